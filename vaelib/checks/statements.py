r"""Checks of what the book claims, each of which can fail.

A check takes draws, compares them with the truth or with each other, and either raises AssertionError with the figures
or prints one line that is the same on every machine; "(4 s.e.)" in it means: to 4 standard errors. Statistical checks
are in units of standard errors: a coordinate whose claim is true fails a two-sided check at 4 standard errors once in
16,000 times, and once and for all, since every seed is fixed. See the page "How this book checks itself".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGMAS = 4.0
"""The width of every statistical check, in standard errors."""


def noisy(draws: Tensor, what: str) -> Tensor:
    """Return ``draws`` ``[S, ...]`` as floats, or refuse what no statement can be made of: nothing, one, NaN.

    Raises
    ------
    AssertionError
        if there are fewer than two draws, no coordinates, or numbers that are not finite.
    """
    draws = torch.as_tensor(draws)
    draws = draws if draws.is_floating_point() else draws.double()
    assert draws.ndim and len(draws) > 1, (
        f"{what}: a standard error needs at least 2 draws, not shape {list(draws.shape)}"
    )
    assert draws.numel(), f"{what}: there is nothing to check in draws of the shape {list(draws.shape)}"
    assert draws.isfinite().all(), f"{what}: {int((~draws.isfinite()).sum())} of {draws.numel()} numbers are not finite"
    return draws


def _alike(first: Tensor, second: Tensor, what: str) -> None:
    """Refuse two sets of draws whose coordinates are not the same: they would be compared crosswise."""
    assert first.shape[1:] == second.shape[1:], (
        f"{what}: draws of the shapes {list(first.shape)} and {list(second.shape)} have other coordinates"
    )


def mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the first axis of ``draws`` ``[S, ...]`` and its standard error."""
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


def total_variance(draws: Tensor) -> tuple[float, float]:
    r"""Return the trace of the covariance of ``draws`` ``[S, ...]`` and the standard error of that estimate."""
    squares = (draws - draws.mean(0)).square().reshape(len(draws), -1).sum(1)
    mean, error = mean_and_error(squares)
    return mean.item() * len(draws) / (len(draws) - 1), error.item()


def z_scores(draws: Tensor, exact: Tensor | float, what: str = "mean") -> Tensor:
    """Return how many standard errors (float rounding, where there is no spread) each mean is from ``exact``."""
    draws = noisy(draws, what)
    exact = torch.as_tensor(exact, dtype=draws.dtype)
    assert exact.ndim == 0 or exact.shape == draws.shape[1:], (
        f"{what}: the exact value has the shape {list(exact.shape)}, but a draw {list(draws.shape[1:])}"
    )
    assert exact.isfinite().all(), f"{what}: the exact value is not finite"
    mean, error = mean_and_error(draws)
    rounding = 100 * torch.finfo(draws.dtype).eps * draws.abs().amax(0).clamp_min(1)
    return (mean - exact).abs() / torch.maximum(error, rounding)


def unbiased(draws: Tensor, exact: Tensor | float, what: str = "mean") -> None:
    """Check that the mean of ``draws`` ``[S, ...]`` is within 4 standard errors of ``exact`` in each coordinate."""
    scores = z_scores(draws, exact, what)
    assert (scores <= SIGMAS).all(), f"{what}: off by {scores.max():.1f} standard errors of {len(draws)} draws"
    where = f" in all {scores.numel()} coordinates" if scores.numel() > 1 else ""
    print(f"ok: {what} is right{where} (4 s.e.)")


def biased(draws: Tensor, exact: Tensor | float, what: str = "mean") -> None:
    """Check that the mean of ``draws`` ``[S, ...]`` is more than 4 standard errors from ``exact`` somewhere."""
    scores = z_scores(draws, exact, what)
    assert (scores > SIGMAS).any(), f"{what}: only {scores.max():.1f} standard errors away with {len(draws)} draws"
    print(f"ok: {what} is wrong (4 s.e.)")


def less_variance(quiet: Tensor, noisier: Tensor, factor: float = 1.0, what: str = "variance") -> None:
    """Check that ``quiet`` has less total variance than ``noisier`` / ``factor``, by more than 4 standard errors."""
    quiet, noisier = noisy(quiet, what), noisy(noisier, what)
    _alike(quiet, noisier, what)
    assert min(len(quiet), len(noisier)) >= 10, f"{what}: the error of a variance needs at least 10 draws"
    (low, low_error), (high, high_error) = total_variance(quiet), total_variance(noisier)
    gap, error = high - factor * low, (high_error**2 + (factor * low_error) ** 2) ** 0.5
    assert gap > SIGMAS * error, f"{what}: {low:.3g} against {high:.3g}, a gap of {gap:.3g} ± {error:.3g}"
    times = "less" if factor == 1 else f"more than {factor:g} times less"
    print(f"ok: {what} is {times} (4 s.e.)")


def below(low: Tensor, high: Tensor, what: str = "mean") -> None:
    """Check that the mean of ``low`` ``[S]`` is below that of ``high`` ``[S]``, paired, by over 4 standard errors."""
    low, high = noisy(low, what), noisy(high, what)
    assert low.shape == high.shape, f"{what}: pairs have one shape, not {list(low.shape)} and {list(high.shape)}"
    mean, error = mean_and_error(high - low)
    assert mean > SIGMAS * error, f"{what}: a gap of {mean:.3g}, {mean / error:.1f} standard errors"
    print(f"ok: {what} (4 s.e.)")


def no_variance(draws: Tensor, what: str = "variance") -> None:
    """Check that all ``draws`` ``[S, ...]`` are the same number, up to float rounding of their size."""
    draws = noisy(draws, what)
    spread = (draws - draws.mean(0)).abs().max()
    rounding = 1e4 * torch.finfo(draws.dtype).eps * draws.abs().max().clamp_min(1)
    assert spread <= rounding, f"{what}: draws differ by {spread:.3g}"
    print(f"ok: {what} is zero")


def same(first: Tensor, second: Tensor, what: str = "values") -> None:
    """Check that two computations of one thing agree to float rounding."""
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    assert first.numel(), f"{what}: there is nothing to compare"
    torch.testing.assert_close(first, second, msg=lambda message: f"{what}: {message}")
    print(f"ok: {what} agree")


def equivalent(first: Tensor, second: Tensor, within: float, what: str = "mean") -> None:
    """Check that the means of ``first`` and ``second`` ``[S]``, paired, differ by less than ``within``.

    The whole interval of 4 standard errors around their difference must lie inside of the margin, the smallest
    difference that would matter: noise alone does not show that two things are the same.
    """
    first, second = noisy(first, what), noisy(second, what)
    assert first.shape == second.shape, f"{what}: pairs have one shape, not {list(first.shape)}, {list(second.shape)}"
    mean, error = mean_and_error(first - second)
    low, high = mean - SIGMAS * error, mean + SIGMAS * error
    assert (-within < low).all() and (high < within).all(), (
        f"{what}: undecided or different, from {low.min():.3g} to {high.max():.3g} with a margin of {within:g}"
    )
    print(f"ok: {what} is the same to {within:g} (4 s.e.)")


def holds(condition: bool | Tensor, what: str) -> None:
    """Check a plain statement: True, or a tensor or array of one True."""
    value = condition.item() if math.prod(getattr(condition, "shape", (0,))) == 1 else condition
    assert isinstance(value, bool), f"{what}: a statement is True or False, not {value!r}"
    assert value, f"does not hold: {what}"
    print(f"ok: {what}")
