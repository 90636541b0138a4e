"""Trainings side by side are the same as each alone: weights, history, state; and every way to mix them is noticed."""

from __future__ import annotations

import copy

import pytest
import torch
from test_training import differences, kill_at
from torch import nn
from toys import Normals

from vaelib import data, estimators, models, optimizers, stacked, training
from vaelib.config import Recipe
from vaelib.errors import InputError
from vaelib.stacked import StackedTraining
from vaelib.training import Diverged, Hook, Training

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


def trainings(split, rows=("elbo-path",) * SEEDS, model="mlp-1", **recipe) -> list[Training]:
    recipe = {"k": 2, "epochs": 3, "batch_size": 20, "lr": 1e-2, **recipe}
    return [
        Training(
            models.build(model, 64, generator=torch.Generator().manual_seed(seed), **SIZES[model]),
            split,
            row,
            Recipe(seed=seed, **recipe),
        )
        for seed, row in enumerate(rows)
    ]


def assert_same(alone: list[Training], together: list[Training]) -> None:
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
    alone, together = trainings(split, **CASES[case]), trainings(split, **CASES[case])
    for run in alone:
        run.run()
    stack = StackedTraining(together)
    stack.run()
    assert_same(alone, together)
    assert all(run.step == 30 for run in stack.trainings)
    assert sum(history[-1]["seconds"] for history in stack.history) == pytest.approx(stack.seconds, abs=0.01)


def shared_noise(stack):
    for run in stack.trainings:
        run.streams["noise"] = training.stream("noise", 0)


def shared_order(stack):
    stack.index = lambda steps: stack.trainings[0].index(steps).unsqueeze(1).expand(-1, SEEDS, -1)


def unscaled(stack):
    stack.estimator = stack.estimator.rows[0]


@pytest.mark.parametrize("fault", [shared_noise, shared_order, unscaled])
def test_what_is_mixed_up_is_noticed(split, fault):
    """The negative control of the test above."""
    alone, together = trainings(split), trainings(split)
    for run in alone:
        run.run()
    stack = StackedTraining(together)
    fault(stack)
    stack.run()
    with pytest.raises(AssertionError):
        assert_same(alone, together)


def test_each_training_s_gradient_is_cut_to_the_limit_and_a_shorter_one_is_left():
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 1, 1))]
    parameters[0].grad = torch.tensor([[3.0, 0], [0.3, 0], [0, 0]])
    parameters[1].grad = torch.tensor([4.0, 0.4, 0]).view(3, 1, 1)  # together the norms are 5, 0.5 and 0
    stacked.clip_gradient(parameters, 1.0, stacked.norm_of_each)
    expected = torch.tensor([[0.6, 0], [0.3, 0], [0, 0]]), torch.tensor([0.8, 0.4, 0]).view(3, 1, 1)
    torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-5, atol=0)


def test_a_gradient_whose_square_overflows_is_cut_to_the_limit_and_its_neighbour_is_left():
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.tensor([[3e20, 4e20], [0.3, 0.4], [3e37, 4e37]])
    stacked.clip_gradient([p], 1.0, stacked.norm_of_each)
    torch.testing.assert_close(p.grad, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.6, 0.8]]), rtol=1e-5, atol=0)


def test_joint_clipping_is_noticed(split, monkeypatch):
    """The other negative control: the norm of all gradients together is another one."""
    monkeypatch.setattr(stacked, "norm_of_each", optimizers.norm_of_all)
    alone, together = trainings(split, clip=0.5), trainings(split, clip=0.5)
    for run in alone:
        run.run()
    StackedTraining(together).run()
    with pytest.raises(AssertionError):
        assert_same(alone, together)


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_a_stack_resumes_bit_for_bit_and_one_of_it_alone(split, optimizer):
    whole = StackedTraining(trainings(split, optimizer=optimizer))
    whole.run()
    state = kill_at(StackedTraining(trainings(split, optimizer=optimizer)), 13)
    resumed = StackedTraining(trainings(split, optimizer=optimizer))
    resumed.load_state(copy.deepcopy(state))
    resumed.run()
    assert not differences(whole.state(), resumed.state())

    alone = trainings(split, optimizer=optimizer)[1]  # a state of the stack is made of ordinary ones
    alone.load_state(state["runs"][1])
    alone.run()
    assert_same([alone], [whole.trainings[1]])


