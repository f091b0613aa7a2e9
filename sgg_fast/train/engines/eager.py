"""The eager engine: kernel by kernel, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.train.engines.base import StepResult, run_micro_batches
from sgg_fast.train.engines.state import Whole, in_matmul_precision
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.groups import is_flat, set_lr
from sgg_fast.train.stages import Stage


class EagerEngine(Whole):
    """No wrapper around the module."""

    def __init__(self, module: Stage, device: torch.device, reason: str = "", flat: bool | None = None) -> None:
        """Build the state of the engine.

        reason: why steps are not captured. flat: whether the optimiser is flat; by default as `is_flat` says.
        """
        optim = module.config.optim
        if flat is None:
            flat = is_flat(optim, ops.backend_for(device, torch.float32) == "triton")
        super().__init__(module, device, flat)
        self.execution = f"eager ({reason})" if reason else "eager"
        self.max_grad_norm = optim.max_grad_norm
        self._norm: torch.Tensor | None = None
        self._micro_left = 0

    @in_matmul_precision
    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> StepResult:
        set_lr(self.optimizer, lr_factor)
        if isinstance(self.optimizer, FlatAdam):
            self.optimizer.send_rates()
            self.optimizer.begin()
        self._micro_left = len(ids_KB)
        losses, chance = run_micro_batches(ids_KB, step, self.forward, self._backward)
        applied = self._apply()
        if applied and self.average:
            self.average.update()
        return StepResult(losses, chance, applied, grad_norm=self._norm)

    def _backward(self, total: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss."""
        # An infinite loss can have finite gradients. Multiplied by NaN they are not finite.
        factor = (self.scale.value if self.scale else 1.0) / self.num_processes
        total = total * torch.where(total.isfinite(), factor, torch.nan)
        self._micro_left -= 1
        if self.gradient_sum and not self._micro_left:
            self.gradient_sum.expect()
            total.backward()
            self.gradient_sum.finish()
        else:
            total.backward()

    def _apply(self) -> bool:
        """Clip and step if everything is finite; returns whether the step was applied."""
        scale, optimizer = self.scale, self.optimizer
        if isinstance(optimizer, FlatAdam):  # it clips and skips by itself
            if scale:
                optimizer.scale_by(1 / scale.value)
            optimizer.step()
            applied, self._norm = bool(optimizer.applied), optimizer.norm
        else:
            applied = self._clip_and_step(scale.value if scale else 1.0)
        if scale:
            scale.update(applied)
        optimizer.zero_grad(set_to_none=True)
        return applied

    def _clip_and_step(self, scale: float) -> bool:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = self._norm = nn.utils.get_total_norm(grads) / scale
        finite = bool(norm.isfinite())
        if finite:
            if self.max_grad_norm or scale != 1:
                clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm else 1.0
                torch._foreach_mul_(grads, clip / scale)
            self.optimizer.step()
        return finite
