"""The house: versions in step, commands documented, nothing of one machine in the files, a quiet import, no circles."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


# Versions


def unpinned(project: dict, constraints: str) -> list[str]:
    """Requirements of the project whose pin is missing, not exact, or outside their range."""
    lines = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    inexact = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    return inexact + [
        text
        for text, need in ((text, Requirement(text)) for text in wanted)
        if canonicalize_name(need.name) not in pins
        or not need.specifier.contains(pins[canonicalize_name(need.name)], prereleases=True)
    ]


def test_every_requirement_is_pinned_inside_its_range():
    assert unpinned(tomllib.loads(read("pyproject.toml"))["project"], read("constraints.txt")) == []


@pytest.mark.parametrize("constraints", ["", "numpy==1.26.0", "numpy>=2.0", "numpy==2.*"])
def test_a_pin_that_is_missing_or_out_of_range_is_found(constraints):
    project = {"dependencies": [], "optional-dependencies": {"book": ["numpy>=2.0,<3"]}}
    assert unpinned(project, "numpy==2.1.0") == []
    assert unpinned(project, constraints) != []


def test_conda_and_make_install_the_same_thing():
    conda = yaml.safe_load(read("environment.yml"))["dependencies"]
    assert conda[2]["pip"] == ["-c constraints.txt", "-e .[book,test,lab,source,ray]"]
    assert "pip install -c constraints.txt -e '.[book,test,lab,source,ray]'" in read("Makefile")
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert Requirement("python" + project["requires-python"]).specifier.contains(conda[0].removeprefix("python="))
    assert {"book", "test", "lab", "source"} <= set(project["optional-dependencies"])


def test_what_opens_the_readers_notebooks_knows_no_myst():
    """The extension for MyST leaves out what is folded, and numbers equations once more."""
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert [Requirement(text).name for text in extras["lab"]] == ["jupyterlab"]
    assert all("book,lab]" in read(name) for name in ("Containerfile", "binder/environment.yml"))
    recipe = read("Makefile").partition("\nlab: ")[2].partition("\n\n")[0]
    assert recipe.endswith("--LabApp.labextensions_path=work work")


def test_the_version_is_said_once():
    import vaelib

    assert yaml.safe_load(read("CITATION.cff"))["version"] == vaelib.__version__


# Commands and files


def undocumented(makefile: str, documents: str) -> list[str]:
    """Targets that the documents do not mention, and mentioned ones that do not exist."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    mentioned = set(re.findall(r"(?:^|`|\s)make ([a-z-]+)\b(?=`|  | #|$| PYTHON)", documents, re.MULTILINE))
    return sorted((targets ^ mentioned) - {"help", "distclean"})


def test_every_command_is_documented():
    assert undocumented(read("Makefile"), read("README.md")) == []
    assert undocumented(read("Makefile"), read("book/running.md")) == []


def test_a_command_that_is_undocumented_or_invented_is_found():
    makefile = "book: x  ## render\n\t@true\nlab:  ## open\n"
    assert undocumented(makefile, "`make book`\nmake lab   # opens") == []
    assert undocumented(makefile, "`make book`") == ["lab"]
    assert undocumented(makefile, "`make book` and `make lab` and `make coffee`") == ["coffee"]


def tool(name: str):
    """A script of ``book/_tools`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"book/_tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_python_that_cannot_make_the_environment_gets_a_sentence(tmp_path, monkeypatch):
    environment = tool("environment")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 10, 0))
        assert "3.11 or newer is needed" in environment.main(str(tmp_path / "new"))
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "python3-venv" in environment.main(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_notebooks_are_run_whole_or_left_alone(tmp_path, capsys):
    run_notebooks = tool("run_notebooks")
    cells = [
        new_code_cell("x = 2", metadata={"execution": {"iopub.status.idle": "now"}}),
        new_code_cell("print(x + 1)"),
    ]
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    nbformat.write(new_notebook(cells=cells), good)
    nbformat.write(new_notebook(cells=[*cells, new_code_cell("x / 0")]), bad)
    before = bad.read_bytes()

    assert run_notebooks.main([str(good), str(bad)]) == 1
    done = nbformat.read(good, as_version=4)
    assert [cell.execution_count for cell in done.cells] == [1, 2]
    assert done.cells[1].outputs[0].text == "3\n"
    assert done.cells[0].metadata == {} and set(done.metadata) == {"kernelspec", "language_info"}
    assert bad.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.ipynb", "good.ipynb"]
    dead = tmp_path / "dead.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("import os; os._exit(1)")]), dead)
    once = good.read_bytes()
    assert run_notebooks.main([str(dead), str(good)]) == 1
    assert "dead.ipynb was left as it is" in capsys.readouterr().err
    assert run_notebooks.main([str(good)]) == 0
    assert good.read_bytes() == once


def broken_links(folder: Path, text: str) -> list[str]:
    """Relative links of a Markdown text that lead nowhere."""
    return [
        target
        for target in re.findall(r"\]\(([^)#\s]+)\)", text)
        if "://" not in target and not (folder / target).exists()
    ]


def test_links_of_the_front_page_lead_somewhere(tmp_path):
    assert broken_links(ROOT, read("README.md") + read("CONTRIBUTING.md")) == []
    assert broken_links(tmp_path, "[a](missing.md) and ![b](missing.png)") == ["missing.md", "missing.png"]


MACHINE = re.compile(r"(?<![\w.~/\"'-])/(?:home|root|Users|work|workspace|mnt|opt|srv|scratch)/\w")


def tracked() -> list[Path]:
    """The files that belong to the project: those git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def machine_paths(paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        if path.suffix in {".png", ".npz", ".gz", ".pt"} or path.name == "test_book.py":
            continue
        text = path.read_text("utf-8")
        found += [f"{path.name}: {hit[0]}" for hit in MACHINE.finditer(text)]
    return found


def test_no_file_names_a_place_on_one_machine(tmp_path):
    assert machine_paths(tracked()) == []
    control = tmp_path / "config.py"
    control.write_text("folder = open(/" + "home/someone/data.txt)")
    assert len(machine_paths([control])) == 1


@pytest.mark.parametrize("rules", [("check",), ("format", "--diff")], ids=lambda rules: rules[0])
def test_the_code_keeps_the_rules_of_ruff(rules, tmp_path):
    def ruff(*paths) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ruff", *rules, "--no-cache", "--config", ROOT / "pyproject.toml", *paths]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    result = ruff(".")
    assert result.returncode == 0, result.stdout
    control = tmp_path / "control.py"
    control.write_text("import os, sys\nx = [1,2]\n")
    assert ruff(control).returncode == 1


# A quiet import

PROBE = """
import pkgutil, random, socket, sys, warnings
import matplotlib, numpy, torch

def state():
    return {
        "torch seed": torch.get_rng_state().tolist(),
        "numpy seed": str(numpy.random.get_state()),
        "python seed": random.getstate(),
        "warning filters": list(warnings.filters),
        "torch dtype": torch.get_default_dtype(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch grad": torch.is_grad_enabled(),
        "torch determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "torch precision": torch.get_float32_matmul_precision(),
        "denormals": bool(torch.tensor([1e-310], dtype=torch.float64).mul(1.0) == 0),
        "matplotlib": dict(matplotlib.rcParams),
    }

def refuse(*args, **kwargs):
    print("socket")
    raise OSError("no network at import")

def everything(name):
    package = __import__(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            __import__(module.name)

before = state()
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
everything(sys.argv[1])
after = state()
print("\\n".join(name for name in before if before[name] != after[name]))
"""


def touched(package: str, folder: Path) -> set[str]:
    """What importing every module of ``package`` from ``folder`` changes or reaches for."""
    result = subprocess.run([sys.executable, "-c", PROBE, package], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split("\n")) - {""}


def test_importing_the_package_changes_nothing():
    assert touched("vaelib", ROOT) == set()


LOUD = """
import random, socket, warnings
import matplotlib, numpy, torch

torch.manual_seed(0)
numpy.random.seed(0)
random.seed(0)
warnings.filterwarnings("ignore")
torch.set_default_dtype(torch.float64)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.set_grad_enabled(False)
torch.use_deterministic_algorithms(True)
torch.set_float32_matmul_precision("medium")
torch.set_flush_denormal(True)
matplotlib.rcParams["figure.dpi"] = 71
try:
    socket.create_connection(("localhost", 9))
except OSError:
    pass
"""


def test_an_import_that_changes_something_is_found(tmp_path):
    (tmp_path / "loud").mkdir()
    (tmp_path / "loud/__init__.py").write_text("")
    (tmp_path / "loud/module.py").write_text(LOUD)
    assert touched("loud", tmp_path) == {"socket", *re.findall(r'"([\w ]+)":', PROBE)}


# Who imports whom


def imports(folder: Path) -> dict[str, set[str]]:
    """For each module of a package, those of its modules that it imports, also inside functions; ``folder`` is it."""
    files = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in folder.rglob("*.py")
    }
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
                base = base if node.level else node.module
                found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Call) and "import" in ast.unparse(
                node.func
            ):  # import_module("vaelib.objectives")
                found = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            else:
                continue
            graph[name].update({*found} & files.keys() - {name})
    root = folder.name  # loads nothing by itself, and finds on demand what is above all others
    return {name: set() if name == root else found - {root} for name, found in graph.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves by way of others."""

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        todo = [name]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return sorted(name for name in graph if name in reached(name))


def test_no_two_files_import_each_other():
    graph = imports(ROOT / "vaelib")
    assert circles(graph) == []
    assert "vaelib.models.pixelcnn" in graph["vaelib.models.builders"]  # a lazy one is seen too
    assert "vaelib.errors" in graph["vaelib.posteriors.base"] and not graph["vaelib.errors"]


@pytest.mark.parametrize(
    "line", ["from loud.a import x", "from loud import a", "import loud.a", "from .a import x", "from . import a",
             "import_module('loud.a')"],
)  # fmt: skip
def test_a_circle_is_found_however_it_is_written(line, tmp_path):
    (tmp_path / "loud").mkdir()
    for name, text in {
        "__init__": "",
        "a": "import loud.b",
        "b": f"def f():\n    {line}",
        "c": "import loud.a",
    }.items():
        (tmp_path / f"loud/{name}.py").write_text(text)
    assert circles(imports(tmp_path / "loud")) == ["loud.a", "loud.b"]
    (tmp_path / "loud/b.py").write_text("import loud")
    assert circles(imports(tmp_path / "loud")) == []


LAYERS = (
    ("errors",),
    ("posteriors", "likelihoods", "bounds"),
    ("layers",),
    ("estimators", "objectives"),
    ("flows", "models"),
    ("evaluation", "advice", "gradients", "checks"),
    ("training", "collapse", "stacked"),
    ("runs",),
    ("experiments",),
    ("cli",),
)
"""The floors of the house, from the ground up; what is not named here may stand on any."""


def upwards(graph: dict[str, set[str]], layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports of a module of a higher floor."""
    floor = {name: i for i, names in enumerate(layers) for name in names}

    def of(module: str) -> int | None:
        return floor.get(module.split(".")[1]) if "." in module else None

    return sorted(
        f"{name} imports {other}"
        for name, found in graph.items()
        for other in found
        if None not in (of(name), of(other)) and of(other) > of(name)
    )


def test_imports_run_downwards():
    graph = imports(ROOT / "vaelib")
    assert upwards(graph, LAYERS) == []
    assert {name.split(".")[1] for name in graph if "." in name} >= {name for floor in LAYERS for name in floor}
    assert upwards({"vaelib.bounds": {"vaelib.models.vae"}}, LAYERS) == ["vaelib.bounds imports vaelib.models.vae"]


def loaded(statement: str) -> set[str]:
    """Every module that is there after ``statement`` in a new process."""
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import vaelib", {"torch", "numpy", "vaelib.errors"}),
        ("from vaelib import errors, config", {"torch", "numpy"}),
        ("from vaelib import models, gradients, evaluation", {"vaelib.models.pixelcnn", "vaelib.models.text"}),
        ("from vaelib import posteriors", {"vaelib.models", "vaelib.data", "vaelib.training", "matplotlib"}),
        ("import vaelib; vaelib.loss", {"vaelib.models", "vaelib.data", "vaelib.training", "matplotlib"}),
    ],
)  # fmt: skip
def test_an_import_loads_what_it_needs(statement, light):
    found = loaded(statement)
    assert "vaelib" in found and not found & light


def test_what_is_loaded_where_it_is_asked_for_is_found():
    assert "vaelib.models.pixelcnn" in loaded(
        "from vaelib import models; models.build('pixelcnn', 16, layers=3, maps=2)"
    )
    assert {"vaelib.estimators.silent", "torch"} <= loaded("from vaelib import silent, discrete, gdreg, tableau")


def test_every_change_that_is_planted_has_its_one_place():
    """A changed line takes its entry in tests/mutants/changes.json with it."""
    changes = json.loads((ROOT / "tests/mutants/changes.json").read_text())
    counts = [(ROOT / change["file"]).read_text().count(change["old"]) for change in changes]
    assert [change for change, count in zip(changes, counts, strict=True) if count != 1] == []


def test_the_package_s_own_names():
    import vaelib
    from vaelib import objectives

    assert vaelib.loss is objectives.loss
    with pytest.raises(AttributeError, match="module 'vaelib' has no attribute 'los'"):
        _ = vaelib.los
    with pytest.raises(ImportError):
        from vaelib import silence  # noqa: F401
