r"""What a model says of itself when it is asked: is z used, is the encoder late, and which gradient is worth its time.

:func:`usage` and :func:`lag` are the questions of the chapter on inference lag, :func:`cost_of_rows` and :data:`CHART`
those of the chapter on choosing, put to a model that is given; :func:`vaelib.gradients.advise` asks all of them, and
:class:`Advice` is what it hands back. Every number that a verdict rests on has its standard error, and a verdict is
"yes" or "no" only where the number is :data:`SURE` of them away from what matters; otherwise it is "cannot tell".
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelib import evaluation
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, Estimator
from vaelib.posteriors import as_posterior, map_latent, ready

SURE = 3.0
"""Standard errors between a number and a limit that make a verdict."""

MATTERS = 0.5
"""Nats an observation that matter: less information than this is a collapse, less to win by the encoder is no lag."""

ALIKE = 1.15
"""Costs whose quotient is less are the same: two clocks agree to a tenth or so."""

PAIRED = ("elbo-arm", "elbo-disarm")
"""Estimators whose draws are antithetic pairs: one counts as two evaluations of the decoder."""


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Return the mean of independent ``values`` ``[N]``."""
        return cls(*evaluation.mean_and_standard_error(values.double()))

    def beyond(self, limit: float) -> str:
        """Say whether the number is above ``limit``."""
        if not math.isfinite(self.value) or not math.isfinite(self.error):
            return "cannot tell"
        distance = self.value - limit
        return "cannot tell" if abs(distance) < SURE * self.error else "yes" if distance > 0 else "no"

    def __str__(self) -> str:
        return f"{self.value:z.2f} ± {self.error:.2f}"


