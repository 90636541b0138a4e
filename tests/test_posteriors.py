"""Posteriors: one contract for all of them, densities against torch.distributions, SciPy and quadrature."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zuko
from scipy import stats
from torch import distributions, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from toys import BATCH, CONTINUOUS, DISCRETE, DTYPE, ONE_PASS, POSTERIORS, Leaves, Target, couplings, is_mixture

from vaelib import checks, discrete, models, objectives
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, TABLEAU
from vaelib.flows import Flow, OnePassFlow
from vaelib.posteriors import (
    DiagonalGaussian,
    FactorisedBernoulli,
    FullGaussian,
    HierarchicalGaussian,
    Mixture,
    Noise,
    OneHotCategorical,
    Posterior,
    as_posterior,
    draw,
    layers_of,
    map_latent,
    standard_normal_log_prob,
)

INF = math.inf


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def randn(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", POSTERIORS)
def test_every_posterior_keeps_the_contract(name, dtype, capsys):
    checks.contract(POSTERIORS[name](Leaves(dtype)))
    assert capsys.readouterr().out.startswith("ok: ")
    q = as_posterior(POSTERIORS[name](Leaves(dtype)))
    (first, *_), z = layers_of(q.noise_like(q.strata)), q.sample(q.noise(q.strata))
    assert first.kind == ("uniform" if name in DISCRETE else "normal") and first.device.type == "cpu"
    assert first.shape[:2] == (q.strata, BATCH) and layers_of(z)[0].dtype == first.dtype == dtype


def grid(posterior):
    """Return every value of z on a grid (or all there are), ``[N, 1, D]``, and the volume that each stands for."""
    if isinstance(posterior, FactorisedBernoulli | OneHotCategorical):
        return posterior.support().expand(-1, BATCH, -1), 1.0
    depth = len(layers_of(posterior.noise_like(posterior.strata)))
    hierarchy = isinstance(posterior, HierarchicalGaussian)
    axes = depth if hierarchy else 2
    width, points = (3.2, 29) if axes == 4 else (6, 601)
    u = torch.linspace(-width, width, points, dtype=DTYPE)  # z = sinh u, for the heavy tails
    point = torch.cartesian_prod(*[u] * axes).reshape(-1, 1, axes).expand(-1, BATCH, -1)
    volume = point.cosh().prod(-1) * (u[1] - u[0]) ** axes
    return tuple(point.sinh().split(1, -1)) if hierarchy else point.sinh(), volume


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE])
def test_every_density_sums_to_one(name):
    q = as_posterior(POSTERIORS[name](Leaves()))
    with torch.no_grad():
        z, volume = grid(q)
        mass = (q.log_prob(z).exp() * volume).sum(0)
    torch.testing.assert_close(mass, torch.ones(BATCH, dtype=DTYPE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*ONE_PASS][:2])
def test_the_one_pass_density_is_that_of_the_flow(name):
    q = POSTERIORS[name](Leaves())
    eps = q.noise(4)
    (z, log_q), (same_z, same_log_q) = q.sample_and_log_prob(eps), q.flow.sample_and_log_prob(eps)
    torch.testing.assert_close(z, same_z), torch.testing.assert_close(log_q, same_log_q)
    torch.testing.assert_close(q.flow.log_prob(z), log_q)


@pytest.mark.parametrize("name", [name for name in CONTINUOUS if not is_mixture(name)])
def test_the_density_is_that_of_the_sampler(name):
    """log q(t(eps)) = log N(eps) - log |det dt/deps|, with the Jacobian by automatic differentiation."""
    q = as_posterior(POSTERIORS[name](Leaves()))
    eps = q.noise(1)
    flat = torch.cat([layer[:, 0] for layer in layers_of(eps)], -1)[0]
    widths = [layer.shape[-1] for layer in layers_of(eps)]

    def sample(flat):
        parts = [part.expand(1, BATCH, -1) for part in flat.split(widths)]
        z = q.sample(tuple(parts) if isinstance(eps, tuple) else parts[0])
        return torch.cat([layer[0, 0] for layer in layers_of(z)])

    jacobian = torch.autograd.functional.jacobian(sample, flat)
    z, log_q = q.sample_and_log_prob(eps)
    expected = standard_normal_log_prob(flat) - jacobian.slogdet().logabsdet
    torch.testing.assert_close(log_q[0, 0], expected)
    torch.testing.assert_close(q.log_prob(z)[0, 0], expected)


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_row_is_its_reference_with_every_posterior(name):
    for row in TABLEAU.values():
        leaf, joint = Leaves(), Target()
        q, x = POSTERIORS[name](leaf), torch.ones(BATCH, 1, dtype=DTYPE)
        eps = as_posterior(q).noise(6, torch.Generator().manual_seed(1))
        parameters = [joint.theta, *leaf.parameters]
        found = []
        for engine in (row.loss, row.reference_loss):
            try:
                loss = engine(joint, q, x, eps)
            except InputError as refusal:
                assert (row.reparameterised and name in DISCRETE) or (not row.whole and is_mixture(name)), refusal
                found.append(None)
            else:
                found.append((loss, torch.autograd.grad(loss.mean(), parameters, allow_unused=True, retain_graph=True)))
        if found[0] is not None:
            torch.testing.assert_close(*(loss for loss, _ in found))
            zeros = [torch.zeros_like(p) for p in parameters]
            mine, truth = ([z if g is None else g for g, z in zip(gs, zeros)] for _, gs in found)
            torch.testing.assert_close(mine, truth, msg=lambda m: f"{row.name}: {m}")
        else:
            assert found[1] is None


SCALES = {"other scale": 2, "another scale, nearly": 1.2}


@dataclass(frozen=True)
class Broken(DiagonalGaussian):
    """What a broken posterior of somebody may look like, one fault at a time."""

    fault: str = ""

    def map_parameters(self, function):
        return Broken(function(self.mean), function(self.log_std), self.fault)

    def noise(self, k, generator=None):
        return super().noise(k, None if self.fault == "own generator" else generator)

    def sample(self, eps):
        z = super().sample(eps)
        return z + torch.randn_like(z) if self.fault == "random sample" else z * SCALES.get(self.fault, 1)

    def log_prob(self, z):
        log_q = super().log_prob(z)
        if self.fault == "another scale, nearly":  # and no score that could tell
            log_q = DiagonalGaussian(self.mean.detach(), self.log_std.detach()).log_prob(z)
        if self.fault == "summed":
            return log_q.sum(-1)
        if self.fault == "random density":
            log_q = log_q + torch.rand(())
        if self.fault == "no determinant":
            log_q = log_q + self.log_det()
        if self.fault == "float32":
            log_q = log_q.float()
        return log_q + 0.3 * z.sum(-1) if self.fault == "tilted" else log_q

    def log_prob_of_sample(self, z, eps):
        return self.log_prob(z)

    def sample_and_log_prob(self, eps):
        z = self.sample(eps)
        return z, self.log_prob(z) + (1 if self.fault == "another log q" else 0)

    def stop_gradient(self):
        if self.fault == "not stopped":
            return self
        if self.fault == "stopped elsewhere":
            return Broken(self.mean.detach() + 1, self.log_std.detach())
        return super().stop_gradient()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("own generator", "differs although the generator is the same"),
        ("random sample", "sample.eps. differs from call to call"),
        ("other scale", "log_prob is not .* the samples"),
        ("another scale, nearly", "log_prob is not the density of the samples: the mean of its derivative in z"),
        ("summed", r"log_prob.z. must be \[K, B\] = \[4, 3\], but is \[4\]"),
        ("random density", "sample_and_log_prob"),
        ("no determinant", "not a density that is normalised for every phi"),
        ("float32", "not of one dtype"),
        ("tilted", "log_prob is not .* the samples"),
        ("another log q", "sample_and_log_prob.eps. is not sample"),
        ("not stopped", "leaves this Broken a way to its parameters"),
        ("stopped elsewhere", "stop_gradient"),
    ],
)
def test_a_broken_posterior_is_told_what_is_broken(fault, sentence):
    leaf = Leaves()
    checks.contract(Broken(leaf(BATCH, 2), leaf(BATCH, 2)))
    with pytest.raises(AssertionError, match=sentence):
        checks.contract(Broken(leaf(BATCH, 2) + 1, leaf(BATCH, 2), fault))


@pytest.mark.parametrize("fault", ["not stopped", "stopped elsewhere", "another log q"])
def test_a_posterior_of_somebody_is_tried_for_each_of_its_settings(fault):
    leaf, x = Leaves(), torch.zeros(BATCH, 2, dtype=DTYPE)
    for _ in range(2):
        objectives.loss(
            "elbo-total", lambda x, z: standard_normal_log_prob(z), Broken(leaf(BATCH, 2), leaf(BATCH, 2)), x
        )
    with pytest.raises(InputError, match="this Broken"):
        objectives.loss(
            "elbo-total", lambda x, z: standard_normal_log_prob(z), Broken(leaf(BATCH, 2), leaf(BATCH, 2), fault), x
        )


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 0.1), (torch.float64, 1e-9)])
def test_two_densities_that_differ_in_more_than_rounding_are_two(dtype, off):
    class Off(DiagonalGaussian):
        def sample_and_log_prob(self, eps):
            z, log_q = super().sample_and_log_prob(eps)
            return z, log_q + off

    leaf = Leaves(dtype)
    with pytest.raises(AssertionError, match="sample_and_log_prob.eps. is not sample"):
        checks.contract(Off(leaf(BATCH, 2), leaf(BATCH, 2)))


class Unscaled(DiagonalGaussian):
    """Normalised for each mean, but not for each scale, and otherwise what it inherits."""

    def log_det(self):
        return 0.7 * super().log_det()


@pytest.mark.parametrize("shape", [(BATCH, 2), (1, 2), (BATCH, 1)])
def test_a_scale_without_a_share_of_its_normalisation_breaks_the_contract(shape):
    leaf = Leaves()
    mean, log_std = leaf(BATCH, 2), leaf(*shape)
    checks.contract(DiagonalGaussian(mean, log_std))
    with pytest.raises(AssertionError, match="not a density that is normalised for every phi"):
        checks.contract(Unscaled(mean, log_std))


def test_a_mixture_whose_shares_are_left_out_breaks_the_contract():
    class Deaf(Mixture):
        def log_share(self, k):
            return 0.0

    leaf = Leaves()
    q = Mixture((leaf.diagonal(), leaf.diagonal()), leaf(2, BATCH) + torch.tensor([[2.0], [0.0]]))
    checks.contract(q)
    with pytest.raises(AssertionError, match="log_prob is not .* the samples"):
        checks.contract(Deaf(q.components, q.logits))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_reproducible_and_refuses_no_draws():
    q = Leaves().diagonal()
    first, again = (q.noise(2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, q.noise(2, torch.Generator().manual_seed(6)))
    with pytest.raises(InputError, match="at least 1, but is 0"):
        q.noise(0)


def test_learning_the_widths_of_a_hierarchy_draws_nothing_and_moves_nothing():
    """The upper layers are called to learn their widths: in a copy, and without torch's generator going on."""
    norm = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5))

    class Above(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, z):
            mean = self.norm(z.reshape(-1, 1)).reshape(z.shape)
            return DiagonalGaussian(mean, torch.zeros_like(mean))

    q = HierarchicalGaussian(Leaves(torch.float32).diagonal(1), (Above(),))
    state = torch.random.get_rng_state()
    noise = q.noise_like(5)
    assert [one.shape for one in noise] == [(5, BATCH, 1)] * 2
    assert torch.equal(state, torch.random.get_rng_state()) and norm[0].num_batches_tracked == 0
    assert [layer.shape for layer in draw(noise)] == [(5, BATCH, 1)] * 2


