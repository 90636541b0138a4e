"""Mixture posteriors, GDReG and the refusals that go with them, against integrals on a grid; in float64.

The truth for a mixture is the ELBO as an ordinary integral, :math:`\\int q \\log (p / q)\\, dz`, which knows neither
components drawn one by one nor stopped gradients.
"""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from toys import (
    DTYPE,
    ONE_LAYER,
    OneLayerJoint,
    parameter,
    quadrature,
)

from vaelib import bounds, checks, data, evaluation, gradients, models, objectives, training
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU
from vaelib.posteriors import DiagonalGaussian, FullGaussian, Mixture, standard_normal_log_prob

GRID = torch.linspace(-9, 9, 6001, dtype=DTYPE).reshape(-1, 1, 1)
STEP = (GRID[1] - GRID[0]).item()
X = torch.tensor([[1.5]], dtype=DTYPE)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


class Squared(nn.Module):
    """p(z) = N(0, 1), p(x | z) = N(z^2, 1/4): two modes, a sign that x does not tell."""

    def forward(self, x, z):
        normal = Normal(torch.zeros((), dtype=DTYPE), 1.0)
        return (normal.log_prob(z) + Normal(z.square(), 0.5).log_prob(x)).sum(-1)


class MixtureParameters(nn.Module):
    """An encoder whose mixture is the same for every x, with the weights as logits or as they are."""

    def __init__(self, mean, log_std, logits):
        super().__init__()
        self.mean, self.log_std, self.logits = parameter(*mean), parameter(*log_std), parameter(*logits)

    def forward(self, x):
        rows = [p.reshape(-1, 1, 1).expand(-1, *x.shape) for p in (self.mean, self.log_std)]
        components = tuple(map(DiagonalGaussian, *rows))
        return Mixture(components, self.logits.unsqueeze(1).expand(-1, len(x)))


@pytest.fixture
def encoder():
    return MixtureParameters((-0.9, 0.2, 1.4), (-0.7, 0.1, -1.0), (1.5, -1.0, 0.2))


@pytest.fixture(params=["diagonal", "full"])
def mixture(request):
    """Three components in two dimensions for four observations, and the same from torch."""
    mean, logits = randn(3, 4, 2), randn(3, 4, seed=1)
    if request.param == "diagonal":
        log_std = 0.4 * randn(3, 4, 2, seed=2)
        q = Mixture(tuple(map(DiagonalGaussian, mean, log_std)), logits)
        family = Independent(Normal(mean.swapaxes(0, 1), log_std.exp().swapaxes(0, 1)), 1)
    else:
        tril = randn(3, 4, 2, 2, seed=2).tril(-1) + torch.diag_embed(0.5 + randn(3, 4, 2, seed=3).abs())
        q = Mixture(tuple(map(FullGaussian, mean, tril)), logits)
        family = MultivariateNormal(mean.swapaxes(0, 1), scale_tril=tril.swapaxes(0, 1))
    return q, MixtureSameFamily(Categorical(logits=logits.mT), family)


def on_the_grid(joint, q):
    """The ELBO of one observation as an integral over z."""
    log_p, log_q = joint(X, GRID)[:, 0], q.log_prob(GRID)[:, 0]
    return (log_q.exp() * (log_p - log_q)).sum() * STEP


def expected(name, joint, encoder):
    """The estimator's expected gradient: the draws of the components enter one by one, so they may share a node."""
    weight = (-0.5 * GRID.square() - 0.5 * math.log(2 * math.pi)).exp().flatten() * STEP
    eps = GRID.reshape(1, -1, 1).expand(3, -1, -1)
    many = X.expand(len(weight), -1)
    loss = weight @ TABLEAU[name].loss(joint, encoder(many), many, eps)
    return [-g for g in torch.autograd.grad(loss, list(encoder.parameters()))]


# --- the posterior ----------------------------------------------------------------------------------------------------


def test_density_and_mean_agree_with_torch(mixture):
    q, reference = mixture
    z = q.sample(q.noise(6, torch.Generator().manual_seed(0)))
    assert z.shape == (6, 4, 2)
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z))
    torch.testing.assert_close(q.mean, reference.mean)


