"""The experiments on lag: that a grid runs, goes on after a kill, makes its tables, and says what collapsed."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from vaelib import data
from vaelib.collapse import METHODS
from vaelib.experiments import find, lag
from vaelib.experiments.results import as_rows

QUIET = lambda fraction: None  # noqa: E731


def measure(experiment, folder, **changes):
    rows = []
    for config in experiment.presets["smoke"].grid:
        config = {**config, **changes}
        place = folder / config["method"]
        place.mkdir()
        measured = as_rows(lag.run(config, 0, place, "cpu", QUIET), 1.0, "cpu")
        rows += [{**config, "seed": 0, "preset": "smoke", **row} for row in measured]
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return measure(find("lag-toy"), tmp_path_factory.mktemp("runs") / "")


def test_a_run_measures_what_the_paper_s_tables_have(rows):
    for method in ("no-z", "plain", "sa-vae", "aggressive"):
        final = {row["metric"]: row["value"] for row in rows if row["method"] == method and row["at"] is None}
        assert {"nll", "kl", "mi", "mi_all", "au", "collapsed", "training_seconds", "aggressive_seconds"} <= set(final)
        assert final["collapsed"] == (final["au"] == 0) and final["nll"] > 0
        assert (final["encoder_steps"] > final["decoder_steps"]) == (method == "aggressive")
        curve = [row["at"] for row in rows if row["method"] == method and row["metric"] == "mi" and row["at"]]
        assert curve == [1, 2]
    exact = {row["metric"]: row["value"] for row in rows if row["method"] == "no-z" and row["at"] is None}
    assert exact["nll"] == pytest.approx(exact["nll_bound"], rel=1e-5)  # a language model's bound is its likelihood
    assert all(row["standard_error"] > 0 for row in rows if row["metric"] == "nll")


def test_the_table_has_a_line_a_method_and_the_published_numbers_beside(rows):
    ours, beside = find("lag-toy").table(rows), find("lag-text").table(rows)
    assert ours[0][:2] == ("method", "NLL") and len({len(line) for line in ours}) == 1
    assert [line[0] for line in ours[1:]] == ["no z (autoregressive)", "VAE", "SA-VAE", "aggressive"]
    assert ours[2][6] == "1.00" and float(ours[4][6]) > 1.5  # time, relative to plain
    assert beside[0][9] == "NLL (yahoo, He et al.)" and beside[4][9:] == ("328.0", "5.4", "3.0", "2.20")
    twice = rows + [{**row, "seed": 1} for row in rows]
    assert find("lag-toy").table(twice)[1][8] == "2" and "± 0.00" in find("lag-toy").table(twice)[1][1]


def test_the_figure_draws_every_method(rows):
    fig = Figure()
    find("lag-toy").figure(rows, fig)
    assert [len(axes.lines) for axes in fig.axes] == [4, 4]


def test_the_posterior_mean_space_is_noted_and_gathered(rows, tmp_path_factory, tmp_path):
    folder = next(tmp_path_factory.getbasetemp().glob("runs*"))
    folders = [folder / config["method"] for config in find("lag-toy").presets["smoke"].grid]
    assert not (folder / "sa-vae" / "space.csv").exists()
    table = tmp_path / "lag-toy-space.csv"
    earlier = "smoke,plain,stage,0,99,0,0\nshort,plain,stage,0,99,0,0\n"
    table.write_text("preset,method,kind,step,point,model_mean,encoder_mean\n" + earlier)
    find("lag-toy").gather("smoke", folders, tmp_path)
    whole = table.read_text()
    found = list(csv.DictReader(whole.splitlines()))
    others = [row["preset"] for row in found if row["point"] == "99"]
    assert others == ["short"]  # what there was of its own preset is replaced
    found = [row for row in found if row["preset"] == "smoke"]
    for method in ("plain", "aggressive"):
        stages = [row for row in found if row["method"] == method and row["kind"] == "stage"]
        paths = [row for row in found if row["method"] == method and row["kind"] == "trajectory"]
        assert len({row["step"] for row in stages}) in (3, 4) and {row["point"] for row in stages} == set("01234")
        assert len(paths) == 9 * 11 and all(-20 <= float(row["model_mean"]) < 20 for row in found)
    find("lag-toy").gather("smoke", [tmp_path / "gone"], tmp_path)
    assert table.read_text() == whole


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed in the middle, the second start ends with the numbers of an undisturbed run, and does not begin anew."""
    config = {**find("lag-toy").presets["smoke"].grid[1], "points": 0}
    (tmp_path / "whole").mkdir()
    whole = lag.run(config, 0, tmp_path / "whole", "cpu", QUIET)
    monkeypatch.setattr(lag, "SAVE_EVERY", 0.0)
    calls = 0

    def interrupt(fraction):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt

    (tmp_path / "killed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        lag.run(config, 0, tmp_path / "killed", "cpu", interrupt)
    again = lag.run(config, 0, tmp_path / "killed", "cpu", interrupt)
    assert calls < 7 + 10
    untimed = [[m for m in found if "seconds" not in m.metric] for found in (whole, again)]
    assert untimed[0] == untimed[1]


def test_every_cell_can_be_built():
    """All grids name methods, sizes and data that exist, and every preset has the same keys."""
    for name in ("lag-toy", "lag-text"):
        experiment = find(name)
        for preset in experiment.presets:
            for task in experiment.tasks(preset):
                config = task.config
                assert config["method"] in lag.CHANGES and config["method"] in lag.LABELS
                assert config["model"] in lag.FAMILIES and config["data"] in data.names()
                changes = {key: config[key] for key in lag.IN_RECIPE if config[key] is not None}
                replace(lag.FAMILIES[config["model"]].recipe, **changes, **lag.CHANGES[config["method"]])
    assert set(METHODS) < set(lag.CHANGES)


def test_images_are_trained_by_the_same_run(tmp_path, monkeypatch):
    """A family is a row: digits and a linear model, with nothing else written."""
    from vaelib import collapse, models

    def load(config):
        images = data.load("digits", valid=100)
        return replace(images, train=replace(images.train, grey=images.train.grey[:200]))

    def build(config, images, generator):
        return models.build("linear", 64, images.train.grey.mean(0), generator, latent=2)

    monkeypatch.setitem(lag.FAMILIES, "toy-images", lag.Family(load, build, collapse.IMAGES))
    config = {**find("lag-toy").presets["smoke"].grid[3], "model": "toy-images", "points": 0, "data": "digits"}
    measured = lag.run(config, 0, tmp_path, "cpu", QUIET)
    assert {m.metric for m in measured} >= {"nll", "au"} and torch.isfinite(
        torch.tensor([m.value for m in measured])
    ).all()
