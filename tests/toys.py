"""Small models whose bounds and gradients are known, for the tests of the estimators."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from vaelib.bounds import BOUNDS
from vaelib.models import DetachedOutputs
from vaelib.objectives import Objective
from vaelib.posteriors import DiagonalGaussian, HierarchicalGaussian, Latent, map_latent, standard_normal_log_prob

DTYPE = torch.float64


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=DTYPE))


def normal(z: Tensor, mean: Tensor | float) -> Tensor:
    return standard_normal_log_prob(z - mean)


class OneLayerJoint(nn.Module):
    """p(z) = N(0, 1), p(x | z) = N(theta z, 1)."""

    def __init__(self, theta: float = 1.3) -> None:
        super().__init__()
        self.theta = parameter(theta)

    def forward(self, x, z):
        return standard_normal_log_prob(z) + normal(x, self.theta * z)


class OneLayerEncoder(nn.Module):
    """q(z | x) = N(slope x + mean, exp(log_std)^2)."""

    def __init__(self, slope: float = 0.1, mean: float = 0.4, log_std: float = -0.3) -> None:
        super().__init__()
        self.slope, self.mean, self.log_std = parameter(slope), parameter(mean), parameter(log_std)

    def forward(self, x):
        mean = self.slope * x + self.mean
        return DiagonalGaussian(mean, self.log_std.expand_as(mean))


class TwoLayerJoint(nn.Module):
    """p(z2) = N(0, 1), p(z1 | z2) = N(theta z2, 1), p(x | z1) = N(z1, 1)."""

    def __init__(self, theta: float = 1.0) -> None:
        super().__init__()
        self.theta = parameter(theta)

    def forward(self, x, z):
        z1, z2 = z
        return standard_normal_log_prob(z2) + normal(z1, self.theta * z2) + normal(x, z1)


class AffineGaussian(nn.Module):
    """q(z2 | z1) = N(a z1 + b, exp(log_std)^2)."""

    def __init__(self, a: float, b: float, log_std: float) -> None:
        super().__init__()
        self.a, self.b, self.log_std = parameter(a), parameter(b), parameter(log_std)

    def forward(self, z1):
        mean = self.a * z1 + self.b
        return DiagonalGaussian(mean, self.log_std.expand_as(mean))


class TwoLayerEncoder(nn.Module):
    """q(z1 | x) = N(mean, exp(log_std)^2), then the layer above; exact for x = 1 with :meth:`exact`."""

    posterior = HierarchicalGaussian

    def __init__(self, mean=0.0, log_std=0.0, a=0.9, b=0.3, log_std2=0.0) -> None:
        super().__init__()
        self.mean, self.log_std, self.second = parameter(mean), parameter(log_std), AffineGaussian(a, b, log_std2)

    @classmethod
    def exact(cls):
        return cls(mean=2 / 3, log_std=0.5 * math.log(2 / 3), a=0.5, b=0.0, log_std2=0.5 * math.log(1 / 2))

    def forward(self, x):
        mean = self.mean.expand_as(x)
        return self.posterior(DiagonalGaussian(mean, self.log_std.expand_as(mean)), (self.second,))


class DetachedTwoLayerEncoder(TwoLayerEncoder):
    """The wrong way to stop two layers: hold the second layer's mean and scale constant, not its parameters."""

    posterior = DetachedOutputs


ONE_LAYER = (OneLayerJoint, OneLayerEncoder, 1, torch.tensor([[2.0]], dtype=DTYPE))
TWO_LAYERS = (TwoLayerJoint, TwoLayerEncoder, 2, torch.tensor([[1.0]], dtype=DTYPE))


def draw_noise(layers: int, shape: tuple[int, ...], generator: torch.Generator) -> Latent:
    eps = tuple(torch.randn(*shape, 1, generator=generator, dtype=DTYPE) for _ in range(layers))
    return eps if layers > 1 else eps[0]


def quadrature(layers: int, k: int, nodes: int) -> tuple[Latent, Tensor]:
    """Return Gauss-Hermite noise, the nodes standing in the batch axis, ``[K, N, 1]``, and its weights ``[N]``."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    axes = [torch.tensor(points, dtype=DTYPE)] * (layers * k)
    masses = [torch.tensor(weights / weights.sum(), dtype=DTYPE)] * (layers * k)
    grid = torch.cartesian_prod(*axes).reshape(-1, layers * k)
    weight = torch.cartesian_prod(*masses).reshape(-1, layers * k).prod(1)
    eps = tuple(layer.unsqueeze(-1) for layer in grid.T.reshape(layers, k, -1))
    return (eps if layers > 1 else eps[0]), weight


def exact_gradient(bound: str, joint, encoder, x, eps, weight) -> list[Tensor]:
    """Differentiate the quadrature of the bound itself: no estimator, no stopped gradient."""
    x = x.expand(len(weight), -1)
    posterior = encoder(x)
    z = posterior.sample(eps)
    value = weight @ BOUNDS[bound](joint(x, z) - posterior.log_prob(z))
    return list(torch.autograd.grad(value, [*joint.parameters(), *encoder.parameters()]))


def expected_gradient(estimator, joint, encoder, x, eps, weight) -> list[Tensor]:
    """Return the estimator's expectation by quadrature over its noise."""
    value = -weight @ Objective(estimator, joint, encoder)(x.expand(len(weight), -1), eps)
    return list(torch.autograd.grad(value, [*joint.parameters(), *encoder.parameters()]))


def gradient_draws(estimator, joint, encoder, x, eps) -> Tensor:
    """Return the gradient of the bound for each draw of ``eps`` ``[S, K, B, 1]``, parameters in a row: ``[S, P]``."""
    objective = Objective(estimator, joint, encoder)

    def loss(parameters, eps):
        return -functional_call(objective, parameters, (x, eps)).mean()

    dims = map_latent(lambda _: 0, eps) if isinstance(eps, tuple) else 0
    gradients = vmap(grad(loss), in_dims=(None, dims))(dict(objective.named_parameters()), eps)
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
