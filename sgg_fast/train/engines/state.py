"""What both engines of one process share: their state (optimiser, average of the weights, loss scale) and its files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sgg_fast.train.engines.base import resolve_precision
from sgg_fast.train.optim.ema import WeightAverage
from sgg_fast.train.optim.groups import build_optimizer
from sgg_fast.train.stages import FinetuneStage, Stage, Terms


class LossScale:
    """Loss scale for fp16: halved by a step that overflows, doubled after 2 000 steps that do not."""

    def __init__(self) -> None:
        self.value, self.good_steps = 2.0**16, 0

    def update(self, finite: bool) -> None:
        """Record the outcome of a step."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % 2000 == 0:
            self.value *= 2


class OneProcess:
    """Base of the engines without DeepSpeed: fp32 weights under autocast, or a UNet in bf16 (--weights split, lean)."""

    sharded = False

    def __init__(self, module: Stage, device: torch.device, flat: bool) -> None:
        """Build optimiser, average and loss scale. flat: the optimiser is on flat buffers, as a captured step needs."""
        config, precision, narrow, stage = module.config, "fp32", False, "pretrain"
        self.module = module.to(device)
        if isinstance(module, FinetuneStage):
            stage, precision, narrow = "finetune", resolve_precision(config.optim, device), config.optim.bf16_weights
            module.unet.to(memory_format=torch.channels_last)
            if narrow:  # it is already, unless the caller built the stage without `assemble`
                module.unet.bfloat16()
        self.optimizer = build_optimizer(module, config.optim, config.run.seed, stage, flat=flat)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scale = LossScale() if precision == "fp16" else None
        self.average: WeightAverage | None = None
        if config.optim.ema:
            self.average = WeightAverage(self.parameters, config.optim.ema, config.optim.ema_device == "cpu")
        self._device_type = device.type
        self._cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision) if not narrow else None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Autocast context of a forward."""
        return torch.autocast(self._device_type, self._cast) if self._cast else contextlib.nullcontext()

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """Loss terms of the samples [B], eagerly and without padding."""
        with self.autocast():
            return self.module(ids, step)

    def outstanding(self) -> list[tuple[int, float]]:
        return []

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def barrier(self) -> None:
        pass

    def exported(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the weights are their averages, if the run keeps averages."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def save(self, folder: Path) -> None:
        """Write the weights as safetensors and the optimiser as a torch file that loads with weights_only."""
        weights = {k: v.cpu().contiguous() for k, v in self.module.state_dict().items()}  # no copy on the device
        save_file(weights, folder / "weights.safetensors")
        state = self.optimizer.state_dict()
        if self.scale:
            state["loss_scale"] = vars(self.scale)
        torch.save(state, folder / "optimizer.pt")
        if self.average:
            save_file(self.average.state_dict(), folder / "average.safetensors")

    def load(self, folder: Path) -> None:
        """Load a folder that `save` wrote."""
        self.module.load_state_dict(load_file(folder / "weights.safetensors"))
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        if self.scale:
            vars(self.scale).update(state.pop("loss_scale"))
        self.optimizer.load_state_dict(state)
        if self.average:
            self.average.load_state_dict(load_file(folder / "average.safetensors"))
