"""The log-likelihood against the exact one, its memory, its error bar; active units; in float64."""

import copy

import pytest
import torch

from vaelib import evaluation, models
from vaelib.errors import InputError
from vaelib.evaluation import StreamingLogMeanExp


@pytest.fixture
def toy():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    joint = models.ppca(x, 2)
    encoder = models.exact_encoder(joint)
    return models.VAE(joint, encoder, binary=False), x


def test_the_exact_encoder_gives_the_exact_value_at_once(toy):
    model, x = toy
    value, error = evaluation.log_likelihood(model, x, samples=3, chunk=2, return_standard_error=True)
    torch.testing.assert_close(value, model.joint.log_marginal(x).detach())
    assert error.max() < 1e-6


def test_an_inexact_encoder_converges_and_its_error_bar_is_honest(toy):
    """Of 30 observations the estimate is within 4 standard errors in all; with a broken weight it is not."""
    model, x = toy
    with torch.no_grad():
        model.encoder.log_std += 0.4
        model.encoder.bias += 0.1
    generator = torch.Generator().manual_seed(1)
    value, error = evaluation.log_likelihood(model, x, 20_000, 500, generator, return_standard_error=True)
    exact = model.joint.log_marginal(x).detach()
    assert ((value - exact).abs() < 4 * error).all() and error.max() < 0.05
    spread = torch.stack(
        [evaluation.log_likelihood(model, x, 200, 200, torch.Generator().manual_seed(s)) for s in range(200)]
    ).std(0)
    _, predicted = evaluation.log_likelihood(model, x, 20_000, 500, generator, return_standard_error=True)
    torch.testing.assert_close(predicted * 10, spread, rtol=0.3, atol=0)  # 4 x the 5 % error of a standard deviation
    model.joint.forward = lambda x, z: model.joint.log_prior(z) + 1.1 * model.joint.log_likelihood(x, z)
    value, error = evaluation.log_likelihood(model, x, 20_000, 500, generator, return_standard_error=True)
    assert ((value - exact).abs() > 4 * error).all()


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_chunks_do_not_change_the_value(chunk):
    log_w = 50 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_w[3, 0] = -torch.inf
    log_w[:, 1] -= 10_000
    log_w[:2, 2] = -torch.inf
    stream = StreamingLogMeanExp()
    for part in log_w.split(chunk):
        stream.add(part)
    torch.testing.assert_close(stream.value, log_w.logsumexp(0) - torch.tensor(100.0).double().log())
    w = log_w.softmax(0)
    torch.testing.assert_close(stream.standard_error, (w.square().sum(0) - 0.01).clamp_min(0).sqrt())


def test_memory_does_not_grow_with_the_number_of_samples(toy):
    """The largest tensor that the model is ever given is [chunk, batch_size, D]."""
    model, x = toy
    seen = []
    model.joint.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].shape))
    evaluation.log_likelihood(model, x, samples=200, chunk=64, batch_size=8)
    assert max(shape.numel() for shape in seen) == 64 * 8 * 2
    assert sum(shape[0] for shape in seen if shape[1] == 8) == 3 * 200


def test_bad_numbers_are_named(toy):
    for kwargs in ({"samples": 0}, {"chunk": 0}, {"batch_size": -1}):
        with pytest.raises(InputError, match=f"{next(iter(kwargs))} must be at least 1"):
            evaluation.log_likelihood(*toy, **kwargs)


def test_active_units_counts_layers_and_sees_collapse(toy):
    model, x = toy
    assert evaluation.active_units(model.encoder, x) == [2]
    with torch.no_grad():
        model.encoder.weight[1] = 0.0
    assert evaluation.active_units(model.encoder, x) == [1]
    assert evaluation.active_units(model.encoder, x, batch_size=7) == [1]
    deep = models.build("mlp-2", 6, latent=5, latent2=3).double()
    assert evaluation.active_units(deep.encoder, x, threshold=-1.0) == [5, 3]
    assert evaluation.active_units(deep.encoder, x, threshold=1e9) == [0, 0]


def gaussian_encoder(log_stds, x):
    """q(z given x) = N(x, sigma^2): with x ~ N(0, 1) in each dimension, I = sum_d 1/2 log(1 + 1 / sigma_d^2)."""
    dim = x.shape[1]
    scale = torch.tensor(log_stds, dtype=x.dtype)
    encoder = models.LinearEncoder(torch.eye(dim, dtype=x.dtype), torch.zeros(dim, dtype=x.dtype), scale)
    return encoder, 0.5 * (1 + (-2 * scale).exp()).log().sum().item()


