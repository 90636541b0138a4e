"""Discrete posteriors, and every estimator that can train them, against enumeration; in float64.

Where samples are steps of the noise, an estimator is a polynomial of it between the steps, so that its mean *and* its
variance are had exactly: two Gauss-Legendre nodes in each piece. The relaxed estimators are integrated with many nodes.
The draws in this file are held to 4 standard errors in at most 42 means: a false alarm once in 380 seeds for each
estimator, and the seeds are fixed.
"""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Independent, kl_divergence
from torch.distributions import OneHotCategorical as Choice
from toys import DTYPE

from vaelib import checks, data, discrete, evaluation, gradients, models, objectives, plots, silent, training
from vaelib.bounds import BOUNDS
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, TABLEAU, LossEstimator, get
from vaelib.likelihoods import Bernoulli as Pixels
from vaelib.posteriors import DiagonalGaussian, FactorisedBernoulli, OneHotCategorical, gumbel

BITS, X = 2, 3
UNBIASED = ["elbo-score", "elbo-score-loo", "elbo-arm", "elbo-disarm", "elbo-silent", "elbo-exact"]
RELAXED = ["elbo-gumbel-softmax", "elbo-straight-through"]
DISCRETE = [name for name in ESTIMATORS if name not in TABLEAU or not TABLEAU[name].reparameterised]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


