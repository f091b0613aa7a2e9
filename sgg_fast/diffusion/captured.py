"""A guided UNet call captured as a CUDA graph: a denoising step costs the host one launch instead of a thousand.

There is one graph for each shape of latents and context. A moved weight or a changed attention processor invalidates
all graphs.

cuDNN tries its algorithms in the warm-up before a capture, once a shape in a process, and keeps the fastest. Another
process may choose another one: then the same seed gives the same picture up to rounding. With `search` off a seed gives
the same numbers in every process on a machine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sgg_fast.diffusion.sampling import conditions, copied, guided

logger = logging.getLogger(__name__)

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(z [B, c, h, w], t []) -> guided prediction [B, c, h, w]."""

MAX_GRAPHS = 8
"""Most graphs kept; the oldest is removed first."""
WARM_UP_CALLS = 2
"""Warm-up calls before a capture: they compile kernels and make one-time allocations."""


class Recording:
    """`call` on tensors like `inputs` as one CUDA graph. Raises RuntimeError if it cannot be captured.

    search: cuDNN tries its algorithms in the warm-up.
    """

    def __init__(
        self,
        call: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        stream: torch.cuda.Stream,
        pool: Any,
        search: bool,
    ) -> None:
        self.inputs, before = [x.clone() for x in inputs], torch.cuda.current_stream(inputs[0].device)
        stream.wait_stream(before)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream), _algorithms_tried(search):
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

    search = True
    """Whether cuDNN tries its algorithms before a capture. It never does so in calls without a graph."""

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
        guidance: float = 1.0,
        relation_guidance: float = 0.0,
        run: Callable[..., Any] | None = None,
    ) -> Denoise:
        """`unet` with guidance as a function of (z, t), for latents of the shape and dtype of `z`.

        context [k B, T, C] and mask [k B, T] of the k `conditions` of both guidances. The UNet computes in the dtype of
        the context; guidance and the prediction have the dtype of z. more: what SDXL reads beside them, by its names.
        run: called in place of `unet`, such as its compiled form.

        choice: "auto" captures if possible, "on" captures or raises ValueError, "off" calls the model.
        """
        names, values = tuple(more or {}), tuple((more or {}).values())
        asked = conditions(guidance, relation_guidance)
        given = torch.tensor([guidance, relation_guidance], dtype=z.dtype).to(z.device), context, mask, *values

        def call(
            z: torch.Tensor,
            t: torch.Tensor,
            scales: torch.Tensor,
            context: torch.Tensor,
            mask: torch.Tensor,
            *values: torch.Tensor,
        ) -> torch.Tensor:
            added = dict(zip(names, values, strict=True)) or None
            copies = copied(z.to(context.dtype), len(asked))
            found = (run or unet)(copies, t, context, encoder_attention_mask=mask, added_cond_kwargs=added).sample
            return guided(found.to(z.dtype), asked, *scales)

        reason = "" if choice == "off" else self._reason(unet, z)
        if choice != "off" and not reason:
            inputs = z, torch.zeros((), device=z.device), *given
            found = self._recording(unet, call, inputs, (run, self.search, asked))
            if isinstance(found, Recording):
                return _replaying(found, given)
            reason = found
        if choice == "on":
            raise ValueError(f"the UNet's step cannot be captured: {reason}")
        return lambda z, t: call(z, t, *given)

    @staticmethod
    def _reason(unet: Any, z: torch.Tensor) -> str:
        """Reason not to capture, or ""."""
        if z.device.type != "cuda":
            return "no CUDA device"
        if any(hasattr(module, "_hf_hook") for module in unet.modules()):
            return "its weights are offloaded"
        if watched(unet):
            return "an attention processor looks at every call"
        return ""

    def _recording(
        self, unet: Any, call: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], kind: Hashable
    ) -> Recording | str:
        """The graph of this kind of call and these shapes, or the reason why there is none."""
        if self._weights != (weights := _identity(unet)):
            self._weights, self._graphs, self._refused = weights, {}, {}
        key = kind, *((x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._graphs and key not in self._refused:
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            pool = next((recording.graph.pool() for recording in self._graphs.values()), None)
            self._stream = self._stream or torch.cuda.Stream(inputs[0].device)
            try:
                self._graphs[key] = self._record(call, inputs, self._stream, pool, self.search)
                self._weights = _identity(unet)  # the first call may have moved merged projections
            except RuntimeError as error:
                self._refused[key] = str(error).strip().splitlines()[0]
                logger.warning("the UNet's step runs without a CUDA graph: %s", self._refused[key])
        return self._refused[key] if key in self._refused else self._graphs[key]


@contextlib.contextmanager
def _algorithms_tried(wanted: bool) -> Iterator[None]:
    """Context in which cuDNN tries its algorithms for each new shape, if wanted, and keeps the fastest afterwards."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def watched(unet: Any) -> bool:
    """Whether an attention processor looks at every call of the UNet."""
    return any(getattr(processor, "needs_calls", False) for processor in unet.attn_processors.values())


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
        return recording.replay().clone()  # multistep schedulers keep predictions

    return step
