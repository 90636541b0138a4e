r"""Every new posterior that holds functions is tried once, before an estimator relies on it.

Its density must be one function of z, and stopping it must hold its parameters, all of them, and nothing else. Flags
and lists of known layers do not tell that; a trial does.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform, _InverseTransform
from torch.nn.parameter import is_lazy

from vaelib.errors import InputError
from vaelib.posteriors.base import Latent, Posterior, layers_of, map_latent, tracing
from vaelib.posteriors.convert import Adapted, as_posterior
from vaelib.posteriors.stopping import CONTENT

TRIED: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()
"""What trials found of the modules inside posteriors, or of foreign classes, in each of their modes."""

SETTINGS = (bool, float, str)
"""Classes of a setting of a module, whose whole numbers may count calls."""

LEAVES = (Tensor, type, types.ModuleType, weakref.ProxyType, weakref.CallableProxyType, str, int, float, type(None))
"""Classes of what holds no modules."""

TRIALS = 64
"""Draws of a trial, for all observations together: a layer that is random shows in one of them."""


def ready(q: Any, eps: Latent | None) -> Posterior:
    """Return ``q`` as a posterior that an estimator can rely on.

    One that holds modules, or is of a foreign class, is tried (:func:`once`): its log-density must be the same function
    whenever it is evaluated, which a random layer inside (dropout, RReLU) would not be; and stopping it must leave no
    way to its parameters, and must leave it the same function of z.

    Raises
    ------
    InputError
        if it is not one, or not.
    """
    q = as_posterior(q)
    if eps is not None and not tracing():
        once(try_out, q, eps)
    return q


def once(trial: Callable[[Posterior, Latent], Any], q: Posterior, eps: Latent) -> Any:
    """Return ``trial(q, eps)``, made once for each mode of the modules in q and each setting of a foreign class.

    A posterior of this package that is made of numbers alone is not tried.
    """
    parts, settings = list(functions_in(q)), []
    if is_foreign(q):
        parts.append(type(q.q) if isinstance(q, Adapted) else type(q))
        settings = [part for part in _held(q) if isinstance(part, (*SETTINGS, int, Enum, type(None)))]
    if not parts:
        return None
    found, key = TRIED.setdefault(parts[0], {}), (trial, _live(q), *_mode(parts), *settings)
    if key not in found:
        found[key] = trial(q, eps)
    return found[key]


def is_foreign(q: Posterior) -> bool:
    """Whether q is of somebody else's class, or stands for one."""
    return isinstance(q, Adapted) or not type(q).__module__.startswith("vaelib.")


def functions_in(value: Any) -> Iterator[Any]:
    """Yield the modules and functions that a posterior holds, also in tuples, lists and posteriors inside it."""
    if isinstance(value, Tensor):  # as most of what it holds
        return
    if isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from functions_in(part)
    elif isinstance(value, Posterior):
        yield from functions_in(_held(value))
    elif isinstance(value, Transform):  # its inverse, if it knows one, is made of the same
        inside = value.__dict__.items()
        yield from functions_in([part for name, part in inside if name != "_inv" or type(value) is _InverseTransform])
    elif isinstance(value, functools.partial):
        yield from functions_in([value.func, *value.args, *value.keywords.values()])
    elif isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        yield value.__self__
    elif isinstance(value, nn.Module) or callable(value) and not isinstance(value, type):
        yield value


def networks_in(q: Posterior) -> Iterator[nn.Module]:
    """Yield the modules that a posterior holds itself."""
    return (part for part in functions_in(q) if isinstance(part, nn.Module))


def learning_in(q: Posterior) -> list[Tensor]:
    """Return the parameters of the modules inside q that learn."""
    return [p for network in networks_in(q) for p in network.parameters() if p.requires_grad]


