"""The UNet's attention processors; the only module that uses xformers and cuDNN.

xFormers' public call refuses to run if its own binary does not load, for example the CUDA 12 wheel beside a CUDA 13
torch. The operators that it would choose need no binary: they are torch's own, in xFormers' form (queries, keys and
values [B, T, H, K], the layout of the projections). The processor here calls these operators directly, checks them
once against plain attention, and works the same on both builds.
Letters: B images, P queries, T keys, H heads, K width of a head.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sgg_fast import env, ops

logger = logging.getLogger(__name__)

ALIGNED = 8
"""Each row of a bias starts at a multiple of this many elements."""
_MOOT = ("xFormers wasn't build with CUDA", "(too new)")
"""Marks of xformers' reasons that do not concern torch's operators; `_check_operators` tests these operators."""


class CudnnAttnProcessor(AttnProcessor2_0):
    """SDPA that prefers cuDNN's kernel. Operands that it does not support (fp32, in sample sheets) use the others."""

    ORDER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Arguments and result of `AttnProcessor2_0`."""
        with sdpa_kernel(list(self.ORDER), set_priority=True):
            return super().__call__(*args, **kwargs)


class Operators(NamedTuple):
    """A pair of xformers' operators."""

    forward: Any
    backward: Any


def find_operators(q_BPHK: torch.Tensor, k_BTHK: torch.Tensor, bias_BHPT: torch.Tensor | None) -> Operators:
    """FlashAttention if it supports these operands, else CUTLASS. Raises ValueError with every reason of both."""
    from xformers.ops.fmha import cutlass, flash
    from xformers.ops.fmha.common import Inputs

    inputs, reasons = Inputs(q_BPHK, k_BTHK, k_BTHK, bias_BHPT), []
    for module in (flash, cutlass):
        found = Operators(module.FwOp, module.BwOp)
        against = {" ".join(reason.split()) for op in found for reason in op.not_supported_reasons(inputs)}
        against = {reason for reason in against if not any(part in reason for part in _MOOT)}
        if not against:
            return found
        reasons.append(f"{found.forward.NAME}: {', '.join(sorted(against))}")
    raise ValueError("; ".join(reasons))


class _Attend(torch.autograd.Function):
    """xFormers' operators, forward and backward; the bias gets no gradient."""

    @staticmethod
    def forward(ctx: Any, operators: Operators, scale: float, q: Any, k: Any, v: Any, bias: Any) -> torch.Tensor:
        """[B, P, H, K]."""
        from xformers.ops.fmha.common import Inputs

        out, saved = operators.forward.apply(Inputs(q, k, v, bias, scale=scale), needs_gradient=True)
        ctx.operators, ctx.scale = operators, scale
        ctx.save_for_backward(q, k, v, bias, out, saved.lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v."""
        from xformers.ops.fmha.common import Context, Inputs

        q, k, v, bias, out, lse = ctx.saved_tensors
        inputs = Inputs(q, k, v, bias, scale=ctx.scale)
        given = ctx.operators.backward.apply(Context(lse=lse, out=out), inputs, grad)
        return None, None, given.dq, given.dk, given.dv, None


def attend(
    operators: Operators,
    q_BPHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHK: torch.Tensor,
    bias_BHPT: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T + bias) v, [B, P, H, K]. The bias is a constant in the dtype of the queries.

    Raises ValueError if the operands' dtypes differ: autocast does not cover these operators.
    """
    for name, operand in (("keys", k_BTHK), ("values", v_BTHK), ("bias", bias_BHPT)):
        if operand is not None and operand.dtype != q_BPHK.dtype:
            raise ValueError(f"{name} in {operand.dtype}, queries in {q_BPHK.dtype}")
    scale = q_BPHK.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BPHK, k_BTHK, v_BTHK)):
        return _Attend.apply(operators, scale, q_BPHK, k_BTHK, v_BTHK, bias_BHPT)
    from xformers.ops.fmha.common import Inputs

    return operators.forward.apply(Inputs(q_BPHK, k_BTHK, v_BTHK, bias_BHPT, scale=scale), needs_gradient=False)[0]


