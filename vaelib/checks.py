r"""Checks of what the book claims, each of which can fail.

A check takes draws, compares them with the truth or with each other, and either raises AssertionError with the figures
or prints one line that is the same on every machine; "(4 s.e.)" in it means: to 4 standard errors. Statistical checks
are in units of standard errors: a coordinate whose claim is true fails a two-sided check at 4 standard errors once in
16,000 times, and once and for all, since every seed is fixed. See the page "How this book checks itself".
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGMAS = 4.0
"""The width of every statistical check, in standard errors."""


def mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the first axis of ``draws`` ``[S, ...]`` and its standard error."""
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


def total_variance(draws: Tensor) -> tuple[float, float]:
    r"""Return the trace of the covariance of ``draws`` ``[S, ...]`` and the standard error of that estimate."""
    squares = (draws - draws.mean(0)).square().reshape(len(draws), -1).sum(1)
    mean, error = mean_and_error(squares)
    return mean.item() * len(draws) / (len(draws) - 1), error.item()


def z_scores(draws: Tensor, exact: Tensor) -> Tensor:
    """Return how many standard errors (float rounding, where there is no spread) each mean is from ``exact``."""
    mean, error = mean_and_error(draws)
    rounding = 100 * torch.finfo(draws.dtype).eps * draws.abs().amax(0).clamp_min(1)
    return (mean - exact).abs() / torch.maximum(error, rounding)


def unbiased(draws: Tensor, exact: Tensor | float, what: str = "mean") -> None:
    """Check that the mean of ``draws`` ``[S, ...]`` is within 4 standard errors of ``exact`` in each coordinate."""
    exact = torch.as_tensor(exact, dtype=draws.dtype)
    scores = z_scores(draws, exact)
    assert (scores <= SIGMAS).all(), f"{what}: off by {scores.max():.1f} standard errors of {len(draws)} draws"
    where = f" in all {scores.numel()} coordinates" if scores.numel() > 1 else ""
    print(f"ok: {what} is right{where} (4 s.e.)")


def biased(draws: Tensor, exact: Tensor | float, what: str = "mean") -> None:
    """Check that the mean of ``draws`` ``[S, ...]`` is more than 4 standard errors from ``exact`` somewhere."""
    exact = torch.as_tensor(exact, dtype=draws.dtype)
    scores = z_scores(draws, exact)
    assert (scores > SIGMAS).any(), f"{what}: only {scores.max():.1f} standard errors away with {len(draws)} draws"
    print(f"ok: {what} is wrong (4 s.e.)")


def less_variance(quiet: Tensor, noisy: Tensor, factor: float = 1.0, what: str = "variance") -> None:
    """Check that ``quiet`` has less total variance than ``noisy`` / ``factor``, by more than 4 standard errors."""
    (low, low_error), (high, high_error) = total_variance(quiet), total_variance(noisy)
    gap, error = high - factor * low, (high_error**2 + (factor * low_error) ** 2) ** 0.5
    assert gap > SIGMAS * error, f"{what}: {low:.3g} against {high:.3g}, a gap of {gap:.3g} ± {error:.3g}"
    times = "less" if factor == 1 else f"more than {factor:g} times less"
    print(f"ok: {what} is {times} (4 s.e.)")


def below(low: Tensor, high: Tensor, what: str = "mean") -> None:
    """Check that the mean of ``low`` ``[S]`` is below that of ``high`` ``[S]``, paired, by over 4 standard errors."""
    mean, error = mean_and_error(high - low)
    assert mean > SIGMAS * error, f"{what}: a gap of {mean:.3g}, {mean / error:.1f} standard errors"
    print(f"ok: {what} (4 s.e.)")


def no_variance(draws: Tensor, what: str = "variance") -> None:
    """Check that all ``draws`` ``[S, ...]`` are the same number, up to float rounding of their size."""
    spread = (draws - draws.mean(0)).abs().max()
    rounding = 1e4 * torch.finfo(draws.dtype).eps * draws.abs().max().clamp_min(1)
    assert spread <= rounding, f"{what}: draws differ by {spread:.3g}"
    print(f"ok: {what} is zero")


def same(first: Tensor, second: Tensor, what: str = "values") -> None:
    """Check that two computations of one thing agree to float rounding."""
    torch.testing.assert_close(first, second, msg=lambda message: f"{what}: {message}")
    print(f"ok: {what} agree")


def holds(condition: bool | Tensor, what: str) -> None:
    """Check a plain statement."""
    assert bool(condition), f"does not hold: {what}"
    print(f"ok: {what}")
