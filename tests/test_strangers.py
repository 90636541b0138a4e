"""Posteriors, joints and estimators of other people: a right number, or a sentence that says what is the matter."""

import weakref
from dataclasses import dataclass
from enum import Enum
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zuko
from torch import Tensor, distributions, nn
from torch.distributions import Categorical, Independent, LowRankMultivariateNormal, MixtureSameFamily, Normal
from torch.func import grad, vmap
from toys import DTYPE, Leaves, quadrature

import vaelib
from vaelib import (
    bounds,
    data,
    estimators,
    evaluation,
    gdreg,
    gradients,
    likelihoods,
    models,
    objectives,
    posteriors,
    training,
)
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU
from vaelib.posteriors import DiagonalGaussian, FullGaussian, HierarchicalGaussian, OneHotCategorical, Posterior

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def closure(weight: Tensor):
    """log p(x, z) as a plain function that closes over its parameters."""

    def log_joint(x: Tensor, z: Tensor) -> Tensor:
        prior = distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        return prior + distributions.Normal(z @ weight, 1.0).log_prob(x).sum(-1)

    return log_joint


class Duck:
    """The four methods that a posterior needs at least."""

    def __init__(self, mean: Tensor, log_std: Tensor, stops: bool = True) -> None:
        self.mean, self.log_std, self.stops = mean, log_std, stops

    def noise(self, k, generator=None):
        return torch.randn((k, *self.mean.shape), generator=generator)

    def sample(self, eps):
        return self.mean + self.log_std.exp() * eps

    def log_prob(self, z):
        return distributions.Normal(self.mean, self.log_std.exp()).log_prob(z).sum(-1)

    def stop_gradient(self):
        return Duck(self.mean.detach(), self.log_std.detach()) if self.stops else self


def test_the_form_with_three_channels_is_right_or_refused_for_a_function():
    """Of a function the parameters cannot be held constant: theta would get its gradient twice."""
    weight, q = numbers(2, 4), DiagonalGaussian(numbers(3, 2, seed=1), numbers(3, 2, seed=2))
    eps = q.noise(3)
    with pytest.raises(InputError, match="needs a joint whose parameters can be held constant"):
        objectives.reference("elbo-path", closure(weight), q, X, eps)
    assert objectives.reference("elbo-path", closure(weight.detach()), q, X, eps).requires_grad


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1)])
def test_one_scale_for_several_dimensions_counts_for_each(shape):
    mean, log_std, joint = numbers(3, 2), numbers(*shape, seed=1), closure(numbers(2, 4, seed=2))
    eps = torch.randn(5, 3, 2)
    q, whole = (DiagonalGaussian(mean, s) for s in (log_std, log_std.expand(3, 2)))
    torch.testing.assert_close(q.entropy(), whole.entropy())
    for name in ("elbo-total", "elbo-path", "iwae-dreg", "elbo-score"):
        (mine, truth) = (vaelib.loss(name, joint, one, X, eps=eps) for one in (q, whole))
        torch.testing.assert_close(mine, truth)
        torch.testing.assert_close(*(torch.autograd.grad(loss.mean(), log_std)[0] for loss in (mine, truth)))


def test_a_class_is_not_trusted_for_a_trial_that_could_not_fail():
    """Frozen, or without gradients, a posterior that does not stop passes; alive it must be tried again."""
    joint, mean, log_std = closure(numbers(2, 4)), numbers(3, 2, seed=1), numbers(3, 2, seed=2)
    vaelib.loss("elbo-path", joint, Duck(mean.detach(), log_std.detach(), stops=False), X)
    with torch.no_grad():  # as an evaluation does
        vaelib.loss("elbo-path", joint, Duck(mean + 0, log_std + 0, stops=False), X)
    with pytest.raises(InputError, match="a way to its parameters"):
        vaelib.loss("elbo-path", joint, Duck(mean, log_std, stops=False), X)
    assert vaelib.loss("elbo-path", joint, Duck(mean, log_std), X).isfinite().all()


class DuckEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return Duck(*self.head(x).chunk(2, -1))


def test_four_methods_are_enough_to_be_trained_and_evaluated():
    digits, joint = data.load("digits"), models.build("linear", 64, latent=2).joint
    model = models.VAE(joint, DuckEncoder(), binary=False)
    history = training.fit(model, digits.train, "elbo-path", epochs=1, batch_size=100)
    assert history[-1]["bound"] < 0 or history[-1]["bound"] > 0
    assert evaluation.log_likelihood(model, digits.test.grey[:5], 20, 10).isfinite().all()


@dataclass(frozen=True)
class Mixed(Posterior):
    """A bit and a Gaussian in one tensor, of the three columns of an encoder's output."""

    out: Tensor

    def noise_like(self, k):
        return posteriors.Noise.like("uniform", k, self.out[:, :2])

    def sample(self, eps):
        logit, mean, log_std = self.out.split(1, -1)
        bit = (eps[..., :1] > torch.sigmoid(-logit)).to(eps.dtype)
        return torch.cat([bit, mean + log_std.exp() * Normal(0.0, 1.0).icdf(eps[..., 1:].clamp(1e-6, 1 - 1e-6))], -1)

    def log_prob(self, z):
        logit, mean, log_std = self.out.split(1, -1)
        bit = -nn.functional.binary_cross_entropy_with_logits(logit.expand_as(z[..., :1]), z[..., :1], reduction="none")
        return (bit + Normal(mean, log_std.exp()).log_prob(z[..., 1:])).sum(-1)


class Held(DiagonalGaussian):
    """Somebody held the scale of the sample constant."""

    def sample(self, eps):
        return self.mean + self.log_std.detach().exp() * eps

    log_prob_of_sample, sample_and_log_prob = Posterior.log_prob_of_sample, Posterior.sample_and_log_prob


class HeldDuck(Duck):
    def sample(self, eps):
        return self.mean + self.log_std.detach().exp() * eps


@pytest.mark.parametrize("kind", [Mixed, Held, HeldDuck])
@pytest.mark.parametrize("name", TABLEAU)
def test_a_number_that_moves_the_density_alone_has_no_path(kind, name):
    mean, log_std = numbers(3, 2, seed=1), numbers(3, 2, seed=2)
    q = Mixed(numbers(3, 3, seed=1)) if kind is Mixed else kind(mean, log_std)
    for right in (
        Duck(mean, log_std),
        DiagonalGaussian(mean, log_std),
        type("Other", (DiagonalGaussian,), {})(mean, log_std),
    ):
        assert vaelib.loss(name, closure(numbers(2, 4)), right, X, k=2).isfinite().all()
    if not TABLEAU[name].reparameterised:
        assert vaelib.loss(name, closure(numbers(2, 4)), q, X, k=2).isfinite().all()
        return
    with pytest.raises(InputError, match="needs a sample that moves with the encoder's parameters"):
        vaelib.loss(name, closure(numbers(2, 4)), q, X, k=2)


