r"""Checks of what the book claims, each of which can fail.

A check takes draws, compares them with the truth or with each other, and either raises AssertionError with the figures
or prints one line that is the same on every machine. ``what``, the sentence that it prints, is also its name: it says
what is claimed and nothing of the outcome, and stays the same whatever the seed.

Statistical checks are in units of standard errors, and "(4 s.e.)" means: as rare by chance as a normal variable 4
standard deviations from its mean, once in 16,000 two-sided, for the whole check, however few its draws and however
many its coordinates (:func:`normal_equivalent`). See the page "How this book checks itself".
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIGMAS = 4.0
"""The width of every statistical check, in standard errors."""

MANY = 100
"""Draws from which on their skewness is estimated; fewer are taken as normal."""

HEAVY = 0.9
"""Skewness of a mean of many draws from which on a single one of them decides."""

ERROR_RATE = 1e-4
"""How often, at most, a check of something random fails although its claim is true."""


# --- what a check is --------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What a statement comes to: whether it holds, the standard errors left before it would not, and the sentence."""

    holds: bool
    margin: float | None
    said: str


class Outcome(NamedTuple):
    """A check that was made: its name and kind, its verdict, and the error rate that its kind states."""

    name: str
    kind: str
    holds: bool
    margin: float | None
    rate: float
    said: str


KINDS: dict[str, float] = {}
"""Every kind of check and the error rate that it states, 0 where nothing is left to chance."""

_record: ContextVar[list[Outcome] | None] = ContextVar("record", default=None)


@contextmanager
def recorded() -> Iterator[list[Outcome]]:
    """Within it checks neither print nor raise: each adds its :class:`Outcome` to the list."""
    outcomes: list[Outcome] = []
    with _recording(outcomes):
        yield outcomes


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within it checks print and raise again."""
    with _recording(None):
        yield


@contextmanager
def _recording(outcomes: list[Outcome] | None) -> Iterator[None]:
    token = _record.set(outcomes)
    try:
        yield
    finally:
        _record.reset(token)


def check(rate: float) -> Callable[[Callable[..., Verdict]], Callable[..., None]]:
    """Make a check that states the error rate ``rate`` of a function that returns a verdict and takes ``what``."""

    def decorate(statement: Callable[..., Verdict]) -> Callable[..., None]:
        kind, signature = statement.__name__, inspect.signature(statement)
        KINDS[kind] = rate

        @functools.wraps(statement)
        def checked(*args, **options) -> None:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            name = bound.arguments["what"]
            try:
                verdict = statement(*args, **options)
            except AssertionError as refusal:
                verdict = Verdict(False, None, str(refusal))
            if (outcomes := _record.get()) is not None:
                outcomes.append(Outcome(name, kind, verdict.holds, verdict.margin, rate, verdict.said))
                return
            if not verdict.holds:
                raise AssertionError(verdict.said)
            print(f"ok: {verdict.said}")

        return checked

    return decorate


# --- means, their errors, and how rare they are -----------------------------------------------------------------------


def noisy(draws: Tensor, what: str) -> Tensor:
    """Return ``draws`` ``[S, ...]`` as floats, or refuse what no statement can be made of: nothing, one, NaN.

    Raises
    ------
    AssertionError
        if there are fewer than two draws, no coordinates, numbers that are not finite, or all draws are the same.
    """
    draws = _draws(draws, what)
    assert (draws != draws[0]).any(), f"{what}: there is no noise in these {len(draws)} draws: compare them with `same`"
    return draws


def _draws(draws: Tensor, what: str) -> Tensor:
    draws = torch.as_tensor(draws).detach()
    assert not draws.is_complex(), f"{what}: draws must be real numbers, but are {draws.dtype}"
    draws = draws if draws.is_floating_point() else draws.double()
    assert draws.ndim and len(draws) > 1, (
        f"{what}: a standard error needs at least 2 draws, not shape {list(draws.shape)}"
    )
    assert draws.numel(), f"{what}: there is nothing to check in draws of the shape {list(draws.shape)}"
    assert draws.isfinite().all(), f"{what}: {int((~draws.isfinite()).sum())} of {draws.numel()} numbers are not finite"
    return draws


def _pairs(first: Tensor, second: Tensor, what: str) -> tuple[Tensor, Tensor]:
    first, second = _draws(first, what), _draws(second, what)
    assert first.shape == second.shape, f"{what}: pairs have one shape, not {list(first.shape)}, {list(second.shape)}"
    return first, second


def _rounding(draws: Tensor) -> Tensor:
    """What a coordinate of ``draws`` ``[S, ...]``, or of their mean, may be off by float rounding."""
    return 100 * torch.finfo(draws.dtype).eps * draws.abs().amax(0)


class Estimate(NamedTuple):
    """A mean (or a difference of means), its standard error, its skewness, and the degrees of freedom of its error."""

    mean: Tensor
    error: Tensor
    skewness: Tensor
    freedom: float


def estimate(draws: Tensor) -> Estimate:
    r"""Return the mean over the first axis of ``draws`` ``[S, ...]`` as an estimate; its skewness is that of the draws
    by :math:`\sqrt S`.
    """
    mean, error = mean_and_error(draws)
    deviations = draws - mean
    spread = deviations.square().mean(0).sqrt()
    skewness = (deviations / spread.clamp_min(torch.finfo(draws.dtype).tiny)).pow(3).mean(0)
    return Estimate(mean, error, skewness / len(draws) ** 0.5, len(draws) - 1)


def normal_equivalent(distance: Tensor, found: Estimate, what: str = "mean", coordinates: int = 1) -> Tensor:
    r"""Return ``distance``, an estimate less what it should be, as the normal deviate that is as rare by chance.

    With t = distance / error, few draws are taken as normal and t as Student's, with the degrees of freedom of the
    error. From :data:`MANY` on, t is made symmetric first, by Hall's transform for a skewness :math:`s` of the estimate
    (1992, "On the removal of skewness by transformation"),

    .. math:: t + \tfrac13 s t^2 + \tfrac1{27} s^2 t^3 + \tfrac16 s .

    The probability of what lies beyond is multiplied by ``coordinates``, among which the largest was picked.

    Raises
    ------
    AssertionError
        where one draw makes up the spread of many: the skewness of their mean, at most 1, is over :data:`HEAVY`.
    """
    from scipy import special  # it adds a warning filter when imported

    t = torch.where(distance == 0, distance, distance / found.error).clamp(-1e6, 1e6).double()
    if found.freedom >= MANY - 1:
        s = found.skewness.double()
        assert (s.abs() < HEAVY).all(), (
            f"{what}: one of {found.freedom + 1:.0f} draws outweighs all others, so that their error says nothing: "
            "take many more, or bound what is averaged"
        )
        t = t + s * t**2 / 3 + s**2 * t**3 / 27 + s / 6
    tail = np.clip(coordinates * special.stdtr(found.freedom, -t.abs().numpy()), 1e-300, 0.5)
    return t.sign() * torch.as_tensor(-special.ndtri(tail))


def mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the first axis of ``draws`` ``[S, ...]`` and its standard error."""
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