# --- Gaussians against torch and SciPy --------------------------------------------------------------------------------


@pytest.fixture
def diagonal(generator):
    q = DiagonalGaussian(randn(4, 3, generator=generator), 0.5 * randn(4, 3, generator=generator))
    return q, Independent(Normal(q.mean, q.log_std.exp()), 1)


@pytest.fixture(params=["shared", "per observation"])
def full(generator, request):
    shape = (3, 3) if request.param == "shared" else (4, 3, 3)
    scale_tril = randn(*shape, generator=generator).tril(-1) + torch.diag_embed(
        0.3 + torch.rand(shape[:-1], generator=generator)
    )
    q = FullGaussian(randn(4, 3, generator=generator), scale_tril.double())
    return q, MultivariateNormal(q.mean, scale_tril=q.scale_tril)


def assert_agrees(q, reference, generator):
    z = q.sample(q.noise(5, generator))
    assert z.shape == (5, 4, 3)
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z))
    torch.testing.assert_close(q.entropy(), reference.entropy())
    prior = (
        type(reference)(torch.zeros(4, 3).double(), scale_tril=torch.eye(3).double().expand(4, 3, 3))
        if isinstance(reference, MultivariateNormal)
        else Independent(Normal(torch.zeros(4, 3).double(), 1.0), 1)
    )
    torch.testing.assert_close(q.kl(), kl_divergence(reference, prior).expand(4))


