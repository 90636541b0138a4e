"""The training loop: schedule, step, seeds, and a state that holds all there is."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from vaelib import data, models, training
from vaelib.config import Config, Recipe
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS
from vaelib.training import Diverged, Trainer


@pytest.fixture(scope="module")
def split():
    return data.load("digits", "dynamic").train


def small_model(seed: int = 0):
    return models.build("mlp-1", 64, generator=torch.Generator().manual_seed(seed), hidden=8, latent=3)


def small_trainer(split, estimator="iwae-dreg", cls=Trainer, **recipe) -> Trainer:
    recipe = {"k": 2, "epochs": 2, "batch_size": 50, **recipe}
    return cls(small_model(), split, ESTIMATORS[estimator], Recipe(**recipe))


def differences(a, b, path="") -> list[str]:
    """Name every place where two states differ by a single bit; seconds apart."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [found for key in a if key != "seconds" for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), path
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


class Killed(BaseException):
    pass


def kill_at(trainer: Trainer, step: int):
    """Run ``trainer`` up to ``step`` and return its state there."""

    def after_step():
        if trainer.step == step:
            raise Killed

    with pytest.raises(Killed):
        trainer.run(after_step)
    return copy.deepcopy(trainer.state_dict())


# The published schedule: stage, epochs, learning rate (Burda et al. 2016; the numbers of their code).
STAGES = [
    (1, 1, 1e-3),
    (2, 3, 7.2e-4),
    (3, 9, 5.2e-4),
    (4, 27, 3.7e-4),
    (5, 81, 2.7e-4),
    (6, 243, 1.9e-4),
    (7, 729, 1.4e-4),
    (8, 2187, 1e-4),
]


def test_the_schedule_of_burda():
    published = [rate for _, epochs, rate in STAGES for _ in range(epochs)]
    assert len(published) == 3280
    ours = [1e-3 * training.burda(epoch) for epoch in range(1, 3281)]
    assert ours == pytest.approx(published, rel=1e-12)
    assert training.burda(4000) == training.burda(3280)


def test_the_schedule_reaches_the_optimizer(split):
    history = small_trainer(split, schedule="burda", lr=2e-3, epochs=5, k=1, batch_size=500).run()
    assert [record["lr"] for record in history] == pytest.approx([2e-3, 1.44e-3, 1.44e-3, 1.44e-3, 1.04e-3])


def released_by_hand(start, gradients, lr, eps, batch_size, beta1=0.99, beta2=0.999):
    """The recursion of the released code in numpy: all right-hand sides are of the step before."""
    theta, m, v = start.copy(), np.zeros_like(start), np.ones_like(start)
    path = []
    for t, g in enumerate(batch_size * gradients, start=1):
        alpha = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
        theta = theta - alpha * m / (np.sqrt(v) + eps)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        path.append(theta)
    return np.array(path)


def steps_of(optimizer, parameter, gradients):
    path = []
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.array(path)


def test_the_released_adam():
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=7), random.normal(size=(30, 7))
    recipe = Recipe(lr=0.05, adam_eps=1e-2, batch_size=20)
    by_hand = released_by_hand(start, gradients, 0.05, 1e-2, 20)
    paths = {}
    for name, build in training.OPTIMIZERS.items():
        parameter = nn.Parameter(torch.from_numpy(start.copy()))
        paths[name] = steps_of(build([parameter], recipe), parameter, gradients)
    np.testing.assert_allclose(paths["adam-released"], by_hand, rtol=1e-12)
    assert (by_hand[0] == start).all() and (by_hand[1] != start).all()

    # the negative control: each fault of the released code alone is seen
    assert np.abs(paths["adam"] - by_hand).max() > 0.01
    for change in ({"beta1": 0.9}, {"batch_size": 1}, {"eps": 1e-4}):
        settings = {"lr": 0.05, "eps": 1e-2, "batch_size": 20, **change}
        assert np.abs(paths["adam-released"] - released_by_hand(start, gradients, **settings)).max() > 1e-4, change


def test_without_shuffling_every_epoch_has_the_same_order(split):
    trainer = small_trainer(split, shuffle=False, batch_size=500, optimizer="adam-released")
    order = trainer.order.clone()
    trainer.run()
    assert torch.equal(trainer.order, order)


