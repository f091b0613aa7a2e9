"""The eager engine: one process, on any device, kernel by kernel."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import nn

from sgg_fast.ops import adam as adam_op
from sgg_fast.train.engines.base import StepResult, run_micro_batches
from sgg_fast.train.engines.state import OneProcess
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.groups import has_flat_kernels, set_lr
from sgg_fast.train.stages import FinetuneStage, Stage


class EagerEngine(OneProcess):
    """One process, no wrapper around the module."""

    def __init__(self, module: Stage, device: torch.device, reason: str = "", flat: bool | None = None) -> None:
        """Build the state of the engine.

        reason: why steps are not captured. flat: whether the optimiser is flat; by default True where our kernels run.
        """
        optim = module.config.optim
        super().__init__(module, device, has_flat_kernels(optim, device) if flat is None else flat)
        self.execution = f"eager ({reason})" if reason else "eager"
        self.max_grad_norm = optim.max_grad_norm
        self._in_backward = isinstance(module, FinetuneStage) and optim.optimizer_in_backward
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        if self._in_backward:
            # Autograd holds a hook where Python's collector does not look: a hook that held the engine would keep it.
            engine = weakref.ref(self)
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(lambda p: _update_by(engine, p))

    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> StepResult:
        set_lr(self.optimizer, lr_factor)
        losses, chance = run_micro_batches(ids_KB, step, self.forward, self._backward)
        applied = self._apply()
        if applied and self.average:
            self.average.update()
        return StepResult(losses, chance, applied)

    def _backward(self, total: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss."""
        if self._in_backward:
            if total.isfinite():
                total.backward()
            else:
                self._finite.fill_(False)
            return
        # An infinite loss can have finite gradients. Multiplied by NaN they are not finite.
        scale = self.scale
        total = total * torch.where(total.isfinite(), scale.value if scale else 1.0, torch.nan)
        total.backward()

    def _update_one(self, parameter: torch.Tensor) -> None:
        """Step one weight during backward. The host does not wait for the check of its gradient."""
        self._finite.logical_and_(self.optimizer.step_one(parameter))  # type: ignore[attr-defined]
        parameter.grad = None

    def _apply(self) -> bool:
        """Clip and step if everything is finite; returns whether the step was applied."""
        if self._in_backward:
            applied = bool(self._finite)
            self._finite.fill_(True)
            return applied
        scale, optimizer = self.scale, self.optimizer
        if isinstance(optimizer, FlatAdam):  # it clips and skips by itself
            if scale:
                optimizer.control[adam_op.INVERSE_SCALE] = 1 / scale.value
            optimizer.step()
            applied = bool(optimizer.applied)
        else:
            applied = self._clip_and_step(scale.value if scale else 1.0)
        if scale:
            scale.update(applied)
        optimizer.zero_grad(set_to_none=True)
        return applied

    def _clip_and_step(self, scale: float) -> bool:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads) / scale
        finite = bool(norm.isfinite())
        if finite:
            if self.max_grad_norm or scale != 1:
                clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm else 1.0
                torch._foreach_mul_(grads, clip / scale)
            self.optimizer.step()
        return finite


def _update_by(engine: weakref.ref[EagerEngine], parameter: torch.Tensor) -> None:
    """Step one weight by its engine, if that is still there."""
    found = engine()
    if found is not None:
        found._update_one(parameter)
