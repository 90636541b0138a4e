"""Every row of the tableau against the truth, on models where the truth is known; all in float64.

The truth comes in three independent ways: autograd of the bound integrated by Gauss-Hermite quadrature, the identity
of the two engines, and a Monte Carlo mean of per-draw gradients (4 standard errors in each of at most 7 coordinates:
a false alarm once in 2,000 draws of a seed, and the seed is fixed).
"""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from toys import (
    DTYPE,
    ONE_LAYER,
    TWO_LAYERS,
    ChainEncoder,
    ChainJoint,
    DetachedChainEncoder,
    OneLayerEncoder,
    OneLayerJoint,
    draw_noise,
    exact_gradient,
    expected_gradient,
    gradient_draws,
    quadrature,
)

import vaelib
from vaelib import checks, data, models, objectives, training
from vaelib.bounds import BOUNDS
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, TABLEAU, Row, Weights
from vaelib.posteriors import DiagonalGaussian

UNBIASED = [e for e in TABLEAU.values() if e.target in BOUNDS]
LAYERS = pytest.mark.parametrize("toy", [ONE_LAYER, TWO_LAYERS], ids=["one-layer", "two-layers"])


DEPTHS = pytest.mark.parametrize("depth", [1, 2, 4])


def rows(estimators=TABLEAU.values()):
    return pytest.mark.parametrize("estimator", estimators, ids=lambda e: e.name)


def gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


@rows()
@LAYERS
def test_the_engine_is_the_reference(estimator, toy):
    make_joint, make_encoder, layers, x = toy
    joint, encoder, x = make_joint(), make_encoder(), x.expand(6, -1) + torch.arange(6.0, dtype=DTYPE)[:, None] / 7
    eps = draw_noise(layers, (3, 6), torch.Generator().manual_seed(0))
    value = objectives.backward(estimator, joint, encoder(x), x, eps)
    fast = gradients(joint, encoder)
    joint.zero_grad(), encoder.zero_grad()
    loss = objectives.reference(estimator, joint, encoder(x), x, eps)
    loss.mean().backward()
    torch.testing.assert_close(value, -loss.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fast, gradients(joint, encoder), rtol=1e-12, atol=1e-13)


@rows()
@pytest.mark.parametrize("name", ["linear", "mlp-1", "mlp-2", "mlp-4", "mlp-1-flow"])
def test_the_engine_is_the_reference_on_the_models_of_the_book(estimator, name):
    generator = torch.Generator().manual_seed(1)
    model = models.build(name, 12, generator=generator, latent=3).double()
    x = torch.bernoulli(torch.full((4, 12), 0.4, dtype=DTYPE), generator=generator)
    eps = model.encoder(x).noise(5, generator)
    objectives.backward(estimator, model.joint, model.encoder(x), x, eps)
    fast = gradients(model)
    model.zero_grad()
    objectives.reference(estimator, model.joint, model.encoder(x), x, eps).mean().backward()
    torch.testing.assert_close(fast, gradients(model), rtol=1e-11, atol=1e-11)


@rows()
def test_the_value_is_the_bound(estimator):
    """...and not, as in three of the peers, the weighted sum of log-weights, which flatters by up to log K."""
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    eps = draw_noise(1, (8, 1), torch.Generator().manual_seed(0))
    q = encoder(x)
    log_w = joint(x, q.sample(eps)) - q.log_prob(q.sample(eps))
    value = objectives.backward(estimator, joint, encoder(x), x, eps)
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


@rows([TABLEAU["iwae-path"]])
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
        expected_gradient(TABLEAU[name], joint, encoder, x, eps, weight)
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
    checks.biased(gradient_draws(TABLEAU["iwae-path"], joint, encoder, x, noise), exact)

    def sign_slip(log_w):
        w = log_w.softmax(0)
        return Weights(w, w, w)

    wrong = Row("wrong", "iwae", "iwae", 1, "", sign_slip)
    with pytest.raises(AssertionError, match="standard errors"):
        checks.unbiased(gradient_draws(wrong, joint, encoder, x, noise), exact)


