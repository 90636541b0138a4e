"""Experiments: grids are data, runs survive being killed, tables are never spoilt; here, on processes and on Ray."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tqdm import tqdm

import vaelib
from vaelib import cli, experiments, runs
from vaelib.errors import InputError
from vaelib.experiments import grid, results, stl
from vaelib.experiments.experiment import Experiment, Measured, Preset, Task, as_text

FIGURE_1 = experiments.find("stl-figure-1")


# --- grids as data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_an_experiment_is_plain_data(name):
    experiment = experiments.find(name)
    assert experiment.name == name and experiment.reproduces and "smoke" in experiment.presets
    for preset, size in experiment.presets.items():
        tasks = experiment.tasks(preset)
        assert len(tasks) == size.runs == len({task.key for task in tasks}) == len({task.name for task in tasks})
        assert all(
            value is None or type(value) in (str, int, float) for task in tasks for value in task.config.values()
        )
        assert all(json.loads(json.dumps(dict(task.config))) == dict(task.config) for task in tasks)


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="no experiment is called 'stl-table', did you mean 'stl-table-2'"):
        experiments.find("stl-table")
    with pytest.raises(InputError, match="no preset of 'stl-figure-1' is called 'long'"):
        FIGURE_1.tasks("long")
    with pytest.raises(InputError, match="seeds must be a whole number of at least 1"):
        FIGURE_1.tasks("smoke", 0)


def test_configurations_with_other_keys_are_refused():
    uneven = Experiment("uneven", "", {"smoke": Preset([{"a": 1}, {"b": 1}], 1, 1)}, None, None, None)
    with pytest.raises(InputError, match="has the keys"):
        uneven.tasks("smoke")


def test_table_2_has_every_published_cell():
    for preset in ("short", "paper"):
        have = {
            (task.config["data"], stl.layers_of(task.config["model"]), task.config["estimator"], task.config["k"])
            for task in stl.EXPERIMENTS["stl-table-2"].tasks(preset)
        }
        for data, layers, estimator in stl.PUBLISHED:
            for k in stl.KS:
                same = estimator.replace("iwae", "elbo") if k == 1 else estimator
                if preset == "paper" or data == "mnist" or k < 50:
                    assert (data, layers, same, k) in have


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of(*values: float) -> list[dict]:
    return results.as_rows([Measured("kl", value, at=i) for i, value in enumerate(values)], 1.0, "cpu")


@pytest.fixture
def table(tmp_path) -> Path:
    """A folder with a table of two runs."""
    for task in FIGURE_1.tasks("smoke"):
        results.add(FIGURE_1, task, rows_of(2.0, 1.0), tmp_path)
    return tmp_path / "stl-figure-1.csv"


def test_what_is_added_is_read_again_in_the_order_of_the_grid(table):
    rows = experiments.load("stl-figure-1", folder=table.parent)
    assert [(row["estimator"], row["at"], row["value"]) for row in rows] == [
        ("elbo-total", 0, 2.0), ("elbo-total", 1, 1.0), ("elbo-path", 0, 2.0), ("elbo-path", 1, 1.0)
    ]  # fmt: skip
    assert {"seed", "value", "standard_error", "seconds", "device", "vaelib", "date", *FIGURE_1.keys} <= set(rows[0])
    assert experiments.load("stl-figure-1", "short", table.parent) == []


def test_a_run_is_not_added_twice(table):
    before = table.read_text()
    results.add(FIGURE_1, FIGURE_1.tasks("smoke")[0], rows_of(7.0), table.parent)
    assert table.read_text() == before


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda lines: lines[2].rpartition(",")[0], "line 3 of .* has 16 fields, not 17"),
        (lambda lines: lines[2].replace(",1,,1", ",one,,1"), "line 3 of .* has value 'one', not a number"),
        (lambda lines: lines[1], "line 3 of .* repeats a number"),
    ],
)
def test_a_corrupt_row_is_named_and_nothing_is_written(table, spoil, complaint):
    lines = table.read_text().splitlines()
    lines[2] = spoil(lines)
    table.write_text("\n".join(lines) + "\n")
    before = table.read_text()
    with pytest.raises(InputError, match=complaint):
        results.add(FIGURE_1, FIGURE_1.tasks("smoke", 2)[1], rows_of(1.0), table.parent)
    assert table.read_text() == before


def test_a_table_of_another_experiment_is_not_written_over(table):
    table.write_text(table.read_text().replace("estimator", "method"))
    with pytest.raises(InputError, match="has the columns preset, method.*move that file out of the way"):
        grid.run("stl-figure-1", "smoke", results_folder=table.parent, runs_folder=table.parent)


def test_a_full_disk_leaves_the_table_whole(table, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = table.read_text()
    monkeypatch.setattr(runs, "whole", full)
    with pytest.raises(InputError, match="could not be written .No space left.*what was there before is whole"):
        results.add(FIGURE_1, FIGURE_1.tasks("smoke", 2)[1], rows_of(1.0), table.parent)
    assert table.read_text() == before


def test_means_over_seeds(tmp_path):
    for task, value in zip(FIGURE_1.tasks("smoke", 3)[:3], (1.0, 2.0, 6.0), strict=True):
        results.add(FIGURE_1, task, rows_of(value), tmp_path)
    rows = experiments.load("stl-figure-1", folder=tmp_path)
    summary = experiments.over_seeds(rows, "kl", ("estimator",), at=0)["elbo-total",]
    assert summary.mean == 3.0 and summary.n == 3
    assert summary.standard_error == pytest.approx((7 / 3) ** 0.5)
    assert str(summary) == "3.00 ± 1.53"


def test_differences_are_paired_by_seed():
    values = {("a", "plain", 0): 1.0, ("a", "plain", 1): 5.0, ("a", "new", 0): 3.0, ("a", "new", 1): 8.0}
    found = results.paired({**values, ("b", "new", 0): 9.0}, "plain")
    assert found == {("a", "plain"): (0.0, 0.0, 2), ("a", "new"): (2.5, pytest.approx(0.5), 2)}
    assert results.paired(values, "other") == {}


def test_a_curve_has_the_places_that_its_own_runs_have():
    rows = [
        {"metric": "kl", "at": at, "value": value, "method": method}
        for method, at, value in (("b", 2, 4.0), ("b", None, 9.0), ("a", 1, 1.0), ("b", 1, 3.0), ("b", 1, 5.0))
    ]
    found = results.curves(rows, "kl", "method")
    assert {name: (at, [s.mean for s in means]) for name, (at, means) in found.items()} == {
        "a": ([1], [1.0]),
        "b": ([1, 2], [4.0, 4.0]),
    }


def test_the_version_is_that_of_the_code_and_of_no_repository_around_it(tmp_path):
    """A package installed into an environment inside somebody's repository is not of their commit."""
    assert results.code_version() == results.CODE
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for name in ("theirs.py", "installed.py"):
        (tmp_path / name).write_text("")
    subprocess.run([*git, "add", "theirs.py"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "theirs"], check=True)
    assert results.code_version(tmp_path / "installed.py") == vaelib.__version__
    assert re.fullmatch(rf"{re.escape(vaelib.__version__)}\+\w+", results.code_version(tmp_path / "theirs.py"))
    assert results.code_version(tmp_path.parent / "nowhere.py") == vaelib.__version__


