"""Negative controls of chapter 4, "Silent gradients beside a nonlinear decoder"."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import DTYPE

from vaelib import checks, gradients, models, silent
from vaelib.estimators import LossEstimator, get
from vaelib.experiments import find
from vaelib.experiments.results import finished
from vaelib.posteriors import DiagonalGaussian

refused = pytest.raises(AssertionError)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Bend(nn.Module):
    def forward(self, z):
        return torch.cat([torch.sin(1.5 * z), z / 2 + z**2 / 4], -1)


SEEN, LOG_S = torch.tensor([[0.9, 1.1]], dtype=DTYPE), torch.tensor(math.log(0.4), dtype=DTYPE)
CURVED = models.Joint(models.GaussianDecoder(Bend(), LOG_S))
STRAIGHT = models.LinearGaussian(
    torch.tensor([[0.49], [0.5]], dtype=DTYPE), torch.tensor([0.0, 0.25], dtype=DTYPE), LOG_S
)
HERE = DiagonalGaussian(torch.tensor([[0.7]], dtype=DTYPE), torch.tensor([[-1.2]], dtype=DTYPE))


def toy(row, joint=None, count=20_000, **options):
    pair = joint or models.Guided(CURVED, STRAIGHT).requires_grad_(False)
    return gradients.draws(row, pair, HERE, SEEN, draws=count, generator=seeded(), **options)


def without_the_mean(scale):
    """The control variate sold as one, with its expectation forgotten."""
    total = get("elbo-total")

    def loss(joint, q, x, eps):
        return total.loss(joint.joint, q, x, eps) - scale * total.loss(joint.guide, q, x, eps)

    return LossEstimator("forgot", "elbo", "elbo", 1, "", loss)


def test_a_control_variate_needs_its_expectation():
    total = get("elbo-total")
    plain = toy(total)
    checks.unbiased(toy(silent.controlled(total, 1.0)) - plain, 0.0)
    for wrong in (without_the_mean(1.0), silent.annealed(total, 0.5)):
        with refused:
            checks.unbiased(toy(wrong) - plain, 0.0)


def test_a_scale_from_the_same_draws_is_biased():
    total = get("elbo-total")
    g = toy(total, count=40_000)
    h = g - toy(silent.controlled(total, 1.0), count=40_000)
    g, h = (value.unflatten(0, (-1, 4)) for value in (g, h))
    fixed = (g * h).sum() / (h * h).sum()
    scale = (g * h).sum((1, 2), keepdim=True) / (h * h).sum((1, 2), keepdim=True)
    mean = g.mean((0, 1))
    checks.unbiased((g - fixed * h).mean(1) - g.mean(1), 0.0)
    with refused:
        checks.unbiased((g - scale * h).mean(1), mean)


def test_both_decoders_share_the_score_only_on_the_same_noise():
    parts = {
        (name, row): toy(row, joint.requires_grad_(False), count=100)
        for name, joint in (("bent", CURVED), ("straight", STRAIGHT))
        for row in ("elbo-total", "elbo-path")
    }
    bent, straight = (parts[name, "elbo-total"] - parts[name, "elbo-path"] for name in ("bent", "straight"))
    checks.same(bent, straight)
    with refused:
        checks.same(bent, straight.flip(0))
    with refused:
        checks.same(parts["bent", "elbo-path"], parts["straight", "elbo-path"])


# --- the tables that the chapter reads

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.mark.parametrize(
    ("name", "preset"), [("silent-annealed", "short"), ("silent-annealed", "long"), ("silent-control-variate", "short")]
)
def test_the_chapter_reads_whole_tables(name, preset):
    """Every run of the preset, and none twice: a missing seed would change a standard error without a word."""
    experiment = find(name)
    tasks = {task.key for task in experiment.tasks(preset)}
    assert tasks and tasks == {key for key in finished(experiment, RESULTS) if key[0] == preset}
