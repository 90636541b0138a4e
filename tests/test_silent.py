"""The closed forms against sums over all of z, their gradients against autograd of those sums, and 10^6 draws.

A sum over all of z is Gauss-Hermite quadrature for Gaussians (exact for polynomials, hence for these integrands) and
enumeration for discrete latents; everything in float64. The draws are held to 4 standard errors in 10 means: a
false alarm once in 1,500 seeds, and the seed is fixed.
"""

import csv
import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal
from toys import DTYPE, Normals

from vaelib import bounds, checks, data, discrete, estimators, gradients, models, objectives, silent, training
from vaelib.errors import InputError
from vaelib.flows import AffineCoupling, FlowEncoder, StandardNormal
from vaelib.likelihoods import Gaussian
from vaelib.posteriors import (
    DiagonalGaussian,
    FactorisedBernoulli,
    FullGaussian,
    HierarchicalGaussian,
    Mixture,
    OneHotCategorical,
    Posterior,
    standard_normal_log_prob,
)

B, X, D = 2, 3, 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def diagonal(mean, log_std):
    return DiagonalGaussian(mean, 0.5 * log_std)


def full(mean, raw):
    return FullGaussian(mean, raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp()))


def mixture(mean0, log_std0, mean1, raw1, logits):
    return Mixture((diagonal(mean0, log_std0), full(mean1, raw1)), logits)


def choices(logits):
    return OneHotCategorical(logits)


FAMILIES = {
    "diagonal": (diagonal, [(B, D), (B, D)]),
    "full": (full, [(B, D), (B, D, D)]),
    "full, one covariance": (full, [(B, D), (D, D)]),
    "mixture": (mixture, [(B, D), (B, D), (B, D), (B, D, D), (2, B)]),
    "bits": (FactorisedBernoulli, [(B, D)]),
    "choices": (choices, [(B, 2, 2)]),
}
"""The posterior as a function of unconstrained parameters, and their shapes."""

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def decoder():
    weight, bias, log_std = randn(X, D, seed=1), randn(X, seed=2), 0.3 * randn(X, seed=3)
    return [value.requires_grad_() for value in (weight, bias, log_std)]


@pytest.fixture
def x():
    return randn(B, X, seed=4)


def parameters(family: str) -> list[torch.Tensor]:
    return [randn(*shape, seed=10 + i).requires_grad_() for i, shape in enumerate(FAMILIES[family][1])]


def expectation(q, function, nodes: int = 4) -> torch.Tensor:
    """Integrate ``function(z) -> [S, B]`` under q by quadrature or enumeration, differentiable in phi, ``[B]``."""
    if isinstance(q, Mixture):
        parts = torch.stack([expectation(part, function, nodes) for part in q.components])
        return (q.log_weights.exp() * parts).sum(0)
    if isinstance(q, DiagonalGaussian | FullGaussian):
        points, mass = np.polynomial.hermite_e.hermegauss(nodes)
        dim = q.mean.shape[-1]
        eps = torch.cartesian_prod(*[torch.tensor(points, dtype=DTYPE)] * dim).reshape(-1, 1, dim)
        weight = torch.cartesian_prod(*[torch.tensor(mass / mass.sum(), dtype=DTYPE)] * dim).reshape(-1, dim).prod(1)
        return weight @ function(q.sample(eps.expand(-1, len(q.mean), -1)))
    z = q.support()
    return (q.log_prob(z).exp() * function(z)).sum(0)


def log_prob(x, decoder):
    weight, bias, log_std = decoder
    return lambda z: Gaussian(z @ weight.mT + bias, log_std).log_prob(x)


def same_gradient(mine, truth, wanted):
    """Compare the gradients of two values ``[B]``, observation by observation."""
    for ours, theirs in zip(mine, truth, strict=True):
        found = [torch.autograd.grad(value, wanted, retain_graph=True) for value in (ours, theirs)]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@every_family
def test_the_expectation_and_all_its_gradients_are_those_of_the_sum_over_z(family, decoder, x):
    phi = parameters(family)
    q = FAMILIES[family][0](*phi)
    truth, mine = expectation(q, log_prob(x, decoder)), silent.expected_log_prob(x, q, *decoder)
    torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)
    same_gradient(mine, truth, [*phi, *decoder])


@every_family
def test_a_wrong_variance_is_found(family, decoder, x):
    """Negative controls: no variance; a full covariance by its diagonal; a mixture or a choice by half its law."""
    q = FAMILIES[family][0](*parameters(family))
    weight = decoder[0]
    mean, variance = q.linear_moments(weight)
    wrong = {"no variance": 0 * variance}
    if isinstance(q, FullGaussian):
        wrong["diagonal"] = q.scale_tril.square().sum(-1).expand_as(q.mean) @ weight.square().mT
    if isinstance(q, Mixture):
        share = q.log_weights.exp().unsqueeze(-1)
        wrong["within"] = (share * torch.stack([part.linear_moments(weight)[1] for part in q.components])).sum(0)
    if isinstance(q, OneHotCategorical):
        wrong["independent"] = (q.mean * (1 - q.mean)) @ weight.square().mT
    for name, value in wrong.items():
        moments = dataclasses.make_dataclass("Wrong", [], bases=(Posterior,))()
        moments.linear_moments = lambda _, value=value: (mean, value)
        off = silent.expected_log_prob(x, moments, *decoder) - expectation(q, log_prob(x, decoder))
        assert off.abs().max() > 1e-3, name


