"""What one process of a run learns of the others' end: torch's errors in collectives become one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sgg_fast import env
from sgg_fast.train.run.interrupts import LostProcess


@contextlib.contextmanager
def lost_process(timeout: float) -> Iterator[None]:
    """Raises `LostProcess` where a collective inside failed: a peer died, or did not come within `timeout` seconds.

    gloo raises a bare RuntimeError for both, known by its text only.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if env.world_size() == 1 or (not isinstance(error, torch.distributed.DistError) and "gloo" not in text):
            raise
        late = "imed out" in text or "imeout" in text
        what = f"did not answer for {timeout:g} s (--rank-timeout)" if late else "died"
        raise LostProcess(
            f"another process of this run {what}; this one stops. Its own message says why; the same command "
            "continues from the last checkpoint"
        ) from error