def total_variance(draws: Tensor) -> tuple[float, float]:
    r"""Return the trace of the covariance of ``draws`` ``[S, ...]`` and the standard error of that estimate."""
    found = _variance(draws)
    return found.mean.item(), found.error.item()


def _variance(draws: Tensor) -> Estimate:
    squares = (draws - draws.mean(0)).square().reshape(len(draws), -1).sum(1)
    found = estimate(squares)
    return found._replace(mean=found.mean * len(draws) / (len(draws) - 1))


def _less(high: Estimate, low: Estimate) -> Estimate:
    """Return the difference of two independent estimates, with Welch's degrees of freedom."""
    squares = high.error**2 + low.error**2
    error = squares.sqrt()
    third = high.skewness * high.error**3 - low.skewness * low.error**3
    freedom = squares**2 / (high.error**4 / high.freedom + low.error**4 / low.freedom)
    return Estimate(high.mean - low.mean, error, third / error**3, freedom.item())


def _off(draws: Tensor, exact: Tensor | float, what: str) -> Estimate:
    """Return the mean of ``draws`` less ``exact``, an error no smaller than rounding."""
    exact = torch.as_tensor(exact, dtype=draws.dtype).detach()
    assert exact.ndim == 0 or exact.shape == draws.shape[1:], (
        f"{what}: the exact value has the shape {list(exact.shape)}, but a draw {list(draws.shape[1:])}"
    )
    assert exact.isfinite().all(), f"{what}: the exact value is not finite"
    found = estimate(draws)
    rounding = torch.maximum(_rounding(draws), _rounding(exact.expand(draws.shape[1:])[None]))
    return found._replace(mean=found.mean - exact, error=torch.maximum(found.error, rounding))


def z_scores(draws: Tensor, exact: Tensor | float) -> Tensor:
    """Return how many standard errors (float rounding, where there is no spread) each mean is from ``exact``."""
    off = _off(_draws(draws, "mean"), exact, "mean")
    return torch.where(off.mean == 0, 0, off.mean.abs() / off.error)


# --- the checks -------------------------------------------------------------------------------------------------------


