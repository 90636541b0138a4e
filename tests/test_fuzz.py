"""Whatever comes in from outside is right or refused in a sentence: no traceback, and nothing wrong taken for right.

Some seconds in ``make test``; ``make fuzz MINUTES=15`` goes on with other examples for so long.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import math
import re
import struct
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from vaelib import cli, data, estimators, experiments, files, models, report, runs
from vaelib.config import Config
from vaelib.data import images, text
from vaelib.errors import InputError
from vaelib.experiments import grid, lag, results

few = settings(max_examples=max(15, settings.default.max_examples // 4))


@contextlib.contextmanager
def in_a_sentence():
    """Let InputError pass if it is one sentence."""
    try:
        yield
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error).strip() and "Traceback" not in str(error), str(error)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# --- the command line -------------------------------------------------------------------------------------------------

JUNK = (
    st.text(max_size=8)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["", " ", "-", "--", "=", "1e999"])
)
WORDS = st.sampled_from(
    [
        "train", "evaluate", "estimators", "models", "data", "experiment", "list", "run", "show", "fetch", "--help",
        "-h", "--version", "--k", "--lr", "--epochs", "--size", "latent=3", "=3", "hidden=99999999999999999999",
        "--data", "digits", "mnist", "MNIST", "--model", "mlp-1", "linear", "--estimator", "iwae-dreg", "elbo-path",
        "--seed", "--samples", "--limit", "--preset", "smoke", "--jobs", "--gpu-share", "--figure", "a.png", "x.odd",
        "--clip", "--device", "cpu", "gpu", "--quiet", "--no-shuffle", "--compile", "--binarisation", "fixed", "1", "0",
        "stl-figure-1", "lag-toy", "--results", "--runs", "--batch-size", "20", "0.1", "nan", "inf", "-1",
    ]
)  # fmt: skip
COMMANDS = st.sampled_from(
    [
        ("train", "run"),
        ("evaluate", "run"),
        ("experiment", "run", "stl-figure-1"),
        ("experiment", "show", "lag-toy"),
        (),
    ]
)


@given(COMMANDS, st.lists(WORDS | JUNK, max_size=8))
@example(("train", "run"), ["--k", "99999999999999999999999"])
@example(("train", "run"), ["--size", "latent=99999999999999999999999"])
@example(("train", "\udcff"), [])
@example(("train", "a\0b"), [])
@example(("experiment", "show", "stl-figure-3"), ["--figure", ""])
@example(("experiment", "show", "stl-figure-3"), ["--figure", "x"])
def test_a_command_line_is_run_or_refused(folder, command, words):
    """Where it would train, the configuration is one that can be meant."""
    asked = []

    def trained(run_dir, config, **_):
        asked.append(config)
        return {"training": {"epoch": 1, "step": 1, "seconds": 1.0, "device": "cpu", "bound": 0.0}}

    said, cried = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(cried):
        patch.chdir(folder)
        patch.setattr(runs, "train", trained)
        patch.setattr(grid, "run", lambda *_, **__: Path("results/x.csv"))
        patch.setattr(data, "fetch", lambda name: data.find(name) and None)
        with pytest.raises(SystemExit) as end:
            cli.main([*command, *words])
    torch.set_flush_denormal(False)  # a command sets it for its process
    assert end.value.code in (None, 0, 1, 2, 130)
    cried.flush()
    assert b"Traceback" not in cried.buffer.getvalue()
    for config in asked:
        assert Config(**asdict(config)) == config and 0 < config.k < 2**31 and 0 < config.lr < math.inf


ABSURD = st.sampled_from(
    [
        10**400, -(10**400), 2**63, 1e308, 1e39, 5e-324, -0.0, math.nan, math.inf, "", "a\0b", "a\nb", "a\0.py:f",
        "\ud800", "\ud800.py:f", "\ud800:f", "x" * 5000, f"{'x' * 5000}:f", "os:system", "torch:save", ":", "x.npy",
    ]
)  # fmt: skip
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | ABSURD
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
FIELDS = st.sampled_from([*Config.__dataclass_fields__, "colour", "epoch"])


@given(st.dictionaries(FIELDS, JSON, max_size=4))
def test_a_configuration_is_one_or_is_refused(folder, options):
    path = folder / "config.json"
    path.write_text(json.dumps(options))
    with in_a_sentence():
        config = runs.read_config(path)
        for name in ("k", "batch_size", "epochs", "seed"):
            assert type(getattr(config, name)) is int and getattr(config, name) >= (name != "seed")
        assert all(0 < value < math.inf for value in (config.lr, config.adam_eps)) and type(config.shuffle) is bool
        assert set(options) <= set(asdict(config))
        assert all(type(name) is str and value > 0 for name, value in config.sizes.items())
        path.write_text(json.dumps(asdict(config)))
        assert runs.read_config(path) == config


@pytest.fixture(scope="module")
def run_dir(folder):
    """Return a run of one epoch."""
    runs.train(folder / "trained", Config(sizes={"latent": 1}, epochs=1, batch_size=700, device="cpu"))
    return folder / "trained"


@few
@given(
    st.sampled_from([["train", "--quiet"], ["evaluate", "--samples", "1", "--limit", "2"], ["show"]]),
    st.sampled_from([*Config.__dataclass_fields__]),
    ABSURD | st.lists(ABSURD, max_size=1) | st.dictionaries(st.sampled_from(["latent", "\ud800"]), ABSURD, min_size=1),
)
@example(["train"], "checkpoint_seconds", 10**400)
@example(["evaluate"], "model", "a\0.py:f")
@example(["show"], "model", "\ud800.py:f")
@example(["evaluate"], "model", "os:system")
@example(["train"], "data", "x" * 5000)
@example(["show"], "sizes", {"latent": 10**400})
def test_a_run_with_an_absurd_setting_is_used_or_refused(run_dir, command, name, value):
    """No traceback, and one short sentence, whatever stands in config.json and whatever is done with the run."""
    config, said = (run_dir / "config.json").read_text(), io.StringIO()
    (run_dir / "config.json").write_text(json.dumps({**json.loads(config), name: value}))
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            patch.setattr(report, "page", lambda *_: "")
            cli.main([*command, str(run_dir)])
    except SystemExit as end:
        assert end.code in (None, 0) or end.code == 2 and said.getvalue().count("\n") == 1
        assert len(said.getvalue().replace(str(run_dir), "")) < 500
    finally:
        (run_dir / "config.json").write_text(config)


KNOWN = {*estimators.ESTIMATORS, *estimators.ALIASES}
NAMES = {*data.DATASETS, *data.TEXTS, *experiments.EXPERIMENTS, *models.MODELS, "auto", "cpu", "cuda"}


@given(JSON)
@example("mlp-1")
def test_names_of_any_type_are_found_or_refused(name):
    for look in (
        data.load, estimators.get, experiments.find, lambda name: models.build(name, 4), runs.find_device,
        lambda value: models.build("linear", 4, latent=str(value) if isinstance(value, int) else value),
        lambda value: data.load("digits", valid=value if not isinstance(value, int) else -1),
    ):  # fmt: skip
        if isinstance(name, str) and name in NAMES or look is estimators.get and str(name).strip().lower() in KNOWN:
            continue
        with pytest.raises(InputError):
            look(name)


# --- readers ----------------------------------------------------------------------------------------------------------


@st.composite
def spoilt(draw, content: bytes) -> bytes:
    """Return a file's content after some accidents: cut, bytes flipped, put in or left out, or another content."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["cut", "flip", "insert", "remove", "replace", "junk"])):
            case "cut":
                content = content[:at]
            case "flip" if at < len(content):
                content = content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
            case "insert":
                content = content[:at] + draw(st.binary(max_size=9)) + content[at:]
            case "remove":
                content = content[:at] + content[at + draw(st.integers(1, 50)) :]
            case "replace":
                content = content.replace(
                    *draw(st.sampled_from([(b",", b";"), (b"\n", b"\r\n"), (b"0", b""), (b"1", b"nan")]))
                )
            case "junk":
                content = draw(st.binary(max_size=60))
    return content


