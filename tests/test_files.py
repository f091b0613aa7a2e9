"""Files that appear whole or not at all, and folders with one writer."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from support import ROOT

from sgg_fast.files import (
    InUseError,
    check_text,
    discard,
    locked,
    replace_folder,
    write_aside,
    write_text,
    write_together,
)


def content(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_at_the_end_and_an_error_leaves_the_old_one(tmp_path, durable):
    path = tmp_path / "deep" / "a.json"
    with write_aside(path, durable) as aside:
        aside.write_text("one")
        assert not path.exists() and aside.parent == path.parent, "a rename never crosses file systems"
    assert content(tmp_path) == {"deep/a.json": "one"}
    with pytest.raises(RuntimeError), write_aside(path, durable) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert content(tmp_path) == {"deep/a.json": "one"}
    write_text(path, "two")
    assert content(tmp_path) == {"deep/a.json": "two"}


def test_a_durable_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with write_aside(path, durable=True) as aside:
        aside.write_bytes(b"x")
    assert seen == [(aside.name, False), (tmp_path.name, True)]


def test_the_last_file_of_a_set_goes_first_and_comes_last(tmp_path):
    names = ["a", "b", "mark"]
    for text in ("old", "new"):
        with write_together(tmp_path, names) as aside:
            for name in names:
                (aside / name).write_text(text)
        assert content(tmp_path) == dict.fromkeys(names, text)
    with pytest.raises(FileNotFoundError), write_together(tmp_path, names) as aside:
        (aside / "a").write_text("newest")  # b is missing
    assert content(tmp_path) == dict.fromkeys(names, "new")
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()  # cannot be replaced: the set has no mark then
    with pytest.raises(OSError), write_together(tmp_path, names) as aside:
        for name in names:
            (aside / name).write_text("newest")
    assert content(tmp_path) == {"a": "newest"}


def test_a_folder_is_replaced_and_discarded_as_a_whole(tmp_path):
    final = tmp_path / "run" / "final"
    for text in ("one", "two"):
        aside = tmp_path / "run" / "aside"
        aside.mkdir(parents=True)
        (aside / text).write_text(text)
        replace_folder(aside, final)
        assert content(tmp_path) == {f"run/final/{text}": text}
    discard(final)
    discard(final)
    assert content(tmp_path) == {}


def _hold(folder, entered, leave) -> None:
    with locked(folder):
        entered.set()
        leave.wait()


@pytest.mark.parametrize("killed", [False, True])
def test_one_process_has_a_folder_until_it_leaves_or_dies(tmp_path, killed):
    fork = multiprocessing.get_context("fork")
    entered, leave = fork.Event(), fork.Event()
    child = fork.Process(target=_hold, args=(tmp_path, entered, leave))
    child.start()
    assert entered.wait(30)
    for _ in range(2):  # who was refused does not take the name away
        with pytest.raises(InUseError, match=f"in use by process {child.pid} on .*: wait"), locked(tmp_path):
            pytest.fail("entered twice")
    os.kill(child.pid, signal.SIGKILL) if killed else leave.set()
    child.join(30)
    with locked(tmp_path):
        pass


def test_it_loads_no_torch():
    code = "import sys; import sgg_fast.files, sgg_fast.commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_flock_is_named_as_the_reason_and_another_folder_cures_it(tmp_path, monkeypatch, number):
    """The kernel's own answer for that folder alone; and no lock of another kind, which would outlive a kill."""
    folder, real = tmp_path / "share", fcntl.flock

    def flock(descriptor: int, what: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder)):
            raise OSError(number, os.strerror(number))
        real(descriptor, what)

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with pytest.raises(OSError) as caught, locked(folder):
            raise AssertionError
        said = str(caught.value)
        assert said.startswith(f"{folder}/lock: cannot be locked ({os.strerror(number)}): the file system of this ")
        assert not isinstance(caught.value, InUseError) and "\n" not in said
    with locked(tmp_path / "local"):
        pass


def test_a_value_that_is_not_text_is_refused_by_its_flag():
    check_text({"out": "pictures/\u00e9", "model": None, "num_images": 3})
    with pytest.raises(ValueError, match=r"^--graph-encoder: not UTF-8 text; give another name$"):
        check_text({"out": "a", "graph_encoder": "a\udcff"})
