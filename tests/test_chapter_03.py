"""Negative controls of chapter 3, "Silent gradients": each claim's check must fail where the claim is false.

The closed forms, their gradients and their refusals are tested in test_silent.py and test_discrete.py. Statistical
checks are at 4 standard errors of 20,000 draws, in at most 8 coordinates: a false alarm once in 2,000 seeds, and they
are fixed.
"""

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import DTYPE

from vaelib import checks, discrete, gradients, models, silent
from vaelib.experiments import find
from vaelib.experiments.results import finished
from vaelib.likelihoods import Gaussian
from vaelib.posteriors import DiagonalGaussian, FactorisedBernoulli, Mixture, OneHotCategorical

refused = pytest.raises(AssertionError)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=DTYPE)


X, WEIGHT, BIAS, LOG_STD = randn(1, 3, seed=1), randn(3, 2, seed=2), randn(3, seed=3), 0.2 * randn(3, seed=4)
GAUSS = DiagonalGaussian(randn(1, 2, seed=5), 0.3 * randn(1, 2, seed=6))


def log_prob(z, weight=WEIGHT, bias=BIAS):
    return Gaussian(z @ weight.mT + bias, LOG_STD).log_prob(X)


def normal(q, count=20_000):
    return q.sample(q.noise(count, seeded()))


def test_the_mean_without_the_variance_is_not_the_expectation():
    drawn = log_prob(normal(GAUSS))
    checks.unbiased(drawn, silent.expected_log_prob(X, GAUSS, WEIGHT, BIAS, LOG_STD))
    with refused:
        checks.unbiased(drawn, log_prob(GAUSS.mean))


