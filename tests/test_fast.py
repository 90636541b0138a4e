"""Compiled and captured steps are the steps they stand for; without a compiler, training goes on."""

from __future__ import annotations

import copy
import itertools
import random
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_stacked import assert_same as assert_same_to_rounding
from torch import nn

from vaelib import data, estimators, fast, models, optimizers, posteriors, training
from vaelib.config import Recipe
from vaelib.data import Split
from vaelib.errors import InputError
from vaelib.posteriors import DiagonalGaussian
from vaelib.stacked import StackedTraining
from vaelib.training import Diverged, Training

SMALL = {"hidden": 4, "latent": 2}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler, and none is here"
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a CUDA graph needs an NVIDIA GPU, and none is here"
)


@pytest.fixture(scope="module", autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(model="mlp-1", k=3):
    sizes = {"latent": 2} if model == "linear" else SMALL
    built = models.build(model, 6, generator=torch.Generator().manual_seed(0), **sizes)
    x = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)).round()
    return built, x, built.encoder(x).noise(k, torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def four_at_once(monkeypatch):
    monkeypatch.setitem(training.AT_ONCE, "cpu", 4)


class Loop:
    """What :class:`vaelib.fast.WholeSteps` is told of a training: a model, a row and an optimiser."""

    def __init__(self, model, row, optimizer="adam", clip=None):
        self.model, self.estimator = model, estimators.get(row)
        self.optimizer = optimizers.build_optimizer(model.parameters(), Recipe(optimizer=optimizer, lr=0.01))
        self.clip = clip

    def plain_step(self, x, eps):
        return training.train_step(self.model, self.estimator, self.optimizer, x, eps, self.clip)

    def limit(self, parameters):
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)

    mean = staticmethod(torch.Tensor.mean)


def plainly(loop):
    return lambda batches: torch.stack([loop.plain_step(x, eps) for x, eps in batches])


def steps_of(x, eps, count=7):
    """Return batches that differ from step to step."""
    generator = torch.Generator().manual_seed(3)
    return [(x, posteriors.map_latent(lambda e: torch.randn(e.shape, generator=generator), eps)) for _ in range(count)]


def begun(row="iwae-dreg", model="mlp-1", change=lambda model: None, **options):
    """Return two equal loops after their first step, the second with its steps traced, and batches."""
    (built, x, eps), loops = problem(model), []
    change(built)
    for _ in range(2):
        loops.append(Loop(copy.deepcopy(built), row, **options))
        loops[-1].plain_step(x, eps)
    return loops[0], loops[1], fast.WholeSteps(loops[1], "eager"), steps_of(x, eps)


def assert_same_values(one, other):
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert one.optimizer.state[a].keys() == other.optimizer.state[b].keys()
        for name, value in one.optimizer.state[a].items():
            torch.testing.assert_close(value, other.optimizer.state[b][name])


@pytest.mark.parametrize("optimizer", ["adam", "adam-released", "sgd"])
@pytest.mark.parametrize(
    ("row", "model"),
    [
        ("elbo-total", "linear"),
        ("rws", "mlp-1"),
        ("iwae-dreg", "mlp-2"),
        ("elbo-path", "mlp-2-detached"),
        ("iwae-vimco", "mlp-1"),
        ("elbo-path", "mlp-1-flow"),
    ],
)
def test_traced_steps_are_the_steps(row, model, optimizer):
    """What the compiler is given, run as it is; for every kind of row, posterior and optimiser."""
    plain, traced, whole, batches = begun(row, model, optimizer=optimizer, clip=5.0)
    bounds = torch.cat([whole(batches[:3]), whole(batches[3:6]), whole(batches[6:])])
    torch.testing.assert_close(bounds, plainly(plain)(batches))
    assert_same_values(plain, traced)
    assert whole.works and [trace.function is not None for trace in whole.traces] == [True]

    another = begun("rws-dreg" if row != "rws-dreg" else "rws", model, optimizer=optimizer, clip=5.0)[0]
    plainly(another)(batches)
    pairs = zip(another.model.parameters(), traced.model.parameters(), strict=True)
    assert not all(torch.allclose(a, b) for a, b in pairs)  # the negative control


