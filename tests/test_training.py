"""The training loop: schedule, step, seeds, and a state that holds all there is."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import vaelib
from vaelib import data, estimators, models, optimizers, runs, training
from vaelib.config import Config, Recipe
from vaelib.data import Split
from vaelib.errors import InputError
from vaelib.estimators import silent
from vaelib.posteriors import DiagonalGaussian, FactorisedBernoulli
from vaelib.training import Diverged, Hook, Progress, Training, check_repeats, train_step


@pytest.fixture(scope="module")
def split():
    return data.load("digits", "dynamic").train


def small_model(seed: int = 0):
    return models.build("mlp-1", 64, generator=torch.Generator().manual_seed(seed), hidden=8, latent=3)


def small_training(split, estimator="iwae-dreg", hooks=(), model=None, **recipe) -> Training:
    recipe = {"k": 2, "epochs": 2, "batch_size": 50, **recipe}
    return Training(model or small_model(), split, estimator, Recipe(**recipe), hooks)


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


def kill_at(training: Training, step: int):
    """Run ``training`` up to ``step`` and return its state there."""

    def after_step(training):
        if training.step == step:
            raise Killed

    with pytest.raises(Killed):
        training.run(after_step)
    return copy.deepcopy(training.state())


def at_epoch(epoch: float) -> Progress:
    return Progress(0, epoch, 0.0)


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
    ours = [1e-3 * training.burda(at_epoch(epoch)) for epoch in range(3280)]
    assert ours == pytest.approx(published, rel=1e-12)
    assert training.burda(at_epoch(4000)) == training.burda(at_epoch(3279)) == training.burda(at_epoch(3279.9))


def test_the_schedule_reaches_the_optimizer(split):
    history = small_training(split, schedule="burda", lr=2e-3, epochs=5, k=1, batch_size=500).run()
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


def adam_by_hand(start, gradients, lr, eps, beta1=0.9, beta2=0.999):
    """Algorithm 1 of Kingma and Ba (2015)."""
    theta, m, v, path = start, 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        theta = theta - lr * m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
        path.append(theta)
    return np.array(path)


def steps_of(optimizer, parameter, gradients):
    path = []
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.array(path)


def test_the_recipe_is_that_of_burda_et_al_if_nothing_is_said():
    """Their batch of 20, rate of 1e-3 and Adam's constant of 1e-4, at one draw."""
    recipe = Recipe()
    assert (recipe.k, recipe.batch_size, recipe.lr, recipe.adam_eps, recipe.clip) == (1, 20, 1e-3, 1e-4, None)


def test_the_released_adam():
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=7), random.normal(size=(30, 7))
    recipe = Recipe(lr=0.05, adam_eps=1e-2, batch_size=20)
    by_hand = released_by_hand(start, gradients, 0.05, 1e-2, 20)
    paths = {}
    for name in optimizers.OPTIMIZERS:
        parameter = nn.Parameter(torch.from_numpy(start.copy()))
        optimizer = optimizers.build_optimizer([parameter], replace(recipe, optimizer=name))
        paths[name] = steps_of(optimizer, parameter, gradients)
    np.testing.assert_allclose(paths["adam-released"], by_hand, rtol=1e-12)
    assert (by_hand[0] == start).all() and (by_hand[1] != start).all()

    # the negative control: each fault of the released code alone is seen
    assert np.abs(paths["adam"] - by_hand).max() > 0.01
    np.testing.assert_allclose(paths["sgd"], start - 0.05 * gradients.cumsum(0), rtol=1e-12)
    np.testing.assert_allclose(paths["adam"], adam_by_hand(start, gradients, 0.05, 1e-2), rtol=1e-9)
    for change in ({"beta1": 0.9}, {"batch_size": 1}, {"eps": 1e-4}):
        settings = {"lr": 0.05, "eps": 1e-2, "batch_size": 20, **change}
        assert np.abs(paths["adam-released"] - released_by_hand(start, gradients, **settings)).max() > 1e-4, change


def test_without_shuffling_every_epoch_has_the_same_order(split):
    run = small_training(split, shuffle=False, batch_size=500, optimizer="adam-released")
    order = run.order.clone()
    run.run()
    assert torch.equal(run.order, order)


