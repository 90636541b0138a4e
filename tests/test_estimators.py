"""The tableau as a table: shapes, sums, edges. What the rows estimate is tested in test_objectives.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vaelib.errors import InputError, choose
from vaelib.estimators import ESTIMATORS

LOG_W = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.1]], dtype=torch.float64)
ROWS = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=lambda e: e.name)


def test_the_kept_names_are_all_there():
    assert list(ESTIMATORS) == [
        "elbo-score", "elbo-score-loo", "elbo-total", "elbo-path", "iwae-score", "iwae-vimco", "iwae-total",
        "iwae-path", "iwae-dreg", "rws", "rws-dreg",
    ]  # fmt: skip


@ROWS
def test_the_theta_weights_average_and_all_shapes_agree(estimator):
    weights = estimator.weights(LOG_W)
    assert all(w.shape == LOG_W.shape for w in weights)
    torch.testing.assert_close(weights.theta.sum(0), torch.ones(2, dtype=torch.float64))
    assert estimator.reparameterised == bool(weights.path.any())


@ROWS
@given(shift=st.floats(-1e3, 1e3))
def test_a_constant_in_log_w_changes_nothing_but_plain_score_rows(estimator, shift):
    """The constant log p(x) must not matter; the two rows without a baseline are the ones where it does."""
    moved, still = estimator.weights(LOG_W + shift), estimator.weights(LOG_W)
    invariant = all(torch.allclose(a, b, atol=1e-9) for a, b in zip(moved, still))
    assert invariant or estimator.name in ("elbo-score", "iwae-score")


def test_the_rows_as_printed_in_the_book():
    w, log_mean = LOG_W.softmax(0), LOG_W.logsumexp(0) - math.log(3)
    third = torch.full_like(LOG_W, 1 / 3)
    others = torch.stack([(LOG_W.sum(0) - LOG_W[k]) / 2 for k in range(3)])
    without = []
    for k in range(3):
        replaced = LOG_W.clone()
        replaced[k] = others[k]
        without.append(replaced.logsumexp(0) - math.log(3))
    zero = torch.zeros_like(LOG_W)
    table = {
        "elbo-score": (third, zero, LOG_W / 3),
        "elbo-score-loo": (third, zero, (LOG_W - others) / 3),
        "elbo-total": (third, third, -third),
        "elbo-path": (third, third, zero),
        "iwae-score": (w, zero, log_mean - w),
        "iwae-vimco": (w, zero, log_mean - torch.stack(without) - w),
        "iwae-total": (w, w, -w),
        "iwae-path": (w, w, zero),
        "iwae-dreg": (w, w**2, zero),
        "rws": (w, zero, w),
        "rws-dreg": (w, w - w**2, zero),
    }
    for name, expected in table.items():
        for channel, mine, truth in zip("abc", ESTIMATORS[name].weights(LOG_W), expected):
            torch.testing.assert_close(mine, truth, msg=lambda m: f"{name}, {channel}: {m}")


def test_too_few_draws_are_refused():
    with pytest.raises(InputError, match="'iwae-vimco' needs k >= 2 draws, but k is 1"):
        ESTIMATORS["iwae-vimco"].weights(LOG_W[:1])


def test_a_mistyped_name_gets_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'elbo-path'"):
        choose("estimator", "elbo-pth", ESTIMATORS)
    with pytest.raises(InputError, match="choose from: elbo-score, "):
        choose("estimator", "zzz", ESTIMATORS)