def test_batches_of_two_kinds_have_a_trace_each():
    plain, traced, whole, batches = begun()
    batches = [(x, eps) if i % 3 else (x[:2], eps[:, :2]) for i, (x, eps) in enumerate(batches)]
    torch.testing.assert_close(whole(batches), plainly(plain)(batches))
    assert_same_values(plain, traced)
    assert whole.works and len(whole.traces) == 2


def test_the_first_step_of_an_optimiser_is_a_plain_one():
    model, x, eps = problem()
    loop = Loop(model, "iwae-dreg")
    whole = fast.WholeSteps(loop, "eager")
    whole([(x, eps)]), whole([(x, eps)])
    assert [trace.function is None for trace in whole.traces] == [True, False]
    assert all(state["step"] == 2 for state in loop.optimizer.state.values())


def test_a_learning_rate_that_changes_is_followed():
    plain, traced, whole, batches = begun()
    for lr in (0.1, 0.001):
        for loop, take in ((plain, plainly(plain)), (traced, whole)):
            loop.optimizer.param_groups[0]["lr"] = lr
            take(batches[:2])
    assert_same_values(plain, traced)
    assert len(whole.traces) == 1


def test_a_stack_is_traced_too():
    def stack():
        return StackedTraining([tiny_training(False, row, seed=s) for s, row in enumerate(("elbo-path", "iwae-dreg"))])

    plain, traced = stack(), with_backend(stack())
    plain.run(), traced.run()
    assert traced.whole.works and traced.whole.traces
    assert_same_to_rounding(plain.trainings, traced.trainings)


def tiny_training(compile, row="iwae-dreg", **recipe):
    split = data.load("digits", "dynamic").train
    split = data.images.Split(split.grey[:110].double(), None, split.shape, split.binarisation)
    model = models.build("mlp-1", 64, generator=torch.Generator().manual_seed(0), **SMALL)
    return Training(model, split, row, Recipe(**{"k": 2, "epochs": 2, "batch_size": 10, **recipe}), compile=compile)


def with_backend(run, backend="eager"):
    """Let a training take its steps traced: four on end, in epochs of eleven."""
    run.compile = True
    run.hasten()
    run.whole.backend = backend
    return run


@pytest.mark.parametrize("recipe", [{}, {"clip": 5.0}, {"optimizer": "adam-released"}, {"optimizer": "sgd"}], ids=str)
def test_a_traced_training_is_the_same_training(recipe):
    eager, traced = tiny_training(False, **recipe), with_backend(tiny_training(False, **recipe))
    seen = []
    eager.run(), traced.run(lambda run: seen.append(run.step))
    assert seen == [1, 5, 9, 11, 15, 19, 22]
    assert traced.whole.works and traced.whole.traces
    assert_same_to_rounding([eager], [traced])


def test_a_traced_training_goes_on_bit_for_bit():
    straight, first, second = (with_backend(tiny_training(False)) for _ in range(3))
    straight.run()

    class Stop(Exception):
        pass

    def stop(run):
        if run.step == 15:
            raise Stop

    with pytest.raises(Stop):
        first.run(stop)
    second.load_state(copy.deepcopy(first.state()))
    second.whole.backend = "eager"
    second.run()
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [r["bound"] for r in straight.history] == [r["bound"] for r in second.history]


class Reused(data.images.Split):
    """Images whose batches all lie in the same place."""

    def batch(self, index, generator=None):
        x = super().batch(index, generator)
        place = self.__dict__.setdefault(f"place of {len(x)}", torch.empty_like(x))
        return place.copy_(x)


def test_batches_that_lie_in_the_same_place_are_taken_one_by_one():
    runs = []
    for compile in (False, True):
        run = tiny_training(False)
        reused = Reused(**{field.name: getattr(run.split, field.name) for field in fields(run.split)})
        runs.append(Training(run.model, reused, run.estimator, run.recipe, compile=compile))
    runs[1].whole.backend = "eager"
    for run in runs:
        run.run()
    assert runs[1].whole.works and runs[1].whole.traces
    assert_same_to_rounding(runs[:1], runs[1:])


