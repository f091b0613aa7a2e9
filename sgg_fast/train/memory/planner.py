"""The memory planner: the memory of a fine-tuning run, part by part, before anything is allocated.

The stage is set up as in the run. It goes forward and backward on fake tensors, which `meter.py` counts; so does a
sample sheet. `parts.py` computes what the engine keeps, and `allocator.py` the gaps between the blocks. Attention is
planned as SDPA, which needs the same memory as xFormers. The CUDA context and cuDNN's workspaces are not counted;
`OUTSIDE` stands for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sgg_fast import ops
from sgg_fast.config import Config
from sgg_fast.data.cache import ENCODED_PIXELS, RESIDENT_SHARE
from sgg_fast.nn.backbone import NUM_SIZES, added
from sgg_fast.nn.clip import embed_images
from sgg_fast.nn.fuse import fuse_for
from sgg_fast.train.assemble import assemble, called_models
from sgg_fast.train.backward.aside import HELD_BYTES, goes_aside
from sgg_fast.train.backward.behind import goes_behind
from sgg_fast.train.engines.base import resolved
from sgg_fast.train.engines.captured import WARM_UP_STEPS
from sgg_fast.train.memory import zero
from sgg_fast.train.memory.allocator import GRAPHS, CachingAllocator, Event
from sgg_fast.train.memory.blank import (
    blank_cache,
    blank_conditioner,
    blank_foundation,
)
from sgg_fast.train.memory.meter import Meter, autocast_like_cuda
from sgg_fast.train.memory.parts import (
    CUBLAS_WORKSPACE,
    CUBLAS_WORKSPACES,
    EngineLayout,
    WeightGroup,
    address_bytes,
    bucket_blocks,
    gradient_bytes,
    in_backward_bytes,
    parameters_of,
    resident_blocks,
    resident_parts,
    update_bytes,
)
from sgg_fast.train.memory.plan import GIB, OUTSIDE, MemoryPlan
from sgg_fast.train.optim.flat import as_matrix
from sgg_fast.train.optim.groups import parameter_groups

LARGEST_BATCH = 4096
"""Upper bound of the batch search."""

GRAPH_BYTES = 4096
"""Upper bound of a packed graph: ids, pointers and message slots of 31 objects and 60 relations."""

ENCODING = "encoding the set"
"""The moment before training in which a set that is not prepared is encoded."""

GUIDED, CONTEXT = 2, 80
"""Rows that the UNet takes for one guided picture of a sample sheet, and their T."""


class Trace(NamedTuple):
    """What the fake tensors of a step took."""

    peaks: dict[str, dict[str, int]]
    """Phase -> bytes by kind at its highest point."""
    events: list[Event]
    """Allocations and releases in order."""
    aside: set[int | str]
    """`Meter.aside`."""


class Planner:
    """Plans one run's settings at any batch size. Its models are fake tensors, built once."""

    def __init__(
        self,
        config: Config,
        ds: dict[str, Any] | None = None,
        device: str = "cuda",
        world_size: int = 1,
        num_images: int | None = None,
        stored: bool | None = None,
    ) -> None:
        """Build the fake models.

        num_images: size of the training set (by default what the settings expect). stored: whether the set is a
        prepared cache, whose latents may stay on disk; by default True if --data is not given. Raises `ConfigError` if
        --model's configuration cannot be read.
        """
        layout = EngineLayout(config.optim, config.model.kernels, device, ds, world_size)
        config = resolved(config, "finetune", torch.device(device), layout.has_kernels, ds is not None)
        self.config, self.layout = config, dataclasses.replace(layout, optim=config.optim)
        # Autograd counts devices at the first backward. Fake tensors pretend that a CUDA build has eight, and it would
        # start a thread for each: a gigabyte of addresses, and no fork could go backward any more.
        torch.ones(1, requires_grad=True).sum().backward()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._traces: dict[int, Trace] = {}
        self._of_sheet: Trace | None = None
        self._of_encoding: Trace | None = None
        with torch.random.fork_rng(devices=[]), self._mode:
            self.foundation = blank_foundation(config.model)
            of_unet, of_graph = self.layout.dtypes()
            _recast(self.foundation.unet, of_unet)
            self._stage = assemble(
                self._as_traced(),
                "finetune",
                self.foundation,
                blank_conditioner(config.model, self.foundation),
                blank_cache(config, self.foundation, 1),
                torch.device("cpu"),
                ds,
                context_fn=self._recomputing,
            )
            for name, module in self._stage.named_children():
                if name != "unet":
                    _recast(module, of_graph)
            groups = parameter_groups(self._stage, config.optim, self.layout.largest_group)
            self._groups = [
                WeightGroup(
                    tuple(p.numel() for p in group["params"]),
                    group["optim_bits"],
                    group["params"][0].dtype,
                    sum(sum(as_matrix(p)) for p in group["params"]),
                )
                for group in groups
            ]
            number_of = {p: number for number, group in enumerate(groups) for p in group["params"]}
            self._order = [(p.numel(), number_of[p]) for p in parameters_of(self._stage)]
        self._num_images = num_images if num_images is not None else config.data.num_expected
        self._stored = stored if stored is not None else not config.data.source

    def plan(self, batch: int, budget: int = 24 * GIB) -> MemoryPlan:
        """MemoryPlan for `batch` images a micro-batch and process."""
        resident, host = resident_parts(self.layout, self._groups)
        unet: nn.Module = self.foundation.unet
        frozen = (p.nbytes for p in unet.parameters() if not p.requires_grad)
        resident["frozen weights of the UNet (LoRA)"] = sum(frozen)
        on_gpu = self.layout.device == "cuda"
        called = self._called if on_gpu else self._frozen
        resident["frozen models"] = sum(_sizes(called))
        resident["training set (graphs, embeddings, latents)"] = self._data_bytes(budget)
        if self._is_captured:
            resident["addresses of the gradients"] = address_bytes(self._groups, self.config.optim.optimizer)
        if self._is_captured and goes_aside(self.config, self.layout.world_size):
            resident["held for weight gradients aside"] = HELD_BYTES + CUBLAS_WORKSPACE
        if on_gpu:
            resident["cuBLAS's workspaces"] = CUBLAS_WORKSPACES
        else:
            resident, host = {**resident, **host}, {}
        moments = {phase: dict(parts) for phase, parts in self._trace(batch).peaks.items()}
        if on_gpu and not self._stored:  # before the weights are there
            extra = sum(self._encoding()[0]) - sum(resident.values())
            moments[ENCODING] = {"frozen models and pictures beyond the rest": max(extra, 0)}
        if on_gpu and self._draws_sheets:
            visiting = sum(_sizes(self._visiting))
            moments["sample sheet"] = {"frozen models for a sheet": visiting, **self._sheet()[0]}
        if not self.config.optim.optimizer_in_backward:
            gradients = gradient_bytes(self.layout, self._groups)
            temporaries = update_bytes(self.layout, self._groups)
            moments["update"] = {"gradients": gradients, "the update's temporaries": temporaries}
        config, micro, side = self.config, self.config.optim.accumulation_steps, self.config.data.resolution
        title = (
            f"fine-tuning {config.run.recipe} with {self.foundation.source} at {side} x {side}, "
            f"batch {batch}{f' x {micro}' if micro > 1 else ''}, "
            f"{self.layout.describe()}{', optimiser behind backward, all gradients kept' if self._is_behind else ''}, "
            f"on {'a GPU' if self.layout.device == 'cuda' else 'the CPU'}"
        )
        plan = MemoryPlan(title, resident, moments, host)
        return dataclasses.replace(plan, gaps=self._gaps(plan, batch)) if on_gpu else plan

    def largest_batch(self, budget: int) -> int:
        """Largest micro-batch in images that fits `budget`; 0 if not even one image fits.

        The peak is a maximum of functions that are linear in the batch, hence convex, so a guess from a chord mostly
        fits. The gaps move in steps, so every guess is planned. If chords creep along a plateau, the middle is tried.
        """
        below, low, high, crept = 0, 0, LARGEST_BATCH + 1, 0  # low fits or is 0, high does not
        while high - low > 1:
            if low < 2:
                guess = low + 1
            elif crept > 1:
                guess = (low + high) // 2
            else:
                a, b = (below, low) if high > LARGEST_BATCH else (low, high)
                at_a, at_b = self.plan(a, budget).reserved, self.plan(b, budget).reserved
                guess = a + (budget - OUTSIDE - at_a) * (b - a) // max(at_b - at_a, 1)
                guess = min(max(guess, low + 1), high - 1)
            if self.plan(guess, budget).fits(budget):
                below, low, crept = low, guess, crept + 1 if guess > 2 else 0
            else:
                high, crept = guess, 0
        return low

    @property
    def _frozen(self) -> list[nn.Module]:
        """The frozen models that the run uses at all."""
        models = [self.foundation.vae, self.foundation.clip]
        if self.config.model.reads_text or self.layout.device == "cpu":
            models += self.foundation.text_encoders
        return models

    @property
    def _draws_sheets(self) -> bool:
        """Whether the run draws sample sheets."""
        return bool(self.config.run.sample_every and self.config.run.num_samples)

    @property
    def _called(self) -> list[nn.Module]:
        """Those that each step calls."""
        return called_models(self.config, self.foundation, self._stage.cache)

    @property
    def _visiting(self) -> list[nn.Module]:
        """Those that come to a GPU for a sample sheet alone."""
        models = [model for model in self._frozen if model not in self._called]
        if self.config.run.sheet_device == "cpu":
            models = [model for model in models if model in self.foundation.text_encoders]
        return models

    @property
    def _is_captured(self) -> bool:
        """Whether a GPU's steps are captured (`engines.captured.why_eager`)."""
        config, layout = self.config, self.layout
        if layout.device != "cuda" or not layout.is_flat or layout.precision == "fp16" or not config.run.cuda_graphs:
            return False
        return self._backend == "triton"

    @property
    def _is_behind(self) -> bool:
        """Whether weights are updated behind backward, which keeps the gradients of the whole step."""
        return self._is_captured and goes_behind(self.config.optim, self.layout.world_size)

    def _gaps(self, plan: MemoryPlan, batch: int) -> int:
        """Bytes of the allocator's segments beyond the peak, by its own arithmetic on what the run allocates."""
        allocator, keys = CachingAllocator(), itertools.count(-1, -1)
        blocks, trace = resident_blocks(self.layout, self._groups), self._trace(batch)
        by_zero = self.layout.stage in (1, 2)
        later = sum(resident_parts(self.layout, self._groups)[0].values()) if by_zero else 0
        for size in (*blocks, sum(plan.resident.values()) - sum(blocks) - later):
            allocator.allocate(next(keys), size)
        temporaries = plan.moments.get("update", {}).get("the update's temporaries", 0)
        step = whole_step(trace.events, [("update", temporaries), ("update", -1)])
        if self._is_captured:
            for _ in range(WARM_UP_STEPS):
                allocator.run(step, "warm-up")
            allocator.empty_cache()
            allocator.run(step, GRAPHS)
        elif by_zero:
            zero.set_up(allocator, self.layout, self._groups, self._order, keys)
            for first in (True, False):
                update = zero.update(self.layout, self._groups, keys, first)
                allocator.run([*trace.events, *update, *ends(trace.events)], aside=trace.aside)
        else:
            allocator.run(step)
            allocator.run(step)
        if self._draws_sheets:
            for size in _sizes(self._visiting):
                allocator.allocate(next(keys), size)
            allocator.run(self._sheet()[1])
        before = CachingAllocator()
        if not self._stored:
            for size in _sizes(self._encoders):
                before.allocate(next(keys), size)
            before.run(self._encoding()[1])
        return max(allocator.peak - plan.peak, before.peak - plan.peak, 0)

    @property
    def _latent_bytes(self) -> int:
        """Bytes of the moments of the whole set."""
        side = self.config.data.resolution // self.foundation.latent_factor
        return self._num_images * 2 * 2 * self.foundation.vae.config.latent_channels * side**2

    def _data_bytes(self, budget: int) -> int:
        """Bytes of the set on the device. Latents of a prepared cache stay in files if they would need too much."""
        latents, on_host = self._latent_bytes, self.config.data.latents_device == "cpu"
        if on_host or (self._stored and (self.layout.device == "cpu" or latents >= RESIDENT_SHARE * budget)):
            latents = 0
        sizes = 4 * 4 if self.foundation.backbone.pooled_dim else 0
        return latents + self._num_images * (4 * self.foundation.clip.config.projection_dim + GRAPH_BYTES + sizes)

    def _trace(self, batch: int) -> Trace:
        """Trace forward and backward of a step at `batch`: the highest point of each phase beside the resident
        parts, and the allocations."""
        if batch not in self._traces:
            stage, optim = self._stage, self.config.optim
            parameters = parameters_of(stage)
            bits = {id(p): g["optim_bits"] for g in parameter_groups(stage, optim) for p in g["params"]}

            with ops.assumed(self._backend), self._mode, Meter() as meter:
                if optim.optimizer_in_backward:
                    group_of = {id(p): WeightGroup((p.numel(),), bits[id(p)], p.dtype) for p in parameters}
                    meter.use_gradients(parameters, lambda p: in_backward_bytes(self.layout, group_of[id(p)]))
                elif self.layout.stage in (1, 2, 3):
                    buffer, aside = gradient_bytes(self.layout, self._groups), self.layout.zero("overlap_comm", False)
                    meter.bucket_gradients(parameters, self.layout.bucket, buffer, aside)
                else:
                    meter.keep_gradients(parameters)
                for _ in range(min(optim.accumulation_steps, 2)):  # the second pass adds to the first's gradients
                    meter.phase = "forward"
                    with autocast_like_cuda(self.layout.autocast()):
                        total = stage(np.zeros(batch, np.int64), 0).total
                    meter.phase = "backward"
                    buckets = bucket_blocks(self.layout, self._groups)
                    taken = [(size, meter.take("reduction buckets", size)) for size in buckets]
                    total.backward()
                    for size, key in taken:
                        meter.give("reduction buckets", size, key)
                    del total
                for parameter in parameters:
                    parameter.grad = None
            self._traces[batch] = Trace(meter.peaks, meter.events, meter.aside)
        return self._traces[batch]

    @property
    def _encoders(self) -> list[nn.Module]:
        """The models that encode a set that is not prepared."""
        return [self.foundation.clip, self.foundation.vae]

    def _encoding(self) -> tuple[list[int], list[Event]]:
        """Trace the encoding of as many pictures as `build_cache` takes at once. Sizes at the highest point, events."""
        if self._of_encoding is None:
            side, vae = self.config.data.resolution, self.foundation.vae
            with self._mode, torch.no_grad(), Meter() as meter:
                meter.phase = "encoding"
                pixels = torch.empty(max(1, ENCODED_PIXELS // side**2), 3, side, side)
                embed_images(self.foundation.clip, pixels)
                vae.encode(pixels.to(vae.dtype))
            self._of_encoding = Trace(meter.peaks, meter.events, meter.aside)
        peaks, events, _ = self._of_encoding
        return [*_sizes(self._encoders), *peaks["encoding"].values()], events

    def _sheet(self) -> tuple[dict[str, int], list[Event]]:
        """Trace one picture of a sample sheet: a guided step of the UNet, then the decoder if it comes to the device.

        Highest point, events.
        """
        if self._of_sheet is None:
            foundation, side = self.foundation, self.config.data.resolution // self.foundation.latent_factor
            unet, vae = foundation.unet, foundation.vae
            fuse_for(torch.device("cpu"), self._as_traced().model.fuse_unet, vae)
            shape = GUIDED, unet.config.in_channels, side, side
            with ops.assumed(self._backend), self._mode, torch.no_grad():
                backbone, more = foundation.backbone, None
                context = torch.empty(GUIDED, CONTEXT, backbone.context_dim, dtype=unet.dtype)
                if backbone.pooled_dim:
                    pooled = torch.empty(GUIDED, backbone.pooled_dim, dtype=unet.dtype)
                    more = added(pooled, torch.zeros(GUIDED, NUM_SIZES))
                mask = torch.ones(GUIDED, CONTEXT, dtype=torch.bool)
                z, z_0 = torch.empty(shape, dtype=unet.dtype), torch.empty(1, *shape[1:], dtype=vae.dtype)
                with Meter() as meter:
                    meter.phase = "sample sheet"
                    unet(z, torch.zeros(GUIDED), context, encoder_attention_mask=mask, added_cond_kwargs=more)
                    if self.config.run.sheet_device == "auto":
                        vae.decode(z_0)
            self._of_sheet = Trace(meter.peaks, meter.events, meter.aside)
        peaks, events, _ = self._of_sheet
        return {"activations": sum(peaks["sample sheet"].values())}, events

    def _recomputing(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Contexts of a block's forward and of its recomputation: backward runs outside of `_trace`'s autocast."""
        return contextlib.nullcontext(), autocast_like_cuda(self.layout.autocast())

    def _as_traced(self) -> Config:
        """The settings with "auto" resolved for the run's device, which is not the device of the fake tensors."""
        config, on_gpu = self.config, self.layout.device == "cuda"
        fuse = ("on" if on_gpu else "off") if config.model.fuse_unet == "auto" else config.model.fuse_unet
        # Graphs with their relations need the most memory.
        return config.replace(relation_dropout=0.0, attention="sdpa", cross_attention="auto", fuse_unet=fuse)

    @property
    def _backend(self) -> str:
        """Kernel backend of the run."""
        auto = "triton" if self.layout.device == "cuda" else "reference"
        return auto if self.config.model.kernels == "auto" else self.config.model.kernels


def _sizes(models: list[nn.Module]) -> list[int]:
    """Bytes of each tensor of the models."""
    return [t.nbytes for model in models for t in (*model.parameters(), *model.buffers())]


def whole_step(events: list[Event], update: list[Event]) -> list[Event]:
    """The events of forward and backward, then those of an update, then the end of all that is left."""
    end = len(events)
    while end and events[end - 1][1] < 0:
        end -= 1
    return [*events[:end], *update, *events[end:], *ends(events)]


def ends(events: list[Event]) -> list[Event]:
    """Releases of what the events leave allocated."""
    freed = {key for key, size in events if size < 0}
    return [(key, -1) for key, size in events if size >= 0 and key not in freed]


def _recast(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every floating parameter and buffer by one in `dtype`: fake ones cannot be converted in place."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.dtype != dtype:
                empty = torch.empty_like(parameter, dtype=dtype)
                owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = torch.empty_like(buffer, dtype=dtype)