def streamed(q, decoder, x, draws=10**6, chunk=10**5) -> gradients.Moments:
    generator, moments = torch.Generator().manual_seed(0), gradients.Moments()
    for _ in range(draws // chunk):
        eps = q.noise(chunk, generator)
        value = log_prob(x, decoder)(q.sample(eps))
        if isinstance(q, Mixture):  # the draws are stratified: put one of each component together
            value = (q.log_share(chunk).exp() * value).unflatten(0, (len(q.components), -1)).mean(0)
        moments.add(value)
    return moments


@every_family
@torch.no_grad()
def test_a_million_draws_agree(family, decoder, x):
    q = FAMILIES[family][0](*parameters(family))
    moments, exact = streamed(q, decoder, x), silent.expected_log_prob(x, q, *decoder)
    assert ((moments.mean - exact).abs() < checks.SIGMAS * moments.standard_error).all()
    wrong = silent.expected_log_prob(x, q, decoder[0], decoder[1], decoder[2] + 0.02)
    assert ((moments.mean - wrong).abs() > checks.SIGMAS * moments.standard_error).any()


@every_family
def test_the_profiled_scale_is_the_best_one_and_its_derivative_does_not_matter(family, decoder, x):
    phi, (weight, bias, _) = parameters(family), decoder
    q = FAMILIES[family][0](*phi)
    square_error = silent.expected_square_error(x, q, weight, bias)
    for shared in (True, False):
        log_std = silent.profiled_log_std(square_error, shared)
        assert log_std.shape == (() if shared else (X,))
        value = silent.expected_log_prob(x, q, weight, bias, log_std).mean()
        leaf = log_std.detach().requires_grad_()
        stopped = silent.expected_log_prob(x, q, weight, bias, leaf).mean()
        *gradient, slope = torch.autograd.grad(stopped, [*phi, weight, bias, leaf], retain_graph=True)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
        live = torch.autograd.grad(value, [*phi, weight, bias], retain_graph=True)
        torch.testing.assert_close(list(live), gradient, rtol=1e-9, atol=1e-10)
        for nudge in (-0.01, 0.01):
            assert silent.expected_log_prob(x, q, weight, bias, log_std + nudge).mean() < value
    scale = (2 * silent.profiled_log_std(square_error)).exp()
    profiled = -0.5 * X * (math.log(2 * math.pi) + scale.log() + 1)
    torch.testing.assert_close(silent.expected_log_prob(x, q, weight, bias, 0.5 * scale.log()).mean(), profiled)


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_a_log_linear_scale_is_exact_too(family, x):
    shapes = [(B, 2), (B, 2)] if family == "diagonal" else [(B, 2), (B, 2, 2)]
    phi = [(0.5 * randn(*shape, seed=20 + i)).requires_grad_() for i, shape in enumerate(shapes)]
    q = FAMILIES[family][0](*phi)
    weight, bias = randn(X, 2, seed=1).requires_grad_(), randn(X, seed=2).requires_grad_()
    scale_weight, scale_bias = (0.5 * randn(X, 2, seed=5)).requires_grad_(), randn(X, seed=6).requires_grad_()
    arguments = [weight, bias, scale_weight, scale_bias]

    def sampled(z):
        return Gaussian(z @ weight.mT + bias, 0.5 * (z @ scale_weight.mT + scale_bias)).log_prob(x)

    truth, mine = expectation(q, sampled, nodes=60), silent.expected_log_prob_log_linear(x, q, *arguments)
    torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)
    same_gradient(mine, truth, [*phi, *arguments])
    with pytest.raises(InputError, match="Gaussian posterior, but this one is a FactorisedBernoulli"):
        silent.expected_log_prob_log_linear(x, FactorisedBernoulli(phi[0]), *arguments)
    untilted = silent.expected_log_prob(x, q, weight, bias, 0.5 * scale_bias)
    assert (untilted - truth).abs().min() > 1e-2  # the control: a scale that ignores z
    constant = silent.expected_log_prob_log_linear(x, q, weight, bias, 0 * scale_weight, scale_bias)
    torch.testing.assert_close(constant, untilted)


# A decoder linear in cosines


def cosines(dim: int, features: int = 5) -> models.CosineDecoder:
    parts = [(features, dim), (features,), (X, features), (X,), (X,)]
    return models.CosineDecoder(*(0.5 * randn(*shape, seed=40 + i) for i, shape in enumerate(parts)))


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_a_decoder_linear_in_cosines_is_exact_too(family, x):
    phi = [
        randn(*shape, seed=20 + i).requires_grad_()
        for i, shape in enumerate([(B, 2), (B, 2) if family == "diagonal" else (B, 2, 2)])
    ]
    q, decoder = FAMILIES[family][0](*phi), cosines(2)
    truth = expectation(q, lambda z: decoder(z).log_prob(x), nodes=60)
    mine = silent.elbo(models.Joint(decoder), x, q) + q.kl()
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)
    same_gradient(mine, truth, [*phi, *decoder.parameters()])
    decoder.log_std = torch.nn.Parameter(torch.tensor(0.2, dtype=DTYPE))  # one scale for all pixels
    truth = expectation(q, lambda z: decoder(z).log_prob(x), nodes=60)
    torch.testing.assert_close(decoder.expected_log_likelihood(x, q), truth, rtol=1e-9, atol=1e-9)
    at_the_mean = decoder(q.mean).log_prob(x)  # the control: no variance
    assert (at_the_mean - truth).abs().min() > 1e-3
    with pytest.raises(InputError, match="Gaussian posterior, but this one is a FactorisedBernoulli"):
        decoder.expected_log_likelihood(x, FactorisedBernoulli(phi[0]))


# The ELBO

PRIORS = {"bits": torch.linspace(-1, 1, D, dtype=DTYPE), "choices": torch.linspace(-1, 1, D, dtype=DTYPE).reshape(2, 2)}


def joint_for(family, decoder, prior_logits=None):
    linear = models.LinearDecoder(*(value.detach() for value in decoder))
    if family not in PRIORS:
        return models.Joint(linear)
    return models.DiscreteJoint(linear, PRIORS[family] if prior_logits is None else prior_logits)


@pytest.mark.parametrize("family", ["diagonal", "full", "full, one covariance", "bits", "choices"])
def test_the_elbo_is_that_of_the_sum_over_z(family, decoder, x):
    joint = joint_for(family, decoder)
    phi = parameters(family)
    q = FAMILIES[family][0](*phi)
    truth, mine = expectation(q, lambda z: joint(x, z) - q.log_prob(z)), silent.elbo(joint, x, q)
    torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)
    same_gradient(mine, truth, [*phi, *joint.parameters()])


def test_a_learned_prior_gets_its_gradient(decoder, x):
    joint = joint_for("bits", decoder, torch.nn.Parameter(PRIORS["bits"].clone()))
    q = FactorisedBernoulli(*parameters("bits"))
    truth, mine = expectation(q, lambda z: joint(x, z) - q.log_prob(z)), silent.elbo(joint, x, q)
    same_gradient(mine, truth, [joint.prior_logits])
    assert torch.autograd.grad(mine.sum(), joint.prior_logits)[0].abs().min() > 0


def test_at_the_optimum_the_elbo_is_the_likelihood_and_silent():
    """Of probabilistic PCA: the gradient is 0, and no draw says otherwise."""
    x = randn(40, 6, seed=7) @ randn(6, 6, seed=8)
    joint = models.ppca(x, 2)
    encoder = models.exact_encoder(joint)
    value = objectives.backward(silent.ELBO, joint, encoder(x), x, None)
    torch.testing.assert_close(value, joint.log_marginal(x).detach())
    gradient = torch.cat([p.grad.flatten() for part in (joint, encoder) for p in part.parameters()])
    assert gradient.abs().max() < 1e-10
    torch.testing.assert_close(silent.elbo(joint, x, joint.posterior(x)), joint.log_marginal(x))


class Encoder(torch.nn.Module):
    """q(z | x) with a log-scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = torch.nn.Linear(X, D, dtype=DTYPE), torch.nn.Linear(X, D, dtype=DTYPE)

    def forward(self, x):
        return DiagonalGaussian(self.mean(x), self.log_std(x))


@pytest.mark.parametrize("wrt", gradients.WRT)
def test_it_has_no_variance_over_the_noise_and_is_what_the_noisy_ones_estimate(wrt, decoder, x):
    torch.manual_seed(0)
    joint, encoder = joint_for("diagonal", decoder), Encoder()
    found = gradients.measure(
        ["elbo-path", silent.ELBO], joint, encoder, x, draws=4000, wrt=wrt, generator=torch.Generator().manual_seed(1)
    )
    quiet, noisy = found["elbo-silent"], found["elbo-path"]
    assert quiet.total_variance == 0 and noisy.total_variance > 1e-2
    assert ((noisy.mean - quiet.mean).abs() < checks.SIGMAS * noisy.standard_error).all()
    assert not ((noisy.mean - 1.2 * quiet.mean).abs() < checks.SIGMAS * noisy.standard_error).all()


def test_the_engine_the_reference_and_the_noise_form_agree(decoder, x):
    torch.manual_seed(0)
    joint, encoder = joint_for("diagonal", decoder), Encoder()
    value = objectives.backward(silent.ELBO, joint, encoder(x), x, None)
    loss = silent.ELBO.loss(joint, encoder(x), x, torch.zeros(3, B, D, dtype=DTYPE))
    torch.testing.assert_close(value, -loss.detach(), rtol=0, atol=0)
    q = encoder(x)
    z = q.sample(q.noise(40_000, torch.Generator().manual_seed(0)))
    checks.unbiased(bounds.elbo_kl(joint, x, q, z).detach(), value)


# Beside a nonlinear decoder


KINDS = {"diagonal": DiagonalGaussian, "bits": FactorisedBernoulli}


class Bent(torch.nn.Module):
    """A decoder that is not linear in z, but a polynomial, for which quadrature is exact."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(randn(X, dim, seed=5))

    def forward(self, z):
        linear = z @ self.weight.mT
        return Gaussian(linear + 0.2 * linear.square(), torch.tensor(-0.5, dtype=DTYPE))