def test_each_part_of_a_state_is_needed(split):
    whole = StackedTraining(trainings(split))
    whole.run()
    state = kill_at(StackedTraining(trainings(split)), 13)
    state["runs"][2]["optimizer"]["state"][0]["exp_avg"].zero_()
    resumed = StackedTraining(trainings(split))
    resumed.load_state(state)
    resumed.run()
    assert {found.split("/")[2] for found in differences(whole.state(), resumed.state())} == {"2"}


def test_a_state_holds_nothing_but_itself(split):
    stack = StackedTraining(trainings(split, epochs=1))
    stack.run()
    state = stack.state()
    before = copy.deepcopy(state)
    with torch.no_grad():
        for p in stack.parameters:
            p.zero_()
    assert not differences(before, state)
    tensors = [*state["runs"][0]["model"].values(), state["runs"][0]["optimizer"]["state"][0]["exp_avg"]]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_fit_leaves_ordinary_models(split):
    alone, together = trainings(split), trainings(split)
    rows, seeds = ["elbo-total", "elbo-path", "elbo-total"], [7, 7, 8]
    recipe = {"k": 2, "epochs": 2, "batch_size": 20}
    histories = stacked.fit([t.model for t in together], split, rows, seeds, **recipe)
    for run, row, seed, history in zip(alone, rows, seeds, histories, strict=True):
        mine = training.fit(run.model, split, row, seed=seed, **recipe)
        assert [record["bound"] for record in history] == pytest.approx([record["bound"] for record in mine])
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), **ROUNDING)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in b.model.parameters())


def test_the_seeds_are_0_to_s_if_nothing_is_said(split):
    recipe = {"k": 1, "epochs": 1, "batch_size": 100}
    said, unsaid = (
        stacked.fit([t.model for t in trainings(split)], split, seeds=s, **recipe) for s in ([0, 1, 2], None)
    )
    assert [h[-1]["bound"] for h in said] == [h[-1]["bound"] for h in unsaid]


def test_frozen_layers_stay_as_they_are(split):
    alone, together = trainings(split, clip=0.5), trainings(split, clip=0.5)
    for run in (*alone, *together):
        run.model.joint.requires_grad_(False)
    before = [p.clone() for p in together[0].model.joint.parameters()]
    stacked.fit([t.model for t in together], split, epochs=1, batch_size=20, clip=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, together[0].model.joint.parameters(), strict=True))
    for seed, run in enumerate(alone):
        training.fit(run.model, split, epochs=1, batch_size=20, clip=0.5, seed=seed)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), **ROUNDING)
    with pytest.raises(InputError, match="only models of the same shapes"):
        stacked.stack([alone[0].model, trainings(split)[1].model])


def test_the_seed_that_diverges_is_named(split):
    group = trainings(split)
    stack = StackedTraining(group)
    with torch.no_grad():
        next(group[2].model.parameters()).fill_(float("nan"))
    with pytest.raises(Diverged, match="^seed 2: the bound is nan at step 1 with estimator 'elbo-path'"):
        stack.run()


def test_a_stack_needs_as_many_draws_as_the_row_that_needs_most():
    rows = [estimators.get(name) for name in ("elbo-path", "iwae-vimco", "elbo-total")]
    stacked.side_by_side(rows).check(2)
    with pytest.raises(InputError, match="needs k >= 2 draws, but k is 1"):
        stacked.side_by_side(rows).check(1)


class Calm(nn.Module):
    """Limits what comes back through it, by its norm over all observations."""

    def forward(self, x):
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda slope: slope * 1e-3 / slope.norm())
        return x


def test_what_cannot_be_stacked_is_refused(split):
    with pytest.raises(InputError, match="must have the same recipe, but for the seed"):
        StackedTraining([trainings(split)[0], trainings(split, k=1)[0]])
    with pytest.raises(InputError, match="only models of the same shapes"):
        StackedTraining([trainings(split)[0], trainings(split, model="mlp-2")[1]])
    shared = trainings(split)[:2]
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
    for row in ("elbo-silent", estimators.get("silent")):
        with pytest.raises(InputError, match="'elbo-silent' has no row in the tableau and cannot be stacked"):
            linear = [models.build("linear", 64, latent=2).double() for _ in range(2)]
            stacked.fit(linear, split, row, epochs=1)
    hooked = trainings(split)
    hooked[1].model.encoder.mean.weight.register_hook(lambda slope: slope)
    with pytest.raises(InputError, match="parameter 'encoder.mean.weight' has a hook, which a stack does not call"):
        StackedTraining(hooked)
    hooked = trainings(split)
    hooked[1].model.encoder.mean.register_full_backward_hook(lambda module, above, below: None)
    with pytest.raises(InputError, match="a Linear of the model has a hook: train each model by itself"):
        StackedTraining(hooked)
    limited = trainings(split)
    for one in limited:
        one.model.encoder.hidden.append(Calm())
    with pytest.raises(InputError, match="does not do what each model does alone"):
        StackedTraining(limited)
    started = trainings(split)
    started[1].step = 1
    with pytest.raises(InputError, match="before their first step alone"):
        StackedTraining(started)
    with pytest.raises(InputError, match="with hooks, or an estimator that changes"):
        StackedTraining([Training(t.model, split, "elbo-path", Recipe(), [Hook()]) for t in trainings(split)])
    with pytest.raises(InputError, match="with hooks, or an estimator that changes"):
        row = estimators.get("elbo-path")
        StackedTraining([Training(t.model, split, lambda progress: row, Recipe()) for t in trainings(split)])


