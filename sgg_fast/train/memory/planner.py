"""The memory planner: what a fine-tuning run will take, part by part, before anything is allocated.

The stage itself, set up as the run sets it up, goes forward and backward on fake tensors (`meter.py` counts them); what
the engine keeps is arithmetic (`parts.py`). Attention is planned as SDPA, which takes what xformers takes. Not counted:
the CUDA context, cuDNN's workspaces and the allocator's gaps, for which `OUTSIDE` stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sgg_fast import ops
from sgg_fast.config import Config
from sgg_fast.data.cache import RESIDENT_SHARE
from sgg_fast.train.assemble import assemble
from sgg_fast.train.memory.blank import (
    blank_cache,
    blank_conditioner,
    blank_foundation,
    latent_factor,
)
from sgg_fast.train.memory.meter import Meter, autocast_like_cuda
from sgg_fast.train.memory.parts import (
    Group,
    Layout,
    bucket_bytes,
    gradient_bytes,
    parameters_of,
    resident_parts,
    update_bytes,
    update_bytes_per_element,
)
from sgg_fast.train.optim.groups import parameter_groups

GIB = 2**30

OUTSIDE = GIB
"""Bytes of the budget that are left to what the plan does not count."""

LARGEST_BATCH = 4096
"""Upper bound of the batch search."""

GRAPH_BYTES = 4096
"""A packed graph, generously: ids, pointers and message slots of 31 objects and 60 relations."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes. All sizes in bytes."""

    title: str
    resident: dict[str, int]
    """On the device all the time, by part."""
    moments: dict[str, dict[str, int]]
    """forward, backward, update -> what is there beside it when that takes the most."""
    host: dict[str, int]
    """In CPU memory, by part."""

    @property
    def when(self) -> str:
        """In which moment the peak is."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """The peak by part, largest first."""
        found = {**self.resident, **self.moments[self.when]}
        return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: -item[1]))

    @property
    def peak(self) -> int:
        """Bytes on the device at the highest."""
        return sum(self.parts.values())

    def fits(self, budget: int) -> bool:
        """Whether the peak and what is not counted stay within `budget`."""
        return self.peak + OUTSIDE <= budget

    def lines(self) -> list[str]:
        """For people."""
        rows = [f"{name:42} {size / GIB:8.3f} GiB" for name, size in self.parts.items()]
        moments = ", ".join(
            f"{name} {(sum(self.resident.values()) + sum(extra.values())) / GIB:.2f}"
            for name, extra in self.moments.items()
        )
        host = [f"in CPU memory: {name:27} {size / GIB:8.3f} GiB" for name, size in self.host.items()]
        return [
            self.title,
            *rows,
            f"{'peak, in ' + self.when:42} {self.peak / GIB:8.3f} GiB  ({moments})",
            *host,
        ]


class Planner:
    """Plans of one run's settings at any batch size. Its models are fake tensors, made once."""

    def __init__(
        self,
        config: Config,
        ds: dict[str, Any] | None = None,
        device: str = "cuda",
        world_size: int = 1,
        num_images: int | None = None,
        stored: bool | None = None,
    ) -> None:
        """num_images: of the training set (as many as the settings expect); stored: whether it is a prepared
        cache, whose latents may stay on disk; by default where --data is not given. Raises `ConfigError` where
        --model's configuration cannot be read.
        """
        self.config, self.layout = config, Layout(config.optim, config.model.kernels, device, ds, world_size)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._traces: dict[int, dict[str, dict[str, int]]] = {}
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
            self._groups = [
                Group(tuple(p.numel() for p in group["params"]), group["optim_bits"], group["params"][0].dtype)
                for group in parameter_groups(self._stage, config.optim, self.layout.largest_group)
            ]
        self._num_images = num_images if num_images is not None else config.data.num_expected
        self._stored = stored if stored is not None else not config.data.source

    def plan(self, batch: int, budget: int = 24 * GIB) -> Plan:
        """At `batch` images a micro-batch and process."""
        resident, host = resident_parts(self.layout, self._groups)
        resident["frozen models"] = self._frozen_bytes()
        resident["training set (graphs, embeddings, latents)"] = self._data_bytes(budget)
        if self.layout.device == "cpu":
            resident, host = {**resident, **host}, {}
        moments = {phase: dict(parts) for phase, parts in self._trace(batch).items()}
        moments["backward"]["ZeRO's buckets"] = bucket_bytes(self.layout, self._groups)
        if not self.config.optim.optimizer_in_backward:
            gradients = gradient_bytes(self.layout, self._groups)
            moments["update"] = {"gradients": gradients, "the update's temporaries": self._update_bytes()}
        config, micro, side = self.config, self.config.optim.accumulation_steps, self.config.data.resolution
        title = (
            f"fine-tuning {config.run.recipe} with {self.foundation.source} at {side} x {side}, "
            f"batch {batch}{f' x {micro}' if micro > 1 else ''}, "
            f"{self.layout.describe()}, on {'a GPU' if self.layout.device == 'cuda' else 'the CPU'}"
        )
        return Plan(title, resident, moments, host)

    def largest_batch(self, budget: int) -> int:
        """Most images a micro-batch may have within `budget`; 0 where not even one fits.

        The peak is a maximum of functions that are linear in the batch, hence convex: a chord lies above it (a guess
        from it fits), an extension below. Where chords creep along a plateau, the middle is tried.
        """
        below, low, high, crept = 0, 0, LARGEST_BATCH + 1, 0  # low fits or is 0, high does not
        while high - low > 1:
            if low < 2:
                guess = low + 1
            elif crept > 1:
                guess = (low + high) // 2
            else:
                a, b = (below, low) if high > LARGEST_BATCH else (low, high)
                at_a, at_b = self.plan(a, budget).peak, self.plan(b, budget).peak
                guess = a + (budget - OUTSIDE - at_a) * (b - a) // max(at_b - at_a, 1)
                guess = min(max(guess, low + 1), high - 1)
            if self.plan(guess, budget).fits(budget):
                below, low, crept = low, guess, crept + 1 if guess > 2 else 0
            else:
                high, crept = guess, 0
        return low

    def _update_bytes(self) -> int:
        return update_bytes(self.layout, self._groups)

    def _frozen_bytes(self) -> int:
        models = [self.foundation.vae, self.foundation.clip]
        if self.config.model.token_init == "text" or self.layout.device == "cpu":
            models.append(self.foundation.text_encoder)
        return sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers()))

    def _data_bytes(self, budget: int) -> int:
        """The set as it lies on the device. Latents of a prepared cache stay on disk where they would take too much."""
        side = self.config.data.resolution // latent_factor(self.foundation)
        latents = self._num_images * 4 * 2 * self.foundation.vae.config.latent_channels * side**2
        if self._stored and (self.layout.device == "cpu" or latents >= RESIDENT_SHARE * budget):
            latents = 0
        return latents + self._num_images * (4 * self.foundation.clip.config.projection_dim + GRAPH_BYTES)

    def _trace(self, batch: int) -> dict[str, dict[str, int]]:
        """Forward and backward of a step at `batch`: what was there beside the resident parts at the highest."""
        if batch not in self._traces:
            stage, parameters = self._stage, parameters_of(self._stage)
            bits = {id(p): g["optim_bits"] for g in parameter_groups(stage, self.config.optim) for p in g["params"]}
            with ops.assumed(self._backend), self._mode, Meter() as meter:
                if self.config.optim.optimizer_in_backward:
                    meter.use_gradients(parameters, lambda p: self._in_backward_bytes(p, bits[id(p)]))
                elif self.layout.stage in (1, 2, 3):
                    meter.bucket_gradients(parameters, self.layout.bucket, gradient_bytes(self.layout, self._groups))
                else:
                    meter.keep_gradients(parameters)
                for _ in range(
                    min(self.config.optim.accumulation_steps, 2)
                ):  # the second meets the first one's gradients
                    meter.phase = "forward"
                    with autocast_like_cuda(self.layout.autocast()):
                        total = stage(np.zeros(batch, np.int64), 0).total
                    meter.phase = "backward"
                    total.backward()
                    del total
                for parameter in parameters:
                    parameter.grad = None
            self._traces[batch] = meter.peaks
        return self._traces[batch]

    def _recomputing(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Around a block's forward and its recomputation: backward is outside of `_trace`'s autocast."""
        return contextlib.nullcontext(), autocast_like_cuda(self.layout.autocast())

    def _as_traced(self) -> Config:
        """The settings, "auto" as the run's device resolves it, which is not where fake tensors are."""
        config, on_gpu = self.config, self.layout.device == "cuda"
        fuse = ("on" if on_gpu else "off") if config.model.fuse_unet == "auto" else config.model.fuse_unet
        # Graphs with their relations take the most.
        return config.replace(relation_dropout=0.0, attention="sdpa", fuse_unet=fuse)

    @property
    def _backend(self) -> str:
        """Form of the kernels that the run has."""
        auto = "triton" if self.layout.device == "cuda" else "reference"
        return auto if self.config.model.kernels == "auto" else self.config.model.kernels

    def _in_backward_bytes(self, parameter: torch.Tensor, bits: int) -> int:
        group = Group((parameter.numel(),), bits, parameter.dtype)
        return parameter.numel() * update_bytes_per_element(self.layout, group)


def _recast(module: nn.Module, dtype: torch.dtype) -> None:
    """Every floating parameter and buffer made anew in `dtype`: fake ones cannot be converted in place."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.dtype != dtype:
                empty = torch.empty_like(parameter, dtype=dtype)
                owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = torch.empty_like(buffer, dtype=dtype)