@pytest.mark.parametrize("step", [5, 13])
def test_plain_steps_of_a_compiled_training_name_the_step_that_failed(step):
    run = with_backend(tiny_training(False))
    run.whole.works, calls, plain = False, itertools.count(1), run.plain_step

    def take(x, eps):
        if next(calls) == step:
            for p in run.model.parameters():
                p.data.fill_(torch.nan)
            raise ValueError("not in the constraint")
        return plain(x, eps)

    run.plain_step = take
    with pytest.raises(Diverged, match=f"not finite before step {step} "):
        run.run()


def test_an_estimator_that_changes_cannot_be_compiled():
    run = tiny_training(False)
    with pytest.raises(InputError, match="changes from step to step cannot be compiled"):
        Training(run.model, run.split, lambda progress: estimators.get("elbo-path"), Recipe(), compile=True)
    remembers = type("Remembers", (estimators.Row,), {"state": lambda self: 0, "load_state": lambda self, state: None})
    row = estimators.get("elbo-path")
    with pytest.raises(InputError, match="changes from step to step cannot be compiled"):
        Training(
            run.model,
            run.split,
            remembers(**{field.name: getattr(row, field.name) for field in fields(row)}),
            Recipe(),
            compile=True,
        )


@needs_compiler
def test_a_compiled_training_is_the_same_training():
    """With the real compiler, once."""
    eager, compiled = tiny_training(False), tiny_training(True)
    eager.run(), compiled.run()
    assert compiled.whole.works and any(trace.function is not None for trace in compiled.whole.traces)
    assert_same_to_rounding([eager], [compiled])


class OneParameter(nn.Module):
    """A joint density whose shift is all that learns."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x, z):
        return -(x - self.shift - z).square().sum(-1) - 0.5 * z.square().sum(-1)


@needs_compiler
def test_a_compiled_step_limits_the_gradient_of_a_single_parameter():
    """Torch's own norm of a list of one tensor ends the whole process there."""
    split, left = Split.of(torch.rand(40, 6).numpy()), []
    for compile in (False, True):
        model = models.VAE(OneParameter(), lambda x: DiagonalGaussian(x, torch.zeros_like(x)), binary=False)
        recipe = Recipe(epochs=2, batch_size=10, clip=0.1, optimizer="sgd")
        run = Training(model, split, "elbo-path", recipe, compile=compile)
        run.run()
        left.append(model.joint.shift.detach())
    assert run.whole.works and run.whole.traces
    torch.testing.assert_close(*left)


# What a trace takes for constant


def with_layers(model):
    model.encoder.hidden.append(nn.Dropout(0.9))
    model.joint.decode.hidden.append(nn.LeakyReLU(0.1))
    model.eval()


def freeze(model):
    model.joint.requires_grad_(False)


def thaw_one(model):
    model.encoder.mean.bias.requires_grad_(False)


def slope(model):
    model.joint.decode.hidden[-1].negative_slope = 0.9


def another_layer(model):
    model.joint.decode.hidden[-1] = nn.Sigmoid()


def no_layer(model):
    del model.joint.decode.hidden[-1]


def another_parameter(model):
    model.encoder.mean.bias = nn.Parameter(torch.ones(2))


def no_bias(model):
    model.encoder.mean.bias = None


