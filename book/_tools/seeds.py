"""The checks of every notebook under other seeds: ``python seeds.py run [NOTEBOOK ...]``, and ``fresh``.

A notebook's code runs as a script in which every seed is moved: every generator, and torch's own, starts at its seed
plus a multiple of a large number, so that initial weights, noise and the order of the data are others; only the
generators of :mod:`vaelib.data` stay, which make and choose the data sets. Checks are recorded and do not stop the run.
Each run is kept in ``.seeds/``, with the names of the functions of the package that it called, which the first run of
a notebook notes for all; where these and the notebook say what they said, it is not run again. ``results/seeds.csv``
has a row for each check, and ``results/seeds-code.json`` the functions.
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
import re
import subprocess
import symtable
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
TABLE, USED, KEPT = ROOT / "results/seeds.csv", ROOT / "results/seeds-code.json", ROOT / ".seeds"
STRIDE = 1_000_003
"""How far one run's seeds lie from the next's."""

SEEDS, FEWER = 50, 20
"""Other seeds of a notebook, and of one of :data:`SLOW`."""

SLOW = ("00-vae", "03-silent-gradients", "05-inference-lag", "06-mixtures-and-iwae", "08-choosing")
"""Notebooks that train for more than half a minute."""

QUIET = {"cache", "contextmanager", "dataclass", "no_grad"}
"""Decorators that leave what they decorate where it is."""

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


# --- what a run used --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def called() -> Iterator[set[tuple[str, int]]]:
    """Collect the file and the first line of every function that is called in the block."""
    lines = set()

    def note(frame, event: str, argument) -> None:  # None: the lines inside are not traced
        lines.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    for module in (sys, threading):
        module.settrace(note)
    try:
        yield lines
    finally:
        for module in (sys, threading):
            module.settrace(None)


def uses(lines: set[tuple[str, int]]) -> dict[str, str]:
    """The modules of the package that are imported by now, and which of their functions begin at these lines."""
    found = {name: set() for name in modules() if name in sys.modules}
    names = {sys.modules[name].__file__: name for name in found}
    for file, line in lines:
        if file in names and (function := modules()[names[file]].lines.get(line)):
            found[names[file]].add(function)
    return {name: " ".join(sorted(functions)) for name, functions in sorted(found.items())}


class Source(NamedTuple):
    """A module, without docstrings, comments and layout, in the parts that it may be used by.

    Attributes
    ----------
    body
        what happens when it is imported.
    functions
        functions and methods by their names.
    names
        what classes, imports and plain assignments name: to have it does nothing. A class with a base has the heads of
        its methods, which may take the place of the base's.
    lines
        the function that a line belongs to.
    """

    body: str
    functions: dict[str, str]
    names: list[tuple[str, str]]
    lines: dict[int, str]


def digest(path: Path, used: dict[str, str]) -> str:
    """The code of a notebook, of what it ran of the package, and of all that is named in either."""
    package = {name: modules()[name] for name in used if name in modules()}
    says = {name: [used[name], source.body] for name, source in package.items()}
    for name, source in package.items():
        says[name] += [source.functions.get(function, "") for function in used[name].split()]
    says["a notebook"] = [ast.unparse(Bare().visit(ast.parse(cell))) for cell in code(path)]
    left = [(module, *one) for module, source in package.items() for one in source.names]
    while True:
        words = {name: set(re.findall(r"\w+", "\n".join(parts))) for name, parts in says.items()}
        anywhere = set().union(*words.values())
        new = [one for one in left if one[1] in (words[one[0]] if is_foreign(one[2]) else anywhere)]
        if not new:
            return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:12]
        left = [one for one in left if one not in new]
        for module, _, said in new:
            says[module].append(said)


@functools.cache
def modules() -> dict[str, Source]:
    """The modules of the package by their dotted names."""
    files = sorted((ROOT / "vaelib").rglob("*.py"))
    names = (file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in files)
    return {
        name.removesuffix(".__init__"): parsed(file.read_text("utf-8")) for name, file in zip(names, files, strict=True)
    }


def parsed(source: str) -> Source:
    """Read a source."""
    tree, functions, names, lines = Bare().visit(ast.parse(source)), {}, [], {}

    def take(nodes: list[ast.stmt], owner: ast.ClassDef | None = None) -> None:
        for node in list(nodes):
            if isinstance(node, ast.ClassDef) and owner is None:
                take(node.body, node)
                if is_quiet(node):
                    names.append((node.name, ast.unparse(node)))
                    nodes.remove(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{owner.name}.{node.name}" if owner else node.name
                functions[name] = functions.get(name, "") + ast.unparse(node)
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines.update(dict.fromkeys(range(first, node.end_lineno + 1), name))
                if is_quiet(node) and not (owner and owner.bases) and not node.name.startswith("__"):
                    nodes.remove(node)
                else:
                    node.body = []
            elif owner is None and not any(isinstance(inner, ast.Call) for inner in ast.walk(node)):
                if given := named_by(node):
                    names.extend(given)
                    nodes.remove(node)

    take(tree.body)
    return Source(ast.unparse(tree), functions, names, lines)


def is_foreign(said: str) -> bool:
    """Whether this imports something from outside of the package, which others name as it comes from there."""
    return said.startswith(("import ", "from ")) and not said.startswith("from vaelib")


def is_quiet(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it changes nothing to define it: its decorators, if any, do not enter it anywhere."""
    called = (decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list)
    return all(ast.unparse(decorator).rpartition(".")[2] in QUIET for decorator in called)


