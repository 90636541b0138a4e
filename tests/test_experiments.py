"""Experiments: grids are data, runs survive being killed, tables are never spoilt; here, on processes and on Ray."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from pandas import DataFrame
from tqdm import tqdm

import vaelib
from vaelib import cli, experiments, files, gradients, runs
from vaelib.errors import InputError
from vaelib.experiments import grid, results, schedule, stl
from vaelib.experiments.experiment import Experiment, Measured, Preset, Task, as_text
from vaelib.posteriors import DiagonalGaussian, Mixture

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


def numbers(*values: float) -> list[dict]:
    return results.with_provenance([Measured("kl", value, at=i) for i, value in enumerate(values)], 1.0, "cpu")


@pytest.fixture
def table(tmp_path) -> Path:
    """A folder with a table of two runs."""
    for task in FIGURE_1.tasks("smoke"):
        results.add(FIGURE_1, task, numbers(2.0, 1.0), tmp_path)
    return tmp_path / "stl-figure-1.csv"


def test_what_is_added_is_read_again_in_the_order_of_the_grid(table):
    found = experiments.load("stl-figure-1", folder=table.parent)
    assert found[["estimator", "at", "value"]].to_numpy().tolist() == [
        ["elbo-total", 0, 2.0], ["elbo-total", 1, 1.0], ["elbo-path", 0, 2.0], ["elbo-path", 1, 1.0]
    ]  # fmt: skip
    assert [found[name].dtype.kind for name in ("seed", "dim", "lr", "at", "value", "standard_error")] == list("iiffff")
    assert list(found) == results.columns(FIGURE_1) and found["standard_error"].isna().all()
    with pytest.raises(InputError, match="has no results of 'stl-figure-1', preset short: make them with `vaelib exp"):
        experiments.load("stl-figure-1", "short", table.parent)
    with pytest.raises(InputError, match="no preset of 'stl-figure-1' is called 'shrt', did you mean 'short'"):
        experiments.load("stl-figure-1", "shrt", table.parent)


def test_a_run_is_not_added_twice(table):
    before = table.read_text()
    results.add(FIGURE_1, FIGURE_1.tasks("smoke")[0], numbers(7.0), table.parent)
    assert table.read_text() == before


SPREADSHEETS = {
    "Windows line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "both": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "blank lines at the end": lambda text: f"{text}\n\n".encode(),
    "no line end at the end": lambda text: text.rstrip("\n").encode(),
    "quotes": lambda text: text.replace("elbo-path", '"elbo-path"').encode(),
    "numbers in its own way": lambda text: text.replace(",0.01,", ",1.00E-02,").encode(),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_a_table_saved_by_a_spreadsheet_reads_right_and_takes_more(table, kind):
    before, text = experiments.load("stl-figure-1", folder=table.parent), table.read_text()
    table.write_bytes(SPREADSHEETS[kind](text))
    after = experiments.load("stl-figure-1", folder=table.parent)
    assert after.equals(before) and list(after.dtypes) == list(before.dtypes)
    known = results.finished(FIGURE_1, table.parent)
    assert known == {task.key for task in FIGURE_1.tasks("smoke")}  # none of them is made again
    results.add(FIGURE_1, FIGURE_1.tasks("smoke", 2)[1], numbers(1.0), table.parent)
    assert len(experiments.load("stl-figure-1", folder=table.parent)) == 5


def in_line_3(change):
    """Spoil the third line of a table, which is of seed 0 and has at 1 and value 1."""

    def spoil(text: str) -> bytes:
        lines = text.splitlines()
        lines[2] = change(lines)
        return ("\n".join(lines) + "\n").encode()

    return spoil


SPOILT = {
    "a field less": (in_line_3(lambda lines: lines[2].rpartition(",")[0]), "line 3 of .* has 17 fields, not 18"),
    "a field more": (in_line_3(lambda lines: lines[2] + ",x"), "line 3 of .* has 19 fields, not 18"),
    "a word for a number": (
        in_line_3(lambda lines: lines[2].replace(",1,1,,1", ",1,one,,1")), "line 3 of .* has value 'one', not a number",
    ),
    "a preset that is none": (
        in_line_3(lambda lines: lines[2].replace("smoke", "smkoe")), "line 3 of .* has preset 'smkoe', not smoke or",
    ),
    "a metric that is none": (in_line_3(lambda lines: lines[2].replace(",kl,", ",KL,")), "metric .KL. at 1, not kl"),
    "a metric of the whole run at a place": (
        in_line_3(lambda lines: lines[2].replace(",kl,", ",final kl,")), "has metric 'final kl' at 1, not kl",
    ),
    "a place less": (in_line_3(lambda lines: lines[2].replace(",kl,1,", ",kl,,")), "has metric 'kl', not final kl"),
    "an estimator that is none": (
        in_line_3(lambda lines: lines[2].replace("elbo-total", "elbo-ttal")),
        "line 3 of .* is of no run of 'stl-figure-1': its estimator is 'elbo-ttal', not 'elbo-",
    ),
    "no value": (in_line_3(lambda lines: lines[2].replace(",1,1,,1", ",1,,,1")), "line 3 of .* has value '', not a"),
    "a line twice": (in_line_3(lambda lines: lines[1]), "line 3 of .* repeats a number"),
    "a number twice, in other words": (
        in_line_3(lambda lines: lines[1].replace(",0.01,", ",1.00E-02,")), "line 3 of .* repeats a number",
    ),
    "a place twice, in other words": (
        in_line_3(lambda lines: lines[1].replace(",kl,0,", ",kl,00,")), "line 3 of .* repeats a number",
    ),
    "a quote that does not end": (in_line_3(lambda lines: '"' + lines[2]), "is not CSV"),
    "a place between epochs": (in_line_3(lambda lines: lines[2].replace(",1,1,,1", ",1.5,1,,1")), "has at '1.5'"),
    "half a letter": (lambda text: text.replace("kl", "k\u00fc").encode("latin-1"), "is not text in UTF-8"),
    "UTF-16": (lambda text: text.encode("utf-16"), "is not text in UTF-8"),
    "zero bytes": (in_line_3(lambda lines: lines[2].replace("kl", "k\0l")), "line 3|repeats|metric"),
    "semicolons": (lambda text: text.replace(",", ";").encode(), "has the columns preset;estimator"),
    "a line of another making of the run": (
        in_line_3(lambda lines: re.sub(f',1,(?="?{re.escape(results.processor())})', ",2,", lines[2])),
        "line 3 of .* is of another making of its run than .*: it has seconds '2', not '1': mend that",
    ),
    "nothing": (lambda text: b"", "csv' is empty: put a whole copy in its place"),
    **{
        f"the seed {seed}": (
            in_line_3(lambda lines, seed=seed: lines[2].replace(",50,0,kl", f",50,{seed},kl")), f"has seed '{seed}'",
        )
        for seed in ("1.5", "nan", "1e9", "-1", "", "\u0663", "9" * 30)
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in SPOILT if kind != "zero bytes"])
def test_a_spoilt_table_gets_one_sentence_and_nothing_is_written(table, kind, capsys):
    spoil, complaint = SPOILT[kind]
    table.write_bytes(spoil(table.read_text()))
    before = table.read_bytes()
    for use in (
        lambda: experiments.load("stl-figure-1", folder=table.parent),
        lambda: results.add(FIGURE_1, FIGURE_1.tasks("smoke", 2)[1], numbers(1.0), table.parent),
    ):
        with pytest.raises(InputError, match=complaint) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert table.read_bytes() == before
    with pytest.raises(SystemExit) as end:
        cli.main(["experiment", "list", "--results", str(table.parent)])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and [line for line in lines if line[0] != " "] == list(experiments.EXPERIMENTS)
    assert re.search(complaint, lines[lines.index("stl-figure-1") + 2])


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_a_table_with_a_metric_in_other_letters_is_refused(tmp_path, name):
    """Which would count as complete, and then lack a number that the table needs."""
    header, line, *rest = Path("results", f"{name}.csv").read_text().splitlines(keepends=True)
    place = header.split(",").index("metric")
    fields = line.split(",")
    metric, fields[place] = fields[place], fields[place].upper()
    (tmp_path / f"{name}.csv").write_text("".join([header, ",".join(fields), *rest]))
    with pytest.raises(InputError, match=f"line 2 of .* has metric '{metric.upper()}'.*, not .*; nothing was written"):
        experiments.load(name, folder=tmp_path)


@pytest.mark.parametrize(("name", "column"), [("flow-vae", "epochs"), ("stl-table-2", "k"), ("stl-schedule", "epochs")])
def test_whole_numbers_that_were_saved_as_others_are_shown_the_same(tmp_path, name, column):
    """As pandas and spreadsheets save them: of all lines, or of one."""
    before = str(experiments.Table(experiments.find(name).table(experiments.load(name))))
    lines = [line.split(",") for line in Path("results", f"{name}.csv").read_text().splitlines(keepends=True)]
    place = lines[0].index(column)
    for some in (slice(1, 2), slice(1, None)):
        for line in lines[some]:
            line[place] = f"{float(line[place])}"
        (tmp_path / f"{name}.csv").write_text("".join(map(",".join, lines)))
        found = experiments.load(name, folder=tmp_path)
        assert found[column].dtype == "int64"
        assert str(experiments.Table(experiments.find(name).table(found))) == before


def test_a_part_of_an_epoch_is_none(tmp_path):
    """In all lines of a run, whose count is then right."""
    text = Path("results/flow-vae.csv").read_text()
    (tmp_path / "flow-vae.csv").write_text(text.replace(",20,100,8,", ",20.5,100,8,"))
    with pytest.raises(InputError, match="line 2 of .* has epochs '20.5', not a whole number: mend"):
        experiments.load("flow-vae", folder=tmp_path)


def test_runs_of_another_grid_are_not_shown_beside_those_of_this_one(tmp_path):
    """A setting altered in all lines of one run."""
    whole, text = experiments.load("flow-vae", folder="results"), Path("results/flow-vae.csv").read_text()
    run = "short,gaussian,elbo-total,20,100,8,100,0.004,0,"
    (tmp_path / "flow-vae.csv").write_text(text.replace(run, run.replace(",20,", ",7,")))
    with pytest.warns(UserWarning, match="1 runs in .* and are left out: the first has epochs '7', not"):
        found = experiments.load("flow-vae", folder=tmp_path)
    assert len(found) == len(whole) - text.count(run) < len(whole) and set(found["epochs"]) == set(whole["epochs"])


def test_runs_of_another_grid_are_named(tmp_path):
    """A number altered alike in all lines of a run is a setting of no cell, and nothing else tells."""
    text = Path("results/flow-vae.csv").read_text()
    (tmp_path / "flow-vae.csv").write_text(text.replace(",20,100,8,", ",21,100,8,"))
    with pytest.warns(UserWarning, match="runs in .* are of no configuration .* has epochs '21', not '20'$"):
        experiments.load("flow-vae", folder=tmp_path)


def test_a_table_under_the_name_of_another_experiment_is_refused(tmp_path):
    (tmp_path / "lag-text.csv").write_bytes(Path("results/lag-toy.csv").read_bytes())
    with pytest.raises(InputError, match="is of no run of 'lag-text': its data is 'synthetic-text', not 'ptb'"):
        experiments.load("lag-text", folder=tmp_path)


def test_what_no_run_of_the_experiment_measures_is_not_written(tmp_path):
    with pytest.raises(InputError, match="what run smoke elbo-total .* measured has metric 'ELBO' at 0, not kl"):
        results.add(FIGURE_1, FIGURE_1.tasks("smoke")[0], [{**numbers(1.0)[0], "metric": "ELBO"}], tmp_path)
    assert not results.finished(FIGURE_1, tmp_path)


def test_a_count_that_was_cut_is_the_whole_run_s(tmp_path):
    """The last line ends "62", and with two characters less "6"."""
    text = Path("results/stl-figure-1.csv").read_text()
    (tmp_path / "stl-figure-1.csv").write_text(text[:-2])
    before, after = (results.finished(FIGURE_1, folder) for folder in (Path("results"), tmp_path))
    assert len(before - after) == 1 and after < before
    with pytest.warns(UserWarning, match="1 runs in .* lack numbers and are left out; `vaelib experiment run"):
        found = experiments.load("stl-figure-1", folder=tmp_path)
    assert len(found) == len(experiments.load("stl-figure-1")) - 62


@pytest.mark.filterwarnings("ignore:.* lack numbers")
def test_a_count_that_was_cut_in_a_run_s_first_line_is_not_the_whole_run_s(tmp_path):
    """Of the first of eleven lines, which ends "11", "1" is left: one of one, it seems, also once more was added."""
    experiment, path = experiments.find("silent-linear"), tmp_path / "silent-linear.csv"
    lines = Path("results/silent-linear.csv").read_text().splitlines(keepends=True)
    found = results.read(experiment, Path("results"))
    at = results.keys(found, experiment).index(key := results.keys(found, experiment)[-1]) + 1
    path.write_text("".join(lines[: at + 1])[:-2])
    assert path.read_text().endswith(",1")
    before = results.finished(experiment, Path("results"))
    assert results.finished(experiment, tmp_path) == before - {key}
    with pytest.warns(UserWarning, match="1 runs in .* lack numbers and are left out"):
        experiments.load("silent-linear", folder=tmp_path)
    results.add(experiment, experiment.tasks("smoke")[0], [{**numbers(1.0)[0], "metric": "elbo"}], tmp_path)
    assert key not in results.finished(experiment, tmp_path)


@pytest.mark.filterwarnings("ignore:.* lack numbers")
@pytest.mark.parametrize("lost", range(1, 4))
def test_a_run_that_lacks_numbers_is_none_and_is_made_anew(table, lost):
    """A table cut at a line end is one that everybody can read; what is finished is told by the count."""
    both = [task.key for task in FIGURE_1.tasks("smoke")]
    whole = experiments.load("stl-figure-1", folder=table.parent)
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-lost]))
    left = both[: 1 if lost < 3 else 0]
    assert results.finished(FIGURE_1, table.parent) == set(left)
    if left:
        assert len(experiments.load("stl-figure-1", folder=table.parent)) == 2
    else:
        with pytest.raises(InputError, match="has no results of 'stl-figure-1'"):
            experiments.load("stl-figure-1", folder=table.parent)
    for task in FIGURE_1.tasks("smoke"):
        results.add(FIGURE_1, task, numbers(2.0, 1.0), table.parent)
    assert experiments.load("stl-figure-1", folder=table.parent).equals(whole)


def test_a_table_of_before_runs_were_counted_is_as_it_is(table):
    """Whether a run of it lacks numbers cannot be told, and that stays so when another run is added."""
    before = experiments.load("stl-figure-1", folder=table.parent).drop(columns="numbers")
    table.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in table.read_text().splitlines()))
    uncounted = table.read_text().splitlines()[1:]
    with pytest.warns(UserWarning, match="does not say how many numbers a run has: whether it lacks some cannot be t"):
        assert experiments.load("stl-figure-1", folder=table.parent).drop(columns="numbers").equals(before)
    with pytest.warns(UserWarning, match="does not say how many numbers"):
        results.add(FIGURE_1, FIGURE_1.tasks("smoke", 2)[1], numbers(1.0), table.parent)
    lines = table.read_text().splitlines()
    assert lines[0].endswith(",date,numbers") and lines[1:-1] == [f"{line}," for line in uncounted]
    with pytest.warns(UserWarning, match="does not say how many numbers"):
        assert len(results.finished(FIGURE_1, table.parent)) == 3


@pytest.mark.filterwarnings("ignore:.* lack numbers")
@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
@pytest.mark.parametrize("share", [0.2, 0.97])
def test_a_table_that_was_cut_between_two_lines_is_shown(tmp_path, name, share):
    """Some runs lack numbers then, or all of a kind do; that is a dash, or a run less."""
    lines = Path("results", f"{name}.csv").read_text().splitlines(keepends=True)
    (tmp_path / f"{name}.csv").write_text("".join(lines[: int(share * len(lines))]))
    presets = {key[0] for key in results.finished(experiments.find(name), tmp_path)}
    if not presets:
        assert (name, share) == ("stl-figure-3", 0.2)
        return
    found = experiments.load(name, max(presets), tmp_path)
    assert str(experiments.Table(experiments.find(name).table(found)))
    experiments.find(name).figure(found, Figure())


def test_a_value_that_is_not_finite_is_read_and_said(table):
    text = table.read_text()
    for word in ("inf", "-inf", "nan"):
        table.write_text(text.replace(",1,1,,1", f",1,{word},,1", 1))
        with pytest.warns(UserWarning, match="1 values in .*stl-figure-1.csv' are not finite"):
            assert str(experiments.load("stl-figure-1", folder=table.parent)["value"][1]) == word


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_a_table_that_came_with_the_package_is_read_without_a_word(name, recwarn):
    assert len(experiments.load(name)) and not list(recwarn)


@pytest.mark.skipif(files.fcntl is None, reason="left out: Windows has no such locks")
def test_a_table_that_is_a_link_is_locked_where_it_is(table, tmp_path):
    """Two grids, each with a folder of its own, one of which has a link to the other's table."""
    link = tmp_path / "other" / table.name
    link.parent.mkdir()
    link.symlink_to(Path("..") / table.name)
    task = FIGURE_1.tasks("smoke", 2)[1]
    adding = threading.Thread(target=results.add, args=(FIGURE_1, task, numbers(1.0), link.parent))
    with files.locked(table.parent):
        adding.start()
        adding.join(1)
        assert adding.is_alive()
        assert len(results.finished(FIGURE_1, table.parent)) == 2
    adding.join(60)
    assert link.is_symlink() and len(results.finished(FIGURE_1, table.parent)) == 3
    table.unlink()
    with pytest.raises(InputError, match="is a link to .*, which is not there: mend it"):
        results.add(FIGURE_1, task, numbers(1.0), link.parent)


