"""Advice: its numbers against closed forms, its verdicts on models whose answer is known, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import re

import nbformat
import pytest
import torch
from test_house import ROOT
from torch import nn

from vaelib import advice, data, evaluation, gradients, models
from vaelib.advice import Choice, Estimate, Pairs, Part, RowCost
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, TABLEAU, LossEstimator
from vaelib.posteriors import DiagonalGaussian


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [(1.0, 0.1, "yes"), (0.0, 0.1, "no"), (0.6, 0.1, "cannot tell"), (math.nan, 0.1, "cannot tell"),
     (1.0, math.nan, "cannot tell"), (math.inf, 0.0, "cannot tell")],
)  # fmt: skip
def test_a_verdict_needs_three_standard_errors(value, error, said):
    assert Estimate(value, error).beyond(0.5) == said


# --- the noise of a training gradient ---------------------------------------------------------------------------------


class Level(nn.Module):
    """An encoder of one number."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        mean = self.level.expand(len(x), 1)
        return DiagonalGaussian(mean, torch.zeros_like(mean))


PROBE = LossEstimator("probe", "elbo", "elbo", 1, "", lambda joint, q, x, eps: -(q.mean * (x + eps.mean(0))).sum(-1))
"""Its gradient for an observation is x plus the mean of its noise."""


def test_both_parts_of_the_noise_are_as_known():
    """With x 0 or 2 in batches of 5 and K = 2: a mean of 1, a variance of 1/5 from the batch and of 1/10 from draws."""
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    pairs = Pairs(gradients.Networks(lambda x, z: None, Level()), PROBE, 2, means=True)
    advice.take_pairs([pairs], x, 5, 2000, seeded(), 1e9)
    signal, minibatch = pairs.signal_and_minibatch("encoder")
    for found, truth in ((pairs.draws("encoder"), 0.1), (minibatch, 0.2), (signal, 1.0)):
        assert abs(found.value - truth) < 5 * found.error < 0.3 * truth
    part = Part(pairs.draws("encoder"), minibatch, signal)
    assert part.variance == pytest.approx(0.3, rel=0.1) and part.snr == pytest.approx(0.3**-0.5, rel=0.1)


def test_a_mean_in_the_noise_has_no_ratio():
    assert Part(Estimate(1.0, 0.1), Estimate(0.0, 0.1), Estimate(0.02, 0.01)).snr is None


# --- z and its encoder, where the truth is known ----------------------------------------------------------------------


def exact_model(latent=4):
    """The linear model of highest likelihood of the digits, with its exact posterior, and some of them."""
    x = data.load("digits").train.grey
    joint = models.ppca(x, latent)
    return models.VAE(joint, models.exact_encoder(joint), binary=False), x[:800]


def test_usage_of_a_model_that_is_known():
    model, x = exact_model()
    used = advice.usage(model, x, seeded())
    assert abs(used.kl.value - model.encoder(x).kl().mean().item()) < 5 * used.kl.error
    assert used.collapsed == "no" and used.active == [4] == used.units
    again = evaluation.mutual_information(model.encoder, x, generator=seeded(1))
    assert used.information == pytest.approx(again, abs=0.5)


class Prior(nn.Module):
    """An encoder that knows nothing of x."""

    def __init__(self, latent):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(latent))

    def forward(self, x):
        mean = self.mean.expand(len(x), -1)
        return DiagonalGaussian(mean, torch.zeros_like(mean))


def test_a_collapse_of_either_half_is_one():
    model, x = exact_model()
    deaf = models.LinearGaussian(torch.zeros(64, 4), model.joint.bias.data, model.joint.log_std.data)
    for joint, encoder in ((deaf, model.encoder), (model.joint, Prior(4)), (deaf, Prior(4))):
        used = advice.usage(models.VAE(joint, encoder, binary=False), x, seeded())
        assert used.collapsed == "yes"
        assert abs(used.told.value) <= 5 * used.told.error + 1e-6


