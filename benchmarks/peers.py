"""The libraries that :mod:`steps` times, each built on the same parameters, images and settings.

A library is a function ``(row, k, problem) -> Contestant``, entered into :data:`LIBRARIES`. It imports its packages
itself, inside its own worker process, so that no library's threads disturb another's. Parameters go in and gradients
come out as lists of NumPy arrays in the order of ``PlainVAE().parameters()``: encoder, mean, log_std, decoder.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

LEARNING_RATE, ADAM_EPS = 1e-3, 1e-4
WAKE_UP = 3  # untimed steps before each timed stretch: threads and caches come back


class Problem(NamedTuple):
    """What every library is given: images of 0 and 1 ``[N, 784]``, batch size, initial parameters, threads."""

    images: np.ndarray
    batch_size: int
    parameters: list[np.ndarray]
    threads: int

    def batches(self, convert: Callable) -> Iterator:
        """Return the resident batches of ``batch_size`` images, over and over."""
        full = len(self.images) // self.batch_size * self.batch_size
        return itertools.cycle([convert(batch) for batch in np.split(self.images[:full], full // self.batch_size)])


class Check(NamedTuple):
    """One evaluation at the initial parameters, to be compared with ours.

    ``objective`` says what the library calls its loss (see ``steps.reference``); ``gradient`` is None where the row's
    gradient is not that of its loss.
    """

    objective: str
    x: np.ndarray
    eps: np.ndarray
    loss: float
    gradient: list[np.ndarray] | None


class Contestant(NamedTuple):
    """A row ready to run: ``steps(n)`` trains n steps and returns when they are done; ``check()`` before that."""

    steps: Callable[[int], None]
    check: Callable[[], Check | None]


class Library(NamedTuple):
    """``package`` is its name for pip; ``rows(k)`` maps each row that exists for k to its bound."""

    package: str
    rows: Callable[[int], dict[str, str]]
    build: Callable[[str, int, Problem], Contestant]


LIBRARIES: dict[str, Library] = {}


def library(name: str, package: str, rows: Callable[[int], dict[str, str]]) -> Callable:
    """Enter the decorated builder into :data:`LIBRARIES`."""

    def enter(build: Callable[[str, int, Problem], Contestant]) -> Callable:
        LIBRARIES[name] = Library(package, rows, build)
        return build

    return enter


def both_bounds(k: int) -> dict[str, str]:
    return {"elbo": "elbo", "iwae": "iwae"}


def our_rows(k: int) -> dict[str, str]:
    from vaelib.estimators import TABLEAU

    return {name: row.bound for name, row in TABLEAU.items() if k >= row.least_k}


def torch_batches(problem: Problem) -> Iterator:
    import torch

    return problem.batches(torch.from_numpy)


def load(parameters, arrays: list[np.ndarray]) -> list:
    """Copy ``arrays`` into torch ``parameters`` and return these as a list."""
    import torch

    parameters = list(parameters)
    with torch.no_grad():
        for parameter, array in zip(parameters, arrays, strict=True):
            parameter.copy_(torch.from_numpy(array))
    return parameters


def take_gradient(parameters) -> list[np.ndarray]:
    """Return the gradients of torch ``parameters`` and clear them."""
    gradient = [parameter.grad.numpy().copy() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradient


def adam(parameters):
    import torch

    return torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=ADAM_EPS, fused=True)


@library("plain loop", "torch", both_bounds)
def plain(row: str, k: int, problem: Problem) -> Contestant:
    import torch
    from plain import PlainVAE, step

    model, generator, batches = PlainVAE(), torch.Generator().manual_seed(0), torch_batches(problem)
    parameters = load(model.parameters(), problem.parameters)
    optimizer = adam(parameters)

    def noise() -> torch.Tensor:
        return torch.randn((k, problem.batch_size, model.mean.out_features), generator=generator)

    def steps(n: int) -> None:
        for _ in range(n):
            step(model, optimizer, row, next(batches), noise())

    def check() -> Check:
        x, eps = next(batches), noise()
        loss = model.loss(row, x, eps)
        loss.backward()
        return Check(row, x.numpy(), eps.numpy(), loss.item(), take_gradient(parameters))

    return Contestant(steps, check)


@library("vaelib", "vaelib", our_rows)
def ours(row: str, k: int, problem: Problem) -> Contestant:
    import torch

    from vaelib import models, objectives
    from vaelib.estimators import TABLEAU
    from vaelib.posteriors import draw
    from vaelib.training import train_step

    estimator, batches = TABLEAU[row], torch_batches(problem)
    model, generator = models.build("mlp-1", problem.images.shape[1]), torch.Generator().manual_seed(0)
    parameters = load([*model.encoder.parameters(), *model.joint.parameters()], problem.parameters)
    optimizer = adam(parameters)
    noise = model.encoder(torch.as_tensor(problem.images[: problem.batch_size])).noise_like(k)

    def steps(n: int) -> None:
        for _ in range(n):
            train_step(model, estimator, optimizer, next(batches), draw(noise, generator))

    def check() -> Check:
        x = next(batches)
        eps = draw(noise, generator)
        loss = -objectives.backward(estimator, model.joint, model.encoder(x), x, eps).mean().item()
        found = take_gradient(parameters)
        is_total = row == f"{estimator.bound}-total"
        return Check(estimator.bound, x.numpy(), eps.numpy(), loss, found if is_total else None)

    return Contestant(steps, check)


@library("vaelib --compile", "vaelib", lambda k: {"iwae-total": "iwae"})
def compiled(row: str, k: int, problem: Problem) -> Contestant:
    import torch

    from vaelib import models
    from vaelib.config import Recipe
    from vaelib.data import Split
    from vaelib.posteriors import draw
    from vaelib.training import AT_ONCE, Training

    recipe = Recipe(k=k, lr=LEARNING_RATE, adam_eps=ADAM_EPS, batch_size=problem.batch_size)
    model = models.build("mlp-1", problem.images.shape[1])
    load([*model.encoder.parameters(), *model.joint.parameters()], problem.parameters)
    loop = Training(model, Split.of(problem.images), row, recipe, compile=True)
    batches, generator = torch_batches(problem), torch.Generator().manual_seed(0)
    noise = model.encoder(torch.as_tensor(problem.images[: problem.batch_size])).noise_like(k)

    def steps(n: int) -> None:
        for taken in range(0, n, AT_ONCE["cpu"]):
            on_end = min(AT_ONCE["cpu"], n - taken)
            loop.whole([(next(batches), draw(noise, generator)) for _ in range(on_end)])

    def check() -> None:
        for _ in range(2):  # the first steps are plain: there are no memories to write to
            steps(1)
        if not loop.whole.works:
            raise RuntimeError("torch.compile does not work here")

    return Contestant(steps, check)


@library("Pyro", "pyro-ppl", both_bounds)
def pyro_svi(row: str, k: int, problem: Problem) -> Contestant:
    """``svi.step`` with ``Trace_ELBO`` or ``RenyiELBO(alpha=0)``, particles vectorised, validation off."""
    import pyro
    import pyro.distributions as dist
    import torch
    from plain import PlainVAE
    from pyro.infer import SVI, RenyiELBO, Trace_ELBO

    pyro.enable_validation(False)
    network, batches = PlainVAE(), torch_batches(problem)
    parameters = load(network.parameters(), problem.parameters)
    name, latent, size = f"{row} {k}", network.mean.out_features, problem.batch_size  # names are global in Pyro
    zero, one = torch.zeros(latent), torch.ones(latent)

    def model(x):
        pyro.module(f"decoder {name}", network.decoder)
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(zero, one).expand([size, latent]).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=network.decoder(z)).to_event(1), obs=x)

    def guide(x):
        for part in ("encoder", "mean", "log_std"):
            pyro.module(f"{part} {name}", getattr(network, part))
        hidden = network.encoder(x)
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(network.mean(hidden), network.log_std(hidden).exp()).to_event(1))

    options = {"num_particles": k, "vectorize_particles": True, "max_plate_nesting": 1}
    elbo = Trace_ELBO(**options) if row == "elbo" else RenyiELBO(alpha=0, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE, "eps": ADAM_EPS, "fused": True}), elbo)

    def steps(n: int) -> None:
        for _ in range(n):
            svi.step(next(batches))

    def check() -> Check:
        x = next(batches)
        torch.manual_seed(0)
        eps = torch.randn(k, size, latent)  # the draws that the guide makes from the same seed
        torch.manual_seed(0)
        loss = elbo.loss_and_grads(model, guide, x) / size
        return Check(row, x.numpy(), eps.numpy(), loss, [g / size for g in take_gradient(parameters)])

    return Contestant(steps, check)


@library("NumPyro", "numpyro", both_bounds)
def numpyro_svi(row: str, k: int, problem: Problem) -> Contestant:
    """``jit(svi.update)`` with ``Trace_ELBO`` or ``RenyiELBO(alpha=0)``; compiled before it is timed."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.handlers import seed, substitute, trace
    from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

    weights = [jnp.asarray(array) for array in problem.parameters]
    start = {"encoder$params": weights[:8], "decoder$params": weights[8:]}
    batches, size, latent = problem.batches(jnp.asarray), problem.batch_size, len(problem.parameters[4])

    def linear(x, weight, bias):
        return x @ weight.T + bias

    def encode(parameters, x):
        for index in (0, 2):
            x = jnp.tanh(linear(x, *parameters[index : index + 2]))
        return linear(x, *parameters[4:6]), linear(x, *parameters[6:8])

    def decode(parameters, z):
        for index in (0, 2):
            z = jnp.tanh(linear(z, *parameters[index : index + 2]))
        return linear(z, *parameters[4:6])

    def network(name, apply):
        return numpyro.module(name, (lambda key, shape: (None, start[f"{name}$params"]), apply), (1,))

    def model(x):
        decoder = network("decoder", decode)
        with numpyro.plate("data", size):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([latent]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        mean, log_std = network("encoder", encode)(x)
        with numpyro.plate("data", size):
            numpyro.sample("z", dist.Normal(mean, jnp.exp(log_std)).to_event(1))

    elbo = Trace_ELBO(num_particles=k) if row == "elbo" else RenyiELBO(alpha=0, num_particles=k)
    svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE, eps=ADAM_EPS), elbo)
    state = svi.init(jax.random.PRNGKey(0), next(batches))
    update = jax.jit(svi.update)

    def steps(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, loss = update(state, next(batches))
        jax.block_until_ready((state, loss))

    def noise(key, x):
        """Return the eps that the loss draws from ``key``: both losses give each particle its own key."""
        if row == "iwae":
            keys = jax.random.split(jax.random.split(key)[1], k)
        else:
            keys = jax.random.split(key, k) if k > 1 else [key]
        mean, log_std = encode(start["encoder$params"], x)

        def draw(key):
            seeded = seed(substitute(guide, data=start), jax.random.split(key)[1])
            return (trace(seeded).get_trace(x)["z"]["value"] - mean) / jnp.exp(log_std)

        return jnp.stack([draw(key) for key in keys])

    def check() -> Check:
        x, key = next(batches), jax.random.PRNGKey(1)
        loss, gradient = jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide, x) / size)(start)
        found = [np.asarray(g) for g in gradient["encoder$params"] + gradient["decoder$params"]]
        return Check(row, np.asarray(x), np.asarray(noise(key, x)), float(loss), found)

    return Contestant(steps, check)


