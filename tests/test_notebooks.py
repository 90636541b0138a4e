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


def test_a_notebook_that_did_not_fit_on_the_disk_comes_the_next_time(small_disk, tmp_path):
    (tmp_path / "a.ipynb").write_text("x" * 100_000)
    (small_disk / "filler").write_bytes(b"x" * 100_000)
    with pytest.raises(InputError, match="a.ipynb' could not be written .No space left on device"):
        notebooks.copy(small_disk / "book", (tmp_path,))
    (small_disk / "filler").unlink()
    assert notebooks.copy(small_disk / "book", (tmp_path,)) == ([small_disk / "book/a.ipynb"], [])
    assert (small_disk / "book/a.ipynb").stat().st_size == 100_000


def test_a_link_to_nothing_is_not_written_through(tmp_path):
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from/a.ipynb").write_text("as shipped")
    (tmp_path / "to/a.ipynb").symlink_to(tmp_path / "elsewhere")
    assert notebooks.copy(tmp_path / "to", (tmp_path / "from",)) == ([], [tmp_path / "to/a.ipynb"])
    assert not (tmp_path / "elsewhere").exists()