def test_draws_come_component_after_component_and_the_shares_put_them_right(mixture):
    """4 standard errors in each of 4 x 2 means and second moments; without the shares they are wrong."""
    q, reference = mixture
    z = q.sample(q.noise(60_000, torch.Generator().manual_seed(0))).unflatten(0, (3, -1))
    torch.testing.assert_close(q.log_share(6).exp().mean(0), torch.ones(4, dtype=DTYPE))
    for values, truth in ((z, reference.mean), (z.square(), reference.variance + reference.mean.square())):
        weighted = (q.log_share(3).exp().unsqueeze(1).unsqueeze(-1) * values).mean(0)
        checks.unbiased(weighted, truth)
        checks.biased(values.mean(0), truth)
    first = q.components[0].mean
    torch.testing.assert_close(q.sample(torch.zeros(6, 4, 2, dtype=DTYPE))[:2], first.expand(2, -1, -1))


def test_draws_that_cannot_be_shared_equally_are_refused(mixture):
    q, _ = mixture
    for attempt in (lambda: q.noise(4), lambda: q.noise(0), lambda: q.sample(randn(5, 4, 2))):
        with pytest.raises(InputError, match="must be a multiple of 3, but is"):
            attempt()
    encoder = models.GaussianMixtureMLP((5, 4), 2, components=3)
    with pytest.raises(InputError, match="multiple of 3, but is 1"):
        encoder(torch.zeros(2, 5)).noise(1)


def test_weights_off_the_simplex_are_refused(mixture):
    q, _ = mixture
    weights = q.log_weights.exp()
    z = randn(3, 4, 2, seed=9)
    torch.testing.assert_close(Mixture.from_weights(q.components, weights).log_prob(z), q.log_prob(z))
    with pytest.raises(InputError, match="sum to 1.1; divide them by their sum"):
        Mixture.from_weights(q.components, 1.1 * weights)
    tilted = weights + torch.tensor([[2.0], [0.0], [-2.0]], dtype=DTYPE)
    with pytest.raises(InputError, match="must be at least 0 .* but one is -"):
        Mixture.from_weights(q.components, tilted)


def test_a_component_of_weight_zero_is_not_there():
    mean = torch.tensor([[[0.0]], [[5.0]]], dtype=DTYPE)
    components = tuple(DiagonalGaussian(m, torch.zeros_like(m)) for m in mean)
    weights = torch.tensor([[1.0], [0.0]], dtype=DTYPE, requires_grad=True)
    for q in (
        Mixture.from_weights(components, weights),
        Mixture(components, torch.tensor([[0.7], [-math.inf]]).double()),
    ):
        torch.testing.assert_close(q.log_prob(GRID), components[0].log_prob(GRID))
        assert q.mean.item() == 0 and q.log_weights.flatten().tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("made", ["weights", "logits", "masked logits"])
@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]], ids=str)
@pytest.mark.parametrize("name", [name for name, row in TABLEAU.items() if row.whole])
def test_a_weight_of_zero_leaves_bound_and_gradient_as_without_the_component(name, weights, made):
    """The bound of the components that are there, whose draws are the same; the others, and their weights, get 0."""
    means = torch.arange(float(len(weights)), dtype=DTYPE, requires_grad=True)
    pi = torch.tensor(weights, dtype=DTYPE).unsqueeze(1).requires_grad_()
    alive = pi.detach().squeeze(1) > 0
    eps, x = randn(2 * len(weights), 1, 2), torch.zeros(1, 1, dtype=DTYPE)

    def prior(x, z):
        return standard_normal_log_prob(z)

    parts = tuple(DiagonalGaussian(m.expand(1, 2), torch.zeros(1, 2, dtype=DTYPE)) for m in means)
    if made == "weights":
        q = Mixture.from_weights(parts, pi)
    elif made == "logits":
        q = Mixture(parts, pi.detach().log().requires_grad_())
    else:
        raw = torch.zeros_like(pi).requires_grad_()
        q = Mixture(parts, raw.masked_fill(~alive.unsqueeze(1), -math.inf))
    bound = objectives.backward(TABLEAU[name], prior, q, x, eps)
    leaves = [means, *[leaf for leaf in (pi, q.logits) if leaf.is_leaf and leaf.grad is not None]]
    assert all(leaf.grad.isfinite().all() for leaf in leaves) and (means.grad[~alive] == 0).all()
    for leaf in leaves[1:]:
        assert (leaf.grad[~alive] == 0).all()

    few = torch.tensor([m for m, here in zip(range(len(weights)), alive) if here], dtype=DTYPE, requires_grad=True)
    rest = Mixture(
        tuple(DiagonalGaussian(m.expand(1, 2), torch.zeros(1, 2, dtype=DTYPE)) for m in few),
        torch.zeros(len(few), 1, dtype=DTYPE),
    )
    kept = torch.cat([e for e, here in zip(eps.chunk(len(weights)), alive) if here])
    truth = objectives.backward(TABLEAU[name], prior, rest, x, kept)
    torch.testing.assert_close(bound, truth)
    torch.testing.assert_close(means.grad[alive], few.grad)


