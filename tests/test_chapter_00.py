"""Negative controls of chapter 0: each of its ways to be wrong about a gradient is refused."""

import pytest
import torch

from vaelib import checks


@pytest.fixture(scope="module")
def eps():
    return torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_wrong_derivative_of_the_second_moment_is_refused(eps):
    """Of E[z^2], z ~ N(1, 1): the score with its sign turned, its square, and nothing where a gradient should be."""
    z = 1 + eps
    checks.unbiased(z**2 * (z - 1), 2.0)
    checks.unbiased(2 * z, 2.0)
    for wrong in (z**2 * (1 - z), z**2 * (z - 1) ** 2, z, 0 * z):
        with pytest.raises(AssertionError):
            checks.unbiased(wrong, 2.0)
