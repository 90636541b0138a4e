"""Negative controls of chapter 1: each of its checks, given something wrong, must refuse it."""

import base64
import math
from pathlib import Path

import nbformat
import pytest
import torch

from vaelib import bounds, checks, data, models
from vaelib.posteriors import DiagonalGaussian

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def digit():
    """The chapter's running example: the joint, one digit, its exact posterior, 20,000 draws of noise."""
    x = data.load("digits").train.grey.double()
    joint = models.ppca(x, latent_dim=8).requires_grad_(False)
    posterior = models.exact_encoder(joint).requires_grad_(False)(x[:1])
    return joint, x[:1], posterior, posterior.noise(20_000, torch.Generator().manual_seed(0))


def gradient_draws(form, joint, x, q, eps):
    own = DiagonalGaussian(*(p.expand(eps.shape).clone().requires_grad_() for p in (q.mean, q.log_std)))
    form(joint, x, own, own.sample(eps)).sum().backward()
    return torch.cat([own.mean.grad, own.log_std.grad], -1).squeeze(1)


def test_no_variance_is_refused_next_to_the_posterior(digit):
    joint, x, q, eps = digit
    checks.no_variance(bounds.elbo_monte_carlo(joint, x, q, q.sample(eps)))
    near = DiagonalGaussian(q.mean + 1e-6, q.log_std)
    for form, wrong in [(bounds.elbo_monte_carlo, near), (bounds.elbo_entropy, q), (bounds.elbo_kl, q)]:
        with pytest.raises(AssertionError):
            checks.no_variance(form(joint, x, wrong, wrong.sample(eps)))


def test_a_wrong_entropy_or_divergence_is_found_by_the_one_expectation(digit):
    """A log-variance taken for a log-scale, a sign turned, a constant forgotten."""
    joint, x, posterior, eps = digit
    q = DiagonalGaussian(0.9 * posterior.mean, 0.9 * posterior.log_std)
    z = q.sample(eps)
    exact = bounds.elbo_monte_carlo(joint, x, q, z).mean(0)
    checks.unbiased(bounds.elbo_kl(joint, x, q, z) - bounds.elbo_monte_carlo(joint, x, q, z), 0.0)
    likelihood, prior = joint.log_likelihood(x, z), joint.log_prior(z)
    for wrong in (
        likelihood + q.kl(),
        likelihood - DiagonalGaussian(q.mean, 2 * q.log_std).kl(),
        likelihood + prior + q.entropy() - 4 * math.log(2 * math.pi),
        likelihood + prior + DiagonalGaussian(q.mean, 2 * q.log_std).entropy(),
    ):
        with pytest.raises(AssertionError):
            checks.unbiased(wrong, exact)


def test_a_wrong_variance_formula_is_found(digit):
    """At r = 0.9, with the chapter's number of draws: one that is a twentieth too large, or without a factor 1/2."""
    joint, x, posterior, _ = digit
    q = DiagonalGaussian(0.9 * posterior.mean, 0.9 * posterior.log_std)
    eps = q.noise(100_000, torch.Generator().manual_seed(0))
    value = bounds.elbo_monte_carlo(joint, x, q, q.sample(eps))
    squares = (value - value.mean()) ** 2
    tau2, variance = (2 * posterior.log_std).exp(), (2 * q.log_std).exp()
    shift = variance * ((q.mean - posterior.mean) / tau2) ** 2
    right = (shift + 0.5 * (variance / tau2 - 1) ** 2).sum(-1)
    checks.unbiased(squares, right)
    for wrong in (1.05 * right, (shift + (variance / tau2 - 1) ** 2).sum(-1)):
        with pytest.raises(AssertionError):
            checks.unbiased(squares, wrong)


def test_two_forms_one_gradient_is_refused_for_another_pair(digit):
    joint, x, posterior, eps = digit
    gradients = [gradient_draws(form, joint, x, posterior, eps[:500]) for form in bounds.FORMS.values()]
    checks.same(gradients[0], gradients[1])
    with pytest.raises(AssertionError):
        checks.same(gradients[0], gradients[2])
    with pytest.raises(AssertionError):
        checks.no_variance(gradients[0])


def test_the_figure_of_the_readme_is_the_chapters():
    notebook = nbformat.read(ROOT / "book/01-elbo-forms.ipynb", 4)
    (cell,) = (cell for cell in notebook.cells if cell.metadata.get("picture") == "_static/figures/elbo-forms.png")
    (picture,) = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    assert base64.b64decode(picture) == (ROOT / "book/_static/figures/elbo-forms.png").read_bytes(), (
        "the README's figure is not the one stored in the chapter: run `make notebooks`"
    )
