"""Checks of what the book claims (:mod:`~vaelib.checks.statements`), of a posterior or an estimator of your own
(:mod:`~vaelib.checks.contracts`), and of the answer to an exercise (:mod:`~vaelib.checks.exercises`). Each can fail;
one that holds prints a line.
"""

from vaelib.checks.contracts import contract
from vaelib.checks.exercises import attempt, refused
from vaelib.checks.statements import (
    ERROR_RATE,
    KINDS,
    SIGMAS,
    Outcome,
    below,
    biased,
    equivalent,
    holds,
    less_variance,
    mean_and_error,
    no_variance,
    recorded,
    same,
    total_variance,
    unbiased,
    z_scores,
)

__all__ = [
    "ERROR_RATE",
    "KINDS",
    "SIGMAS",
    "Outcome",
    "attempt",
    "below",
    "biased",
    "contract",
    "equivalent",
    "holds",
    "less_variance",
    "mean_and_error",
    "no_variance",
    "recorded",
    "refused",
    "same",
    "total_variance",
    "unbiased",
    "z_scores",
]