def modules_in(value: Any, objects: bool = True) -> Iterator[nn.Module]:
    """Yield the modules of a network, of a posterior, and of what a method, object or function holds or closes over.

    Without ``objects`` not those behind an object that is none of these, which may hold them for somebody else.
    """
    rest, seen = [value], {}
    while rest:
        part = rest.pop()
        if id(part) in seen or issubclass(type(part), LEAVES):  # isinstance would ask the object itself
            continue
        seen[id(part)] = part
        if isinstance(part, nn.Module):
            for module in part.modules():
                if hasattr(module, "training"):  # a frozen script has no modes, and no parameters
                    yield module
                rest += [held for name, held in _attributes(module).items() if name not in CONTENT]
        elif isinstance(part, dict | list | tuple | set):
            rest += part.values() if isinstance(part, dict) else part
        elif isinstance(part, types.MethodType):
            rest += part.__self__, part.__func__
        elif objects or callable(part) or isinstance(part, Posterior | Transform):
            rest += [*_closed_over(part), *_attributes(part).values()]


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that stand in it, whatever it answers when it is asked for others."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}


def _closed_over(function: Any) -> Iterator[Any]:
    """Yield the values of the names that a function, not one of a library, takes from outside of it."""
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    if not isinstance(function, types.FunctionType) or (function.__module__ or "").startswith(("torch.", "vaelib.")):
        return
    yield from (cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType())
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)


def _mode(parts: list[Any]) -> tuple[Any, ...]:
    """Return what a trial of ``parts`` holds for: classes, modes and settings of the modules, and the functions."""
    found, seen, rest = [], set(), list(parts)
    while rest:
        part = rest.pop()
        if type(part) in SETTINGS:
            found.append(part)
        elif isinstance(part, nn.Module):
            if id(part) not in seen:
                seen.add(id(part))
                content = part.__dict__
                found += type(part), part.training
                rest += content["_modules"].values()
                found.append(any(p is not None and p.requires_grad for p in content["_parameters"].values()))
                if len(content) > len(CONTENT):
                    rest += [content[name] for name in content if name not in CONTENT]
        elif isinstance(part, dict | list | tuple):
            rest += part.values() if isinstance(part, dict) else part
        elif callable(part):
            found.append(id(part))
    return tuple(found)


def _live(q: Posterior) -> tuple[bool, ...]:
    """Whether the numbers of q move with parameters: where none do, a trial cannot tell that stopping holds them."""
    return torch.is_grad_enabled(), any(tensor.requires_grad for tensor in tensors_in(q))


def remade(q: Posterior, leaf: Callable[[Tensor], Tensor]) -> tuple[Posterior, list[Tensor]]:
    """Return q made of ``leaf(p)`` in the place of each number p that it is made of, and a list of these."""
    leaves: list[Tensor] = []
    return q.map_parameters(lambda p: leaves.append(leaf(p)) or leaves[-1]), leaves


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that a posterior holds, also in lists and distributions inside it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
    elif isinstance(value, Posterior | Distribution):
        yield from tensors_in(_held(value) if isinstance(value, Posterior) else vars(value))


def _held(q: Posterior) -> list[Any]:
    """Return what a posterior, or the distribution that it stands for, is made of."""
    return list(getattr(q.q if isinstance(q, Adapted) else q, "__dict__", {}).values())


