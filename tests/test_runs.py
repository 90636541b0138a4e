"""Runs on disk: killed at any moment they go on bit for bit; nothing is ever half written, or written over."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch
from test_training import Killed, differences

from vaelib import bounds, data, evaluation, files, models, runs, training
from vaelib.config import Config
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


def wait_for_change(path, before, process, patience=60.0):
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
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed: let it train longer"
        steps.append(torch.load(checkpoint, weights_only=True)["step"])
    assert steps[0] < steps[1] < steps[2] and any(step % 74 for step in steps)
    last = start("train", killed)  # the options are those of the run
    assert last.communicate(timeout=120)[1] == "" and last.returncode == 0
    assert uninterrupted.communicate(timeout=120)[1] == "" and uninterrupted.returncode == 0
    assert not differences(contents(whole), contents(killed))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    run_dir = tmp_path / "run"
    process = start("train", run_dir, *PROCESS, "--epochs", "1000", "--checkpoint-seconds", "1000")
    wait_for_change(run_dir / "metrics.jsonl", None, process)
    wait_for_change(run_dir / "metrics.jsonl", stamp(run_dir / "metrics.jsonl"), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
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


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (damage(lambda content: content[:1000]), "is cut or altered"),
        (damage(lambda content: b""), "is cut or altered"),
        (damage(lambda content: b"hello\n"), "is cut or altered"),
        (flip_a_bit, "is cut or altered, or no checkpoint .wrong checksum of"),
        (lambda path: torch.save({"format": Evil()}, path), "is cut or altered, or no checkpoint"),
        (lambda path: torch.save([1, 2], path), "is cut or altered, or no checkpoint"),
        (other_format, "has format 99, but vaelib .* reads format 2: use the version"),
        (first_edition, "has format 1, but vaelib .* reads format 2: use vaelib 0.1.0, or train anew"),
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


def test_a_checkpoint_without_a_configuration_is_not_touched(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "config.json").unlink()
    with pytest.raises(InputError, match="has a checkpoint.pt but no config.json"):
        runs.train(run_dir, TINY)
    assert (run_dir / "checkpoint.pt").read_bytes() == (finished / "checkpoint.pt").read_bytes()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="is a file, but a run needs a folder"):
        runs.train(tmp_path / "run", TINY)
    assert (tmp_path / "run").read_text() == "mine"


def test_one_process_a_folder(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    with runs.in_use(runs.Folder(run_dir)):
        for use in (lambda: runs.train(run_dir, TINY), lambda: runs.evaluate(run_dir)):
            with pytest.raises(InputError, match="another process works in .*: wait for it"):
                use()
    runs.train(run_dir, TINY)  # free again


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


def test_evaluate(finished, tmp_path):
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
    runs.train(run_dir, replace(TINY, epochs=3))
    assert "evaluation" not in json.loads((run_dir / "result.json").read_text()), "it is of another state"


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