@pytest.mark.parametrize(("clip", "expected"), [(0.01, 0.01), (1e9, None), (None, None)])
def test_clip_limits_the_gradient(split, clip, expected):
    model = small_model()
    x = split.batch(slice(0, 20), torch.Generator().manual_seed(0))
    eps = model.encoder(x).noise(1, torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training.train_step(model, estimators.get("elbo-path"), optimizer, x, eps, clip)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert norm == pytest.approx(expected, rel=1e-3) if expected else norm > 1


HUGE = 1e31  # finite, but its square is infinite in single precision


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_whose_square_overflows_is_brought_down_to_the_limit(compiled):
    """As torch's own clip does not: its norm is infinite then, and nothing moves any more."""
    slopes = [torch.tensor([3 * HUGE, 0.0, -1.0]), torch.tensor([[4 * HUGE]])]

    def clipped(*slopes):
        factor = optimizers.shrinkage(slopes, 5.0)
        return [factor * slope for slope in slopes]

    if compiled:
        clipped = make_fx(clipped)(*map(torch.ones_like, slopes))
    expected = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([[4.0]])]
    torch.testing.assert_close(clipped(*slopes), expected, rtol=1e-5, atol=1e-20)
    torch.testing.assert_close(clipped(*expected), expected, rtol=1e-5, atol=0)  # at the limit already
    parameters = [nn.Parameter(torch.zeros_like(slope)) for slope in slopes]
    for p, slope in zip(parameters, slopes):
        p.grad = slope.clone()
    nn.utils.clip_grad_norm_(parameters, 5.0)
    assert all(not p.grad.any() for p in parameters)


LARGE = {
    "double precision": [torch.tensor([3e160, 4e160], dtype=torch.float64)],
    "both precisions": [torch.tensor([3e31]), torch.tensor([4e160], dtype=torch.float64)],
    "complex numbers": [torch.tensor([3e31j]), torch.tensor([4e31])],
    "a part without numbers": [torch.zeros(0, 3), torch.tensor([3e31, 4e31])],
    "few of many rows": [torch.tensor([[3e31, 4e31], [0.0, 0.0]]).to_sparse(1)],
    "a single number": [torch.tensor(3e31), torch.tensor([4e31])],
    "many numbers": [torch.full((10_000,), 3e38)],
}


@pytest.mark.parametrize("kind", LARGE)
def test_the_limit_holds_whatever_the_numbers_are(kind):
    parameters = [nn.Parameter(torch.zeros(slope.shape, dtype=slope.dtype)) for slope in LARGE[kind]]
    for p, slope in zip(parameters, LARGE[kind]):
        p.grad = slope.clone()
    optimizers.clip_gradient(iter(parameters), 5.0)
    norm = math.sqrt(sum(p.grad.to_dense().abs().double().square().sum().item() for p in parameters))
    assert norm == pytest.approx(5, rel=1e-5)


def test_where_no_square_overflows_the_limit_is_torch_s_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        slopes = [torch.randn(7, 3, generator=generator) * 10.0 ** float(size) for size in range(-2, 3)]
        ours, theirs = ([nn.Parameter(torch.zeros(7, 3)) for _ in slopes] for _ in range(2))
        for p, q, slope in zip(ours, theirs, slopes):
            p.grad, q.grad = slope.clone(), slope.clone()
        optimizers.clip_gradient(ours, 5.0)
        nn.utils.clip_grad_norm_(theirs, 5.0)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours, theirs))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_not_made_so_by_the_limit(bad):
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([bad, 1.0])
    optimizers.clip_gradient([p], 5.0)
    assert not p.grad.isfinite().all()


def test_fit_raises_the_bound_and_returns_the_history(split):
    model = small_model()
    history = training.fit(model, split, "elbo-path", epochs=3, lr=1e-2)
    assert [(record["epoch"], record["step"]) for record in history] == [(1, 74), (2, 148), (3, 222)]
    assert history[0]["bound"] + 1 < history[1]["bound"] < history[2]["bound"] < 0
    again = small_model()
    assert not differences(history, training.fit(again, split, estimators.get("elbo-path"), epochs=3, lr=1e-2))
    assert not differences(model.state_dict(), again.state_dict())


def test_seeds(split):
    same, again, other = (small_training(split, seed=seed) for seed in (1, 1, 2))
    for run in (same, again, other):
        run.run()
    assert not differences(same.state(), again.state())
    assert {"/order", "/bounds", "/streams/noise"} <= set(differences(same.state(), other.state()))


def test_streams_are_apart():
    draws = {
        (name, seed): torch.rand(1, generator=training.stream(name, seed)).item()
        for name in training.STREAMS
        for seed in range(20)
    }
    assert len(set(draws.values())) == len(draws)


def test_an_epoch_shows_every_image_once_and_no_part_of_a_batch(split):
    seen = []

    class Watch(Hook):
        def update(self, training, x):
            seen.append(len(x))
            return training.plain_step(x, training.noise(x))

    run = small_training(split, hooks=[Watch()], epochs=1)
    run.run()
    assert seen == [50] * (len(split) // 50)
    assert len(run.order.unique()) == 50 * (len(split) // 50) and run.order.max() < len(split)
    assert not torch.equal(run.order, run.order.sort().values)


STEPS = 29  # an epoch of the digits at batch size 50


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 7, 2 * STEPS - 1])
def test_a_state_is_all_there_is(split, step):
    whole = small_training(split)
    whole.run()
    resumed = small_training(split)
    resumed.load_state(kill_at(small_training(split), step))
    resumed.run()
    assert not differences(whole.state(), resumed.state())