class LogNormal(DiagonalGaussian):
    """Redefines sample and density, and inherits what is said of both together: near 1, nearly the same number."""

    def sample(self, eps):
        return super().sample(eps).exp()

    def log_prob(self, z):
        return super().log_prob(z.log()) - z.log().sum(-1)


@pytest.mark.parametrize(
    ("mean", "log_std", "latent"), [(0.02, -2.0, 50), (0.0, -3.0, 2), (0.0, -5.0, 2), (1.0, -0.5, 2)]
)
def test_a_density_that_is_nearly_the_inherited_one_is_another(mean, log_std, latent):
    x = torch.ones(3, latent)
    q = LogNormal(torch.full((3, latent), mean).requires_grad_(), torch.full((3, latent), log_std))
    with pytest.raises(InputError, match="log_prob of this LogNormal is not what it says of its own samples"):
        vaelib.loss("elbo-total", lambda x, z: Normal(z, 1.0).log_prob(x).sum(-1), q, x)


class Level(Enum):
    GOOD, BAD = 1, 2


class OfSetting(Duck):
    """Stops in one setting, and not in another."""

    def __init__(self, mean, log_std, setting):
        super().__init__(mean, log_std)
        self.setting = setting

    def stop_gradient(self):
        return self if self.setting in (2, Level.BAD, None) else super().stop_gradient()


@pytest.mark.parametrize("settings", [(1, 2), (Level.GOOD, Level.BAD), (0, None)])
def test_a_class_is_tried_in_each_of_its_settings(settings):
    joint, mean, log_std = closure(numbers(2, 4)), numbers(3, 2, seed=1), numbers(3, 2, seed=2)
    good, bad = (OfSetting(mean, log_std, one) for one in settings)
    assert vaelib.loss("elbo-path", joint, good, X).isfinite().all()
    with pytest.raises(InputError, match="a way to its parameters"):
        vaelib.loss("elbo-path", joint, bad, X)


class Around(Duck):
    """Holds its numbers in a distribution of torch's, and does not stop them."""

    def __init__(self, mean, log_std):
        self.normal = Normal(mean, log_std.exp())

    mean, log_std = (property(lambda self: self.normal.mean), property(lambda self: self.normal.stddev.log()))

    def stop_gradient(self):
        return self


def test_numbers_inside_a_distribution_are_seen_to_live():
    joint, mean, log_std = closure(numbers(2, 4)), numbers(3, 2, seed=1), numbers(3, 2, seed=2)
    vaelib.loss("elbo-path", joint, Around(mean.detach(), log_std.detach()), X)
    with pytest.raises(InputError, match="a way to its parameters"):
        vaelib.loss("elbo-path", joint, Around(mean, log_std), X)


class Spatial(Duck):
    """A latent of maps, ``[K, B, C, W]``."""

    def log_prob(self, z):
        return super().log_prob(z).sum(-1)

    def stop_gradient(self):
        return Spatial(self.mean.detach(), self.log_std.detach())


