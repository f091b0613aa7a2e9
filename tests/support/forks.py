"""Processes for tests that kill them: a server imports everything once, and each process is a fork of it.

`ForkServer` is the tests' side; run as a script this file is the server. A child runs train.py's `main`, or writes
checkpoints only. It can be made to kill itself at its k-th operation on files below a folder (Python's audit hook tells
of opening, renaming and deleting, a wrapper of `os.fsync`, which raises no audit event), so the product has no hooks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Child:
    """One fork."""

    def __init__(self, server: ForkServer, pid: int, output: Path) -> None:
        self.server, self.pid, self.output = server, pid, output

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 120.0) -> int:
        """Exit code, or minus the signal that ended it. Raises TimeoutError, having killed it."""
        status = self.server.ask(wait=self.pid, timeout=timeout)["status"]
        if status is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.said()}")
        return status

    def said(self) -> str:
        """What it has printed so far, stdout and stderr."""
        return self.output.read_text(errors="replace")

    def wait_for(self, path: Path, timeout: float = 120.0) -> None:
        """Until `path` exists."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)


def heed_signals() -> None:
    """Undo ignored signals, which children of tests under nohup or in a shell's background would inherit."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class ForkServer:
    """Starts children. A context manager."""

    def __init__(self, folder: Path, deepspeed: bool = False) -> None:
        self.folder, self._number = folder, itertools.count()
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(["deepspeed"] if deepspeed else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            preexec_fn=heed_signals,
        )  # fmt: skip
        self.ask()  # until everything is imported

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv: list[str], **request: Any) -> Child:
        """train.py with `argv`. env: more environment; below, kill_at: see `die_at`; patch: code run before it."""
        output = self.folder / f"child-{next(self._number)}.txt"
        output.touch()
        return Child(self, self.ask(argv=argv, output=str(output), **request)["pid"], output)

    def start_all(self, num: int, argv: list[str], **request: Any) -> list[Child]:
        """`start` of `num` processes of one run, with what torchrun would tell them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = map(str, range(num))
        return [self.start(argv, env={"RANK": rank, "LOCAL_RANK": rank, **world}, **request) for rank in ranks]

    def write(self, **arguments: Any) -> int:
        """`write_checkpoints` in a child; its exit code."""
        output = self.folder / f"child-{next(self._number)}.txt"
        output.touch()
        return Child(self, self.ask(write=arguments, output=str(output))["pid"], output).wait()


def die_at(below: str, kill_at: int) -> list[str]:
    """Count operations on files below a folder; SIGKILL at number `kill_at`, before it happens. 0: count only."""
    seen: list[str] = []

    def note(what: str, path: object) -> None:
        if isinstance(path, str | os.PathLike) and str(path).startswith(below):
            seen.append(f"{what} {os.path.relpath(path, below)}")
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # shutil.rmtree: relative to a folder
            note(event, f"{below}/(in a tree)/{arguments[0]}" if inside else arguments[0])

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        note("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)
    return seen


def write_checkpoints(run: str, first: int, last: int, events: str, kill_at: int) -> int:
    """Checkpoints of the steps first .. last of a small module by the plain engine; the fault is in the last one."""
    import numpy as np
    import torch

    from sgg_fast.recipes import recipe
    from sgg_fast.train.engines.eager import EagerEngine
    from sgg_fast.train.run import checkpoint, processes

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 8))
    module.config = recipe("toy")
    engine = EagerEngine(module, torch.device("cpu"))
    for step in range(1, last + 1):
        module(torch.from_numpy(np.random.default_rng(step).normal(size=(4, 8))).float()).square().mean().backward()
        engine.optimizer.step()
        if step >= first:
            seen = die_at(f"{run}/checkpoints", kill_at) if step == last else []
            meta = {"stage": "pretrain", "settings": {}}
            checkpoint.save_checkpoint(Path(run), step, meta, engine.save, processes.barrier, 0)
    Path(events).write_text("\n".join(seen))
    return 0


def _serve() -> tuple[dict[str, Any], int]:
    """In the server: answers until its input ends, then exits. In a child: returns what it shall do."""
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        if "argv" in request or "write" in request:
            sys.stdout.flush()
            answer["pid"] = pid = os.fork()
            if pid == 0:
                return request, os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        elif "wait" in request:
            end = time.monotonic() + request["timeout"]
            status = None
            while status is None and time.monotonic() < end:
                pid, code = os.waitpid(request["wait"], os.WNOHANG)
                status = os.waitstatus_to_exitcode(code) if pid else time.sleep(0.01)
            answer["status"] = status
        print(json.dumps(answer), flush=True)
    sys.exit(0)


def _main() -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import sgg_fast.toy.world
    import sgg_fast.train.trainer  # noqa: F401
    import train

    if "deepspeed" in sys.argv[1:]:  # its extension too: a child that is killed must not leave the build's lock behind
        os.environ["DS_ACCELERATOR"] = "cpu"
        from sgg_fast.train.engines import deepspeed as ds_engine

        with contextlib.redirect_stdout(sys.stderr):
            ds_engine._import_deepspeed()
            from deepspeed.comm.torch import build_shm_op

            build_shm_op()
    gc.freeze()
    request, output = _serve()
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, onto in ((null, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, onto)
    os.environ.update(request.get("env", {}))
    if "write" in request:
        return write_checkpoints(**request["write"])
    if "below" in request:
        seen = die_at(request["below"], request.get("kill_at", 0))
    exec(request.get("patch", ""), {})  # a test's own fault, such as a loss that is not a number
    code = train.main(request["argv"])
    if "events" in request:
        Path(request["events"]).write_text("\n".join(seen))
    return code


if __name__ == "__main__":
    status = _main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # a fork need not take the imported modules apart
