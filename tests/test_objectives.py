"""Every row of the tableau against the truth, on models where the truth is known; all in float64.

The truth comes in three independent ways: autograd of the bound integrated by Gauss-Hermite quadrature, the identity
of the two engines, and a Monte Carlo mean of per-draw gradients (4 standard errors in each of at most 7 coordinates:
a false alarm once in 2,000 draws of a seed, and the seed is fixed).
"""

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
    draw_noise,
    exact_gradient,
    expected_gradient,
    gradient_draws,
    quadrature,
)

from vaelib import checks, models, objectives
from vaelib.bounds import BOUNDS
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, Estimator, Weights
from vaelib.posteriors import DiagonalGaussian, stop_gradient

UNBIASED = [e for e in ESTIMATORS.values() if e.target in BOUNDS]
LAYERS = pytest.mark.parametrize("toy", [ONE_LAYER, TWO_LAYERS], ids=["one-layer", "two-layers"])


def rows(estimators=ESTIMATORS.values()):
    return pytest.mark.parametrize("estimator", estimators, ids=lambda e: e.name)


def gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


@rows()
@LAYERS
def test_the_engine_is_the_reference(estimator, toy):
    make_joint, make_encoder, layers, x = toy
    joint, encoder, x = make_joint(), make_encoder(), x.expand(6, -1) + torch.arange(6.0, dtype=DTYPE)[:, None] / 7
    eps = draw_noise(layers, (3, 6), torch.Generator().manual_seed(0))
    value = objectives.backward(estimator, joint, encoder, x, eps)
    fast = gradients(joint, encoder)
    joint.zero_grad(), encoder.zero_grad()
    loss = objectives.surrogate(estimator, joint, encoder, x, eps)
    loss.mean().backward()
    torch.testing.assert_close(value, -loss.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fast, gradients(joint, encoder), rtol=1e-12, atol=1e-13)


@rows()
@pytest.mark.parametrize("name", ["linear", "mlp-1", "mlp-2"])
def test_the_engine_is_the_reference_on_the_models_of_the_book(estimator, name):
    generator = torch.Generator().manual_seed(1)
    model = models.build(name, 12, generator=generator, latent=3).double()
    x = torch.bernoulli(torch.full((4, 12), 0.4, dtype=DTYPE), generator=generator)
    eps = model.encoder.noise(5, x, generator)
    objectives.backward(estimator, model.joint, model.encoder, x, eps)
    fast = gradients(model)
    model.zero_grad()
    objectives.surrogate(estimator, model.joint, model.encoder, x, eps).mean().backward()
    torch.testing.assert_close(fast, gradients(model), rtol=1e-11, atol=1e-11)


@rows()
def test_the_value_is_the_bound(estimator):
    """...and not, as in three of the peers, the weighted sum of log-weights, which flatters by up to log K."""
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    eps = draw_noise(1, (8, 1), torch.Generator().manual_seed(0))
    q = encoder(x)
    log_w = joint(x, q.sample(eps)) - q.log_prob(q.sample(eps))
    value = objectives.backward(estimator, joint, encoder, x, eps)
    torch.testing.assert_close(value, BOUNDS[estimator.bound](log_w).detach(), rtol=1e-13, atol=0)
    flattering = (log_w.softmax(0) * log_w).sum(0)
    assert estimator.bound != "iwae" or (flattering - value > 0.01).all()


@pytest.mark.parametrize(
    ("estimator", "k"),
    [(e, k) for e in UNBIASED for k in (1, 2) if k >= e.least_k],
    ids=lambda value: getattr(value, "name", value),
)
@LAYERS
def test_unbiased_rows_have_the_exact_expectation(estimator, k, toy):
    """Quadrature on both sides, so that no sampling error hides a bias."""
    make_joint, make_encoder, layers, x = toy
    joint, encoder = make_joint(), make_encoder()
    eps, weight = quadrature(layers, k, nodes=60 if layers * k <= 2 else 12)
    truth = exact_gradient(estimator.bound, joint, encoder, x, eps, weight)
    mine = expected_gradient(estimator, joint, encoder, x, eps, weight)
    torch.testing.assert_close(mine, truth, rtol=0, atol=1e-8 if layers * k <= 2 else 2e-4)


@rows([ESTIMATORS["iwae-path"]])
def test_iwae_path_is_biased_for_more_than_one_draw(estimator):
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    eps, weight = quadrature(1, 2, nodes=60)
    truth = exact_gradient("iwae", joint, encoder, x, eps, weight)
    mine = expected_gradient(estimator, joint, encoder, x, eps, weight)
    assert max((a - b).abs().max() for a, b in zip(mine, truth)) > 0.1
    eps, weight = quadrature(1, 1, nodes=60)
    truth = exact_gradient("iwae", joint, encoder, x, eps, weight)
    torch.testing.assert_close(expected_gradient(estimator, joint, encoder, x, eps, weight), truth, rtol=0, atol=1e-8)


