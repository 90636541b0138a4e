"""Negative controls of chapter 2, "Score and path": each claim's check must fail where the claim is false."""

import json
import math
import sys
from pathlib import Path

import check_browser
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from toys import DTYPE, TWO_LAYERS, ChainJoint, DetachedTwoLayerEncoder, TwoLayerEncoder, TwoLayerJoint

from vaelib import checks, experiments, gradients, models, objectives, plots
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU, Row, Weights, elbo_scaled
from vaelib.posteriors import DiagonalGaussian, HierarchicalGaussian, standard_normal_log_prob

sys.path.insert(0, str(Path(__file__).parents[1] / "book" / "_tools"))
interactive = pytest.importorskip("interactive")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(*values):
    return torch.tensor([values], dtype=DTYPE)


class Target(nn.Module):
    """log p(z | x) of a diagonal Gaussian."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, z):
        return standard_normal_log_prob((z - self.mean) / self.std) - self.std.log().sum(-1)


MEAN, STD, X = numbers(1.0, -0.5), numbers(0.6, 1.4), numbers(0.0)
TARGET = Target(MEAN, STD)


def draws(row, q, count=20_000, **options):
    return gradients.draws(row, TARGET, q, X, draws=count, generator=seeded(), **options)


def at_ratio(rho, shift=0.0):
    """q with rho times the posterior's variance."""
    return DiagonalGaussian(MEAN + shift, STD.log() + 0.5 * math.log(rho))


def scaled_variance(c, q):
    """v(c) of the chapter's theorem."""
    s2 = (2 * q.log_std).exp()
    rho = s2 / STD**2
    return ((1 - rho - c) ** 2 * (1 / s2 + 2) + (q.mean - MEAN) ** 2 * s2 / STD**4).sum()


def squares(g):
    return (g - g.mean(0)).square().sum(1)


def test_total_has_variance_at_the_posterior_and_a_path_a_little_off_it_too():
    checks.no_variance(draws("elbo-path", at_ratio(1.0)), scale=1.0)
    for row, q in (("elbo-total", at_ratio(1.0)), ("elbo-path", at_ratio(1.001))):
        with pytest.raises(AssertionError, match="draws differ"):
            checks.no_variance(draws(row, q), scale=1.0)


def test_a_score_that_is_not_the_derivative_of_its_own_density_is_not_zero_on_average():
    q = at_ratio(0.7)
    score = draws("elbo-path", q) - draws("elbo-total", q)
    checks.unbiased(score, 0.0)
    with pytest.raises(AssertionError, match="standard errors"):
        checks.unbiased(score + 0.05, 0.0)


@pytest.mark.parametrize("rho", [0.3, 0.7, 2.0])
def test_the_theorem_on_the_scaled_score_and_a_wrong_theorem(rho):
    q = at_ratio(rho, 0.3)
    for c in (0.0, 0.4, 1.0):
        g = squares(draws(elbo_scaled(c), q))
        checks.unbiased(g, scaled_variance(c, q))
        with pytest.raises(AssertionError, match="standard errors"):
            checks.unbiased(g, scaled_variance(1 - c, q) if c != 0.4 else 1.1 * scaled_variance(c, q))


def test_the_border_is_at_half_the_variance():
    """The order turns between 0.4 and 0.6, and the check of one order refuses the other."""
    for rho, low, high in ((0.4, "elbo-total", "elbo-path"), (0.6, "elbo-path", "elbo-total")):
        quiet, noisy = (draws(name, at_ratio(rho)) for name in (low, high))
        checks.less_variance(quiet, noisy)
        with pytest.raises(AssertionError):
            checks.less_variance(noisy, quiet)
    with pytest.raises(AssertionError):  # on the border neither wins
        checks.less_variance(draws("elbo-path", at_ratio(0.5)), draws("elbo-total", at_ratio(0.5)))


def test_positive_correlation_alone_does_not_make_the_path_worse():
    for rho, positive in ((0.75, True), (1.5, False)):
        path, total = (draws(name, at_ratio(rho)) for name in ("elbo-path", "elbo-total"))
        product = ((path - path.mean(0)) * (path - total)).sum(1)
        assert (product.mean() > 0) == positive
        checks.less_variance(path, total)


