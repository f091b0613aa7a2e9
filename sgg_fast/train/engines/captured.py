"""Training steps replayed as CUDA graphs: what both stages share, and pre-training.

The host draws the samples, fills one small table for each micro-batch and launches; everything else reads device
memory. The rules of capture:

* Nothing in a step decides on data, sizes a tensor by it, reads a number back or copies from memory that is not pinned.
  Shapes follow from the `Bucket`, which the host knows, for it drew the batch.
* What changes from step to step lies in the table: samples, offsets, step, learning rates. Everything random is a hash
  of (seed, step, sample), so no generator is registered, and a resumed run draws what it would have drawn.
* Steps warm up on the stream of the capture, where autograd binds its nodes, kernels are compiled and cuDNN tries its
  algorithms (only there). The optimiser's own flag skips them, so they change nothing.
* No gradient exists when a capture begins: backward leaves each in the graphs' memory, and the optimiser finds it by a
  table of addresses that is filled after the capture. Further micro-batches add to them, by a graph of their own.
* One memory pool serves all graphs: those of a bucket run in the order of their capture, never between another's.
* Whether a step was applied, and its loss, are copied back beside it, and read when its slot is needed again.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from sgg_fast import ops
from sgg_fast.config import Config
from sgg_fast.graph import SceneGraphBatch
from sgg_fast.ops import adam as adam_op
from sgg_fast.train.engines.base import Update
from sgg_fast.train.engines.buckets import Bucket, Buckets
from sgg_fast.train.engines.eager import PlainEngine
from sgg_fast.train.optim.adam_flat import FlatAdam8bit
from sgg_fast.train.optim.flat import FlatAdam
from sgg_fast.train.optim.groups import set_lr
from sgg_fast.train.stages import PretrainStage, Terms

SLOTS = 8
"""Steps that the host may be ahead of the device; also after how many steps it hears whether one was applied."""

WARM_UP_STEPS = 3

RATES_PLACE = 1
"""In the table's last row, behind the step: the learning rate of each parameter group, its bits as an integer."""

Gradients = tuple[list[torch.Tensor], list[int]]
"""Flat gradients and their offsets in the optimiser's buffers."""

Part = tuple[Callable[[], Gradients | None], ...]
"""What one graph runs."""


@dataclasses.dataclass
class _Slot:
    """Pinned memory of one step on its way, and when the device is done with it."""

    tables: torch.Tensor
    """[K, 4, W], of each micro-batch."""
    told: torch.Tensor
    """[2] of its step: whether it was applied, and its loss."""
    step: int = -1
    done: torch.cuda.Event | None = None

    def free(self) -> tuple[bool, float]:
        """Wait for its step; whether that was applied (True if there was none), and its loss."""
        if self.done is None:
            return True, 0.0
        self.done.synchronize()
        self.done = None
        applied, loss = self.told.tolist()
        return bool(applied), loss


