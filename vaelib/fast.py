r"""The same steps with less overhead: a whole step as one traced function, and many of them as one CUDA graph.

Neither changes what is computed, and neither knows the estimators or the optimisers. :class:`WholeSteps` traces what a
step is, from the loss to the optimiser's last write in place, hooks and all, and calls that for some steps on end;
:class:`Captured` records whatever they launch on a GPU. :class:`vaelib.training.Training` uses both if told to
``compile``.
"""

from __future__ import annotations

import copy
import itertools
import random
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only

from vaelib.errors import InputError
from vaelib.objectives import Objective
from vaelib.optimizers import RULES
from vaelib.posteriors import Latent
from vaelib.posteriors.stopping import CONTENT

MOST_TRACES = 8
"""Of one training: what changes more often is not worth the compiler's time."""

CHECK_EVERY = 100
"""Steps, after which a trace's bound is held to the model's own."""

Batch = tuple[Tensor, Latent]
"""What a step is taken with: observations and noise."""

Batches = Sequence[Batch]
"""Of several steps."""

Named = dict[str, Tensor]

OPTIONS = {"cpu": {"cpp_wrapper": True, "fallback_random": True}, "cuda": {"fallback_random": True}}
"""Of torch's inductor: layers that draw do so as they would without it; on a processor, no Python between kernels."""


class Untraceable(Exception):
    """Torch, its backend or the system's compiler cannot do it."""

    advice = "install a C++ compiler (g++ or clang) if it is missing, or leave out compile"


class Unsteady(Untraceable):
    """A step of the model does what a trace of it would do once, or not at all."""

    advice = "leave out compile"


class Shared(Untraceable):
    """A module has two names, and to be called with other values loses one of them."""

    advice = "share its parameters and not the module, or leave out compile"


class WholeSteps:
    """Called with the batches of some steps, it takes them and returns their bounds, ``[steps, ...]``.

    One function is traced for each shape of a batch and each state of the model's settings (see :class:`Settings`): the
    loss, its gradients, and what the optimiser does with them, values and memories written back in place. Whether all
    is as it was traced is asked once for all the steps of a call, and what they need is put together once. Where
    there is no compiler, or a step of the model is more than a function of tensors, it warns, once, and takes plain
    steps. So it does, without a word, where an optimiser has no memories yet to write to: in the first call, and in
    the first one with a parameter. A model whose bound is not the traced one any more, since something changed that its
    settings do not show, is refused: this is looked at every hundred steps or so (:data:`CHECK_EVERY`).

    Parameters
    ----------
    training
        what it takes the steps of, with ``estimator``, ``model``, ``optimizer``; ``plain_step(x, eps)``, which it
        stands for; ``limit(parameters)``, which limits their gradients; and ``mean(bound)``, what is reported of a
        batch. Its ``captured`` is taken away where the steps stay plain.
    backend
        of ``torch.compile``; "eager" runs what was traced as it is, without a compiler.
    """

    def __init__(self, training: Any, backend: str = "inductor") -> None:
        self.training, self.backend = training, backend
        self.traces: list[Trace] = []
        self.works, self.unchecked = True, CHECK_EVERY

    def __call__(self, batches: Batches) -> Tensor:
        return torch.cat([self.take(list(alike)) for _, alike in itertools.groupby(batches, kind)])

    def take(self, batches: Batches) -> Tensor:
        """Take the steps of some batches of one kind and return their bounds."""
        if batches[0][0].is_cuda and torch.cuda.is_current_stream_capturing():
            return self.last(batches)
        if self.works:
            try:
                self.last = self.find(batches[0])
                if self.last.function is not None:
                    return self.traced(batches)
            except Untraceable as error:
                self.works = False
                self.training.captured = None  # a graph is one of traced steps
                warnings.warn(
                    f"torch.compile does not work here ({error}); training goes on without it, to the same end and "
                    f"more slowly: {error.advice}",
                    stacklevel=2,
                )
        return torch.stack([self.training.plain_step(x, eps) for x, eps in batches])

    def traced(self, batches: Batches) -> Tensor:
        """Take the steps of some batches by the last trace and return their bounds."""
        due, objective = self.unchecked >= CHECK_EVERY, self.last.objective
        self.unchecked = len(batches) + (0 if due else self.unchecked)
        if due:
            with drawing_nothing(batches[0]), left_as_it_was(objective):
                own = self.training.mean(-objective(*batches[0]).detach())
        bounds = self.last(batches)
        if due and not near(bounds[0], own):
            raise InputError(
                f"the bound of this model is {own.mean():.6g}, and not {bounds[0].mean():.6g} as of the step that was "
                f"compiled: something that no attribute of a module shows, such as a global or an object with slots, "
                f"has changed during the last {CHECK_EVERY} steps or so, which may be wrong: leave out compile"
            )
        return bounds

    def find(self, batch: Batch) -> Trace:
        """Return the trace for such a batch, made now if none of the known ones is of the training as it is."""
        for trace in reversed(self.traces):  # the latest first
            if trace.holds(batch):
                return trace
        if len(self.traces) == MOST_TRACES:
            raise Unsteady(f"a setting of the model, or a shape, has changed {MOST_TRACES} times")
        self.traces.append(Trace(self.training, self.backend, batch))
        return self.traces[-1]