def test_a_released_recipe_resumes(split):
    released = {"optimizer": "adam-released", "shuffle": False}
    whole, resumed = small_training(split, **released), small_training(split, **released)
    whole.run()
    resumed.load_state(kill_at(small_training(split, **released), STEPS + 7))
    resumed.run()
    assert not differences(whole.state(), resumed.state())


@pytest.mark.parametrize(
    "lost", ["order", "bounds", "optimizer", "streams/noise", "streams/binarisation", "streams/order"]
)
def test_each_part_of_the_state_is_needed(split, lost):
    """The negative control: leave one part out, and the comparison of the test above must fail."""
    whole = small_training(split)
    whole.run()
    state = kill_at(small_training(split), 10)
    fresh = kill_at(small_training(split), 1) if lost == "optimizer" else small_training(split).state()
    part, _, name = lost.partition("/")
    if name:
        state[part][name] = fresh[part][name]
    else:
        state[part] = fresh[part]
    resumed = small_training(split)
    resumed.load_state(state)
    resumed.run()
    assert differences(whole.state(), resumed.state())


def test_more_epochs_later_are_the_same_as_at_once(split):
    short, long = small_training(split, epochs=1), small_training(split, epochs=3, schedule="constant")
    short.run()
    long.run()
    resumed = small_training(split, epochs=3)
    resumed.load_state(copy.deepcopy(short.state()))
    resumed.run()
    assert not differences(long.state(), resumed.state())


def test_on_another_kind_of_device_the_noise_is_drawn_anew(split):
    state = kill_at(small_training(split), 10)
    moved = small_training(split)
    moved.load_state({**state, "device": "elsewhere", "streams": {"order": state["streams"]["order"]}})
    assert torch.equal(moved.streams["order"].get_state(), state["streams"]["order"])
    assert not torch.equal(moved.streams["noise"].get_state(), small_training(split).streams["noise"].get_state())
    moved.run()
    assert moved.history[-1]["epoch"] == 2


class Poison(Hook):
    """From one step on, a parameter is nan."""

    at = STEPS + 12

    def update(self, training, x):
        bound = training.plain_step(x, training.noise(x))
        if training.step + 1 == self.at:
            next(training.model.parameters()).data[0, 0] = math.nan
        return bound


def test_a_bound_that_is_not_finite_is_named_by_its_step(split):
    with pytest.raises(
        Diverged, match=rf"^the bound is nan at step {STEPS + 13} with estimator 'rws', k = 2 and learning"
    ):
        small_training(split, "rws", hooks=[Poison()]).run()