def test_a_table_of_another_experiment_is_not_written_over(table):
    table.write_text(table.read_text().replace("estimator", "method"))
    with pytest.raises(InputError, match="has the columns preset, method.*move that file out of the way"):
        grid.run("stl-figure-1", "smoke", results_folder=table.parent, runs_folder=table.parent)


def test_a_full_disk_leaves_the_table_whole(table, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = table.read_text()
    monkeypatch.setattr(files, "atomic", full)
    with pytest.raises(InputError, match="could not be written .No space left.*what was there before is whole"):
        results.add(FIGURE_1, FIGURE_1.tasks("smoke", 2)[1], numbers(1.0), table.parent)
    assert table.read_text() == before


def frame(columns: str, *lines: tuple) -> DataFrame:
    return DataFrame(list(lines), columns=columns.split())


def test_means_over_seeds():
    found = frame("method seed value", ("b", 0, 1.0), ("a", 0, 4.0), ("b", 1, 2.0), ("b", 2, 6.0))
    means = experiments.over_seeds(found, ["method"])
    assert list(means.index) == ["b", "a"] and list(means["n"]) == [3, 1]  # in order of appearance
    assert list(means["mean"]) == [3.0, 4.0]
    assert means.at["b", "standard_error"] == pytest.approx((7 / 3) ** 0.5) and math.isnan(
        means.at["a", "standard_error"]
    )
    assert list(experiments.plus_minus(means)) == ["3.00 ± 1.53", "4.00"]
    assert experiments.over_seeds(found[:0], ["method"]).empty


def test_a_value_that_is_not_a_number_is_not_left_out_of_a_mean():
    means = experiments.over_seeds(frame("method seed value", ("a", 0, 1.0), ("a", 1, math.nan)), ["method"])
    assert math.isnan(means.at["a", "mean"]) and math.isnan(means.at["a", "standard_error"]) and means.at["a", "n"] == 2


def test_what_is_selected_is_one_number_a_run():
    found = frame("metric at value", ("kl", None, 1.0), ("kl", 3, 2.0), ("mi", None, 3.0), ("kl", 4, 4.0))
    assert list(experiments.select(found, "kl")["value"]) == [1.0]
    assert list(experiments.select(found, "kl", 3)["value"]) == [2.0]
    assert experiments.select(found, "mi", 3).empty


def test_differences_are_paired_by_seed():
    found = frame(
        "data method seed value",
        ("a", "plain", 0, 1.0), ("a", "new", 1, 8.0), ("a", "plain", 1, 5.0), ("a", "new", 0, 3.0),
        ("b", "new", 0, 9.0),
    )  # fmt: skip
    less = experiments.differences(found, ["data", "method"], method="plain")
    assert less[["data", "method", "seed", "value"]].to_numpy().tolist() == [
        ["a", "plain", 0, 0.0], ["a", "new", 1, 3.0], ["a", "plain", 1, 0.0], ["a", "new", 0, 2.0]
    ]  # fmt: skip
    means = experiments.over_seeds(less, ["data", "method"])
    assert means.loc[("a", "new")].tolist() == [2.5, pytest.approx(0.5), 2]  # unpaired, the error would be 3.2
    assert experiments.differences(found, ["data", "method"], method="other").empty
    shifted = experiments.differences(
        found, ["data", "method"], data=lambda f: f["data"].replace("b", "a"), method="plain"
    )
    assert shifted["value"].tolist() == [0.0, 3.0, 0.0, 2.0, 8.0]
    with pytest.raises(
        InputError, match="several lines are the same in method, seed: choose one preset, and one metric"
    ):
        experiments.differences(found, ["method"], method="plain")


def test_a_curve_has_the_places_that_its_own_runs_have():
    found = frame("metric at value", ("kl", 2, 4.0), ("kl", None, 9.0), ("mi", 1, 7.0), ("kl", 1, 3.0), ("kl", 1, 5.0))
    points = experiments.curve(found, "kl")
    assert list(points.index) == [1, 2] and list(points["mean"]) == [4.0, 4.0] and list(points["n"]) == [2, 1]


def commit(folder: Path, *names: str) -> None:
    """Make a repository in a folder, with these files in it, all empty."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for path in map(folder.joinpath, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    subprocess.run([*git, "add", *names], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "all"], check=True)


def test_the_version_is_that_of_the_code_and_of_no_repository_around_it(tmp_path):
    """A package installed into an environment inside somebody's repository is not of their commit."""
    assert results.code_version() == results.CODE
    commit(tmp_path, "theirs.py")
    (tmp_path / "installed.py").write_text("")
    assert results.code_version(tmp_path / "installed.py") == vaelib.__version__
    assert re.fullmatch(rf"{re.escape(vaelib.__version__)}\+\w+", results.code_version(tmp_path / "theirs.py"))
    assert results.code_version(tmp_path.parent / "nowhere.py") == vaelib.__version__


def test_a_number_says_what_processor_it_was_made_on(monkeypatch):
    def hidden(path):
        raise InputError(f"'{path}' cannot be read (Permission denied)")

    (number,) = numbers(1.0)
    assert number["device"] == results.processor() != ""
    monkeypatch.setattr(files, "read_text", lambda path: "processor : 0\nmodel name\t: Abacus: 2\nmodel name : other\n")
    assert results.processor() == "Abacus: 2"
    monkeypatch.setattr(results.platform, "processor", str)
    monkeypatch.setattr(results.platform, "machine", str)
    monkeypatch.setattr(files, "read_text", lambda path: None)
    assert results.processor() == "cpu"
    monkeypatch.setattr(files, "read_text", hidden)
    assert results.processor() == "cpu"


def test_changed_code_makes_a_version_dirty_and_a_changed_table_does_not(tmp_path):
    commit(tmp_path, "code/some.py", "code/part/other.py", "results/table.csv")
    (tmp_path / "results" / "table.csv").write_text("1")
    clean = results.code_version(tmp_path / "code" / "some.py")
    assert re.fullmatch(rf"{re.escape(vaelib.__version__)}\+\w+", clean)
    (tmp_path / "code" / "part" / "other.py").write_text("1")
    assert results.code_version(tmp_path / "code" / "some.py") == f"{clean}-dirty"


def test_a_table_is_set_in_columns_and_in_markdown():
    table = experiments.Table([("name", "nll"), ("a", "1.25"), ("longer", "2")])
    assert str(table) == "name    nll\na       1.25\nlonger  2"
    assert table._repr_markdown_() == "| name | nll |\n| --- | --- |\n| a | 1.25 |\n| longer | 2 |"


def test_numbers_survive_the_table():
    assert [as_text(value) for value in (None, 1, 0.1, 1e-5, "a")] == ["", "1", "0.1", "1e-05", "a"]
    assert [as_text(value) for value in (126.501976, 1 / 3)] == ["126.501976", "0.3333333333"]


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
    found = experiments.load("stl-table-2", folder=folder).set_index(["seed", "metric"])["value"]
    assert found.index.is_unique
    return {key: value for key, value in found.items() if "seconds" not in key[1]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """What two runs measure that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for job in jobs_of([training_task(0), training_task(1)], folder):
        job.folder.mkdir()
        subprocess.run([sys.executable, "-c", ONE_RUN, str(job.task.seed), str(job.folder)], check=True)
        results.add(stl.EXPERIMENTS["stl-table-2"], job.task, measured_of(job), folder)
    return values(folder)


def measured_of(job: grid.Job) -> list[dict]:
    return grid.measured_in(job.folder / "measured.json", job.task)


ONE_RUN = """
import sys, pathlib
sys.path.insert(0, "tests")
from test_experiments import training_task
from vaelib.experiments import grid
assert not grid.execute(training_task(int(sys.argv[1])), pathlib.Path(sys.argv[2]), "cpu")
"""


def wait_for(condition, seconds: float = 300):
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
                self.processes[job][0].kill()
            return super().ended()

    assert finish(Murderous(2), jobs, tmp_path) == {}
    assert Murderous.victims == [] and all(job.deaths == 1 for job in jobs)
    assert values(tmp_path) == undisturbed


def test_a_run_that_dies_each_time_is_given_up(tmp_path):
    class Deadly(grid.OnThisMachine):
        def ended(self):
            for process, _ in self.processes.values():
                process.kill()
            return super().ended()

    (why,) = finish(Deadly(1), jobs_of([training_task()], tmp_path), tmp_path).values()
    assert why == "its process died 3 times"


def test_the_seconds_of_earlier_starts_count(tmp_path, monkeypatch):
    """By a clock that is asked at the start, at each of five reports and at the end, and goes on by 2 seconds."""
    monkeypatch.setattr(grid, "time", SimpleNamespace(monotonic=itertools.count(step=2).__next__))
    files.write_json(tmp_path / "progress.json", {"done": 0.5, "seconds": 1000.0})
    task = FIGURE_1.tasks("smoke")[0]
    assert grid.execute(task, tmp_path, "cpu") == ""
    assert grid.progress_in(tmp_path) == {"done": 1.0, "seconds": 1010.0}
    assert {number["seconds"] for number in grid.measured_in(tmp_path / "measured.json", task)} == {1012.0}


def test_a_run_that_another_version_of_the_code_went_on_with_names_both(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    task, mine = FIGURE_1.tasks("smoke")[0], results.CODE
    assert grid.execute(task, first, "cpu") == ""
    assert grid.code_at(second) == mine
    monkeypatch.setattr(results, "CODE", "another")
    assert grid.execute(task, second, "cpu") == ""
    for folder, code in ((first, mine), (second, f"{mine} then another")):
        assert {number["vaelib"] for number in grid.measured_in(folder / "measured.json", task)} == {code}


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    wrong, right = jobs_of([training_task(data="nothing"), training_task(epochs=1)], tmp_path)
    failed = finish(grid.OnThisMachine(1), [wrong, right], tmp_path)
    assert list(failed) == [wrong] and "no data set is called 'nothing'" in failed[wrong]
    assert {seed for seed, _ in values(tmp_path)} == {0}


@pytest.mark.parametrize(
    ("name", "where", "what"),
    [
        ("lag-toy", {"results_folder": "a-file/below"}, "a-file/below/lag-toy.csv"),
        ("lag-toy", {"runs_folder": "a-file"}, "'a-file' is a file, but a run needs a folder"),
        ("stl-schedule", {}, "VAELIB_DATA is 'nowhere', which is not a folder"),
    ],
)
def test_what_would_stop_every_run_is_said_before_the_first(tmp_path, monkeypatch, name, where, what):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAELIB_DATA", "nowhere")
    monkeypatch.setattr(grid.Grid, "finish", lambda grid: pytest.fail("a run was started"))
    Path("a-file").touch()
    with pytest.raises(InputError, match=re.escape(what)):
        grid.run(name, "short", device="cpu", jobs=1, **where)


def test_a_folder_that_takes_no_table_is_told_before_the_first_run(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(grid.Grid, "finish", lambda grid: pytest.fail("a run was started"))
    with pytest.raises(InputError, match="lag-toy.csv' could not be written"):
        grid.run("lag-toy", "smoke", device="cpu", jobs=1, results_folder=tmp_path, runs_folder=tmp_path)


class Told:
    """A pool whose jobs end at once, with the word that is given."""

    def __init__(self, word: str | None) -> None:
        self.word, self.started = word, []

    def has_room(self) -> bool:
        return True

    def start(self, job: grid.Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        self.started.append(job)

    def ended(self) -> list:
        ended, self.started = [(job, self.word) for job in self.started], []
        return ended

    def stop(self) -> None:
        pass


def test_a_run_whose_process_dies_is_tried_three_times_in_all(tmp_path):
    class Deadly(Told):
        starts = 0

        def start(self, job: grid.Job) -> None:
            self.starts += 1
            super().start(job)

    pool, (job,) = Deadly(None), jobs_of([training_task()], tmp_path)
    assert finish(pool, [job], tmp_path) == {job: "its process died 3 times"} and pool.starts == 3


def test_a_full_disk_is_the_reason_that_is_told_and_nothing_is_tried_again(tmp_path, monkeypatch):
    """The reason travels by another way than a file."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "atomic", full)
    task = FIGURE_1.tasks("smoke")[0]
    why = grid.execute(task, tmp_path / "run", "cpu")
    assert "could not be written (No space left on device)" in why
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: full(path))
    assert grid.execute(task, tmp_path / "run", "cpu") == f"{tmp_path / 'run'}: No space left on device"
    monkeypatch.undo()
    monkeypatch.setattr(files, "atomic", full)
    (job,) = jobs_of([task], tmp_path)
    assert finish(Told(why), [job], tmp_path) == {job: why} and job.deaths == 0
    assert [path.name for path in job.folder.iterdir()] == []


def test_an_error_of_the_program_is_kept_whole_in_the_folder(tmp_path):
    (job,) = jobs_of([FIGURE_1.tasks("smoke")[0]], tmp_path)
    assert finish(Told("Traceback ...\n  line\nKeyError: 'x'"), [job], tmp_path) == {job: "KeyError: 'x'"}
    assert (job.folder / "error.txt").read_text() == "Traceback ...\n  line\nKeyError: 'x'\n"


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "{}", '{"rows": []}', '{"measured": 3}', '{"measured": [{"value": 1}]}', "[" * 10**5, "{", None],
)
def test_a_damaged_file_of_a_run_fails_that_run_alone(tmp_path, content):
    damaged, whole = jobs_of(FIGURE_1.tasks("smoke"), tmp_path)
    pool = Told("")

    def start(job: grid.Job) -> None:
        Told.start(pool, job)
        if job is whole:
            files.write_json(job.folder / "measured.json", grid.outcome_of(job.task, numbers(1.0)))
        elif content is not None:
            (job.folder / "measured.json").write_text(content)

    pool.start = start
    failed = finish(pool, [damaged, whole], tmp_path)
    assert list(failed) == [damaged] and "measured.json" in failed[damaged] and "\n" not in failed[damaged]
    assert len(experiments.load("stl-figure-1", folder=tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    ["of another run", "of another experiment", "a number less", "a number twice", "as it was before"],
)
def test_the_numbers_of_another_run_or_some_of_them_are_not_stored(tmp_path, change):
    damaged, whole = jobs_of(FIGURE_1.tasks("smoke"), tmp_path)
    for job in (damaged, whole):
        assert grid.execute(job.task, job.folder, "cpu") == ""
    here, there = damaged.folder / "measured.json", whole.folder / "measured.json"
    found = json.loads(here.read_text())
    found = {
        "of another run": json.loads(there.read_text()),
        "of another experiment": {**found, "run": ["stl-figure-3", *found["run"][1:]]},
        "a number less": {**found, "measured": found["measured"][1:]},
        "a number twice": grid.outcome_of(damaged.task, [*found["measured"], found["measured"][0]]),
        "as it was before": {"measured": found["measured"]},
    }[change]
    files.write_json(here, found)
    failed = finish(Told(""), [damaged, whole], tmp_path)
    assert list(failed) == [damaged]
    assert "measured.json' is not what this run measured: delete it" in failed[damaged]
    assert results.finished(FIGURE_1, tmp_path) == {whole.task.key}
    here.unlink()
    assert finish(grid.OnThisMachine(1), [damaged], tmp_path) == {}
    assert len(results.finished(FIGURE_1, tmp_path)) == 2


def test_a_socket_s_path_that_is_too_long_is_named(tmp_path, monkeypatch):
    def long(process):
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(grid.OnThisMachine(1).context.Process, "start", long)
    with pytest.raises(InputError, match="too long a path: set TMPDIR"):
        grid.run("stl-figure-1", "smoke", results_folder=tmp_path, runs_folder=tmp_path / "runs", jobs=2)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="left out: the children are found in /proc")
