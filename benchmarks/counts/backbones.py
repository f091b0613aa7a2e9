"""Counts parameters, launches, bytes and operations of each backbone's UNet at the resolution that it was trained with.

    python -m benchmarks.counts.backbones

These are counts, not measurements, of one call forward and backward at batch 2 with bf16 weights (see `unet.py`). An
operation is a multiplication or an addition in a GEMM, a convolution or an attention; recomputation is not counted.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counts.unet import BATCH, FORMS, count, made, opaque_attention
from benchmarks.harness.readme_table import markdown
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.nn import fuse
from sgg_fast.train.memory.sizes import PUBLISHED

PIXELS = 8
"""Width in pixels of one latent."""


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, out_shape: object = None) -> int:
    """Two GEMMs."""
    images, heads, num_queries, width = q
    return 4 * images * heads * num_queries * k[2] * width


def _attention_bwd(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, out_shape: object = None) -> int:
    """Four GEMMs: the gradients of v, of the weights, of q and of k."""
    return 2 * _attention(q, k, v)


def operations(name: str) -> tuple[int, int]:
    """(forward, forward and backward) of the stock UNet."""
    ours = {torch.ops.sgg_count.attention: _attention, torch.ops.sgg_count.attention_bwd: _attention_bwd}
    sizes, found = PUBLISHED[name], []
    with FakeTensorMode(), opaque_attention():
        call = made(sizes, FORMS[0], sizes.resolution // PIXELS)
        with FlopCounterMode(display=False, custom_mapping=ours) as counter:
            out = call()
            found.append(counter.get_total_flops())
            out.backward(torch.empty_like(out))
        found.append(counter.get_total_flops())
    return found[0], found[1]


def fused(name: str) -> dict[str, int]:
    """`fuse.summary` of the UNet."""
    with FakeTensorMode():
        return fuse.fuse(UNet2DConditionModel.from_config(PUBLISHED[name].unet))


def row(name: str) -> list[str]:
    """Cells of a backbone."""
    sizes = PUBLISHED[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sizes.unet)
    forward, both = operations(name)
    cells = [f"{sizes.name} UNet", f"{sizes.resolution}", f"{sum(p.numel() for p in unet.parameters()):,}"]
    cells += [f"{forward / 1e12:.2f} / {both / 1e12:.2f}"]
    for form in (FORMS[0], FORMS[-1]):
        first, second = (counter.total for counter in count(form, sizes.resolution // PIXELS, False, name))
        whole = first + second
        cells.append(f"{whole.launches:,} / {whole.bytes / 1e9:.1f}")
    found = fused(name)
    modules = sum(number for kind, number in found.items() if kind.startswith("Fused"))
    return [*cells, f"{modules} + {found['GEMMs']}"]


@command("benchmarks.counts.backbones")
def main(argv: list[str] | None) -> None:
    """Print a row a backbone."""
    parser = OneLineParser(prog="python -m benchmarks.counts.backbones", description=__doc__.split("\n\n")[0])
    parser.add_argument("--names", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    names = parser.parse_args(argv).names
    header = ["", "pixels", "parameters", f"operations, batch {BATCH}, forward / both, T", "stock: launches / GB",
              "fused: launches / GB", "fused modules + merged GEMMs"]  # fmt: skip
    print("\n".join(markdown(header, [row(name) for name in names])))
