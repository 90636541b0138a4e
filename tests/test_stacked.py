"""Trainings side by side are the same as each alone: weights, history, state; and every way to mix them is noticed."""

from __future__ import annotations

import copy

import pytest
import torch
from test_training import differences, kill_at
from torch import nn

from vaelib import data, models, objectives, silent, stacked, training
from vaelib.config import Recipe
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS
from vaelib.stacked import StackedTrainer
from vaelib.training import Diverged, Trainer

SEEDS = 3
SIZES = {"mlp-1": {"hidden": 8, "latent": 3}, "mlp-2": {"hidden": 8, "latent": 4, "hidden2": 5, "latent2": 3}}
SIZES["mlp-2-detached"] = SIZES["mlp-2"]
ROUNDING = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module", autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def split(double):
    train = data.load("digits", "dynamic").train
    return data.images.Split(train.grey[:200].double(), None, train.shape, train.binarisation)


def trainers(split, rows=("elbo-path",) * SEEDS, model="mlp-1", **recipe) -> list[Trainer]:
    recipe = {"k": 2, "epochs": 3, "batch_size": 20, "lr": 1e-2, **recipe}
    return [
        Trainer(
            models.build(model, 64, generator=torch.Generator().manual_seed(seed), **SIZES[model]),
            split,
            ESTIMATORS[row],
            Recipe(seed=seed, **recipe),
        )
        for seed, row in enumerate(rows)
    ]


def assert_same(alone: list[Trainer], together: list[Trainer]) -> None:
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(dict(a.model.named_parameters()), dict(b.model.named_parameters()), **ROUNDING)
        torch.testing.assert_close(a.bounds, b.bounds, **ROUNDING)
        for ours, theirs in zip(a.history, b.history, strict=True):
            assert ours["bound"] == pytest.approx(theirs["bound"], rel=1e-9)
            assert ours.keys() == theirs.keys() and ours["lr"] == theirs["lr"] and ours["step"] == theirs["step"]


CASES = {
    "seeds": {},
    "one draw": {"k": 1},
    "two stochastic layers": {"model": "mlp-2", "rows": ("iwae-dreg",) * SEEDS},
    "the fault of the released code": {"model": "mlp-2-detached"},
    "no path": {"rows": ("iwae-vimco",) * SEEDS, "k": 3},
    "automatic": {"rows": ("elbo-total", "iwae-total", "elbo-total")},
    "estimators of all kinds": {"rows": ("elbo-total", "elbo-path", "elbo-score-loo", "iwae-dreg", "rws", "iwae-path")},
    "clipped": {"clip": 0.5},
    "released": {"optimizer": "adam-released", "shuffle": False},
    "schedule": {"schedule": "burda"},
}


@pytest.mark.parametrize("case", CASES)
def test_together_as_alone(split, case):
    alone, together = trainers(split, **CASES[case]), trainers(split, **CASES[case])
    for trainer in alone:
        trainer.run()
    stack = StackedTrainer(together)
    stack.run()
    assert_same(alone, together)
    assert all(trainer.step == 30 for trainer in stack.trainers)


def shared_noise(stack):
    for trainer in stack.trainers:
        trainer.streams["noise"] = training.stream("noise", 0)
        trainer.streams["noise"].set_state(training.stream("noise", 0).get_state())


def shared_order(stack):
    stack.index = lambda steps: stack.trainers[0].index(steps).unsqueeze(1).expand(-1, SEEDS, -1)


def unscaled(stack):
    stack.backward = lambda estimator, *rest: objectives.backward(estimator.rows[0], *rest)


@pytest.mark.parametrize("fault", [shared_noise, shared_order, unscaled])
def test_what_is_mixed_up_is_noticed(split, fault):
    """The negative control of the test above."""
    alone, together = trainers(split), trainers(split)
    for trainer in alone:
        trainer.run()
    stack = StackedTrainer(together)
    fault(stack)
    stack.run()
    with pytest.raises(AssertionError):
        assert_same(alone, together)


def test_joint_clipping_is_noticed(split, monkeypatch):
    """The other negative control: the norm of all gradients together is another one."""
    monkeypatch.setattr(stacked, "clip_each", nn.utils.clip_grad_norm_)
    alone, together = trainers(split, clip=0.5), trainers(split, clip=0.5)
    for trainer in alone:
        trainer.run()
    StackedTrainer(together).run()
    with pytest.raises(AssertionError):
        assert_same(alone, together)


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_a_stack_resumes_bit_for_bit_and_one_of_it_alone(split, optimizer):
    whole = StackedTrainer(trainers(split, optimizer=optimizer))
    whole.run()
    state = kill_at(StackedTrainer(trainers(split, optimizer=optimizer)), 13)
    resumed = StackedTrainer(trainers(split, optimizer=optimizer))
    resumed.load_state_dict(copy.deepcopy(state))
    resumed.run()
    assert not differences(whole.state_dict(), resumed.state_dict())

    alone = trainers(split, optimizer=optimizer)[1]  # a state of the stack is made of ordinary ones
    alone.load_state_dict(state["runs"][1])
    alone.run()
    assert_same([alone], [whole.trainers[1]])


