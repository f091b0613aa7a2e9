"""torch's memory-efficient attention on a CPU: its own checks of dtypes and shapes in front of plain arithmetic.

The operators exist for CUDA alone, so without one a wrong operand passes every test. Here `standing_in` registers CPU
forms that refuse what `aten/src/ATen/native/transformers/cuda/attention.cu` and its kernels' `check_supported` refuse,
in the same words, and note their operands. Letters: B images, P queries, T keys, H heads, K width of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LSE_ROWS = 32
"""Places of the log-sum-exp are padded to a multiple."""


@dataclasses.dataclass
class Seen:
    """Operands of a forward call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise RuntimeError(message)


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises RuntimeError as the CUDA form does."""
    aligned = 4 if q.dtype == torch.float32 else 8
    _refuse(q.dtype not in DTYPES, f"cutlass: no kernel found to launch for {q.dtype}")
    for name, x in (("query", q), ("key", k), ("value", v)):
        _refuse(x.dim() != 4, f"{name}.dim() == 4 INTERNAL ASSERT FAILED")
        _refuse(x.dtype != q.dtype, f"expected scalar type {q.dtype} but found {x.dtype}")
        _refuse(x.stride(-1) != 1, f"{name}: last dimension must be contiguous")
        _refuse(x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2], f"{name}: batch or heads differ from the query's")
        _refuse(x.stride(2) % aligned or x.stride(1) % aligned, f"{name} is not correctly aligned (strideH, strideM)")
    _refuse(k.shape[1] != v.shape[1] or q.shape[3] != k.shape[3], "keys fit neither values nor queries")
    if bias is not None:
        _refuse(bias.dtype != q.dtype, "invalid dtype for bias - should match query's dtype")
        _refuse(bias.dim() != 4, "Bias expected in BMHK format")
        wanted = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        _refuse(tuple(bias.shape) != wanted, f"attn_bias: wrong shape {tuple(bias.shape)}, expected {wanted}")
        _refuse(bias.stride(-1) != 1, "attn_bias: last dimension must be contiguous")
        for dim in range(3):
            one = bias.shape[dim] <= 1
            _refuse(not one and bias.stride(dim) % aligned != 0, f"attn_bias is not correctly aligned (dim {dim})")


def _weights(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """[B, H, P, T] in fp32."""
    scores_BHPT = torch.einsum("bphk,bthk->bhpt", q.float(), k.float()) * scale
    return (scores_BHPT if bias is None else scores_BHPT + bias.float()).softmax(-1)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """[B, P, H, K] in fp32."""
    return torch.einsum("bhpt,bthk->bphk", _weights(q, k, bias, scale), v.float())


def _plain_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v in fp32; written out, since an operator of the dispatcher runs below autograd."""
    weights = _weights(q, k, bias, scale)
    by_weight = torch.einsum("bphk,bthk->bhpt", grad.float(), v.float())
    by_score = weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True)) * scale
    return (
        torch.einsum("bhpt,bthk->bphk", by_score, k.float()),
        torch.einsum("bhpt,bphk->bthk", by_score, q.float()),
        torch.einsum("bhpt,bphk->bthk", weights, grad.float()),
    )


@contextlib.contextmanager
def standing_in() -> Iterator[list[Seen]]:
    """Inside, the aten operators run on CPU tensors; gives what forward was called with."""
    seen: list[Seen] = []

    def forward(  # type: ignore[no-untyped-def]
        query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
        compute_log_sumexp=False, *, scale=None, seqlen_k=None, window_size=None,
    ):  # fmt: skip
        check_operands(query, key, value, bias)
        seen.append(Seen(query, key, value, bias))
        batch, places, heads, width = query.shape
        out = _plain(query, key, value, bias, scale or width**-0.5).to(query.dtype)
        rows = -(-places // LSE_ROWS) * LSE_ROWS if compute_log_sumexp else 0
        none = torch.empty((), dtype=torch.long)
        return out, torch.zeros(batch, heads, rows), none, none.clone(), places, key.shape[1]

    def backward(  # type: ignore[no-untyped-def]
        grad, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
        dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None, num_splits_key=None,
        window_size=None, shared_storage_dqdkdv=False,
    ):  # fmt: skip
        check_operands(query, key, value, bias)
        _refuse(grad.dtype != query.dtype or out.dtype != query.dtype, "gradient or output in another dtype")
        _refuse(grad.shape != out.shape, "gradient and output differ in shape")
        _refuse(logsumexp.shape[-1] % LSE_ROWS != 0, "LSE is not correctly aligned")
        made = _plain_backward(grad, query, key, value, bias, scale or query.shape[-1] ** -0.5)
        return (*(g.to(query.dtype) for g in made), torch.empty(0))

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_efficient_attention_forward", forward, "CPU")
        library.impl("_efficient_attention_backward", backward, "CPU")
        yield seen
    finally:
        library._destroy()
