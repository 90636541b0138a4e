"""The checks of every notebook under other seeds: ``python seeds.py run [NOTEBOOK ...]``, and ``fresh``.

A notebook's code runs as a script in which every seed is moved: every generator, and torch's own, starts at its seed
plus a multiple of a large number, so that initial weights, noise and the order of the data are others; only the
generators of :mod:`vaelib.data` stay, which make and choose the data sets. Checks are recorded and do not stop the run.
Each run is kept in ``.seeds/``; what has been run with the same code, of the notebook and of the package, is not run
again. ``results/seeds.csv`` has a row for each check.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import math
import os
import subprocess
import symtable
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
TABLE, KEPT = ROOT / "results/seeds.csv", ROOT / ".seeds"
STRIDE = 1_000_003
"""How far one run's seeds lie from the next's."""

SEEDS, FEWER = 50, 20
"""Other seeds of a notebook, and of one of :data:`SLOW`."""

SLOW = ("05-inference-lag", "08-choosing")
"""Notebooks that train for more than a minute."""

CONFIDENCE = 0.99
COLUMNS = ["chapter", "check", "kind", "runs", "failures", "margin_median", "margin_lowest", "stated", "at_least",
           "at_most", "code"]  # fmt: skip


# --- one run ----------------------------------------------------------------------------------------------------------


def move_seeds(by: int) -> None:
    """Let every ``manual_seed(s)`` from now on mean s + ``by``, but for the generators of :mod:`vaelib.data`."""
    import torch

    generator, global_seed = torch.Generator, torch.manual_seed

    class Kind(type(generator)):
        def __instancecheck__(cls, instance):
            return isinstance(instance, generator)

    class Moved(generator, metaclass=Kind):
        def manual_seed(self, seed):
            stays = sys._getframe(1).f_globals.get("__name__", "").startswith("vaelib.data")
            return super().manual_seed(seed if stays else (seed + by) % 2**63)

    torch.Generator = Moved
    torch.manual_seed = lambda seed: global_seed((seed + by) % 2**63)


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """A scope and all inside of it."""
    yield table
    for inner in table.get_children():
        yield from scopes(inner)


def statements(path: Path) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement of a notebook's code, and whether it depends on what is read from ``results/``."""
    stored: set[str] = set()
    for source in code(path):
        for node in ast.parse(source).body:
            said = ast.unparse(node)
            top = symtable.symtable(said, path.name, "exec")
            names = {s.get_name() for t in scopes(top) for s in t.get_symbols() if s.is_referenced() and s.is_global()}
            bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_namespace()}
            loops = [inner.target for inner in ast.walk(node) if isinstance(inner, ast.For)]
            names -= {n.id for target in loops for n in ast.walk(target) if isinstance(n, ast.Name)}
            reads = "results/" in said or "experiments.load" in said
            depends = reads or bool(names & stored)
            stored = stored | bound if depends else stored - bound
            yield node, depends


def code(path: Path) -> list[str]:
    """The source of every code cell."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_one(path: Path, seed: int) -> list[dict]:
    """Run a notebook with its seeds moved ``seed`` times; return its outcomes, the last of which is that it ended."""
    import matplotlib.pyplot as plt

    from vaelib import checks

    move_seeds(seed * STRIDE)
    space, outcomes, seen, error = {"__name__": "__main__"}, [], Counter(), ""
    os.chdir(path.parent)
    with checks.recorded() as record, contextlib.redirect_stdout(None):
        for node, stored in statements(path):
            before = len(record)
            try:
                exec(compile(ast.Module([node], []), path.name, "exec"), space)
            except Exception as found:
                error = f"{type(found).__name__}: {found}"
            for outcome in record[before:]:
                seen[outcome.name] += 1
                again = f" ({seen[outcome.name]})" if seen[outcome.name] > 1 else ""
                kind = "stored" if stored else outcome.kind
                outcomes.append(outcome._replace(name=outcome.name + again, kind=kind)._asdict())
            plt.close("all")
            if error:
                break
    return [*outcomes, checks.Outcome("it runs to its end", "notebook", not error, None, 0.0, error)._asdict()]


# --- many runs --------------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """What the syntax of a source says, without docstrings, comments and layout, and every module it may name."""

    says: str
    names: set[str]


def digest(path: Path) -> str:
    """What a run depends on: the code of the notebook and of the modules of the package that it comes to import."""
    cells, package = [parsed(source) for source in code(path)], modules()
    used, found = set(), list(cells)
    while found:
        new = found.pop().names & set(package) - used
        used |= new
        found += [package[name] for name in new]
    says = "\n".join(part.says for part in [*cells, *(package[name] for name in sorted(used))])
    return hashlib.sha256(says.encode()).hexdigest()[:12]


@functools.cache
def modules() -> dict[str, Code]:
    """The modules of the package by their dotted names."""
    files = sorted((ROOT / "vaelib").rglob("*.py"))
    names = (file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in files)
    return {
        name.removesuffix(".__init__"): parsed(file.read_text("utf-8")) for name, file in zip(names, files, strict=True)
    }


def parsed(source: str) -> Code:
    """Read a source; a module is named by an import, at the top or in a function, or by a string."""
    tree, named = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.add(node.value)
    parts = (name.split(".") for name in named)
    return Code(ast.dump(Bare().visit(tree)), {".".join(part[:i]) for part in parts for i in range(1, len(part) + 1)})


class Bare(ast.NodeTransformer):
    """Takes out what stands as a sentence of its own: docstrings."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        sentence = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if sentence else node


