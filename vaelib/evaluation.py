r"""What a trained model is worth: its log-likelihood and how much of its latent space it uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from vaelib.bounds import check_form, divergence
from vaelib.errors import InputError, between, whole_number
from vaelib.estimators.base import Estimator, check_observations
from vaelib.estimators.joint import log_joint, log_posterior, log_weight
from vaelib.posteriors import (
    DiagonalGaussian,
    Discrete,
    FactorisedBernoulli,
    Latent,
    Posterior,
    as_posterior,
    draws,
    map_latent,
    modules_in,
    ready,
)


class StreamingLogMeanExp:
    r"""The log of a mean of exponentials, and its standard error, from values that arrive in chunks.

    Keeps, for each observation, the largest log-weight m so far and the sums of :math:`e^{\log w - m}` and of its
    square, in float64; nothing overflows, and memory does not grow with the number of values.
    """

    def __init__(self) -> None:
        self.count = 0
        self.peak = self.total = self.squares = None

    def add(self, log_w: Tensor) -> None:
        """Take in ``log_w`` ``[k, B]``."""
        self.dtype, log_w = log_w.dtype, log_w.double()
        peak = log_w.amax(0)
        if self.count:
            peak = torch.maximum(peak, self.peak)
        anchor = peak.clamp_min(torch.finfo(peak.dtype).min)  # all weights zero so far: keep the sums at 0, not nan
        w = (log_w - anchor).exp()
        total, squares = w.sum(0), w.square().sum(0)
        if self.count:
            shrink = (self.peak.clamp_min(torch.finfo(peak.dtype).min) - anchor).exp()
            total += shrink * self.total
            squares += shrink.square() * self.squares
        self.count += log_w.shape[0]
        self.peak, self.total, self.squares = peak, total, squares

    @property
    def value(self) -> Tensor:
        r"""The estimate :math:`\log \tfrac1K \sum_k w_k`, ``[B]``."""
        return (self.peak + (self.total / self.count).log()).to(self.dtype)

    @property
    def standard_error(self) -> Tensor:
        r"""Its standard error by the delta method, :math:`\sqrt{\sum_k \tilde w_k^2 - 1/K}`, ``[B]``.

        Of one draw it is NaN: nothing is known about it.
        """
        error = (self.squares / self.total.square() - 1 / self.count).clamp_min(0).sqrt()
        return (error if self.count > 1 else torch.full_like(error, math.nan)).to(self.dtype)


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    x: Tensor,
    samples: int = 5000,
    chunk: int = 100,
    generator: torch.Generator | None = None,
    *,
    batch_size: int = 100,
    return_standard_error: bool = False,
    progress: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Estimate log p(x) of every observation by importance sampling from the encoder, ``[N]``, in nats.

    .. math:: \log p(x) \approx \log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad z_k \sim q(z \mid x)

    The estimate is a lower bound in expectation, of the model in evaluation mode. The weights stream through ``chunk``
    at a time, and the model sees no more of them at once than :data:`AT_ONCE` allows, so that memory is bounded
    whatever the model is. Used throughout the book; introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    model
        anything with a ``joint`` and an ``encoder``, such as :class:`vaelib.models.VAE`.
    x
        observations, ``[N, ...]``.
    samples, chunk, batch_size
        how many draws an observation, how many of them at a time, and for how many observations at a time.
    generator
        draws the noise, on the device of ``x``.
    return_standard_error
        return ``(values, standard_errors)``, the Monte Carlo error of each value by the delta method.
    progress
        show a progress bar.

    Raises
    ------
    InputError
        if there is nothing to evaluate, or the densities do not have the shape ``[K, B]``.
    """
    for part in ("joint", "encoder"):
        if not callable(getattr(model, part, None)):
            raise InputError(
                f"a model must have a joint and an encoder, but this {type(model).__name__} has no {part}: give "
                "models.VAE(joint, encoder), or any object with the two"
            )
    check_observations(x)
    if not len(x):
        raise InputError("there are no observations to evaluate: x has the shape " + str(list(x.shape)))
    for name, value in {"samples": samples, "chunk": chunk, "batch_size": batch_size}.items():
        whole_number(name, value, least=1)
    values, errors = [], []
    with evaluating(model.joint, model.encoder):
        for batch in tqdm(x.split(batch_size), desc="log p(x)", unit="batch", disable=not progress, leave=False):
            q = as_posterior(model.encoder(batch))
            if samples % q.strata:
                raise InputError(f"samples must be a multiple of the mixture's {q.strata} components, but is {samples}")
            estimate, step, most = StreamingLogMeanExp(), q.at_least(chunk), None
            for start in range(0, samples, step):
                eps = q.noise(min(step, samples - start), generator)
                z, log_q = ready(q, eps).sample_and_log_prob(eps)
                most = most or draws_at_once(model.joint, batch, z)
                log_p = log_joint_in_pieces(model.joint, most, batch, z)
                estimate.add(log_p - log_posterior(log_q, batch, z) + q.log_share(draws(eps)))
            values.append(estimate.value)
            errors.append(estimate.standard_error)
    return (torch.cat(values), torch.cat(errors)) if return_standard_error else torch.cat(values)


