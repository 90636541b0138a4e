"""Run notebooks in place, top to bottom, and store their outputs: ``python run_notebooks.py CHAPTER.ipynb ...``.

A notebook is written only if all of its cells ran, and holds nothing of the machine it ran on. A figure whose cell has
a path in its metadata as ``picture`` is stored there too.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

from vaelib.files import write

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TRANSIENT = ("ExecuteTime", "collapsed", "execution", "scrolled", "trusted")


def run(path: Path) -> None:
    """Execute the notebook at ``path`` in its own folder and replace the file whole."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": path.parent}},
    ).execute()
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for key in TRANSIENT:
            cell.metadata.pop(key, None)
        if "picture" in cell.metadata:
            (png,) = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
            write(path.parent / cell.metadata["picture"], base64.b64decode(png))
    write(path, (nbformat.writes(notebook) + "\n").encode())


def main(paths: list[str]) -> int:
    """Run every notebook named; return the number that failed."""
    failed = 0
    for path in map(Path, paths):
        print(f"{path} ...", flush=True)
        try:
            run(path)
        except (CellControlSignal, DeadKernelError) as error:
            failed += 1
            print(f"{path} was left as it is; a cell failed:\n{error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
