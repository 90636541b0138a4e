"""The bounds and the three forms of the ELBO; in float64."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from vaelib import bounds, models
from vaelib.posteriors import DiagonalGaussian

FLOATS = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12)


@given(FLOATS)
def test_the_bounds_are_ordered(values):
    """ELBO <= IWAE <= the largest weight, and the gap to the weighted mean is KL(w || uniform) <= log K."""
    log_w = torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
    elbo, iwae = bounds.elbo(log_w), bounds.iwae(log_w)
    slack = 1e-9 * (1 + log_w.abs().max())
    assert elbo <= iwae + slack and iwae <= log_w.max() + slack
    weighted = (log_w.softmax(0) * log_w).sum(0)
    assert -slack <= weighted - iwae <= math.log(len(values)) + slack


def test_iwae_is_the_log_mean_and_does_not_overflow():
    weights = torch.tensor([[1.0, 3.0], [2.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(bounds.iwae(weights.log()), weights.mean(0).log())
    torch.testing.assert_close(bounds.iwae(weights.log() - 5000), weights.mean(0).log() - 5000)
    torch.testing.assert_close(bounds.iwae(weights[:1].log()), bounds.elbo(weights[:1].log()))


def test_three_forms_one_expectation():
    """Means of 20,000 draws within 4 standard errors of the exact ELBO, and the entropy form's sign flipped is not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    joint = models.build("linear", 5, generator=generator, latent=2).double().joint
    exact_posterior = joint.posterior(x)
    q = DiagonalGaussian(exact_posterior.mean + 0.3, torch.full((6, 2), -0.5, dtype=torch.float64))
    z = q.sample(q.noise(20_000, generator))
    residual = x - q.mean @ joint.weight.mT - joint.bias
    spread = ((joint.weight**2) @ (2 * q.log_std).exp().mT).mT
    variance = (2 * joint.log_std).exp()
    reconstruction = -0.5 * ((residual**2 + spread) / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
    exact = reconstruction - q.kl()
    for form in bounds.FORMS.values():
        draws = form(joint, x, q, z)
        assert draws.shape == (20_000, 6)
        assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / 20_000**0.5).all()
    wrong = bounds.elbo_entropy(joint, x, q, z) - 2 * q.entropy()
    assert ((wrong.mean(0) - exact).abs() > 4 * wrong.std(0) / 20_000**0.5).all()
    exact_draws = bounds.elbo_monte_carlo(
        joint, x, exact_posterior, exact_posterior.sample(exact_posterior.noise(50, generator))
    )
    torch.testing.assert_close(exact_draws, joint.log_marginal(x).expand(50, 6))
