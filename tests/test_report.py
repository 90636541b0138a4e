"""The page of a run: whole, self-contained, and of what the run is; what a loaded run can do."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vaelib import advice, cli, models, plots, report, runs
from vaelib.config import Config
from vaelib.errors import InputError
from vaelib.posteriors import DiagonalGaussian

TEXT = {"data": "synthetic-text", "model": "lstm", "sizes": {"latent": 2, "hidden": 8, "embedding": 8}}
IMAGE = {"data": "digits", "binarisation": "dynamic"}
SMALL = {"hidden": 8, "latent": 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a run of some kind, trained once."""
    known = {}

    def run(kind, **changes):
        if kind not in known:
            known[kind] = tmp_path_factory.mktemp("runs") / kind
            small = {"epochs": 1, "batch_size": 500, "device": "cpu"}
            runs.train(known[kind], Config(**small | changes))
        return known[kind]

    return run


@pytest.fixture
def image(made):
    return made("image", **IMAGE, model="mlp-1", sizes=SMALL)


@pytest.fixture
def text(made):
    return made("text", **TEXT)


KINDS = {
    "mlp-2": {"sizes": SMALL | {"latent2": 2, "hidden2": 4}, "units": 5},
    "mlp-1-mixture": {"sizes": SMALL | {"components": 2}, "k": 2},
    "mlp-1-flow": {"sizes": SMALL | {"layers": 2, "flow_hidden": 4}},
    "mlp-1-bernoulli": {"sizes": SMALL, "estimator": "elbo-score-loo", "k": 2},
    "mlp-1-categorical": {"sizes": SMALL | {"classes": 4}, "estimator": "elbo-score-loo", "k": 2, "units": 12},
    "linear": {"sizes": {"latent": 3}, "binarisation": "grey"},
    "guided": {"sizes": {"latent": 3, "hidden": 8}, "binarisation": "grey"},
    "pixelcnn": {"sizes": {"latent": 3, "maps": 2, "layers": 3, "encoder_maps": 2, "hidden": 8}},
}