def test_the_bias_of_iwae_path_is_the_wake_phase_update():
    """E[iwae-path] = E[iwae] + E[rws] in phi; the theta channels are the same."""
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    eps, weight = quadrature(1, 2, nodes=60)
    path, iwae, rws, rws_dreg = (
        expected_gradient(ESTIMATORS[name], joint, encoder, x, eps, weight)
        for name in ["iwae-path", "iwae-dreg", "rws", "rws-dreg"]
    )
    torch.testing.assert_close(rws, rws_dreg, rtol=0, atol=1e-8)
    torch.testing.assert_close(path[1:], [a + b for a, b in zip(iwae, rws)][1:], rtol=0, atol=1e-8)
    torch.testing.assert_close(path[0], iwae[0], rtol=0, atol=1e-12)


@rows(UNBIASED)
@LAYERS
def test_the_mean_over_many_draws_is_the_exact_gradient(estimator, toy):
    make_joint, make_encoder, layers, x = toy
    joint, encoder = make_joint(), make_encoder()
    eps, weight = quadrature(layers, 2, nodes=60 if layers == 1 else 12)
    exact = torch.cat(exact_gradient(estimator.bound, joint, encoder, x, eps, weight))
    noise = draw_noise(layers, (20_000, 2, 1), torch.Generator().manual_seed(3))
    checks.unbiased(gradient_draws(estimator, joint, encoder, x, noise), exact)


def test_the_mean_over_many_draws_finds_the_bias():
    """The negative control of the test above: the same number of draws, a biased row and a wrong one."""
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    eps, weight = quadrature(1, 2, nodes=60)
    exact = torch.cat(exact_gradient("iwae", joint, encoder, x, eps, weight))
    noise = draw_noise(1, (20_000, 2, 1), torch.Generator().manual_seed(3))
    checks.biased(gradient_draws(ESTIMATORS["iwae-path"], joint, encoder, x, noise), exact)

    def sign_slip(log_w):
        w = log_w.softmax(0)
        return Weights(w, w, w)

    wrong = Estimator("wrong", "iwae", "iwae", 1, "", sign_slip)
    with pytest.raises(AssertionError, match="standard errors"):
        checks.unbiased(gradient_draws(wrong, joint, encoder, x, noise), exact)


@pytest.mark.parametrize("toy", [ONE_LAYER, TWO_LAYERS], ids=["one-layer", "two-layers"])
def test_path_has_no_variance_at_the_exact_posterior(toy):
    make_joint, _, layers, x = toy
    joint = make_joint(1.0)
    encoder = (
        OneLayerEncoder(0.5, 0.0, -0.5 * torch.tensor(2.0).log().item()) if layers == 1 else TwoLayerEncoder.exact()
    )
    encoder = encoder.double()
    phi = slice(1, None)  # the first parameter is theta, whose gradient does vary
    noise = draw_noise(layers, (500, 1, 1), torch.Generator().manual_seed(0))
    path = gradient_draws(ESTIMATORS["elbo-path"], joint, encoder, x, noise)[:, phi]
    assert path.abs().max() < (1e-6 if layers == 1 else 1e-13)  # one layer's log_std is a float32 literal
    total = gradient_draws(ESTIMATORS["elbo-total"], joint, encoder, x, noise)[:, phi]
    assert total.var(0).min() > 0.1


def test_detached_outputs_lose_the_zero_variance_of_two_layers():
    joint, x = TwoLayerJoint(), TWO_LAYERS[3]
    noise = draw_noise(2, (2000, 1, 1), torch.Generator().manual_seed(0))
    encoder = DetachedTwoLayerEncoder.exact()
    detached = gradient_draws(ESTIMATORS["elbo-path"], joint, encoder, x, noise)[:, 1:3]  # of the first layer
    with pytest.raises(AssertionError):
        checks.no_variance(detached)
    checks.unbiased(detached, 0.0)  # unbiased still, for one draw and the ELBO


def test_detached_outputs_make_dreg_biased_in_two_layers():
    """The numbers of the two-layer chain: exact 0.244, detached 0.046 (K = 5, derivative in the first mean)."""
    joint, x, dreg = TwoLayerJoint(), TWO_LAYERS[3], ESTIMATORS["iwae-dreg"]
    noise = draw_noise(2, (40_000, 5, 1), torch.Generator().manual_seed(0))
    right = gradient_draws(dreg, joint, TwoLayerEncoder(), x, noise)[:, 1]
    wrong = gradient_draws(dreg, joint, DetachedTwoLayerEncoder(), x, noise)[:, 1]
    truth = gradient_draws(ESTIMATORS["iwae-total"], joint, TwoLayerEncoder(), x, noise)[:, 1]
    checks.unbiased(right - truth, 0.0)  # paired: the same noise
    checks.biased(wrong - truth, 0.0)
    assert abs(right.mean() - 0.244) < 0.004 and abs(wrong.mean() - 0.046) < 0.004


def test_a_wrong_shape_is_named():
    class Forgetful(torch.nn.Module):
        def forward(self, x, z):
            return z  # [K, B, 1], not summed

    x, eps = torch.ones(3, 1, dtype=DTYPE), torch.zeros(2, 3, 1, dtype=DTYPE)
    with pytest.raises(InputError, match=r"\[K, B\] = \[2, 3\]"):
        objectives.backward(ESTIMATORS["elbo-path"], Forgetful(), OneLayerEncoder(), x, eps)