def kept(path: Path) -> Path:
    """The folder of a notebook's runs with its present code, a file a seed."""
    return KEPT / path.stem / digest(path)


def enough(path: Path) -> int:
    """How many other seeds a notebook needs to count as complete."""
    return FEWER if path.stem in SLOW else SEEDS


def run(paths: list[Path], seeds: int | None, workers: int) -> None:
    """Run what has not been run yet, ``workers`` notebooks at a time, and write the table at the end."""

    def one(job: tuple[Path, int]) -> None:
        path, seed = job
        done = launch(path, seed, folders[path] / f"{seed}.json")
        if done.returncode:
            print(f"{path.stem}, seed {seed}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return
        print(f"{path.stem}, seed {seed}", flush=True)

    folders = {path: kept(path) for path in paths}
    todo = sorted((seed, path) for path in paths for seed in range(1, (seeds or enough(path)) + 1))
    jobs = [(path, seed) for seed, path in todo if not (folders[path] / f"{seed}.json").exists()]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, jobs))
    tabulate(paths)


def launch(path: Path, seed: int, out: Path) -> subprocess.CompletedProcess:
    """Run one notebook in a process of its own, which writes its outcomes to ``out``."""
    command = [sys.executable, __file__, "one", str(path), str(seed), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text, "utf-8")
    part.replace(path)


# --- the table --------------------------------------------------------------------------------------------------------


def rows(chapter: str, runs: list[list[dict]], code: str) -> Iterator[dict]:
    """A row for each check of a notebook, from the outcomes of its runs."""
    found = defaultdict(list)
    for outcomes in runs:
        for outcome in outcomes:
            found[outcome["name"]].append(outcome)
    for name, outcomes in found.items():
        kind, stated = outcomes[0]["kind"], outcomes[0]["rate"]
        margins = pd.Series([o["margin"] for o in outcomes], dtype=float)
        failures = sum(not o["holds"] for o in outcomes)
        least, most = (0.0, 1.0) if kind == "stored" else bounds(kind, margins, failures)
        yield dict(zip(COLUMNS, (
            chapter, name, kind, len(outcomes), failures, round(margins.median(), 2), round(margins.min(), 2), stated,
            float(f"{least:.2g}"), float(f"{most:.2g}"), code), strict=True))  # fmt: skip


def bounds(kind: str, margins: pd.Series, failures: int) -> tuple[float, float]:
    """Bounds of the rate at which a check fails, each at 99%: from the count, and closer from the margins.

    The margins of ``unbiased`` are 4 - |z|, and z is normal, around 0 if the claim is true: the sum of z**2 is a
    chi-squared variable whose noncentrality is bounded. Those of a comparison are normal. Those of ``biased`` are
    |z| - 4; where the bias is another for each seed, log |z| may be normal instead, and the wider bounds count.
    """
    from scipy import optimize, stats

    n = len(margins)
    low = stats.beta.ppf(1 - CONFIDENCE, failures, n - failures + 1) if failures else 0.0
    high = stats.beta.ppf(CONFIDENCE, failures + 1, n - failures) if failures < n else 1.0
    if margins.isna().any() or n < 5 or margins.std() <= 1e-9 * margins.abs().max():
        return low, high
    if kind == "unbiased":
        total = ((4 - margins) ** 2).sum()

        def quantile(level: float) -> float:
            def gap(d: float) -> float:
                return stats.ncx2.cdf(total, n, n * d**2 + 1e-12) - level

            return 0.0 if gap(0) <= 0 else 20.0 if gap(20) > 0 else optimize.brentq(gap, 0, 20)

        shifts = quantile(CONFIDENCE), quantile(1 - CONFIDENCE)
        least, most = (float(stats.norm.sf(4 - d) + stats.norm.sf(4 + d)) for d in shifts)
    else:
        scales = [margins, np.log1p(margins / 4)] if kind == "biased" and margins.min() > -4 else [margins]
        leasts, mosts = zip(*map(normal_bounds, scales), strict=True)
        least, most = min(leasts), max(mosts)
    return max(low, least), max(low, most) if failures == 0 else high


