"""What a training run is: one frozen record of plain values, whose numbers are checked when it is made.

This file imports nothing heavy, so that the command line can show its help at once: a name (of a schedule, an
optimiser, an estimator, a model, data, a device) is looked up where it is used, before the first step. What each field
means is written beside it, once, for the help of the command line too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from vaelib.errors import InputError, between, choose, plain, positive, shown, true_or_false, typed, whole_number

LOGS = {"tensorboard": "TensorBoard"}
LONGEST = 4096  # bytes of a path on Linux
DEVICES = {"auto": "a GPU if there is one", "cpu": "the processor", "cuda": "an NVIDIA GPU"}


def setting(default: Any, text: str) -> Any:
    """Return a field of a recipe: what it is if nothing is said, and what it means."""
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata={"help": text})


def is_name(value: Any) -> bool:
    """Tell whether ``value`` is text that a file could be called, as data and models may be called by their files."""
    try:
        return isinstance(value, str) and "\0" not in value and len(os.fsencode(value)) < LONGEST
    except UnicodeEncodeError:
        return False


def names(recipe: Any, *fields: str) -> None:
    """Raise InputError unless these fields of a recipe are names, whatever they are names of."""
    for name in fields:
        if not is_name(value := getattr(recipe, name)):
            raise InputError(f"{typed(name)} must be a name, but is {shown(value)}")


@dataclass(frozen=True)
class Recipe:
    """How to train, whatever the model and the data; the defaults are Burda et al.'s (2016) at their first stage.

    Raises
    ------
    InputError
        for a value that cannot be meant.
    """

    k: int = setting(1, "Draws of the latent an observation.")
    batch_size: int = setting(20, "Observations a step.")
    epochs: int = setting(10, "Passes through the training data.")
    lr: float = setting(1e-3, "The optimiser's learning rate.")
    schedule: str = setting(
        "constant",
        "How the rate changes: constant, or burda: lr falls tenfold in eight stages of 1, 3, 9 ... 2187 epochs (Burda "
        "et al. 2016; the first four are 40 epochs, all are 3280).",
    )
    optimizer: str = setting(
        "adam",
        "adam, sgd, or adam-released: as in the code released with the papers (beta1 .99, second moment from 1, "
        "moments of the step before, gradient summed over the batch).",
    )
    shuffle: bool = setting(True, "Another order of the observations every epoch; the released code never does it.")
    clip: float | None = setting(None, "Largest global norm of a gradient; without it, no limit.")
    adam_eps: float = setting(1e-4, "The constant in Adam's denominator, for the gradient of the batch's mean.")
    seed: int = setting(0, "Seed of weights, data order, binarisation, noise and random layers, a stream for each.")

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the recipe with these fields, or say which one it has not."""
        for name in given:
            choose("field of the recipe", name, cls.__dataclass_fields__)
        return cls(**given)

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("k", "batch_size", "epochs"):
            whole_number(name, getattr(self, name), least=1)
        whole_number("seed", self.seed, least=0, most=2**63 - 1)
        positive("lr", self.lr)
        positive("adam_eps", self.adam_eps)
        if self.clip is not None:
            positive("clip", self.clip)
        true_or_false("shuffle", self.shuffle)
        names(self, "schedule", "optimizer")


@dataclass(frozen=True)
class Config(Recipe):
    """Everything that decides what ``vaelib train`` computes; the defaults train the running example in seconds."""

    data: str = setting(
        "digits", "Data set, see `vaelib data list`; or your own: a .npy, .npz or .csv file, or a folder of pictures."
    )
    binarisation: str | None = setting(
        None, "dynamic, fixed or grey; without it, the data set's own, or what the model's likelihood needs."
    )
    model: str = setting(
        "linear",
        "Model, see `vaelib models`; or your own: FILE.py:FUNCTION or package.module:FUNCTION, code that is run.",
    )
    sizes: Mapping[str, int] = setting(dict, "Widths of the model other than its own, such as latent=10.")
    estimator: str = setting("elbo-path", "Gradient estimator; see `vaelib estimators`.")
    validate: bool = setting(
        False,
        "Measure the bound of held-out observations after each epoch: of the data set's validation part, or else of a "
        "tenth of the training set, which is not trained on then.",
    )
    patience: int | None = setting(
        None, "Stop after so many epochs without a better held-out bound; without it, never. Needs validate."
    )
    log: str | None = setting(None, "tensorboard: also write the curves for it, into the folder of the run.")
    device: str = setting("auto", "cpu, cuda or auto.")
    checkpoint_seconds: float = setting(60.0, "Longest time between two checkpoints; each epoch ends with one.")
    compile: bool = setting(False, "Compile the step: the same numbers to rounding, sooner; needs a C++ compiler.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("binarisation", "log") if getattr(self, name) is not None]
        names(self, "data", "model", "estimator", "device", *given)
        for name in ("validate", "compile"):
            true_or_false(name, getattr(self, name))
        if self.log is not None:
            choose("log", self.log, LOGS)
        if self.patience is not None:
            whole_number("patience", self.patience, least=1)
            if not self.validate:
                raise InputError(f"{typed('patience')} waits for a better held-out bound: add {typed('validate')}")
        if not isinstance(self.sizes, Mapping):
            raise InputError(
                f"sizes must map names to whole numbers, such as {{'latent': 8}}, but is {shown(self.sizes)}"
            )
        object.__setattr__(self, "sizes", {name: plain(value) for name, value in self.sizes.items()})
        for name, value in self.sizes.items():
            whole_number(f"size {shown(name)}", value, least=1)
        between("checkpoint_seconds", self.checkpoint_seconds, 0, math.inf)