@pytest.mark.parametrize(("first", "seen"), [(42, 100), (250, 300)])
def test_a_bound_that_is_not_finite_is_seen_within_a_hundred_steps(first, seen, split):
    """And it is the first one that is named, in an epoch of 300 steps."""

    class Late(Hook):
        def update(self, training, x):
            bound = training.plain_step(x, training.noise(x))
            return bound * math.nan if training.step + 1 in (first, first + 3) else bound

    run = small_training(split, batch_size=len(split) // 300, hooks=[Late()])
    with pytest.raises(Diverged, match=f"the bound is nan at step {first} "):
        run.run()
    assert run.step == seen and run.steps_per_epoch >= seen


def test_a_state_that_is_not_finite_is_not_given_away(split):
    run = small_training(split, hooks=[Poison()])

    def after_step(training):
        if training.step == Poison.at:  # the parameters are bad, the bounds are all still good
            training.state()

    with pytest.raises(Diverged, match=rf"a parameter or its gradient is not finite at step {STEPS + 12} "):
        run.run(after_step)


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
        ({"shuffle": 1}, "shuffle must be true or false, but is 1"),
        ({"k": np.int64(0)}, "k must be a whole number of at least 1"),
        ({"k": np.float64(2)}, "k must be a whole number of at least 1"),
        ({"lr": np.float32("nan")}, "lr must be a positive number"),
    ],
)
def test_a_recipe_that_cannot_be_meant(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Recipe(**values)


def test_a_recipe_of_numpy_s_numbers_is_that_of_python_s():
    """As a sweep has them: for seed in np.arange(5), for lr in np.logspace(-4, -2)."""
    values = {"k": np.int32(2), "seed": np.int64(3), "lr": np.float64(0.5), "clip": np.float32(0.25)}
    recipe = Config(**values, shuffle=np.bool_(False), sizes={"latent": np.uint8(4)})
    same = Config(k=2, seed=3, lr=0.5, clip=0.25, shuffle=False, sizes={"latent": 4})
    assert recipe == same and json.loads(json.dumps(asdict(recipe))) == asdict(same)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sizes": 3}, "sizes must map names to whole numbers"),
        ({"sizes": {"latent": 0}}, "size 'latent' must be a whole number of at least 1"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must be a number of at least 0"),
        (
            {"checkpoint_seconds": 10**400},
            "checkpoint_seconds must be a number of at least 0, but is 10{39}[.]{3}0{17}$",
        ),
        ({"checkpoint_seconds": False}, "checkpoint_seconds must be a number of at least 0"),
        *(({name: 10**400}, f"{name} must be a positive number") for name in ("lr", "adam_eps", "clip")),
        ({"lr": 10**5000}, "lr must be a positive number, but is a int too long to be shown$"),
        ({"model": "a\0.py:f"}, r"model must be a name, but is 'a\\x00.py:f'"),
        ({"model": "\ud800.py:f"}, r"model must be a name, but is '\\ud800.py:f'"),
        ({"data": "x" * 5000}, "data must be a name, but is 'x{39}[.]{3}x{16}'$"),
        ({"compile": "yes"}, "compile must be true or false, but is 'yes'"),
        ({"lr": -1.0}, "lr must be"),
    ],
)
def test_a_configuration_that_cannot_be_meant(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Config(**values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"schedule": "burdas"}, "did you mean 'burda'"),
        ({"optimizer": "adam-relesed"}, "no optimizer is called 'adam-relesed', did you mean 'adam-released'"),
        ({"data": "mnits"}, "no data set is called 'mnits', did you mean 'mnist'"),
        ({"binarisation": "dynamik"}, "did you mean 'dynamic'"),
        ({"model": "mlp1"}, "did you mean 'mlp-1'"),
        ({"estimator": "elbo-pth"}, "did you mean 'elbo-path'"),
        ({"estimator": "iwae-vimco"}, "needs k >= 2 draws, but k is 1"),
        ({"device": "gpu"}, "no device is called 'gpu'.*choose from: auto, cpu, cuda"),
    ],
)
def test_a_name_that_does_not_exist_is_told_before_anything_is_made(values, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        runs.train(tmp_path / "run", Config(**values))
    assert not (tmp_path / "run").exists()


def test_things_that_do_not_go_together(split):
    grey = data.load("digits", "grey").train
    with pytest.raises(InputError, match="images of 0 and 1, but these have grey levels: use binarisation=dynamic"):
        training.fit(small_model(), grey)
    fixed = data.load("digits", "fixed").train
    training.fit(small_model(), fixed, epochs=1, batch_size=500)
    assert len(training.fit(small_model(), split, epochs=1, batch_size=1497)) == 1  # all of them at once
    with pytest.raises(InputError, match="batch_size is 1498, but there are only 1497 training images"):
        training.fit(small_model(), split, batch_size=1498)
    with pytest.raises(InputError, match="needs k >= 2"):
        training.fit(small_model(), split, "elbo-score-loo")
    with pytest.raises(InputError, match="did you mean 'iwae-dreg'"):
        training.fit(small_model(), split, "iwae-drek")


# The kinds of fault: what a model of one's own may be


def test_a_model_for_images_of_another_size_is_told_what_it_would_take(split):
    for name in ("mlp-1", "linear"):
        for width in (784, 9):
            with pytest.raises(InputError, match=rf"64 pixels, but would take {width} .*: build it with data_dim=64"):
                training.fit(models.build(name, width, latent=3), split)


@pytest.mark.parametrize("part", ["encoder", "joint"])
@pytest.mark.parametrize("error", [RuntimeError("the lookup table is empty"), KeyError("mine"), TypeError("mine")])
def test_a_user_s_own_exception_reaches_them_as_it_is(split, part, error):
    model = small_model()

    def fail(*arguments):
        raise error

    getattr(model, part).forward = fail
    with pytest.raises(type(error)) as caught:
        training.fit(model, split)
    assert caught.value is error


def doubled(split):
    return replace(split, grey=split.grey.double())


def test_the_dtype_follows_the_data(split):
    model = small_model().double()
    assert doubled(split).batch(slice(0, 3), torch.Generator().manual_seed(0)).dtype == torch.float64
    history = training.fit(model, doubled(split), epochs=1)
    assert math.isfinite(history[0]["bound"]) and next(model.parameters()).dtype == torch.float64
    for wrong in ((small_model(), doubled(split)), (small_model().double(), split)):
        with pytest.raises(
            InputError, match=r"images are torch.float\d\d, but the model is torch.float\d\d: convert one"
        ):
            training.fit(*wrong)
    grey = data.load("digits", "grey").train
    with pytest.raises(InputError, match="images are torch.float32, but the model is torch.float64: .*double"):
        training.fit(models.build("linear", 64, latent=2).double(), grey)


class Casting(nn.Module):
    """An encoder of one's own that takes any dtype."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.to(next(self.inner.parameters()).dtype))


def test_a_model_that_casts_by_itself_is_let_through(split):
    model = small_model()
    model.encoder, model.joint = Casting(model.encoder), model.joint
    training.fit(model, doubled(split), epochs=1, batch_size=500)


def test_a_gaussian_likelihood_takes_any_finite_number(split):
    grey = replace(split, grey=3 * split.grey - 1, binarisation="grey")
    training.fit(models.build("linear", 64, latent=2), grey, epochs=1, batch_size=500)
    with pytest.raises(InputError, match="wants images of 0 and 1"):
        training.fit(small_model(), grey)


def strided(kind, values):
    """The same values, dense in memory or with gaps or overlaps, and the memory that they are a view of."""
    rows, columns = values.shape
    if kind == "columns":
        memory = torch.cat([values, torch.full_like(values, 7.0)], 1)
        return memory[:, :columns], memory
    if kind == "every other":
        memory = torch.stack([values, torch.full_like(values, 7.0)], -1).flatten(1)
        return memory[:, ::2], memory
    if kind == "transposed":
        memory = values.T.contiguous()
        return memory.T, memory
    memory = values[:, :1].clone()
    return memory.expand(rows, columns), memory


@pytest.mark.parametrize("kind", ["columns", "every other", "transposed", "expanded"])
@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_a_parameter_that_is_a_view_is_trained_like_any_other(kind, optimizer):
    generator = torch.Generator().manual_seed(0)
    values, x = torch.randn(12, 3, generator=generator), torch.randn(60, 12, generator=generator)
    images = data.images.Split(x, None, (3, 4), "grey")
    ends = []
    for dense in (False, True):
        view, memory = strided(kind, values)
        before = memory.clone()
        weight = view.clone(memory_format=torch.contiguous_format) if dense else view
        joint = models.LinearGaussian(weight, torch.zeros(12), torch.tensor(0.0))
        encoder = models.LinearEncoder(0.1 * torch.ones(3, 12), torch.zeros(3), torch.zeros(3))
        training.fit(models.VAE(joint, encoder, False), images, epochs=4, lr=1e-2, optimizer=optimizer)
        ends.append([p.detach().clone() for p in (*joint.parameters(), *encoder.parameters())])
        others = memory[memory == 7.0] if kind in ("columns", "every other") else torch.tensor([7.0])
        assert (others == 7).all() and (kind in ("transposed",) or torch.equal(memory, before))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_what_fills_its_memory():
    whole = torch.zeros(4, 6)
    assert all(map(optimizers.dense, (whole, whole.T, whole[1], whole[:1, :1], torch.zeros(()))))
    assert optimizers.dense(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not any(map(optimizers.dense, (whole[:, :3], whole[::2], whole[:, 0], whole[0].expand(4, 6), whole[0, ::2])))


@pytest.mark.parametrize("row", [row for row in estimators.TABLEAU])
def test_a_frozen_encoder_lets_the_decoder_learn_by_every_row(split, row):
    model = small_model()
    model.encoder.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.fit(model, split, row, k=2, epochs=1, batch_size=500)
    moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
    assert all(move == name.startswith("joint") for name, move in moved.items())


def test_a_model_of_which_nothing_learns_is_refused(split):
    with pytest.raises(InputError, match="no parameter of this model learns: set requires_grad"):
        training.fit(small_model().requires_grad_(False), split, "elbo-path", epochs=1)


# Random layers


def test_what_draws_from_the_global_generator_draws_from_the_one_that_is_given():
    """Anew each time: the second draw is not the first, and the global generator knows of neither."""
    generator, same = (torch.Generator().manual_seed(3) for _ in range(2))
    before, found = torch.get_rng_state(), []
    for _ in range(2):
        with training.drawing_from(generator):
            found.append(torch.rand(5))
    assert all(torch.equal(draw, torch.rand(5, generator=same)) for draw in found)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(generator.get_state(), same.get_state())


class Everywhere(nn.Module):
    """Noise from torch's global generator."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


@pytest.mark.parametrize("layer", [nn.Dropout(0.2), nn.RReLU(), Everywhere()], ids=lambda layer: type(layer).__name__)
def test_the_same_seed_gives_the_same_training_with_random_layers(split, layer):
    def run(seed=0, **more):
        model = small_model()
        model.joint.decode.hidden.append(layer)
        return small_training(split, model=model, seed=seed, **more)

    whole, again, resumed = run(), run(), run()
    torch.manual_seed(5)
    whole.run()
    torch.manual_seed(6)
    before = torch.get_rng_state()
    again.run()
    assert torch.equal(before, torch.get_rng_state()), "the caller's generator is as it was"
    assert not differences(whole.state(), again.state())
    resumed.load_state(kill_at(run(), STEPS + 7))
    torch.rand(3)
    resumed.run()
    assert not differences(whole.state(), resumed.state())
    other = kill_at(run(), STEPS + 7)
    other["streams"]["layers"] = training.stream("layers", 1).get_state()  # the negative control
    resumed = run()
    resumed.load_state(other)
    resumed.run()
    assert differences(whole.state(), resumed.state())


def test_what_is_drawn_between_steps_does_not_change_the_training(split):
    def run():
        model = small_model()
        model.joint.decode.hidden.append(nn.Dropout(0.2))
        return small_training(split, model=model)

    quiet, watched = run(), run()
    quiet.run()
    watched.run(lambda training: torch.rand(3))
    assert not differences(quiet.state(), watched.state())


def test_looking_at_a_model_leaves_it_as_it_was(split):
    """Neither the trial nor the noise's first look moves batch norm, modes, or any generator."""

    class Normed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.norm, self.drop = inner, nn.BatchNorm1d(64), nn.Dropout(0.1).eval()

        def forward(self, x):
            return self.inner(self.drop(self.norm(x)))

    model = small_model()
    model.encoder = Normed(model.encoder)
    before, everywhere = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    run = small_training(split, model=model)
    states = {name: generator.get_state() for name, generator in run.streams.items()}
    eps = run.noise(split.batch(slice(0, 7), torch.Generator().manual_seed(0)))
    assert torch.equal(eps, torch.randn(2, 7, 3, generator=training.stream("noise", 0)))
    run.streams["noise"].set_state(states["noise"])
    assert all(torch.equal(state, run.streams[name].get_state()) for name, state in states.items())
    assert not differences(before, model.state_dict()) and torch.equal(everywhere, torch.get_rng_state())
    assert model.encoder.norm.training and not model.encoder.drop.training


@pytest.mark.parametrize("name", models.MODELS)
def test_a_step_can_be_rehearsed_with_every_model(split, name):
    model = models.build(name, 64, generator=torch.Generator().manual_seed(0), shape=(8, 8))
    row = "elbo-path" if "mixture" in name else "elbo-score"  # the one takes no z without a path, the other no strata
    check_repeats(small_training(split, row, model=model, k=4, batch_size=10))


def test_a_rehearsal_leaves_a_training_as_it_was(split):
    """With what a step in training mode moves: batch norm, spectral norm, and the generators."""

    def run():
        model, _ = small_model(), torch.manual_seed(0)
        layers = nn.BatchNorm1d(64), nn.Dropout(0.2), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
        model.encoder = nn.Sequential(*layers, model.encoder)
        return small_training(split, model=model)

    quiet, watched = run(), run()
    quiet.run()
    everywhere = torch.get_rng_state()
    watched.run(check_repeats)
    assert not differences(quiet.state(), watched.state()) and torch.equal(everywhere, torch.get_rng_state())
    before = copy.deepcopy(watched.model.state_dict())
    watched.coming_loss()
    assert differences(before, watched.model.state_dict()), "a step does move it"


# Hooks and what changes from step to step


def test_an_estimator_that_changes_is_asked_at_each_step_and_told_how_far_it_is(split):
    seen = []

    def estimator(progress):
        seen.append(progress)
        return estimators.get("elbo-path")

    small_training(split, estimator).run()
    assert seen[0] == Progress(0, 0.0, 0.0)
    assert seen[1:] == [Progress(i, i / STEPS, i / (2 * STEPS)) for i in range(2 * STEPS)]


def test_hooks_see_epochs_stop_the_training_and_finish(split):
    class Half(Hook):
        ends = 0

        def after_epoch(self, training, record):
            record["half"] = training.decay
            training.decay /= 2
            training.restart_optimizer()
            training.stopped = record["epoch"] == 3

        def finish(self, training):
            self.ends += 1

    hook = Half()
    run = small_training(split, hooks=[hook], epochs=9, batch_size=500, lr=0.008)
    history = run.run()
    assert [record["lr"] for record in history] == [0.008, 0.004, 0.002] and run.over and hook.ends == 1
    assert [record["half"] for record in history] == [1.0, 0.5, 0.25] and run.progress.done == pytest.approx(1 / 3)
    assert run.run() is history and len(history) == 3


class Restarts(Hook):
    """Begins every epoch with a new optimiser."""

    def after_epoch(self, training, record):
        training.decay /= 2
        training.restart_optimizer()


class OfItsOwn(Hook):
    """Takes the steps with an optimiser of its own, which remembers nothing."""

    def update(self, training, x):
        optimizer = torch.optim.SGD(training.model.parameters(), 1e-3)
        return train_step(training.model, training.estimator, optimizer, x, training.noise(x))


@pytest.mark.parametrize(("hook", "moments"), [(Restarts, (0, 14, 0)), (OfItsOwn, (0, 0, 0))])
def test_what_an_optimiser_remembers_is_what_it_remembered_when_it_was_recorded(split, hook, moments):
    """Nothing right after a restart, or where it takes no steps; what it did remember must not be lost."""

    def run():
        return small_training(split, hooks=[hook()])

    whole = run()
    whole.run()
    for step, found in zip((STEPS, STEPS + 1, 2 * STEPS), moments, strict=True):
        state, resumed = kill_at(run(), step), run()
        assert len(state["optimizer"]["state"]) == found
        resumed.load_state(copy.deepcopy(state))
        resumed.run()
        assert not differences(whole.state(), resumed.state())
        state["optimizer"]["state"].pop(0, None)
        refused = pytest.raises(InputError, match="of 14 parameters, but does so of 13") if found else nullcontext()
        with refused:
            run().load_state(state)


def test_a_record_of_before_it_said_what_its_optimiser_remembers_is_taken(split):
    whole, resumed = small_training(split), small_training(split)
    state = kill_at(small_training(split), STEPS)
    del state["remembered"]
    whole.run()
    resumed.load_state(state)
    resumed.run()
    assert not differences(whole.state(), resumed.state())


def test_a_tracked_scale_resumes_bit_for_bit(split):
    grey = data.load("digits", "grey").train

    def run():
        model = models.build("guided", 64, generator=torch.Generator().manual_seed(0), hidden=8, latent=3)
        noise = training.stream("noise", 0, step=1)
        scale = silent.TrackedScale(estimators.get("elbo-path"), model, grey.grey[:20], every=4, generator=noise)
        return Training(model, grey, scale, Recipe(epochs=2, batch_size=50)), scale

    (whole, scale), (first, _), (resumed, there) = run(), run(), run()
    whole.run()
    state = kill_at(first, STEPS + 6)
    resumed.load_state(state)
    resumed.run()
    assert not differences(whole.state(), resumed.state()) and scale.scale == there.scale != 0
    state = kill_at(run()[0], STEPS + 6)
    state["hooks"][0]["scale"] += 0.5  # the negative control
    resumed, _ = run()
    resumed.load_state(state)
    resumed.run()
    assert differences(whole.state(), resumed.state())


def test_the_history_has_the_mean_of_an_epoch_s_bounds(split):
    class Counting(Hook):
        def update(self, training, x):
            return torch.tensor(float(training.step))

    training = small_training(split, hooks=[Counting()], batch_size=300)
    steps = training.steps_per_epoch
    assert steps > 1
    assert [record["bound"] for record in training.run()] == [(steps - 1) / 2, steps + (steps - 1) / 2]


def test_a_step_has_the_gradient_and_the_bound_of_its_batch_s_mean_alone(split):
    x, model, row = (
        split.batch(slice(0, 4), torch.Generator().manual_seed(0)),
        small_model(),
        estimators.get("iwae-dreg"),
    )
    q = model.encoder(x)
    eps = q.noise(3, torch.Generator().manual_seed(1))
    loss = row.loss(model.joint, q, x, eps).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for _ in range(2):  # the second step's gradient has nothing of the first one's
        torch.testing.assert_close(training.train_step(model, row, optimizer, x, eps), -loss.detach())
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


# --- held-out observations --------------------------------------------------------------------------------------------


def held_out_training(split, epochs=3, lr=1e-3, patience=None, hook=True):
    model = models.build("linear", 64, None, torch.Generator().manual_seed(0), latent=2)
    recipe = Recipe(epochs=epochs, batch_size=50, lr=lr, seed=1)
    hooks = [training.HeldOut(data.load("digits").test.sample(40), patience)] if hook else []
    return training.Training(model, split, "elbo-path", recipe, hooks)


def test_the_held_out_bound_is_that_of_the_held_out_and_moves_nothing(split):
    watched, alone = held_out_training(split), held_out_training(split, hook=False)
    watched.run(), alone.run()
    for a, b in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)
    x, joint = watched.hooks[0].split.grey, watched.model.joint
    q = watched.model.encoder(x)
    near = torch.distributions.MultivariateNormal(q.mean, torch.diag_embed((2 * q.log_std).exp().expand_as(q.mean)))
    true = torch.distributions.MultivariateNormal(joint.posterior(x).mean, scale_tril=joint.posterior(x).scale_tril)
    exact = joint.log_marginal(x) - torch.distributions.kl_divergence(near, true)
    with torch.no_grad():
        log_w = joint(x, z := q.sample(q.noise(400, torch.Generator().manual_seed(0)))) - q.log_prob(z)
    error = log_w.std(0).square().sum().sqrt().item() / len(x)  # of one draw for each
    assert abs(watched.history[-1]["held_out"] - exact.mean().item()) < 5 * error
    assert all("held_out" in record for record in watched.history) and "held out" in watched.summary()


