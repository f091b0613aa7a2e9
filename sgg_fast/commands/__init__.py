"""Exit codes and one-line errors of this package's commands. It does not import torch."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

REFUSED, BAD_NUMBERS, INTERRUPTED = 2, 3, 130
"""Exit codes: unusable settings or input (as in argparse); numbers that are not finite; SIGINT."""
_LONGEST = 2000


class NotFiniteError(ArithmeticError):
    """A picture or a latent with NaN or Inf, which is not used and not saved."""


Main = Callable[[list[str] | None], int | None]


def refuse(name: str, reason: Exception | str, code: int = REFUSED) -> int:
    """Print `name: reason` as one line on stderr, without terminal control characters; returns the exit code."""
    text = " ".join(str(reason).split())
    if not text.isprintable():
        text = text.encode("unicode_escape").decode("ascii")
    print(f"{name}: {text[:_LONGEST]}", file=sys.stderr)
    return code


def typed(name: str) -> list[str]:
    """The words to type for `train` or `infer`: as the running command was typed, installed or in a checkout."""
    return [f"sgg-{name}"] if Path(sys.argv[0]).name.startswith("sgg-") else ["python", f"{name}.py"]


def tell(text: str) -> None:
    """Print a result on stdout. If its reader has exited, the work continues."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_stdout()


def _end_stdout() -> None:
    """Flush stdout; if its reader has exited, the interpreter would otherwise fail at its end."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()


def _drop_stdout() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def command(
    name: str, interrupted: str = "", refused: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Callable[[Main], Callable[..., int]]:
    """Wraps a function as `main(argv)`. The function returns its exit code, or None for 0, or raises.

    In the module that is the program (`python -m`) it also runs: there it comes last.

    name: name of the command in messages. interrupted: advice for the user after Ctrl-C. refused: errors that the user
    can correct. `NotFiniteError` gives BAD_NUMBERS. Any other error is a bug and keeps its traceback.
    """

    def wrap(body: Main) -> Callable[..., int]:
        @functools.wraps(body)
        def main(argv: list[str] | None = None) -> int:
            # Set before torch loads OpenMP: on a busy machine spinning threads make small steps 20 times slower.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            try:
                code = body(argv) or 0
                _end_stdout()
                return code
            except NotFiniteError as error:
                return refuse(name, error, BAD_NUMBERS)
            except refused as error:
                return refuse(name, error)
            except KeyboardInterrupt:
                print(f"{name}: interrupted{f'; {interrupted}' if interrupted else ''}", file=sys.stderr)
                return INTERRUPTED

        if body.__module__ == "__main__":
            sys.exit(main())
        return main

    return wrap