@contextmanager
def undisturbed(modules: Sequence[nn.Module], device: torch.device, evaluating: bool = False) -> Iterator[None]:
    """Leave torch's generators, and the buffers and modes of ``modules``, as they were; in evaluation mode if asked.

    They are called on copies of their buffers: one that is put back in place would spoil a graph that holds it.
    """
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    kept = [b for _, before in buffers for b in before.values() if b is not None and not is_lazy(b)]
    values = {id(buffer): (buffer, buffer.clone(), version(buffer)) for buffer in kept}
    modes = [(module, module.training) for module in modules]
    copies = {key: value.clone() for key, (_, value, _) in values.items()}
    try:
        for own, before in buffers:
            for name in before:
                own[name] = copies.get(id(before[name]), before[name])
        for module, mode in modes:
            module.training = mode and not evaluating
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for own, before in buffers:
            for name in set(own.keys()) - before.keys():
                del own[name]
            for name in before:
                own[name] = before[name]
        for buffer, value, then in values.values():
            if version(buffer) != then:  # which the modules reach another way, too
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def version(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place, if it can be."""
    return None if tensor.is_inference() else tensor._version


def try_out(q: Posterior, eps: Latent) -> None:
    """Raise InputError unless ``q`` is one function of z, and stopping it holds its parameters and nothing else."""
    name = type(q).__name__
    rows = max(1, q.strata * layers_of(eps)[0].shape[1])
    few = map_latent(lambda e: e[: q.strata].repeat_interleave(-(-TRIALS // rows), 0), eps)
    with undisturbed(list(modules_in(q)), layers_of(eps)[0].device), torch.enable_grad():
        z = q.sample(few)
        if not all(isinstance(layer, Tensor) for layer in layers_of(z)):
            raise InputError(
                f"sample(eps) of a {name} must be a tensor [K, B, D], or a tuple of one for each stochastic layer, but "
                f"is a {type(z).__name__}"
            )
        held = map_latent(Tensor.detach, z)
        before = [version(layer) for layer in layers_of(held)]
        if not isinstance(log_q := q.log_prob(held), Tensor):
            raise InputError(f"log_prob(z) of a {name} must be a tensor [K, B], but is a {type(log_q).__name__}")
        if [version(layer) for layer in layers_of(held)] != before:
            raise InputError(
                f"the density of this {name} changes z in place: let its networks leave what they are given, such as "
                "ReLU() for ReLU(inplace=True)"
            )
        other, z = q.sample(few), map_latent(lambda layer: layer.detach().requires_grad_(), q.sample(few))
        still = q.stop_gradient()
        first, second = (still.log_prob_of_sample(z, few) for _ in range(2))
        pairs = zip((*layers_of(z), first), (*layers_of(other), second), strict=True)
        if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True) for a, b in pairs):
            raise InputError(
                f"the density of this {name} is another one each time it is evaluated, since a random layer such as "
                "dropout is active in a network inside it: call .eval() on that network, or leave the layer out"
            )
        held = map_latent(Tensor.detach, z)
        if still.log_prob_of_sample(held, few).requires_grad:
            raise InputError(
                f"stop_gradient leaves this {name} a way to its parameters, through a function that closes over them: "
                "make them parameters of a module that is called, or write a method stop_gradient of its own"
            )
        if not q.detaches and not _same_slopes(first, q.log_prob_of_sample(z, few), layers_of(z)):
            raise InputError(
                f"stop_gradient makes another function of z of this {name}: hold the parameters of its networks "
                "constant (posteriors.stop_gradient(module)), not their outputs, which move with z"
            )
        if not _says_the_same(q, few):
            raise InputError(
                f"log_prob of this {name} is not what it says of its own samples: a class that redefines sample and "
                "log_prob must redefine log_prob_of_sample and sample_and_log_prob too, or inherit from Posterior"
            )


def _says_the_same(q: Posterior, eps: Latent) -> bool:
    """Whether q gives its own samples one log-density however it is asked: to rounding, if made of numbers alone."""
    if next(functions_in(q), None) is None:
        with suppress(InputError, NotImplementedError, RuntimeError, TypeError):
            return _agrees(q.map_parameters(Tensor.double), map_latent(Tensor.double, eps), rtol=1e-4, atol=1e-3)
    return _agrees(q, eps, rtol=0.05, atol=0.5)


def _agrees(q: Posterior, eps: Latent, rtol: float, atol: float) -> bool:
    z, total = q.sample_and_log_prob(eps)
    own, z = q.log_prob(z), map_latent(Tensor.detach, z)
    said = [one for one in (q.log_prob_of_sample(z, eps), total) if one.shape == own.shape]
    return all(torch.allclose(one, own, rtol, atol, equal_nan=True) for one in said)


def _same_slopes(still: Tensor, live: Tensor, z: tuple[Tensor, ...]) -> bool:
    """Whether two log-densities have the same derivative in z."""

    def slopes(log_q: Tensor) -> list[Tensor]:
        if not log_q.requires_grad:
            return [torch.zeros_like(layer) for layer in z]
        found = torch.autograd.grad(log_q.sum(), z, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(layer) if slope is None else slope for layer, slope in zip(z, found, strict=True)]

    size = [1e-3 * max([1.0, *slope.abs().flatten().tolist()]) for slope in slopes(live)]
    pairs = zip(slopes(still), slopes(live), size, strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=atol, equal_nan=True) for a, b, atol in pairs)
