"""What is given away: a wheel that needs no repository, an archive of the sources that can be tested, addresses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import settings_of_book as settings
import yaml

import hatch_build

ROOT = Path(__file__).parent.parent
MADE_UP = "https://github.com/Someone/some-book"


def build(target, folder, root=ROOT):
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The archive of the sources, laid out."""
    folder = tmp_path_factory.mktemp("sources")
    with tarfile.open(build("sdist", tmp_path_factory.mktemp("sdist"))) as archive:
        archive.extractall(folder, filter="data")
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The wheel that is made from the archive of the sources."""
    return build("wheel", tmp_path_factory.mktemp("wheel"), sources)


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return message_from_bytes(archive.read(name))


def test_a_wheel_needs_no_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = """if True:
        import pathlib, sys
        from vaelib import cli, experiments, notebooks
        assert pathlib.Path(notebooks.__file__).is_relative_to(sys.argv[1])
        assert pathlib.Path(experiments.TABLES).is_relative_to(sys.argv[1])
        assert len(experiments.load("stl-figure-1", "short"))
        assert (experiments.TABLES / "benchmark-steps.csv").exists()
        cli.main(["book", "mine"])"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "PYTHONSAFEPATH": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    copied = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert copied == sorted(path.name for path in (ROOT / "book").glob("*.ipynb"))
    notebook = json.loads((tmp_path / "mine" / copied[0]).read_text("utf-8"))
    assert "find_spec" in "".join(notebook["cells"][0]["source"])
    assert (tmp_path / "site/vaelib/py.typed").exists()


def test_what_the_wheel_says_of_itself(wheel):
    said = metadata(wheel)
    assert said["Name"] == "vaelib" and said["Author"] and "Typing :: Typed" in said.get_all("Classifier")
    links = re.findall(r"\]\(([^)]+)\)", said.get_payload())
    assert links and all(link.startswith("https://") for link in links)
    assert (said.get_all("Project-URL") is None) == (settings.repository() == "")


def test_with_an_address_the_readme_leads_there():
    text = "![A line](book/a.png) and [a page](book/a.md), [abroad](https://example.org)"
    assert hatch_build.readme(text, MADE_UP) == (
        f"![A line]({MADE_UP}/raw/main/book/a.png) and [a page]({MADE_UP}/blob/main/book/a.md), "
        "[abroad](https://example.org)"
    )
    assert hatch_build.readme(text, "") == " and a page, [abroad](https://example.org)"


def test_with_an_address_the_metadata_has_it(monkeypatch):
    said = {}
    monkeypatch.setattr(settings, "repository", lambda root: MADE_UP)
    hatch_build.MetadataHook(str(ROOT), {}).update(said)
    assert said["urls"]["Source"] == MADE_UP and said["urls"]["Book"] == "https://someone.github.io/some-book"


def test_the_archive_of_the_sources_holds_the_book_and_its_tests_can_be_collected(sources):
    for name in ("book/index.md", "results/lag-toy.csv", "Makefile", "CHANGELOG.md", ".github/workflows/test.yml"):
        assert (sources / name).exists(), name
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_book.py", "tests/test_editions.py",
               "tests/test_site.py", "tests/test_house.py", "tests/test_reproductions.py"]  # fmt: skip
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, env={"PYTHONPATH": str(sources)})
    assert done.returncode == 0, done.stdout


# Where it runs


def workflow(name):
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text("utf-8"))


def test_each_python_that_is_promised_is_tested():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["classifiers"]
    promised = [found[1] for line in classifiers if (found := re.search(r":: (3\.\d+)$", line))]
    assert workflow("test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == promised


def test_the_workflows_ask_for_what_there_is():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for path in (ROOT / ".github/workflows").iterdir():
        jobs = workflow(path.name)["jobs"].values()
        for command in (step.get("run", "") for job in jobs for step in job["steps"]):
            for target in re.findall(r"^make (\S+)", command, re.MULTILINE):
                assert f"\n{target}:" in makefile, (path.name, target)
            for file in re.findall(r"python (\S+\.py)", command):
                assert (ROOT / file).exists(), (path.name, file)


def test_binder_and_the_container_make_the_environment_of_the_book():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    texts = [(ROOT / name).read_text("utf-8") for name in ("binder/environment.yml", "Containerfile")]
    for text in texts:
        (asked,) = re.findall(r"-e '?\.*\[([\w,]+)\]", text)
        assert set(asked.split(",")) <= set(extras) and re.search(r"-c \S*constraints\.txt", text)
    for text in (texts[1], (ROOT / "binder/postBuild").read_text("utf-8")):
        for file in re.findall(r"python (\S+\.py)", text):
            assert (ROOT / file).exists()