def test_a_fork_server_that_is_killed_while_it_starts_is_told(tmp_path):
    process = command(tmp_path, "stl-figure-1", "--preset", "smoke", "--jobs", 1)

    def fork_servers() -> list[int]:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        words = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in children}
        with suppress(FileNotFoundError, ProcessLookupError):  # another child, which ended just now
            return [pid for pid, line in words.items() if b"forkserver" in line.read_bytes()]
        return []

    wait_for(fork_servers)
    os.kill(fork_servers()[0], signal.SIGKILL)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and err == (
        "vaelib: the process from which the runs are started died (killed, perhaps for want of memory): the same "
        "command goes on from the checkpoints\n"
    )


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
    (folders[0] / "measured.json").unlink()  # half a run of this machine beside a table from another one
    grid.run("stl-figure-3", "smoke", **where)
    assert gathered[1][1] == folders[1:]


@pytest.mark.parametrize("folders", ["there", "gone"])
def test_what_a_table_loses_while_the_grid_works_is_put_back_or_missed(tmp_path, monkeypatch, folders):
    """A spreadsheet saves the copy that it opened before."""
    path, runs = tmp_path / "results" / "stl-figure-3.csv", tmp_path / "runs"
    true, older = grid.Grid.finish, []

    def then_saved_by_another(self):
        failed = true(self)
        older.append(path.read_text())
        path.write_text("".join(older[0].splitlines(keepends=True)[:4]))
        if folders == "gone":
            shutil.rmtree(runs)
        return failed

    monkeypatch.setattr(grid.Grid, "finish", then_saved_by_another)
    if folders == "gone":
        with pytest.raises(InputError, match=r"has lost \d of \d runs while this command worked.* makes them anew"):
            grid.run("stl-figure-3", "smoke", results_folder=path.parent, runs_folder=runs)
    else:
        grid.run("stl-figure-3", "smoke", results_folder=path.parent, runs_folder=runs)
        assert sorted(path.read_text().splitlines()) == sorted(older[0].splitlines())


