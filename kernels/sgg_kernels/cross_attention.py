"""Attention of many queries to few keys with an additive bias: the UNet's cross-attention to its context tokens.

A program holds a whole row of scores, so forward needs no running maximum, and backward no output. Tiles have powers of
two as sizes. Widths of heads (40, 80, 160) and numbers of keys (80) are cut into parts of such sizes instead of padded
to the next one. Two warps are no warp group, so every chip multiplies with mma.sync, sm_90 too. Values are bf16 or
fp16: products of fp32 took more registers than there are, so fp32 stays with the reference.

Letters: B images, S queries, T keys, H heads, D width of a head, P chunks of queries, R rows of either kind.
"""

# mypy: disable-error-code="assignment"
# (in kernels a tuple of tiles grows)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import launch
from .segments import column_sum

PART = 32
"""Widest part of keys or columns: a tile of a row's parts leaves registers for the scores."""
BLOCK_S = 32
"""Queries of a block, 16 for each of two warps."""
PROGRAMS = 512
"""Programs wanted of the gradient of keys and values; each writes partial sums."""
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(p_x, o_R, num_rows, stride, D: tl.constexpr, D_PARTS: tl.constexpr, i: tl.constexpr):
    """[rows, part i of D] of one head; 0 beyond the last row and column."""
    o_D = D_PARTS[i][0] + tl.arange(0, D_PARTS[i][1])
    m_RD = (o_R < num_rows)[:, None] & (o_D < D)[None, :]
    return tl.load(p_x + o_R.to(tl.int64)[:, None] * stride + o_D[None, :], mask=m_RD, other=0.0)


@triton.jit
def _store(p_x, b_RD, o_R, num_rows, stride, D: tl.constexpr, D_PARTS: tl.constexpr, i: tl.constexpr):
    """Store [rows, part i of D] of one head."""
    o_D = D_PARTS[i][0] + tl.arange(0, D_PARTS[i][1])
    m_RD = (o_R < num_rows)[:, None] & (o_D < D)[None, :]
    tl.store(p_x + o_R.to(tl.int64)[:, None] * stride + o_D[None, :], b_RD, mask=m_RD)


@triton.jit
def _zeros(BLOCK_R: tl.constexpr, D_PARTS: tl.constexpr, i: tl.constexpr):
    """fp32 zeros [rows, part i of D]."""
    BLOCK_D: tl.constexpr = D_PARTS[i][1]
    return tl.zeros([BLOCK_R, BLOCK_D], tl.float32)


@triton.jit
def _products(
    p_x, o_S, num_queries, stride_x, p_y, num_keys, stride_y,
    D: tl.constexpr, T_PARTS: tl.constexpr, D_PARTS: tl.constexpr,
):  # fmt: skip
    """x y^T for rows x of the queries o_S and rows y of all keys: an fp32 tile [S, part of T] for each part."""
    total = ()
    for i in tl.static_range(len(D_PARTS)):
        b_x = _load(p_x, o_S, num_queries, stride_x, D, D_PARTS, i)
        added = ()
        for j in tl.static_range(len(T_PARTS)):
            o_T = T_PARTS[j][0] + tl.arange(0, T_PARTS[j][1])
            b_y = tl.trans(_load(p_y, o_T, num_keys, stride_y, D, D_PARTS, i))
            if i == 0:
                added += (tl.dot(b_x, b_y),)
            else:
                added += (tl.dot(b_x, b_y, total[j]),)
        total = added
    return total


@triton.jit
def _sums(
    weights, p_y, num_keys, stride_y,
    D: tl.constexpr, T_PARTS: tl.constexpr, D_PARTS: tl.constexpr, i: tl.constexpr,
):  # fmt: skip
    """Sum over the keys of weight times row y: fp32 [S, part i of D]. weights: tiles [S, part of T]."""
    o_T = tl.arange(0, T_PARTS[0][1])
    b_SD = tl.dot(weights[0], _load(p_y, o_T, num_keys, stride_y, D, D_PARTS, i))
    for j in tl.static_range(1, len(T_PARTS)):
        o_T = T_PARTS[j][0] + tl.arange(0, T_PARTS[j][1])
        b_TD = _load(p_y, o_T, num_keys, stride_y, D, D_PARTS, i)
        b_SD = tl.dot(weights[j], b_TD, b_SD)
    return b_SD


