"""The experiments of the chapter on flows: fits side by side are those of each seed, and tables say what was won."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from pandas import DataFrame

from vaelib import checks, experiments, flows
from vaelib.experiments import flow, grid


def test_seeds_side_by_side_are_the_fits_of_each():
    both = flow.fit(flow.ring(), True, [0, 1], steps=20, every=10)
    alone = flow.fit(flow.ring(), True, [1], steps=20, every=10)
    torch.testing.assert_close(both.kl[1], alone.kl[0], rtol=1e-3, atol=0)
    assert both.kl.shape == (2, 3) and (both.kl[:, -1] < both.kl[:, 0]).all()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(both.kl[0], alone.kl[0], rtol=1e-3, atol=0)


def test_the_ring_is_normalised_and_the_divergence_is_that_of_many_draws():
    log_p = flow.ring()
    cells = torch.cartesian_prod(*[torch.linspace(-5.98, 6.02, 601)] * 2)  # other points than it was normalised with
    assert abs(log_p(cells).exp().sum() * 0.02**2 - 1) < 1e-3
    q = flow.start(0)(torch.zeros(1, 1))
    z, log_q = q.sample_and_log_prob(torch.randn(100_000, 1, 2, generator=torch.Generator().manual_seed(0)))
    exact = flow.fit(log_p, False, [0], steps=0).kl[0, 0]
    checks.unbiased((log_q - log_p(z)).double()[:, 0], exact, "KL")
    with pytest.raises(AssertionError):
        checks.unbiased((log_q - log_p(z)).double()[:, 0], 1.05 * exact, "KL")


def test_path_and_total_have_one_value_and_two_gradients():
    eps = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))
    value, slope = {}, {}
    for path in (False, True):
        encoder = flow.start(0)
        torch.nn.init.normal_(encoder.layers[0].network[-1].weight, generator=torch.Generator().manual_seed(1))
        loss = flow.Loss(encoder, flow.ring(), path)(eps).mean()
        value[path] = loss.detach()
        slope[path] = torch.autograd.grad(loss, encoder.layers[-1].network[-1].bias)[0]
    torch.testing.assert_close(value[True], value[False])
    assert (slope[True] - slope[False]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:1 values in")
def test_a_point_that_is_no_number_makes_a_mean_that_is_none(tmp_path):
    text = Path("results/flow-ring.csv").read_text()
    (tmp_path / "flow-ring.csv").write_text(text.replace(",63,kl,1500,0.03317385285,", ",63,kl,1500,nan,"))
    ends = flow.ends(experiments.load("flow-ring", folder=tmp_path))
    assert ends["value"].isna().sum() == 1


@pytest.mark.parametrize("name", ["flow-ring", "flow-vae"])
def test_one_command_makes_the_table_alone_or_together(name, tmp_path):
    grid.run(name, "smoke", device="cpu", together=True, results_folder=tmp_path, runs_folder=tmp_path / "runs")
    found, experiment = experiments.load(name, "smoke", tmp_path), experiments.find(name)
    lines = experiment.table(found)
    assert len(lines) > 1 and all(len(line) == len(lines[0]) and "nan" not in line for line in lines)
    figure = Figure()
    experiment.figure(found, figure)
    assert figure.axes
    task = experiment.tasks("smoke")[1]
    again = {m.metric: m.value for m in experiment.run(task.config, task.seed, Path(), "cpu", lambda fraction: None)}
    stored = found[(found["seed"] == task.seed) & (found["estimator"] == task.config["estimator"])]
    if "posterior" in stored:
        stored = stored[stored["posterior"] == task.config["posterior"]]
    last = stored.groupby("metric", sort=False)["value"].last()
    for metric, value in again.items():
        assert value == pytest.approx(last[metric], rel=1e-2), metric


def test_a_posterior_that_is_a_flow_is_one():
    assert isinstance(flow.autoencoder("flow", 5, 4, 0).encoder, flows.FlowEncoder)
    assert not isinstance(flow.autoencoder("gaussian", 5, 4, 0).encoder, flows.FlowEncoder)


def test_each_line_of_gains_has_the_seeds_of_its_own_pairs():
    seeds = {("gaussian", "elbo-total"): 4, ("gaussian", "elbo-path"): 3, ("flow", "elbo-total"): 2}
    seeds["flow", "elbo-path"] = 1
    found = DataFrame(
        [
            {"posterior": posterior, "estimator": estimator, "epochs": 20, "seed": seed, "metric": metric, "value": 1.0}
            for (posterior, estimator), n in seeds.items()
            for seed in range(n)
            for metric in ("elbo", "log-likelihood")
        ]
    )
    lines = {line[1:3]: line[-1] for line in flow.table_of_gains(found)[1:]}
    assert lines == {
        ("flow", "elbo-total"): "2",
        ("flow", "elbo-path"): "1",
        ("elbo-path", "gaussian"): "3",
        ("elbo-path", "flow"): "1",
    }


@pytest.mark.parametrize("name", ["flow-ring", "flow-vae"])
def test_a_run_says_that_it_was_made_on_the_cpu_whatever_is_asked_for(name, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert grid.place_of(experiments.find(name), "auto") == grid.place_of(experiments.find(name), "cuda") == "cpu"
    assert grid.place_of(experiments.find("stl-table-2"), "auto") == "cuda"
    places = []
    experiment = replace(experiments.find(name), together=lambda tasks, folder, place, add: places.append(place))
    grid.make_together(experiment, experiment.tasks("smoke"), tmp_path / "runs", "cuda", tmp_path)
    assert places == ["cpu"]