AT_ONCE = 2**25
"""Numbers that the largest tensor on the way to log p(x, z) may have: 128 MB of float32."""


def draws_at_once(joint: Callable[..., Tensor], x: Tensor, z: Latent) -> int:
    """Return for how many draws ``joint`` keeps to :data:`AT_ONCE`: one of one observation is made, and measured.

    It is the observation with the fewest zeros, which are the padding of a sentence: the longest one.
    """
    i = int(x.reshape(len(x), -1).count_nonzero(1).argmax())
    with Largest() as largest:
        log_joint(joint, x[i : i + 1], map_latent(lambda layer: layer[:1, i : i + 1], z))
    return max(1, AT_ONCE // largest.size)


def log_joint_in_pieces(joint: Callable[..., Tensor], most: int, x: Tensor, z: Latent) -> Tensor:
    """Return ``joint(x, z)``, ``[K, B]``, from at most ``most`` draws of all observations together at a time."""
    columns = min(len(x), most)
    rows = max(1, most // columns)

    def piece(j: int, i: int) -> Tensor:
        here = slice(j, j + rows), slice(i, i + columns)
        return log_joint(joint, x[here[1]], map_latent(lambda layer: layer[here], z))

    return torch.cat([torch.cat([piece(j, i) for i in range(0, len(x), columns)], 1) for j in range(0, draws(z), rows)])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made, views of others left out."""

    size = 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given, new = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), made))
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.size = max([self.size, *(t.numel() for t in new if t.untyped_storage().data_ptr() not in known)])
        return made


@contextmanager
def evaluating(*parts: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and each of their parts back into its own."""
    modes = [(module, module.training) for part in parts for module in modules_in(part)]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def mean_and_standard_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent ``values`` ``[N]`` and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@torch.no_grad()
def bound_by_draws(
    model: nn.Module, estimator: Estimator, x: Tensor, k: int, generator: torch.Generator, *, batch_size: int = 500
) -> Tensor:
    """Return the bound of ``k`` draws that ``estimator`` reports, for each observation of ``x`` ``[N, ...]``, ``[N]``.

    From draws whatever its loss makes of it, so that the bounds of all estimators are estimated alike.
    """
    values = []
    for batch in x.split(batch_size):
        q = as_posterior(model.encoder(batch))
        eps = q.noise(k, generator)
        log_w = log_weight(model.joint, batch, *ready(q, eps).sample_and_log_prob(eps))
        values.append(estimator.value(log_w, q.log_share(k)))
    return torch.cat(values)


@torch.no_grad()
def active_units(encoder: nn.Module, x: Tensor, threshold: float = 0.01, *, batch_size: int = 1000) -> list[int]:
    r"""Count the latent units that carry information, :math:`\operatorname{Var}_x(E_q[z_d])` above the threshold.

    (Burda et al. 2016; 0.01 is their threshold.) One number for each stochastic layer. The mean of a second layer is
    taken at the mean of the first; for a flow's stands the place where the mean of its Gaussian ends. The variance is
    over ``x`` ``[N, ...]``, gathered in batches; of a single observation it is 0.
    Introduced in book/01-elbo-forms.ipynb.
    """
    between("threshold", threshold, 0, math.inf)
    return [int((variance > threshold).sum()) for variance in activity(encoder, x, batch_size=batch_size)]


@torch.no_grad()
def activity(encoder: nn.Module, x: Tensor, *, batch_size: int = 1000) -> list[Tensor]:
    r"""Return :math:`\operatorname{Var}_x(E_q[z_d])` of each latent unit, ``[D]`` for each stochastic layer.

    As :func:`active_units` counts them.
    """
    check_observations(x)
    whole_number("batch_size", batch_size, least=1)
    with evaluating(encoder):
        layers = map(
            torch.cat, zip(*[as_posterior(encoder(batch)).means() for batch in x.split(batch_size)], strict=True)
        )
    variances = [(means - means.mean(0)).square().mean(0) for means in layers]
    if not all(variance.isfinite().all() for variance in variances):
        raise InputError(
            f"units are counted by the variance of their means over x, but over these {len(x)} observations it is not "
            "finite: look at x and at what the encoder makes of it"
        )
    return variances


def kl_by_unit(joint: Callable[..., Tensor], q: Posterior) -> Tensor | None:
    r"""Return :math:`\mathrm{KL}(q(z_d \mid x) \,\|\, p(z_d))` of each unit, ``[B, D]``; of choices, of each group.

    None where q or the prior does not factorise into units, the divergence has no closed form, or the joint does not
    tell its prior.
    """
    try:
        divergence(joint, q)
    except InputError:
        return None
    if isinstance(q, DiagonalGaussian):
        return q.kl_by_dimension()
    if isinstance(q, Discrete):
        axis = -1 if isinstance(q, FactorisedBernoulli) else -2
        alone, prior = (type(q)(part.logits.unsqueeze(axis)) for part in (q, joint.prior))
        return alone.kl(prior)
    return None


@torch.no_grad()
def mutual_information(
    encoder: nn.Module,
    x: Tensor,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    *,
    chunk: int = 100,
) -> float:
    r"""Estimate how much z tells about x under the encoder, in nats.

    It is :math:`I_q = \mathbb E_x\,\mathrm{KL}(q(z \mid x) \,\|\, q(z))`, estimated by

    .. math:: \hat I = \frac1N \sum_i \Big[ -H(q(z \mid x_i)) - \log \frac1B \sum_j q(z_i \mid x_j) \Big],
        \qquad z_i \sim q(z \mid x_i)

    The inner sum stands for the aggregate :math:`q(z) = \mathbb E_x[q(z \mid x)]`. With ``batch_size`` it runs over the
    minibatch of B that :math:`x_i` is in, as in He et al. (2019); since :math:`x_i` is one of them, the estimate is
    **at most log B in expectation** (3.47 for 32, 3.91 for 50), however much z tells. Without, it runs over all N, and
    the cap is log N. Averages over both; one draw for each x. Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    encoder
        called as ``encoder(x)``; its posterior must know its entropy.
    x
        observations, ``[N, ...]``.
    batch_size
        B; None for all of ``x``.
    generator
        draws the noise, on the device of ``x``.
    chunk
        observations that are encoded, or compared with all others, at a time; memory grows with ``chunk`` times N.

    Raises
    ------
    InputError
        if there are less than two observations in x, or asked for in a batch, or the posterior has no entropy in
        closed form.
    """
    check_observations(x)
    if batch_size is not None:
        whole_number("batch_size", batch_size, least=1)
    if min(len(x), batch_size or len(x)) < 2:
        raise InputError(
            f"mutual information needs 2 observations at least to compare, but there are {len(x)}"
            + ("" if batch_size is None else f" in batches of {batch_size}")
        )
    whole_number("chunk", chunk, least=1)
    with evaluating(encoder):
        total = sum(_information(encoder, batch, generator, chunk) for batch in x.split(batch_size or len(x)))
    return total / len(x)


def _information(encoder: nn.Module, x: Tensor, generator: torch.Generator | None, chunk: int) -> float:
    """Return the sum of the estimate's terms over ``x``, whose aggregate is its own."""
    parts = x.split(chunk)
    posteriors = [as_posterior(encoder(part)) for part in parts]
    samples, entropy = [], 0.0
    for part, q in zip(parts, posteriors, strict=True):
        if not hasattr(q, "entropy"):
            raise InputError(f"{type(q).__name__} has no entropy in closed form, which the estimate starts from")
        check_form(q, "entropy")
        samples.append(q.sample_and_log_prob(q.noise(1, generator)))
        entropy += q.entropy().double().expand(len(part)).sum().item()  # one of all may stand for each
    z = torch.cat([sample[0] for sample, _ in samples]).unsqueeze(1)  # [N, 1, D], against each posterior's [b, D]
    log_sum, start = z.new_full((len(x),), -math.inf, dtype=torch.float64), 0
    for part, q, (_, own) in zip(parts, posteriors, samples, strict=True):
        log_q = log_posterior(q.log_prob(z), part, z)
        log_q[start : start + len(part)].diagonal().copy_(own[0])  # without inverting q, which may be narrow
        log_sum, start = torch.logaddexp(log_sum, log_q.double().logsumexp(1)), start + len(part)
    return -entropy - (log_sum - math.log(len(x))).sum().item()
