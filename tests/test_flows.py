"""Flows: layers against dense Jacobians, densities against quadrature, and path gradients three ways; in float64.

The truth about a force is the dense one: with :math:`z_L(z_0)` and :math:`\\log q` along the forward pass,
:math:`F = (\\partial z_L / \\partial z_0)^{-\\top} \\partial_{z_0} \\log q`. It inverts no layer and knows no
recursion.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap
from toys import DTYPE, draw_noise, exact_gradient, expected_gradient, gradient_draws, quadrature

from vaelib import checks, data, evaluation, models, objectives, training
from vaelib.bounds import BOUNDS
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU
from vaelib.flows import (
    AffineCoupling,
    Flow,
    FlowEncoder,
    Layer,
    OnePassFlow,
    Planar,
    SinhArcsinh,
    StandardNormal,
    push,
)
from vaelib.models import GaussianMLP
from vaelib.posteriors import DiagonalGaussian, standard_normal_log_prob

ROWS = pytest.mark.parametrize("estimator", TABLEAU.values(), ids=lambda e: e.name)
X = torch.zeros(1, 1, dtype=DTYPE)


def scrambled(layer, generator, spread=0.4):
    """Return the layer with random parameters, in float64: a new coupling layer only exchanges the halves."""
    with torch.no_grad():
        for p in layer.double().parameters():
            p.copy_(spread * torch.randn(p.shape, generator=generator, dtype=DTYPE))
    return layer


def coupling(dim, generator, context=0):
    return scrambled(AffineCoupling(dim, (8,), context), generator)


def sinh_arcsinh(dim, generator):
    return scrambled(SinhArcsinh(*(torch.zeros(dim) for _ in range(4))), generator)


def planar(dim, generator):
    return scrambled(Planar(torch.zeros(dim), torch.zeros(dim), torch.zeros(())), generator, spread=1.0)


LAYERS = {"coupling": coupling, "sinh-arcsinh": sinh_arcsinh, "planar": planar}
INVERTIBLE = ["coupling", "sinh-arcsinh"]
kinds = pytest.mark.parametrize("kind", LAYERS)


def encoder_of(kinds, dim=2, seed=0, one_pass=False, base=None, conditional=False):
    generator = torch.Generator().manual_seed(seed)
    layers = [coupling(dim, generator, 2 * dim) if conditional else LAYERS[kind](dim, generator) for kind in kinds]
    return FlowEncoder(base or StandardNormal(dim), layers, one_pass=one_pass, conditional=conditional).double()


def conditional_encoder(one_pass=False, dtype=DTYPE):
    base = scrambled(GaussianMLP((3, 5), 3), torch.Generator().manual_seed(8))
    return encoder_of(["coupling"] * 3, dim=3, base=base, conditional=True, one_pass=one_pass).to(dtype)


class Banana(nn.Module):
    """A crescent that no Gaussian fits, up to a constant; theta widens it."""

    def __init__(self, theta=0.5):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=DTYPE))

    def forward(self, x, z):
        return -0.5 * z[..., 0] ** 2 - 0.5 * ((z[..., 1] - self.theta * z[..., 0] ** 2 + 0.5) / 0.7) ** 2


class Skewed(nn.Module):
    """A smooth log-density of one or more dimensions that no flow here contains, with a parameter."""

    def __init__(self, theta=0.6):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=DTYPE))

    def forward(self, x, z):
        return standard_normal_log_prob(z - x) + torch.cos(self.theta * z).sum(-1) + nn.functional.logsigmoid(z).sum(-1)


class Contained(nn.Module):
    """The flow's own density as the target: what is fitted is exact."""

    def __init__(self, encoder):
        super().__init__()
        self.log_prob = encoder(X).stop_gradient().log_prob  # no parameters of the model's

    def forward(self, x, z):
        return self.log_prob(z)


