"""The PixelCNN is causal, its density sums to 1, its samples follow it, and its batch norms are handled right."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from vaelib import collapse, evaluation, models, objectives, training
from vaelib.data import Split
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU
from vaelib.experiments import lag
from vaelib.models.pixelcnn import (
    CausalConvolution,
    NoLatent,
    PixelCNN,
    Residual,
    convolution,
    kernel_sizes,
    pixelcnn_alone,
)
from vaelib.posteriors import stop_gradient

SIZES = {"latent": 2, "maps": 4, "layers": 4, "encoder_maps": 3, "hidden": 5}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settle(model: torch.nn.Module) -> torch.nn.Module:
    """Give batch norms statistics and scales other than those they start with, and return the model for evaluation."""
    g = generator(7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in (
                *((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0)),
                *((module.weight.data, 0.5, 2.0), (module.bias.data, -0.5, 0.5)),
            ):
                values.uniform_(low, high, generator=g)
    return model.double().eval()


def build(side: int, **sizes: int) -> models.VAE:
    return settle(models.build("pixelcnn", side * side, generator=generator(), **SIZES | sizes))


def binary(count: int, pixels: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, pixels, generator=generator(seed), dtype=torch.float64).round()


# ------------------------------------------------------------------------------------------------- causality


def influence(network: PixelCNN, side: int) -> torch.Tensor:
    """Return how much logit i moves with pixel j, largest of some images and latents, ``[X, X]``."""
    z = torch.randn(1, 3, network.weight.shape[1], generator=generator(2), dtype=torch.float64)
    x = torch.rand(3, side * side, generator=generator(3), dtype=torch.float64)

    def logits(x):
        return network(z).conditional(x).logits.sum((0, 1))  # images do not meet in evaluation mode

    return torch.autograd.functional.jacobian(logits, x).abs().amax(1)


def is_causal(moves: torch.Tensor) -> bool:
    """Say whether no logit moves at all with a pixel at or after its place."""
    return bool((moves.triu() == 0).all())


@pytest.mark.parametrize(("side", "layers"), [(5, 3), (6, 4)])
def test_every_logit_sees_the_pixels_before_it_and_no_other(side, layers):
    moves = influence(build(side, layers=layers).joint.decode, side)
    assert is_causal(moves)
    seen = (moves > 0).sum(1)
    assert seen[0] == 0 and (seen[1:] > 0).all()
    left = moves.diagonal(-1)[[i for i in range(side * side - 1) if (i + 1) % side]]
    assert (left > 0).all()  # the left neighbour, and the one above
    assert (moves.diagonal(-side) > 0).all()
    assert moves[side, 3] > 0 and moves[side, 4] == 0  # one row up, 7 x 7 kernels see 3 to the right: the blind spot


def test_the_published_kernels_are_causal():
    assert kernel_sizes(13) == [7] * 5 + [5] * 4 + [3] * 4
    assert kernel_sizes(7) == [7] * 3 + [5] * 2 + [3] * 2
    network = settle(PixelCNN(6, 2, maps=2, layers=13, generator=generator()))
    assert len(network.blocks) == 12 and len(network.skips) == 11
    assert is_causal(influence(network, 6))


def see_itself(network):
    network.pixels = CausalConvolution(1, 4, 7, "B", generator()).double()


def see_the_next(network):
    network.pixels.seen[-1] = network.pixels.seen[-1].roll(2)


def see_the_next_in_a_block(network):
    network.blocks[-1].body[3].seen[-1] = 1


def see_the_row_below(network):
    network.pixels.forward = lambda x: torch.nn.functional.conv2d(
        x, network.pixels.weight * network.pixels.seen, padding=3
    )[..., 1 : x.shape[-2] + 1, :]


@pytest.mark.parametrize("fault", [see_itself, see_the_next, see_the_next_in_a_block, see_the_row_below])
def test_negative_control_a_wrong_mask_is_noticed(fault):
    network = build(5).joint.decode
    fault(network)
    assert not is_causal(influence(network, 5))


def test_negative_control_a_mask_that_hides_the_left_neighbour_is_noticed():
    network = build(5).joint.decode
    network.pixels.seen[-1, 2] = 0
    moves = influence(network, 5)
    assert is_causal(moves) and (moves.diagonal(-1) == 0).any()


def test_negative_control_training_mode_is_not_causal():
    """Batch statistics carry later pixels back; the docstring says so, and why one evaluates with eval()."""
    network = build(5).joint.decode
    assert is_causal(influence(network, 5))
    assert not is_causal(influence(network.train(), 5))


def test_the_density_sums_to_one():
    """Over all 512 images of 3 x 3 pixels, whatever z; not so in training mode, nor with a mask that sees its pixel."""
    joint = build(3).joint
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9)), dtype=torch.float64)
    z = torch.randn(1, 1, 2, generator=generator(), dtype=torch.float64).expand(1, 512, 2)

    def total():
        parts = [joint.log_likelihood(*part) for part in zip(x.split(8), z.split(8, 1), strict=True)]
        return torch.cat(parts, 1).logsumexp(1).detach()

    torch.testing.assert_close(total(), torch.zeros(1, dtype=torch.float64))
    joint.train()
    assert total().abs() > 1e-3
    joint.eval()
    see_itself(joint.decode)
    assert total().abs() > 1e-3


def test_the_layers_are_the_equations():
    """Layer after layer as they are written: each output skips three layers, through a block of its own."""
    network = build(5, layers=6).joint.decode
    x, z = binary(3, 25), torch.randn(2, 3, 2, generator=generator(), dtype=torch.float64)
    maps = torch.nn.functional.linear(z, network.weight, network.bias).reshape(6, 4, 5, 5)
    images = x.view(3, 1, 5, 5).repeat(2, 1, 1, 1)
    y = [network.first(network.pixels(images) + network.latent(maps))]
    for layer, block in enumerate(network.blocks, 1):
        y.append(block(y[layer - 1] + (network.skips[layer - 3](y[layer - 3]) if layer >= 3 else 0.0)))
    logits = network.last(y[5] + network.skips[3](y[3])).reshape(2, 3, 25)
    torch.testing.assert_close(network(z).conditional(x).logits, logits)


def test_a_residual_block_is_elu_of_body_and_shortcut():
    block = Residual(torch.nn.Identity(), torch.nn.Threshold(0.0, -1.0))  # x + x, or below 0 x - 1
    found = block(torch.tensor([2.0, -0.5]))
    torch.testing.assert_close(found, torch.tensor([4.0, math.exp(-1.5) - 1]))


# --------------------------------------------------------------------------------------- the model's contract


def test_every_draw_and_image_on_its_own():
    """A batch of K x B is a loop over single images and draws."""
    model = build(6)
    x = binary(3, 36)
    z = model.encoder(x).sample(model.encoder(x).noise(4, generator()))
    together = model.joint(x, z)
    assert together.shape == (4, 3)
    for k, b in itertools.product(range(4), range(3)):
        torch.testing.assert_close(model.joint(x[b : b + 1], z[k : k + 1, b : b + 1]), together[k : k + 1, b : b + 1])
        torch.testing.assert_close(model.encoder(x[b : b + 1]).mean[0], model.encoder(x).mean[b])


def test_the_sizes_are_those_of_he_et_al():
    model = models.build("pixelcnn", 784)
    encoder = [tuple(p.shape) for p in model.encoder.parameters() if p.ndim > 1]
    first = [(64, 1, 3, 3), (64, 64, 3, 3), (64, 1, 1, 1)]
    others = [(64, 64, 3, 3), (64, 64, 3, 3), (64, 64, 1, 1)]
    assert encoder == [*first, *others, *others, (512, 64, 4, 4), (64, 512)]
    decoder = model.joint.decode
    assert decoder.weight.shape == (4 * 784, 32) and decoder.latent.weight.shape == (64, 4, 7, 7)
    assert decoder.pixels.weight.shape == (64, 1, 4, 7)
    body = [p.shape for p in decoder.blocks[0].parameters() if p.ndim > 1]
    assert body == [(32, 64, 1, 1), (32, 32, 4, 7), (64, 32, 1, 1)]
    assert model.eval().encoder(torch.zeros(3, 784)).noise(2).shape == (2, 3, 32)


@pytest.mark.parametrize("causal", [False, True])
def test_it_starts_from_he_s_weights_by_the_maps_that_come_out(causal):
    """A variance of 2 / (5^2 * 8), over 8 maps out and 2,000 in."""
    generator = torch.Generator().manual_seed(0)
    layer = CausalConvolution(2000, 8, 5, "B", generator) if causal else convolution(2000, 8, 5, generator)
    squares = layer.weight.detach().square().flatten() * (5 * 5 * 8) / 2
    assert abs(squares.mean() - 1) < 4 * math.sqrt(2 / len(squares)) and abs(layer.weight.mean()) < 1e-3


def test_other_image_sizes_are_named():
    model = build(6)
    z = torch.zeros(1, 2, 2, dtype=torch.float64)
    for call in (lambda: model.encoder(binary(2, 49)), lambda: model.joint(binary(2, 49), z)):
        with pytest.raises(InputError, match="built for images of 6 x 6 = 36 pixels, but these have 49"):
            call()
    with pytest.raises(InputError, match="square images.*data_dim is 20"):
        models.build("pixelcnn", 20)
    with pytest.raises(InputError, match="at least 3 layers.*layers is 2"):
        models.build("pixelcnn", 36, layers=2)
    with pytest.raises(InputError, match="batch_size of at least 2"):
        build(6).train().encoder(binary(1, 36))
    with pytest.raises(InputError, match="call model.eval"):
        model.train().joint.decode(z).sample()


def test_without_a_latent():
    """The bound is log p(x), one draw is enough, and training it is maximum likelihood."""
    model = pixelcnn_alone(36, generator(), maps=4, layers=4)
    x = binary(20, 36).float()
    model.eval()
    exact = model.joint.decode(torch.zeros(1, 20, 0)).log_prob(x)[0]
    torch.testing.assert_close(evaluation.log_likelihood(model, x, 1), exact.detach())
    torch.testing.assert_close(evaluation.log_likelihood(model, x, 3, chunk=2), exact.detach())
    q = model.encoder(x)
    objectives.backward(TABLEAU["elbo-score"], model.joint, q, x, q.noise(1))
    found = model.joint.decode.pixels.weight.grad
    torch.testing.assert_close(found, torch.autograd.grad(-exact.mean(), model.joint.decode.pixels.weight)[0])


def test_trains_on_made_images():
    """Stripes: a net that uses its neighbours, or z, codes them in far less than independent pixels."""
    stripes = (torch.arange(16) % 4 // 2).float()
    grey = torch.stack([stripes, 1 - stripes]).repeat(16, 1)
    split = Split(grey, None, (4, 4), "fixed")
    for model, row in (
        (models.build("pixelcnn", 16, generator=generator(), **SIZES), "elbo-path"),
        (pixelcnn_alone(16, generator(), maps=4, layers=4), "elbo-score"),
    ):
        training.fit(model, split, row, epochs=25, batch_size=16, lr=1e-2)
        values = evaluation.log_likelihood(model.eval(), grey[:2], 100, generator=generator())
        assert -values.mean() < 0.2 * 16 * math.log(2), row  # half the pixels are 1: 11 nats if independent


# --------------------------------------------------------------------------------------------------- sampling


def test_samples_follow_the_exact_probabilities():
    """16 images of 2 x 2: chi-squared at 15 degrees of freedom, a false alarm in 1e-6 of seeds; a wrong order fails."""
    decode = build(2).joint.decode
    z = torch.tensor([0.7, -1.2], dtype=torch.float64)
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
    probabilities = decode(z.expand(1, 16, 2)).log_prob(x)[0].exp().detach()
    samples = decode(z.expand(4, 1000, 2)).sample(generator()).reshape(-1, 4)

    def p_value(samples):
        counts = torch.bincount((samples @ torch.tensor([8.0, 4, 2, 1]).double()).long(), minlength=16)
        return stats.chisquare(counts, 4000 * probabilities).pvalue

    assert p_value(samples) > 1e-6
    assert p_value(samples.flip(1)) < 1e-6


def test_samples_are_reproducible_and_each_pixel_has_its_conditional():
    """The rows below change nothing: drawing with whole images and the same noise gives the same image."""
    model = build(5)
    z = torch.randn(2, 3, 2, generator=generator(4), dtype=torch.float64)
    decode = model.joint.decode
    sample = decode(z).sample(generator(5))
    assert sample.shape == (2, 3, 25) and set(sample.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(sample, decode(z).sample(generator(5)))
    assert not torch.equal(sample, decode(z).sample(generator(6)))
    g, drawn = generator(5), torch.zeros(2, 3, 25, dtype=torch.float64)
    for d in range(25):
        probability = decode(z).conditional(drawn).logits[..., d].sigmoid()
        drawn[..., d] = torch.bernoulli(probability, generator=g)
    assert torch.equal(sample, drawn)


# ----------------------------------------------------------------------------------------- batch normalisation


def gradients(function, model):
    model.zero_grad()
    function()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def both_gradients(name: str, model: models.VAE, x: torch.Tensor, k: int):
    row, eps = TABLEAU[name], model.encoder(x).noise(k, generator())
    engine = gradients(lambda: objectives.backward(row, model.joint, model.encoder(x), x, eps), model)
    reference = gradients(
        lambda: objectives.reference(row, model.joint, model.encoder(x), x, eps).mean().backward(), model
    )
    return engine, reference


def agree(pair) -> bool:
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("name", ["elbo-total", "elbo-path", "iwae-total", "iwae-path"])
@pytest.mark.parametrize("mode", [True, False])
def test_the_engine_is_its_reference_with_batch_norms(name, mode):
    model = build(5).train(mode)
    assert agree(both_gradients(name, model, binary(4, 25), 3))


def test_dreg_is_itself_in_evaluation_mode_only():
    model, x = build(5), binary(4, 25)
    assert agree(both_gradients("iwae-dreg", model, x, 3))
    assert not agree(both_gradients("iwae-dreg", model.train(), x, 3))


def buffers(model):
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("name", ["elbo-total", "elbo-path"])
def test_running_statistics_move_once_a_step(name):
    """As far as one plain pass moves them; a second pass through the encoder itself moves them again."""
    x = binary(4, 25)
    once, stepped, twice = (build(5).train() for _ in range(3))
    q = once.encoder(x)
    eps = q.noise(1, generator())
    once.joint(x, q.sample(eps))
    for model in (stepped, twice):
        objectives.backward(TABLEAU[name], model.joint, model.encoder(x), x, eps)
    for moved, plain, start in zip(buffers(stepped), buffers(once), buffers(build(5).train()), strict=True):
        torch.testing.assert_close(moved, plain)
        assert moved.ndim == 2 or not torch.equal(moved, start)  # masks stay
    stopped = stop_gradient(stepped.encoder)(x)
    assert all(torch.equal(a, b) for a, b in zip(buffers(stepped), buffers(once), strict=True))
    torch.testing.assert_close(stopped.mean, stepped.encoder(x).mean)  # in training mode: the same q, by its batch
    twice.encoder(x)
    assert any(not torch.equal(a, b) for a, b in zip(buffers(twice), buffers(once), strict=True))


def test_stopping_parameters_is_stopping_outputs():
    """One stochastic layer: d log q / dz alone is left, by either way, also through the statistics of the batch."""
    model, x = build(5).train(), binary(4, 25)
    eps = model.encoder(x).noise(2, generator())

    def loss(stop):
        posterior = model.encoder(x)
        z = posterior.sample(eps)
        return (model.joint(x, z) - stop(posterior).log_prob(z)).mean()

    outputs = gradients(lambda: loss(lambda q: q.stop_gradient()).backward(), model.encoder)
    copied = gradients(lambda: loss(lambda q: stop_gradient(model.encoder)(x)).backward(), model.encoder)
    assert agree((outputs, copied))
    live = gradients(lambda: loss(lambda q: q).backward(), model.encoder)
    assert not agree((outputs, live))


def test_path_is_unbiased_with_batch_norms():
    """Total minus path is the score, of mean 0 though images share statistics: 4,000 draws of it along one direction, a
    mean within 5 standard errors (a false alarm in 6e-7 of seeds). Negative control: its square."""
    model, x = build(4).train(), binary(4, 16)
    parameters = list(model.encoder.parameters())
    direction = [torch.randn(p.shape, generator=generator(8), dtype=p.dtype) for p in parameters]
    posterior = model.encoder(x)
    mean, log_std = posterior.mean.detach(), posterior.log_std.detach()
    along = []
    for output in (posterior.mean, posterior.log_std):  # d output along the direction, by two reverse passes
        v = torch.ones_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, parameters, v, create_graph=True, allow_unused=True)
        inner = sum((g * d).sum() for g, d in zip(pulled, direction, strict=True) if g is not None)
        along.append(torch.autograd.grad(inner, v, retain_graph=True)[0])
    eps = torch.randn(4000, *mean.shape, generator=generator(9), dtype=mean.dtype)
    score = (eps * (-log_std).exp() * along[0] + (eps.square() - 1) * along[1]).sum((1, 2))
    error = score.std() / math.sqrt(len(score))
    assert score.mean().abs() < 5 * error
    assert score.square().mean() > 5 * error


# ------------------------------------------------------------------------------------------- the experiment


def made_images(count: int = 30, side: int = 4) -> Split:
    return Split(torch.rand(count, side * side, generator=generator(11)), None, (side, side), "dynamic")


@pytest.mark.parametrize("method", ["plain", "aggressive", "sa-vae"])
def test_a_stopped_training_ends_where_an_uninterrupted_one_does(method):
    """Bit for bit, running statistics included; without them it would not."""
    recipe = replace(collapse.IMAGES, epochs=2, batch_size=10, most=3, block=2, **collapse.METHODS[method])

    def start():
        model = models.build("pixelcnn", 16, generator=generator(), **SIZES)
        return collapse.prepare(model, made_images(), made_images(10), recipe)

    whole, first, second, forgetful = (start() for _ in range(4))
    whole.run()

    def stop(training):
        if training.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    state = copy.deepcopy(first.state())
    second.load_state(copy.deepcopy(state))
    second.run()
    pairs = zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [r["nll_bound"] for r in whole.history] == [r["nll_bound"] for r in second.history]
    if method == "plain":
        start_again = models.build("pixelcnn", 16, generator=generator(), **SIZES).state_dict()
        lost = {name: start_again[name] if "running" in name else value for name, value in state["model"].items()}
        forgetful.load_state(state | {"model": lost})
        forgetful.run()
        assert [r["nll_bound"] for r in whole.history] != [r["nll_bound"] for r in forgetful.history]


def test_the_grid_of_lag_omniglot():
    """Every preset has cells that build; the paper's is the published model on the published split."""
    experiment = lag.EXPERIMENTS["lag-omniglot"]
    for preset in experiment.presets:
        tasks = experiment.tasks(preset, 1)
        assert {"no-z", "plain", "sa-vae", "aggressive"} <= {task.config["method"] for task in tasks}
        for task in tasks[:2]:
            images = lag.Images("made", "", made_images(2, task.config["side"] or 8), None, made_images(2))
            model = lag.build_pixelcnn(task.config, images, generator())
            assert isinstance(model.encoder, NoLatent) == (task.config["method"] == "no-z")
    paper = experiment.tasks("paper", 1)[1].config
    published = {"data": "omniglot-burda", "valid": 2000, "latent": 32, "maps": 64, "layers": 13}
    assert published.items() <= paper.items()
    recipe = collapse.IMAGES
    assert (recipe.batch_size, recipe.block, recipe.rule, recipe.lr) == (50, 10, "five-misses", 1e-3)


