"""Exact things about the models."""

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal

from vaelib import models, objectives
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS


@pytest.fixture
def toy():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    joint = models.LinearGaussian(
        torch.randn(6, 3, generator=generator, dtype=torch.float64),
        torch.randn(6, generator=generator, dtype=torch.float64),
        0.3 * torch.randn(6, generator=generator, dtype=torch.float64),
    )
    return joint, x, generator


def marginal(joint):
    variance = (2 * joint.log_std).exp().expand(joint.bias.shape)
    return MultivariateNormal(joint.bias, joint.weight @ joint.weight.mT + variance.diag())


def test_log_marginal_is_the_gaussian_it_should_be(toy):
    joint, x, _ = toy
    torch.testing.assert_close(joint.log_marginal(x), marginal(joint).log_prob(x))
    p = marginal(joint)
    scipy = stats.multivariate_normal.logpdf(x, p.loc.detach(), p.covariance_matrix.detach())
    torch.testing.assert_close(joint.log_marginal(x).detach(), torch.tensor(scipy))


def test_bayes_rule_holds_for_every_z(toy):
    """log p(x, z) - log p(z | x) is log p(x), whatever z: exact, so any slip in posterior or joint shows."""
    joint, x, generator = toy
    posterior = joint.posterior(x)
    z = 5 * torch.randn(7, 40, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(joint(x, z) - posterior.log_prob(z), joint.log_marginal(x).expand(7, 40))


def test_ppca_has_the_highest_likelihood(toy):
    """Its gradient vanishes, its posterior covariance is diagonal, and every step away from it is worse."""
    _, x, generator = toy
    joint = models.ppca(x, 3)
    best = joint.log_marginal(x).mean()
    gradients = torch.autograd.grad(best, list(joint.parameters()))
    assert max(g.abs().max() for g in gradients) < 1e-10
    covariance = joint.posterior(x).scale_tril
    torch.testing.assert_close(covariance, covariance.diagonal().diag())
    for _ in range(50):
        other = models.ppca(x, 3)
        with torch.no_grad():
            for p in other.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        assert other.log_marginal(x).mean() < best
    with pytest.raises(InputError, match="between 1 and 5"):
        models.ppca(x, 6)
    for few in (2, 3):
        with pytest.raises(InputError, match=f"3 dimensions explain these {few} observations without a rest"):
            models.ppca(x[:few], 3)


def test_the_exact_encoder_is_the_posterior(toy):
    _, x, generator = toy
    joint = models.ppca(x, 3)
    q, exact = models.exact_encoder(joint)(x), joint.posterior(x)
    z = torch.randn(4, 40, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z))


@pytest.mark.parametrize("name", models.MODELS)
def test_models_are_reproducible_and_of_the_stated_size(name):
    first, again, other = (models.build(name, 25, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    small = models.build(name, 25, latent=2)
    x = torch.rand(3, 25)
    eps = small.encoder.noise(4, x, torch.Generator().manual_seed(0))
    posterior = small.encoder(x)
    drawn = posterior.noise(4, torch.Generator().manual_seed(0))
    for a, b in zip(eps if isinstance(eps, tuple) else (eps,), drawn if isinstance(drawn, tuple) else (drawn,)):
        assert torch.equal(a, b)  # the encoder's own noise needs no forward pass, and is the same noise
    assert small.joint(x, posterior.sample(eps)).shape == (4, 3)


def test_the_sizes_are_those_of_burda_et_al():
    layers = {
        name: [tuple(p.shape) for part in (model.encoder, model.joint) for p in part.parameters() if p.ndim == 2]
        for name, model in ((name, models.build(name, 784)) for name in ("mlp-1", "mlp-2"))
    }
    assert layers["mlp-1"] == [(200, 784), (200, 200), (50, 200), (50, 200), (200, 50), (200, 200), (784, 200)]
    encoder = [(200, 784), (200, 200), (100, 200), (100, 200), (100, 100), (100, 100), (50, 100), (50, 100)]
    prior, decoder = [(100, 50), (100, 100), (100, 100), (100, 100)], [(200, 100), (200, 200), (784, 200)]
    assert layers["mlp-2"] == encoder + prior + decoder


def test_the_output_bias_starts_at_the_mean_image():
    mean = torch.tensor([0.0, 0.2, 1.0])
    decoder = models.build("mlp-1", 3, mean=mean).joint.decode
    torch.testing.assert_close(decoder.logits.bias.sigmoid(), mean.clamp(0.001, 0.999))
    torch.testing.assert_close(models.build("linear", 3, mean=mean).joint.bias.data, mean)


def test_the_detached_model_differs_in_its_stopped_posterior_alone():
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    detached, model = (
        models.build(name, 6, generator=torch.Generator().manual_seed(0), hidden=5, latent=4, hidden2=5, latent2=2)
        for name in ("mlp-2-detached", "mlp-2")
    )
    gradients = {}
    for row in ("elbo-total", "elbo-path"):
        for name, each in (("right", model), ("detached", detached)):
            each.zero_grad()
            eps = each.encoder.noise(3, x, torch.Generator().manual_seed(2))
            objectives.backward(ESTIMATORS[row], each.joint, each.encoder, x, eps)
            gradients[row, name] = {key: p.grad.clone() for key, p in each.named_parameters()}
    torch.testing.assert_close(gradients["elbo-total", "right"], gradients["elbo-total", "detached"])
    other = {
        key.split(".")[1]
        for key, gradient in gradients["elbo-path", "right"].items()
        if not torch.allclose(gradient, gradients["elbo-path", "detached"][key])
    }
    assert other == {"first"}  # what is cut is the way from log q(z2 | z1) through z1

    q = detached.encoder(x).stop_gradient().stop_gradient()
    z = tuple(layer.detach().requires_grad_() for layer in q.sample(eps))
    above = detached.encoder.second(z[0]).stop_gradient()
    by_hand = torch.autograd.grad(q.first.log_prob(z[0]).sum() + above.log_prob(z[1]).sum(), z)
    torch.testing.assert_close(torch.autograd.grad(q.log_prob(z).sum(), z), by_hand)


def test_bad_names_and_sizes_are_named():
    for name, sizes, message in [
        ("mlp1", {}, "no model is called 'mlp1', did you mean 'mlp-1'"),
        ("mlp-1", {"hiden": 3}, "did you mean 'hidden'"),
        ("mlp-2", {"latent2": 0}, "latent2 of model 'mlp-2' must be at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            models.build(name, 10, **sizes)


def test_a_guided_model_has_the_prior_of_its_model():
    from vaelib import bounds, discrete

    generator = torch.Generator().manual_seed(0)
    for name in ("guided", "guided-bernoulli"):
        model = models.build(name, 6, generator=generator, hidden=5, latent=3)
        x = torch.rand(4, 6, generator=generator)
        q = model.encoder(x)
        z = q.sample(q.noise(2, generator))
        torch.testing.assert_close(model.joint.log_prior(z) + model.joint.log_likelihood(x, z), model.joint(x, z))
        torch.testing.assert_close(bounds.divergence(model.joint, q), bounds.divergence(model.joint.joint, q))
    objectives.backward(
        discrete.ESTIMATORS["elbo-gumbel-softmax"], model.joint, model.encoder, x, q.noise(2, generator)
    )