def dense_force(flow, eps):
    """Return the force at the end of the flow for each draw of ``eps`` ``[K, B, D]`` by dense linear algebra."""
    z0 = flow.base.sample(eps).detach()

    def forward(z):
        log_q = flow.base.log_prob(z)
        for layer in flow.layers:
            z, log_det = layer(z, flow.context)
            log_q = log_q - log_det
        return z, log_q

    forces = torch.empty_like(z0)
    for k in range(z0.shape[0]):
        (jacobian, slope) = jacrev(forward)(z0[k : k + 1])  # observations do not mix: pick the diagonal blocks
        for b in range(z0.shape[1]):
            forces[k, b] = torch.linalg.solve(jacobian[0, b, :, 0, b].mT, slope[0, b, 0, b])
    return forces


def phi_gradient(module):
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in module.parameters()]
    )


# --- layers


@kinds
@pytest.mark.parametrize("dim", [2, 3, 5])
def test_the_log_determinant_is_the_jacobians(kind, dim):
    generator = torch.Generator().manual_seed(dim)
    layer = LAYERS[kind](dim, generator)
    z = torch.randn(7, dim, generator=generator, dtype=DTYPE)
    dense = vmap(jacrev(lambda one: layer(one)[0]))(z)
    torch.testing.assert_close(layer(z)[1], torch.linalg.slogdet(dense)[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", INVERTIBLE)
@pytest.mark.parametrize("dim", [2, 3, 5])
def test_the_inverse_undoes_the_layer(kind, dim):
    generator = torch.Generator().manual_seed(dim)
    layer = LAYERS[kind](dim, generator)
    z = 2 * torch.randn(50, 4, dim, generator=generator, dtype=DTYPE)
    moved, log_det = layer(z)
    back, again = layer.inverse(moved)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(again, log_det, rtol=0, atol=1e-10)
    assert (moved - z).abs().max() > 0.1


@kinds
def test_push_moves_as_the_layer_does_and_solves_the_transposed_system(kind):
    generator = torch.Generator().manual_seed(1)
    layer = LAYERS[kind](3, generator)
    z = torch.randn(6, 1, 3, generator=generator, dtype=DTYPE, requires_grad=True)
    force = torch.randn(6, 1, 3, generator=generator, dtype=DTYPE)
    moved, log_det, after = layer.push(z, force)
    torch.testing.assert_close((moved, log_det), layer(z), rtol=1e-13, atol=1e-13)
    flat = z.detach()[:, 0]
    dense = vmap(jacrev(lambda one: layer(one)[0]))(flat)
    slope = vmap(jacrev(lambda one: layer(one)[1]))(flat)
    expected = torch.linalg.solve(dense.mT, force[:, 0] - slope)
    torch.testing.assert_close(after[:, 0], expected, rtol=1e-11, atol=1e-12)
    assert not after.requires_grad
    with pytest.raises(AssertionError):  # the negative control: without the slope of the log-determinant
        torch.testing.assert_close(after[:, 0], torch.linalg.solve(dense.mT, force[:, 0]), rtol=1e-3, atol=1e-3)


def test_a_new_stack_of_couplings_is_the_gaussian_it_starts_from():
    encoder = FlowEncoder(StandardNormal(4), [AffineCoupling(4) for _ in range(4)]).double()
    q = encoder(X)
    eps = q.noise(9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.sample(eps), eps)
    torch.testing.assert_close(q.log_prob(eps), standard_normal_log_prob(eps))


def test_a_planar_layer_is_invertible_whatever_its_parameters():
    """w'u > -1 by construction, so that 1 + h w'u > 0 everywhere; raw parameters that break it are bent."""
    layer = Planar(*(torch.tensor(v, dtype=DTYPE) for v in ([-9.0, 1.0], [2.0, 0.5], 0.0)))
    assert layer.normal @ layer.direction < -1 < layer.normal @ layer.bent_direction()
    z = 3 * torch.randn(1000, 1, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    assert layer(z)[1].isfinite().all()


# --- densities


def integral(q, points=600, reach=14.0):
    """Integrate exp(log q) over a square (or an interval) by the midpoint rule."""
    dim = q.base.mean.shape[-1]
    axis = torch.linspace(-reach, reach, points, dtype=DTYPE)
    z = torch.cartesian_prod(*[axis] * dim).reshape(-1, 1, dim)
    return (q.log_prob(z).exp().sum() * (axis[1] - axis[0]) ** dim).item()


@pytest.mark.parametrize("dim", [1, 2])
def test_the_density_integrates_to_one(dim):
    encoder = encoder_of(["sinh-arcsinh"] if dim == 1 else ["coupling"] * 3, dim=dim, seed=4)
    assert abs(integral(encoder(X), points=20_000 if dim == 1 else 900, reach=40.0 if dim == 1 else 14.0) - 1) < 1e-4


def test_a_density_that_forgets_its_determinants_does_not():
    class Forgetful(Flow):
        def log_prob(self, z):
            for layer in reversed(self.layers):
                z, _ = layer.inverse(z, self.context)
            return self.base.log_prob(z)

    q = encoder_of(["coupling"] * 3, seed=4)(X)
    assert abs(integral(Forgetful(q.base, q.layers), points=900) - 1) > 0.05


def test_the_inverse_and_the_forward_pass_give_one_density():
    for encoder, x in [
        (encoder_of(["coupling", "sinh-arcsinh"] * 2), X),
        (conditional_encoder(), torch.randn(4, 3).double()),
    ]:
        q = encoder(x)
        eps = q.noise(5, torch.Generator().manual_seed(0))
        z, log_q = q.sample_and_log_prob(eps)
        assert z.shape == eps.shape and log_q.shape == eps.shape[:2]
        torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(q.stop_gradient().log_prob(z), log_q, rtol=1e-11, atol=1e-11)


def test_samples_and_density_of_the_one_dimensional_flow_have_the_same_mean():
    layer = SinhArcsinh(*(torch.tensor([v], dtype=DTYPE) for v in (0.3, -0.2, 0.4, 0.25)))
    q = Flow(StandardNormal(1)(X), nn.ModuleList([layer]))
    points, weights = np.polynomial.hermite_e.hermegauss(100)
    z = q.sample(torch.tensor(points).reshape(-1, 1, 1))
    mean = (torch.tensor(weights / weights.sum()) @ z.flatten()).item()
    axis = torch.linspace(-60, 60, 200_001, dtype=DTYPE)
    density = q.log_prob(axis.reshape(-1, 1, 1)).exp().flatten()
    assert abs(torch.trapezoid(density * axis, axis).item() - mean) < 1e-5


# --- forces, and path gradients


@pytest.mark.parametrize(
    "kinds", [["coupling"] * 4, ["sinh-arcsinh"] * 2, ["planar"] * 3, ["coupling", "planar", "sinh-arcsinh"]]
)
def test_the_force_is_the_dense_one(kinds):
    flow = encoder_of(kinds, seed=3)(X)
    eps = torch.randn(4, 1, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    torch.testing.assert_close(push(flow, eps).force, dense_force(flow, eps), rtol=1e-10, atol=1e-11)


def test_the_force_of_a_conditional_flow_is_the_dense_one():
    flow = conditional_encoder()(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double())
    eps = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    drawn = push(flow, eps)
    torch.testing.assert_close(drawn.force, dense_force(flow, eps), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close((drawn.z, drawn.log_q), flow.sample_and_log_prob(eps))


def run(function, estimator, joint, encoder, x, eps):
    encoder.zero_grad(), joint.zero_grad()
    value = function(estimator, joint, encoder(x), x, eps)
    if function is objectives.reference:
        value.mean().backward()
        value = -value.detach()
    return value, torch.cat([phi_gradient(joint), phi_gradient(encoder)])


@ROWS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_drop_in_and_one_pass_are_one_gradient_in_both_engines(estimator, dtype):
    """To 1e-12 in float64 and 1e-6 (a few of them, relative to the largest) in float32, for every row."""
    generator = torch.Generator().manual_seed(0)
    joint = Skewed().to(dtype)
    x = torch.randn(5, 3, generator=generator, dtype=dtype)
    eps = torch.randn(4, 5, 3, generator=generator, dtype=dtype)
    results = [
        run(function, estimator, joint, conditional_encoder(one_pass, dtype), x, eps)
        for one_pass in (False, True)
        for function in (objectives.backward, objectives.reference)
    ]
    value, gradient = results[0]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
    assert gradient.abs().max() > 0
    for other_value, other in results[1:]:
        torch.testing.assert_close(other_value, value, rtol=tolerance, atol=tolerance)
        assert (other - gradient).abs().max() <= tolerance * gradient.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", ["elbo-total", "elbo-path", "iwae-total", "iwae-dreg"])
def test_planar_layers_run_in_one_pass_and_have_the_exact_expectation(name):
    estimator = TABLEAU[name]
    joint, encoder = Banana(), encoder_of(["planar"] * 2, seed=5, one_pass=True)
    with torch.no_grad():
        for layer in encoder.layers:
            layer.normal.mul_(0.4)  # gentle waves, or quadrature needs many more nodes
    eps, weight = quadrature(2, 1, nodes=100)
    eps = torch.cat(eps, -1)  # two stochastic layers of one dimension: one of two
    x = X.expand(len(weight), -1)
    z, log_q = encoder(x).flow.sample_and_log_prob(eps)
    parameters = [*joint.parameters(), *encoder.parameters()]
    truth = torch.autograd.grad(weight @ BOUNDS[estimator.bound](joint(x, z) - log_q), parameters)
    value = -weight @ estimator.loss(joint, encoder(x), x, eps)
    torch.testing.assert_close(torch.autograd.grad(value, parameters), truth, rtol=0, atol=1e-7)


def one_dimensional(one_pass=False):
    return encoder_of(["sinh-arcsinh"], dim=1, seed=2, one_pass=one_pass)


@pytest.mark.parametrize("estimator", [e for e in TABLEAU.values() if e.target in BOUNDS], ids=lambda e: e.name)
@pytest.mark.parametrize("one_pass", [False, True])
def test_rows_on_a_flow_are_unbiased(estimator, one_pass):
    """Both sides by quadrature over the noise of K draws."""
    joint, encoder, k = (
        Skewed(),
        one_dimensional(one_pass),
        max(estimator.least_k, 2 if estimator.bound == "iwae" else 1),
    )
    eps, weight = quadrature(1, k, nodes=90)
    truth = exact_gradient(estimator.bound, joint, encoder, X, eps, weight)
    mine = expected_gradient(estimator, joint, encoder, X, eps, weight)
    torch.testing.assert_close(mine, truth, rtol=0, atol=1e-7)


def test_iwae_path_is_biased_on_a_flow_too():
    joint, encoder = Skewed(), one_dimensional()
    eps, weight = quadrature(1, 2, nodes=90)
    truth = exact_gradient("iwae", joint, encoder, X, eps, weight)
    mine = expected_gradient(TABLEAU["iwae-path"], joint, encoder, X, eps, weight)
    assert max((a - b).abs().max() for a, b in zip(mine, truth)) > 0.01


def test_path_has_no_variance_where_the_flow_contains_the_target():
    encoder = encoder_of(["coupling"] * 4)
    joint = Contained(encoder)
    noise = torch.randn(300, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    path = gradient_draws(TABLEAU["elbo-path"], joint, encoder, X, noise)
    assert path.abs().max() < 1e-12
    with pytest.raises(AssertionError):
        checks.no_variance(gradient_draws(TABLEAU["elbo-total"], joint, encoder, X, noise))
    one_pass = FlowEncoder(encoder.base, encoder.layers, one_pass=True)
    encoder.zero_grad()
    x = X.expand(300, 1)
    objectives.backward(TABLEAU["elbo-path"], joint, one_pass(x), x, noise[:, 0, 0].unsqueeze(0))
    assert phi_gradient(one_pass).abs().max() < 1e-12


# --- refusals


@pytest.mark.parametrize("name", ["elbo-path", "elbo-total", "iwae-dreg"])
def test_a_flow_without_an_inverse_is_refused_and_told_what_to_do(name):
    encoder = encoder_of(["planar"] * 2)
    with pytest.raises(InputError, match=r"Planar layer has no inverse.*one_pass=True.*sample_and_log_prob"):
        objectives.backward(TABLEAU[name], Banana(), encoder(X), X, torch.zeros(3, 1, 2, dtype=DTYPE))


def test_a_layer_that_cannot_carry_the_force_is_refused():
    class Shift(Layer):
        def forward(self, z, context=None):
            return z + 1, torch.zeros_like(z[..., 0])

    encoder = FlowEncoder(StandardNormal(2), [Shift()], one_pass=True)
    with pytest.raises(InputError, match="Shift layer does not say how it carries the force"):
        encoder(X).sample(torch.zeros(1, 1, 2, dtype=DTYPE))


def test_a_coupling_of_one_dimension_is_refused():
    with pytest.raises(InputError, match="at least 2 dimensions"):
        AffineCoupling(1)


def test_one_pass_knows_only_its_own_sample():
    q = encoder_of(["coupling"] * 2, one_pass=True)(X)
    z = torch.ones(3, 1, 2, dtype=DTYPE)
    with pytest.raises(InputError, match="only at the sample that it drew last"):
        q.log_prob(z)
    z = q.sample(z)
    assert torch.equal(q.log_prob(z), q.drawn.log_q)
    with pytest.raises(InputError, match="one_pass=False"):
        q.log_prob(z + 1e-3)
    still = q.stop_gradient()
    assert isinstance(still, OnePassFlow) and still.log_prob(z).shape == (3, 1)
    conditional = conditional_encoder(one_pass=True)(torch.ones(2, 3, dtype=DTYPE))
    eps = conditional.noise(4)
    parameters = list(conditional.flow.layers.parameters())
    for _ in range(2):  # before it has drawn, and after; it may draw again, held constant
        _, log_q = conditional.stop_gradient().sample_and_log_prob(eps)
        found = torch.autograd.grad(log_q.sum(), parameters, allow_unused=True)  # z alone is a leaf
        assert all(slope is None for slope in found)
        conditional.sample(eps)


# --- in a model


def test_stopping_holds_base_layers_and_context():
    encoder = conditional_encoder()
    q = encoder(torch.ones(2, 3, dtype=DTYPE)).stop_gradient()
    z = torch.ones(4, 2, 3, dtype=DTYPE, requires_grad=True)
    q.log_prob(z).sum().backward()
    assert z.grad.abs().min() > 0 and all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_flow_trains_and_is_evaluated_like_any_posterior(one_pass):
    digits = data.load("digits", "dynamic")
    generator, before = torch.Generator().manual_seed(0), torch.get_rng_state()
    sizes = {"hidden": 20, "latent": 4, "layers": 2, "flow_hidden": 8}
    model = models.build("mlp-1-flow", 64, digits.train.grey.mean(0), generator, **sizes)
    assert torch.equal(before, torch.get_rng_state())
    model.encoder.one_pass = one_pass
    history = training.fit(model, digits.train, "elbo-path", epochs=2, batch_size=100, lr=5e-3)
    assert history[1]["bound"] > history[0]["bound"]
    x = digits.test.batch(slice(0, 10), generator)
    value = evaluation.log_likelihood(model, x, 50, 25, torch.Generator().manual_seed(1))
    assert value.shape == (10,) and not value.requires_grad
    model.encoder.one_pass = not one_pass
    torch.testing.assert_close(value, evaluation.log_likelihood(model, x, 50, 25, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("one_pass", [False, True])
def test_active_units_of_a_flow_are_those_of_its_centre(one_pass):
    """The couplings see x, and move what the Gaussian encoder keeps still; a collapsed encoder has no active unit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 6, generator=generator)
    model = models.build("mlp-1-flow", 6, None, generator, hidden=8, latent=4, layers=2, flow_hidden=8)
    encoder = model.encoder
    encoder.one_pass = one_pass
    scrambled(encoder.layers, generator).float()
    still = encoder(x).sample(torch.zeros(1, 50, 4))[0]
    torch.testing.assert_close(encoder(x).means(), (still,))
    far = still.var(0, correction=0)
    level = far.sort().values[1:3].mean().item()
    assert evaluation.active_units(encoder, x, level) == [2]
    assert evaluation.active_units(encoder.base, x, level) != [2]
    with torch.no_grad():
        encoder.base.mean.weight.zero_(), encoder.base.log_std.weight.zero_()
    assert evaluation.active_units(encoder, x) == [0]


def test_a_flow_without_layers_is_its_base():
    base = DiagonalGaussian(torch.tensor([[0.3, -1.0]], dtype=DTYPE), torch.tensor([[0.1, -0.4]], dtype=DTYPE))
    flow = Flow(base, nn.ModuleList())
    eps = draw_noise(1, (3, 1), torch.Generator().manual_seed(0)).expand(-1, -1, 2)
    torch.testing.assert_close(flow.sample_and_log_prob(eps), (base.sample(eps), base.log_prob(base.sample(eps))))
    z = base.sample(eps)
    torch.testing.assert_close(push(flow, eps).force, -(z - base.mean) * (-2 * base.log_std).exp())
    assert math.isclose(integral(flow, points=800), 1, abs_tol=1e-4)


# --- against formulas written by hand


def test_a_coupling_is_its_equation():
    """Two tanh layers by hand; s is softly bounded by 2, and its slope at 0 is 1."""
    layer = coupling(5, torch.Generator().manual_seed(0), context=2)
    z, context = 3 * torch.randn(4, 6, 5, dtype=DTYPE), torch.randn(6, 2, dtype=DTYPE)
    first, last = layer.network[0], layer.network[2]
    seen = torch.cat((z[..., :3], context.expand(4, -1, -1)), -1)
    raw, shift = (torch.tanh(seen @ first.weight.mT + first.bias) @ last.weight.mT + last.bias).split(2, -1)
    e = torch.exp(raw)
    log_scale = 2 * (e - 1) / (e + 1)  # 2 tanh(raw / 2)
    moved, log_det = layer(z, context)
    torch.testing.assert_close(moved, torch.cat((z[..., 3:] * log_scale.exp() + shift, z[..., :3]), -1))
    torch.testing.assert_close(log_det, log_scale.sum(-1))
    with torch.no_grad():
        last.bias.fill_(1e3)
    torch.testing.assert_close(layer(z, context)[1], torch.full((4, 6), 4.0, dtype=DTYPE))  # two of e^2


def test_a_new_coupling_exchanges_the_halves():
    z = torch.arange(5.0).reshape(1, 1, 5)
    moved, log_det = AffineCoupling(5)(z)
    assert moved.flatten().tolist() == [3, 4, 0, 1, 2] and log_det.item() == 0


def test_sinh_arcsinh_and_planar_are_their_equations():
    z = torch.linspace(-3, 3, 7, dtype=DTYPE).reshape(7, 1, 1)
    layer = SinhArcsinh(*(torch.tensor([v], dtype=DTYPE) for v in (0.3, -0.2, 0.4, 0.25)))
    by_hand = 0.3 + math.exp(-0.2) * np.sinh(math.exp(0.25) * (np.arcsinh(z.numpy()) + 0.4))
    torch.testing.assert_close(layer(z)[0].detach(), torch.tensor(by_hand))
    u, w, b = (torch.tensor(v, dtype=DTYPE) for v in ([0.7, -2.0], [1.5, 0.5], 0.3))
    along = 0.7 * 1.5 - 2.0 * 0.5
    bent = u + (math.log1p(math.exp(along)) - 1 - along) * w / (1.5**2 + 0.5**2)
    z = torch.randn(6, 1, 2, dtype=DTYPE)
    moved = z + bent * torch.tanh(z @ w + b).unsqueeze(-1)
    torch.testing.assert_close(Planar(u, w, b)(z)[0], moved)


# --- narrow posteriors


@pytest.mark.parametrize("log_std", [0.0, -12.0])
def test_the_density_of_a_narrow_flow_s_own_sample_has_all_its_digits(log_std):
    """In float32 the Gaussian's part of a sample cannot be told from its mean; its noise still can."""
    encoder = encoder_of(["coupling", "sinh-arcsinh", "coupling"], seed=3)
    eps = torch.randn(6, 1, 2, generator=torch.Generator().manual_seed(0))
    value = torch.tensor([[3.0, -2.0]]), torch.full((1, 2), log_std)
    wide = Flow(DiagonalGaussian(*(v.double() for v in value)), encoder.layers)
    _, truth = wide.sample_and_log_prob(eps.double())
    q = Flow(DiagonalGaussian(*value), encoder.float().layers)
    z, log_q = q.sample_and_log_prob(eps)
    one_pass = OnePassFlow(q)
    same = one_pass.sample(eps)
    found = {
        "forward": log_q,
        "inverse": q.log_prob_of_sample(z, eps),
        "stopped": q.stop_gradient().log_prob_of_sample(z, eps),
        "one pass": one_pass.log_prob_of_sample(same, eps),
        "one pass, forward": one_pass.sample_and_log_prob(eps)[1],
    }
    for name, mine in found.items():
        assert (mine.double() - truth).abs().max() < 1e-4, name
    if log_std < 0:  # the control: inverting the Gaussian too
        assert (q.log_prob(z).double() - truth).abs().max() > 1e-2


def test_the_density_of_a_sample_is_one_function_of_sample_and_parameters():
    """Value and derivatives in z and in phi, at the sample: log_prob_of_sample against log_prob."""
    encoder = conditional_encoder()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    eps = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    q = encoder(x)
    z = q.sample(eps).detach().requires_grad_()
    wanted = [z, *encoder.parameters()]
    values = q.log_prob(z), q.log_prob_of_sample(z, eps)
    plain, own = (torch.autograd.grad(value.sum(), wanted, retain_graph=True) for value in values)
    torch.testing.assert_close(own, plain)
    assert all(g.abs().max() > 1e-3 for g in own)


# --- the contract


@pytest.mark.parametrize("one_pass", [False, True])
def test_mapping_the_parameters_moves_the_gaussian_and_the_context(one_pass):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    q = conditional_encoder(one_pass)(x)
    flow = q.flow if one_pass else q
    mapped = q.map_parameters(lambda p: 2 * p)
    again = mapped.flow if one_pass else mapped
    assert type(mapped) is type(q) and again.layers is flow.layers
    parameters = [(f.base.mean, f.base.log_std, f.context) for f in (again, flow)]
    assert all(torch.equal(mine, 2 * before) for mine, before in zip(*parameters, strict=True))
    torch.testing.assert_close(flow.context, torch.cat((flow.base.mean, flow.base.log_std), -1))
    plain = encoder_of(["coupling"], one_pass=one_pass)(X)
    assert plain.map_parameters(torch.clone).noise(3).shape == (3, 1, 2)


@ROWS
def test_a_coupling_with_dropout_is_refused(estimator):
    """Also where the force is carried along: each sample is then of another q."""
    encoder = encoder_of(["coupling"] * 2)
    for layer in encoder.layers:
        layer.network.insert(2, nn.Dropout(0.5))
    q = encoder(X)
    eps = q.noise(3)
    with pytest.raises(InputError, match="density of this Flow is another one each time"):
        objectives.backward(estimator, Skewed(), q, X, eps)
    encoder.eval()
    assert objectives.backward(estimator, Skewed(), encoder(X), X, eps).isfinite().all()
    encoder.train()
    one_pass = FlowEncoder(encoder.base, encoder.layers, one_pass=True)
    with pytest.raises(InputError, match="density of this OnePassFlow is another one each time"):
        objectives.backward(estimator, Skewed(), one_pass(X), X, eps)
