"""Compiled and captured steps are the steps they stand for; without a compiler, training goes on."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_stacked import assert_same as assert_same_to_rounding
from torch import nn

from vaelib import data, estimators, fast, models, stacked, training
from vaelib.config import Recipe
from vaelib.errors import InputError
from vaelib.stacked import StackedTraining
from vaelib.training import Training

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


def gradient(backward, row, model, x, eps):
    model.zero_grad()
    bound = backward(estimators.get(row), model, x, eps)
    return bound, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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
def test_the_traced_engine_is_the_engine(row, model):
    """What the compiler is given, run as it is; for every kind of row and of posterior."""
    traced, (model, x, eps) = fast.Compiled("eager"), problem(model)
    for step in range(2):  # it follows the weights
        torch.testing.assert_close(
            gradient(traced, row, model, x, eps), gradient(training.backward, row, model, x, eps)
        )
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5 + step)
    assert traced.works and len(traced.traces) == 1
    _, once = gradient(traced, row, model, x, eps)
    traced(estimators.get(row), model, x, eps)  # it adds to .grad
    torch.testing.assert_close(
        {name: model.get_parameter(name).grad for name in once}, {n: 2 * g for n, g in once.items()}
    )

    _, other = gradient(training.backward, "rws-dreg" if row != "rws-dreg" else "rws", model, x, eps)
    assert not all(torch.allclose(once[name], other[name]) for name in other)  # the negative control


def test_a_stack_is_traced_too():
    built = [problem("mlp-2")[0] for _ in range(2)]
    x, eps = torch.cat([problem()[1]] * 2), [problem("mlp-2")[2]] * 2
    rows, gradients = stacked.side_by_side([estimators.get(name) for name in ("elbo-path", "iwae-dreg")]), []
    model = stacked.stack(built)
    for backward in (fast.Compiled("eager"), training.backward):
        model.zero_grad()
        backward(rows, model, x, stacked.join(eps))
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def tiny_training(compile, row="iwae-dreg", **recipe):
    split = data.load("digits", "dynamic").train
    split = data.images.Split(split.grey[:100].double(), None, split.shape, split.binarisation)
    model = models.build("mlp-1", 64, generator=torch.Generator().manual_seed(0), **SMALL)
    return Training(model, split, row, Recipe(k=2, epochs=2, **recipe), compile=compile)


def with_backend(run, backend="eager"):
    run.backward = fast.Compiled(backend)
    return run


@pytest.mark.parametrize("recipe", [{}, {"clip": 5.0}, {"optimizer": "adam-released"}, {"optimizer": "sgd"}], ids=str)
def test_a_traced_training_is_the_same_training(recipe):
    eager, traced = tiny_training(False, **recipe), with_backend(tiny_training(True, **recipe))
    eager.run(), traced.run()
    assert traced.backward.works and traced.backward.traces
    assert_same_to_rounding([eager], [traced])


def test_an_estimator_that_changes_cannot_be_compiled():
    run = tiny_training(False)
    with pytest.raises(InputError, match="changes from step to step cannot be compiled"):
        Training(run.model, run.split, lambda progress: estimators.get("elbo-path"), Recipe(), compile=True)


@needs_compiler
def test_a_compiled_training_is_the_same_training():
    """With the real compiler, once."""
    eager, compiled = tiny_training(False), tiny_training(True)
    eager.run(), compiled.run()
    assert compiled.backward.works and compiled.backward.traces
    assert_same_to_rounding([eager], [compiled])


# What a trace takes for constant


def changed_model():
    model, x, eps = problem()
    model.encoder.hidden.append(nn.Dropout(0.9))
    model.joint.decode.hidden.append(nn.LeakyReLU(0.1))
    return model.eval(), x, eps


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
def test_a_trace_notices_what_changes_in_the_model_and_when_it_changes_back(change):
    traced, (model, x, eps) = fast.Compiled("eager"), changed_model()
    first = gradient(traced, "iwae-dreg", model, x, eps)
    change(model)
    second = gradient(traced, "iwae-dreg", model, x, eps)
    torch.testing.assert_close(second, gradient(training.backward, "iwae-dreg", model, x, eps))
    assert first[1].keys() != second[1].keys() or any(not torch.equal(first[1][n], g) for n, g in second[1].items())
    gradient(traced, "iwae-dreg", model, x, eps)
    assert sum(map(len, traced.traces.values())) == 2


def test_a_trace_is_kept_for_each_mode():
    traced, (model, x, eps) = fast.Compiled("eager"), changed_model()
    for mode in (False, True, False, True):
        model.train(mode)
        torch.manual_seed(0)
        mine = gradient(traced, "elbo-path", model, x, eps)
        torch.manual_seed(0)
        torch.testing.assert_close(mine, gradient(training.backward, "elbo-path", model, x, eps))
    assert sum(map(len, traced.traces.values())) == 2


def test_a_decoder_thawed_after_an_epoch_learns_in_a_compiled_training_too():
    runs = [tiny_training(False), with_backend(tiny_training(True))]
    for run in runs:
        run.model.joint.requires_grad_(False)
        run.run(lambda run: run.model.joint.requires_grad_(run.step >= run.steps_per_epoch))
    assert_same_to_rounding(runs[:1], runs[1:])
    assert not torch.equal(
        runs[1].model.joint.decode.logits.weight, tiny_training(False).model.joint.decode.logits.weight
    )


def test_a_setting_that_changes_at_every_step_ends_the_compiling(recwarn):
    traced, (model, x, eps) = fast.Compiled("eager"), changed_model()
    for step in range(fast.MOST_TRACES + 3):
        model.joint.decode.hidden[-1].negative_slope = 0.1 + 0.01 * step
        torch.testing.assert_close(
            gradient(traced, "elbo-path", model, x, eps), gradient(training.backward, "elbo-path", model, x, eps)
        )
    assert not traced.works and sum("a setting of the model has changed" in str(w.message) for w in recwarn) == 1


def test_gradients_lie_in_memory_as_their_parameters_do():
    """Fused Adam runs through memory, and a compiled gradient may come in any order."""
    traced, (model, x, eps) = fast.Compiled("eager"), problem()
    for p in model.parameters():
        if p.ndim == 2:
            p.data = p.data.T.contiguous().T
    gradient(traced, "elbo-path", model, x, eps)
    traced(estimators.get("elbo-path"), model, x, eps)
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


def test_tracing_draws_nothing():
    traced, (model, x, eps) = fast.Compiled("eager"), changed_model()
    model.train()
    torch.manual_seed(0)
    torch.testing.assert_close(
        gradient(traced, "elbo-path", model, x, eps)[0],
        (torch.manual_seed(0), gradient(training.backward, "elbo-path", model, x, eps))[1][0],
    )


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch, recwarn):
    def none(*arguments, **options):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", none)
    compiled, (model, x, eps) = fast.Compiled(), problem()
    for _ in range(2):
        torch.testing.assert_close(
            gradient(compiled, "elbo-path", model, x, eps), gradient(training.backward, "elbo-path", model, x, eps)
        )
    (warning,) = recwarn.list
    sentence = str(warning.message)
    assert sentence.startswith("torch.compile does not work here (No working C++ compiler found); training goes on")
    assert "\n" not in sentence


def test_what_the_caller_got_wrong_is_no_fault_of_the_compiler(recwarn):
    model, x, eps = problem(k=1)
    traced = fast.Compiled("eager")
    with pytest.raises(InputError, match="needs k >= 2 draws, but k is 1"):
        traced(estimators.get("iwae-vimco"), model, x, eps)
    assert traced.works and not [w for w in recwarn if "torch.compile does not work" in str(w.message)]


def test_torch_without_its_compiler_is_caught(monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    monkeypatch.setattr(config, "force_disable_caches", True)
    torch._dynamo.reset()
    compiled, (model, x, eps) = fast.Compiled(), problem(k=2)
    with pytest.warns(UserWarning, match="torch.compile does not work here .*install a C.. compiler"):
        compiled(estimators.get("elbo-path"), model, x, eps)
    assert not compiled.works


@needs_gpu
@pytest.mark.parametrize("side_by_side", [False, True])
def test_captured_steps_are_the_steps(side_by_side, monkeypatch):
    split = data.load("digits", "dynamic").train.to("cuda")
    monkeypatch.setattr(training, "CAPTURED_STEPS", 5)

    def group(capture):
        runs = []
        for seed in range(2):
            model = models.build("mlp-1", 64, generator=torch.Generator().manual_seed(seed), **SMALL)
            recipe = Recipe(epochs=3, k=2, batch_size=100, schedule="burda", seed=seed)
            runs.append(Training(model.float().cuda(), split, "iwae-dreg", recipe))
        loops = [StackedTraining(runs)] if side_by_side else runs
        for loop in loops:
            loop.captures = capture
            loop.run()
        assert not capture or all(loop.captured.graph is not None for loop in loops)
        return runs

    for eager, captured in zip(group(False), group(True), strict=True):
        weights = nn.utils.parameters_to_vector(eager.model.parameters())
        torch.testing.assert_close(
            nn.utils.parameters_to_vector(captured.model.parameters()), weights, rtol=1e-3, atol=1e-4
        )
        assert [record["step"] for record in captured.history] == [14, 28, 42]
