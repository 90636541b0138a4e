"""Every gradient estimator by name: the rows of the tableau, and those beside it.

:mod:`~vaelib.estimators.base` says what an estimator is, :mod:`~vaelib.estimators.joint` what it asks of a joint
density; :mod:`~vaelib.estimators.tableau` has the rows, :mod:`~vaelib.estimators.discrete` what discrete latents need
besides, :mod:`~vaelib.estimators.silent` the closed forms and what is made of them, :mod:`~vaelib.estimators.gdreg` a
second path for the parameters of a prior.
"""

from __future__ import annotations

import difflib
from collections import ChainMap
from collections.abc import MutableMapping

from vaelib.errors import InputError, choose
from vaelib.estimators.base import Estimator, LossEstimator
from vaelib.estimators.discrete import ARM, DISARM, EXACT, GUMBEL_SOFTMAX, STRAIGHT_THROUGH
from vaelib.estimators.joint import log_joint, log_weight
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

ESTIMATORS: MutableMapping[str, Estimator] = ChainMap(
    {one.name: one for one in (ARM, DISARM, GUMBEL_SOFTMAX, STRAIGHT_THROUGH, SILENT, EXACT)}, TABLEAU
)
"""All estimators that have a name: the rows of :data:`TABLEAU`, and those that are no rows. One of your own is entered
by ``ESTIMATORS[one.name] = one``, and a row by its decorator."""

ALIASES = {
    "vae": "elbo-total",
    "elbo": "elbo-total",
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
    if isinstance(name, str):
        word = name.strip().lower().replace("_", "-").replace(" ", "-")
        if (known := ALIASES.get(word, word)) in ESTIMATORS:
            return ESTIMATORS[known]
        near = difflib.get_close_matches(word, [*ESTIMATORS, *ALIASES], n=1)
        if near and near[0] in ALIASES:
            raise InputError(
                f"no estimator is called '{name}', did you mean '{near[0]}' ({ALIASES[near[0]]})? choose from: "
                f"{', '.join(ESTIMATORS)}"
            )
    return choose("estimator", name, ESTIMATORS)