def test_a_training_stops_when_the_held_out_bound_has_not_risen_for_long_enough(split):
    still = held_out_training(split, epochs=9, lr=1e-30, patience=2)
    assert len(still.run()) == 3 and still.stopped and still.over
    rising = held_out_training(split, epochs=5, patience=2)
    assert len(rising.run()) == 5 and not rising.stopped
    bounds = [record["held_out"] for record in rising.history]
    assert bounds == sorted(bounds)


def test_early_stopping_resumes_where_it_was(split):
    whole, parts = (held_out_training(split, epochs=9, lr=1e-30, patience=4) for _ in range(2))
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        parts.run(lambda training: stop_at(training, 2 * training.steps_per_epoch + 1))
    again = held_out_training(split, epochs=9, lr=1e-30, patience=4)
    again.load_state(parts.state())
    again.run()
    without = lambda history: [{**record, "seconds": 0} for record in history]  # noqa: E731
    assert without(again.history) == without(whole.history) and len(again.history) == 5


def stop_at(training, step):
    if training.step >= step:
        raise KeyboardInterrupt


def test_a_held_out_bound_that_is_not_finite_ends_the_training(split):
    run = held_out_training(split)
    run.hooks[0].split.grey[0, 0] = float("inf")
    with pytest.raises(training.Diverged, match="the held-out bound is nan after epoch 1"):
        run.run()


