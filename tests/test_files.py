"""Files: whole or not there, those of others left alone, and one sentence for whatever comes in from outside."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vaelib import data, files
from vaelib.errors import InputError, enough_memory

PACKAGE = Path(files.__file__).parent


def test_nothing_else_in_the_package_opens_a_file():
    """One place where the outside comes in; what is given there is read from memory."""
    methods = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "read_csv", "loadtxt", "genfromtxt"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            opens = getattr(call.func, "attr", None) in methods or getattr(call.func, "id", None) == "open"
            if opens and not (words := ast.unparse(call)).startswith("files.") and "io." not in words:  # from memory
                found.add(f"{path.relative_to(PACKAGE)}: {words}")
    assert {one for one in found if not one.startswith("files.py: ")} == {
        "data/files.py: open(path, 'rb')",  # a part of a download, for its digest
        "data/files.py: open(target, 'wb')",  # what `atomic` gave
        "data/images.py: open(target, 'wb')",
        "data/images.py: archive.open(name)",  # within what was read
    }


def test_what_others_call_part_is_left_alone(tmp_path):
    theirs = [tmp_path / name for name in (".thesis.odt.part", "film.part", ".a.part", f"{'a' * 32}.part")]
    for path in theirs:
        path.write_text("mine")
    (tmp_path / f".x.{'0' * 32}.part").mkdir()
    ours = tmp_path / f".checkpoint.pt.{'0' * 32}.part"
    ours.write_text("half")
    files.sweep(tmp_path)
    assert not ours.exists() and all(path.read_text() == "mine" for path in theirs)
    assert (tmp_path / f".x.{'0' * 32}.part").is_dir()


def test_what_was_killed_is_swept_by_its_age_whatever_the_clock_said(tmp_path):
    """A day on either side of now is old; less may be another's that still writes, by a clock not quite ours."""
    ages = (-1e6, -100.0, 100.0, 1e6)
    parts = [tmp_path / f".file.{i:032x}.part" for i in range(len(ages))]
    for part, age in zip(parts, ages):
        part.touch()
        os.utime(part, (time.time() - age,) * 2)
    files.write(tmp_path / "file", b"new")
    assert [part.exists() for part in parts] == [False, True, True, False]
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


KILLED = """
import sys; from pathlib import Path; from vaelib import files
path = Path(sys.argv[1])
while True:
    for byte in b"ab":
        files.write(path, bytes([byte]) * 2_000_000)
        print("written", flush=True)
"""


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "file"
    for moment in range(5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.011 * moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        content = files.read(path)
        assert len(content) == 2_000_000 and content in (b"a" * 2_000_000, b"b" * 2_000_000)
    files.sweep(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_link_stays_one_and_a_dangling_one_is_told(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere/real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    files.write(link, b"new")
    assert link.is_symlink() and real.read_text() == "new" and len(list(real.parent.iterdir())) == 1
    real.unlink()
    with pytest.raises(InputError, match="link' is a link to '.*real', which is not there"):
        files.read(link)
    assert files.read(tmp_path / "nothing") is None
    far = tmp_path / "far"
    far.symlink_to(tmp_path / "gone" / "file")
    with pytest.raises(
        InputError,
        match="far' could not be written .*it is a link to '.*gone/file': its folder is gone or was never there",
    ):
        files.write(far, b"new")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    for read in (files.read, files.read_text, data.load):
        with pytest.raises(InputError, match="pipe.npy' is a pipe or a device and no file"):
            read(tmp_path / "pipe.npy" if read is not data.load else str(tmp_path / "pipe.npy"))


def test_each_reason_is_told_by_itself(tmp_path, small_disk):
    with pytest.raises(InputError, match="big' could not be written .No space left on device.; .* make room"):
        files.write(small_disk / "big", b"x" * 200_000)
    assert list(small_disk.iterdir()) == []
    with pytest.raises(InputError, match="its folder is gone or was never there: bring it back"):
        files.write(tmp_path / "gone/file", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="a folder has that name: move it out of the way"):
        files.write(tmp_path / "folder", b"")
    with pytest.raises(InputError, match="folder' cannot be read .Is a directory"):
        files.read(tmp_path / "folder")
    with pytest.raises(InputError, match="cannot be read"):
        files.read(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"null", "is no JSON object"),
        (b"[]", "is no JSON object"),
        (b"3", "is no JSON object"),
        (b'{"a": "\xff"}', "is not text in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not text in UTF-8"),
        (b"\0\0", "is not text in UTF-8"),
        (b'{"k": 1, "b": {"k": 2, "k": 2}}', "is not JSON .'k' stands there twice"),
    ],
)
def test_json_of_another_kind_is_refused(tmp_path, content, sentence):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        files.read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_memory_is_told_from_other_errors():
    with pytest.raises(
        InputError, match="not enough memory, 68719476704 bytes were asked for at once: choose a smaller k"
    ):
        with enough_memory("k"):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476704 bytes.")
    with pytest.raises(InputError, match="not enough memory, 20.00 MiB were .* a smaller k or sizes"):
        with enough_memory("k", "sizes"):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
    with pytest.raises(InputError, match="not enough memory: choose"):
        with enough_memory("k"):
            raise MemoryError
    with pytest.raises(RuntimeError, match="shapes"):
        with enough_memory("k"):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


HOLDS = """
import sys, time; from pathlib import Path; from vaelib import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / ".lock"], stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(files.InUse, match="another process works in"), files.locked(tmp_path / ".lock"):
        pass
    process.kill()
    process.wait()
    with files.locked(tmp_path / ".lock"):
        pass
    assert os.listdir(tmp_path) == [".lock"]
