"""The laboratory against closed forms, a naive loop and itself; all in float64.

Statistical tests are at 4 standard errors in at most 8 coordinates (a false alarm once in 2,000 seeds, and the seed
is fixed), unless they say otherwise.
"""

import copy
import math

import pytest
import torch
from toys import (
    DTYPE,
    ONE_LAYER,
    TWO_LAYERS,
    DetachedTwoLayerEncoder,
    OneLayerEncoder,
    OneLayerJoint,
    TwoLayerEncoder,
    TwoLayerJoint,
    exact_gradient,
    quadrature,
)

from vaelib import checks, gradients, models, objectives
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU, LossEstimator, Row, Weights, elbo_scaled
from vaelib.gradients import Moments
from vaelib.posteriors import DiagonalGaussian, FullGaussian, Mixture, standard_normal_log_prob

X = ONE_LAYER[3]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_model(name="linear", observations=3, **sizes):
    """A model of the book in float64 with a few observations."""
    model = models.build(name, 6, generator=seeded(1), latent=2, **sizes).double()
    x = torch.bernoulli(torch.full((observations, 6), 0.4, dtype=DTYPE), generator=seeded(2))
    return model.joint, model.encoder, x


def naive(estimator, joint, posterior, x, noise, wanted):
    """One draw, one backward pass, one row of gradients."""
    rows = []
    for eps in noise:
        for p in wanted:
            p.grad = None
        objectives.backward(TABLEAU[estimator], joint, posterior(), x, eps)
        rows.append(torch.cat([-p.grad.flatten() if p.grad is not None else 0 * p.flatten() for p in wanted]))
    return torch.stack(rows).detach()


# --- moments ----------------------------------------------------------------------------------------------------------


def test_the_moments_are_those_of_all_draws_at_once():
    draws = 1e4 + torch.randn(1000, 5, generator=seeded(), dtype=DTYPE).exp() @ torch.randn(
        5, 3, generator=seeded(1), dtype=DTYPE
    )
    moments = Moments()
    for part in draws.split(130):
        moments.add(part)
    centred = draws - draws.mean(0)
    torch.testing.assert_close(moments.mean, draws.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.variance, draws.var(0), rtol=1e-11, atol=0)
    torch.testing.assert_close(moments.standard_error, draws.std(0) / 1000**0.5, rtol=1e-11, atol=0)
    fourth = (centred**4).mean(0) - (centred**2).mean(0) ** 2
    torch.testing.assert_close(moments.variance_error, (fourth / 1000).sqrt(), rtol=1e-9, atol=0)
    total, error = checks.total_variance(draws)
    assert moments.total_variance == pytest.approx(total, rel=1e-11)
    assert moments.total_variance_error == pytest.approx(error, rel=0.02)  # the anchor is a mean of 130
    torch.testing.assert_close(moments.standard_error, draws.std(0) / 1000**0.5, rtol=1e-11, atol=0)


def test_the_size_of_the_batches_does_not_matter():
    draws = torch.randn(1000, 4, generator=seeded(), dtype=DTYPE)
    whole = Moments().add(draws)
    for size in (1, 7, 999):
        parts = Moments()
        for part in draws.split(size):
            parts.add(part)
        assert parts.count == 1000
        for name in ("mean", "variance", "variance_error"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-11, atol=1e-13)
        assert parts.total_variance_error == pytest.approx(whole.total_variance_error, rel=0.05)


@pytest.mark.parametrize("block", [1, 30, 90])
def test_the_size_of_the_blocks_does_not_matter(monkeypatch, block):
    """Blocks of one, three and all nine coordinates of ten draws."""
    draws = torch.randn(10, 9, generator=seeded(), dtype=DTYPE)
    whole = Moments().add(draws)
    monkeypatch.setattr(gradients, "BLOCK", block)
    parts = Moments().add(draws)
    torch.testing.assert_close(parts.powers, whole.powers, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.norms, whole.norms, rtol=1e-12, atol=0)


def test_single_precision_draws_far_from_zero_keep_their_variance():
    draws = 1000 + torch.randn(4096, 1, generator=seeded())
    moments = Moments()
    for part in draws.split(64):
        moments.add(part)
    assert moments.variance.item() == pytest.approx(draws.double().var().item(), rel=1e-9)


def test_variance_intervals_hold_the_truth_as_often_as_they_say():
    """90 % intervals over 400 seeds: between 335 and 385 hits, at 4 standard errors of the binomial."""
    hits = 0
    for seed in range(400):
        moments = Moments().add(2 + 3 * torch.randn(500, 2, generator=seeded(seed), dtype=DTYPE))
        least, most = moments.variance_interval(0.9)
        hits += least < 18 < most
    assert 335 <= hits <= 385


def test_the_signal_to_noise_ratio_of_a_known_distribution():
    moments = Moments().add(torch.tensor([3.0, 0.0]) + 2 * torch.randn(40_000, 2, generator=seeded(), dtype=DTYPE))
    error = math.sqrt((1 + 0.5 * 1.5**2) / 40_000)  # of a ratio of mean and standard deviation
    assert abs(moments.total_snr - 3 / math.sqrt(8)) < 4 * error
    assert Moments().add(torch.tensor([[2.0, 3.0], [4.0, 5.0]])).total_snr == pytest.approx(5 / 2)  # of (3, 4)
    constant = Moments().add(torch.ones(5, 2))
    assert constant.total_snr == math.inf and constant.total_variance == 0


