"""What the engines without DeepSpeed share: their state (optimiser, average of the weights, loss scale), its files."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sgg_fast import env
from sgg_fast.nn import lora
from sgg_fast.train.engines.all_reduce import GradientSum
from sgg_fast.train.engines.base import StepResult, holding, resolve_matmul, resolve_precision
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.ema import WeightAverage
from sgg_fast.train.optim.groups import build_optimizer
from sgg_fast.train.run import processes
from sgg_fast.train.stages import FinetuneStage, Stage, Terms, checkpoint_state


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


Update = TypeVar("Update", bound=Callable[..., StepResult])


def in_matmul_precision(update: Update) -> Update:
    """An engine's `update` with fp32 matrices multiplied as `matmul_precision` says; torch's setting is restored."""

    @functools.wraps(update)
    def inside(engine: Whole, *args: Any, **kwargs: Any) -> StepResult:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(engine.matmul_precision or before)
        try:
            return update(engine, *args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(before)

    return cast(Update, inside)


class Whole:
    """Base of the engines without DeepSpeed: fp32 weights under autocast, or a UNet in bf16 (--weights split, lean).

    With --lora the weights that do not train are stored in the type of autocast. Each of several processes holds all
    weights and the whole optimiser, and takes the same update.
    """

    sharded = False
    matmul_precision = ""
    """torch's float32 matmul precision of a step; empty for the process's own."""

    def __init__(self, module: Stage, device: torch.device, flat: bool) -> None:
        """Build optimiser, average and loss scale. flat: the optimiser is on flat buffers, as a captured step needs."""
        config, precision, narrow, stage = module.config, "fp32", False, "pretrain"
        self.module = module.to(device)
        if isinstance(module, FinetuneStage):
            stage, precision, narrow = "finetune", resolve_precision(config.optim, device), config.optim.bf16_weights
            module.unet.to(memory_format=torch.channels_last)
            if narrow:  # it is already, unless the caller built the stage without `assemble`
                module.unet.bfloat16()
        self._cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision) if not narrow else None
        if isinstance(module, FinetuneStage) and config.optim.lora and self._cast:
            lora.store_frozen(module.unet, self._cast)
        processes.spread(checkpoint_state(module).values())
        self.optimizer = build_optimizer(module, config.optim, config.run.seed, stage, flat=flat)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.num_processes = env.world_size()
        self.gradient_sum: GradientSum | None = None
        """Sums the gradients of several processes; None with a single one."""
        if self.num_processes > 1:
            self.gradient_sum = self._gradient_sum()
        self.scale = LossScale() if precision == "fp16" else None
        self.average: WeightAverage | None = None
        if config.optim.ema:
            self.average = WeightAverage(self.parameters, config.optim.ema, config.optim.ema_device == "cpu")
        self.matmul_precision = resolve_matmul(config.optim, stage, device)
        self._device_type = device.type

    def _gradient_sum(self) -> GradientSum:
        """The sum, which updates the weights itself where that happens in backward."""
        optimizer = self.optimizer
        if isinstance(optimizer, FlatAdam) and optimizer.in_backward:
            optimizer.waits = True
            return GradientSum(self.parameters, optimizer.step_one)
        return GradientSum(self.parameters)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Autocast context of a forward."""
        return torch.autocast(self._device_type, self._cast) if self._cast else contextlib.nullcontext()

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """Loss terms of the samples [B], eagerly and without padding."""
        with self.autocast():
            return self.module(ids, step)

    def outstanding(self) -> list[tuple[int, float]]:
        return []

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Context in which the weights are their averages, if the run keeps averages; else split ones are fp32."""
        if self.average:
            with self.average.in_place():
                yield
            return
        whole = dict(self.optimizer.split_weights()) if isinstance(self.optimizer, FlatAdam) else {}
        with holding(whole):
            yield

    def save(self, folder: Path) -> None:
        """Write the weights as safetensors and the optimiser as a torch file that loads with weights_only.

        Every process holds the same, so the first one writes, and any number of processes can load it.
        """
        if env.rank():
            return
        # No copy on the device.
        weights = {name: tensor.cpu().contiguous() for name, tensor in checkpoint_state(self.module).items()}
        save_file(weights, folder / "weights.safetensors")
        state = self.optimizer.state_dict()
        if self.scale:
            state["loss_scale"] = vars(self.scale)
        torch.save(state, folder / "optimizer.pt")
        if self.average:
            save_file(self.average.state_dict(), folder / "average.safetensors")

    def load(self, folder: Path) -> None:
        """Load a folder that `save` wrote."""
        whole = self.module.state_dict()
        held = {name: whole[name] for name in whole.keys() - checkpoint_state(self.module).keys()}
        self.module.load_state_dict({**held, **load_file(folder / "weights.safetensors")})
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        if self.scale:
            vars(self.scale).update(state.pop("loss_scale"))
        self.optimizer.load_state_dict(state)
        if self.average:
            self.average.load_state_dict(load_file(folder / "average.safetensors"))
