"""Why a run ends before its last step. `train.py` prints the message, one line, and exits with the code.

Wrong settings and input are not among them: those are `ConfigError`.
"""

from __future__ import annotations

import signal


class Stop(Exception):  # noqa: N818 - not all of them are errors
    """A run that ends early, its last checkpoint whole; the same command continues."""

    exit_code: int


class Signalled(Stop):
    """SIGTERM or SIGINT: the step was ended and saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped and saved at step {step}; the same command continues")
        self.exit_code = 128 + number


class BadNumbers(Stop):
    """Too many steps in a row whose loss or gradient was not finite."""

    exit_code = 3


class LostProcess(Stop):
    """Another process of the run died or did not answer in time."""

    exit_code = 4