def test_where_all_runs_fail_no_others_are_spoken_of(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "execute", None)
    monkeypatch.setattr(grid.Grid, "finish", lambda self: dict.fromkeys(self.waiting, "a reason"))
    with pytest.raises(InputError, match="^(.) of \\1 runs failed, .*: a reason; the same command tries the failed"):
        grid.run("stl-figure-3", "smoke", results_folder=tmp_path / "results", runs_folder=tmp_path / "runs")


def test_the_command_that_is_advised_makes_the_runs_that_lack_numbers(table):
    lines = table.read_text().splitlines(keepends=True)
    place = lines[0].strip().split(",").index("seed")
    stray = lines[1].split(",")
    stray[place] = "9"
    table.write_text("".join([*lines[:-1], ",".join(stray)]))
    with pytest.warns(UserWarning, match="lack numbers") as told:
        experiments.load("stl-figure-1", folder=table.parent)
    said = str(told[0].message)
    assert f"`vaelib experiment run stl-figure-1 --preset smoke --results {table.parent}` makes them anew" in said
    assert "1 are of no run of a preset (of another --seeds?): delete their lines" in said


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
    found = experiments.load("stl-figure-1", folder=tmp_path / "results")
    made = found[["estimator", "seed"]].drop_duplicates()
    assert len(made) == 6 and len(found) == 6 * 6  # KL at 5 steps and in the end


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see the workers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_grid_that_is_stopped_leaves_no_worker_and_goes_on(tmp_path, number):
    process = command(tmp_path, "stl-table-2", "--preset", "smoke", "--jobs", 1)
    wait_for(lambda: list(tmp_path.glob("runs/*/*/*/model/checkpoint.pt")))
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    if number != signal.SIGKILL:
        assert (process.returncode, err) == (130, "vaelib: stopped; the same command goes on from here\n")
    folder = str(tmp_path)
    wait_for(lambda: not any(folder in line for line in open_locks()))
    assert not list(tmp_path.glob("results/*.csv")) or len(experiments.load("stl-table-2", folder=tmp_path / "results"))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_hangup_interrupts_unless_it_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with pytest.raises(KeyboardInterrupt), grid.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(5)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with grid.interruptible() as listen:
            listen()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.fixture