class Counts:
    """A Poisson posterior: its noise is the draw, so that no other q can draw it."""

    def __init__(self, rate):
        self.rate = rate

    def noise(self, k, generator=None):
        return torch.poisson(self.rate.detach().expand(k, *self.rate.shape), generator=generator)

    def sample(self, eps):
        return eps

    def log_prob(self, z):
        return (z * self.rate.log() - self.rate - torch.lgamma(z + 1)).sum(-1)

    def stop_gradient(self):
        return Counts(self.rate.detach())


class InPairs(DiagonalGaussian):
    """Antithetic pairs, which ``noise_like`` does not tell."""

    def noise(self, k, generator=None):
        half = super().noise(k // 2, generator)
        return torch.cat([half, -half])


class Changing(nn.Module):
    """Uniform noise in evaluation mode, normal noise in a step."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        if not self.training:
            return FactorisedBernoulli(self.head(x))
        return DiagonalGaussian(self.head(x), torch.zeros(2))


def counting(kind):
    torch.manual_seed(0)
    head = nn.Linear(5, 2)
    encoder = nn.Module()
    encoder.head, encoder.kind = head, kind
    encoder.forward = {
        Counts: lambda x: Counts(nn.functional.softplus(head(x)) + 0.1),
        InPairs: lambda x: InPairs(head(x), torch.zeros(2)),
    }.get(kind)
    decode = nn.Linear(2, 5)
    joint = nn.Module()
    joint.decode = decode
    joint.forward = lambda x, z: -(x - decode(z)).square().sum(-1) - z.square().sum(-1) / 10
    return models.VAE(joint, Changing() if kind is Changing else encoder, binary=False)


@pytest.mark.parametrize("kind", [Counts, InPairs, Changing])
def test_noise_is_drawn_by_the_q_of_its_step(kind):
    """As in a plain loop over vaelib.loss; and so does a training that goes on."""
    x = torch.rand(24, 5, generator=torch.Generator().manual_seed(1))
    row = "iwae-path" if kind is InPairs else "elbo-score-loo"
    recipe = Recipe(epochs=2, batch_size=6, k=4, lr=0.05, shuffle=False)

    def begun():
        return Training(counting(kind), Split.of(x), row, recipe)

    whole, loop, first, second = (begun() for _ in range(4))
    whole.run()
    second.load_state(kill_at(first, 5))
    second.run()
    for batch in (*x.split(6), *x.split(6)):
        loop.optimizer.zero_grad()
        q = loop.model.encoder(batch)
        vaelib.loss(row, loop.model.joint, q, batch, 4, loop.streams["noise"]).mean().backward()
        loop.optimizer.step()
    for theirs, mine, again in zip(*(t.model.parameters() for t in (loop, whole, second)), strict=True):
        assert torch.equal(theirs, mine) and torch.equal(mine, again)