# --- is z used? -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    r"""How much of z a model uses, in nats an observation.

    Attributes
    ----------
    kl
        :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))` by draws; None where the joint does not know its ``log_prior``.
    told
        :math:`\log p(x \mid z)` less the same with the z of another observation: what the decoder hears of z.
    information
        the mutual information of :func:`vaelib.evaluation.mutual_information`, over all x; None where q does not know
        its entropy.
    active, units
        how many units are active, and how many there are, in each stochastic layer.
    observations
        how many x this is of.
    """

    kl: Estimate | None
    told: Estimate
    information: float | None
    active: list[int]
    units: list[int]
    observations: int

    @property
    def informed(self) -> str:
        """The mutual information, with the most that its estimate can show."""
        if self.information is None:
            return "-"
        most = f"log {self.observations} = {math.log(self.observations):.2f}"
        return f"{self.information:z.2f} (its estimate ends near {most})"

    @property
    def collapsed(self) -> str:
        """Whether z is lost: "yes" if q is at the prior or the decoder deaf to z, "no" if neither."""
        alive = {number.beyond(MATTERS) for number in (self.kl, self.told) if number is not None}
        return "yes" if "no" in alive else "cannot tell" if "cannot tell" in alive else "no"


@torch.no_grad()
def usage(model: nn.Module, x: Tensor, generator: torch.Generator, draws: int = 8, batch_size: int = 50) -> Usage:
    """Return how much of z ``model`` uses on ``x`` ``[N, ...]``, by some draws of each."""
    joint, knows_prior = model.joint, hasattr(model.joint, "log_prior")
    kl, told, units = [], [], []
    with evaluation.evaluating(model.joint, model.encoder):
        order = torch.randperm(len(x), generator=generator, device=x.device)
        for part in x[order].split(batch_size):
            q = as_posterior(model.encoder(part))
            k = q.at_least(draws)
            eps = q.noise(k, generator)
            z, log_q = ready(q, eps).sample_and_log_prob(eps)
            share = torch.as_tensor(q.log_share(k)).exp()
            other = map_latent(lambda layer: layer.roll(1, 1), z)
            if knows_prior:
                kl.append((share * (log_q - joint.log_prior(z))).mean(0))
            if len(part) > 1:
                told.append((share * (joint(part, z) - joint(part, other))).mean(0))
            units = [means.shape[-1] for means in q.means()]
        knows_entropy = hasattr(q, "entropy")
        information = evaluation.mutual_information(model.encoder, x, generator=generator) if knows_entropy else None
        active = evaluation.active_units(model.encoder, x)
    found = Estimate.of(torch.cat(kl)) if kl else None
    return Usage(found, Estimate.of(torch.cat(told)), information, active, units, len(x))


# --- is the encoder late? ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lag:
    """What the encoder still had to learn.

    Attributes
    ----------
    gain
        what the ELBO of held-out observations gains, in nats, if the encoder alone trains on; None if it cannot.
    steps
        how many steps it trained.
    """

    gain: Estimate | None
    steps: int

    @property
    def late(self) -> str:
        """Whether the encoder lags."""
        return self.gain.beyond(MATTERS) if self.gain else "cannot tell"


def lag(
    model: nn.Module,
    x: Tensor,
    estimator: Estimator,
    generator: torch.Generator,
    *,
    steps: int = 400,
    lr: float = 1e-3,
    batch_size: int = 100,
    k: int = 1,
) -> Lag:
    """Train a copy of the encoder alone on three quarters of ``x``; see what the last quarter gains by it."""
    own = copy.deepcopy(model)
    still = weights_of(own.joint)
    moving = [p for p in weights_of(own.encoder) if not any(p is other for other in still)]
    if not moving:
        return Lag(None, 0)
    for p in still:
        p.requires_grad_(False)
    kept = len(x) - len(x) // 4
    learnt, held = x[:kept], x[kept:]
    seed = int(torch.randint(2**62, (), generator=generator, device=x.device))
    before = elbo(own, held, torch.Generator(x.device).manual_seed(seed))
    optimizer = torch.optim.Adam(moving, lr)
    for batch in minibatches(learnt, batch_size, steps, generator):
        q = as_posterior(own.encoder(batch))
        optimizer.zero_grad()
        estimator.loss(own.joint, q, batch, q.noise(k, generator)).mean().backward()
        optimizer.step()
    after = elbo(own, held, torch.Generator(x.device).manual_seed(seed))
    return Lag(Estimate.of(after - before), steps)


def weights_of(part: Any) -> list[nn.Parameter]:
    """Return what is trained in a network; of a plain function nothing."""
    return [p for p in part.parameters() if p.requires_grad] if isinstance(part, nn.Module) else []


def elbo(model: nn.Module, x: Tensor, generator: torch.Generator, draws: int = 8, batch_size: int = 100) -> Tensor:
    """Return the ELBO of each observation by some draws, ``[N]``."""
    k = as_posterior(model.encoder(x[:1])).at_least(draws)
    return evaluation.bound_by_draws(model, ESTIMATORS["elbo-total"], x, k, generator, batch_size=batch_size)


# --- what does a row cost? --------------------------------------------------------------------------------------------


def draws_of(name: str, k: int) -> int:
    """Return the draws of an estimator for ``k`` evaluations of the decoder."""
    return max(1, k // 2) if name in PAIRED else k


def applicable(model: nn.Module, x: Tensor, k: int) -> tuple[dict[str, Estimator], dict[str, str]]:
    """Return the estimators that this model takes with ``k`` draws, and of the others why not; each is tried."""
    with evaluation.evaluating(model.joint, model.encoder):
        q = as_posterior(model.encoder(x))
        takes, reasons = {}, {}
        for name, estimator in ESTIMATORS.items():
            try:
                eps = q.noise(draws_of(name, k), torch.Generator(x.device).manual_seed(0))
                estimator.loss(model.joint, q, x, eps)
                takes[name] = estimator
            except InputError as error:
                reasons[name] = str(error)
    if not takes:
        raise InputError(f"no estimator takes this model: {next(iter(reasons.values()))}")
    return takes, reasons


def aim(estimator: Estimator) -> str:
    """Return what an estimator is unbiased for, or the bound that it reports."""
    return estimator.target or estimator.bound


@dataclass(frozen=True)
class Part:
    """The noise of a training gradient in the weights of the encoder, or of the joint.

    Attributes
    ----------
    draws
        the variance that the draws of z make, with the minibatch given: what an estimator can change.
    minibatch
        the variance of the mean over the draws, from minibatch to minibatch: what no row of the tableau can.
    signal
        the length of the mean gradient, squared. This and ``minibatch`` are those of the quietest unbiased row with the
        same target.
    """

    draws: Estimate
    minibatch: Estimate
    signal: Estimate

    @property
    def variance(self) -> float:
        """Of the whole gradient."""
        return self.draws.value + max(self.minibatch.value, 0.0)

    @property
    def snr(self) -> float | None:
        """The length of the mean over the standard deviation; None if the mean drowns in noise."""
        seen = self.signal.beyond(0.0) == "yes" and self.variance > 0
        return math.sqrt(self.signal.value / self.variance) if seen else None


class Pairs:
    """Pairs of training gradients: one minibatch, two independent noises; sums that do not grow with their number."""

    BLOCKS = 8

    def __init__(self, model: nn.Module, estimator: Estimator, k: int, means: bool = False) -> None:
        self.model, self.estimator, self.k = model, estimator, k
        weights = {name: weights_of(getattr(model, name)) for name in ("encoder", "joint")}
        self.weights = {name: part for name, part in weights.items() if part}
        self.half: dict[str, list[float]] = {name: [] for name in self.weights}
        self.common: dict[str, list[float]] = {name: [] for name in self.weights}
        self.sums = {name: [0.0] * self.BLOCKS for name in self.weights} if means else None
        self.times: list[float] = []

    def gradient(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradient of the bound's mean in each part, and take the time."""
        _wait(x)
        start = time.perf_counter()
        q = as_posterior(self.model.encoder(x))
        loss = self.estimator.loss(self.model.joint, q, x, q.noise(self.k, generator)).mean()
        leaves = [p for part in self.weights.values() for p in part]
        found = torch.autograd.grad(loss, leaves, materialize_grads=True)
        _wait(x)
        self.times.append(time.perf_counter() - start)
        flat = map(Tensor.flatten, found)
        return {name: torch.cat([next(flat) for _ in part]) for name, part in self.weights.items()}

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Take a pair of gradients on the minibatch ``x``."""
        one, other = self.gradient(x, generator), self.gradient(x, generator)
        for name in self.weights:
            block = len(self.half[name]) % self.BLOCKS
            self.half[name].append(0.5 * (one[name] - other[name]).square().sum().item())
            self.common[name].append((one[name] @ other[name]).item())
            if self.sums:
                self.sums[name][block] = self.sums[name][block] + 0.5 * (one[name] + other[name])

    @property
    def seconds(self) -> float:
        """The time of a gradient: the lowest tenth's, to which the load of others adds nothing."""
        return sorted(self.times)[len(self.times) // 10]

    def draws(self, part: str) -> Estimate:
        """The variance that the draws make."""
        return Estimate.of(torch.tensor(self.half[part], dtype=torch.float64))

    def signal_and_minibatch(self, part: str) -> tuple[Estimate, Estimate]:
        r"""Return :math:`\|\EE g\|^2` across minibatches, and :math:`\EE[g \cdot g']` less that, by jackknife."""
        sums, n = torch.stack(self.sums[part]).double(), len(self.common[part])
        gram, block = sums @ sums.mT, torch.arange(n) % self.BLOCKS
        common, counts = torch.tensor(self.common[part], dtype=torch.float64), torch.bincount(block).double()

        def both(kept: list[int]) -> Tensor:
            here, some = gram[kept][:, kept], counts[kept]
            between = (here.sum() - here.trace()) / (some.sum().square() - some.square().sum())
            return torch.stack([between, common[torch.isin(block, torch.tensor(kept))].mean() - between])

        every = list(range(self.BLOCKS))
        without = torch.stack([both(every[:j] + every[j + 1 :]) for j in every])
        errors = ((self.BLOCKS - 1) / self.BLOCKS * (without - without.mean(0)).square().sum(0)).sqrt()
        return tuple(map(Estimate, both(every).tolist(), errors.tolist()))


def minibatches(x: Tensor, size: int, count: int, generator: torch.Generator) -> Iterable[Tensor]:
    """Yield random minibatches of ``x``."""
    for _ in range(count):
        yield x[torch.randint(len(x), (size,), generator=generator, device=x.device)]


def take_pairs(
    several: Sequence[Pairs], x: Tensor, size: int, count: int, generator: torch.Generator, seconds: float
) -> None:
    """Take pairs for each on the same minibatches and noise, for as many seconds in all as there are, 16 at least."""
    spent = [0.0] * len(several)
    for number, batch in enumerate(minibatches(x, size, count, generator)):
        state = generator.get_state()
        for i, pairs in enumerate(several):
            if number >= 2 * Pairs.BLOCKS and spent[i] > seconds / len(several):
                continue
            start = time.perf_counter()
            generator.set_state(state)
            pairs.add(batch, generator)
            spent[i] += time.perf_counter() - start


@dataclass(frozen=True)
class Bias:
    """How far the mean of a row is from that of the reference row, in the posterior's coordinates.

    Attributes
    ----------
    reference
        the row that it is measured against, unbiased for the same target, on the same noise.
    size, error
        the length of the difference of the means, less what noise adds to it, and its standard error; in units of the
        length of the reference's mean.
    shown
        a difference of this length would have been found however it is spread over the coordinates.
    found
        "yes", "no", or "cannot tell" where even a difference as long as the mean itself would not have shown.
    """

    reference: str
    size: float
    error: float
    shown: float
    found: str


def bias_of(test: Any, reference: str, mean: Tensor, counted: Tensor | slice = slice(None)) -> Bias:
    """Return what a :class:`vaelib.gradients.BiasTest` says of the coordinates ``counted``.

    ``mean`` is that of the reference. Inside every coordinate's limit, a difference is no longer than all limits.
    """
    off, error = test.difference[counted], test.standard_error[counted].norm().item()
    unit = mean[counted].norm().item()
    if not len(off) or not unit > 0:
        return Bias(reference, math.nan, math.nan, math.nan, "cannot tell")
    size = math.sqrt(max(off.square().sum().item() - error**2, 0.0))
    shown, biased = test.threshold * error / unit, bool((test.t[counted].abs() > test.threshold).any())
    return Bias(reference, size / unit, error / unit, shown, "yes" if biased else "no" if shown < 1 else "cannot tell")


@dataclass(frozen=True)
class RowCost:
    """All that was measured of one estimator."""

    name: str
    target: str | None
    aim: str
    k: int
    bias: Bias | None
    encoder: Part | None
    joint: Part | None
    seconds: float

    @property
    def cost(self) -> float:
        """Variance times time of the gradient in the encoder's weights, or where it has none in the joint's."""
        return (self.encoder or self.joint).variance * self.seconds

    @property
    def cost_error(self) -> float:
        """The standard error of the cost, as far as the draws make it."""
        return (self.encoder or self.joint).draws.error * self.seconds


@dataclass(frozen=True)
class Doubled:
    """A row's gradient of some size: its variance in the encoder's weights and its time, in units of the first."""

    row: str
    draws: int
    batch: int
    variance: float
    seconds: float

    @property
    def cost(self) -> float:
        """Variance times time, in the same units."""
        return self.variance * self.seconds


def cost_of_rows(
    model: nn.Module,
    x: Tensor,
    rows: Mapping[str, Estimator],
    k: int,
    batch_size: int,
    generator: torch.Generator,
    seconds: float,
    bias: Callable[[Estimator, Estimator, int], Bias],
) -> tuple[list[RowCost], list[Doubled]]:
    """Measure every row on one model, and the quietest one of the ELBO with twice the draws and twice the batch."""
    if not weights_of(model.encoder) and not weights_of(model.joint):
        raise InputError("there is nothing to train in this model: it has no parameters, or every one is frozen")
    every = {name: Pairs(model, row, draws_of(name, k)) for name, row in rows.items()}
    take_pairs(list(every.values()), x, batch_size, 100, generator, 0.5 * seconds)
    part = next(iter(next(iter(every.values())).weights))

    def quietest(goal: str) -> str:
        unbiased = [name for name, row in rows.items() if row.target == goal]
        some = unbiased or [name for name, row in rows.items() if aim(row) == goal]
        return min(some, key=lambda name: (every[name].draws(part).value, every[name].seconds))

    goals = list(dict.fromkeys(map(aim, rows.values())))
    clear = {goal: quietest(goal) for goal in goals}
    means = {goal: Pairs(model, rows[name], draws_of(name, k), means=True) for goal, name in clear.items()}
    take_pairs(list(means.values()), x, batch_size, 100, generator, 0.3 * seconds)

    def part_of(name: str, side: str) -> Part | None:
        if side not in every[name].weights:
            return None
        signal, minibatch = means[aim(rows[name])].signal_and_minibatch(side)
        return Part(every[name].draws(side), minibatch, signal)

    found = [
        RowCost(
            name,
            row.target,
            aim(row),
            draws_of(name, k),
            None if clear[aim(row)] == name else bias(row, rows[clear[aim(row)]], k),
            part_of(name, "encoder"),
            part_of(name, "joint"),
            every[name].seconds,
        )
        for name, row in rows.items()
    ]
    drawn = [name for name in rows if rows[name].target and every[name].draws(part).value > 0]
    if not drawn:
        return found, []
    name = min(drawn, key=lambda name: (rows[name].target != "elbo", every[name].draws(part).value))
    return found, doubled(model, rows[name], x, draws_of(name, k), batch_size, part, generator, seconds)


def doubled(
    model: nn.Module,
    row: Estimator,
    x: Tensor,
    k: int,
    batch_size: int,
    part: str,
    generator: torch.Generator,
    seconds: float,
) -> list[Doubled]:
    """Measure a row as it is, with twice the draws, and with twice the batch."""
    sizes = ((k, batch_size), (2 * k, batch_size), (k, 2 * batch_size))
    several = [Pairs(model, row, draws, means=draws == k) for draws, _ in sizes]
    for pairs, (_, size) in zip(several, sizes, strict=True):
        take_pairs([pairs], x, size, 60, generator, 0.05 * seconds)
    minibatch = max(several[0].signal_and_minibatch(part)[1].value, 0.0)  # halved by twice the batch
    left = (minibatch, minibatch, minibatch / 2)
    variances = [pairs.draws(part).value + rest for pairs, rest in zip(several, left, strict=True)]
    return [
        Doubled(row.name, draws, size, variance / max(variances[0], 1e-300), pairs.seconds / several[0].seconds)
        for (draws, size), variance, pairs in zip(sizes, variances, several, strict=True)
    ]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


# --- the chart --------------------------------------------------------------------------------------------------------

ENUMERATION = "elbo-exact"

CHART = (
    ("elbo", "x Gaussian, decoder linear in z", "elbo-silent"),
    ("elbo", "z has a path, the ELBO", "elbo-path"),
    ("elbo", "z is discrete, 12 bits at most and a cheap decoder", ENUMERATION),
    ("elbo", "z is discrete, bits", "elbo-disarm"),
    ("elbo", "z is discrete, choices", "elbo-score-loo"),
    ("wake", "z has a path, K draws, wake phase", "rws-dreg"),
    ("wake", "z is discrete, K draws, wake phase", "rws"),
    ("iwae", "z has a path, K draws, the bound", "iwae-dreg"),
    ("iwae", "z is discrete, K draws, the bound", "iwae-vimco"),
)
"""The leaves of the chart of the chapter on choosing: the aim, the leaf, its row; the first that fits counts."""

WANTED = {
    "elbo": "for q itself or a reported ELBO",
    "iwae": "for log p(x) with K draws, by the gradient of the bound",
    "wake": "for log p(x) with K draws, by the wake phase",
}


@dataclass(frozen=True)
class Choice:
    """The row to take for one aim.

    Attributes
    ----------
    aim, leaf
        what is wanted, and the leaf of the chart; None if the chart has none for this model.
    row
        the row to take.
    agrees
        whether the measured costs bear the chart out: "yes", "no", or "cannot tell" where a rival is as good.
    rival
        the best of the other unbiased rows of this aim, and how many times as much variance x time it costs.
    """

    aim: str
    leaf: str | None
    row: str
    agrees: str
    rival: tuple[str, float] | None

    def __str__(self) -> str:
        against = (
            f"{self.rival[0]} has {self.rival[1]:.2g} times its variance x time" if self.rival else "it is the only one"
        )
        leaf = f"leaf '{self.leaf}'" if self.leaf else "the chart has no leaf for it"
        word = {"yes": "", "no": "; measured against the chart", "cannot tell": "; the noise cannot tell the two apart"}
        return f"{WANTED[self.aim]}: {self.row} ({leaf}; {against}{word[self.agrees]})"


def choose_row(goal: str, rows: Sequence[RowCost]) -> Choice | None:
    """Return the unbiased row for an aim: the chart's, unless another one is measured to cost less for certain."""
    some = {row.name: row for row in rows if row.target == goal}
    if not some:
        return None
    best = min(some.values(), key=lambda row: row.cost)

    def dearer(row: RowCost, other: RowCost) -> bool:
        error = math.hypot(row.cost_error, ALIKE * other.cost_error)
        return row.cost - ALIKE * other.cost > SURE * error

    leaves = [(leaf, name) for target, leaf, name in CHART if target == goal and name in some]
    if leaves and leaves[0][1] == ENUMERATION and dearer(some[ENUMERATION], best):
        leaves.pop(0)
    leaf, charted = leaves[0] if leaves else (None, None)
    taken = some[charted] if charted and not dearer(some[charted], best) else best
    others = [row for row in some.values() if row is not taken]
    rival = min(others, key=lambda row: row.cost, default=None)
    sure = rival is None or dearer(rival, taken)
    agrees = "no" if charted and taken.name != charted else "yes" if sure else "cannot tell"
    ratio = (rival.name, rival.cost / taken.cost if taken.cost else math.inf) if rival else None
    return Choice(goal, leaf if taken.name == charted else None, taken.name, agrees, ratio)


@dataclass(frozen=True)
class Advice:
    """What :func:`vaelib.gradients.advise` measured, and what follows from it; printed, it is a page of text.

    Attributes
    ----------
    rows
        what was measured of each estimator that applies.
    left_out
        why each of the others does not apply, by name.
    choices
        the row to take for each aim.
    doubled
        the quietest row of the ELBO as it is, with twice the draws, and with twice the batch.
    usage, lag
        how much of z is used, and whether the encoder is late.
    current
        the estimator in use, where there is one.
    setting
        draws, batch and observations that this was measured with.
    """

    rows: list[RowCost]
    left_out: dict[str, str]
    choices: list[Choice]
    doubled: list[Doubled]
    usage: Usage
    lag: Lag
    current: str | None
    setting: dict[str, int]

    @property
    def recommendation(self) -> list[str]:
        """What to do, a sentence each, the first thing first; every sentence has the numbers that it rests on."""
        said, used = [], self.usage
        numbers = f"the decoder loses {used.told} nats with the z of another observation" + (
            f", KL {used.kl} nats" if used.kl else ""
        )
        if used.collapsed == "yes":
            cure = (
                "While q is late, which is next, more steps of the encoder may (chapter 5): train on and ask again"
                if self.lag.late == "yes"
                else "While the bound still rises, train on and ask again; once it rests, train anew with more steps "
                "of the encoder, a KL weight that starts at 0, or free bits (chapter 5)"
            )
            said.append(f"z is collapsed ({numbers}): no row brings it back. {cure}")
        elif used.collapsed == "cannot tell":
            said.append(f"whether z is collapsed, the noise does not tell ({numbers}): give more observations")
        if self.lag.late == "yes":
            said.append(
                f"the encoder is late: {self.lag.steps} steps of its own gain {self.lag.gain} nats on held-out "
                "observations. Less noise does not cure lag (leaf 'encoder not late'): give it more steps first"
            )
        elif self.lag.late == "cannot tell" and self.lag.gain:
            said.append(f"whether the encoder is late, the noise does not tell (gain {self.lag.gain} nats)")
        said += map(str, self.choices)
        return said + self.to_win

    @property
    def to_win(self) -> list[str]:
        """What the row in use leaves to win, and what no row can."""
        rows = {row.name: row for row in self.rows}
        choice = next((c for c in self.choices if c.aim == self._goal), None)
        if choice is None or rows[choice.row].encoder is None:
            return []
        part, said = rows[choice.row].encoder, []
        if self.current in rows and self.current != choice.row and (now := rows[self.current].encoder) is not None:
            said.append(
                f"from {self.current} to {choice.row} the variance of the encoder's gradient falls "
                f"{now.variance / part.variance:.2g} times"
                if part.variance
                else f"{choice.row} leaves no variance"
            )
        if part.variance:
            share = max(part.minibatch.value, 0) / part.variance
            said.append(
                f"{share:.0%} of what {choice.row} leaves in the encoder is the minibatch's own noise, which no row "
                "takes away"
            )
        return said

    @property
    def _goal(self) -> str:
        current = ESTIMATORS.get(self.current or "")
        return aim(current) if current and any(c.aim == aim(current) for c in self.choices) else "elbo"

    def table(self) -> list[tuple[str, ...]]:
        """Return the rows as words, a header first."""
        best = {c.aim: next(row.cost for row in self.rows if row.name == c.row) for c in self.choices}
        lines = [("row", "aim", "bias", "would show", "var(encoder)", "var(decoder)", "snr", "ms", "var x time")]
        for row in sorted(self.rows, key=lambda row: (list(WANTED).index(row.aim), row.cost)):
            lines.append(
                (
                    row.name,
                    row.aim + ("" if row.target else "*"),
                    "reference" if row.bias is None else _bias(row.bias),
                    "" if row.bias is None else f"{row.bias.shown:.1%}",
                    _variance(row.encoder),
                    _variance(row.joint),
                    _snr(row.encoder or row.joint),
                    f"{1e3 * row.seconds:.2f}",
                    f"{row.cost / best[row.aim]:.3g}" if best.get(row.aim) else "-",
                )
            )
        return lines

    def legend(self) -> str:
        """Return what the columns of the table are."""
        return (
            "bias         of the mean gradient in q's parameters; the mean of its aim's reference is 100% long\n"
            "would show   a bias of this length would have been found\n"
            "var, snr     variance of a minibatch's gradient; the length of its mean over its standard deviation\n"
            "var x time   in units of the row to take for the aim\n"
            "*            unbiased for nothing\n"
            "k = {k}, minibatches of {batch_size}, {observations} observations".format(**self.setting)
        )

    def sizes(self) -> list[tuple[str, ...]]:
        """Return what more draws are worth against a larger batch as words, a header first; nothing if no row draws."""
        lines = [
            (one.row, str(one.draws), str(one.batch), f"{one.variance:.2f}", f"{one.seconds:.2f}", f"{one.cost:.2f}")
            for one in self.doubled
        ]
        return [("row", "draws", "batch", "variance", "time", "var x time"), *lines] if lines else []

    def diagnosis(self) -> list[tuple[str, str, str]]:
        """Return what was asked of the model, the number, and the verdict."""
        used = self.usage
        return [
            ("is z lost? (the decoder's loss with another's z, nats)", str(used.told), used.collapsed),
            ("KL(q || prior), nats", str(used.kl) if used.kl else "-", ""),
            ("mutual information, nats", used.informed, ""),
            ("active units", ", ".join(f"{a} of {n}" for a, n in zip(used.active, used.units, strict=True)), ""),
            ("is q late? (gain of the encoder alone, nats)", str(self.lag.gain or "-"), self.lag.late),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        plain = asdict(self)
        plain["usage"]["collapsed"], plain["lag"]["late"] = self.usage.collapsed, self.lag.late
        for row, measured in zip(plain["rows"], self.rows, strict=True):
            row["cost"] = measured.cost
            for side in ("encoder", "joint"):
                if (part := getattr(measured, side)) is not None:
                    row[side] |= {"variance": part.variance, "snr": part.snr}
        return _named({"recommendation": self.recommendation, **plain})

    def __str__(self) -> str:
        said = [f"{i}. {sentence}" for i, sentence in enumerate(self.recommendation, 1)]
        diagnosis, rows, sizes = (_columns(part) for part in (self.diagnosis(), self.table(), self.sizes()))
        return "\n\n".join("\n".join(part) for part in (said, diagnosis, rows, [self.legend()], sizes) if part)


def _bias(bias: Bias) -> str:
    return "cannot tell" if bias.found == "cannot tell" else f"{bias.size:.1%} ± {bias.error:.1%}, {bias.found}"


def _variance(part: Part | None) -> str:
    return "-" if part is None else f"{part.variance:.3g}"


def _snr(part: Part) -> str:
    return "cannot tell" if part.snr is None else f"{part.snr:.2g}"


def _columns(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _named(value: Any) -> Any:
    """Return plain values with estimates as objects and what is not finite as None, which JSON can say."""
    if isinstance(value, Estimate):
        return _named(value._asdict())
    if isinstance(value, Mapping):
        return {key: _named(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_named(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