def cluster(monkeypatch):
    """Start an empty Ray cluster on this machine, which knows nothing of a data folder."""
    ray = pytest.importorskip("ray", reason="the extra vaelib[ray] is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("VAELIB_DATA", raising=False)
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "240000")  # a busy machine
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # notice a lost node sooner
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3600")  # else a lost head ends this process
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_ray_resumes_elsewhere_what_a_lost_node_was_at(tmp_path, undisturbed, cluster):
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
    assert losing.lost and sum(job.deaths for job in jobs) == 1
    assert values(tmp_path) == undisturbed


def test_the_data_folder_travels_to_the_workers_of_a_cluster(tmp_path, cluster, monkeypatch):
    cluster.add_node(num_cpus=1)
    (tmp_path / "data/ptb").mkdir(parents=True)
    (tmp_path / "data/ptb/ptb.train.txt").write_text("damaged")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAELIB_DATA", "data")
    config = dict(experiments.find("lag-text").presets["short"].grid[0])
    (job,) = jobs_of([Task("lag-text", "short", config, 0)], tmp_path)
    (why,) = finish(grid.OnRay(cluster.address, "cpu", 1.0), [job], tmp_path).values()
    assert why.startswith(f"'{tmp_path}/data/ptb/ptb.train.txt' is cut or altered")


@pytest.mark.parametrize("listens", ["nobody", "somebody silent", "a web server", "no address", "no port", "auto"])
def test_a_cluster_that_is_not_there_is_one_sentence_at_once(listens, monkeypatch):
    """Without asking Ray itself, which waits for minutes."""
    ray = pytest.importorskip("ray", reason="the extra vaelib[ray] is not installed")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setattr(grid, "ANSWER", 0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if listens != "nobody":
            server.listen()
        if listens == "a web server":
            answer = lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")  # noqa: E731
            threading.Thread(target=answer, daemon=True).start()
        address = {"no address": "nowhere", "no port": "ray://nowhere"}.get(listens, address)
        if listens == "auto":  # what auto means, says the environment
            monkeypatch.setenv("RAY_ADDRESS", address)
            server.close()
        with pytest.raises(InputError, match="there is no Ray cluster at '.*'") as caught:
            grid.OnRay("auto" if listens == "auto" else address, "cpu", 1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="left out: how far it is, is found in /proc")
@pytest.mark.parametrize("moment", ["torch is loaded", "a worker has begun"])
def test_ctrl_c_at_any_moment_is_one_line(tmp_path, moment):
    """As a terminal does it: all processes of the group hear it, the fork server among them."""
    folders = ("--results", tmp_path / "results", "--runs", tmp_path / "runs", "--device", "cpu", "--jobs", "1")
    words = [
        sys.executable,
        "-m",
        "vaelib",
        "experiment",
        "run",
        "stl-table-2",
        "--preset",
        "smoke",
        *map(str, folders),
    ]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard)
    loaded = Path(f"/proc/{process.pid}/maps")
    wait_for(
        lambda: "libtorch" in loaded.read_text() if moment == "torch is loaded" else list(tmp_path.rglob("*/.lock"))
    )
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=300)[1]
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in err and err.count("\n") <= 2


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="left out: Windows stops no processes")
def test_a_worker_that_was_stopped_does_not_hold_up_the_end(tmp_path, monkeypatch):
    (job,) = jobs_of([training_task(epochs=9)], tmp_path)
    pool = grid.OnThisMachine(1)
    pool.start(job)
    wait_for(lambda: under_way(job))
    process, _ = pool.processes[job]
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(process, "kill", lambda: None)  # it ends by itself, with a checkpoint
    monkeypatch.setattr(grid, "PATIENCE", 300)
    pool.stop()
    assert process.exitcode == 130