def test_the_diagonal_gaussian_agrees_with_torch(diagonal, generator):
    assert_agrees(*diagonal, generator)


def test_the_full_gaussian_agrees_with_torch(full, generator):
    assert_agrees(*full, generator)


def test_densities_agree_with_scipy(diagonal, full, generator):
    q, p = diagonal[0], full[0]
    z = randn(4, 3, generator=generator)
    torch.testing.assert_close(
        q.log_prob(z), torch.tensor(stats.norm.logpdf(z, q.mean, q.log_std.exp())).sum(-1), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        standard_normal_log_prob(z), torch.tensor(stats.norm.logpdf(z)).sum(-1), rtol=1e-12, atol=0
    )
    covariance = (p.scale_tril @ p.scale_tril.mT).expand(4, 3, 3)
    reference = [stats.multivariate_normal.logpdf(a, b, c) for a, b, c in zip(z, p.mean, covariance)]
    torch.testing.assert_close(p.log_prob(z), torch.tensor(reference), rtol=1e-10, atol=1e-10)


def test_samples_have_the_moments_they_should(full, diagonal, generator):
    """4 standard errors in each of 4 x 3 means and 4 x 9 covariances."""
    for q, reference in (full, diagonal):
        z = q.sample(q.noise(40_000, generator))
        centred = z - reference.mean
        for draws in (centred, centred.unsqueeze(-1) * centred.unsqueeze(-2)):
            dense = isinstance(reference, MultivariateNormal)
            covariance = reference.covariance_matrix if dense else torch.diag_embed(reference.variance)
            truth = 0.0 if draws is centred else covariance
            assert ((draws.mean(0) - truth).abs() < 4 * draws.std(0) / 200).all()


