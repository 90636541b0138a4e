r"""The contracts of a posterior, a joint density and an estimator: checks that one of your own can be tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from vaelib.checks.statements import z_scores
from vaelib.errors import InputError
from vaelib.estimators import TABLEAU, Estimator
from vaelib.estimators.base import check_noise, check_observations
from vaelib.estimators.joint import close, log_joint, mixed_up, mixes
from vaelib.models import DiscreteJoint, Guided, HierarchicalJoint, LinearDecoder, LinearGaussian
from vaelib.objectives import Objective, gradient
from vaelib.posteriors import (
    DiagonalGaussian,
    FactorisedBernoulli,
    HierarchicalGaussian,
    Latent,
    Posterior,
    as_posterior,
    draw,
    layers_of,
    learning_in,
    map_latent,
    modules_in,
    remade,
    tensors_in,
)
from vaelib.posteriors.base import standard_normal_log_prob
from vaelib.posteriors.trial import TRIALS, try_out

GROUPS = 64
"""Groups of draws that the statistical part of a contract compares; their means are normal, whatever a draw is."""

DRAWS = 1024
"""Draws of an estimator's gradient."""

CONTRACT_SIGMAS = 6.0
"""The width of a contract's statistical checks, in standard errors: it has to hold in any number of coordinates."""


STEP = 1e-2
"""Of the way from one sample to another, to both sides: what a slope is measured over."""

SLOPE = 0.1
"""How far the gradient of a joint density may be off its slope: kinks leave less, a part held constant more."""


def contract(subject: Any, joint: Callable[..., Tensor] | None = None, q: Any = None, x: Tensor | None = None) -> None:
    r"""Check that a posterior, a joint density or an estimator is what the engine takes it for.

    AssertionError says what is broken.

    A posterior (see :mod:`vaelib.posteriors`): its noise is that of the generator, sample and density are functions
    with the shapes ``[K, B, D]`` and ``[K, B]`` and one dtype, ``sample_and_log_prob`` is the two of them, stopping it
    holds its parameters and nothing else, and the density is that of the samples. The last is tried on draws, by two
    identities that fail for a density that is not normalised or belongs to another sampler,

    .. math:: \mathbb E_q[\partial_\phi \log q] = 0, \qquad
        \mathbb E_q[\partial_z \log q] = 0, \quad \mathbb E_q[(z - c)\, \partial_z \log q] = -1,

    the last two of which (Stein's) are for samples that move with phi. A density that ends at an edge fails Stein's,
    and may instead be that of the noise by the change of variables,
    :math:`\log q(z) = \log p(\varepsilon) - \log|\det \partial z / \partial \varepsilon|`, draw by draw.

    A joint density, any function ``log_joint(x, z)``, tried on samples of q for the observations ``x``: it returns
    :math:`\log p(x, z)` ``[K, B]`` for any K, the same in every call, never NaN or infinity (minus infinity is the log
    of 0), and for each draw of each observation from these two alone; and where samples move with phi, its gradient in
    z is its slope. That it is normalised is not looked at.

    An estimator (see :mod:`vaelib.estimators`): too few draws are refused, its loss ``[B]`` is pure, gives the same
    gradients under ``vmap(grad(...))`` as one by one, gives theta its gradient where q is frozen, has the bound as its
    value on average, and has the target's gradient on average, paired with a row that is known to.

    Parameters
    ----------
    subject
        a posterior, a joint density, or an estimator.
    joint, q, x
        for an estimator, the model that it is tried on, where none of the small ones here will do; for a joint density
        q and x, two observations or more that differ.
    """
    name = subject.name if isinstance(subject, Estimator) else getattr(subject, "__name__", type(subject).__name__)
    try:
        if isinstance(subject, Estimator):
            what, faults = "an estimator", _faults_of_estimator(subject, *_setting(subject, joint, q, x))
        elif q is not None:
            what, faults = "a joint density", _faults_of_joint(subject, as_posterior(q), x)
        else:
            what, faults = "a posterior", _faults_of_posterior(as_posterior(subject))
        for kept, fault in faults:
            assert kept, f"{name}: {fault}"
    except InputError as error:
        raise AssertionError(f"{name}: {error}") from error
    print(f"ok: {name} keeps the contract of {what}")