def hooked(model):
    model.joint.decode.logits.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize(
    "change", [freeze, thaw_one, slope, another_layer, no_layer, another_parameter, no_bias, hooked]
)
def test_a_trace_notices_what_changes_in_the_model(change):
    plain, traced, whole, batches = begun(change=with_layers)
    for loop, take in ((plain, plainly(plain)), (traced, whole)):
        take(batches[:2])
        change(loop.model)
        torch.manual_seed(0)
        loop.last = take(batches[2:4]), take(batches[4:6])
    torch.testing.assert_close(traced.last, plain.last)
    for a, b in zip(plain.model.parameters(), traced.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(whole.traces) == 2 and whole.works


class Rounding(nn.Module):
    """Adds what a third of the default dtype is off, made large enough to see."""

    def forward(self, h):
        return h + 1e7 * (torch.full((1,), 1 / 3).double() - 1 / 3)


def test_a_trace_notices_another_default_dtype():
    plain, traced, whole, batches = begun(change=lambda model: model.joint.decode.hidden.append(Rounding()))
    for loop, take in ((plain, plainly(plain)), (traced, whole)):
        before = take(batches[:2])
        torch.set_default_dtype(torch.float32)
        loop.last = take(batches[2:4])
        torch.set_default_dtype(torch.float64)
    torch.testing.assert_close(traced.last, plain.last)
    assert before.dtype == torch.float64 and len(whole.traces) == 2


def test_a_trace_is_kept_for_each_mode():
    plain, traced, whole, batches = begun(change=with_layers)
    for mode in (False, True, False, True):
        for loop, take in ((plain, plainly(plain)), (traced, whole)):
            loop.model.train(mode)
            torch.manual_seed(0)
            take(batches[:2])
    assert_same_values(plain, traced)
    assert len(whole.traces) == 2


def test_a_parameter_that_is_thawed_gets_its_memories_by_a_plain_step():
    plain, traced, whole, batches = begun(change=lambda model: model.joint.requires_grad_(False))
    for loop, take in ((plain, plainly(plain)), (traced, whole)):
        take(batches[:2])
        loop.model.joint.requires_grad_(True)
        take(batches[2:4]), take(batches[4:6])
    assert_same_values(plain, traced)
    assert [trace.function is None for trace in whole.traces] == [False, True, False]


def test_a_parameter_that_the_loss_does_not_reach_stays_and_hinders_nothing():
    def with_a_spare(model):
        model.joint.spare = nn.Parameter(torch.ones(2))

    plain, traced, whole, batches = begun(change=with_a_spare)
    torch.testing.assert_close(whole(batches[:3]), plainly(plain)(batches[:3]))
    assert_same_values(plain, traced)
    assert [trace.function is None for trace in whole.traces] == [False]


def test_a_decoder_thawed_after_an_epoch_learns_in_a_compiled_training_too():
    runs = [tiny_training(False), with_backend(tiny_training(False))]
    for run in runs:
        run.model.joint.requires_grad_(False)
        run.run(lambda run: run.model.joint.requires_grad_(run.step >= run.steps_per_epoch))
    assert_same_to_rounding(runs[:1], runs[1:])
    assert not torch.equal(
        runs[1].model.joint.decode.logits.weight, tiny_training(False).model.joint.decode.logits.weight
    )


def counts_in_an_attribute(decoder):
    def count(module, given, made):
        module.calls += 1
        return made * (1 + module.calls / 100)

    decoder.calls = 0
    decoder.register_forward_hook(count)


def replaces_a_buffer(decoder):
    def replace(module, given, made):
        module.calls = module.calls + 1
        return made * (1 + module.calls / 100)

    decoder.register_buffer("calls", torch.zeros(()))
    decoder.register_forward_hook(replace)


class Counted(nn.Linear):
    """A layer whose calls are counted where no attribute of it tells."""

    def forward(self, x):
        self.log.calls += 1
        return super().forward(x) * (1 + self.log.calls / 100)

    def get_extra_state(self):
        return {"calls": self.log.calls}

    def set_extra_state(self, state):
        self.log.calls = state["calls"]


def counts_in_an_extra_state(layer):
    layer.__class__, layer.log = Counted, SimpleNamespace(calls=0)


def takes_numbers_out(how):
    def change(layer):
        layer.register_forward_hook(lambda module, given, made: made * (1 + torch.tensor(how(made.detach().mean()))))

    return change


def takes_a_part(layer):
    layer.register_forward_hook(lambda module, given, made: made + made[made > 0].mean())


def has_a_hook(layer):
    layer.weight.register_hook(lambda slope: slope * 0.5)


def has_a_hook_after(layer):
    layer.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * 0.5))


