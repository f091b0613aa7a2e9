"""How a run ends before its last step: a signal, numbers that are not finite, or another process that is lost.

`train.py` prints the message of a `Stop`, one line, and exits with its code. Wrong settings and input are no `Stop`:
those are `ConfigError`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from sgg_fast import env

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The first of them ends the step and saves, the second ends the process. One that is ignored stays so (nohup)."""


class Stop(Exception):  # noqa: N818 - not all of them are errors
    """A run that ends early, its last checkpoint whole; the same command continues."""

    exit_code: int


class Signalled(Stop):
    """SIGTERM, SIGINT or SIGHUP: the step was ended and saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped and saved at step {step}; the same command continues")
        self.exit_code = 128 + number


class BadNumbers(Stop):
    """Too many steps in a row whose loss or gradient was not finite."""

    exit_code = 3


class LostProcess(Stop):
    """Another process of the run died or did not answer in time."""

    exit_code = 4


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because a peer died or did not come. gloo's bare RuntimeError is known by its text
    only."""
    import torch  # late: train.py knows of a `Stop` before it loads torch

    if env.world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def lost_process(timeout: float) -> Iterator[None]:
    """Raises `LostProcess` where a collective inside failed: a peer died, or did not come within `timeout` seconds."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        text = str(error)
        late = "imed out" in text or "imeout" in text
        what = f"did not answer for {timeout:g} s (--rank-timeout)" if late else "died"
        raise LostProcess(
            f"another process of this run {what}; this one stops. Its own message says why; the same command "
            "continues from the last checkpoint"
        ) from error


def _say(line: str) -> None:
    """On stderr, past Python's own buffer: a print may be interrupted by the handler that calls this."""
    with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
        os.write(2, line.encode())


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Give the signals of `CAUGHT` that are not ignored to `handler`; returns what had them before.

    Outside the main thread, where Python allows no handlers, that is none.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [number for number in CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


@contextlib.contextmanager
def stops_at_once(name: str) -> Iterator[None]:
    """Inside, where no `StopSignals` is entered, each of `CAUGHT` ends the process with one line and 128 + its number.

    Nothing is unwound: an exception in the midst of a library's import is at times swallowed, at times a traceback.
    A stopped set-up leaves no more than SIGKILL does, and later runs cope with that.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _say(f"{name}: {signal.Signals(number).name}: stopped; the same command continues from the last checkpoint\n")
        os._exit(128 + number)

    before = _handle(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """While entered, the first of `CAUGHT` only sets `number`; from then on they do what the system's default is."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came, None while none has."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = _handle(self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        _say(f"\n{signal.Signals(number).name}: ending this step, then saving; a second signal stops at once\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