@pytest.mark.parametrize(("clip", "expected"), [(0.01, 0.01), (1e9, None), (None, None)])
def test_clip_limits_the_gradient(split, clip, expected):
    model = small_model()
    x = split.batch(slice(0, 20), torch.Generator().manual_seed(0))
    eps = model.encoder.noise(1, x, torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training.train_step(model, ESTIMATORS["elbo-path"], optimizer, x, eps, clip)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert norm == pytest.approx(expected, rel=1e-3) if expected else norm > 1


def test_fit_raises_the_bound_and_returns_the_history(split):
    model = small_model()
    history = training.fit(model, split, "elbo-path", epochs=3, lr=1e-2)
    assert [(record["epoch"], record["step"]) for record in history] == [(1, 74), (2, 148), (3, 222)]
    assert history[0]["bound"] + 1 < history[1]["bound"] < history[2]["bound"] < 0
    again = small_model()
    assert not differences(history, training.fit(again, split, ESTIMATORS["elbo-path"], epochs=3, lr=1e-2))
    assert not differences(model.state_dict(), again.state_dict())


def test_seeds(split):
    same, again, other = (small_trainer(split, seed=seed) for seed in (1, 1, 2))
    for trainer in (same, again, other):
        trainer.run()
    assert not differences(same.state_dict(), again.state_dict())
    assert {"/order", "/bounds", "/streams/noise"} <= set(differences(same.state_dict(), other.state_dict()))


def test_streams_are_apart():
    draws = {
        (name, seed): torch.rand(1, generator=training.stream(name, seed)).item()
        for name in training.STREAMS
        for seed in range(20)
    }
    assert len(set(draws.values())) == len(draws)


def test_an_epoch_shows_every_image_once_and_no_part_of_a_batch(split):
    seen = []

    class Watched(Trainer):
        def update(self, x):
            seen.append(len(x))
            return super().update(x)

    trainer = small_trainer(split, cls=Watched, epochs=1)
    first = trainer.order.clone()
    trainer.run()
    assert seen == [50] * (len(split) // 50)
    assert torch.equal(trainer.order.sort().values, first) and not torch.equal(trainer.order, first)


STEPS = 29  # an epoch of the digits at batch size 50


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 7, 2 * STEPS - 1])
def test_a_state_is_all_there_is(split, step):
    whole = small_trainer(split)
    whole.run()
    resumed = small_trainer(split)
    resumed.load_state_dict(kill_at(small_trainer(split), step))
    resumed.run()
    assert not differences(whole.state_dict(), resumed.state_dict())


def test_a_released_recipe_resumes(split):
    released = {"optimizer": "adam-released", "shuffle": False}
    whole, resumed = small_trainer(split, **released), small_trainer(split, **released)
    whole.run()
    resumed.load_state_dict(kill_at(small_trainer(split, **released), STEPS + 7))
    resumed.run()
    assert not differences(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    "lost", ["order", "bounds", "optimizer", "streams/noise", "streams/binarisation", "streams/order"]
)
def test_each_part_of_the_state_is_needed(split, lost):
    """The negative control: leave one part out, and the comparison of the test above must fail."""
    whole = small_trainer(split)
    whole.run()
    state = kill_at(small_trainer(split), 10)
    fresh = small_trainer(split).state_dict()
    part, _, name = lost.partition("/")
    if name:
        state[part][name] = fresh[part][name]
    else:
        state[part] = fresh[part]
    resumed = small_trainer(split)
    resumed.load_state_dict(state)
    resumed.run()
    assert differences(whole.state_dict(), resumed.state_dict())


def test_more_epochs_later_are_the_same_as_at_once(split):
    short, long = small_trainer(split, epochs=1), small_trainer(split, epochs=3, schedule="constant")
    short.run()
    long.run()
    resumed = small_trainer(split, epochs=3)
    resumed.load_state_dict(copy.deepcopy(short.state_dict()))
    resumed.run()
    assert not differences(long.state_dict(), resumed.state_dict())


def test_on_another_kind_of_device_the_noise_is_drawn_anew(split):
    state = kill_at(small_trainer(split), 10)
    moved = small_trainer(split)
    moved.load_state_dict({**state, "device": "elsewhere", "streams": {"order": state["streams"]["order"]}})
    assert torch.equal(moved.streams["order"].get_state(), state["streams"]["order"])
    assert not torch.equal(moved.streams["noise"].get_state(), small_trainer(split).streams["noise"].get_state())
    moved.run()
    assert moved.history[-1]["epoch"] == 2