class XformersAttnProcessor:
    """xFormers' operators on the projections' outputs, without a copy; one instance for all layers of a UNet.

    The first layer of a UNet call casts the bias [B, 1, T] to the queries' dtype. Every head and query reads it at
    stride 0.
    """

    def __init__(self) -> None:
        self.ran: dict[tuple[Any, ...], Operators] = {}
        """Operators found for each key (dtype, K, with a bias, deterministic)."""
        self._mask: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, P, C] of hidden states [B, P, C], context [B, T, ..] and a bias [B, 1 or P, T]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q_BPHK, k_BTHK, v_BTHK = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        out = self._attend(q_BPHK, k_BTHK, v_BTHK, attention_mask, attn.scale).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor

    def _attend(
        self, q_BPHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """[B, P, H, K]. mask: bias [B, 1 or P, T]."""
        bias = None
        if mask is not None:
            bias = self._bias_of(mask, q_BPHK.dtype)[:, None].expand(-1, q_BPHK.shape[2], q_BPHK.shape[1], -1)
        kind = q_BPHK.dtype, q_BPHK.shape[-1], bias is not None, torch.are_deterministic_algorithms_enabled()
        if kind not in self.ran:
            self.ran[kind] = find_operators(q_BPHK, k_BTHK, bias)
            operands = f"{kind[0]}, head width {kind[1]}{', masked' if kind[2] else ''}".removeprefix("torch.")
            logger.info("xformers attends by %s (%s)", self.ran[kind].forward.NAME, operands)
        return attend(self.ran[kind], q_BPHK, k_BTHK, v_BTHK, bias, scale)

    def _bias_of(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`mask` in `dtype` with aligned rows; the last result is cached for the following layers."""
        if self._mask is not mask or self._bias is None or self._bias.dtype != dtype:
            bias, short = mask.detach().to(dtype), -mask.shape[-1] % ALIGNED
            if short:
                bias = F.pad(bias, (0, short))[..., : mask.shape[-1]]
            self._mask, self._bias = mask, bias
        return self._bias


class OurCrossAttnProcessor(XformersAttnProcessor):
    """`ops.cross_attention` on the projections' outputs, without a copy; one instance for all cross-attentions.

    It takes one bias for all queries, [B, 1, T], cast to fp32 once a UNet call.
    """

    def _attend(
        self, q_BPHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        if mask is None:
            bias_BT = q_BPHK.new_zeros(k_BTHK.shape[:2], dtype=torch.float32)
        else:
            bias_BT = self._bias_of(mask, torch.float32)[:, 0]
        return ops.cross_attention(q_BPHK, k_BTHK, v_BTHK, bias_BT, scale)


def _strange(unet: UNet2DConditionModel, cross_only: bool = False) -> str:
    """The first feature of a layer that `XformersAttnProcessor` does not compute, or ""."""
    for name, layer in unet.named_modules():
        if isinstance(layer, Attention) and (layer.is_cross_attention or not cross_only):
            for part in ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
                if getattr(layer, part, None):
                    return f"{name} has {part}"
    return ""


def _differences(operators: Operators | None, operands: list[torch.Tensor], bias: Any, dtype: torch.dtype) -> Any:
    """Output and gradients in fp32; without operators those of plain attention."""
    q, k, v = (x.to(dtype).requires_grad_() for x in operands)
    if operators is not None:
        out = attend(operators, q, k, v, bias)
    else:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q_, k_, v_, None if bias is None else bias.to(dtype)).transpose(1, 2)
    return [x.float() for x in (out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))]


@torch.enable_grad()
def _check_operators(width: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Names of the operators for heads of `width` in `dtype`, without and with a bias.

    Raises ValueError if one cannot run, forward or backward, or if its error against fp32 is over twice that of plain
    attention in the same dtype: a kernel that was not compiled for the device prints a line and returns garbage.
    """
    generator, names = torch.Generator().manual_seed(0), []
    for num_keys, masked in ((64, False), (80, True)):
        shapes = ((2, 64, 2, width), (2, num_keys, 2, width), (2, num_keys, 2, width))
        operands = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        bias = torch.zeros(2, 1, 1, num_keys, dtype=dtype, device=device) if masked else None
        if bias is not None:
            bias[..., num_keys // 2 :] = -10000
            bias = bias.expand(2, 2, 64, num_keys)
        operators = find_operators(operands[0], operands[1], bias)
        try:
            got = _differences(operators, operands, bias, dtype)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise ValueError(f"{operators.forward.NAME}: {' '.join(str(error).split())}") from error
        plain, exact = (_differences(None, operands, bias, of) for of in (dtype, torch.float32))
        for a, b, c in zip(got, plain, exact, strict=True):
            if not bool((a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-4 * c.abs().max()):
                raise ValueError(
                    f"{operators.forward.NAME} in {dtype} at head width {width}: its numbers are wrong here"
                )
        names.append(operators.forward.NAME)
    return names


def check_xformers(unet: UNet2DConditionModel, device: torch.device) -> str:
    """The operators that `unet` would use. Raises ValueError with the full reason if xformers cannot run."""
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise ValueError(f"xformers cannot be imported: {' '.join(str(error).split())}") from error
    if strange := _strange(unet):
        raise ValueError(strange)
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    half = (torch.bfloat16, torch.float16) if torch.cuda.get_device_capability(device)[0] >= 8 else (torch.float16,)
    names: dict[str, None] = {}
    for width in sorted({layer.inner_dim // layer.heads for layer in layers}):
        for dtype in (*half, torch.float32):
            names.update(dict.fromkeys(_check_operators(width, dtype, device)))
    return ", ".join(names)


def _probe_cudnn(device: torch.device) -> None:
    """Raises RuntimeError if cuDNN attention fails with a token mask at SD's head width, forward or backward."""
    q = torch.zeros(1, 8, 64, 40, dtype=torch.bfloat16, device=device, requires_grad=True)
    k = torch.zeros(1, 8, 80, 40, dtype=torch.bfloat16, device=device)
    bias = torch.zeros(1, 1, 1, 80, dtype=torch.bfloat16, device=device).expand(1, 8, 64, 80)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, k, k, bias).sum().backward()


def _why_not_ours(unet: UNet2DConditionModel, device: torch.device) -> str:
    """Reason why our kernel cannot compute the cross-attentions of `unet`, or ""."""
    if ops.backend_for(device, torch.bfloat16) != "triton":
        return f"the kernels do not run here (device {device.type}, see --kernels)"
    layers = [layer for layer in unet.modules() if isinstance(layer, Attention) and layer.is_cross_attention]
    widest = max((layer.inner_dim // layer.heads for layer in layers), default=1)
    if reason := ops.why_no_kernel(1, widest, torch.bfloat16):
        return reason
    return _strange(unet, cross_only=True)


def put_processors(unet: UNet2DConditionModel, chosen: str, cross: str = "auto") -> None:
    """Give every layer the processor of a resolved choice, without asking whether it can run."""
    processors = {"xformers": XformersAttnProcessor, "cudnn": CudnnAttnProcessor, "sdpa": AttnProcessor2_0}
    used, ours = processors[chosen](), OurCrossAttnProcessor()
    layers = {f"{name}.processor": layer for name, layer in unet.named_modules() if isinstance(layer, Attention)}
    unet.set_attn_processor(
        {name: ours if cross == "ours" and layer.is_cross_attention else used for name, layer in layers.items()}
    )


def set_attention(unet: UNet2DConditionModel, choice: str, device: torch.device, cross: str = "auto") -> str:
    """Set the attention of every layer to `choice`; returns the resolved choice and logs its reason.

    choice: "xformers", "sdpa", "cudnn", or "auto": xformers on CUDA if its operators run, else SDPA. cross: "ours" for
    our kernel in the cross-attentions, "auto" for `choice` there, too. Raises ValueError if an explicit request cannot
    be met.
    """
    if cross == "ours" and (against := _why_not_ours(unet, device)):
        raise ValueError(f"--cross-attention ours: {against}; use --cross-attention auto")
    if choice in ("xformers", "cudnn") and device.type != "cuda":
        raise ValueError(f"--attention {choice} needs a CUDA device; use --attention sdpa here")
    chosen, reason = "sdpa", f"{device.type} tensors" if choice == "auto" else "asked for"
    left_out = env.unfit("attention") if choice == "auto" and device.type == "cuda" else ""
    if left_out:
        reason = f"xformers is left out since sgg-doctor: {left_out}"
    elif choice == "xformers" or (choice == "auto" and device.type == "cuda"):
        try:
            chosen, reason = "xformers", check_xformers(unet, device)
        except ValueError as error:
            reason = f"xformers cannot attend: {error}"
            if choice == "xformers":
                raise ValueError(f"--attention {reason}; use --attention sdpa") from error
    if choice == "cudnn":
        try:
            _probe_cudnn(device)
        except RuntimeError as error:
            raise ValueError(f"--attention cudnn: {str(error).strip().splitlines()[0]}; use sdpa") from error
        chosen = "cudnn"
    put_processors(unet, chosen, cross)
    logger.info("UNet attention: %s (%s)%s", chosen, reason, "; our cross-attention" if cross == "ours" else "")
    return chosen


def checkpoint_activations(unet: UNet2DConditionModel, **options: Any) -> None:
    """Recompute each block in backward. The UNet draws no random numbers, so no generator state is kept.

    options: further options of `torch.utils.checkpoint.checkpoint`.
    """
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, **options)
    unet.enable_gradient_checkpointing(recompute)
