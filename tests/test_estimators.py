"""The tableau as a table: shapes, sums, edges; the contract. What rows estimate: test_objectives.py."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import DTYPE, TWO_LAYERS, ChainEncoder, ChainJoint

from vaelib import checks, estimators, gdreg, models, silent
from vaelib.errors import InputError, choose
from vaelib.estimators import ALIASES, ESTIMATORS, TABLEAU, LossEstimator, Row, Weights
from vaelib.posteriors import DiagonalGaussian, FactorisedBernoulli, HierarchicalGaussian
from vaelib.posteriors.base import tracing

LOG_W = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.1]], dtype=torch.float64)
ROWS = pytest.mark.parametrize("estimator", TABLEAU.values(), ids=lambda e: e.name)


def test_the_kept_names_are_all_there():
    assert list(TABLEAU) == [
        "elbo-score", "elbo-score-loo", "elbo-total", "elbo-path", "iwae-score", "iwae-vimco", "iwae-total",
        "iwae-path", "iwae-dreg", "rws", "rws-dreg",
    ]  # fmt: skip
    assert list(ESTIMATORS) == [
        *TABLEAU, "elbo-arm", "elbo-disarm", "elbo-gumbel-softmax", "elbo-straight-through", "elbo-silent",
        "elbo-exact",
    ]  # fmt: skip
    assert all(e.name == name and e.summary and e.reference for name, e in ESTIMATORS.items())


@ROWS
def test_the_theta_weights_average_and_all_shapes_agree(estimator):
    weights = estimator.weights(LOG_W)
    assert all(w.shape == LOG_W.shape for w in weights)
    torch.testing.assert_close(weights.theta.sum(0), torch.ones(2, dtype=torch.float64))
    assert estimator.reparameterised == bool(weights.path.any())


@ROWS
@given(shift=st.floats(-1e3, 1e3))
def test_a_constant_in_log_w_changes_nothing_but_plain_score_rows(estimator, shift):
    """The constant log p(x) must not matter; the two rows without a baseline are the ones where it does."""
    moved, still = estimator.weights(LOG_W + shift), estimator.weights(LOG_W)
    invariant = all(torch.allclose(a, b, atol=1e-9) for a, b in zip(moved, still))
    assert invariant or estimator.name in ("elbo-score", "iwae-score")


def test_the_rows_as_printed_in_the_book():
    w, log_mean = LOG_W.softmax(0), LOG_W.logsumexp(0) - math.log(3)
    third = torch.full_like(LOG_W, 1 / 3)
    others = torch.stack([(LOG_W.sum(0) - LOG_W[k]) / 2 for k in range(3)])
    without = []
    for k in range(3):
        replaced = LOG_W.clone()
        replaced[k] = others[k]
        without.append(replaced.logsumexp(0) - math.log(3))
    zero = torch.zeros_like(LOG_W)
    table = {
        "elbo-score": (third, zero, LOG_W / 3),
        "elbo-score-loo": (third, zero, (LOG_W - others) / 3),
        "elbo-total": (third, third, -third),
        "elbo-path": (third, third, zero),
        "iwae-score": (w, zero, log_mean - w),
        "iwae-vimco": (w, zero, log_mean - torch.stack(without) - w),
        "iwae-total": (w, w, -w),
        "iwae-path": (w, w, zero),
        "iwae-dreg": (w, w**2, zero),
        "rws": (w, zero, w),
        "rws-dreg": (w, w - w**2, zero),
    }
    for name, expected in table.items():
        for channel, mine, truth in zip("abc", TABLEAU[name].weights(LOG_W), expected):
            torch.testing.assert_close(mine, truth, msg=lambda m: f"{name}, {channel}: {m}")


def test_too_few_draws_are_refused():
    with pytest.raises(InputError, match="'iwae-vimco' needs k >= 2 draws, but k is 1"):
        TABLEAU["iwae-vimco"].weights(LOG_W[:1])


def test_a_name_is_found_by_what_the_field_calls_it():
    for alias, name in ALIASES.items():
        assert estimators.get(alias) is estimators.get(alias.upper().replace("-", "_")) is ESTIMATORS[name]
    row = estimators.elbo_scaled(0.5)
    assert estimators.get(row) is row and estimators.get("Elbo-Path") is TABLEAU["elbo-path"]


def test_a_mistyped_name_gets_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'elbo-path'"):
        choose("estimator", "elbo-pth", TABLEAU)
    for name in ("zzz", None, 3, ["elbo-path"]):
        with pytest.raises(InputError, match="choose from: elbo-score, "):
            estimators.get(name)


# --- the contract -----------------------------------------------------------------------------------------------------


BESIDE = [
    estimators.elbo_scaled(0.3),
    silent.annealed(TABLEAU["elbo-path"], 0.4),
    silent.annealed(TABLEAU["elbo-score-loo"], 0.0),
    silent.controlled(TABLEAU["elbo-path"], 0.7),
    silent.controlled(TABLEAU["elbo-total"], 0.7, silent.taylor_control),
    gdreg.gdreg(TABLEAU["elbo-path"]),
    gdreg.gdreg(TABLEAU["iwae-dreg"]),
]


@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), *BESIDE], ids=lambda e: e.name)
def test_every_estimator_keeps_the_contract(estimator, capsys):
    checks.contract(estimator)
    assert capsys.readouterr().out == f"ok: {estimator.name} keeps the contract of an estimator\n"


@pytest.mark.parametrize("name", [name for name, row in TABLEAU.items()])
def test_every_row_keeps_the_contract_with_two_layers(name):
    x = TWO_LAYERS[3].expand(3, -1)
    checks.contract(TABLEAU[name], ChainJoint(1.2), ChainEncoder()(x), x)


@pytest.mark.parametrize("name", [name for name, row in TABLEAU.items() if row.whole])
def test_every_whole_row_keeps_the_contract_with_a_mixture(name):
    model = models.build("mlp-1-mixture", 4, generator=torch.Generator().manual_seed(0), hidden=4, latent=2).double()
    x = torch.ones(2, 4, dtype=DTYPE)
    checks.contract(TABLEAU[name], model.joint, model.encoder(x), x)


def lost(loss):
    """An estimator given by a loss like that of elbo-path, but for the fault."""
    return LossEstimator("mine", "elbo", "elbo", 1, "", loss)


def path(joint, q, x, eps):
    z = q.sample(eps)
    return -(joint(x, z) - q.stop_gradient().log_prob(z)).mean(0)


def score_kept_twice(joint, q, x, eps):
    score = q.log_prob(q.sample(eps).detach())
    return path(joint, q, x, eps) + 2 * (score - score.detach()).mean(0)


def slip(log_w):
    """A sign slip in the score of iwae-total."""
    w = log_w.softmax(0)
    return Weights(w, w, w)


CALLS = []
FAULTY = {
    "not unbiased for 'iwae'.*from iwae-total": replace(TABLEAU["iwae-path"], target="iwae"),
    "not unbiased for 'iwae'": Row("mine", "iwae", "iwae", 1, "", slip),
    "not unbiased for 'wake'": replace(TABLEAU["rws-dreg"], rule=TABLEAU["iwae-dreg"].rule),
    "not unbiased for 'elbo'": lost(lambda joint, q, x, eps: path(joint, q.stop_gradient(), x, eps)),
    "its gradient is off by .* from elbo-total": lost(
        lambda joint, q, x, eps: path(joint, q.map_parameters(lambda p: p.detach() + 1.05 * (p - p.detach())), x, eps)
    ),
    r"vmap.grad.loss.. is not the gradient of each draw": lost(
        lambda joint, q, x, eps: path(joint, q, x, eps) * (2.0 if tracing() else 1.0)
    ),
    "the value is not -elbo": lost(lambda joint, q, x, eps: path(joint, q, x, eps) + 0.5),
    "the value is not -iwae": replace(lost(path), bound="iwae", target=None),
    r"of the shape \[B\] = \[2\], .*, but is \[\]": lost(lambda joint, q, x, eps: path(joint, q, x, eps).mean()),
    "differs from call to call": lost(lambda joint, q, x, eps: path(joint, q, x, torch.randn_like(eps))),
    "theta gets another gradient if q is frozen": lost(
        lambda joint, q, x, eps: path(joint, q, x, eps) * (1.0 if q.mean.requires_grad else 2.0)
    ),
    "fewer than least_k = 2 draws are not refused": type("Deaf", (Row,), {"check": lambda self, k: None})(
        "mine", "elbo", "elbo", 2, "", TABLEAU["elbo-path"].rule
    ),
    "loss is not pure": lost(
        lambda joint, q, x, eps: (path(joint, q, x, eps).sum().backward(), path(joint, q, x, eps))[1]
    ),
}


@pytest.mark.parametrize("sentence", FAULTY)
def test_a_broken_estimator_is_told_what_is_broken(sentence):
    with pytest.raises(AssertionError, match=sentence):
        checks.contract(FAULTY[sentence])


def test_an_estimator_of_your_own_keeps_the_contract_if_it_is_right():
    checks.contract(lost(path))
    checks.contract(lost(score_kept_twice))  # noisy, but its mean is right: the score has none


def test_an_estimator_that_no_small_model_fits_asks_for_one():
    def picky(joint, q, x, eps):
        if not isinstance(joint, Picky):
            raise InputError("only for a Picky")
        return path(joint, q, x, eps)

    class Picky(nn.Module):
        def forward(self, x, z):
            return -0.5 * (z - x).square().sum(-1)

    with pytest.raises(
        AssertionError, match="none of the small models will do .only for a Picky.; give joint, q and x"
    ):
        checks.contract(lost(picky))
    x = torch.zeros(2, 2, dtype=DTYPE)
    checks.contract(lost(picky), Picky(), DiagonalGaussian(x, x), x)


# --- weights that are zero --------------------------------------------------------------------------------------------


INF = math.inf
HARD = {
    "one impossible": torch.tensor([[0.3], [-INF], [-0.7]]),
    "one possible": torch.tensor([[-INF], [0.2], [-INF]]),
    "all impossible": torch.full((3, 1), -INF),
    "far apart": torch.tensor([[0.0], [-1e4], [-2e4]]),
    "huge": torch.tensor([[3e37], [1e37], [2e37]]),
}


@ROWS
@pytest.mark.parametrize("case", HARD)
def test_no_weight_is_nan(estimator, case):
    log_w = HARD[case].double()
    weights, value = estimator.weights(log_w), estimator.value(log_w)
    assert not any(w.isnan().any() for w in weights) and not value.isnan().any()
    if estimator.bound == "iwae":
        possible = log_w > -INF
        expected = torch.where(possible.any(0), 1.0, 0.0).double()
        torch.testing.assert_close(weights.theta.sum(0), expected)
        assert (weights.theta[~possible] == 0).all() and all(w.isfinite().all() for w in weights)


@ROWS
@pytest.mark.parametrize("case", ["one impossible", "one possible", "all impossible"])
def test_impossible_draws_leave_no_nan_in_the_gradient(estimator, case):
    """A joint that rules some z out; the importance-weighted bounds learn from the others as if they were all."""
    mean = torch.tensor([[0.1]], dtype=DTYPE, requires_grad=True)
    theta = nn.Parameter(torch.tensor(0.5, dtype=DTYPE))
    eps = torch.tensor([[[0.3]], [[-0.4]], [[1.0]]], dtype=DTYPE)
    never = (HARD[case] == -INF).squeeze(-1)

    def joint(x, z):
        return (theta * z - z.square()).squeeze(-1).masked_fill(never.unsqueeze(-1), -INF)

    def slopes(joint, eps, q):
        loss = estimator.loss(joint, q, torch.ones(1, 1, dtype=DTYPE), eps)
        return loss, torch.autograd.grad(loss.sum(), [theta, mean], allow_unused=True)

    q = DiagonalGaussian(mean, torch.zeros_like(mean))
    loss, found = slopes(joint, eps, q)
    assert not loss.isnan().any()
    if estimator.bound == "iwae":
        assert all(g is None or g.isfinite().all() for g in found)
        assert torch.isinf(loss).all() == (case == "all impossible")
    if case == "all impossible" and estimator.bound == "iwae":
        assert all(g is None or (g == 0).all() for g in found)


@ROWS
def test_an_observation_that_is_not_a_number_is_no_concern_of_another(estimator):
    """Also beside a joint that rules some z out; its loss, and its slope in what is its own."""
    eps = torch.tensor([1.0, -1.0, 2.0], dtype=DTYPE).view(3, 1, 1).expand(3, 2, 1)

    def joint(x, z):
        log_p = -0.5 * (z.square() + (x - z).square()).sum(-1)
        return log_p.masked_fill(z[..., 0] < 0.5, -INF)

    def of_second(first):
        mean = torch.zeros(2, 1, dtype=DTYPE, requires_grad=True)
        q = DiagonalGaussian(mean, torch.zeros_like(mean))
        loss = estimator.loss(joint, q, torch.tensor([[first], [0.0]], dtype=DTYPE), eps)[1]
        return loss, torch.autograd.grad(loss, mean)[0][1]

    expected, found = of_second(0.0), of_second(math.nan)
    torch.testing.assert_close(found, expected)
    assert not any(value.isnan().any() for value in found)


def test_the_baselines_of_vimco_with_an_impossible_draw():
    """Of the impossible one it is the geometric mean of the others; theirs is 0, since it takes part in it."""
    log_w = torch.tensor([[0.0], [1.0], [-INF]], dtype=DTYPE)
    w, found = log_w.softmax(0), TABLEAU["iwae-vimco"].weights(log_w)
    without = torch.log(torch.tensor([[math.e], [1.0], [1 + math.e + math.exp(0.5)]], dtype=DTYPE) / 3)
    torch.testing.assert_close(found.score, log_w.logsumexp(0) - math.log(3) - without - w)
    torch.testing.assert_close(TABLEAU["elbo-score-loo"].weights(log_w + 1).score, torch.zeros_like(w))


# --- rows, layers and noise of other people


def truncated(log_w):
    w = log_w.softmax(0).clamp_max(0.8)
    return Weights(theta=w, path=w, score=-w)


def without_theta(log_w):
    return Weights(theta=torch.zeros_like(log_w), path=log_w.softmax(0).square(), score=None)


def above_half(log_w):
    w = log_w.softmax(0)
    return Weights(theta=torch.where(w > 0.5, w, 0.0), path=w, score=-w)


@pytest.mark.parametrize("rule", [truncated, without_theta, above_half])
def test_a_row_of_ones_own_is_what_its_weights_say(rule):
    """Weights that are the bound's for some draws only, and a path where theta has no weight."""
    row, generator = Row("mine", "iwae", None, 1, "", rule), torch.Generator().manual_seed(0)
    joint = models.LinearGaussian(
        torch.randn(4, 2, generator=generator).double(), torch.zeros(4).double(), torch.zeros(())
    )
    x, mean = torch.randn(6, 4, generator=generator).double(), torch.randn(6, 2, generator=generator).double()
    phi = mean.requires_grad_(), torch.zeros(6, 2).double().requires_grad_()
    q = DiagonalGaussian(*phi)
    eps = q.noise(5, generator)
    mine, right = (torch.autograd.grad(f(joint, q, x, eps).sum(), phi) for f in (row.loss, row.reference_loss))
    assert all(part.abs().max() > 0.1 for part in right)
    for one, other in zip(mine, right, strict=True):
        torch.testing.assert_close(one, other)


