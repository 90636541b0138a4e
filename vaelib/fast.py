r"""The same steps with less overhead: the engine as one compiled function, and several steps as one CUDA graph.

Neither changes what is computed, and neither knows the estimators: :class:`Compiled` traces
:func:`vaelib.objectives.backward` with all that it does (both passes and its hooks), and :class:`Captured` records
whatever a training step launches on a GPU. :class:`vaelib.training.Trainer` uses both if told to ``compile``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from vaelib import objectives
from vaelib.errors import InputError
from vaelib.estimators import Estimator, LossEstimator
from vaelib.posteriors import Latent, map_latent


class Engine(nn.Module):
    """:func:`vaelib.objectives.backward` as a module of its two networks, for ``functional_call``."""

    def __init__(self, estimator: Estimator | LossEstimator, joint: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.estimator, self.joint, self.encoder = estimator, joint, encoder

    def forward(self, x: Tensor, eps: Latent) -> Tensor:
        return objectives.backward(self.estimator, self.joint, self.encoder, x, eps)


class Compiled:
    """Called as :func:`vaelib.objectives.backward` and does the same, to rounding, by ``torch.compile``.

    Forward and backward are traced together, once for each estimator, model and shape; this takes the compiler some
    ten seconds, and saves a tenth to a third of every step after. Where it finds no compiler it warns, once, and goes
    on without.

    Parameters
    ----------
    backend
        of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self.known: dict[object, tuple[Engine, Callable]] = {}
        self.works = True

    def __call__(
        self, estimator: Estimator | LossEstimator, joint: nn.Module, encoder: nn.Module, x: Tensor, eps: Latent
    ) -> Tensor:
        key = (estimator, joint, encoder, x.shape, x.dtype, x.device, map_latent(lambda e: e.shape, eps))
        if self.works and key not in self.known:
            try:
                self.known[key] = compiled(estimator, joint, encoder, x, eps, self.backend)
            except InputError:
                raise
            except Exception as error:  # whatever torch, its backend and the system's compiler find wrong
                self.works = False
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"torch.compile does not work here ({reason}); training goes on without it, to the same end and "
                    "more slowly: install a C++ compiler (g++ or clang) if it is missing, or leave out compile",
                    stacklevel=2,
                )
        if not self.works:
            return objectives.backward(estimator, joint, encoder, x, eps)
        engine, function = self.known[key]
        parameters = dict(engine.named_parameters())
        with torch.no_grad():
            bound, gradients = function({**parameters, **dict(engine.named_buffers())}, x, eps)
            for name, gradient in gradients.items():
                p = parameters[name]
                p.grad = gradient if p.grad is None else p.grad + gradient
        return bound


def compiled(
    estimator: Estimator | LossEstimator,
    joint: nn.Module,
    encoder: nn.Module,
    x: Tensor,
    eps: Latent,
    backend: str = "inductor",
) -> tuple[Engine, Callable]:
    """Return the engine and its compiled form, ``(values, x, eps) -> (bound, gradients by name)``, tried once."""
    if not isinstance(estimator, LossEstimator):
        _ = estimator.automatic, estimator.reparameterised  # found out once, and not while tracing
    engine = Engine(estimator, joint, encoder)

    def gradient(values: dict[str, Tensor], x: Tensor, eps: Latent) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: value.detach().requires_grad_(learns[name]) for name, value in values.items()}
        bound = functional_call(engine, leaves, (x, eps))
        return bound, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    values = {**dict(engine.named_parameters()), **dict(engine.named_buffers())}
    learns = {name: value.requires_grad for name, value in values.items()}
    constants = {name: value.detach().clone() for name, value in values.items()}
    function = torch.compile(make_fx(gradient)(constants, x, eps), dynamic=False, backend=backend)
    with torch.no_grad():
        function(constants, x, eps)
    return engine, function


class Captured:
    """Several training steps as one CUDA graph: the processor starts it, and the GPU does the rest by itself.

    Parameters
    ----------
    step
        takes one step from the numbers of its observations, reads nothing back from the GPU, and returns its bound.
    generators
        all that the step draws from; each replay goes on where the last one ended.
    """

    WARM_UP = 3
    """Steps that torch wants to see on a stream before it captures there."""

    def __init__(self, step: Callable[[Tensor], Tensor], generators: Iterable[torch.Generator]) -> None:
        self.step, self.generators = step, list(generators)
        self.stream, self.warm, self.graph = torch.cuda.Stream(), 0, None

    def __call__(self, index: Tensor) -> Tensor:
        """Take ``len(index)`` steps, always as many as the first time, and return their bounds."""
        if self.warm < self.WARM_UP:
            self.warm += len(index)
            return self.beside(lambda: torch.stack([self.step(row) for row in index]))
        if self.graph is None:
            self.index, self.graph = index.clone(), torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.bounds = torch.stack([self.step(row) for row in self.index])
        self.index.copy_(index)
        self.graph.replay()
        return self.bounds

    def beside(self, work: Callable[[], Tensor]) -> Tensor:
        """Do ``work`` on the capturing stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            done = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return done
