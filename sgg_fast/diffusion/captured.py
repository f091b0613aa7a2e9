"""A UNet call captured as a CUDA graph: a denoising step costs the host one launch instead of a thousand.

There is one graph for each shape of latents and context. A moved weight or a changed attention processor invalidates
all graphs. cuDNN's benchmark mode stays off, so that a seed gives the same picture in every process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(z [B, c, h, w], t []) -> prediction [B, c, h, w]."""

MAX_GRAPHS = 8
"""Most graphs kept; the oldest is removed first."""
WARM_UP_CALLS = 2
"""Warm-up calls before a capture: they compile kernels and make one-time allocations."""


class Recording:
    """`call` on tensors like `inputs` as one CUDA graph. Raises RuntimeError if it cannot be captured."""

    def __init__(
        self, call: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], stream: torch.cuda.Stream, pool: Any
    ) -> None:
        self.inputs, before = [x.clone() for x in inputs], torch.cuda.current_stream(inputs[0].device)
        stream.wait_stream(before)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    call(*self.inputs)
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                self.output = call(*self.inputs)
        finally:
            torch.cuda.set_stream(before)  # a failed capture leaves its own stream as the current one

    def replay(self) -> torch.Tensor:
        """The output for the current `inputs`; the next replay of any graph of the pool overwrites it."""
        self.graph.replay()
        return self.output


class CapturedUNet:
    """The captured steps of a UNet, one graph a shape, captured at its first use. Not thread-safe."""

    def __init__(self, record: Callable[..., Recording] = Recording) -> None:
        self._record = record
        self._weights: Hashable = None
        self._graphs: dict[Hashable, Recording] = {}
        self._refused: dict[Hashable, str] = {}
        self._stream: Any = None

    def denoiser(
        self,
        unet: Any,
        z: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor,
        choice: str = "auto",
        more: Mapping[str, torch.Tensor] | None = None,
    ) -> Denoise:
        """`unet` with this context [B, T, C] and mask [B, T] as a function of (z, t); the shape of z is fixed here.

        The UNet computes in the dtype of the context; the prediction has the dtype of z. more: what SDXL reads beside
        them, by its names.

        choice: "auto" captures if possible, "on" captures or raises ValueError, "off" calls the model.
        """
        names, values = tuple(more or {}), tuple((more or {}).values())
        given = context, mask, *values

        def call(
            z: torch.Tensor, t: torch.Tensor, context: torch.Tensor, mask: torch.Tensor, *values: torch.Tensor
        ) -> torch.Tensor:
            added = dict(zip(names, values, strict=True)) or None
            return unet(z, t, context, encoder_attention_mask=mask, added_cond_kwargs=added).sample

        reason = "" if choice == "off" else self._reason(unet, z)
        if choice != "off" and not reason:
            inputs = z.to(context.dtype), torch.zeros((), device=z.device), *given
            found = self._recording(unet, call, inputs)
            if isinstance(found, Recording):
                return _replaying(found, given)
            reason = found
        if choice == "on":
            raise ValueError(f"the UNet's step cannot be captured: {reason}")
        return lambda z, t: call(z.to(context.dtype), t, *given).to(z.dtype)

    @staticmethod
    def _reason(unet: Any, z: torch.Tensor) -> str:
        """Reason not to capture, or ""."""
        if z.device.type != "cuda":
            return "no CUDA device"
        if any(hasattr(module, "_hf_hook") for module in unet.modules()):
            return "its weights are offloaded"
        if any(getattr(processor, "needs_calls", False) for processor in unet.attn_processors.values()):
            return "an attention processor looks at every call"
        return ""

    def _recording(
        self, unet: Any, call: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> Recording | str:
        """The graph of these shapes, or the reason why there is none."""
        if self._weights != (weights := _identity(unet)):
            self._weights, self._graphs, self._refused = weights, {}, {}
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._graphs and key not in self._refused:
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            pool = next((recording.graph.pool() for recording in self._graphs.values()), None)
            self._stream = self._stream or torch.cuda.Stream(inputs[0].device)
            try:
                self._graphs[key] = self._record(call, inputs, self._stream, pool)
                self._weights = _identity(unet)  # the first call may have moved merged projections
            except RuntimeError as error:
                self._refused[key] = str(error).strip().splitlines()[0]
                logger.warning("the UNet's step runs without a CUDA graph: %s", self._refused[key])
        return self._refused[key] if key in self._refused else self._graphs[key]


def _identity(unet: Any) -> Hashable:
    """Addresses of the weights and the attention processors; a captured graph depends on them."""
    return tuple(p.data_ptr() for p in unet.parameters()), tuple(unet.attn_processors.values())


def _replaying(recording: Recording, given: Sequence[torch.Tensor]) -> Denoise:
    kept_z, kept_t, *kept = recording.inputs
    for own, x in zip(kept, given, strict=True):
        own.copy_(x)

    def step(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        kept_z.copy_(z)
        kept_t.copy_(t)
        return recording.replay().to(z.dtype, copy=True)  # a copy, because multistep schedulers keep predictions

    return step
