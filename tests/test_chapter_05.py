"""Negative controls of chapter 5, "Inference lag": each claim's check must fail where the claim is false."""

import math

import pytest
import torch
from torch import nn

from vaelib import checks, collapse, evaluation, experiments, models, objectives, silent
from vaelib.data import Sentences, Vocabulary
from vaelib.models.text import lstm_vae
from vaelib.posteriors import DiagonalGaussian

DTYPE = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=DTYPE)


def factor_model(use, size=5):
    """A sensor is ``use`` times z plus unit noise."""
    return models.LinearGaussian(
        torch.full((size, 1), use, dtype=DTYPE), torch.zeros(size, dtype=DTYPE), torch.tensor(0.0, dtype=DTYPE)
    )


X = normal(200, 5)


# --- the gauges


def test_information_without_its_own_term_breaks_the_cap_and_the_check_sees_it():
    """Leave q(z_i | x_i) out of the inner sum, and the estimate exceeds log B."""
    joint = factor_model(20.0)
    encoder, batches = models.exact_encoder(joint).requires_grad_(False), []
    x = joint.decode(normal(1, 640, 1, seed=1)).mean[0] + normal(640, 5, seed=2)
    for part in x.split(8):
        q = encoder(part)
        log_q = q.log_prob(q.sample(normal(1, len(part), 1, seed=3))[0].unsqueeze(1))
        others = log_q.masked_fill(torch.eye(len(part), dtype=bool), -torch.inf).logsumexp(1) - math.log(len(part) - 1)
        own = log_q.logsumexp(1) - math.log(len(part))
        batches.append(torch.stack([(-q.entropy() - sums).mean() for sums in (own, others)]))
    right, wrong = torch.stack(batches).T
    cap = torch.full_like(right, math.log(8))
    checks.below(right, cap)
    with pytest.raises(AssertionError):
        checks.below(wrong, cap)


def test_the_whole_set_gets_past_the_cap_and_a_batch_does_not():
    joint = factor_model(20.0)
    encoder = models.exact_encoder(joint).requires_grad_(False)
    x = joint.decode(normal(1, 2048, 1, seed=1)).mean[0] + normal(2048, 5, seed=2)
    truth = -encoder.log_std.sum()
    checks.holds(abs(evaluation.mutual_information(encoder, x, generator=seeded()) - truth) < 0.2, "all at once: right")
    with pytest.raises(AssertionError, match="does not hold"):
        checks.holds(abs(evaluation.mutual_information(encoder, x, 8, seeded()) - truth) < 0.2, "batches: right")


def test_a_capped_estimate_that_forgets_log_b_is_biased():
    q = DiagonalGaussian(normal(400, 1), torch.full((400, 1), -2.0, dtype=DTYPE))
    z = q.sample(normal(1, 400, 1, seed=4))[0]
    first, second = [], []
    for rows in torch.arange(400).split(8):
        part = DiagonalGaussian(q.mean[rows], q.log_std[rows])
        log_q = part.log_prob(z[rows].unsqueeze(1))
        first.append((-part.entropy() - log_q.logsumexp(1)).mean() + math.log(8))
        second.append((log_q.diagonal() - log_q.logsumexp(1)).mean())
    first, second = torch.stack(first), torch.stack(second)
    checks.unbiased(first - (second + math.log(8)), 0.0)
    with pytest.raises(AssertionError, match="standard errors"):
        checks.unbiased(first - second, 0.0)


# --- what must collapse, and the gaps


def linear_optimum(lam, variance, rotate=False):
    """The best linear VAE in the axes of the data, whose covariance is diagonal; or one turned by an eighth."""
    weight = torch.diag((lam - variance).clamp_min(0).sqrt())
    if rotate:
        c = math.cos(math.pi / 4)
        weight[:2, :2] = weight[:2, :2] @ torch.tensor([[c, -c], [c, c]], dtype=DTYPE)
    return models.LinearGaussian(
        weight, torch.zeros(len(lam), dtype=DTYPE), torch.tensor(0.5 * math.log(variance), dtype=DTYPE)
    )


LAM = torch.tensor([2.0, 1.0, 0.4, 0.1], dtype=DTYPE)
ROWS = torch.cat([torch.diag((4 * LAM).sqrt()), -torch.diag((4 * LAM).sqrt())])


