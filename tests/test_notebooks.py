"""`vaelib book`: the notebooks arrive, and what a reader has changed stays."""

import pytest

from vaelib import cli, notebooks
from vaelib.errors import InputError


def test_notebooks_are_copied_and_a_changed_one_stays(tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for name in ("00-a.ipynb", "01-b.ipynb"):
        (shipped / name).write_text("as shipped")
    monkeypatch.setattr(notebooks, "PLACES", (tmp_path / "nothing", shipped))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(["book", *arguments])
        assert not end.value.code
        return capsys.readouterr().out

    assert run() == "2 notebooks copied into quiet-gradients\n"
    changed = tmp_path / "quiet-gradients/00-a.ipynb"
    changed.write_text("as changed")
    (tmp_path / "quiet-gradients/01-b.ipynb").unlink()
    assert run("quiet-gradients") == "1 notebooks copied into quiet-gradients, 1 kept as they were\n"
    assert changed.read_text() == "as changed"
    assert (tmp_path / "quiet-gradients/01-b.ipynb").read_text() == "as shipped"


def test_a_package_without_notebooks_says_so(tmp_path):
    with pytest.raises(InputError, match="came without notebooks: make them with `make editions`"):
        notebooks.copy(tmp_path / "here", (tmp_path,))
    assert not (tmp_path / "here").exists()
