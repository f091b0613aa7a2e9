"""Real faults in real processes: kill -9, signals, full disks, processes that die or hang. See docs/RELIABILITY.md."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import DS_JSON
from support.forks import Child, ForkServer
from support.tiny_runs import flags, lines, rows, same_weights

from sgg_fast.train.run.checkpoint import MANIFEST, checkpoint_dir, checkpoint_steps, newest_checkpoint, read_manifest
from sgg_fast.train.run.processes import EXCHANGE_EVERY

MODES = {
    "pretrain": (["--stage", "pretrain"], {"pretrain_steps": 12}),
    "plain": (["--stage", "finetune"], {"finetune_steps": 4}),
    "deepspeed": (["--stage", "finetune", "--deepspeed", DS_JSON], {"finetune_steps": 4}),
}
SMALL = {"resolution": 32, "num_scenes": 4, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("children"), deepspeed=True) as one:
        yield one


def command(mode: str, out: Path, **changes: object) -> list[str]:
    words, settings = MODES[mode]
    return [*words, "--out", str(out), *flags(**{**SMALL, **settings, **changes})]


def folder(mode: str, out: Path) -> Path:
    return out / MODES[mode][0][1]


def result(mode: str, out: Path) -> Path:
    return folder(mode, out) / ("graph_encoder" if mode == "pretrain" else "pipeline")


def logged(run: Path) -> list[int]:
    return [line["step"] for line in lines(run) if "event" not in line]


def wait_until_logged(child: Child, run: Path, step: int, timeout: float = 180.0) -> None:
    child.wait_for(run / "log.jsonl", timeout)
    end = time.monotonic() + timeout
    while not any(f'{{"step": {n},' in (run / "log.jsonl").read_text() for n in range(step, step + 50)):
        assert time.monotonic() < end, child.said()
        time.sleep(0.01)


def last_line(child: Child) -> str:
    return child.said().rstrip().splitlines()[-1]


# Kills.


def test_a_kill_at_every_operation_of_writing_a_checkpoint_leaves_a_whole_one(server, tmp_path):
    """The third of three: the newest before it stays until it is whole, and what is left aside is in nobody's way."""
    events = tmp_path / "events"
    arguments = {"first": 1, "last": 3, "events": str(events)}
    assert server.write(run=str(tmp_path / "whole"), kill_at=0, **arguments) == 0
    operations = events.read_text().splitlines()
    assert [o.split()[0] for o in operations].count("os.fsync") == 5, "three files, their folder, the one above"
    assert [o.split()[0] for o in operations].count("os.rename") == 2, "to its name; the oldest out of the way"
    assert len(operations) > 20
    for k in range(1, len(operations) + 1):
        run = tmp_path / "killed"
        assert server.write(run=str(run), kill_at=k, **arguments) == -signal.SIGKILL, operations[k - 1]
        published = k > next(i for i, o in enumerate(operations, 1) if o.startswith("os.rename"))
        assert newest_checkpoint(run)[0] == (3 if published else 2), operations[k - 1]
        for step in checkpoint_steps(run):
            read_manifest(checkpoint_dir(run, step))
        assert server.write(run=str(run), kill_at=0, first=4, last=4, events=str(events)) == 0
        kept = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert kept == [f"step-{3 if published else 2:07d}", "step-0000004"], operations[k - 1]
        shutil.rmtree(run)


def undisturbed(server: ForkServer, mode: str, out: Path) -> float:
    """Seconds that the whole run takes."""
    began = time.monotonic()
    child = server.start(command(mode, out))
    assert child.wait() == 0, child.said()
    return time.monotonic() - began


def same_run(mode: str, one: Path, other: Path) -> bool:
    steps = logged(folder(mode, one))
    return (
        same_weights(result(mode, one), result(mode, other))
        and rows(folder(mode, one)) == rows(folder(mode, other))
        and steps == sorted(set(steps))
    )