def test_the_hierarchical_density_is_the_product(generator):
    def second(z1):
        return DiagonalGaussian(2 * z1[..., :2], torch.zeros_like(z1[..., :2]) - 0.3)

    q = HierarchicalGaussian(
        DiagonalGaussian(randn(4, 3, generator=generator), randn(4, 3, generator=generator)), (second,)
    )
    z1, z2 = q.sample(q.noise(5, generator))
    assert z1.shape == (5, 4, 3) and z2.shape == (5, 4, 2)
    expected = Independent(Normal(q.first.mean, q.first.log_std.exp()), 1).log_prob(z1)
    expected = expected + Independent(Normal(2 * z1[..., :2], 0.7408182206817179), 1).log_prob(z2)
    torch.testing.assert_close(q.log_prob((z1, z2)), expected)


def test_what_is_above_the_diagonal_of_a_scale_does_not_count(generator):
    mean, scale = randn(4, 3, generator=generator), randn(4, 3, 3, generator=generator)
    scale.diagonal(dim1=-2, dim2=-1).abs_().add_(0.2)
    q, clean = FullGaussian(mean, scale.requires_grad_()), FullGaussian(mean, scale.detach().tril())
    eps, weight = q.noise(5, generator), randn(2, 3, generator=generator)
    z = clean.sample(eps)
    for ask in (
        lambda q: q.sample(eps),
        lambda q: q.log_prob(z),
        lambda q: q.log_prob_of_sample(z, eps),
        lambda q: q.sample_and_log_prob(eps)[1],
        lambda q: q.entropy(),
        lambda q: q.kl(),
        lambda q: torch.cat(q.linear_moments(weight)),
    ):
        torch.testing.assert_close(ask(q), ask(clean))
        (slope,) = torch.autograd.grad(ask(q).sum(), scale)
        assert slope.triu(1).abs().max() == 0 and slope.abs().max() > 0


# --- narrow posteriors ------------------------------------------------------------------------------------------------


def narrow_gaussians(mean, log_std):
    """Diagonal and full, in float32, of eight dimensions."""
    means, log_stds = torch.full((1, 8), mean), torch.full((1, 8), log_std)
    yield DiagonalGaussian(means, log_stds)
    tril = torch.eye(8) + 0.3 * torch.ones(8, 8).tril(-1)
    yield FullGaussian(means, math.exp(log_std) * tril)


def conditioned():
    """A full Gaussian whose covariance has the condition number 1e6."""
    g = torch.Generator().manual_seed(0)
    return FullGaussian(
        torch.ones(1, 8), torch.tril(0.1 * torch.randn(8, 8, generator=g), -1) + torch.diag(torch.logspace(0, -3, 8))
    )


class Narrow(nn.Module):
    """q(z2 | z1), as narrow as what is below it."""

    def __init__(self, log_std):
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(log_std))

    def forward(self, z):
        return DiagonalGaussian(z + 1, self.log_std.expand_as(z))


NARROW = {
    **{
        f"{type(q).__name__} mean {mean:g} log_std {log_std:g}": q
        for mean, log_std in ((1.0, -8.0), (1.0, -12.0), (1.0, -20.0), (100.0, -8.0))
        for q in narrow_gaussians(mean, log_std)
    },
    "full, condition 1e6": conditioned(),
    "hierarchy": HierarchicalGaussian(next(narrow_gaussians(1.0, -12.0)), (Narrow(-12.0), Narrow(-15.0))),
    "mixture of one place": Mixture(tuple(next(narrow_gaussians(1.0, s)) for s in (-12.0, -12.3)), torch.zeros(2, 1)),
    "mixture of full": Mixture(tuple([*narrow_gaussians(1.0, s)][1] for s in (-14.0, -14.1)), torch.ones(2, 1)),
    "mixture of two kinds": Mixture(tuple(narrow_gaussians(1.0, -13.0)), torch.zeros(2, 1)),
    "mixture of neighbours": Mixture(
        tuple(DiagonalGaussian(torch.full((1, 8), 1 + d), torch.full((1, 8), -14.0)) for d in (0.0, 2**-21)),
        torch.zeros(2, 1),
    ),
}


@pytest.mark.parametrize("name", NARROW)
def test_log_q_of_its_own_sample_is_exact_where_q_is_narrow(name):
    """Float32 against float64, where the digits last; sampling and then asking for log q is nats off."""
    q = NARROW[name]
    eps = q.noise(40, torch.Generator().manual_seed(0))
    precise = q.map_parameters(torch.Tensor.double)
    if isinstance(q, HierarchicalGaussian):
        precise = HierarchicalGaussian(precise.first, tuple(copy.deepcopy(layer).double() for layer in q.above))
    eps64 = map_latent(torch.Tensor.double, eps)
    truth = precise.log_prob(precise.sample(eps64)).float()
    z, log_q = q.sample_and_log_prob(eps)
    torch.testing.assert_close(log_q, truth, rtol=1e-5, atol=1e-3)
    for still in (q, q.stop_gradient()):
        torch.testing.assert_close(still.log_prob_of_sample(z, eps), truth, rtol=1e-5, atol=1e-3)