def _deviate(draws: Tensor, exact: Tensor | float, what: str) -> tuple[float, Estimate]:
    """Return the normal deviate of the worst coordinate, out of all of them."""
    off = _off(noisy(draws, what), exact, what)
    return normal_equivalent(off.mean, off, what, off.mean.numel()).abs().max().item(), off


@check(ERROR_RATE)
def unbiased(draws: Tensor, exact: Tensor | float, what: str = "mean") -> Verdict:
    """Check that the mean of ``draws`` ``[S, ...]`` is within 4 standard errors of ``exact`` in each coordinate.

    It prints the smallest bias that would show: found 98 times in 100, in the coordinate where it is hardest to see.
    """
    z, off = _deviate(draws, exact, what)
    if z > SIGMAS:
        worst = (off.mean.abs() / off.error).max()
        return Verdict(False, SIGMAS - z, f"{what}: off by {worst:.1f} standard errors of {len(draws)} draws")
    least = _rounded_up(_least_bias(off).max().item())
    where = f" in all {off.mean.numel()} coordinates" if off.mean.numel() > 1 else ""
    return Verdict(True, SIGMAS - z, f"{what} is right{where} (4 s.e.; a bias of {least} would show)")


def _least_bias(off: Estimate) -> Tensor:
    """Return the bias of each coordinate that is found 98 times in 100, on the side where it is harder to see."""
    from scipy import special

    width = -special.stdtrit(off.freedom, special.ndtr(-SIGMAS) / off.mean.numel())
    beyond = special.nctdtrinc(off.freedom, 0.02, width) - width
    if off.freedom >= MANY - 1:  # Hall's transform, solved for t
        s = off.skewness.abs().clamp_min(1e-6)
        cube = 1 - s * (width + s / 6)
        width = 3 / s * (1 - cube.sign() * cube.abs() ** (1 / 3))
    return (width + beyond) * off.error


def _rounded_up(value: float) -> str:
    """Return a positive number with one significant digit, not below ``value``."""
    unit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / unit) * unit:.1g}"


@check(ERROR_RATE)
def biased(draws: Tensor, exact: Tensor | float, what: str = "mean") -> Verdict:
    """Check that the mean of ``draws`` ``[S, ...]`` is more than 4 standard errors from ``exact`` somewhere."""
    z, _ = _deviate(draws, exact, what)
    if z > SIGMAS:
        return Verdict(True, z - SIGMAS, f"{what} is wrong (4 s.e.)")
    return Verdict(False, z - SIGMAS, f"{what}: only {z:.1f} standard errors away with {len(draws)} draws")


@check(ERROR_RATE)
def less_variance(quiet: Tensor, noisier: Tensor, factor: float = 1.0, what: str = "variance") -> Verdict:
    """Check that ``quiet`` has less total variance than ``noisier`` / ``factor``, by more than 4 standard errors.

    ``quiet`` may have no variance at all.
    """
    quiet, noisier = _draws(quiet, what), _draws(noisier, what)
    assert quiet.shape[1:] == noisier.shape[1:], (
        f"{what}: draws of the shapes {list(quiet.shape)} and {list(noisier.shape)} have other coordinates"
    )
    assert 0 < factor < math.inf, f"{what}: the factor must be a positive number, but is {factor}"
    assert min(len(quiet), len(noisier)) >= 10, f"{what}: the error of a variance needs at least 10 draws"
    low, high = _variance(quiet), _variance(noisier)
    scaled = low._replace(mean=factor * low.mean, error=factor * low.error)
    assert high.error > 0 or low.error > 0, f"{what}: {low.mean:.3g} against {high.mean:.3g}, a gap of 0 ± 0"
    gap = _less(high, scaled)
    z = normal_equivalent(gap.mean, gap, what).item()
    if z > SIGMAS:
        times = "less" if factor == 1 else f"more than {factor:g} times less"
        return Verdict(True, z - SIGMAS, f"{what} is {times} (4 s.e.)")
    return Verdict(
        False,
        z - SIGMAS,
        f"{what}: {low.mean:.3g} against {high.mean:.3g}, a gap of {gap.mean:.3g} ± {gap.error:.3g}",
    )


@check(ERROR_RATE)
def below(low: Tensor, high: Tensor, what: str = "mean") -> Verdict:
    """Check that the mean of ``low`` ``[S]`` is below that of ``high`` ``[S]``, paired, by over 4 standard errors."""
    low, high = _pairs(low, high, what)
    assert low.ndim == 1, f"{what}: one number a pair, not {list(low.shape[1:])}"
    gap = estimate(noisy(high - low, what))
    z = normal_equivalent(gap.mean, gap, what).item()
    said = (
        f"{what} (4 s.e.)"
        if z > SIGMAS
        else f"{what}: a gap of {gap.mean:.3g} ± {gap.error:.3g} in {len(low)} pairs, {z:.1f} standard errors"
    )
    return Verdict(z > SIGMAS, z - SIGMAS, said)