@pytest.mark.parametrize("name", TABLEAU)
@pytest.mark.parametrize(("k", "shape"), [(4, (4, 4, 3)), (2, (3, 4, 5))])
def test_a_latent_of_maps_is_that_of_its_numbers(name, k, shape):
    mean, log_std, eps = numbers(*shape, seed=1), numbers(*shape, seed=2), torch.randn(k, *shape)
    x = torch.randn(shape[0], 6)
    weight = torch.randn(shape[1] * shape[2], 6)

    def joint(x, z):
        return closure(weight)(x, z.flatten(2))

    flat = DiagonalGaussian(mean.flatten(1), log_std.flatten(1))
    found = [
        torch.autograd.grad(vaelib.loss(name, joint, q, x, eps=noise).mean(), (mean, log_std), materialize_grads=True)
        for q, noise in ((Spatial(mean, log_std), eps), (flat, eps.flatten(2)))
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Short(models.DiscreteJoint):
    """Its likelihood is summed over more than the pixels."""

    how = "batch"

    def log_likelihood(self, x, z):
        log_p = super().log_likelihood(x, z)
        return {"batch": log_p.sum(1, keepdim=True), "all": log_p.sum(), "right": log_p}[self.how]


@pytest.mark.parametrize("how", ["batch", "all", "right"])
@pytest.mark.parametrize("name", ["elbo-gumbel-softmax", "elbo-straight-through", "elbo-score-loo", "elbo-exact"])
def test_a_likelihood_that_is_summed_over_the_batch_is_refused(name, how):
    decode = models.LinearDecoder(torch.ones(4, 2), torch.zeros(4), torch.zeros(()))
    joint, q = Short(decode, torch.zeros(2)), posteriors.FactorisedBernoulli(torch.zeros(3, 2))
    joint.how = how
    if how == "right":
        assert vaelib.loss(name, joint, q, X, k=2).shape == (3,)
    else:
        with pytest.raises(InputError, match=r"log_likelihood\(x, z\) must return log p\(x given z\) of the shape"):
            vaelib.loss(name, joint, q, X, k=2)


class TemperedBits(posteriors.FactorisedBernoulli):
    """Twice the logits, in everything that a posterior of somebody must redefine."""

    def twice(self):
        return posteriors.FactorisedBernoulli(2 * self.logits)

    def sample(self, eps):
        return self.twice().sample(eps)

    def log_prob(self, z):
        return self.twice().log_prob(z)

    def relaxed_sample(self, eps, temperature):
        return self.twice().relaxed_sample(eps, temperature)


class TemperedGaussian(DiagonalGaussian):
    def twice(self):
        return DiagonalGaussian(self.mean, self.log_std + 1)

    def sample(self, eps):
        return self.twice().sample(eps)

    def log_prob(self, z):
        return self.twice().log_prob(z)

    log_prob_of_sample, sample_and_log_prob = Posterior.log_prob_of_sample, Posterior.sample_and_log_prob

    def kl(self):
        return self.twice().kl()


def test_closed_forms_of_a_base_class_are_not_those_of_another_density():
    decode = models.LinearDecoder(torch.ones(4, 2), torch.zeros(4), torch.zeros(()))
    bits, gaussian = TemperedBits(numbers(3, 2)), TemperedGaussian(numbers(3, 2), numbers(3, 2, seed=1))
    for name in ("elbo-arm", "elbo-disarm"):
        with pytest.raises(InputError, match="ask for the logits of bits, but a TemperedBits redefines"):
            vaelib.loss(name, models.DiscreteJoint(decode, torch.zeros(2)), bits, X, k=2)
    with pytest.raises(InputError, match="redefines log_prob, but its linear_moments is that of the class"):
        vaelib.loss("elbo-silent", models.Joint(decode), gaussian, X)
    with pytest.raises(InputError, match="redefines log_prob, but its entropy is that of the class"):
        evaluation.mutual_information(lambda x: TemperedGaussian(x[:, :2], x[:, 2:]), X)


class Tied(nn.Module):
    """An encoder whose weights a decoder may have as well."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        mean = self.head(x)
        return DiagonalGaussian(mean, torch.zeros_like(mean))


class TiedJoint(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, z):
        return closure(self.encoder.head.weight)(x, z)


def test_a_gradient_that_a_closure_hides_from_a_measurement_is_refused():
    encoder = Tied()
    joint = TiedJoint(encoder)
    loss = vaelib.loss("elbo-total", joint, encoder(X), X, 20_000, torch.Generator().manual_seed(0)).mean()
    truth = torch.cat([-slope.flatten() for slope in torch.autograd.grad(loss, list(encoder.parameters()))])
    found = gradients.measure(["elbo-path"], joint, encoder, X, draws=2_000, k=4, wrt="encoder")["elbo-path"]
    assert ((found.mean - truth).abs() < 0.1).all()
    with pytest.raises(InputError, match="weights of the encoder by a function that closes over them"):
        gradients.measure(["elbo-path"], lambda x, z: joint(x, z), encoder, X, draws=10, wrt="encoder")
    gradients.measure(["elbo-path"], lambda x, z: joint(x, z), encoder, X, draws=10, wrt="posterior")


def mean_of_the_batch(log_p):
    return log_p.mean(1, keepdim=True).expand_as(log_p)


MIXED = {
    "a mean over the batch": mean_of_the_batch,
    "a sum over the batch": lambda log_p: log_p.sum(1, keepdim=True).expand_as(log_p),
    "a mean over everything": lambda log_p: log_p.mean().expand_as(log_p),
    "a sum over draws": lambda log_p: log_p.sum(0, keepdim=True).expand_as(log_p),
    "rows in another order": lambda log_p: log_p.flip(1),
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("call", ["loss", "evaluation"])
def test_a_joint_that_mixes_draws_or_observations_up_is_told_whenever_it_is_called(kind, call):
    q, right = DiagonalGaussian(numbers(len(X), 2, seed=1), numbers(len(X), 2, seed=2)), closure(numbers(2, 4))

    def wrong(x, z):
        return MIXED[kind](right(x, z))

    def value(log_p):
        if call == "evaluation":
            return evaluation.log_likelihood(models.VAE(log_p, lambda x: q, binary=False), X, 4, batch_size=len(X))
        return vaelib.loss("iwae-total", log_p, q, X, k=3)

    for _ in range(2):
        with pytest.raises(InputError, match="changes with other draws or observations"):
            value(wrong)
    assert value(right).isfinite().all()


def test_a_joint_may_mix_its_batch_where_it_trains_alone():
    norm, q = nn.BatchNorm1d(2), DiagonalGaussian(numbers(len(X), 2, seed=1), numbers(len(X), 2, seed=2))
    right = closure(numbers(2, 4))

    def joint(x, z):
        return right(x, norm(z.flatten(0, 1)).view_as(z))

    before = torch.get_rng_state()
    loss = vaelib.loss("elbo-total", joint, q, X, eps=q.noise(3, torch.Generator().manual_seed(0)))
    loss.mean().backward()
    assert norm.training and int(norm.num_batches_tracked) == 1 and torch.equal(before, torch.get_rng_state())


def made_by_exec(net):
    made = {}
    exec("def apply(net, z):\n    return net(z)", made)
    return lambda z: made["apply"](net, z)


def in_an_object(net):
    held = SimpleNamespace(inside=[SimpleNamespace(net=net)])
    return lambda z: held.inside[0].net(z)


def beside_a_cycle(net):
    cycle = {"net": net}
    cycle["itself"] = cycle
    return lambda z: cycle["net"](z)


def beside_a_frozen_network(net):
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 2)).eval()))
    return lambda z: net(z) + 0 * frozen(z)


@pytest.mark.parametrize("hidden", [made_by_exec, in_an_object, beside_a_cycle, beside_a_frozen_network])
def test_a_joint_is_tried_however_it_holds_its_networks(hidden):
    norm, q = nn.BatchNorm1d(2), DiagonalGaussian(numbers(len(X), 2, seed=1), numbers(len(X), 2, seed=2))
    right, apply = closure(numbers(2, 4)), hidden(lambda z: z)
    with pytest.raises(InputError, match="changes with other draws or observations"):
        vaelib.loss("elbo-total", lambda x, z: right(x, apply(z)) + z.mean(), q, X)
    normed = hidden(norm)
    vaelib.loss("elbo-total", lambda x, z: right(x, normed(z.flatten(0, 1)).view_as(z)), q, X, k=3)
    assert norm.training and int(norm.num_batches_tracked) == 1


class Odd:
    """Answers whatever it is asked for."""

    __slots__ = ("net",)

    def __getattr__(self, name):
        raise KeyError(name)


def test_odd_objects_in_reach_are_no_obstacle():
    q, right = DiagonalGaussian(numbers(len(X), 2, seed=1), numbers(len(X), 2, seed=2)), closure(numbers(2, 4))
    gone = weakref.proxy(nn.Linear(2, 2))
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 2)).eval()))
    held = SimpleNamespace(odd=Odd(), gone=gone, lazy=nn.LazyBatchNorm1d(), frozen=frozen)
    assert vaelib.loss("elbo-total", lambda x, z: (right(x, z), held)[0], q, X, k=3).isfinite().all()
    with pytest.raises(InputError, match="changes with other draws or observations"):
        vaelib.loss("elbo-total", lambda x, z: (right(x, z) + z.mean(), held)[0], q, X, k=3)
    model = models.VAE(lambda x, z: (right(x, z), held)[0], lambda x: q, binary=False)
    assert evaluation.log_likelihood(model, X, 4, batch_size=len(X)).isfinite().all()


def test_an_object_that_holds_model_and_joint_does_not_hide_weights_of_the_encoder():
    model = models.build("mlp-1", 4, generator=torch.Generator().manual_seed(0), hidden=3, latent=2)
    run = SimpleNamespace(model=SimpleNamespace(joint=model.joint, encoder=model.encoder))
    x = X.round().clamp(0, 1)
    means = []
    for joint in (model.joint, lambda x, z: run.model.joint(x, z)):
        options = {"draws": 10, "wrt": "encoder", "generator": torch.Generator().manual_seed(0)}
        found = gradients.measure(["elbo-path"], joint, model.encoder, x, **options)
        means.append(found["elbo-path"].mean)
    torch.testing.assert_close(*means)


class Averaging(nn.Module):
    """A layer that takes the mean of its batch in evaluation mode alone."""

    def forward(self, z):
        return z if self.training else z.mean(1, keepdim=True).expand_as(z)


def test_a_joint_is_tried_in_each_mode():
    class InLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Averaging()

        def forward(self, x, z):
            return -0.5 * (x[:, :2] - self.layer(z)).square().sum(-1)

    joint, q = InLayers(), DiagonalGaussian(numbers(len(X), 2, seed=1), numbers(len(X), 2, seed=2))
    vaelib.loss("elbo-total", joint, q, X)
    with pytest.raises(InputError, match="changes with other draws"):
        vaelib.loss("elbo-total", joint.eval(), q, X)


def test_a_joint_that_closes_over_the_condition_of_one_batch_is_measured_draw_by_draw():
    condition = numbers(len(X), 2, seed=3).detach()
    q = DiagonalGaussian(numbers(len(X), 2, seed=1), numbers(len(X), 2, seed=2))
    given = torch.cat([X[:, :1], condition], 1)

    def joint(x, z):
        return -0.5 * (z - x[:, :1] - condition[: len(x)]).square().sum(-1)

    def whole(x, z):
        return -0.5 * (z - x[:, :1] - x[:, 1:]).square().sum(-1)

    found, expected = (
        gradients.measure(["elbo-total"], log_p, q, x, draws=30, generator=torch.Generator().manual_seed(0))
        for log_p, x in ((joint, X), (whole, given))
    )
    torch.testing.assert_close(found["elbo-total"].mean, expected["elbo-total"].mean)
    torch.testing.assert_close(found["elbo-total"].variance, expected["elbo-total"].variance)


class Bare:
    """The four methods that a posterior needs at least, and nothing else."""

    def __init__(self, q):
        self.q = q

    def noise(self, k, generator=None):
        return self.q.noise(k, generator)

    def sample(self, eps):
        return self.q.sample(eps)

    def log_prob(self, z):
        return self.q.log_prob(z)

    def stop_gradient(self):
        return Bare(self.q.stop_gradient())


def test_active_units_of_a_posterior_without_a_mean_are_told():
    with pytest.raises(InputError, match="a Bare does not say where it is centred.*give it a property mean"):
        evaluation.active_units(lambda x: Bare(Duck(x, x)), X)


class Closed(nn.Module):
    """A decoder that holds a function over its own weights, or calls them itself."""

    def __init__(self, closed):
        super().__init__()
        self.head = nn.Linear(2, 4)
        self.call = (lambda z: self.head(z)) if closed else None

    def forward(self, z):
        return likelihoods.Gaussian((self.call or self.head)(z), torch.zeros(()))


class Upper(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, z):
        return DiagonalGaussian(self.head(z), torch.zeros_like(z))


def test_gdreg_of_a_decoder_that_cannot_be_held_constant_is_refused():
    q, estimator = DiagonalGaussian(numbers(3, 2), numbers(3, 2)), gdreg.gdreg(TABLEAU["iwae-dreg"])
    q = HierarchicalGaussian(q, (Upper(),))
    assert vaelib.loss(estimator, models.HierarchicalJoint(Upper(), Closed(False)), q, X, k=3).isfinite().all()
    with pytest.raises(InputError, match="a function inside this HierarchicalJoint closes over live ones"):
        vaelib.loss(estimator, models.HierarchicalJoint(Upper(), Closed(True)), q, X, k=3)


class Tanh(DiagonalGaussian):
    """Redefines sample and density, and inherits what is said of both together."""

    def sample(self, eps):
        return torch.tanh(self.mean + self.log_std.exp() * eps)

    def log_prob(self, z):
        normal = distributions.Normal(self.mean, self.log_std.exp())
        return (normal.log_prob(torch.atanh(z)) - torch.log1p(-z * z)).sum(-1)


def test_a_subclass_whose_parts_do_not_go_together_is_refused():
    with pytest.raises(InputError, match="log_prob of this Tanh is not what it says of its own samples"):
        vaelib.loss("elbo-total", closure(numbers(2, 4)), Tanh(numbers(3, 2), numbers(3, 2, seed=1)), X, k=4)


class Wide(models.LinearGaussian):
    def log_prior(self, z):
        return distributions.Normal(0.0, 3.0).log_prob(z).sum(-1)


def test_a_prior_of_ones_own_is_no_standard_normal():
    joint, q = Wide(torch.rand(4, 2), torch.zeros(4), torch.zeros(())), DiagonalGaussian(numbers(3, 2), numbers(3, 2))
    for broken in (
        lambda: vaelib.loss("silent", joint, q, X),
        lambda: bounds.estimate("kl", "elbo", joint, X, q, q.sample(q.noise(2))),
    ):
        with pytest.raises(InputError, match="not the standard normal"):
            broken()


def test_noise_of_another_width_or_dtype_is_refused():
    q, joint = DiagonalGaussian(numbers(3, 2), numbers(3, 2, seed=1)), closure(numbers(2, 4, seed=2))
    for eps in (torch.randn(5, 3, 1), torch.randn(5, 3, 3), torch.randn(5, 3, 2).double(), torch.ones(5, 3, 2).long()):
        with pytest.raises(InputError, match=r"the noise of a DiagonalGaussian is normal, \[K, B, 2\]"):
            vaelib.loss("elbo-total", joint, q, X, eps=eps)
    with pytest.raises(InputError, match="needs draws"):
        objectives.backward("elbo-path", joint, q, X, None)


def test_modules_in_a_dictionary_are_found_and_tried():
    class Inside(Posterior):
        def __init__(self, net, mean):
            self.nets, self.mean = {"a": net}, mean

        def noise_like(self, k):
            return posteriors.Noise.like("normal", k, self.mean)

        def sample(self, eps):
            return self.mean + eps

        def log_prob(self, z):
            return posteriors.standard_normal_log_prob(z - self.mean) + 0 * self.nets["a"](z).sum(-1)

        def stop_gradient(self):
            return Inside(posteriors.stop_gradient(self.nets["a"]), self.mean.detach())

    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    vaelib.loss("elbo-path", closure(numbers(2, 4)), Inside(net.eval(), numbers(3, 2)), X)
    net[0].weight.data.fill_(float("inf"))  # so that a mask shows: 0 * inf is not a number where it is open
    net[0].bias.data.fill_(1.0)
    assert list(posteriors.functions_in(Inside(net, numbers(3, 2)))) == [net]


def test_an_upper_layer_may_be_of_any_family():
    class Above(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, z):
            return self.make(z)

    first = DiagonalGaussian(numbers(3, 2), numbers(3, 2, seed=1))
    full = Above(lambda z: FullGaussian(z, torch.eye(2)))
    choices = Above(lambda z: OneHotCategorical(z.unsqueeze(-1).expand(*z.shape, 4)))
    for layer, width in ((full, 2), (choices, 8)):
        eps = HierarchicalGaussian(first, (layer,)).noise(5)
        assert [e.shape for e in eps] == [(5, 3, 2), (5, 3, width)]


def test_the_form_with_three_channels_has_no_nan_where_a_draw_is_impossible():
    class Half(nn.Module):
        def forward(self, x, z):
            log_p = posteriors.standard_normal_log_prob(z)
            return torch.where(torch.arange(4).unsqueeze(-1) == 2, -torch.inf, log_p)

    mean = numbers(3, 2)
    q = DiagonalGaussian(mean, numbers(3, 2, seed=1))
    eps = q.noise(4, torch.Generator().manual_seed(2))
    for name in ("iwae-total", "iwae-dreg", "iwae-vimco", "rws"):
        mine, truth = (form(Half(), q, X, eps) for form in (TABLEAU[name].loss, TABLEAU[name].reference_loss))
        torch.testing.assert_close(mine, truth)
        torch.testing.assert_close(*(torch.autograd.grad(loss.mean(), mean)[0] for loss in (mine, truth)))


def test_gdreg_keeps_its_digits_where_q_is_narrow():
    def gradient(dtype):
        model = models.build("mlp-2", 4, generator=torch.Generator().manual_seed(0), hidden=5, hidden2=5).to(dtype)
        model.encoder.first.log_std.bias.data.fill_(-12.0)
        x = (X > 0.5).to(dtype)
        q = model.encoder(x)
        eps = tuple(e.to(dtype) for e in model.float().encoder(x.float()).noise(3, torch.Generator().manual_seed(1)))
        model = model.to(dtype)
        loss = gdreg.gdreg(TABLEAU["iwae-dreg"]).loss(model.joint, model.encoder(x), x, eps).mean()
        del q
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.joint.priors.parameters()))])

    single, double = gradient(torch.float32), gradient(torch.float64)
    assert (single - double).norm() < 1e-4 * double.norm()


def test_names_are_found_as_people_write_them():
    assert estimators.get(" STL ") is estimators.get("Sticking the Landing") is TABLEAU["elbo-path"]
    assert estimators.get("ELBO PATH") is TABLEAU["elbo-path"] and estimators.get("elbo") is TABLEAU["elbo-total"]
    with pytest.raises(InputError, match=r"did you mean 'dreg'"):
        estimators.get("dregg")
    with pytest.raises(InputError, match=r"make one by data.Split.of"):
        training.fit(models.build("linear", 64), torch.rand(10, 64))


def test_a_model_of_few_digits_is_told():
    digits = data.load("digits").train
    with pytest.raises(InputError, match=r"the model is torch.bfloat16, which has too few digits .* model.float\(\)"):
        training.fit(models.build("linear", 64).bfloat16(), digits, batch_size=10, epochs=1)


def test_a_gradient_of_a_map_is_right_or_refused():
    """Inside vmap a tensor does not say that it requires a gradient, so that the path could not be scaled."""
    weight, eps = numbers(2, 4).detach(), torch.randn(6, 5, 3, 2, generator=torch.Generator().manual_seed(3))

    def loss(mean, eps, name):
        q = DiagonalGaussian(mean, torch.zeros(3, 2))
        return TABLEAU[name].loss(closure(weight), q, X, eps).mean()

    mean = numbers(3, 2, seed=1).detach()
    for name in ("elbo-total", "elbo-path", "iwae-total", "iwae-dreg", "rws-dreg", "rws"):
        each = vmap(grad(loss), in_dims=(None, 0, None))(mean, eps, name).mean(0)
        try:
            mapped = grad(lambda mean, name=name: vmap(loss, in_dims=(None, 0, None))(mean, eps, name).mean())(mean)
        except InputError:
            assert name.endswith("dreg")
        else:
            torch.testing.assert_close(mapped, each)


# --- what a newcomer gives --------------------------------------------------------------------------------------------


def normal_q() -> DiagonalGaussian:
    return DiagonalGaussian(numbers(3, 2, seed=1), numbers(3, 2, seed=2))


@pytest.mark.parametrize("name", ["elbo-total", "elbo-path", "iwae-dreg", "rws-dreg", "elbo-score"])
def test_a_joint_that_changes_its_arguments_in_place_is_refused(name):
    """Its z is q's too: what arrives there was scaled after the change, not before."""
    log_joint = closure(numbers(2, 4))
    for joint in (lambda x, z: log_joint(x, z.mul_(2.0)), lambda x, z: log_joint(x.sub_(1.0), z)):
        with pytest.raises(InputError, match="changes x or z in place"):
            vaelib.loss(name, joint, normal_q(), X.clone(), k=3)


@pytest.mark.parametrize(
    "joint, x, sentence",
    [
        (None, X, "joint must be a function"),
        (lambda x, z: (x, z), X, "but returned a tuple"),
        (lambda x, z: None, X, "but returned a NoneType"),
        (closure(numbers(2, 4)), X.numpy(), "x must be a tensor of observations .* a ndarray"),
        (closure(numbers(2, 4)), X[0, 0], "x must be a tensor of observations"),
        (closure(numbers(2, 4)), X[:2], "x has 2 observations, but q .* is of 3"),
    ],
)
def test_what_does_not_go_together_is_told_in_a_sentence(joint, x, sentence):
    with pytest.raises(InputError, match=sentence):
        vaelib.loss("iwae-dreg", joint, normal_q(), x, k=2)


def test_evaluation_says_what_it_needs():
    model = models.build("linear", 4)
    for x in (X.numpy(), X[0, 0]):
        with pytest.raises(InputError, match="x must be a tensor of observations"):
            evaluation.log_likelihood(model, x)
    with pytest.raises(InputError, match="this Linear has no joint"):
        evaluation.log_likelihood(nn.Linear(4, 2), X)
    with pytest.raises(InputError, match="batch_size must be a whole number"):
        evaluation.mutual_information(model.encoder, X, batch_size="3")


def test_a_q_that_is_given_is_not_called_what_an_encoder_returned():
    with pytest.raises(InputError, match="q must be a posterior, .* but is a tuple"):
        vaelib.loss("elbo-path", closure(numbers(2, 4)), (numbers(3, 2), numbers(3, 2)), X)


def test_observations_stay_on_the_first_axis():
    normal = distributions.Normal(numbers(3, 2), numbers(3, 2, seed=1).exp())
    full = distributions.MultivariateNormal(numbers(3, 2), torch.eye(2))
    for q in (distributions.Independent(normal, 2), distributions.Independent(full, 1)):
        with pytest.raises(InputError, match=r"one distribution of the shape \[3, 2\]"):
            posteriors.as_posterior(q)
    with pytest.raises(InputError, match="LowRankMultivariateNormal, MixtureSameFamily, Bernoulli"):
        posteriors.as_posterior(distributions.Laplace(numbers(3, 2), 1.0))


@pytest.mark.parametrize("shape", [(3, 2), (2,), (1, 3), (2, 1)])
def test_logits_of_a_mixture_have_the_components_first(shape):
    with pytest.raises(InputError, match=r"of the shape \[C, B\] = \[2, 3\]"):
        posteriors.Mixture((normal_q(), normal_q()), torch.zeros(shape))


def test_messages_name_the_class_that_was_given():
    joint, duck = models.build("linear", 4).joint, Duck(numbers(3, 2), numbers(3, 2, seed=1))
    with pytest.raises(InputError, match="a Duck does not know the mean and variance"):
        vaelib.loss("silent", joint, duck, X)


def test_an_estimator_of_ones_own_says_what_it_is_of():
    def made(bound, target, function=lambda joint, q, x, eps: q.mean.sum(-1)):
        return estimators.LossEstimator("mine", bound, target, 1, "", function)

    with pytest.raises(InputError, match="no bound is called 'elob'"):
        made("elob", None)
    with pytest.raises(InputError, match="no target is called 'eblo'"):
        made("elbo", "eblo")
    scalar = made("elbo", None, lambda joint, q, x, eps: q.mean.sum())
    with pytest.raises(InputError, match=r"must be of the shape \[B\] = \[3\]"):
        vaelib.loss(scalar, closure(numbers(2, 4)), normal_q(), X)


def test_weights_are_held_constant():
    log_w = numbers(3, 2)
    assert not any(w.requires_grad for row in TABLEAU.values() for w in row.weights(log_w))


class Parts:
    """A model that is no module, of functions that close over modules."""

    def __init__(self, net):
        self.encoder = lambda x: DiagonalGaussian(x[:, :2], x[:, 2:])

        def decode(z):
            return torch.stack([net(one) for one in z])

        self.joint = lambda x, z: -0.5 * z.square().sum(-1) - 0.5 * (x - decode(z)).square().sum(-1)


def test_modules_that_a_function_closes_over_are_evaluated_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))
    model = Parts(net)

    def ask():
        generator = torch.Generator().manual_seed(0)
        gradient = gradients.draws("elbo-path", model.joint, normal_q(), X, draws=4, generator=generator)
        return evaluation.log_likelihood(model, X, 20, 10, generator), gradient

    found = ask()
    assert net.training and net[1].training
    net.eval()
    torch.testing.assert_close(found, ask())


