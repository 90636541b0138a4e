"""Posteriors, joints and estimators of other people: a right number, or a sentence that says what is the matter."""

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.func import grad, vmap

import vaelib
from vaelib import bounds, data, estimators, evaluation, gdreg, models, objectives, posteriors, training
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