def kind(batch: Batch) -> Any:
    """Return what a trace takes for constant of a batch."""
    return tree_map(lambda value: (value.shape, value.dtype, value.device), batch)


def near(bound: Tensor, own: Tensor) -> bool:
    """Whether two computations of a bound agree to half of the digits of their dtype, or of autocast's."""
    device = own.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own.dtype
    tolerance = 3 * torch.finfo(dtype).eps ** 0.5  # 1e-3 in float32
    return torch.allclose(bound, own, rtol=tolerance, atol=tolerance, equal_nan=True)


def drawing_nothing(batch: Batch) -> AbstractContextManager:
    """Put torch's generators back to where they were."""
    return torch.random.fork_rng([batch[0].device] if batch[0].is_cuda else [])


def check_apart(objective: nn.Module) -> None:
    """Raise Shared if a module with parameters or buffers has two names, of which ``functional_call`` loses one."""
    names = [(name, part) for name, part in objective.named_modules(remove_duplicate=False) if any(part.state_dict())]
    times = Counter(part for _, part in names)
    if twice := [name for name, part in names if times[part] > 1]:
        raise Shared(f"'{twice[0]}' and '{twice[1]}' are one module under two names")


class Trace:
    """A whole step as one function; there is none where the optimiser has yet to make its memories."""

    def __init__(self, training: Any, backend: str, batch: Batch) -> None:
        self.objective = objective = Objective(training.estimator, training.model.joint, training.model.encoder)
        check_apart(objective)
        self.optimizer, self.settings = training.optimizer, Settings(objective)
        self.rule, (self.group,) = RULES[type(self.optimizer)], self.optimizer.param_groups
        with drawing_nothing(batch):
            self.learning = what_learns(training.model, objective, batch)
        values = dict(objective.named_parameters()) | dict(objective.named_buffers())
        self.rest = {name: value for name, value in values.items() if name not in self.learning}
        self.constants = self.read_constants(batch)
        ages = dict(zip(self.learning, self.ages(), strict=True))
        self.of_age = {age: name for name, age in reversed(ages.items())}  # a parameter of each age, for all of them
        which = {name: list(self.of_age).index(age) for name, age in ages.items()}

        def step(learning: Named, memories: Named, rest: Named, factors: Tensor, batch: Batch) -> Tensor:
            leaves = {name: p.detach().requires_grad_() for name, p in learning.items()}
            loss = functional_call(objective, leaves | rest, batch)
            slopes = torch.autograd.grad(loss.mean(), list(leaves.values())) if leaves else ()
            for leaf, slope in zip(leaves.values(), slopes, strict=True):
                leaf.grad = slope
            training.limit(list(leaves.values()))
            values, kept = {}, {}
            for name, leaf in leaves.items():
                numbers = factors[which[name]].unbind()
                values[name], kept[name] = self.rule.update(
                    learning[name], leaf.grad, memories[name], numbers, self.group
                )
            for old, new in zip(tree_leaves((learning, memories)), tree_leaves((values, kept)), strict=True):
                old.copy_(new)
            return training.mean(-loss.detach())

        self.function = None
        if None in ages.values():
            return
        with drawing_nothing(batch):
            try:
                self.function = self.compiled(step, backend, batch)
            except Unsteady:
                raise
            except Exception as error:  # whatever torch, its backend and the system's compiler find wrong
                raise Untraceable((str(error).strip() or type(error).__name__).splitlines()[0]) from error

    def compiled(self, step: Callable, backend: str, batch: Batch) -> Callable:
        """Return ``step`` as one function of tensors, once tried on copies."""
        arguments = *self.values(), self.factors(1)[0], batch
        copies = tree_map_only(Tensor, lambda value: value.detach().clone(), arguments)
        with NumbersStay():
            function = make_fx(step)(*copies)
        if operation := shaped_by_numbers(function.graph):
            raise Unsteady(f"the numbers decide on the shape of a tensor, by {operation}")
        if backend != "eager":
            options = OPTIONS[batch[0].device.type] if backend == "inductor" else None
            function = torch.compile(function, dynamic=False, backend=backend, options=options)
        with torch.no_grad():
            function(*copies)
        return function

    @torch.no_grad()
    def __call__(self, batches: Batches) -> Tensor:
        """Take a step with each of the batches; return their bounds."""
        values, factors = self.values(), self.factors(len(batches)).unbind()
        bounds = [self.function(*values, *one) for one in zip(factors, batches, strict=True)]
        if self.rule.memories:
            torch._foreach_add_([self.optimizer.state[p]["step"] for p in self.learning.values()], len(batches))
        return torch.stack(bounds)

    def values(self) -> tuple[Named, dict[str, tuple[Tensor, ...]], Named]:
        """Return what the function reads or writes, besides the batches."""
        state = {name: self.optimizer.state[p] for name, p in self.learning.items()}
        return self.learning, {n: tuple(s[key] for key in self.rule.memories) for n, s in state.items()}, self.rest

    def ages(self) -> list[int | None]:
        """Return how many steps each parameter has taken; None for one whose memories are not there."""
        if not self.rule.memories:
            return [0 for _ in self.learning]
        state = [self.optimizer.state.get(p, {}) for p in self.learning.values()]
        return [int(s["step"]) if "step" in s else None for s in state]

    def factors(self, steps: int) -> Tensor:
        """Return the factors of the next steps, for the parameters of each age, ``[steps, ages, factors]``.

        In double precision, as Python's numbers are: Adam's :math:`1 - \\beta_2^t` would lose four digits.
        """
        p = next(self.objective.parameters())
        t = torch.arange(1, steps + 1, dtype=torch.double, device=p.device).unsqueeze(1)
        if self.rule.memories:
            t = t + torch.stack([self.optimizer.state[self.learning[name]]["step"] for name in self.of_age.values()])
        found = self.rule.factors(t, self.group["lr"], self.group)
        return torch.stack([f if isinstance(f, Tensor) else torch.full_like(t, f) for f in found], -1).to(p.dtype)

    def read_constants(self, batch: Batch) -> Any:
        """Return what the trace takes for constant besides the settings of the modules."""
        ages = self.ages()
        group = {name: value for name, value in self.group.items() if name not in ("params", "lr")}
        autocast = torch.is_autocast_enabled(batch[0].device.type)
        return kind(batch), [ages.index(age) for age in ages], None in ages, group, torch.get_default_dtype(), autocast

    def holds(self, batch: Batch) -> bool:
        """Whether all is still as it was traced."""
        return self.settings.hold() and self.constants == self.read_constants(batch)


