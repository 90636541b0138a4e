"""Small models whose bounds and gradients are known, for the tests of the estimators."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, distributions, nn
from torch.func import functional_call, grad, vmap

from vaelib.bounds import BOUNDS
from vaelib.flows import AffineCoupling, Flow, OnePassFlow, Planar, SinhArcsinh
from vaelib.models import DetachedOutputs
from vaelib.objectives import Objective
from vaelib.posteriors import (
    DiagonalGaussian,
    FactorisedBernoulli,
    FullGaussian,
    HierarchicalGaussian,
    Latent,
    Mixture,
    OneHotCategorical,
    layers_of,
    map_latent,
    standard_normal_log_prob,
)

DTYPE = torch.float64


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=DTYPE))


def normal(z: Tensor, mean: Tensor | float) -> Tensor:
    return standard_normal_log_prob(z - mean)


class Pointed(DiagonalGaussian):
    """A Laplace distribution that has all of its base's but the density."""

    def log_prob(self, z):
        return distributions.Laplace(self.mean, self.log_std.exp()).log_prob(z).sum(-1)


class Remade(nn.Module):
    """A network with something made of what it returns."""

    def __init__(self, network, make):
        super().__init__()
        self.network, self.make = network, make

    def forward(self, z):
        return self.make(self.network(z))


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


class ChainJoint(nn.Module):
    """p(z_L) = N(0, 1), p(z_l | z_{l+1}) = N(theta z_{l+1}, 1), p(x | z_1) = N(z_1, 1); z says how deep it is."""

    def __init__(self, theta: float = 1.0) -> None:
        super().__init__()
        self.theta = parameter(theta)

    def forward(self, x, z):
        layers = [normal(here, self.theta * above) for here, above in pairwise(z)]
        return standard_normal_log_prob(z[-1]) + sum(layers) + normal(x, z[0])


class AffineGaussian(nn.Module):
    """q(z2 | z1) = N(a z1 + b, exp(log_std)^2)."""

    def __init__(self, a: float, b: float, log_std: float) -> None:
        super().__init__()
        self.a, self.b, self.log_std = parameter(a), parameter(b), parameter(log_std)

    def forward(self, z1):
        mean = self.a * z1 + self.b
        return DiagonalGaussian(mean, self.log_std.expand_as(mean))


class ChainEncoder(nn.Module):
    """q(z1 | x) = N(mean, exp(log_std)^2), then the layers above; exact for x = 1 and theta = 1 with :meth:`exact`."""

    posterior = HierarchicalGaussian

    def __init__(self, mean=0.0, log_std=0.0, above=((0.9, 0.3, 0.0),)) -> None:
        super().__init__()
        self.mean, self.log_std = parameter(mean), parameter(log_std)
        self.above = nn.ModuleList(AffineGaussian(*layer) for layer in above)

    @classmethod
    def of_depth(cls, depth: int):
        return cls(above=((0.9, 0.3, 0.0),) * (depth - 1))

    @classmethod
    def exact(cls, depth: int = 2):
        """The variance of z_l under the prior is v = depth, depth - 1, ..., 1."""
        above = [(v / (v + 1), 0.0, 0.5 * math.log(v / (v + 1))) for v in range(depth - 1, 0, -1)]
        first = depth / (depth + 1)
        return cls(first, 0.5 * math.log(first), above)

    def forward(self, x):
        mean = self.mean.expand_as(x)
        return self.posterior(DiagonalGaussian(mean, self.log_std.expand_as(mean)), tuple(self.above))


class DetachedChainEncoder(ChainEncoder):
    """The wrong way to stop several layers: hold the means and scales above constant, not their parameters."""

    posterior = DetachedOutputs


TwoLayerJoint, TwoLayerEncoder, DetachedTwoLayerEncoder = ChainJoint, ChainEncoder, DetachedChainEncoder

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


# --- one of every posterior -------------------------------------------------------------------------------------------


class Leaves:
    """Random parameters of posteriors, and the modules inside them, which are remembered in ``parameters``."""

    def __init__(self, dtype: torch.dtype = DTYPE, seed: int = 0) -> None:
        self.dtype, self.generator, self.parameters = dtype, torch.Generator().manual_seed(seed), []

    def __call__(self, *shape: int, spread: float = 0.4) -> Tensor:
        values = spread * torch.randn(shape, generator=self.generator, dtype=DTYPE)
        self.parameters.append(values.to(self.dtype).requires_grad_())
        return self.parameters[-1]

    def module(self, module: nn.Module) -> nn.Module:
        """Return the module with random parameters: new layers of flows do nothing."""
        with torch.no_grad():
            for p in module.to(self.dtype).parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=self.generator, dtype=DTYPE))
        self.parameters += module.parameters()
        return module

    def diagonal(self, dim: int = 2) -> DiagonalGaussian:
        return DiagonalGaussian(self(BATCH, dim), self(BATCH, dim))

    def scale_tril(self, *shape: int) -> Tensor:
        return self(*shape, 2, 2).tril(-1) + torch.diag_embed(self(*shape, 2).exp())

    def hierarchy(self, depth: int) -> HierarchicalGaussian:
        above = (self.module(AffineGaussian(0, 0, 0)) for _ in range(depth - 1))
        return HierarchicalGaussian(self.diagonal(1), tuple(above))

    def flow(self, *layers: nn.Module, context: int = 0) -> Flow:
        layers = self.module(nn.ModuleList(layers))
        return Flow(self.diagonal(), layers, self(BATCH, context) if context else None)