def test_images_are_chosen_by_lot_and_averaged():
    split = made_images(10, 4)
    small = lag.reduced(split, 3, 2)
    assert small.grey.shape == (3, 4) and small.shape == (2, 2)
    blocks = split.grey.view(10, 2, 2, 2, 2).mean((2, 4)).flatten(1)
    assert all(any(torch.allclose(row, block) for block in blocks) for row in small.grey)
    again = lag.reduced(split, 3, 2)
    assert torch.equal(small.grey, again.grey)
    assert sorted(lag.reduced(split, None, None).grey.sum(1).tolist()) == sorted(split.grey.sum(1).tolist())


@pytest.mark.parametrize("method", ["no-z", "plain"])
def test_a_run_says_whether_it_collapsed(method, tmp_path):
    task = next(t for t in lag.EXPERIMENTS["lag-omniglot"].tasks("smoke") if t.config["method"] == method)
    measured = lag.run(task.config | {"images": 60}, 0, tmp_path, "cpu", lambda fraction: None)
    final = {m.metric: m.value for m in measured if m.at is None}
    assert {"nll", "kl", "mi", "mi_all", "au", "training_seconds", "encoder_steps"} <= final.keys()
    assert final["collapsed"] == (final["au"] == 0)
    if method == "no-z":
        assert final["kl"] == final["mi"] == final["au"] == 0
        assert final["nll"] == pytest.approx(final["nll_bound"], rel=1e-5)


