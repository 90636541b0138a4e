"""Runs on disk: killed at any moment they go on bit for bit; nothing is ever half written, or written over."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_training import Killed, differences
from typer.testing import CliRunner

from vaelib import bounds, cli, data, evaluation, files, models, report, runs, training
from vaelib.config import Config, Recipe
from vaelib.errors import InputError

TINY = Config(
    binarisation="dynamic", model="mlp-1", sizes={"hidden": 8, "latent": 3}, estimator="iwae-dreg", k=2, epochs=2,
    batch_size=50, device="cpu",
)  # fmt: skip
STEPS = 29  # an epoch of TINY


def contents(run_dir) -> dict:
    """Return everything a run left, seconds apart."""
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return {
        "checkpoint": {**checkpoint, "history": list(map(json.loads, checkpoint["history"].splitlines()))},
        "metrics": metrics,
        "config": json.loads((run_dir / "config.json").read_text()),
        "result": json.loads((run_dir / "result.json").read_text()),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run of TINY; not to be written to."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    runs.train(run_dir, TINY)
    return run_dir


def copy_of(run_dir, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    for path in run_dir.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def kill_at_write(monkeypatch, number: int, where: str):
    """Let the process "die" before or after the file write of that number, without any cleaning up."""
    count, write = 0, files.write

    def deadly(path, content):
        nonlocal count
        count += 1
        if count == number and where == "before":
            raise Killed
        write(path, content)
        if count == number and where == "after":
            raise Killed

    for module in (files, runs):
        monkeypatch.setattr(module, "write", deadly)


def test_a_run_leaves_what_it_says(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".lock", "checkpoint.pt", "config.json", "metrics.jsonl", "result.json",
    ]  # fmt: skip
    found = contents(finished)
    assert Config(**found["config"]) == TINY
    assert [record["epoch"] for record in found["metrics"]] == [1, 2]
    assert found["result"]["training"]["step"] == 2 * STEPS
    assert found["result"]["training"]["bound"] == found["metrics"][-1]["bound"]


# Writes: 1 config, 2 metrics (empty), then 3 checkpoint, 4 metrics, 5 checkpoint, 6 metrics, 7 result.
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 8))
def test_killed_between_any_two_writes(finished, tmp_path, monkeypatch, number, where):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at_write(patch, number, where)
        with pytest.raises(Killed):
            runs.train(run_dir, TINY)
    (run_dir / f".checkpoint.pt.{32 * 'a'}.part").write_bytes(b"half a checkpoint")
    runs.train(run_dir, TINY)
    assert not differences(contents(finished), contents(run_dir))
    assert not list(run_dir.glob("*.part")) + list(run_dir.glob(".*.part"))


def test_checkpoints_within_an_epoch(finished, tmp_path, monkeypatch):
    """With no time between checkpoints every step has one; die at some of them, again and again."""
    config, run_dir, deaths = replace(TINY, checkpoint_seconds=0.0), tmp_path / "run", 0
    for steps in (5, 20, 11, 30):
        with monkeypatch.context() as patch:
            kill_at_write(patch, steps, "after")
            with pytest.raises(Killed):
                runs.train(run_dir, config)
        deaths += torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] % STEPS != 0
    assert deaths >= 3, "the deaths must fall within epochs for this test to mean anything"
    runs.train(run_dir, config)
    expected, found = contents(finished), contents(run_dir)
    assert differences(expected, found) == ["/config/checkpoint_seconds"]


def test_forgetting_the_noise_is_noticed(finished, tmp_path, monkeypatch):
    """The negative control of all comparisons here: resume without the noise generator's state."""
    config, run_dir = replace(TINY, checkpoint_seconds=0.0), tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at_write(patch, 10, "after")
        with pytest.raises(Killed):
            runs.train(run_dir, config)

    class Forgetful(training.Training):
        def load_state(self, state):
            noise = self.streams["noise"].get_state()
            super().load_state(state)
            self.streams["noise"].set_state(noise)

    monkeypatch.setattr(runs, "Training", Forgetful)
    runs.train(run_dir, config)
    found = differences(contents(finished), contents(run_dir))
    assert "/checkpoint/streams/noise" in found
    assert any(place.startswith("/checkpoint/model") for place in found)
    assert any(place.startswith("/metrics") for place in found)


PROCESS = [
    "--data", "digits", "--binarisation", "dynamic", "--model", "mlp-1", "--size", "hidden=8", "--size", "latent=3",
    "--estimator", "iwae-dreg", "--k", "2", "--epochs", "4", "--device", "cpu", "--checkpoint-seconds", "0",
]  # fmt: skip