class NumbersStay(TorchFunctionMode):
    """Raises Unsteady where a number leaves torch: a trace would keep it for all steps."""

    LEAVES = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function in self.LEAVES:
            raise Unsteady(f"the model takes numbers out of torch, by .{function.__name__}()")
        return function(*args, **(kwargs or {}))


def shaped_by_numbers(graph: fx.Graph) -> str | None:
    """Return an operation whose result has the shape that its input's numbers say, such as a mask as an index."""
    for node in graph.nodes:
        if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
            dtypes = {place.meta["tensor_meta"].dtype for place in node.all_input_nodes[1:]}
            if node.target is not torch.ops.aten.index.Tensor or dtypes & {torch.bool, torch.uint8}:
                return str(node.target)
    return None


def with_hook(model: nn.Module) -> str | None:
    """Return the name of a parameter with a hook, which nothing but the engine calls."""
    hooked = (n for n, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks)
    return next(hooked, None)


def what_learns(model: nn.Module, objective: Objective, batch: tuple[Tensor, Latent]) -> Named:
    """Return the parameters that a batch has a gradient for; what is wrong with the model is told here.

    Raises
    ------
    Unsteady
        if something else than values in place has changed then, which is put back; or if the networks reach what is a
        part of the model, but not of them.
    """
    asked = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    parts = {id(tensor) for tensor in tensors_of(objective)}
    outside = [tensor for tensor in tensors_of(model) if id(tensor) not in parts]
    learning = [tensor for tensor in outside if tensor.requires_grad]
    if hooked := with_hook(objective):
        raise Unsteady(f"the parameter {hooked} has a hook")
    with left_as_it_was(objective):
        loss = objective(*batch)
        if not loss.requires_grad:
            return {}
        slopes = torch.autograd.grad(loss.mean(), [*asked.values(), *learning], allow_unused=True)
    if len(learning) < len(outside) or any(slope is not None for slope in slopes[len(asked) :]):
        raise Unsteady("what is a part of the model, but neither of its joint nor of its encoder, counts or may count")
    return {name: p for (name, p), slope in zip(asked.items(), slopes) if slope is not None}


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put all that a model remembers back to what it was; raise Unsteady if that is more than values in place."""
    settings, states = Settings(model), [(module, extra_state(module)) for module in model.modules()]
    plain, arrays = random.getstate(), np.random.get_state()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    drawn = random.getstate() != plain or np.random.get_state()[2] != arrays[2]
    random.setstate(plain)
    np.random.set_state(arrays)
    changed = settings.restore()
    for module, state in states:
        if not alike(state, extra_state(module)):
            module.set_extra_state(state)
            changed.append(module)
    if drawn:
        raise Unsteady("the model draws by NumPy or by Python's random")
    if changed:
        raise Unsteady(f"a step changes an attribute of its {type(changed[0]).__name__}, or its extra state")


def extra_state(module: nn.Module) -> Any:
    """Return a copy of what a module remembers besides tensors; None if it has nothing of the kind."""
    has = type(module).get_extra_state is not nn.Module.get_extra_state
    return copy.deepcopy(module.get_extra_state()) if has else None


def alike(one: Any, other: Any) -> bool:
    """Whether two states say the same; so do tensors of a kind that nobody can compare, such as nested ones."""
    (a, form), (b, again) = tree_flatten(one), tree_flatten(other)
    return form == again and all(map(equal, a, b))


def equal(one: Any, other: Any) -> bool:
    """Whether two leaves of a state are the same."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return same({0: one}, {0: other})
    try:
        return torch.equal(one, other)
    except (RuntimeError, NotImplementedError):
        return True