@pytest.mark.parametrize("variance", [0.05, 0.5, 1.5])
def test_the_theorem_and_two_that_are_wrong(variance):
    encoder = models.exact_encoder(linear_optimum(LAM, variance))
    kl = collapse.kl_by_dimension(encoder(ROWS)).mean(0)
    checks.same(kl.detach(), 0.5 * (LAM / variance).log().clamp_min(0))
    for wrong in (0.5 * (LAM / math.sqrt(variance)).log().clamp_min(0), (LAM / variance).log().clamp_min(0)):
        with pytest.raises(AssertionError):
            checks.same(kl.detach(), wrong)


@pytest.mark.parametrize("variance", [0.05, 0.5, 1.5])
def test_a_prediction_from_noise_that_is_one_per_cent_off_is_refused(variance):
    """The chapter's margin, a thousandth of a nat, lies below what an error of one per cent makes: ln(1.01) / 2."""
    kl = collapse.kl_by_dimension(models.exact_encoder(linear_optimum(LAM, variance))(ROWS)).mean(0).detach()
    for assumed in (variance, 1.01 * variance, 0.99 * variance):
        close = (kl - 0.5 * (LAM / assumed).log().clamp_min(0)).abs() < 0.001
        if assumed == variance:
            checks.holds(close, "as predicted")
        else:
            with pytest.raises(AssertionError, match="does not hold"):
                checks.holds(close, "as predicted")


def test_a_rotated_optimum_has_the_same_likelihood_and_an_approximation_gap():
    straight, turned = linear_optimum(LAM, 0.3), linear_optimum(LAM, 0.3, rotate=True)
    with torch.no_grad():
        checks.same(straight.log_marginal(ROWS).mean(), turned.log_marginal(ROWS).mean())
        gaps = [j.log_marginal(ROWS) - silent.elbo(j, ROWS, models.exact_encoder(j)(ROWS)) for j in (straight, turned)]
    checks.same(gaps[0], torch.zeros_like(gaps[0]), scale=1.0)
    with pytest.raises(AssertionError):
        checks.same(gaps[1], torch.zeros_like(gaps[1]), scale=1.0)


def test_an_encoder_that_is_not_the_best_lags():
    joint = factor_model(0.7)
    best = models.exact_encoder(joint).requires_grad_(False)
    with torch.no_grad():
        top = silent.elbo(joint, X, best(X)).mean()
        checks.holds(top - silent.elbo(joint, X, best(X)).mean() < 1e-9, "no lag")
        best.weight *= 0.9
        with pytest.raises(AssertionError, match="does not hold"):
            checks.holds(top - silent.elbo(joint, X, best(X)).mean() < 1e-9, "no lag")


def test_the_decoder_turns_z_down_only_where_q_is_the_prior():
    for mean, right in ((0.0, True), (0.3, False)):
        joint = factor_model(0.7)
        q = DiagonalGaussian(mean * X[:, :1], torch.zeros(200, 1, dtype=DTYPE))
        silent.elbo(joint, X, q).mean().backward()
        if right:
            checks.same(joint.weight.grad, -joint.weight.detach())
        else:
            with pytest.raises(AssertionError):
                checks.same(joint.weight.grad, -joint.weight.detach())