def test_a_grid_on_a_full_disk_says_so(tmp_path, small_disk):
    """A real one, on which the workers cannot write: the reason comes back, and nothing is tried three times."""
    disk = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (disk.f_bavail * disk.f_bsize))
    with pytest.raises(InputError, match="runs failed, the first in .*No space left on device") as caught:
        where = {"results_folder": tmp_path / "results", "runs_folder": small_disk / "runs"}
        grid.run("stl-figure-1", "smoke", device="cpu", jobs=1, **where)
    assert "died" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["stl-schedule", "lag-text", "silent-linear"])
def test_a_table_that_pandas_saved_is_the_same_table(name, tmp_path):
    """Which makes 0.0 of 0 in a column where nothing stands somewhere."""
    experiment = experiments.find(name)
    pd.read_csv(results.path_of(experiment, results.TABLES)).to_csv(results.path_of(experiment, tmp_path), index=False)
    assert results.finished(experiment, tmp_path) == results.finished(experiment, results.TABLES)
    ours, theirs = (experiments.load(name, folder=folder) for folder in (results.TABLES, tmp_path))
    pd.testing.assert_frame_equal(ours.drop(columns="vaelib"), theirs.drop(columns="vaelib"))


def test_two_that_gather_at_once_keep_what_both_have(tmp_path):
    """The table of points is read and written under its lock: each adds its own preset."""
    script = (
        "import sys; from pathlib import Path; from vaelib.experiments import lag\n"
        "for _ in range(20): lag.gather_space(sys.argv[1], [Path(sys.argv[2]) / sys.argv[1]], Path(sys.argv[2]))\n"
    )
    line = "method,kind,step,point,model_mean,encoder_mean\nplain,stage,1,0,0.5,0.25\n"
    for preset in ("short", "long"):
        (tmp_path / preset).mkdir()
        (tmp_path / preset / "space.csv").write_text(line)
    both = [subprocess.Popen([sys.executable, "-c", script, preset, tmp_path]) for preset in ("short", "long")]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted((tmp_path / "lag-toy-space.csv").read_text().splitlines()[1:]) == [
        "long,plain,stage,1,0,0.5,0.25", "short,plain,stage,1,0,0.5,0.25"
    ]  # fmt: skip


def test_a_cluster_that_dies_in_mid_grid_is_one_sentence(cluster, monkeypatch):
    """Its head is killed while nothing of it is left to wait for; Ray itself says so in C++, after a minute."""
    monkeypatch.setattr(grid, "ANSWER", 1)
    monkeypatch.setattr(grid, "SILENCE", 3)
    pool = grid.OnRay(cluster.address, "cpu", 1.0)
    cluster.head_node.kill_gcs_server(check_alive=False)
    with pytest.raises(InputError, match="the Ray cluster at '.*' does not answer any more .*goes on from"):
        wait_for(lambda: pool.ended() == [None])
    pool.stop()  # at once: there is nobody to ask
    from ray._private.worker import global_worker

    for thread in ("listener_thread", "logger_thread"):  # ray.shutdown() waits for them, and they for the head
        vars(global_worker).pop(thread, None)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_gain_on_the_total_derivative_is_paired_by_seed(tmp_path):
    nll = {("elbo-total", 0): 100.0, ("elbo-path", 0): 99.0, ("elbo-total", 1): 90.0, ("elbo-path", 1): 88.0}
    for (estimator, seed), value in nll.items():
        task = Task("stl-table-2", "smoke", stl.cell("digits", "mlp-1", estimator, 1, 2, 50), seed)
        measured = results.with_provenance([Measured("nll", value, 0.5)], 1.0, "cpu")
        results.add(stl.EXPERIMENTS["stl-table-2"], task, measured, tmp_path)
    found = experiments.load("stl-table-2", folder=tmp_path)
    (gain,) = stl.gains(found).to_numpy().tolist()
    assert gain == [1.5, 0.5, 2]  # unpaired, the error would be 7
    words = stl.table_2(found)
    assert words[0] == ("recipe", "data", "model", "estimator", "k = 1", "published", "seeds")
    assert words[1] == ("paper", "digits", "mlp-1", "elbo-total", "95.00 ± 5.00", "-", "2")
    assert words[3] == ("paper", "digits", "mlp-1", "elbo-total - elbo-path", "1.50 ± 0.50", "-", "2")


TABLE_2 = """
86.76 86.40  86.76 86.40  108.11 107.39  108.11 107.39
86.47 86.33  85.54 85.20  107.62 107.40  106.12 105.42
86.35 86.48  84.78 84.45  107.80 107.42  104.67 104.16
85.33 84.77  85.33 84.77  107.58 105.22  107.56 105.22
85.01 84.68  83.89 83.57  106.31 104.87  104.79 103.59
84.78 84.33  82.90 83.16  106.30 105.70  103.38 102.86
"""
"""As the paper prints it: one layer and two, k = 1, 5 and 50; MNIST and Omniglot, VAE and IWAE, total and path."""


def test_the_published_figures_are_those_of_the_paper():
    rows = itertools.product(("mlp-1", "mlp-2"), stl.KS)
    columns = [*itertools.product(("mnist", "omniglot"), ("elbo", "iwae"), ("total", "path"))]
    for (model, k), line in zip(rows, TABLE_2.split("\n")[1:-1], strict=True):
        ours = [stl.published(data, model, f"{bound}-{form}", k) for data, bound, form in columns]
        assert [f"{figure:.2f}" for figure in ours] == line.split()
    assert math.isnan(stl.published("digits", "mlp-1", "elbo-total", 1)) and len(stl.PUBLISHED) == 16


def test_a_cell_is_evaluated_with_its_own_samples_and_its_error_is_over_images(tmp_path, monkeypatch):
    found = {"nll": 90.0, "nll_error": 0.5, "sampling_error": 0.1, "bound": -92.0, "active_units": [7, 3]}
    asked = []

    def evaluate(folder, samples, device):
        asked.append((samples, device))
        return found

    monkeypatch.setattr(stl.runs, "train", lambda *arguments, **options: {"training": {"seconds": 8.0}})
    monkeypatch.setattr(stl.runs, "evaluate", evaluate)
    config = stl.cell("digits", "mlp-2", "elbo-path", 1, 2, samples=70)
    assert stl.train_and_evaluate(config, 0, tmp_path, "cpu", lambda done: None) == [
        Measured("nll", 90.0, 0.5),
        Measured("bound", -92.0),
        Measured("active units, layer 1", 7),
        Measured("active units, layer 2", 3),
        Measured("training seconds", 8.0),
    ]
    assert asked == [(70, "cpu")]


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
        results.add(experiment, task, results.with_provenance([Measured("nll", nll)], 1.0, "cpu"), tmp_path)
    found = experiments.load("stl-table-2", "short", tmp_path)
    assert [line[1:] for line in experiment.table(found)] == [
        ("data", "model", "estimator", "k = 5", "published", "seeds"),
        ("mnist", "mlp-2", "iwae-total", "93.89", "83.89", "1"),
        ("mnist", "mlp-2", "iwae-path", "93.50", "83.57", "1"),
        ("mnist", "mlp-2-detached", "iwae-path", "94.00", "83.57", "1"),
        ("omniglot", "mlp-2", "iwae-total", "114.79", "104.79", "1"),
        ("mnist", "mlp-2", "iwae-total - iwae-path", "0.39", "0.32", "1"),
        ("mnist", "mlp-2-detached", "iwae-total - iwae-path", "-0.11", "0.32", "1"),
    ]
    experiment.figure(found, figure)
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
        results.add(experiment, task, results.with_provenance([Measured("nll", nll)], 1.0, "cpu"), tmp_path)
        return experiments.load("stl-table-2", "short", tmp_path)

    found = add("elbo-total", 1, 92.0)
    assert len(experiment.table(found)) == 2
    with pytest.raises(InputError, match="nothing to draw yet"):
        experiment.figure(found, Figure())
    add("elbo-path", 1, 91.5)
    lines = experiment.table(add("elbo-total", 5, 91.0))
    assert lines[-1][3:] == ("elbo-total - elbo-path", "0.50", "0.36", "-", "0.14", "1")
    assert {len(line) for line in lines} == {9} and str(experiments.Table(lines))


