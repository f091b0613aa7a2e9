"""How a run ends before its last step: a signal, numbers that are not finite, or another process that is lost.

`train.py` prints the message of a `Stop`, one line, and exits with its code. Wrong settings and input raise
`ConfigError` instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from sgg_fast import env

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The first signal ends the step and saves, the second ends the process. An ignored signal stays ignored (nohup)."""


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

    def __init__(self, what: str, is_late: bool = False) -> None:
        """what: happened to it. is_late: it may be out of reach, so nothing more is asked of it."""
        super().__init__(
            f"another process of this run {what}; this one stops. Its own message says why; the same command continues "
            "from the last checkpoint"
        )
        self.is_late = is_late

    @classmethod
    def after(cls, timeout: float) -> LostProcess:
        """One that was waited for so many seconds."""
        return cls(f"did not answer for {timeout:g} s (--rank-timeout)", is_late=True)


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because a peer died or did not come. For gloo only the text shows it."""
    import torch  # late: train.py catches a `Stop` before it loads torch

    if env.world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def lost_process(timeout: float) -> Iterator[None]:
    """Raises `LostProcess` if a collective inside fails: a peer died, or did not come within `timeout` seconds."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        text = str(error)
        late = "imed out" in text or "imeout" in text
        raise LostProcess.after(timeout) if late else LostProcess("died") from error


def _print_first(line: str) -> None:
    """Write to stderr without Python's buffer: the calling handler may have interrupted a print.

    Only the first process of a run does: a launcher sends its signals to all.
    """
    if env.rank():
        return
    with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
        os.write(2, line.encode())


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context in which `handler` has the signals of `CAUGHT` that are not ignored.

    Outside the main thread, where Python allows no handlers, it changes nothing.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [number for number in CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def stops_at_once(name: str) -> Iterator[None]:
    """Context in which each of `CAUGHT` ends the process with one line and the exit code 128 + its number.

    `stops_after_step` inside takes precedence. The handler raises nothing, because libraries swallow an exception in
    the middle of an import. A stopped set-up leaves the same files as SIGKILL does, and later runs cope with them.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        what = f"{signal.Signals(number).name}: stopped"
        _print_first(f"{name}: {what}; the same command continues from the last checkpoint\n")
        os._exit(128 + number)

    with _handled_by(stop):
        yield


@dataclasses.dataclass
class Caught:
    """The signal that ends a run."""

    number: int = 0
    """0 until a signal comes."""


@contextlib.contextmanager
def stops_after_step() -> Iterator[Caught]:
    """Context in which the first of `CAUGHT` only sets `Caught.number`; from then on each ends the process."""
    caught, ending = Caught(), "ending this step" if env.world_size() == 1 else "ending within 16 steps"

    def note(number: int, frame: FrameType | None) -> None:
        caught.number = number
        for each in CAUGHT:
            if signal.getsignal(each) == note:
                signal.signal(each, signal.SIG_DFL)
        _print_first(f"\n{signal.Signals(number).name}: {ending}, then saving; a second signal stops at once\n")

    with _handled_by(note):
        yield caught