def test_path_has_no_variance_at_the_exact_posterior():
    joint, x = OneLayerJoint(1.0), ONE_LAYER[3]
    encoder = OneLayerEncoder(0.5, 0.0, -0.5 * torch.tensor(2.0, dtype=DTYPE).log().item())
    noise = draw_noise(1, (500, 1, 1), torch.Generator().manual_seed(0))
    path = gradient_draws(TABLEAU["elbo-path"], joint, encoder, x, noise)[:, 1:]  # theta's gradient does vary
    assert path.abs().max() < 1e-13
    total = gradient_draws(TABLEAU["elbo-total"], joint, encoder, x, noise)[:, 1:]
    assert total.var(0).min() > 0.1


# --- stochastic layers, one, two and four -----------------------------------------------------------------------------


CHAIN_X = torch.ones(1, 1, dtype=DTYPE)


def chain_noise(depth, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, 1, generator=g, dtype=DTYPE) for _ in range(depth))


@rows()
@DEPTHS
def test_the_engine_is_the_reference_at_every_depth(estimator, depth):
    joint, encoder = ChainJoint(1.2), ChainEncoder.of_depth(depth)
    x, eps = torch.linspace(-1, 1, 6, dtype=DTYPE).unsqueeze(1), chain_noise(depth, 3, 6)
    value = objectives.backward(estimator, joint, encoder(x), x, eps)
    fast = gradients(joint, encoder)
    joint.zero_grad(), encoder.zero_grad()
    loss = objectives.reference(estimator, joint, encoder(x), x, eps)
    loss.mean().backward()
    torch.testing.assert_close(value, -loss.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fast, gradients(joint, encoder), rtol=1e-12, atol=1e-13)


@DEPTHS
def test_path_has_no_variance_at_the_exact_posterior_of_every_depth(depth):
    joint, encoder, noise = ChainJoint(), ChainEncoder.exact(depth), chain_noise(depth, 500, 1, 1)
    path = gradient_draws(TABLEAU["elbo-path"], joint, encoder, CHAIN_X, noise)[:, 1:]
    assert path.shape[1] == 2 + 3 * (depth - 1) and path.abs().max() < 1e-13
    total = gradient_draws(TABLEAU["elbo-total"], joint, encoder, CHAIN_X, noise)[:, 1:]
    assert total.var(0).min() > 0.1
    iwae = gradient_draws(TABLEAU["iwae-dreg"], joint, encoder, CHAIN_X, chain_noise(depth, 100, 5, 1))[:, 1:]
    assert iwae.abs().max() < 1e-13


@DEPTHS
def test_dreg_is_unbiased_at_every_depth(depth):
    """Paired with iwae-total, on the same noise, in theta and in the parameters of every layer."""
    joint, encoder, noise = ChainJoint(1.2), ChainEncoder.of_depth(depth), chain_noise(depth, 20_000, 5, 1)
    dreg, total, biased = (
        gradient_draws(TABLEAU[name], joint, encoder, CHAIN_X, noise)
        for name in ("iwae-dreg", "iwae-total", "iwae-path")
    )
    checks.unbiased(dreg - total, torch.zeros(dreg.shape[1]))
    checks.biased(biased - total, torch.zeros(dreg.shape[1]))  # the negative control
    assert dreg[:, 1:].var(0).sum() < 0.7 * total[:, 1:].var(0).sum()


@pytest.mark.parametrize("depth", [2, 4])
def test_detached_outputs_lose_the_zero_variance(depth):
    """In every layer but the last, whose parameters nothing above depends on."""
    joint, noise = ChainJoint(), chain_noise(depth, 2000, 1, 1)
    encoder = DetachedChainEncoder.exact(depth)
    detached = gradient_draws(TABLEAU["elbo-path"], joint, encoder, CHAIN_X, noise)[:, 1:]
    below = detached[:, :-3]
    assert below.var(0).min() > 1e-3 and detached[:, -3:].abs().max() < 1e-13
    with pytest.raises(AssertionError):
        checks.no_variance(below)
    checks.unbiased(detached[:, 0], 0.0)  # unbiased still, for one draw and the ELBO


@pytest.mark.parametrize("depth", [2, 4])
def test_detached_outputs_make_dreg_biased(depth):
    joint, noise = ChainJoint(), chain_noise(depth, 40_000, 5, 1)
    right, wrong = (
        gradient_draws(TABLEAU["iwae-dreg"], joint, encoder.of_depth(depth), CHAIN_X, noise)[:, 1]
        for encoder in (ChainEncoder, DetachedChainEncoder)
    )
    truth = gradient_draws(TABLEAU["iwae-total"], joint, ChainEncoder.of_depth(depth), CHAIN_X, noise)[:, 1]
    checks.unbiased(right - truth, 0.0)  # paired: the same noise
    checks.biased(wrong - truth, 0.0)
    if depth == 2:  # the numbers of the two-layer chain
        assert abs(right.mean() - 0.244) < 0.004 and abs(wrong.mean() - 0.046) < 0.004


