r"""The same steps with less overhead: the engine as one compiled function, and several steps as one CUDA graph.

Neither changes what is computed, and neither knows the estimators: :class:`Compiled` traces forward and backward of an
estimator's loss together, hooks and all, and :class:`Captured` records whatever a training step launches on a GPU.
:class:`vaelib.training.Training` uses both if told to ``compile``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from vaelib import objectives
from vaelib.estimators import Estimator
from vaelib.posteriors import Latent, map_latent

MOST_TRACES = 8
"""Of one model with one estimator and one shape of batch: what changes more often is not worth the compiler's time."""


class Compiled:
    """Called as :func:`vaelib.training.backward` and does the same, to rounding, by ``torch.compile``.

    Forward and backward are traced together, once for each estimator, model, shape, and state of the model's settings
    (see :func:`settings`); this takes the compiler some ten seconds, and saves a tenth to a third of every step after.
    Where it finds no compiler it warns, once, and goes on without.

    Parameters
    ----------
    backend
        of ``torch.compile``; "eager" runs what was traced as it is, without a compiler.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self.traces: dict[object, list[Trace]] = {}
        self.works = True

    def __call__(self, estimator: Estimator, model: nn.Module, x: Tensor, eps: Latent) -> Tensor:
        if self.works:
            try:
                return self.find(estimator, model, x, eps)(x, eps)
            except Untraceable as error:
                self.works = False
                warnings.warn(
                    f"torch.compile does not work here ({error}); training goes on without it, to the same end and "
                    "more slowly: install a C++ compiler (g++ or clang) if it is missing, or leave out compile",
                    stacklevel=2,
                )
        return objectives.backward(estimator, model.joint, model.encoder(x), x, eps)

    def find(self, estimator: Estimator, model: nn.Module, x: Tensor, eps: Latent) -> Trace:
        """Return the trace for this call, made now if none of the known ones is of the model as it is."""
        noise = map_latent(lambda e: (e.shape, e.dtype), eps)
        world = torch.get_default_dtype(), torch.is_autocast_enabled(x.device.type)
        key = (estimator, model, x.shape, x.dtype, x.device, noise, world)
        known = self.traces.setdefault(key, [])
        for trace in known:
            if trace.holds():
                return trace
        if len(known) == MOST_TRACES:
            raise Untraceable(f"a setting of the model has changed {MOST_TRACES} times")
        known.append(Trace(estimator, model, x, eps, self.backend))
        return known[-1]


class Untraceable(Exception):
    """Torch, its backend or the system's compiler cannot do it."""


class Trace:
    """One compiled step: ``(x, eps) -> bound``, which adds the gradient of ``-bound.mean()`` to ``.grad``."""

    def __init__(self, estimator: Estimator, model: nn.Module, x: Tensor, eps: Latent, backend: str) -> None:
        self.engine = engine = objectives.Objective(estimator, model.joint, model.encoder)
        self.settings = [(module, settings(module)) for module in engine.modules()]
        self.parameters = dict(engine.named_parameters())
        self.buffers = dict(engine.named_buffers())
        self.learns = [p.requires_grad for p in self.parameters.values()]
        names = [name for name, p in self.parameters.items() if p.requires_grad]

        def gradient(values: dict[str, Tensor], x: Tensor, eps: Latent) -> tuple[Tensor, dict[str, Tensor]]:
            leaves = {name: value.detach().requires_grad_(name in names) for name, value in values.items()}
            loss = functional_call(engine, leaves, (x, eps))
            wrt = [leaves[name] for name in names] if loss.requires_grad else []
            grads = torch.autograd.grad(loss.mean(), wrt, allow_unused=True) if wrt else ()
            return -loss.detach(), {name: grad for name, grad in zip(names, grads) if grad is not None}

        constants = {name: value.detach().clone() for name, value in (self.parameters | self.buffers).items()}
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            gradient(constants, x, eps)  # what is wrong with the model is told here, and not by the compiler
            try:
                graph = make_fx(gradient)(constants, x, eps)
                self.function = graph if backend == "eager" else torch.compile(graph, dynamic=False, backend=backend)
                with torch.no_grad():
                    self.function(constants, x, eps)
            except Exception as error:  # whatever torch, its backend and the system's compiler find wrong
                raise Untraceable((str(error).strip() or type(error).__name__).splitlines()[0]) from error

    def holds(self) -> bool:
        """Whether the model is still as it was traced."""
        return all(same(module.__dict__, then) for module, then in self.settings) and self.learns == [
            p.requires_grad for p in self.parameters.values()
        ]

    @torch.no_grad()
    def __call__(self, x: Tensor, eps: Latent) -> Tensor:
        bound, gradients = self.function({**self.parameters, **self.buffers}, x, eps)
        for name, gradient in gradients.items():
            p = self.parameters[name]
            if gradient.stride() != p.stride():  # fused optimisers run through memory
                gradient = torch.empty_like(p).copy_(gradient)
            p.grad = gradient if p.grad is None else p.grad + gradient
        return bound


def settings(module: nn.Module) -> dict[str, Any]:
    """Return all that a trace of ``module`` takes for constant: mode, parts, and every attribute, as it is now."""
    return {k: copy.copy(v) if isinstance(v, dict | list | set) else v for k, v in module.__dict__.items()}


def same(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Whether two records of a module's settings are the same; a tensor in the place of another one is not."""
    try:
        return now == then
    except (RuntimeError, ValueError):  # two tensors or arrays have no one answer
        return False


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