class ReplayEngine(PlainEngine):
    """One process whose optimiser is flat. On a CPU the same step runs without being captured, which is for tests.

    `Update.applied` tells of the step `SLOTS` before, and its values hold until the next one. A step that is skipped
    repeats the values of the one before it; the average of the weights (--ema) counts it.
    """

    optimizer: FlatAdam | FlatAdam8bit

    has_flat_optimizer = True
    execution = "captured as CUDA graphs"

    def __init__(
        self, module: Any, config: Config, stage: str, device: torch.device, num_graphs: int, num_micro: int
    ) -> None:
        """num_graphs: packed for a micro-batch; num_micro: micro-batches of a step."""
        super().__init__(module, config, stage, device)
        self.config, self.device, self.num_micro = config, device, num_micro
        num_rates = len(self.optimizer.param_groups)
        self._rates = slice(RATES_PLACE, RATES_PLACE + num_rates)
        rows, width = ops.table_shape(num_graphs + 1, RATES_PLACE + num_rates)
        pinned = device.type == "cuda"
        self._slots = [
            _Slot(
                torch.zeros(num_micro, rows, width, dtype=torch.int32, pin_memory=pinned),
                torch.ones(2, pin_memory=pinned),
            )
            for _ in range(SLOTS)
        ]
        self._table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._names: tuple[list[str], list[str]] = ([], [])
        self._sum: torch.Tensor | None = None
        self._row: torch.Tensor | None = None
        self._told = torch.ones(2, device=device)
        self._address_tables: list[torch.Tensor] = []
        self._runs: dict[Bucket, list[Callable[[], object]]] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device) if pinned else None

    @property
    @abc.abstractmethod
    def store(self) -> SceneGraphBatch:
        """All graphs that batches are packed from."""

    @abc.abstractmethod
    def graphs_of(self, ids_B: np.ndarray, step: int) -> np.ndarray:
        """Which of them a micro-batch of these samples packs."""

    @abc.abstractmethod
    def bucket_of(self, ids_KB: np.ndarray) -> Bucket:
        """The shapes of a step on these samples."""

    @abc.abstractmethod
    def packed_terms(self, bucket: Bucket) -> Terms:
        """Forward of a micro-batch, on what `self._table` says."""

    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> Update:
        """See `Engine`."""
        assert len(ids_KB) == self.num_micro
        set_lr(self.optimizer, lr_factor)
        bucket, slot = self.bucket_of(ids_KB), self._slots[step % SLOTS]
        applied, loss = slot.free()
        for table, ids in zip(slot.tables, ids_KB, strict=True):
            self.fill(table, ids, step, bucket)
        if bucket not in self._runs:
            self._table.copy_(slot.tables[0])
            self._runs[bucket] = self._prepare(bucket)
        for k, run in enumerate(self._runs[bucket]):
            if k < self.num_micro:
                self._table.copy_(slot.tables[k], non_blocking=True)
            run()
        if self.average:
            self.average.update()
        slot.told.copy_(self._told, non_blocking=True)
        if self.device.type != "cuda":
            applied, loss = slot.told.tolist()
            return Update(*self._terms(), bool(applied), lost=None if applied else loss)
        slot.step, slot.done = step, torch.cuda.Event()
        slot.done.record()
        return Update(*self._terms(), applied, behind=SLOTS, lost=None if applied else loss)

    def outstanding(self) -> list[tuple[int, float]]:
        """See `Engine`."""
        found = [(slot.step, *slot.free()) for slot in self._slots if slot.done is not None]
        return [(step, loss) for step, applied, loss in sorted(found) if not applied]

    def fill(self, table: torch.Tensor, ids: np.ndarray, step: int, bucket: Bucket) -> None:
        """Write a micro-batch's samples, the step and the learning rates."""
        ops.draw_table(self.store, self.graphs_of(ids, step), step, bucket=bucket.shape, out=table)
        rates = torch.tensor([group["lr"] for group in self.optimizer.param_groups], dtype=torch.float32)
        table[3, self._rates].view(torch.float32).copy_(rates)

    def _terms(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        values, chance = self._names
        assert self._row is not None
        row = self._row.unbind()
        return dict(zip(values, row, strict=False)), dict(zip(chance, row[len(values) :], strict=True))

    def add(self, bucket: Bucket, first: bool) -> None:
        """Forward and backward of a micro-batch; its gradients and terms are added up from the first on."""
        terms = self.packed_terms(bucket)
        # A loss that is not finite can have finite gradients: times NaN they are not, and the step is skipped.
        terms.total.backward(terms.total.detach() * 0 + 1 / self.num_micro)
        row = torch.stack([*terms.values.values(), *terms.chance.values()])
        if self._sum is None:
            self._sum, self._row = torch.zeros_like(row), torch.zeros_like(row)
            self._names = list(terms.values), list(terms.chance)
        if first:
            self._sum.copy_(row)
        else:
            self._sum.add_(row)

    @torch.no_grad()
    def apply(self, addresses: torch.Tensor | None) -> Gradients:
        """The optimiser's step, and the terms' means where it was applied; returns the gradients, which are let go.

        addresses: the optimiser's table on the device, perhaps filled later; None to make it from the gradients.
        """
        optimizer = self.optimizer
        assert self._sum is not None and self._row is not None
        optimizer.rates.copy_(self._table[3, self._rates].view(torch.float32))
        grads, offsets = optimizer.flat.gradients()
        if addresses is None:
            addresses = optimizer.table(grads, offsets).to(self.device)
        optimizer.launch(grads, offsets, addresses)
        mean, applied = self._sum / self.num_micro, optimizer.applied
        self._row.copy_(torch.where(applied > 0, mean, self._row))
        self._told.copy_(torch.stack([applied, mean[0]]))
        optimizer.zero_grad(set_to_none=True)
        return grads, offsets

    def parts(self, bucket: Bucket, addresses: torch.Tensor | None) -> list[Part]:
        """What a step runs, in order; the same one is captured once. Alone a micro-batch needs one graph."""
        apply = partial(self.apply, addresses)
        first, further = partial(self.add, bucket, True), partial(self.add, bucket, False)
        if self.num_micro == 1:
            return [(first, apply)]
        return [(first,), *[(further,)] * (self.num_micro - 1), (apply,)]

    def warm_up(self, bucket: Bucket) -> torch.Tensor:
        """Steps that run whole but are not applied; returns the table of the gradients, on the host."""
        control = self.optimizer.control
        control[adam_op.INVERSE_SCALE] = torch.nan
        with _tried_algorithms():
            for _ in range(WARM_UP_STEPS):
                gradients = [run_part(part) for part in self.parts(bucket, None)][-1]
        control[adam_op.INVERSE_SCALE] = 1
        assert gradients is not None
        return self.optimizer.table(*gradients)

    def _prepare(self, bucket: Bucket) -> list[Callable[[], object]]:
        """What runs a step of a bucket: its graphs' replays, or without CUDA the step itself."""
        if self._stream is None:
            self.warm_up(bucket)
            return [partial(run_part, part) for part in self.parts(bucket, None)]
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            addresses = torch.zeros_like(self.warm_up(bucket), device=self.device)
        torch.cuda.synchronize(self.device)
        parts = self.parts(bucket, addresses)
        graphs: dict[Part, torch.cuda.CUDAGraph] = {}
        for part in dict.fromkeys(parts):
            graphs[part] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[part], pool=self._pool, stream=self._stream):
                gradients = run_part(part)
            self._pool = self._pool or graphs[part].pool()
        assert gradients is not None
        addresses.copy_(self.optimizer.table(*gradients))
        torch.cuda.synchronize(self.device)
        self._address_tables.append(addresses)  # the graph reads it for as long as it lives
        return [graphs[part].replay for part in parts]


