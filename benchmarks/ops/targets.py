"""Compares rows of kernels with our targets, one for every op and optimiser. It reads CSV rows and measures nothing."""

from __future__ import annotations

import dataclasses

from benchmarks.harness.output import CsvRow

AT_SCALE = ("1e5", "1e6", "1e7")
LARGE_IMAGES = ("512px", "512px16")
PAPER_SIZES = ("paper", "vg2", "vg16", "vg64", "vg256")
IMAGE_SIZES = ("paper", "512px")
COPY_SHARE = 0.85
"""Of a device copy's bandwidth on compulsory bytes, for a kernel that requests each row once."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The targets of one op."""

    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    """Mode -> least share of a copy's bandwidth at the largest measured size, captured; none if bytes do not decide."""
    large: tuple[str, ...] = AT_SCALE
    """Sizes of that share, ascending."""
    rivals: tuple[str, ...] = ("compile",)
    """Forms that ours must beat at every one of `sizes`, captured or, for forms that cannot be, called."""
    sizes: tuple[str, ...] = PAPER_SIZES
    mode: str = "fwd_bwd"
    """Mode of the comparison with rivals."""
    dtypes: tuple[str, ...] = ("bf16", "fp32")


_BOTH = {"fwd": COPY_SHARE, "bwd": COPY_SHARE}
_NORM = Target({"fwd": COPY_SHARE * 2 / 3, "bwd": COPY_SHARE * 3 / 5}, LARGE_IMAGES, ("eager", "compile"), IMAGE_SIZES)
"""Statistics first: a large image comes from memory twice, 3 passes where 2 are compulsory, and 5 where 3 are."""

TARGETS: dict[str, Target] = {
    "scatter_mean": Target(_BOTH, rivals=("pyg", "compile")),
    "masked_pool": Target(_BOTH, rivals=("pyg", "compile")),
    "graph_mean": Target(_BOTH, rivals=("pyg", "compile")),
    "gather_add_relu": Target(_BOTH),
    "triple_context": Target(_BOTH),
    "layer": Target(),  # its GEMMs decide
    "pack": Target({"fwd": 0.5}, rivals=(), mode="fwd", dtypes=("int32",)),  # runs of 4 to 60 bytes: half of a sector
    "group_norm_silu": _NORM,
    "group_norm_silu_shift": _NORM,
    "add_layer_norm": Target(_BOTH, LARGE_IMAGES, ("eager", "compile"), IMAGE_SIZES),
    "cross_attention": Target(rivals=("eager", "compile"), sizes=IMAGE_SIZES, dtypes=("bf16",)),  # off until it wins
    "geglu": Target(_BOTH, LARGE_IMAGES, sizes=IMAGE_SIZES),
    "hash_draw": Target(sizes=IMAGE_SIZES, mode="fwd", dtypes=("fp32",)),  # integer instructions decide
    "adam": Target({"step": COPY_SHARE}, ("unet",), ("foreach", "fused"), ("unet",), "step", ("fp32",)),
    "adam8bit": Target(
        {"step": 0.6}, ("unet",), ("bitsandbytes", "torchao"), ("unet",), "step", ("fp32", "split", "bf16")
    ),  # an H200 is predicted to be bound by instructions (kernels/README.md)
    "adam4bit": Target({"step": 0.5}, ("unet",), ("torchao",), ("unet",), "step", ("fp32", "split", "bf16")),
    "adafactor": Target({"step": 0.3}, ("unet",), ("transformers",), ("unet",), "step", ("fp32", "bf16")),
    # adafactor reads gradients three times more than its compulsory bytes count
}
"""Op -> its targets. A public kernel whose op is missing here fails a test."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One target, the measured value, and "met", "missed" or "no row"."""

    target: str
    found: str
    verdict: str


def _select(rows: list[CsvRow], **wanted: str) -> list[CsvRow]:
    return [row for row in rows if row["ms_p50"] and all(row[k] == v for k, v in wanted.items())]


def _at_scale(rows: list[CsvRow], op: str, mode: str, dtype: str) -> Finding:
    """Share of the copy bandwidth at the largest size, captured, L2 flushed; an optimiser's buffers exceed every L2."""
    wanted = TARGETS[op]
    target = f"{op} {mode} {dtype}, large: >= {100 * wanted.shares[mode]:.0f} % of a copy"
    l2 = "warm" if mode == "step" else "flushed"
    for size in reversed(wanted.large):
        found = _select(rows, op=op, mode=mode, dtype=dtype, size=size, backend="ours", call="replay", l2=l2)
        if found:
            share = float(found[0]["copy_share"])
            return Finding(
                target, f"{100 * share:.1f} % at {size}", "met" if share >= wanted.shares[mode] else "missed"
            )
    return Finding(target, "", "no row")


def _fastest(rows: list[CsvRow], backend: str, **wanted: str) -> float | None:
    """Median in ms: captured, else called."""
    for call in ("replay", "eager"):
        if found := _select(rows, backend=backend, call=call, **wanted):
            return float(found[0]["ms_p50"])
    return None


def _against_rivals(rows: list[CsvRow], op: str, dtype: str, size: str) -> Finding:
    """Our median over the fastest rival's, captured where it can be, with a warm L2."""
    names, mode = TARGETS[op].rivals, TARGETS[op].mode
    target = f"{op} {mode} {dtype} {size}, replay: faster than {' and '.join(names)}"
    wanted = {"op": op, "mode": mode, "dtype": dtype, "size": size, "l2": "warm"}
    mine = _select(rows, backend="ours", call="replay", **wanted)
    rivals = {name: ms for name in names if (ms := _fastest(rows, name, **wanted)) is not None}
    if not mine or not rivals:
        return Finding(target, "", "no row")
    ours = float(mine[0]["ms_p50"])
    best = min(rivals, key=lambda name: rivals[name])
    ratio = rivals[best] / ours
    absent = "".join(f", {name}: no row" for name in names if name not in rivals)
    return Finding(target, f"{1e3 * ours:.2f} us, {best} {ratio:.2f}x{absent}", "met" if ratio > 1 else "missed")


def findings(rows: list[CsvRow]) -> list[Finding]:
    """Every target that applies to the rows of a run; GPU rows only."""
    rows = [row for row in rows if not row["device"].startswith("CPU")]
    found = []
    for op, wanted in TARGETS.items():
        for dtype in wanted.dtypes:
            found += [_at_scale(rows, op, mode, dtype) for mode in wanted.shares]
            found += [_against_rivals(rows, op, dtype, size) for size in wanted.sizes if wanted.rivals]
    return found
