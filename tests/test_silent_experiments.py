"""The experiments of the silent gradient: small runs, what their tables say, and that made-up rows are read right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pandas import DataFrame, concat
from torch.distributions import Normal, kl_divergence

from vaelib import estimators
from vaelib.estimators import silent
from vaelib.experiments import find, load, results, select
from vaelib.experiments import silent as experiments
from vaelib.experiments.experiment import Task
from vaelib.training import Progress, stream

NAMES = ("silent-linear", "silent-annealed", "silent-control-variate")


def measure(name: str, folder, **changes) -> DataFrame:
    """Make the first seeds of some configurations of the smoke preset, through a table on disk."""
    experiment = find(name)
    wanted = changes.pop("only")
    for task in experiment.tasks("smoke"):
        if all(task.config[key] in values for key, values in wanted.items()):
            small = Task(name, "smoke", {**task.config, **changes}, 0)
            measured = experiment.run(small.config, 0, folder, "cpu", lambda fraction: None)
            results.add(experiment, small, results.with_provenance(measured, 0.0, "cpu"), folder)
    return load(name, folder=folder)


@pytest.mark.parametrize(
    ("name", "only", "metrics"),
    [
        (
            "silent-linear",
            {"estimator": ["elbo-silent", "elbo-total"], "latent": ["gaussian", "gaussian-cosine"]},
            {"elbo", "diverged", "test elbo", "test log-likelihood", "log-likelihood", "ppca"},
        ),
        (
            "silent-linear",
            {"estimator": ["elbo-silent", "elbo-disarm", "elbo-score"], "latent": ["bernoulli", "categorical"]},
            {"elbo", "diverged", "test elbo", "test log-likelihood"},
        ),
        (
            "silent-annealed",
            {"estimator": ["elbo-gumbel-softmax"]},
            {"elbo", "diverged", "log-likelihood", "best elbo", "epochs taken"},
        ),
        (
            "silent-control-variate",
            {"estimator": ["elbo-total", "elbo-disarm"], "method": ["plain", "linear decoder"]},
            {
                "elbo",
                "diverged",
                "log-likelihood",
                "variance",
                "variance ratio",
                "variance over path",
                "scale",
                "cost ratio",
            },
        ),
    ],
)
def test_a_small_run_gives_its_numbers_its_table_and_its_figure(name, only, metrics, tmp_path):
    found = measure(name, tmp_path, only=only, images=100, epochs=2)
    assert set(found["metric"]) == metrics
    assert np.isfinite(found["value"]).all()
    assert set(found[found["metric"] == "elbo"]["at"]) == {0, 1, 2}
    table = find(name).table(found)
    assert len(table) > 1 and len({len(line) for line in table}) == 1
    find(name).figure(found, Figure())
    ours, best = (
        found[(found["metric"] == metric) & (found.get("latent") == "gaussian")].set_index("estimator")["value"]
        for metric in ("log-likelihood", "ppca")
    )
    assert (ours.reindex(best.index) < best).all() and ("ppca" not in metrics or len(best) == 2)


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_sound(name):
    experiment = find(name)
    for preset in ("smoke", "short"):
        tasks = experiment.tasks(preset)
        assert len({task.key for task in tasks}) == len(tasks) == experiment.presets[preset].runs
    kinds = {tuple(type(value) for value in task.config.values()) for task in experiment.tasks("short")}
    assert len(kinds) == 1


def test_the_same_seed_starts_at_the_same_place(tmp_path):
    found = measure(
        "silent-linear",
        tmp_path,
        only={"latent": ["bernoulli"], "estimator": ["elbo-silent", "elbo-arm"]},
        images=100,
        epochs=1,
    )
    first, later = (set(select(found, "elbo", at)["value"]) for at in (0, 1))
    assert (len(first), len(later)) == (1, 2)


def test_a_run_that_diverges_is_a_result(tmp_path):
    task = find("silent-linear").tasks("smoke")[0]
    config = {**task.config, "lr": 1e30, "images": 100, "epochs": 3}
    measured = {m.metric: m.value for m in experiments.run_linear(config, 0, tmp_path, "cpu", lambda fraction: None)}
    assert measured["diverged"] == 1 and "test elbo" not in measured


class Walk:
    """A training whose model has given held-out ELBOs, epoch by epoch."""

    def __init__(self, stopping, elbos, monkeypatch, done=1.0):
        self.model, self.stopped, self.progress = torch.nn.Linear(1, 1), False, Progress(0, 0.0, done)
        monkeypatch.setattr(experiments, "mean_elbo", lambda model, x: elbos[self.epoch])
        for self.epoch in range(len(elbos)):
            torch.nn.init.constant_(self.model.weight, self.epoch)
            stopping.after_epoch(self, {})
            if self.stopped:
                break
        stopping.finish(self)


def test_stopping_waits_from_the_best_epoch_and_goes_back_to_it(monkeypatch):
    walk = Walk(experiments.EarlyStopping(None, 2, 0.1), [1.0, 3.0, 2.0, 2.9, 4.0], monkeypatch)
    assert walk.epoch == 3 and walk.model.weight.item() == 1
    walk = Walk(experiments.EarlyStopping(None, 2, 0.1), [1.0, 3.0, 2.0, 4.0, 3.0], monkeypatch)
    assert walk.epoch == 4 and walk.model.weight.item() == 3 and not walk.stopped


def test_stopping_does_not_wait_while_the_guide_leads(monkeypatch):
    walk = Walk(experiments.EarlyStopping(None, 2, 0.5), [3.0, 2.0, 2.0, 2.0, 2.0], monkeypatch, done=0.4)
    assert walk.epoch == 4 and not walk.stopped and walk.model.weight.item() == 0


def test_the_method_names_the_estimator():
    config = {"estimator": "elbo-total", "anneal": 0.5}
    names = {
        method: [
            experiments.estimator_at({**config, "method": method})(Progress(0, 0.0, done)).name
            for done in (0.0, 0.25, 0.5, 1.0)
        ]
        for method in experiments.METHODS
    }
    assert names["plain"] == ["elbo-annealed(0)"] * 4
    for method in ("linear", "linear, sampled", "cosine"):
        assert names[method] == ["elbo-annealed(1)", "elbo-annealed(0.5)", "elbo-annealed(0)", "elbo-annealed(0)"]


def small_guided():
    return experiments.start({"data": "digits", "images": 100}, 0, "guided", "cpu", hidden=8, latent=2)


def encoder_gradient(estimator, model, x, eps):
    loss = estimator.loss(model.joint, model.encoder(x), x, eps).mean()
    return torch.autograd.grad(loss, list(model.encoder.parameters()))


@pytest.mark.parametrize(("method", "quiet"), [("linear", True), ("cosine", True), ("linear, sampled", False)])
def test_the_guide_is_exact_or_as_the_control_sampled(method, quiet):
    """While the guide has all the weight, the encoder's gradient does not depend on the draws; sampled, it does."""
    model, images = small_guided()
    config, x = {"estimator": "elbo-total", "anneal": 0.5, "method": method}, images.train.grey[:5]
    estimator = experiments.estimator_at(config)(Progress(0, 0.0, 0.0))
    noise = (model.encoder(x).noise(1, stream("noise", seed)) for seed in (0, 1))
    pairs = zip(*(encoder_gradient(estimator, model, x, eps) for eps in noise), strict=True)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs) == quiet