def _faults_of_posterior(q: Posterior) -> Iterator[tuple[bool, str]]:
    """Yield whether each clause is kept, and the sentence for the case that it is not."""
    k = 4 * q.strata
    eps = q.noise(k, _seeded(0, q))
    yield _equal(eps, q.noise(k, _seeded(0, q))), "noise(k, generator) differs although the generator is the same"
    yield not _equal(eps, q.noise(k, _seeded(1, q))), "noise(k, generator) does not depend on the generator"
    if _tells_noise(q):
        yield (
            _equal(eps, draw(q.noise_like(k), _seeded(0, q))),
            "noise(k, generator) is not draw(noise_like(k), generator)",
        )

    z = q.sample(eps)
    shape = (k, layers_of(eps)[0].shape[1])
    found = [list(layer.shape) for layer in layers_of(z)]
    yield (
        all(len(one) == 3 and tuple(one[:2]) == shape for one in found),
        (f"sample(eps) must be [K, B, D] with [K, B] = {list(shape)}, but is {found}"),
    )
    yield _equal(z, q.sample(eps)), "sample(eps) differs from call to call"
    log_q = q.log_prob(z)
    yield log_q.shape == shape, f"log_prob(z) must be [K, B] = {list(shape)}, but is {list(log_q.shape)}"
    kinds = {(part.dtype, part.device) for part in (*layers_of(eps), *layers_of(z), log_q)}
    yield len(kinds) == 1, f"noise, samples and density are not of one dtype on one device: {kinds}"
    again, log_q_again = q.sample_and_log_prob(eps)
    yield (
        _close(again, z) and _close(log_q_again, log_q),
        "sample_and_log_prob(eps) is not sample(eps) and its log_prob",
    )
    yield _close(q.log_prob_of_sample(z, eps), log_q), "log_prob_of_sample(z, eps) is not log_prob(z)"

    try_out(q, eps)
    z = map_latent(Tensor.detach, q.sample(eps))
    yield _close(q.stop_gradient().log_prob(z), q.log_prob(z)), "stop_gradient() is another density"

    off = _standard_errors_off(q)
    yield (
        off["score"] <= CONTRACT_SIGMAS,
        (
            f"log_prob is not a density that is normalised for every phi, or not that of the samples: the mean of its "
            f"derivative in phi is {off['score']:.0f} standard errors from 0"
        ),
    )
    yield (
        off["slope"] <= CONTRACT_SIGMAS or _is_that_of_the_noise(q),
        (
            f"log_prob is not the density of the samples: the mean of its derivative in z is off by {off['slope']:.0f} "
            "standard errors"
        ),
    )


def _standard_errors_off(q: Posterior) -> dict[str, float]:
    """Return how far the means of the score and of the slope in z are from what they are for a density."""
    q, phi = _learning(q)
    generator, k = _seeded(2, q), 64 * q.strata
    share = _share(q, k)
    centre = map_latent(lambda layer: (share.unsqueeze(-1) * layer).mean(0).detach(), q.sample(q.noise(k, generator)))
    scores, slopes = [], []
    for _ in range(GROUPS):
        z = q.sample(q.noise(k, generator))
        moves = any(layer.requires_grad for layer in layers_of(z))
        z = map_latent(lambda layer: layer.detach().requires_grad_(), z)
        log_q = (_share(q, k).detach() * q.log_prob(z)).sum()
        found = gradient(log_q, [*layers_of(z), *phi])
        in_z, in_phi = found[: len(layers_of(z))], found[len(layers_of(z)) :]
        scores.append(torch.cat([g.flatten() for g in in_phi]) / k if in_phi else log_q.new_zeros(1))
        parts = [
            torch.stack([slope.mean(0), ((layer - c) * slope + share.unsqueeze(-1)).mean(0)]).flatten()
            for slope, layer, c in zip(in_z, layers_of(z), layers_of(centre), strict=True)
        ]
        slopes.append(torch.cat(parts).detach() if moves else log_q.new_zeros(1))
    found = {"score": torch.stack(scores).detach(), "slope": torch.stack(slopes).detach()}
    return {name: _off(draws) for name, draws in found.items()}