def test_the_estimated_scale_is_biased_and_a_fixed_one_is_not():
    q = at_ratio(0.4, 0.5)
    path, total = (draws(name, q, 80_000).unflatten(0, (20_000, 4)) for name in ("elbo-path", "elbo-total"))
    s = path - total
    a, b = path - path.mean(1, keepdim=True), s - s.mean(1, keepdim=True)
    c = (a * b).sum((1, 2), keepdim=True) / (b * b).sum((1, 2), keepdim=True)
    truth = torch.cat([(MEAN - q.mean) / STD**2, 1 - (2 * q.log_std).exp() / STD**2], 1)[0]
    checks.biased((path - c * s).mean(1), truth)
    with pytest.raises(AssertionError):
        checks.biased((path - 0.6 * s).mean(1), truth)


def test_a_schedule_that_ends_before_the_score_is_gone_does_not_land():
    """Annealed to 0 the distance vanishes; annealed to 0.3 it stops at a floor."""
    ends = {}
    for last in (0.0, 0.3):
        q = at_ratio(0.05, 0.5)
        mean, log_std = (nn.Parameter(v.clone()) for v in (q.mean, q.log_std))
        generator, optimizer = seeded(), torch.optim.SGD([mean, log_std], 0.05)
        for step in range(1500):
            row = elbo_scaled(max(last, 1 - step / 100))
            optimizer.zero_grad()
            eps = torch.randn(1, 1, 2, generator=generator, dtype=DTYPE)
            objectives.backward(row, TARGET, DiagonalGaussian(mean, log_std), X, eps)
            optimizer.step()
        ends[last] = ((mean - MEAN) ** 2 + (log_std - STD.log()) ** 2).sum().item()
    assert ends[0.0] < 1e-16 and ends[0.3] > 1e-6


def one_pass(row, q, eps, scale=lambda a, b: b / a, still=torch.Tensor.detach, taken=torch.Tensor.detach):
    """The chapter's loss of a row; ``scale``, ``still`` and ``taken`` are where one can slip."""
    z = q.sample(eps)
    log_w = TARGET(X, z) - q.stop_gradient().log_prob(z)
    a, b, c = row.weights(log_w.detach())
    z.register_hook(lambda slope: scale(a, b).unsqueeze(-1) * slope)
    score = (c * q.log_prob(still(z))).sum(0)
    return -(row.value(log_w) + score - taken(score))


def test_a_row_is_a_loss_in_one_pass_and_each_slip_shows():
    own = [value.clone().requires_grad_() for value in (MEAN + 0.3, STD.log() - 0.4)]
    q = DiagonalGaussian(*own)
    eps = q.noise(3, seeded())
    log_w = TARGET(X, q.sample(eps)) - q.log_prob(q.sample(eps))

    def slopes(loss):
        return torch.cat(torch.autograd.grad(loss.sum(), own), -1)

    for row in TABLEAU.values():
        truth = slopes(objectives.reference(row, TARGET, q, X, eps))
        checks.same(slopes(row.loss(TARGET, q, X, eps)), truth)
        checks.same(slopes(one_pass(row, q, eps)), truth)
        checks.same(row.loss(TARGET, q, X, eps), -row.value(log_w))
        a, b, c = row.weights(log_w.detach())
        if not torch.equal(a, b):
            with pytest.raises(AssertionError):
                checks.same(slopes(one_pass(row, q, eps, scale=lambda a, b: torch.ones_like(a))), truth)
        if c.any() and b.any():  # without a path, the hook stops what would come through a live sample
            with pytest.raises(AssertionError):
                checks.same(slopes(one_pass(row, q, eps, still=lambda z: z)), truth)
        if c.any():
            with pytest.raises(AssertionError):
                checks.same(one_pass(row, q, eps, taken=torch.zeros_like), -row.value(log_w))


def test_a_posterior_that_is_detached_unawares_is_refused():
    class Unaware(DetachedTwoLayerEncoder.posterior):
        detaches = False

    class UnawareEncoder(DetachedTwoLayerEncoder):
        posterior = Unaware

    with pytest.raises(InputError, match="another function of z"):
        gradients.draws("elbo-path", TwoLayerJoint(), UnawareEncoder.exact(), TWO_LAYERS[3], draws=2)


def test_detached_outputs_fail_the_checks_that_stopped_parameters_pass():
    joint, x = TwoLayerJoint(), TWO_LAYERS[3]
    for encoder, right in ((TwoLayerEncoder.exact(), True), (DetachedTwoLayerEncoder.exact(), False)):
        g = gradients.draws("elbo-path", joint, encoder, x, draws=5000, generator=seeded())[:, 0]
        if right:
            checks.no_variance(g, scale=1.0)
        else:
            with pytest.raises(AssertionError):
                checks.no_variance(g, scale=1.0)
            checks.unbiased(g**2, 0.5)
            with pytest.raises(AssertionError):
                checks.unbiased(g**2, 1.5)  # the total gradient's