def two_decoders(family: str, dim: int = 2) -> models.Guided:
    weight, bias, log_std = randn(X, dim, seed=1), randn(X, seed=2), torch.tensor(-0.3, dtype=DTYPE)
    parts = Bent(dim), models.LinearDecoder(weight, bias, log_std)
    if family == "bits":
        return models.Guided(*(models.DiscreteJoint(part, randn(dim, seed=3)) for part in parts))
    return models.Guided(*map(models.Joint, parts))


def noise(family: str, phi: list[torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise ``[K, N, D]`` that stands for all there is, and its weights ``[N]``."""
    if family == "bits":  # a node in each step of the sample; ARM and DisARM have more steps: see test_discrete.py
        pi = phi[0].detach().sigmoid()[0].repeat(k)
        bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=DTYPE)] * len(pi))
        eps, weight = (1 - pi + bits) / 2, torch.where(bits > 0, pi, 1 - pi).prod(1)
    else:
        points, mass = (torch.tensor(v, dtype=DTYPE) for v in np.polynomial.hermite_e.hermegauss(12))
        dim = k * phi[0].shape[1]
        eps = torch.cartesian_prod(*[points] * dim).reshape(-1, dim)
        weight = torch.cartesian_prod(*[mass / mass.sum()] * dim).reshape(-1, dim).prod(1)
    return eps.unflatten(1, (k, -1)).transpose(0, 1), weight


def moments_of_gradient(estimator, joint, family, phi, x, k=1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact mean and total variance of an estimator's gradient in phi for one observation."""
    eps, weight = noise(family, phi, k)
    leaves = [value.detach().expand(len(weight), -1).clone().requires_grad_() for value in phi]
    loss = estimator.loss(joint, KINDS[family](*leaves), x.expand(len(weight), -1), eps)
    each = -torch.cat(torch.autograd.grad(loss.sum(), leaves), dim=1)
    mean = weight @ each
    return mean, weight @ (each - mean).square().sum(1)


def exact_gradient(joint, family, phi, x) -> torch.Tensor:
    q = KINDS[family](*phi)
    elbo = expectation(q, lambda z: joint(x, z) - q.log_prob(z), nodes=12)
    return torch.cat(torch.autograd.grad(elbo.sum(), phi), dim=1)[0]


def one_observation(family: str, dim: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    count = 1 if family == "bits" else 2
    return [0.5 * randn(1, dim, seed=30 + i).requires_grad_() for i in range(count)], randn(1, X, seed=4)


ALL = estimators.ESTIMATORS
BASES = [("diagonal", "elbo-total"), ("diagonal", "elbo-path"), ("diagonal", "elbo-score"), ("bits", "elbo-score")]
bases = pytest.mark.parametrize(("family", "base"), BASES)


def close(mine, truth) -> bool:
    return torch.allclose(mine, truth, rtol=1e-7, atol=1e-7)


@bases
@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0, -2.0])
def test_a_control_variate_leaves_the_mean_alone_whatever_its_scale(family, base, scale):
    joint, (phi, x) = two_decoders(family), one_observation(family)
    mean, _ = moments_of_gradient(silent.controlled(ALL[base], scale), joint, family, phi, x)
    assert close(mean, exact_gradient(joint, family, phi, x))


@bases
def test_without_its_expectation_a_control_variate_is_a_bias(family, base):
    """The negative control: g - c g_linear, its mean left out."""

    def forgetful(base, joint, q, x, eps):
        return base.loss(joint.guide, q, x, eps)

    joint, (phi, x) = two_decoders(family), one_observation(family)
    mean, _ = moments_of_gradient(silent.controlled(ALL[base], 0.1, forgetful), joint, family, phi, x)
    assert (mean - exact_gradient(joint, family, phi, x)).abs().max() > 1e-2


@pytest.mark.parametrize("base", ["elbo-score-loo", "elbo-score"])
def test_the_same_with_two_draws(base):
    joint, (phi, x) = two_decoders("bits"), one_observation("bits")
    mean, variance = moments_of_gradient(silent.controlled(ALL[base], 0.6), joint, "bits", phi, x, k=2)
    assert close(mean, exact_gradient(joint, "bits", phi, x)) and variance > 1e-3


@bases
def test_a_guide_that_is_the_model_leaves_no_variance(family, base):
    joint, (phi, x) = two_decoders(family), one_observation(family)
    joint = models.Guided(joint.guide, joint.guide)
    _, bare = moments_of_gradient(silent.controlled(ALL[base], 0.0), joint, family, phi, x)
    _, none = moments_of_gradient(silent.controlled(ALL[base], 1.0), joint, family, phi, x)
    assert none < 1e-20 and bare > 1e-3


@bases
def test_the_best_scale_is_the_best(family, base):
    joint, (phi, x) = two_decoders(family), one_observation(family)
    eps, weight = noise(family, phi, 1)
    together = [0.0, 0.0]
    for i, mass in enumerate(weight):
        q = KINDS[family](*phi)
        for j, value in enumerate(silent.covariances(ALL[base], joint, q, x, eps[:, i : i + 1])):
            together[j] += mass.item() * value
    scale = together[0] / together[1]

    def variance(c):
        return moments_of_gradient(silent.controlled(ALL[base], c), joint, family, phi, x)[1]

    assert variance(scale) < min(variance(0.0), variance(scale - 0.05), variance(scale + 0.05))


def test_the_model_s_own_expansion_is_a_control_variate_too():
    """It leaves the mean alone; and of a linear decoder it takes all the noise there is in the posterior's mean."""
    joint, (phi, x) = two_decoders("diagonal"), one_observation("diagonal")
    estimator = silent.controlled(ALL["elbo-total"], 1.0, silent.taylor_control)
    mean, _ = moments_of_gradient(estimator, joint, "diagonal", phi, x)
    assert close(mean, exact_gradient(joint, "diagonal", phi, x))
    linear = models.Guided(joint.guide, joint.guide)
    eps = randn(50, 1, 1, 2, seed=9)

    def likelihood_part(c):
        def gradient(e):
            q = DiagonalGaussian(*(value.detach().requires_grad_() for value in phi))
            loss = -linear.log_likelihood(x, q.sample(e)).sum() - c * silent.taylor_control(None, linear, q, x, e).sum()
            return torch.autograd.grad(loss, q.mean)[0].flatten()

        return torch.stack([gradient(e) for e in eps]).var(0).sum()

    assert likelihood_part(1.0) < 1e-20 and likelihood_part(0.0) > 1e-2 and likelihood_part(0.9) > 1e-4


ROWS_OF_ELBO = [row for row in estimators.TABLEAU.values() if row.bound == "elbo"]


@pytest.mark.parametrize("row", [*ROWS_OF_ELBO, estimators.elbo_scaled(0.5)], ids=lambda row: row.name)
def test_the_loss_is_the_reference_in_value_and_all_gradients(row, decoder, x):
    torch.manual_seed(0)
    joint, encoder = joint_for("diagonal", decoder), Encoder()
    eps = randn(3, B, D, seed=8)
    everything = [*joint.parameters(), *encoder.parameters()]
    truth = objectives.reference(row, joint, encoder(x), x, eps)
    mine = row.loss(joint, encoder(x), x, eps)
    torch.testing.assert_close(mine, truth)
    same_gradient(mine, truth, everything)


@pytest.mark.parametrize("family", ["diagonal", "bits"])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("exact", [True, False])
def test_annealing_mixes_the_encoder_s_gradients_and_no_decoder_s(family, weight, exact):
    base = ALL["elbo-total" if family == "diagonal" else "elbo-gumbel-softmax"]
    guide = silent.ELBO if exact else base
    joint, (phi, x) = two_decoders(family), one_observation(family)
    q = KINDS[family](*phi)
    eps = 0.2 + 0.6 * torch.rand(2, 1, 2, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    loss = silent.annealed(base, weight, guide).loss(joint, q, x, eps)
    model, linear = base.loss(joint.joint, q, x, eps), guide.loss(joint.guide, q, x, eps)
    torch.testing.assert_close(loss, model)

    def gradients_of(value, wanted):
        return torch.autograd.grad(value.sum(), list(wanted), retain_graph=True, allow_unused=True)

    for mine, a, b in zip(gradients_of(loss, phi), gradients_of(model, phi), gradients_of(linear, phi)):
        torch.testing.assert_close(mine, (1 - weight) * a + weight * b)
    torch.testing.assert_close(
        gradients_of(loss, joint.joint.parameters()), gradients_of(model, joint.joint.parameters())
    )
    of_guide = gradients_of(loss, joint.guide.parameters())
    if weight == 0:
        assert of_guide == (None,) * len(of_guide)
    else:
        torch.testing.assert_close(of_guide, gradients_of(linear, joint.guide.parameters()))


@bases
def test_annealing_is_biased_until_it_is_done(family, base):
    joint, (phi, x) = two_decoders(family), one_observation(family)
    truth = exact_gradient(joint, family, phi, x)
    biased, done = (
        moments_of_gradient(silent.annealed(ALL[base], weight), joint, family, phi, x)[0] for weight in (0.3, 0.0)
    )
    assert close(done, truth) and (biased - truth).abs().max() > 1e-2
    assert [silent.annealed(ALL[base], weight).target for weight in (0.3, 0.0)] == [None, "elbo"]


@pytest.mark.parametrize("schedule", silent.SCHEDULES.values(), ids=silent.SCHEDULES)
def test_schedules_go_from_one_to_zero(schedule):
    weights = [schedule(t / 20) for t in range(30)]
    assert weights[0] == 1 and weights[20:] == [0] * 10
    assert all(a > b for a, b in zip(weights[:20], weights[1:21]))


def images(n=60):
    return data.load("digits").train.grey[:n]


def split(n=60):
    return dataclasses.replace(data.load("digits").train, grey=images(n), labels=None)


@pytest.mark.parametrize(("model", "base"), [("guided", "elbo-path"), ("guided-bernoulli", "elbo-score-loo")])
def test_training_with_a_schedule_and_with_a_tracked_scale(model, base):
    def trained(make):
        torch.manual_seed(0)
        vae = models.build(model, 64, images().mean(0), torch.Generator().manual_seed(0), hidden=8, latent=3)
        history = training.fit(vae, split(), make(vae), epochs=3, batch_size=20, k=2, lr=1e-2)
        return [record["bound"] for record in history], vae

    plain = trained(lambda _: silent.annealed(ALL[base], 0.0))
    constant = trained(lambda _: lambda done: silent.annealed(ALL[base], 0.0))
    assert plain[0] == constant[0]
    seen = []

    def schedule(progress):
        seen.append(progress.done)
        return silent.annealed(ALL[base], silent.linear(2 * progress.done))

    annealed = trained(lambda _: schedule)
    assert seen == [0.0, *(i / 9 for i in range(9))] and annealed[0] != plain[0]
    tracked = []

    def track(vae):
        generator = torch.Generator().manual_seed(5)
        tracked.append(silent.TrackedScale(ALL[base], vae, images(), 2, every=2, generator=generator))
        return tracked[0]

    controlled = trained(track)
    assert controlled[0] != plain[0] and tracked[0].calls == 10 and tracked[0].scale != 0
    guides = [dict(vae.joint.guide.named_parameters()) for _, vae in (plain, controlled)]
    assert all(not torch.equal(a, b) for a, b in zip(guides[0].values(), guides[1].values()))  # only one has learned


def test_the_scale_does_not_depend_on_the_draws_it_scales():
    """The negative control of unbiasedness: a scale made of the same draws is a bias."""
    joint, (phi, x) = two_decoders("bits"), one_observation("bits")
    eps, weight = noise("bits", phi, 1)

    def own_scale(base, joint, q, x, e):
        parts = []
        for i in range(e.shape[1]):
            one = FactorisedBernoulli(q.logits[i : i + 1].detach())
            covariance, variance = silent.covariances(base, joint, one, x[i : i + 1], e[:, i : i + 1])
            parts.append(covariance / variance)
        return torch.tensor(parts, dtype=DTYPE) * silent.linear_control(base, joint, q, x, e)

    mean, _ = moments_of_gradient(silent.controlled(ALL["elbo-score"], 1.0, own_scale), joint, "bits", phi, x)
    assert (mean - exact_gradient(joint, "bits", phi, x)).abs().max() > 1e-3


def test_what_a_guide_refuses(decoder, x):
    phi, _ = one_observation("diagonal")
    q, eps = DiagonalGaussian(*phi), torch.zeros(1, 1, 2, dtype=DTYPE)
    with pytest.raises(InputError, match="weight of the guide must be a number between 0 and 1, but is 1.5"):
        silent.annealed(ALL["elbo-path"], 1.5)
    for make in (silent.annealed, silent.controlled):
        with pytest.raises(InputError, match="'iwae-dreg' is of the bound 'iwae'"):
            make(ALL["iwae-dreg"], 0.5)
        with pytest.raises(InputError, match="Joint has none: use models.Guided"):
            make(ALL["elbo-path"], 0.5).loss(joint_for("diagonal", decoder), q, x[:1], eps)
    for name in ("elbo-path", "elbo-total"):  # bits have no path, and dropping the score would leave nothing
        logits = FactorisedBernoulli(phi[0].detach().requires_grad_())
        with pytest.raises(InputError, match=f"'{name}' is reparameterised: .* that of a FactorisedBernoulli does not"):
            silent.controlled(ALL[name], 0.5).loss(two_decoders("bits"), logits, x[:1], eps + 0.5)
    bits, u = FactorisedBernoulli(phi[0]), torch.full((1, 1, 2), 0.5, dtype=DTYPE)
    with pytest.raises(InputError, match="DiagonalGaussian posterior, but this one is a FactorisedBernoulli"):
        silent.controlled(ALL["elbo-score"], 1.0, silent.taylor_control).loss(two_decoders("bits"), bits, x[:1], u)


def with_networks():
    couplings = [AffineCoupling(2)]
    first = DiagonalGaussian(*one_observation("diagonal")[0])
    return [
        FlowEncoder(StandardNormal(2), couplings).double()(randn(1, X)),
        FlowEncoder(StandardNormal(2), couplings, one_pass=True).double()(randn(1, X)),
        HierarchicalGaussian(first, (models.GaussianMLP((2, 3), 2).double(),)),
    ]


@pytest.mark.parametrize("q", with_networks(), ids=lambda q: type(q).__name__)
def test_a_posterior_with_a_network_inside_is_refused_by_what_scales_or_splits_its_gradient(q):
    """Its gradient would go past the numbers that are scaled, straight to the network."""
    joint, x, eps = two_decoders("diagonal"), randn(1, X), q.noise(2)
    sentence = f"a {type(q).__name__} has a network inside: use DiagonalGaussian"
    for attempt in (
        lambda: silent.scaled_gradient(q, 0.5),
        lambda: silent.covariances(ALL["elbo-path"], joint, q, x, eps),
        lambda: silent.annealed(ALL["elbo-path"], 0.5).loss(joint, q, x, eps),
    ):
        with pytest.raises(InputError, match=sentence):
            attempt()


@every_family
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_a_scaled_gradient_is_that_many_times_the_gradient(family, factor):
    """Of every parameter, and of nothing else: the value stays, and the derivative in z."""
    phi = parameters(family)
    q = FAMILIES[family][0](*phi)
    scaled = silent.scaled_gradient(q, factor)
    assert type(scaled) is type(q)
    z = q.sample(q.noise(4, torch.Generator().manual_seed(0))).detach().requires_grad_()
    values = [p.log_prob(z).square().sum() for p in (scaled, q)]
    torch.testing.assert_close(*values)
    (of_z, *mine), (same, *whole) = (torch.autograd.grad(value, [z, *phi], retain_graph=True) for value in values)
    torch.testing.assert_close(of_z, same)
    torch.testing.assert_close(mine, [factor * g for g in whole])
    assert all(g.abs().max() > 1e-3 for g in whole)


def linear_of_draws(base, joint, q, x, eps):
    """A control for posteriors whose divergence has no closed form."""
    return base.loss(joint.guide, q, x, eps)


@pytest.mark.parametrize("family", ["full", "full, one covariance", "mixture"])
def test_covariances_of_full_gaussians_and_mixtures_are_those_of_densities_written_by_torch(family):
    """Per observation and parameter, by automatic differentiation of log p - log q with nothing of ours in q."""
    joint, x = two_decoders("diagonal", D), randn(B, X, seed=4)
    numbers = [p.detach() for p in parameters(family)]
    q = FAMILIES[family][0](*numbers)
    eps = q.noise(4, torch.Generator().manual_seed(0))
    control = linear_of_draws if family == "mixture" else silent.linear_control
    found = silent.covariances(ALL["elbo-total"], joint, q, x, eps, control)

    if family == "mixture":
        first, second = q.components
        raw = [first.mean, first.log_std, second.mean, second.scale_tril, q.logits]
    else:
        raw = [q.mean, q.scale_tril.expand(B, D, D)]
    leaves = [p.clone().requires_grad_() for p in raw]

    def gradient_of(model, exact):
        if family == "mixture":
            mean0, log_std0, mean1, tril, logits = leaves
            parts = [Independent(Normal(mean0, log_std0.exp()), 1), MultivariateNormal(mean1, scale_tril=tril)]
            log_pi = logits.log_softmax(0)
            z = torch.cat((mean0 + log_std0.exp() * eps[:2], mean1 + (tril.tril() @ eps[2:].unsqueeze(-1)).squeeze(-1)))
            log_q = torch.stack([w + part.log_prob(z) for w, part in zip(log_pi, parts, strict=True)]).logsumexp(0)
            share = 2 * log_pi.exp().repeat_interleave(2, 0)
            value = (share * (model(x, z) - log_q)).mean(0)
        else:
            mean, tril = leaves
            z = mean + (tril.tril() @ eps.unsqueeze(-1)).squeeze(-1)
            value = (model(x, z) - MultivariateNormal(mean, scale_tril=tril).log_prob(z)).mean(0)
            if exact:
                value = value - silent.elbo(model, x, FullGaussian(mean, tril))
        return torch.autograd.grad(-value.sum(), leaves)

    g, h = gradient_of(joint.joint, False), gradient_of(joint.guide, True)
    expected = sum((a * b).sum() for a, b in zip(g, h)), sum(b.square().sum() for b in h)
    torch.testing.assert_close(torch.tensor(found, dtype=DTYPE), torch.stack(expected))


@pytest.mark.parametrize("family", ["full", "mixture"])
def test_annealing_works_for_full_gaussians_and_mixtures(family):
    """With draws for the guide too, since a mixture's divergence has no closed form."""
    joint, x, phi, base = two_decoders("diagonal", D), randn(B, X, seed=4), parameters(family), ALL["elbo-path"]
    q = FAMILIES[family][0](*phi)
    eps = q.noise(4, torch.Generator().manual_seed(0))
    losses = (
        silent.annealed(base, 0.3, base).loss(joint, q, x, eps), base.loss(joint.joint, q, x, eps),
        base.loss(joint.guide, q, x, eps),
    )  # fmt: skip
    mine, model, guide = (torch.autograd.grad(loss.sum(), phi, retain_graph=True) for loss in losses)
    torch.testing.assert_close(list(mine), [0.7 * a + 0.3 * b for a, b in zip(model, guide, strict=True)])


@pytest.mark.parametrize("scale", [0.0, 0.7])
@pytest.mark.parametrize("family", ["diagonal", "full", "bits"])
def test_the_guide_of_a_control_variate_learns_its_own_bound_and_the_model_from_its_draws_alone(family, scale):
    """The control is of the encoder's gradient: the guide must not learn from it, whatever the scale."""
    joint = two_decoders("bits" if family == "bits" else "diagonal", D)
    x, phi = randn(B, X, seed=4), parameters(family)
    q = FAMILIES[family][0](*phi)
    base = ALL["elbo-score" if family == "bits" else "elbo-total"]
    eps = q.noise(3, torch.Generator().manual_seed(0))
    loss = silent.controlled(base, scale).loss(joint, q, x, eps)
    torch.testing.assert_close(loss, base.loss(joint.joint, q, x, eps))
    for part, truth in (
        (joint.guide, -silent.elbo(joint.guide, x, q.stop_gradient())),
        (joint.joint, base.loss(joint.joint, q, x, eps)),
    ):
        found = [
            torch.autograd.grad(value.sum(), list(part.decode.parameters()), retain_graph=True)
            for value in (loss, truth)
        ]
        torch.testing.assert_close(*found)
    control = silent.linear_control(base, joint, q, x, eps)
    assert torch.autograd.grad(control.sum(), list(joint.parameters()), allow_unused=True) == (None,) * 4


def test_what_taylor_s_control_is(x):
    """Its two derivatives by hand, for a decoder whose slope and curvature are polynomials; nothing else learns."""
    joint, phi = two_decoders("diagonal"), [0.5 * randn(B, 2, seed=30 + i).requires_grad_() for i in range(2)]
    q, eps = DiagonalGaussian(*phi), randn(3, B, 2, seed=8)
    found = torch.autograd.grad(silent.taylor_control(None, joint, q, x, eps).sum(), phi)
    mean = phi[0].detach()
    delta = phi[1].detach().exp() * eps

    def log_p(z, i):
        return joint.log_likelihood(x[i : i + 1], z.reshape(1, 1, 2)).squeeze()

    slope = torch.stack([torch.func.grad(log_p)(mean[i], i) for i in range(B)]).detach()
    hessian = torch.stack([torch.func.hessian(log_p)(mean[i], i) for i in range(B)]).detach()
    expected = -(hessian @ delta.unsqueeze(-1)).squeeze(-1).mean(0), -(slope * delta).mean(0)
    torch.testing.assert_close(found, expected)
    control = silent.taylor_control(None, joint, q, x, eps)
    assert torch.autograd.grad(control.sum(), list(joint.parameters()), allow_unused=True) == (None,) * 4
    loss = silent.controlled(ALL["elbo-total"], 0.5, silent.taylor_control).loss(joint, q, x, eps)
    wanted = list(joint.guide.parameters())
    assert torch.autograd.grad(loss.sum(), wanted, allow_unused=True) == (None,) * len(wanted)  # it has no part in it


# The scale that is tracked


def tracked_model(family="diagonal"):
    encoder = Encoder() if family == "diagonal" else models.DiscreteEncoder(torch.nn.Linear(X, D, dtype=DTYPE), (D,))
    return models.VAE(two_decoders(family, D), encoder, binary=False)


def looks(vae, base, x, count, k=2):
    """The ratios of one look after the other, with noise from the same seed."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        q = vae.encoder(x)
        covariance, variance = silent.covariances(base, vae.joint, q, x, q.noise(k, generator))
        found.append(covariance / variance)
    return found


@pytest.mark.parametrize("family", ["diagonal", "bits"])
def test_the_tracked_scale_is_an_average_of_looks_that_forgets(family, x):
    vae, base = tracked_model(family), ALL["elbo-score"]
    first, second, third = looks(vae, base, x, 3)
    assert len({round(value, 6) for value in (first, second, third)}) == 3
    generator = torch.Generator().manual_seed(5)
    track = silent.TrackedScale(base, vae, x, 2, every=2, memory=0.8, generator=generator)
    scales = []
    for _ in range(5):
        estimator = track()
        scales.append(track.scale)
        assert estimator.name == f"elbo-controlled({track.scale:.3g})" and estimator.target == "elbo"
    average = 0.8 * first + 0.2 * second  # the first look counts in full
    assert scales == pytest.approx([first, first, average, average, 0.8 * average + 0.2 * third])
    eps = vae.encoder(x).noise(2)
    found = [e.loss(vae.joint, vae.encoder(x), x, eps).sum() for e in (track(), silent.controlled(base, scales[-1]))]
    wanted = list(vae.encoder.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(value, wanted) for value in found))


def test_the_tracked_scale_knows_what_a_distribution_of_pytorch_is(x):
    joint, scales, gaussians = tracked_model().joint, [], Encoder()
    for encoder in (Normals(gaussians), gaussians):
        vae = models.VAE(joint, encoder, binary=False)
        track = silent.TrackedScale(ALL["elbo-path"], vae, x, 2, generator=torch.Generator().manual_seed(0))
        track()
        scales.append(track.scale)
    assert scales[0] == pytest.approx(scales[1]) != 0


def test_the_tracked_scale_has_the_stated_defaults_and_knows_a_control_that_does_not_move(x):
    track = silent.TrackedScale(ALL["elbo-total"], tracked_model(), x)
    assert (track.every, track.memory, track.k, track.calls, track.scale) == (20, 0.5, 1, 0, 0.0)
    track.control = lambda base, joint, q, x, eps: 0 * linear_of_draws(base, joint, q, x, eps)
    track()
    assert track.scale == 0.0 and track.calls == 1


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_tracked_scale_that_is_resumed_goes_on_exactly(after, x, tmp_path):
    vae, base = tracked_model(), ALL["elbo-score"]

    def new(seed):
        return silent.TrackedScale(base, vae, x, 2, every=2, generator=torch.Generator().manual_seed(seed))

    whole, begun, resumed = new(5), new(5), new(6)
    for _ in range(after):
        whole(), begun()
    torch.save(begun.state(), tmp_path / "state.pt")
    begun()  # what is saved does not go on
    begun(), begun()
    resumed.load_state(torch.load(tmp_path / "state.pt"))
    for _ in range(5):
        whole(), resumed()
        assert (whole.scale, whole.calls) == (resumed.scale, resumed.calls)
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())
    other = new(6)
    for _ in range(after + 5):
        other()
    assert other.scale != whole.scale  # the control: another generator
    plain = silent.TrackedScale(base, vae, x)
    plain.load_state(silent.TrackedScale(base, vae, x).state())  # torch's own generator is the training's to keep
    assert plain.generator is None


def test_a_look_at_the_scale_leaves_the_model_as_it_was(x):
    """Neither gradients nor the running statistics of a batch normalisation move."""
    vae = tracked_model()
    vae.encoder.mean = torch.nn.Sequential(torch.nn.BatchNorm1d(X, dtype=DTYPE), vae.encoder.mean)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    silent.TrackedScale(ALL["elbo-total"], vae, x)()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())


# What is asked of the joints


class Masked(models.Joint):
    """Pixels that were not seen count nothing."""

    def log_likelihood(self, x, z):
        seen = (x != -1).to(x)
        return (torch.distributions.Normal(self.decode(z).mean, 1.0).log_prob(x) * seen).sum(-1)


class Seen(Masked):
    """With the closed form of it."""

    def expected_log_likelihood(self, x, q):
        mean, variance = q.linear_moments(self.decode.weight)
        error = (x - mean - self.decode.bias).square() + variance
        return -(0.5 * (error + math.log(2 * math.pi)) * (x != -1)).sum(-1)


def test_a_likelihood_that_is_not_that_of_its_decoder_has_no_closed_form():
    decode = models.LinearDecoder(torch.ones(4, 2), torch.zeros(4), torch.zeros(()))
    q, x = DiagonalGaussian(torch.ones(3, 2), torch.zeros(3, 2)), torch.rand(3, 4)
    torch.testing.assert_close(silent.elbo(Masked(decode), x, q), silent.elbo(models.Joint(decode), x, q))
    x[:, 0] = -1
    with pytest.raises(InputError, match="the likelihood of this Masked is not that of its LinearDecoder, whose"):
        silent.elbo(Masked(decode), x, q)
    assert silent.elbo(Seen(decode), x, q).isfinite().all()
    x[:, 0] = 0.5
    torch.testing.assert_close(silent.elbo(Seen(decode), x, q), silent.elbo(models.Joint(decode), x, q))


class Crooked(models.LinearDecoder):
    """A decoder that is linear no more."""

    def forward(self, z):
        return Gaussian(super().forward(z).mean.relu(), self.log_std)


def test_a_decoder_that_bends_the_linear_one_has_not_its_closed_form():
    decode = Crooked(torch.tensor([[1.0, -1.0], [-1.0, 0.5]]), torch.zeros(2), torch.zeros(()))
    q, x = DiagonalGaussian(torch.ones(3, 2), torch.zeros(3, 2)), torch.rand(3, 2)
    with pytest.raises(InputError, match="the likelihood of this Joint is not that of its Crooked, whose expectation"):
        silent.elbo(models.Joint(decode), x, q)


@pytest.mark.parametrize("family", ["diagonal", "bits"])
def test_two_decoders_are_the_model_s_and_share_its_prior(family, x):
    joint = two_decoders(family)
    if family == "bits":
        joint.guide.prior_logits = randn(2, seed=9)  # a guide may have another prior: it is not the model's
    q = KINDS[family](*(0.5 * randn(B, 2, seed=30 + i) for i in range(1 if family == "bits" else 2)))
    z = q.sample(q.noise(3, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(joint(x, z), joint.joint(x, z))
    torch.testing.assert_close(joint.log_prior(z), joint.joint.log_prior(z))
    torch.testing.assert_close(joint.log_likelihood(x, z), joint.joint.decode(z).log_prob(x))
    assert (joint(x, z) - joint.guide(x, z)).abs().max() > 1e-2
    if family == "bits":
        assert torch.equal(joint.prior.logits, joint.joint.prior_logits)
        p, pi = joint.joint.prior_logits.sigmoid(), q.mean
        kl = (pi * (pi / p).log() + (1 - pi) * ((1 - pi) / (1 - p)).log()).sum(-1)
        torch.testing.assert_close(joint.log_prior(z), (z * p.log() + (1 - z) * (1 - p).log()).sum(-1))
    else:
        assert joint.prior is None
        kl = torch.distributions.kl_divergence(Normal(q.mean, q.log_std.exp()), Normal(0 * q.mean, 1.0)).sum(-1)
    torch.testing.assert_close(bounds.divergence(joint, q), kl)


def test_a_hierarchy_of_any_depth_is_the_sum_of_its_conditionals():
    def conditional(shift):
        return lambda z: Normal(z.sum(-1, keepdim=True) * shift, 1 + 0.1 * shift)

    class Prior(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, z):
            p = conditional(self.shift)(z)
            return DiagonalGaussian(p.mean, p.stddev.log())

    x = randn(B, X, seed=4)
    for depth in (1, 2, 4):
        z = tuple(randn(3, B, 1, seed=50 + i) for i in range(depth))
        decode = Bent(1)
        joint = models.HierarchicalJoint([Prior(i + 1) for i in range(depth - 1)], decode)
        log_p = Normal(0.0, 1.0).log_prob(z[-1]).sum(-1)
        for i in range(depth - 1):
            log_p = log_p + conditional(i + 1)(z[i + 1]).log_prob(z[i]).sum(-1)
        torch.testing.assert_close(joint.log_prior(z), log_p)
        torch.testing.assert_close(joint(x, z), log_p + decode(z[0]).log_prob(x))
        with pytest.raises(ValueError):
            joint.log_prior((*z, z[0]))
    assert len(models.HierarchicalJoint(Prior(1), decode).priors) == 1


def test_decoders_are_their_equations(x):
    z, torch_normal = randn(5, B, D), torch.distributions.Normal
    weight, bias, log_std = randn(X, D, seed=1), randn(X, seed=2), 0.3 * randn(X, seed=3)
    mean = torch.einsum("kbd,xd->kbx", z, weight) + bias
    found = models.LinearDecoder(weight, bias, log_std)(z).log_prob(x)
    torch.testing.assert_close(found, torch_normal(mean, log_std.exp()).log_prob(x).sum(-1))
    network = torch.nn.Sequential(torch.nn.Linear(D, X, dtype=DTYPE), torch.nn.Tanh())
    found = models.GaussianDecoder(network, torch.tensor(-0.7, dtype=DTYPE))(z).log_prob(x)
    torch.testing.assert_close(found, torch_normal(network(z), math.exp(-0.7)).log_prob(x).sum(-1))
    frequency, phase, weight = randn(5, D, seed=41), randn(5, seed=42), randn(X, 5, seed=43)
    mean = torch.einsum("kbj,xj->kbx", torch.cos(z @ frequency.T + phase), weight) + bias
    found = models.CosineDecoder(frequency, phase, weight, bias, log_std)(z).log_prob(x)
    torch.testing.assert_close(found, torch_normal(mean, log_std.exp()).log_prob(x).sum(-1))


def test_pixels_start_at_the_logit_of_their_mean_and_those_that_are_always_black_at_one_in_a_thousand():
    generator = torch.Generator().manual_seed(0)
    decoder = models.BernoulliMLP((D, 5, 6), 4, torch.tensor([0.0, 0.2, 0.5, 1.0]), generator)
    odds = [math.log(p / (1 - p)) for p in (0.001, 0.2, 0.5, 0.999)]
    torch.testing.assert_close(decoder.logits.bias.tolist(), odds, rtol=1e-3, atol=1e-5)
    z = torch.randn(3, 2, D, generator=generator)
    hidden = z
    for layer in (decoder.hidden[0], decoder.hidden[2]):
        hidden = torch.tanh(hidden @ layer.weight.T + layer.bias)
    torch.testing.assert_close(decoder(z).logits, hidden @ decoder.logits.weight.T + decoder.logits.bias)
    assert (models.BernoulliMLP((D, 5), 4).logits.bias == 0).all()


def test_the_schedules_are_their_equations():
    for name, value in (("linear", 0.75), ("cosine", 0.5 + 0.5 / math.sqrt(2)), ("exponential", math.exp(-1.25))):
        assert silent.SCHEDULES[name](0.25) == pytest.approx(value, abs=1e-15)


def test_a_distribution_of_torch_has_its_closed_form(decoder, x):
    """``silent.elbo`` takes what an encoder may return."""
    q = diagonal(*(p.detach() for p in parameters("diagonal")))
    theirs = Independent(Normal(q.mean, q.log_std.exp()), 1)
    joint = joint_for("diagonal", decoder)
    torch.testing.assert_close(silent.elbo(joint, x, theirs), silent.elbo(joint, x, q))
    torch.testing.assert_close(silent.ELBO.loss(joint, theirs, x, None), -silent.elbo(joint, x, q))


# The benchmark


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_silent", Path(sys.path[0]) / "silent.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_compares_one_thing_and_notices_another(benchmark):
    for kind in benchmark.KINDS.values():
        joint, encoder, x = benchmark.build(kind, latent=10, batch=3)
        assert benchmark.disagreement(joint, encoder, x) < benchmark.SIGMAS
        decode = joint.decode  # now it forgets the variance
        decode.expected_log_likelihood = lambda x, q, decode=decode: decode(q.mean).log_prob(x)
        assert benchmark.disagreement(joint, encoder, x) > benchmark.SIGMAS


def test_the_benchmark_writes_what_it_says(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        sizes = ["--k", "1", "2", "--latent", "10", "--batch-size", "3", "--steps", "1", "--rounds", "1"]
        benchmark.main([*sizes, "--output", str(tmp_path / "table.csv")])
    finally:
        torch.set_num_threads(threads), torch.set_flush_denormal(False)
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"ms", "ratio_to_one_draw", "load", "code"} <= set(rows[0])
    assert [row["k"] for row in rows if row["estimator"] == "elbo-silent"] == ["0"] * len(benchmark.KINDS)
    assert len(rows) == sum(1 + 2 * len(kind.estimators) for kind in benchmark.KINDS.values())


# What is refused


def test_a_likelihood_without_a_closed_form_is_refused(x):
    q = diagonal(*parameters("diagonal"))
    pixels = models.Joint(models.BernoulliMLP((D, 5), X).double())
    with pytest.raises(InputError, match=r"BernoulliMLP has no closed form .* quadratic .* elbo-path.*LinearDecoder"):
        silent.elbo(pixels, x, q)
    with pytest.raises(InputError, match="no closed form"):
        objectives.backward(silent.ELBO, pixels, q, x, None)


def test_a_posterior_without_moments_is_refused(decoder, x):
    flow = FlowEncoder(StandardNormal(D), [AffineCoupling(D)]).double()(x)
    first = diagonal(*parameters("diagonal"))
    for q in (flow, HierarchicalGaussian(first, (torch.nn.Linear(D, D),))):
        with pytest.raises(InputError, match=f"a {type(q).__name__} does not know the mean and variance"):
            silent.expected_log_prob(x, q, *decoder)


def test_a_divergence_without_a_closed_form_is_refused(decoder, x):
    q = mixture(*parameters("mixture"))
    silent.expected_log_prob(x, q, *decoder)  # has one, but the divergence has not
    with pytest.raises(InputError, match="of a Mixture from a standard normal prior .* DiagonalGaussian or Full"):
        silent.elbo(joint_for("diagonal", decoder), x, q)
    bits, gauss = FactorisedBernoulli(*parameters("bits")), diagonal(*parameters("diagonal"))
    with pytest.raises(InputError, match="FactorisedBernoulli from a standard normal prior"):
        silent.elbo(joint_for("diagonal", decoder), x, bits)
    with pytest.raises(InputError, match="DiagonalGaussian from a FactorisedBernoulli prior"):
        silent.elbo(joint_for("bits", decoder), x, gauss)


def test_sizes_that_do_not_go_together_are_named(decoder, x):
    q = diagonal(*parameters("diagonal"))
    with pytest.raises(InputError, match=r"\[B, X\] = \[2, 3\], but x is \[2, 1\]"):
        silent.expected_log_prob(x[:, :1], q, *decoder)


# --- scales that are shared, and joints of other people


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2,)])
@pytest.mark.parametrize("kind", ["linear", "cosines"])
def test_a_shared_scale_counts_for_every_dimension(shape, kind):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 2, generator=generator).double(), torch.randn(3, 4, generator=generator).double()
    zero, mean = torch.zeros(4).double(), torch.randn(3, 2, generator=generator).double()
    joint = models.LinearGaussian(weight, zero, torch.zeros(()).double())
    if kind == "cosines":
        joint = models.Joint(models.CosineDecoder(weight, zero, weight @ weight.mT, zero, torch.zeros(()).double()))
    shared, full = (DiagonalGaussian(mean, log_std) for log_std in (torch.full(shape, 0.3).double(), 0 * mean + 0.3))
    torch.testing.assert_close(silent.elbo(joint, x, shared), silent.elbo(joint, x, full))


def test_a_mixture_of_as_many_components_as_observations_with_shared_scales():
    generator = torch.Generator().manual_seed(0)
    mean, log_std = (torch.randn(2, 2, *rest, generator=generator).double() for rest in ((2,), ()))
    weight, logits = torch.randn(4, 2, generator=generator).double(), torch.zeros(2, 2).double()
    shared, full = (
        Mixture(tuple(DiagonalGaussian(m, s.expand(rows, 2) if rows else s) for m, s in zip(mean, log_std)), logits)
        for rows in (0, 2)
    )
    for one, other in zip(shared.linear_moments(weight), full.linear_moments(weight), strict=True):
        torch.testing.assert_close(one, other)


class Tempered(models.LinearGaussian):
    def log_likelihood(self, x, z):
        return 0.5 * super().log_likelihood(x, z)


class OfBits(models.DiscreteJoint):
    """A class of somebody else: the density that it comes from, or a tempered one."""

    weight = 1.0

    def forward(self, x, z):
        return self.log_prior(z) + self.log_likelihood(x, z)

    def log_likelihood(self, x, z):
        return self.weight * super().log_likelihood(x, z)


@pytest.mark.parametrize("family", [FactorisedBernoulli, OneHotCategorical])
def test_a_closed_form_that_a_joint_of_bits_has_not_is_refused(family):
    q = family(randn(B, 6) if family is FactorisedBernoulli else randn(B, 2, 3))
    joint = OfBits(models.LinearDecoder(randn(X, 6), randn(X), torch.zeros((), dtype=DTYPE)), 0 * q.logits[0])
    x = randn(B, X, seed=1)
    torch.testing.assert_close(silent.elbo(joint, x, q), discrete.exact_elbo(joint, x, q))
    joint.weight = 0.9
    with pytest.raises(InputError, match="the likelihood of this OfBits is not that of its LinearDecoder"):
        silent.elbo(joint, x, q)


class LearntPrior(models.Joint):
    @property
    def prior(self):
        return DiagonalGaussian(torch.ones(1, 2), torch.zeros(1, 2))

    def log_prior(self, z):
        return self.prior.log_prob(z)


def test_closed_forms_that_a_joint_has_not_are_refused_for_every_gaussian():
    weight, mean, x = torch.ones(4, 2), torch.ones(3, 2), torch.zeros(3, 4)
    diagonal = DiagonalGaussian(mean, 0 * mean)
    families = diagonal, FullGaussian(mean, torch.eye(2)), Mixture((diagonal,), torch.zeros(1, 3))
    for q in families[:2]:
        with pytest.raises(InputError, match="the likelihood of this Tempered is not that of its"):
            silent.elbo(Tempered(weight, torch.zeros(4), torch.zeros(())), x, q)
    learnt = LearntPrior(models.LinearDecoder(weight, torch.zeros(4), torch.zeros(())))
    with pytest.raises(InputError, match="from a prior of its own kind has no closed form here"):
        silent.elbo(learnt, x, diagonal)
    assert objectives.loss("elbo-path", learnt, diagonal, x).shape == (3,)


@pytest.mark.parametrize("place", [0.3, -1.1, 2.7])
def test_a_prior_that_agrees_at_one_place_is_not_the_standard_normal(place):
    class Elsewhere(models.LinearGaussian):
        def log_prior(self, z):
            return standard_normal_log_prob(z) + (z - place).sum(-1)

    joint = Elsewhere(torch.ones(4, 2), torch.zeros(4), torch.zeros(()))
    with pytest.raises(InputError, match="the prior of this Elsewhere is not the standard normal"):
        bounds.divergence(joint, DiagonalGaussian(torch.zeros(3, 2), torch.zeros(3, 2)))
