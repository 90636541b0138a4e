"""Measure how many gradients a second the laboratory takes, against a loop that takes one after the other.

vaelib.gradients.measure against the plain way: for each draw a forward and a backward pass, the gradient put in a list,
mean and variance at the end. elbo-path on the 784-200-200-50 model of Burda et al., float32, one image, one draw of z a
gradient; with respect to the posterior's own parameters and to the encoder's weights. Both must first find the same
variance. They are timed in turns, on one thread, by the process's own time; a ratio is taken within each round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rounds import clock, finish, parser, ratios, spread, take_turns
from torch import nn

from vaelib import gradients, models, objectives
from vaelib.estimators import ESTIMATORS
from vaelib.posteriors import DiagonalGaussian

ROW, PIXELS = "elbo-path", 784
DRAWS = {"posterior": 2000, "encoder": 60}
SIGMAS = 6.0


def loop(wrt: str, model: nn.Module, x: torch.Tensor, draws: int, generator: torch.Generator) -> float:
    """Return the total variance of the gradient, one draw after the other."""
    found = []
    for _ in range(draws):
        q = model.encoder(x)
        eps = q.noise(1, generator)
        if wrt == "posterior":
            leaves = [q.mean.detach().requires_grad_(), q.log_std.detach().requires_grad_()]
            objectives.backward(ESTIMATORS[ROW], model.joint, DiagonalGaussian(*leaves), x, eps)
        else:
            leaves = list(model.encoder.parameters())
            model.zero_grad()
            objectives.backward(ESTIMATORS[ROW], model.joint, q, x, eps)
        found.append(torch.cat([leaf.grad.flatten() for leaf in leaves]))
    return torch.stack(found).var(0).sum().item()


def laboratory(
    wrt: str, model: nn.Module, x: torch.Tensor, draws: int, generator: torch.Generator
) -> gradients.Moments:
    """Return what the laboratory finds."""
    return gradients.measure([ROW], model.joint, model.encoder, x, draws=draws, wrt=wrt, generator=generator)[ROW]


def measure(wrt: str, draws: int, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one set of parameters."""
    generator = torch.Generator().manual_seed(0)
    model = models.build("mlp-1", PIXELS, generator=generator)
    x = torch.rand((1, PIXELS), generator=generator).round()
    moments = laboratory(wrt, model, x, draws, generator)
    error = SIGMAS * 2**0.5 * moments.total_variance_error
    if abs(loop(wrt, model, x, draws, generator) - moments.total_variance) > error:
        raise SystemExit(f"the loop and the laboratory do not find the same variance, with respect to the {wrt}")
    ways: dict[str, Callable] = {"loop": loop, "laboratory": laboratory}
    calls = {name: (lambda way=way: way(wrt, model, x, draws, generator)) for name, way in ways.items()}
    times = take_turns(calls, rounds, clock(1), wrt)
    return [
        {"wrt": wrt, "way": name, "parameters": len(moments.mean), "draws": draws, "threads": 1, "rounds": rounds}
        | spread("draws_a_second", [draws / seconds for seconds in mine])
        | spread("times_the_loop", ratios(times["loop"], mine))
        for name, mine in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "benchmark-gradient-lab", rounds=20)
    options.add_argument("--wrt", nargs="+", choices=list(DRAWS), default=list(DRAWS))
    options.add_argument("--draws", type=int, help="in a round (default: 2000 of the posterior, 60 of the encoder)")
    arguments = options.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    records = [r for wrt in arguments.wrt for r in measure(wrt, arguments.draws or DRAWS[wrt], arguments.rounds)]
    finish(arguments.output, records)


if __name__ == "__main__":
    main()
