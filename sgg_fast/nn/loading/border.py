"""Turns exceptions of libraries into one line with file and cause."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sgg_fast.graph import plain

_LONGEST = 300


class ModelError(ValueError):
    """A model that cannot be used. One line: folder or hub id, file, cause, and the cure if there is one."""


@contextlib.contextmanager
def border(what: str) -> Iterator[None]:
    """Any exception inside becomes `ModelError("WHAT: cause")`; nested borders put the outer `what` in front."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{what}: {error}") from error
    except Exception as error:  # border
        raise ModelError(f"{what}: {cause(error)}") from error
    except BaseException as error:  # border
        # Rust panics (tokenizers, safetensors) are not an Exception; signals and exits pass through.
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """The first line of an exception's message, escaped for a terminal."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not text or not isinstance(error, (ValueError, OSError, RuntimeError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = plain(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