def test_inverting_a_narrow_posterior_is_off():
    """The negative control of the test above."""
    q = NARROW["DiagonalGaussian mean 1 log_std -20"]
    z, log_q = q.sample_and_log_prob(q.noise(40, torch.Generator().manual_seed(0)))
    assert (q.log_prob(z) - log_q).abs().max() > 1


@pytest.mark.parametrize("one_pass", [False, True], ids=["inverted", "one-pass"])
def test_a_flow_with_a_narrow_start_knows_log_q_of_its_sample(one_pass):
    layers = Leaves(torch.float32).flow(*couplings()).layers
    q = Flow(DiagonalGaussian(torch.ones(BATCH, 2), torch.full((BATCH, 2), -18.0)), layers)
    eps = q.noise(40, torch.Generator().manual_seed(0))
    precise = Flow(q.base.map_parameters(torch.Tensor.double), copy.deepcopy(layers).double())
    truth = precise.sample_and_log_prob(eps.double())[1].float()
    posterior = OnePassFlow(q) if one_pass else q
    z, log_q = posterior.sample_and_log_prob(eps)
    torch.testing.assert_close(log_q, truth, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(posterior.stop_gradient().log_prob_of_sample(z, eps), truth, rtol=1e-5, atol=1e-3)


def test_every_row_reports_the_bound_where_q_is_narrow():
    """With p = q, log w is 0 whatever z is: the value of every row, and so it would be nats off."""
    for q in (NARROW["DiagonalGaussian mean 1 log_std -20"], NARROW["mixture of one place"]):
        eps = q.noise(4, torch.Generator().manual_seed(0))
        log_q = q.sample_and_log_prob(eps)[1]
        for row in TABLEAU.values():
            if isinstance(q, Mixture) and not row.whole:
                continue
            loss = row.loss(
                lambda x, z: log_q, q.map_parameters(lambda p: p.clone().requires_grad_()), torch.ones(1, 1), eps
            )
            torch.testing.assert_close(loss, torch.zeros(1), rtol=0, atol=1e-3, msg=lambda m: f"{row.name}: {m}")


# --- logits of -inf, weights of 0 -------------------------------------------------------------------------------------


def test_what_is_ruled_out_has_no_entropy_and_no_nan():
    """The value, and a gradient that is finite and 0 in the class that is ruled out."""
    third = OneHotCategorical(torch.tensor([[[0.0, 0.0, -INF]]]).requires_grad_())
    bits = FactorisedBernoulli(torch.tensor([[INF, -INF, 0.0]]).requires_grad_())
    prior = OneHotCategorical(torch.tensor([[0.0, 0.0, -INF]]))
    sure = FactorisedBernoulli(torch.tensor([INF, -INF, 1.0]))
    log_2 = math.log(2)
    for value, truth, logits in (
        (third.log_prob(torch.tensor([[[1.0, 0.0, 0.0]]])), -log_2, third.logits),
        (third.log_prob(torch.tensor([[[0.0, 0.0, 1.0]]])), -INF, None),
        (third.entropy(), log_2, third.logits),
        (third.kl(), math.log(1.5), third.logits),
        (third.kl(prior), 0.0, third.logits),
        (OneHotCategorical(torch.zeros(1, 1, 3)).kl(prior), INF, None),
        (bits.log_prob(torch.tensor([[[1.0, 0.0, 1.0]]])), -log_2, bits.logits),
        (bits.log_prob(torch.tensor([[[0.0, 0.0, 1.0]]])), -INF, None),
        (bits.entropy(), log_2, bits.logits),
        (bits.kl(), 2 * log_2, bits.logits),
        (
            bits.kl(sure),
            -log_2 - 0.5 * (math.log(torch.tensor(1.0).sigmoid()) + math.log(torch.tensor(-1.0).sigmoid())),
            bits.logits,
        ),
    ):
        torch.testing.assert_close(value.squeeze(), torch.tensor(truth))
        if logits is not None:
            assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


PATHLESS = [name for name, e in ESTIMATORS.items() if not getattr(e, "reparameterised", name == "elbo-silent")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "bits") for name in PATHLESS]
    + [(name, "choices") for name in PATHLESS if name not in ("elbo-arm", "elbo-disarm")],
)
def test_every_estimator_learns_with_a_logit_of_minus_infinity(name, kind):
    """Values and gradients are those of the posterior without the class that is ruled out (the bits that are sure)."""
    estimator, x = ESTIMATORS[name], torch.ones(2, 3)
    if kind == "bits":
        logits = torch.tensor([[0.3, INF, -INF], [-0.2, -INF, INF]])
    else:
        logits = torch.tensor([[[0.3, 0.1, -INF]], [[-INF, 0.4, 0.2]]])
    logits.requires_grad_()
    q = as_posterior(FactorisedBernoulli(logits) if kind == "bits" else OneHotCategorical(logits))
    if name in ("elbo-gumbel-softmax", "elbo-straight-through"):
        decode = models.LinearDecoder(torch.rand(3, 3), torch.zeros(3), torch.zeros(()))
        joint = models.DiscreteJoint(decode, torch.zeros(3) if kind == "bits" else torch.zeros(1, 3))
    else:
        weight = nn.Parameter(torch.tensor([0.5, -0.3, 0.2]))
        joint = lambda x, z: (z * weight).sum(-1) * x[:, 0]  # noqa: E731
    eps = q.noise(5, torch.Generator().manual_seed(0))
    loss = objectives.loss(estimator, joint, q, x, eps=eps)
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all() and slope.isfinite().all()
    assert (slope[logits.isinf()] == 0).all() and slope.abs().max() > 0


