"""What a training run is: one frozen record of plain values, checked when it is made.

This file imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vaelib.errors import InputError, choose, positive, true_or_false, whole_number

DEVICES = {"auto": "a GPU if there is one", "cpu": "the processor", "cuda": "an NVIDIA GPU"}


@dataclass(frozen=True)
class Recipe:
    """How to train, whatever the model and the data; the defaults are Burda et al.'s (2016) at their first stage.

    Attributes
    ----------
    k, batch_size, epochs
        draws an observation, observations a step, passes through the data.
    lr, schedule
        Adam's step size and how it changes from epoch to epoch, a key of :data:`vaelib.training.SCHEDULES`.
    optimizer
        a key of :data:`vaelib.training.OPTIMIZERS`: Adam as the papers describe it, or as their released code has it.
    shuffle
        whether every epoch visits the observations in another order; the released code never does.
    clip
        the largest global norm of a gradient; None for no limit.
    adam_eps
        the constant in Adam's denominator, for the gradient of the *mean* over a batch ("adam-released": of the sum).
    seed
        of initial weights, data order, binarisation and noise, each of which has a generator of its own.

    Raises
    ------
    InputError
        for a value that cannot be meant.
    """

    k: int = 1
    batch_size: int = 20
    epochs: int = 10
    lr: float = 1e-3
    schedule: str = "constant"
    optimizer: str = "adam"
    shuffle: bool = True
    clip: float | None = None
    adam_eps: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        from vaelib import training  # here, since it takes seconds to import torch

        for name in ("k", "batch_size", "epochs"):
            whole_number(name, getattr(self, name), least=1)
        whole_number("seed", self.seed, least=0)
        for name in ("lr", "adam_eps", "clip"):
            if (value := getattr(self, name)) is not None or name != "clip":
                positive(name, value)
        choose("schedule", self.schedule, training.SCHEDULES)
        choose("optimizer", self.optimizer, training.OPTIMIZERS)
        true_or_false("shuffle", self.shuffle)


@dataclass(frozen=True)
class Config(Recipe):
    """Everything that decides what ``vaelib train`` computes; the defaults train the running example in seconds.

    Attributes
    ----------
    data, binarisation
        as for :func:`vaelib.data.load`.
    model, sizes
        as for :func:`vaelib.models.build`.
    estimator
        its name in :func:`vaelib.estimators.every`.
    device
        a key of :data:`DEVICES`.
    checkpoint_seconds
        the longest time between two checkpoints; each epoch ends with one too.
    compile
        take the same steps with less overhead, see :mod:`vaelib.fast`; the numbers are the same to rounding.
    """

    data: str = "digits"
    binarisation: str | None = None
    model: str = "linear"
    sizes: Mapping[str, int] = field(default_factory=dict)
    estimator: str = "elbo-path"
    device: str = "auto"
    checkpoint_seconds: float = 60.0
    compile: bool = False

    def __post_init__(self) -> None:
        from vaelib import data, estimators, models

        super().__post_init__()
        choose("data set", self.data, data.DATASETS)
        if self.binarisation is not None:
            choose("binarisation", self.binarisation, data.BINARISATIONS)
        choose("model", self.model, models.MODELS)
        choose("estimator", self.estimator, estimators.ESTIMATORS).check(self.k)
        choose("device", self.device, DEVICES)
        true_or_false("compile", self.compile)
        if not isinstance(self.sizes, Mapping):
            raise InputError(f"sizes must map names to whole numbers, such as {{'latent': 8}}, but is {self.sizes!r}")
        for name, value in self.sizes.items():
            whole_number(f"size '{name}'", value, least=1)
        if self.checkpoint_seconds != 0:
            positive("checkpoint_seconds", self.checkpoint_seconds)