def named_by(node: ast.stmt) -> list[tuple[str, str]]:
    """The names that an import or an assignment of one plain name gives, and what each is."""
    match node:
        case ast.Import() | ast.ImportFrom():
            whence = f"from {'.' * node.level}{node.module or ''} " if isinstance(node, ast.ImportFrom) else ""
            given = [(alias.asname or alias.name, alias.name) for alias in node.names]
            return [(name.partition(".")[0], f"{whence}import {what} as {name}") for name, what in given]
        case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
            return [(name, ast.unparse(node))]
    return []


class Bare(ast.NodeTransformer):
    """Takes out what stands as a sentence of its own: docstrings."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        sentence = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if sentence else node


# --- many runs --------------------------------------------------------------------------------------------------------


def kept(path: Path) -> dict[int, dict]:
    """The runs of a notebook by their seeds, of which it and what it ran are still the same."""
    files = sorted((KEPT / path.stem).glob("*.json"))
    runs = {int(file.stem): json.loads(file.read_text("utf-8")) for file in files}
    now = functools.cache(lambda used: digest(path, json.loads(used)))
    return {seed: run for seed, run in runs.items() if run["code"] == now(json.dumps(run["used"]))}


def enough(path: Path) -> int:
    """How many other seeds a notebook needs to count as complete."""
    return FEWER if path.stem in SLOW else SEEDS


def run(paths: list[Path], seeds: int | None, workers: int) -> None:
    """Run what has not been run yet, ``workers`` notebooks at a time, and write the table at the end."""

    def one(job: tuple[Path, int]) -> None:
        path, seed = job
        done = launch(path, seed, KEPT / path.stem / f"{seed}.json")
        if done.returncode:
            print(f"{path.stem}, seed {seed}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return
        print(f"{path.stem}, seed {seed}", flush=True)

    found = {path: kept(path) for path in paths}
    todo = sorted((seed, path) for path in paths for seed in range(1, (seeds or enough(path)) + 1))
    jobs = [(path, seed) for seed, path in todo if seed not in found[path]]
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
    chi-squared variable whose noncentrality is bounded. Those of the others are t - 4 for a difference of t standard
    errors, and normal. One difference has a standard deviation of 1 of them; where they scatter more, it is another for
    each seed, so that log t may be normal instead, and the wider bounds count.
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
        wide = margins.var() > stats.chi2.ppf(CONFIDENCE, n - 1) / (n - 1)
        scales = [margins, np.log1p(margins / 4)] if wide and margins.min() > -4 else [margins]
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
    table, used = read()
    for path in paths:
        if runs := list(kept(path).values()):
            used[path.stem] = together(runs)
            outcomes, now = [run["outcomes"] for run in runs], digest(path, used[path.stem])
            new = pd.DataFrame(rows(path.stem, outcomes, now), columns=COLUMNS)
            rest = table[table["chapter"] != path.stem]
            table = pd.concat([rest, new]) if len(rest) else new
    if len(table):
        write(TABLE, table.sort_values("chapter", kind="stable").to_csv(index=False))
        write(USED, json.dumps(used, indent=1, sort_keys=True) + "\n")


def together(runs: list[dict]) -> dict[str, str]:
    """What any of some runs used."""
    found = defaultdict(set)
    for module, functions in (pair for one in runs for pair in one["used"].items()):
        found[module].update(functions.split())
    return {module: " ".join(sorted(functions)) for module, functions in sorted(found.items())}


def read() -> tuple[pd.DataFrame, dict[str, dict[str, str]]]:
    """The table, and what of the package the runs of each notebook used."""
    if not TABLE.exists():
        return pd.DataFrame(columns=COLUMNS), {}
    return pd.read_csv(TABLE, dtype={"code": str}), json.loads(USED.read_text("utf-8"))


def missing(table: pd.DataFrame, used: dict[str, dict[str, str]], paths: list[Path]) -> list[str]:
    """What the table lacks, or has of other code or of too few runs: a sentence a notebook."""
    found = []
    for path in paths:
        of = table[table["chapter"] == path.stem]
        if of.empty:
            found.append(f"{path.stem}: never run")
        elif set(of["code"]) != {digest(path, used.get(path.stem, {}))}:
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
    for chapter, of in read()[0].groupby("chapter", sort=True):
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
    parser.add_argument("--seeds", type=int, help=f"by default {SEEDS}, and {FEWER} of {', '.join(SLOW)}")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_intermixed_args(arguments)
    if given.command == "one":
        path, seed, out = given.what
        path, out = Path(path).resolve(), Path(out).resolve()
        if before := list(kept(path).values()):  # to note every call takes as long again
            outcomes, used = run_one(path, int(seed)), together(before)
        else:
            with called() as lines:
                outcomes = run_one(path, int(seed))
            used = uses(lines)
        write(out, json.dumps({"outcomes": outcomes, "used": used, "code": digest(path, used)}))
        return 0
    paths = [Path(name).resolve() for name in given.what] or sorted((ROOT / "book").glob("*.ipynb"))
    if given.command == "run":
        run(paths, given.seeds, given.workers)
    table, used = read()
    found = missing(table, used, paths) + exceeding(table[table["chapter"].isin([path.stem for path in paths])])
    print("\n".join(found) or "every check keeps its rate")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
