"""Pre-training with the whole step, from packing to the optimiser, as one CUDA graph for each bucket.

The host draws the samples, fills one small table and launches; everything else reads device memory. Rules: nothing in
the step decides on data or copies from memory that is not pinned; steps that warm up are skipped by the optimiser's
own flag, so they change nothing; one memory pool serves all graphs, which never run at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sgg_fast import ops
from sgg_fast.config import Config
from sgg_fast.ops import adam as adam_op
from sgg_fast.train.base import Update
from sgg_fast.train.buckets import COPIES, Buckets
from sgg_fast.train.flat import FlatAdam
from sgg_fast.train.optim import set_lr
from sgg_fast.train.plain import PlainEngine
from sgg_fast.train.stages import PretrainStage

SLOTS = 8
"""Steps that the host may be ahead of the device; also after how many steps it hears whether one was applied."""

WARM_UP_STEPS = 3

LR_PLACE = 1
"""In the table's last row, behind the step: the learning rate, its bits as an integer."""


@dataclasses.dataclass
class _Slot:
    """Pinned memory of one step on its way, and when the device is done with it."""

    table: torch.Tensor
    applied: torch.Tensor
    done: torch.cuda.Event | None = None

    def wait(self) -> bool:
        """Until it is free again; whether its step was applied (True for one that was never used)."""
        if self.done is None:
            return True
        self.done.synchronize()
        return bool(self.applied)


class ReplayEngine(PlainEngine):
    """One process, pre-training. On a CPU the same step runs without being captured, which is for tests.

    `Update.applied` tells of the step `SLOTS` before. A step that is skipped repeats the values of the one before it.
    """

    module: PretrainStage
    optimizer: FlatAdam

    def __init__(self, module: PretrainStage, config: Config, device: torch.device) -> None:
        super().__init__(module, config, "pretrain", device)
        self.config, self.device = config, device
        self.buckets = Buckets(module.cache.graphs.sizes, config.batch_size)
        shape = ops.table_shape(COPIES * config.batch_size + 1)
        pinned = device.type == "cuda"
        self._slots = [
            _Slot(torch.zeros(shape, dtype=torch.int32, pin_memory=pinned), torch.ones((), pin_memory=pinned))
            for _ in range(SLOTS)
        ]
        self._table = torch.zeros(shape, dtype=torch.int32, device=device)
        self._names: tuple[list[str], list[str]] = ([], [])
        self._row: torch.Tensor | None = None
        self._tables: list[torch.Tensor] = []
        self._steps: dict[tuple[int, int], Callable[[], object]] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device) if pinned else None

    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> Update:
        """See `Engine`; one micro-batch."""
        (ids,) = ids_KB
        set_lr(self.optimizer, lr_factor)
        bucket, slot = self.buckets.of(ids), self._slots[step % SLOTS]
        applied = slot.wait()
        ops.draw_table(self.module.cache.graphs, np.concatenate([ids, ids]), step, bucket=bucket, out=slot.table)
        slot.table[3, LR_PLACE : LR_PLACE + 1].view(torch.float32).fill_(self.optimizer.param_groups[0]["lr"])
        self._table.copy_(slot.table, non_blocking=True)
        if bucket not in self._steps:
            self._steps[bucket] = self._prepare(bucket)
        self._steps[bucket]()
        if self.average:
            self.average.update()
        slot.applied.copy_(self.optimizer.applied, non_blocking=True)
        if self.device.type == "cuda":
            slot.done = torch.cuda.Event()
            slot.done.record()
        else:
            applied = bool(slot.applied)
        return Update(*self._terms(), applied)

    def _terms(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        values, chance = self._names
        assert self._row is not None
        row = self._row.unbind()
        return dict(zip(values, row, strict=False)), dict(zip(chance, row[len(values) :], strict=True))

    def body(self, bucket: tuple[int, int], table_K3: torch.Tensor | None) -> tuple[list[torch.Tensor], list[int]]:
        """The step on what `self._table` says, its terms in `self._row`; returns the gradients and their offsets.

        table: the device's table of gradients if it is known or filled later, None where the gradients make it.
        """
        stage, optimizer, num = self.module, self.optimizer, self.config.batch_size
        mask = ops.MaskDraw(num, self.config.mask_ratio, self.config.seed, 0)
        packed = ops.pack_replayed(
            stage.cache.graphs, self._table, COPIES * num, mask, bucket=bucket, bounds=self.buckets.bounds
        )
        terms = stage.terms(stage.encode_packed(*packed, num), self._table[0, :num].long(), self._table[3, :1])
        # A loss that is not finite can have finite gradients: times NaN they are not, and the step is skipped.
        terms.total.backward(terms.total.detach() * 0 + 1)
        with torch.no_grad():
            optimizer.control[adam_op.LR].copy_(self._table[3, LR_PLACE : LR_PLACE + 1].view(torch.float32)[0])
            grads, offsets = optimizer.flat.gradients()
            made = optimizer.table(grads, offsets).to(self.device) if table_K3 is None else table_K3
            optimizer.launch(grads, offsets, made)
            row = torch.stack([*terms.values.values(), *terms.chance.values()])
            if self._row is None:
                self._row, self._names = torch.zeros_like(row), (list(terms.values), list(terms.chance))
            self._row.copy_(torch.where(optimizer.applied > 0, row, self._row))
        return grads, offsets

    def _eager(self, bucket: tuple[int, int], table_K3: torch.Tensor | None = None) -> int:
        """`body` outside a capture; returns how many chunks of gradients there are."""
        grads, offsets = self.body(bucket, table_K3)
        num_chunks = len(self.optimizer.table(grads, offsets))
        self.optimizer.zero_grad(set_to_none=True)
        return num_chunks

    def _warm_up(self, bucket: tuple[int, int]) -> int:
        """Steps that run whole but are not applied; returns the number of chunks."""
        control = self.optimizer.control
        control[adam_op.INVERSE_SCALE] = torch.nan
        num_chunks = max(self._eager(bucket) for _ in range(WARM_UP_STEPS))
        control[adam_op.INVERSE_SCALE] = 1
        return num_chunks

    def _prepare(self, bucket: tuple[int, int]) -> Callable[[], object]:
        """What runs the step of a bucket: its graph's replay, or without CUDA the step itself."""
        if self._stream is None:
            self._warm_up(bucket)
            return lambda: self._eager(bucket)
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            table_K3 = torch.zeros(self._warm_up(bucket), 3, dtype=torch.int64, device=self.device)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            grads, offsets = self.body(bucket, table_K3)
        self._pool = self._pool or graph.pool()
        table_K3.copy_(self.optimizer.table(grads, offsets))
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize(self.device)
        self._tables.append(table_K3)  # the graph reads it for as long as it lives
        return graph.replay