def kill_at_random(server: ForkServer, mode: str, tmp_path: Path, num_kills: int) -> None:
    seconds = undisturbed(server, mode, tmp_path / "whole")
    draw = random.Random(mode)
    kills, lives = 0, 0
    while kills < num_kills:
        out, lives = tmp_path / "killed", lives + 1
        while True:
            child = server.start(command(mode, out))
            if kills < num_kills:
                time.sleep(draw.uniform(0, seconds))
                child.kill()
            status = child.wait()
            assert status in (0, -signal.SIGKILL), child.said()
            kills += status != 0
            if checkpoint_steps(folder(mode, out)):
                newest_checkpoint(folder(mode, out))  # raises if it is not whole
            if status == 0:
                break
        assert same_run(mode, out, tmp_path / "whole")
        shutil.rmtree(out)
    print(f"{mode}: {kills} kills in {lives} runs")


@pytest.mark.parametrize("mode", MODES)
def test_runs_killed_at_random_instants_end_with_the_same_bits(server, tmp_path, mode):
    kill_at_random(server, mode, tmp_path, 5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_runs_killed_at_fifty_random_instants_end_with_the_same_bits(server, tmp_path, mode):
    kill_at_random(server, mode, tmp_path, 50)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_runs_killed_at_every_operation_on_checkpoints_end_with_the_same_bits(server, tmp_path, mode):
    undisturbed(server, mode, tmp_path / "whole")
    k = 0
    while True:
        k, out = k + 1, tmp_path / "killed"
        status = server.start(command(mode, out), below=str(folder(mode, out) / "checkpoints"), kill_at=k).wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        child = server.start(command(mode, out))
        assert child.wait() == 0, child.said()
        assert same_run(mode, out, tmp_path / "whole"), k
        shutil.rmtree(out)
    print(f"{mode}: killed at each of {k - 1} operations")
    assert k > 30


# Signals, and two runs in one folder.


def test_signals_save_and_the_same_command_continues(server, tmp_path):
    out, endless = tmp_path / "run", {"pretrain_steps": 100_000, "checkpoint_every": 100_000}
    run, stopped_at = folder("pretrain", out), []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        child = server.start(command("pretrain", out, **endless))
        wait_until_logged(child, run, (stopped_at or [0])[-1] + 1)
        second = server.start(command("pretrain", out, **endless))
        assert second.wait() == 2
        assert f"train.py: {run} is in use by process {child.pid} on {socket.gethostname()}" in last_line(second)
        child.kill(number)
        assert child.wait() == code, child.said()
        stopped_at.append(newest_checkpoint(run)[0])
        assert f"{signal.Signals(number).name}: stopped and saved at step {stopped_at[-1]}" in last_line(child)
        assert "Traceback" not in child.said()
    assert stopped_at[0] < stopped_at[1] < stopped_at[2]
    starts = [line["step"] for line in lines(run) if line.get("event") == "start"]
    assert starts == [0, *stopped_at[:2]]

    ends = {"pretrain_steps": stopped_at[2] + 1}
    for path in (out, tmp_path / "whole"):
        child = server.start(command("pretrain", path, **ends))
        assert child.wait() == 0, child.said()
    assert same_run("pretrain", out, tmp_path / "whole")


SLOW_STEPS = """
import time
from sgg_fast.train.engines.eager import EagerEngine
update = EagerEngine.update
def slow(*arguments, **more):
    print("a long step begins", flush=True)
    time.sleep(600)
    return update(*arguments, **more)
EagerEngine.update = slow
"""


def test_a_second_signal_stops_at_once_and_a_dead_run_locks_nothing(server, tmp_path):
    child = server.start(command("pretrain", tmp_path), patch=SLOW_STEPS)
    for text in ("a long step begins", "SIGTERM: ending this step, then saving; a second signal stops at once"):
        end = time.monotonic() + 120
        while text not in child.said():
            assert time.monotonic() < end, child.said()
            time.sleep(0.01)
        child.kill(signal.SIGTERM)
    assert child.wait(timeout=10) == -signal.SIGTERM
    child = server.start(command("pretrain", tmp_path))
    assert child.wait() == 0, child.said()


# Disks.


@contextlib.contextmanager
def small_disk(where: Path, size: int) -> Iterator[Path]:
    where.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(server, tmp_path):
    with small_disk(tmp_path / "disk", 12 << 20) as disk:
        out, filler = disk / "run", disk / "filler"
        run, settings = folder("pretrain", out), {"pretrain_steps": 60, "checkpoint_every": 20}
        child = server.start(command("pretrain", out, **settings))
        child.wait_for(checkpoint_dir(run, 20) / MANIFEST)
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - (600 << 10)))  # less than a checkpoint
        assert child.wait() == 2, child.said()
        step = newest_checkpoint(run)[0]
        assert f"checkpoints/step-{step + 20:07d}: cannot be written (No space left on device)" in last_line(child)
        assert "free space" in last_line(child) and "Traceback" not in child.said()
        assert not list((run / "checkpoints").glob(".step-*")), "what it had written of it is gone"

        child = server.start(command("pretrain", out, **settings))  # still full: refused before anything is computed
        assert child.wait() == 2 and "MiB free, but checkpoints and result need" in last_line(child)
        filler.unlink()
        child = server.start(command("pretrain", out, **settings))
        assert child.wait() == 0, child.said()
        child = server.start(command("pretrain", tmp_path / "whole", **settings))
        assert child.wait() == 0
        assert same_run("pretrain", out, tmp_path / "whole")