def test_leave_one_out_rows_refuse_one_draw():
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    for name in ["elbo-score-loo", "iwae-vimco"]:
        with pytest.raises(InputError, match="needs k >= 2"):
            objectives.backward(ESTIMATORS[name], joint, encoder, x, torch.zeros(1, 1, 1, dtype=DTYPE))


def test_weights_that_underflow_leave_no_nan():
    class Steep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, x, z):
            return (self.theta * 1e4 * z).squeeze(-1) - 0 * x.sum(-1)

    encoder = OneLayerEncoder().float()
    for estimator in ESTIMATORS.values():
        encoder.zero_grad()
        eps = torch.linspace(-1, 1, 6).reshape(6, 1, 1)
        objectives.backward(estimator, Steep(), encoder, torch.ones(1, 1), eps)
        assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_gradients_are_added_and_the_score_rows_need_no_path():
    """Two calls add up; a sample that cannot be differentiated is enough for a row without a path channel."""
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    eps = draw_noise(1, (4, 1), torch.Generator().manual_seed(0))
    objectives.backward(ESTIMATORS["elbo-path"], joint, encoder, x, eps)
    once = gradients(joint, encoder)
    objectives.backward(ESTIMATORS["elbo-path"], joint, encoder, x, eps)
    torch.testing.assert_close(gradients(joint, encoder), [2 * g for g in once])
    assert not ESTIMATORS["rws"].reparameterised and ESTIMATORS["iwae-dreg"].reparameterised


def test_a_target_without_parameters_can_be_fitted():
    """Plain variational inference: only q learns, whatever the row."""

    class Target(torch.nn.Module):
        def forward(self, x, z):
            return -0.5 * (z - 3).square().sum(-1) - 0 * x.sum(-1)

    for estimator in ESTIMATORS.values():
        encoder = OneLayerEncoder()
        eps = draw_noise(1, (4, 1), torch.Generator().manual_seed(0))
        objectives.backward(estimator, Target(), encoder, ONE_LAYER[3], eps)
        assert encoder.mean.grad.isfinite().all() and encoder.mean.grad.abs().max() > 0


def test_stop_gradient_follows_the_values_and_stops_the_parameters():
    lstm = torch.nn.LSTM(3, 4, batch_first=True)
    for module, x in [
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)), torch.randn(5, 3)),
        (torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4)), torch.randn(5, 3)),
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), torch.randn(5, 3)),
        (lstm, torch.randn(5, 2, 3)),
    ]:
        x.requires_grad_()
        stopped = stop_gradient(module)
        first = (lambda out: out[0] if isinstance(out, tuple) else out)(stopped(x)).sum()
        (gradient,) = torch.autograd.grad(first, x, retain_graph=True)
        assert gradient.shape == x.shape
        assert all(g is None for g in torch.autograd.grad(first, list(module.parameters()), allow_unused=True))
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.5)
        outputs = [
            (lambda out: out[0] if isinstance(out, tuple) else out)(m(x)) for m in (stop_gradient(module), module)
        ]
        torch.testing.assert_close(*outputs)


def test_stop_gradient_leaves_running_statistics_alone_and_refuses_dropout():
    norm = torch.nn.BatchNorm1d(4)
    stop_gradient(norm)(torch.randn(6, 4))
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5))
    with pytest.raises(InputError, match="dropout"):
        stop_gradient(network)
    stop_gradient(network.eval())


def test_stop_gradient_of_a_shared_module_stays_shared():
    shared = torch.nn.Linear(3, 3)
    stopped = stop_gradient(torch.nn.Sequential(shared, torch.nn.Tanh(), shared))
    assert stopped[0] is stopped[2]


def test_the_stopped_gaussian_has_the_same_density():
    q = DiagonalGaussian(torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True))
    z = q.sample(q.noise(4)).detach().requires_grad_()
    torch.testing.assert_close(q.stop_gradient().log_prob(z), q.log_prob(z))
    q.stop_gradient().log_prob(z).sum().backward()
    assert q.mean.grad is None and z.grad is not None


@pytest.mark.parametrize("row", [row.name for row in ESTIMATORS.values() if row.reparameterised])
def test_one_of_two_layers_may_be_frozen(row):
    model = models.build(
        "mlp-2", 6, generator=torch.Generator().manual_seed(0), hidden=5, latent=3, hidden2=4, latent2=2
    )
    model.encoder.first.requires_grad_(False)
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)).round()
    eps = model.encoder.noise(3, x, torch.Generator().manual_seed(2))
    learns = [p for p in model.parameters() if p.requires_grad]
    objectives.backward(ESTIMATORS[row], model.joint, model.encoder, x, eps)
    loss = objectives.surrogate(ESTIMATORS[row], model.joint, model.encoder, x, eps).mean()
    torch.testing.assert_close([p.grad for p in learns], list(torch.autograd.grad(loss, learns)), rtol=1e-4, atol=1e-5)