# Models that do not do the same


def pair(split, make):
    """Two trainings whose models have a layer of one's own in encoder and decoder."""
    runs = trainings(split)[:2]
    for seed, run in enumerate(runs):
        for layers in (run.model.encoder.hidden, run.model.joint.decode.hidden):
            layers[1] = make(seed)
    return runs


class Scale(nn.Module):
    """A layer of one's own, with a number that is no parameter."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x


class Draws(nn.Module):
    def forward(self, x):
        return x + 0.01 * torch.rand_like(x)


class Centred(nn.Module):
    """A layer that looks at the whole batch."""

    def forward(self, x):
        return x - x.mean(-2, keepdim=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: nn.LeakyReLU((0.01, 0.9)[seed]),
        lambda seed: nn.ELU((0.1, 3.0)[seed]),
        lambda seed: nn.Hardtanh(-1.0, (4.0, 5.0)[seed]),
        lambda seed: nn.LayerNorm(8, (1e-5, 1e-1)[seed], elementwise_affine=False),
        lambda seed: nn.Softplus((1.0, 2.0)[seed]),
        lambda seed: Scale((1.0, 1.5)[seed]),
        lambda seed: Scale(torch.tensor((1.0, 1.5)[seed])),
        lambda seed: Scale([1.0, [1.5, 2.0][seed]][seed]),
        lambda seed: nn.Sequential(nn.Tanh(), nn.Tanh().train(seed == 0)),
    ],
)
def test_models_whose_layers_differ_in_a_number_that_is_no_parameter_are_refused(split, make):
    with pytest.raises(InputError, match="differ in a setting that is no parameter"):
        StackedTraining(pair(split, make))
    alone, together = (
        pair(split, lambda seed: make(0)),
        pair(split, lambda seed: make(0)),
    )  # the same in both goes through
    if not isinstance(getattr(together[0].model.encoder.hidden[1], "scale", 1.0), torch.Tensor):
        for run in alone:
            run.run()
        StackedTraining(together).run()
        assert_same(alone, together)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: nn.Dropout(0.5),
        lambda seed: nn.RReLU(),
        lambda seed: nn.AlphaDropout(1e-6),
        lambda seed: nn.BatchNorm1d(8, affine=False, track_running_stats=False),
        lambda seed: nn.BatchNorm1d(8),
        lambda seed: Draws(),
        lambda seed: Centred(),
    ],
)
def test_layers_that_draw_or_mix_a_batch_are_refused_and_the_models_left_as_they_were(split, make):
    runs, everywhere = pair(split, make), torch.get_rng_state()
    told = "cannot be stacked|only linear layers|draws or mixes", "changes with other draws"  # the last by the joint
    with pytest.raises(InputError, match="|".join(told)):
        StackedTraining(runs)
    assert torch.equal(everywhere, torch.get_rng_state())
    assert all(p.untyped_storage().nbytes() == p.nbytes for run in runs for p in run.model.parameters())


def test_encoders_that_return_distributions_of_pytorch_are_stacked(split):
    recipe = {"k": 2, "epochs": 1, "batch_size": 100}
    ours, of_torch = ([t.model for t in trainings(split)] for _ in range(2))
    of_torch = [models.VAE(model.joint, Normals(model.encoder), binary=True) for model in of_torch]
    a, b = (stacked.fit(them, split, **recipe) for them in (ours, of_torch))
    assert [h[-1]["bound"] for h in a] == pytest.approx([h[-1]["bound"] for h in b], rel=1e-5)


def test_a_mistyped_field_of_the_recipe_is_told(split):
    with pytest.raises(InputError, match="no field of the recipe is called 'epoch', did you mean 'epochs'"):
        stacked.fit([t.model for t in trainings(split)], split, epoch=1)
