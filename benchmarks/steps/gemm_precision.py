"""Pre-training with the operands of its GEMMs rounded as a GPU would round them, in fp32 arithmetic.

The command is `benchmarks/gemm_precision.py`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.steps.forms import MANTISSA

GEMMS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Operator -> places of its operands."""
SHOWN = 10
"""Points of a curve, each the mean over an equal share of the steps."""


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`x` fp32 with this many mantissa bits, to nearest, ties away from zero (`cvt.rna`); infinities and NaN stay."""
    if bits >= 23:
        return x
    raw, drop = x.contiguous().view(torch.int32), 23 - bits
    kept = ((raw + (1 << (drop - 1))) >> drop) << drop
    return torch.where(x.isfinite(), kept.view(torch.float32), x)


class RoundedGemms(TorchDispatchMode):
    """Rounds the fp32 operands of every GEMM. `rounds` counts them."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.rounds = bits, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        places = GEMMS.get(func._schema.name.removeprefix("aten::"), ())
        given = list(args)
        for place in places:
            if given[place].dtype == torch.float32:
                given[place] = rounded(given[place], self.bits)
                self.rounds += 1
        return func(*given, **(kwargs or {}))


@contextlib.contextmanager
def gemms_in(precision: str) -> Iterator[RoundedGemms | None]:
    """Context in which GEMMs have operands of this precision, also those of a backward."""
    if precision == "fp32":
        yield None
        return
    with RoundedGemms(MANTISSA[precision]) as mode, torch.autograd.set_multithreading_enabled(False):
        yield mode


def curve(precision: str, seed: int, steps: int) -> tuple[list[float], dict[str, float]]:
    """The loss of each step of the toy's pre-training, and the accuracies on its held-out pairs after the last one."""
    from sgg_fast.recipes import recipe
    from sgg_fast.train.order import SampleOrder
    from sgg_fast.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as out:
        config = recipe("toy", seed=seed, pretrain_steps=steps)
        trainer = Trainer(config, "pretrain", Path(out))
        order = SampleOrder(len(trainer.trained), config.optim.batch_size, seed, 0, 1)
        losses = []
        with gemms_in(precision):
            for step in range(steps):
                ids_KB = trainer.trained[order.at(step)].reshape(1, -1)
                losses.append(float(trainer.engine.update(ids_KB, step).losses["loss"]))
        assert trainer.watch is not None and trainer.watch.validation is not None
        return losses, trainer.watch.validation.measure().values


def shares(losses: list[float]) -> list[float]:
    size = max(1, len(losses) // SHOWN)
    return [sum(losses[i : i + size]) / size for i in range(0, size * SHOWN, size) if losses[i : i + size]]
