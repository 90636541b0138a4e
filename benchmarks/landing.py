"""Measure whose gradients stick the landing: the variance of each library's gradient at the exact posterior.

The model is p(z) = N(0, 1), p(x given z) = N(z, 1) with x = 2, and q is the posterior N(1, 1/2), so the mean gradient
in (m, log sigma) is zero. Exact variances, both parameters together: 4 for the total derivative, 1.5 with the
divergence from the prior in closed form, 0 for the path gradient. Nothing is timed. Runs in the environment of
``make bench``.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator

import torch
from rounds import finish, parser
from torch import Tensor

from vaelib import checks, gradients, models
from vaelib.posteriors import DiagonalGaussian

X, MEAN, LOG_STD = 2.0, 1.0, math.log(0.5) / 2
OBJECTIVES = ("Trace_ELBO", "TraceGraph_ELBO", "TraceMeanField_ELBO")
Found = Iterator[tuple[str, Tensor]]


def ours(draws: int) -> Found:
    one = torch.ones(1, 1, dtype=torch.float64)
    joint = models.LinearGaussian(one, 0 * one[0], 0 * one[0, 0]).requires_grad_(False)
    q = DiagonalGaussian(MEAN * one, LOG_STD * one)
    for name in ("elbo-total", "elbo-path"):
        generator = torch.Generator().manual_seed(0)
        yield name, gradients.draws(name, joint, lambda x: q, X * one, draws=draws, generator=generator)


def pyro(draws: int) -> Found:
    import pyro
    from pyro import infer
    from pyro.distributions import Normal

    def model():
        pyro.sample("x", Normal(pyro.sample("z", Normal(0.0, 1.0)), 1.0), obs=torch.tensor(X))

    def guide():
        m, log_std = (pyro.param(name, torch.tensor(value)) for name, value in (("m", MEAN), ("log_std", LOG_STD)))
        pyro.sample("z", Normal(m, log_std.exp()))

    for name in OBJECTIVES:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        objective, rows = getattr(infer, name)(), []
        for _ in range(draws // 10):  # one at a time
            objective.loss_and_grads(model, guide)
            leaves = [pyro.param(leaf).unconstrained() for leaf in ("m", "log_std")]
            rows.append(torch.stack([leaf.grad for leaf in leaves]))
            for leaf in leaves:
                leaf.grad = None
        yield name, torch.stack(rows)


def numpyro(draws: int) -> Found:
    import jax
    import numpyro
    from numpyro import infer
    from numpyro.distributions import Normal

    def model():
        numpyro.sample("x", Normal(numpyro.sample("z", Normal(0.0, 1.0)), 1.0), obs=X)

    def guide():
        m, log_std = numpyro.param("m", MEAN), numpyro.param("log_std", LOG_STD)
        numpyro.sample("z", Normal(m, jax.numpy.exp(log_std)))

    at = {"m": jax.numpy.array(MEAN), "log_std": jax.numpy.array(LOG_STD)}
    for name in OBJECTIVES:
        objective = getattr(infer, name)()

        def gradient(key, objective=objective):
            return jax.grad(lambda p: objective.loss(key, p, model, guide))(at)

        found = jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.PRNGKey(0), draws))
        yield name, torch.tensor([found["m"].tolist(), found["log_std"].tolist()]).mT


LIBRARIES = {"vaelib": ("vaelib", ours), "Pyro": ("pyro-ppl", pyro), "NumPyro": ("numpyro", numpyro)}


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "benchmark-landing")
    options.add_argument("--draws", type=int, default=20_000, help="gradients of each objective (a tenth for Pyro)")
    arguments = options.parse_args(argv)
    records = []
    for library, (package, gradients_of) in LIBRARIES.items():
        for objective, draws in gradients_of(arguments.draws):
            variance, error = checks.total_variance(draws)
            records.append({
                "library": library, "version": importlib.metadata.version(package), "objective": objective,
                "draws": len(draws), "variance": f"{variance:.4f}", "standard_error": f"{error:.4f}",
            })  # fmt: skip
    finish(arguments.output, records)


if __name__ == "__main__":
    main()