class Settings:
    """All that is taken for constant of a model: modes, parts, every attribute, and which parameters learn."""

    def __init__(self, model: nn.Module) -> None:
        self.of = [(module, copied(module.__dict__)) for module in model.modules()]
        self.learns = [(p, p.requires_grad) for p in model.parameters()]
        inside = [(then, name) for _, then in self.of for name in then.keys() - CONTENT if has_inside(then[name])]
        self.inside = [(place, name, said(place[name])) for place, name in (*inside, *globals_of(model))]

    def restore(self) -> list[nn.Module]:
        """Put all attributes back to what they were; return the modules that were not so."""
        changed = [(module, then) for module, then in self.of if not same(module.__dict__, then)]
        for module, then in changed:
            module.__dict__.clear()
            module.__dict__.update(copied(then))
        return [module for module, _ in changed]

    def hold(self) -> bool:
        """Whether all is as it was; a tensor in the place of another one is not."""
        return (
            all(same(module.__dict__, then) for module, then in self.of)
            and all(p.requires_grad == then for p, then in self.learns)
            and all(same({0: said(place.get(name))}, {0: then}) for place, name, then in self.inside)
        )


def has_inside(value: Any) -> bool:
    """Whether something can change and stay the same object: a container, or an object that is none of torch's."""
    if isinstance(value, Tensor | nn.Module | type | types.ModuleType) or callable(value):
        return False
    return isinstance(value, dict | list | tuple | set) or hasattr(value, "__dict__")