@triton.jit
def _scores(
    p_q, o_S, num_queries, stride_q, p_k, num_keys, stride_k, p_bias, scale_log2,
    D: tl.constexpr, T_PARTS: tl.constexpr, D_PARTS: tl.constexpr,
):  # fmt: skip
    """log2(e) (scale q k^T + bias): an fp32 tile [S, part of T] for each part; -inf beyond the last key."""
    products = _products(p_q, o_S, num_queries, stride_q, p_k, num_keys, stride_k, D, T_PARTS, D_PARTS)
    scores = ()
    for j in tl.static_range(len(T_PARTS)):
        o_T = T_PARTS[j][0] + tl.arange(0, T_PARTS[j][1])
        b_bias = tl.load(p_bias + o_T, mask=o_T < num_keys, other=float("-inf")) * _LOG2_E
        scores += (products[j] * scale_log2 + b_bias[None, :],)
    return scores


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qs, stride_kb, stride_kt, stride_vb, stride_vt, stride_bias, num_queries, num_keys, scale_log2,
    H: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, T_PARTS: tl.constexpr, D_PARTS: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T + bias) v [1], and lse = log2 of the softmax's denominator, fp32 [B, H, S].

    Bytes an element of q at bf16: 4 (q read, out written); keys and values are read once a block of queries, from L2.

    [1] Vaswani et al., Attention is all you need (2017), eq. 1.
    """
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    o_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    p_q, p_k = q_ptr + i_b * stride_qb + i_h * D, k_ptr + i_b * stride_kb + i_h * D
    scores = _scores(
        p_q, o_S, num_queries, stride_qs, p_k, num_keys, stride_kt, bias_ptr + i_b * stride_bias, scale_log2,
        D, T_PARTS, D_PARTS,
    )  # fmt: skip
    b_max = tl.max(scores[0], axis=1)
    for j in tl.static_range(1, len(T_PARTS)):
        b_max = tl.maximum(b_max, tl.max(scores[j], axis=1))
    b_sum = tl.zeros([BLOCK_S], tl.float32)
    weights = ()
    for j in tl.static_range(len(T_PARTS)):
        b_ST = tl.exp2(scores[j] - b_max[:, None])
        b_sum += tl.sum(b_ST, axis=1)
        weights += (b_ST.to(v_ptr.dtype.element_ty),)
    p_v, p_out = v_ptr + i_b * stride_vb + i_h * D, out_ptr + (i_b * num_queries * H + i_h) * D
    for i in tl.static_range(len(D_PARTS)):
        b_out = _sums(weights, p_v, num_keys, stride_vt, D, T_PARTS, D_PARTS, i) / b_sum[:, None]
        _store(p_out, b_out, o_S, num_queries, H * D, D, D_PARTS, i)
    tl.store(lse_ptr + (i_b * H + i_h) * num_queries + o_S, b_max + tl.log2(b_sum), mask=o_S < num_queries)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def cross_attention_bwd_q_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, grad_q_ptr, delta_ptr,
    stride_gb, stride_gs, stride_qb, stride_qs, stride_kb, stride_kt, stride_vb, stride_vt, stride_bias,
    num_queries, num_keys, scale, scale_log2,
    H: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, T_PARTS: tl.constexpr, D_PARTS: tl.constexpr,
):  # fmt: skip
    """With p = softmax, w = g v^T, delta = sum over keys of p w: grad q = scale (p (w - delta)) k; delta [B, H, S].

    Bytes an element of q at bf16: 6 (g, q read, grad q written). The output is not read, because the row is whole.
    """
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    o_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    p_q, p_k = q_ptr + i_b * stride_qb + i_h * D, k_ptr + i_b * stride_kb + i_h * D
    p_g, p_v = grad_ptr + i_b * stride_gb + i_h * D, v_ptr + i_b * stride_vb + i_h * D
    scores = _scores(
        p_q, o_S, num_queries, stride_qs, p_k, num_keys, stride_kt, bias_ptr + i_b * stride_bias, scale_log2,
        D, T_PARTS, D_PARTS,
    )  # fmt: skip
    slopes = _products(p_g, o_S, num_queries, stride_gs, p_v, num_keys, stride_vt, D, T_PARTS, D_PARTS)
    o_row = (i_b * H + i_h) * num_queries + o_S
    b_lse = tl.load(lse_ptr + o_row, mask=o_S < num_queries, other=0.0)
    b_delta = tl.zeros([BLOCK_S], tl.float32)
    weights = ()
    for j in tl.static_range(len(T_PARTS)):
        weights += (tl.exp2(scores[j] - b_lse[:, None]),)
        b_delta += tl.sum(weights[j] * slopes[j], axis=1)
    tl.store(delta_ptr + o_row, b_delta, mask=o_S < num_queries)
    grads = ()
    for j in tl.static_range(len(T_PARTS)):
        grads += ((weights[j] * (slopes[j] - b_delta[:, None])).to(k_ptr.dtype.element_ty),)
    p_grad_q = grad_q_ptr + (i_b * num_queries * H + i_h) * D
    for i in tl.static_range(len(D_PARTS)):
        b_grad = scale * _sums(grads, p_k, num_keys, stride_kt, D, T_PARTS, D_PARTS, i)
        _store(p_grad_q, b_grad, o_S, num_queries, H * D, D, D_PARTS, i)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "chunk"])
def cross_attention_bwd_kv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, partial_ptr,
    stride_gb, stride_gs, stride_qb, stride_qs, stride_kb, stride_kt, stride_vb, stride_vt, stride_bias,
    num_queries, num_keys, scale, scale_log2, chunk,
    H: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, D_PARTS: tl.constexpr,
):  # fmt: skip
    """Over a chunk of queries: grad k = scale (p (w - delta))^T q | grad v = p^T g, fp32 [P, 2, B, T, H, D].

    Bytes an element of q at bf16: 4 (g, q read) from memory, and again from L2 for each further block of keys. A sum
    over the chunks follows.
    """
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    o_T = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    p_q, p_k = q_ptr + i_b * stride_qb + i_h * D, k_ptr + i_b * stride_kb + i_h * D
    p_g, p_v = grad_ptr + i_b * stride_gb + i_h * D, v_ptr + i_b * stride_vb + i_h * D
    b_bias = tl.load(bias_ptr + i_b * stride_bias + o_T, mask=o_T < num_keys, other=float("-inf")) * _LOG2_E
    keys, values, grad_k, grad_v = (), (), (), ()
    for i in tl.static_range(len(D_PARTS)):
        # [BLOCK_T, part of D] each
        keys += (_load(p_k, o_T, num_keys, stride_kt, D, D_PARTS, i),)
        values += (_load(p_v, o_T, num_keys, stride_vt, D, D_PARTS, i),)
        grad_k += (_zeros(BLOCK_T, D_PARTS, i),)
        grad_v += (_zeros(BLOCK_T, D_PARTS, i),)
    first = tl.program_id(0) * chunk
    for start in range(first, tl.minimum(first + chunk, num_queries), BLOCK_S):
        o_S = start + tl.arange(0, BLOCK_S)
        b_score = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        b_slope = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        queries, grads = (), ()
        for i in tl.static_range(len(D_PARTS)):
            # [BLOCK_S, part of D] both
            queries += (_load(p_q, o_S, num_queries, stride_qs, D, D_PARTS, i),)
            grads += (_load(p_g, o_S, num_queries, stride_gs, D, D_PARTS, i),)
            b_score = tl.dot(keys[i], tl.trans(queries[i]), b_score)
            b_slope = tl.dot(values[i], tl.trans(grads[i]), b_slope)
        o_row = (i_b * H + i_h) * num_queries + o_S
        b_lse = tl.load(lse_ptr + o_row, mask=o_S < num_queries, other=float("inf"))
        b_delta = tl.load(delta_ptr + o_row, mask=o_S < num_queries, other=0.0)
        b_TS = tl.exp2(b_score * scale_log2 + b_bias[:, None] - b_lse[None, :])
        b_grad = (b_TS * (b_slope - b_delta[None, :])).to(q_ptr.dtype.element_ty)
        b_weight = b_TS.to(q_ptr.dtype.element_ty)
        more_k, more_v = (), ()
        for i in tl.static_range(len(D_PARTS)):
            more_k += (tl.dot(b_grad, queries[i], grad_k[i]),)
            more_v += (tl.dot(b_weight, grads[i], grad_v[i]),)
        grad_k, grad_v = more_k, more_v
    num_images = tl.num_programs(1) // H
    p_grad_k = partial_ptr + ((tl.program_id(0) * 2 * num_images + i_b) * num_keys * H + i_h) * D
    p_grad_v = p_grad_k + num_images.to(tl.int64) * num_keys * H * D
    for i in tl.static_range(len(D_PARTS)):
        _store(p_grad_k, scale * grad_k[i], o_T, num_keys, H * D, D, D_PARTS, i)
        _store(p_grad_v, grad_v[i], o_T, num_keys, H * D, D, D_PARTS, i)


def parts(num: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of parts that cover `num`: 16 or `PART`, with at most 15 places too many."""
    found, start, left = [], 0, -(-num // 16) * 16
    while left:
        size = min(PART, 1 << (left.bit_length() - 1))
        found.append((start, size))
        start, left = start + size, left - size
    return tuple(found)


def _heads(x_BRHD: torch.Tensor) -> torch.Tensor:
    """x with adjacent heads in a row and any strides of images and rows. Copies only if needed."""
    heads, width = x_BRHD.shape[2:]
    adjacent = x_BRHD.stride(3) == 1 and (heads == 1 or x_BRHD.stride(2) == width)
    return x_BRHD if adjacent else x_BRHD.contiguous()


def _options(q_BSHD: torch.Tensor) -> dict[str, object]:
    """Launch options of all kernels."""
    heads, width = q_BSHD.shape[2:]
    return {"H": heads, "D": width, "D_PARTS": parts(width), "BLOCK_S": BLOCK_S, "num_warps": 2, "num_stages": 1}


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [x.stride(d) for x in tensors for d in (0, 1)]


def cross_attention_fwd(
    q_BSHD: torch.Tensor, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor, bias_BT: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, S, H, D] in the dtype of q, lse fp32 [B, H, S]). bias: fp32 with adjacent elements in a row."""
    q, k, v = (_heads(x) for x in (q_BSHD, k_BTHD, v_BTHD))
    num_images, num_queries, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_images, num_heads, num_queries, dtype=torch.float32, device=q.device)
    launch(
        cross_attention_fwd_kernel, (triton.cdiv(num_queries, BLOCK_S), num_images * num_heads),
        q, k, v, bias_BT, out, lse, *_strides(q, k, v), bias_BT.stride(0), num_queries, k.shape[1],
        scale * math.log2(math.e), T_PARTS=parts(k.shape[1]), **_options(q),
    )  # fmt: skip
    return out, lse


def cross_attention_bwd(
    grad_BSHD: torch.Tensor, q_BSHD: torch.Tensor, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor, bias_BT: torch.Tensor,
    lse: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(gradient of q [B, S, H, D], gradients of k and v [2, B, T, H, D]), in the dtype of q."""
    grad, q, k, v = (_heads(x) for x in (grad_BSHD, q_BSHD, k_BTHD, v_BTHD))
    num_images, num_queries, num_heads, width = q.shape
    num_keys, options = k.shape[1], _options(q)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    scales = scale, scale * math.log2(math.e)
    strides = *_strides(grad, q, k, v), bias_BT.stride(0)
    # Without a bound ptxas aims at a higher occupancy on sm_90 and spills; 200 registers let ten warps reside.
    launch(
        cross_attention_bwd_q_kernel, (triton.cdiv(num_queries, BLOCK_S), num_images * num_heads),
        grad, q, k, v, bias_BT, lse, grad_q, delta, *strides, num_queries, num_keys, *scales,
        T_PARTS=parts(num_keys), maxnreg=200, **options,
    )  # fmt: skip
    block_t = 32 if width <= 80 else 16  # two sums [keys, D] stay in registers
    others = max(1, num_images * num_heads * triton.cdiv(num_keys, block_t))
    blocks = max(1, triton.cdiv(num_queries, BLOCK_S))
    chunk = BLOCK_S * triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, others)))
    num_chunks = triton.cdiv(num_queries, chunk)
    sizes = 2, num_images, num_keys, num_heads, width
    partial = torch.empty(num_chunks, math.prod(sizes), dtype=torch.float32, device=q.device)
    launch(
        cross_attention_bwd_kv_kernel, (num_chunks, num_images * num_heads, triton.cdiv(num_keys, block_t)),
        grad, q, k, v, bias_BT, lse, delta, partial, *strides, num_queries, num_keys, *scales, chunk,
        BLOCK_T=block_t, **options,
    )  # fmt: skip
    return grad_q, column_sum(partial, q.dtype, rows=16).view(sizes)
