"""Two machines with a folder that both see, as network namespaces joined by a pair of virtual Ethernet devices.

Slow: each run imports everything twice. Skipped where a process may not make namespaces (`ip netns add`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import DS_JSON
from support.tiny_runs import flags, rows, train

from sgg_fast.train.engines.deepspeed import LAUNCHER
from sgg_fast.train.run.checkpoint import newest_checkpoint

ROOT = Path(__file__).resolve().parents[3]
PORT = 29511
SMALL = {"resolution": 32, "num_scenes": 4, "checkpoint_every": 1}

pytestmark = pytest.mark.slow


class Host(NamedTuple):
    """A namespace, its device and its address."""

    name: str
    device: str
    address: str


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def kill_all(host: Host) -> None:
    """Every process of a host, its launcher included."""
    listed = subprocess.run(["ip", "netns", "pids", host.name], check=False, capture_output=True, text=True)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two of them, connected; whatever still runs there is killed at the end."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command (Debian's iproute2)")
    pair = [Host(f"sgg{os.getpid()}{x}", f"v{os.getpid()}{x}", f"10.77.0.{n}") for n, x in enumerate("ab", 1)]
    try:
        ip("netns", "add", pair[0].name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"ip netns add: {error.stderr.strip()}")
    try:
        ip("netns", "add", pair[1].name)
        ip("link", "add", pair[0].device, "type", "veth", "peer", "name", pair[1].device)
        for host in pair:
            ip("link", "set", host.device, "netns", host.name)
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
            ip("-n", host.name, "link", "set", host.device, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield pair
    finally:
        for host in pair:
            for pid in subprocess.run(
                ["ip", "netns", "pids", host.name], capture_output=True, text=True
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


def start(hosts: list[Host], out: Path, words: list[str]) -> list[subprocess.Popen[str]]:
    """One torchrun of one process on each host."""
    base = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    begun = []
    for rank, host in enumerate(hosts):
        launcher = ["ip", "netns", "exec", host.name, sys.executable, "-m", "torch.distributed.run",
                    "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1",
                    "--master_addr", hosts[0].address, "--master_port", str(PORT)]  # fmt: skip
        log = (out.parent / f"host-{rank}.txt").open("w")
        begun.append(subprocess.Popen(
            [*launcher, "train.py", "--out", str(out), *words], cwd=ROOT, text=True, stdout=log, stderr=log,
            env={**base, "GLOO_SOCKET_IFNAME": host.device, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        ))  # fmt: skip
    return begun


def said(out: Path) -> list[str]:
    return [(out.parent / f"host-{rank}.txt").read_text() for rank in (0, 1)]


def ended(begun: list[subprocess.Popen[str]], out: Path) -> None:
    assert [process.wait(timeout=600) for process in begun] == [0, 0], said(out)


STAGES = {
    "pretrain": ("pretrain", []),
    "finetune": ("finetune", []),
    "deepspeed": ("finetune", ["--deepspeed", DS_JSON]),
}


@pytest.mark.parametrize("mode", list(STAGES))
def test_two_hosts_are_one_process_with_twice_the_batch(hosts, tmp_path, mode):
    """At each step the difference is at most 1e-5, and under DeepSpeed twice what low precision makes of it more."""
    stage, more = STAGES[mode]
    out = tmp_path / "two"
    ended(start(hosts, out, ["--stage", stage, *more, *flags(**SMALL, batch_size=1)]), out)
    train(tmp_path / "one", stage, **SMALL, batch_size=2)
    got, want = rows(out / stage), rows(tmp_path / "one" / stage)
    low = want
    if more:
        train(tmp_path / "low", stage, **SMALL, batch_size=2, precision="bf16")
        low = rows(tmp_path / "low" / stage)
    assert list(got) == list(want) == [1, 2, 3, 4]
    for step in want:
        for name, value in want[step].items():
            assert abs(got[step][name] - value) <= 1e-5 + 2 * abs(low[step][name] - value), (step, name, got, want)
    assert sum(text.count("\nsaved ") for text in said(out)) == 1, "by the first host"


@pytest.mark.parametrize("fault", ["killed", "cut off"])
@pytest.mark.parametrize("mode", ["finetune", "deepspeed"])
def test_a_lost_host_ends_the_other_and_both_go_on(hosts, tmp_path, mode, fault):
    """In bounded time, with one line; the same command on both continues from the last checkpoint."""
    stage, more = STAGES[mode]
    out, run = tmp_path / "run", tmp_path / "run" / stage
    words = ["--stage", stage, *more, "--rank-timeout", "60"]
    begun = start(hosts, out, [*words, *flags(**SMALL, finetune_steps=100_000)])
    end = time.monotonic() + 400
    while not list((run / "checkpoints").glob("step-*")):
        assert time.monotonic() < end and begun[0].poll() is None, said(out)
        time.sleep(0.1)
    if fault == "killed":
        for pid in subprocess.run(
            ["ip", "netns", "pids", hosts[1].name], capture_output=True, text=True
        ).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
    else:
        ip("-n", hosts[1].name, "link", "set", hosts[1].device, "down")
    began = time.monotonic()
    assert begun[0].wait(timeout=300) != 0
    took = time.monotonic() - began
    assert took < 180, took
    line = "did not answer for 60 s (--rank-timeout)" if fault == "cut off" else "another process of this run"
    assert said(out)[0].count("train.py: another process of this run") == 1 and line in said(out)[0]
    assert begun[1].wait(timeout=300) != 0, "that one loses the first host"
    if fault == "cut off":
        ip("-n", hosts[1].name, "link", "set", hosts[1].device, "up")
    step, _ = newest_checkpoint(run)
    ended(start(hosts, out, [*words, *flags(**SMALL, finetune_steps=step + 2)]), out)
    assert list(rows(run))[-2:] == [step + 1, step + 2]
