"""The log-likelihood against the exact one, its memory, its error bar; active units; in float64."""

import copy
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from vaelib import evaluation, models
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU
from vaelib.evaluation import Largest, StreamingLogMeanExp
from vaelib.models.text import lstm_vae
from vaelib.posteriors import DiagonalGaussian, Mixture, standard_normal_log_prob


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


def test_a_mixture_s_draws_count_by_their_shares(toy, monkeypatch):
    """Against the exact log p(x), within 4 standard errors in all 30; a chunk that is no multiple of 3 is made one."""
    model, x = toy
    exact, posterior = model.joint.log_marginal(x).detach(), models.exact_encoder(model.joint)

    def encode(x):
        q = posterior(x)
        parts = tuple(DiagonalGaussian(q.mean + off, q.log_std + 0.2) for off in (0.0, 0.5, -0.3))
        return Mixture(parts, torch.tensor([2.0, 0.0, -1.0], dtype=x.dtype).unsqueeze(-1).expand(3, len(x)))

    monkeypatch.setattr(model.encoder, "forward", encode)
    for chunk in (6000, 500):
        noise = torch.Generator().manual_seed(0)
        value, error = evaluation.log_likelihood(model, x, 6000, chunk, noise, return_standard_error=True)
        assert ((value - exact).abs() < 4 * error).all() and error.max() < 0.02
    few = {"batch_size": 7, "generator": torch.Generator().manual_seed(0)}
    bound = evaluation.bound_by_draws(model, TABLEAU["iwae-path"], x, 6, **few)
    few["generator"].manual_seed(0)
    torch.testing.assert_close(bound, evaluation.log_likelihood(model, x, 6, **few))  # the same numbers by another way
    with pytest.raises(InputError, match="samples must be a multiple of the mixture's 3 components, but is 10"):
        evaluation.log_likelihood(model, x, 10)


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


def test_the_mean_and_its_error():
    """Of 2, 4 and 9: a mean of 5, a variance of 13."""
    assert evaluation.mean_and_standard_error(torch.tensor([2.0, 4.0, 9.0])) == pytest.approx((5, (13 / 3) ** 0.5))


def test_impossible_draws_and_a_single_one():
    stream = StreamingLogMeanExp()
    stream.add(torch.full((2, 1), -torch.inf))
    assert stream.value == -torch.inf
    stream.add(torch.zeros(2, 1))
    torch.testing.assert_close(stream.value, torch.tensor([0.5]).log())  # two of four
    torch.testing.assert_close(stream.standard_error, torch.tensor([0.5]))
    one = StreamingLogMeanExp()
    one.add(torch.zeros(1, 3))
    assert (one.value == 0).all() and one.standard_error.isnan().all()  # one draw says nothing about its error
    broken = StreamingLogMeanExp()
    broken.add(torch.tensor([[0.0], [math.nan]]))
    assert broken.value.isnan() and broken.standard_error.isnan()


def test_equal_weights_have_no_error_in_single_precision_either():
    """The sum of squares less 1 / K: a small difference of two numbers that are nearly the same."""
    log_w = -100 + 1e-4 * torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    stream = StreamingLogMeanExp()
    stream.add(log_w)
    assert stream.value.dtype == stream.standard_error.dtype == torch.float32
    exact = log_w.double().softmax(0).square().sum(0).sub(0.01).sqrt()
    torch.testing.assert_close(stream.standard_error.double(), exact, rtol=1e-3, atol=0)
    stream = StreamingLogMeanExp()
    stream.add(1e-9 * torch.randn(30, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert (stream.standard_error < 1e-7).all()  # rounding on either side of 0 is no NaN


def test_memory_does_not_grow_with_the_number_of_samples(toy):
    """The largest tensor that the model is ever given is [chunk, batch_size, D]."""
    model, x = toy
    seen = []
    model.joint.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].shape))
    evaluation.log_likelihood(model, x, samples=200, chunk=64, batch_size=8)
    assert max(shape.numel() for shape in seen) == 64 * 8 * 2
    tried = 2 * 2  # a new joint is called twice more with two draws
    assert sum(shape[0] for shape in seen if shape[1] == 8) == 3 * 200 + tried


