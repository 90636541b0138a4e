"""Measure training steps a second on an NVIDIA GPU: eager, compiled, in a CUDA graph, both; one seed and stacked ones.

A step is all of it (data order, dynamic binarisation on the device, noise, forward, backward, fused Adam): elbo-path,
the 784-200-200-50 model of Burda et al., float32, batches of 20. The ways are timed in turns, by the wall's clock after
the GPU has caught up. "share" is the floating-point work of the matrix products in a second, over that of one large
product of matrices in float32 on the same chip. Needs a GPU, and there is no other way to have these figures.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rounds import finish, parser, spread, take_turns
from stacked import training
from torch.utils.flop_counter import FlopCounterMode

from vaelib.stacked import StackedTraining
from vaelib.training import AT_ONCE, Training

WAYS = ("eager", "compiled", "graph", "compiled graph")
LARGE = 8192


def on_gpu(k: int, seed: int) -> Training:
    """Return one training whose data and model are on the GPU."""
    here = training("burda", k, seed)
    return Training(here.model.cuda(), here.split.to("cuda"), here.estimator, here.recipe)


def make(way: str, k: int, seeds: int) -> Training:
    """Return one training, or several stacked ones, that take their steps in this way."""
    loop: Any = on_gpu(k, 0) if seeds == 1 else StackedTraining([on_gpu(k, seed) for seed in range(seeds)])
    loop.compile = way != "eager"
    loop.hasten()
    loop.whole = loop.whole if "compiled" in way else None
    loop.captured = loop.captured if "graph" in way else None
    return loop


def steps(loop: Training, count: int) -> None:
    """Take at least ``count`` steps, and wait for them."""
    end = loop.step + count
    while loop.step < end:
        loop.note(loop.advance())
    torch.cuda.synchronize()


def chip() -> float:
    """Return the floating-point operations a second of a large product in float32."""
    a = torch.randn(LARGE, LARGE, device="cuda")
    a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return 10 * 2 * LARGE**3 / (time.perf_counter() - start)


def measure(k: int, seeds: int, rounds: int, rate: float) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one k and one number of seeds."""
    loops = {way: make(way, k, seeds) for way in WAYS}
    with FlopCounterMode(display=False) as counter:
        loops["eager"].note(loops["eager"].advance())
    count = 4 * AT_ONCE["cuda"]
    calls = {way: (lambda loop=loop: steps(loop, count)) for way, loop in loops.items()}
    times = take_turns(calls, rounds, time.perf_counter, f"k = {k}, {seeds} seeds")
    return [
        {"way": way, "k": k, "seeds": seeds, "gpu": torch.cuda.get_device_name(), "rounds": rounds}
        | spread("steps_a_second", [seeds * count / seconds for seconds in mine])
        | {"share": f"{max(count / seconds for seconds in mine) * counter.get_total_flops() / rate:.5f}"}
        for way, mine in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "benchmark-gpu", rounds=10)
    options.add_argument("--k", type=int, nargs="+", default=[1, 5, 50], help="draws (default: 1 5 50)")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 8, 32], help="stacked (default: 1 8 32)")
    arguments = options.parse_args(argv)
    if not torch.cuda.is_available():
        options.error("this benchmark needs an NVIDIA GPU, and torch finds none here")
    rate = chip()
    finish(
        arguments.output,
        [r for k in arguments.k for seeds in arguments.seeds for r in measure(k, seeds, arguments.rounds, rate)],
    )


if __name__ == "__main__":
    main()
