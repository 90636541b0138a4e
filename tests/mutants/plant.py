"""Plant small changes in the numeric core, one at a time, and count those that the tests do not notice.

``python tests/mutants/plant.py`` takes the list in ``changes.json``: each is a file, a piece of text that stands in it
once, and what to put in its place. A change is planted in a copy of the package, the tests of that file are run until
one fails, and the outcome is a line of ``outcomes.csv``; a change whose line is there already, for the code and tests
as they are, is not tried again. ``--show`` prints the changes that went unnoticed. Not part of ``make test``: all of it
takes some two hours of one core.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLUMNS = ("file", "old", "new", "outcome", "by", "fingerprint")
TIMEOUT = 600  # seconds; a change that makes the tests hang is noticed

TESTS = {
    "vaelib/posteriors": ("posteriors", "mixtures", "objectives", "discrete", "flows", "gradients"),
    "vaelib/likelihoods.py": ("likelihoods", "models", "objectives"),
    "vaelib/bounds.py": ("bounds", "estimators", "objectives", "mixtures", "discrete"),
    "vaelib/estimators/silent.py": ("silent", "silent_experiments", "chapter_03"),
    "vaelib/estimators/discrete.py": ("discrete",),
    "vaelib/estimators": ("estimators", "objectives", "mixtures", "discrete", "silent"),
    "vaelib/objectives.py": ("objectives", "estimators"),
    "vaelib/flows.py": ("flows",),
    "vaelib/models/pixelcnn.py": ("pixelcnn",),
    "vaelib/models/text.py": ("text",),
    "vaelib/models": ("models", "silent", "discrete", "objectives"),
    "vaelib/layers.py": ("models", "flows"),
    "vaelib/gradients.py": ("gradients",),
    "vaelib/evaluation.py": ("evaluation", "collapse"),
    "vaelib/checks": ("checks",),
    "vaelib/training.py": ("training", "runs"),
    "vaelib/collapse.py": ("collapse", "lag"),
    "vaelib/stacked.py": ("stacked",),
    "vaelib/fast.py": ("fast", "training"),
    "vaelib/runs.py": ("runs", "cli"),
    "vaelib/data": ("data", "text"),
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

    def plant(self, root: Path) -> None:
        """Make the change in the copy of the package at ``root``."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file} has {self.old!r} {text.count(self.old)} times, not once: mend changes.json")
        path.write_text(text.replace(self.old, self.new))

    def outcome(self) -> dict[str, str]:
        """Return the line of the table: whether the tests noticed, and which one did."""
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for part in ("vaelib", "tests", "benchmarks", "book", "results"):
                shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", root)
            self.plant(root)
            by, outcome = "", "unnoticed"
            for test in self.tests:
                command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "--no-header", "--tb=no", test]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
                try:
                    done = subprocess.run(
                        command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT
                    )
                except subprocess.TimeoutExpired:
                    by, outcome = test, "hangs"
                    break
                if done.returncode:
                    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                    by, outcome = (failed[0].split(" - ")[0].split()[-1] if failed else test), "noticed"
                    break
        line = (self.file, self.old, self.new, outcome, by, self.fingerprint)
        return dict(zip(COLUMNS, line, strict=True))


def known(path: Path) -> dict[str, dict[str, str]]:
    """Return the lines of the table by their fingerprints."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {line["fingerprint"]: line for line in csv.DictReader(file)}


def tried(changes: list[Change], path: Path) -> Iterator[dict[str, str]]:
    """Yield the line of each change, from the table or by trying, and keep the table whole."""
    before, lines = known(path), []
    for change in changes:
        line = before.get(change.fingerprint)
        fresh = line is None
        lines.append(line or change.outcome())
        if fresh:
            rest = [other for other in before.values() if other["fingerprint"] not in {x["fingerprint"] for x in lines}]
            write([*lines, *rest], path)
        yield lines[-1]
    write(lines, path)


def write(lines: list[dict[str, str]], path: Path) -> None:
    """Write the table, whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--changes", type=Path, default=HERE / "changes.json")
    parser.add_argument("--outcomes", type=Path, default=HERE / "outcomes.csv")
    parser.add_argument("--files", nargs="*", default=[""], help="only changes of files whose path begins so")
    parser.add_argument("--show", action="store_true", help="print what went unnoticed, and try nothing")
    arguments = parser.parse_args()
    changes = [Change(**entry) for entry in json.loads(arguments.changes.read_text())]
    changes = [change for change in changes if change.file.startswith(tuple(arguments.files))]
    if arguments.show:
        have = known(arguments.outcomes)
        lines = [have[change.fingerprint] for change in changes if change.fingerprint in have]
    else:
        lines = []
        for line in tried(changes, arguments.outcomes):
            lines.append(line)
            print(f"{line['outcome']:9} {line['file']}: {line['old']!r} -> {line['new']!r}  {line['by']}", flush=True)
    missed = [line for line in lines if line["outcome"] == "unnoticed"]
    for line in missed if arguments.show else ():
        print(f"{line['file']}: {line['old']!r} -> {line['new']!r}")
    print(f"{len(missed)} of {len(lines)} changes went unnoticed")


if __name__ == "__main__":
    main()