def test_corners_are_exact_for_squares_and_for_nothing_higher():
    """The trick of the chapter, one of +1 and -1 for each noise variable, fails for a fourth power."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DTYPE)] * 2).unsqueeze(1)
    at_corners = GAUSS.sample(corners)
    checks.same(log_prob(at_corners).mean(0), silent.expected_log_prob(X, GAUSS, WEIGHT, BIAS, LOG_STD))
    mean, scale = GAUSS.mean[0, 0], GAUSS.log_std[0, 0].exp()
    fourth = mean**4 + 6 * mean**2 * scale**2 + 3 * scale**4
    checks.unbiased(normal(GAUSS)[:, 0, 0] ** 4, fourth)
    with refused:
        checks.same((at_corners[..., 0] ** 4).mean(), fourth)


def test_a_sampled_gradient_is_not_silent():
    joint = models.LinearGaussian(WEIGHT, BIAS, LOG_STD).requires_grad_(False)
    for row in (silent.ELBO, "elbo-path"):
        g = gradients.draws(row, joint, GAUSS, X, draws=50, generator=seeded())
        if row is silent.ELBO:
            checks.no_variance(g)
        else:
            with refused:
                checks.no_variance(g)


def test_the_length_of_a_column_by_a_wrong_threshold():
    """The lengths are lambda - s^2 to 0.001; with s for s^2, or without the cut at 0, they are not."""
    values, s2 = torch.tensor([0.69, 0.64, 0.55, 0.40]), torch.tensor(0.6)
    lengths = (values - s2).clamp_min(0)
    for wrong in (values - s2, (values - s2.sqrt()).clamp_min(0)):
        with refused:
            checks.holds((lengths - wrong).abs().max() < 1e-3, "all lengths")


def test_the_threshold_is_where_the_likelihood_says():
    """At eq. (threshold) the gradient of log p(x) in W vanishes; longer or shorter columns are no maximum."""
    x = randn(200, 4, seed=7) @ torch.diag(torch.tensor([1.5, 1.0, 0.7, 0.3], dtype=DTYPE))
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
    for s2 in (0.2, 0.6):
        lengths = (values.flip(0)[:2] - s2).clamp_min(0)
        for factor, maximum in ((1.0, True), (1.1, False)):
            weight = (vectors.flip(1)[:, :2] * (factor * lengths).sqrt()).requires_grad_()
            joint = models.LinearGaussian(
                weight, torch.zeros(4, dtype=DTYPE), torch.tensor(0.5 * math.log(s2), dtype=DTYPE)
            )
            (slope,) = torch.autograd.grad(joint.log_marginal(x).mean(), joint.weight)
            assert (slope.abs().max() < 1e-9) == maximum


def test_a_log_linear_scale_without_the_tilt():
    scale_weight = 0.5 * randn(3, 2, seed=8)
    drawn = Gaussian((z := normal(GAUSS)) @ WEIGHT.mT + BIAS, 0.5 * (z @ scale_weight.mT + LOG_STD)).log_prob(X)
    checks.unbiased(drawn, silent.expected_log_prob_log_linear(X, GAUSS, WEIGHT, BIAS, scale_weight, LOG_STD))
    at_mean = 0.5 * (GAUSS.mean @ scale_weight.mT + LOG_STD)[0]
    with refused:
        checks.unbiased(drawn, silent.expected_log_prob(X, GAUSS, WEIGHT, BIAS, at_mean))


def test_a_coin_is_told_from_a_gaussian_and_a_gaussian_is_not():
    softplus, first, second = nn.functional.softplus, 2 * randn(20_000), 2 * randn(20_000, seed=1)
    coin = torch.tensor([-2.0, 2.0], dtype=DTYPE)
    checks.biased(softplus(first), softplus(coin).mean())
    with refused:
        checks.biased(softplus(first) - softplus(second), 0.0)


def test_cosines_without_their_damping():
    frequency, phase = randn(4, 2, seed=9), randn(4, seed=10)
    drawn = (normal(GAUSS) @ frequency.mT + phase).cos()
    checks.unbiased(drawn, silent.expected_cosines(GAUSS, frequency, phase))
    with refused:
        checks.unbiased(drawn, (GAUSS.mean @ frequency.mT + phase).cos())


def bits_draws(row, k, count=20_000):
    decoder = models.LinearDecoder(WEIGHT, BIAS, LOG_STD)
    joint = models.DiscreteJoint(decoder, torch.zeros(2, dtype=DTYPE)).requires_grad_(False)
    q = FactorisedBernoulli(randn(1, 2, seed=11))
    return gradients.draws(row, joint, q, X, draws=count, k=k, generator=seeded())


def test_bias_is_found_where_it_is_and_only_there():
    truth = bits_draws("elbo-exact", 1, 1)[0]
    checks.same(bits_draws("elbo-silent", 1, 1)[0], truth)
    for name, k in (("elbo-score", 2), ("elbo-score-loo", 2), ("elbo-arm", 1), ("elbo-disarm", 1)):
        g = bits_draws(name, k)
        checks.unbiased(g, truth)
        with refused:
            checks.biased(g, truth)
    for relaxed in (discrete.gumbel_softmax, discrete.straight_through):
        g = bits_draws(relaxed(1.0), 2)
        checks.biased(g, truth)
        with refused:
            checks.unbiased(g, truth)


def test_disarm_is_not_quieter_than_itself():
    g, again = (bits_draws("elbo-disarm", 1)[part::2] for part in (0, 1))
    with refused:
        checks.less_variance(g, again)
    checks.less_variance(g, bits_draws("elbo-arm", 1))


# --- the exercises


def test_columns_that_are_not_weighted_by_the_noise():
    def by_columns(weight):
        at_mean = Gaussian(GAUSS.mean @ WEIGHT.mT + BIAS, LOG_STD).log_prob(X)
        return at_mean - 0.5 * (2 * GAUSS.log_std).exp() @ weight.square().sum(0)

    truth = silent.expected_log_prob(X, GAUSS, WEIGHT, BIAS, LOG_STD)
    checks.same(by_columns(WEIGHT / LOG_STD.exp()[:, None]), truth)
    with refused:
        checks.same(by_columns(WEIGHT), truth)


def test_a_choice_is_a_mixture_of_points_and_not_of_wide_gaussians():
    choice, weight = OneHotCategorical(randn(1, 1, 4, seed=12)), randn(3, 4, seed=13)
    for log_std, same in ((-20.0, True), (-2.0, False)):
        parts = tuple(
            DiagonalGaussian(e[None], torch.full((1, 4), log_std, dtype=DTYPE)) for e in torch.eye(4, dtype=DTYPE)
        )
        found, truth = (q.linear_moments(weight)[1] for q in (Mixture(parts, choice.logits[:, 0].mT), choice))
        if same:
            checks.same(found, truth)
        else:
            with refused:
                checks.same(found, truth)


def test_a_poisson_mean_without_the_half_variance():
    counts = torch.tensor([[3.0, 0.0, 1.0]], dtype=DTYPE)
    mean, variance = GAUSS.linear_moments(0.5 * WEIGHT)
    logs = normal(GAUSS) @ (0.5 * WEIGHT.mT) + BIAS
    drawn = torch.distributions.Poisson(logs.exp()).log_prob(counts).sum(-1)

    def closed(half):
        return (counts * (mean + BIAS) - (mean + BIAS + half * variance).exp() - torch.lgamma(counts + 1)).sum(-1)

    checks.unbiased(drawn, closed(0.5))
    for wrong in (0.0, 1.0):
        with refused:
            checks.unbiased(drawn, closed(wrong))


# --- the tables that the chapter reads

RESULTS = Path(__file__).resolve().parent.parent / "results"


def test_the_chapter_reads_a_whole_table():
    """Every run of the short preset, and none twice: a missing seed would change a standard error without a word."""
    experiment = find("silent-linear")
    tasks = {task.key for task in experiment.tasks("short")}
    assert tasks and tasks == finished(experiment, RESULTS)


def test_the_costs_that_the_chapter_reads_are_of_one_run():
    with open(RESULTS / "benchmark-silent.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["posterior"] for row in rows if row["estimator"] == "elbo-silent"} == {"gaussian", "bits", "choices"}
    assert len({tuple(row[name] for name in ("machine", "torch", "date", "code")) for row in rows}) == 1
