r"""What a trained model is worth: its log-likelihood and how much of its latent space it uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vaelib.errors import InputError
from vaelib.posteriors import Mixture


class StreamingLogMeanExp:
    r"""The log of a mean of exponentials, and its standard error, from values that arrive in chunks.

    Keeps, for each observation, the largest log-weight m so far and the sums of :math:`e^{\log w - m}` and of its
    square; nothing overflows, and memory does not grow with the number of values.
    """

    def __init__(self) -> None:
        self.count = 0
        self.peak = self.total = self.squares = None

    def add(self, log_w: Tensor) -> None:
        """Take in ``log_w`` ``[k, B]``."""
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
        return self.peak + (self.total / self.count).log()

    @property
    def standard_error(self) -> Tensor:
        r"""Its standard error by the delta method, :math:`\sqrt{\sum_k \tilde w_k^2 - 1/K}`, ``[B]``."""
        return (self.squares / self.total.square() - 1 / self.count).clamp_min(0).sqrt()


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
    at a time, so that memory depends on ``chunk`` and ``batch_size`` and not on ``samples`` or the number of
    observations. Used throughout the book; introduced in book/01-elbo-forms.ipynb.

    Parameters
    ----------
    model
        anything with a ``joint`` and an ``encoder`` (with ``noise``), such as :class:`vaelib.models.VAE`.
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
    """
    for name, value in {"samples": samples, "chunk": chunk, "batch_size": batch_size}.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, but is {value}")
    values, errors = [], []
    with evaluating(model.joint, model.encoder):
        for batch in tqdm(x.split(batch_size), desc="log p(x)", unit="batch", disable=not progress, leave=False):
            posterior = model.encoder(batch)
            estimate, step = StreamingLogMeanExp(), whole_shares(posterior, samples, chunk)
            for start in range(0, samples, step):
                eps = model.encoder.noise(min(step, samples - start), batch, generator)
                z = posterior.sample(eps)
                log_w = model.joint(batch, z) - posterior.log_prob(z)
                estimate.add(log_w + posterior.log_share(len(eps)) if isinstance(posterior, Mixture) else log_w)
            values.append(estimate.value)
            errors.append(estimate.standard_error)
    return (torch.cat(values), torch.cat(errors)) if return_standard_error else torch.cat(values)


@contextmanager
def evaluating(*parts: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and each of their parts back into its own."""
    modes = [(m, m.training) for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def whole_shares(posterior, samples: int, chunk: int) -> int:
    """Return how many draws to take at a time: ``chunk``, or of a mixture the next multiple of its components."""
    count = len(posterior.components) if isinstance(posterior, Mixture) else 1
    if samples % count:
        raise InputError(f"samples must be a multiple of the mixture's {count} components, but is {samples}")
    return -(-chunk // count) * count


def mean_and_standard_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent ``values`` ``[N]`` and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@torch.no_grad()
def active_units(encoder: nn.Module, x: Tensor, threshold: float = 0.01, *, batch_size: int = 1000) -> list[int]:
    r"""Count the latent units that carry information, :math:`\operatorname{Var}_x(E_q[z_d])` above the threshold.

    (Burda et al. 2016; 0.01 is their threshold.) One number for each stochastic layer. The mean of a second layer is
    taken at the mean of the first; for a flow's stands the place where the mean of its Gaussian ends. The variance is
    over ``x`` ``[N, ...]``, gathered in batches. Introduced in book/01-elbo-forms.ipynb.
    """
    with evaluating(encoder):
        layers = map(torch.cat, zip(*[posterior_means(encoder(batch)) for batch in x.split(batch_size)]))
    return [int(((means - means.mean(0)).square().mean(0) > threshold).sum()) for means in layers]


def posterior_means(posterior) -> tuple[Tensor, ...]:
    """Return the mean of each stochastic layer, ``[B, D]`` each; an upper layer's at the mean of the one below.

    A flow gives its ``centre`` instead.
    """
    if hasattr(posterior, "second"):
        return posterior.first.mean, posterior.second(posterior.first.mean).mean
    return (posterior.centre if hasattr(posterior, "centre") else posterior.mean,)


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
    the cap is log N. Averages over both; one draw for each x. Introduced in book/04-inference-lag.ipynb.

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
        if there are less than two observations in a batch, or the posterior has no entropy in closed form.
    """
    if min(len(x), len(x) if batch_size is None else batch_size) < 2:
        raise InputError(
            f"mutual information needs 2 observations at least to compare, but there are {len(x)}"
            + ("" if batch_size is None else f" in batches of {batch_size}")
        )
    with evaluating(encoder):
        total = sum(_information(encoder, batch, generator, chunk) for batch in x.split(batch_size or len(x)))
    return total / len(x)


def _information(encoder: nn.Module, x: Tensor, generator: torch.Generator | None, chunk: int) -> float:
    """Return the sum of the estimate's terms over ``x``, whose aggregate is its own."""
    z, entropy, log_sum = [], 0.0, None
    parts = x.split(chunk)
    posteriors = [encoder(part) for part in parts]
    for part, posterior in zip(parts, posteriors):
        if not hasattr(posterior, "entropy"):
            raise InputError(
                f"{type(posterior).__name__} has no entropy in closed form, which the estimate starts from"
            )
        z.append(posterior.sample(encoder.noise(1, part, generator))[0])
        entropy += posterior.entropy().double().sum().item()
    z = torch.cat(z).unsqueeze(1)  # [N, 1, D], against each posterior's [b, D]
    for posterior in posteriors:
        log_q = posterior.log_prob(z).double().logsumexp(1)
        log_sum = log_q if log_sum is None else torch.logaddexp(log_sum, log_q)
    return -entropy - (log_sum - math.log(len(x))).sum().item()