class Cube(torch.nn.Module):
    """A decoder that is not linear in z, also between its corners."""

    def __init__(self, dim: int, pixels: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(randn(pixels, dim, seed=1))

    def forward(self, z):
        linear = z @ self.weight.mT
        return Pixels(2 * linear + linear.square() - linear.roll(1, -1) * z.sum(-1, keepdim=True))


def linear_joint(shape=(BITS,)):
    weight, log_std = randn(X, math.prod(shape), seed=1), torch.tensor(-0.4, dtype=DTYPE)
    return models.DiscreteJoint(models.LinearDecoder(weight, randn(X, seed=2), log_std), 0.5 * randn(*shape, seed=3))


def curved_joint(shape=(BITS,)):
    return models.DiscreteJoint(Cube(math.prod(shape), X), 0.5 * randn(*shape, seed=3))


JOINTS = pytest.mark.parametrize("make_joint", [linear_joint, curved_joint], ids=["linear", "curved"])


def observations(count=1):
    return (randn(count, X, seed=4) > 0).to(DTYPE)


def pieces(logits: torch.Tensor, k: int, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise ``[K, N, D]`` and weights ``[N]`` that integrate over the unit cube piece by piece.

    The pieces end where a sample or its twin changes, at sigmoid(l) and sigmoid(-l).
    """
    points, mass = np.polynomial.legendre.leggauss(nodes)
    axes, masses = [], []
    for logit in logits.tolist() * k:
        step = 1 / (1 + math.exp(-logit))
        ends = np.unique([0, min(step, 1 - step), max(step, 1 - step), 1])
        width, start = np.diff(ends)[:, None], ends[:-1, None]
        axes.append(torch.tensor((start + width * (points + 1) / 2).ravel(), dtype=DTYPE))
        masses.append(torch.tensor((width * mass / 2).ravel(), dtype=DTYPE))
    grid = torch.cartesian_prod(*axes).reshape(-1, k, len(logits))
    return grid.transpose(0, 1), torch.cartesian_prod(*masses).reshape(len(grid), -1).prod(1)


def draws_at(estimator, joint, x, logits, eps) -> torch.Tensor:
    """Return the gradient in the logits for each noise, the noises standing in the batch axis, ``[N, D]``."""
    leaf = logits.expand(eps.shape[1], -1).clone().requires_grad_()
    loss = estimator.loss(joint, FactorisedBernoulli(leaf), x.expand(len(leaf), -1), eps)
    return -torch.autograd.grad(loss.sum(), leaf)[0]


def exact_moments(name, joint, x, logits, k=1, nodes=2):
    """Return the mean of the gradient in the logits and its total variance, exactly."""
    eps, weight = pieces(logits, k, nodes)
    draws = draws_at(ESTIMATORS[name] if isinstance(name, str) else name, joint, x, logits, eps)
    mean = weight @ draws
    return mean, (weight @ (draws - mean).square().sum(-1)).item()


def truth(joint, x, logits):
    leaf = logits.clone().requires_grad_()
    value = discrete.exact_elbo(joint, x, FactorisedBernoulli(leaf.unsqueeze(0))).sum()
    return torch.autograd.grad(value, leaf)[0]


LOGITS = torch.tensor([0.7, -1.1], dtype=DTYPE)

# The posteriors


@pytest.mark.parametrize("kind", ["bits", "choices"])
def test_densities_divergences_and_entropies_agree_with_torch(kind):
    if kind == "bits":
        q, p = FactorisedBernoulli(2 * randn(4, 3)), FactorisedBernoulli(randn(3, seed=1))
        reference, prior = (Independent(Bernoulli(logits=logits), 1) for logits in (q.logits, p.logits.expand(4, -1)))
        z = q.sample(q.noise(5))
        theirs, fair = z, Independent(Bernoulli(logits=torch.zeros(4, 3, dtype=DTYPE)), 1)
    else:
        q, p = OneHotCategorical(2 * randn(4, 2, 3)), OneHotCategorical(randn(2, 3, seed=1))
        reference, prior = (Independent(Choice(logits=logits), 1) for logits in (q.logits, p.logits.expand(4, -1, -1)))
        z = q.sample(q.noise(5))
        theirs, fair = z.unflatten(-1, (2, 3)), Independent(Choice(logits=torch.zeros(4, 2, 3, dtype=DTYPE)), 1)
    assert z.shape == (5, 4, q.mean.shape[-1]) and not z.requires_grad
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(theirs))
    torch.testing.assert_close(q.entropy(), reference.entropy())
    torch.testing.assert_close(q.kl(p), kl_divergence(reference, prior))
    torch.testing.assert_close(q.kl(), kl_divergence(reference, fair))
    support = q.support()
    torch.testing.assert_close(q.log_prob(support).exp().sum(0), torch.ones(4, dtype=DTYPE))
    assert len(support) == len(support.unique(dim=0)) == (8 if kind == "bits" else 9)
    assert torch.equal(q.stop_gradient().log_prob(z), q.log_prob(z))


@pytest.mark.parametrize("q", [FactorisedBernoulli(randn(2, 3)), OneHotCategorical(randn(2, 2, 3))])
def test_samples_have_the_probabilities_they_should(q):
    z = q.sample(q.noise(40_000, torch.Generator().manual_seed(0)))
    checks.unbiased(z, q.mean)
    frequency = (z.unsqueeze(1) == q.support()).all(-1).to(DTYPE)  # of every joint value
    checks.unbiased(frequency, q.log_prob(q.support()).exp())
    with pytest.raises(AssertionError):
        checks.unbiased(z, q.mean + 0.02)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_a_relaxed_sample_rounds_to_the_sample_of_the_same_noise(temperature):
    for q in (FactorisedBernoulli(randn(4, 3)), OneHotCategorical(randn(4, 2, 3))):
        eps = q.noise(200, torch.Generator().manual_seed(0))
        soft, hard = q.relaxed_sample(eps, temperature), q.sample(eps)
        largest = (
            soft.round()
            if isinstance(q, FactorisedBernoulli)
            else (soft.unflatten(-1, (2, 3)) == soft.unflatten(-1, (2, 3)).amax(-1, keepdim=True)).flatten(-2).to(DTYPE)
        )
        assert torch.equal(largest, hard) and (soft > 0).any() and (soft - hard).abs().max() > 1e-3


def test_two_classes_are_a_bit():
    bits = FactorisedBernoulli(randn(4, 3))
    pairs = OneHotCategorical(torch.stack((torch.zeros_like(bits.logits), bits.logits), -1))
    torch.testing.assert_close(pairs.mean.unflatten(-1, (3, 2))[..., 1], bits.mean)
    torch.testing.assert_close(pairs.entropy(), bits.entropy())
    torch.testing.assert_close(pairs.kl(), bits.kl())
    weight = randn(5, 3, seed=1)
    pair_weight = torch.stack((torch.zeros_like(weight), weight), -1).flatten(-2)
    torch.testing.assert_close(pairs.linear_moments(pair_weight), bits.linear_moments(weight))
    eps = pairs.noise(50, torch.Generator().manual_seed(0))  # a difference of two Gumbels is logistic
    first, second = gumbel(eps).unflatten(-1, (3, 2)).unbind(-1)
    logistic = torch.sigmoid(second - first)
    ours, theirs = pairs.relaxed_sample(eps, 0.7), bits.relaxed_sample(logistic, 0.7)
    torch.testing.assert_close(ours.unflatten(-1, (3, 2))[..., 1], theirs)


def test_extreme_logits_and_noise_leave_no_nan():
    tiny, one = torch.finfo(torch.float32).tiny, 1 - 2**-24
    logits = torch.tensor([[-200.0, 0.0, 200.0]], requires_grad=True)
    for q in (FactorisedBernoulli(logits), OneHotCategorical(logits.unflatten(-1, (1, 3)))):
        for value in (tiny, 0.5, one):
            eps = torch.full((1, 1, 3), value)
            numbers = [q.relaxed_sample(eps, 0.1).sum(), q.log_prob(q.sample(eps)).sum(), q.kl(), q.entropy()]
            (gradient,) = torch.autograd.grad(sum(numbers), logits)
            assert all(n.isfinite() for n in numbers) and gradient.isfinite().all()


def test_noise_is_reproducible_between_0_and_1_and_refuses_no_draws():
    q = FactorisedBernoulli(torch.zeros(1000, 100))
    first, again = (q.noise(2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again) and first.min() > 0 and first.max() < 1
    with pytest.raises(InputError, match="at least 1, but is 0"):
        q.noise(0)


# Enumeration


def test_enumeration_is_the_bound_and_log_p_is_above_it():
    x, joint = observations(4), curved_joint()
    q = FactorisedBernoulli(randn(4, BITS, seed=5))
    bound, log_p = discrete.exact_elbo(joint, x, q), discrete.log_marginal(joint, x, q)
    log_joint = joint(x, q.support().expand(-1, 4, -1))
    gap = (q.log_prob(q.support()).exp() * (q.log_prob(q.support()) - log_joint.log_softmax(0))).sum(0)
    torch.testing.assert_close(log_p - bound, gap)  # the KL to the exact posterior
    assert (gap > 0).all() and torch.equal(discrete.log_marginal(joint, x, joint.prior), log_p)
    model = models.VAE(joint, lambda _: q, binary=True)
    estimate, error = evaluation.log_likelihood(
        model, x, 20_000, 2000, torch.Generator().manual_seed(0), return_standard_error=True
    )
    assert ((estimate - log_p).abs() < 4 * error).all() and ((estimate - bound).abs() > 4 * error).all()


def test_a_single_exact_bit_makes_the_bound_tight():
    x, joint = observations(4), curved_joint((1,))
    log_joint = joint(x, joint.prior.support().expand(-1, 4, -1))
    exact = FactorisedBernoulli((log_joint[1] - log_joint[0]).unsqueeze(-1))
    torch.testing.assert_close(discrete.exact_elbo(joint, x, exact), discrete.log_marginal(joint, x, exact))


def test_enumeration_agrees_with_the_silent_elbo():
    x = observations(4)
    for joint, q in (
        (linear_joint((BITS,)), FactorisedBernoulli(randn(4, BITS))),
        (linear_joint((2, 3)), OneHotCategorical(randn(4, 2, 3))),
    ):
        torch.testing.assert_close(discrete.exact_elbo(joint, x, q), silent.elbo(joint, x, q))


def test_too_many_values_are_refused():
    x = observations()
    assert len(FactorisedBernoulli(torch.zeros(1, 12)).support()) == 4096
    for q in (FactorisedBernoulli(torch.zeros(1, 13)), OneHotCategorical(torch.zeros(1, 4, 10))):
        with pytest.raises(InputError, match=r"has (8,192|10,000) values, too many .* at most 4,096 \(12 bits\)"):
            discrete.exact_elbo(linear_joint(), x, q)
    with pytest.raises(InputError, match="enumeration is for a discrete posterior.*DiagonalGaussian"):
        discrete.exact_elbo(linear_joint(), x, DiagonalGaussian(x, x))


# Means and variances, exactly


@JOINTS
@pytest.mark.parametrize("name", [name for name in UNBIASED if name != "elbo-silent"])
def test_unbiased_estimators_have_the_exact_mean(name, make_joint):
    joint, x = make_joint(), observations()
    for k in (1, 2) if ESTIMATORS[name].least_k == 1 else (2,):
        mean, _ = exact_moments(name, joint, x, LOGITS, k)
        torch.testing.assert_close(mean, truth(joint, x, LOGITS), rtol=1e-9, atol=1e-9)


@JOINTS
@pytest.mark.parametrize("name", ["iwae-score", "iwae-vimco"])
def test_the_rows_of_the_other_bound_have_theirs(name, make_joint):
    """The expectation of the bound of two draws, over all pairs of values."""
    joint, x, leaf = make_joint(), observations(), LOGITS.clone().requires_grad_()
    q = FactorisedBernoulli(leaf)
    z = q.support()
    log_q = q.log_prob(z)
    log_w = (joint(x, z) - log_q).squeeze(-1)
    mass = log_q.squeeze(-1).exp()
    pairs = torch.stack(torch.broadcast_tensors(log_w, log_w.unsqueeze(-1)))
    (right,) = torch.autograd.grad(mass @ BOUNDS["iwae"](pairs) @ mass, leaf)
    mean, _ = exact_moments(name, joint, x, LOGITS, k=2)
    torch.testing.assert_close(mean, right, rtol=1e-9, atol=1e-9)
    assert (mean - truth(joint, x, LOGITS)).abs().max() > 1e-2  # it is not the ELBO's


@JOINTS
def test_the_relaxed_estimators_are_biased_less_so_when_cold_but_louder(make_joint):
    joint, x = make_joint(), observations()
    right = truth(joint, x, LOGITS)
    for make in (discrete.gumbel_softmax, discrete.straight_through):
        found = {}
        for nodes in (40, 80):  # the integral has converged
            found[nodes] = [exact_moments(make(t), joint, x, LOGITS, nodes=nodes) for t in (1.0, 0.5, 0.2)]
        for (mean, variance), (again, same) in zip(found[40][:2], found[80][:2], strict=True):
            torch.testing.assert_close(mean, again, rtol=1e-2, atol=2e-3)
        bias = [(mean - right).norm().item() for mean, _ in found[80]]
        assert bias[0] > 0.1 and bias[1] > 0.02, (make.__name__, bias)
        if make is discrete.gumbel_softmax:
            assert bias[0] > bias[1] > bias[2] and found[80][0][1] < found[80][1][1] < found[80][2][1]


@JOINTS
@pytest.mark.parametrize("seed", range(5))
def test_the_variances_are_in_the_order_of_the_theory(make_joint, seed):
    """DisARM averages ARM over what does not change its samples. That a twin beats an independent draw is measured."""
    joint, x, logits = make_joint(), observations(), randn(BITS, seed=seed)
    variance = {name: exact_moments(name, joint, x, logits)[1] for name in ("elbo-score", "elbo-arm", "elbo-disarm")}
    pair, two = (exact_moments(name, joint, x, logits, k=2)[1] for name in ("elbo-score-loo", "elbo-score"))
    assert variance["elbo-disarm"] < variance["elbo-arm"] < pair < two  # two evaluations of the model each
    torch.testing.assert_close(two, variance["elbo-score"] / 2)
    for name in ("elbo-silent", "elbo-exact"):
        if name == "elbo-exact" or make_joint is linear_joint:
            assert exact_moments(name, joint, x, logits)[1] < 1e-25


def test_disarm_is_the_mean_of_arm_given_its_samples():
    joint, x = curved_joint(), observations()
    eps, weight = pieces(LOGITS, 1, 2)
    q = FactorisedBernoulli(LOGITS)
    pair = torch.cat((q.sample(eps), q.sample(1 - eps)), -1)[0]
    arm, disarm = (draws_at(ESTIMATORS[name], joint, x, LOGITS, eps) for name in ("elbo-arm", "elbo-disarm"))
    for values in pair.unique(dim=0):
        cell = (pair == values).all(-1)
        mean = weight[cell] @ arm[cell] / weight[cell].sum()
        torch.testing.assert_close(disarm[cell], mean.expand(int(cell.sum()), -1))


def test_a_wrong_estimator_has_the_wrong_mean():
    """The control of the exact means: ARM without its half, DisARM without its sign, DisARM of sigmoid(l)."""
    joint, x = curved_joint(), observations()
    wrong = [
        lambda eps, difference, q: 0.5 * eps,
        lambda eps, difference, q: 0.5 * difference.abs() * q.logits.abs().sigmoid(),
        lambda eps, difference, q: 0.5 * difference * q.logits.sigmoid(),
    ]
    for rule in wrong:
        estimator = LossEstimator("wrong", "elbo", "elbo", 1, "", discrete.antithetic(rule))
        assert (exact_moments(estimator, joint, x, LOGITS)[0] - truth(joint, x, LOGITS)).abs().max() > 1e-2


# Through the engine, on models with weights


def six_bits():
    torch.manual_seed(0)
    return curved_joint((6,)), models.DiscreteEncoder(torch.nn.Linear(X, 6, dtype=DTYPE), (6,)), observations(2)


def groups():
    torch.manual_seed(0)
    return linear_joint((2, 3)), models.DiscreteEncoder(torch.nn.Linear(X, 6, dtype=DTYPE), (2, 3)), observations(2)


def applicable(make_toy) -> list[str]:
    """The estimators for a model: the twins are for bits, and silence is for the linear decoder."""
    missing = ["elbo-silent"] if make_toy is six_bits else ["elbo-arm", "elbo-disarm"]
    return [name for name in DISCRETE if name not in missing]


def exact_gradient(joint, encoder, x):
    value = discrete.exact_elbo(joint, x, encoder(x)).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*joint.parameters(), *encoder.parameters()])])


def measured(names, toy, wrt="weights", draws=20_000, k=2):
    joint, encoder, x = toy
    generator = torch.Generator().manual_seed(2)
    estimators = [ESTIMATORS[name] for name in names]
    return gradients.measure(estimators, joint, encoder, x, draws=draws, k=k, wrt=wrt, generator=generator)


def misses(moments, exact):
    """In how many standard errors (of float rounding, where there is no spread) the worst coordinate is off."""
    return ((moments.mean - exact).abs() / moments.standard_error.clamp_min(1e-12)).max()


@pytest.mark.parametrize("make_toy", [six_bits, groups])
def test_many_draws_tell_the_unbiased_from_the_biased(make_toy):
    """All parameters of decoder and encoder, by the gradient laboratory; enumeration is the truth."""
    joint, encoder, x = toy = make_toy()
    good = [name for name in UNBIASED if name in applicable(make_toy)]
    found, exact = measured([*good, *RELAXED], toy), exact_gradient(joint, encoder, x)
    for name in good:
        assert misses(found[name], exact) < checks.SIGMAS, name
    for name in RELAXED:
        assert misses(found[name], exact) > 2 * checks.SIGMAS, name
    decoder = sum(p.numel() for p in joint.parameters())
    hard = found["elbo-straight-through"]  # sees what the decoder will see
    assert ((hard.mean - exact).abs() <= checks.SIGMAS * hard.standard_error)[:decoder].all()
    assert found["elbo-score-loo"].total_variance < found["elbo-score"].total_variance
    assert {found[name].total_variance for name in {"elbo-silent", "elbo-exact"} & set(good)} == {0}
    if "elbo-arm" in good:
        assert found["elbo-disarm"].total_variance < found["elbo-arm"].total_variance


def test_the_posterior_and_the_weights_give_one_answer():
    """The laboratory's two ways: draws side by side as one batch, and vmap over the weights."""
    toy = joint, encoder, x = six_bits()
    logits, weights = (
        measured(["elbo-disarm"], toy, wrt=wrt, draws=10)["elbo-disarm"].mean for wrt in ("posterior", "encoder")
    )
    torch.testing.assert_close(logits.unflatten(0, (len(x), 6)).mean(0), weights[-6:])  # of the bias


@pytest.mark.parametrize(("make_toy", "name"), [(toy, name) for toy in (six_bits, groups) for name in applicable(toy)])
def test_the_engine_is_the_reference_and_the_value_a_bound(make_toy, name):
    joint, encoder, x = make_toy()
    estimator, eps = ESTIMATORS[name], encoder(x).noise(3, torch.Generator().manual_seed(0))
    assert estimator.name == name and estimator.bound in BOUNDS
    value = objectives.backward(estimator, joint, encoder(x), x, eps)
    fast = [p.grad.clone() for part in (joint, encoder) for p in part.parameters()]
    joint.zero_grad(), encoder.zero_grad()
    loss = objectives.reference(estimator, joint, encoder(x), x, eps)
    loss.mean().backward()
    torch.testing.assert_close(value, -loss.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fast, [p.grad for part in (joint, encoder) for p in part.parameters()])
    q = encoder(x)
    z = torch.cat((q.sample(eps), q.sample(1 - eps))) if name in ("elbo-arm", "elbo-disarm") else q.sample(eps)
    if name in RELAXED:
        expected = joint.log_likelihood(x, z).mean(0) - q.kl(joint.prior)
    elif name in ("elbo-silent", "elbo-exact"):
        expected = discrete.exact_elbo(joint, x, q)
    else:
        expected = BOUNDS[estimator.bound](joint(x, z) - q.log_prob(z))
    torch.testing.assert_close(value, expected.detach())


def test_straight_through_decodes_bits_and_gumbel_softmax_does_not():
    seen = []

    class Watch(Cube):
        def forward(self, z):
            seen.append(z.detach())
            return super().forward(z)

    joint = models.DiscreteJoint(Watch(BITS, X), torch.zeros(BITS, dtype=DTYPE))
    q, x = FactorisedBernoulli(LOGITS.expand(1, -1).clone().requires_grad_()), observations()
    for name in RELAXED:
        objectives.backward(ESTIMATORS[name], joint, q, x, q.noise(50, torch.Generator().manual_seed(0)))
    hard, soft, through = seen
    assert torch.equal(hard, hard.round()) and torch.equal(through, hard) and not torch.equal(soft, soft.round())


def test_a_temperature_is_in_the_name_and_above_0():
    assert discrete.gumbel_softmax(0.25).name == "elbo-gumbel-softmax(0.25)"
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(InputError, match="temperature .* must be a positive number"):
            discrete.gumbel_softmax(wrong)


# What is refused


def test_rows_with_a_path_refuse_a_discrete_posterior():
    joint, encoder, x = six_bits()
    q = encoder(x)
    paths = [row for row in TABLEAU.values() if row.reparameterised]
    assert paths
    for row in paths:
        for run in (objectives.backward, objectives.reference):
            with pytest.raises(InputError, match="that of a FactorisedBernoulli does not.*elbo-score-loo"):
                run(row, joint, q, x, q.noise(2))


def test_estimators_say_what_they_are_for():
    joint, encoder, x = groups()
    eps = encoder(x).noise(2)
    for name in ("elbo-arm", "elbo-disarm"):
        with pytest.raises(InputError, match="for bits.*OneHotCategorical.*elbo-score-loo"):
            objectives.backward(ESTIMATORS[name], joint, encoder(x), x, eps)
    gauss = DiagonalGaussian(torch.zeros(2, 6, dtype=DTYPE), torch.zeros(2, 6, dtype=DTYPE))
    for name in (*RELAXED, "elbo-exact"):
        with pytest.raises(InputError, match="for a discrete posterior.*DiagonalGaussian"):
            objectives.backward(ESTIMATORS[name], joint, gauss, x, eps)

    class Whole(torch.nn.Module):
        def forward(self, x, z):
            return z  # neither a likelihood of its own nor summed

    with pytest.raises(InputError, match="log_likelihood.* Whole does not have"):
        objectives.backward(ESTIMATORS["elbo-gumbel-softmax"], Whole(), encoder(x), x, eps)
    bits = FactorisedBernoulli(torch.zeros(2, 6, dtype=DTYPE, requires_grad=True))
    for name in ("elbo-exact", "elbo-arm"):
        with pytest.raises(InputError, match=r"shape \[K, B\] = .* but returned \[\d+, 2, 6\]"):
            objectives.backward(ESTIMATORS[name], Whole(), bits, x, eps)
    with pytest.raises(InputError, match=r"\(bits,\) or \(groups, classes\), but this one has \(1, 2, 3\)"):
        models.DiscreteEncoder(torch.nn.Linear(3, 6), (1, 2, 3))


def test_a_discrete_model_can_be_saved_and_moved():
    joint, encoder, x = groups()
    again, _, _ = groups()
    again.load_state_dict(joint.state_dict())
    assert "prior_logits" in joint.state_dict() and joint.float().prior.logits.dtype == torch.float32
    assert encoder(x).noise(3, torch.Generator().manual_seed(0)).shape == (3, 2, 6)
    assert torch.equal(*(q.noise(2, torch.Generator().manual_seed(1)) for q in (encoder(x), encoder(x))))


def test_training_by_any_name_raises_the_exact_bound():
    """A hundred steps each from one start."""
    for name in ("elbo-score-loo", "elbo-arm", "elbo-disarm", *RELAXED, "elbo-exact"):
        joint, encoder, x = six_bits()
        optimizer = torch.optim.Adam([*joint.parameters(), *encoder.parameters()], lr=0.05)
        generator = torch.Generator().manual_seed(0)
        before = discrete.exact_elbo(joint, x, encoder(x)).mean().item()
        for _ in range(100):
            optimizer.zero_grad()
            q = encoder(x)
            objectives.backward(ESTIMATORS[name], joint, q, x, q.noise(2, generator))
            optimizer.step()
        assert discrete.exact_elbo(joint, x, encoder(x)).mean().item() > before + 0.5, name


# Beside them: a linear decoder's silent gradient as a control variate, and the pairings that training refuses


@pytest.mark.parametrize("name", ["elbo-arm", "elbo-disarm", "elbo-score"])
def test_a_control_variate_leaves_their_mean_alone_and_takes_all_noise_of_a_linear_model(name):
    joint, x = models.Guided(curved_joint(), linear_joint()), observations()
    exact = truth(joint.joint, x, LOGITS)
    for scale in (0.5, 1.0):
        mean, variance = exact_moments(silent.controlled(ESTIMATORS[name], scale), joint, x, LOGITS)
        torch.testing.assert_close(mean, exact)
        assert variance > 1e-6
    same = models.Guided(joint.guide, joint.guide)
    assert exact_moments(silent.controlled(ESTIMATORS[name], 1.0), same, x, LOGITS)[1] < 1e-20
    forgetful = silent.controlled(ESTIMATORS[name], 0.5, lambda base, joint, *rest: base.loss(joint.guide, *rest))
    assert (exact_moments(forgetful, joint, x, LOGITS)[0] - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model", "estimator", "sentence"),
    [
        ("mlp-1", "elbo-silent", "BernoulliMLP has no closed form"),
        ("mlp-1", "elbo-arm", "ARM and DisARM are for bits"),
        ("mlp-1", "elbo-gumbel-softmax", "for a discrete posterior"),
        ("mlp-1", "elbo-exact", "enumeration is for a discrete posterior"),
        ("mlp-1-bernoulli", "elbo-path", "needs a sample that moves with the encoder"),
        ("mlp-1-bernoulli", "elbo-silent", "BernoulliMLP has no closed form"),
        ("mlp-1-categorical", "elbo-disarm", "this one is a OneHotCategorical"),
        ("mlp-1-bernoulli", "elbo-exact", "too many to go through"),
        ("linear", "elbo-straight-through", "for a discrete posterior"),
    ],
)
def test_a_wrong_pairing_is_refused_before_training(model, estimator, sentence):
    split = data.load("digits", "grey" if model.startswith("linear") else "dynamic").train
    vae = models.build(model, 64, generator=torch.Generator().manual_seed(0))
    before = [value.clone() for value in vae.parameters()]
    with pytest.raises(InputError, match=sentence):
        training.fit(vae, split, estimator, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters()))


@pytest.mark.parametrize("model", ["linear-bernoulli", "linear-categorical", "mlp-1-bernoulli", "mlp-1-categorical"])
@pytest.mark.parametrize("estimator", ["elbo-score-loo", "elbo-gumbel-softmax"])
def test_the_discrete_models_learn(model, estimator):
    split = data.load("digits", "grey" if model.startswith("linear") else "dynamic").train
    sizes = {"latent": 3} if model.startswith("linear") else {"latent": 3, "hidden": 20}
    vae = models.build(model, 64, split.grey.mean(0), torch.Generator().manual_seed(0), **sizes)
    history = training.fit(vae, split, estimator, epochs=3, k=2, lr=1e-2, batch_size=50)
    assert history[-1]["bound"] > history[0]["bound"]


def test_every_estimator_is_found_by_name():
    names = list(ESTIMATORS)
    assert names[: len(TABLEAU)] == list(TABLEAU) and set(UNBIASED) | set(RELAXED) < set(names)
    assert all(row.name == name and row.summary.endswith(".") for name, row in ESTIMATORS.items())
    assert set(names) <= set(plots.LOOKS)
    with pytest.raises(InputError, match="did you mean 'elbo-disarm'"):
        get("elbo-disarn")
    assert get("DisARM") is get("elbo-disarm") is ESTIMATORS["elbo-disarm"]


# Sure bits, impossible values, and noise that is exactly 0


def extremes(kind, value):
    """The logits of two observations: some entries of the first are ``value``; and their model."""
    logits = randn(2, 4, seed=6)
    logits[0, [0, 3]] = value
    if kind == "bits":
        return logits, curved_joint((4,))
    return logits.unflatten(-1, (2, 2)), linear_joint((2, 2))


FINITE_OR_NOT = [("bits", math.inf), ("bits", -math.inf), ("choices", -math.inf)]
NOT_FOR = {"bits": ["elbo-silent"], "choices": ["elbo-arm", "elbo-disarm"]}
USED = [(kind, value, name) for kind, value in FINITE_OR_NOT for name in DISCRETE if name not in NOT_FOR[kind]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "value", "name"), USED)
def test_a_logit_that_is_infinite_is_one_that_is_very_large(kind, value, name, dtype):
    """In value and all gradients; of the logits themselves nothing moves any more."""
    found = []
    for size in (value, math.copysign(800.0, value)):
        logits, joint = extremes(kind, size)
        joint, x = joint.to(dtype), observations(2).to(dtype)
        leaf = logits.to(dtype).requires_grad_()
        q = (FactorisedBernoulli if kind == "bits" else OneHotCategorical)(leaf)
        eps = q.noise(5, torch.Generator().manual_seed(3))
        loss = ESTIMATORS[name].loss(joint, q, x, eps)
        of_logits, *of_joint = torch.autograd.grad(loss.sum(), [leaf, *joint.parameters()])
        sure = of_logits[0].flatten()[[0, 3]].clone()
        of_logits[0].view(-1)[[0, 3]] = 0.0
        found.append([loss.detach(), of_logits, *of_joint])
        if size == value or name != "elbo-arm":  # whose noise has the mean 0 there, but is not 0
            torch.testing.assert_close(sure, torch.zeros_like(sure), rtol=0, atol=1e-30)
    assert all(part.isfinite().all() for part in found[0]) and found[0][1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-5 if dtype is torch.float32 else 1e-9, atol=1e-5)