def normal_bounds(margins: pd.Series) -> tuple[float, float]:
    """Bounds, each at 99%, of the probability that a normal variable of which these are draws is negative.

    The noncentral t distribution gives exact ones.
    """
    from scipy import optimize, stats

    n = len(margins)
    t = n**0.5 * margins.mean() / margins.std()

    def below(k: float) -> float:
        """How probable a t below the observed one is at the level k; scipy has NaN where it is 0 or 1 to rounding."""
        p = stats.nct.cdf(t, n - 1, n**0.5 * k)
        return float(n**0.5 * k < t) if math.isnan(p) else p

    def level_at(p: float) -> float:
        ends = -37 / n**0.5, 37 / n**0.5
        gaps = [below(k) - p for k in ends]
        if gaps[0] * gaps[1] > 0:  # it lies beyond them
            return ends[int(gaps[1] > 0)]
        return optimize.brentq(lambda k: below(k) - p, *ends)

    levels = [
        level_at(p)
        if abs(t) < 30
        else t / n**0.5 - (1 if p == CONFIDENCE else -1) * 2.33 * (1 / n + t**2 / n / 2 / (n - 1)) ** 0.5
        for p in (1 - CONFIDENCE, CONFIDENCE)
    ]
    rates = [float(stats.norm.sf(level)) for level in levels]
    return min(rates), max(rates)


def tabulate(paths: list[Path]) -> None:
    """Write the rows of these notebooks into the table, from the runs of their present code."""
    table = pd.read_csv(TABLE, dtype={"code": str}) if TABLE.exists() else pd.DataFrame(columns=COLUMNS)
    for path in paths:
        runs = [json.loads(file.read_text("utf-8")) for file in sorted(kept(path).glob("*.json"))]
        if runs:
            new = pd.DataFrame(rows(path.stem, runs, digest(path)), columns=COLUMNS)
            rest = table[table["chapter"] != path.stem]
            table = pd.concat([rest, new]) if len(rest) else new
    if len(table):
        write(TABLE, table.sort_values("chapter", kind="stable").to_csv(index=False))


def read() -> pd.DataFrame:
    return pd.read_csv(TABLE, dtype={"code": str})


def missing(table: pd.DataFrame, paths: list[Path]) -> list[str]:
    """What the table lacks, or has of other code or of too few runs: a sentence a notebook."""
    found = []
    for path in paths:
        of = table[table["chapter"] == path.stem]
        if of.empty:
            found.append(f"{path.stem}: never run")
        elif set(of["code"]) != {digest(path)}:
            found.append(f"{path.stem}: run with other code")
        elif of["runs"].max() < enough(path):
            found.append(f"{path.stem}: {of['runs'].max()} of {enough(path)} seeds")
    return found


def exceeding(table: pd.DataFrame) -> list[str]:
    """Checks that fail more often than they state, a sentence each; of stored results, those that fail at all."""
    refuted = (table["at_least"] > table["stated"]) | ((table["kind"] == "stored") & (table["failures"] > 0))
    return [
        f"{row.chapter}: {row.check}: {row.failures} of {row.runs} fail, margin {row.margin_median} in the median: "
        f"at least {row.at_least:g}, but {row.stated:g} stated"
        for row in table[refuted].itertuples()
    ]


# --- the page ---------------------------------------------------------------------------------------------------------


def summary() -> str:
    """The table that "How this book checks itself" shows, in Markdown: a line a notebook."""
    lines = [
        "| notebook | checks | of them statistical | other seeds | failures | least median margin |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for chapter, of in read().groupby("chapter", sort=True):
        of = of[of["kind"] != "notebook"]
        judged = of[of["margin_median"].notna() & (of["kind"] != "stored")]
        least = f"{judged['margin_median'].min():.1f}" if len(judged) else ""
        lines.append(
            f"| {chapter} | {len(of)} | {len(judged)} | {of['runs'].max()} | {of['failures'].sum()} | {least} |"
        )
    return "\n".join(lines)


def setup(app) -> dict:
    """Put the summary where a page says ``<!-- seeds -->``."""

    def fill(app, name, source) -> None:
        if "<!-- seeds -->" in source[0] and TABLE.exists():
            source[0] = source[0].replace("<!-- seeds -->", summary())

    app.connect("source-read", fill)
    return {"parallel_read_safe": True}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "one", "fresh"])
    parser.add_argument("what", nargs="*")
    parser.add_argument("--seeds", type=int, help=f"by default {SEEDS}, and {FEWER} of {' and '.join(SLOW)}")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_intermixed_args(arguments)
    if given.command == "one":
        path, seed, out = given.what
        write(Path(out).resolve(), json.dumps(run_one(Path(path).resolve(), int(seed))))
        return 0
    paths = [Path(name).resolve() for name in given.what] or sorted((ROOT / "book").glob("*.ipynb"))
    if given.command == "run":
        run(paths, given.seeds, given.workers)
    table = read() if TABLE.exists() else pd.DataFrame(columns=COLUMNS)
    found = missing(table, paths) + exceeding(table[table["chapter"].isin([path.stem for path in paths])])
    print("\n".join(found) or "every check keeps its rate")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