def test_a_mixture_of_a_weight_zero_trains_on_in_float32_and_is_evaluated():
    """From logits, as an encoder makes them: -inf in one observation and not in the other."""
    logits = torch.tensor([[0.0, -math.inf], [0.3, 0.0]], requires_grad=True)
    parts = tuple(DiagonalGaussian(torch.zeros(2, 1) + m, torch.zeros(2, 1)) for m in (0.0, 1.0))  # they do not learn
    q, x = Mixture(parts, logits), torch.ones(2, 1)
    for row in (row for row in TABLEAU.values() if row.whole):
        loss = row.loss(lambda x, z: -z.square().sum(-1), q, x, randn(4, 2, 1).float())
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and slope.isfinite().all() and slope[0, 1] == 0


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elbo-total", "elbo-path"])
def test_the_expected_gradient_is_that_of_the_integral_weights_included(encoder, name):
    truth = torch.autograd.grad(on_the_grid(Squared(), encoder(X)), list(encoder.parameters()))
    torch.testing.assert_close(expected(name, Squared(), encoder), list(truth), rtol=0, atol=1e-8)


class LogSoftmaxOff(Mixture):
    """The wrong way: the weights as they are, with nothing that keeps them on the simplex."""

    @property
    def log_weights(self):
        return self.logits

    def stop_gradient(self):
        return LogSoftmaxOff(tuple(q.stop_gradient() for q in self.components), self.logits.detach())


class RawWeights(MixtureParameters):
    def forward(self, x):
        q = super().forward(x)
        return LogSoftmaxOff(q.components, q.logits.log())


def test_raw_weights_get_a_gradient_that_is_off_by_one():
    """E_q[d log q / d pi_c] = 1 for each c: nothing on the simplex, where the steps sum to zero, but not nothing."""
    raw = RawWeights((-0.9, 0.2, 1.4), (-0.7, 0.1, -1.0), (0.3, 0.2, 0.5))
    total, path = (expected(name, Squared(), raw) for name in ("elbo-total", "elbo-path"))
    torch.testing.assert_close(path[:2], total[:2], rtol=0, atol=1e-8)
    torch.testing.assert_close(path[2] - total[2], torch.ones(3, dtype=DTYPE), rtol=0, atol=1e-8)


def test_the_weights_need_their_live_share(encoder):
    """Stopped everywhere, as by a Mixture whose shares are stopped as well, they would never learn."""

    class Stopped(Mixture):
        def log_share(self, k):
            return super().log_share(k).detach()

    class Deaf(MixtureParameters):
        def forward(self, x):
            q = super().forward(x)
            return Stopped(q.components, q.logits)

    deaf = Deaf((-0.9, 0.2, 1.4), (-0.7, 0.1, -1.0), (1.5, -1.0, 0.2))
    truth = torch.autograd.grad(on_the_grid(Squared(), encoder(X)), encoder.logits)[0]
    eps, _ = quadrature(1, 1, 5)
    many = X.expand(5, -1)
    objectives.backward(TABLEAU["elbo-path"], Squared(), deaf(many), many, eps.expand(3, -1, -1))
    assert deaf.logits.grad is None and truth.abs().max() > 0.1


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_path_has_no_variance_at_the_exact_mixture_posterior(family):
    mean, logits = randn(5, 1, 2), randn(5, 1, seed=1)
    tril = 0.3 * randn(5, 1, 2, 2, seed=2).tril(-1) + torch.diag_embed(0.5 + randn(5, 1, 2, seed=3).abs())
    components = map(FullGaussian, mean, tril) if family == "full" else map(DiagonalGaussian, mean, 0.2 * mean.flip(0))
    q = Mixture(tuple(components), logits)

    class Exact(nn.Module):
        def forward(self, x, z):
            return q.log_prob(z) - 1.7

    for row, quiet in (("elbo-path", True), ("elbo-total", False), ("iwae-path", True), ("iwae-total", False)):
        draws = gradients.draws(row, Exact(), q, X, draws=200, k=10, generator=torch.Generator().manual_seed(0))
        if quiet:
            checks.no_variance(draws, scale=1.0)
            assert draws.abs().max() < 1e-10
        else:
            with pytest.raises(AssertionError):
                checks.no_variance(draws, scale=1.0)