class Above(nn.Module):
    """q(z2 | z1), from any network."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z):
        return DiagonalGaussian(self.net(z), torch.zeros_like(z))


def test_a_layer_of_q_that_works_in_place_is_refused():
    q = HierarchicalGaussian(normal_q(), (Above(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))),))
    with pytest.raises(InputError, match="changes z in place"):
        vaelib.loss("elbo-path", lambda x, z: -z[1].square().sum(-1), q, X)


def test_forms_that_evaluate_the_joint_twice_refuse_a_random_one():
    """With two masks, what is taken back of a gradient is not what was in it."""
    model = models.build("mlp-2", 4, generator=torch.Generator().manual_seed(0), hidden=5, hidden2=5)
    model.joint.priors[0] = nn.Sequential(nn.Dropout(0.5), model.joint.priors[0])
    x, row = X.round(), TABLEAU["iwae-dreg"]
    q = model.encoder(x)
    eps = q.noise(3, torch.Generator().manual_seed(1))
    for broken in (gdreg.gdreg(row).loss, row.reference_loss):
        with pytest.raises(InputError, match="a random layer such as dropout"):
            broken(model.joint, q, x, eps)
        model.joint.eval()
        assert broken(model.joint, q, x, eps).isfinite().all()
        model.joint.train()


def test_no_observations_are_no_batch():
    q = DiagonalGaussian(torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(InputError, match=r"there are no observations: x has the shape \[0, 4\]"):
        objectives.backward("elbo-path", closure(numbers(2, 4)), q, X[:0], torch.zeros(1, 0, 2))


class Torch(nn.Module):
    """An encoder that returns a distribution of torch, which refuses parameters that are not numbers."""

    def __init__(self):
        super().__init__()
        self.head, self.calls = nn.Linear(64, 4), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 9:  # as an update by a gradient that is not finite leaves them
            self.head.weight.data.fill_(float("nan"))
        mean, log_std = self.head(x).chunk(2, -1)
        return distributions.Independent(distributions.Normal(mean, log_std.exp(), validate_args=True), 1)


def test_a_training_says_what_is_wrong_with_it():
    digits, joint = data.load("digits"), models.build("linear", 64, latent=2).joint
    with pytest.raises(training.Diverged, match="a parameter is not finite before step [1-9]"):
        training.fit(models.VAE(joint, Torch(), binary=False), digits.train, epochs=1)
    with pytest.raises(InputError, match="'epoch', did you mean 'epochs'"):
        training.fit(models.build("linear", 64), digits.train, epoch=1)


# --- the gradient of vaelib.loss against quadrature and enumeration ---------------------------------------------------

K, NODES = 2, 14
FINE = {"rtol": 0, "atol": 1e-4}
"""What so many nodes leave; the bias of iwae-path, which is looked for too, is a hundred times that."""


def target(theta: Tensor):
    """A log p(x, z) that is neither a Gaussian in z nor the same for its coordinates."""

    def log_joint(x: Tensor, z: Tensor) -> Tensor:
        scale = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
        return -0.5 * ((z - theta * x).square() / scale + 0.2 * (z * scale / 2).cos()).sum(-1) + theta * z[..., 0]

    return log_joint


def flow_of(name: str, leaf: Leaves, n: int):
    sizes = {"transforms": 1, "hidden_features": (3,), "activation": nn.Tanh}
    flow = leaf.module(getattr(zuko.flows, name)(2, 1, **sizes).to(DTYPE))
    q = flow(leaf(1, 1).expand(n, -1))
    return q, q.transform.inv


def shift(mean: Tensor, scale: Tensor):
    return lambda eps: mean + (scale @ eps.unsqueeze(-1)).squeeze(-1)


def normal(leaf: Leaves, n: int, wrap):
    mean, std = leaf(1, 2).expand(n, -1), leaf(1, 2).exp().expand(n, -1)
    return wrap(Normal(mean, std)), shift(mean, torch.diag_embed(std))


def multivariate(leaf: Leaves, n: int):
    mean, scale = leaf(1, 2).expand(n, -1), leaf.scale_tril(1).expand(n, -1, -1)
    return distributions.MultivariateNormal(mean, scale_tril=scale), shift(mean, scale)


def low_rank(leaf: Leaves, n: int):
    mean, factor, diagonal = leaf(1, 2).expand(n, -1), leaf(1, 2, 1).expand(n, -1, -1), leaf(1, 2).exp().expand(n, -1)
    covariance = factor @ factor.mT + torch.diag_embed(diagonal)
    return LowRankMultivariateNormal(mean, factor, diagonal), shift(mean, torch.linalg.cholesky(covariance))


def mixture(leaf: Leaves, n: int):
    logits, mean, std = (leaf(1, 2, *more, spread=0.2).expand(n, 2, *more) for more in ((), (2,), (2,)))
    q = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, std.exp()), 1))
    return q, lambda eps: torch.stack([mean[:, c] + std[:, c].exp() * eps[c] for c in range(2)])


CONTINUOUS = {
    "Normal": lambda leaf, n: normal(leaf, n, lambda q: q),
    "Independent": lambda leaf, n: normal(leaf, n, lambda q: Independent(q, 1)),
    "MultivariateNormal": multivariate,
    "LowRankMultivariateNormal": low_rank,
    "MixtureSameFamily": mixture,
    "zuko autoregressive": lambda leaf, n: flow_of("MAF", leaf, n),
    "zuko couplings": lambda leaf, n: flow_of("RealNVP", leaf, n),
}
"""n copies of one q, as its own package has it, and how its samples come from the noise."""

DISCRETE = {
    "Bernoulli": lambda leaf, n: distributions.Bernoulli(logits=leaf(1, 2).expand(n, -1)),
    "OneHotCategorical": lambda leaf, n: distributions.OneHotCategorical(logits=leaf(1, 3).expand(n, -1)),
}


def density(q, z: Tensor) -> Tensor:
    log_q = q.log_prob(z)
    return log_q if log_q.ndim == 2 else log_q.sum(-1)


def truth(row, log_w: Tensor, log_q_still: Tensor, share: Tensor | float, weight: Tensor, theta, phi) -> list[Tensor]:
    """The gradient of the bound itself, over all noise; for the wake-phase update, its definition."""
    if isinstance(share, Tensor) and row.bound == "elbo":
        value = weight @ (share.exp() * log_w).mean(0)
    else:
        value = weight @ bounds.BOUNDS[row.bound](log_w + share)
    found = list(torch.autograd.grad(value, [theta, *phi], retain_graph=True))
    if row.target == "wake":
        wake = weight.detach() @ (log_w.softmax(0).detach() * log_q_still).sum(0)
        found[1:] = torch.autograd.grad(wake, phi, retain_graph=True)
    return found


def assert_rows_are_right(q, z: Tensor, eps: Tensor, weight: Tensor, phi, rows, share=0.0):
    """Hold the mean of vaelib.loss over all noise, and its gradient, to the truth."""
    x, theta = torch.full((len(weight), 1), 0.4, dtype=DTYPE), torch.tensor(0.7, dtype=DTYPE, requires_grad=True)
    joint = target(theta)
    log_w = joint(x, z) - density(q, z)
    for row in rows:
        expected = truth(row, log_w, density(q, z.detach()), share, weight, theta, phi)
        loss = vaelib.loss(row.name, joint, q, x, eps=eps)
        value = bounds.BOUNDS[row.bound](log_w, share)
        torch.testing.assert_close(-weight @ loss, weight @ value, **FINE)
        found = torch.autograd.grad(-weight.detach() @ loss, [theta, *phi], retain_graph=True)
        for mine, true in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, true, **FINE, msg=lambda m: f"{row.name}: {m}")


@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_row_has_the_right_gradient_with_every_continuous_family(name):
    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    grid = torch.cartesian_prod(*[torch.tensor(points)] * (2 * K))
    weight = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * (2 * K)).prod(-1)
    eps = grid.view(-1, K, 2).transpose(0, 1)
    leaf = Leaves()
    q, sample = CONTINUOUS[name](leaf, len(weight))
    mixed = name == "MixtureSameFamily"
    share = (q.mixture_distribution.logits.log_softmax(-1).mT + np.log(2)) if mixed else 0.0
    rows = [row for row in TABLEAU.values() if row.target and (row.whole or not mixed)]
    assert len(rows) >= 3
    assert_rows_are_right(q, sample(eps), eps, weight, leaf.parameters, rows, share)
    with pytest.raises(AssertionError, match="iwae-path"):
        assert_rows_are_right(q, sample(eps), eps, weight, leaf.parameters, [TABLEAU["iwae-path"]], share)


@pytest.mark.parametrize("name", DISCRETE)
def test_every_row_that_applies_has_the_right_gradient_with_every_discrete_family(name):
    support = DISCRETE[name](Leaves(), 1).enumerate_support().reshape(-1, 2 if name == "Bernoulli" else 3)
    support = support if name != "Bernoulli" else torch.tensor([*product((0.0, 1.0), repeat=2)], dtype=DTYPE)
    z = torch.stack([torch.stack(pair) for pair in product(support, repeat=K)], 1)
    leaf = Leaves()
    q = DISCRETE[name](leaf, z.shape[1])
    ours = posteriors.as_posterior(q)
    eps = torch.full(ours.noise_like(K).shape, 0.5, dtype=DTYPE)
    for one in torch.rand(400, *eps.shape, dtype=DTYPE):  # for each z some noise that it comes from
        eps = torch.where((ours.sample(one) == z).all(-1, keepdim=True), one, eps)
    assert torch.equal(ours.sample(eps), z)
    weight = density(q, z).sum(0).exp()
    rows = [row for row in TABLEAU.values() if row.target and not row.reparameterised] + [estimators.get("exact")]
    assert_rows_are_right(q, z, eps, weight, leaf.parameters, rows)
    for row in TABLEAU.values():
        if row.reparameterised:
            with pytest.raises(InputError, match="use a row without the path channel"):
                vaelib.loss(row.name, target(torch.ones(())), q, torch.ones(z.shape[1], 1, dtype=DTYPE), k=K)


# --- in a loop of one's own -------------------------------------------------------------------------------------------


def toy_vae(generator=None):
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)
    return encoder, decoder, lambda x: DiagonalGaussian(*encoder(x).float().chunk(2, -1))


def log_prior(z: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(z).sum(-1)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("name", ["elbo-total", "elbo-path", "elbo-score-loo"])
def test_a_weight_on_the_kl_is_a_tempered_likelihood(name, beta):
    """By quadrature, which is exact for these polynomials, against E log p(x|z) - beta KL in closed form."""
    eps, weight = quadrature(1, K, nodes=8)
    mean, log_std = (torch.tensor([value], dtype=DTYPE, requires_grad=True) for value in (0.6, -0.4))
    q, x = DiagonalGaussian(mean.expand(len(weight), 1), log_std.expand(len(weight), 1)), weight.new_full((1, 1), 0.9)

    def log_joint(x, z):
        return (Normal(2 * z, 1.0).log_prob(x).sum(-1)) / beta + log_prior(z)

    loss = beta * vaelib.loss(name, log_joint, q, x.expand(len(weight), 1), eps=eps)
    expected = Normal(2 * mean, 1.0).log_prob(x).sum() - 2 * (2 * log_std).exp().sum() - beta * q.kl()[0]
    torch.testing.assert_close(-weight @ loss, expected)
    for mine, true in zip(*(torch.autograd.grad(v, [mean, log_std]) for v in (-weight @ loss, expected)), strict=True):
        torch.testing.assert_close(mine, true)


def test_a_conditional_model_closes_over_its_condition():
    """log p(x, z | c) with q(z | x, c): the exact posterior makes every log-weight log p(x | c)."""
    condition, weight = torch.randn(3, 1), numbers(1)

    def log_joint(x, z):
        return Normal(weight * condition, 1.0).log_prob(z).sum(-1) + Normal(z[..., 0], 1.0).log_prob(x[:, 0])

    mean = (weight * condition + X[:, :1]) / 2
    q = Normal(mean, torch.full_like(mean, 0.5**0.5))
    log_p = Normal((weight * condition)[:, 0], 2**0.5).log_prob(X[:, 0])
    for name in ("elbo-total", "iwae-total", "elbo-path", "iwae-dreg"):
        loss = vaelib.loss(name, log_joint, q, X, k=5)
        torch.testing.assert_close(-loss, log_p)
        if name.endswith("total"):  # differentiates this very constant
            mine, true = (torch.autograd.grad(v.sum(), weight, retain_graph=True)[0] for v in (-loss, log_p))
            torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("name", ["elbo-path", "iwae-dreg", "iwae-vimco"])
def test_gradients_of_parts_of_a_batch_add_up(name):
    encoder, decoder, q = toy_vae()
    parameters = [*encoder.parameters(), *decoder.parameters()]
    eps = torch.randn(5, 3, 2)

    def log_joint(x, z):
        return log_prior(z) + Normal(decoder(z), 1.0).log_prob(x).sum(-1)

    whole = torch.autograd.grad(vaelib.loss(name, log_joint, q(X), X, eps=eps).mean(), parameters)
    for part in (slice(0, 1), slice(1, 3)):
        (vaelib.loss(name, log_joint, q(X[part]), X[part], eps=eps[:, part]).sum() / len(X)).backward()
    for p, expected in zip(parameters, whole, strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("name", ["elbo-total", "elbo-path", "iwae-dreg", "elbo-score-loo"])
def test_under_autocast_the_networks_are_rounded_and_the_densities_are_not(name):
    encoder, decoder, q = toy_vae()
    parameters, eps, seen = [*encoder.parameters(), *decoder.parameters()], torch.randn(5, 3, 2), []

    def log_joint(x, z):
        seen.append(decoder(z).dtype)
        return log_prior(z) + Normal(decoder(z).float(), 1.0).log_prob(x).sum(-1)

    exact = vaelib.loss(name, log_joint, q(X), X, eps=eps)
    expected = torch.autograd.grad(exact.mean(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        full = distributions.MultivariateNormal(torch.zeros(3, 2), scale_tril=torch.tensor([[1.0, 0.0], [0.3, 0.7]]))
        z = posteriors.as_posterior(full).sample(eps)
        loss = vaelib.loss(name, log_joint, q(X), X, eps=eps)
        wide = vaelib.loss("elbo-total", lambda x, z: log_prior(z), full, X, eps=eps)
    found = torch.autograd.grad(loss.mean(), parameters)
    assert seen[0] == torch.float32 and seen[-1] == loss.dtype == torch.float32 or torch.bfloat16 in seen
    assert torch.bfloat16 in seen and loss.dtype == torch.float32 and not torch.equal(loss, exact)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.05)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=0.1, atol=0.05)
    exactly = vaelib.loss("elbo-total", lambda x, z: log_prior(z), full, X, eps=eps)
    assert torch.equal(wide, exactly) and not torch.equal(z, posteriors.as_posterior(full).sample(eps))


@pytest.mark.parametrize("name", ["elbo-silent", "elbo-gumbel-softmax", "elbo-straight-through"])
def test_under_autocast_an_estimator_that_asks_for_a_part_of_the_joint_is_told_of_it(name):
    numbers = torch.zeros(3, 2)
    decode = models.LinearDecoder(torch.ones(4, 2), torch.zeros(4), torch.zeros(()))
    joint, q = models.DiscreteJoint(decode, numbers[0]), posteriors.FactorisedBernoulli(numbers)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(InputError, match="under torch.autocast .* asks for its part '"):
            vaelib.loss(name, joint, q, X)
        with torch.autocast("cpu", enabled=False):
            assert vaelib.loss(name, joint, q, X).shape == (3,)


def test_a_density_of_two_digits_is_refused():
    half, eps = torch.zeros(3, 2, dtype=torch.bfloat16), torch.randn(5, 3, 2)
    q = DiagonalGaussian(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"log p\(x, z\) is torch.bfloat16.*take the sum in float32"):
        vaelib.loss("elbo-path", lambda x, z: log_prior(z).bfloat16(), q, X, eps=eps)
    with pytest.raises(InputError, match=r"log q\(z\) is torch.bfloat16.*take the sum in float32"):
        vaelib.loss("elbo-path", lambda x, z: log_prior(z).float(), DiagonalGaussian(half, half), X)