def test_five_thousand_draws_a_hundred_at_a_time_if_nothing_is_said(toy):
    """Of 101 observations, 100 of them together; a trial of one draw goes before each batch, one of the joint first."""
    model, x = toy
    seen = []
    model.joint.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[1].shape)))
    evaluation.log_likelihood(model, x.repeat(4, 1)[:101])
    assert Counter(seen) == {(1, 1, 2): 2, (2, 100, 2): 2, (100, 100, 2): 50, (100, 1, 2): 50}


def test_bad_numbers_are_named(toy):
    for kwargs in ({"samples": 0}, {"chunk": 0}, {"batch_size": -1}):
        with pytest.raises(InputError, match=f"{next(iter(kwargs))} must be a whole number of at least 1"):
            evaluation.log_likelihood(*toy, **kwargs)
    with pytest.raises(InputError, match=r"batch_size must .*np.uint8\(4\) of NumPy's: give 4, by .item\(\)"):
        evaluation.log_likelihood(*toy, batch_size=np.uint8(4))
    with pytest.raises(InputError, match="chunk must be a whole number of at least 1"):
        evaluation.mutual_information(toy[0].encoder, toy[1], chunk=0)


def largest(run):
    """The size of the largest tensor on the way."""
    with Largest() as seen:
        run()
    return seen.size


def heavy_models():
    """Models whose decoders make much of a draw, with six observations each."""
    generator = torch.Generator().manual_seed(0)
    short, long = [1, 3, 2] + 12 * [0], [1, *range(3, 16), 2]
    text = torch.tensor([short, short, long, short, long, long])
    language = lstm_vae(300, generator, latent=2, embedding=4, hidden=5)
    pixelcnn = models.build("pixelcnn", 36, generator=generator, latent=2, maps=8, layers=3, encoder_maps=2, hidden=4)
    images = torch.rand(6, 36, generator=generator).round()
    deep = models.build("mlp-4", 36, generator=generator, latent=8, hidden=50, hidden2=4)
    mixture = models.build("mlp-1-mixture", 36, generator=generator, latent=2, hidden=50, components=3)
    return {
        "text": (language, text),
        "pixelcnn": (pixelcnn, images),
        "deep": (deep, images),
        "mixture": (mixture, images),
    }


@pytest.mark.parametrize(("name", "limit"), [("text", 2**15), ("pixelcnn", 2**13), ("deep", 1200), ("mixture", 1200)])
def test_no_tensor_on_the_way_is_larger_than_the_limit_and_pieces_give_the_same_numbers(name, limit, monkeypatch):
    """As the first sentence is a short one, what it takes says little of the others."""
    model, x = heavy_models()[name]

    def ask():
        noise = torch.Generator().manual_seed(1)
        return evaluation.log_likelihood(model, x, 30, 12, noise, return_standard_error=True)

    whole, unbounded = ask(), largest(ask)
    monkeypatch.setattr(evaluation, "AT_ONCE", limit)
    pieces = ask()
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert largest(ask) <= limit < unbounded / 1.5
    calls = []
    handle = model.joint.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[0]))
    ask()
    handle.remove()
    assert len(calls) < {"text": 60, "pixelcnn": 60, "deep": 12, "mixture": 14}[name]  # however large the weights
    monkeypatch.setattr(evaluation, "AT_ONCE", 1)  # one draw of one observation is the least that can be done
    torch.testing.assert_close(ask()[0], whole[0], rtol=1e-5, atol=1e-5)