def _is_that_of_the_noise(q: Posterior) -> bool:
    r"""Whether :math:`\log q(z) = \log p(\varepsilon) - \log|\det \partial z / \partial \varepsilon|`.

    It also holds where q ends at an edge, as an exponential does. The sign of the determinant must be one and the same,
    or two values of the noise could meet in one z.
    """
    if not _tells_noise(q) or q.strata > 1 or isinstance(noise := q.noise_like(TRIALS), tuple):
        return False
    eps = draw(noise, _seeded(3, q)).requires_grad_()
    z = q.sample(eps)
    if z.shape != eps.shape or not z.requires_grad:
        return False
    rows = [torch.autograd.grad(part.sum(), eps, retain_graph=True)[0] for part in z.unbind(-1)]
    sign, log_det = torch.stack(rows, -2).slogdet()
    log_p = standard_normal_log_prob(eps) if noise.kind == "normal" else torch.zeros_like(log_det)
    return bool((sign == sign.flatten()[0]).all()) and _close(q.log_prob(z.detach()), log_p - log_det)


def _faults_of_joint(joint: Any, q: Posterior, x: Tensor) -> Iterator[tuple[bool, str]]:
    """Yield whether each clause is kept, and the sentence for the case that it is not."""
    check_observations(x)
    (q, _), generator = _learning(q), torch.Generator(x.device).manual_seed(5)
    k = next(n * q.strata for n in (3, 4) if n * q.strata != len(x))  # so that draws and observations are told apart
    eps, eps_other = q.noise(k, generator), q.noise(k, generator)
    check_noise(q, x, eps)
    z, other = q.sample(eps), q.sample(eps_other)
    moves = any(layer.requires_grad for layer in layers_of(z))
    z, other = (map_latent(Tensor.detach, one) for one in (z, other))
    yield not _equal(x, x.roll(1, 0)), "give x of two observations or more that differ, or nothing is seen of a mix-up"

    def log_p(x: Tensor, z: Latent) -> Tensor:
        try:
            return log_joint(joint, x, z)
        except InputError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = [list(layer.shape) for layer in (x, *layers_of(z))]
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"joint(x, z) fails for x and z of the shapes {shapes}: {reason}") from error

    value = log_p(x, z).detach()
    bad = value.isnan() | value.isposinf()
    yield not bad.any(), f"joint(x, z) is NaN or infinite for {bad.sum()} of {bad.numel()} samples of q"
    yield value.isfinite().any(), "joint(x, z) is minus infinity for every sample of q"
    yield _close(log_p(x, z), value), "joint(x, z) differs from call to call, as with dropout; call .eval() first"
    for at in ((0, 0), (k - 1, len(x) - 1)):
        yield not mixes(log_p, list(modules_in(log_p)), x, z, at), mixed_up(at)
    if moves:
        off = _slope_off(log_p, x, z, other)
        yield (
            off <= SLOPE,
            f"the gradient of joint(x, z) in z is off its slope by {off:.0%}: see that z is not held constant, rounded "
            "or turned into plain numbers on the way, and that no branch has a NaN",
        )


def _slope_off(log_p: Callable[..., Tensor], x: Tensor, z: Latent, other: Latent) -> float:
    """Return how far the gradient is off the slope halfway from z to another sample, beyond what rounding explains."""
    way = [b - a for a, b in zip(layers_of(z), layers_of(other), strict=True)]

    def at(t: float) -> list[Tensor]:
        return [a + t * step for a, step in zip(layers_of(z), way, strict=True)]

    def value(layers: list[Tensor]) -> Tensor:
        return log_p(x, tuple(layers) if isinstance(z, tuple) else layers[0])

    before, after = (value(at(t)).detach() for t in (0.5 - STEP, 0.5 + STEP))
    middle = [layer.requires_grad_() for layer in at(0.5)]
    found = gradient(value(middle).sum(), middle)
    slope = (after - before) / (2 * STEP)
    along = sum((g * step).flatten(2).sum(-1) for g, step in zip(found, way, strict=True))
    rounding = torch.finfo(slope.dtype).eps * (before.norm() + after.norm()) / STEP
    inside = slope.isfinite()
    return ((along - slope)[inside].norm() / (slope[inside].norm() + rounding / SLOPE)).item()


