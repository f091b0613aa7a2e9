"""Starts the processes of rows: forks of one that has imported the project's libraries, or fresh ones.

The libraries take eight seconds of CPU to import, which is half of a row, and a fork has them already. A row that
changes the device (its chip, its memory, how many) or has several processes gets fresh ones: torch reads a device's
properties once. On a device forks could not use CUDA; the stand-in is plain memory, which a fork copies.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

FRESH = ("FAKE_CUDA_", "PYTHON", "TRITON_INTERPRET")
"""Beginnings of variables that a process reads when it starts."""
READ_LATE = {"FAKE_CUDA_REFUSES_CAPTURES", "FAKE_CUDA_CHILDREN"}
"""Variables that are read at a capture, or by a child."""


class Workers:
    """Runs `python -m fake_cuda.run` in `root`, at most as many forks at a time as there are callers."""

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        self.root, self.env = root, env
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()

    def run(
        self, words: list[str], reports: list[Path], logs: list[Path], env: dict[str, str], limit: float
    ) -> tuple[float, bool]:
        """One process for each report. Returns CPU seconds of all, with what they started, and whether one was late."""
        fresh = len(logs) > 1 or any(name.startswith(FRESH) and name not in READ_LATE for name in env)
        if fresh:
            return self._run_fresh(words, reports, logs, env, limit)
        return self._run_fork(words, reports[0], logs[0], env, limit)

    def _run_fresh(
        self, words: list[str], reports: list[Path], logs: list[Path], env: dict[str, str], limit: float
    ) -> tuple[float, bool]:
        begun = []
        for report, log, launched in zip(reports, logs, launcher(len(logs)), strict=True):
            with log.open("w") as file:
                begun.append(subprocess.Popen(
                    [sys.executable, "-m", "fake_cuda.run", str(report), *words], cwd=self.root,
                    env={**self.env, **env, **launched}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    start_new_session=True,
                ))  # fmt: skip
        late = threading.Event()
        timer = threading.Timer(limit, _kill, ([process.pid for process in begun], late))
        timer.start()
        seconds = 0.0
        for process in begun:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds += usage.ru_utime + usage.ru_stime
        timer.cancel()
        return seconds, late.is_set()

    def _run_fork(
        self, words: list[str], report: Path, log: Path, env: dict[str, str], limit: float
    ) -> tuple[float, bool]:
        try:
            server = self._idle.get_nowait()
        except queue.Empty:
            server = subprocess.Popen(
                [sys.executable, "-m", "fake_cuda.run", "--serve"], cwd=self.root, env=self.env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        assert server.stdin is not None and server.stdout is not None
        asked = {"words": [str(report), *words], "log": str(log), "env": env}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        pid, late = int(server.stdout.readline()), threading.Event()
        timer = threading.Timer(limit, _kill, ([pid], late))
        timer.start()
        seconds = float(server.stdout.readline())
        timer.cancel()
        self._idle.put(server)
        return seconds, late.is_set()

    def close(self) -> None:
        """End the processes that forked."""
        while not self._idle.empty():
            server = self._idle.get()
            assert server.stdin is not None
            server.stdin.close()
            server.wait()


def launcher(num: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each process; nothing for a single one."""
    if num == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "FAKE_CUDA_DEVICES": str(num)}  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num)]


def _kill(pids: list[int], late: threading.Event) -> None:
    late.set()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
