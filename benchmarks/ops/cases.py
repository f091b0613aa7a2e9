"""The measured cases, each by (op, mode, size, dtype), and the names that commands take. It does not load torch.

Letters: N objects, E relations, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

WIDTH = 512
"""D of the paper."""

GRAPH_OPS = ("scatter_mean", "masked_pool", "gather_add_relu", "triple_context", "graph_mean", "layer", "pack")
"""`layer` is one whole triple convolution (plain form), its GEMMs included; `pack` copies integers."""
IMAGE_OPS = ("group_norm_silu", "group_norm_silu_shift", "add_layer_norm", "cross_attention", "geglu", "hash_draw")
"""Ops of the UNet and its noise; geglu's rows are the pixels of all images, four times the channels wide, and hash_draw
makes the latents' noise. `group_norm_silu_shift` has a shift for each image and channel, as the time embedding's."""
OPS = GRAPH_OPS + IMAGE_OPS

FORWARD_ONLY = {"pack": "int32", "hash_draw": "fp32"}
"""Ops without a gradient, and the one dtype of their results."""

BACKENDS = ("ours", "reference", "eager", "compile", "pyg", "sg2im")
"""Forms of an op (`baselines.py`)."""
OPTIMISERS = ("ours", "reference", "foreach", "fused", "bitsandbytes", "torchao", "transformers", "bitsandbytes-flat")
OPTIMISER_SIZES = ("tiny", "graph", "unet")
"""Forms and sizes of an optimiser's step (`optimisers.py`)."""

HEADLINE = ("scatter_mean", "masked_pool")
"""Ops that are measured first. `targets.py` has a target for every op."""

MODES = ("fwd", "bwd", "fwd_bwd")

DTYPES = ("fp32", "bf16", "fp16")

SIZES: dict[str, tuple[int, int]] = {
    "tiny": (1, 0),
    "paper": (2, 0),
    "vg2": (2, 0),
    "vg16": (16, 0),
    "vg64": (64, 0),
    "vg256": (256, 0),
    "1e4": (64, 10**4),
    "1e5": (64, 10**5),
    "1e6": (64, 10**6),
    "1e7": (64, 10**7),
}
"""Name -> (graphs, relations at scale or 0 for Visual-Genome-like sizes). `paper` is the pre-training bucket."""

IMAGE_SIZES = {"tiny": (1, 16), "paper": (2, 32 * 32), "512px": (2, 64 * 64), "512px16": (16, 64 * 64)}
"""Name -> (images, pixels of the latents): the UNet's top level; `paper` is 256 x 256 at batch 2."""
IMAGE_CHANNELS = 320
"""Channels of the UNet's top level, in 32 groups; the default width."""
LATENT_CHANNELS = 4
HEADS, CONTEXT_TOKENS = 8, 80
"""Of a cross-attention."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured case."""

    op: str
    mode: str
    size: str
    dtype: str
    width: int = WIDTH


def cases(
    ops: Sequence[str], sizes: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], width: int = WIDTH
) -> list[Case]:
    """The requested cases, the headline first, so a run that is out of time loses the last ones.

    Graph ops and image ops have sizes of their own; `tiny` and `paper` belong to both. Ops without a gradient have one
    dtype and no backward; the layer stops at 1e5 relations, the limit of its check in float64.
    """
    made = []
    for first in (True, False):
        for dtype in dtypes:
            for size in sizes:
                for op in ops:
                    if size not in (SIZES if op in GRAPH_OPS else IMAGE_SIZES):
                        continue
                    if (op in HEADLINE) != first or (op == "layer" and SIZES[size][1] > 10**5):
                        continue
                    if op in FORWARD_ONLY:
                        if dtype == dtypes[0] and "fwd" in modes:
                            made.append(Case(op, "fwd", size, FORWARD_ONLY[op], width))
                    else:
                        made += [Case(op, mode, size, dtype, width) for mode in modes]
    return made
