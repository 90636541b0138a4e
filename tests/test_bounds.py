"""The bounds and the three forms of the ELBO; in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Pointed

from vaelib import bounds, collapse, discrete, estimators, evaluation, models
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU
from vaelib.posteriors import DiagonalGaussian, FactorisedBernoulli, Mixture

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


def test_the_kl_form_knows_the_model_s_prior():
    """Three bits whose prior is far from fair: all forms average to the sum over the eight values."""
    generator = torch.Generator().manual_seed(0)
    decode = models.build("mlp-1-bernoulli", 4, generator=generator, hidden=5, latent=3).double().joint.decode
    joint = models.DiscreteJoint(decode, torch.full((3,), 3.0, dtype=torch.float64))
    x = torch.ones(1, 4, dtype=torch.float64)
    q = FactorisedBernoulli(torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64))
    exact, z = discrete.exact_elbo(joint, x, q), q.sample(q.noise(20_000, generator))
    for form in bounds.FORMS.values():
        draws = form(joint, x, q, z)
        assert (draws.mean(0) - exact).abs() < 4 * draws.std(0) / 20_000**0.5
    assert (q.kl() - bounds.divergence(joint, q)).abs() > 1  # fair bits are another prior
    with pytest.raises(InputError, match="a FactorisedBernoulli from a standard normal prior has no closed form"):
        bounds.estimate("kl", "elbo", models.Joint(decode), x, q, z)


def test_a_closed_form_that_there_is_none_of_is_refused():
    """A prior that says it is another than the standard normal, and a posterior without an entropy."""

    class Wide(models.Joint):
        def log_prior(self, z):
            return super().log_prior(z / 2) - z.shape[-1] * math.log(2)

    x, q = torch.zeros(1, 4), DiagonalGaussian(torch.zeros(1, 2), torch.zeros(1, 2))
    decode = models.BernoulliMLP((2, 3), 4)
    z = torch.zeros(1, 1, 2)
    assert bounds.divergence(models.Joint(decode), q) == 0
    with pytest.raises(InputError, match="the prior of this Wide is not the standard normal"):
        bounds.estimate("kl", "elbo", Wide(decode), x, q, z)
    mixture = Mixture((q, q), torch.zeros(2, 1))
    with pytest.raises(InputError, match="Mixture has no entropy in closed form: use form 'monte-carlo'"):
        bounds.estimate("entropy", "elbo", models.Joint(decode), x, mixture, z)


class Shifted(models.Joint):
    """A prior around another place, which at z = 1 is as dense as around 0; learnt, if that is a parameter."""

    def __init__(self, decode, place):
        super().__init__(decode)
        self.place = place

    def log_prior(self, z):
        return super().log_prior(z - self.place)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [(torch.tensor(2.0), "is not the standard"), (torch.nn.Parameter(torch.zeros(2)), "is learnt, and so not the sta")],
)
def test_a_prior_that_is_another_elsewhere_or_later_is_not_the_standard_normal(place, sentence):
    joint = Shifted(models.LinearDecoder(torch.ones(4, 2), torch.zeros(4), torch.zeros(())), place)
    q, z = DiagonalGaussian(torch.zeros(1, 2), torch.zeros(1, 2)), torch.zeros(1, 1, 2)
    for use in (
        lambda: bounds.divergence(joint, q),
        lambda: bounds.estimate("kl", "elbo", joint, torch.zeros(1, 4), q, z),
        lambda: estimators.get("elbo-silent").loss(joint, q, torch.zeros(1, 4), None),
    ):
        with torch.no_grad(), pytest.raises(InputError, match=f"the prior of this Shifted {sentence}"):
            use()
    assert evaluation.kl_by_unit(joint, q) is None
    with pytest.raises(InputError, match=f"the prior of this Shifted {sentence}"):
        collapse.elbo_kl(free_bits=0.1).loss(joint, q, torch.zeros(1, 4), z)
    assert bounds.divergence(Shifted(joint.decode, torch.tensor(0.0)), q) == 0


class Chain(models.DiscreteJoint):
    """Bits that follow their neighbours, which ``prior`` does not know."""

    def log_prior(self, z):
        signs = 2 * z - 1
        return torch.nn.functional.logsigmoid(2 * signs[..., 1:] * signs[..., :-1]).sum(-1) - math.log(2)


class Quarter(models.Joint):
    """A likelihood that counts a quarter, in ``forward`` alone."""

    def forward(self, x, z):
        return self.log_prior(z) + self.log_likelihood(x, z) / 4


def test_what_is_redefined_by_half_has_no_closed_form():
    """A subclass keeps closed forms of its base that are not its own."""
    bits = FactorisedBernoulli(torch.zeros(1, 3))
    decode = models.build("mlp-1-bernoulli", 4, hidden=5, latent=3).joint.decode
    linear = models.LinearDecoder(torch.ones(4, 2), torch.zeros(4), torch.zeros(()))
    q, pointed = (kind(torch.zeros(1, 2), torch.zeros(1, 2)) for kind in (DiagonalGaussian, Pointed))
    x = torch.zeros(1, 4)
    chain, quarter, joint = Chain(decode, torch.zeros(3)), Quarter(linear), models.Joint(linear)
    for model, of, sentence in (
        (chain, bits, "this Chain redefines log_prior, but its prior is that of the class it comes from"),
        (quarter, q, "this Quarter redefines forward, but its log_likelihood is that of the class it comes from"),
        (joint, pointed, "a Pointed redefines log_prob, but its kl is that of the class it comes from"),
    ):
        with pytest.raises(InputError, match=sentence):
            bounds.divergence(model, of)
        with pytest.raises(InputError, match=sentence):
            bounds.estimate("kl", "elbo", model, x, of, of.sample(of.noise(2)))
    with pytest.raises(InputError, match="a Pointed redefines log_prob, but its entropy"):
        bounds.estimate("entropy", "elbo", joint, x, pointed, torch.zeros(1, 1, 2))
    with pytest.raises(InputError, match="this Chain redefines log_prior"):
        estimators.get("elbo-gumbel-softmax").loss(chain, bits, x, bits.noise(1))
    assert evaluation.kl_by_unit(chain, bits) is None
    own = type("Own", (Pointed,), {"kl": lambda self: torch.ones(1)})(pointed.mean, pointed.log_std)
    assert bounds.divergence(joint, own) == 1


def test_a_prior_that_is_not_told_is_not_guessed():
    """A linear decoder and p(z) = N(0, 9), both in one forward alone."""

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decode = models.LinearDecoder(torch.ones(4, 2), torch.zeros(4), torch.zeros(()))

        def forward(self, x, z):
            return self.decode(z).log_prob(x) + torch.distributions.Normal(0.0, 3.0).log_prob(z).sum(-1)

    q = DiagonalGaussian(torch.zeros(1, 2), torch.zeros(1, 2))
    for use in (
        lambda: bounds.divergence(Wide(), q),
        lambda: estimators.get("elbo-silent").loss(Wide(), q, torch.zeros(1, 4), None),
    ):
        with pytest.raises(InputError, match=r"a Wide does not tell its prior: give it a method log_prior\(z\), or"):
            use()
    assert evaluation.kl_by_unit(Wide(), q) is None


def test_a_distribution_of_pytorch_is_its_gaussian():
    joint, x = models.build("mlp-1", 6, hidden=8, latent=2).joint, torch.ones(4, 6)
    q = DiagonalGaussian(torch.linspace(-1, 1, 8).view(4, 2), torch.full((4, 2), -0.3))
    normal = torch.distributions.Normal(q.mean, q.log_std.exp())
    torch.testing.assert_close(bounds.divergence(joint, normal), bounds.divergence(joint, q))
    z = q.sample(q.noise(3, torch.Generator().manual_seed(0)))
    for form in bounds.FORMS:
        torch.testing.assert_close(*(bounds.estimate(form, "elbo", joint, x, one, z) for one in (normal, q)))


def test_a_mixture_is_averaged_by_its_shares():
    """The bounds of stratified draws, written out with the weights C pi; and without them they are others."""
    joint = models.build("linear", 5, latent=2, generator=torch.Generator().manual_seed(0)).double().joint
    x = torch.zeros(1, 5, dtype=torch.float64)
    parts = tuple(DiagonalGaussian(torch.full((1, 2), m).double(), torch.zeros(1, 2).double()) for m in (0.0, 3.0))
    q = Mixture(parts, torch.tensor([[4.0], [0.0]], dtype=torch.float64))
    eps = q.noise(4, torch.Generator().manual_seed(0))
    z = q.sample(eps)
    log_w, shares = joint(x, z) - q.log_prob(z), 2 * q.logits.softmax(0).repeat_interleave(2, 0)
    truth = {"elbo": (shares * log_w).mean(0), "iwae": (shares * log_w.exp()).mean(0).log()}
    for bound, value in truth.items():
        torch.testing.assert_close(bounds.estimate("monte-carlo", bound, joint, x, q, z), value)
        assert (bounds.BOUNDS[bound](log_w) - value).abs() > 0.1
    torch.testing.assert_close(-TABLEAU["iwae-path"].loss(joint, q, x, eps), truth["iwae"])
    bits = Mixture(tuple(FactorisedBernoulli(torch.zeros(1, 2).double().requires_grad_()) for _ in range(2)), q.logits)
    with pytest.raises(InputError, match="'elbo-path' is reparameterised"):
        TABLEAU["elbo-path"].loss(joint, bits, x, torch.full((4, 1, 2), 0.5).double())


def test_the_importance_weighted_bound_is_for_log_weights_alone():
    """The entropy and KL forms have no log w; the values that would come out bound nothing."""
    joint = models.build("linear", 5, latent=2, generator=torch.Generator().manual_seed(0)).double().joint
    x, q = torch.zeros(1, 5).double(), DiagonalGaussian(torch.zeros(1, 2).double(), torch.zeros(1, 2).double())
    z = q.sample(q.noise(4, torch.Generator().manual_seed(0)))
    for form in ("entropy", "kl"):
        with pytest.raises(InputError, match=f"the form '{form}' takes an expectation out of log w"):
            bounds.estimate(form, "iwae", joint, x, q, z)
        torch.testing.assert_close(
            bounds.estimate(form, "elbo", joint, x, q, z), bounds.FORMS[form](joint, x, q, z).mean(0)
        )


INF = math.inf


@pytest.mark.parametrize(
    ("log_w", "elbo", "iwae"),
    [
        ([0.0, -INF], -INF, -math.log(2)),
        ([-INF, -INF], -INF, -INF),
        ([-INF], -INF, -INF),
        ([INF, 0.0], INF, INF),
        ([-1e4, -1e4], -1e4, -1e4),
    ],
)
def test_impossible_draws_weigh_nothing_and_leave_no_nan(log_w, elbo, iwae):
    log_w = torch.tensor(log_w).unsqueeze(-1).requires_grad_()
    torch.testing.assert_close(bounds.elbo(log_w), torch.tensor([elbo]))
    value = bounds.iwae(log_w)
    torch.testing.assert_close(value, torch.tensor([iwae]))
    if math.isfinite(elbo) or elbo == -INF:
        slope = torch.autograd.grad(value.sum(), log_w)[0]
        assert slope.isfinite().all() and abs(slope.sum() - (0 if iwae == -INF else 1)) < 1e-3
        weights = bounds.normalised(log_w.detach())
        torch.testing.assert_close(weights, slope, rtol=1e-3, atol=1e-6)  # the slope has the digits of log w


def test_a_share_of_zero_counts_nothing_whatever_its_draw():
    log_w = torch.tensor([[0.3], [-INF], [INF]]).requires_grad_()
    log_share = torch.tensor([[math.log(3)], [-INF], [-INF]]).requires_grad_()
    value = bounds.elbo(log_w, log_share)
    torch.testing.assert_close(value, torch.tensor([0.3]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), [log_w, log_share]))
    value = bounds.iwae(log_w[:2], log_share[:2])
    torch.testing.assert_close(value, torch.tensor([0.3 + math.log(3 / 2)]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), [log_w, log_share]))
