"""The shipped launches: every launcher of `kernels/` at the sizes, widths and dtypes of training.

Tensors are on the meta device: they have shapes, strides and alignment but no memory, so even cases of more than 2^31
elements run at full size. A kernel that no case launches fails the check. Letters: B graphs, N objects, E relations, D
width.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Callable

import torch
from sgg_kernels.reference.hash import NORMAL, UNIFORM, WORD


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One launcher at one size."""

    name: str
    run: Callable[[], object]
    vectors: bool
    """Whether rows are aligned, so loads must be 16 bytes a lane."""


@dataclasses.dataclass(frozen=True)
class GraphSize:
    """Shapes and dtypes of the graph ops."""

    name: str
    graphs: int
    objects: int
    relations: int
    width: int
    dtype: torch.dtype
    wide: torch.dtype
    """Type of biases, residuals and pools: fp32 under autocast, else `dtype`."""

    def rows(self, num: int, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[num, width] values."""
        return torch.empty(num, width, dtype=dtype or self.dtype, device="meta")

    def bias(self, num: int) -> torch.Tensor:
        """[num] values."""
        return torch.empty(num, dtype=self.wide, device="meta")


def index(num: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """[num] indices, or a mask of uint8."""
    return torch.empty(num, dtype=dtype, device="meta")


_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_BUCKET = (5, 128, 256)  # batch 2, full and masked copies, and the padding graph
_SCALE = (65, 2_500_001, 10_000_003)
SIZES = (
    GraphSize("bucket fp32", *_BUCKET, 512, _F32, _F32),
    GraphSize("bucket fp16", *_BUCKET, 512, _F16, _F16),
    GraphSize("bucket bf16", *_BUCKET, 512, _BF16, _BF16),
    GraphSize("bucket autocast", *_BUCKET, 512, _BF16, _F32),
    GraphSize("bucket fp16 autocast", *_BUCKET, 512, _F16, _F32),
    GraphSize("scale fp32", *_SCALE, 512, _F32, _F32),
    GraphSize("scale autocast", *_SCALE, 512, _BF16, _F32),
    GraphSize("toy fp32", 17, 208, 512, 128, _F32, _F32),
    GraphSize("narrow fp32", 65, 4096, 9000, 128, _F32, _F32),
    GraphSize("odd bf16", 3, 31, 77, 77, _BF16, _BF16),
)
"""The pre-training bucket of the paper's recipes, ten million relations, the toy's sizes, narrow and odd ones."""


def gather_add_relu(z: GraphSize) -> None:
    from sgg_kernels.gather_add_relu import gather_add_relu_bwd, gather_add_relu_fwd

    n, e, d = z.objects, z.relations, z.width
    ends = index(e), index(e)
    gather_add_relu_fwd(z.rows(n, 2 * d), z.rows(e, d), z.bias(d), *ends)
    gather_add_relu_bwd(z.rows(e, d), z.rows(e, d), *ends, index(n + 1), index(n), index(2 * e), z.wide)


def scatter_mean(z: GraphSize) -> None:
    from sgg_kernels.scatter_mean import scatter_mean_bwd, scatter_mean_fwd

    n, e, d = z.objects, z.relations, z.width
    y, bias, ends = z.rows(e, 3 * d), z.bias(3 * d), (index(e), index(e))
    plan = index(n + 1), index(n), index(2 * e)
    for residual in (z.rows(e, d, z.wide), None):  # the residual encoder and the plain one
        _, r = scatter_mean_fwd(y, bias, residual, *ends, *plan)
    scatter_mean_bwd(z.rows(n, d), z.rows(e, d, r.dtype), y, bias, *ends, plan[0])


def masked_pool(z: GraphSize) -> None:
    from sgg_kernels.masked_pool import Rows, graph_mean_fwd, masked_pool_fwd, pool_bwd

    b, n, e, d = z.graphs, z.objects, z.relations, z.width
    sets = [Rows(z.rows(num, d, z.wide), index(b + 1), index(num), index(num, torch.uint8)) for num in (n, e)]
    out, count = masked_pool_fwd(*sets)
    pool_bwd(torch.empty_like(out), count, [(s.graph, s.mask, z.wide) for s in sets])
    tokens = Rows(z.rows(e, d), index(b + 1), index(e))
    out, count = graph_mean_fwd(tokens)
    pool_bwd(torch.empty_like(out), count, [(tokens.graph, None, z.dtype)])


def triple_context(z: GraphSize) -> None:
    from sgg_kernels.triple_context import triple_context_bwd, triple_context_fwd

    b, n, e, h = z.graphs, z.objects, z.relations, 2 * z.width
    graph_and_ends = index(e), index(e), index(e)
    values = z.rows(n, h), z.rows(e, h), z.rows(n, h), z.rows(b, h, z.wide)
    triple_context_fwd(*values, z.bias(h), *graph_and_ends)
    plan = index(n + 1), index(n), index(2 * e), index(b + 1)
    triple_context_bwd(z.rows(e, h), *graph_and_ends, *plan, z.wide, z.wide)


def pack(padded: bool, masked: bool) -> None:
    from sgg_kernels.pack import pack_fwd
    from sgg_kernels.reference.pack import STORE_FIELDS, MaskKey

    store = {name: index(2**26, torch.uint8 if name.endswith("pooled") else torch.int32) for name in STORE_FIELDS}
    mask = MaskKey(2, 300_000, 1, index(1)) if masked else None
    num_graphs = 5 if padded else 4
    pack_fwd(store, index(4), index(num_graphs + 1), index(num_graphs + 1), *_BUCKET[1:], mask)


DRAWS = {"words": WORD, "uniform": UNIFORM, "normal": NORMAL}


def hash_draw(kind: int) -> None:
    """The key of a captured step, and that of the instance codes."""
    from sgg_kernels.hash_draw import hash_draw

    for samples, words in ((2, ()), (128, (index(128),))):
        hash_draw([index(1), index(samples, torch.int64), 12, *words], 77, 4096, kind)


def adam(
    num_chunks: int, max_norm: float, weight: torch.dtype, split: bool, grad: torch.dtype, state: int | str
) -> None:
    """state: the bits of both moments, or a name of `FACTORED`."""
    from sgg_kernels.optim.adafactor import adafactor_update
    from sgg_kernels.optim.adam import BLOCK, adam_decide, adam_update
    from sgg_kernels.optim.adam_blockwise import adam_blockwise_update
    from sgg_kernels.reference.adafactor import Factored
    from sgg_kernels.reference.adam import CONTROL_SIZE, Hyper
    from sgg_kernels.reference.adam_blockwise import BLOCKS, Moments
    from sgg_kernels.reference.weights import Weights

    num = num_chunks * BLOCK
    weights = Weights(index(num, weight), index(num, torch.int16) if split else None, seed=3)
    table, control, hyper = (
        index(3 * num_chunks, torch.int64).view(-1, 3),
        index(CONTROL_SIZE, _F32),
        Hyper(max_norm=max_norm),
    )
    rest = grad, control, index(4, _F32), index(1), hyper
    adam_decide([table], [grad], control, index(1), hyper)
    if state == 32:
        adam_update(weights, (index(num, _F32), index(num, _F32)), table, *rest)
        return
    if isinstance(state, int):
        codes = (index(num * state // 8, torch.uint8) for _ in range(2))
        scales = (index(num // BLOCKS[state], _F32) for _ in range(2))
        maps = (index(2**state, _F32) for _ in range(2))
        adam_blockwise_update(weights, Moments(*codes, *scales, *maps), table, *rest)
        return
    shapes = FACTORED[state]
    means = (index(sum(shape[k] for shape in shapes), _F32) for k in (0, 1))
    matrices = index(6 * len(shapes), torch.int64).view(-1, 6)
    heads = index(3 * len(shapes), torch.int64).view(-1, 3)
    adafactor_update(weights, Factored(*means, matrices), table, heads, shapes, *rest)


FACTORED = {"wide": [(1280, 11520), (320, 320), (10240, 1280)], "first": [(320, 36)], "odd": [(77, 77)]}
"""Rows and columns of the matrices: all widths a multiple of 8; the UNet's first convolution; an odd width."""

ADAM_FORMS = {
    "fp32": (_F32, False, _F32),
    "split": (_BF16, True, _BF16),
    "lean": (_BF16, False, _BF16),
    "fp32 weights, bf16 gradients": (_F32, False, _BF16),
}
"""Weights, whether their low halves are kept, gradients."""

NORMS = {
    **{f"C/G {size} {pixels}": (2, pixels, 32 * size, 32) for size, pixels in
       ((10, 1024), (20, 1024), (30, 1024), (40, 256), (60, 64), (80, 16))},
    "512px": (16, 4096, 640, 32),
    "vae": (16, 512 * 512, 256, 32),
    "toy": (32, 256, 96, 16),
    "odd": (3, 77, 21, 3),
    "odd large": (3, 1100, 21, 3),
    "wide group": (2, 64, 1280, 1),
}  # fmt: skip
"""Images, pixels, channels and groups: the UNet's at 256 x 256 and batch 2, larger ones, and odd shapes."""

_ODD_NORMS = ("odd", "odd large", "wide group")
"""Rows are not aligned, or too few for alignment to matter."""

GATES = {"320": (2048, 1280), "640": (512, 2560), "1280": (128, 5120), "512px": (65536, 1280), "toy": (8192, 128),
         "odd": (77, 77), "scale": (10_000_003, 1280)}  # fmt: skip
"""Rows and width, by the width of the UNet's level at 256 x 256 and batch 2; and others."""


def group_norm_silu(shape: tuple[int, int, int, int], dtype: torch.dtype, wide: torch.dtype, silu: bool) -> None:
    from sgg_kernels.group_norm_silu import group_norm_silu_fwd
    from sgg_kernels.group_norm_silu_bwd import group_norm_silu_bwd
    from sgg_kernels.segments import column_sum

    *sizes, num_groups = shape
    x = torch.empty(sizes, dtype=dtype, device="meta")
    weight, bias = (torch.empty(sizes[2], dtype=wide, device="meta") for _ in range(2))
    shift = torch.empty(sizes[0], 2 * sizes[2], device="meta")[:, : sizes[2]]  # one of a merged projection
    for added in (None, shift) if silu else (None,):  # the first and the second norm of a residual block
        out, *stats = group_norm_silu_fwd(x, added, weight, bias, num_groups, 1e-5, silu)
        for beside in (None, out):
            *_, partial = group_norm_silu_bwd(out, x, beside, weight, bias, *stats, num_groups, silu)
            column_sum(partial, wide)


LAYER_NORMS = {"320": (2048, 320), "640": (512, 640), "1280": (128, 1280), "512px": (65536, 320), "odd": (77, 77)}
"""Rows and width: the UNet's at 256 x 256 and batch 2, 512 x 512 at batch 16, and odd ones."""


def add_layer_norm(num_rows: int, width: int, dtype: torch.dtype, wide: torch.dtype) -> None:
    """The first norm of a transformer block, and those behind an attention, whose bias may come late."""
    from sgg_kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
    from sgg_kernels.segments import column_sum

    x = torch.empty(num_rows, width, dtype=dtype, device="meta")
    weight, bias = (torch.empty(width, dtype=wide, device="meta") for _ in range(2))
    for residual, late in ((None, None), (x, None), (x, bias)):
        out, total, *stats = add_layer_norm_fwd(x, residual, late, weight, bias, 1e-5)
        total = x if residual is None else total
        for beside in (None, out):
            _, partial = add_layer_norm_bwd(out, beside, total, weight, *stats, late is not None)
            column_sum(partial, wide)


def geglu(num_rows: int, width: int, dtype: torch.dtype) -> None:
    from sgg_kernels.geglu import geglu_bwd, geglu_fwd

    x = torch.empty(num_rows, 2 * width, dtype=dtype, device="meta")
    geglu_bwd(torch.empty_like(geglu_fwd(x)), x)


ATTENTIONS = {"40": (4096, 80, 40), "80": (1024, 80, 80), "160": (256, 80, 160), "160 few": (64, 80, 160),
              "64": (4096, 77, 64), "odd": (77, 19, 13)}  # fmt: skip
"""Queries, keys and width of a head: the UNet's cross-attention at 512 x 512; heads of 64 and 77 keys; odd sizes."""


def cross_attention(num_queries: int, num_keys: int, width: int, dtype: torch.dtype) -> None:
    """Two images of eight heads; keys and values are slices of a merged GEMM."""
    from sgg_kernels.cross_attention import cross_attention_bwd, cross_attention_fwd

    q = torch.empty(2, num_queries, 8, width, dtype=dtype, device="meta")
    merged = torch.empty(2, num_keys, 32 * width, dtype=dtype, device="meta")
    k, v = (merged[..., at * width :][..., : 8 * width].unflatten(-1, (8, width)) for at in (8, 16))
    bias = torch.empty(2, num_keys, device="meta")
    out, lse = cross_attention_fwd(q, k, v, bias, width**-0.5)
    cross_attention_bwd(torch.empty_like(out), q, k, v, bias, lse, width**-0.5)


def unet_cases() -> list[AotCase]:
    """Norms and gate, each in bf16 under autocast, and attention; the first of each kind in every dtype."""
    made = []
    autocast = (_BF16, _F32), (_F16, _F32)
    for name, shape in NORMS.items():
        most = {"C/G 10 1024": ((_F32, _F32), (_F16, _F16), *autocast), "C/G 20 1024": autocast}
        for dtype, wide in most.get(name, autocast[:1]):
            run = functools.partial(group_norm_silu, shape, dtype, wide, True)
            title = f"group_norm_silu {name} {str(dtype)[6:]}{' autocast' * ((dtype, wide) == (_F16, _F32))}"
            made.append(AotCase(title, run, vectors=name not in _ODD_NORMS))
    run = functools.partial(group_norm_silu, NORMS["C/G 20 1024"], _BF16, _F32, False)
    made.append(AotCase("group_norm C/G 20 1024 bfloat16", run, vectors=True))
    for name, shape in LAYER_NORMS.items():
        most = ((_F32, _F32), (_F16, _F16), (_BF16, _BF16), (_BF16, _F32)) if name == "320" else ((_BF16, _BF16),)
        for dtype, wide in most:
            run = functools.partial(add_layer_norm, *shape, dtype, wide)
            title = f"add_layer_norm {name} {str(dtype)[6:]}{' autocast' * (dtype != wide)}"
            made.append(AotCase(title, run, vectors=name != "odd"))
    for name, (num_rows, width) in GATES.items():
        for dtype in (_F32, _F16, _BF16) if name == "320" else (_BF16,):
            run = functools.partial(geglu, num_rows, width, dtype)
            made.append(AotCase(f"geglu {name} {str(dtype)[6:]}", run, vectors=name != "odd"))
    for name, sizes in ATTENTIONS.items():
        for dtype in (_F16, _BF16) if name == "40" else (_BF16,):
            run = functools.partial(cross_attention, *sizes, dtype)
            made.append(AotCase(f"cross_attention {name} {str(dtype)[6:]}", run, vectors=name != "odd"))
    return made


def cases() -> list[AotCase]:
    """Every case, the paper's first."""
    made = []
    for padded in (True, False):
        for masked in (True, False):
            name = f"pack{' padded' * padded}{' masked' * masked}"
            made.append(AotCase(name, functools.partial(pack, padded, masked), vectors=False))
    for name, kind in DRAWS.items():
        made.append(AotCase(f"hash_draw {name}", functools.partial(hash_draw, kind), vectors=False))
    for name, num_chunks, max_norm in (
        ("paper", 23_000, 1.0),
        ("paper unclipped", 23_000, 0.0),
        ("scale", 2**22, 1.0),
        ("one chunk", 1, 1.0),
    ):
        run = functools.partial(adam, num_chunks, max_norm, *ADAM_FORMS["fp32"], 32)
        made.append(AotCase(f"adam {name}", run, vectors=True))
    for bits, num_chunks, name in ((8, 839_000, "unet"), (8, 2**22, "scale"), (32, 700, "norms")):
        for form, dtypes in ADAM_FORMS.items():
            if name != "scale" or form in ("fp32", "lean"):
                run = functools.partial(adam, num_chunks, 0.0, *dtypes, bits)
                made.append(AotCase(f"adam8bit {bits} {name} {form}", run, vectors=True))
    for form, dtypes in ADAM_FORMS.items():
        run = functools.partial(adam, 839_000, 0.0, *dtypes, 4)
        made.append(AotCase(f"adam4bit unet {form}", run, vectors=True))
        for name in FACTORED if form == "lean" else ("wide",):
            run = functools.partial(adam, 839_000, 0.0, *dtypes, name)
            made.append(AotCase(f"adafactor {name} {form}", run, vectors=name == "wide"))
    for size in SIZES:
        for op in (gather_add_relu, scatter_mean, masked_pool, triple_context):
            made.append(AotCase(f"{op.__name__} {size.name}", functools.partial(op, size), size.width % 16 == 0))
    return made + unet_cases()


def shipped_kernels(folder: pathlib.Path | None = None) -> set[str]:
    """Every kernel of `kernels/`: its jit functions, except those that jit functions of any of its files call."""
    folder = folder or pathlib.Path(__file__).resolve().parents[2] / "kernels" / "sgg_kernels"
    trees = [ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))]
    jit = [
        node for tree in trees for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]  # fmt: skip
    called = {n.id for node in jit for child in node.body for n in ast.walk(child) if isinstance(n, ast.Name)}
    return {node.name for node in jit} - called


LEAST_WARPS = {
    **dict.fromkeys(shipped_kernels(), 16),
    "adam_decide_kernel": 4,  # one program
    # Matrix units hide latency with registers: a row of scores, or the sums of a block of keys, lies in them.
    "cross_attention_bwd_q_kernel": 10,
    "cross_attention_bwd_kv_kernel": 6,
}
"""Least occupancy of each kernel: warps that must fit on an SM at once, if the grid has as many.

These kernels are limited by memory, so bytes in flight matter. 16 warps with 16 bytes a lane and four loads in flight
are 32 KB an SM; an H100 hides its latency with about 20 KB. 16 is also every block slot of sm_86 with one warp each.
"""

MOST_STACK = {
    ("sm_120", "cross_attention_bwd_q_kernel"): 40,
    ("sm_120", "cross_attention_bwd_kv_kernel"): 32,
}
"""Bytes of stack that a kernel may need on a chip.

Triton passes --regAllocOptLevel=2 to ptxas for Blackwell, around a fault of ptxas. With it ptxas spills up to ten words
at any bound of registers; without it none.
"""
