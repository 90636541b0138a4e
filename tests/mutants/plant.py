"""Plant small changes in the numeric core, one at a time, and count those that the tests do not notice.

``python tests/mutants/plant.py`` takes the list in ``changes.json``: each is a file, a piece of text that stands in it
once, and what to put in its place. A change is planted in a copy of the package, the tests of that file which call the
changed function are run, quick ones first, until one fails, and the outcome is a line of ``outcomes.csv``; a change
whose line is there already, for the code and tests as they are, is not tried again. ``--show`` prints the changes that
went unnoticed, ``--untried`` tries only those that have no line. Not part of ``make test``: all of it takes some twenty
minutes of one core.

Which tests call what is found once for a test file, by running it with an eye on every call, and kept beside the
table in ``calls.json`` (not committed; delete it where tests have come to call other functions). Tests that fail
without any change are left out there, and named. Each run is a fork of this process, which has loaded torch already.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CALLS = HERE / "calls.json"
COLUMNS = ("file", "old", "new", "outcome", "by", "seconds", "fingerprint")
TIMEOUT = 600  # seconds; a change that makes the tests hang is noticed
PATIENCE = 90  # seconds of tests, as they take without a change, for a change; what only later ones notice is missed
LOADED = (
    "torch", "torch.func", "torch.fx.experimental.proxy_tensor", "torch.distributed.tensor", "numpy", "pandas",
    "scipy.stats", "pytest", "hypothesis", "tqdm", "typer", "matplotlib.pyplot",
)  # fmt: skip

TESTS = {
    "vaelib/posteriors": (
        "posteriors",
        "mixtures",
        "silent",
        "objectives",
        "stopping",
        "discrete",
        "evaluation",
        "models",
    ),
    "vaelib/posteriors/stopping.py": ("stopping", "posteriors", "objectives"),
    "vaelib/posteriors/trial.py": ("stopping", "posteriors", "flows"),
    "vaelib/posteriors/discrete.py": ("discrete", "posteriors", "silent"),
    "vaelib/likelihoods.py": ("likelihoods", "models", "objectives"),
    "vaelib/bounds.py": ("bounds", "mixtures", "estimators", "objectives", "discrete"),
    "vaelib/estimators/silent.py": ("silent", "silent_experiments", "chapter_03"),
    "vaelib/estimators/discrete.py": ("discrete", "estimators"),
    "vaelib/estimators/gdreg.py": ("gdreg",),
    "vaelib/estimators": ("estimators", "bounds", "objectives", "mixtures", "discrete", "stopping", "gradients"),
    "vaelib/objectives.py": ("objectives", "estimators"),
    "vaelib/flows.py": ("flows", "chapter_06"),
    "vaelib/models/pixelcnn.py": ("pixelcnn",),
    "vaelib/models/text.py": ("text",),
    "vaelib/models/linear.py": ("models", "silent", "evaluation"),
    "vaelib/models": ("models", "silent", "discrete", "objectives", "reproductions"),
    "vaelib/layers.py": ("models", "flows"),
    "vaelib/gradients.py": ("gradients",),
    "vaelib/evaluation.py": ("evaluation", "collapse"),
    "vaelib/checks/contracts.py": ("checks", "posteriors", "estimators"),
    "vaelib/checks": ("checks",),
    "vaelib/training.py": ("training", "runs", "reproductions"),
    "vaelib/collapse.py": ("collapse", "lag"),
    "vaelib/stacked.py": ("stacked",),
    "vaelib/fast.py": ("fast", "training"),
    "vaelib/optimizers.py": ("training", "fast", "stacked", "collapse"),
    "vaelib/config.py": ("training", "runs", "reproductions"),
    "vaelib/runs.py": ("runs", "cli"),
    "vaelib/data/own.py": ("own",),
    "vaelib/data": ("data", "own", "text"),
    "vaelib/experiments/silent.py": ("silent_experiments", "experiments"),
    "vaelib/experiments/lag.py": ("lag", "experiments"),
    "vaelib/experiments": ("experiments", "silent_experiments", "lag"),
}
"""The tests that are to notice a change, most likely first, by the beginning of the file's path."""