def test_a_conditional_entropy_with_a_class_ruled_out_is_the_sum_over_the_others():
    logits = torch.tensor([[[0.3, -0.7, -INF, 1.1]]], dtype=DTYPE)
    few = torch.tensor([[[0.3, -0.7, 1.1]]], dtype=DTYPE)
    torch.testing.assert_close(
        OneHotCategorical(logits).entropy(), distributions.OneHotCategorical(logits=few).entropy()[:, 0]
    )
    joint = lambda x, z: (z[..., [0, 1, 3]] * torch.tensor([0.5, -0.3, 0.2], dtype=DTYPE)).sum(-1)  # noqa: E731
    small = lambda x, z: (z * torch.tensor([0.5, -0.3, 0.2], dtype=DTYPE)).sum(-1)  # noqa: E731
    x = torch.ones(1, 1, dtype=DTYPE)
    torch.testing.assert_close(
        discrete.exact_elbo(joint, x, OneHotCategorical(logits)), discrete.exact_elbo(small, x, OneHotCategorical(few))
    )


# --- posteriors of others ---------------------------------------------------------------------------------------------


def test_the_families_of_torch_keep_their_densities():
    for name, make in POSTERIORS.items():
        if not name.startswith("torch"):
            continue
        reference = make(Leaves())
        q = as_posterior(reference)
        z = q.sample(q.noise(6))
        log_p = reference.log_prob(z)
        while log_p.ndim > 2:  # Normal and Bernoulli leave the coordinates apart
            log_p = log_p.sum(-1)
        torch.testing.assert_close(q.log_prob(z), log_p, msg=lambda m: f"{name}: {m}")
        mean = reference.mean.reshape(BATCH, -1)
        torch.testing.assert_close(q.mean, mean)


@pytest.mark.parametrize(
    ("q", "sentence"),
    [
        (distributions.Laplace(torch.zeros(3, 2), 1.0), "torch.distributions.Laplace has no counterpart"),
        (distributions.StudentT(torch.ones(3, 2)), "StudentT has no counterpart"),
        (distributions.Independent(distributions.Gamma(torch.ones(3, 2), 1.0), 1), "Gamma has no counterpart"),
        (distributions.LogNormal(torch.zeros(3, 2), 1.0), "LogNormal has no counterpart"),
        (distributions.RelaxedBernoulli(torch.tensor(0.5), torch.zeros(3, 2)), "RelaxedBernoulli has no counterpart"),
        (
            distributions.MixtureSameFamily(
                distributions.Categorical(torch.ones(3, 2)),
                distributions.Independent(distributions.Laplace(torch.zeros(3, 2, 2), 1.0), 1),
            ),
            "LowRankMultivariateNormal, not Laplace",
        ),
        (distributions.Normal(torch.zeros(2), 1.0), r"2 axes, but one has the shape \[2\]"),
        (distributions.Normal(torch.zeros(4, 3, 2), 1.0), r"but one has the shape \[4, 3, 2\]"),
        (
            distributions.MixtureSameFamily(
                distributions.Categorical(torch.ones(3, 2)), distributions.Normal(torch.zeros(3, 2), 1.0)
            ),
            r"event shape \[\]: wrap them as Independent",
        ),
        (zuko.flows.MAF(2, 3), "q is zuko's MAF itself: call it"),
        (zuko.flows.MAF(2)(), r"the shape \[2\] and not \[B, D\]: give it a context"),
        (zuko.flows.NCSF(2, 3)(torch.zeros(3, 3)), "must start from a Gaussian, but this one's base is a Uniform"),
        (zuko.flows.CNF(2, 3)(torch.zeros(3, 3)), r"a continuous flow of zuko \(CNF\) cannot be held constant"),
        (torch.zeros(3, 2), "is a Tensor, which has no noise and no sample"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), "is a tuple"),
        (None, "is a NoneType"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_no_posterior_is_refused_by_name(q, sentence):
    with pytest.raises(InputError, match=sentence):
        as_posterior(q)
    with pytest.raises(InputError, match=sentence):
        objectives.loss("elbo-path", lambda x, z: -z.square().sum(-1), q, torch.zeros(3, 1))


class Duck:
    """A posterior that inherits nothing: noise, sample, log_prob and stop_gradient, as an outsider might write it."""

    def __init__(self, mean, log_std):
        self.mean, self.log_std = mean, log_std

    def noise(self, k, generator=None):
        return torch.randn(k, *self.mean.shape, generator=generator, dtype=self.mean.dtype)

    def sample(self, eps):
        return self.mean + self.log_std.exp() * eps

    def log_prob(self, z):
        return Normal(self.mean, self.log_std.exp()).log_prob(z).sum(-1)

    def stop_gradient(self):
        return type(self)(self.mean.detach(), self.log_std.detach())


def test_an_outsider_with_four_methods_is_enough_for_every_row():
    joint, x = Target(), torch.ones(BATCH, 1, dtype=DTYPE)
    checks.contract(Duck(torch.zeros(BATCH, 2, dtype=DTYPE), torch.ones(BATCH, 2, dtype=DTYPE)))
    for row in TABLEAU.values():
        results = []
        for family in (Duck, DiagonalGaussian):
            leaf = Leaves()
            q = family(leaf(BATCH, 2), leaf(BATCH, 2))
            loss = objectives.loss(row, joint, q, x, k=4, generator=torch.Generator().manual_seed(0))
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), [joint.theta, *leaf.parameters])))
        torch.testing.assert_close(*results, msg=lambda m: f"{row.name}: {m}")