def test_a_late_encoder_gains_what_it_is_behind_and_no_more():
    model, x = exact_model()
    good = advice.lag(model, x, ESTIMATORS["elbo-path"], seeded())
    assert good.late == "no" and good.gain.value < 0.05
    late = copy.deepcopy(model)
    with torch.no_grad():
        late.encoder.bias += 0.5
    before = copy.deepcopy(late.state_dict())
    q, p = late.encoder(x[600:]), model.encoder(x[600:])
    behind = 0.5 * ((q.mean - p.mean) / p.log_std.exp()).square().sum(1).mean().item()  # KL(q || p(z given x))
    found = advice.lag(late, x, ESTIMATORS["elbo-path"], seeded(), lr=1e-2)
    assert found.late == "yes" and found.gain.value == pytest.approx(behind, rel=0.05)
    assert all(torch.equal(value, before[name]) for name, value in late.state_dict().items())


def test_what_the_lag_is_measured_on_is_not_what_the_encoder_learns_from(monkeypatch):
    (model, x), used = exact_model(), {"minibatches": [], "elbo": []}
    for name in used:

        def noted(*arguments, name=name, function=getattr(advice, name)):
            used[name].append(next(each for each in arguments if type(each) is torch.Tensor))
            return function(*arguments)

        monkeypatch.setattr(advice, name, noted)
    advice.lag(model, x, ESTIMATORS["elbo-path"], seeded(), steps=2)
    (learnt,), held = used["minibatches"], used["elbo"]
    assert all(torch.equal(torch.cat([learnt, part]), x) for part in held) and len(held) == 2


def test_an_encoder_without_weights_of_its_own_has_no_lag_to_show():
    model, x = exact_model()
    for encoder in (lambda x: model.encoder(x), copy.deepcopy(model.encoder).requires_grad_(False)):
        found = advice.lag(gradients.Networks(model.joint, encoder), x, ESTIMATORS["elbo-path"], seeded())
        assert found.gain is None and found.late == "cannot tell"


# --- choosing ---------------------------------------------------------------------------------------------------------


def row(name, variance, error=0.01, seconds=1.0):
    part = Part(Estimate(variance, error), Estimate(0.0, 0.0), Estimate(1.0, 0.1))
    return RowCost(name, ESTIMATORS[name].target, advice.aim(ESTIMATORS[name]), 4, None, part, part, seconds)


@pytest.mark.parametrize(
    ("rows", "taken", "agrees"),
    [
        ([row("elbo-path", 1.0), row("elbo-total", 5.0)], "elbo-path", "yes"),
        ([row("elbo-path", 5.0), row("elbo-total", 1.0)], "elbo-total", "no"),
        ([row("elbo-path", 1.0), row("elbo-total", 1.1)], "elbo-path", "cannot tell"),
        ([row("elbo-path", 1.0, 2.0), row("elbo-total", 0.5, 2.0)], "elbo-path", "cannot tell"),
        ([row("elbo-exact", 1.0), row("elbo-disarm", 1.5), row("elbo-score", 9.0)], "elbo-exact", "yes"),
        ([row("elbo-exact", 1.0, seconds=9.0), row("elbo-disarm", 1.5), row("elbo-score", 9.0)], "elbo-disarm", "yes"),
        ([row("elbo-score", 3.0)], "elbo-score", "yes"),
        ([row("elbo-disarm", 1.0), row("elbo-gumbel-softmax", 0.1), row("elbo-score-loo", 3.0)], "elbo-disarm", "yes"),
    ],
)  # fmt: skip
def test_the_chart_counts_unless_it_is_measured_to_be_wrong(rows, taken, agrees):
    choice = advice.choose_row("elbo", rows)
    assert (choice.row, choice.agrees) == (taken, agrees)
    assert (choice.leaf is None) == (agrees == "no" or taken == "elbo-score") and taken in str(choice)


def test_biased_rows_are_chosen_for_nothing():
    assert advice.choose_row("iwae", [row("iwae-path", 1.0)]) is None


def test_the_leaves_are_those_of_the_chapter():
    (path,) = (ROOT / "book").glob("*-choosing.ipynb")
    chart = nbformat.read(path, as_version=4).cells[1].source
    quoted = set(re.findall(r'["`]([a-z]+(?:-[a-z]+)*)["`]', chart))
    assert {name for _, _, name in advice.CHART} <= quoted


# --- all of it --------------------------------------------------------------------------------------------------------


