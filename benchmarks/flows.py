"""Measure what a path gradient costs a normalizing flow, in milliseconds and megabytes, against the total derivative.

A gradient is forward and backward of one estimate of -ELBO from 256 draws, on a stack of affine coupling layers in 32
dimensions, float32, with a standard normal target that costs nothing. Three ways to it: the total derivative by one
forward pass; the path gradient by inverting a stopped copy (vaelib.flows.Flow); the path gradient by carrying the force
along (vaelib.flows.OnePassFlow). The two path gradients must first agree. Times are the process's own CPU time on one
thread, taken in turns, round after round; a ratio to the total derivative is taken within each round. Memory is the
peak of what autograd keeps for a backward pass, without the parameters, counted by saved-tensor hooks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rounds import clock, finish, parser, ratios, spread, take_turns
from torch import Tensor, nn

from vaelib import objectives
from vaelib.estimators import TABLEAU
from vaelib.flows import AffineCoupling, FlowEncoder, StandardNormal
from vaelib.posteriors import standard_normal_log_prob

DIM, DRAWS, LAYERS = 32, 256, 2
TOLERANCE = 1e-5


class Target(nn.Module):
    """log N(z; 0, I)."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return standard_normal_log_prob(z)


def make_encoder(depth: int, hidden: int, one_pass: bool) -> FlowEncoder:
    """Return a flow whose layers have random weights, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    layers = [AffineCoupling(DIM, [hidden] * LAYERS, generator=generator) for _ in range(depth)]
    with torch.no_grad():
        for layer in layers:
            for p in layer.network[-1].parameters():
                p.normal_(0, 0.05, generator=generator)
    return FlowEncoder(StandardNormal(DIM), layers, one_pass=one_pass)


def total(encoder: FlowEncoder, x: Tensor, eps: Tensor) -> None:
    """The total derivative, as automatic differentiation of the forward pass gives it."""
    z, log_q = encoder(x).sample_and_log_prob(eps)
    (log_q - Target()(x, z)).mean().backward()


def path(encoder: FlowEncoder, x: Tensor, eps: Tensor) -> None:
    """The path gradient; by which of the two ways, the encoder decides."""
    objectives.backward(TABLEAU["elbo-path"], Target(), encoder(x), x, eps)


METHODS: dict[str, tuple[Callable[[FlowEncoder, Tensor, Tensor], None], bool]] = {
    "total": (total, False),
    "path, stopped copy": (path, False),
    "path, one pass": (path, True),
}
"""The function that takes the gradient, and whether the flow carries the force along."""


class Graph:
    """Bytes that autograd keeps, each storage once and without the ``exempt``: as many as now, and at the peak."""

    def __init__(self, exempt: set[int]) -> None:
        self.exempt, self.holders, self.bytes, self.peak = exempt, {}, 0, 0

    def pack(self, tensor: Tensor) -> Kept:
        return Kept(self, tensor)


class Kept:
    """A saved tensor that takes note of when it is let go."""

    def __init__(self, graph: Graph, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.graph, self.tensor, self.key, self.size = graph, tensor, storage.data_ptr(), storage.nbytes()
        graph.holders[self.key] = graph.holders.get(self.key, 0) + 1
        if graph.holders[self.key] == 1 and self.key not in graph.exempt:
            graph.bytes += self.size
            graph.peak = max(graph.peak, graph.bytes)

    def __del__(self) -> None:
        graph = self.graph
        graph.holders[self.key] -= 1
        if graph.holders[self.key] == 0 and self.key not in graph.exempt:
            graph.bytes -= self.size


def megabytes(take: Callable[[], None], encoder: FlowEncoder) -> float:
    """Return the peak of what autograd keeps while ``take`` runs, in 10^6 bytes."""
    take()  # the first one also tries the posterior, once and for all
    graph = Graph({p.untyped_storage().data_ptr() for p in encoder.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(graph.pack, lambda kept: kept.tensor):
        take()
    return graph.peak / 1e6


def gradient(encoder: FlowEncoder) -> Tensor:
    return torch.cat([p.grad.flatten() for p in encoder.parameters()])


def measure(depth: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one depth."""
    x = torch.zeros(1, 1)
    eps = torch.randn(DRAWS, 1, DIM, generator=torch.Generator().manual_seed(1))
    encoders = {name: make_encoder(depth, arguments.hidden, one_pass) for name, (_, one_pass) in METHODS.items()}
    takes = {name: (lambda e=encoders[name], f=f: f(e, x, eps)) for name, (f, _) in METHODS.items()}
    memory = {name: megabytes(take, encoders[name]) for name, take in takes.items()}
    ours, theirs = (gradient(encoders[name]) for name in list(METHODS)[1:])
    if not (error := (ours - theirs).norm() / ours.norm()) <= TOLERANCE:
        raise SystemExit(f"the two path gradients differ by {error:.1e} at depth {depth}")
    times = take_turns(takes, arguments.rounds, clock(1), f"depth {depth}", lambda name: encoders[name].zero_grad())
    records = []
    for name, mine in times.items():
        settings = {"method": name, "depth": depth, "dim": DIM, "hidden": "x".join([str(arguments.hidden)] * LAYERS)}
        settings |= {"draws": DRAWS, "threads": 1, "rounds": arguments.rounds}
        settings |= spread("ms", [1e3 * seconds for seconds in mine])
        settings |= spread("ratio_to_total", ratios(mine, times["total"]))
        settings |= {"graph_mb": f"{memory[name]:.4f}", "graph_ratio": f"{memory[name] / memory['total']:.4f}"}
        records.append(settings)
    return records


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "benchmark-flows", rounds=60)
    options.add_argument("--depth", type=int, nargs="+", default=[2, 4, 8, 16], help="layers (default: 2 4 8 16)")
    options.add_argument("--hidden", type=int, default=128, help="width of both hidden layers (default: %(default)s)")
    arguments = options.parse_args(argv)
    torch.set_num_threads(1)
    finish(arguments.output, [record for depth in arguments.depth for record in measure(depth, arguments)])


if __name__ == "__main__":
    main()