def exact_chain(depth, kind):
    """The exact posterior of a :class:`ChainJoint` at x = 1; layer l has the prior variance depth + 1 - l."""

    def link(below):  # from prior variance `below` to one less
        slope = (below - 1) / below
        return lambda z: DiagonalGaussian(slope * z, 0.5 * math.log(slope) + 0 * z)

    s2 = depth / (depth + 1)
    first = DiagonalGaussian(numbers(s2), numbers(0.5 * math.log(s2)))
    return kind(first, tuple(link(below) for below in range(depth, 1, -1)))


@pytest.mark.parametrize("depth", [2, 4, 7])
def test_the_price_of_the_trap_at_depth_and_one_link_alone(depth):
    def first_mean(row, kind):
        chain, posterior = ChainJoint().double(), exact_chain(depth, kind)
        return gradients.draws(row, chain, posterior, numbers(1.0), draws=5000, generator=seeded())[:, 0]

    checks.no_variance(first_mean("elbo-path", HierarchicalGaussian), scale=1.0)
    checks.unbiased(first_mean("elbo-total", HierarchicalGaussian) ** 2, 1 + 1 / depth)
    trapped = first_mean("elbo-path", models.DetachedOutputs)
    checks.unbiased(trapped**2, (depth**2 - 1) / (3 * depth))
    if depth > 2:
        with pytest.raises(AssertionError, match="standard errors"):
            checks.unbiased(trapped**2, (depth - 1) / depth)


def test_a_gain_that_is_not_there_or_does_not_fall_is_refused():
    """The checks on the rows of the schedule, with the faults planted that they are to find."""
    found = experiments.load("stl-schedule", "paper").query("metric == 'nll' and model == 'mlp-1'")
    nll = found.pivot(index=["epochs", "seed"], columns="estimator", values="value")
    gain = nll["elbo-total"] - nll["elbo-path"]
    late, early = (torch.tensor(gain[epochs].to_numpy()) for epochs in (40, 4))
    checks.below(0 * late, late)
    checks.below(late, early)
    none = 0 * late
    for low, high in ((none, -late), (none, late - late.mean()), (late, late.flip(0)), (none[:3], late[:3])):
        with pytest.raises(AssertionError, match="standard errors"):
            checks.below(low, high)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_a_floor_that_is_not_proportional_to_the_step_is_refused(power):
    noise = 0.1 * torch.randn(80, generator=seeded(), dtype=DTYPE)
    small = torch.randn(80, generator=seeded(1), dtype=DTYPE) * 0.1
    checks.equivalent(small + math.log(2) + noise, small + math.log(2), 0.25)
    with pytest.raises(AssertionError, match=r"different|undecided"):
        checks.equivalent(small + power * math.log(2) + noise, small + math.log(2), 0.25)


def test_the_bias_test_of_the_chapter_needs_a_bias():
    q = at_ratio(0.4)
    for row, biased in (("iwae-path", True), ("iwae-dreg", False)):
        found = gradients.bias_test(row, "iwae-total", TARGET, q, X, k=5, draws=4000, generator=seeded())
        assert found.biased is biased


def test_a_slip_of_sign_in_the_score_is_unbiased_but_seen_in_the_variance():
    """Unbiasedness alone would not notice: the check of the variance does."""

    def slip(log_w):
        u = torch.full_like(log_w, 1 / log_w.shape[0])
        return Weights(u, u, u)

    q, wrong = at_ratio(0.8), Row("slip", "elbo", "elbo", 1, "", slip)
    checks.unbiased(draws(wrong, q) - draws("elbo-path", q), 0.0)
    with pytest.raises(AssertionError):
        checks.unbiased(squares(draws(wrong, q)), scaled_variance(1.0, q))
    assert TABLEAU["elbo-total"].rule(torch.zeros(1, 1)).score < 0


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_laboratory_can_be_drawn():
    q, measured = at_ratio(0.8), {}
    for k in (1, 2, 5):
        for name, m in gradients.measure(
            ["iwae-total", "iwae-dreg"], TARGET, q, X, k=k, draws=50, generator=seeded()
        ).items():
            measured.setdefault(name, []).append(m)
            m.seconds = 0.5
    found = gradients.bias_test("iwae-dreg", "iwae-total", TARGET, q, X, k=5, draws=50, generator=seeded())
    for draw in (
        lambda axes: plots.variance_along(axes, [1, 2, 5], measured),
        lambda axes: plots.snr(axes, [1, 2, 5], measured),
        lambda axes: plots.variance_time(axes, {name: series[-1] for name, series in measured.items()}),
        lambda axes: plots.bias(axes, {"iwae-dreg": found}),
    ):
        figure, axes = plt.subplots()
        draw(axes)
        figure.canvas.draw()
        assert axes.lines or axes.patches or axes.collections
        plt.close(figure)