@pytest.mark.parametrize("file", ["log.jsonl", "tensorboard"])
def test_a_disk_that_fills_up_under_the_log_or_tensorboard_is_one_line_with_the_file(server, tmp_path, file):
    """Each alone on a disk that is full from the start of the steps: nothing of either may be a traceback."""
    run = folder("pretrain", tmp_path / "run")
    run.mkdir(parents=True)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        if file == "tensorboard":
            (run / file).symlink_to(disk)
        else:
            (run / file).symlink_to(disk / file)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - (8 << 10)))
        settings = {"pretrain_steps": 4000, "checkpoint_every": 100_000}
        child = server.start(command("pretrain", tmp_path / "run", **settings))
        assert child.wait() == 2, child.said()
        assert f"train.py: {run / file}: cannot be written (No space left on device): free space" in last_line(child)
        assert "Traceback" not in child.said() and "Exception" not in child.said(), child.said()


def test_a_disk_that_is_too_small_or_read_only_is_refused_before_the_run(server, tmp_path):
    with small_disk(tmp_path / "disk", 3 << 20) as disk:
        child = server.start(command("pretrain", disk / "run"))
        assert child.wait() == 2 and f"train.py: --out {disk}/run/pretrain: 3 MiB free, but" in last_line(child)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        child = server.start(command("pretrain", disk / "run"))
        assert child.wait() == 2 and last_line(child) == f"train.py: --out: {disk} is not writable"


# Several processes.


def start_pair(server: ForkServer, out: Path, mode: str = "deepspeed", patch: str = "") -> list[Child]:
    """Two processes of one endless run, which saves at every step."""
    endless = {"pretrain_steps" if mode == "pretrain" else "finetune_steps": 100_000}
    argv = [*command(mode, out, **endless, checkpoint_every=1), "--rank-timeout", "20"]
    return server.start_all(2, argv, patch=patch)


DIED, LATE = (signal.SIGKILL, "died"), (signal.SIGSTOP, "did not answer for 20 s (--rank-timeout)")