MEMORY = """
import resource, sys, torch
from vaelib import evaluation, models
from vaelib.models.text import lstm_vae
generator = torch.Generator().manual_seed(0)
if sys.argv[1] == "text":
    words = torch.randint(3, 10_002, (100, 77), generator=generator)
    x = torch.cat([torch.ones(100, 1, dtype=torch.long), words, torch.full((100, 1), 2)], 1)
    x[0, 2:] = torch.tensor([2] + [0] * 76)
    model = lstm_vae(10_002, generator, latent=32, embedding=16, hidden=16, dropout=0.0)
else:
    x = torch.rand(100, 784, generator=generator).round()
    model = models.build("pixelcnn", 784, generator=generator, latent=2, maps=16, layers=3, encoder_maps=2, hidden=4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(1.5 * 2**30),) * 2)
joint, calls = model.joint.forward, []
def forward(x, z):  # the trial and the first piece show the memory
    calls.append(z.shape)
    return joint(x, z) if len(calls) < 3 else torch.zeros(z.shape[:2])
model.joint.forward = forward
values = evaluation.log_likelihood(model, x, samples=100, generator=generator)
print(max(shape[0] * shape[1] for shape in calls), bool(values.isfinite().all()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and counts memory as Linux does")
@pytest.mark.parametrize("model", ["text", "images"])
def test_the_defaults_fit_in_memory(model):
    """100 observations by 100 draws, of which one tensor would have 30 GB (sentences) or five of 0.5 GB each be alive
    at once (images): in 1.5 GB more than what the libraries take."""
    command = [sys.executable, "-c", MEMORY, model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    most, finite = done.stdout.split()
    assert finite == "True" and 1 < int(most) < 10_000


def test_shapes_that_would_broadcast_are_refused():
    """With as many draws as observations [K, B, 1] against [K, B] makes a square of wrong numbers."""
    x = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    encoder = models.LinearEncoder(torch.full((1, 1), 0.5), torch.zeros(1), torch.full((1,), -0.3))

    class Unsummed(DiagonalGaussian):
        def log_prob_of_sample(self, z, eps):
            return -0.5 * eps.square()

        def sample_and_log_prob(self, eps):
            z = self.sample(eps)
            return z, self.log_prob_of_sample(z, eps)

        def log_prob(self, z):
            return -0.5 * self.whiten(z - self.mean).square()

        def entropy(self):
            return super().entropy()

    def joint(x, z):
        return standard_normal_log_prob(z) + standard_normal_log_prob(x - z)

    class Model:
        def __init__(self, joint, encoder):
            self.joint, self.encoder = joint, encoder

    def unsummed_joint(x, z):
        return -0.5 * (z.square() + (x - z).square())

    def unsummed_encoder(x):
        q = encoder(x)
        return Unsummed(q.mean, q.log_std)

    assert evaluation.log_likelihood(Model(joint, encoder), x, 12).shape == (6,)  # a model need not be a module
    for samples in (6, 12, 1):
        with pytest.raises(InputError, match=r"joint\(x, z\) must return .* of the shape \[K, B\]"):
            evaluation.log_likelihood(Model(unsummed_joint, encoder), x, samples)
        with pytest.raises(InputError, match=r"log_prob\(z\) must return .* of the shape \[K, B\]"):
            evaluation.log_likelihood(Model(joint, unsummed_encoder), x, samples)
    with pytest.raises(InputError, match=r"log_prob\(z\) must return .* of the shape \[K, B\] = \[6, 6\]"):
        evaluation.mutual_information(unsummed_encoder, x)
    one_for_all = Model(joint, lambda x: encoder(x[:1]))
    with pytest.raises(InputError, match=r"log q\(z\) of the shape \[K, B\] = \[4, 6\]"):
        evaluation.log_likelihood(one_for_all, x, 4)


def test_grey_values_have_no_bernoulli_density():
    model = models.build("mlp-1", 16, generator=torch.Generator().manual_seed(0), hidden=8, latent=3)
    binary = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)).round()
    assert (evaluation.log_likelihood(model, binary, 10) < 0).all()
    off = [binary.clone().index_fill_(1, torch.tensor([3]), value) for value in (math.nan, math.inf)]
    for wrong in (binary * 255, 2 * binary - 1, 0.7 * binary, *off):
        with pytest.raises(InputError, match="pixels of 0 and 1"):
            evaluation.log_likelihood(model, wrong, 10)


def test_nothing_is_concluded_from_nothing(toy):
    model, x = toy
    with pytest.raises(InputError, match=r"no observations to evaluate: x has the shape \[0, 6\]"):
        evaluation.log_likelihood(model, x[:0])
    assert evaluation.log_likelihood(model, x.index_fill(0, torch.tensor([3]), math.nan), 5)[3].isnan()
    for wrong in (x[:0], x.index_fill(0, torch.tensor([3]), math.nan)):  # not: no unit is active
        with pytest.raises(InputError, match="it is not finite"):
            evaluation.active_units(model.encoder, wrong)
    with pytest.raises(InputError, match="needs 2 observations at least"):
        evaluation.mutual_information(model.encoder, x[:0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_values_have_the_data_s_precision(toy, dtype):
    model, x = toy
    model, x = model.to(dtype), x.to(dtype)
    for values in evaluation.log_likelihood(model, x, 3, return_standard_error=True):
        assert values.dtype == dtype


@pytest.mark.parametrize(
    "name", ["linear", "mlp-1", "mlp-2", "mlp-4", "mlp-1-mixture", "mlp-1-flow", "cosine", "guided"]
)
def test_one_of_everything(name):
    sizes = {"hidden": 1, "hidden2": 1, "latent": 1, "latent2": 1, "components": 1, "features": 1, "flow_hidden": 1}
    known = models.MODELS[name].__kwdefaults__
    if name == "mlp-1-flow":
        sizes["latent"] = 2  # a coupling needs two halves
    model = models.build(
        name, 1, generator=torch.Generator().manual_seed(0), **{key: sizes[key] for key in sizes.keys() & known}
    )
    x = torch.ones(1, 1)
    value, error = evaluation.log_likelihood(model, x, 1, 1, return_standard_error=True)
    assert value.shape == (1,) and value.isfinite() and error.isnan()
    assert evaluation.active_units(model.encoder, x) == [0] * (1 if name not in ("mlp-2", "mlp-4") else int(name[-1]))


def test_active_units_counts_layers_and_sees_collapse(toy):
    model, x = toy
    assert evaluation.active_units(model.encoder, x) == [2]
    with torch.no_grad():
        model.encoder.weight[1] = 0.0
    assert evaluation.active_units(model.encoder, x) == [1]
    assert evaluation.active_units(model.encoder, x, batch_size=7) == [1]
    deep = models.build("mlp-2", 6, latent=5, latent2=3).double()
    assert evaluation.active_units(deep.encoder, x, threshold=0.0) == [5, 3]
    with pytest.raises(InputError, match="threshold must be a number of at least 0"):  # nothing is above it
        evaluation.active_units(deep.encoder, x, threshold=math.nan)
    assert evaluation.active_units(deep.encoder, x, threshold=1e9) == [0, 0]


def test_active_units_are_counted_by_their_variance():
    """Means of variance 0.0081 and 0.0121 about 5, below and above the threshold of 0.01."""
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).unsqueeze(-1)
    mean = 5 + sign * torch.tensor([0.09, 0.11])
    assert evaluation.active_units(lambda x: DiagonalGaussian(mean, torch.zeros(4, 2)), torch.ones(4, 1)) == [1]


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


def test_mutual_information_is_the_mean_over_its_own_definition(normal):
    """Term by term with torch.distributions, for minibatches of different sizes: 30, 30 and 10."""
    encoder, _ = gaussian_encoder((-1.0, 0.0), normal)
    x, total = normal[:70], 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in x.split(30):
        q = encoder(batch)
        z = q.sample(q.noise(1, generator))[0]
        normals = torch.distributions.Normal(q.mean, q.log_std.exp())
        for i, own in enumerate(z):
            others = normals.log_prob(own).sum(-1)
            total += -normals.entropy()[i].sum() - others.exp().mean().log()
    found = evaluation.mutual_information(encoder, x, 30, torch.Generator().manual_seed(0))
    assert found == pytest.approx((total / 70).item(), rel=1e-10)


def test_a_narrow_posterior_knows_its_own_samples(normal):
    """In float32 at sigma = 2e-9 a sample of a mean near 1 says nothing of its noise; I is log N, as for all q."""
    x = normal[:200]
    exact = math.log(200)
    for dtype in (torch.float64, torch.float32):
        encoder, _ = gaussian_encoder((-20.0, -20.0), x.to(dtype))
        generator = torch.Generator().manual_seed(0)
        found = torch.tensor([evaluation.mutual_information(encoder, x.to(dtype), None, generator) for _ in range(8)])
        assert (found.mean() - exact).abs() < 5 * found.std() / 8**0.5 + 0.01


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


def test_an_entropy_that_is_the_same_for_all_counts_for_each():
    class OneEntropy(DiagonalGaussian):
        def entropy(self):
            return super().entropy()[0]

    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    found = [
        evaluation.mutual_information(
            lambda x, kind=kind: kind(x, torch.zeros_like(x)), x, generator=torch.Generator().manual_seed(1)
        )
        for kind in (DiagonalGaussian, OneEntropy)
    ]
    assert found[0] == pytest.approx(found[1]) and found[0] > 0.1