# --- what is refused, and what is not ---------------------------------------------------------------------------------


def test_a_wrong_shape_is_named():
    class Forgetful(torch.nn.Module):
        def forward(self, x, z):
            return z  # [K, B, 1], not summed

    x, eps = torch.ones(3, 1, dtype=DTYPE), torch.zeros(2, 3, 1, dtype=DTYPE)
    with pytest.raises(InputError, match=r"\[K, B\] = \[2, 3\]"):
        objectives.backward(TABLEAU["elbo-path"], Forgetful(), OneLayerEncoder()(x), x, eps)


def test_leave_one_out_rows_refuse_one_draw():
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    for name in ["elbo-score-loo", "iwae-vimco"]:
        with pytest.raises(InputError, match="needs k >= 2"):
            objectives.backward(TABLEAU[name], joint, encoder(x), x, torch.zeros(1, 1, 1, dtype=DTYPE))


def test_weights_that_underflow_leave_no_nan():
    class Steep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, x, z):
            return (self.theta * 1e4 * z).squeeze(-1) - 0 * x.sum(-1)

    encoder = OneLayerEncoder().float()
    for estimator in TABLEAU.values():
        encoder.zero_grad()
        eps = torch.linspace(-1, 1, 6).reshape(6, 1, 1)
        objectives.backward(estimator, Steep(), encoder(torch.ones(1, 1)), torch.ones(1, 1), eps)
        assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_gradients_are_added_and_the_score_rows_need_no_path():
    """Two calls add up; a sample that cannot be differentiated is enough for a row without a path channel."""
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    eps = draw_noise(1, (4, 1), torch.Generator().manual_seed(0))
    objectives.backward(TABLEAU["elbo-path"], joint, encoder(x), x, eps)
    once = gradients(joint, encoder)
    objectives.backward(TABLEAU["elbo-path"], joint, encoder(x), x, eps)
    torch.testing.assert_close(gradients(joint, encoder), [2 * g for g in once])
    assert not TABLEAU["rws"].reparameterised and TABLEAU["iwae-dreg"].reparameterised


def test_a_target_without_parameters_can_be_fitted():
    """Plain variational inference: only q learns, whatever the row."""

    class Target(torch.nn.Module):
        def forward(self, x, z):
            return -0.5 * (z - 3).square().sum(-1) - 0 * x.sum(-1)

    for estimator in TABLEAU.values():
        encoder = OneLayerEncoder()
        eps = draw_noise(1, (4, 1), torch.Generator().manual_seed(0))
        objectives.backward(estimator, Target(), encoder(ONE_LAYER[3]), ONE_LAYER[3], eps)
        assert encoder.mean.grad.isfinite().all() and encoder.mean.grad.abs().max() > 0


# --- what is frozen ---------------------------------------------------------------------------------------------------


def learning(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(estimator, model, x, eps):
    """Return the gradients of the parameters that learn, in their order."""
    model.zero_grad()
    objectives.backward(estimator, model.joint, model.encoder(x), x, eps)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learning(model)]


SETTINGS = {
    "mlp-1": {"hidden": 8, "latent": 3},
    "mlp-2": {"hidden": 8, "latent": 3, "hidden2": 8, "latent2": 2},
    "mlp-4": {"hidden": 8, "latent": 4, "hidden2": 8},
    "mlp-1-flow": {"hidden": 8, "latent": 4, "layers": 2, "flow_hidden": 8},
    "mlp-1-mixture": {"hidden": 8, "latent": 3, "components": 2},
    "mlp-1-bernoulli": {"hidden": 8, "latent": 3},
    "linear": {"latent": 3},
    "linear-bernoulli": {"latent": 3},
    "linear-categorical": {"latent": 2, "classes": 3},
}


