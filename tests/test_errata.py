"""The negative controls of "What the papers got wrong" and of the stop-gradient page, on the pages' own code.

The cells that define something are taken from the notebook itself, so that what is refused here is refused there.
"""

from __future__ import annotations

import ast
import csv
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import nbformat
import pytest
import torch

from vaelib import bounds, checks, gradients, models
from vaelib.posteriors import DiagonalGaussian

BOOK = Path(__file__).parent.parent / "book"
sys.path.insert(0, str(BOOK.parent / "benchmarks"))

import landing  # noqa: E402

NOTEBOOK = nbformat.read(BOOK / "what-the-papers-got-wrong.ipynb", as_version=4)
STOP_PAGE = (BOOK / "stop-gradient-in-frameworks.md").read_text("utf-8")
TREES = [ast.parse(cell.source) for cell in NOTEBOOK.cells if cell.cell_type == "code"]
refused = pytest.raises(AssertionError)


def defines(tree: ast.Module, name: str) -> bool:
    return any(
        getattr(node, "name", None) == name
        or (isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets))
        for node in tree.body
    )


@pytest.fixture
def page():
    """Run the notebook's cells that define the names given, after its first, and return all that they define."""

    def run(*names: str) -> SimpleNamespace:
        space: dict = {}
        wanted = [tree for tree in TREES if any(defines(tree, name) for name in ("generator", *names))]
        for tree in wanted:
            exec(compile(tree, "notebook", "exec"), space)
        return SimpleNamespace(**space)

    with mpl.rc_context():
        yield run
    torch.set_default_dtype(torch.float32)


def test_every_section_of_the_summary_exists():
    source = "\n".join(cell.source for cell in NOTEBOOK.cells) + STOP_PAGE
    labels = re.findall(r"^\((errata-[\w-]+)\)=$", source, re.MULTILINE)
    assert len(labels) == len(set(labels)) == 11
    assert set(re.findall(r"<(errata-[\w-]+)>", source)) == set(labels)


def test_algorithm_4_is_refused_where_dreg_passes(page):
    p = page("weight", "mean_gradient")
    for truth, dreg, algorithm_4, wake in p.exact.values():
        checks.same(dreg, truth)
        for wrong in (algorithm_4, truth + wake / 2, wake):
            with refused:
                checks.same(wrong, truth)
        with refused:
            checks.same(algorithm_4, truth + 0.99 * wake)


def test_the_integrals_are_those_of_the_rows(page):
    """The trick with 1/S against draws, for what it is applied to; the draws refuse a tenth more."""
    p = page("weight", "mean_gradient")
    one = torch.ones(1, 1)
    joint = models.LinearGaussian(one, torch.zeros(1), torch.tensor(0.0)).requires_grad_(False)
    q = DiagonalGaussian(0.3 * one, 0 * one)
    for row, exact in (("iwae-dreg", p.exact[8][1]), ("iwae-path", p.exact[8][2]), ("rws", p.exact[8][3])):
        generator = torch.Generator().manual_seed(0)
        draws = gradients.draws(row, joint, q, 2 * one, k=8, draws=20_000, generator=generator)[:, 0]
        checks.unbiased(draws, exact.item())
        with refused:
            checks.unbiased(draws, 1.1 * exact.item())


def test_detached_outputs_are_not_quiet_where_stopped_parameters_are(page):
    p = page("Affine", "corners")
    checks.no_variance(p.in_first_mean("elbo-path", 1.0), scale=1.0)
    for name, kind in (("elbo-path", p.AsReleased), ("elbo-total", p.HierarchicalGaussian)):
        with refused:
            checks.no_variance(p.in_first_mean(name, 1.0, kind), scale=1.0)
    with refused:  # another tau has another variance
        checks.same((p.in_first_mean("elbo-path", 0.9, p.AsReleased) ** 2).mean(), torch.tensor(0.5))


def test_only_the_path_gradient_lands(page):
    p = page("weight", "toy", "forms")
    quiet = {name for name, (_, slope, mean) in p.found.items() if slope < 1e-9 and mean.abs().max() < 1e-9}
    assert quiet == {"path"}
    with refused:
        checks.same(p.found["closed KL, stopped"][2], torch.zeros(2))
    total, closed = p.found["total"][1], p.found["closed KL"][1]
    assert (
        f"{total:g} for the total derivative, {closed:.2g} with the divergence in closed form, 0 for the path"
        in STOP_PAGE
    )


def test_a_difference_in_the_table_is_seen(page):
    p = page("models_of_table", "said")
    assert len(p.differing) == 2
    data = next(tree for tree in TREES if defines(tree, "said"))
    changed = vars(p) | {"total": p.total + torch.tensor([[0.0], [0.0], [0.0], [0.1], [0.0], [0.0]])}
    exec(compile(data, "notebook", "exec"), changed)
    assert ("MNIST IWAE", 2, 1) not in changed["differing"]  # with 0.1 more the text is right about this one
    assert len(changed["differing"]) == 4  # and wrong about the three others of the row


def test_the_papers_adam_is_not_the_released_one(page):
    p = page("released_adam", "adam")
    noisy = torch.randn(20, generator=p.generator).tolist()
    checks.same(p.follow(p.optimizers.ReleasedAdam, noisy), p.released_adam(noisy))
    with refused:
        checks.same(p.adam(noisy), p.released_adam(noisy))
    with refused:
        checks.holds(p.adam([1.0])[0] == 0, "no first step")
    with refused:  # a factor on the gradient is not nothing while eps stays
        checks.same(p.adam([20 * 1e-5]), p.adam([1e-5]))