class Forbidden(torch.nn.Module):
    """A joint density of two bits where the second may not be 1."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.7, dtype=DTYPE))

    def forward(self, x, z):
        log_p = self.theta * z[..., 0] - x.sum(-1)
        return log_p.masked_fill(z[..., 1] > 0.5, -math.inf)


@pytest.mark.parametrize("never", [-math.inf, -800.0])
@pytest.mark.parametrize("name", ["elbo-arm", "elbo-disarm", "elbo-exact"])
def test_an_impossible_value_that_q_may_draw_makes_the_bound_minus_infinity_and_no_nan(name, never):
    """Of an observation where q keeps away from it, the gradient is what it was."""
    joint, x = Forbidden(), observations(2)
    leaf = torch.tensor([[0.3, 0.5], [-0.4, never]], dtype=DTYPE, requires_grad=True)
    q = FactorisedBernoulli(leaf)
    eps = q.noise(20, torch.Generator().manual_seed(0))
    loss = ESTIMATORS[name].loss(joint, q, x, eps)
    both, one = (torch.autograd.grad(value, [leaf, joint.theta], retain_graph=True) for value in (loss.sum(), loss[1]))
    assert loss[0] == math.inf and loss[1].isfinite()
    assert all(part.isfinite().all() for part in both)
    torch.testing.assert_close(both[0][1], one[0][1])
    assert one[0][1, 0] != 0


def test_log_p_of_what_cannot_be_is_minus_infinity_without_a_slope():
    class Nowhere(Forbidden):
        def forward(self, x, z):
            return (super().forward(x, z) + 0 * z[..., 1]).masked_fill(x[:, 0] > 0, -math.inf)

    x = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=DTYPE)
    joint, q = Nowhere(), FactorisedBernoulli(torch.zeros(2, 2, dtype=DTYPE))
    value = discrete.log_marginal(joint, x, q)
    assert value[0] == -math.inf
    torch.testing.assert_close(value[1].exp(), (joint.theta.exp() + 1) * math.exp(-1))
    (slope,) = torch.autograd.grad(value.sum(), joint.theta)
    torch.testing.assert_close(slope, joint.theta.detach().sigmoid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_uniform_number_that_is_exactly_0_is_none(monkeypatch, dtype):
    """torch.rand gives one in 2^24: then a sure bit would be 0, and a Gumbel variable infinite."""
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: rand(*a, **k) * 0)
    for q in (
        FactorisedBernoulli(torch.tensor([[math.inf, 800.0, 0.0]], dtype=dtype)),
        OneHotCategorical(torch.tensor([[[-math.inf, 0.0, 1.0]]], dtype=dtype)),
    ):
        eps = q.noise(2)
        assert 0 < eps.min() and eps.max() < 1e-30 and gumbel(eps).isfinite().all()
        assert q.sample(eps)[0, 0].tolist() == ([1, 1, 0] if isinstance(q, FactorisedBernoulli) else [0, 0, 1])
        assert q.relaxed_sample(eps, 0.1).isfinite().all()


def test_the_named_relaxed_estimators_have_the_temperature_one_half():
    joint, x = curved_joint(), observations()
    q = FactorisedBernoulli(LOGITS.expand(1, -1).clone().requires_grad_())
    eps = q.noise(5, torch.Generator().manual_seed(0))
    for name, make in zip(RELAXED, (discrete.gumbel_softmax, discrete.straight_through), strict=True):
        found, same, other = (
            torch.autograd.grad(e.loss(joint, q, x, eps).sum(), q.logits)[0]
            for e in (ESTIMATORS[name], make(0.5), make(0.6))
        )
        assert torch.equal(found, same) and not torch.allclose(found, other)


def test_several_draws_and_their_twins_count_alike():
    """Value, decoder and logits of K draws are the means over those of one each."""
    joint, x = curved_joint(), observations(2)
    leaf = randn(2, BITS, seed=5).requires_grad_()
    eps = FactorisedBernoulli(leaf).noise(4, torch.Generator().manual_seed(0))
    for name in ("elbo-arm", "elbo-disarm", *RELAXED):

        def value_and_gradient(e, name=name):
            loss = ESTIMATORS[name].loss(joint, FactorisedBernoulli(leaf), x, e)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), [leaf, *joint.decode.parameters()])]

        each = [value_and_gradient(e.unsqueeze(0)) for e in eps]
        mean = [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]
        torch.testing.assert_close(value_and_gradient(eps), mean)


def test_a_fair_prior_of_no_logits_and_one_of_an_axis_too_many():
    assert models.DiscreteJoint(Cube(2, 3), torch.zeros(2)).prior.logits.shape == (2,)
    for wrong in (torch.zeros(()), torch.zeros(1, 2, 3)):
        with pytest.raises(InputError, match=r"\(bits,\) or \(groups, classes\)"):
            models.DiscreteJoint(Cube(2, 3), wrong)
    learned = models.DiscreteJoint(Cube(2, 3), torch.nn.Parameter(torch.zeros(2)))
    assert "prior_logits" in dict(learned.named_parameters())