def _learning(q: Posterior) -> tuple[Posterior, list[Tensor]]:
    """Return q with numbers of its own that learn, and all of it that does, with the parameters of modules inside it.

    A q that does not say what it is made of is returned as it is; its slopes in z tell enough.
    """
    try:
        q, numbers = remade(q, lambda p: p.detach().clone().requires_grad_())
    except (InputError, NotImplementedError):
        numbers = []
    return q, numbers + learning_in(q)


KNOWN_UNBIASED = {"elbo": ("elbo-total", "elbo-score-loo"), "iwae": ("iwae-total", "iwae-vimco"), "wake": ("rws",)}
"""Rows that are known to have the gradient of each target, for samples with and without a path."""


class _Numbers(nn.Module):
    """An encoder that returns one and the same posterior, made of parameters of its own."""

    def __init__(self, q: Posterior) -> None:
        super().__init__()
        self.q, self.numbers = q.stop_gradient(), nn.ParameterList()
        q.map_parameters(lambda p: self.numbers.append(p.detach().clone()) and p)

    def forward(self, x: Tensor) -> Posterior:
        numbers = iter(self.numbers)
        return self.q.map_parameters(lambda _: next(numbers))


def _setting(estimator: Estimator, joint: Any, q: Any, x: Any) -> tuple[Any, Posterior, Tensor]:
    """Return what the estimator is tried on: what was given, or the first of some small models that it takes."""
    if joint is not None:
        return joint, as_posterior(q), x
    g = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x, scale = randn(2, 3), torch.tensor(-0.2, dtype=torch.float64)
    gaussian, bits = DiagonalGaussian(randn(2, 2), 0.3 * randn(2, 2)), FactorisedBernoulli(randn(2, 2))
    plain, guide = (LinearGaussian(randn(3, 2), randn(3), scale.clone()) for _ in range(2))
    discrete = DiscreteJoint(LinearDecoder(randn(3, 2), randn(3), scale.clone()), torch.zeros_like(bits.logits[0]))
    layers = HierarchicalJoint(_Affine(randn(2, 2)), LinearDecoder(randn(3, 2), randn(3), scale.clone()))
    refusal = None
    for joint, q in (
        (plain, gaussian),
        (Guided(plain, guide), gaussian),
        (discrete, bits),
        (layers, HierarchicalGaussian(gaussian, (_Affine(randn(2, 2)),))),
    ):
        try:
            estimator.loss(joint, q, x, q.noise(4, _seeded(0, q)))
        except InputError as error:
            refusal = error
        else:
            return joint, q, x
    raise InputError(f"none of the small models will do ({refusal}); give joint, q and x")