def test_a_table_is_set_in_columns_and_in_markdown():
    table = experiments.Table([("name", "nll"), ("a", "1.25"), ("longer", "2")])
    assert str(table) == "name    nll\na       1.25\nlonger  2"
    assert table._repr_markdown_() == "| name | nll |\n| --- | --- |\n| a | 1.25 |\n| longer | 2 |"


def test_numbers_survive_the_table():
    assert [as_text(value) for value in (None, 1, 0.1, 1e-5, "a")] == ["", "1", "0.1", "1e-05", "a"]


# --- runs -------------------------------------------------------------------------------------------------------------


def training_task(seed: int = 0, epochs: int = 30, **changes) -> Task:
    """A run of Table 2 on digits that takes a second or two."""
    config = {**stl.cell("digits", "mlp-1", "elbo-path", 1, epochs, 20), **changes}
    return Task("stl-table-2", "smoke", config, seed)


def jobs_of(tasks, folder: Path) -> list[grid.Job]:
    return [grid.Job(task, folder / task.name, "cpu") for task in tasks]


def finish(pool: grid.Pool, jobs: list[grid.Job], table: Path) -> dict:
    with tqdm(total=len(jobs), disable=True) as bar:
        return grid.Grid(pool, list(jobs), table, bar, done=0).finish()