@given(st.data())
def test_a_checkpoint_is_whole_or_refused(folder, data):
    """A damaged one is never taken for a whole one: what is loaded is what was saved."""
    run_dir, config = (
        folder / "run",
        Config(model="linear", sizes={"latent": 1}, epochs=1, batch_size=700, device="cpu"),
    )
    if not run_dir.exists():
        runs.train(run_dir, config)
        (folder / "good.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes())
    good = (folder / "good.pt").read_bytes()
    found = data.draw(spoilt(good))
    (folder / "bad.pt").write_bytes(found)
    training = runs.build(config, small_digits())
    with in_a_sentence():
        runs.restore(training, folder / "bad.pt")
        whole = runs.build(config, small_digits())
        runs.restore(whole, folder / "good.pt")
        assert training.step == whole.step and training.history == whole.history
        assert all(torch.equal(a, b) for a, b in zip(training.model.parameters(), whole.model.parameters()))


def small_digits(kept=[]):
    if not kept:
        kept.append(data.load("digits"))
    return kept[0]


TRAINED = {"epoch": 1, "step": 3, "bound": 1.0, "seconds": 0.5, "device": "cpu"}


@given(st.data())
def test_a_result_is_one_or_refused(folder, data):
    whole = json.dumps({"training": TRAINED, "evaluation": {"step": 3}}).encode()
    (folder / "result.json").write_bytes(data.draw(spoilt(whole) | JSON.map(lambda value: json.dumps(value).encode())))
    with in_a_sentence():
        assert all(isinstance(part["step"], int) for part in runs.read_result(folder / "result.json").values())


IDX = gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2, 3, 3) + bytes(range(18)), mtime=0)
AMAT = b"\n".join(b" ".join([b"1", b"0"] * 392) for _ in range(2)) + b"\n"


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


