"""The negative controls of chapter 6: what its checks must refuse, each on the chapter's own quantity.

Those of the mixture objective, of GDReG and of the refusals are in test_mixtures.py; those of two stochastic layers
with detached outputs and of the engine's weights in test_objectives.py.
"""

import math

import numpy as np
import pytest
import torch
from toys import DTYPE

from vaelib import bounds, checks, models
from vaelib.estimators import TABLEAU, Row, Weights
from vaelib.posteriors import DiagonalGaussian

refused = pytest.raises(AssertionError)
NODES, MASSES = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(120))
PAIR = torch.cartesian_prod(NODES, NODES).T.unsqueeze(-1)
PAIR_MASS = torch.outer(MASSES, MASSES).flatten() / MASSES.sum() ** 2
X = torch.full((len(PAIR_MASS), 1), 2.0, dtype=DTYPE)


class Toy(torch.nn.Module):
    def forward(self, x, z):
        return -0.5 * (z**2 + (x - z) ** 2).sum(-1) - math.log(2 * math.pi)


def exactly(rule):
    """The expected gradient in (m, log sigma) of the row with this rule, for K = 2."""
    row = rule if isinstance(rule, Row) else Row("mine", "iwae", None, 1, "", rule)
    leaf = torch.tensor([0.3, 0.0], dtype=DTYPE, requires_grad=True)
    q = DiagonalGaussian(*leaf[:, None, None].expand(2, len(X), 1))
    return -torch.autograd.grad(PAIR_MASS @ row.loss(Toy(), q, X, PAIR), leaf)[0]