def run_part(part: Part) -> Gradients | None:
    """The functions in order; what the last one returns."""
    return [function() for function in part][-1]


@contextlib.contextmanager
def _tried_algorithms() -> Iterator[None]:
    """cuDNN tries its algorithms inside and keeps to the fastest afterwards; it could not try them in a capture."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class PretrainReplay(ReplayEngine):
    """Pre-training: the whole step, from packing to the optimiser, is one graph for each bucket."""

    module: PretrainStage

    def __init__(self, module: PretrainStage, config: Config, device: torch.device) -> None:
        super().__init__(module, config, "pretrain", device, module.copies * config.batch_size, num_micro=1)
        self.buckets = Buckets(module.cache.graphs.sizes, config.batch_size, module.copies)

    @property
    def store(self) -> SceneGraphBatch:
        """See `ReplayEngine`."""
        return self.module.cache.graphs

    def graphs_of(self, ids_B: np.ndarray, step: int) -> np.ndarray:
        """The copies, one after the other."""
        return np.tile(ids_B, self.module.copies)

    def bucket_of(self, ids_KB: np.ndarray) -> Bucket:
        """See `ReplayEngine`."""
        return self.buckets.of(ids_KB[0])

    def packed_terms(self, bucket: Bucket) -> Terms:
        """See `ReplayEngine`."""
        stage, num = self.module, self.config.batch_size
        mask, num_graphs = stage.mask_draw(num, 0), stage.copies * num
        packed = ops.pack_replayed(self.store, self._table, num_graphs, mask, bucket=bucket.shape, bounds=bucket.bounds)
        sample_B, step = self._table[0, :num].long(), self._table[3, :1]
        return stage.terms(stage.encode_packed(*packed, sample_B, step), sample_B, step)
