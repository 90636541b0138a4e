"""Total against path on MNIST for three epochs, several seeds: one row a run in results/stl-mnist-short.csv.

The one-layer model of Burda et al., dynamic binarisation, batches of 20, k = 1, Adam at 1e-3; -log p(x) of the first
1,000 test images with 500 importance samples. Runs that the table holds already are not made again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import subprocess
import tempfile
from pathlib import Path

import torch

from vaelib import runs
from vaelib.config import Config

TABLE = Path(__file__).resolve().parent.parent / "results/stl-mnist-short.csv"
ESTIMATORS = ("elbo-total", "elbo-path")


def rows() -> list[dict[str, str]]:
    """Return the rows of the table, as text."""
    return list(csv.DictReader(TABLE.open(newline=""))) if TABLE.exists() else []


def measure(estimator: str, seed: int) -> dict[str, object]:
    """Train and evaluate one model."""
    config = Config(data="mnist", model="mlp-1", estimator=estimator, epochs=3, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        seconds = runs.train(Path(folder) / "run", config)["training"]["seconds"]
        found = runs.evaluate(Path(folder) / "run", samples=500, limit=1000)
    code = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=TABLE.parent)
    return {
        "data": config.data, "model": config.model, "estimator": estimator, "k": config.k, "epochs": config.epochs,
        "lr": config.lr, "seed": seed, "images": found["images"], "samples": found["samples"],
        "nll": f"{found['nll']:.4f}", "nll_error": f"{found['nll_error']:.4f}", "bound": f"{found['bound']:.4f}",
        "seconds": seconds, "device": found["device"], "torch": found["torch"],
        "date": datetime.date.today().isoformat(), "code": code.stdout.strip(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each estimator (default: %(default)s)")
    seeds = parser.parse_args().seeds
    torch.set_flush_denormal(True)
    for seed in range(seeds):
        for estimator in ESTIMATORS:
            if any(row["estimator"] == estimator and int(row["seed"]) == seed for row in rows()):
                continue
            table = [*rows(), measure(estimator, seed)]
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
            runs.write(TABLE, text.getvalue().encode())
            print(f"{estimator}, seed {seed}: {table[-1]['nll']} nats", flush=True)


if __name__ == "__main__":
    main()