def test_a_faint_use_of_z_is_collapse_only_if_the_encoder_is_late():
    """A model without a past has nothing to explain the data by but z: plain training does not collapse."""
    x = normal(300, 1, seed=5) + 0.5 * normal(300, 5, seed=6)
    joint = factor_model(0.2)
    encoder = models.LinearEncoder(0.01 * normal(1, 5), torch.zeros(1, dtype=DTYPE), torch.zeros(1, dtype=DTYPE))
    optimizer = torch.optim.SGD([*joint.parameters(), *encoder.parameters()], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        objectives.backward(silent.ELBO, joint, encoder(x), x, None)
        optimizer.step()
    with pytest.raises(AssertionError, match="does not hold"):
        checks.holds(encoder(x).kl().mean() < 0.005, "the divergence is all but 0")
    with pytest.raises(AssertionError, match="does not hold"):
        checks.holds(evaluation.active_units(encoder, x) == [0], "no unit is active")


def test_a_regression_that_forgets_what_z_told_leaves_the_ridge():
    covariance = torch.full((2, 2), 1.0, dtype=DTYPE) + 0.25 * torch.eye(2, dtype=DTYPE)
    w = 0.4
    for told, right in ((w, True), (0.0, False)):
        a = (covariance[1, 0] - w * told) / covariance[0, 0]
        rest = covariance[1, 1] - a**2 * covariance[0, 0] - 2 * w * a * w - w**2
        made = a * covariance[0, 0] + w * w, a**2 * covariance[0, 0] + 2 * a * w * w + w**2 + rest
        if right:
            checks.same(torch.stack(made), covariance[1])
        else:
            with pytest.raises(AssertionError):
                checks.same(torch.stack(made), covariance[1])


# --- sentences


def sentences():
    words = tuple("abcdef")
    vocabulary = Vocabulary.of([list(words)])
    rows = torch.randint(6, (64, 5), generator=seeded())
    return Sentences(vocabulary.encode([[words[i] for i in row] for row in rows.tolist()]), vocabulary)


@pytest.mark.parametrize("change", [{"most": 40}, {"clip": 1e-4}, {"block": 40}])
def test_my_step_is_not_the_packages_with_other_numbers(change):
    text, after = sentences(), []
    for options in ({}, {**change}):
        model, g = lstm_vae(len(text.vocabulary), seeded(), latent=1, embedding=4, hidden=4, dropout=0.0), seeded(1)
        collapse.aggressive_step(
            model, collapse.elbo_kl(), torch.optim.SGD(model.parameters(), 1.0), text.batch(slice(0, 32)),
            lambda: text.batch(torch.randint(64, (32,), generator=g)), lambda x: model.encoder(x).noise(1, g),
            **options,
        )  # fmt: skip
        after.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    with pytest.raises(AssertionError):
        checks.same(*after)


def test_points_beside_the_diagonal_are_not_called_close_and_a_collapsed_model_not_alive():
    across = normal(50)
    with pytest.raises(AssertionError, match="does not hold"):
        checks.holds(torch.corrcoef(torch.stack([across, normal(50, seed=9)]))[0, 1] > 0.9, "on the diagonal")
    text = sentences()
    model = lstm_vae(len(text.vocabulary), seeded(), latent=1, embedding=4, hidden=4, dropout=0.0)
    found = collapse.measure(model, text.tokens, 32, seeded())
    with pytest.raises(AssertionError, match="does not hold"):
        checks.holds(found["kl"] > 0.3 and found["au"] == 1, "no collapse")


# --- results


def stored(name, metric):
    """A line for each seed, a column for each method."""
    found = experiments.select(experiments.load(name, "short"), metric)
    return found.pivot(index="seed", columns="method", values="value")


@pytest.mark.parametrize(("method", "right"), [("plain", 0.0), ("aggressive", 1.0)])
def test_one_run_of_eight_that_ends_otherwise_is_seen(method, right):
    units = stored("lag-toy", "au")[method]
    checks.holds(units == right, "with each of 8 seeds")
    units.loc[3] = 1 - right
    with pytest.raises(AssertionError, match="1 of 8 do not"):
        checks.holds(units == right, "with each of 8 seeds")


def test_one_run_that_ends_ahead_of_no_z_is_seen():
    nll = stored("lag-toy", "nll")
    behind = nll["aggressive"] - nll["no-z"]
    checks.holds(behind > 0, "behind no z")
    behind.loc[5] *= -1
    with pytest.raises(AssertionError, match="1 of 8 do not"):
        checks.holds(behind > 0, "behind no z")


def test_free_bits_are_a_floor_under_the_divergence_and_not_under_the_information():
    """A posterior shifted alike for all data pays the floor and tells nothing; one normalised over the data tells."""
    same_mean = DiagonalGaussian(torch.full((300, 1), 0.5, dtype=DTYPE), torch.zeros(300, 1, dtype=DTYPE))
    mean = normal(300, 1)
    spread = DiagonalGaussian(0.5 * (mean - mean.mean()) / mean.std(correction=0), torch.zeros(300, 1, dtype=DTYPE))
    told = []
    for q in (same_mean, spread):
        assert q.kl().mean() >= 0.125 - 1e-9
        told.append(0.5 * (1 + q.mean.var() * (-2 * q.log_std).exp()[0, 0]).log())
    assert told[0] < 1e-9 and told[1] > 0.1
