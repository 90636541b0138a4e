"""The log-likelihood against the exact one, its memory, its error bar; active units; in float64."""

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
