"""Counts the launches and bytes of a training step of Stable Diffusion v1's UNet, stock and fused, at full size.

    python -m benchmarks.counts.unet            # print
    python -m benchmarks.counts.unet --write    # put the table into kernels/README.md
    python -m benchmarks.counts.unet --check    # exit 1 if the committed table differs

These are counts, not measurements: the model runs on tensors without memory, forward and backward. Every operator that
runs a kernel is counted, and every launch of ours. Each launch is assumed to touch each different element of its
tensors once. The optimiser is not included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import UNet2DConditionModel
from sgg_kernels.launch import intercept
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from benchmarks.counts.kernels import Count, OpCounter, tensor_bytes, triton_everywhere
from benchmarks.harness.readme_table import ReadmeTable, markdown
from sgg_fast.nn import attention as attention_module
from sgg_fast.nn import fuse
from sgg_fast.nn.backbone import NUM_SIZES, Backbone, added
from sgg_fast.train.memory.sizes import PUBLISHED, Sizes

BATCH, CONTEXT = 2, 80
"""Images and tokens of the context."""
ATTENTION_LAUNCHES = (1, 2)
"""Launches of flash attention, forward and backward (the row sums of the gradient, then everything else)."""

PRODUCTS = (2, 5)
"""Products of two matrices in them."""


@torch.library.custom_op("sgg_count::attention", mutates_args=())
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("for counting only")


@torch.library.custom_op("sgg_count::attention_bwd", mutates_args=())
def _attention_bwd(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError("for counting only")


@_attention.register_fake
def _(q, k, v):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


@_attention_bwd.register_fake
def _(grad, q, k, v):
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


_attention.register_autograd(
    lambda ctx, grad: _attention_bwd(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@contextlib.contextmanager
def opaque_attention() -> Iterator[None]:
    """Attention as one fused operator; on tensors without memory torch would decompose it."""

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):  # type: ignore[no-untyped-def]
        return _attention(q, k, v)

    def by_xformers(operators, q, k, v, bias=None, scale=None):  # type: ignore[no-untyped-def]
        return _attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    forward = types.SimpleNamespace(NAME="counted")
    with contextlib.ExitStack() as stack:
        for where, name, put in (
            (F, "scaled_dot_product_attention", attention),
            (attention_module, "attend", by_xformers),
            (attention_module, "find_operators", lambda *operands: attention_module.Operators(forward, forward)),
        ):
            stack.enter_context(mock.patch.object(where, name, put))
        yield


@contextlib.contextmanager
def cuda_norms() -> Iterator[None]:
    """Norms in fp32, as in CUDA's autocast rules but not in the CPU's."""
    stock = F.group_norm, F.layer_norm

    def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
        return stock[0](input.float(), num_groups, weight, bias, eps)

    def layer_norm(input, shape, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
        return stock[1](input.float(), shape, weight, bias, eps)

    F.group_norm, F.layer_norm = group_norm, layer_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        F.group_norm, F.layer_norm = stock


class UNetCounter(OpCounter):
    """Counts aten's operators, and the launches of our operators for the shapes of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.split("::")[1]
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        if func.namespace == "sgg_fast":
            self._run(OPDEFS[func._schema.name]._init_fn, args)
        elif func.namespace == "sgg_count":
            outputs = result if isinstance(result, tuple) else (result,)
            backward = name.endswith("bwd")
            q, k = args[backward : backward + 2]
            self.launches[name] += ATTENTION_LAUNCHES[backward]
            self.flops += PRODUCTS[backward] * 2 * q.numel() * k.shape[2]
            self.moved[name] += sum(map(tensor_bytes, (*args, *outputs)))
        elif "convolution" in name:
            self._copy_weight(*(args[1:3] if name.endswith("backward") else args[:2]), name.endswith("backward"))
        return result

    def _copy_weight(self, images: torch.Tensor, weight: torch.Tensor, backward: bool) -> None:
        """cuDNN takes channels-last images with a weight in that layout: another one is copied, and its gradient is."""
        last = torch.channels_last
        copied = images.is_contiguous(memory_format=last) and not images.is_contiguous()
        if copied and not weight.is_contiguous(memory_format=last):
            self.launches["weight to channels last"] += 1 + backward
            self.moved["weight to channels last"] += 2 * (1 + backward) * tensor_bytes(weight)

    def _run(self, launcher: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Run our operator on tensors of the same shapes and strides; its launches are counted, not made."""

        def note(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], options: dict[str, Any]) -> bool:
            self.launches[kernel.__name__] += 1
            different = {id(t): t for t in given if isinstance(t, torch.Tensor)}  # one may stand for an absent one
            self.moved[kernel.__name__] += sum(map(tensor_bytes, different.values()))
            return True

        def bare_of(a: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")

        bare = tree_map_only(torch.Tensor, bare_of, args)
        with torch.utils._python_dispatch._disable_current_modes(), intercept(note):
            launcher(*bare)

    @property
    def total(self) -> Count:
        """Sum of aten's and ours."""
        ours = Count(sum(self.launches.values()), sum(self.moved[name] for name in self.launches), self.flops)
        return self.count() + ours

    def named(self) -> Counter[str]:
        """Launches by operator or kernel."""
        aten = {name: num for name, num in self.names.items() if "::" not in name}
        return Counter(aten) + self.launches


@dataclasses.dataclass(frozen=True)
class UNetForm:
    """A way to run the UNet."""

    name: str
    channels_last: bool
    merge: bool | None
    """Argument of `fuse`; None for the stock model."""


FORMS = (
    UNetForm("stock", False, None),
    UNetForm("stock, channels last", True, None),
    UNetForm("fused kernels", True, False),
    UNetForm("fused kernels, merged GEMMs", True, True),
)


def make_channels_last(model: torch.nn.Module) -> None:
    """`model.to(memory_format=torch.channels_last)`, which tensors without memory do not support."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.ndim == 4:
                laid_out = p.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = torch.nn.Parameter(laid_out)


def made(sizes: Sizes, form: UNetForm, side: int) -> Callable[[], torch.Tensor]:
    """A call of the UNet on new inputs at batch 2, as a function. Call it under a `FakeTensorMode`."""
    unet = UNet2DConditionModel.from_config(sizes.unet).train()
    z, backbone = torch.empty(BATCH, 4, side, side), Backbone.of(sizes.unet)
    if form.channels_last:
        make_channels_last(unet)
        z = z.to(memory_format=torch.channels_last)
    if form.merge is not None:
        fuse.fuse(unet, form.merge)
    context = torch.empty(BATCH, CONTEXT, backbone.context_dim, requires_grad=True)
    t, mask = torch.zeros(BATCH, dtype=torch.int64), torch.ones(BATCH, CONTEXT, dtype=torch.bool)
    more = None
    if backbone.pooled_dim:
        pooled = torch.empty(BATCH, backbone.pooled_dim, requires_grad=True)
        more = added(pooled, torch.zeros(BATCH, NUM_SIZES, dtype=torch.float32))
    return lambda: unet(z, t, context, encoder_attention_mask=mask, added_cond_kwargs=more).sample


@functools.cache
def count(form: UNetForm, side: int, autocast: bool, sizes: str = "sd") -> tuple[UNetCounter, UNetCounter]:
    """Forward and backward of one call at batch 2; bf16 weights, or fp32 ones under autocast to bf16.

    sizes: key of `PUBLISHED`.
    """
    forward, behind = UNetCounter(), UNetCounter()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32 if autocast else torch.bfloat16)
        with FakeTensorMode(), opaque_attention(), triton_everywhere():
            call = made(PUBLISHED[sizes], form, side)
            with contextlib.ExitStack() as stack:
                if autocast:  # to bf16, by CUDA's rules
                    stack.enter_context(cuda_norms())
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                stack.enter_context(forward)
                out = call()
            with behind:
                out.backward(torch.empty_like(out))
    finally:
        torch.set_default_dtype(before)
    return forward, behind


def table(title: str, side: int, autocast: bool) -> list[str]:
    """One setting, as lines of Markdown."""
    rows = []
    for form in FORMS:
        forward, behind = (counter.total for counter in count(form, side, autocast))
        cells = (f"{c.launches:,} / {c.bytes / 1e9:.2f}" for c in (forward, behind, forward + behind))
        rows.append([form.name, *cells])
    return [f"{title}; each cell: launches / GB", "", *markdown(["UNet", "forward", "backward", "both"], rows)]


def body() -> str:
    """The text between the markers of the README."""
    tables = [
        table("256 x 256, batch 2, bf16 weights", 32, autocast=False),
        table("256 x 256, batch 2, fp32 weights under autocast to bf16", 32, autocast=True),
        table("512 x 512, batch 2, bf16 weights", 64, autocast=False),
    ]
    return "\n\n".join("\n".join(lines) for lines in tables)


TABLE = ReadmeTable("counts.unet", "unet", body)

main = TABLE.main(__doc__.split("\n\n")[0])

if __name__ == "__main__":
    sys.exit(main())
