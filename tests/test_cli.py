"""The command line: help that is enough, and one sentence for whatever the user can put right."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from vaelib import __version__, cli, data, estimators, models
from vaelib.config import Config


@pytest.fixture
def vaelib(capsys):
    """Run the command in this process; return (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


TINY = ("--model", "mlp-1", "--binarisation", "dynamic", "--size", "hidden=8", "--size", "latent=3",
        "--epochs", 1, "--batch-size", 100, "--device", "cpu")  # fmt: skip


def test_train_and_evaluate(vaelib, tmp_path):
    run_dir = tmp_path / "run"
    code, out, err = vaelib("train", run_dir, *TINY)
    assert (code, err) == (0, "")
    assert re.match(r"1 epochs, 14 steps, \d+ s on cpu; mean bound in the last epoch: -\d+\.\d\d nats\n", out)
    assert out.endswith(
        f"next: vaelib evaluate {run_dir}\n  or: vaelib show {run_dir}\n  or: vaelib advise {run_dir}\n"
    )
    code, out, err = vaelib("train", run_dir, "--epochs", 2, "--quiet")
    assert (code, err) == (0, "") and out.startswith("2 epochs, 28 steps")
    code, out, err = vaelib("evaluate", run_dir, "--samples", 20, "--limit", 10, "--chunk", 7, "--seed", 1)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r"-log p\(x\): \d+\.\d\d \+- \d\.\d\d nats \(10 test images, 20 samples each\)\n"
        r"bound: -\d+\.\d\d nats; active units: \d\n",
        out,
    )


