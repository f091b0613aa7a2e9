"""Adam over groups of parameters in flat buffers, its moments in 32, 8 or 4 bits or its second moments factored.

Letters: P elements of the flat buffers, K chunks, R rows and C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from sgg_kernels.reference import adam as reference
from sgg_kernels.reference.adafactor import Factored, first_means
from sgg_kernels.reference.adafactor import adafactor as reference_adafactor
from sgg_kernels.reference.adam import (
    APPLIED,
    CONTROL_SIZE,
    CORRECTION_1,
    CORRECTION_2,
    FACTOR,
    INVERSE_SCALE,
    NORM,
    Hyper,
)
from sgg_kernels.reference.adam_blockwise import BLOCKS, ZERO_1, Moments, bits_of, dynamic_map, quantise
from sgg_kernels.reference.adam_blockwise import adam_blockwise as reference_blockwise
from sgg_kernels.reference.weights import Weights, read_weights, write_weights

from .dispatch import backend_for

__all__ = [
    "APPLIED", "BLOCKS", "CONTROL_SIZE", "CORRECTION_1", "CORRECTION_2", "FACTOR", "INVERSE_SCALE", "NORM",
    "ZERO_1", "Factored", "GroupGrads", "Hyper", "Moments", "Weights", "adam_decide_", "adam_update_", "bits_of",
    "chunk_table", "dynamic_map", "first_means", "num_chunks", "quantise", "read_weights", "write_weights",
]  # fmt: skip

GRAD_DTYPES = (torch.float32, torch.bfloat16)


class GroupGrads(NamedTuple):
    """The gradients of a group, all of one dtype."""

    grads: list[torch.Tensor]
    """[n] each, fp32 or bf16."""
    offsets: list[int]
    """Index of each gradient's first element in the group's flat buffers."""
    table: torch.Tensor
    """[K, 3] from `chunk_table`, on the device; K is 0 for the reference."""
    shapes: list[tuple[int, int]] | None = None
    """(R, C) of each gradient, for factored second moments."""


def chunk_table(
    grads: Sequence[torch.Tensor], offsets: Sequence[int], backend: str, numbers: Sequence[int] | None = None
) -> torch.Tensor:
    """[K, 3] on the host: the location of each chunk of `grads` for the kernels; empty for the reference.

    K is padded to a multiple of 4 with empty chunks, so that parts of a longer table start on 16 bytes and the kernels
    need no second form. numbers: of the gradients' matrices, for factored second moments; an empty chunk for each
    gradient then follows, padded likewise.
    """
    if backend == "reference" or not grads:
        return torch.empty(0, 3, dtype=torch.int64)
    from sgg_kernels.optim.adam import adam_table

    addresses, numels = [g.data_ptr() for g in grads], [g.numel() for g in grads]
    table_K3 = adam_table(addresses, offsets, numels, grads[0].element_size())
    empty = table_K3.new_tensor([[addresses[0], offsets[0], 0]])
    if numbers is None:
        return torch.cat([table_K3, empty.expand(-len(table_K3) % 4, 3)])
    number = torch.tensor(numbers, dtype=torch.int64) << 32  # beside the number of elements, which is below 2^31
    of_chunk = torch.tensor([-(-n // reference.BLOCK) for n in numels])
    table_K3[:, 2] += number.repeat_interleave(of_chunk)
    heads = torch.stack([torch.tensor(addresses), torch.tensor(offsets), number], 1)
    padding = [empty.expand(-len(table) % 4, 3) for table in (table_K3, heads)]
    return torch.cat([table_K3, padding[0], heads, padding[1]])


def num_chunks(numels: Sequence[int], backend: str, factored: bool = False) -> int:
    """K of `chunk_table`."""
    if backend == "reference":
        return 0
    of_heads = -(-len(numels) // 4) * 4 if factored else 0
    return -(-sum(-(-num // reference.BLOCK) for num in numels) // 4) * 4 + of_heads


@torch.library.custom_op("sgg_fast::adam_decide_", mutates_args=("control", "step"))
def _decide(
    control: torch.Tensor,
    step: torch.Tensor,
    grads: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    in_bf16: Sequence[bool],
    beta_1: float,
    beta_2: float,
    eps: float,
    max_norm: float,
    backend: str,
) -> None:
    hyper = Hyper(beta_1, beta_2, eps, max_norm)
    if backend == "reference":
        reference.adam_decide(reference.squares_of(grads), control, step, hyper)
    else:
        from sgg_kernels.optim.adam import adam_decide

        dtypes = [torch.bfloat16 if narrow else torch.float32 for narrow in in_bf16]
        adam_decide(tables, dtypes, control, step, hyper)


@torch.library.custom_op("sgg_fast::adam_update_", mutates_args=("param", "low", "moments"))
def _update(
    param: torch.Tensor,
    low: torch.Tensor | None,
    moments: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    table: torch.Tensor,
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    shapes: Sequence[int],
    seed: int,
    beta_1: float,
    beta_2: float,
    eps: float,
    backend: str,
) -> None:
    weights, rest = Weights(param, low, seed), (control, rate, step, Hyper(beta_1, beta_2, eps))
    if backend == "reference":
        if control[reference.APPLIED]:
            if len(moments) == 2:
                reference.adam_update(weights, moments, grads, offsets, *rest)
            elif shapes:
                reference_adafactor(weights, Factored(*moments), grads, offsets, *rest)
            else:
                reference_blockwise(weights, Moments(*moments), grads, offsets, *rest)
    elif len(moments) == 2:
        from sgg_kernels.optim.adam import adam_update

        adam_update(weights, moments, table, grads[0].dtype, *rest)
    elif shapes:
        from sgg_kernels.optim.adafactor import adafactor_update

        pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
        chunks = num_chunks([grad.numel() for grad in grads], backend)
        adafactor_update(weights, Factored(*moments), table[:chunks], table[chunks:], pairs, grads[0].dtype, *rest)
    else:
        from sgg_kernels.optim.adam_blockwise import adam_blockwise_update

        adam_blockwise_update(weights, Moments(*moments), table, grads[0].dtype, *rest)


for _op in (_decide, _update):
    _op.register_fake(lambda *args: None)


def adam_decide_(groups: Sequence[GroupGrads], control: torch.Tensor, step: torch.Tensor, hyper: Hyper) -> None:
    """Decide on the step from the norm of the gradients of all groups; changes `control` and `step`.

    control: fp32 [8] with the indices of `sgg_kernels.reference.adam`; step: int32 [1]. Raises ValueError without any
    gradient.

    Equivalent PyTorch: `norm = torch.nn.utils.get_total_norm(grads); norm.isfinite()`
    """
    grads = [grad for group in groups for grad in group.grads]
    if not grads:
        raise ValueError("adam_decide_: needs at least one gradient")
    in_bf16 = [group.grads[0].dtype == torch.bfloat16 for group in groups]
    backend = backend_for(control.device, torch.float32)
    _decide(control, step, grads, [group.table for group in groups], in_bf16, *hyper, backend)


def adam_update_(
    weights: Weights,
    moments: Moments | Factored | tuple[torch.Tensor, torch.Tensor],
    group: GroupGrads,
    control: torch.Tensor,
    rate: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """Apply the decided step in place; no change if `control[APPLIED]` is 0.

    moments: two in fp32 [P], `Moments` in 8 or 4 bits, which need offsets and buffer lengths that are multiples of
    256, or `Factored` with the group's shapes. rate: fp32, aligned to 16 bytes; its first element is the
    learning rate. Weights have any form of `Weights`. Elements without a gradient do not change. Raises ValueError for
    an empty list, and for gradients that are not flat, not fp32 or bf16, or not of one dtype.

    Equivalent PyTorch: `torch.optim.Adam(params, lr, betas, eps).step()`, `bitsandbytes.optim.Adam8bit(..).step()`,
    `torchao.optim.Adam4bit(..).step()` or `transformers.Adafactor(params, lr, relative_step=False,
    scale_parameter=False).step()`
    """
    param, low, seed = weights
    if not group.grads or any(g.dtype not in GRAD_DTYPES or g.ndim != 1 for g in group.grads):
        raise ValueError("adam_update_: needs at least one gradient, each flat and in fp32 or bf16")
    if len({g.dtype for g in group.grads}) > 1 or param.dtype not in GRAD_DTYPES:
        raise ValueError("adam_update_: the gradients of a group are of one dtype, its weights in fp32 or bf16")
    backend = backend_for(param.device, param.dtype)
    assert (group.shapes is not None) == isinstance(moments, Factored)
    shapes = [size for shape in group.shapes or [] for size in shape]
    _update(param, low, list(moments), *group[:3], control, rate, step, shapes, seed, *hyper[:3], backend)