@dataclass(frozen=True)
class Change:
    """One change: ``old`` stands once in ``file``, and ``new`` takes its place."""

    file: str
    old: str
    new: str

    @property
    def tests(self) -> list[str]:
        """The test files, as paths from the root."""
        prefix = max((p for p in TESTS if self.file.startswith(p)), key=len)
        return [path for name in TESTS[prefix] if (ROOT / (path := f"tests/test_{name}.py")).exists()]

    @property
    def fingerprint(self) -> str:
        """Of the change, and the code and tests that it is tried on."""
        parts = [self.file, self.old, self.new, *((ROOT / path).read_text() for path in (self.file, *self.tests))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def changed(self) -> str:
        """The text of the file with the change in it."""
        text = (ROOT / self.file).read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file} has {self.old!r} {text.count(self.old)} times, not once: mend changes.json")
        return text.replace(self.old, self.new)

    @property
    def function(self) -> str | None:
        """The function that it is in, as ``file:Class.method``; None outside of functions."""
        text = (ROOT / self.file).read_text()
        line, found = text[: text.index(self.old)].count("\n") + 1, None
        todo: list[tuple[ast.AST, str]] = [(ast.parse(text), "")]
        while todo:
            node, prefix = todo.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    name = prefix + child.name
                    if child.lineno <= line <= child.end_lineno:
                        found = name if isinstance(child, ast.FunctionDef) else found
                        todo.append((child, name + (".<locals>." if isinstance(child, ast.FunctionDef) else ".")))
                else:
                    todo.append((child, prefix))
        return found and f"{self.file}:{found}"


# --- running tests ----------------------------------------------------------------------------------------------------


class Watcher:
    """A pytest plugin: runs the tests of a list in its order, and notes what fails and what each one calls."""

    def __init__(self, root: str, order: list[str] | None) -> None:
        self.root, self.order = root + os.sep, order
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.order is not None:
            place = {name: i for i, name in enumerate(self.order)}
            items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtest_protocol(self, item: Any) -> None:
        if self.order is None:
            self.look(item.nodeid)

    def look(self, name: str) -> None:
        """Note what is called from now on as called by the test ``name``."""
        seen: dict[int, Any] = {}

        def called(frame: Any, event: str, _: Any) -> None:
            if event == "call":
                seen[id(frame.f_code)] = frame.f_code

        self.tests[name] = {"start": time.process_time(), "seen": seen}
        sys.setprofile(called)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.order is None:
            sys.setprofile(None)
            test = self.tests[nodeid]
            test["seconds"] = round(time.process_time() - test.pop("start"), 2)
            codes = [code for code in test.pop("seen").values() if code.co_filename.startswith(self.root)]
            test["calls"] = sorted({f"{c.co_filename[len(self.root) :]}:{c.co_qualname}" for c in codes})