def command(*arguments):
    """Return the command line ``python -m vaelib ...``."""
    return [sys.executable, "-m", "vaelib", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_change(path, before, process, patience=300.0):
    """Wait until ``path`` has another content than ``before`` (its stat, None if it did not exist)."""
    deadline = time.monotonic() + patience
    while stamp(path) == before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stamp(path):
    return path.stat().st_ino if path.exists() else None


def test_a_real_process_is_killed_several_times(tmp_path):
    moments = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start("train", whole, *PROCESS)
    steps = []
    for _ in range(3):
        checkpoint = killed / "checkpoint.pt"
        before = stamp(checkpoint)
        process = start("train", killed, *PROCESS)
        wait_for_change(checkpoint, before, process)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed: let it train longer"
        steps.append(torch.load(checkpoint, weights_only=True)["step"])
    assert steps[0] < steps[1] < steps[2] and any(step % 74 for step in steps)
    last = start("train", killed)  # the options are those of the run
    assert last.communicate(timeout=300)[1] == "" and last.returncode == 0
    assert uninterrupted.communicate(timeout=300)[1] == "" and uninterrupted.returncode == 0
    assert not differences(contents(whole), contents(killed))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    run_dir = tmp_path / "run"
    process = start("train", run_dir, *PROCESS, "--epochs", "1000", "--checkpoint-seconds", "1000")
    wait_for_change(run_dir / "metrics.jsonl", None, process)
    wait_for_change(run_dir / "metrics.jsonl", stamp(run_dir / "metrics.jsonl"), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and out == ""
    step = torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"]
    assert err == (
        f"vaelib: stopped after step {step} of 74000, with a checkpoint; go on with: vaelib train {run_dir}\n"
    )


def test_signals_are_given_back(finished, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    runs.train(copy_of(finished, tmp_path), TINY)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_finished_run_is_left_as_it_is(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    before = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "metrics.jsonl").write_text('{"epoch": 7, "bound": "from another life"}\n')
    runs.train(run_dir, TINY)
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert not differences(contents(finished), contents(run_dir))


def test_more_epochs_go_on(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    runs.train(run_dir, replace(TINY, epochs=3))
    runs.train(tmp_path / "at once", replace(TINY, epochs=3))
    assert not differences(contents(tmp_path / "at once"), contents(run_dir))
    with pytest.raises(InputError, match="has done 3 epochs, but only 2 are asked for"):
        runs.train(run_dir, TINY)
    assert contents(run_dir)["config"]["epochs"] == 3


def test_a_run_in_a_folder_called_as_its_data_goes_on(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_of(finished, tmp_path).rename(TINY.data)
    runs.train(TINY.data, replace(TINY, epochs=3))
    assert runs.evaluate(TINY.data, samples=2)


def test_another_configuration_is_refused_by_its_differences(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    with pytest.raises(InputError, match=r"lr is 0.001 there and 0.01 here; seed is 0 there and 3 here\): leave these"):
        runs.train(run_dir, replace(TINY, lr=0.01, seed=3, checkpoint_seconds=5.0))
    assert not differences(contents(finished), contents(run_dir))


def damage(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flip_a_bit(path):
    """Alter one bit of the largest tensor in the archive at ``path``."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    name, extra = (int.from_bytes(content[member.header_offset + at :][:2], "little") for at in (26, 28))
    content[member.header_offset + 30 + name + extra + 5] ^= 1
    path.write_bytes(content)


def other_format(path):
    torch.save({**torch.load(path, weights_only=True), "format": 99}, path)


def first_edition(path):
    """What vaelib 0.1.0 wrote."""
    state = torch.load(path, weights_only=True)
    kept = ("step", "model", "optimizer", "order", "bounds", "history", "seconds", "device", "streams")
    torch.save({"format": 1, **{name: state[name] for name in kept}}, path)


def other_model(path):
    state = torch.load(path, weights_only=True)
    state["model"].popitem()
    torch.save(state, path)


def other_recipe(recipe):
    return lambda path: torch.save({**torch.load(path, weights_only=True), "recipe": recipe}, path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (damage(lambda content: content[:1000]), "is cut or altered"),
        (damage(lambda content: b""), "is cut or altered"),
        (damage(lambda content: b"hello\n"), "is cut or altered"),
        (
            damage(lambda content: content + b"\0"),
            "is cut or altered, or no checkpoint .something was added",
        ),
        (damage(lambda content: b"\0" + content), "is cut or altered"),
        (damage(lambda content: content + content), "is cut or altered, or no checkpoint .something was added"),
        (flip_a_bit, "is cut or altered, or no checkpoint .wrong checksum of"),
        (lambda path: torch.save({"format": Evil()}, path), "is cut or altered, or no checkpoint"),
        (lambda path: torch.save([1, 2], path), "is cut or altered, or no checkpoint"),
        (other_format, "has format 99, but vaelib .* reads format 2: use the version"),
        (first_edition, "has format 1, but vaelib .* reads format 2: use vaelib 0.1.0, or train anew"),
        (other_recipe([1]), "is not a checkpoint of this run's model and data"),
        (other_recipe({"colour": 1}), "is a checkpoint of another run .its colour is 1, not None"),
        (other_recipe({}), "is a checkpoint of another run .*its batch_size is None, not "),
        (other_recipe({"k": 1}), "is a checkpoint of another run .*its batch_size is None, not "),
        (other_model, "is not a checkpoint of this run's model and data"),
    ],
)
@pytest.mark.parametrize("use", [lambda run_dir: runs.train(run_dir, replace(TINY, epochs=3)), runs.evaluate])
def test_a_damaged_checkpoint_is_refused_and_kept(finished, tmp_path, monkeypatch, harm, sentence, use):
    monkeypatch.chdir(tmp_path)
    run_dir = copy_of(finished, tmp_path)
    harm(run_dir / "checkpoint.pt")
    before = (run_dir / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=sentence):
        use(run_dir)
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert (run_dir / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "evil").exists()


def test_torch_alone_would_not_notice_a_flipped_bit(finished, tmp_path):
    path = copy_of(finished, tmp_path) / "checkpoint.pt"
    flip_a_bit(path)
    torch.load(path, weights_only=True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no JSON object"),
        ("3", "is no JSON object"),
        ('{"colour": 1}', "no option is called 'colour'"),
        ('{"k": "five"}', "k must be a whole number of at least 1, but is 'five'"),
        ('{"model": ["mlp-1"]}', "is not the record of a run"),
        ("{}", "is not the record of a run .it does not say its data, model, estimator, k, epochs, lr, seed.: choose"),
        ('{"epochs": 2, "seed": 0}', "it does not say its data, model, estimator, k, lr"),
    ],
)
def test_a_damaged_configuration_is_refused(finished, tmp_path, text, sentence):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "config.json").write_text(text)
    for use in (lambda: runs.train(run_dir, TINY), lambda: runs.evaluate(run_dir)):
        with pytest.raises(InputError, match=sentence):
            use()
    assert (run_dir / "config.json").read_text() == text


def test_a_configuration_of_before_an_option_existed_goes_on(finished, tmp_path):
    """A field that is not there has its default; and with another value it is another run."""
    run_dir = copy_of(finished, tmp_path)
    old = {name: value for name, value in contents(run_dir)["config"].items() if name not in ("optimizer", "shuffle")}
    (run_dir / "config.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="optimizer is 'adam' there and 'adam-released' here; shuffle is True there"):
        runs.train(run_dir, replace(TINY, optimizer="adam-released", shuffle=False))
    runs.train(run_dir, TINY)
    assert not differences(contents(finished), contents(run_dir))


def test_a_checkpoint_without_a_configuration_goes_on_by_the_options_it_is_of_and_by_no_others(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "config.json").unlink()
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(InputError, match=r"\(its k is 2, not 3\): put .* or without a config.json that run's options"):
        runs.train(run_dir, replace(TINY, k=3))
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    runs.train(run_dir, TINY)
    assert not differences(contents(finished), contents(run_dir))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="run' is a file, but a run needs a folder"):
        runs.train(tmp_path / "run", TINY)
    with pytest.raises(InputError, match="link' is a link to '.*nowhere', which is not there, but a run needs"):
        runs.train(tmp_path / "link", TINY)
    assert (tmp_path / "run").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_one_process_a_folder(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    with runs.in_use(runs.Folder(run_dir)):
        for use in (lambda: runs.train(run_dir, TINY), lambda: runs.evaluate(run_dir)):
            with pytest.raises(InputError, match="another process works in .*: wait for it"):
                use()
    runs.train(run_dir, TINY)  # free again


def turned(place, other, how):
    """Put the run in ``other`` where ``place`` leads; return where the one that was there is now."""
    if how == "renamed":
        place.rename(place.with_name("old"))
        other.rename(place)
        return place.with_name("old")
    first = place.resolve()
    place.unlink()
    place.symlink_to(other)
    return first


def begun(tmp_path, how):
    """Return where a command is to work: a folder, or a link to one."""
    (tmp_path / "run").mkdir() if how == "renamed" else (tmp_path / "first").mkdir()
    if how == "linked":
        (tmp_path / "run").symlink_to(tmp_path / "first")
    return tmp_path / "run"


def files_in(run_dir):
    return {path.name: path.read_bytes() for path in run_dir.iterdir()}


@pytest.mark.parametrize("how", ["renamed", "linked"])
@pytest.mark.parametrize("kept", [True, False], ids=["locked", "never-locked"])
def test_a_run_writes_nothing_into_another_that_came_into_its_place(finished, tmp_path, how, kept):
    place, other, steps, old = begun(tmp_path, how), copy_of(finished, tmp_path), [], None
    if not kept:
        (other / ".lock").unlink()
    before = files_in(other)

    def turn(fraction):
        nonlocal old
        steps.append(fraction)
        if len(steps) == STEPS + 5:
            old = turned(place, other, how)

    with pytest.raises(InputError, match="run' is not the folder any more that this command began in"):
        runs.train(place, TINY, report=turn)
    assert files_in(place) == before and len(steps) == 2 * STEPS
    runs.train(old, TINY)
    assert not differences(contents(finished), contents(old))


@pytest.mark.parametrize("how", ["renamed", "linked"])
def test_an_evaluation_is_not_written_into_another_run(finished, tmp_path, how):
    place, other = begun(tmp_path, how), copy_of(finished, tmp_path)
    for name, content in files_in(finished).items():
        (place / name).write_bytes(content)
    before = files_in(other)
    with pytest.raises(InputError, match="not the folder any more"):
        runs.evaluate(place, 2, limit=2, show=lambda found: turned(place, other, how))
    assert files_in(place) == before


def test_a_full_disk_keeps_the_last_checkpoint(finished, tmp_path):
    """A file size limit stands in for the full disk: the same OSError, at the same place."""
    run_dir = tmp_path / "run"
    runs.train(run_dir, replace(TINY, epochs=1))
    before = (run_dir / "checkpoint.pt").read_bytes()
    process = subprocess.run(
        command("train", run_dir, "--epochs", 2),
        env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY)),
    )  # fmt: skip
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == (
        f"vaelib: '{run_dir}/checkpoint.pt' could not be written (File too large); what was there before is whole: "
        "make room, then run the same command again to go on\n"
    )
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert not list(run_dir.glob(".*.part"))
    runs.train(run_dir, TINY)
    assert not differences(contents(finished), contents(run_dir))


def test_divergence_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    step = training.Training.plain_step

    def poisoned(self, x, eps):
        if self.step == STEPS + 3:
            next(self.model.parameters()).data.fill_(float("inf"))
        return step(self, x, eps)

    monkeypatch.setattr(training.Training, "plain_step", poisoned)
    with pytest.raises(InputError) as caught:
        runs.train(run_dir, TINY)
    assert f"at step {STEPS + 4} with estimator 'iwae-dreg', k = 2" in str(caught.value)
    assert str(caught.value).endswith(f"the last good checkpoint is '{run_dir}/checkpoint.pt', after step {STEPS}")
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    with pytest.raises(InputError, match="the last good checkpoint is none"):
        runs.train(tmp_path / "other", replace(TINY, lr=1e30))


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch finds no CUDA GPU on this machine: use cpu or auto"):
        runs.train(tmp_path / "run", replace(TINY, device="cuda"))
    assert not (tmp_path / "run").exists()
    assert runs.find_device("auto").type == "cpu"


def test_bad_data_leave_no_folder(tmp_path):
    for bad in (
        replace(TINY, binarisation="grey"),
        replace(TINY, batch_size=5000),
        replace(TINY, sizes={"depth": 3}),
    ):
        with pytest.raises(InputError):
            runs.train(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()


def test_one_test_image_or_one_sample_has_no_error(tmp_path, recwarn):
    bits = torch.Generator().manual_seed(0)
    train, test = (torch.rand(n, 8, generator=bits).round().numpy() for n in (40, 1))
    np.savez(tmp_path / "bits.npz", train=train, test=test)
    runs.train(tmp_path / "run", replace(TINY, data=str(tmp_path / "bits.npz"), batch_size=20))
    found = runs.evaluate(tmp_path / "run", samples=10)
    assert math.isfinite(found["nll"]) and found["nll_error"] is None and found["sampling_error"] > 0
    assert runs.evaluate(tmp_path / "run", samples=1)["sampling_error"] is None
    assert "NaN" not in (tmp_path / "run/result.json").read_text()
    said = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "run"), "--samples", "10"]).output
    assert re.search(r"-log p\(x\): \d+\.\d\d nats \(1 test image, 10 samples each\)", said)
    with pytest.raises(InputError, match="compares test observations, but .*bits.npz has one alone"):
        report.show(tmp_path / "run")
    assert not recwarn.list


def test_evaluate(finished, tmp_path, monkeypatch):
    run_dir = copy_of(finished, tmp_path)
    found = runs.evaluate(run_dir, samples=200, limit=40, seed=3)
    assert found == runs.evaluate(run_dir, samples=200, limit=40, seed=3)
    assert found["nll"] != runs.evaluate(run_dir, samples=200, limit=40, seed=4)["nll"]
    assert found["images"] == 40 and len(found["active_units"]) == 1

    model = models.build("mlp-1", 64, hidden=8, latent=3)
    model.load_state_dict(torch.load(run_dir / "checkpoint.pt", weights_only=True)["model"])
    x = data.load("digits", "dynamic").test.batch(slice(0, 40), training.stream("test", 3, "cpu"))
    values = evaluation.log_likelihood(model, x, 2000, 100, torch.Generator().manual_seed(9))
    assert abs(found["nll"] + values.mean().item()) < 4 * 2 * found["sampling_error"]
    assert found["nll_error"] == pytest.approx(values.std().item() / 40**0.5, rel=0.05)
    assert -found["nll"] - 5 < found["bound"] < -found["nll"] + 1
    noise = training.stream("noise", 3, "cpu")
    values, errors = evaluation.log_likelihood(model, x, 200, 20, noise, return_standard_error=True)
    assert found["nll"] == pytest.approx(-values.mean().item(), rel=1e-6)
    # independent errors add in squares
    assert found["sampling_error"] == pytest.approx(errors.norm().item() / 40, rel=1e-5)

    result = json.loads((run_dir / "result.json").read_text())
    assert result["training"] == json.loads((finished / "result.json").read_text())["training"]
    assert result["evaluation"]["samples"] == 200
    with warnings.catch_warnings(action="error"):
        runs.train(run_dir, TINY)

    class Looks(training.Training):
        def run(self, *arguments):
            assert json.loads((run_dir / "result.json").read_text()) == result, "it can still be copied"
            super().run(*arguments)

    monkeypatch.setattr(runs, "Training", Looks)
    with pytest.warns(UserWarning, match=f"the evaluation in '.*result.json', of step {2 * STEPS}, is left out once"):
        runs.train(run_dir, replace(TINY, epochs=3))
    assert "evaluation" not in json.loads((run_dir / "result.json").read_text()), "it is of another state"


def test_all_test_images_are_evaluated_with_five_thousand_samples_if_nothing_is_said(finished, tmp_path, monkeypatch):
    asked, run_dir = [], copy_of(finished, tmp_path)

    def log_likelihood(model, x, samples, *others, **options):
        asked.append((len(x), samples))
        return torch.arange(float(len(x))), torch.ones(len(x))

    monkeypatch.setattr(evaluation, "log_likelihood", log_likelihood)
    found = runs.evaluate(run_dir)
    assert asked == [(300, 5000)] and (found["images"], found["samples"], found["seed"]) == (300, 5000, 0)


def test_what_was_evaluated_before_the_training_was_noted_stays(finished, tmp_path):
    """A kill between the last checkpoint and result.json, an evaluation, then the same command again."""
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "result.json").unlink()
    found = runs.evaluate(run_dir, samples=20, limit=4)
    result = runs.train(run_dir, runs.read_config(run_dir / "config.json"))
    assert result["training"] == json.loads((finished / "result.json").read_text())["training"]
    assert result["evaluation"] == found == json.loads((run_dir / "result.json").read_text())["evaluation"]


@pytest.mark.parametrize("estimator", ["elbo-silent", "elbo-total"])
def test_the_bound_is_of_samples_whatever_the_loss_makes_of_it(estimator):
    """The silent gradient's loss is the exact ELBO, without noise; its bound is estimated as every other one's."""
    config = replace(TINY, model="linear", binarisation="grey", sizes={"latent": 2}, estimator=estimator, k=3)
    images = runs.load_images(config)
    run, x = runs.build(config, images), images.test.grey[:30]
    with torch.no_grad():
        q = run.model.encoder(x)
        z = q.sample(q.noise(3, torch.Generator().manual_seed(2)))
        expected = (run.model.joint(x, z) - q.log_prob(z)).mean().item()
    assert runs.mean_bound(run, x, torch.Generator().manual_seed(2)) == pytest.approx(expected, rel=1e-6)


def test_the_bound_of_a_mixture_counts_each_draw_by_its_share(tmp_path):
    """Two components of unequal weights: the bound at many draws is close to log p(x), and not without the shares."""
    sizes = {"hidden": 4, "latent": 1, "components": 2}
    config = replace(TINY, model="mlp-1-mixture", estimator="iwae-path", sizes=sizes, k=4, epochs=1)
    runs.train(tmp_path / "run", config)
    run = runs.build(config, runs.load_images(config))
    runs.restore(run, tmp_path / "run" / "checkpoint.pt")
    with torch.no_grad():
        run.model.encoder.logits.weight.zero_()
        run.model.encoder.logits.bias.copy_(torch.tensor([3.0, 0.0]))
        run.model.encoder.mean.bias.copy_(torch.tensor([0.0, 3.0]))
    x = data.load("digits", "dynamic").test.batch(slice(0, 30), torch.Generator().manual_seed(0))
    truth = evaluation.log_likelihood(run.model, x, 4000, 100, torch.Generator().manual_seed(1)).mean().item()
    run.recipe = replace(run.recipe, k=2000)
    assert runs.mean_bound(run, x, torch.Generator().manual_seed(2)) == pytest.approx(truth, abs=0.02)
    q = run.model.encoder(x)
    with torch.no_grad():
        z = q.sample(q.noise(2000, torch.Generator().manual_seed(2)))
        unshared = bounds.iwae(run.model.joint(x, z) - q.log_prob(z)).mean().item()
    assert abs(unshared - truth) > 0.1


def test_a_trained_model_is_loaded_with_one_call(finished, tmp_path):
    run = runs.load(finished, device="cpu")
    state = contents(finished)["checkpoint"]
    assert not differences(state["model"], dict(run.model.state_dict())) and not run.model.training
    assert run.config == TINY and run.history == state["history"] and len(run.data.test) > 0
    with pytest.raises(InputError, match="there is no trained model in .*: make one with `vaelib train"):
        runs.load(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    without = copy_of(finished, tmp_path)
    (without / "config.json").unlink()
    with pytest.raises(InputError, match="has a checkpoint but no config.json: put that back, or give `vaelib train "):
        runs.load(without)
    runs.train(without, TINY)
    assert runs.load(without, device="cpu").config == TINY


def test_a_damaged_checkpoint_that_is_deleted_lets_the_run_begin_anew(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes()[:-100])
    with pytest.raises(InputError, match="is cut or altered.*or delete it to begin anew"):
        runs.train(run_dir, TINY)
    (run_dir / "checkpoint.pt").unlink()
    runs.train(run_dir, TINY)
    assert not differences(contents(finished), contents(run_dir))


def test_data_that_were_made_on_this_machine_are_the_run_s_as_those_of_one_s_own(tmp_path, monkeypatch):
    """They have no checksum; what is downloaded has one."""
    file = tmp_path / "data" / "omniglot" / "omniglot_28x28_made.npz"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("VAELIB_DATA", str(tmp_path / "data"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 28, 28), np.uint8)
    names = {"background": np.array([True, True, False]), "alphabet": np.array(list("ABC")), "character": list("123")}
    np.savez(file, images=pixels, **names)
    config = replace(TINY, data="omniglot", batch_size=20)
    runs.train(tmp_path / "run", config)
    runs.train(tmp_path / "run", replace(config, epochs=config.epochs + 1))
    before = file.read_bytes()
    np.savez(file, images=255 - pixels, **names)
    for use in (lambda: runs.train(tmp_path / "run", config), lambda: runs.load(tmp_path / "run")):
        with pytest.raises(InputError, match="omniglot_28x28_made.npz' has changed since this run began: put it back"):
            use()
    file.write_bytes(before)
    assert runs.load(tmp_path / "run", device="cpu").config.data == "omniglot"


def test_any_training_goes_on_from_its_folder(finished, tmp_path):
    """What the experiments lean on: no config, the same checkpoints, and a signal saves before it stops."""

    def start():
        return runs.build(TINY, runs.load_images(TINY)), runs.Folder(tmp_path)

    first, folder = start()

    def stop(run):
        if run.step == STEPS + 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {STEPS + 7} of {2 * STEPS}, with a checkpoint"):
        runs.go_on(first, folder, 1000.0, stop)
    second, _ = start()
    runs.restore(second, folder.checkpoint)
    assert second.step == STEPS + 7
    runs.go_on(second, folder)
    whole = torch.load(finished / "checkpoint.pt", weights_only=True)
    end = torch.load(folder.checkpoint, weights_only=True)
    assert not differences({**whole, "history": 0}, {**end, "history": 0}) and second.history[-1]["epoch"] == 2


def test_a_checkpoint_is_a_minute_old_at_most_if_nothing_is_said(tmp_path, monkeypatch):
    """By a clock on which each of the 29 steps takes 25 seconds."""
    run, saved = runs.build(replace(TINY, epochs=1), runs.load_images(TINY)), []
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: 25.0 * run.step))
    monkeypatch.setattr(runs, "save", lambda training, path: saved.append(training.step))
    runs.go_on(run, runs.Folder(tmp_path))
    assert saved == [*range(3, STEPS, 3), STEPS] and Config().checkpoint_seconds == 60


def test_a_run_starts_from_its_seed_and_the_mean_image():
    images = runs.load_images(TINY)
    run, mean = runs.build(replace(TINY, seed=3), images), images.train.grey.mean(0)
    torch.testing.assert_close(run.model.joint.decode.logits.bias.sigmoid(), mean.clamp(0.001, 0.999))
    same = models.build("mlp-1", 64, mean, training.stream("init", 3), **TINY.sizes)
    assert not differences(dict(run.model.state_dict()), dict(same.state_dict()))


def test_a_folder_with_a_space_goes_on_by_the_command_that_is_printed(tmp_path):
    def stop(fraction):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="go on with: vaelib train '.*/my run'$"):
        runs.train(tmp_path / "my run", TINY, report=stop)


def test_evaluate_needs_a_run_and_sense(finished, tmp_path):
    with pytest.raises(InputError, match="there is no trained model in .*: make one with `vaelib train"):
        runs.evaluate(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    run_dir = copy_of(finished, tmp_path)
    for bad, sentence in (
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1"),
        ({"limit": 0}, "limit must be a whole number of at least 2"),
        ({"seed": -1}, "seed must be"),
        ({"device": "tpu"}, "no device is called 'tpu'"),
    ):
        with pytest.raises(InputError, match=sentence):
            runs.evaluate(run_dir, **bad)


def test_a_damaged_result_is_refused_and_kept(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "result.json").write_text('{"training": ')
    for use in (
        lambda: runs.evaluate(run_dir, samples=2, limit=2),
        lambda: runs.train(run_dir, runs.read_config(run_dir / "config.json")),
    ):
        with pytest.raises(InputError, match="result.json' is not JSON .*: delete it"):
            use()
    assert (run_dir / "result.json").read_text() == '{"training": '


def test_files_are_readable_by_others_as_the_umask_says(finished):
    """A temporary file of the tempfile module would be the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in finished.glob("*.*") if path.is_file())


def test_a_full_disk_is_told_and_nothing_is_lost(small_disk):
    """A real disk, with room for one checkpoint and for no second one beside it."""
    run_dir = small_disk / "run"
    runs.train(run_dir, replace(TINY, epochs=1))
    before = contents(run_dir)
    disk = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (disk.f_bavail * disk.f_bsize - 12_000))
    with pytest.raises(InputError, match="checkpoint.pt' could not be written .No space left on device.*make room"):
        runs.train(run_dir, TINY)
    (small_disk / "filler").unlink()
    assert not differences(before["checkpoint"], contents(run_dir)["checkpoint"])
    assert contents(run_dir)["result"] == before["result"], "the old result stands until the new one does"
    runs.train(run_dir, TINY)
    assert contents(run_dir)["result"]["training"]["epoch"] == 2


def test_an_evaluation_is_shown_before_it_is_written(finished, tmp_path, monkeypatch):
    run_dir, shown = copy_of(finished, tmp_path), []

    def full(path, content):
        raise InputError("no room")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(InputError, match="no room"):
        runs.evaluate(run_dir, samples=2, limit=2, show=shown.append)
    assert shown[0]["nll"] > 0 and (run_dir / "result.json").read_bytes() == (finished / "result.json").read_bytes()


def test_an_evaluation_that_nobody_can_see_is_written_all_the_same(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)

    def closed(found):
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError):
        runs.evaluate(run_dir, samples=2, limit=2, show=closed)
    assert contents(run_dir)["result"]["evaluation"]["samples"] == 2


def test_a_stop_that_nothing_in_the_run_decided_does_not_count(finished, tmp_path):
    """Not so a patience of before, which may be given up."""
    run_dir = copy_of(finished, tmp_path)
    altered(stopped=True)(run_dir / "checkpoint.pt")
    assert runs.train(run_dir, replace(TINY, epochs=3))["training"]["epoch"] == 3


def test_a_checkpoint_of_another_run_is_named(finished, tmp_path):
    run_dir, other = copy_of(finished, tmp_path), tmp_path / "other"
    runs.train(other, replace(TINY, seed=1, lr=0.01))
    (run_dir / "checkpoint.pt").write_bytes((other / "checkpoint.pt").read_bytes())
    for use in (lambda: runs.train(run_dir, replace(TINY, epochs=9)), lambda: runs.load(run_dir)):
        with pytest.raises(InputError, match=r"of another run \(.*its lr is 0.01, not 0.001.*its seed is 1, not 0"):
            use()
    assert (run_dir / "result.json").read_bytes() == (finished / "result.json").read_bytes()


def test_the_checkpoint_of_other_data_of_the_same_shape_is_refused(finished, tmp_path):
    """Nothing but the name tells them apart."""
    run_dir, state = copy_of(finished, tmp_path), torch.load(finished / "checkpoint.pt", weights_only=True)
    for name, other in (("data", "mnist"), ("model", "mlp-2")):
        recipe = {**state["recipe"], name: other}
        torch.save({**state, "recipe": recipe}, run_dir / "checkpoint.pt")
        for use in (lambda: runs.train(run_dir, replace(TINY, epochs=9)), lambda: runs.load(run_dir)):
            with pytest.raises(
                InputError, match=rf"of another run \(its {name} is '{other}', not '{getattr(TINY, name)}'\)"
            ):
                use()


def test_a_checkpoint_that_does_not_say_of_which_data_it_is_is_read(finished, tmp_path):
    """As those of before were."""
    run_dir, state = copy_of(finished, tmp_path), torch.load(finished / "checkpoint.pt", weights_only=True)
    recipe = {name: value for name, value in state["recipe"].items() if name not in ("data", "model")}
    torch.save({**state, "recipe": recipe}, run_dir / "checkpoint.pt")
    assert len(runs.load(run_dir).history) == 2
    runs.train(run_dir, replace(TINY, epochs=3))
    assert contents(run_dir)["checkpoint"]["recipe"] == state["recipe"]


def test_the_result_of_another_run_is_not_believed(finished, tmp_path):
    run_dir, other = copy_of(finished, tmp_path), tmp_path / "other"
    runs.train(other, replace(TINY, seed=1))
    strange = runs.evaluate(other, samples=2, limit=2)
    (run_dir / "result.json").write_bytes((other / "result.json").read_bytes())
    with pytest.warns(UserWarning, match="result.json' has the training and evaluation of another run"):
        result = runs.train(run_dir, TINY)
    assert result == contents(run_dir)["result"] == contents(finished)["result"]

    (run_dir / "result.json").write_bytes((other / "result.json").read_bytes())
    with pytest.warns(UserWarning, match="of another run"):
        found = runs.evaluate(run_dir, samples=2, limit=2)
    assert contents(run_dir)["result"] == {"evaluation": found} and found["nll"] != strange["nll"]
    assert runs.train(run_dir, TINY) == {**contents(finished)["result"], "evaluation": found}


def test_the_training_of_a_longer_or_shorter_run_is_not_taken_for_one_s_own(finished, tmp_path):
    """Whether it says of which weights it is or not; the file's evaluation is then not one's own either."""
    run_dir, other = copy_of(finished, tmp_path), tmp_path / "other"
    for epochs in (1, 3):
        runs.train(other, replace(TINY, seed=1, epochs=epochs))
        strange = contents(other)["result"]["training"]
        for kept in (strange, {name: value for name, value in strange.items() if name != "weights"}):
            (run_dir / "result.json").write_text(json.dumps({"training": kept, "evaluation": {"step": 2 * STEPS}}))
            with pytest.warns(UserWarning, match="the training and evaluation of another run or checkpoint: left out"):
                found = runs.evaluate(run_dir, samples=2, limit=2)
            assert contents(run_dir)["result"] == {"evaluation": found}


def test_the_result_of_an_earlier_epoch_stays_until_there_is_another(finished, tmp_path, monkeypatch):
    run_dir = copy_of(finished, tmp_path)
    before = contents(run_dir)["result"]["training"]
    with monkeypatch.context() as patch:
        kill_at_write(patch, 4, "before")  # 1 config, 2 metrics, 3 checkpoint
        with pytest.raises(Killed):
            runs.train(run_dir, replace(TINY, epochs=4))
    found = runs.evaluate(run_dir, samples=2, limit=2)
    assert contents(run_dir)["result"] == {"training": before, "evaluation": found} and found["step"] == 3 * STEPS


def test_a_result_of_before_weights_were_noted_stays(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    runs.evaluate(run_dir, samples=2, limit=2)
    old = contents(run_dir)["result"]
    for part in old.values():
        del part["weights"]
    (run_dir / "result.json").write_text(json.dumps(old))
    assert runs.train(run_dir, TINY) == old


def test_patience_is_no_matter_before_the_first_epoch_has_ended(tmp_path, monkeypatch):
    waiting = replace(TINY, epochs=1, validate=True, patience=1, checkpoint_seconds=0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_write(patch, 5, "after")
        runs.train(tmp_path / "run", waiting)
    assert not runs.load(tmp_path / "run").history
    runs.train(tmp_path / "run", waiting)
    runs.train(tmp_path / "at once", waiting)
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "at once"))


def test_more_patience_goes_on_where_less_had_stopped(tmp_path):
    still = replace(TINY, epochs=6, lr=1e-30, validate=True, patience=1)
    assert runs.train(tmp_path, still)["training"]["epoch"] == 2
    assert runs.train(tmp_path, replace(still, patience=3))["training"]["epoch"] == 4
    assert runs.train(tmp_path, replace(still, patience=2))["training"]["epoch"] == 4


def test_less_patience_in_the_middle_of_an_epoch_ends_at_the_end_of_it(tmp_path, monkeypatch):
    still = replace(TINY, epochs=6, lr=1e-30, validate=True, patience=5, checkpoint_seconds=0.0)
    real, seen = training.Training.note, []

    def note(run, bounds):
        real(run, bounds)
        seen.append(run.step)
        if len(seen) == 2 * run.steps_per_epoch + 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Training, "note", note)
        runs.train(tmp_path, still)
    found = runs.train(tmp_path, replace(still, patience=1))["training"]
    assert found["epoch"] == 3 and found["step"] == runs.read_state(tmp_path / "checkpoint.pt")["step"]


def test_a_frozen_parameter_need_not_be_finite(tmp_path):
    split = data.load("digits", "dynamic").train

    def begun():
        model = models.build("mlp-1", 64, hidden=4, latent=2, generator=torch.Generator().manual_seed(0))
        model.mask = torch.nn.Parameter(torch.tensor(-math.inf), requires_grad=False)
        return training.Training(model, split, "elbo-path", Recipe(epochs=1, batch_size=500))

    first, second = begun(), begun()
    first.run()
    second.load_state(first.state())
    assert second.step == first.step
    first.model.mask.requires_grad_()
    with pytest.raises(training.Diverged, match="a parameter or its gradient is not finite"):
        first.state()


@pytest.mark.parametrize(
    "text",
    [
        "[]", "null", '{"training": 3}', '{"training": {}}', '{"training": {"step": 30}}', '{"other": {"step": 1}}',
        '{"training": {"epoch": 1, "step": 30, "bound": "-9", "seconds": 1.0, "device": "cpu"}}',
        '{"training": {"epoch": 1, "step": 30, "bound": -9.0, "seconds": 1.0, "device": "cpu", "held_out": []}}',
        '{"evaluation": {"nll": 1.0}}', "[" * 99999,
    ],
)  # fmt: skip
def test_a_result_of_another_kind_is_told_before_anything_is_computed(finished, tmp_path, monkeypatch, text):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "result.json").write_text(text)
    monkeypatch.setattr(evaluation, "log_likelihood", None)
    monkeypatch.setattr(training.Training, "run", None)
    for use in (lambda: runs.evaluate(run_dir), lambda: runs.train(run_dir, replace(TINY, epochs=3))):
        with pytest.raises(InputError, match="result.json' is n"):
            use()
    assert (run_dir / "result.json").read_text() == text


@pytest.mark.parametrize("name", runs.WRITTEN)
def test_a_folder_with_files_of_that_name_but_no_run_is_not_touched(tmp_path, name):
    (tmp_path / name).write_text("mine")
    said = "is cut or altered" if name == "checkpoint.pt" else f"has a {name} but no config.json: choose another folder"
    with pytest.raises(InputError, match=said):
        runs.train(tmp_path, TINY)
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "config.json").exists()


def test_the_files_of_the_user_stay_also_when_the_run_is_refused(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / ".thesis.odt.part").write_text("mine")
    (run_dir / ".x.part").mkdir()
    with pytest.raises(InputError, match="belongs to another configuration"):
        runs.train(run_dir, replace(TINY, lr=0.5))
    runs.train(run_dir, replace(TINY, epochs=3))
    assert (run_dir / ".thesis.odt.part").read_text() == "mine" and (run_dir / ".x.part").is_dir()


def test_an_empty_name_is_not_the_folder_that_we_are_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (lambda: runs.train("", TINY), lambda: runs.evaluate(" "), lambda: runs.load("")):
        with pytest.raises(InputError, match="the name of the folder is empty"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_linked_checkpoint_stays_one_and_a_dangling_link_is_no_beginning(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    (tmp_path / "kept.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes())
    (run_dir / "checkpoint.pt").unlink()
    (run_dir / "checkpoint.pt").symlink_to(tmp_path / "kept.pt")
    runs.train(run_dir, replace(TINY, epochs=3))
    assert (run_dir / "checkpoint.pt").is_symlink()
    assert torch.load(tmp_path / "kept.pt", weights_only=True)["step"] == 3 * STEPS
    (tmp_path / "kept.pt").unlink()
    with pytest.raises(InputError, match="checkpoint.pt' is a link to '.*kept.pt', which is not there"):
        runs.train(run_dir, replace(TINY, epochs=4))
    assert not (tmp_path / "kept.pt").exists()


def test_a_folder_that_is_removed_in_mid_run_is_told_as_that(tmp_path):
    def remove(fraction):
        for path in (tmp_path / "run").iterdir():
            path.unlink()
        (tmp_path / "run").rmdir()

    with pytest.raises(InputError, match="checkpoint.pt' could not be written .*its folder is gone") as caught:
        runs.train(tmp_path / "run", replace(TINY, checkpoint_seconds=0.0), report=remove)
    assert "room" not in str(caught.value)


def test_a_folder_in_the_place_of_a_file_is_told_as_that(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="metrics.jsonl' could not be written .*a folder has that name"):
        runs.train(run_dir, replace(TINY, epochs=3))


def altered(**changes):
    def alter(path):
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return alter


@pytest.mark.parametrize(
    ("alter", "sentence"),
    [
        (altered(step="2"), "its step must be a whole number"),
        (altered(step=14.5), "its step must be a whole number"),
        (altered(step=-5), "its step must be a whole number"),
        (altered(step=10), "its history must be of the 0 epochs"),
        (altered(history=None), "is not a checkpoint of this run"),
        (altered(history="3\n4\n"), "its history must be of the 2 epochs"),
        (altered(history=[{}, {}]), "is not a checkpoint of this run"),
        (altered(decay=float("nan")), "its decay must be a positive number"),
        (altered(seconds="long"), "its seconds must be a number"),
        (altered(stopped=None), "whether it stopped must be true or false"),
        (altered(order=torch.arange(3)), r"its order must be a tensor \[1450\]"),
        (altered(order=torch.full((1450,), 10**6)), "its order must be of 1497 observations"),
        (altered(bounds=torch.zeros(1)), r"its bounds must be a tensor \[29\]"),
        (altered(streams={}), "is not a checkpoint of this run"),
        (altered(world=None), "is not a checkpoint of this run"),
        (altered(hooks=[1, 2]), "is not a checkpoint of this run"),
    ],
)
def test_a_checkpoint_of_another_kind_is_one_sentence(finished, tmp_path, alter, sentence):
    run_dir = copy_of(finished, tmp_path)
    alter(run_dir / "checkpoint.pt")
    for use in (lambda: runs.train(run_dir, replace(TINY, epochs=3)), lambda: runs.load(run_dir)):
        with pytest.raises(InputError, match=sentence) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_what_is_refused_as_code_comes_with_no_advice_to_load_it_all_the_same(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    torch.save({"format": runs.FORMAT, "model": Evil()}, run_dir / "checkpoint.pt")
    with pytest.raises(InputError, match="it holds more than numbers and words") as caught:
        runs.load(run_dir)
    assert "weights_only" not in str(caught.value) and "option" not in str(caught.value)


def spoil_a_weight(state):
    state["model"]["joint.decode.logits.weight"][0, 0] = math.nan


def half_the_weights(state):
    state["model"] = {name: value.half() for name, value in state["model"].items()}


def spoil_a_moment(state):
    state["optimizer"]["state"][0]["exp_avg_sq"].fill_(math.inf)


def halve_a_moment(state):
    state["optimizer"]["state"][0]["exp_avg"] = state["optimizer"]["state"][0]["exp_avg"].half()


def spoil_a_bound(state):
    state["bounds"][-1] = math.nan


def spoil_the_history(state):
    state["history"] = re.sub('"bound": [-0-9.]+', '"bound": NaN', state["history"])


def forget_the_moments(state):
    state["optimizer"]["state"].clear()


def forget_one(state):
    del state["optimizer"]["state"][0]


def forget_how_many(state):  # as before this was recorded
    state["optimizer"]["state"].clear()
    del state["remembered"]


def cut_a_moment(state):  # which fused Adam would read beyond its end
    state["optimizer"]["state"][0]["exp_avg"] = state["optimizer"]["state"][0]["exp_avg"][:1].clone()


def climb_down(state):
    state["optimizer"]["param_groups"][0]["maximize"] = True


def other_betas(state):
    state["optimizer"]["param_groups"][0]["betas"] = (0.5, 0.5)


def exchange_parameters(state):
    state["optimizer"]["param_groups"][0]["params"][:2] = [1, 0]


def cut_a_weight(state):
    state["model"]["encoder.mean.weight"] = state["model"]["encoder.mean.weight"][1:]


def slow_down(state):
    state["decay"] = 0.5


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (exchange_parameters, r"its optimiser's params must be \[0, 1, .*\], but is \[1, 0, "),
        (slow_down, "its decay must be 1, as nothing in this run slows it down, but is 0.5"),
        (forget_the_moments, r"its optimiser must remember its exp_avg and exp_avg_sq of \d+ parameters, .* so of 0"),
        (forget_one, r"its optimiser must remember its exp_avg and exp_avg_sq of \d+ parameters, but does so of \d+"),
        (forget_how_many, "its optimiser must remember its exp_avg and exp_avg_sq of 1 parameters, but does so of 0"),
        (cut_a_moment, r"its optimiser's exp_avg must be of the shape \[.*\], but is of \[1"),
        (
            cut_a_weight,
            r"Error.* size mismatch for encoder.mean.weight: .*\[2, 8\].*\[3, 8\]",
        ),
        (climb_down, "its optimiser's maximize must be False, but is True"),
        (other_betas, r"its optimiser's betas must be \(0.9, 0.999\), but is \(0.5, 0.5\)"),
        (spoil_a_weight, "its joint.decode.logits.weight must be finite numbers of torch.float32"),
        (half_the_weights, "its [a-z.0-9_]+ must be finite numbers of torch.float32"),
        (spoil_a_moment, "its optimiser's exp_avg_sq must be finite numbers"),
        (halve_a_moment, "its optimiser's exp_avg must be finite numbers of torch.float32 or torch.float64"),
        (spoil_a_bound, "its bounds must be a tensor .* of finite numbers"),
        (spoil_the_history, "the bounds in its history must be finite"),
    ],
)
def test_a_checkpoint_with_numbers_that_no_training_saves_is_refused(finished, tmp_path, spoil, part):
    """By all that reads it; none of them changes it, and as it was it is read."""
    run_dir = copy_of(finished, tmp_path)
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    runs.load(run_dir)
    spoil(state)
    torch.save(state, run_dir / "checkpoint.pt")
    before = (run_dir / "checkpoint.pt").read_bytes()
    for use in (runs.load, runs.evaluate, lambda path: runs.train(path, replace(TINY, epochs=3))):
        with pytest.raises(InputError, match=rf"checkpoint.pt' is not a checkpoint of this run's .* \({part}"):
            use(run_dir)
    assert (run_dir / "checkpoint.pt").read_bytes() == before


def test_another_world_is_told(finished, tmp_path):
    """Resuming is bit for bit with the same threads, dtype and versions alone, which the checkpoint has."""
    run_dir, threads = copy_of(finished, tmp_path), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"not bit for bit .*: threads {threads} then and {threads + 1} now$"):
            runs.train(run_dir, replace(TINY, epochs=3))
    finally:
        torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(InputError, match="the images are torch.float32, but the model is torch.float64"):
            runs.load(run_dir)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_checkpoint_whose_next_bound_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """Parameters may be finite, and all that comes of them not: the checkpoint of before stays."""
    run_dir = tmp_path / "run"
    step = training.Training.plain_step

    def blown_up(self, x, eps):
        bound = step(self, x, eps)
        if self.step == 2 * STEPS - 1:  # the last one: no step comes after it
            for p in self.model.parameters():
                p.data.fill_(1e30)
        return bound

    monkeypatch.setattr(training.Training, "plain_step", blown_up)
    with pytest.raises(
        training.Diverged, match=f"the bound is not finite after step {2 * STEPS} .*, after step {STEPS}$"
    ):
        runs.train(run_dir, TINY)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == STEPS
    assert not (run_dir / "result.json").exists()
    with pytest.raises(training.Diverged, match="the last good checkpoint is none"):
        runs.train(tmp_path / "one", replace(TINY, lr=1e20, epochs=1, batch_size=1400))  # one step in all


def test_looking_whether_a_checkpoint_is_good_changes_nothing(tmp_path, finished):
    """Saved after every step, so that the look is taken everywhere, the training ends as it does without."""
    runs.train(tmp_path / "run", replace(TINY, checkpoint_seconds=0.0))
    found = differences(contents(finished), contents(tmp_path / "run"))
    assert found == ["/config/checkpoint_seconds"]


def test_each_epoch_is_put_into_words_once(tmp_path, monkeypatch):
    """So that the end of an epoch does not cost more the longer the history is."""
    written, dumps = [], json.dumps
    monkeypatch.setattr(training.json, "dumps", lambda value, **how: written.append(value) or dumps(value, **how))
    runs.train(tmp_path / "run", replace(TINY, epochs=4, checkpoint_seconds=0.0))
    assert sum("bound" in each for each in written) == 4  # and result.json is put into words by files


def test_data_that_is_not_finite_is_not_blamed_on_the_learning_rate(monkeypatch):
    split = data.Split.of(torch.full((60, 4), 1e30))
    model = models.build("linear", 4, latent=2)
    with pytest.raises(InputError, match="nothing is learnt yet, so look at the data") as caught:
        training.fit(model, split, "elbo-path", batch_size=20, epochs=1)
    assert "lower lr" not in str(caught.value)
    with pytest.raises(InputError, match="fill in what is not a number"):
        data.Split.of(torch.full((3, 4), float("nan")))


# --- held out, and for TensorBoard ------------------------------------------------------------------------------------


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_the_curves_are_the_history_also_of_a_run_that_went_on(tmp_path):
    config = replace(TINY, epochs=2, validate=True, log="tensorboard")
    runs.train(tmp_path / "run", config)
    runs.train(tmp_path / "run", replace(config, epochs=3))
    history = runs.load(tmp_path / "run").history
    assert len(history) == 3
    for name in ("bound", "held_out", "lr"):
        expected = [(record["epoch"], pytest.approx(record[name], rel=1e-5)) for record in history]
        assert scalars(tmp_path / "run")[name] == expected


def test_without_tensorboard_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        InputError, match=r"log tensorboard needs a package that is not here: pip install 'vaelib\[tens"
    ):
        runs.train(tmp_path / "run", replace(TINY, log="tensorboard"))


def test_held_out_observations_are_not_trained_on(tmp_path):
    """Digits have no validation part, so a tenth of the training part is taken; their own is used by those who do."""
    plain, held = (runs.load_images(replace(TINY, validate=validate)) for validate in (False, True))
    assert (len(plain.train), len(held.train), len(held.valid)) == (1497, 1348, 149)
    assert torch.equal(torch.cat([held.train.grey, held.valid.grey]), plain.train.grey)
    runs.train(tmp_path / "run", replace(TINY, validate=True))
    assert "held_out" in runs.load(tmp_path / "run").history[-1]
    with pytest.raises(InputError, match="validate is True there and False here"):
        runs.train(tmp_path / "run", TINY)