def test_the_engine_the_reference_and_algorithm_3_are_one(encoder):
    eps = randn(6, 2, 1)
    x = torch.tensor([[1.5], [0.7]], dtype=DTYPE)
    for name in ("elbo-path", "elbo-total", "iwae-total"):
        encoder.zero_grad()
        value = objectives.backward(TABLEAU[name], Squared(), encoder(x), x, eps)
        fast = [p.grad.clone() for p in encoder.parameters()]
        loss = objectives.reference(TABLEAU[name], Squared(), encoder(x), x, eps)
        torch.testing.assert_close(value, -loss.detach())
        torch.testing.assert_close(fast, list(torch.autograd.grad(loss.mean(), list(encoder.parameters()))))
    q, pi = encoder(x), encoder(x).log_weights.exp()
    total = 0
    for c, component in enumerate(q.components):  # as printed in the paper
        z = component.sample(eps[2 * c : 2 * c + 2])
        total = total + pi[c] * (Squared()(x, z) - q.stop_gradient().log_prob(z)).mean(0)
    value = -TABLEAU["elbo-path"].loss(Squared(), q, x, eps)
    torch.testing.assert_close(total, value)
    torch.testing.assert_close(
        torch.autograd.grad(total.sum(), list(encoder.parameters())),
        torch.autograd.grad(value.sum(), list(encoder.parameters())),
    )


def test_the_stratified_importance_weighted_bound_is_one(encoder):
    """The shares make the mean weight p(x) exactly; the bound lies between the ELBO and log p(x); by quadrature."""
    log_p_x = (Squared()(X, GRID).logsumexp(0) + math.log(STEP)).detach()
    eps, weight = quadrature(1, 3, 60)
    many = X.expand(len(weight), -1)
    with torch.no_grad():
        q = encoder(many)
        z = q.sample(eps)
        log_w = Squared()(many, z) - q.log_prob(z)
        mean_weight = weight @ (q.log_share(3) + log_w).exp().mean(0)
        elbo, iwae = (-weight @ TABLEAU[name].loss(Squared(), q, many, eps) for name in ("elbo-path", "iwae-total"))
        without = weight @ log_w.exp().mean(0)
    torch.testing.assert_close(mean_weight.log(), log_p_x.squeeze(), rtol=0, atol=1e-3)
    assert elbo + 0.05 < iwae < log_p_x - 0.01
    assert abs(without.log() - log_p_x) > 0.05  # the negative control


def test_rows_that_do_not_fit_a_mixture_are_refused(encoder):
    assert [name for name, row in TABLEAU.items() if row.whole] == [
        "elbo-total",
        "elbo-path",
        "iwae-total",
        "iwae-path",
    ]
    for name, row in TABLEAU.items():
        eps = randn(3, 1, 1)
        if row.whole:
            objectives.backward(row, Squared(), encoder(X), X, eps)
        else:
            for engine in (objectives.backward, objectives.reference):
                with pytest.raises(InputError, match=f"'{name}' .* use one of elbo-total, elbo-path"):
                    engine(row, Squared(), encoder(X), X, eps)


def test_the_log_likelihood_counts_every_draw_by_its_share(encoder):
    """4 standard errors; with the shares left out the estimate is off."""
    truth = (Squared()(X, GRID).logsumexp(0) + math.log(STEP)).detach()

    class Deaf(Mixture):
        def log_share(self, k):
            return torch.zeros_like(super().log_share(k))

    for make, right in ((encoder, True), (lambda x: Deaf(encoder(x).components, encoder(x).logits), False)):

        class Encoder(nn.Module):
            forward = staticmethod(make)

        model = models.VAE(Squared(), Encoder(), binary=False)
        value, error = evaluation.log_likelihood(
            model, X, 30_000, 3000, torch.Generator().manual_seed(0), return_standard_error=True
        )
        assert (abs(value - truth) < 4 * error).item() is right


