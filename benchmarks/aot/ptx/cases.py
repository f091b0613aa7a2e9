"""The AOT cases at small sizes: the same programs on real tensors, forward and backward, against the reference.

Blocks and specialisation follow from shapes. So the sizes here keep the properties that select them (divisibility by
16, more than one row, splits), and the launchers' thresholds are lowered for a case instead of using large tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch

from benchmarks.aot.cases import ADAM_FORMS, NORMS, SIZES, GraphSize, cases
from benchmarks.aot.compare import Tensors, check, compare, compare_norms
from benchmarks.ops import registry
from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch

SAME_CODES = 0.999
"""Share of 8-bit codes, and of stochastically rounded weights, on which kernel and reference must agree. The others lie
at a midpoint, up to rounding."""


@contextlib.contextmanager
def lowered(**values: object) -> Iterator[None]:
    """Lowers thresholds of the launchers, each by `module__NAME`."""
    with contextlib.ExitStack() as stack:
        for place, value in values.items():
            module, name = place.split("__")
            stack.enter_context(mock.patch.object(importlib.import_module(f"sgg_kernels.{module}"), name, value))
        yield


def _randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _batch(num_graphs: int, num_objects: int, num_relations: int, hubs: bool) -> SceneGraphBatch:
    """A batch whose relations join objects of one graph; a third of the rows is masked, the last graph may be empty.

    With hubs, half of the first graph's relations start at one object and a third end at another; else six each do, so
    that a run is longer than its first block.
    """
    rng = np.random.default_rng(0)
    first = (num_objects // 2, num_relations * 2 // 3) if hubs else (0, 0)
    left = num_graphs - bool(hubs)
    sizes = [first] * bool(hubs) + [
        tuple(total // left + (i < total % left) for total in (num_objects - first[0], num_relations - first[1]))
        for i in range(left)
    ]
    ends, begin = [], 0
    for i, (n, e) in enumerate(sizes):
        subject, object_ = rng.integers(begin, begin + n, (2, e))
        if hubs and i == 0:
            subject[: e // 2], object_[e // 2 :] = begin, begin + n - 1
        elif i == 0:
            subject[:6], object_[-6:] = begin, begin + n - 1
        ends.append(np.stack([subject, object_]))
        begin += n
    names = np.zeros(num_objects, np.int64), np.zeros(num_relations, np.int64)
    batch = SceneGraphBatch.from_arrays(*names, *np.concatenate(ends, axis=1), np.asarray(sizes))
    masks = (torch.from_numpy((rng.random(n) < 0.7).astype(np.uint8)) for n in (num_objects, num_relations))
    return dataclasses.replace(batch, object_pooled=next(masks), relation_pooled=next(masks))


_BUCKET = (5, 32, 64)
_SMALL = {"bucket": _BUCKET, "toy": (3, 48, 64), "odd": (3, 31, 77), "scale": (5, 141, 331), "narrow": (5, 256, 328)}
"""Graphs, objects and relations that replace `SIZES`, by the first word of its name."""


def _chunk_size(num_rows: int) -> int:
    """Replaces `segments.chunk_size`, so a run of 100 rows has chunks."""
    return 16 if num_rows > 64 else 0


def _thresholds(most_partials: int) -> dict[str, object]:
    split = {f"{module}__chunk_size": _chunk_size for module in ("scatter_mean", "role_sums", "masked_pool")}
    most = {f"{module}__MAX_PARTIALS": most_partials for module in ("scatter_mean", "role_sums")}
    return split | most | {"segments__SMALL_ELEMENTS": 2**14}


_LOWERED = {"scale": _thresholds(32), "narrow": _thresholds(128)}


def _graph_op(op: str, z: GraphSize) -> None:
    kind = z.name.split()[0]
    with lowered(**_LOWERED.get(kind, {})):
        _check_graph_op(op, z, _batch(*_SMALL[kind], hubs=kind in _LOWERED))


def _check_graph_op(op: str, z: GraphSize, b: SceneGraphBatch) -> None:
    n, e, d = b.num_objects, b.num_relations, z.width
    rows = functools.partial(_randn, dtype=z.dtype)
    wide = functools.partial(_randn, dtype=z.wide)
    if op == "gather_add_relu":
        check(
            lambda ac, b_, bias: (ops.gather_add_relu(ac, b_, bias, b),),
            {"ac": rows(0, n, 2 * d), "b_": rows(1, e, d), "bias": wide(2, d)},
        )
    elif op == "scatter_mean":
        inputs = {"y": rows(0, e, 3 * d), "bias": wide(1, 3 * d)}
        for residual in ({"residual": wide(2, e, d)}, {}):
            check(lambda y, bias, residual=None: ops.scatter_mean(y, bias, b, residual), inputs | residual)
    elif op == "masked_pool":
        check(
            lambda x, r: (ops.masked_pool(x, r, b),),
            {"x": wide(0, n, d), "r": wide(1, e, d)},
        )
        check(lambda x: (ops.graph_mean(x, b.relation_ptr, b.relation_graph),), {"x": rows(2, e, d)})
        _check_both_halves(b, rows(2, e, d), z.dtype, mean=True)
    else:
        values = {"s": rows(0, n, 2 * d), "r": rows(1, e, 2 * d), "o": rows(2, n, 2 * d)}
        check(
            lambda s, r, o, pool, bias: (ops.triple_context(s, r, o, pool, bias, b),),
            values | {"pool": wide(3, b.num_graphs, 2 * d), "bias": wide(4, 2 * d)},
        )
        _check_both_halves(b, rows(5, e, 2 * d), z.wide, mean=False)


def _check_both_halves(b: SceneGraphBatch, x_ED: torch.Tensor, dtype: torch.dtype, mean: bool) -> None:
    """The pool of one set of rows is half of a kernel for two: check both halves, without masks."""
    from sgg_kernels.masked_pool import Rows, _pool, pool_bwd

    sets = [x_ED, x_ED.flip(0)]
    found, count = _pool([Rows(x, b.relation_ptr, b.relation_graph) for x in sets], dtype, mean)
    graph, sizes = b.relation_graph.long(), b.relation_ptr.diff().clamp(min=1)[:, None].double()
    width = x_ED.shape[1]
    sums = [x.new_zeros(b.num_graphs, width, dtype=torch.float64).index_add(0, graph, x.double()) for x in sets]
    exact = torch.cat(sums, 1) / (torch.cat([sizes, sizes], 1).repeat_interleave(width, 1) if mean else 1)
    assert torch.equal(count[0], b.relation_ptr.diff()) and torch.equal(count[0], count[1]), "rows counted"
    compare({"pool": found}, {"pool": exact.to(dtype)}, {"pool": exact})
    if mean:
        grad = _randn(6, b.num_graphs, 2 * width, dtype=dtype)
        for half, got in enumerate(pool_bwd(grad, count, [(b.relation_graph, None, dtype)] * 2)):
            want = (grad[:, half * width : (half + 1) * width].double() / sizes)[graph]
            compare({"gradient": got}, {"gradient": want.to(dtype)}, {"gradient": want})


def _pack(padded: bool, masked: bool) -> None:
    """Check that `pack` is bit-exact."""
    from sgg_kernels.pack import pack_fwd
    from sgg_kernels.reference.pack import pack

    drawn, shape = registry.draw("paper" if padded else "vg2", torch.device("cpu"))
    given = drawn.store, drawn.ids, drawn.object_ptr, drawn.relation_ptr
    mask = drawn.mask if masked else None
    found, found_mask = pack_fwd(*given, shape.objects, shape.relations, mask)
    want, want_mask = pack(*given, mask)
    assert torch.equal(found_mask, want_mask), "masked"
    for name, x in want.items():
        assert torch.equal(found[name], x), name


def _hash_draw(kind: int) -> None:
    """Words and uniform numbers are bit-exact, normal numbers within the rule of Box-Muller in float64."""
    from sgg_kernels import reference
    from sgg_kernels.hash_draw import hash_draw

    sample, step = torch.arange(7).reshape(7) * 2**29, torch.tensor([5], dtype=torch.int32)
    for place in ((), (torch.arange(7, dtype=torch.int32) - 3,)):
        start = (reference.hash_words((9,)) + 2**31) % 2**32 - 2**31
        key = (9, step, sample, 12, *place)
        found = hash_draw(key[1:], start, 96, kind)
        if kind < 2:
            want = (reference.hash_u32, reference.hash_uniform)[kind](*key)
            assert torch.equal(found, want), "not the reference's bits"
            continue
        columns = [word[:, None] if isinstance(word, torch.Tensor) else word for word in key]
        u = reference.hash_uniform(*columns, torch.arange(192)).double()
        exact = torch.sqrt(-2 * torch.log(u[:, ::2])) * torch.cos(2 * torch.pi * u[:, 1::2])
        compare({"normal": found}, {"normal": reference.hash_normal((96,), *key)}, {"normal": exact})


_NUMELS, _OFFSETS, _NUM = [300, 1024, 2053], [0, 512, 1536], 3840
"""Elements of three gradients, their offsets in the flat buffers, and the size of the buffers."""


def _read(weights, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from sgg_kernels.reference.weights import read_weights

    return read_weights(weights, slice(0, _NUM)).to(dtype)


_FACTORED = {"wide": [(20, 16), (32, 32), (3, 680)], "first": [(75, 4), (64, 16), (17, 120)],
             "odd": [(60, 5), (16, 64), (3, 683)]}  # fmt: skip
"""Rows and columns of three gradients, of about the sizes of `_NUMELS`, by their common divisor: 8, 4 and 1."""


def _adam(state: int | str, form: str, max_norm: float) -> None:
    """One step after a drawn state; weights and moments within the rule of a float64 step."""
    from sgg_fast.ops import adam as op

    dtype, split, grad_dtype = ADAM_FORMS[form]
    hyper = op.Hyper(max_norm=max_norm)
    shapes = _FACTORED[state] if isinstance(state, str) else None
    numels = [rows * columns for rows, columns in shapes] if shapes else _NUMELS
    grads = [_randn(i, num).to(grad_dtype) for i, num in enumerate(numels)]
    states: dict[str, Tensors] = {}
    for backend in ("reference", "triton"):
        ops.use_kernels(backend)
        low = torch.zeros(_NUM, dtype=torch.int16) if split else None
        weights = op.Weights(_randn(7, _NUM).to(dtype), low, 3)
        moments = _factored(shapes) if shapes else _moments(state, numels)
        control, step, rate = (
            torch.zeros(op.CONTROL_SIZE),
            torch.full((1,), 6, dtype=torch.int32),
            torch.full((4,), 1e-2),
        )
        control[[op.INVERSE_SCALE, op.CORRECTION_1, op.CORRECTION_2]] = torch.tensor([0.5, 1 - 0.9**6, 1 - 0.999**6])
        before = _exact_moments(moments)
        table = op.chunk_table(grads, _OFFSETS, backend, range(len(grads)) if shapes else None)
        group = op.GroupGrads(grads, _OFFSETS, table, shapes)
        op.adam_decide_([group], control, step, hyper)
        op.adam_update_(weights, moments, group, control, rate, step, hyper)
        ops.use_kernels("auto")
        assert step.item() == 7, "the step was not taken"
        named = zip(("row", "column") if shapes else ("m", "v"), _exact_moments(moments), strict=True)
        states[backend] = {"weights": _read(weights), **dict(named), "control": control}
        codes = [c for c in moments if c.dtype == torch.uint8]
        states[f"{backend} codes"] = {str(i): c for i, c in enumerate(codes)}
    true_step = functools.partial(_true_factored_step, shapes) if shapes else _true_step
    exact = true_step(grads, _randn(7, _NUM).to(dtype).double(), *before, max_norm)
    exact["control"] = states["reference"]["control"].double()
    compare(states["triton"], states["reference"], exact)
    pairs = [(c, states["reference codes"][i]) for i, c in states["triton codes"].items()]
    if form == "lean":
        pairs.append((states["triton"]["weights"], states["reference"]["weights"]))
    for mine, other in pairs:
        same = (mine == other).double().mean().item()
        assert same >= SAME_CODES, f"{100 * (1 - same):.2f} % of the codes are not the reference's"


def _moments(bits: int, numels: list[int]):
    from sgg_fast.ops import adam as op

    if bits == 32:
        m, v = torch.zeros(_NUM), torch.zeros(_NUM)
        for num, offset in zip(numels, _OFFSETS, strict=True):
            m[offset : offset + num], v[offset : offset + num] = _randn(8, num), _randn(9, num).square()
        return m, v
    generator, codes = torch.Generator().manual_seed(8), []
    for zero in (op.ZERO_1[bits], 0):
        code = torch.full((_NUM,), zero, dtype=torch.uint8)
        for num, offset in zip(numels, _OFFSETS, strict=True):
            code[offset : offset + num] = torch.randint(2**bits, (num,), generator=generator, dtype=torch.uint8)
        codes.append(code if bits == 8 else code[::2] << 4 | code[1::2])
    scales = [torch.rand(_NUM // op.BLOCKS[bits], generator=generator) for _ in range(2)]
    idle = torch.ones(_NUM, dtype=torch.bool)
    for num, offset in zip(numels, _OFFSETS, strict=True):
        idle[offset : offset + num] = False
    for scale in scales:  # a code of 4 bits has no zero: what no gradient reaches gets none of it
        scale[idle.view(len(scale), -1).all(1)] = 0
    return op.Moments(*codes, *scales, op.dynamic_map(True, bits), op.dynamic_map(False, bits))


def _factored(shapes: list[tuple[int, int]]):
    from sgg_fast.ops import adam as op

    *firsts, ends = op.first_means(shapes)
    row, column = torch.zeros(ends[0]), torch.zeros(ends[1])
    for k, means in enumerate((row, column)):
        for shape, first in zip(shapes, firsts, strict=True):  # between them there may be padding
            means[first[k] : first[k] + shape[k]] = _randn(9 + k, shape[k]).square() + 0.1
    matrices = [[at, *shape, *first, 0] for at, shape, first in zip(_OFFSETS, shapes, firsts, strict=True)]
    return op.Factored(row, column, torch.tensor(matrices))


def _exact_moments(moments) -> tuple[torch.Tensor, ...]:
    """m and v, or the means of rows and of columns."""
    from sgg_fast.ops import adam as op

    if len(moments) == 2:
        return moments[0].clone(), moments[1].clone()
    if isinstance(moments, op.Factored):
        return moments.row.clone(), moments.column.clone()
    made = []
    for code, absmax, values in zip(moments[:2], moments[2:4], moments[4:], strict=True):
        bits = op.bits_of(values)
        codes = torch.stack([code >> 4, code & 15], 1).flatten() if bits == 4 else code
        made.append(values[codes.long()] * absmax.repeat_interleave(op.BLOCKS[bits]))
    return tuple(made)


def _true_factored_step(
    shapes: list[tuple[int, int]],
    grads: list[torch.Tensor],
    wide: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    max_norm: float,
) -> Tensors:
    """Step 7 by the formula of the paper, in float64."""
    norm = 0.5 * sum(g.double().square().sum() for g in grads).sqrt().item()
    factor = 0.5 * (min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0)
    wide, row, column = wide.clone(), row.double(), column.double()
    first = [0, 0]
    for grad, offset, shape in zip(grads, _OFFSETS, shapes, strict=True):
        g, part = factor * grad.double().view(shape), slice(offset, offset + grad.numel())
        r, c = (mean[at : at + size] for mean, at, size in zip((row, column), first, shape, strict=True))
        r.copy_(0.999 * r + 0.001 * g.square().mean(1))
        c.copy_(0.999 * c + 0.001 * g.square().mean(0))
        u = g / (r[:, None] * c / r.mean() / (1 - 0.999**7)).sqrt()
        wide[part] -= 1e-2 * (u / max(1.0, u.square().mean().sqrt().item())).flatten()
        first = [at + size for at, size in zip(first, shape, strict=True)]
    return {"weights": wide, "row": row, "column": column}


def _true_step(
    grads: list[torch.Tensor], wide: torch.Tensor, m: torch.Tensor, v: torch.Tensor, max_norm: float
) -> Tensors:
    """Step 7 by the textbook formula, in float64."""
    norm = 0.5 * sum(g.double().square().sum() for g in grads).sqrt().item()
    factor = 0.5 * (min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0)
    g, covered = torch.zeros_like(wide), torch.zeros_like(wide, dtype=torch.bool)
    for grad, offset in zip(grads, _OFFSETS, strict=True):
        g[offset : offset + len(grad)] = factor * grad.double()
        covered[offset : offset + len(grad)] = True
    m, v = 0.9 * m.double() + 0.1 * g, 0.999 * v.double() + 0.001 * g.square()
    update = 1e-2 * (m / (1 - 0.9**7)) / ((v / (1 - 0.999**7)).sqrt() + 1e-8)
    return {"weights": torch.where(covered, wide - update, wide), "m": m, "v": v}


_SMALL_NORMS = {
    "C/G 10 1024": (1, 128, 80, 8), "C/G 20 1024": (1, 128, 80, 4), "C/G 30 1024": (1, 48, 240, 8),
    "C/G 40 256": (2, 80, 80, 2), "C/G 60 64": (1, 48, 240, 4), "C/G 80 16": (1, 16, 160, 2),
    "512px": (1, 512, 160, 8), "vae": (1, 2304, 64, 8), "toy": (1, 128, 96, 16), "odd large": (3, 140, 21, 3),
}  # fmt: skip
"""Images, pixels, channels and groups that replace `NORMS`, for cases that are not small already."""
_SPLIT = {"group_norm_layout__ONE_PASS_PIXELS": 0, "group_norm_layout__CHUNK_PIXELS": 16}


def _group_norm(name: str, dtype: torch.dtype, wide: torch.dtype, silu: bool) -> None:
    images, pixels, channels, groups = _SMALL_NORMS.get(name, NORMS[name])
    x = 2 + _randn(0, images, pixels, channels, dtype=dtype).transpose(1, 2)
    inputs = {"x": x, "weight": 1 + 0.5 * _randn(1, channels, dtype=wide), "bias": _randn(2, channels, dtype=wide)}
    with lowered(**(_SPLIT if name in ("512px", "vae", "odd large") else {})):
        check(
            lambda x, weight, bias: (ops.group_norm_silu(x, weight, bias, num_groups=groups, eps=1e-5, silu=silu),),
            inputs,
        )
        check(lambda x, weight, bias: ops.group_norm_silu_beside(x, weight, bias, groups, 1e-5, silu), inputs)
        if silu:
            shift = _randn(3, images, 2 * channels)[:, :channels]
            check(
                lambda x, weight, bias, shift: ops.group_norm_silu_beside(x, weight, bias, groups, 1e-5, True, shift),
                inputs | {"shift": shift},
            )
            check(
                lambda x, weight, bias, shift: (ops.group_norm_silu(x, weight, bias, groups, 1e-5, shift_BC=shift),),
                inputs | {"shift": shift},
            )


def _add_layer_norm(num_rows: int, width: int, dtype: torch.dtype, wide: torch.dtype) -> None:
    """Rows that fill their last tile and rows that do not; the sums of one or more programs."""
    rows = 20 if num_rows % 16 == 0 else 7
    inputs = {"x": 2 + _randn(0, rows, width, dtype=dtype), "weight": 1 + 0.5 * _randn(1, width, dtype=wide)}
    inputs["bias"] = _randn(2, width, dtype=wide)
    residual, late = _randn(3, rows, width, dtype=dtype), _randn(4, width, dtype=wide)
    for more in ({}, {"residual": residual}, {"residual": residual, "late": late}):

        def run(x, weight, bias, residual=None, late=None):
            return ops.add_layer_norm(x, weight, bias, 1e-5, residual, late)

        check(run, inputs | more)
        check(lambda run=run, **given: run(**given)[:1], inputs | more)


def _geglu(num_rows: int, width: int, dtype: torch.dtype) -> None:
    """Rows divisible by 16 or not, as in the case; an odd width fills its block, so every lane has a column.

    Normal numbers times three, because erf has two branches, below 1 and above.
    """
    rows, width = 32 if num_rows % 16 == 0 else 77, width if width % 16 == 0 else 127
    check(lambda x: (ops.geglu(x),), {"x": 3 * _randn(0, rows, 2 * width, dtype=dtype)})


def _cross_attention(num_queries: int, num_keys: int, width: int, dtype: torch.dtype) -> None:
    """One image of the eight heads: three blocks of queries, the last of seven, in two or three chunks.

    Their number is odd, so each stride is a multiple of 16 exactly where the shipped one is: the programs are the same.
    """
    merged = _randn(1, 1, num_keys, 32 * width, dtype=dtype)
    k, v = (merged[..., at * width :][..., : 8 * width].unflatten(-1, (8, width)) for at in (8, 16))
    bias = 0.5 * _randn(2, 1, num_keys)
    bias[:, num_keys * 2 // 3 :] = -10000.0
    with lowered(cross_attention__PROGRAMS=48):
        check(
            lambda q, k, v: (ops.cross_attention(q, k, v, bias),),
            {"q": _randn(0, 1, 71, 8, width, dtype=dtype), "k": k, "v": v},
            compare_norms,
        )


_SMALL_OF = {
    "pack": _pack,
    "hash_draw": _hash_draw,
    "add_layer_norm": _add_layer_norm,
    "geglu": _geglu,
    "cross_attention": _cross_attention,
}


def small_cases() -> dict[str, Callable[[], None]]:
    """AOT case -> its small run, which raises AssertionError for a wrong result."""
    made: dict[str, Callable[[], None]] = {}
    sizes = {z.name: z for z in SIZES}
    for case in cases():
        run, op = case.run, case.run.func.__name__  # type: ignore[attr-defined]
        args = run.args  # type: ignore[attr-defined]
        if op == "adam":
            _, max_norm, weight, split, grad, state = args
            form = next(name for name, types in ADAM_FORMS.items() if types == (weight, split, grad))
            made[case.name] = functools.partial(_adam, state, form, max_norm)
        elif op == "group_norm_silu":
            name = next(name for name, shape in NORMS.items() if shape == args[0])
            made[case.name] = functools.partial(_group_norm, name, *args[1:])
        elif op in _SMALL_OF:
            made[case.name] = functools.partial(_SMALL_OF[op], *args)
        else:
            made[case.name] = functools.partial(_graph_op, op, sizes[args[0].name])
    return made