def test_the_test_elbo_is_that_of_torch_s_distributions():
    model, images = small_guided()
    x, decode = images.test.grey[:20], model.joint.joint.decode
    q = Normal(model.encoder(x).mean, model.encoder(x).log_std.exp())
    z = q.mean + q.stddev * torch.randn(10, *q.mean.shape, generator=stream("test", 0))
    likelihood = Normal(decode.mean(z), decode.log_std.exp()).log_prob(x).sum(-1)
    elbo = likelihood.mean(0) - kl_divergence(q, Normal(0.0, 1.0)).sum(-1)
    (found,) = experiments.test_elbo(model, x, 3)
    assert (found.metric, found.at) == ("elbo", 3) and found.value == pytest.approx(elbo.mean().item(), rel=1e-5)


def test_a_ratio_of_variances_is_over_the_bare_estimator_s(tmp_path):
    """Before the first step, by a loop over the draws; without a control, total is over path."""
    ((task, *_),) = [
        [task for task in find("silent-control-variate").tasks("smoke") if task.config["method"] == method]
        for method in ("linear decoder",)
    ]
    config = {**task.config, "estimator": "elbo-total", "images": 100, "epochs": 1}
    found = {}
    for method in ("plain", "linear decoder"):
        measured = experiments.run_controlled({**config, "method": method}, 0, tmp_path, "cpu", lambda fraction: None)
        found[method] = {m.metric: m.value for m in measured if m.at == 0}
    model, images = experiments.start(config, 0, "guided", "cpu", **experiments.SIZES)
    x = images.train.grey[: experiments.LOOK_AT]
    q, joint, draws = model.encoder(x), model.joint.joint, {"elbo-total": [], "elbo-path": []}
    noise = stream("test", 0)
    leaves = [p.detach().requires_grad_() for p in (q.mean, q.log_std)]
    for _ in range(experiments.DRAWS):
        eps = q.noise(1, noise)
        for name, gradients in draws.items():
            loss = estimators.get(name).loss(joint, type(q)(*leaves), x, eps).sum()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)]))
    total, path = (torch.stack(gradients).var(0).sum().item() for gradients in draws.values())
    assert found["plain"]["variance"] == pytest.approx(total, rel=1e-3)
    assert found["plain"]["variance over path"] == pytest.approx(total / path, rel=1e-3)
    mine = found["linear decoder"]
    assert mine["variance ratio"] == pytest.approx(mine["variance"] / total, rel=1e-3)
    assert mine["variance over path"] == pytest.approx(mine["variance"] / path, rel=1e-3)


def test_all_score_estimators_of_bits_have_as_many_samples():
    """ARM and DisARM make two of a draw."""
    of_two = {"elbo-score", "elbo-score-loo"}
    for cell in experiments.linear_grid("digits", 100, (0.1,), 1, experiments.LATENTS):
        assert cell["k"] == (2 if cell["estimator"] in of_two else 1)


