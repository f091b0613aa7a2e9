"""Normalisation, gate and cross-attention of the UNet and the VAE.

Letters: B images, C channels, G groups, R rows, D width, S queries, T keys, H heads.

Values are fp32, fp16 or bf16 (float64 too on the reference), accumulated in fp32. Every floating argument has a
gradient, except a bias of attention, which is a constant. Under autocast the values keep their dtype, without torch's
casts to fp32 and back.
"""

from __future__ import annotations

import torch
from sgg_kernels import reference

from . import unet_kernels
from .dispatch import backend_for
from .graph_ops import DEBUG, check


def group_norm_silu(
    x: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    num_groups: int,
    eps: float,
    silu: bool = True,
    shift_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(group_norm(x + shift))`, or the norm alone without `silu`: [B, C, ..] in the dtype of x, channels last.

    x: [B, C, any spatial dimensions], preferably channels last (else x is copied); weight, bias: [C]; G divides C.
    shift: [B, C] for all pixels of an image; it costs no pass over x.
    Statistics are accurate at any mean, because deviations are squared, not values. Raises ValueError if the shapes do
    not fit or x has no pixel.

    Equivalent PyTorch: `silu(group_norm(x + shift[:, :, None, None], num_groups, weight, bias, eps))`
    """
    name = "group_norm_silu"
    check(name, x.ndim >= 2, "x must be [B, C, ..]")
    check(name, weight_C.shape == bias_C.shape == x.shape[1:2], f"weight and bias must be [{x.shape[1]}]")
    check(name, num_groups > 0 and x.shape[1] % num_groups == 0, f"{num_groups} groups do not divide {x.shape[1]}")
    check(name, x.shape[1:].numel() > 0, "an image must have a pixel and a channel")
    check(name, shift_BC is None or shift_BC.shape == x.shape[:2], f"the shift must be {list(x.shape[:2])}")
    values = (x, weight_C, bias_C) if shift_BC is None else (x, weight_C, bias_C, shift_BC)
    check(name, all(value.device == x.device for value in values), f"all tensors must be on {x.device}")
    if backend_for(x.device, *(value.dtype for value in values)) == "reference":
        return reference.group_norm_silu(x, weight_C, bias_C, num_groups, eps, silu, shift_BC)
    spatial = x.shape[2:]
    x_BSC = x.flatten(2).transpose(1, 2) if spatial else x.unsqueeze(1)
    out_BSC, *_ = unet_kernels.group_norm_silu(x_BSC, shift_BC, weight_C, bias_C, num_groups, eps, silu)
    return out_BSC.transpose(1, 2).unflatten(2, spatial) if spatial else out_BSC.squeeze(1)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """`a * gelu(gate)` with a | gate = x along the last dimension: x [.., 2D] -> [.., D] in the dtype of x.

    The gelu is exact (erf). Raises ValueError if the last dimension is odd.

    Equivalent PyTorch: `a, gate = x.chunk(2, -1); a * gelu(gate)`
    """
    check("geglu", x.ndim >= 1 and x.shape[-1] % 2 == 0, "the last dimension must be even: values and their gates")
    if backend_for(x.device, x.dtype) == "reference":
        return reference.geglu(x)
    return unet_kernels.geglu(x.flatten(0, -2) if x.ndim > 1 else x[None]).view(*x.shape[:-1], x.shape[-1] // 2)


MOST_KEYS, MOST_WIDTH = 128, 160
"""Most keys, and the widest head, of the kernel of `cross_attention`."""


def why_no_kernel(num_keys: int, width: int, dtype: torch.dtype) -> str | None:
    """Reason why the kernel of `cross_attention` does not compute these sizes, or None. The reference does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype)[6:]} values, and the kernel takes bfloat16 and float16"
    if num_keys > MOST_KEYS:
        return f"{num_keys} keys, and the kernel takes up to {MOST_KEYS}"
    if width > MOST_WIDTH:
        return f"heads of width {width}, and the kernel takes up to {MOST_WIDTH}"
    return None


def cross_attention(
    q_BSHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    v_BTHD: torch.Tensor,
    bias_BT: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """`softmax(scale q k^T + bias) v` of every head, with one bias for all queries: [B, S, H, D] in the dtype of q.

    q: [B, S, H, D]; k, v: [B, T, H, D], T >= 1, in the dtype of q; bias: [B, T] fp32, a constant. scale: 1 / sqrt(D)
    if None. Images and rows may have any stride (slices of a merged GEMM); heads that are not adjacent are copied.
    The kernel takes bf16 and fp16, up to 128 keys and heads of width 160; the reference runs otherwise. No query gives
    gradients of 0.
    Raises ValueError if shapes, dtypes or devices do not fit, or if the bias requires a gradient.

    Equivalent PyTorch: `scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
    bias[:, None, None], scale=scale).transpose(1, 2)`
    """
    name, (images, _, heads, width) = "cross_attention", q_BSHD.shape
    check(name, k_BTHD.shape == v_BTHD.shape, "k and v must have one shape")
    num_keys = k_BTHD.shape[1]
    check(name, k_BTHD.shape == (images, num_keys, heads, width), f"k must be [{images}, T, {heads}, {width}]")
    check(name, num_keys > 0 and width > 0, "there must be a key, of a width")
    check(name, bias_BT.shape == (images, num_keys), f"the bias must be [{images}, {num_keys}]")
    check(name, k_BTHD.dtype == v_BTHD.dtype == q_BSHD.dtype, "q, k and v must have one dtype")
    check(name, not bias_BT.requires_grad, "the bias is a constant without a gradient: detach it")
    check(name, all(x.device == q_BSHD.device for x in (k_BTHD, v_BTHD, bias_BT)), f"all must be on {q_BSHD.device}")
    if DEBUG:
        check(name, bool((bias_BT.amax(dim=1) > -torch.inf).all()), "an image has no key: its biases are all -inf")
    scale = width**-0.5 if scale is None else scale
    backend = backend_for(q_BSHD.device, q_BSHD.dtype)
    if backend == "reference" or why_no_kernel(num_keys, width, q_BSHD.dtype):
        return reference.cross_attention(q_BSHD, k_BTHD, v_BTHD, bias_BT, scale)
    check(name, bias_BT.dtype == torch.float32, "the bias must be fp32")
    bias_BT = bias_BT if bias_BT.stride(1) == 1 else bias_BT.contiguous()
    return unet_kernels.cross_attention(q_BSHD, k_BTHD, v_BTHD, bias_BT, scale)[0]
