"""Exact things about the models."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal

from vaelib import bounds, discrete, models, objectives
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, TABLEAU
from vaelib.estimators.silent import covariances_of_cosines
from vaelib.models.text import lstm_vae
from vaelib.posteriors import DiagonalGaussian, FullGaussian, OneHotCategorical, layers_of, standard_normal_log_prob


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


@pytest.mark.parametrize("s", [0.1, 0.01, 0.001])
def test_the_closed_forms_keep_their_digits_at_small_noise(s):
    """In float32 against float64: log p(x) and its gradient, the posterior, and the encoder and model made of them."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 8, generator=generator)
    scale = torch.full((64,), s).index_fill(0, torch.tensor([3]), s / 100)  # one pixel that is nearly exact
    x = torch.randn(50, 8, generator=generator) @ w.mT + scale * torch.randn(50, 64, generator=generator)
    joint = models.LinearGaussian(w, torch.zeros(64), scale.log())
    exact = copy.deepcopy(joint).double()
    found, truth = joint.log_marginal(x), exact.log_marginal(x.double())
    assert found.dtype == torch.float32 and (found - truth).abs().max() < 1e-4 * truth.abs().max()
    gradient, true = (
        torch.autograd.grad(value.sum(), list(model.parameters())) for value, model in ((found, joint), (truth, exact))
    )
    for a, b in zip(gradient, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    for a, b in zip(vars(joint.posterior(x)).values(), vars(exact.posterior(x.double())).values(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    for a, b in zip(models.exact_encoder(joint).parameters(), models.exact_encoder(exact).parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    fitted, best = models.ppca(x, 8), models.ppca(x.double(), 8)
    assert fitted.weight.dtype == torch.float32
    torch.testing.assert_close(fitted.log_std.double(), best.log_std, rtol=0, atol=1e-4)
    off = fitted.double().log_marginal(x.double()).mean() - best.log_marginal(x.double()).mean()
    assert off.abs() < 0.05


@pytest.mark.parametrize("log_std", [-6.0, -2.0, 1.0, 3.0])
def test_the_covariances_of_cosines_are_their_integrals(log_std):
    """By quadrature, for orthogonal, equal and opposite directions, narrow and wide q; also in float32."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    phase = torch.tensor([0.0, 0.3, 0.7, -0.2, 1.0], dtype=torch.float64)
    i, j = torch.triu_indices(5, 5)
    q = DiagonalGaussian(*torch.tensor([[[0.4, -1.3]], [[log_std, log_std]]], dtype=torch.float64))
    points = torch.linspace(-9, 9, 901, dtype=torch.float64)
    mass = standard_normal_log_prob(points.unsqueeze(-1)).exp() * 0.02
    eps = torch.cartesian_prod(points, points).unsqueeze(1)
    cosines = (q.sample(eps)[:, 0] @ weight.mT + phase).cos()
    weights = torch.outer(mass, mass).flatten().unsqueeze(-1)
    centred = cosines - (weights * cosines).sum(0)
    truth = (weights * centred[:, i] * centred[:, j]).sum(0)
    found = covariances_of_cosines(q, weight, phase, i, j)[0]
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-13)
    single = covariances_of_cosines(q.map_parameters(torch.Tensor.float), weight.float(), phase.float(), i, j)[0]
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-6 * math.exp(min(0, 2 * log_std)))


def test_a_wide_posterior_does_not_overflow_in_its_cosines():
    decoder = models.build("cosine", 4, generator=torch.Generator().manual_seed(0)).joint.decode
    q = DiagonalGaussian(torch.zeros(1, 8, requires_grad=True), torch.full((1, 8), 4.0, requires_grad=True))
    value = decoder.expected_log_likelihood(torch.zeros(1, 4), q)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, [q.mean, q.log_std, *decoder.parameters()]))


@pytest.mark.parametrize("s", [0.1, 0.01, 0.001])
def test_the_expected_likelihood_of_cosines_keeps_its_digits(s):
    decoder = models.build("cosine", 16, generator=torch.Generator().manual_seed(0)).joint.decode
    with torch.no_grad():
        decoder.log_std.fill_(math.log(s))
    generator = torch.Generator().manual_seed(1)
    q = DiagonalGaussian(torch.randn(20, 8, generator=generator), torch.full((20, 8), -6.0))
    x = decoder(q.mean.unsqueeze(0)).mean[0].detach() + s * torch.randn(20, 16, generator=generator)
    exact = copy.deepcopy(decoder).double().expected_log_likelihood(x.double(), q.map_parameters(torch.Tensor.double))
    assert (decoder.expected_log_likelihood(x, q) - exact).abs().max() < 0.01


def test_the_variance_of_a_choice_keeps_its_digits():
    """The weights of a choice are 100 and little more: their variance is not the difference of two large squares."""
    q = OneHotCategorical(torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]]))
    weight = 100 + 0.01 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    _, exact = OneHotCategorical(q.logits.double()).linear_moments(weight.double())
    torch.testing.assert_close(q.linear_moments(weight)[1].double(), exact, rtol=1e-2, atol=0)
    double = OneHotCategorical(q.logits.double())
    share = double.log_prob(double.support()).exp()
    images = double.support()[:, 0] @ weight.double().mT
    truth = (share * (images - (share * images).sum(0)).square()).sum(0)
    torch.testing.assert_close(exact[0], truth, rtol=1e-6, atol=0)


def test_the_exact_encoder_is_the_posterior(toy):
    _, x, generator = toy
    joint = models.ppca(x, 3)
    q, exact = models.exact_encoder(joint)(x), joint.posterior(x)
    z = torch.randn(4, 40, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z))


def test_of_a_full_covariance_the_exact_encoder_is_the_closest_factorised_gaussian(toy):
    """In KL(q || p): its gradient vanishes there, and does not at the scales of the marginals."""
    joint, x, _ = toy
    q, p = models.exact_encoder(joint)(x[:1]), joint.posterior(x[:1])
    precision = torch.cholesky_inverse(p.scale_tril)
    assert (precision - precision.diagonal().diag()).abs().max() > 0.1

    def slope(log_std):
        """Of KL(q || p) = tr(M diag sigma^2) / 2 - sum log sigma + constant, by automatic differentiation."""
        log_std = log_std.detach().requires_grad_()
        normal = torch.distributions.MultivariateNormal(q.mean, scale_tril=log_std.exp().diag_embed())
        exact = torch.distributions.MultivariateNormal(p.mean, scale_tril=p.scale_tril)
        return torch.autograd.grad(torch.distributions.kl_divergence(normal, exact).sum(), log_std)[0]

    assert slope(q.log_std).abs().max() < 1e-10
    marginal_scale = 0.5 * (p.scale_tril @ p.scale_tril.mT).diagonal().log()
    assert slope(marginal_scale.expand_as(q.log_std)).abs().max() > 0.1


def test_the_kl_of_a_full_gaussian_is_torch_s(toy):
    joint, x, _ = toy
    q = joint.posterior(x)
    ours = MultivariateNormal(q.mean, scale_tril=q.scale_tril)
    prior = MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(q.kl(), torch.distributions.kl_divergence(ours, prior))
    torch.testing.assert_close(FullGaussian(q.mean, q.scale_tril).entropy(), ours.entropy().expand(40))


WEIGHTS = json.loads((Path(__file__).parent / "initial_weights.json").read_text("utf-8"))
"""For each parameter a projection of its initial value, as 0.2 drew it from the same seed (mlp-4, conv: 0.3)."""
SMALL = {"latent": 2, "maps": 4, "layers": 4, "encoder_maps": 3, "hidden": 5}


@pytest.mark.parametrize("name", [*models.MODELS, "lstm"])
def test_the_initial_weights_are_what_they_always_were(name):
    generator = torch.Generator().manual_seed(3)
    if name == "lstm":
        model = lstm_vae(20, generator, latent=2, embedding=5, hidden=6)
    else:
        sizes = SMALL if name == "pixelcnn" else {}
        model = models.build(name, 16, torch.linspace(0, 1, 16), generator, **sizes)
    parameters = [p.detach().double().flatten() for part in (model.encoder, model.joint) for p in part.parameters()]
    found = [(p @ torch.arange(1, len(p) + 1).double().cos()).item() for p in parameters]
    assert found == pytest.approx(WEIGHTS[name], rel=1e-4, abs=2e-6)


def test_the_negative_control_of_the_initial_weights():
    """Another seed, and two parameters drawn in another order, are seen."""
    for seed, swap in ((4, False), (3, True)):
        model = models.build("mlp-1", 16, torch.linspace(0, 1, 16), torch.Generator().manual_seed(seed))
        parameters = [p for part in (model.encoder, model.joint) for p in part.parameters()]
        if swap:
            parameters[4].data, parameters[6].data = parameters[6].data, parameters[4].data  # of mean and log_std
        flat = [p.detach().double().flatten() for p in parameters]
        found = [(p @ torch.arange(1, len(p) + 1).double().cos()).item() for p in flat]
        assert found != pytest.approx(WEIGHTS["mlp-1"], rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("name", models.MODELS)
def test_models_are_reproducible_and_of_the_stated_size(name):
    first, again, other = (models.build(name, 25, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    small = models.build(name, 25, latent=2)
    x = torch.rand(3, 25).round()
    posterior = small.encoder(x)
    z = posterior.sample(posterior.noise(4, torch.Generator().manual_seed(0)))
    assert small.joint(x, z).shape == posterior.log_prob(z).shape == (4, 3)


def test_four_stochastic_layers():
    """The widths halve, the densities are the sums over their layers, and one tanh network makes each conditional."""
    model = models.build("mlp-4", 6, generator=torch.Generator().manual_seed(0), latent=16, hidden=5, hidden2=4)
    model = model.double()
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round()
    q = model.encoder(x)
    z = q.sample(q.noise(2, torch.Generator().manual_seed(2)))
    assert [layer.shape for layer in layers_of(z)] == [(2, 3, width) for width in (16, 8, 4, 2)]
    log_q = model.encoder.first(x).log_prob(z[0])
    log_p = standard_normal_log_prob(z[3]) + model.joint.decode(z[0]).log_prob(x)
    for below, (upper, prior) in enumerate(zip(model.encoder.above, model.joint.priors, strict=True)):
        log_q = log_q + upper(z[below]).log_prob(z[below + 1])
        log_p = log_p + prior(z[below + 1]).log_prob(z[below])
    torch.testing.assert_close(q.log_prob(z), log_q)
    torch.testing.assert_close(model.joint(x, z), log_p)
    for part in (*model.encoder.above, *model.joint.priors):
        assert [layer.out_features for layer in part.hidden if hasattr(layer, "out_features")] == [4, 4]
    assert [p.shape for p in models.build("mlp-4", 6, latent=2).encoder.above[2].mean.parameters()] == [(1, 100), (1,)]
    objectives.backward(TABLEAU["iwae-dreg"], model.joint, q, x, q.noise(2, torch.Generator().manual_seed(2)))
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_sizes_are_those_of_burda_et_al():
    layers = {
        name: [tuple(p.shape) for part in (model.encoder, model.joint) for p in part.parameters() if p.ndim == 2]
        for name, model in ((name, models.build(name, 784)) for name in ("mlp-1", "mlp-2"))
    }
    assert layers["mlp-1"] == [(200, 784), (200, 200), (50, 200), (50, 200), (200, 50), (200, 200), (784, 200)]
    encoder = [(200, 784), (200, 200), (100, 200), (100, 200), (100, 100), (100, 100), (50, 100), (50, 100)]
    prior, decoder = [(100, 50), (100, 100), (100, 100), (100, 100)], [(200, 100), (200, 200), (784, 200)]
    assert layers["mlp-2"] == encoder + prior + decoder


def test_the_networks_are_tanh_layers_and_a_linear_one():
    """In NumPy: the encoder's mean and log-scale, and the logits of the pixels."""
    generator = torch.Generator().manual_seed(0)
    encoder = models.GaussianMLP((4, 5, 3), 2, generator).double()
    decoder = models.BernoulliMLP((2, 5), 4, None, generator).double()
    mixed = models.GaussianMixtureMLP((4, 5), 2, 3, generator).double()
    x = np.random.default_rng(0).normal(size=(6, 4))
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *decoder.parameters(), *mixed.parameters()):
            parameter.normal_(generator=generator)
        q, logits = encoder(torch.from_numpy(x)), decoder(torch.from_numpy(x[:, :2])).logits
        mixture = mixed(torch.from_numpy(x))

    def layer(linear, h):
        return h @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()

    h = np.tanh(layer(encoder.hidden[2], np.tanh(layer(encoder.hidden[0], x))))
    np.testing.assert_allclose(q.mean, layer(encoder.mean, h), rtol=1e-12)
    np.testing.assert_allclose(q.log_std, layer(encoder.log_std, h), rtol=1e-12)
    np.testing.assert_allclose(logits, layer(decoder.logits, np.tanh(layer(decoder.hidden[0], x[:, :2]))), rtol=1e-12)
    h = np.tanh(layer(mixed.hidden[0], x))
    np.testing.assert_allclose(mixture.logits, layer(mixed.logits, h).T, rtol=1e-12)
    for name in ("mean", "log_std"):  # two numbers of the first component, then of the second, then of the third
        found = np.concatenate([getattr(component, name) for component in mixture.components], 1)
        np.testing.assert_allclose(found, layer(getattr(mixed, name), h), rtol=1e-12)


def test_the_output_bias_starts_at_the_mean_image():
    mean = torch.tensor([0.0, 0.2, 1.0])
    decoder = models.build("mlp-1", 3, mean=mean).joint.decode
    torch.testing.assert_close(decoder.logits.bias.sigmoid(), mean.clamp(0.001, 0.999))
    torch.testing.assert_close(models.build("linear", 3, mean=mean).joint.bias.data, mean)


def test_the_detached_model_differs_in_its_stopped_posterior_alone():
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)).round()
    detached, model = (
        models.build(name, 6, generator=torch.Generator().manual_seed(0), hidden=5, latent=4, hidden2=5, latent2=2)
        for name in ("mlp-2-detached", "mlp-2")
    )
    gradients = {}
    for row in ("elbo-total", "elbo-path"):
        for name, each in (("right", model), ("detached", detached)):
            each.zero_grad()
            q = each.encoder(x)
            eps = q.noise(3, torch.Generator().manual_seed(2))
            objectives.backward(TABLEAU[row], each.joint, q, x, eps)
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
    above = detached.encoder.above[0](z[0]).stop_gradient()
    by_hand = torch.autograd.grad(q.first.log_prob(z[0]).sum() + above.log_prob(z[1]).sum(), z)
    torch.testing.assert_close(torch.autograd.grad(q.log_prob(z).sum(), z), by_hand)


def test_bad_names_and_sizes_are_named():
    for name, sizes, message in [
        ("mlp1", {}, "no model is called 'mlp1', did you mean 'mlp-1'"),
        ("mlp-1", {"hiden": 3}, "did you mean 'hidden'"),
        ("mlp-2", {"latent2": 0}, "latent2 of model 'mlp-2' must be a whole number of at least 1, but is 0"),
    ]:
        with pytest.raises(InputError, match=message):
            models.build(name, 10, **sizes)


@pytest.mark.parametrize("name", ["linear", "mlp-1", "pixelcnn", "cosine"])
@pytest.mark.parametrize(
    ("pixels", "given", "message"),
    [
        (0, {}, "data_dim must be a whole number of at least 1, but is 0"),
        ((3, 3), {}, r"data_dim must be a whole number of at least 1, but is \(3, 3\)"),
        (9, {"mean": torch.zeros(4)}, r"mean must be a tensor \[9\] of .*, but is a tensor \[4\]"),
        (9, {"mean": [0.5] * 9}, r"mean must be a tensor \[9\] of .*, but is a list"),
        (9, {"mean": torch.full((9,), math.nan)}, "mean must be .* finite numbers.*, but holds one that is not"),
        (9, {"shape": (2, 2)}, r"shape must be that of 9 pixels, but is \(2, 2\)"),
        (9, {"shape": (-3, -3)}, r"shape must be that of 9 pixels, but is \(-3, -3\)"),
        (9, {"shape": 9}, "shape must be that of 9 pixels, but is 9"),
    ],
)
def test_a_model_of_other_data_is_refused(name, pixels, given, message):
    with pytest.raises(InputError, match=message):
        models.build(name, pixels, **given)


def test_sizes_may_be_numpy_s():
    ours, numpy_s = (
        models.build("mlp-1", number(6), hidden=number(5), latent=number(2), generator=torch.Generator().manual_seed(0))
        for number in (int, np.uint8)
    )
    torch.testing.assert_close(ours.state_dict(), numpy_s.state_dict())


def test_a_guided_model_has_the_prior_of_its_model():
    """Also where it is not the one that comes of itself: bits that are rarely 0."""
    generator = torch.Generator().manual_seed(0)
    for name in ("guided", "guided-bernoulli"):
        model = models.build(name, 6, generator=generator, hidden=5, latent=3)
        x = torch.rand(4, 6, generator=generator)
        q = model.encoder(x)
        z = q.sample(q.noise(2, generator))
        torch.testing.assert_close(model.joint.log_prior(z) + model.joint.log_likelihood(x, z), model.joint(x, z))
        torch.testing.assert_close(bounds.divergence(model.joint, q), bounds.divergence(model.joint.joint, q))
    objectives.backward(ESTIMATORS["elbo-gumbel-softmax"], model.joint, q, x, q.noise(2, generator))
    decode, guide = model.joint.joint.decode, model.joint.guide
    rare = models.Guided(models.DiscreteJoint(decode, torch.full((3,), 3.0)), guide)
    assert (rare.log_prior(torch.zeros(1, 3)) - 3 * torch.tensor(-3.0).sigmoid().log()).abs() < 1e-4
    torch.testing.assert_close(bounds.divergence(rare, q), q.kl(rare.joint.prior))
    assert (bounds.divergence(rare, q) - q.kl()).abs().min() > 0.5
    exact = discrete.exact_elbo(rare, x, q)
    assert (exact - discrete.exact_elbo(model.joint, x, q)).abs().min() > 0.5


@pytest.mark.parametrize("name", models.MODELS)
def test_models_in_double_precision_follow_the_data(name):
    """By .double(), and by torch's default; the mean image may have another precision."""
    model = models.build(name, 16, latent=2, **({"maps": 4, "layers": 3} if name == "pixelcnn" else {})).double()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        of_default = models.build(name, 16, torch.full((16,), 0.4, dtype=torch.float32), latent=2)
    finally:
        torch.set_default_dtype(default)
    of_single = models.build(name, 16, torch.full((16,), 0.4, dtype=torch.float64), latent=2)
    for built, dtype in ((model, torch.float64), (of_default, torch.float64), (of_single, torch.float32)):
        assert {p.dtype for p in built.parameters()} == {dtype}
        x = torch.rand(3, 16, dtype=dtype).round()
        q = built.encoder(x)
        z = q.sample(q.noise(4, torch.Generator().manual_seed(0)))
        assert {part.dtype for part in (*layers_of(z), built.joint(x, z), q.log_prob(z))} == {dtype}


def test_one_of_everything():
    """K = B = D = X = 1 through every estimator that takes the model, with the reference form beside it."""
    tried = 0
    for name, estimator in itertools.product(models.MODELS, ESTIMATORS.values()):
        if name in ("pixelcnn", "mlp-1-flow"):  # a batch of one, and a coupling of one dimension, cannot be
            continue
        sizes = dict.fromkeys(models.MODELS[name].__kwdefaults__, 1)
        model = models.build(name, 1, generator=torch.Generator().manual_seed(0), **sizes)
        x = torch.ones(1, 1)
        q = model.encoder(x)
        try:
            bound = objectives.backward(estimator, model.joint, q, x, q.noise(1, torch.Generator().manual_seed(1)))
        except InputError:
            continue
        tried += 1
        assert bound.shape == (1,) and bound.isfinite(), (name, estimator.name)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert tried > 60


def test_the_closed_forms_of_a_gaussian_are_torch_s():
    generator = torch.Generator().manual_seed(0)
    q = DiagonalGaussian(*torch.randn(2, 4, 3, generator=generator, dtype=torch.float64))
    normal = torch.distributions.Normal(q.mean, q.log_std.exp())
    prior = torch.distributions.Normal(torch.zeros(3).double(), torch.ones(3).double())
    truth = torch.distributions.kl_divergence(normal, prior).sum(-1)
    torch.testing.assert_close(bounds.divergence(bounds.StandardPrior(), q), truth)
    torch.testing.assert_close(q.entropy(), normal.entropy().sum(-1))


def test_a_likelihood_that_forgot_its_sum_bounds_nothing():
    """[K, B, 1] against [K, B] would make [K, B, B]."""

    class Unsummed(models.Joint):
        def log_likelihood(self, x, z):
            return super().log_likelihood(x, z).unsqueeze(-1)

    joint = Unsummed(models.build("linear", 5, latent=2).joint.decode)
    q = DiagonalGaussian(torch.zeros(4, 2), torch.zeros(4, 2))
    z = q.sample(q.noise(4, torch.Generator().manual_seed(0)))
    for form in bounds.FORMS:
        with pytest.raises(InputError, match=r"of the shape \[K, B\] = \[4, 4\].*but returned \[4, 4, 1\]"):
            bounds.estimate(form, "elbo", joint, torch.zeros(4, 5), q, z)


# --- convolutions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (1, 7, 5), (3, 2, 9), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("name", ["conv", "conv-gaussian", "conv-logistic"])
def test_a_convolutional_model_takes_images_of_any_shape(name, shape):
    pixels, generator = math.prod(shape), torch.Generator().manual_seed(0)
    x = (255 * torch.rand(4, pixels, generator=generator)).round() / 255
    x = (x > 0.5).float() if name == "conv" else x
    mean = torch.linspace(0.1, 0.9, pixels)
    model = models.build(name, pixels, mean, generator, shape, maps=3, latent=2)
    q = model.encoder(x)
    z = q.sample(q.noise(5, generator))
    assert model.joint(x, z).shape == (5, 4) and model.binary == (name == "conv")
    z = torch.zeros(1, 1, 2)  # where the output starts at the mean image: the biases of all layers are 0
    torch.testing.assert_close(model.joint.generate(z)[0, 0], mean)
    loss = objectives.loss("iwae-dreg", model.joint, q, x, k=3, generator=generator).mean()
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_a_convolution_sees_where_a_pixel_is():
    """A row of X numbers is put into lines as the data have them: moving a patch by a line moves what is seen."""
    model = models.build("conv", 8 * 16, None, torch.Generator().manual_seed(0), (8, 16), maps=2, latent=2)
    image = torch.zeros(8, 16)
    image[4:, 8:] = 1.0
    torch.testing.assert_close(
        model.encoder.maps[0](image.view(1, 1, 8, 16)),
        model.encoder.maps[0](image.flatten().unsqueeze(0).unflatten(-1, model.encoder.shape)),
    )
    assert model.encoder.shape == (1, 8, 16)


@pytest.mark.parametrize("shape", [None, (1, 60)])
def test_rows_of_numbers_are_no_images(shape):
    with pytest.raises(InputError, match="is for images .* but these observations are rows of 60 numbers"):
        models.build("conv", 60, shape=shape)