TURN, SLIDE = interactive.PARTS


def notebook(tmp_path, kind=TURN, **metadata):
    output = {"output_type": "display_data", "data": {kind: {"data": [{"x": "<b>"}], "layout": {}}}}
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps({"cells": [{"metadata": metadata, "outputs": [output]}, {"metadata": {}}]}))
    return path


@pytest.mark.parametrize(("kind", "part"), [(TURN, "turn-button"), (SLIDE, 'type="range"')])
def test_a_figure_to_move_gets_its_part_in_its_own_place(tmp_path, kind, part):
    figures = interactive.moving_figures(notebook(tmp_path, kind, mystnb={"figure": {"name": "fig-b"}}))
    page = '<figure id="fig-a"><img alt="a"><figcaption>A</figcaption></figure>'
    page += '<figure class="c" id="fig-b"><img><figcaption>'
    body = interactive.add_parts(page, figures, "../_static/plotly.min.js")
    assert body.count(part) == 1 and body.index(part) > body.index("fig-b")
    assert ('data-script="../_static/plotly.min.js"' in body) == (kind == TURN)
    assert "<b>" not in body and "http" not in body


@pytest.mark.skipif(check_browser.browser() is None, reason="no Chromium or Chrome: NOTHING in a browser was checked")
def test_arrow_keys_slide_through_the_pictures(tmp_path):
    """As on the site, the script stands in the head, before the figure."""
    told = {"label": "steps", "values": ["one", "two"], "pictures": ["AAAA", "BBBB"], "start": 0}
    body = interactive.add_parts('<figure id="a"><img><figcaption>A</figcaption>', {"a": (SLIDE, told)}, "")
    head = f"<!DOCTYPE html><title>A</title><script>{interactive._SCRIPT}</script>"
    (tmp_path / "page.html").write_text(f"{head}<body>{body}</figure>")
    with check_browser.chromium() as program:
        page = program.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        page.focus("input", timeout=5000)
        page.keyboard.press("ArrowRight")
        assert page.is_visible("input") and page.inner_text("output") == "two"
        assert page.get_attribute("img", "src") == "data:image/png;base64,BBBB"


def test_a_figure_without_a_name_or_a_page_without_the_figure_stops_the_build(tmp_path):
    with pytest.raises(Exception, match=r"needs a mystnb\.figure\.name"):
        interactive.moving_figures(notebook(tmp_path))
    with pytest.raises(Exception, match="0 figures called fig-b"):
        interactive.add_parts("<figure id='other'>", {"fig-b": (TURN, {})}, "")


@pytest.fixture
def shown(monkeypatch):
    plt.close("all")  # of other tests
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: found.append(data))
    yield found
    assert all(set(data) - {TURN, SLIDE} == {"image/png", "text/plain"} for data in found)
    json.dumps(found)
    assert not plt.get_fignums()


def test_the_numbers_of_a_figure_to_turn_are_small_and_plain(shown):
    figure, _ = plt.subplots()
    plots.rotatable(figure, [{"type": "surface", "z": torch.full((2, 2), 1 / 3)}], ("x", "y", "z"))
    assert shown[0][TURN]["data"][0]["z"] == [[0.333, 0.333], [0.333, 0.333]]
    assert shown[0][TURN]["layout"]["scene"]["xaxis"] == {"title": {"text": "x"}}


def test_a_figure_to_slide_through_holds_each_picture_and_shows_one(shown):
    frames = {f"{k}": plt.figure(figsize=(k, 1)) for k in (1, 2, 3)}
    plots.sliding(frames, "draws K", start=1)
    slides = shown[0][SLIDE]
    assert slides["label"] == "draws K" and slides["values"] == ["1", "2", "3"] and slides["start"] == 1
    assert len(set(slides["pictures"])) == 3 and shown[0]["image/png"] == slides["pictures"][1]
