"""Compiled and captured steps are the steps they stand for; without a compiler, training goes on."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_stacked import assert_same as assert_same_to_rounding
from torch import nn

from vaelib import data, fast, models, objectives, stacked, training
from vaelib.config import Recipe
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS
from vaelib.stacked import StackedTrainer
from vaelib.training import Trainer

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
    return built, x, built.encoder.noise(k, x, torch.Generator().manual_seed(2))


def gradient(backward, row, model, x, eps):
    model.zero_grad()
    bound = backward(ESTIMATORS[row], model.joint, model.encoder, x, eps)
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
            gradient(traced, row, model, x, eps), gradient(objectives.backward, row, model, x, eps)
        )
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5 + step)
    assert traced.works and len(traced.known) == 1
    _, once = gradient(traced, row, model, x, eps)
    traced(ESTIMATORS[row], model.joint, model.encoder, x, eps)  # it adds to .grad
    torch.testing.assert_close(
        {name: model.get_parameter(name).grad for name in once}, {n: 2 * g for n, g in once.items()}
    )

    _, other = gradient(objectives.backward, "rws-dreg" if row != "rws-dreg" else "rws", model, x, eps)
    assert not all(torch.allclose(once[name], other[name]) for name in other)  # the negative control


def test_a_stack_is_traced_too():
    built = [problem("mlp-2")[0] for _ in range(2)]
    x, eps = torch.cat([problem()[1]] * 2), [problem("mlp-2")[2]] * 2
    rows, gradients = stacked.side_by_side(ESTIMATORS["elbo-path"], ESTIMATORS["iwae-dreg"]), []
    model = stacked.stack(built)
    for backward in (fast.Compiled("eager"), objectives.backward):
        model.zero_grad()
        backward(rows, model.joint, model.encoder, x, stacked.join(eps))
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@needs_compiler
def test_a_compiled_training_is_the_same_training():
    split = data.load("digits", "dynamic").train
    split = data.images.Split(split.grey[:100].double(), None, split.shape, split.binarisation)

    def trainer(compile):
        model = models.build("mlp-1", 64, generator=torch.Generator().manual_seed(0), **SMALL)
        return Trainer(model, split, ESTIMATORS["iwae-dreg"], Recipe(k=2, epochs=2, clip=5.0), compile)

    eager, compiled = trainer(False), trainer(True)
    eager.run(), compiled.run()
    assert compiled.backward.works and compiled.backward.known
    assert_same_to_rounding([eager], [compiled])
    with pytest.raises(InputError, match="changes from step to step cannot be compiled"):
        Trainer(eager.model, split, lambda done: ESTIMATORS["elbo-path"], Recipe(), compile=True)


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch, recwarn):
    def none(*arguments):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(fast, "compiled", none)
    compiled, (model, x, eps) = fast.Compiled(), problem()
    for _ in range(2):
        torch.testing.assert_close(
            gradient(compiled, "elbo-path", model, x, eps), gradient(objectives.backward, "elbo-path", model, x, eps)
        )
    (warning,) = recwarn.list
    sentence = str(warning.message)
    assert sentence.startswith("torch.compile does not work here (No working C++ compiler found); training goes on")
    assert "\n" not in sentence


@needs_compiler
def test_what_the_caller_got_wrong_is_no_fault_of_the_compiler(recwarn):
    model, x, eps = problem(k=1)
    traced = fast.Compiled("eager")
    with pytest.raises(InputError, match="needs k >= 2 draws, but k is 1"):
        traced(ESTIMATORS["iwae-vimco"], model.joint, model.encoder, x, eps)
    assert traced.works and not [w for w in recwarn if "torch.compile does not work" in str(w.message)]


def test_torch_without_its_compiler_is_caught(monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    monkeypatch.setattr(config, "force_disable_caches", True)
    torch._dynamo.reset()
    compiled, (model, x, eps) = fast.Compiled(), problem(k=2)
    with pytest.warns(UserWarning, match="torch.compile does not work here .*install a C.. compiler"):
        compiled(ESTIMATORS["elbo-path"], model.joint, model.encoder, x, eps)
    assert not compiled.works


@needs_gpu
@pytest.mark.parametrize("side_by_side", [False, True])
def test_captured_steps_are_the_steps(side_by_side, monkeypatch):
    split = data.load("digits", "dynamic").train.to("cuda")
    monkeypatch.setattr(training, "CAPTURED_STEPS", 5)

    def group(capture):
        trainers = []
        for seed in range(2):
            model = models.build("mlp-1", 64, generator=torch.Generator().manual_seed(seed), **SMALL)
            recipe = Recipe(epochs=3, k=2, batch_size=100, schedule="burda", seed=seed)
            trainers.append(Trainer(model.float().cuda(), split, ESTIMATORS["iwae-dreg"], recipe))
        loops = [StackedTrainer(trainers)] if side_by_side else trainers
        for loop in loops:
            loop.captures = capture
            loop.run()
        assert not capture or all(loop.captured.graph is not None for loop in loops)
        return trainers

    for eager, captured in zip(group(False), group(True), strict=True):
        weights = nn.utils.parameters_to_vector(eager.model.parameters())
        torch.testing.assert_close(
            nn.utils.parameters_to_vector(captured.model.parameters()), weights, rtol=1e-3, atol=1e-4
        )
        assert [record["step"] for record in captured.history] == [14, 28, 42]
