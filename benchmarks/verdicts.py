"""Count the verdicts of ``vaelib advise`` on models whose answer is known, and hold its choice against the chart.

Three kinds of model on binarised digits, mlp-1 with 50 hidden units and 8 latents, one for each seed:

collapse  trained with a weight of 20 on the KL, which is not worth a unit of z: z is lost
lag       the decoder after 60 epochs, and the encoder that there was after 3: q is late
neither   the same training, whole

and two that lie nearer to the limit of half a nat:

half collapse  a weight of 3 on the KL, which leaves it a tenth or two of a nat
mild lag       the decoder after 60 epochs, and the encoder that there was after 20

whose truth is a second measurement, of images that the first did not have and with more draws; where that is within
three standard errors of the limit, it is "open", and no verdict is wrong.

Of each it is asked whether z is lost and whether q is late; a verdict is right, wrong, or "cannot tell". And the small
models of book/08-choosing.ipynb, trained as there: is the row for the ELBO that of the chart's leaf (of few bits:
enumeration, or DisARM where that costs less)?
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from rounds import finish, parser

from vaelib import advice, data, flows, gradients, models, training
from vaelib.collapse import elbo_kl
from vaelib.estimators import ESTIMATORS

EPOCHS = 60
WEIGHTS = {"collapse": 20.0, "half collapse": 3.0}
"""Of the KL."""

EARLY = {"lag": 3, "mild lag": 20}
"""The epochs of the encoder."""

TRUTH = {"collapse": ("yes", "no"), "lag": ("no", "yes"), "neither": ("no", "no")}
"""Whether z is lost, and whether q is late."""

CASES = (*TRUTH, "half collapse", "mild lag")

SMALL = {"hidden": 50, "latent": 8}
ZOO = {
    "linear": ("linear", {"latent": 8}, "elbo-path", 1e-2, "elbo-silent"),
    "one layer": ("mlp-1", SMALL, "elbo-path", 2e-3, "elbo-path"),
    "two layers": ("mlp-2", SMALL | {"hidden2": 30, "latent2": 6}, "elbo-path", 2e-3, "elbo-path"),
    "mixture": ("mlp-1-mixture", SMALL, "elbo-path", 2e-3, "elbo-path"),
    "flow": ("mlp-1", SMALL, "elbo-path", 2e-3, "elbo-path"),
    "bits": ("mlp-1-bernoulli", {"hidden": 50, "latent": 10}, "elbo-disarm", 2e-3, "elbo-exact elbo-disarm"),
    "many bits": ("mlp-1-bernoulli", {"hidden": 50, "latent": 20}, "elbo-disarm", 2e-3, "elbo-disarm"),
    "choices": ("mlp-1-categorical", {"hidden": 50, "latent": 5, "classes": 8}, "elbo-score-loo", 2e-3,
                "elbo-score-loo"),
}  # fmt: skip
"""The chapter's models, how they are trained, and the chart's row for their ELBO; bits and choices also beyond 12."""


def build(kind: str, seed: int, flow: bool = False, **sizes: int) -> models.VAE:
    """Return a model of the digits before its first step."""
    generator = training.stream("init", seed)
    model = models.build(kind, 64, data.load("digits").train.grey.mean(0), generator, **sizes)
    if flow:
        layers = [flows.AffineCoupling(8, (32,), 16, generator) for _ in range(2)]
        model.encoder = flows.FlowEncoder(model.encoder, layers, conditional=True, one_pass=True)
    return model


def planted(case: str, seed: int, epochs: int = EPOCHS) -> models.VAE:
    """Return a model whose answer is known."""
    model, split = build("mlp-1", seed, **SMALL), data.load("digits", "dynamic").train
    fit = functools.partial(training.fit, model, split, lr=2e-3, batch_size=50, seed=seed)
    if case in WEIGHTS:
        fit(elbo_kl(WEIGHTS[case]), epochs=epochs)
        return model
    early = copy.deepcopy(model)
    fit("elbo-path", epochs=epochs)
    if case not in EARLY:
        return model
    training.fit(early, split, "elbo-path", lr=2e-3, batch_size=50, seed=seed, epochs=min(EARLY[case], epochs))
    return models.VAE(model.joint, early.encoder, binary=True)


def observations(binary: bool) -> torch.Tensor:
    """Return the training images as a model sees them."""
    split = data.load("digits", "dynamic" if binary else "grey").train.sample(None)
    return split.batch(slice(None), training.stream("test", 0))


def measured(model: models.VAE, x: torch.Tensor) -> tuple[str, str]:
    """Return whether z is lost and q late by the test images, which are the last quarter of what the encoder gets."""
    split, noise = data.load("digits", "dynamic").test, training.stream("test", 1)
    unseen = split.batch(slice(None), noise)
    late = advice.lag(model, torch.cat([x[: 3 * len(unseen)], unseen]), ESTIMATORS["elbo-path"], noise, k=4)
    used = advice.usage(model, unseen, noise, draws=64)
    return tuple("open" if said == "cannot tell" else said for said in (used.collapsed, late.late))


def judge(case: str, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """Return the verdicts on a planted model."""
    torch.set_num_threads(1)
    model, x, noise = planted(case, seed, epochs), observations(True), training.stream("noise", seed)
    late = advice.lag(model, x, ESTIMATORS["elbo-path"], noise, k=4)
    used = advice.usage(model, x, noise)
    lost, is_late = TRUTH[case] if case in TRUTH else measured(model, x)
    return {
        "case": case, "seed": seed, "told": used.told.value, "told_error": used.told.error, "kl": used.kl.value,
        "kl_error": used.kl.error, "gain": late.gain.value, "gain_error": late.gain.error, "lost": used.collapsed,
        "lost_truth": lost, "late": late.late, "late_truth": is_late, "row": "", "chart": "", "agrees": "",
    }  # fmt: skip


def choose(case: str, seed: int, epochs: int = 15, seconds: float = 20.0) -> dict[str, Any]:
    """Return the choice for the ELBO on a model of the chapter."""
    torch.set_num_threads(1)
    kind, sizes, trained_by, lr, chart = ZOO[case]
    model = build(kind, seed, case == "flow", **sizes)
    split = data.load("digits", "dynamic" if model.binary else "grey").train
    draws = advice.draws_of(trained_by, 4)
    training.fit(model, split, trained_by, k=draws, lr=lr, batch_size=50, seed=seed, epochs=epochs)
    given = gradients.advise(
        model, observations(model.binary), seconds=seconds, generator=training.stream("noise", seed)
    )
    (choice,) = [choice for choice in given.choices if choice.aim == "elbo"]
    used, late = given.usage, given.lag.gain
    return {
        "case": case, "seed": seed, "told": used.told.value, "told_error": used.told.error, "kl": used.kl.value,
        "kl_error": used.kl.error, "gain": late.value, "gain_error": late.error, "lost": used.collapsed,
        "lost_truth": "", "late": given.lag.late, "late_truth": "", "row": choice.row, "chart": chart,
        "agrees": choice.agrees,
    }  # fmt: skip


def wrong(records: list[dict[str, Any]], question: str) -> int:
    """Count the verdicts that are the opposite of the truth."""
    return sum({record[question], record[f"{question}_truth"]} == {"yes", "no"} for record in records)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "advice")
    options.add_argument("--seeds", type=int, default=20, help="planted models of each kind (default: %(default)s)")
    options.add_argument("--models", type=int, default=3, help="seeds of each of the chapter's (default: %(default)s)")
    options.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    arguments = options.parse_args(argv)
    tasks: list[tuple[Callable[..., dict[str, Any]], str, int]] = [
        *((judge, case, seed) for case in CASES for seed in range(arguments.seeds)),
        *((choose, case, seed) for case in ZOO for seed in range(arguments.models)),
    ]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        records = [future.result() for future in [pool.submit(*task) for task in tasks]]
    for case in CASES:
        some = [record for record in records if record["case"] == case]
        for question in ("lost", "late"):
            unsure = sum(record[question] == "cannot tell" for record in some)
            truth = Counter(record[f"{question}_truth"] for record in some)
            print(
                f"{case}: {question}? {len(some)} models, truth {dict(truth)}: {wrong(some, question)} wrong, {unsure} "
                "cannot tell"
            )
    for case in ZOO:
        some = [record for record in records if record["case"] == case]
        print(f"{case}: {', '.join(record['row'] for record in some)} (chart: {ZOO[case][-1]})")
    finish(arguments.output, records)


if __name__ == "__main__":
    main()
