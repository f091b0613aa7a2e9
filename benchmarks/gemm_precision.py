"""Pre-trains the toy with the operands of its GEMMs rounded as a GPU would round them, beside fp32, on any machine.

    python -m benchmarks.gemm_precision                       # fp32, TF32 and bf16 operands, 300 steps, two seeds
    python -m benchmarks.gemm_precision --steps 600 --seeds 0 1 2

It answers what `--pretrain-matmul high` does to the loss curve. A tensor core multiplies rounded operands exactly and
sums in fp32, so rounding the operands of every GEMM, forward and backward, in fp32 arithmetic stands for it. Nothing is
timed. Samples, masks and noise of a seed are the same in every column.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

MANTISSA = {"fp32": 23, "tf32": 10, "bf16": 7}
"""Mantissa bits of an operand."""
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


def _shares(losses: list[float]) -> list[float]:
    size = max(1, len(losses) // SHOWN)
    return [sum(losses[i : i + size]) / size for i in range(0, size * SHOWN, size) if losses[i : i + size]]


@command("benchmarks.gemm_precision")
def main(argv: list[str] | None) -> None:
    """Print each curve and its distance from fp32's."""
    parser = OneLineParser(prog="python -m benchmarks.gemm_precision", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="pre-training steps (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1), help="default 0 1")
    parser.add_argument("--precision", nargs="+", choices=MANTISSA, default=tuple(MANTISSA))
    args: argparse.Namespace = parser.parse_args(argv)
    for seed in args.seeds:
        exact: list[float] = []
        for precision in args.precision:
            losses, scores = curve(precision, seed, args.steps)
            exact = exact or losses
            away = math.sqrt(sum((a - b) ** 2 for a, b in zip(losses, exact, strict=True)) / len(losses))
            points = " ".join(f"{point:.4f}" for point in _shares(losses))
            overall = sum(scores.values()) / len(scores)
            rest = f"rms from {args.precision[0]} {away:.5f}; held-out accuracy {overall:.4f}"
            print(f"seed {seed} {precision}: {points}; {rest}", flush=True)