def test_each_part_of_a_state_is_needed(split):
    whole = StackedTrainer(trainers(split))
    whole.run()
    state = kill_at(StackedTrainer(trainers(split)), 13)
    state["runs"][2]["optimizer"]["state"][0]["exp_avg"].zero_()
    resumed = StackedTrainer(trainers(split))
    resumed.load_state_dict(state)
    resumed.run()
    assert {found.split("/")[2] for found in differences(whole.state_dict(), resumed.state_dict())} == {"2"}


def test_a_state_holds_nothing_but_itself(split):
    stack = StackedTrainer(trainers(split, epochs=1))
    stack.run()
    state = stack.state_dict()
    before = copy.deepcopy(state)
    with torch.no_grad():
        for p in stack.parameters:
            p.zero_()
    assert not differences(before, state)
    tensors = [*state["runs"][0]["model"].values(), state["runs"][0]["optimizer"]["state"][0]["exp_avg"]]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_fit_leaves_ordinary_models(split):
    alone, together = trainers(split), trainers(split)
    rows, seeds = ["elbo-total", "elbo-path", "elbo-total"], [7, 7, 8]
    recipe = {"k": 2, "epochs": 2, "batch_size": 20}
    histories = stacked.fit([t.model for t in together], split, rows, seeds, **recipe)
    for trainer, row, seed, history in zip(alone, rows, seeds, histories, strict=True):
        mine = training.fit(trainer.model, split, row, seed=seed, **recipe)
        assert [record["bound"] for record in history] == pytest.approx([record["bound"] for record in mine])
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), **ROUNDING)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in b.model.parameters())


def test_frozen_layers_stay_as_they_are(split):
    alone, together = trainers(split, clip=0.5), trainers(split, clip=0.5)
    for trainer in (*alone, *together):
        trainer.model.joint.requires_grad_(False)
    before = [p.clone() for p in together[0].model.joint.parameters()]
    stacked.fit([t.model for t in together], split, epochs=1, batch_size=20, clip=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, together[0].model.joint.parameters(), strict=True))
    for seed, trainer in enumerate(alone):
        training.fit(trainer.model, split, epochs=1, batch_size=20, clip=0.5, seed=seed)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), **ROUNDING)
    with pytest.raises(InputError, match="only models of the same shapes"):
        stacked.stack([alone[0].model, trainers(split)[1].model])


def test_the_seed_that_diverges_is_named(split):
    group = trainers(split)
    stack = StackedTrainer(group)
    with torch.no_grad():
        next(group[2].model.parameters()).fill_(float("nan"))
    with pytest.raises(Diverged, match="^seed 2: the bound is nan at step 1 with estimator 'elbo-path'"):
        stack.run()


def test_what_cannot_be_stacked_is_refused(split):
    with pytest.raises(InputError, match="must have the same recipe, but for the seed"):
        StackedTrainer([trainers(split)[0], trainers(split, k=1)[0]])
    with pytest.raises(InputError, match="only models of the same shapes"):
        StackedTrainer([trainers(split)[0], trainers(split, model="mlp-2")[1]])
    shared = trainers(split)[:2]
    with pytest.raises(InputError, match="share parameters cannot be stacked"):
        stacked.stack([shared[0].model, shared[0].model])
    with pytest.raises(InputError, match="only linear layers can be stacked, but the model has a GRU"):
        stacked.stack([nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 2)) for _ in range(2)])
    with pytest.raises(InputError, match="has a Dropout"):
        stacked.stack([nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)) for _ in range(2)])
    with pytest.raises(InputError, match="2 models, 2 estimators and 1 seeds"):
        stacked.fit([t.model for t in shared], split, seeds=[0])
    mixtures = [models.build("mlp-1-mixture", 64, hidden=4, latent=2, components=2) for _ in range(2)]
    with pytest.raises(InputError, match="posterior is a mixture cannot be stacked"):
        stacked.fit(mixtures, split, k=2, epochs=1)
    for row in ("elbo-silent", silent.ELBO):
        with pytest.raises(InputError, match="'elbo-silent' has no row in the tableau and cannot be stacked"):
            linear = [models.build("linear", 64, latent=2).double() for _ in range(2)]
            stacked.fit(linear, split, row, epochs=1)
    started = trainers(split)
    started[1].step = 1
    with pytest.raises(InputError, match="before their first step alone"):
        StackedTrainer(started)
