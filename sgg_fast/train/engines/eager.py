"""The engine of one process: fp32 weights under autocast, or a UNet in bf16 (--weights split, lean)."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgg_fast.config import Config
from sgg_fast.ops import adam as adam_op
from sgg_fast.train.engines.base import Engine, resolve_precision
from sgg_fast.train.optim.adam_flat import FlatAdam8bit
from sgg_fast.train.optim.ema import WeightAverage
from sgg_fast.train.optim.flat import FlatAdam
from sgg_fast.train.optim.groups import build_optimizer, has_flat_kernels
from sgg_fast.train.stages import Terms


class LossScale:
    """fp16's loss scale: halved by a step that overflows, doubled after 2 000 that do not."""

    def __init__(self) -> None:
        self.value, self.good_steps = 2.0**16, 0

    def update(self, finite: bool) -> None:
        """Note the outcome of a step."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % 2000 == 0:
            self.value *= 2


class PlainEngine(Engine):
    """One process, no wrapper around the module."""

    has_flat_optimizer = False
    """Whether fine-tuning's optimiser is one that a step can be replayed with."""

    def __init__(self, module: nn.Module, config: Config, stage: str, device: torch.device) -> None:
        finetune = stage == "finetune"
        precision = resolve_precision(config, device) if finetune else "fp32"
        narrow = finetune and config.bf16_weights
        self.module = module.to(device)
        if finetune:
            module.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if narrow:
            module.unet.bfloat16()
        by_kernels = self.has_flat_optimizer or has_flat_kernels(config, device)
        self.optimizer = build_optimizer(module, config, stage, flat=by_kernels)
        self.max_grad_norm = config.max_grad_norm
        self.scale = LossScale() if precision == "fp16" else None
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision) if not narrow else None
        if config.ema:
            flat = self.optimizer.flat if isinstance(self.optimizer, FlatAdam) else None
            weights = [flat.buffer] if flat else self._parameters
            self.average = WeightAverage(weights, config.ema, config.ema_device == "cpu")
        self._autocast = lambda: torch.autocast(device.type, cast) if cast else contextlib.nullcontext()
        self._in_backward = finetune and config.optimizer_in_backward
        self._finite = True
        if self._in_backward:
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(self._update_one)

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """See `Engine`."""
        with self._autocast():
            return self.module(ids, step)

    def _backward(self, total: torch.Tensor) -> None:
        if self._in_backward:
            self._finite = bool(total.isfinite())
            if self._finite:
                total.backward()
            return
        # An infinite loss can have finite gradients: times NaN it has none.
        total = total * torch.where(total.isfinite(), self.scale.value if self.scale else 1.0, torch.nan)
        total.backward()

    def _update_one(self, parameter: nn.Parameter) -> None:
        """In backward: a weight's own step, left out where its gradient is not finite."""
        assert parameter.grad is not None
        if parameter.grad.isfinite().all():
            self.optimizer.step_one(parameter)  # type: ignore[attr-defined]
        else:
            self._finite = False
        parameter.grad = None

    def _apply(self) -> bool:
        if self._in_backward:
            return self._finite
        if isinstance(self.optimizer, (FlatAdam, FlatAdam8bit)):  # which clip and skip by themselves
            if self.scale:
                self.optimizer.control[adam_op.INVERSE_SCALE] = 1 / self.scale.value
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            applied = bool(self.optimizer.applied)
            if self.scale:
                self.scale.update(applied)
            return applied
        grads = [p.grad for p in self._parameters if p.grad is not None]
        scale = self.scale.value if self.scale else 1.0
        norm = nn.utils.get_total_norm(grads) / scale
        finite = bool(norm.isfinite())
        if finite:
            if self.max_grad_norm or self.scale:
                clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm else 1.0
                torch._foreach_mul_(grads, clip / scale)
            self.optimizer.step()
        if self.scale:
            self.scale.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        return values

    def barrier(self) -> None:
        """See `Engine`."""

    def save(self, folder: Path) -> None:
        """Weights as safetensors; the optimiser as a torch file that loads with weights_only."""
        save_file({k: v.contiguous() for k, v in self.module.state_dict().items()}, folder / "weights.safetensors")
        state = self.optimizer.state_dict()
        if self.scale:
            state["loss_scale"] = vars(self.scale)
        torch.save(state, folder / "optimizer.pt")
        if self.average:
            save_file(self.average.state_dict(), folder / "average.safetensors")

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        self.module.load_state_dict(load_file(folder / "weights.safetensors"))
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        if self.scale:
            vars(self.scale).update(state.pop("loss_scale"))
        self.optimizer.load_state_dict(state)
        if self.average:
            self.average.load_state_dict(load_file(folder / "average.safetensors"))
