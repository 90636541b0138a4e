"""The package behind the textbook Quiet Gradients: gradient estimators for variational autoencoders.

Import what you use: ``from vaelib import bounds, data, estimators, objectives``. Importing the package itself loads
nothing; ``vaelib.loss`` and the modules of estimators are found when they are asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

ESTIMATOR_MODULES = ("tableau", "discrete", "silent", "gdreg")


def __getattr__(name: str) -> Any:
    if name == "loss":
        return import_module("vaelib.objectives").loss
    if name in ESTIMATOR_MODULES:
        return import_module(f"vaelib.estimators.{name}")
    raise AttributeError(f"module 'vaelib' has no attribute '{name}'")