def test_the_figures_are_drawn(tmp_path):
    where = {"results_folder": tmp_path, "runs_folder": tmp_path / "runs"}
    for name in ("stl-figure-1", "stl-figure-3"):
        grid.run(name, "smoke", **where)
        experiment, found, figure = experiments.find(name), experiments.load(name, folder=tmp_path), Figure()
        assert len(experiment.table(found)) == 3 + (name == "stl-figure-3")
        experiment.figure(found, figure)
        assert figure.axes[0].lines
    found = experiments.load("stl-figure-1", folder=tmp_path)
    final = experiments.select(found, "final kl").set_index("estimator")["value"]
    assert final["elbo-path"] < final["elbo-total"]


def test_figure_1_begins_at_the_closed_form(tmp_path):
    """KL(N(0, I), N(m, s^2)) = sum log s + (1 + m^2) / (2 s^2) - 1/2, with m from N(0, 1) and log s from U(-1, 1)."""
    config = {**FIGURE_1.presets["short"].grid[0], "steps": 1}
    found = [stl.fit_gaussian(config, seed, tmp_path, "cpu", lambda done: None)[0].value for seed in range(40)]
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.randn(100, generator=generator), 2 * torch.rand(100, generator=generator) - 1
    kl = log_std + 0.5 * (1 + mean.square()) * (-2 * log_std).exp() - 0.5
    assert found[0] == pytest.approx(kl.sum().item(), rel=1e-5)
    expected = 100 * (math.sinh(2) / 2 - 0.5)  # E[m^2] = 1 and E[s^-2] = sinh(2) / 2
    assert abs(statistics.mean(found) - expected) < 4 * statistics.stdev(found) / 40**0.5
    stored = experiments.load("stl-figure-1", "short")
    first = stored[(stored["metric"] == "kl") & (stored["at"] == 0) & (stored["seed"] == 0)]["value"]
    assert first.to_list() == pytest.approx([found[0]] * 2, rel=1e-5)  # of both estimators


def test_figure_3_ends_at_its_target_where_the_path_is_silent(tmp_path):
    """The score does not know the target: at the start it is what total is where the target is q itself."""
    config = {**experiments.find("stl-figure-3").presets["short"].grid[0], "draws": 100, "percent": 100}
    found = stl.walk_to_mixture(config, 0, tmp_path, "cpu", lambda done: None)
    variance = {(m.metric, m.at): m.value for m in found}
    assert variance["path", 100] < 1e-20 < variance["path", 0]
    assert variance["score", 100] == pytest.approx(variance["total", 100])
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.randn(2, 5, 1, 2, generator=generator).double()
    logits = torch.randn(5, 1, generator=generator).double()
    q = Mixture(tuple(map(DiagonalGaussian, 2 * mean, 0.3 * log_std)), logits)
    x, noise = torch.zeros(1, 1).double(), torch.Generator().manual_seed(0)
    score = gradients.draws("elbo-total", stl.Target(q), lambda x: q, x, k=5, draws=100, generator=noise)
    assert variance["score", 0] == pytest.approx(((score - score.mean(0)) ** 2).sum().item() / 99)


def test_the_command_shows_a_table_and_says_what_is_missing(tmp_path, capsys):
    for arguments, sentence in [
        (("show", "stl-figure-1"), "has no results of 'stl-figure-1': make them with"),
        (("show", "stl-figure-1", "--preset", "huge"), "no preset of 'stl-figure-1' is called 'huge'"),
        (("run", "stl-figure-1", "--preset", "smoke", "--jobs", "0"), "jobs must be a whole number of at least 1"),
        (("run", "stl-figure-1", "--preset", "smoke", "--device", "tpu"), "no device is called 'tpu'"),
    ]:
        with pytest.raises(SystemExit) as end:
            cli.main(["experiment", *arguments, "--results", str(tmp_path)])
        assert end.value.code == 2 and sentence in capsys.readouterr().err
    for task in FIGURE_1.tasks("smoke", 2):
        measured = results.with_provenance([Measured("kl", 1.25, at=0), Measured("final kl", 1.25)], 1.0, "cpu")
        results.add(FIGURE_1, task, measured, tmp_path)
    with pytest.raises(SystemExit):
        cli.main(
            ["experiment", "show", "stl-figure-1", "--results", str(tmp_path), "--figure", str(tmp_path / "a.png")]
        )
    out = capsys.readouterr().out
    assert (
        f"preset smoke, 2 of 2 runs and 2 of further seeds, {results.processor()}" in out
        and "elbo-path" in out
        and "1.25" in out
        and (tmp_path / "a.png").exists()
    )