@pytest.mark.parametrize(
    ("mode", "fault", "said"),
    [("deepspeed", *DIED), ("deepspeed", *LATE), ("pretrain", *DIED), ("plain", *DIED), ("plain", *LATE)],
)
def test_a_lost_process_stops_the_other_in_bounded_time(server, tmp_path, mode, fault, said):
    pair, run = start_pair(server, tmp_path, mode), folder(mode, tmp_path)
    wait_until_logged(pair[0], run, 1)
    while mode != "deepspeed" and not checkpoint_steps(run):
        assert pair[0].wait_for(run / "checkpoints") is None and "train.py:" not in pair[0].said()
        time.sleep(0.01)
    pair[1].kill(fault)
    began = time.monotonic()
    try:
        assert pair[0].wait(timeout=90) == 4, pair[0].said()
    finally:
        pair[1].kill()
    assert time.monotonic() - began < 60
    assert f"train.py: another process of this run {said}; this one stops" in pair[0].said()
    assert pair[1].wait() == -signal.SIGKILL
    assert pair[0].said().count("train.py:") == 1 and "Traceback" not in pair[0].said()
    whole = newest_checkpoint(run) if checkpoint_steps(run) else None
    if mode == "deepspeed":
        assert "x2" in lines(run)[0]["engine"]
    else:  # the same command, with less to do: it goes on from the last checkpoint, with both or with one
        assert whole is not None
        steps = {"pretrain_steps" if mode == "pretrain" else "finetune_steps": whole[0] + 2}
        pair = server.start_all(2, command(mode, tmp_path, **steps, checkpoint_every=1))
        assert [child.wait() for child in pair] == [0, 0], pair[0].said() + pair[1].said()
        assert list(rows(run))[-2:] == [whole[0] + 1, whole[0] + 2]


LOST_IN_SET_UP = """
import os
from sgg_fast import env
from sgg_fast.train.engines import deepspeed as engines
load = engines._import_deepspeed
def losing():
    package = load()
    if env.rank() == 1:
        package.initialize = lambda **settings: os.kill(os.getpid(), {number})
    return package
engines._import_deepspeed = losing
"""


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_lost_in_the_set_up_stops_the_other_in_bounded_time(server, tmp_path, fault):
    """Where DeepSpeed makes groups of its own and spreads the weights: before any step, and any barrier of ours."""
    pair = start_pair(server, tmp_path, patch=LOST_IN_SET_UP.format(number=int(fault)))
    try:
        assert pair[0].wait(timeout=90) == 4, pair[0].said()
    finally:
        pair[1].kill()
    said = "another process of this run did not answer for 20 s (--rank-timeout); this one stops"
    assert f"train.py: {said}" in pair[0].said()
    assert pair[1].wait() == -signal.SIGKILL


ONE_POISONED = """
from sgg_fast import env
from sgg_fast.train.engines.deepspeed import DeepSpeedEngine
from sgg_fast.train.engines.eager import EagerEngine
for engine in (DeepSpeedEngine, EagerEngine):
    def poisoned(self, total, calls=[], backward=engine._backward):
        calls.append(total)
        return backward(self, total * float("nan") if env.rank() == 1 and len(calls) == 2 else total)
    engine._backward = poisoned
"""


@pytest.mark.parametrize("mode", list(MODES))
def test_what_befalls_one_process_both_do(server, tmp_path, mode):
    """The second process's second loss is not a number, then it alone gets a signal: both skip, both stop and save."""
    pair, run = start_pair(server, tmp_path, mode, ONE_POISONED), folder(mode, tmp_path)
    wait_until_logged(pair[0], run, 3)
    pair[1].kill(signal.SIGTERM)
    before = max(logged(run))
    assert [child.wait() for child in pair] == [143, 143], pair[0].said() + pair[1].said()
    step, _ = newest_checkpoint(run)
    # One step may have ended without being logged yet.
    assert step % EXCHANGE_EVERY == 0 and step <= before + 1 + 2 * EXCHANGE_EVERY
    assert "train.py" not in pair[1].said(), "the first process speaks for both"
    assert f"SIGTERM: stopped and saved at step {step}; the same command continues" in last_line(pair[0])
    assert logged(run) == [n for n in range(1, step + 1) if n != 2]
    skipped = [line for line in lines(run) if line.get("event") == "skipped"]
    assert [(line["step"], len(line["samples"])) for line in skipped] == [(2, 4)]