class Poisoned(Trainer):
    """From one step on, a parameter is nan."""

    poison = STEPS + 12

    def update(self, x):
        bound = super().update(x)
        if self.step + 1 == self.poison:
            next(self.model.parameters()).data[0, 0] = math.nan
        return bound


def test_a_bound_that_is_not_finite_is_named_by_its_step(split):
    with pytest.raises(
        Diverged, match=rf"^the bound is nan at step {STEPS + 13} with estimator 'rws', k = 2 and learning"
    ):
        small_trainer(split, "rws", cls=Poisoned).run()


def test_a_state_that_is_not_finite_is_not_given_away(split):
    trainer = small_trainer(split, cls=Poisoned)

    def after_step():
        if trainer.step == Poisoned.poison:  # the parameters are bad, the bounds are all still good
            trainer.state_dict()

    with pytest.raises(Diverged, match=rf"a parameter or its gradient is not finite at step {STEPS + 12} "):
        trainer.run(after_step)


def test_a_learning_rate_far_too_high_is_told(split):
    with pytest.raises(Diverged, match="train anew with a lower lr"):
        training.fit(small_model(), split, "elbo-total", lr=1e30, epochs=2)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"k": 0}, "k must be a whole number of at least 1, but is 0"),
        ({"k": 2.5}, "k must be a whole number"),
        ({"k": True}, "k must be a whole number"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"batch_size": -3}, "batch_size must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"lr": 0.0}, "lr must be a positive number, but is 0.0"),
        ({"lr": math.nan}, "lr must be a positive number, but is nan"),
        ({"lr": math.inf}, "lr must be a positive number"),
        ({"lr": "fast"}, "lr must be a positive number, but is 'fast'"),
        ({"lr": None}, "lr must be a positive number"),
        ({"adam_eps": -1e-8}, "adam_eps must be a positive number"),
        ({"clip": 0}, "clip must be a positive number"),
        ({"schedule": "burdas"}, "did you mean 'burda'"),
        ({"optimizer": "adam-relesed"}, "no optimizer is called 'adam-relesed', did you mean 'adam-released'"),
        ({"shuffle": 1}, "shuffle must be true or false, but is 1"),
    ],
)
def test_a_recipe_that_cannot_be_meant(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Recipe(**values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"data": "mnits"}, "no data set is called 'mnits', did you mean 'mnist'"),
        ({"binarisation": "dynamik"}, "did you mean 'dynamic'"),
        ({"model": "mlp1"}, "did you mean 'mlp-1'"),
        ({"estimator": "elbo-pth"}, "did you mean 'elbo-path'"),
        ({"estimator": "iwae-vimco"}, "needs k >= 2 draws, but k is 1"),
        ({"device": "gpu"}, "no device is called 'gpu'.*choose from: auto, cpu, cuda"),
        ({"sizes": 3}, "sizes must map names to whole numbers"),
        ({"sizes": {"latent": 0}}, "size 'latent' must be a whole number of at least 1"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must be a positive number"),
        ({"compile": "yes"}, "compile must be true or false, but is 'yes'"),
        ({"lr": -1.0}, "lr must be"),
    ],
)
def test_a_configuration_that_cannot_be_meant(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Config(**values)


def test_things_that_do_not_go_together(split):
    grey = data.load("digits", "grey").train
    with pytest.raises(InputError, match="images of 0 and 1, but these have grey levels: use binarisation=dynamic"):
        training.fit(small_model(), grey)
    fixed = data.load("digits", "fixed").train
    training.fit(small_model(), fixed, epochs=1, batch_size=500)
    with pytest.raises(InputError, match="batch_size is 1498, but there are only 1497 training images"):
        training.fit(small_model(), split, batch_size=1498)
    with pytest.raises(InputError, match="needs k >= 2"):
        training.fit(small_model(), split, "elbo-score-loo")
    with pytest.raises(InputError, match="did you mean 'iwae-dreg'"):
        training.fit(small_model(), split, "iwae-drek")
    with pytest.raises(InputError, match="cannot take these images of 64 pixels .*: build it with data_dim=64"):
        training.fit(models.build("mlp-1", 784, hidden=8, latent=3), split)