def test_the_list_says_what_is_done_and_how_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "default_jobs", lambda device: 4)
    first, _ = FIGURE_1.tasks("smoke")
    results.add(FIGURE_1, first, results.with_provenance([Measured("kl", 1.25, at=0)], 1.0, "cpu"), tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["experiment", "list", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert [line for line in lines if not line.startswith(" ")] == list(experiments.EXPERIMENTS)
    at = lines.index("stl-figure-1")
    assert lines[at + 2 : at + 4] == [
        "    smoke: 2 runs, 1 done; 6 seconds of one core, 1 second here",
        "    short: 20 runs, 0 done; 60 seconds of one core, 15 seconds here",
    ]


@pytest.mark.parametrize(
    "minutes, words",
    [
        (1 / 60, "1 second"),
        (0.5, "30 seconds"),
        (2, "2 minutes"),
        (119, "119 minutes"),
        (120, "2 hours"),
        (2880, "2 days"),
    ],
)
def test_durations(minutes, words):
    assert cli.duration(minutes) == words


# The schedule


def stages(gain, seeds=10, scatter=0.01):
    """Return results of two stages: path gains ``gain`` on total at the first, and nothing at the second."""
    rows = []
    for epochs, ahead in ((1, gain), (4, 0.0)):
        for seed in range(seeds):
            own = scatter * (-1) ** seed
            for estimator, value in (("elbo-total", 100.0 + seed), ("elbo-path", 100.0 + seed - ahead + own)):
                cell = {"data": "mnist", "model": "mlp-1", "estimator": estimator, "k": 1, "epochs": epochs}
                rows.append({**cell, "samples": 1000, "seed": seed, "metric": "nll", "value": value, "at": None})
    return DataFrame(rows).assign(standard_error=None)


@pytest.mark.parametrize(
    ("gain", "seeds", "scatter", "words"),
    [
        (0.5, 10, 0.01, ["ahead", "alike"]),
        (-0.5, 10, 0.01, ["behind", "alike"]),
        (0.5, 9, 0.01, ["undecided", "undecided"]),
        (0.05, 10, 0.01, ["ahead", "alike"]),
        (0.5, 10, 1.0, ["undecided", "undecided"]),
        (math.nan, 10, 0.01, ["undecided", "alike"]),
    ],
)
def test_a_stage_is_decided_by_its_interval_and_by_ten_seeds(gain, seeds, scatter, words):
    lines = schedule.table_of_stages(stages(gain, seeds, scatter))
    assert [line[-1] for line in lines[1:] if line[2] == "elbo-path"] == words


def test_the_interval_is_students():
    values = torch.tensor([0.1, 0.4, -0.2, 0.3])
    low, high = schedule.interval(values.mean().item(), (values.std() / 2).item(), 4)
    assert (low, high) == pytest.approx(scipy.stats.t.interval(0.95, 3, values.mean(), values.std() / 2))


def test_a_stage_goes_on_from_the_one_before_and_together_is_alone(tmp_path, monkeypatch):
    """Eight runs as two stacks end where each ends alone, at each of two stages."""
    monkeypatch.setattr(schedule, "config_of", partial(without_compiler, schedule.config_of))
    experiment, found = experiments.find("stl-schedule"), {}
    tasks = [task for task in experiment.tasks("smoke", 1) if task.config["model"] == "mlp-2"]
    schedule.train_together(tasks, tmp_path, "cpu", lambda task, numbers, _: found.update({task.key: numbers}))
    for task in tasks:
        alone = experiment.run(task.config, task.seed, tmp_path / "smoke" / task.name, "cpu", lambda done: None)
        for mine, theirs in zip(alone, found[task.key], strict=True):
            assert mine.metric == theirs.metric
            if mine.metric in ("training bound", "nll"):
                assert mine.value == pytest.approx(theirs.value, abs=1e-2)
    path = tmp_path / "trained" / "digits-mlp-2-elbo-path-k1-0"
    assert [runs.load(path / stage, "cpu").history[-1]["epoch"] for stage in ("1", "4")] == [1, 4]
    first = runs.read_state(path / "1" / "checkpoint.pt"), runs.read_state(path / "4" / "checkpoint.pt")
    assert first[0]["step"] * 4 == first[1]["step"]


def test_a_stage_at_which_another_process_is_does_not_begin(tmp_path):
    before, place = tmp_path / "1", tmp_path / "4"
    runs.train(before, runs.Config(model="linear", epochs=1, batch_size=500))
    with runs.in_use(runs.Folder(place)), pytest.raises(InputError, match="another process works in"):
        schedule.begin(place)
    assert not (place / "config.json").exists()
    schedule.begin(place)
    assert (place / "checkpoint.pt").read_bytes() == (before / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("lost", ["checkpoint.pt", "config.json"])
def test_a_stage_does_not_begin_with_one_that_has_lost_a_file(lost, tmp_path):
    runs.train(tmp_path / "1", runs.Config(model="linear", epochs=1, batch_size=500))
    (tmp_path / "1" / lost).unlink()
    schedule.begin(tmp_path / "4")
    assert not (tmp_path / "4" / "checkpoint.pt").exists()


def test_a_stage_whose_predecessor_is_damaged_says_which_and_begins_once_that_is_gone(tmp_path):
    runs.train(tmp_path / "1", runs.Config(model="linear", epochs=1, batch_size=500))
    damaged = tmp_path / "1" / "checkpoint.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"'{damaged}' is cut or altered.*or delete it to begin anew"):
        schedule.begin(tmp_path / "4")
    assert not (tmp_path / "4" / "checkpoint.pt").exists() and not (tmp_path / "4" / "config.json").exists()
    damaged.unlink()
    schedule.begin(tmp_path / "4")
    assert not (tmp_path / "4" / "checkpoint.pt").exists()  # there is none before it to go on from


def test_a_stage_needs_none_before_it_and_is_left_alone_by_those_after_it(tmp_path, monkeypatch):
    """The last one first, as with many jobs at once; then the first; the last again ends in the same numbers."""
    monkeypatch.setattr(schedule, "config_of", partial(without_compiler, schedule.config_of))
    experiment, arm = experiments.find("stl-schedule"), ("mlp-1", "elbo-path")
    tasks = [t for t in experiment.tasks("smoke", 1) if (t.config["model"], t.config["estimator"]) == arm]
    early, late = sorted(tasks, key=lambda task: task.config["epochs"])

    def made(task, where):
        found = experiment.run(task.config, 0, tmp_path / where / "smoke" / task.name, "cpu", lambda done: None)
        return [number.value for number in found if number.metric != "training seconds"]

    alone = made(late, "a")
    first = made(early, "a")
    assert made(early, "b") == first and made(late, "b") == alone
    shutil.rmtree(tmp_path / "b/trained" / "digits-mlp-1-elbo-path-k1-0" / "4")
    assert made(early, "b") == first and made(late, "b") == alone


def in_stacks(folder, seeds, epochs=(1, 4)):
    """The training bounds of some seeds' stages, made together in a folder that may hold stacks already."""
    tasks = [task for task in experiments.find("stl-schedule").tasks("smoke", 3) if task.config["model"] == "mlp-2"]
    chosen = [task for task in tasks if task.seed in seeds and task.config["epochs"] in epochs]
    found = {}
    schedule.train_together(chosen, folder, "cpu", lambda task, numbers, _: found.update({task.key: numbers}))
    return {key: [m.value for m in numbers if m.metric == "training bound"] for key, numbers in found.items()}


def test_a_stack_is_of_its_members_and_goes_on_for_some_of_them(tmp_path, monkeypatch):
    """As after a kill among the rows of a stage, or with another number of seeds."""
    monkeypatch.setattr(schedule, "config_of", partial(without_compiler, schedule.config_of))
    whole, other = in_stacks(tmp_path / "whole", {0, 1}), in_stacks(tmp_path / "other", {2})
    assert in_stacks(tmp_path / "again", {0, 1}, epochs=(1,)).items() <= whole.items()
    again = in_stacks(tmp_path / "again", {1}, epochs=(4,))
    assert again and again.items() <= whole.items()
    assert in_stacks(tmp_path / "again", {2}) == other


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stack_that_is_asked_to_stop_within_an_epoch_goes_on_from_there(name, tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "config_of", partial(without_compiler, schedule.config_of))
    whole, steps, taken = in_stacks(tmp_path / "whole", {0, 1}), 5, []

    def step(stack, x, eps, real=schedule.StackedTraining.plain_step):
        taken.append(stack.step)
        if len(taken) == steps:
            os.kill(os.getpid(), getattr(signal, name))
        return real(stack, x, eps)

    monkeypatch.setattr(schedule.StackedTraining, "plain_step", step)
    with pytest.raises(KeyboardInterrupt):
        in_stacks(tmp_path / "cut", {0, 1})
    assert len(taken) == steps
    assert in_stacks(tmp_path / "cut", {0, 1}) == whole
    assert taken[steps] == steps


def test_a_stack_beyond_a_stage_that_is_wanted_stays_and_another_begins_beside_it(tmp_path, monkeypatch):
    """As for a second table, or where the lines of a run were lost."""
    monkeypatch.setattr(schedule, "config_of", partial(without_compiler, schedule.config_of))
    whole = in_stacks(tmp_path, {0, 1})
    before = {path: path.read_bytes() for path in (tmp_path / "trained").iterdir()}
    for count in (2, 3):
        again = in_stacks(tmp_path, {1}, epochs=(1,))
        assert again and again.items() <= whole.items()
        assert in_stacks(tmp_path, {0, 1}) == whole
        assert all(path.read_bytes() == content for path, content in before.items())
        assert len(list((tmp_path / "trained").iterdir())) == count * len(before)


@pytest.mark.parametrize("state", [b"cut", {"step": 1}, {"who": 3}, {"who": [("elbo-path", 0), ("elbo-total", 0)]}])
def test_a_stack_that_is_cut_or_of_another_kind_is_named(tmp_path, monkeypatch, state):
    monkeypatch.setattr(schedule, "config_of", partial(without_compiler, schedule.config_of))
    path = tmp_path / "trained" / "digits-mlp-2-k1-together-0.pt"
    path.parent.mkdir()
    path.write_bytes(state) if isinstance(state, bytes) else runs.write_state(state, path)
    with pytest.raises(InputError, match="together-0.pt' is (cut or altered|not a checkpoint)"):
        in_stacks(tmp_path, {0}, epochs=(1,))


def without_compiler(real, *arguments):
    return replace(real(*arguments), compile=False)