OMNIGLOT = npz(
    images=np.zeros((2, 20, 28, 28), np.uint8), character=np.array(["a", "b"]), alphabet=np.array(["x", "x"]),
    background=np.array([True, True]),
)  # fmt: skip
LINES = b"3\tthe cat sat\n4\ton the mat\n"
SPACE = b"method,kind,step,point,model_mean,encoder_mean\nplain,stage,3,0,1.5,2.5\nplain,stage,3,1,0.5,-2.5\n"


@given(st.data())
def test_data_files_are_read_or_refused(folder, data):
    path = folder / "file"

    def read(content: bytes, reader):
        path.write_bytes(data.draw(spoilt(content)))
        with in_a_sentence():
            return reader(path)

    if (found := read(IDX, images.idx)) is not None:
        assert found.dtype == np.uint8
    if (found := read(AMAT, lambda path: images.read_amat({"train": path})["train"][0])) is not None:
        assert found.shape[1:] == (28, 28) and np.isin(found, (0, 1)).all()
    if (found := read(OMNIGLOT, lambda path: images.read_omniglot({"drawings": path})["train"][0])) is not None:
        assert found.shape[1:] == (28, 28) and 0 <= found.min() <= found.max() <= 1
    if (found := read(LINES, lambda path: text.lines(path, labelled=True))) is not None:
        assert found and all(words and all(words) for words in found)
    if (found := read(SPACE, lambda path: lag.read_points(path, lag.SPACE_COLUMNS))) is not None:
        assert all(math.isfinite(float(value)) for value in found["model_mean"])


# --- tables of results ------------------------------------------------------------------------------------------------


@functools.cache
def some_of(name: str, runs_of_it: int) -> bytes:
    """Return the first runs in a table that is in the repository."""
    experiment = experiments.find(name)
    found = results.read(experiment, Path(__file__).parents[1] / "results")
    keys = results.keys(found, experiment)
    kept = set(list(dict.fromkeys(keys))[:runs_of_it])
    return found[[key in kept for key in keys]].to_csv(index=False, lineterminator="\n").encode()


@few
@given(st.sampled_from(list(experiments.EXPERIMENTS)), st.data())
def test_a_table_is_shown_or_refused(folder, name, data):
    """What is taken for finished has all its numbers; a run that is added is there, and nothing else is changed."""
    whole = some_of(name, 3)
    lines = whole.splitlines(keepends=True)
    field = st.tuples(st.integers(0, len(lines) - 1), st.integers(0, 40), st.sampled_from(CELLS))
    content = data.draw(
        spoilt(whole)
        | st.integers(0, len(lines)).map(lambda last: b"".join(lines[:last]))
        | st.lists(st.sampled_from(range(len(lines))), min_size=1).map(
            lambda some: b"".join(lines[i] for i in [0, *some])
        )
        | field.map(lambda change: with_field(lines, *change))
    )
    path, experiment = folder / f"{name}.csv", experiments.find(name)
    path.write_bytes(content)
    with in_a_sentence():
        finished = results.finished(experiment, folder)
        found = experiments.load(name, folder=folder)
        runs = found.groupby([*found.columns[: found.columns.get_loc("metric")]], dropna=False, sort=False)
        told = runs["numbers"].max()  # a line that does not say it is taken for one of before
        assert len(told) == len(finished) and (runs.size() == told)[told.notna()].all()
        assert results.loaded_runs(found, experiment) == finished and found["value"].dtype == "float64"
        found = found[found["preset"] == found["preset"].iloc[0]]
        assert str(experiments.Table(experiment.table(found)))
        experiment.figure(found, Figure())
    path.unlink()


CELLS = ("", "nan", "inf", "-1", "1e9", "1.5", "1e999", "x", "1_0", "\u0663", " 1", "0x10", "short", "nll", "9" * 30)


def with_field(lines: list[bytes], line: int, column: int, word: str) -> bytes:
    """Return a table with another word in one of its fields."""
    fields = lines[line].decode().rstrip("\n").split(",")
    fields[column % len(fields)] = word
    return b"".join([*lines[:line], (",".join(fields) + "\n").encode(), *lines[line + 1 :]])


@given(st.text(alphabet="0123456789.eE+-naifNAI_ \u0663\u00b2", max_size=6))
def test_a_number_is_one_that_pandas_reads_as_python_does(word):
    if results.NUMBER.fullmatch(word):
        number = float(word)
        read = results.as_numbers(results.Series([word], dtype=object)).astype("float64")[0]
        assert math.isnan(number) and math.isnan(read) or read == number
        assert re.fullmatch(r"[ -~]+", word)


@given(JSON)
def test_what_a_run_measured_is_that_or_refused(folder, value):
    task = experiments.find("stl-figure-1").tasks("smoke")[0]
    (folder / "measured.json").write_text(json.dumps(grid.outcome_of(task, [value])))
    with pytest.raises(InputError):
        grid.measured_in(folder / "measured.json", task)
    (folder / "progress.json").write_text(json.dumps(value))
    assert all(0 <= number <= 1e9 for number in grid.progress_in(folder).values())
    files.sweep(folder)