class Workshop:
    """A copy of the package in which changes are planted and tests are run."""

    def __init__(self, root: Path) -> None:
        self.root, self.planted = root, 0
        for part in ROOT.iterdir():
            if part.name in ("vaelib", "tests"):
                shutil.copytree(part, root / part.name, ignore=shutil.ignore_patterns("__pycache__", "*.json.part"))
            elif part.name not in (".git", ".venv", "pyproject.toml"):
                (root / part.name).symlink_to(part)
        shutil.copy(ROOT / "pyproject.toml", root)
        self.calls = json.loads(CALLS.read_text()) if CALLS.exists() else {}

    @contextmanager
    def planting(self, change: Change) -> Iterator[None]:
        """Make a change, and take it back."""
        path, before = self.root / change.file, ROOT / change.file
        self.planted += 1
        path.write_text(change.changed)
        os.utime(path, (0, self.planted))  # or Python takes the compiled file of one planted in the same second
        try:
            yield
        finally:
            shutil.copy2(before, path)

    def run(self, test: str, order: list[str] | None = None) -> dict[str, Any] | None:
        """Run the tests of a file, as it stands now, in a fork; None if they hang."""
        shutil.copy2(ROOT / test, self.root / test)
        receive, send = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=self.within, args=(test, order, send))
        child.start()
        send.close()
        try:
            return receive.recv() if receive.poll(TIMEOUT if order else 10 * TIMEOUT) else None
        except EOFError:  # it died
            return {"failed": [test], "tests": {}}
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.join()

    def within(self, test: str, order: list[str] | None, send: Any) -> None:
        """Run tests in this process, and send what was found."""
        import pytest

        os.setsid()
        os.chdir(self.root)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        sys.path[:0] = [str(self.root)]
        os.environ.update(PYTHONPATH=str(self.root), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # nbval alone takes 3 seconds
        watcher = Watcher(str(self.root), order)
        options = ["-q", "--no-header", "--tb=no", *(["-x"] if order is not None else [])]
        code = pytest.main([*options, test], plugins=[watcher])
        if code not in (0, 1, 5):
            watcher.failed.append(test)
        send.send({"failed": watcher.failed, "tests": watcher.tests})

    def known_calls(self, test: str) -> dict[str, dict[str, Any]]:
        """Return the tests of a file, with what each one calls and how long it takes."""
        mark = hashlib.sha256((ROOT / test).read_bytes()).hexdigest()[:16]
        if self.calls.get(test, {}).get("mark") != mark:
            found = self.run(test)
            if found is None or test in found["failed"]:
                raise SystemExit(f"{test} does not come to its end without a change: mend it, or wait for a quiet hour")
            if found["failed"]:
                print(f"these tests fail without a change: {', '.join(found['failed'])}", flush=True)
            tests = {name: entry for name, entry in found["tests"].items() if name not in found["failed"]}
            self.calls[test] = {"mark": mark, "tests": tests}
            CALLS.write_text(json.dumps(self.calls))
        return self.calls[test]["tests"]

    def attempts(self, change: Change, last: str) -> Iterator[tuple[str, list[str]]]:
        """Yield test files and the tests in them to run, in their order: first the one that noticed ``last`` time."""
        if last:
            yield last.split("::")[0], [last]
        function, left = change.function, PATIENCE
        for test in change.tests:
            tests, order = self.known_calls(test), []
            for name in sorted(tests, key=lambda name: tests[name]["seconds"]):
                if (function is None or function in tests[name]["calls"]) and left > 0:
                    order.append(name)
                    left -= tests[name]["seconds"]
            if order:
                yield test, order

    def try_out(self, change: Change, last: str = "") -> dict[str, Any]:
        """Return the line of the table: whether the tests noticed, and which one did."""
        by, outcome, seconds = "", "unnoticed", 0.0
        for test, order in self.attempts(change, last):
            start = time.monotonic()
            with self.planting(change):
                found = self.run(test, order)
            seconds += time.monotonic() - start
            if found is None or found["failed"]:
                by, outcome = (found["failed"][0], "noticed") if found else (test, "hangs")
                break
        line = (change.file, change.old, change.new, outcome, by, f"{seconds:.0f}", change.fingerprint)
        return dict(zip(COLUMNS, line, strict=True))


# --- the table --------------------------------------------------------------------------------------------------------


def known(path: Path) -> dict[str, dict[str, str]]:
    """Return the lines of the table by their fingerprints."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {line["fingerprint"]: line for line in csv.DictReader(file)}


def write(lines: list[dict[str, Any]], path: Path) -> None:
    """Write the table, whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    os.replace(part, path)


def tried(changes: list[Change], path: Path, order: list[Change]) -> Iterator[dict[str, Any]]:
    """Yield the line of each change, from the table or by trying; the table is kept in the order of the list.

    A line of other code or tests stands until its change is tried again.
    """
    table = {(line["file"], line["old"], line["new"]): line for line in known(path).values()}
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for change in order:
            key = (change.file, change.old, change.new)
            line = table.get(key, {})
            if line.get("fingerprint") != change.fingerprint:
                table[key] = workshop.try_out(change, line["by"] if line.get("outcome") == "noticed" else "")
                write([table[k] for k in ((c.file, c.old, c.new) for c in changes) if k in table], path)
            yield table[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--changes", type=Path, default=HERE / "changes.json")
    parser.add_argument("--outcomes", type=Path, default=HERE / "outcomes.csv")
    parser.add_argument("--files", nargs="*", default=[""], help="only changes of files whose path begins so")
    parser.add_argument("--untried", action="store_true", help="try only those that have no line yet")
    parser.add_argument("--again", action="store_true", help="try those again that went unnoticed, whatever changed")
    parser.add_argument("--show", action="store_true", help="print what went unnoticed, and try nothing")
    arguments = parser.parse_args()
    everything = [Change(**entry) for entry in json.loads(arguments.changes.read_text())]
    for change in everything:
        change.changed  # which says so where it cannot be planted
    order = [change for change in everything if change.file.startswith(tuple(arguments.files))]
    random.Random(0).shuffle(order)  # all files early, or in the order in which they are named
    order.sort(key=lambda change: next(i for i, path in enumerate(arguments.files) if change.file.startswith(path)))
    table = {(line["file"], line["old"], line["new"]): line for line in known(arguments.outcomes).values()}
    if arguments.untried:
        order = [c for c in order if (c.file, c.old, c.new) not in table]
    if arguments.again:
        order = [c for c in order if table.get((c.file, c.old, c.new), {}).get("outcome") == "unnoticed"]
    if arguments.show:
        lines = [table[key] for key in ((c.file, c.old, c.new) for c in order) if key in table]
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        for name in LOADED:
            importlib.import_module(name)
        lines = []
        for line in tried(everything, arguments.outcomes, order):
            lines.append(line)
            what = f"{line['file']}: {line['old']!r} -> {line['new']!r}"
            print(f"{line['outcome']:9} {line['seconds']:>4} s  {what}  {line['by']}", flush=True)
    missed = [line for line in lines if line["outcome"] == "unnoticed"]
    for line in missed if arguments.show else ():
        print(f"{line['file']}: {line['old']!r} -> {line['new']!r}")
    print(f"{len(missed)} of {len(lines)} changes went unnoticed")


if __name__ == "__main__":
    main()