# --- how far a pixel sees


def seen(side: int, layers: int) -> float:
    """Return the share of the pairs of an earlier and a later pixel whose later one depends on the earlier."""
    alone = PixelCNN(side, latent=0, maps=2, layers=layers, generator=generator()).double().eval()
    context = torch.zeros(1, 1, 2, side, side, dtype=torch.float64)

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return alone.logits(pixels.view(1, side, side), context).flatten()

    pixels = torch.rand(side**2, generator=generator(1), dtype=torch.float64)
    depends = torch.autograd.functional.jacobian(logits, pixels, vectorize=True) != 0
    assert not depends.triu().any(), "causal"
    return depends.sum().item() / math.comb(side**2, 2)


def test_how_much_of_an_image_the_decoders_see_is_what_the_page_says():
    assert lag.SMALL["layers"] == 4
    shares = [f"{seen(side, 4):.0%}".rstrip("%") for side in (8, 14, 20, 28)]
    page = (Path(__file__).resolve().parent.parent / "book" / "reproductions.ipynb").read_text("utf-8")
    first, *others, last = shares
    assert f"computes a pixel from {first}% of those before it at 8 × 8" in page
    assert f"and from {', '.join(others)} and {last}% at 14, 20 and 28 pixels a side" in page
    assert f"the paper's decoder, of 13 layers, sees {seen(28, 13):.0%} at 28 × 28" in page
