"""Every gradient estimator by name: the rows of the tableau, and those beside it.

:mod:`~vaelib.estimators.base` says what an estimator is; :mod:`~vaelib.estimators.tableau` has the rows,
:mod:`~vaelib.estimators.discrete` what discrete latents need besides, :mod:`~vaelib.estimators.silent` the closed forms
and what is made of them, :mod:`~vaelib.estimators.gdreg` a second path for the parameters of a prior.
"""

from __future__ import annotations

from vaelib.errors import choose
from vaelib.estimators.base import Estimator, LossEstimator, log_joint, log_weight
from vaelib.estimators.discrete import ARM, DISARM, EXACT, GUMBEL_SOFTMAX, STRAIGHT_THROUGH
from vaelib.estimators.silent import ELBO as SILENT
from vaelib.estimators.tableau import TABLEAU, Row, Weights, elbo_scaled

__all__ = [
    "ALIASES",
    "ESTIMATORS",
    "TABLEAU",
    "Estimator",
    "LossEstimator",
    "Row",
    "Weights",
    "elbo_scaled",
    "get",
    "log_joint",
    "log_weight",
]

ESTIMATORS: dict[str, Estimator] = {
    **TABLEAU,
    **{one.name: one for one in (ARM, DISARM, GUMBEL_SOFTMAX, STRAIGHT_THROUGH, SILENT, EXACT)},
}
"""All estimators that have a name: the rows of :data:`TABLEAU`, and those that are no rows."""

ALIASES = {
    "vae": "elbo-total",
    "reparameterisation": "elbo-total",
    "reparameterization": "elbo-total",
    "pathwise": "elbo-total",
    "stl": "elbo-path",
    "sticking-the-landing": "elbo-path",
    "reinforce": "elbo-score",
    "score-function": "elbo-score",
    "likelihood-ratio": "elbo-score",
    "rloo": "elbo-score-loo",
    "reinforce-loo": "elbo-score-loo",
    "iwae": "iwae-total",
    "iwae-stl": "iwae-path",
    "vimco": "iwae-vimco",
    "dreg": "iwae-dreg",
    "dregs": "iwae-dreg",
    "iwae-dregs": "iwae-dreg",
    "reweighted-wake-sleep": "rws",
    "wake": "rws",
    "rws-dregs": "rws-dreg",
    "arm": "elbo-arm",
    "disarm": "elbo-disarm",
    "u2g": "elbo-disarm",
    "gumbel-softmax": "elbo-gumbel-softmax",
    "concrete": "elbo-gumbel-softmax",
    "straight-through": "elbo-straight-through",
    "silent": "elbo-silent",
    "exact": "elbo-exact",
    "enumeration": "elbo-exact",
}
"""What the field calls them besides."""


def get(name: str | Estimator) -> Estimator:
    """Return an estimator by its name, or by another one of the field; an estimator is returned as it is.

    Raises
    ------
    InputError
        if there is none of that name; it says which was probably meant.
    """
    if isinstance(name, Estimator):
        return name
    known = ALIASES.get(name.lower().replace("_", "-").replace(" ", "-"), name) if isinstance(name, str) else name
    if isinstance(known, str) and known not in ESTIMATORS and (lower := known.lower().replace("_", "-")) in ESTIMATORS:
        known = lower
    return choose("estimator", known, ESTIMATORS)
