"""The optimiser behind backward: on a second stream, weights are updated while backward goes on.

They are updated in segments, as backward completes their gradients. All gradients stay until the end of the step. So
the second stream may lag behind as far as it has to where weights are many and pixels few, backward never waits for it,
and a step takes the memory of an update after backward. On a CPU the same runs without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sgg_fast.config import OptimConfig
from sgg_fast.train.backward.in_order import InOrder
from sgg_fast.train.optim.adam_flat import FlatAdam, Gradients

SEGMENT_BYTES, NUM_SEGMENTS = 32 * 2**20, 8
"""A segment is full at so many bytes of gradients, or at that share of all. The last update has no backward beside it,
and each takes up to five launches (a squaring and an update for each group and type, and a decision)."""


def goes_behind(optim: OptimConfig, num_processes: int) -> bool:
    """Whether a captured step updates weights behind backward: no norm of all gradients is needed first."""
    return not (optim.max_grad_norm or optim.optimizer_in_backward) and num_processes == 1


class Behind(InOrder):
    """Updates the weights of a flat optimiser. A segment with a gradient that is not finite is skipped alone."""

    def __init__(self, optimizer: FlatAdam) -> None:
        """Hook the optimiser's weights, which it then counts apart."""
        self.optimizer, self.gradients = optimizer, list[Gradients]()
        self.addresses: torch.Tensor | None = None
        """The table of a capture's gradients on the device, in the order of the updates; None makes it from them."""
        optimizer.apart()
        device, parameters = optimizer.rates.device, optimizer.parameters()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        super().__init__(parameters, min(SEGMENT_BYTES, sum(p.nbytes for p in parameters) // NUM_SEGMENTS))

    def expect(self) -> None:
        super().expect()
        self.gradients, self._num_rows = [], 0

    def finish(self) -> None:
        """Update what is left; the stream that goes on waits for all updates."""
        super().finish()
        self.join()

    def join(self) -> None:
        """The current stream waits for the second one."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Context of work on the second stream, after what the current one has so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def taken(self) -> list[Gradients]:
        """The gradients of the segments in the order of the updates, which are kept no longer."""
        gradients, self.gradients = self.gradients, []
        return gradients

    def _formed(self, left: list[int]) -> None:
        for segment in self.buckets or ():
            self.optimizer.unite(segment)

    @torch.no_grad()
    def _start(self, bucket: list[int]) -> None:
        with self.beside():
            gradients = self.optimizer.gradients(bucket)
            if not any(found for found, _ in gradients):
                return
            self.gradients.append(gradients)
            if self.addresses is None:
                table = self.optimizer.table(gradients).to(self.optimizer.rates.device)
            else:
                first, self._num_rows = self._num_rows, self._num_rows + sum(self.optimizer.lengths(gradients))
                table = self.addresses[first : self._num_rows]
            self.optimizer.update(gradients, table, bucket[0])
