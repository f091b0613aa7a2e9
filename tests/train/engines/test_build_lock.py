"""The lock of a build that was killed: deleted with a notice; that of a build that lives is left alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest
from support import DS_JSON, ROOT
from support.tiny_runs import flags

from sgg_fast.config import ConfigError
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
    assert lock.exists() and str(lock) not in caplog.text
    build.kill()
    build.wait()
    assert lock.exists(), "this is what the next start would wait for"
    remove_stale_locks(wait=0.1)
    assert not lock.exists()
    assert f"{lock}: left behind by a build that was killed" in caplog.text
    remove_stale_locks(wait=0.1)


COMPILES = """
import subprocess, sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=sys.argv[2])
print(child.pid, flush=True)
child.wait()
"""


def test_compilers_that_outlive_their_build_are_waited_for(lock, caplog):
    """As torch runs ninja: in the build's folder. Killed is the process that holds the lock, and it alone."""
    words = [sys.executable, "-c", COMPILES, str(lock), str(lock.parent)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    compiler = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with pytest.raises(ConfigError, match=f"processes {compiler} still build in .*wait until they end, or kill"):
            remove_stale_locks(wait=0.1, patience=0.3)
        assert lock.exists() and f"are at work (processes {compiler}): waiting" in caplog.text
        threading.Timer(0.5, os.kill, (compiler, signal.SIGKILL)).start()
        remove_stale_locks(wait=0.1)
        assert not lock.exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(compiler, signal.SIGKILL)


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
