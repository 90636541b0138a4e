"""Densities against torch.distributions and SciPy, closed forms against quadrature; in float64."""

import pytest
import torch
from scipy import stats
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from vaelib.errors import InputError
from vaelib.posteriors import DiagonalGaussian, FullGaussian, HierarchicalGaussian, standard_normal_log_prob


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def randn(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def diagonal(generator):
    q = DiagonalGaussian(randn(4, 3, generator=generator), 0.5 * randn(4, 3, generator=generator))
    return q, Independent(Normal(q.mean, q.log_std.exp()), 1)


@pytest.fixture(params=["shared", "per observation"])
def full(generator, request):
    shape = (3, 3) if request.param == "shared" else (4, 3, 3)
    scale_tril = randn(*shape, generator=generator).tril(-1) + torch.diag_embed(
        0.3 + torch.rand(shape[:-1], generator=generator)
    )
    q = FullGaussian(randn(4, 3, generator=generator), scale_tril.double())
    return q, MultivariateNormal(q.mean, scale_tril=q.scale_tril)


def assert_agrees(q, reference, generator):
    z = q.sample(q.noise(5, generator))
    assert z.shape == (5, 4, 3)
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z))
    torch.testing.assert_close(q.entropy(), reference.entropy())
    prior = (
        type(reference)(torch.zeros(4, 3).double(), scale_tril=torch.eye(3).double().expand(4, 3, 3))
        if isinstance(reference, MultivariateNormal)
        else Independent(Normal(torch.zeros(4, 3).double(), 1.0), 1)
    )
    torch.testing.assert_close(q.kl(), kl_divergence(reference, prior))


def test_the_diagonal_gaussian_agrees_with_torch(diagonal, generator):
    assert_agrees(*diagonal, generator)


def test_the_full_gaussian_agrees_with_torch(full, generator):
    assert_agrees(*full, generator)


def test_densities_agree_with_scipy(diagonal, full, generator):
    q, p = diagonal[0], full[0]
    z = randn(4, 3, generator=generator)
    torch.testing.assert_close(
        q.log_prob(z), torch.tensor(stats.norm.logpdf(z, q.mean, q.log_std.exp())).sum(-1), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        standard_normal_log_prob(z), torch.tensor(stats.norm.logpdf(z)).sum(-1), rtol=1e-12, atol=0
    )
    covariance = (p.scale_tril @ p.scale_tril.mT).expand(4, 3, 3)
    reference = [stats.multivariate_normal.logpdf(a, b, c) for a, b, c in zip(z, p.mean, covariance)]
    torch.testing.assert_close(p.log_prob(z), torch.tensor(reference), rtol=1e-10, atol=1e-10)


def test_samples_have_the_moments_they_should(full, diagonal, generator):
    """4 standard errors in each of 4 x 3 means and 4 x 9 covariances."""
    for q, reference in (full, diagonal):
        z = q.sample(q.noise(40_000, generator))
        centred = z - reference.mean
        for draws in (centred, centred.unsqueeze(-1) * centred.unsqueeze(-2)):
            dense = isinstance(reference, MultivariateNormal)
            covariance = reference.covariance_matrix if dense else torch.diag_embed(reference.variance)
            truth = 0.0 if draws is centred else covariance
            assert ((draws.mean(0) - truth).abs() < 4 * draws.std(0) / 200).all()


def test_the_hierarchical_density_is_the_product(generator):
    second = torch.nn.Module()
    second.forward = lambda z1: DiagonalGaussian(2 * z1[..., :2], torch.zeros_like(z1[..., :2]) - 0.3)
    q = HierarchicalGaussian(
        DiagonalGaussian(randn(4, 3, generator=generator), randn(4, 3, generator=generator)), second
    )
    z1, z2 = q.sample(q.noise(5, generator))
    assert z1.shape == (5, 4, 3) and z2.shape == (5, 4, 2)
    expected = Independent(Normal(q.first.mean, q.first.log_std.exp()), 1).log_prob(z1)
    expected = expected + Independent(Normal(2 * z1[..., :2], 0.7408182206817179), 1).log_prob(z2)
    torch.testing.assert_close(q.log_prob((z1, z2)), expected)


def test_noise_is_reproducible_and_refuses_no_draws(diagonal):
    q, _ = diagonal
    first, again = (q.noise(2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, q.noise(2, torch.Generator().manual_seed(6)))
    with pytest.raises(InputError, match="at least 1, but is 0"):
        q.noise(0)


def test_what_is_above_the_diagonal_of_a_scale_does_not_count(generator):
    mean, scale = randn(4, 3, generator=generator), randn(4, 3, 3, generator=generator)
    scale.diagonal(dim1=-2, dim2=-1).abs_().add_(0.2)
    q, clean = FullGaussian(mean, scale.requires_grad_()), FullGaussian(mean, scale.detach().tril())
    eps, weight = q.noise(5, generator), randn(2, 3, generator=generator)
    z = clean.sample(eps)
    for ask in (
        lambda q: q.sample(eps),
        lambda q: q.log_prob(z),
        lambda q: q.entropy(),
        lambda q: q.kl(),
        lambda q: torch.cat(q.linear_moments(weight)),
    ):
        torch.testing.assert_close(ask(q), ask(clean))
        (slope,) = torch.autograd.grad(ask(q).sum(), scale)
        assert slope.triu(1).abs().max() == 0 and slope.abs().max() > 0