def test_an_outsider_whose_stop_does_not_stop_is_refused():
    class Running(Duck):
        def stop_gradient(self):
            return self

    leaf = Leaves()
    with pytest.raises(InputError, match="leaves this Running a way to its parameters"):
        objectives.loss(
            "elbo-path", Target(), Running(leaf(BATCH, 2), leaf(BATCH, 2)), torch.ones(BATCH, 1, dtype=DTYPE)
        )


def test_a_posterior_of_your_own_needs_three_methods():
    @dataclass(frozen=True)
    class Cauchy(Posterior):
        scale: torch.Tensor

        def noise_like(self, k):
            return DiagonalGaussian(self.scale, self.scale).noise_like(k)

        def sample(self, eps):
            return self.scale * torch.tan(math.pi * (Normal(0.0, 1.0).cdf(eps) - 0.5))

        def log_prob(self, z):
            return distributions.Cauchy(0.0, self.scale).log_prob(z).sum(-1)

    checks.contract(Cauchy(torch.full((BATCH, 2), 0.7, dtype=DTYPE)))

    class Nameless(Posterior):
        pass

    with pytest.raises(InputError, match="Nameless does not say which numbers it is made of"):
        Nameless().stop_gradient()


@dataclass(frozen=True)
class Exponential(Posterior):
    """A density with an edge at 0, where the mean of its derivative in z is not 0; ``off`` makes it another one."""

    scale: torch.Tensor
    off: ClassVar[float] = 1.0

    def noise_like(self, k):
        return Noise.like("uniform", k, self.scale)

    def sample(self, eps):
        return -self.scale * eps.log()

    def log_prob(self, z):
        scale = self.off * self.scale
        return (-scale.log() - z / scale).sum(-1)


class TwiceTheMean(Exponential):
    off = 2.0


class Folded(DiagonalGaussian):
    """Two values of the noise meet in one z, and the density is that of one of them."""

    def sample(self, eps):
        return self.log_std.exp() * eps.abs()

    def log_prob(self, z):
        return Normal(torch.zeros_like(self.mean), self.log_std.exp()).log_prob(z).sum(-1)

    log_prob_of_sample, sample_and_log_prob = Posterior.log_prob_of_sample, Posterior.sample_and_log_prob


def test_a_density_that_ends_at_an_edge_is_held_to_its_noise():
    scale = torch.tensor([[0.7, 1.5], [2.0, 0.1]], dtype=DTYPE)
    checks.contract(Exponential(scale))
    for wrong in (TwiceTheMean(scale), Folded(scale, scale.log())):
        with pytest.raises(AssertionError, match="log_prob is not"):
            checks.contract(wrong)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda q: Mixture((q, q), torch.zeros(2, 3)),
            "a Mixture is made of posteriors .* it is a Normal",
        ),
        (lambda q: HierarchicalGaussian(q, ()), "a HierarchicalGaussian is made of posteriors .* is a Normal"),
        (lambda q: HierarchicalGaussian(as_posterior(q), nn.Identity()), "must be a tuple, .* but are a Identity"),
        (
            lambda q: HierarchicalGaussian(as_posterior(q), (lambda z: distributions.Normal(z, 1.0),)).noise(2),
            "but a part of it is a Normal: give posteriors.as_posterior",
        ),
        (
            lambda q: Mixture((Flow(as_posterior(q), nn.ModuleList()),), torch.zeros(1, 3)),
            "must have a mean .*, but a Flow has none",
        ),
        (
            lambda q: as_posterior(type("My", (distributions.Normal,), {})(q.loc, q.scale)),
            "My, a subclass of Normal",
        ),
    ],
)
def test_what_no_posterior_can_be_made_of_is_told(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build(distributions.Normal(torch.zeros(3, 2), 1.0))


@pytest.mark.parametrize(
    ("method", "function", "sentence"),
    [
        ("noise_like", lambda q, k: [DiagonalGaussian.noise_like(q, k)], "noise_like.* but returns a list"),
        ("sample", lambda q, eps: [q.mean + eps], r"sample\(eps\) of a Mine must be a tensor .* but is a list"),
        ("log_prob", lambda q, z: 0.5, r"log_prob\(z\) of a Mine must be a tensor .* but is a float"),
    ],
)
def test_what_a_method_returns_instead_of_tensors_is_told(method, function, sentence):
    q = type("Mine", (DiagonalGaussian,), {method: function})(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(InputError, match=sentence):
        objectives.loss("elbo-path", lambda x, z: -z.square().sum(-1), q, torch.zeros(3, 1))


def exact_moments(q, weight):
    """Return mean and variance of W z from the covariance of z: of Gaussians by torch, of classes by enumeration."""
    if isinstance(q, Mixture):  # the law of total variance
        shares = q.logits.softmax(0).unsqueeze(-1)
        means, variances = map(torch.stack, zip(*(exact_moments(part, weight) for part in q.components), strict=True))
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + means.square())).sum(0) - mean.square()
    scale = torch.diag_embed(q.log_std.exp()) if isinstance(q, DiagonalGaussian) else q.scale_tril.tril()
    covariance = MultivariateNormal(q.mean, scale_tril=scale.expand(*q.mean.shape, -1)).covariance_matrix
    return q.mean @ weight.mT, torch.einsum("xd,bde,xe->bx", weight, covariance, weight)