class _Affine(nn.Module):
    """A conditional Gaussian with a linear mean."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.log_std = nn.Parameter(weight), nn.Parameter(torch.zeros_like(weight[0]))

    def forward(self, z: Tensor) -> DiagonalGaussian:
        mean = z @ self.weight.mT
        return DiagonalGaussian(mean, self.log_std.expand_as(mean))


def _faults_of_estimator(estimator: Estimator, joint: Any, q: Posterior, x: Tensor) -> Iterator[tuple[bool, str]]:
    """Yield whether each clause is kept, and the sentence for the case that it is not."""
    if estimator.least_k > 1:
        yield (
            _raises(InputError, estimator.check, estimator.least_k - 1),
            f"fewer than least_k = {estimator.least_k} draws are not refused",
        )
    encoder, generator = _Numbers(q), _seeded(4, q)
    objective = Objective(estimator, joint, encoder)
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    k = q.at_least(max(4, estimator.least_k))
    noise = [encoder(x).noise(k, generator) for _ in range(DRAWS)]
    eps, kept = noise[0], map_latent(Tensor.clone, noise[0])

    before = {name: value.clone() for name, value in objective.state_dict().items()}
    loss = objective(x, eps)
    yield loss.shape == x.shape[:1], f"loss must be [B] = {list(x.shape[:1])}, but is {list(loss.shape)}"
    yield torch.equal(loss, objective(x, eps)), "loss differs from call to call, although the noise is the same"
    after = objective.state_dict()
    pure = all(p.grad is None for p in objective.parameters()) and all(_equal(before[n], after[n]) for n in before)
    yield pure and _equal(eps, kept), "loss is not pure: it changes gradients, parameters, buffers or the noise"

    stacked = tuple(map(torch.stack, zip(*map(layers_of, noise), strict=True)))
    stacked = stacked if isinstance(eps, tuple) else stacked[0]

    def draws(row: Estimator) -> tuple[list[Tensor], Tensor]:
        """Return the gradient of every draw, parameter by parameter, and its value for each observation."""
        one = Objective(row, joint, encoder)

        def loss(parameters: dict[str, Tensor], eps: Latent) -> tuple[Tensor, Tensor]:
            losses = functional_call(one, parameters, (x, eps))
            return losses.mean(), losses

        found, losses = vmap(grad(loss, has_aux=True), in_dims=(None, 0), chunk_size=GROUPS)(named, stacked)
        return list(found.values()), losses.detach()

    mine, values = draws(estimator)
    loop = zip(*[gradient(objective(x, one).mean(), list(named.values())) for one in noise[:4]], strict=True)
    alike = all(_close(a[:4], torch.stack(b)) for a, b in zip(mine, loop, strict=True))
    yield alike, "vmap(grad(loss)) is not the gradient of each draw"

    theta = [p for p in joint.parameters() if p.requires_grad] if isinstance(joint, nn.Module) else []
    frozen = gradient(estimator.loss(joint, encoder(x).stop_gradient(), x, eps).mean(), theta)
    yield all(_close(a, b[0]) for a, b in zip(frozen, mine, strict=False)), "theta gets another gradient if q is frozen"

    target = estimator.target or estimator.bound
    rows = map(TABLEAU.get, KNOWN_UNBIASED[target])
    row = next(row for row in rows if not _raises(InputError, row.loss, joint, encoder(x), x, eps))
    truth, bounds = draws(row)
    off = _off(values - bounds)
    yield off <= CONTRACT_SIGMAS, f"the value is not -{estimator.bound}: it is off by {off:.0f} standard errors"
    if estimator.target is not None:
        pairs = [(a, b) for a, b in zip(mine, truth, strict=True) if b.any()]  # what the bound depends on
        off = _off(torch.cat([(a - b).reshape(DRAWS, -1) for a, b in pairs], 1))
        sentence = (
            f"it is not unbiased for '{target}': its gradient is off by {off:.0f} standard errors from {row.name}"
        )
        yield off <= CONTRACT_SIGMAS, f"{sentence}, draw by draw"


def _off(draws: Tensor) -> float:
    """Return by how many standard errors the mean of ``draws`` ``[S, ...]`` is off 0, in the worst coordinate."""
    return z_scores(draws, torch.zeros_like(draws[0])).max().item()


def _device(q: Posterior) -> torch.device:
    return next((tensor.device for tensor in tensors_in(q)), torch.device("cpu"))


def _seeded(seed: int, q: Posterior) -> torch.Generator:
    return torch.Generator(_device(q)).manual_seed(seed)


def _equal(a: Latent, b: Latent) -> bool:
    return all(map(torch.equal, layers_of(a), layers_of(b)))


def _close(a: Latent, b: Latent) -> bool:
    return all(map(close, layers_of(a), layers_of(b)))


def _share(q: Posterior, k: int) -> Tensor:
    """Return what each of ``k`` draws counts, ``[K, B]`` or ``[1, 1]``."""
    log_share = q.log_share(k)
    return log_share.exp() if isinstance(log_share, Tensor) else torch.ones(1, 1, device=_device(q))


def _tells_noise(q: Posterior) -> bool:
    return not _raises(NotImplementedError, q.noise_like, q.strata)


def _raises(error: type[Exception], call: Callable[..., Any], *arguments: Any) -> bool:
    try:
        call(*arguments)
    except error:
        return True
    return False