@check(0.0)
def no_variance(draws: Tensor, what: str = "variance", scale: Tensor | float = 0.0) -> Verdict:
    """Check that all ``draws`` ``[S, ...]`` are the same number in each coordinate, up to float rounding.

    Rounding is that of the coordinate's own size, or of ``scale``, the size of the terms that cancel in it, if larger.
    """
    draws = _draws(draws, what)
    spread = (draws - draws.mean(0)).abs().amax(0)
    size = torch.maximum(draws.abs().amax(0), _size(scale, what).to(draws.dtype))
    wide = spread > 1e4 * torch.finfo(draws.dtype).eps * size
    if wide.any():
        return Verdict(False, None, f"{what}: draws differ by {spread[wide].max():.3g}{_CANCELLED}")
    return Verdict(True, None, f"{what} is zero")


@check(0.0)
def same(first: Tensor, second: Tensor, what: str = "values", scale: float = 0.0) -> Verdict:
    """Check that two computations of one thing agree to float rounding, number by number.

    Rounding is that of the number itself, or of ``scale``, the size of the terms that cancel in it, if larger.
    """
    first, second = torch.as_tensor(first).detach(), torch.as_tensor(second).detach()
    assert first.numel(), f"{what}: there is nothing to compare"
    assert first.isfinite().all() and second.isfinite().all(), f"{what}: a number is not finite"
    relative, scale = max(_RELATIVE.get(each.dtype, 0.0) for each in (first, second)), _size(scale, what).item()
    torch.testing.assert_close(
        first, second, rtol=relative, atol=relative * scale, msg=lambda message: f"{what}: {message}{_CANCELLED}"
    )
    return Verdict(True, None, f"{what} agree")


def _size(scale: Tensor | float, what: str) -> Tensor:
    """Return ``scale`` as a tensor; what is not finite would let everything pass."""
    scale = torch.as_tensor(scale).detach()
    assert scale.isfinite().all() and (scale >= 0).all(), f"{what}: scale must be finite and not below 0: {scale}"
    return scale


_CANCELLED = " (where larger terms cancel, say how large: scale=...)"
_RELATIVE = {torch.float64: 1e-7, torch.float32: 1.3e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


@check(ERROR_RATE)
def equivalent(first: Tensor, second: Tensor, within: float, what: str = "mean") -> Verdict:
    """Check that the means of ``first`` and ``second`` ``[S, ...]``, paired, differ by less than ``within``.

    The whole interval of 4 standard errors around their difference must lie inside of the margin, the smallest
    difference that would matter: noise alone does not show that two things are the same.
    """
    first, second = _pairs(first, second, what)
    assert 0 < within < math.inf, f"{what}: the margin is the smallest difference that would matter, and not {within}"
    gap = estimate(noisy(first - second, what))
    inside = torch.minimum(*(normal_equivalent(within + sign * gap.mean, _turned(gap, sign), what) for sign in (1, -1)))
    margin = inside.min().item() - SIGMAS
    if margin > 0:
        return Verdict(True, margin, f"{what} is the same to {within:g} (4 s.e.)")
    beyond = normal_equivalent(gap.mean.abs() - within, _turned(gap, gap.mean.sign()), what).max() > SIGMAS
    verdict = "different" if beyond else "undecided"
    most = gap.mean.abs().argmax()
    mean, error = gap.mean.flatten()[most], gap.error.flatten()[most]
    return Verdict(
        False, margin, f"{what}: {verdict}, {mean:.3g} ± {error:.3g} in {len(first)} pairs, with a margin of {within:g}"
    )


def _turned(found: Estimate, sign: Tensor | int) -> Estimate:
    """Return the estimate of the same quantity times ``sign``, a 1 or a -1."""
    return found._replace(mean=sign * found.mean, skewness=sign * found.skewness)


@check(ERROR_RATE)
def holds(condition: bool | Tensor, what: str) -> Verdict:
    """Check a plain statement: True, or a list, tensor, array or series of which each one is True, and not none.

    ``checks.holds([low < high for ...], ...)``, without ``all``: of nothing at all everything is true.
    """
    values = np.asarray(condition)
    assert values.dtype == bool, f"{what}: a statement is True or False, not {condition!r}"
    assert values.size, f"{what}: there is nothing to check"
    if values.all():
        return Verdict(True, None, what)
    where = f" ({int((~values).sum())} of {values.size} do not)" if values.size > 1 else ""
    return Verdict(False, None, f"does not hold: {what}{where}")