BATCH = 3


def couplings(context: int = 0) -> list[nn.Module]:
    return [AffineCoupling(2, (4,), context) for _ in range(2)]


def zuko_flow(leaf: Leaves, name: str) -> distributions.Distribution:
    """What a flow of zuko gives for the context of each observation."""
    import zuko

    flow = leaf.module(getattr(zuko.flows, name)(2, 2, transforms=2, hidden_features=(4,)).to(DTYPE))
    return flow(leaf(BATCH, 2))


CONTINUOUS = {
    "diagonal": lambda leaf: leaf.diagonal(),
    "full, shared": lambda leaf: FullGaussian(leaf(BATCH, 2), leaf.scale_tril()),
    "full": lambda leaf: FullGaussian(leaf(BATCH, 2), leaf.scale_tril(BATCH)),
    "hierarchy of 1": lambda leaf: leaf.hierarchy(1),
    "hierarchy of 2": lambda leaf: leaf.hierarchy(2),
    "hierarchy of 4": lambda leaf: leaf.hierarchy(4),
    "mixture": lambda leaf: Mixture((leaf.diagonal(), leaf.diagonal()), leaf(2, BATCH)),
    "mixture of full": lambda leaf: Mixture(
        tuple(FullGaussian(leaf(BATCH, 2), leaf.scale_tril(BATCH)) for _ in range(3)), leaf(3, BATCH)
    ),
    "couplings": lambda leaf: leaf.flow(*couplings()),
    "couplings that see x": lambda leaf: leaf.flow(*couplings(context=2), context=2),
    "sinh-arcsinh": lambda leaf: leaf.flow(SinhArcsinh(*torch.zeros(4, 2))),
    "torch Normal": lambda leaf: distributions.Normal(leaf(BATCH, 2), leaf(BATCH, 2).exp()),
    "torch Independent": lambda leaf: distributions.Independent(
        distributions.Normal(leaf(BATCH, 2), leaf(BATCH, 2).exp()), 1
    ),
    "torch MultivariateNormal": lambda leaf: distributions.MultivariateNormal(
        leaf(BATCH, 2), scale_tril=leaf.scale_tril(BATCH)
    ),
    "torch LowRankMultivariateNormal": lambda leaf: distributions.LowRankMultivariateNormal(
        leaf(BATCH, 2), leaf(BATCH, 2, 1), leaf(BATCH, 2).exp()
    ),
    "torch MixtureSameFamily": lambda leaf: distributions.MixtureSameFamily(
        distributions.Categorical(logits=leaf(BATCH, 3)),
        distributions.Independent(distributions.Normal(leaf(BATCH, 3, 2), leaf(BATCH, 3, 2).exp()), 1),
    ),
    "torch mixture of MultivariateNormal": lambda leaf: distributions.MixtureSameFamily(
        distributions.Categorical(logits=leaf(BATCH, 2)),
        distributions.MultivariateNormal(leaf(BATCH, 2, 2), scale_tril=leaf.scale_tril(BATCH, 2)),
    ),
    "zuko autoregressive": lambda leaf: zuko_flow(leaf, "MAF"),
    "zuko couplings": lambda leaf: zuko_flow(leaf, "RealNVP"),
}
ONE_PASS = {
    "one-pass couplings": lambda leaf: OnePassFlow(leaf.flow(*couplings())),
    "one-pass sinh-arcsinh": lambda leaf: OnePassFlow(leaf.flow(SinhArcsinh(*torch.zeros(4, 2)))),
    "one-pass planar": lambda leaf: OnePassFlow(leaf.flow(Planar(torch.zeros(2), torch.zeros(2), torch.zeros(())))),
}
DISCRETE = {
    "bits": lambda leaf: FactorisedBernoulli(leaf(BATCH, 3)),
    "choices": lambda leaf: OneHotCategorical(leaf(BATCH, 2, 3)),
    "torch Bernoulli": lambda leaf: distributions.Bernoulli(logits=leaf(BATCH, 3)),
    "torch OneHotCategorical": lambda leaf: distributions.OneHotCategorical(logits=leaf(BATCH, 3)),
}
POSTERIORS = CONTINUOUS | ONE_PASS | DISCRETE
"""One of every family, of three observations: ``POSTERIORS[name](Leaves())``."""


class Normals(nn.Module):
    """An encoder of diagonal Gaussians that returns them as PyTorch has them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        q = self.encoder(x)
        return distributions.Normal(q.mean, q.log_std.exp())


def is_mixture(name: str) -> bool:
    return "ixture" in name


class Target(nn.Module):
    """A log p(x, z) for every latent of :data:`POSTERIORS`, in the same dtype: it pulls z to theta x."""

    def __init__(self, dtype: torch.dtype = DTYPE) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.8], dtype=dtype))

    def forward(self, x, z):
        return -0.5 * sum((layer - self.theta * x).square().sum(-1) for layer in layers_of(z))
