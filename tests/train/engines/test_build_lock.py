"""The lock of a build that was killed: deleted with a notice; that of a build that lives is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import DS_JSON, ROOT
from support.tiny_runs import flags

from sgg_fast.train.engines.build_lock import remove_stale_locks

BUILD = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """Where torch would guard DeepSpeed's build, in a folder of its own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "deepspeed_shm_comm").mkdir()
    return tmp_path / "deepspeed_shm_comm" / "lock"


@pytest.fixture
def build(lock):
    """A process that holds torch's own lock as a build does."""
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    yield process
    process.kill()
    process.wait()


def test_the_lock_of_a_killed_build_is_deleted_and_of_a_living_one_is_not(lock, build, caplog):
    remove_stale_locks(wait=0.1)
    assert lock.exists() and not caplog.text
    build.kill()
    build.wait()
    assert lock.exists(), "this is what the next start would wait for"
    remove_stale_locks(wait=0.1)
    assert not lock.exists()
    assert f"{lock}: left behind by a build that was killed" in caplog.text
    remove_stale_locks(wait=0.1)


@pytest.mark.parametrize("size, local_size, local_rank", [(16, 8, 0), (2, 2, 1)])
def test_other_machines_and_other_ranks_leave_it_alone(lock, monkeypatch, size, local_size, local_rank):
    lock.touch()
    for name, value in (("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", local_size), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))
    remove_stale_locks(wait=0.1)
    assert lock.exists()


@pytest.mark.slow
def test_deepspeed_builds_and_trains_where_a_killed_build_left_its_lock(lock, tmp_path):
    """The whole way, in a folder where nothing was built yet. Without the deletion this waits for ever."""
    lock.touch()
    argv = ["--stage", "finetune", "--deepspeed", DS_JSON, "--out", str(tmp_path / "run"), *flags(finetune_steps=1)]
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"{lock}: left behind by a build that was killed" in done.stderr
    assert (lock.parent / "deepspeed_shm_comm.so").is_file() and not lock.exists()