def test_a_mixture_vae_trains_and_is_measured():
    images = data.load("digits", "dynamic")
    sizes = {"hidden": 12, "latent": 2, "components": 2}
    model = models.build("mlp-1-mixture", 64, images.train.grey.mean(0), torch.Generator().manual_seed(0), **sizes)
    before = [p.clone() for p in model.encoder.logits.parameters()]
    history = training.fit(model, images.train, "elbo-path", epochs=3, k=2, lr=5e-3, batch_size=50)
    assert history[-1]["bound"] > history[0]["bound"] + 0.2
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(before, model.encoder.logits.parameters()))
    x = images.test.batch(slice(0, 20), torch.Generator().manual_seed(0))
    assert evaluation.log_likelihood(model, x, 20, 10).isfinite().all()
    odd, even = (evaluation.log_likelihood(model, x, 20, chunk, torch.Generator().manual_seed(1)) for chunk in (3, 4))
    assert torch.equal(odd, even)
    with pytest.raises(InputError, match="samples must be a multiple of the mixture's 2 components, but is 21"):
        evaluation.log_likelihood(model, x, 21)
    assert evaluation.active_units(model.encoder, x)[0] in (1, 2)
    with pytest.raises(InputError, match="multiple of 2, but is 3"):
        training.fit(model, images.train, "elbo-path", k=3)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_importance_weighted_bound_with_a_closed_form_is_refused():
    joint = models.LinearGaussian(
        torch.ones(1, 1, dtype=DTYPE), torch.zeros(1, dtype=DTYPE), torch.zeros((), dtype=DTYPE)
    )
    q = DiagonalGaussian(torch.tensor([[0.4]], dtype=DTYPE, requires_grad=True), torch.zeros(1, 1, dtype=DTYPE))
    z = q.sample(randn(5, 1, 1))
    for form in ("entropy", "kl"):
        with pytest.raises(InputError, match=f"'{form}' takes .* needs log w itself .* use form 'monte-carlo'"):
            bounds.estimate(form, "iwae", joint, X, q, z)
    log_w = joint(X, z) - q.log_prob(z)
    torch.testing.assert_close(bounds.estimate("monte-carlo", "iwae", joint, X, q, z), bounds.iwae(log_w))
    assert torch.autograd.grad(bounds.estimate("kl", "elbo", joint, X, q, z).sum(), q.mean)[0].isfinite().all()
    with pytest.raises(InputError, match="no form of the ELBO is called 'kll', did you mean 'kl'"):
        bounds.estimate("kll", "elbo", joint, X, q, z)
    mixture = Mixture((q, q), torch.zeros(2, 1, dtype=DTYPE))
    with pytest.raises(InputError, match="Mixture has no entropy in closed form"):
        bounds.estimate("entropy", "elbo", joint, X, mixture, mixture.sample(randn(4, 1, 1)))


class Coins:
    """A discrete posterior: its sample does not move with its parameters."""

    def __init__(self, logits):
        self.logits = logits

    def noise(self, k, generator=None):
        return torch.rand(k, *self.logits.shape, generator=generator, dtype=DTYPE)

    def sample(self, eps):
        return (eps < self.logits.sigmoid()).to(eps.dtype)

    def log_prob(self, z):
        return (z * self.logits - nn.functional.softplus(self.logits)).sum(-1)

    def stop_gradient(self):
        return Coins(self.logits.detach())


class CoinEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = parameter(0.3)

    def forward(self, x):
        return Coins(self.logits.expand_as(x))


@pytest.mark.parametrize("estimator", TABLEAU.values(), ids=lambda e: e.name)
def test_a_discrete_posterior_is_refused_by_the_reparameterised_rows_alone(estimator):
    joint, encoder, x = OneLayerJoint(), CoinEncoder(), ONE_LAYER[3]
    eps = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    for engine in (objectives.backward, objectives.reference):
        if estimator.reparameterised:
            with pytest.raises(InputError, match=f"'{estimator.name}' is reparameterised.* such as elbo-score-loo"):
                engine(estimator, joint, encoder(x), x, eps)
            assert joint.theta.grad is None  # refused before anything was added
        else:
            engine(estimator, joint, encoder(x), x, eps)
            joint.zero_grad()