def test_the_ceiling_is_the_minibatchs(page):
    p = page("Known")
    far, near = p.estimates(12, 32, 60), p.estimates(0.5, 32, 60)
    checks.unbiased(far, math.log(32))
    for draws, value in ((far, 12.0), (far, math.log(50)), (near, math.log(32))):
        with refused:
            checks.unbiased(draws, value)
    with refused:  # far below the ceiling there is nothing to see
        checks.below(near, torch.full_like(near, 0.5))


def test_a_clip_of_its_own_leaves_the_encoder_alone(page):
    p = page("encoder_step")
    both = [p.encoder, p.decoder]
    assert p.encoder_step(1000.0, [p.encoder]) == 1 > p.encoder_step(1000.0, both)
    assert p.encoder_step(1.0, both) == 1  # a norm below 5 is not clipped


def test_the_surrogate_is_right_for_a_line_alone(page):
    p = page("weight", "ms")
    checks.same(*p.slopes(0.0))
    for bend in (0.01, 1.0):
        with refused:
            checks.same(*p.slopes(bend))


def test_a_sampled_gradient_is_not_silent(page):
    p = page("images")
    x, generator = p.batches[0], torch.Generator().manual_seed(0)
    q = DiagonalGaussian(0.8 * p.known(x).mean, p.known(x).log_std + 0.2)

    def sampled():
        value = bounds.elbo_monte_carlo(p.decoder, x, q, q.sample(q.noise(1, generator))).mean()
        return torch.autograd.grad(-value, p.decoder.bias)[0]

    draws = torch.stack([sampled() for _ in range(50)])
    checks.no_variance(p.again)
    checks.unbiased(draws, p.again[0])
    with refused:
        checks.no_variance(draws)


# The page on stop-gradient.


def test_what_was_measured_of_other_libraries_is_what_the_page_says():
    exact = {"elbo-total": 4, "elbo-path": 0, "Trace_ELBO": 4, "TraceGraph_ELBO": 4, "TraceMeanField_ELBO": 1.5}
    with (BOOK.parent / "results/benchmark-landing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["library"] for row in rows} == {"vaelib", "Pyro", "NumPyro"}
    for row in rows:
        value, error = float(row["variance"]), float(row["standard_error"])
        assert abs(value - exact[row["objective"]]) <= checks.SIGMAS * error, row
        assert row["library"] == "vaelib" or f"| {row['library']} {row['version']} | none; at the optimum" in STOP_PAGE


def test_the_measurement_tells_a_landing_from_none():
    variance = {name: checks.total_variance(draws)[0] for name, draws in landing.ours(500)}
    assert variance["elbo-path"] < 1e-9 and 3 < variance["elbo-total"] < 5


def test_the_stop_gradient_page_stops_what_it_says():
    """Its two PyTorch functions: both stop the weights, and only the right one lets the sample through."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", STOP_PAGE, re.DOTALL) if "def wrong" in block)
    space = {"Normal": torch.distributions.Normal, "functional_call": torch.func.functional_call}
    exec(code, space)

    class Second(torch.nn.Linear):
        def forward(self, z):
            return torch.distributions.Normal(super().forward(z), 1.0)

    second, z1 = Second(1, 1), torch.ones(1, requires_grad=True)
    parameters = (z1, *second.parameters())
    through = torch.autograd.grad(space["right"](second, z1).mean.sum(), parameters, allow_unused=True)
    assert torch.equal(through[0], second.weight[0]) and through[1:] == (None, None)
    assert not space["wrong"](second, z1).mean.requires_grad
    assert space["wrong"](second, z1).mean == space["right"](second, z1).mean == second(z1).mean


def test_where_one_stop_may_stand():
    """Trap 2: the four ways, at the exact posterior of the toy, by quadrature over the noise."""
    eps = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    mass = (-(eps**2) / 2).exp() / (-(eps**2) / 2).exp().sum()

    def mean_and_variance(log_w):
        leaf = torch.tensor([1.0, math.log(0.5) / 2], dtype=torch.float64).repeat(2001, 1).requires_grad_()
        z = leaf[:, 0] + leaf[:, 1].exp() * eps
        (slope,) = torch.autograd.grad(log_w(leaf, z).sum(), leaf)
        mean = mass @ slope
        return mean, (mass @ (slope - mean) ** 2).sum()

    def log_p(z):
        return -(z**2) / 2 - (2 - z) ** 2 / 2

    def log_q(leaf, z):
        return -((z - leaf[:, 0]) ** 2) * (-2 * leaf[:, 1]).exp() / 2 - leaf[:, 1]

    right, sample, value, everywhere = (
        mean_and_variance(form)
        for form in (
            lambda leaf, z: log_p(z) - log_q(leaf.detach(), z),
            lambda leaf, z: log_p(z) - log_q(leaf, z.detach()),
            lambda leaf, z: log_p(z) - log_q(leaf, z).detach(),
            lambda leaf, z: log_p(z.detach()) - log_q(leaf, z.detach()),
        )
    )
    zero, shrinks = torch.zeros(2).double(), torch.tensor([0.0, -1.0]).double()
    torch.testing.assert_close(right[0], zero, atol=1e-10, rtol=0)
    assert right[1] < 1e-12
    for mean, _ in (sample, value):
        torch.testing.assert_close(mean, shrinks, atol=1e-10, rtol=0)
    torch.testing.assert_close(everywhere[0], zero, atol=1e-10, rtol=0)
    assert everywhere[1] > 1  # the score and nothing else