@pytest.fixture
def normal():
    return torch.randn(1500, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("log_stds", [(1.0, 2.0), (0.0, 0.5), (-1.0, 0.0)])
def test_mutual_information_is_the_closed_form(log_stds, normal):
    """Where I is well below the caps both estimates agree with it; with another scale than the encoder's they do not.

    Over 8 repetitions the mean is within 5 standard errors (t with 7 degrees of freedom: wrong once in 600), and 0.03
    nats for what the finite set adds: its own aggregate is not the population's.
    """
    encoder, exact = gaussian_encoder(log_stds, normal)
    generator = torch.Generator().manual_seed(0)
    for batch_size, slack in ((None, 0.03), (500, 0.03)):
        draws = torch.tensor([evaluation.mutual_information(encoder, normal, batch_size, generator) for _ in range(8)])
        error = draws.std() / 8**0.5
        assert (draws.mean() - exact).abs() < 5 * error + slack
        _, other = gaussian_encoder([s - 0.7 for s in log_stds], normal)
        assert (draws.mean() - other).abs() > 5 * error + slack


def test_on_the_linear_vae_s_exact_posterior_too(toy):
    """The aggregate of the exact posterior is the prior, so I = E KL(q || p): on data that the model itself makes."""
    model, _ = toy
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1500, 2, generator=generator, dtype=torch.float64)
    x = model.joint.decode(z).sample(generator).detach()
    model.encoder = models.exact_encoder(model.joint)
    exact = model.encoder(x).kl().mean().item()
    found = evaluation.mutual_information(model.encoder, x, None, generator)
    assert 0.3 < exact < 3 and abs(found - exact) < 0.1


def test_the_minibatch_estimate_is_capped_and_the_whole_set_s_is_not(normal):
    """I = 5.3 nats: with batches of 32 the estimate sticks below log 32 = 3.47, with the whole set it does not."""
    encoder, exact = gaussian_encoder((-2.65, -2.65), normal)
    generator = torch.Generator().manual_seed(0)
    whole = evaluation.mutual_information(encoder, normal, None, generator)
    assert 5.2 < exact < 5.4 and abs(whole - exact) < 0.3
    for batch_size in (32, 50):
        draws = torch.tensor([evaluation.mutual_information(encoder, normal, batch_size, generator) for _ in range(8)])
        cap = torch.tensor(float(batch_size)).log()
        assert draws.mean() < cap + 5 * draws.std() / 8**0.5 and draws.mean() > cap - 0.3 and draws.mean() < exact - 1


def test_no_information_is_none(normal):
    encoder, _ = gaussian_encoder((0.0, 0.0), normal)
    with torch.no_grad():
        encoder.weight.zero_()
    assert evaluation.mutual_information(encoder, normal) == pytest.approx(0, abs=0.06)


def test_chunks_do_not_change_mutual_information(normal):
    encoder, _ = gaussian_encoder((-1.0, 0.0), normal)
    values = [
        evaluation.mutual_information(encoder, normal[:70], 30, torch.Generator().manual_seed(0), chunk=chunk)
        for chunk in (30, 1000)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_mutual_information_wants_something_to_compare(normal):
    encoder, _ = gaussian_encoder((0.0, 0.0), normal)
    for x, batch_size in ((normal[:1], None), (normal, 1)):
        with pytest.raises(InputError, match="needs 2 observations at least"):
            evaluation.mutual_information(encoder, x, batch_size)
    mixture = models.build("mlp-1-mixture", 2, hidden=4, latent=2, components=2).double()
    with pytest.raises(InputError, match="Mixture has no entropy in closed form"):
        evaluation.mutual_information(mixture.encoder, normal[:4])


def test_a_model_is_evaluated_in_evaluation_mode_and_left_in_its_own():
    """A PixelCNN normalises by its batch in training mode, and would learn from what it is asked."""
    model = models.build(
        "pixelcnn", 16, generator=torch.Generator().manual_seed(0), latent=2, maps=4, layers=3, hidden=8
    )
    x = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)).round()
    model.joint.decode.first.eval()  # one part by itself
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]

    def ask():
        value = evaluation.log_likelihood(model, x, 10, 5, torch.Generator().manual_seed(2))
        units = evaluation.active_units(model.encoder, x[:1])
        return value, units, evaluation.mutual_information(model.encoder, x, generator=torch.Generator().manual_seed(3))

    found = ask()
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    model.eval()
    torch.testing.assert_close(found, ask())
