"""Pure-torch form of the UNet's and the VAE's kernels; the Triton kernels are tested against it.

Letters: B images, C channels, G groups, D width, S queries, T keys, H heads. Any floating dtype; sums run in fp32
(float64 for float64 inputs) and are rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def group_norm_silu(
    x: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    shift_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(group_norm(x + shift))`, or without the silu, of [B, C, ..] (Wu & He, 2018), in the dtype of x.

    The variance is the mean of centred squares: E[x^2] - E[x]^2 loses all digits where the mean is large.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(acc)
    if shift_BC is not None:
        x_wide = x_wide + shift_BC.to(acc).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    grouped_BGM = x_wide.reshape(x.shape[0], num_groups, x.shape[1:].numel() // num_groups)
    centred_BGM = grouped_BGM - grouped_BGM.mean(dim=-1, keepdim=True)
    variance_BG1 = centred_BGM.square().mean(dim=-1, keepdim=True)
    normal = (centred_BGM * torch.rsqrt(variance_BG1 + eps)).reshape(x.shape)
    per_channel = (-1, *[1] * (x.ndim - 2))
    out = normal * weight_C.to(acc).view(per_channel) + bias_C.to(acc).view(per_channel)
    return (F.silu(out) if silu else out).to(x.dtype)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """`a * gelu(gate)` with a | gate = x along the last dimension and the exact gelu (Shazeer, 2020)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    a, gate = x.to(acc).chunk(2, dim=-1)
    return (a * F.gelu(gate)).to(x.dtype)


def add_layer_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    late_D: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(sum), sum) with sum = x + residual + late, rounded to the dtype of x (Ba, Kiros & Hinton, 2016)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    total = x
    if residual is not None or late_D is not None:
        total = x.to(acc)
        total = total if residual is None else total + residual.to(acc)
        total = (total if late_D is None else total + late_D.to(acc)).to(x.dtype)
    wide = total.to(acc)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (centred * rstd * weight_D.to(acc) + bias_D.to(acc)).to(x.dtype), total


def cross_attention(
    q_BSHD: torch.Tensor, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor, bias_BT: torch.Tensor, scale: float
) -> torch.Tensor:
    """`softmax(scale q k^T + bias) v` of every head, [B, S, H, D] in the dtype of q (Vaswani et al., 2017, eq. 1).

    The weights are rounded to the dtype of the values, and their gradients too: matrix units multiply values of one
    dtype. Sums run in fp32.
    """
    acc = torch.promote_types(q_BSHD.dtype, torch.float32)
    q, k, v = (x.to(acc) for x in (q_BSHD, k_BTHD, v_BTHD))
    scores_BHST = torch.einsum("bshd,bthd->bhst", q, k) * scale + bias_BT.to(acc)[:, None, None]
    weights_BHST = scores_BHST.softmax(dim=-1).to(v_BTHD.dtype).to(acc)
    return torch.einsum("bhst,bthd->bshd", weights_BHST, v).to(q_BSHD.dtype)
