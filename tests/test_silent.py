"""The closed forms against sums over all of z, their gradients against autograd of those sums, and 10^6 draws.

A sum over all of z is Gauss-Hermite quadrature for Gaussians (exact for polynomials, hence for these integrands) and
enumeration for discrete latents; everything in float64. The draws are held to 4 standard errors in 10 means: a
false alarm once in 1,500 seeds, and the seed is fixed.
"""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import DTYPE

from vaelib import bounds, checks, gradients, models, objectives, silent
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
        moments = type("Wrong", (), {"linear_moments": staticmethod(lambda _, value=value: (mean, value))})
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


# The ELBO

PRIORS = {"bits": torch.linspace(-1, 1, D, dtype=DTYPE), "choices": torch.linspace(-1, 1, D, dtype=DTYPE).reshape(2, 2)}


def joint_for(family, decoder, prior_logits=None):
    linear = silent.LinearDecoder(*(value.detach() for value in decoder))
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
    value = objectives.backward(silent.ELBO, joint, encoder, x, None)
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
    value = objectives.backward(silent.ELBO, joint, encoder, x, None)
    loss = objectives.surrogate(silent.ELBO, joint, encoder, x, torch.zeros(3, B, D, dtype=DTYPE))
    torch.testing.assert_close(value, -loss.detach(), rtol=0, atol=0)
    q = encoder(x)
    z = q.sample(q.noise(40_000, torch.Generator().manual_seed(0)))
    checks.unbiased(bounds.elbo_kl(joint, x, q, z).detach(), value)


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
    assert list(rows[0]) == benchmark.COLUMNS
    assert [row["k"] for row in rows if row["estimator"] == "elbo-silent"] == ["0"] * len(benchmark.KINDS)
    assert len(rows) == sum(1 + 2 * len(kind.estimators) for kind in benchmark.KINDS.values())


# What is refused


def test_a_likelihood_without_a_closed_form_is_refused(x):
    q = diagonal(*parameters("diagonal"))
    pixels = models.Joint(models.BernoulliMLP((D, 5), X).double())
    with pytest.raises(InputError, match=r"BernoulliMLP has no closed form .* quadratic .* elbo-path.*LinearDecoder"):
        silent.elbo(pixels, x, q)
    with pytest.raises(InputError, match="no closed form"):
        objectives.backward(silent.ELBO, pixels, lambda _: q, x, None)


def test_a_posterior_without_moments_is_refused(decoder, x):
    flow = FlowEncoder(StandardNormal(D), [AffineCoupling(D)]).double()(x)
    first = diagonal(*parameters("diagonal"))
    for q in (flow, HierarchicalGaussian(first, torch.nn.Linear(D, D))):
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
