"""Normalisation, gate and cross-attention of the UNet and the VAE.

Letters: B images, C channels, G groups, R rows, D width, S queries, T keys, H heads.

Values are fp32, fp16 or bf16 (float64 too on the reference), accumulated in fp32. Every floating argument has a
gradient, except a bias of attention, which is a constant. Under autocast the values keep their dtype, without torch's
casts to fp32 and back.
"""

from __future__ import annotations

import torch
from sgg_kernels import reference

from . import norm_kernels, unet_kernels
from .dispatch import backend_for
from .graph_ops import DEBUG, check
from .sums import Slot


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
    _check_group_norm(x, weight_C, bias_C, num_groups, shift_BC)
    values = (x, weight_C, bias_C) if shift_BC is None else (x, weight_C, bias_C, shift_BC)
    if backend_for(x.device, *(value.dtype for value in values)) == "reference":
        return reference.group_norm_silu(x, weight_C, bias_C, num_groups, eps, silu, shift_BC)
    out_BSC, *_ = unet_kernels.group_norm_silu(_rows_of(x), shift_BC, weight_C, bias_C, num_groups, eps, silu)
    return _image_of(out_BSC, x)


def _check_group_norm(
    x: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, num_groups: int, shift_BC: torch.Tensor | None
) -> None:
    name = "group_norm_silu"
    check(name, x.ndim >= 2, "x must be [B, C, ..]")
    check(name, weight_C.shape == bias_C.shape == x.shape[1:2], f"weight and bias must be [{x.shape[1]}]")
    check(name, num_groups > 0 and x.shape[1] % num_groups == 0, f"{num_groups} groups do not divide {x.shape[1]}")
    check(name, x.shape[1:].numel() > 0, "an image must have a pixel and a channel")
    check(name, shift_BC is None or shift_BC.shape == x.shape[:2], f"the shift must be {list(x.shape[:2])}")
    same = all(value is None or value.device == x.device for value in (weight_C, bias_C, shift_BC))
    check(name, same, f"all tensors must be on {x.device}")


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """[B, C, ..] as [B, S, C]."""
    return x.flatten(2).transpose(1, 2) if x.ndim > 2 else x.unsqueeze(1)


def _image_of(out_BSC: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B, S, C] in the shape of x."""
    return out_BSC.transpose(1, 2).unflatten(2, x.shape[2:]) if x.ndim > 2 else out_BSC.squeeze(1)


def _recorded(*values: torch.Tensor | None) -> bool:
    """True if autograd records this call and nothing compiles it."""
    wanted = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)
    return wanted and not torch.compiler.is_compiling()


def group_norm_silu_beside(
    x: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    num_groups: int,
    eps: float,
    silu: bool = True,
    shift_BC: torch.Tensor | None = None,
    slot: Slot | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`group_norm_silu`, x): use the second for what goes past the norm, and its gradient is added in the kernel.

    Arguments and errors as of `group_norm_silu`; slot: of `ColumnSums`, for the gradients of weight and bias.

    Equivalent PyTorch: `silu(group_norm(x + shift[:, :, None, None], num_groups, weight, bias, eps)), x`
    """
    values = (x, weight_C, bias_C) if shift_BC is None else (x, weight_C, bias_C, shift_BC)
    if not _recorded(*values) or backend_for(x.device, *(value.dtype for value in values)) == "reference":
        return group_norm_silu(x, weight_C, bias_C, num_groups, eps, silu, shift_BC), x
    _check_group_norm(x, weight_C, bias_C, num_groups, shift_BC)
    token = None if slot is None else slot.token
    out_BSC, beside_BSC = norm_kernels.GroupNormBeside.apply(
        _rows_of(x), shift_BC, weight_C, bias_C, token, slot, num_groups, eps, silu
    )
    return _image_of(out_BSC, x), _image_of(beside_BSC, x)


def add_layer_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    late_D: torch.Tensor | None = None,
    slot: Slot | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`layer_norm(sum)`, sum) with sum = x + residual + late: both [.., D] in the dtype of x.

    x, residual: [.., D] of one shape and dtype; weight, bias, late: [D] with D of at most 8,192. The sum is rounded
    before its norm. Without residual and late the sum is x. Use it for what goes past the norm: its gradient is added
    in the norm's backward. slot: of `ColumnSums`, for the gradients of weight, bias and late. Raises ValueError if the
    shapes or the dtypes of x and residual do not fit.

    Equivalent PyTorch: `s = x + residual + late; layer_norm(s, s.shape[-1:], weight, bias, eps), s`
    """
    name, width = "add_layer_norm", x.shape[-1:]
    check(name, x.ndim >= 1 and 0 < x.shape[-1] <= 8192, "x must be [.., D] with D from 1 to 8192")
    given = [value for value in (weight_D, bias_D, late_D) if value is not None]
    check(name, all(value.shape == width for value in given), f"weight, bias and late must be {list(width)}")
    fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    check(name, fits, f"the residual must be {x.dtype} {list(x.shape)}")
    given += [] if residual is None else [residual]
    check(name, all(value.device == x.device for value in given), f"all tensors must be on {x.device}")
    if backend_for(x.device, *(value.dtype for value in (x, *given))) == "reference":
        return reference.add_layer_norm(x, weight_D, bias_D, eps, residual, late_D)
    rows, added = (None if t is None else t.reshape(-1, x.shape[-1]) for t in (x, residual))
    if _recorded(x, *given):
        token = None if slot is None else slot.token
        out, total = norm_kernels.AddLayerNorm.apply(rows, added, late_D, weight_D, bias_D, token, slot, eps)
    else:
        out, total, *_ = norm_kernels.add_layer_norm(rows, added, late_D, weight_D, bias_D, eps)
        total = rows if added is None and late_D is None else total
    return out.view(x.shape), total.view(x.shape)


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