def values(folder: Path) -> dict:
    """Everything the runs of Table 2 measured, by seed and metric, times apart."""
    rows = experiments.load("stl-table-2", folder=folder)
    assert len({(row["seed"], row["metric"]) for row in rows}) == len(rows)
    return {(row["seed"], row["metric"]): row["value"] for row in rows if "seconds" not in row["metric"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """What two runs measure that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for job in jobs_of([training_task(0), training_task(1)], folder):
        job.folder.mkdir()
        subprocess.run([sys.executable, "-c", ONE_RUN, str(job.task.seed), str(job.folder)], check=True)
        results.add(
            stl.EXPERIMENTS["stl-table-2"], job.task, runs.read_json(job.folder / "measured.json")["rows"], folder
        )
    return values(folder)


ONE_RUN = """
import sys, pathlib, torch
sys.path.insert(0, "tests")
from test_experiments import training_task
from vaelib.experiments import grid
torch.set_num_threads(1)
grid.execute(training_task(int(sys.argv[1])), pathlib.Path(sys.argv[2]), "cpu")
"""


def wait_for(condition, seconds: float = 60):
    """Wait until ``condition()``; fail if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def under_way(job: grid.Job) -> bool:
    return (job.folder / "model/checkpoint.pt").exists() and not (job.folder / "measured.json").exists()


def test_a_run_whose_process_is_killed_goes_on_to_the_same_numbers(tmp_path, undisturbed):
    jobs = jobs_of([training_task(0), training_task(1)], tmp_path)

    class Murderous(grid.OnThisMachine):
        victims = list(jobs)

        def ended(self):
            for job in [job for job in self.victims if job in self.processes and under_way(job)]:
                self.victims.remove(job)
                self.processes[job].kill()
            return super().ended()

    assert finish(Murderous(2), jobs, tmp_path) == {}
    assert Murderous.victims == [] and all(job.deaths == 1 for job in jobs)
    assert values(tmp_path) == undisturbed


def test_a_run_that_dies_each_time_is_given_up(tmp_path):
    class Deadly(grid.OnThisMachine):
        def ended(self):
            for process in self.processes.values():
                process.kill()
            return super().ended()

    (why,) = finish(Deadly(1), jobs_of([training_task()], tmp_path), tmp_path).values()
    assert why == "its process died 3 times"


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    wrong, right = jobs_of([training_task(data="nothing"), training_task(epochs=1)], tmp_path)
    failed = finish(grid.OnThisMachine(1), [wrong, right], tmp_path)
    assert list(failed) == [wrong] and "no data set is called 'nothing'" in failed[wrong]
    assert {seed for seed, _ in values(tmp_path)} == {0}


def test_finished_runs_are_not_made_again(tmp_path, monkeypatch):
    where = {"results_folder": tmp_path / "results", "runs_folder": tmp_path / "runs"}
    path = grid.run("stl-figure-3", "smoke", **where)
    before = path.read_text()
    monkeypatch.setattr(grid, "OnThisMachine", None)
    assert grid.run("stl-figure-3", "smoke", **where) == path
    assert path.read_text() == before
    path.unlink()  # a run that was finished, but not added to the table, is added from its folder
    monkeypatch.undo()
    gathered = []
    watched = replace(experiments.find("stl-figure-3"), gather=lambda *what: gathered.append(what))
    monkeypatch.setattr(grid, "find", lambda name: watched)
    grid.run("stl-figure-3", "smoke", **where)
    assert path.read_text() == before
    ((preset, folders, table),) = gathered  # what runs leave beside numbers, also of a grid that ended before it was
    assert preset == "smoke" and table == path.parent and all((each / "measured.json").exists() for each in folders)


def command(tmp_path, *arguments) -> subprocess.Popen:
    folders = ("--results", tmp_path / "results", "--runs", tmp_path / "runs", "--device", "cpu")
    words = [sys.executable, "-m", "vaelib", "experiment", "run", *map(str, (*arguments, *folders))]
    # a background job of a shell inherits that SIGINT is ignored
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def test_two_grids_at_once_share_the_work(tmp_path):
    both = [command(tmp_path, "stl-figure-1", "--preset", "smoke", "--seeds", 3, "--jobs", 1) for _ in range(2)]
    for process in both:
        assert process.wait() == 0, process.communicate()
    rows = experiments.load("stl-figure-1", folder=tmp_path / "results")
    runs_made = {(row["estimator"], row["seed"]) for row in rows}
    assert len(runs_made) == 6 and len(rows) == 6 * 6  # KL at 5 steps and in the end


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see the workers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_grid_that_is_stopped_leaves_no_worker_and_goes_on(tmp_path, number):
    process = command(tmp_path, "stl-table-2", "--preset", "smoke", "--jobs", 1)
    wait_for(lambda: list(tmp_path.glob("runs/*/*/*/model/checkpoint.pt")))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on from here" in err
    folder = str(tmp_path)
    wait_for(lambda: not any(folder in line for line in open_locks()))
    assert not list(tmp_path.glob("results/*.csv")) or experiments.load("stl-table-2", folder=tmp_path / "results")


def open_locks() -> list[str]:
    """The lock files that any process has open."""
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(path)
        except OSError:
            continue
        if target.endswith(".lock"):
            found.append(target)
    return found


# --- a cluster --------------------------------------------------------------------------------------------------------


def test_ray_resumes_elsewhere_what_a_lost_node_was_at(tmp_path, undisturbed, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra vaelib[ray] is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # notice a lost node sooner
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        jobs = jobs_of([training_task(0), training_task(1)], tmp_path)
        pool = grid.OnRay(cluster.address, "cpu", 1.0)

        class Losing:
            """The pool, but one node is lost while both runs are under way."""

            lost = False
            has_room, start, stop = pool.has_room, pool.start, pool.stop

            def ended(self):
                if not self.lost and all(under_way(job) for job in jobs):
                    self.lost = True
                    cluster.remove_node(nodes[0], allow_graceful=False)
                return pool.ended()

        losing = Losing()
        assert finish(losing, jobs, tmp_path) == {}
        assert losing.lost
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert values(tmp_path) == undisturbed


def test_a_cluster_that_is_not_there_is_one_sentence():
    pytest.importorskip("ray", reason="the extra vaelib[ray] is not installed")
    with pytest.raises(InputError, match="there is no Ray cluster at 'nowhere'"):
        grid.OnRay("nowhere", "cpu", 1.0)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_gain_on_the_total_derivative_is_paired_by_seed(tmp_path):
    nll = {("elbo-total", 0): 100.0, ("elbo-path", 0): 99.0, ("elbo-total", 1): 90.0, ("elbo-path", 1): 88.0}
    for (estimator, seed), value in nll.items():
        task = Task("stl-table-2", "smoke", stl.cell("digits", "mlp-1", estimator, 1, 2, 50), seed)
        measured = results.as_rows([Measured("nll", value, 0.5)], 1.0, "cpu")
        results.add(stl.EXPERIMENTS["stl-table-2"], task, measured, tmp_path)
    rows = experiments.load("stl-table-2", folder=tmp_path)
    (gain,) = stl.gains(rows).values()
    assert (gain.mean, gain.standard_error, gain.n) == (1.5, 0.5, 2)  # unpaired, the error would be 7
    words = stl.table_2(rows)
    assert words[0] == ("recipe", "data", "model", "estimator", "k = 1", "published", "seeds")
    assert words[1] == ("paper", "digits", "mlp-1", "elbo-total", "95.00 ± 5.00", "-", "2")
    assert words[3] == ("paper", "digits", "mlp-1", "elbo-total - elbo-path", "1.50 ± 0.50", "-", "2")


def test_table_2_sets_ours_beside_the_published_figures(tmp_path):
    experiment, figure = stl.EXPERIMENTS["stl-table-2"], Figure()
    figures = {
        ("omniglot", "mlp-2", "iwae-total"): 114.79,
        ("mnist", "mlp-2-detached", "iwae-path"): 94.0,
        ("mnist", "mlp-2", "iwae-path"): 93.5,
        ("mnist", "mlp-2", "iwae-total"): 93.89,
    }
    for (data, model, estimator), nll in figures.items():
        task = Task("stl-table-2", "short", stl.cell(data, model, estimator, 5, 40, 1000), 0)
        results.add(experiment, task, results.as_rows([Measured("nll", nll)], 1.0, "cpu"), tmp_path)
    rows = experiments.load("stl-table-2", "short", tmp_path)
    assert [line[1:] for line in experiment.table(rows)] == [
        ("data", "model", "estimator", "k = 5", "published", "seeds"),
        ("mnist", "mlp-2", "iwae-total", "93.89", "83.89", "1"),
        ("mnist", "mlp-2", "iwae-path", "93.50", "83.57", "1"),
        ("mnist", "mlp-2-detached", "iwae-path", "94.00", "83.57", "1"),
        ("omniglot", "mlp-2", "iwae-total", "114.79", "104.79", "1"),
        ("mnist", "mlp-2", "iwae-total - iwae-path", "0.39", "0.32", "1"),
        ("mnist", "mlp-2-detached", "iwae-total - iwae-path", "-0.11", "0.32", "1"),
    ]
    experiment.figure(rows, figure)
    drawn = {ax.get_title(): [*line.get_ydata()] for ax in figure.axes for line in ax.containers[1].lines[:1]}
    assert drawn == {"mnist, mlp-2": [pytest.approx(0.39)], "mnist, mlp-2-detached": [pytest.approx(-0.11)]}
    crosses = [
        y for ax in figure.axes for line in ax.lines if line.get_label() == "published" for y in line.get_ydata()
    ]
    assert crosses == [pytest.approx(0.32)] * 2


def test_a_table_2_that_is_not_complete_is_shown(tmp_path):
    """With five draws there is the total derivative alone: its column stays, and the gains have none there."""
    experiment = stl.EXPERIMENTS["stl-table-2"]

    def add(estimator, k, nll):
        task = Task("stl-table-2", "short", stl.cell("mnist", "mlp-1", estimator, k, 40, 1000), 0)
        results.add(experiment, task, results.as_rows([Measured("nll", nll)], 1.0, "cpu"), tmp_path)
        return experiments.load("stl-table-2", "short", tmp_path)

    rows = add("elbo-total", 1, 92.0)
    assert len(experiment.table(rows)) == 2
    with pytest.raises(InputError, match="nothing to draw yet"):
        experiment.figure(rows, Figure())
    add("elbo-path", 1, 91.5)
    lines = experiment.table(add("elbo-total", 5, 91.0))
    assert lines[-1][3:] == ("elbo-total - elbo-path", "0.50", "0.36", "-", "0.14", "1")
    assert {len(line) for line in lines} == {9} and str(experiments.Table(lines))


def test_the_figures_are_drawn(tmp_path):
    where = {"results_folder": tmp_path, "runs_folder": tmp_path / "runs"}
    for name in ("stl-figure-1", "stl-figure-3"):
        grid.run(name, "smoke", **where)
        experiment, rows, figure = experiments.find(name), experiments.load(name, folder=tmp_path), Figure()
        assert len(experiment.table(rows)) == 3 + (name == "stl-figure-3")
        experiment.figure(rows, figure)
        assert figure.axes[0].lines
    rows = experiments.load("stl-figure-1", folder=tmp_path)
    final = {row["estimator"]: row["value"] for row in rows if row["metric"] == "final kl"}
    assert final["elbo-path"] < final["elbo-total"]


def test_the_command_shows_a_table_and_says_what_is_missing(tmp_path, capsys):
    for arguments, sentence in [
        (("show", "stl-figure-1"), "has no results of 'stl-figure-1': make them with"),
        (("show", "stl-figure-1", "--preset", "huge"), "no preset is called 'huge'"),
        (("run", "stl-figure-1", "--preset", "smoke", "--jobs", "0"), "jobs must be a whole number of at least 1"),
        (("run", "stl-figure-1", "--preset", "smoke", "--device", "tpu"), "no device is called 'tpu'"),
    ]:
        with pytest.raises(SystemExit) as end:
            cli.main(["experiment", *arguments, "--results", str(tmp_path)])
        assert end.value.code == 2 and sentence in capsys.readouterr().err
    for task in FIGURE_1.tasks("smoke"):
        measured = results.as_rows([Measured("kl", 1.25, at=0), Measured("final kl", 1.25)], 1.0, "cpu")
        results.add(FIGURE_1, task, measured, tmp_path)
    with pytest.raises(SystemExit):
        cli.main(
            ["experiment", "show", "stl-figure-1", "--results", str(tmp_path), "--figure", str(tmp_path / "a.png")]
        )
    out = capsys.readouterr().out
    assert "preset smoke, cpu" in out and "elbo-path" in out and "1.25" in out and (tmp_path / "a.png").exists()


def test_the_list_says_what_is_done_and_how_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "default_jobs", lambda device: 4)
    first, _ = FIGURE_1.tasks("smoke")
    results.add(FIGURE_1, first, results.as_rows([Measured("kl", 1.25, at=0)], 1.0, "cpu"), tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["experiment", "list", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert [line for line in lines if not line.startswith(" ")] == list(experiments.EXPERIMENTS)
    at = lines.index("stl-figure-1")
    assert lines[at + 2 : at + 4] == [
        "    smoke: 2 runs, 1 done; 6 seconds of one core, 2 seconds here",
        "    short: 20 runs, 0 done; 60 seconds of one core, 15 seconds here",
    ]


@pytest.mark.parametrize(
    "minutes, words", [(0.5, "30 seconds"), (2, "2 minutes"), (119, "119 minutes"), (120, "2 hours"), (2880, "2 days")]
)
def test_durations(minutes, words):
    assert cli.duration(minutes) == words