class Above(nn.Module):
    def __init__(self, bits=False):
        super().__init__()
        self.scale, self.bits = nn.Parameter(torch.ones(2).double()), bits

    def forward(self, z):
        return FactorisedBernoulli(self.scale * z) if self.bits else DiagonalGaussian(self.scale * z, 0 * z)


def beside(x, z):
    return 3 * z[0].sum(-1) - 0.5 * (z[1] - x).square().sum(-1)


@pytest.mark.parametrize("name", TABLEAU)
def test_bits_beside_a_gaussian_have_no_path(name):
    x, numbers, path = torch.randn(3, 2).double(), torch.zeros(3, 2).double(), TABLEAU[name].reparameterised
    live = numbers.clone().requires_grad_()
    for first, above, refused in (
        (FactorisedBernoulli(live), Above(), path),
        (FactorisedBernoulli(numbers), Above(), False),
        (DiagonalGaussian(numbers, numbers), Above(), False),
        (DiagonalGaussian(live, numbers), Above(), False),
        (DiagonalGaussian(live, numbers), Above(bits=True), path),
        (DiagonalGaussian(live, numbers), Above(bits=True).requires_grad_(False), False),
    ):
        q = HierarchicalGaussian(first, (above,))
        eps = q.noise(2, torch.Generator().manual_seed(0))
        if refused:
            with pytest.raises(InputError, match="needs a sample that moves with the encoder's parameters"):
                TABLEAU[name].loss(beside, q, x, eps)
        else:
            assert TABLEAU[name].loss(beside, q, x, eps).shape == (3,)


def test_noise_of_another_kind_is_refused():
    x, zero = torch.randn(3, 2).double(), torch.zeros(3, 2).double()
    bits, layers = FactorisedBernoulli(zero), HierarchicalGaussian(DiagonalGaussian(zero, zero), (Above(),))
    normal = torch.randn(5, 3, 2).double()
    for q, eps, sentence in (
        (bits, normal, r"uniform on \(0, 1\), but eps is from -"),
        (bits, 5, "must be a tensor, or a tuple of one for each stochastic layer, but is of type int"),
        (bits, [normal], "but is of type list"),
        (layers, (normal, normal[:1]), r"of the same draws and observations.*\[\[5, 3, 2\], \[1, 3, 2\]\]"),
        (layers, (normal, normal[:, :1]), "of the same draws and observations"),
    ):
        with pytest.raises(InputError, match=sentence):
            TABLEAU["elbo-score"].loss(beside, q, x, eps)