def made(estimator, lr, seed, curve) -> list[dict]:
    key = {"data": "d", "latent": "gaussian", "estimator": estimator, "lr": lr, "seed": seed, "epochs": 2}
    return [{**key, "metric": "elbo", "at": at, "value": value} for at, value in enumerate(curve)]


def test_shortfalls_and_best_rates_made_by_hand():
    found = DataFrame([
        *made("a", 0.1, 0, (0, 1, 10)), *made("a", 0.2, 0, (0, 2, 6)),
        *made("a", 0.1, 1, (0, 1, 12)), *made("a", 0.2, 1, (0, 2, 8)),
        *made("b", 0.1, 0, (0, 1, 4)), *made("b", 0.2, 0, (0, 3)),  # the second one diverged
    ])  # fmt: skip
    assert experiments.best_rates(found).to_dict() == {("d", "gaussian", "a"): 0.1, ("d", "gaussian", "b"): 0.1}
    lost = experiments.shortfalls(found)
    assert lost.loc["d", "gaussian", "a"].tolist() == [3.0, 1.0, 2]  # of 4, (2 + 6) / 2, and of 2, (0 + 4) / 2
    assert lost.at[("d", "gaussian", "b"), "mean"] == (8 + 12) / 2
    assert len(experiments.at_best_rate(found)) == 9
    assert experiments.best_rates(found, at=1)["d", "gaussian", "a"] == 0.2
    quiet = found[found["estimator"] == "a"].assign(estimator="elbo-silent", value=lambda f: f["value"] + 1 + f["seed"])
    both = concat([found, quiet])
    leads = experiments.leads(both, "elbo")
    assert leads.loc["d", "gaussian", "a"].tolist() == [1.5, 0.5, 2]
    assert "elbo-silent" not in leads.index.get_level_values("estimator")
    assert experiments.leads(both, "elbo", at=1).at[("d", "gaussian", "b"), "mean"] == 3 + 0 - 3
    ends = both[both["at"] == 2].assign(metric="test log-likelihood", at=None)  # of the whole run, at no epoch
    assert experiments.leads(concat([both, ends]), "test log-likelihood").loc["d", "gaussian", "a"].tolist() == [
        1.5, 0.5, 2
    ]  # fmt: skip


def test_gains_are_paired_by_seed():
    lines = []
    for seed, (plain, mine) in enumerate([(0.0, 1.0), (100.0, 101.5)]):
        for method, value in (("plain", plain), ("linear", mine)):
            key = {"data": "d", "estimator": "e", "method": method, "seed": seed, "epochs": 7}
            lines += [{**key, "metric": "m", "at": at, "value": value * factor} for at, factor in ((1, 2), (7, 1))]
    gains = experiments.over_plain(DataFrame(lines), "m")
    assert gains.loc["d", "e", "linear"].tolist() == [1.25, 0.25, 2] and gains.at[("d", "e", "plain"), "mean"] == 0
    assert experiments.over_plain(DataFrame(lines), "m", at=1).at[("d", "e", "linear"), "mean"] == 2.5


def test_the_cost_holds_the_looks_at_the_scale(monkeypatch):
    model, images = experiments.start({"data": "digits", "images": 100}, 0, "guided", "cpu", hidden=8, latent=2)
    now = [0.0]
    monkeypatch.setattr(experiments.time, "process_time", lambda: now[0])
    looks, backward = silent.covariances, experiments.objectives.backward

    def took(seconds, what):
        def timed(*arguments):
            now[0] += seconds(*arguments)
            return what(*arguments)

        return timed

    monkeypatch.setattr(silent, "covariances", took(lambda *_: 8, looks))
    monkeypatch.setattr(
        experiments.objectives, "backward", took(lambda _, joint, *__: 3 if hasattr(joint, "guide") else 2, backward)
    )
    tracked = silent.TrackedScale(estimators.get("elbo-total"), model, images.train.grey[:10], every=4)
    assert experiments.cost_ratio(tracked, model, images.train.grey[:10]) == (3 + 8 / 4) / 2


@pytest.mark.filterwarnings("ignore:1 values in")
@pytest.mark.parametrize("metric", ["elbo", "diverged"])
def test_a_number_that_is_none_is_seen_in_the_table(metric):
    """Of a rate that it makes the best or the worst, it is not left out."""
    found = load("silent-linear", "short", "results")
    table = find("silent-linear").table
    assert not any("nan" in cell for line in table(found) for cell in line)
    rates = experiments.best_rates(found)
    data, latent, estimator = rates.index[0]
    arm = (found["data"] == data) & (found["latent"] == latent) & (found["estimator"] == estimator)
    here = found[arm & (found["lr"] == rates.iloc[0]) & (found["metric"] == metric)]
    found.loc[here.index[-1], "value"] = float("nan")
    (line,) = (line for line in table(found) if {data, latent, estimator} <= set(line))
    assert any("nan" in cell for cell in line)
