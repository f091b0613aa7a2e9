"""Training steps of both stages, captured as CUDA graphs.

The host draws the samples, fills one small table for each micro-batch and launches; everything else reads device
memory. The rules of capture:

* A step does not branch on data, size a tensor by data, read a number back or copy from memory that is not pinned.
  Shapes follow from the `Bucket`, which the host knows because it drew the batch.
* The table holds what changes from step to step: samples, offsets, step, learning rates. Latents that do not lie on the
  device come beside it, so capture does not depend on the size of the set.
* Every random number is a hash of (seed, step, sample), so no generator is registered, and a resumed run draws the same
  numbers.
* All buckets of fine-tuning are warmed up before the first capture: its pool is held from then on, and a warm-up needs
  as much memory as the pool.
* Warm-up steps run on the stream of the capture. There autograd binds its nodes, kernels are compiled and cuDNN tries
  its algorithms (only there). The optimiser's flag skips them, so they change nothing.
* No gradient exists when a capture begins. Backward leaves each gradient in the graphs' memory, and the optimiser finds
  it by a table of addresses that is filled after the capture (an update in backward knows its address at once). Further
  micro-batches add to the gradients in a graph of their own.
* One memory pool serves all graphs. The graphs of a bucket run in the order of their capture, without graphs of other
  buckets in between.
* The applied flag and the loss of a step are copied back beside it and read when its slot is needed again.
* Without clipping weights are updated behind backward (`backward/behind.py`), on a second stream that joins the
  capture and is joined before its end. Its kernels yield to those of backward, by the streams' priorities. It also
  takes the weight gradients of the UNet if the settings say so (`backward/aside.py`).
* With several processes the all-reduces of the gradients, NCCL's, are part of the graph. Warm-up leaves them out, so no
  process waits there for one that needs no warm-up. They run in the order that the first warm-up step has shown.

A step of one micro-batch is one graph. With accumulation three graphs serve any number of micro-batches. The backward
of the first graph writes the gradients. The backward of the second adds to them. The third runs the optimiser. Where
the last micro-batch also sums the gradients over the processes, or updates the weights, it has a graph of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from sgg_fast import env, ops
from sgg_fast.data.moments import MomentRows
from sgg_fast.train.backward.aside import Aside, goes_aside
from sgg_fast.train.backward.behind import Behind, goes_behind
from sgg_fast.train.buckets import Bucket
from sgg_fast.train.engines.base import StepResult, resolve_precision
from sgg_fast.train.engines.state import Whole, in_matmul_precision
from sgg_fast.train.optim.adam_flat import FlatAdam, Gradients
from sgg_fast.train.optim.groups import set_lr
from sgg_fast.train.run.processes import is_by_host, wait_for
from sgg_fast.train.stages import FinetuneStage, Stage

logger = logging.getLogger(__name__)

SLOTS = 8
"""Steps that the host may be ahead of the device, and steps until the host reads whether one was applied."""

WARM_UP_STEPS = 3

RATES_PLACE = 1
"""Index in the table's last row, behind the step: each group's learning rate, its bits stored as an integer."""

Part = tuple[Callable[[], list[Gradients] | None], ...]
"""Functions that one graph runs."""


@dataclasses.dataclass
class _Slot:
    """Pinned memory of one step in flight, and the event at which the device is done with it."""

    tables: torch.Tensor
    """[K, 4, W], one table for each micro-batch."""
    outcome: torch.Tensor
    """[2], the applied flag and the loss of its step."""
    moments: torch.Tensor | None = None
    """[K, B, 2c, h, w], the latents' moments of its samples; None if the whole set's lie on the device."""
    step: int = -1
    done: torch.cuda.Event | None = None

    def free(self) -> tuple[bool, float]:
        """Wait for its step. Returns whether that was applied (True if there was none), and its loss."""
        if self.done is None:
            return True, 0.0
        wait_for(self.done)
        self.done = None
        applied, loss = self.outcome.tolist()
        return bool(applied), loss


def why_eager(stage: Stage, device: torch.device) -> str | None:
    """The reason why a step of this stage on a GPU, without DeepSpeed, is not captured; None if it is captured."""
    config = stage.config
    if not config.run.cuda_graphs:
        return "--no-cuda-graphs"
    if left_out := env.unfit("capture"):
        return f"left out since sgg-doctor: {left_out}"
    if ops.backend_for(device, torch.float32) != "triton":
        return "the reference forms of the kernels wait for the device"
    if is_by_host():
        return "gloo sums the gradients of the processes on the host"
    if not isinstance(stage, FinetuneStage):
        return None
    if resolve_precision(config.optim, device) == "fp16":
        return "--precision fp16: the host changes the loss's scale"
    if stage.cache.texts is not None:
        return "SD's text encoder runs in each step"
    return None


class CapturedEngine(Whole):
    """An engine with a flat optimiser. On a CPU the same step runs without capture, for tests.

    `StepResult.applied` describes the step `SLOTS` before, and its losses hold until the next step. A skipped step
    repeats the losses of the one before it, and the average of the weights (--ema) counts it. After a failed capture
    its bucket, and all buckets met later, run eagerly.
    """

    optimizer: FlatAdam

    def __init__(self, module: Stage, device: torch.device) -> None:
        super().__init__(module, device, flat=True)
        self.device, self.execution, self.num_micro = device, "captured as CUDA graphs", module.num_micro
        self.behind = Behind(self.optimizer) if goes_behind(module.config.optim, self.num_processes) else None
        if self.behind:
            self.execution += ", the optimiser behind backward"
        self.aside: Aside | None = None
        if self.behind and isinstance(module, FinetuneStage) and goes_aside(module.config, self.num_processes):
            self.aside = Aside(self.behind, module.unet.parameters())
            self.execution += ", weight gradients aside"
        self.buckets, self._rows = module.buckets(), module.cache.moments
        num_rates = len(self.optimizer.param_groups)
        self._rates = slice(RATES_PLACE, RATES_PLACE + num_rates)
        rows, width = ops.table_shape(module.num_graphs + 1, RATES_PLACE + num_rates + module.num_shared)
        pinned = device.type == "cuda"
        self._slots = [
            _Slot(
                torch.zeros(self.num_micro, rows, width, dtype=torch.int32, pin_memory=pinned),
                torch.ones(2, pin_memory=pinned),
            )
            for _ in range(SLOTS)
        ]
        self._table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._staged: torch.Tensor | None = None
        """[B, 2c, h, w] on the device: the moments of the micro-batch that the graphs read."""
        if isinstance(self._rows, MomentRows):
            shape = self.num_micro, module.num_graphs, *self._rows.shape[1:]
            self._staged = torch.zeros(shape[1:], dtype=self._rows.dtype, device=device)
            for slot in self._slots:
                slot.moments = torch.zeros(shape, dtype=self._rows.dtype, pin_memory=pinned)
        self._names: tuple[list[str], list[str]] = ([], [])
        self._sum: torch.Tensor | None = None
        self._row: torch.Tensor | None = None
        self._outcome = torch.ones(2, device=device)
        self._address_tables: list[torch.Tensor] = []
        self._warm: dict[Bucket, torch.Size] = {}
        """Bucket that is warmed up -> shape of the table of its gradients."""
        self._runs: dict[Bucket, list[Callable[[], object]]] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device, priority=-1) if pinned else None
        self.capture: Callable[[Bucket, torch.Tensor], list[Callable[[], object]]] | None = None
        """What makes a bucket's graphs; None where steps run eagerly."""
        if pinned:
            self.capture = self._capture

    @in_matmul_precision
    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> StepResult:
        assert len(ids_KB) == self.num_micro
        set_lr(self.optimizer, lr_factor)
        bucket, slot = self.buckets.of(ids_KB), self._slots[step % SLOTS]
        applied, loss = slot.free()
        for k, ids in enumerate(ids_KB):
            self.fill(slot.tables[k], ids, step, bucket)
            if slot.moments is not None and isinstance(self._rows, MomentRows):
                slot.moments[k].copy_(self._rows.take(ids))
        if bucket not in self._runs:
            self._send(slot, 0)
            self._runs[bucket] = self._prepare(bucket)
        for k, run in enumerate(self._runs[bucket]):
            if k < self.num_micro:
                self._send(slot, k)
            run()
        if self.average:
            self.average.update()
        slot.outcome.copy_(self._outcome, non_blocking=True)
        if self.device.type != "cuda":
            applied, loss = slot.outcome.tolist()
            return StepResult(*self._terms(), bool(applied), 0, None if applied else loss, self.optimizer.norm)
        slot.step, slot.done = step, torch.cuda.Event()
        slot.done.record()
        return StepResult(*self._terms(), applied, SLOTS, None if applied else loss, self.optimizer.norm)

    def _send(self, slot: _Slot, k: int) -> None:
        """Copy what a micro-batch reads to the device."""
        self._table.copy_(slot.tables[k], non_blocking=True)
        if self._staged is not None and slot.moments is not None:
            self._staged.copy_(slot.moments[k], non_blocking=True)

    def outstanding(self) -> list[tuple[int, float]]:
        found = [(slot.step, *slot.free()) for slot in self._slots if slot.done is not None]
        return [(step, loss) for step, applied, loss in sorted(found) if not applied]

    def fill(self, table: torch.Tensor, ids: np.ndarray, step: int, bucket: Bucket) -> None:
        """Write a micro-batch's samples, the step and the learning rates."""
        ops.draw_table(self.module.store, self.module.graphs_of(ids, step), step, bucket=bucket.shape, out=table)
        rates = torch.tensor([group["lr"] for group in self.optimizer.param_groups], dtype=torch.float32)
        table[3, self._rates].view(torch.float32).copy_(rates)
        self.module.share(table)

    def _terms(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        losses, chance = self._names
        assert self._row is not None
        row = self._row.unbind()
        return dict(zip(losses, row, strict=False)), dict(zip(chance, row[len(losses) :], strict=True))

    def add(self, bucket: Bucket, first: bool, last: bool = False, addresses: torch.Tensor | None = None) -> None:
        """Run forward and backward of a micro-batch and add its gradients and terms; the first one overwrites.

        The last one sums the gradients over the processes, or updates the weights behind backward. addresses: as in
        `apply`.
        """
        if isinstance(self._rows, MomentRows):
            self._rows.current = self._staged
        if first:
            self.optimizer.rates.copy_(self._table[3, self._rates].view(torch.float32))
            self.optimizer.begin()
        with self.autocast(), self.aside or contextlib.nullcontext():
            terms = self.module.packed_terms(self._table, bucket)
        if self.behind:
            self.behind.addresses = addresses
        in_order = (self.gradient_sum or self.behind) if last else None
        if in_order:
            in_order.expect()
        # A loss that is not finite can have finite gradients. Times NaN they are not, and the step is skipped.
        terms.total.backward(terms.total.detach() * 0 + 1 / (self.num_micro * self.num_processes))
        if in_order:
            in_order.finish()
        if self.aside:
            self.aside.finish()
        row = torch.stack([*terms.losses.values(), *terms.chance.values()])
        if self._sum is None:
            self._sum, self._row = torch.zeros_like(row), torch.zeros_like(row)
            self._names = list(terms.losses), list(terms.chance)
        if first:
            self._sum.copy_(row)
        else:
            self._sum.add_(row)

    @torch.no_grad()
    def apply(self, addresses: torch.Tensor | None) -> list[Gradients]:
        """Run the optimiser's step; if it is applied, update the mean terms. Returns the gradients and releases them.

        The gradients are those of each update. addresses: the optimiser's table on the device, which may be filled
        later; None builds it from the gradients.
        """
        optimizer = self.optimizer
        assert self._sum is not None and self._row is not None
        if self.behind:
            gradients = self.behind.taken()
            optimizer.sum_up()
        else:
            gradients = [optimizer.gradients()]
            table = self._table_of(gradients).to(self.device) if addresses is None else addresses
            optimizer.launch(gradients[0], table)
        mean, applied = self._sum / self.num_micro, optimizer.applied
        self._row.copy_(torch.where(applied > 0, mean, self._row))
        self._outcome.copy_(torch.stack([applied, mean[0]]))
        optimizer.zero_grad(set_to_none=True)
        return gradients

    def parts(self, bucket: Bucket, addresses: torch.Tensor | None) -> list[Part]:
        """The parts of a step in order; a part that repeats is captured once. A single micro-batch needs one graph."""
        apply = partial(self.apply, addresses)
        if self.num_micro == 1:
            return [(partial(self.add, bucket, True, True, addresses), apply)]
        first, further = partial(self.add, bucket, True, False), partial(self.add, bucket, False, False)
        last = partial(self.add, bucket, False, True, addresses) if self.gradient_sum or self.behind else further
        return [(first,), *[(further,)] * (self.num_micro - 2), (last,), (apply,)]

    def warm_up(self, bucket: Bucket) -> torch.Tensor:
        """Run whole steps that are not applied; returns the table of the gradients, on the host."""
        self.optimizer.scale_by(torch.nan)
        alone = self.gradient_sum.silent() if self.gradient_sum else contextlib.nullcontext()
        with _tried_algorithms(), alone:
            for _ in range(WARM_UP_STEPS):
                gradients = None  # the gradients of the last step must be freed before this one
                for part in self.parts(bucket, None):
                    gradients = run_part(part)
        self.optimizer.scale_by(1)
        assert gradients is not None
        return self._table_of(gradients)

    def _table_of(self, gradients: list[Gradients]) -> torch.Tensor:
        """The host's table of the gradients of all updates."""
        return torch.cat([self.optimizer.table(each) for each in gradients])

    def _prepare(self, bucket: Bucket) -> list[Callable[[], object]]:
        """The functions that run a step of a bucket: its graphs, or the step itself if it is not captured."""
        eagerly: list[Callable[[], object]] = [partial(run_part, part) for part in self.parts(bucket, None)]
        if bucket not in self._warm:
            self._warm_all_up(bucket)
        if self.capture is None:
            return eagerly
        addresses = torch.zeros(self._warm[bucket], dtype=torch.int64, device=self.device)
        before = torch.cuda.current_stream(self.device) if self._stream else None
        try:
            return self.capture(bucket, addresses)
        except Exception as error:  # border
            if before is not None:  # torch leaves the capture's stream current if ending a capture fails
                torch.cuda.set_stream(before)
                torch.cuda.synchronize(self.device)
            for part in (self.gradient_sum, self.behind, self.aside):
                if part:
                    part.forget()
            self.optimizer.zero_grad(set_to_none=True)  # the remaining gradients lie in the memory of the graph
            self.capture = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.execution = f"eager (the capture failed: {reason})"
            logger.warning("a training step cannot be captured as a CUDA graph and runs eagerly: %s", reason)
            return eagerly

    def _warm_all_up(self, bucket: Bucket) -> None:
        """Warm up `bucket` on the table as it is, and every other bucket of the set on a table of its example."""
        drawn = self._table.clone()
        with self._on_stream():
            self._warm[bucket] = self.warm_up(bucket).shape
            for other, sample in self.buckets.examples().items():
                if other not in self._warm:
                    ids_B = np.full(self.module.config.optim.batch_size, sample)
                    table = torch.zeros(drawn.shape, dtype=drawn.dtype)
                    self.fill(table, ids_B, 0, other)
                    self._table.copy_(table)
                    self._warm[other] = self.warm_up(other).shape
            self._table.copy_(drawn)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Context in which work goes to the capture's stream; the device is synchronised before and after."""
        if self._stream is None:
            yield
            return
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize(self.device)

    def _capture(self, bucket: Bucket, addresses: torch.Tensor) -> list[Callable[[], object]]:
        """Capture the graphs of a bucket; their optimiser reads `addresses` [K, 3] on the device."""
        parts, gradients = self.parts(bucket, addresses), None
        graphs: dict[Part, torch.cuda.CUDAGraph] = {}
        for part in dict.fromkeys(parts):
            graphs[part] = torch.cuda.CUDAGraph()
            # NCCL's watchdog asks for events of its own meanwhile, from another thread.
            mode = "thread_local" if self.gradient_sum else "global"
            with torch.cuda.graph(graphs[part], pool=self._pool, stream=self._stream, capture_error_mode=mode):
                gradients = run_part(part)
            self._pool = self._pool or graphs[part].pool()
        assert gradients is not None
        addresses.copy_(self._table_of(gradients))
        torch.cuda.synchronize(self.device)
        self._address_tables.append(addresses)  # the graph reads the table as long as the graph lives
        return [graphs[part].replay for part in parts]


def run_part(part: Part) -> list[Gradients] | None:
    """Call the functions in order; returns the result of the last one."""
    return [function() for function in part][-1]


@contextlib.contextmanager
def _tried_algorithms() -> Iterator[None]:
    """Context in which cuDNN tries its algorithms, which it cannot do in a capture. It keeps the fastest afterwards."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
