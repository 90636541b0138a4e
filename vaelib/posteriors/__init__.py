"""Approximate posteriors q(z given x), and the one operation the whole book turns on: holding their parameters still.

:mod:`~vaelib.posteriors.base` says what a posterior is; :mod:`~vaelib.posteriors.gaussian` and
:mod:`~vaelib.posteriors.discrete` have ours, :mod:`~vaelib.posteriors.convert` takes over those of others, which
:mod:`~vaelib.posteriors.trial` tries.
"""

from vaelib.posteriors.base import (
    LOG_2PI,
    Latent,
    Noise,
    Posterior,
    draw,
    draws,
    in_forward_mode,
    inside_vmap,
    is_ours,
    layers_of,
    map_latent,
    redefines_half,
    standard_normal_log_prob,
    times,
    tracing,
)
from vaelib.posteriors.convert import Adapted, as_posterior, draws_by_itself
from vaelib.posteriors.discrete import MAX_STATES, Discrete, FactorisedBernoulli, OneHotCategorical, gumbel
from vaelib.posteriors.gaussian import DiagonalGaussian, FullGaussian, HierarchicalGaussian, Mixture
from vaelib.posteriors.stopping import stop_gradient
from vaelib.posteriors.trial import (
    functions_in,
    is_foreign,
    learning_in,
    modules_in,
    once,
    ready,
    remade,
    tensors_in,
    undisturbed,
    version,
)

__all__ = [
    "LOG_2PI",
    "MAX_STATES",
    "Adapted",
    "DiagonalGaussian",
    "Discrete",
    "FactorisedBernoulli",
    "FullGaussian",
    "HierarchicalGaussian",
    "Latent",
    "Mixture",
    "Noise",
    "OneHotCategorical",
    "Posterior",
    "as_posterior",
    "draw",
    "draws",
    "draws_by_itself",
    "functions_in",
    "in_forward_mode",
    "inside_vmap",
    "gumbel",
    "is_foreign",
    "is_ours",
    "layers_of",
    "learning_in",
    "map_latent",
    "modules_in",
    "once",
    "ready",
    "redefines_half",
    "remade",
    "standard_normal_log_prob",
    "stop_gradient",
    "tensors_in",
    "times",
    "tracing",
    "undisturbed",
    "version",
]
