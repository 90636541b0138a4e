"""Likelihoods against torch.distributions; in float64."""

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal

from vaelib.errors import InputError
from vaelib.likelihoods import Bernoulli, DiscretisedLogistic, Gaussian


def test_bernoulli_agrees_with_torch_and_survives_extreme_logits():
    logits = torch.tensor([-800.0, -3.0, 0.0, 2.5, 800.0], dtype=torch.float64).expand(3, 2, 5).clone().requires_grad_()
    for x in (torch.zeros(2, 5), torch.ones(2, 5), torch.tensor([[0.0, 1, 0, 1, 0], [1, 0, 1, 0, 1]])):
        x = x.double()
        mine = Bernoulli(logits).log_prob(x)
        torch.testing.assert_close(mine, TorchBernoulli(logits=logits).log_prob(x).sum(-1))
        assert torch.autograd.grad(mine.sum(), logits)[0].isfinite().all()


def test_gaussian_agrees_with_torch_with_one_scale_and_with_many():
    generator = torch.Generator().manual_seed(0)
    x, mean = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(2, 5), (3, 2, 5)])
    for log_std in (torch.tensor(-0.4).double(), torch.randn(5, generator=generator, dtype=torch.float64)):
        expected = Normal(mean, log_std.exp()).log_prob(x).sum(-1)
        torch.testing.assert_close(Gaussian(mean, log_std).log_prob(x), expected)


def test_samples_have_the_right_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-2.0, 0.0, 1.0]).expand(20_000, 1, 3)
    draws = Bernoulli(logits).sample(generator)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((draws.mean(0) - logits[0].sigmoid()).abs() < 4 * draws.std(0) / 20_000**0.5).all()
    draws = Gaussian(logits, torch.tensor(0.3)).sample(generator)
    assert ((draws.mean(0) - logits[0]).abs() < 4 * draws.std(0) / 20_000**0.5).all()
    assert (draws.std(0) / torch.tensor(0.3).exp() - 1).abs().max() < 4 / (2 * 20_000) ** 0.5


@pytest.mark.parametrize(
    "x",
    [[0.0, 255.0], [0.0, 0.5], [-1.0, 1.0], [0.0, float("nan")], [float("inf"), 1.0], [0.0, 1.0 + 1e-6], [0.0, 1e-30]],
    ids=str,
)
def test_pixels_that_are_not_0_or_1_have_no_bernoulli_density(x):
    """Levels, grey values, NaN: log p of them would be a number, and bound nothing."""
    likelihood = Bernoulli(torch.zeros(3, 1, 2))
    with pytest.raises(InputError, match="for pixels of 0 and 1, but these go from"):
        likelihood.log_prob(torch.tensor([x]))
    torch.testing.assert_close(likelihood.log_prob(torch.tensor([[0.0, 1.0]])), torch.full((3, 1), -2 * 0.6931472))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long])
def test_pixels_that_are_whole_numbers_are_told_what_to_be(dtype):
    with pytest.raises(InputError, match=r"must be floating-point numbers, but x is .*: use x.to\(torch.float32\)"):
        Bernoulli(torch.zeros(3, 1, 2)).log_prob(torch.ones(1, 2, dtype=dtype))


@pytest.mark.parametrize("make", [Bernoulli, lambda m: Gaussian(m, torch.zeros(()))], ids=["Bernoulli", "Gaussian"])
def test_another_number_of_pixels_is_refused(make):
    """One pixel would broadcast over all, and so would one output of the decoder over all pixels."""
    for output, pixels in ((5, 1), (1, 5), (5, 4)):
        with pytest.raises(InputError, match=f"makes {output} pixels, but x has {pixels}: build .* data_dim={pixels}"):
            make(torch.zeros(3, 2, output)).log_prob(torch.ones(2, pixels))


def test_the_density_of_grey_values_is_at_the_values_themselves():
    """...not at rounded ones: a scale of 0.1 tells 0.4 from 0."""
    x = torch.tensor([[0.4, 0.6]])
    expected = Normal(torch.zeros(2), 0.1).log_prob(x).sum(-1)
    torch.testing.assert_close(
        Gaussian(torch.zeros(1, 1, 2), torch.tensor(0.1).log()).log_prob(x), expected.unsqueeze(0)
    )


LEVELS = torch.arange(256, dtype=torch.float64) / 255


@pytest.mark.parametrize("log_scale", [-12.0, -5.0, -2.0, 0.0, 3.0])
@pytest.mark.parametrize("mean", [-3.0, 0.0, 0.4, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_levels_of_a_discretised_logistic_sum_to_one(mean, log_scale, dtype):
    output = torch.full((1, 256, 1), mean, dtype=dtype, requires_grad=True)
    scale = torch.tensor(log_scale, dtype=dtype, requires_grad=True)
    log_p = DiscretisedLogistic(output, scale).log_prob(LEVELS.to(dtype).unsqueeze(-1))
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=dtype))
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_p.sum(), [output, scale]))


def test_a_discretised_logistic_is_the_difference_of_its_distribution_function():
    m, s = 0.3, 0.05
    cdf = lambda x: 1 / (1 + np.exp(-(x - m) / s))  # noqa: E731
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255, [np.inf]])
    output = torch.full((1, 256, 1), m, dtype=torch.float64)
    log_p = DiscretisedLogistic(output, torch.tensor(s).double().log()).log_prob(LEVELS.unsqueeze(-1))
    torch.testing.assert_close(log_p[0], torch.from_numpy(np.diff(cdf(edges))).log(), rtol=1e-6, atol=0)


def test_draws_of_a_discretised_logistic_are_levels_with_its_probabilities():
    likelihood = DiscretisedLogistic(torch.full((100_000, 1, 1), 0.02), torch.tensor(0.01).log())
    draws = likelihood.sample(torch.Generator().manual_seed(0))
    counts = torch.bincount((255 * draws).round().long().flatten(), minlength=256) / len(draws)
    p = DiscretisedLogistic(torch.full((1, 256, 1), 0.02), torch.tensor(0.01).log()).log_prob(LEVELS.float()[:, None])
    assert ((counts - p[0].exp()).abs() < 5 * (p[0].exp() / len(draws)).sqrt() + 1e-4).all()


@pytest.mark.parametrize("x", [[0.0, 255.0], [0.5, 0.1], [-1 / 255, 0.0], [float("nan"), 0.0]], ids=str)
def test_other_levels_have_no_discretised_density(x):
    with pytest.raises(InputError, match="for the levels 0, 1/255, ..., 1, but these go from"):
        DiscretisedLogistic(torch.zeros(1, 1, 2), torch.zeros(())).log_prob(torch.tensor([x]))
