r"""What the estimators ask of a joint density: log p(x, z), one value for each draw of each observation.

A sum or a mean over the wrong axis often has the right shape, since it broadcasts. So every new joint is tried once: a
value that is not that of its own draw and observation alone changes with the others.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vaelib.bounds import shaped
from vaelib.errors import InputError
from vaelib.posteriors import Latent, layers_of, map_latent, modules_in, tracing, undisturbed, version

TRIED: weakref.WeakKeyDictionary[Any, set[bool]] = weakref.WeakKeyDictionary()
"""The joints that were tried, by what they are called from, and in which modes."""


def log_joint(joint: Callable[..., Tensor], x: Tensor, z: Latent) -> Tensor:
    """Return ``joint(x, z)``, ``[K, B]``.

    Raises
    ------
    InputError
        if it is of another shape, if x or z is another one then, or if draws or observations are mixed up in it, which
        is tried once.
    """
    given = () if tracing() else (x, *layers_of(z))
    before = [version(part) for part in given]
    log_p = joint(x, z)
    if [version(part) for part in given] != before:
        raise InputError(
            "joint(x, z) changes x or z in place, which q and the other estimators see too: leave them as they are, "
            "such as z * 2 for z.mul_(2), or ReLU() for ReLU(inplace=True)"
        )
    log_p = shaped("joint(x, z)", "log p(x, z)", log_p, x, z)
    if log_p.numel() > 1 and not tracing():
        once(try_out, joint, x, z, log_p)
    return log_p


def log_weight(joint: Callable[..., Tensor], x: Tensor, z: Latent, log_q: Tensor) -> Tensor:
    r"""Return :math:`\log w = \log p_\theta(x, z) - \log q`, ``[K, B]``.

    Raises
    ------
    InputError
        if one of the two has another shape.
    """
    return log_joint(joint, x, z) - log_posterior(log_q, x, z)


def log_posterior(log_q: Tensor, x: Tensor, z: Latent) -> Tensor:
    """Return ``log_q``, or raise InputError if it is not of the shape ``[K, B]``."""
    return shaped("log_prob(z)", "log q(z)", log_q, x, z)


# --- the trial --------------------------------------------------------------------------------------------------------


def once(trial: Callable[..., None], joint: Callable[..., Tensor], *given: Any) -> None:
    """Make a trial of each object in each of its modes, and of all functions of the same code, until it is passed."""
    source = joint
    while isinstance(source, partial):
        source = source.func
    source = source.__self__ if isinstance(source, types.MethodType) else source
    source = source.__code__ if isinstance(source, types.FunctionType) else source
    mode = isinstance(source, nn.Module) and source.training
    try:
        passed = TRIED.setdefault(source, set())
    except TypeError:  # no object that can be a key
        passed = TRIED.setdefault(type(source), set())
    if mode not in passed:
        trial(joint, *given)
        passed.add(mode)


def try_out(joint: Callable[..., Tensor], x: Tensor, z: Latent, log_p: Tensor) -> None:
    """Raise InputError if ``joint``, which returned ``log_p``, mixes draws or observations up, in evaluation mode too.

    (Batch normalisation that trains does by intention.) It is called again only where its gradient does not tell that
    it leaves them apart; one that cannot be called with fewer draws is left alone.
    """
    at, live = (0, 0), [layer for layer in layers_of(z) if layer.requires_grad]
    if log_p.requires_grad and len(live) == len(layers_of(z)):
        slopes = torch.autograd.grad(log_p[at], live, retain_graph=True, allow_unused=True)
        if not any(slope.count_nonzero() > slope[at].count_nonzero() for slope in slopes if slope is not None):
            return
    z, modules = map_latent(lambda layer: layer[:2].detach(), z), list(modules_in(joint))
    try:
        mixed = mixes(joint, modules, x, z, at) and mixes(joint, modules, x, z, at, evaluating=True)
    except Exception:  # whatever it asks of the number of draws
        return
    if mixed:
        raise InputError(mixed_up(at))


def mixed_up(at: tuple[int, int]) -> str:
    """Return the sentence for a joint whose value of one draw changes with the others."""
    return (
        f"joint(x, z){list(at)} changes with other draws or observations than z{list(at)} and x[{at[1]}]: see over "
        "which axis it sums or takes a mean, and that batch norm is in eval()"
    )


def mixes(
    joint: Callable[..., Tensor],
    modules: Sequence[nn.Module],
    x: Tensor,
    z: Latent,
    at: tuple[int, int],
    evaluating: bool = False,
) -> bool:
    """Whether log p(x, z) of draw ``at[0]`` of observation ``at[1]`` changes if all others are exchanged.

    ``modules`` are those in the joint. It draws the same random numbers in each call; one that is another in each call
    all the same does not count.
    """
    x_other = x.roll(1, 0)
    x_other[at[1]] = x[at[1]]

    def exchanged(layer: Tensor) -> Tensor:
        other = layer.roll((1, 1), (0, 1))
        other[at] = layer[at]
        return other

    def value(x: Tensor, z: Latent) -> Tensor:
        with torch.no_grad(), undisturbed(modules, x.device, evaluating):
            return joint(x, z)[at]

    before = value(x, z)
    return not close(value(x_other, map_latent(exchanged, z)), before) and close(value(x, z), before)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of one thing agree, infinities and all; float32 may lose some digits on the way."""
    a, b = a.detach(), b.detach()
    digits, size = 1e3 * torch.finfo(a.dtype).eps, b[b.isfinite()].abs().flatten()
    return torch.allclose(a, b, digits, digits * torch.cat([b.new_ones(1), size]).max().item(), equal_nan=True)