def test_what_the_moments_do_not_have_is_said():
    with pytest.raises(InputError, match="at least 2 draws, but there are 1"):
        _ = Moments().add(torch.ones(1, 2)).variance
    with pytest.raises(InputError, match="repeats"):
        _ = Moments().add(torch.ones(2, 2)).variance_time


# --- the gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLEAU)
def test_gradients_of_the_posterior_are_those_of_a_loop(name):
    joint, encoder, x = batch_model()
    q = encoder(x)
    mean, log_std = (p.detach().clone().requires_grad_() for p in (q.mean, q.log_std))
    mine = gradients.draws(name, joint, encoder, x, draws=6, k=3, generator=seeded())
    block = gradients.ROWS // 9
    noise = q.noise(3 * block, seeded()).unflatten(0, (block, 3))[:6]
    loop = naive(name, joint, lambda: DiagonalGaussian(mean, log_std), x, noise, [mean, log_std])
    loop *= 3  # observations: each has its own bound here, and not their mean
    torch.testing.assert_close(mine, loop, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrt", ["encoder", "joint", "weights"])
@pytest.mark.parametrize("loop_from", [0, 2**30], ids=["loop", "vmap"])
@pytest.mark.parametrize("name", ["elbo-path", "iwae-dreg", "iwae-vimco"])
def test_gradients_of_weights_are_those_of_a_loop(name, wrt, loop_from, monkeypatch):
    monkeypatch.setattr(gradients, "LOOP_FROM", loop_from)
    joint, encoder, x = batch_model("mlp-2", hidden=4, hidden2=4, latent2=2)
    mine = gradients.draws(name, joint, encoder, x, draws=5, k=2, wrt=wrt, generator=seeded())
    assert all(p.grad is None for module in (joint, encoder) for p in module.parameters())
    block = gradients.ROWS // 6
    noise = [e.unflatten(0, (block, 2))[:5] for e in encoder(x).noise(2 * block, seeded())]
    wanted = [
        p
        for part, module in (("joint", joint), ("encoder", encoder))
        if wrt in (part, "weights")
        for p in module.parameters()
    ]
    loop = naive(name, joint, lambda: encoder(x), x, list(zip(*noise)), wanted)
    torch.testing.assert_close(mine, loop, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrt", gradients.WRT)
def test_the_chunk_changes_nothing(wrt, monkeypatch):
    monkeypatch.setattr(gradients, "ROWS", 240)
    joint, encoder, x = batch_model()
    whole = gradients.draws("iwae-dreg", joint, encoder, x, draws=50, k=2, wrt=wrt, generator=seeded())
    for chunk in (1, 7, 1000):
        parts = gradients.draws("iwae-dreg", joint, encoder, x, draws=50, k=2, wrt=wrt, generator=seeded(), chunk=chunk)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    fewer = gradients.draws("iwae-dreg", joint, encoder, x, draws=11, k=2, wrt=wrt, generator=seeded())
    torch.testing.assert_close(fewer, whole[:11], rtol=1e-12, atol=1e-12)


def test_measure_is_the_moments_of_draws_and_all_rows_see_the_same_noise():
    joint, encoder, x = batch_model()
    measured = gradients.measure(["elbo-total", "elbo-path"], joint, encoder, x, draws=3000, k=2, generator=seeded())
    for name, moments in measured.items():
        draws = gradients.draws(name, joint, encoder, x, draws=3000, k=2, generator=seeded())
        torch.testing.assert_close(moments.mean, draws.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.variance, draws.var(0), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ["elbo-total", "elbo-path", "iwae-dreg", "elbo-score-loo"])
def test_the_mean_is_the_exact_gradient(name):
    joint, encoder = OneLayerJoint(), OneLayerEncoder()
    eps, weight = quadrature(1, 2, nodes=60)
    truth = torch.cat(exact_gradient(TABLEAU[name].bound, joint, encoder, X, eps, weight))
    moments = gradients.measure([name], joint, encoder, X, draws=40_000, k=2, wrt="weights", generator=seeded())[name]
    assert ((moments.mean - truth).abs() < 4 * moments.standard_error).all()
    assert not ((moments.mean + truth).abs() < 4 * moments.standard_error).any()  # of the wrong sign


def test_the_variances_of_a_gaussian_are_the_closed_forms():
    """q = N(m, s^2) against N(m*, s*^2): with r = s^2 / s*^2 and d = (m - m*) s / s*^2, see chapter 2."""
    joint, encoder = OneLayerJoint(1.3), OneLayerEncoder()
    posterior_variance = 1 / (1 + 1.3**2)
    s, mean = math.exp(-0.3), 0.1 * 2 + 0.4
    r, d = s**2 / posterior_variance, (mean - posterior_variance * 1.3 * 2) * s / posterior_variance
    exact = {
        "elbo-path": ((1 - r) ** 2 / s**2, d**2 + 2 * (1 - r) ** 2),
        "elbo-total": (r**2 / s**2, d**2 + 2 * r**2),
    }
    measured = gradients.measure(list(exact), joint, encoder, X, draws=200_000, generator=seeded())
    for name, truth in exact.items():
        off = (measured[name].variance - torch.tensor(truth, dtype=DTYPE)).abs()
        assert (off < 4 * measured[name].variance_error).all(), name
        assert abs(measured[name].total_variance - sum(truth)) < 4 * measured[name].total_variance_error


def test_a_million_draws_fit_in_the_memory_of_a_few(monkeypatch):
    """The largest batch that goes through the model does not grow with the number of draws."""
    seen = []

    class Watched(OneLayerJoint):
        def forward(self, x, z):
            seen.append(z.numel())
            return super().forward(x, z)

    moments = gradients.measure(["elbo-path"], Watched(), OneLayerEncoder(), X, draws=10**6, generator=seeded())[
        "elbo-path"
    ]
    assert moments.count == 10**6 and sum(seen) == 10**6 + 1  # the first is a trial
    assert max(seen) <= gradients.ROWS
    assert moments.standard_error.max() < 0.001


def test_gradients_of_many_weights_come_a_few_at_a_time(monkeypatch):
    seen = []
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, draws: seen.append(draws.numel()) or add(self, draws))
    monkeypatch.setattr(gradients, "GRADIENTS", 100)
    joint, encoder, x = batch_model()
    size = sum(p.numel() for p in encoder.parameters())
    for wrt, least in (("encoder", size), ("posterior", 12)):
        seen.clear()
        gradients.measure(["elbo-path"], joint, encoder, x, draws=50, wrt=wrt, generator=seeded())
        assert sum(seen) == 50 * least and max(seen) <= 100


def test_every_posterior_can_be_taken_apart():
    """The gradient in a posterior's numbers, observation by observation, for parameters they do not share."""
    mean, log_std = (torch.randn(3, 2, generator=seeded(i), dtype=DTYPE) for i in range(2))
    scale = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=DTYPE)
    joint, _, x = batch_model()
    first, second = DiagonalGaussian(mean, log_std), DiagonalGaussian(mean + 1, log_std)
    logits = torch.randn(2, 3, generator=seeded(), dtype=DTYPE)
    for posterior, size in [
        (first, 12),
        (FullGaussian(mean, scale), 6 + 12),
        (FullGaussian(mean[:2], scale), 4 + 8),  # as many observations as dimensions
        (Mixture((first, second), logits), 24 + 6),
    ]:
        batch = x[: len(posterior.mean)]
        draws = gradients.draws("elbo-path", joint, posterior, batch, draws=4, k=2, generator=seeded())
        alone = gradients.draws("elbo-path", joint, posterior, batch, draws=4, k=2, generator=seeded(), chunk=1)
        assert draws.shape == (4, size)
        torch.testing.assert_close(draws, alone, rtol=1e-12, atol=1e-12)
    step = 1e-6  # the logit of the first component, for the second observation, by finite differences
    eps = Mixture((first, second), logits).noise(2 * (gradients.ROWS // 6), seeded())[:2]
    bounds = []
    for sign in (1, -1):
        moved = logits.clone()
        moved[0, 1] += sign * step
        bounds.append(-TABLEAU["elbo-total"].loss(joint, Mixture((first, second), moved), x, eps)[1])
    exact = ((bounds[0] - bounds[1]) / (2 * step)).item()
    mixture = Mixture((first, second), logits)
    draw = gradients.draws("elbo-total", joint, mixture, x, draws=1, k=2, generator=seeded())[0]
    assert draw[24:].reshape(3, 2)[1, 0].item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("layer", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN, torch.nn.GRUCell])
def test_what_vmap_has_no_rule_for_is_done_draw_by_draw(layer, monkeypatch):
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer(1, 3), torch.nn.Linear(3, 2)

        def forward(self, x):
            states = self.layer(x)
            states = states[0] if isinstance(states, tuple) else states
            return DiagonalGaussian(*self.head(states).chunk(2, -1))

    encoder, x = Recurrent().double(), torch.ones(2, 1, dtype=DTYPE)
    options = {"draws": 3, "wrt": "encoder"}
    draws = gradients.draws("elbo-path", OneLayerJoint(), encoder, x, generator=seeded(), **options)
    assert draws.shape == (3, sum(p.numel() for p in encoder.parameters())) and draws.abs().max() > 0
    monkeypatch.setattr(gradients, "LOOP_FROM", 0)
    loop = gradients.draws("elbo-path", OneLayerJoint(), encoder, x, generator=seeded(), **options)
    torch.testing.assert_close(draws, loop, rtol=1e-12, atol=1e-12)


def test_a_joint_that_looks_at_its_values_is_done_draw_by_draw():
    class Looking(OneLayerJoint):
        def forward(self, x, z):
            log_p = super().forward(x, z)
            return 2 * log_p if z.mean() > 0.4 else log_p

    found = gradients.draws("elbo-path", Looking(), OneLayerEncoder(), X, draws=20, wrt="weights", generator=seeded())
    plain = gradients.draws(
        "elbo-path", OneLayerJoint(), OneLayerEncoder(), X, draws=20, wrt="joint", generator=seeded()
    )
    ratio = found[:, :1] / plain
    assert ((ratio - 1).abs() < 1e-9).any() and ((ratio - 2).abs() < 1e-9).any()


def test_an_error_of_the_model_s_own_reaches_the_caller():
    def joint(x, z):
        raise RuntimeError("my own fault")

    for wrt in ("posterior", "encoder"):
        with pytest.raises(RuntimeError, match="my own fault"):
            gradients.draws("elbo-path", joint, OneLayerEncoder(), X, draws=2, wrt=wrt)


def test_a_frozen_network_is_measured_like_any_other(monkeypatch):
    joint, encoder, x = batch_model()
    frozen = copy.deepcopy(joint).requires_grad_(False), copy.deepcopy(encoder).requires_grad_(False)
    for wrt in ("joint", "encoder", "weights"):
        truth = gradients.draws("elbo-path", joint, encoder, x, draws=3, wrt=wrt, generator=seeded())
        for threshold in (gradients.LOOP_FROM, 0):
            monkeypatch.setattr(gradients, "LOOP_FROM", threshold)
            found = gradients.draws("elbo-path", *frozen, x, draws=3, wrt=wrt, generator=seeded())
            torch.testing.assert_close(found, truth)
        monkeypatch.undo()
    assert not any(p.requires_grad or p.grad is not None for part in frozen for p in part.parameters())


class Restless(torch.nn.Module):
    """A linear layer behind dropout and a batch norm."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(inputs), torch.nn.Linear(inputs, outputs)
        ).double()

    def forward(self, z):
        return self.layers(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


class RestlessEncoder(Restless):
    def forward(self, x):
        return DiagonalGaussian(*super().forward(x).chunk(2, -1))


class RestlessJoint(Restless):
    def forward(self, x, z):
        return standard_normal_log_prob(z) + standard_normal_log_prob(x - super().forward(z))


class Callable:
    """Not a module, but it holds one."""

    def __init__(self, network):
        self.network = network

    def __call__(self, *inputs):
        return self.network(*inputs)


def restless():
    """Networks with random layers and running statistics in training mode, but for one part; and observations."""
    torch.manual_seed(3)
    joint, encoder = RestlessJoint(2, 5), RestlessEncoder(5, 4)
    encoder.layers[1].eval()
    return joint, encoder, torch.randn(4, 5, generator=seeded(), dtype=DTYPE)


@pytest.mark.parametrize("given", ["modules", "methods", "objects"])
@pytest.mark.parametrize("wrt", gradients.WRT)
def test_networks_are_measured_in_evaluation_mode_and_left_as_they_were(wrt, given):
    """Also those that come as bound methods or in objects of another class, where they have no weights to ask for."""
    joint, encoder, x = restless()
    if given != "modules" and wrt != "posterior":
        return
    wrapped = {
        "modules": (joint, encoder),
        "methods": (joint.forward, encoder.forward),
        "objects": (Callable(joint), Callable(encoder)),
    }[given]
    before = copy.deepcopy((joint.state_dict(), encoder.state_dict()))
    modes = [m.training for part in (joint, encoder) for m in part.modules()]
    random = torch.get_rng_state()
    found = gradients.draws("elbo-path", *wrapped, x, draws=3, k=2, wrt=wrt, generator=seeded())
    again = gradients.draws("elbo-path", *wrapped, x, draws=3, k=2, wrt=wrt, generator=seeded())
    gradients.bias_test("elbo-path", "elbo-total", *wrapped, x, draws=3, wrt=wrt, generator=seeded())
    gradients.measure(["elbo-path"], joint, encoder, x, draws=3, wrt=wrt, generator=seeded(), repeats=1)
    assert torch.equal(found, again)  # without dropout
    assert modes == [m.training for part in (joint, encoder) for m in part.modules()]
    assert all(p.grad is None and p.requires_grad for part in (joint, encoder) for p in part.parameters())
    for part, values in zip((joint, encoder), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in part.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    frozen = copy.deepcopy(joint).eval(), copy.deepcopy(encoder).eval()
    torch.testing.assert_close(
        found, gradients.draws("elbo-path", *frozen, x, draws=3, k=2, wrt=wrt, generator=seeded())
    )


@pytest.mark.parametrize("loop_from", [0, 2**30], ids=["loop", "vmap"])
def test_tied_weights_are_one_parameter(loop_from, monkeypatch):
    """The encoder's mean is W' x and the decoder's W z: whatever the gradient is taken in, W has but one of it."""
    monkeypatch.setattr(gradients, "LOOP_FROM", loop_from)
    w = torch.nn.Parameter(torch.randn(6, 2, generator=seeded(), dtype=DTYPE))

    class TiedJoint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = w, torch.nn.Parameter(torch.zeros(6, dtype=DTYPE))

        def forward(self, x, z):
            return standard_normal_log_prob(z) + standard_normal_log_prob(x - z @ self.w.mT - self.b)

    class TiedEncoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.s = w, torch.nn.Parameter(torch.zeros(2, dtype=DTYPE))

        def forward(self, x):
            return DiagonalGaussian(x @ self.w, self.s.expand(len(x), 2))

    joint, encoder = TiedJoint(), TiedEncoder()
    x = torch.randn(4, 6, generator=seeded(1), dtype=DTYPE)
    first = encoder(x).noise(gradients.ROWS // 4, seeded(2))[:1]
    objectives.backward(TABLEAU["elbo-total"], joint, encoder(x), x, first)
    for wrt, size in {"encoder": 14, "joint": 18, "weights": 20}.items():
        found = gradients.draws("elbo-total", joint, encoder, x, draws=2, wrt=wrt, generator=seeded(2))
        assert found.shape == (2, size)
        torch.testing.assert_close(found[0, :12], -w.grad.flatten(), rtol=1e-12, atol=1e-12)
    tied = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).double()
    tied[1].weight = tied[0].weight  # twice in one network
    encoder = lambda x: DiagonalGaussian(x[:, :2], torch.zeros_like(x[:, :2]))  # noqa: E731
    joint = models.Joint(models.GaussianDecoder(tied, torch.tensor(0.0, dtype=DTYPE)))
    found = gradients.draws("elbo-total", joint, encoder, x[:, :2], draws=2, wrt="joint", generator=seeded(2))
    objectives.backward(TABLEAU["elbo-total"], joint, encoder(x), x[:, :2], first)
    assert found.shape == (2, 1 + 4 + 2 + 2)
    truth = torch.cat([p.grad.flatten() for p in joint.parameters()])
    torch.testing.assert_close(found[0], -truth, rtol=1e-12, atol=1e-12)


def test_a_joint_that_is_a_closure_gets_no_gradient():
    model, encoder = OneLayerJoint(), OneLayerEncoder()
    for wrt in ("posterior", "encoder"):
        truth = gradients.draws("elbo-path", model, encoder, X, draws=3, wrt=wrt, generator=seeded())
        found = gradients.draws("elbo-path", lambda x, z: model(x, z), encoder, X, draws=3, wrt=wrt, generator=seeded())
        assert torch.equal(truth, found) and not found.requires_grad
    assert model.theta.grad is None
    with pytest.raises(InputError, match="the joint has no parameters"):
        gradients.draws("elbo-path", lambda x, z: model(x, z), encoder, X, draws=3, wrt="joint")


def test_a_fixed_posterior_stands_in_for_an_encoder():
    """One of ours, with modules in it, or of torch; the gradient may be taken in its numbers, or in the model's."""
    joint, x = TwoLayerJoint(), TWO_LAYERS[3]
    encoder = TwoLayerEncoder()
    q = encoder(x)
    for wrt in ("posterior", "joint"):
        truth = gradients.draws("elbo-path", joint, encoder, x, draws=3, wrt=wrt, generator=seeded())
        found = gradients.draws("elbo-path", joint, q, x, draws=3, wrt=wrt, generator=seeded())
        assert torch.equal(truth, found)
    assert all(p.grad is None for part in (joint, encoder) for p in part.parameters())
    for wrt in ("encoder", "weights"):
        with pytest.raises(InputError, match="the encoder has no parameters"):
            gradients.draws("elbo-path", joint, q, x, draws=3, wrt=wrt)
    normal = torch.distributions.Normal(torch.ones(1, 1, dtype=DTYPE), torch.ones(1, 1, dtype=DTYPE))
    ours = DiagonalGaussian(normal.loc, normal.scale.log())
    truth, found = (
        gradients.draws("elbo-path", OneLayerJoint(), one, X, draws=3, generator=seeded()) for one in (ours, normal)
    )
    assert torch.equal(truth, found)
    above = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1)).double()
    layer = models.GaussianMLP((1,), 1).double()

    class Above(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.above, self.layer = above, layer

        def forward(self, z):
            return self.layer(self.above(z.flatten(0, 1)).unflatten(0, z.shape[:2]))

    fixed = models.HierarchicalEncoder(models.GaussianMLP((1,), 1).double(), Above())(x)
    gradients.draws("elbo-path", joint, fixed, x, draws=3, generator=seeded())
    assert above.training and above[0].running_mean == 0


def test_weights_that_a_hook_computes_can_be_measured():
    """Weight norm in torch's first edition puts a tensor that has been computed where the parameter was."""
    joint, encoder, x = batch_model("mlp-1", hidden=4)
    torch.nn.utils.weight_norm(encoder.mean)
    for wrt in ("posterior", "encoder"):
        eps = encoder(x).noise(gradients.ROWS // 3, seeded())[:1]
        found = gradients.draws("elbo-path", joint, encoder, x, draws=2, wrt=wrt, generator=seeded())
        if wrt == "encoder":
            truth = naive("elbo-path", joint, lambda: encoder(x), x, [eps], list(encoder.parameters()))
            torch.testing.assert_close(found[:1], truth, rtol=1e-12, atol=1e-12)
    assert encoder.mean.weight.requires_grad and not gradients.own(encoder, {}).mean.weight.requires_grad  # no way back


def test_two_layers_and_the_trap_of_detached_outputs():
    """At the exact posterior: none for path, 3/2 for total, 1/2 for the outputs detached, in the first mean."""
    joint, x = TwoLayerJoint(), TWO_LAYERS[3]
    right, wrong = TwoLayerEncoder.exact(), DetachedTwoLayerEncoder.exact()
    noise = {"draws": 100_000, "generator": seeded()}
    measured = gradients.measure(["elbo-path", "elbo-total"], joint, right, x, **noise)
    assert measured["elbo-path"].variance[0] < 1e-28
    total = measured["elbo-total"]
    assert abs(total.variance[0] - 1.5) < 4 * total.variance_error[0]
    detached = gradients.measure(["elbo-path"], joint, wrong, x, **noise)["elbo-path"]
    assert abs(detached.variance[0] - 0.5) < 4 * detached.variance_error[0]


def test_intervals_are_as_wide_as_their_errors():
    moments = Moments().add(torch.randn(400, 3, generator=seeded(), dtype=DTYPE))
    for level, sigmas in ((0.95, 1.959964), (0.9, 1.644854)):
        least, most = moments.variance_interval(level)
        assert (least + most) / 2 == pytest.approx(moments.total_variance)
        assert most - least == pytest.approx(2 * sigmas * moments.total_variance_error, rel=1e-6)
    assert moments.variance_interval() == moments.variance_interval(0.95)  # if nothing is said
    few = Moments().add(torch.tensor([[0.0]] * 99 + [[1.0]]))
    assert few.variance_interval(0.9999)[0] == 0  # a variance is not negative


def test_the_time_is_the_median_without_the_first_round(monkeypatch):
    """By a clock on which the rounds take 100, 3, 1 and 2 seconds."""
    ticks = iter([0, 100, 100, 103, 200, 201, 300, 302])
    monkeypatch.setattr(gradients.time, "perf_counter", lambda: next(ticks))
    found = gradients.measure(["elbo-path"], OneLayerJoint(), OneLayerEncoder(), X, draws=2, repeats=3)["elbo-path"]
    assert found.seconds == 2


def test_time_is_taken_when_asked_for():
    measured = gradients.measure(["elbo-path"], OneLayerJoint(), OneLayerEncoder(), X, draws=10, repeats=2)["elbo-path"]
    assert measured.seconds > 0
    assert measured.variance_time == measured.total_variance * measured.seconds


# --- the scaled score -------------------------------------------------------------------------------------------------


def test_the_scaled_row_runs_from_path_to_total():
    joint, encoder, x = batch_model()
    path, half, total = (
        gradients.draws(row, joint, encoder, x, draws=20, k=2, generator=seeded())
        for row in ("elbo-path", elbo_scaled(0.5), "elbo-total")
    )
    torch.testing.assert_close(half, (path + total) / 2, rtol=1e-12, atol=1e-12)
    for scale, end in ((0.0, path), (1.0, total)):
        row = gradients.draws(elbo_scaled(scale), joint, encoder, x, draws=20, k=2, generator=seeded())
        torch.testing.assert_close(row, end, rtol=1e-12, atol=1e-12)


def test_the_scaled_row_is_unbiased_for_every_scale():
    for scale in (-1.0, 0.3, 2.0):
        found = gradients.bias_test(
            elbo_scaled(scale),
            "elbo-total",
            OneLayerJoint(),
            OneLayerEncoder(),
            X,
            draws=20_000,
            generator=seeded(),
        )
        assert not found.biased


# --- the bias test ----------------------------------------------------------------------------------------------------


def test_the_bias_test_raises_false_alarms_no_more_often_than_it_says():
    """500 seeds at a rate of 5%: at most 25 + 4 sqrt(25 * 0.95) = 44 alarms; and not none, or it could not fail."""
    joint, encoder = OneLayerJoint(), OneLayerEncoder()
    alarms = sum(
        gradients.bias_test(
            "iwae-total",
            "iwae-dreg",
            joint,
            encoder,
            X,
            draws=1000,
            k=2,
            error_rate=0.05,
            generator=seeded(seed),
        ).biased
        for seed in range(500)
    )
    assert 6 <= alarms <= 44, alarms


def test_the_bias_test_finds_iwae_path():
    joint, encoder = OneLayerJoint(), OneLayerEncoder()
    for k, biased in ((1, False), (5, True)):
        for wrt in ("posterior", "encoder"):
            found = gradients.bias_test(
                "iwae-path", "iwae-dreg", joint, encoder, X, draws=2000, k=k, wrt=wrt, generator=seeded()
            )
            assert found.biased is biased, (k, wrt, found.t)


def test_the_bias_test_finds_a_slip_of_sign_and_a_small_bias():
    def slip(log_w):
        w = log_w.softmax(0)
        return Weights(w, w, w)

    models_and_data, wrong = (
        (OneLayerJoint(), OneLayerEncoder(), X),
        Row("wrong", "iwae", "iwae", 1, "", slip),
    )
    assert gradients.bias_test(wrong, "iwae-dreg", *models_and_data, draws=2000, k=2, generator=seeded()).biased
    assert not gradients.bias_test(
        elbo_scaled(-1), "elbo-path", *models_and_data, draws=2000, generator=seeded()
    ).biased

    def two_percent_more(log_w):
        u = torch.full_like(log_w, 1.02 / log_w.shape[0])
        return Weights(u, u, None)

    more = Row("more", "elbo", "elbo", 1, "", two_percent_more)  # found, since the two share their noise
    assert gradients.bias_test(more, "elbo-path", *models_and_data, draws=2000, generator=seeded()).biased


def test_the_weights_of_a_row_of_one_s_own_are_the_weights_of_its_gradient():
    """Also where they are not the derivative of the bound that it reports."""

    def more(name):
        rule = TABLEAU[name].rule
        return Row(
            "more", TABLEAU[name].bound, None, 1, "", lambda w: Weights(*(v if v is None else 3 * v for v in rule(w)))
        )

    for name in ("elbo-path", "elbo-total", "elbo-score", "iwae-dreg", "iwae-total", "rws"):
        plain, row = (
            gradients.draws(one, OneLayerJoint(), OneLayerEncoder(), X, draws=5, k=3, wrt="weights", generator=seeded())
            for one in (name, more(name))
        )
        torch.testing.assert_close(row, 3 * plain, rtol=1e-12, atol=1e-12)


def test_rounding_is_no_bias():
    """Two ways to compute one number differ by rounding, always the same way."""
    joint, encoder, x = batch_model()
    same = elbo_scaled(0.0)
    for dtype in (torch.float32, torch.float64):
        found = gradients.bias_test(same, "iwae-total", joint.to(dtype), encoder.to(dtype), x.to(dtype), draws=50, k=1)
        assert found.standard_error.min() > 0
    shifted = Row(
        "shifted",
        "elbo",
        "elbo",
        1,
        "",
        lambda w: Weights(torch.ones_like(w), torch.ones_like(w) * (1 + 1e-15), None),
    )
    assert not gradients.bias_test(shifted, "elbo-path", joint, encoder, x, draws=50).biased


def test_draws_that_cancel_are_rounded_by_their_size_and_not_by_their_mean():
    """For log p(x, z) = 10^6 z^4 about 0 the slopes of the mean are millions, either way."""
    q, x = DiagonalGaussian(torch.zeros(1, 1, dtype=DTYPE), torch.zeros(1, 1, dtype=DTYPE)), X[:1]
    problem = (lambda x, z: 1e6 * z.pow(4).sum(-1)), q, x
    g = gradients.draws("elbo-path", *problem, draws=500, generator=seeded())
    assert g.mean(0)[0].abs() < 0.2 * g.abs().mean(0)[0]
    found = gradients.bias_test("elbo-path", "elbo-path", *problem, draws=500, generator=seeded())
    torch.testing.assert_close(found.standard_error, 100 * torch.finfo(DTYPE).eps * g.abs().mean(0), rtol=1e-9, atol=0)


def test_a_bias_of_some_roundings_is_found_in_single_precision_too():
    joint, encoder, x = (part.float() for part in batch_model())
    tilted = Row("tilted", "elbo", "elbo", 1, "", lambda w: Weights(torch.ones_like(w), torch.full_like(w, 1.01), None))
    assert gradients.bias_test(tilted, "elbo-path", joint, encoder, x, draws=2000, generator=seeded()).biased


def test_no_variance_is_below_zero():
    rare = Moments().add(torch.tensor([[0.0], [0.0], [0.0], [8.0]], dtype=DTYPE))
    low, high = rare.variance_interval(0.999)
    assert low == 0.0 and rare.total_variance == 16 and high > 32


# --- bad use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrt": "weight"}, r"no set of parameters \(wrt\) is called 'weight', did you mean 'weights'"),
        ({"estimators": ["elbo-pat"]}, "did you mean 'elbo-path'"),
        ({"estimators": "elbo-path"}, r"must be a list, such as \['elbo-path'\], but is one alone"),
        ({"estimators": TABLEAU["elbo-path"]}, r"must be a list, such as \['elbo-path'\], but is one alone"),
        ({"estimators": []}, "there are no estimators to measure"),
        (
            {"estimators": ["elbo-path", elbo_scaled(0.5), elbo_scaled(0.5)]},
            r"two estimators share a name \(elbo-path, ",
        ),
        ({"estimators": ["iwae-vimco"]}, "needs k >= 2 draws, but k is 1"),
        ({"estimators": ["elbo-score-loo"], "wrt": "encoder"}, "needs k >= 2 draws, but k is 1"),
        ({"draws": 1}, "draws must be a whole number of at least 2, but is 1"),
        ({"draws": 0}, "draws must be a whole number of at least 2, but is 0"),
        ({"k": 0}, "k must be a whole number of at least 1, but is 0"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1, but is 0"),
        ({"repeats": -1}, "repeats must be a whole number of at least 0, but is -1"),
    ],
)
def test_bad_use_is_refused_in_a_sentence(changes, message):
    options = {"estimators": ["elbo-path"], "draws": 4, **changes}
    estimators = options.pop("estimators")
    with pytest.raises(InputError, match=message):
        gradients.measure(estimators, OneLayerJoint(), OneLayerEncoder(), X, **options)


def test_a_model_without_weights_and_an_error_rate_that_is_none():
    class Target(torch.nn.Module):
        def forward(self, x, z):
            return -0.5 * z.square().sum(-1) + 0 * x.sum(-1)

    for wrt in ("joint", "weights"):
        with pytest.raises(InputError, match="the joint has no parameters"):
            gradients.draws("elbo-path", Target(), OneLayerEncoder(), X, draws=2, wrt=wrt)
    with pytest.raises(InputError, match="error_rate"):
        gradients.bias_test("elbo-path", "elbo-total", Target(), OneLayerEncoder(), X, draws=10, error_rate=5)
    with pytest.raises(InputError, match="nothing to train, whose time"):
        gradients.measure(["elbo-path"], Target(), OneLayerEncoder()(X), X, draws=2, repeats=1)


def test_nothing_is_concluded_from_nothing():
    """No observations, one draw, gradients that are not finite, a posterior without a number."""

    class Broken(OneLayerJoint):
        def forward(self, x, z):
            return super().forward(x, z) + torch.where(x > 1, math.nan, 0.0).sum(-1)

    laboratory = (OneLayerJoint(), OneLayerEncoder(), X)
    for draws in (1, 0):
        with pytest.raises(InputError, match=f"draws must be a whole number of at least 2, but is {draws}"):
            gradients.bias_test("elbo-path", "elbo-total", *laboratory, draws=draws)
    with pytest.raises(InputError, match="no observations in x"):
        gradients.measure(["elbo-path"], *laboratory[:2], X[:0], draws=2)
    with pytest.raises(InputError, match="draws must be a whole number of at least 1, but is 0"):
        gradients.draws("elbo-path", *laboratory, draws=0)
    x = torch.tensor([[0.0], [2.0]], dtype=DTYPE)
    broken = LossEstimator("broken", "elbo", None, 1, "", lambda joint, q, x, eps: (q.mean * x / 0).sum(-1))
    with pytest.raises(InputError, match=r"the gradient of 'elbo-score' is not finite in 2 of 4 coordinates"):
        gradients.measure(["elbo-path", "elbo-score"], Broken(), OneLayerEncoder(), x, draws=3)
    with pytest.raises(InputError, match="2 of 4 coordinates have no finite t statistic"):
        gradients.bias_test("elbo-score", "elbo-path", Broken(), OneLayerEncoder(), x, draws=3)
    for pair in ((broken, "elbo-path"), ("elbo-path", broken)):
        with pytest.raises(InputError, match="have no finite t statistic"):
            gradients.bias_test(*pair, *laboratory, draws=3)
    empty = DiagonalGaussian(torch.empty(1, 0, dtype=DTYPE), torch.empty(1, 0, dtype=DTYPE))
    with pytest.raises(InputError, match="DiagonalGaussian has no numbers that a gradient could be taken in"):
        gradients.draws("elbo-path", laboratory[0], empty, X, draws=2)


@pytest.mark.parametrize("difference", [torch.empty(0), torch.tensor([0.0, math.nan]), torch.tensor([math.inf])])
def test_a_verdict_is_of_finite_numbers(difference):
    with pytest.raises(InputError, match="a bias test needs finite gradients"):
        gradients.BiasTest(difference, torch.ones_like(difference), 100, 0.01)


def test_shapes_that_would_broadcast_are_refused():
    moments = Moments().add(torch.ones(4, 3))
    for wrong in (torch.ones(4, 1), torch.ones(3), torch.ones(0, 3), torch.ones(4, 3, 1), torch.tensor(1.0)):
        with pytest.raises(InputError, match=r"draws must be of the shape \[S, 3\], .* not"):
            moments.add(wrong)
    with pytest.raises(InputError, match=r"draws must be of the shape \[S, P\], .* not \[3\]"):
        Moments().add(torch.ones(3))

    def unsummed(x, z):
        return -0.5 * z.square() + 0 * x

    def one_for_all(x, z):
        return unsummed(x, z).sum((-1, -2)).unsqueeze(-1)

    x = torch.ones(2, 1, dtype=DTYPE)
    for joint in (unsummed, one_for_all):
        for measure in (gradients.draws, lambda one, *args, **kwargs: gradients.measure([one], *args, **kwargs)):
            with pytest.raises(InputError, match=r"of the shape \[K, B\] = \[1, 2\]"):
                measure("elbo-path", joint, OneLayerEncoder(), x, draws=2)
    with pytest.raises(InputError, match="x has 2 observations, but q .* is of 1"):  # one q for two observations
        gradients.draws("elbo-path", OneLayerJoint(), OneLayerEncoder()(x[:1]), x, draws=2)


def test_a_false_alarm_in_a_hundred_is_what_is_risked_if_nothing_is_said():
    found = gradients.bias_test("elbo-path", "elbo-total", OneLayerJoint(), OneLayerEncoder(), X, draws=10)
    assert found.error_rate == 0.01


def test_bonferroni_shares_the_error_rate_among_the_coordinates():
    """The probability of a false alarm in P independent coordinates is the rate that was asked for, not P times it."""
    for coordinates in (1, 10, 1000):
        test = gradients.BiasTest(torch.zeros(coordinates), torch.ones(coordinates), 10**6, 0.05)
        beyond = math.erfc(test.threshold / math.sqrt(2))
        assert beyond == pytest.approx(0.05 / coordinates, rel=1e-9)
    near = torch.zeros(1000)
    near[7] = 3.0  # beyond 1.96, within 4.06
    assert not gradients.BiasTest(near, torch.ones(1000), 10**6, 0.05).biased
    assert gradients.BiasTest(-1.5 * near, torch.ones(1000), 10**6, 0.05).biased


@pytest.mark.parametrize("wrt", gradients.WRT)
def test_one_of_everything(wrt):
    """K = B = D = X = 1, two draws."""
    model = models.build("mlp-1", 1, generator=seeded(), hidden=1, latent=1)
    x = torch.ones(1, 1)
    measured = gradients.measure(["elbo-path", "iwae-dreg"], model.joint, model.encoder, x, draws=2, wrt=wrt)
    assert all(moments.mean.isfinite().all() and moments.count == 2 for moments in measured.values())
    assert gradients.bias_test("elbo-path", "elbo-total", model.joint, model.encoder, x, draws=2, wrt=wrt).draws == 2


def test_sentences_have_a_laboratory_too():
    """Observations need not be floating-point numbers; the precision is that of the gradients."""
    from vaelib.models.text import lstm_vae

    model = lstm_vae(7, seeded(), latent=2, embedding=3, hidden=4)  # with dropout
    x = torch.tensor([[1, 3, 4, 2], [1, 5, 2, 0]])
    for wrt in gradients.WRT:
        assert not gradients.bias_test(
            "elbo-path", "elbo-total", model.joint, model.encoder, x, draws=20, wrt=wrt, generator=seeded()
        ).biased
