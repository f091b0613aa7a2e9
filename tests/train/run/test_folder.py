"""The folder of a run: who may write there, room for its files, faults of a disk in one line, emptied but its lock."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from sgg_fast.config import ConfigError
from sgg_fast.files import LOCK, InUseError, locked
from sgg_fast.train.run import folder as module
from sgg_fast.train.run.folder import check_folder, check_room, clear, writing


def test_a_folder_that_can_be_made_passes_and_is_not_made(tmp_path, monkeypatch):
    check_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"--out: {tmp_path}/file is a file, not a folder"):
        check_folder(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=f"--out: {tmp_path} is not writable"):
        check_folder(tmp_path / "run")


def test_a_folder_in_use_is_refused_until_its_run_ends(tmp_path):
    with locked(tmp_path), pytest.raises(InUseError, match=f"in use by process {os.getpid()} on"):
        check_folder(tmp_path)
    check_folder(tmp_path)


def test_room_is_what_is_free_and_what_the_folder_holds(tmp_path):
    """A file without blocks stands for a terabyte of checkpoints, which the run would replace."""
    held, spare = 1 << 40, 1 << 36
    needed = shutil.disk_usage(tmp_path).free + held - spare
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    weights = tmp_path / "run" / "checkpoints" / "weights"
    with weights.open("wb") as file:
        file.truncate(held)
    check_room(tmp_path / "run", needed)
    weights.unlink()
    with pytest.raises(
        ConfigError, match=r"--out .*/run: \d+ MiB free, but checkpoints and result need \d+ MiB"
    ) as said:
        check_room(tmp_path / "run", needed)
    assert int(str(said.value).split("need ")[1].split()[0]) == (needed >> 20) + 1, "and the folder holds nothing"
    check_room(tmp_path / "absent" / "run", 0)


def write_text(path):
    with path.open("w") as file:
        file.write("x" * 10**6)


def write_state(path):
    torch.save({"w": torch.zeros(10**5)}, path)


def write_tensors(path):
    save_file({"w": torch.zeros(3)}, path / "absent" / "w.safetensors")


@pytest.mark.parametrize(
    ("write", "place"), [(write_text, "/dev/full"), (write_state, "/dev/full"), (write_tensors, "")]
)
def test_what_cannot_be_written_is_one_line_with_the_path_whatever_the_library_raises(tmp_path, write, place):
    """OSError, RuntimeError and SafetensorError."""
    path = tmp_path / "result"
    with (
        pytest.raises(OSError, match=rf"^{path}: cannot be written \(.+\): free space or make the folder") as caught,
        writing(path),
    ):
        write(type(path)(place) if place else tmp_path)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_other_errors_pass_and_a_full_disk_is_named(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path):
        raise RuntimeError("shapes differ")
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match=rf"cannot be written \({os.strerror(errno.ENOSPC)}\)"), writing(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file")


def test_emptied_is_everything_but_the_lock_and_what_links_point_to(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for path in (run / "checkpoints" / "step-0000001", other):
        path.mkdir(parents=True)
        (path / "weights").touch()
    (run / LOCK).write_text("process 1")
    (run / "log.jsonl").touch()
    (run / "tensorboard").symlink_to(other)
    clear(run)
    assert [path.name for path in run.iterdir()] == [LOCK] and (run / LOCK).read_text() == "process 1"
    assert (other / "weights").is_file()
