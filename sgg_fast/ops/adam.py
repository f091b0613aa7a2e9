"""Adam over flat buffers, one operator for all parameters. Letters: P elements of the buffers, K chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sgg_kernels.reference.adam import APPLIED, CONTROL_SIZE, CORRECTION_1, CORRECTION_2, INVERSE_SCALE, LR, NORM, Hyper
from sgg_kernels.reference.adam import adam as reference_adam

from .dispatch import backend_for

__all__ = [
    "APPLIED", "CONTROL_SIZE", "CORRECTION_1", "CORRECTION_2", "INVERSE_SCALE", "LR", "NORM", "Hyper", "adam_",
    "adam_table",
]  # fmt: skip


@torch.library.custom_op("sgg_fast::adam_", mutates_args=("param", "moment_1", "moment_2", "control", "step"))
def _adam(
    param: torch.Tensor,
    moment_1: torch.Tensor,
    moment_2: torch.Tensor,
    control: torch.Tensor,
    step: torch.Tensor,
    grads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    table: torch.Tensor,
    beta_1: float,
    beta_2: float,
    eps: float,
    max_norm: float,
    backend: str,
) -> None:
    hyper = Hyper(beta_1, beta_2, eps, max_norm)
    if backend == "reference":
        reference_adam(param, moment_1, moment_2, grads, offsets, control, step, hyper)
    else:
        from sgg_kernels.adam import adam_step

        adam_step(param, moment_1, moment_2, table, control, step, hyper)


@_adam.register_fake
def _(param, moment_1, moment_2, control, step, grads, offsets, table, beta_1, beta_2, eps, max_norm, backend):
    return None


def adam_table(grads: Sequence[torch.Tensor], offsets: Sequence[int], backend: str) -> torch.Tensor:
    """[K, 3] on the host: where the kernel finds each chunk of `grads`; empty for the reference, which has them."""
    if backend == "reference":
        return torch.empty(0, 3, dtype=torch.int64)
    from sgg_kernels.adam import adam_table as table_of

    return table_of([g.data_ptr() for g in grads], offsets, [g.numel() for g in grads], 4)


def adam_(
    param_P: torch.Tensor,
    moment_1_P: torch.Tensor,
    moment_2_P: torch.Tensor,
    grads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    table_K3: torch.Tensor,
    control: torch.Tensor,
    step: torch.Tensor,
    hyper: Hyper,
) -> None:
    """One Adam step in place over flat fp32 buffers [P]; no host synchronisation with the kernels.

    grads: [n] each, fp32, at `offsets` of the buffers; elements that none covers stay as they are. table: of
    `adam_table`, on the device. control: fp32 [8], step: int32 [1], by the places of `sgg_kernels.reference.adam`. A
    gradient that is not finite leaves parameters, moments, corrections and step untouched, and `control[APPLIED]` 0.
    Raises ValueError for gradients that are not flat fp32, or fewer than one.

    Equivalent PyTorch: `clip_grad_norm_(params, max_norm); torch.optim.Adam(params, lr, betas, eps).step()`
    """
    if not grads or any(g.dtype != torch.float32 or g.ndim != 1 for g in grads):
        raise ValueError("adam_: needs at least one gradient, each flat and in fp32")
    backend = backend_for(param_P.device, param_P.dtype)
    _adam(param_P, moment_1_P, moment_2_P, control, step, list(grads), list(offsets), table_K3, *hyper, backend)
