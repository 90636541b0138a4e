r"""The one operation the whole book turns on: a module with its parameters held constant, and nothing else changed."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from vaelib.errors import InputError

CONTENT = frozenset(nn.Module().__dict__)
"""What every module has; the rest are its settings, such as the rate of a dropout."""


def stop_gradient(module: Callable[..., Any]) -> Callable[..., Any]:
    r"""Return the same module with its parameters held constant, :math:`f_{\bar\phi}` for :math:`f_\phi`.

    The copy shares the parameters' storage, follows every later change of their values, and can be differentiated
    with respect to its *input*. It is a shallow copy whose tensors are detached, module by module, also those in plain
    lists, tuples and dictionaries, in methods bound to a module and in transforms of ``torch.distributions``, and it
    works under ``torch.func.functional_call``, ``vmap`` and ``grad``. A compiled module is stopped as what was
    compiled. Buffers are copied, so that the running statistics of a stopped batch normalisation do not move twice. A
    function is returned as it is, and what it closes over is out of reach: the estimators try every new posterior and
    refuse one that is not stopped by this (:func:`vaelib.posteriors.ready`). Introduced in
    book/02-score-and-path.ipynb.

    Raises
    ------
    InputError
        for a scripted module, which cannot be copied.
    """
    return _still(module, {})


def _still(value: Any, known: dict[int, Any]) -> Any:
    """Return ``value`` with every tensor in it detached; ``known`` holds what was met before, by its id."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, Tensor):
        still = value.detach() if value.requires_grad else value
        known[id(value)] = still
        return still
    if isinstance(value, nn.Module):
        return _still_module(value, known)
    if isinstance(value, Distribution | Transform):
        return _still_transform(value, known)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, _still(value.__self__, known))
    if isinstance(value, functools.partial):
        return functools.partial(
            _still(value.func, known), *_still(value.args, known), **_still(dict(value.keywords), known)
        )
    if (original := getattr(value, "_torchdynamo_orig_callable", None)) is not None:
        return _still(original, known)
    if isinstance(value, dict):
        return _refilled(value, {key: _still(part, known) for key, part in value.items()})
    if isinstance(value, list | tuple):
        parts = [_still(part, known) for part in value]
        if all(part is before for part, before in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        still = {name: _still(part, known) for name, part in parts.items()}
        changed = {name: part for name, part in still.items() if part is not parts[name]}
        return replace(value, **changed) if changed else value
    return value


def _still_transform(value: Any, known: dict[int, Any]) -> Any:
    still = known[id(value)] = copy.copy(value)
    for name, part in value.__dict__.items():
        if not isinstance(part, weakref.ref):  # to the live one's inverse, in older torch
            still.__dict__[name] = _still(part, known)
    return still


def _refilled(before: dict, content: dict) -> dict:
    if all(part is before[key] for key, part in content.items()):
        return before
    after = before.copy()
    after.update(content)
    return after


def _still_module(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError("a scripted module cannot be held constant: give the module that it was scripted from")
    if hasattr(module, "_orig_mod"):  # what torch.compile returns runs with the parameters that it was compiled with
        return _still(module._orig_mod, known)
    still = known[id(module)] = object.__new__(type(module))  # copy.copy refuses parametrised modules
    content = dict(module.__dict__)
    content["_compiled_call_impl"] = None
    content["_parameters"] = {name: _still(p, known) for name, p in module._parameters.items()}
    content["_modules"] = {name: _still(child, known) for name, child in module._modules.items()}
    content["_buffers"] = {name: b if b is None else b.detach().clone() for name, b in module._buffers.items()}
    still.__dict__ = content
    for name in content.keys() - CONTENT:
        content[name] = _still(content[name], known)
    return still