def test_moments_of_linear_functions_are_those_of_the_covariance(diagonal, full, generator):
    """Of a mixture too, whose components must have moments that differ."""
    (diagonal, _), (full, _) = diagonal, full
    weight = torch.randn(5, 3, generator=generator).double()
    mixture = Mixture((full, DiagonalGaussian(full.mean + 1, 0.3 * full.mean)), torch.randn(2, len(full.mean)).double())
    for q in (diagonal, full, mixture):
        for found, expected in zip(q.linear_moments(weight), exact_moments(q, weight), strict=True):
            torch.testing.assert_close(found.double(), expected.double())


def test_the_stopped_gaussian_has_the_same_density():
    q = DiagonalGaussian(torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True))
    z = q.sample(q.noise(4)).detach().requires_grad_()
    torch.testing.assert_close(q.stop_gradient().log_prob(z), q.log_prob(z))
    q.stop_gradient().log_prob(z).sum().backward()
    assert q.mean.grad is None and z.grad is not None


@pytest.mark.parametrize("name", ["mlp-1", "mlp-2", "mlp-4"])
def test_the_layers_of_a_hierarchy_are_centred_where_a_sample_without_noise_is(name, generator):
    encoder = models.build(name, 6, generator=generator, hidden=5, latent=8).double().encoder
    q = encoder(randn(3, 6, generator=generator))
    still = q.sample(map_latent(torch.zeros_like, q.noise(1, generator)))
    torch.testing.assert_close(q.means(), tuple(layer[0] for layer in layers_of(still)))


def test_the_density_of_a_mixture_moves_if_one_component_s_does(generator):
    fixed = DiagonalGaussian(randn(2, 3, generator=generator), randn(2, 3, generator=generator))
    moving = fixed.map_parameters(lambda p: p.clone().requires_grad_())
    logits = randn(2, 2, generator=generator).requires_grad_()
    for components, moves in (((fixed, moving), True), ((moving, fixed), True), ((fixed, fixed), False)):
        q = Mixture(components, logits)
        eps = q.noise(2, generator)
        assert q.density_moves(q.sample(eps).detach(), eps) is moves


@pytest.mark.parametrize("shape", [(), (2,), (1, 2), (4, 1), (4, 2)])
def test_a_scale_that_is_shared_has_coordinates_of_each_observation(shape):
    """Or what is measured an observation at a time would take its dimensions for observations."""
    q = DiagonalGaussian(torch.zeros(4, 2), torch.rand(shape))
    seen = []
    same = q.map_parameters(lambda p: seen.append(p.shape) or p)
    assert seen == [(4, 2), (4, 2)]
    z = torch.randn(3, 4, 2)
    assert torch.equal(same.log_prob(z), q.log_prob(z)) and torch.equal(q.stop_gradient().log_prob(z), q.log_prob(z))


@dataclass(frozen=True)
class StudentT(DiagonalGaussian):
    """Somebody's density, on the samples of a Gaussian."""

    def log_prob(self, z):
        return distributions.StudentT(3.0, self.mean, self.log_std.exp()).log_prob(z).sum(-1)


def test_a_mixture_of_somebodys_gaussians_has_their_density():
    mean = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    q = Mixture((StudentT(mean, 0 * mean), StudentT(mean + 1, 0 * mean)), torch.zeros(2, 3).double())
    eps = q.noise(4, torch.Generator().manual_seed(1))
    z = q.sample(eps)
    torch.testing.assert_close(q.log_prob_of_sample(z, eps), q.log_prob(z))