def small(name="mlp-1", **sizes):
    mean = data.load("digits").train.grey.mean(0)
    return models.build(name, 64, mean, seeded(), **{"hidden": 8, "latent": 2, **sizes})


def binary(count=200):
    return data.load("digits", "dynamic").train.batch(slice(0, count), seeded())


def test_advice_is_whole_and_leaves_the_model_alone():
    model, x = small().train(), binary()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    given = gradients.advise(model, x, estimator="stl", seconds=0.1)
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(torch.equal(value, before[name]) and p.grad is None for (name, value), p in
               zip(model.state_dict().items(), model.parameters(), strict=True))  # fmt: skip
    plain = json.loads(json.dumps(given.as_dict(), allow_nan=False))
    names = [each["name"] for each in plain["rows"]]
    assert set(names) == set(TABLEAU)
    assert {"elbo-silent", "elbo-disarm", "elbo-exact"} <= set(plain["left_out"])
    accused = {each["name"] for each in plain["rows"] if each["bias"] and each["bias"]["found"] == "yes"}
    assert accused <= {"iwae-path"} and given.current == "elbo-path"
    assert [choice.aim for choice in given.choices] == ["elbo", "iwae", "wake"]
    assert [one.batch for one in given.doubled] == [20, 20, 40] and [one.draws for one in given.doubled] == [4, 8, 4]
    assert str(given).count("cannot tell") + str(given).count("reference") > 2


@pytest.mark.parametrize(
    ("name", "sizes", "has", "leaf"),
    [("linear", {"latent": 2}, "elbo-silent", "x Gaussian, decoder linear in z"),
     ("mlp-1-mixture", {"components": 2}, "elbo-path", "z has a path, the ELBO"),
     ("mlp-1-bernoulli", {"latent": 3}, "elbo-exact", "z is discrete, 12 bits at most and a cheap decoder"),
     ("mlp-1-categorical", {"latent": 5, "classes": 6}, "elbo-score-loo", "z is discrete, choices")],
)  # fmt: skip
def test_every_family_has_its_leaf(name, sizes, has, leaf):
    built = models.build(name, 64, None, seeded(), **({} if name == "linear" else {"hidden": 8}) | sizes)
    x = binary() if built.binary else data.load("digits").train.grey[:200]
    takes, _ = advice.applicable(built, x[:8], 4)
    assert has in takes
    assert next(leaf for target, leaf, row in advice.CHART if target == "elbo" and row in takes) == leaf


def test_a_collapse_is_for_good_only_where_the_encoder_is_not_late():
    used = advice.Usage(Estimate(3.0, 0.1), Estimate(-0.001, 0.01), 4.0, [2], [2], 100)
    setting = {"k": 4, "batch_size": 20, "observations": 100}
    for gain, first in ((9.0, "more steps of the encoder may"), (0.0, "train anew")):
        given = advice.Advice([], {}, [], [], used, advice.Lag(Estimate(gain, 0.1), 400), None, setting)
        assert given.recommendation[0].startswith("z is collapsed (the decoder loses 0.00 ± 0.01 nats")
        assert first in given.recommendation[0] and ("the encoder is late" in str(given)) == (gain > 1)
    assert "4.00 (its estimate ends near log 100 = 4.61)" in str(given) and "minibatches of 20" in str(given)


def test_what_cannot_be_advised_is_refused():
    model, x = small(), binary()
    with pytest.raises(InputError, match="advice needs 100 observations at least, but x has 99"):
        gradients.advise(model, x[:99])
    with pytest.raises(InputError, match="must have a joint and an encoder, but this one has no encoder"):
        gradients.advise(type("Half", (), {"joint": model.joint})(), x)
    with pytest.raises(InputError, match="nothing to train in this model"):
        gradients.advise(copy.deepcopy(model).requires_grad_(False), x, seconds=0.1)
    with pytest.raises(InputError, match="k must be a whole number"):
        gradients.advise(model, x, k=0)


def test_a_choice_says_what_it_rests_on():
    said = str(Choice("elbo", "z has a path, the ELBO", "elbo-path", "cannot tell", ("elbo-total", 1.05)))
    assert "elbo-total has 1.1 times its variance x time; the noise cannot tell the two apart" in said
