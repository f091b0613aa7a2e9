"""Processes of a run on the host: they meet, agree, wait in bounded time, stop together; a single one does nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from support.cases import meeting

from sgg_fast.train.run import processes
from sgg_fast.train.run.interrupts import LostProcess


def test_two_processes_agree_and_stop_together():
    """The checks are in `support/cases/meeting.py`, which runs in both processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pair = [
        subprocess.Popen(
            [sys.executable, meeting.__file__], env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said
    assert [out.split() for out, _ in said] == 2 * [[check.__name__ for check in meeting.CHECKS]]


def test_a_single_process_exchanges_nothing(monkeypatch):
    """Every function returns at once with what this process says."""
    monkeypatch.setattr(processes._Met, "timeout", 0.0)
    processes.meet(torch.device("cpu"), 60.0)
    assert not processes.have_met() and not processes.is_by_host()
    values = torch.tensor([1.0, 2.0])
    assert processes.mean(values) is values and processes.first_says(iter([3, 1])) == [3, 1]
    processes.spread([values])
    processes.same_everywhere({"seed": 1})
    processes.barrier()
    processes.say_refused()
    assert not processes.first_refused() and values.tolist() == [1.0, 2.0]
    exchange = processes.SignalExchange()
    assert [exchange.stopped_by(number, done) for number, done in ((0, 8), (15, 3))] == [0, 15], "at any step"
    assert exchange.settle() == 0


class Event:
    """In place of a device's: reached after so many questions."""

    def __init__(self, after: float) -> None:
        self.after, self.asked, self.waited = after, 0, False

    def query(self) -> bool:
        self.asked += 1
        return self.asked > self.after

    def synchronize(self) -> None:
        self.waited = True


def test_the_wait_for_a_device_is_bounded_where_a_peer_may_be_lost(monkeypatch):
    alone = Event(0)
    processes.wait_for(alone)
    assert alone.waited and not alone.asked, "a single process waits as long as it takes"
    monkeypatch.setattr(processes._Met, "host", object())
    monkeypatch.setattr(processes._Met, "timeout", 0.05)
    slow = Event(5)
    processes.wait_for(slow)
    assert slow.asked == 6 and not slow.waited
    with pytest.raises(LostProcess, match=r"did not answer for 0\.05 s \(--rank-timeout\)"):
        processes.wait_for(Event(float("inf")))