def said(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return what a value says now, with all that is inside; what has no inside is itself."""
    if not has_inside(value) or id(value) in above:
        return value
    above = (*above, id(value))
    if isinstance(value, list | tuple | set):
        return type(value).__name__, [said(part, above) for part in value]
    content = value if isinstance(value, dict) else vars(value)
    return type(value), {name: said(part, above) for name, part in content.items()}


def globals_of(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return where the numbers and containers are that the methods of a model's classes take from their files."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    foreign = (kind for kind in classes if not kind.__module__.startswith(("torch.", "vaelib.", "builtins")))
    methods = [m for kind in foreign for m in vars(kind).values() if isinstance(m, types.FunctionType)]
    found = [(m.__globals__, name) for m in methods for name in m.__code__.co_names if name in m.__globals__]
    return [
        (place, name) for place, name in found if has_inside(place[name]) or type(place[name]) in (int, float, bool)
    ]


def copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of a module's attributes that does not change with them."""
    return {k: copy.copy(v) if isinstance(v, dict | list | set) else v for k, v in attributes.items()}


def same(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Whether two records of a module's attributes are the same."""
    try:
        return now == then
    except (RuntimeError, ValueError):  # two tensors or arrays have no one answer
        return False


WARM_UPS = 2
"""Calls before the one that is captured: the optimiser makes its memories in the first, the second is compiled."""


class Captured:
    """Several training steps as one CUDA graph: the processor starts it, and the GPU does the rest by itself.

    Parameters
    ----------
    steps
        takes steps from the numbers of their observations ``[steps, ...]``, reads nothing back from the GPU, and
        returns their bounds.
    model
        what they train; a graph holds for its settings as they are.
    generators
        all that the steps draw from; each replay goes on where the last one ended.
    """

    def __init__(
        self, steps: Callable[[Tensor], Tensor], model: nn.Module, generators: Iterable[torch.Generator]
    ) -> None:
        self.steps, self.model, self.generators = steps, model, list(generators)
        self.stream, self.graph, self.settings = torch.cuda.Stream(), None, None

    def forget(self) -> None:
        """Capture anew at the next call: a number that was captured, such as the learning rate, is another one now."""
        self.graph = None

    def __call__(self, index: Tensor) -> Tensor:
        """Take ``len(index)`` steps, always as many as the first time, and return their bounds."""
        if self.settings is None or not self.settings.hold():
            self.graph, self.settings, self.warm = None, Settings(self.model), 0
        if self.warm < WARM_UPS:
            self.warm += 1
            return self.beside(lambda: self.steps(index))
        if self.graph is None:
            self.index, self.graph = index.clone(), torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.bounds = self.steps(self.index)
        self.index.copy_(index)
        self.graph.replay()
        return self.bounds

    def beside(self, work: Callable[[], Tensor]) -> Tensor:
        """Do ``work`` on the capturing stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            done = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return done
