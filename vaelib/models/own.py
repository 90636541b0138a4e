"""Models of one's own by name: ``FILE.py:FUNCTION``, or ``package.module:FUNCTION``.

The function is a builder like those of ``vaelib.models.MODELS``::

    def build(start, *, latent=8):
        encoder = MyEncoder(start.pixels, latent)  # encoder(x) returns a posterior
        joint = MyJoint(start.pixels, latent)      # joint(x, z) returns log p(x, z), [K, B]
        return VAE(joint, encoder, binary=True)    # binary: the likelihood wants pixels of 0 and 1

``start`` is a :class:`vaelib.models.Start`; what stands behind the star are sizes, which ``--size latent=4`` sets. Any
module with ``joint`` and ``encoder`` serves in the place of a :class:`vaelib.models.VAE`. An estimator that the file
enters into :data:`vaelib.estimators.ESTIMATORS` can be used by its name. The file is code, and it is run.
"""

from __future__ import annotations

import importlib
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from vaelib.errors import InputError, choose, shown
from vaelib.files import read

EXTRAS = {"zuko": "'vaelib[zuko]'"}
"""What brings a package in the right version."""


def file_of(name: str) -> Path | None:
    """Return the file in ``FILE.py:FUNCTION``; None if a module stands there."""
    place = name.rpartition(":")[0]
    return Path(place) if place.endswith(".py") or os.sep in place else None


def absolute(name: str) -> str:
    """Return the same name from wherever it is looked up."""
    path = file_of(name)
    return name if path is None else f"{path.absolute()}:{name.rpartition(':')[2]}"


def builder(name: str) -> Callable[..., nn.Module]:
    """Return the function that a name means, from its file or module, which is run.

    Raises
    ------
    InputError
        if there is no such file, module or function, or it wants a package that is not here. What else goes wrong in
        that code reaches the caller as it is.
    """
    place, _, function = name.rpartition(":")
    path = file_of(name)
    if path is None and not all(map(str.isidentifier, place.split("."))):
        raise InputError(f"{shown(place)} is no name of a module, in the model {shown(name)}: give FILE.py:FUNCTION")
    if path is None and place.partition(".")[0] in sys.stdlib_module_names:
        raise InputError(f"'{place}' is a module of Python's own, which builds no model: give FILE.py:FUNCTION")
    try:
        module = imported(place) if path is None else executed(path)
    except ModuleNotFoundError as error:
        if path is None and place.startswith(error.name or ""):
            raise InputError(
                f"there is no module {shown(place)} for the model {shown(name)}: see where you are, or give "
                "FILE.py:FUNCTION"
            ) from error
        raise InputError(
            f"'{place}' imports '{error.name}', which is not installed here: install it, such as by "
            f"`pip install {EXTRAS.get(error.name, error.name)}`"
        ) from error
    found = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    return callable_with_start(choose(f"function of '{place}'", function, found), name)


