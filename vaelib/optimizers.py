r"""Optimisers: by name, and their steps as pure functions, for :mod:`vaelib.fast` to trace; the limit of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from vaelib.config import Recipe
from vaelib.errors import choose
from vaelib.posteriors import tracing

Values = tuple[Tensor, ...]


class Rule(NamedTuple):
    """What an optimiser does to one parameter, as equations.

    Attributes
    ----------
    memories
        the names of what it remembers, in the state of a ``torch.optim.Optimizer``, besides the number of its "step".
    factors
        ``(t, lr, group) -> numbers``, what the t-th step takes the same of all parameters.
    update
        ``(p, gradient, memories, factors, group) -> p, memories``, the new values.
    """

    memories: tuple[str, ...]
    factors: Callable[[Any, Any, dict], tuple]
    update: Callable[[Tensor, Tensor, Values, tuple, dict], tuple[Tensor, Values]]


# --- Adam -------------------------------------------------------------------------------------------------------------


def adam_factors(t: Any, lr: Any, group: dict) -> tuple:
    r"""Return :math:`\eta / (1 - \beta_1^t)` and :math:`\sqrt{1 - \beta_2^t}`."""
    beta1, beta2 = group["betas"]
    return lr / (1 - beta1**t), (1 - beta2**t) ** 0.5


def adam_update(p: Tensor, gradient: Tensor, memories: Values, factors: tuple, group: dict) -> tuple[Tensor, Values]:
    """Adam (Kingma and Ba 2015, algorithm 1), epsilon outside the root."""
    (mean, square), (beta1, beta2), (rate, root) = memories, group["betas"], factors
    mean = mean + (1 - beta1) * (gradient - mean)
    square = beta2 * square + (1 - beta2) * gradient * gradient
    return p - rate * mean / (square.sqrt() / root + group["eps"]), (mean, square)


# --- Adam, as released ------------------------------------------------------------------------------------------------


def released_factors(t: Any, lr: Any, group: dict) -> tuple:
    r"""Return :math:`\eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`."""
    beta1, beta2 = group["betas"]
    return (lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t),)


def released_update(
    p: Tensor, gradient: Tensor, memories: Values, factors: tuple, group: dict
) -> tuple[Tensor, Values]:
    """The step of :class:`ReleasedAdam`: the moments that move p are those of before."""
    (mean, square), (beta1, beta2), (rate,) = memories, group["betas"], factors
    gradient = gradient * group["scale"]
    moved = p - rate * (mean / (square.sqrt() + group["eps"]))
    return moved, (beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient * gradient)


class ReleasedAdam(torch.optim.Optimizer):
    r"""Adam as it stands in the code released with Burda et al. (2016) and Roeder et al. (2017), not as in their text.

    With the gradient g summed over the batch, :math:`m_0 = 0`, :math:`v_0 = 1`, :math:`\beta_1 = 0.99`,

    .. math::

        \theta_t &= \theta_{t-1} - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{m_{t-1}}{\sqrt{v_{t-1}} + \epsilon}, \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2.

    The moments in the update are those of the step before, so that the first step moves nothing.

    Parameters
    ----------
    params, lr, betas, eps
        as for :class:`torch.optim.Adam`.
    scale
        multiplies the gradient; the batch size turns that of the mean into that of the sum.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.99, 0.999),
        eps: float = 1e-4,
        scale: float = 1.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "scale": scale})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.ones_like(p)}
                state["step"] += 1
                memories = state["mean"], state["square"]
                factors = released_factors(state["step"].item(), group["lr"], group)
                moved, new = released_update(p, p.grad, memories, factors, group)
                for old, value in zip((p, *memories), (moved, *new), strict=True):
                    old.copy_(value)


# --- gradient descent -------------------------------------------------------------------------------------------------


def sgd_factors(t: Any, lr: Any, group: dict) -> tuple:
    """Return the learning rate."""
    return (lr,)


def sgd_update(p: Tensor, gradient: Tensor, memories: Values, factors: tuple, group: dict) -> tuple[Tensor, Values]:
    """Gradient descent."""
    return p - factors[0] * gradient, ()


RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.Adam: Rule(("exp_avg", "exp_avg_sq"), adam_factors, adam_update),
    ReleasedAdam: Rule(("mean", "square"), released_factors, released_update),
    torch.optim.SGD: Rule((), sgd_factors, sgd_update),
}
"""The steps of the optimisers in :data:`OPTIMIZERS`."""