def draws(name, k, count=10_000, m=0.3, seed=0):
    """The gradient in m of each draw, for the toy of the chapter."""
    eps = torch.randn(k, count, 1, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
    z = (m + eps).requires_grad_()
    log_w = Toy()(torch.tensor(2.0, dtype=DTYPE), z) - DiagonalGaussian(
        z.new_full((1, 1), m), z.new_zeros(1, 1)
    ).log_prob(z)
    (slope,) = torch.autograd.grad(log_w.sum(), z)
    _, b, c = TABLEAU[name].weights(log_w.detach())
    return (b * slope[..., 0] + c * eps[..., 0]).sum(0)


def test_the_quadrature_tells_dreg_from_its_near_misses():
    truth = exactly(TABLEAU["iwae-total"])
    checks.same(exactly(TABLEAU["iwae-dreg"]), truth)
    for power in (1, 1.9, 3):  # 1 is algorithm 4
        with refused:
            checks.same(exactly(lambda log_w, p=power: Weights(log_w.softmax(0), log_w.softmax(0) ** p, None)), truth)


def test_the_exchange_of_score_and_path_needs_the_square():
    rws = exactly(TABLEAU["rws"])
    checks.same(exactly(TABLEAU["rws-dreg"]), rws)
    with refused:
        checks.same(exactly(lambda log_w: Weights(log_w.softmax(0), log_w.softmax(0), None)), rws)


def test_iwae_path_is_not_the_bound_plus_half_the_wake_phase():
    total, path, rws = (exactly(TABLEAU[name]) for name in ("iwae-total", "iwae-path", "rws"))
    checks.same(path, total + rws)
    with refused:
        checks.same(path, total + 0.9 * rws)


def test_the_paired_draws_find_the_bias_and_its_explanation():
    for k in (8, 64):
        total, dreg, path, rws = (draws(name, k) for name in ("iwae-total", "iwae-dreg", "iwae-path", "rws"))
        checks.unbiased(dreg - total, 0.0)
        checks.unbiased(path - dreg - rws, 0.0)
        with refused:
            checks.unbiased(path - total, 0.0)
        with refused:
            checks.unbiased(path - dreg - 0.95 * rws, 0.0)


def test_the_means_in_the_text_are_told_from_others_by_a_twentieth_and_a_tenth():
    path, dreg = draws("iwae-path", 8, 40_000), draws("iwae-dreg", 8, 40_000)
    checks.equivalent(path, 0.75 + 0 * path, 0.02)
    checks.equivalent(dreg, 0.11 + 0 * dreg, 0.005)
    for factor in (0.95, 1.05):
        with refused:
            checks.equivalent(factor * path, 0.75 + 0 * path, 0.02)
    for factor in (0.9, 1.1):
        with refused:
            checks.equivalent(factor * dreg, 0.11 + 0 * dreg, 0.005)


def test_the_slope_of_the_noise_tells_a_half_from_the_whole_and_three_halves():
    def slope(name):
        first, last = (draws(name, k, 2500).reshape(20, -1).std(1).log() for k in (16, 256))
        return (last - first) / math.log(16)

    for name, told in (("iwae-total", -0.5), ("iwae-dreg", -1.5)):
        checks.equivalent(slope(name), torch.full((20,), told, dtype=DTYPE), 0.15)
        with refused:
            checks.equivalent(slope(name), torch.full((20,), -1.0, dtype=DTYPE), 0.15)


def test_nothing_but_the_path_is_quiet_at_the_posterior():
    q = DiagonalGaussian(
        torch.ones(500, 1, dtype=DTYPE).requires_grad_(), torch.full((500, 1), -0.5 * math.log(2), dtype=DTYPE)
    )
    eps = torch.randn(8, 500, 1, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    for name, quiet in (("iwae-dreg", True), ("iwae-path", True), ("iwae-total", False), ("iwae-vimco", False)):
        loss = TABLEAU[name].loss(Toy(), q, X[:500], eps).sum()
        (gradient,) = torch.autograd.grad(loss, q.mean)
        if quiet:
            checks.no_variance(gradient, scale=1.0)
        else:
            with refused:
                checks.no_variance(gradient, scale=1.0)


@pytest.fixture(scope="module")
def below():
    """log w - log p(x) of the wide encoder on 20 images: K = 12,800 in all, as in the chapter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 12, generator=generator, dtype=DTYPE)
    joint = models.ppca(x, 8).requires_grad_(False)
    exact = models.exact_encoder(joint)(x[:20])
    wide = DiagonalGaussian(exact.mean, exact.log_std + 0.4).stop_gradient()
    z = wide.sample(wide.noise(12_800, generator))
    return joint(x[:20], z) - wide.log_prob(z) - joint.log_marginal(x[:20])


def test_the_gap_is_half_the_variance_of_the_average_and_not_the_variance(below):
    rho = math.exp(0.8)
    taylor = ((rho / math.sqrt(2 * rho - 1)) ** 8 - 1) / 2
    gap = -bounds.iwae(below.T.reshape(20, -1, 32).permute(2, 0, 1)).flatten()
    checks.unbiased(gap, taylor / 32)
    for factor in (0.5, 2):
        with refused:
            checks.unbiased(gap, factor * taylor / 32)


def test_the_flattering_value_is_neither_the_bound_nor_below_the_likelihood(below):
    groups = below.T.reshape(20, -1, 64).permute(2, 0, 1).flatten(1)
    w = groups.softmax(0)
    flattering, bound = (w * groups).sum(0), bounds.iwae(groups)
    checks.same(flattering, bound + (w * (64 * w).log()).sum(0))
    with refused:
        checks.same(flattering, bound)
    with refused:
        checks.below(flattering, torch.zeros_like(flattering))
    checks.below(bound, torch.zeros_like(bound))


def ovis(sign=1, own=0.0):
    """OVIS at gamma = 0, with the other sign of its own weight or a part of it in the baseline."""

    def rule(log_w):
        w = log_w.softmax(0)
        return Weights(w, None, -(1 - w).clamp(1e-12).log() - sign * w + own * w)

    return Row("mine", "iwae", None, 2, "", rule)


def test_the_quadrature_tells_ovis_from_its_near_misses():
    truth, rws = exactly(TABLEAU["iwae-total"]), exactly(TABLEAU["rws"])
    checks.same(exactly(ovis()), truth)
    for gamma in (0.5, 1.0):
        checks.same(exactly(ovis(own=gamma)), truth + gamma * rws)
    for wrong in (ovis(own=0.01), ovis(sign=-1)):
        with refused:
            checks.same(exactly(wrong), truth)