def callable_with_start(function: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    """Return ``function``, or raise InputError if it cannot be called as a builder is."""
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:  # a ValueError where it does not say what it takes
        raise InputError(f"'{name}' must be called with one argument, start, and sizes that have defaults") from error
    return function


class Source(NamedTuple):
    """A file of code, and what stood in it when it was run."""

    path: Path
    content: bytes


def code(name: str) -> dict[str, Source]:
    """Return the files that the code of a model is in, once it is loaded: ``model``, and what it imports from beside.

    Those go by their paths from the folder that the import started from.
    """
    place, path = name.rpartition(":")[0], file_of(name)
    if path is not None:
        return sys.modules[key_of(path)].__sources__
    path = Path(sys.modules[place].__file__).resolve()
    folder = path.parents[place.count(".") + (path.name == "__init__.py")]
    return {"model": Source(path, read(path) or b""), **beside(folder, sys.modules.keys() - {place})}


def beside(folder: Path, keys: Iterable[str]) -> dict[str, Source]:
    """Return the files of those modules of these names that lie in ``folder``, by their paths from there."""
    found = {}
    for key in () if folder.name in ("site-packages", "dist-packages") else sorted(keys):
        file, top = Path(getattr(sys.modules[key], "__file__", None) or "").resolve(), key.partition(".")[0]
        inside = file.relative_to(folder) if file.is_relative_to(folder) else Path()
        if top != "vaelib" and inside.parts[:1] in ((top,), (f"{top}.py",)):
            found[str(inside)] = Source(file, read(file) or b"")
    return found


def imported(place: str):
    """Return a module, also one in the folder where we are."""
    with looking_in(os.getcwd()):
        return importlib.import_module(place)


def key_of(path: Path) -> str:
    """Return the name that a file goes by among the modules."""
    return f"{path.name} in {path.absolute().parent}"


def executed(path: Path):
    """Run a file as a module, once while neither it nor what it imports from beside it changes.

    What it imports is what a new process would: not a module of the same name from elsewhere, or of before a change.
    """
    if (content := read(path)) is None:
        raise InputError(f"there is no file '{path}' with a model: see where you are, or give the whole path")
    key = key_of(path)
    known = sys.modules.get(key)
    if known is not None and all(read(source.path) == source.content for source in known.__sources__.values()):
        return known
    spec = spec_from_file_location(key, path, loader=SourceFileLoader(key, str(path)))
    module = sys.modules[key] = module_from_spec(spec)
    module.__sources__, module.__beside__ = {"model": Source(path, content)}, {}
    try:
        with at_home(path):
            exec(compile(content, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[key]
        raise
    return module


@contextmanager
def at_home(path: Path | None) -> Iterator[None]:
    """Let the code of a file that is a module by now import from beside it; note in the module what it does import.

    Python itself sees to a module of a package, for which None stands.
    """
    if path is None:
        yield
        return
    module, folder = sys.modules[key_of(path)], path.absolute().parent
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if is_shadowed(name, folder)}
    sys.modules.update(module.__beside__)
    before = set(sys.modules)
    try:
        with looking_in(str(folder)):
            yield
    finally:
        new = sys.modules.keys() - before
        module.__sources__ |= beside(folder.resolve(), new)
        module.__beside__ |= {name: sys.modules[name] for name in new if is_shadowed(name, folder)}
        sys.modules.update(aside | {name: sys.modules[name] for name in aside if name in sys.modules})


def is_shadowed(name: str, folder: Path) -> bool:
    """Whether a module of that name in ``folder`` comes before any other but Python's own."""
    top = name.partition(".")[0]
    ours = top == "vaelib" or top in sys.stdlib_module_names or top.startswith("__")
    return not ours and ((folder / f"{top}.py").exists() or (folder / top / "__init__.py").exists())


@contextmanager
def looking_in(folder: str) -> Iterator[None]:
    """Let modules be found in ``folder`` too, and come back to where we are from wherever they go."""
    here = os.getcwd()
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        os.chdir(here)


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Let what is drawn from the generators of PyTorch, NumPy and Python follow from this one's seed; put them back."""
    if generator is None:
        yield
        return
    seed, arrays, plain = generator.initial_seed(), np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(arrays)
            random.setstate(plain)


def whole(model: nn.Module, name: str) -> nn.Module:
    """Return what a function built, or raise InputError if it is no model."""
    wanted = "a module with an encoder and a joint, such as vaelib.models.VAE(joint, encoder, binary=False)"
    if not isinstance(model, nn.Module):
        raise InputError(f"'{name}' must return {wanted}, but returned a {type(model).__name__}")
    for part in ("encoder", "joint"):
        if not isinstance(getattr(model, part, None), nn.Module):
            raise InputError(
                f"'{name}' must return {wanted}, but its {part} is a {type(getattr(model, part, None)).__name__}"
            )
    if not any(isinstance(p, torch.Tensor) and p.requires_grad for p in model.parameters()):
        raise InputError(f"'{name}' returned a model without parameters, so that there is nothing to train")
    return model