# --- the limit of a gradient ------------------------------------------------------------------------------------------

Parts = Sequence[Tensor]


def norm_of_all(parts: Parts, order: float = 2) -> Tensor:
    """Return the norm of all ``parts`` together, ``[]``."""
    return vector_norm(torch.stack([vector_norm(part, order) for part in parts]), order)


def norm_of_each(parts: Parts, order: float = 2) -> Tensor:
    """Return the norm of each training's share of ``parts``, whose axis 0 is the trainings', ``[S]``."""
    return vector_norm(torch.stack([vector_norm(part.flatten(1), order, dim=1) for part in parts]), order, dim=0)


def shrinkage(parts: Parts, limit: float, norm: Callable[..., Tensor] = norm_of_all) -> Tensor:
    r"""Return what brings the norm of ``parts`` down to a limit c, :math:`\min(1, c / \|g\|)`.

    From about 1e19 on, the square of a number is infinite in single precision, and so would be the norm: the factor
    would be 0, and no step would move anything any more, as with :func:`torch.nn.utils.clip_grad_norm_`. There the
    largest number is taken out of the norm first.
    """
    parts = [part.coalesce().values() if part.is_sparse else part for part in parts]
    plain = (limit / (norm(parts) + 1e-6)).clamp(max=1.0)
    if not tracing() and not plain.is_cuda and bool((plain > 0).all()):
        return plain
    parts = [part for part in parts if part.numel()]
    largest = norm(parts, torch.inf)
    scaled = [part / along_axis_0(largest, part) for part in parts]
    return torch.where(plain > 0, plain, (limit / norm(scaled) / largest).clamp(max=1.0))


def along_axis_0(factor: Tensor, part: Tensor) -> Tensor:
    """Return a factor, ``[]`` or ``[S]``, in a shape that multiplies ``part`` along its axis 0."""
    return factor.view((*factor.shape, *[1] * (part.ndim - factor.ndim)))


def clip_gradient(parameters: Iterable[Tensor], limit: float, norm: Callable[..., Tensor] = norm_of_all) -> None:
    """Limit the norm of the gradient of all ``parameters`` together, or of each training's, in place."""
    if slopes := [p.grad for p in parameters if p.grad is not None]:
        factor = shrinkage(slopes, limit, norm)
        for slope in slopes:
            slope.mul_(along_axis_0(factor, slope))


class Limited(torch.autograd.Function):
    """The identity; on the way back it brings the norm of the gradient in all of its tensors down to a limit."""

    @staticmethod
    def forward(limit: float, *tensors: Tensor) -> Values:
        """Return ``tensors``."""
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Values) -> None:
        """Keep the limit."""
        ctx.limit = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the slopes times one factor, which is held constant; None for a tensor that counts for nothing."""
        factor = shrinkage([slope.detach() for slope in slopes if slope is not None], ctx.limit)
        return (None, *(slope if slope is None else factor * slope for slope in slopes))


# --- by name ----------------------------------------------------------------------------------------------------------


def dense(p: Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order: then fused Adam, which runs through that, is right."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def adam(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015), as the papers describe their training."""
    fused, on_gpu = all(map(dense, parameters)), parameters[0].is_cuda
    return torch.optim.Adam(parameters, recipe.lr, eps=recipe.adam_eps, fused=fused, capturable=on_gpu)


def adam_released(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam as in the papers' released code."""
    return ReleasedAdam(parameters, recipe.lr, eps=recipe.adam_eps, scale=recipe.batch_size)


def sgd(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Stochastic gradient descent."""
    return torch.optim.SGD(parameters, recipe.lr)


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], Recipe], torch.optim.Optimizer]] = {
    "adam": adam,
    "adam-released": adam_released,
    "sgd": sgd,
}
"""Optimisers by name, built from the parameters and the recipe."""


def build_optimizer(parameters: Iterable[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser; a parameter that is a view with gaps or overlaps gets memory of its own first."""
    parameters = list(parameters)
    for p in parameters:
        if not dense(p):
            p.data = p.data.clone(memory_format=torch.contiguous_format)
    return choose("optimizer", recipe.optimizer, OPTIMIZERS)(parameters, recipe)
