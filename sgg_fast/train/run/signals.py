"""SIGTERM and SIGINT in training: the first ends the step and saves, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While entered, the first of `CAUGHT` only sets `number`; from then on they do what the system's default is.

    Outside the main thread, where Python allows no handlers, it catches nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came, None while none has."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in CAUGHT}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in CAUGHT:
            signal.signal(each, signal.SIG_DFL)
        line = f"\n{signal.Signals(number).name}: ending this step, then saving; a second signal stops at once\n"
        os.write(2, line.encode())  # the progress bar may be in the middle of a print, which must not be entered twice

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