def setting(name, frozen=()):
    """Return a model in float64 with some of its parts frozen, six binary pixels of four images, and noise."""
    model = models.build(name, 6, generator=torch.Generator().manual_seed(0), **SETTINGS[name]).double()
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    x = torch.bernoulli(torch.full((4, 6), 0.5, dtype=DTYPE), generator=torch.Generator().manual_seed(1))
    return model, x, model.encoder(x).noise(6, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", SETTINGS)
@rows(ESTIMATORS.values())
def test_a_frozen_encoder_leaves_the_model_its_gradient(estimator, name):
    """theta's gradient does not need q to move, whatever the estimator; what refuses this posterior, refuses it."""
    free, x, eps = setting(name)
    frozen, _, _ = setting(name, ["encoder"])
    try:
        step(estimator, free, x, eps)
    except InputError:
        if getattr(estimator, "reparameterised", False) and not name.startswith(("mlp-1-mix", "mlp-1-b", "linear-")):
            raise
        return
    truth = [p.grad for p in free.joint.parameters()]
    torch.testing.assert_close(step(estimator, frozen, x, eps), truth)
    assert all(p.grad is None for p in frozen.encoder.parameters())


@pytest.mark.parametrize("name", SETTINGS)
@rows(ESTIMATORS.values())
def test_a_frozen_model_leaves_the_encoder_its_gradient(estimator, name):
    free, x, eps = setting(name)
    frozen, _, _ = setting(name, ["joint"])
    try:
        step(estimator, free, x, eps)
    except InputError:
        return
    torch.testing.assert_close(step(estimator, frozen, x, eps), [p.grad for p in free.encoder.parameters()])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mlp-2", "encoder.first"),
        ("mlp-2", "encoder.above.0"),
        ("mlp-4", "encoder.first"),
        ("mlp-4", "encoder.above.0"),
        ("mlp-4", "encoder.above.1"),
        ("mlp-4", "encoder.above.2"),
        ("mlp-4", "joint.priors.1"),
        ("mlp-1-flow", "encoder.base"),
        ("mlp-1-flow", "encoder.layers"),
        ("mlp-1-flow", "encoder.layers.1"),
        ("mlp-1", "encoder.log_std"),
        ("mlp-1-mixture", "encoder.logits"),
        ("mlp-1-mixture", "encoder.mean"),
        ("mlp-1-mixture", "encoder.hidden"),
    ],
)
@rows()
def test_any_part_may_be_frozen_and_the_others_get_what_they_would(estimator, name, part):
    free, x, eps = setting(name)
    frozen, _, _ = setting(name, [part])
    if name == "mlp-1-mixture" and not estimator.whole:
        return
    everything = step(estimator, free, x, eps)
    kept = [g for g, p in zip(everything, frozen.parameters(), strict=True) if p.requires_grad]
    torch.testing.assert_close(step(estimator, frozen, x, eps), kept)
    loss = objectives.reference(estimator, frozen.joint, frozen.encoder(x), x, eps).mean()
    found = torch.autograd.grad(loss, learning(frozen), allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, learning(frozen), strict=True)]
    torch.testing.assert_close(found, kept)


@rows()
def test_all_may_be_frozen_and_nothing_is_added(estimator):
    model, x, eps = setting("mlp-1", ["encoder", "joint"])
    bound = objectives.backward(estimator, model.joint, model.encoder(x), x, eps)
    assert bound.shape == (4,) and bound.isfinite().all() and all(p.grad is None for p in model.parameters())


def test_a_frozen_encoder_trains_its_model_by_default():
    digits = data.load("digits", "dynamic")
    model = models.build("mlp-1", 64, generator=torch.Generator().manual_seed(0), hidden=8, latent=3)
    model.encoder.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    training.fit(model, digits.train, epochs=1)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    number = len(list(model.joint.parameters()))
    assert sum(moved) == number and not any((a is not None) for a in (p.grad for p in model.encoder.parameters()))


# --- a loop of your own -----------------------------------------------------------------------------------------------


def plain_function(x, z):
    return -0.5 * (z - x).square().sum(-1)


class WithCall:
    def __call__(self, x, z):
        return plain_function(x, z)

    def bound(self, x, z):
        return plain_function(x, z)


