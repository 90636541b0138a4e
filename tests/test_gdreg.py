"""Generalised doubly reparameterised gradients against quadrature of the bound itself; in float64."""

import pytest
import torch
from torch import Tensor, nn
from toys import (
    DTYPE,
    AffineGaussian,
    OneLayerEncoder,
    OneLayerJoint,
    Pointed,
    Remade,
    exact_gradient,
    parameter,
    quadrature,
)

from vaelib import gdreg, models, objectives
from vaelib.bounds import BOUNDS
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, TABLEAU
from vaelib.likelihoods import Gaussian
from vaelib.posteriors import DiagonalGaussian, FullGaussian, map_latent

X = torch.ones(1, 1, dtype=DTYPE)
GDREG = {name: gdreg.gdreg(TABLEAU[name]) for name in gdreg.ROWS}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


class Decode(nn.Module):
    """p(x | z1) = N(w z1, 1)."""

    def __init__(self):
        super().__init__()
        self.w = parameter(1.1)

    def forward(self, z):
        return Gaussian(self.w * z, torch.zeros(1, dtype=DTYPE))


class First(nn.Module):
    """q(z1 | x) = N(mean, exp(log_std)^2), whatever x."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_std = parameter(0.1), parameter(-0.1)

    def forward(self, x):
        return DiagonalGaussian(self.mean.expand_as(x), self.log_std.expand_as(x))


def layers(depth: int = 2):
    """A model of ``depth`` stochastic layers of one dimension, and its encoder."""
    priors = [AffineGaussian(0.8, 0.1, -0.2) for _ in range(depth - 1)]
    encoder = models.HierarchicalEncoder(First(), *(AffineGaussian(0.9, 0.3, 0.0) for _ in range(depth - 1)))
    return models.HierarchicalJoint(priors, Decode()), encoder


def expected(loss, bound, k, joint, encoder):
    """Return the mean of the gradient of ``-loss`` and that of the bound, both by quadrature."""
    eps, weight = quadrature(2, k, nodes=40 if k == 1 else 12)
    value = -weight @ loss(joint, encoder(X.expand(len(weight), -1)), X.expand(len(weight), -1), eps)
    mine = torch.autograd.grad(value, [*joint.parameters(), *encoder.parameters()])
    return list(mine), exact_gradient(bound, joint, encoder, X, eps, weight)


@pytest.mark.parametrize(("name", "k"), [("elbo-path", 1), ("elbo-path", 2), ("iwae-dreg", 1), ("iwae-dreg", 2)])
def test_gdreg_has_the_exact_expectation(name, k):
    """In all parameters: prior, decoder and both layers of q; the quadrature for K = 2 has 12 nodes in 4 dimensions."""
    mine, truth = expected(GDREG[name].loss, GDREG[name].bound, k, *layers())
    atol = 1e-3 if (name, k) == ("iwae-dreg", 2) else 1e-10
    torch.testing.assert_close(mine, truth, rtol=0, atol=atol)


def test_gdreg_without_the_change_of_measure_is_biased():
    """The negative control: as if the draws came from the prior, whose score then has no q / p in it."""

    def naive(joint, q, x, eps):
        still = q.stop_gradient()
        z1, z2 = map_latent(Tensor.detach, still.sample(eps))
        prior = joint.priors[0](z2)
        moved = prior.sample(((z1 - prior.mean) * (-prior.log_std).exp()).detach()), z2
        nothing = sum(p.sum() * 0 for layer in (q.first.mean, q.first.log_std) for p in layer)
        upper = sum(p.sum() * 0 for p in q.above[0].parameters())
        return -BOUNDS["elbo"](joint(x, moved) - still.log_prob(moved)) + nothing + upper

    joint, encoder = layers()
    wrong, truth = expected(naive, "elbo", 1, joint, encoder)
    of_prior = [i for i, (name, _) in enumerate(joint.named_parameters()) if name.startswith("priors")]
    assert len(of_prior) == 3 and max((wrong[i] - truth[i]).abs().max() for i in of_prior) > 0.1


@pytest.mark.parametrize("name", gdreg.ROWS)
def test_value_decoder_and_encoder_are_the_row_s_and_the_prior_is_not(name):
    joint, encoder = layers()
    eps, x = (randn(3, 4, 1), randn(3, 4, 1, seed=1)), randn(4, 1, seed=2)
    mine, row = (estimator.loss(joint, encoder(x), x, eps) for estimator in (GDREG[name], TABLEAU[name]))
    torch.testing.assert_close(mine, row)
    parts = {"decode": joint.decode, "encoder": encoder, "priors": joint.priors}
    for part, module in parts.items():
        found = [
            torch.autograd.grad(value.mean(), list(module.parameters()), retain_graph=True) for value in (mine, row)
        ]
        if part == "priors":
            assert all((a - b).abs().max() > 1e-2 for a, b in zip(*found, strict=True))
        else:
            torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", gdreg.ROWS)
def test_at_the_exact_posterior_of_q_and_p_the_decoder_alone_speaks(name):
    """With log w constant in z1, what is left for the prior is the first term, a path through the decoder."""
    joint, encoder = layers()
    eps, x = (randn(3, 1, 1), randn(3, 1, 1, seed=1)), X
    prior = list(joint.priors.parameters())

    class Flat(models.HierarchicalJoint):
        """p(x, z) is q(z) itself, but claims the likelihood of the model."""

        def forward(self, x, z):
            return encoder(x).stop_gradient().log_prob(z) + 0 * self.log_prior(z)

    flat = Flat(joint.priors, joint.decode)
    found = torch.autograd.grad(-GDREG[name].loss(flat, encoder(x), x, eps).sum(), prior)
    z1, z2 = map_latent(Tensor.detach, encoder(x).sample(eps))
    p, w = joint.priors[0](z2), joint.decode.w.detach()
    moved = p.mean + p.log_std.exp() * ((z1 - p.mean) / p.log_std.exp()).detach()
    a = torch.full((3, 1), 1 / 3, dtype=DTYPE)
    likelihood = (a * (-0.5 * (x - w * moved).square()).sum(-1)).sum()
    plain = (a * p.log_prob(z1)).sum()  # taken back, although this joint has no score of the prior
    torch.testing.assert_close(found, torch.autograd.grad(likelihood - plain, prior))


def test_the_likelihood_of_a_joint_of_one_s_own_counts():
    """A subclass with another likelihood keeps it: GDReG asks the joint, and does not build one of its own."""

    class Sharper(models.HierarchicalJoint):
        def log_likelihood(self, x, z):
            return 3 * super().log_likelihood(x, z)

    plain, encoder = layers()
    mine, truth = expected(GDREG["elbo-path"].loss, "elbo", 1, Sharper(plain.priors, plain.decode), encoder)
    torch.testing.assert_close(mine, truth, rtol=0, atol=1e-10)


def test_a_prior_with_a_full_covariance_has_its_path_too():
    """The same Gaussian, written in two ways, has one gradient."""

    def as_full(p):
        return FullGaussian(p.mean, torch.diag_embed(p.log_std.exp()))

    joint, encoder = layers()
    eps, x = (randn(3, 4, 1), randn(3, 4, 1, seed=1)), randn(4, 1, seed=2)
    full = models.HierarchicalJoint(Remade(joint.priors[0], as_full), joint.decode)
    wanted = [*joint.parameters(), *encoder.parameters()]
    found = [torch.autograd.grad(GDREG["iwae-dreg"].loss(j, encoder(x), x, eps).mean(), wanted) for j in (joint, full)]
    torch.testing.assert_close(*found)


def test_a_prior_that_is_a_distribution_of_pytorch_has_a_density_alone():
    def of_torch(p):
        return torch.distributions.Independent(torch.distributions.Normal(p.mean, p.log_std.exp()), 1)

    joint, encoder = layers()
    eps, x = (randn(3, 4, 1), randn(3, 4, 1, seed=1)), randn(4, 1, seed=2)
    other = models.HierarchicalJoint(Remade(joint.priors[0], of_torch), joint.decode)
    torch.testing.assert_close(other(x, eps), joint(x, eps))
    with pytest.raises(InputError, match="a Independent has no whiten: give a class that has, such as a DiagonalG"):
        GDREG["iwae-dreg"].loss(other, encoder(x), x, eps)
    with pytest.raises(InputError, match="sampled by noise, which a Independent of PyTorch does not take"):
        other.sample_prior(eps)


def test_a_prior_that_is_redefined_by_half_has_no_path():
    joint, encoder = layers()
    other = models.HierarchicalJoint(Remade(joint.priors[0], lambda p: Pointed(p.mean, p.log_std)), joint.decode)
    q = encoder(X)
    with pytest.raises(InputError, match="a Pointed redefines log_prob, but its whiten is that of the class it comes"):
        GDREG["iwae-dreg"].loss(other, q, X, q.noise(2))


def test_gdreg_says_what_it_is_for():
    for name in ESTIMATORS.keys() - set(gdreg.ROWS):
        with pytest.raises(InputError, match=f"elbo-path and iwae-dreg, but the estimator is '{name}'"):
            gdreg.gdreg(ESTIMATORS[name])
    for depth in (1, 3, 4):
        joint, encoder = layers(depth)
        q = encoder(X)
        with pytest.raises(InputError, match=f"the joint is a HierarchicalJoint with {depth}: use the row 'iwae-dreg'"):
            objectives.backward(GDREG["iwae-dreg"], joint, q, X, q.noise(2))
    q = OneLayerEncoder()(X)
    with pytest.raises(InputError, match="but the joint is a OneLayerJoint: use"):
        objectives.backward(GDREG["iwae-dreg"], OneLayerJoint(), q, X, q.noise(2))
    assert GDREG["iwae-dreg"].name == "iwae-dreg-gdreg" and GDREG["iwae-dreg"].target == "iwae"