@library("pythae", "pythae", lambda k: {"elbo-kl": "elbo", "iwae": "iwae"} if k == 1 else {"iwae": "iwae"})
def pythae_model(row: str, k: int, problem: Problem) -> Contestant:
    """pythae's ``VAE`` (one draw, KL in closed form) or ``IWAE``, in a bare loop without its trainer's callbacks."""
    import torch
    from plain import PlainVAE
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    network, batches = PlainVAE(), torch_batches(problem)
    parameters = load(network.parameters(), problem.parameters)
    latent, size = network.mean.out_features, problem.batch_size

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.hidden, self.mean, self.log_std = network.encoder, network.mean, network.log_std

        def forward(self, x):
            hidden = self.hidden(x)
            return ModelOutput(embedding=self.mean(hidden), log_covariance=2 * self.log_std(hidden))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.logits = network.decoder

        def forward(self, z):
            return ModelOutput(reconstruction=self.logits(z).sigmoid())

    sizes = {"input_dim": (problem.images.shape[1],), "latent_dim": latent, "reconstruction_loss": "bce"}
    if row == "iwae":
        model = IWAE(IWAEConfig(number_samples=k, **sizes), Encoder(), Decoder())
    else:
        model = VAE(VAEConfig(**sizes), Encoder(), Decoder())
    optimizer = adam(parameters)

    def steps(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            model({"data": next(batches)}).loss.backward()
            optimizer.step()

    def check() -> Check:
        x = next(batches)
        torch.manual_seed(0)
        eps = torch.randn(size, k, latent).transpose(0, 1).contiguous()  # the model's own draws
        torch.manual_seed(0)
        loss = model({"data": x}).loss
        loss.backward()
        objective = "iwae-weighted" if row == "iwae" else row
        return Check(objective, x.numpy(), eps.numpy(), loss.item(), take_gradient(parameters))

    return Contestant(steps, check)


@library("floor", "torch", lambda k: {"matrix products and Adam": "elbo"})
def floor(row: str, k: int, problem: Problem) -> Contestant:
    """The matrix products of one step, forward and backward, into memory that is there already, and fused Adam."""
    import torch

    parameters = [torch.tensor(array, requires_grad=True) for array in problem.parameters]
    products = []
    for index, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        rows = problem.batch_size * (k if index >= 4 else 1)  # the decoder follows the encoder's four layers
        outputs, inputs = weight.shape
        weight.grad, bias.grad = torch.randn(outputs, inputs), torch.randn(outputs)
        x, y = torch.randn(rows, inputs), torch.randn(rows, outputs)
        products.append((weight.detach(), bias.detach(), weight.grad, x, torch.empty_like(x), y, torch.empty_like(y)))
    optimizer = adam(parameters)

    def steps(n: int) -> None:
        for _ in range(n):
            for weight, bias, _, x, _, _, out in products:
                torch.addmm(bias, x, weight.t(), out=out)
            for index, (weight, _, weight_grad, x, x_grad, y, _) in enumerate(products):
                torch.mm(y.t(), x, out=weight_grad)
                if index > 0:  # nothing below the images wants a gradient
                    torch.mm(y, weight, out=x_grad)
            optimizer.step()

    return Contestant(steps, lambda: None)


def serve(connection: Connection, name: str, problem: Problem) -> None:
    """Answer requests for one library until told to stop: the body of its worker process.

    ``("build", k)`` answers ``[(row, bound, check), ...]``; ``("time", row, n)`` answers milliseconds a step.
    """
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: problem.threads])  # binds JAX as well
        if name != "NumPyro":
            import torch

            torch.set_num_threads(problem.threads)
            torch.set_flush_denormal(True)  # XLA does so by itself
        package, rows, build = LIBRARIES[name]
        connection.send(importlib.metadata.version(package))
        contestants: dict[str, Contestant] = {}
        while True:
            match connection.recv():
                case ("build", k):
                    contestants = {row: build(row, k, problem) for row in rows(k)}
                    connection.send([(row, bound, contestants[row].check()) for row, bound in rows(k).items()])
                case ("time", row, n):
                    contestants[row].steps(WAKE_UP)
                    start = time.perf_counter()
                    contestants[row].steps(n)
                    connection.send((time.perf_counter() - start) / n * 1e3)
                case _:
                    return
    except (EOFError, KeyboardInterrupt):
        return
    except ImportError as error:
        connection.send(error)
    except Exception:  # shown by the parent, which stops
        connection.send(RuntimeError(f"{name} failed: {traceback.format_exc()}"))