def test_every_option_arrives(vaelib, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("vaelib.runs.train", lambda run_dir, config, progress, say: asked.update(config=config) or {
        "training": {"epoch": 1, "step": 1, "seconds": 1.0, "device": "cpu", "bound": 0.0}
    })  # fmt: skip
    given = Config(data="mnist", binarisation="fixed", model="mlp-2", sizes={"latent": 4, "latent2": 2},
                   estimator="iwae-dreg", k=5, batch_size=7, epochs=3, lr=0.01, schedule="burda", clip=2.0,
                   optimizer="adam-released", shuffle=False, adam_eps=1e-8, seed=9, device="cpu",
                   checkpoint_seconds=5.0, compile=True, validate=True, patience=3, log="tensorboard")  # fmt: skip
    options = []
    for name, value in vars(given).items():
        flag = f"--{name.replace('_', '-')}"
        options += (
            [o for s, n in value.items() for o in ("--size", f"{s}={n}")]
            if name == "sizes"
            else [flag if value else f"--no-{name}"]
            if isinstance(value, bool)
            else [flag, value]
        )
    assert vaelib("train", tmp_path, *options)[0] == 0
    assert asked["config"] == given
    assert vaelib("train", tmp_path)[0] == 0
    assert asked["config"] == Config()


BAD = {
    "an unknown data set": (("--data", "mnits"), "no data set is called 'mnits', did you mean 'mnist'"),
    "an unknown model": (("--model", "mlp-3"), "no model is called 'mlp-3', did you mean 'mlp-"),
    "an unknown estimator": (
        ("--estimator", "elbo-pth"),
        "no estimator is called 'elbo-pth', did you mean 'elbo-path'",
    ),
    "an unknown schedule": (("--schedule", "burdda"), "did you mean 'burda'"),
    "an unknown binarisation": (("--binarisation", "dynamc"), "did you mean 'dynamic'"),
    "an unknown device": (("--device", "gpu"), "no device is called 'gpu', did you mean 'cuda'?"),
    "a size twice": (
        ("--size", "latent=4", "--size", "latent=5"),
        "--size latent is given twice, 4 and 5: give it once",
    ),
    "an unknown size": (("--size", "latnt=3"), "did you mean 'latent'"),
    "a size that is no number": (
        ("--size", "latent=few"),
        "--size takes NAME=N, such as latent=10, but got 'latent=few'",
    ),
    "a size of nothing": (
        ("--size", "latent=0"),
        "size 'latent' must be a whole number of at least 1, but is 0",
    ),
    "no draws": (("--k", "0"), "k must be a whole number of at least 1, but is 0"),
    "one draw where two are needed": (("--estimator", "elbo-score-loo"), "needs --k >= 2 draws, but --k is 1"),
    "no epochs": (("--epochs", "0"), "epochs must be a whole number of at least 1"),
    "no learning rate": (("--lr", "0"), "lr must be a positive number, but is 0.0"),
    "no number": (("--lr", "nan"), "lr must be a positive number, but is nan"),
    "a negative seed": (("--seed", "-1"), "seed must be a whole number of at least 0"),
    "no norm": (("--clip", "0"), "clip must be a positive number"),
    "grey images for Bernoulli": (
        ("--model", "mlp-1", "--binarisation", "grey"),
        "wants images of 0 and 1, but these have grey levels: use --binarisation=dynamic",
    ),
    "a batch larger than the data": (
        ("--batch-size", "2000"),
        "--batch-size is 2000, but there are only 1497 training images",
    ),
    "patience without a bound to wait for": (("--patience", "2"), "--patience waits for a better held-out bound: add"),
    "an unknown log": (("--log", "tensorbord"), "no log is called 'tensorbord', did you mean 'tensorboard'"),
    "a file that is not there": (("--data", "none.npy"), "there is no file '"),
    "a model that is not there": (("--model", "none.py:build"), "none.py' with a model: see where you are"),
    "a module that is not there": (("--model", "nowhere.models:build"), "there is no module 'nowhere.models'"),
    "a learning rate far too high": (("--lr", "1e30"), "the last good checkpoint is none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(vaelib, tmp_path, case):
    options, sentence = BAD[case]
    code, out, err = vaelib("train", tmp_path / "run", *options)
    assert (code, out) == (2, "")
    assert err.startswith("vaelib: ") and err.count("\n") == 1 and sentence in err
    assert "Traceback" not in err


def test_other_sentences(vaelib, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, sentence in (
        (("train", tmp_path / "a", "--device", "cuda"), "torch finds no CUDA GPU on this machine"),
        (("evaluate", tmp_path / "b"), "there is no trained model in"),
        (("data", "fetch", "emnist"), "did you mean 'mnist'"),
    ):
        code, out, err = vaelib(*arguments)
        assert (code, out) == (2, "") and err.startswith("vaelib: ") and sentence in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_empty_name_of_a_folder_is_not_the_folder_we_are_in(vaelib, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in ("--results", "--runs"):
        code, _, err = vaelib("experiment", "run", "stl-figure-1", "--preset", "smoke", option, "")
        assert code == 2 and f"Invalid value for '{option}': the name of the folder is empty" in err
    for command in ("list", "show stl-figure-1"):
        assert vaelib("experiment", *command.split(), "--results", "")[0] == 2
    assert not list(tmp_path.iterdir())


def test_more_seeds_than_anybody_makes_are_refused_at_once(vaelib):
    code, _, err = vaelib("experiment", "run", "stl-figure-1", "--preset", "smoke", "--seeds", 10**9)
    assert (code, err) == (2, "vaelib: --seeds must be a whole number of at most 100000, but is 1000000000\n")


def test_without_a_standard_error_there_is_no_bar_and_all_else(vaelib, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert not cli.show_progress(quiet=False)
    done = subprocess.run(
        f"exec {sys.executable} -m vaelib train run --model linear --epochs 1 2>&-",
        shell=True, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "run" / "result.json").exists()


def test_advice_for_more_draws_than_fit_is_a_sentence(vaelib, tmp_path):
    assert vaelib("train", tmp_path / "run", *TINY)[0] == 0
    code, _, err = vaelib("advise", tmp_path / "run", "--k", 10**9)
    assert code == 2 and "there is not enough memory" in err and err.endswith("choose a smaller --k\n")


def test_another_configuration(vaelib, tmp_path):
    assert vaelib("train", tmp_path, *TINY)[0] == 0
    code, out, err = vaelib("train", tmp_path, "--lr", "0.5", "--estimator", "elbo-total")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "(--lr is 0.001 there and 0.5 here; --estimator is 'elbo-path' there and 'elbo-total' here)" in err


def test_a_folder_that_cannot_be_made(vaelib, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = vaelib("train", tmp_path / "file" / "run")
    assert (code, out) == (2, "")
    assert err == f"vaelib: '{tmp_path}/file/run/config.json' cannot be read (Not a directory)\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "x", "--epoch", "3"), "--epoch"),
        (("train", "x", "--epochs", "many"), "--epochs"),
        (("train",), "RUN_DIR"),
        (("trane",), "trane"),
        (("evaluate", "x", "--samples", "1.5"), "--samples"),
        (("data", "fetch"), "NAME"),
    ],
)
def test_usage_errors_name_the_option(vaelib, arguments, named):
    code, _, err = vaelib(*arguments)
    assert code == 2 and named in err and "Traceback" not in err


def test_version(vaelib):
    assert vaelib("--version") == (0, f"vaelib {__version__}\n", "")


def test_help_is_enough(vaelib):
    _, out, _ = vaelib("--help")
    assert all(command in out for command in ("train", "evaluate", "data", "estimators", "models"))
    for command in ("train", "evaluate"):
        code, out, _ = vaelib(command, "--help")
        assert code == 0 and f"vaelib {command} runs/" in out
        assert all(re.search(r"\S", line) for line in out.splitlines() if line.startswith("  --"))


def test_the_options_are_the_fields_of_the_configuration(vaelib):
    _, out, _ = vaelib("train", "--help")
    words = " ".join(out.split())
    for field in dataclasses.fields(Config):
        flag = "--size NAME=N" if field.name == "sizes" else f"--{field.name.replace('_', '-')}"
        assert f"{flag} " in words and " ".join(field.metadata["help"].split()) in words
    assert "--shuffle / --no-shuffle" in words and "[default: (no-compile)]" in words


NAMES = ("my runs/first é", "it's", "a&b; exit 3", "$HOME", "-x", "--epochs", "two\nlines", 'a"b`c', "plain")


@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_is_printed_can_be_pasted_whatever_the_folder_is_called(vaelib, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    def pasted(command: str) -> list[str]:
        shell = ["sh", "-c", f'vaelib() {{ printf "%s\\0" "$@"; }}; {command}']
        return subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]

    _, _, err = vaelib("evaluate", "--", name)
    assert pasted(re.search(r"`(vaelib .*?)`(?!c)", err, re.DOTALL)[1])[-1] in (name, f"./{name}")
    code, out, err = vaelib("train", *TINY, "--quiet", "--", name)
    assert (code, err) == (0, "")
    proposed = out[out.index("next: ") :].replace("next: ", "").replace("\n  or: ", "\n")
    found = pasted(proposed)
    assert found[::2] == ["evaluate", "show", "advise"] and set(found[1::2]) <= {name, f"./{name}"}
    code, _, err = vaelib(*found[:2], "--samples", 2, "--limit", 2, "--device", "cpu")
    assert (code, err) == (0, "")

    code, _, err = vaelib("experiment", "show", "stl-figure-3", f"--results={name}")
    found = pasted(re.search(r"`(vaelib .*)`", err, re.DOTALL)[1])
    assert code == 2 and found[:3] == ["experiment", "run", "stl-figure-3"] and found[-1] in (name, f"./{name}")
    monkeypatch.setattr("vaelib.experiments.grid.run", lambda *_, **__: tmp_path)
    code, out, _ = vaelib(*found)
    shown = pasted(out[out.index("next: ") + 6 :])
    assert code == 0 and shown[:3] == ["experiment", "show", "stl-figure-3"] and shown[-2:] == found[-2:]


def test_an_empty_name_is_no_folder(vaelib, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("train", "evaluate"):
        for name in ("", " "):
            code, out, err = vaelib(command, name)
            assert code == 2 and "the name of the folder is empty" in err and not list(tmp_path.iterdir())


def test_a_figure_needs_an_ending(vaelib, tmp_path):
    for name in ("", tmp_path / "figure"):
        code, _, err = vaelib("experiment", "show", "stl-figure-3", "--figure", name)
        assert code == 2 and "--figure must be a file's name with an ending" in err and not list(tmp_path.iterdir())


def test_lists(vaelib):
    for command, names in (
        (("estimators",), estimators.ESTIMATORS),
        (("models",), [*models.MODELS, "lstm"]),
        (("data", "list"), data.DATASETS),
    ):
        code, out, err = vaelib(*command)
        assert (code, err) == (0, "")
        assert list(names) == [line.split()[0] for line in out.splitlines() if line.split()[0] in names]


def test_fetch(vaelib):
    assert vaelib("data", "fetch", "digits") == (0, "digits is built in\n", "")


def test_help_and_import_take_nothing_heavy():
    """A process of its own: torch, numpy and the rest must not be loaded by the package or by help."""
    script = """
        import sys
        import vaelib
        assert not {"torch", "numpy", "typer"} & set(sys.modules)
        from vaelib import cli
        try:
            cli.main(["train", "--help"])
        except SystemExit:
            pass
        heavy = {"torch", "numpy", "pandas", "sklearn", "matplotlib", "rich"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True)


def test_an_unforeseen_error_is_not_hidden(monkeypatch):
    """The negative control of "one sentence": a fault of the program keeps its traceback."""

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", lambda *_, **__: broken())
    with pytest.raises(RuntimeError):
        cli.main([])


def test_the_first_try_works_and_says_what_it_chose(vaelib, tmp_path):
    options = [part for part in TINY if part not in ("--binarisation", "dynamic")]
    code, out, err = vaelib("train", tmp_path, *options, "--estimator", "stl", "--validate")
    assert (code, err) == (0, "")
    assert out.startswith(
        "--binarisation dynamic, since the likelihood of mlp-1 is Bernoulli and these images are not black and white"
    )
    assert re.search(r"mean bound in the last epoch: -\d+\.\d\d nats, held out: -\d+\.\d\d\n", out)
    assert vaelib("evaluate", tmp_path, "--samples", 20, "--limit", 10)[0] == 0


def test_a_shell_completes_names(vaelib):
    for option, some in (
        ("estimator", "iwae-dreg"),
        ("model", "conv-logistic"),
        ("data", "mnist"),
        ("log", "tensorboard"),
    ):
        assert some in cli.COMPLETIONS[option](some[:3]) and cli.COMPLETIONS[option]("xyz") == []
    assert {"--install-completion", "--show-completion"} <= set(vaelib("--help")[1].split())


def test_data_are_listed_with_what_takes_them(vaelib):
    entries = re.split(r"\n(?=\S)", vaelib("data", "list")[1])
    uses = {entry.split()[0]: entry for entry in entries}
    assert "`vaelib train` with any other model" in uses["mnist"] and "--model lstm" in uses["ptb"]
    assert "licence: MIT" in uses["fashion-mnist"] and "do not pass it on" in uses["ptb"]


@pytest.mark.parametrize("set_up", [{"PYTHONOPTIMIZE": "2"}, {"PYTHONIOENCODING": "iso8859-5"}])
def test_the_lists_are_printed_without_docstrings_and_in_other_alphabets(set_up):
    for command in (["models"], ["estimators"], ["experiment", "show", "stl-figure-1"]):
        done = subprocess.run([sys.executable, "-m", "vaelib", *command], env=os.environ | set_up, capture_output=True)
        assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EROFS, "Read-only file system", "ro/.lock"), "cannot use 'ro/.lock': Read-only .*: choose a f"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot use the output: No space .*: make room"),
        (OSError(errno.ENOTDIR, "Not a directory", "a/b"), "cannot use 'a/b': Not a directory$"),
        (OSError("it is broken"), "it is broken$"),
    ],
)
def test_what_the_system_refuses_is_said_with_what_to_do(error, sentence):
    assert re.match(sentence, cli.explain(error))


@pytest.mark.parametrize("error", [RuntimeError("xelatex not found"), ValueError("Axis limits cannot be NaN or Inf")])
def test_a_figure_that_cannot_be_drawn_is_one_sentence(vaelib, tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    code, _, err = vaelib("experiment", "show", "stl-figure-1", "--figure", tmp_path / "a.png")
    assert code == 2 and err == f"vaelib: --figure '{tmp_path}/a.png': {error}\n" and not list(tmp_path.iterdir())


def test_a_figure_is_written_whole_or_not_at_all(vaelib, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"an older one")

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vaelib.files.Path.write_bytes", full)
    code, _, err = vaelib("experiment", "show", "stl-figure-1", "--figure", tmp_path / "a.png")
    assert code == 2 and re.match("vaelib: '.*a.png' could not be written .No space left", err)
    assert (tmp_path / "a.png").read_bytes() == b"an older one" and len(list(tmp_path.iterdir())) == 1