@pytest.mark.parametrize(
    "change",
    [
        counts_in_an_attribute,
        replaces_a_buffer,
        counts_in_an_extra_state,
        takes_numbers_out(lambda number: number.numpy()),
        takes_numbers_out(lambda number: number.tolist()),
        takes_numbers_out(lambda number: np.asarray(number)),
        takes_a_part,
        has_a_hook,
        has_a_hook_after,
    ],
)
def test_a_step_that_is_more_than_a_function_of_tensors_is_not_traced(change, recwarn):
    """To the last bit, and to the last count, as if nobody had asked for it."""
    plain, traced, whole, batches = begun("elbo-path")
    for loop in (plain, traced):
        change(loop.model.joint.decode.hidden[0])
    assert torch.equal(torch.cat([whole(batches[:3]), whole(batches[3:])]), plainly(plain)(batches))
    for (name, one), other in zip(plain.model.state_dict().items(), traced.model.state_dict().values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
    for one, other in zip(plain.model.modules(), traced.model.modules(), strict=True):
        assert getattr(one, "calls", None) == getattr(other, "calls", None)
    assert not whole.works and traced.captured is None
    (warning,) = [w for w in recwarn if "torch.compile" in str(w.message)]
    assert str(warning.message).endswith("to the same end and more slowly: leave out compile")


class Through(nn.Module):
    """An encoder that reaches its first layer through a tuple, so that it is no part of it."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.mean = (trunk,), nn.Linear(4, 2)

    def forward(self, x):
        return posteriors.DiagonalGaussian(self.mean(self.trunk[0](x).tanh()), torch.zeros(2))


def test_what_only_the_model_has_as_a_part_learns_too(recwarn):
    def through(model):
        torch.manual_seed(0)
        model.trunk = nn.Linear(6, 4)
        model.encoder = Through(model.trunk)

    plain, traced, whole, batches = begun("elbo-path", change=through)
    before = traced.model.trunk.weight.clone()
    torch.testing.assert_close(torch.cat([whole(batches[:3]), whole(batches[3:])]), plainly(plain)(batches))
    assert_same_values(plain, traced)
    assert not whole.works and (traced.model.trunk.weight - before).abs().min() > 0


SCALES = {"a": {"b": 1.0}}
SCALE = 1.0


class Scaled(nn.Linear):
    """A layer that is scaled by a number inside of something."""

    def forward(self, x):
        inside = {
            "object": self.made.scale,
            "nested": self.nested["a"]["b"],
            "global": SCALE,
            "table": SCALES["a"]["b"],
        }
        return super().forward(x) * inside[self.kind]


def scale_by(value, kind, layer):
    if kind == "global":
        globals()["SCALE"] = value
    elif kind == "object":
        layer.made.scale = value
    else:
        (SCALES if kind == "table" else layer.nested)["a"]["b"] = value


@pytest.mark.parametrize("kind", ["object", "nested", "global", "table"])
def test_a_number_inside_of_something_is_followed(kind):
    def scaled(model):
        layer = model.joint.decode.hidden[0]
        layer.__class__, layer.kind = Scaled, kind
        layer.made, layer.nested = SimpleNamespace(scale=1.0), {"a": {"b": 1.0}}

    plain, traced, whole, batches = begun("elbo-path", change=scaled)
    for value in (1.0, 0.5, 0.5, 1.0):
        for loop, take in ((plain, plainly(plain)), (traced, whole)):
            scale_by(value, kind, loop.model.joint.decode.hidden[0])
            take(batches[:1])
    assert_same_values(plain, traced)
    assert whole.works and len(whole.traces) == 2


class Slotted:
    __slots__ = ("scale",)


class Hidden(nn.Linear):
    """A layer that is scaled by a number where none of its attributes tells."""

    of_all = Slotted()

    def forward(self, x):
        scales = {"slots": lambda: self.made.scale, "class": lambda: self.of_all.scale}
        return super().forward(x) * scales.get(self.kind, self.scale)()


def hidden(kind):
    """Return a change of a model that scales a layer by a hidden number, and what sets this number."""
    held, made, generator = [1.0], Slotted(), torch.Generator().manual_seed(0)

    def scale_by(value):
        made.scale = Hidden.of_all.scale = held[0] = value

    def change(model):
        layer = model.joint.decode.hidden[0]
        layer.__class__, layer.kind, layer.made = Hidden, kind, made
        layer.scale = {"generator": lambda: torch.rand((), generator=generator)}.get(kind, lambda: held[0])

    scale_by(1.0)
    return change, scale_by


@pytest.mark.parametrize("kind", ["slots", "class", "function"])
def test_a_number_that_no_attribute_shows_is_noticed(kind, monkeypatch):
    monkeypatch.setattr(fast, "CHECK_EVERY", 3)
    change, scale_by = hidden(kind)
    _, traced, _, batches = begun("elbo-path")
    change(traced.model)
    whole = fast.WholeSteps(traced, "eager")
    whole(batches[:2]), whole(batches[2:4])
    scale_by(1.1)
    with pytest.raises(InputError, match="the bound of this model is .* has changed during the last 3 steps"):
        whole(batches[4:])
    assert fast.WholeSteps(traced, "eager")(batches).isfinite().all()


def test_draws_that_no_seed_reaches_are_noticed():
    _, traced, whole, batches = begun("elbo-path")
    hidden("generator")[0](traced.model)
    with pytest.raises(InputError, match="something that no attribute of a module shows"):
        whole(batches)


def test_a_model_that_draws_by_python_is_not_traced(recwarn):
    def noisy(layer):
        layer.register_forward_hook(lambda module, given, made: made * (1 + random.random() + np.random.rand()))

    plain, traced, whole, batches = begun("elbo-path")
    found = []
    for loop, take in ((plain, plainly(plain)), (traced, whole)):
        noisy(loop.model.joint.decode.hidden[0])
        random.seed(0)
        np.random.seed(0)
        found.append(torch.cat([take(batches[:3]), take(batches[3:])]))
    assert torch.equal(*found) and not whole.works


def test_a_setting_that_changes_at_every_step_ends_the_compiling(recwarn):
    plain, traced, whole, batches = begun("elbo-path", change=with_layers)
    for step in range(fast.MOST_TRACES + 3):
        for loop, take in ((plain, plainly(plain)), (traced, whole)):
            loop.model.joint.decode.hidden[-1].negative_slope = 0.1 + 0.01 * step
            take(batches[:1])
    assert_same_values(plain, traced)
    assert not whole.works and sum("a setting of the model" in str(w.message) for w in recwarn) == 1


def test_values_stay_where_they_lie_in_memory():
    """Fused Adam runs through memory, and views of a parameter must go on seeing it."""

    def transpose(model):
        for p in model.parameters():
            if p.ndim == 2:
                p.data = p.data.T.contiguous().T

    plain, traced, whole, batches = begun("elbo-path", change=transpose)
    before = [(p.data_ptr(), p.stride()) for p in traced.model.parameters()]
    whole(batches[:2]), plainly(traced)(batches[2:]), plainly(plain)(batches)
    assert [(p.data_ptr(), p.stride()) for p in traced.model.parameters()] == before
    assert_same_values(plain, traced)


def test_tracing_draws_nothing():
    plain, traced, whole, batches = begun(change=lambda model: (with_layers(model), model.train()))
    torch.manual_seed(0)
    mine = whole(batches[:1])
    torch.manual_seed(0)
    torch.testing.assert_close(mine, plainly(plain)(batches[:1]))


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch, recwarn):
    def none(*arguments, **options):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", none)
    plain, traced, _, batches = begun()
    whole, traced.captured = fast.WholeSteps(traced), "a graph of steps that are not traced"
    torch.testing.assert_close(torch.cat([whole(batches[:3]), whole(batches[3:])]), plainly(plain)(batches))
    assert_same_values(plain, traced)
    assert traced.captured is None
    (warning,) = recwarn.list
    sentence = str(warning.message)
    assert sentence.startswith("torch.compile does not work here (No working C++ compiler found); training goes on")
    assert "\n" not in sentence


def test_what_the_caller_got_wrong_is_no_fault_of_the_compiler(recwarn):
    model, x, eps = problem(k=1)
    whole = fast.WholeSteps(Loop(model, "iwae-vimco"), "eager")
    with pytest.raises(InputError, match="needs k >= 2 draws, but k is 1"):
        whole([(x, eps)])
    assert whole.works and not [w for w in recwarn if "torch.compile does not work" in str(w.message)]


def test_torch_without_its_compiler_is_caught(monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    monkeypatch.setattr(config, "force_disable_caches", True)
    torch._dynamo.reset()
    _, traced, _, batches = begun("elbo-path")
    whole = fast.WholeSteps(traced)
    with pytest.warns(UserWarning, match="torch.compile does not work here .*install a C.. compiler"):
        whole(batches[:1])
    assert not whole.works


@needs_gpu
@pytest.mark.parametrize("side_by_side", [False, True])
def test_captured_steps_are_the_steps(side_by_side, monkeypatch):
    split = data.load("digits", "dynamic").train.to("cuda")
    monkeypatch.setitem(training.AT_ONCE, "cuda", 5)

    def group(capture):
        runs = []
        for seed in range(2):
            model = models.build("mlp-1", 64, generator=torch.Generator().manual_seed(seed), **SMALL)
            recipe = Recipe(epochs=3, k=2, batch_size=100, schedule="burda", seed=seed)
            runs.append(Training(model.float().cuda(), split, "iwae-dreg", recipe))
        loops = [StackedTraining(runs)] if side_by_side else runs
        for loop in loops:
            loop.compile = capture
            loop.hasten()
            loop.run()
        assert not capture or all(loop.captured.graph is not None and loop.whole.works for loop in loops)
        return runs

    for eager, captured in zip(group(False), group(True), strict=True):
        weights = nn.utils.parameters_to_vector(eager.model.parameters())
        torch.testing.assert_close(
            nn.utils.parameters_to_vector(captured.model.parameters()), weights, rtol=1e-3, atol=1e-4
        )
        assert [record["step"] for record in captured.history] == [14, 28, 42]


def test_tracing_leaves_the_running_means_of_batch_normalisation_alone():
    """A trace is made anew when a run is taken up again, which must not show."""

    def after(compiled):
        torch.manual_seed(0)
        head = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
        forward = {"forward": lambda self, x: posteriors.DiagonalGaussian(*self.head(x).chunk(2, -1))}
        encoder = type("Encoder", (torch.nn.Module,), forward)()
        encoder.head = head
        joint = type("Joint", (torch.nn.Module,), {"forward": lambda self, x, z: -z.square().sum(-1) - x.sum(-1)})()
        model = models.VAE(joint, encoder, binary=False)
        split, recipe = data.Split.of(torch.rand(32, 6)), Recipe(epochs=2, batch_size=8)
        made = training.Training(model, split, "elbo-path", recipe, compile=compiled)
        if compiled:
            made.whole = fast.WholeSteps(made, "eager")
        made.run()
        return head[1]

    plain, traced = after(False), after(True)
    assert traced.num_batches_tracked == plain.num_batches_tracked == 8
    assert torch.allclose(traced.running_mean, plain.running_mean, atol=1e-6)


def test_a_module_with_two_names_is_not_traced():
    """functional_call would lose one of its names, and the optimiser its parameters."""
    layer = nn.Linear(2, 2)
    with pytest.raises(fast.Shared, match="'0' and '2' are one module under two names"):
        fast.check_apart(nn.Sequential(layer, nn.Tanh(), layer))
    tied, tanh = nn.Linear(2, 2), nn.Tanh()
    tied.weight = layer.weight
    fast.check_apart(nn.Sequential(layer, tanh, tied, tanh))