@pytest.mark.parametrize(
    "log_joint",
    [plain_function, lambda x, z: plain_function(x, z), WithCall(), WithCall().bound],
    ids=["function", "lambda", "object", "method"],
)
@rows(ESTIMATORS.values())
def test_vaelib_loss_takes_any_callable(estimator, log_joint):
    """Every row with a torch.distribution as q; those for discrete latents and closed forms say what they want."""
    mean = torch.zeros(3, 2, dtype=DTYPE, requires_grad=True)
    q = torch.distributions.Independent(torch.distributions.Normal(mean, torch.ones_like(mean)), 1)
    x, eps = torch.ones(3, 2, dtype=DTYPE), torch.randn(4, 3, 2, dtype=DTYPE)
    if not isinstance(estimator, Row):
        with pytest.raises(InputError, match=r"FactorisedBernoulli|closed form"):
            vaelib.loss(estimator.name, log_joint, q, x, k=4)
        return
    loss = vaelib.loss(estimator.name, log_joint, q, x, eps=eps)
    z = mean + eps
    log_w = plain_function(x, z) - q.log_prob(z)
    torch.testing.assert_close(loss, -BOUNDS[estimator.bound](log_w))
    loss.sum().backward()
    assert mean.grad.abs().max() > 0


def test_vaelib_loss_draws_its_noise_and_says_what_is_wrong():
    q, x = DiagonalGaussian(torch.zeros(3, 2), torch.zeros(3, 2)), torch.ones(3, 2)
    first, again = (
        vaelib.loss("dreg", plain_function, q, x, k=5, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, again)
    eps = q.noise(5, torch.Generator().manual_seed(1))
    assert torch.equal(first, vaelib.loss(TABLEAU["iwae-dreg"], plain_function, q, x, eps=eps))
    with pytest.raises(InputError, match="did you mean 'iwae-dreg'"):
        vaelib.loss("iwae-dre", plain_function, q, x)
    with pytest.raises(InputError, match="x must be a tensor"):
        vaelib.loss("dreg", plain_function, q, [1.0])
    with pytest.raises(InputError, match=r"\[K, B\] = \[5, 3\].* but returned a float"):
        vaelib.loss("dreg", lambda x, z: 1.0, q, x, k=5)
    with pytest.raises(ZeroDivisionError):  # one's own error reaches one as it is
        vaelib.loss("dreg", lambda x, z: 1 / 0, q, x, k=5)


def of_a_line(name, slope, eps):
    """The loss of an encoder whose mean and log-scale are a line in x each, in the mean over observations."""
    x = torch.linspace(-1, 1, 4).unsqueeze(1)
    q = DiagonalGaussian(*(x * slope).chunk(2, -1))
    return vaelib.loss(name, plain_function, q, x.expand(-1, 2), eps=eps).mean()


@pytest.mark.parametrize("name", ["iwae-path", "iwae-dreg", "rws-dreg", "elbo-total"])
def test_the_gradient_is_the_same_in_a_graph_of_torch_compile(name):
    """A row that scales what arrives at its samples does so outside of it."""
    slope, eps = torch.tensor([0.3, -0.2, 0.1, 0.4], requires_grad=True), torch.randn(5, 4, 2)
    expected = torch.autograd.grad(of_a_line(name, slope, eps), slope)[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda slope, eps: of_a_line(name, slope, eps), backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(slope, eps), slope)[0], expected)


@pytest.mark.parametrize("name", ["iwae-path", "elbo-total", "iwae-dreg", "rws-dreg"])
def test_forward_mode_is_the_same_or_refused(name):
    slope, eps = torch.tensor([0.3, -0.2, 0.1, 0.4]), torch.randn(5, 4, 2)
    loss = partial(of_a_line, name, eps=eps)
    if not TABLEAU[name].scales:
        torch.testing.assert_close(torch.func.jacfwd(loss)(slope), torch.func.grad(loss)(slope))
        return
    refused = pytest.raises(InputError, match=r"has no way forward \(jvp, jacfwd\): use grad or jacrev")
    with refused:
        torch.func.jacfwd(loss)(slope)
    with refused, forward_ad.dual_level():
        loss(forward_ad.make_dual(slope.requires_grad_(), torch.ones(4)))
    torch.testing.assert_close(torch.func.jacrev(loss)(slope.detach()), torch.func.grad(loss)(slope.detach()))


def test_an_objective_is_a_module_of_both_networks():
    joint, encoder, x = OneLayerJoint(), OneLayerEncoder(), ONE_LAYER[3]
    eps = draw_noise(1, (4, 1), torch.Generator().manual_seed(0))
    objective = objectives.Objective(TABLEAU["elbo-path"], joint, encoder)
    other = {name: p + 1 for name, p in objective.named_parameters()}
    moved = torch.func.functional_call(objective, other, (x, eps))
    assert set(other) == {"joint.theta", "encoder.slope", "encoder.mean", "encoder.log_std"}
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(1)
    torch.testing.assert_close(objective(x, eps), moved)