@pytest.mark.parametrize("model", KINDS)
def test_every_kind_of_model_shows_itself(model, made):
    options = dict(KINDS[model])
    units = options.pop("units", 3)
    run = runs.load(made(model, **IMAGE | options, model=model), "cpu")
    x = run.data.test.batch(slice(0, 5), seeded())
    assert run.reconstruct(x).shape == (5, 64) and run.sample(7).shape == (7, 64) and run.embed(x).shape == (5, units)
    assert torch.equal(run.reconstruct(x), run.reconstruct(x)) and torch.equal(run.sample(3), run.sample(3))
    assert not torch.equal(run.sample(3), run.sample(3, seeded(1)))
    one, same, other = (run.reconstruct(x, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert "data:image/png" in report.page(run, "a run")


def test_what_comes_back_is_the_decoder_s_mean(image):
    run = runs.load(image, "cpu")
    x = run.data.test.batch(slice(0, 3), seeded())
    q = run.model.encoder(x)
    again = run.model.joint.decode(q.sample(q.noise(1, seeded())))
    torch.testing.assert_close(run.reconstruct(x), again.logits.sigmoid()[0])
    torch.testing.assert_close(run.embed(x), q.mean)


def test_a_mixture_s_components_count_by_their_weights(made):
    run = runs.load(made("mlp-1-mixture", **IMAGE, model="mlp-1-mixture", **KINDS["mlp-1-mixture"]), "cpu")
    x = run.data.test.batch(slice(0, 3), seeded())
    q = run.model.encoder(x)
    each = run.model.joint.decode(q.sample(q.noise(2, seeded()))).mean
    torch.testing.assert_close(run.reconstruct(x), (q.logits.softmax(0).unsqueeze(-1) * each).sum(0))


def test_samples_are_from_the_prior():
    """Two layers: z2 ~ N(0, 1) and z1 from p(z1 given z2); bits as often as the prior has them."""
    joint = models.build("mlp-2", 64, None, seeded(), hidden=4, hidden2=4, latent=2, latent2=2).joint
    eps = torch.randn(5, 1, 2, generator=seeded()), torch.randn(5, 1, 2, generator=seeded(1))
    z1, z2 = joint.sample_prior(eps)
    assert torch.equal(z2, eps[1]) and torch.equal(z1, joint.priors[0](z2).sample(eps[0]))
    bits = models.DiscreteJoint(None, torch.tensor([2.0])).sample_prior(torch.rand(20_000, 1, 1, generator=seeded()))
    assert abs(bits.mean().item() - 0.8808) < 5 * 0.0023


def test_an_original_and_its_reconstruction_stand_side_by_side(image, monkeypatch):
    run, sheets = runs.load(image, "cpu"), []
    monkeypatch.setattr(report, "sheet", lambda x, *_: sheets.append(x) or "a sheet")
    x = report.observations(run, "test", 30)
    report.made(run, x)
    pairs, samples = sheets
    assert torch.equal(pairs[..., :8].flatten(1), x[:24]) and samples.shape[-2:] == (8, 8)
    assert torch.equal(pairs[..., 8:16].flatten(1), run.reconstruct(x[:24])) and not pairs[..., 16:].any()


def test_a_joint_that_cannot_show_itself_says_so(image):
    run = runs.load(image, "cpu")
    run.model.joint = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="this joint, a Linear, has no sample_prior and no generate: build it as"):
        run.sample(2)
    with pytest.raises(InputError, match="n must be a whole number of at least 1"):
        run.sample(0)


def loads(page):
    """What a browser would fetch for a page."""
    found = re.findall(r"""(?:src|srcset|href|url)\s*[=(]\s*["']?([^"'\s>)]{1,40})""", page)
    return [address for address in found if not address.startswith("data:")]


def test_a_page_needs_nothing_but_itself(image, text):
    for folder in (image, text):
        path = report.show(folder, "cpu")
        page = path.read_text("utf-8")
        assert path == folder / "report.html" and loads(page) == [] and "<script" not in page
        assert page.index('class="verdict"') < page.index("<h2>") and 'name="viewport"' in page
        pictures = re.findall(r"<img [^>]*>", page)
        assert len(pictures) >= 3 and all(re.search(r'alt="[^"]{20,}"', picture) for picture in pictures)
        assert page.count("prefers-color-scheme: dark") == len(pictures) + 1
    assert "Originals and reconstructions" not in page and "Written from the prior" in page
    assert loads('<img src="http://x/y.png">') == ["http://x/y.png"]


def test_what_a_name_or_a_sentence_has_of_html_is_text(text):
    run = runs.load(text, "cpu")
    assert "<b>" not in report.page(run, "<b>") and "&lt;b&gt;" in report.page(run, "<b>")


def test_the_page_is_whole_or_as_it_was(image, monkeypatch):
    (image / "report.html").write_text("before")
    monkeypatch.setattr("vaelib.report.units", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.show(image, "cpu")
    assert (image / "report.html").read_text() == "before"
    with pytest.raises(InputError, match="there is no trained model"):
        report.show(image / "nothing")
    assert not (image / "nothing").exists()


def test_every_bound_of_the_history_is_drawn():
    history = [{"epoch": e, "bound": -e, "held_out": -2.5 * e, "lr": 1.0} for e in (1, 2)]
    assert "training ends at -2.00 nats, held out ends at -5.00 nats" in report.curves(history)
    assert report.curves([]) == ""


def test_the_map_names_each_label(image, monkeypatch):
    run, figure = runs.load(image, "cpu"), Figure()
    monkeypatch.setattr(report, "picture", lambda draw, *_: draw(figure))
    report.latent_map(run, report.observations(run, "test", report.MAPPED))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list("0123456789")


def test_samples_are_of_other_noise_than_reconstructions(image, monkeypatch):
    """Where q is the prior, the same noise would make the same pictures, and the model look as if it copied."""
    run, sheets = runs.load(image, "cpu"), []
    prior = DiagonalGaussian(*torch.zeros(2, 500, SMALL["latent"]))
    joint = run.model.joint
    deaf = SimpleNamespace(
        joint=joint, parameters=joint.parameters, encoder=lambda x: prior.map_parameters(lambda p: p[: len(x)])
    )
    run = replace(run, model=deaf)
    monkeypatch.setattr(report, "sheet", lambda x, *_: sheets.append(x) or "")
    report.made(run, report.observations(run, "test", 30))
    pairs, samples = sheets
    width = samples.shape[-1]
    assert not torch.allclose(pairs[..., width : 2 * width], samples)


def test_a_narrow_axis_of_the_advice_has_ticks_apart():
    part = advice.Part(advice.Estimate(10.0, 1.0), advice.Estimate(290.0, 1.0), advice.Estimate(1.0, 1.0))
    row = advice.RowCost("elbo-path", "elbo", "elbo", 1, None, part, part, 1.0)
    figure = Figure((7.2, 4.4))
    plots.advice(figure, SimpleNamespace(rows=[row]))
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        assert axes.get_xlim() == (100.0, 1000.0)
        boxes = [text.get_window_extent() for text in axes.get_xticklabels(which="both") if text.get_text()]
        inside = sorted((box for box in boxes if box.width), key=lambda box: box.x0)
        assert all(a.x1 < b.x0 for a, b in pairwise(inside))


def test_the_commands_write_what_they_say(image, capsys):
    for command, says, files in (
        ("show", "look at ", ["report.html"]),
        ("advise", "for q itself or a reported ELBO: ", ["advice.json", "advice.png"]),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([command, str(image), "--device", "cpu"])
        assert not end.value.code and says in capsys.readouterr().out
        assert all((image / name).stat().st_size > 1000 for name in files)
    found = json.loads((image / "advice.json").read_text())
    assert {"recommendation", "rows", "usage", "lag", "doubled", "left_out", "setting"} <= set(found)


def test_sentences_and_images_go_with_their_models(tmp_path):
    for config, sentence in (
        (Config(data="digits", model="lstm"), "model 'lstm' is for sentences, but 'digits' has images"),
        (
            Config(data="synthetic-text", model="mlp-1"),
            "model 'mlp-1' is for images, but 'synthetic-text' has sentences",
        ),
        (Config(**TEXT | {"sizes": {"laten": 2}}), "no size of model 'lstm' is called 'laten', did you mean 'latent'"),
    ):
        with pytest.raises(InputError, match=sentence):
            runs.train(tmp_path / "run", config)


@pytest.mark.parametrize(("of_the_run", "asked", "used"), [(1, None, 4), (7, None, 7), (7, 2, 2)])
def test_advice_is_for_the_draws_of_the_run_and_at_least_four(image, monkeypatch, of_the_run, asked, used):
    """Most estimators need two draws and more, and are compared at the same number."""
    seen, load = [], runs.load

    def loaded(*arguments):
        run = load(*arguments)
        return replace(run, config=replace(run.config, k=of_the_run))

    monkeypatch.setattr(runs, "load", loaded)
    monkeypatch.setattr("vaelib.gradients.advise", lambda *_, k, **__: seen.append(k) or SimpleNamespace(as_dict=dict))
    monkeypatch.setattr(report, "png", lambda *_: b"a picture")
    report.advise(image, asked, device="cpu")
    assert seen == [used]


def test_advice_for_a_mixture_is_for_the_next_multiple_of_its_components(made):
    folder = made("three components", **IMAGE, model="mlp-1-mixture", sizes=SMALL | {"components": 3}, k=3)
    given, _ = report.advise(folder, device="cpu")
    assert given.setting["k"] == 6 and any(row.name == "elbo-total" for row in given.rows)


def test_advice_is_shown_before_it_is_written(image, monkeypatch):
    shown = []

    def full(path, content):
        raise InputError("no room")

    given = SimpleNamespace(as_dict=dict)
    monkeypatch.setattr("vaelib.gradients.advise", lambda *_, **__: given)
    monkeypatch.setattr("vaelib.files.write_json", full)
    with pytest.raises(InputError, match="no room"):
        report.advise(image, device="cpu", show=shown.append)
    assert shown == [given]


def test_what_is_shown_of_a_run_is_not_written_into_another(image, tmp_path, monkeypatch):
    """The folder is renamed, and another comes into its place, while the page or the advice is computed."""
    place = tmp_path / "run"
    for command in ("show", "advise"):
        for name in ("run", "other"):
            shutil.copytree(image, tmp_path / name)
        before = sorted(os.listdir(place))

        def turn(*_, **__):
            place.rename(tmp_path / "old")
            (tmp_path / "other").rename(place)
            return SimpleNamespace(as_dict=dict)

        monkeypatch.setattr("vaelib.gradients.advise", turn)
        monkeypatch.setattr(report, "page", lambda *_: str(turn()))
        with pytest.raises(InputError, match="run' is not the folder any more"):
            getattr(report, command)(place, device="cpu")
        assert sorted(os.listdir(place)) == before
        for name in ("run", "old"):
            shutil.rmtree(tmp_path / name)


def test_a_run_that_is_at_work_is_not_shown(image, monkeypatch):
    """It is told before anything is computed."""
    monkeypatch.setattr("vaelib.gradients.advise", None)
    monkeypatch.setattr(report, "page", None)
    with runs.in_use(runs.Folder(image)):
        for command in (report.show, report.advise):
            with pytest.raises(InputError, match="another process works in"):
                command(image, device="cpu")


def test_advice_that_nobody_can_see_is_written_all_the_same(image, monkeypatch):
    def closed(given):
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr("vaelib.gradients.advise", lambda *_, **__: SimpleNamespace(as_dict=lambda: {"rows": []}))
    monkeypatch.setattr(report, "png", lambda *_: b"a picture")
    with pytest.raises(BrokenPipeError):
        report.advise(image, device="cpu", show=closed)
    assert json.loads((image / "advice.json").read_text()) == {"rows": []}
    assert (image / "advice.png").read_bytes() == b"a picture"


def test_a_seed_that_is_none_is_told_before_the_run_is_looked_at(tmp_path):
    with pytest.raises(InputError, match="seed must be a whole number of at least 0, but is -1"):
        report.advise(tmp_path / "nothing", seed=-1)
