"""The DeepSpeed engine: ZeRO with the recipe's optimiser as client optimiser, with or without a launcher.

Only this module and `ds_config.py` use DeepSpeed.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import importlib.util
import io
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgg_fast import env
from sgg_fast.config import ConfigError
from sgg_fast.train.engines.base import StepResult, holding, run_micro_batches
from sgg_fast.train.engines.build_lock import remove_stale_locks
from sgg_fast.train.engines.ds_config import GROUP_ELEMENTS
from sgg_fast.train.optim.ema import WeightAverage
from sgg_fast.train.optim.groups import build_optimizer, set_lr
from sgg_fast.train.run.processes import leave
from sgg_fast.train.stages import Stage, Terms

logger = logging.getLogger(__name__)

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun and DeepSpeed's launcher set for each process."""
ALONE = ("0", "0", "1", "127.0.0.1", "29500")
"""The values of a single process; no server listens at that port."""


class DeepSpeedEngine:
    """DeepSpeed ZeRO 0 to 3, with fp32 master weights for bf16 or fp16 weights."""

    execution = "eager (DeepSpeed moves weights and runs hooks of its own)"

    _wrapper: Any  # DeepSpeed's wrapper of our optimiser; None if there is none

    def __init__(self, module: Stage, ds_config: dict[str, Any], device: torch.device) -> None:
        config = module.config
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = _import_deepspeed()
        alone = "RANK" not in os.environ
        if alone:  # a launcher would set these for one process; without them DeepSpeed looks for MPI
            os.environ.update({**dict(zip(LAUNCHER, ALONE, strict=True)), **os.environ})
        try:
            with _held_output():
                if not torch.distributed.is_initialized():
                    atexit.register(leave)
                backend = "nccl" if device.type == "cuda" else "gloo"
                remove_stale_locks()
                timeout = datetime.timedelta(seconds=config.run.rank_timeout)
                if alone and not torch.distributed.is_initialized():  # uses no port, so no conflict is possible
                    store = torch.distributed.HashStore()
                    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
                deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
                module.to(device)
                self.optimizer = build_optimizer(module, config.optim, config.run.seed, "finetune", GROUP_ELEMENTS)
                # DeepSpeed's own groups would wait for half an hour, from the first broadcast of the weights on.
                bounded = functools.partial(torch.distributed.new_group, timeout=timeout)
                with mock.patch.object(torch.distributed, "new_group", bounded):
                    self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=ds_config)
        except ConfigError:  # ours
            raise
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--deepspeed: DeepSpeed refuses these settings: {reason}") from error
        self.module = self.engine.module
        self.stage = ds_config["zero_optimization"].get("stage", 0)
        self.sharded = self.stage == 3
        own = self.engine.optimizer
        self._wrapper = None if own is self.optimizer else own
        self._micro = 0
        self.optimizer.state.clear()  # some wrappers have taken a step on zeros, which would count
        if self.stage in (1, 2):
            own.check_grad_overflow = True  # check in fp32 too; DeepSpeed does not
        self.average: WeightAverage | None = None
        if config.optim.ema:
            self.average = WeightAverage(self._masters(), config.optim.ema, config.optim.ema_device == "cpu")

    def update(self, ids_KB: np.ndarray, step: int, lr_factor: float = 1.0) -> StepResult:
        set_lr(self.optimizer, lr_factor)
        losses, chance = run_micro_batches(ids_KB, step, self.forward, self._backward)
        applied = self._apply()
        if applied and self.average:
            self.average.update()
        norm = self.engine.get_global_grad_norm()
        return StepResult(losses, chance, applied, grad_norm=None if norm is None else torch.as_tensor(norm))

    def outstanding(self) -> list[tuple[int, float]]:
        return []

    def forward(self, ids: np.ndarray, step: int) -> Terms:
        """Loss terms of this process's samples [B]."""
        return self.engine(ids, step)

    def _backward(self, total: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss."""
        if self._micro:
            self.engine.step()  # ends the micro-batch before; DeepSpeed updates at the last one only
        self._micro += 1
        # A loss that is not finite still goes through backward: other processes would wait for the gradients of a
        # process that left it out. Multiplied by NaN all its gradients are NaN, and every process skips the step.
        poison = torch.where(total.isfinite(), 1.0, torch.nan)
        self.engine.backward(total * poison, scale_wrt_gas=False)

    def _apply(self) -> bool:
        """Clip and step if everything is finite on every process; returns whether the step was applied."""
        self._micro = 0
        if self.stage == 3 and self._wrapper.dtype != torch.float16:
            self._wrapper.check_overflow()  # its step skips for this flag, but sets it in fp16 only
        if self._wrapper is None:  # ZeRO 0 in fp32 makes no check; the gradients are reduced by now
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            if not nn.utils.get_total_norm(grads).isfinite():
                self.engine.zero_grad()
                self.engine.micro_steps += 1  # its step would have counted these
                return False
        self.engine.step()
        return self.engine.was_step_applied()

    def _masters(self) -> list[torch.Tensor]:
        """The fp32 tensors that the optimiser steps; under ZeRO these are the partitions of this process."""
        wrapper = self._wrapper
        if self.stage in (1, 2):
            return wrapper.single_partition_of_fp32_groups
        if self.stage == 3:
            return wrapper.fp32_partitioned_groups_flat
        groups = wrapper.fp32_groups if wrapper else [group["params"] for group in self.optimizer.param_groups]
        return [p for group in groups for p in group]

    def _whole(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each weight with its whole fp32 value in CPU memory. Every process must iterate to the end."""
        import deepspeed

        if self.stage == 0:
            lower = itertools.chain(*self._wrapper.fp16_groups) if self._wrapper else self._masters()
            yield from ((p, master.detach().cpu()) for p, master in zip(lower, self._masters(), strict=True))
            return
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                yield parameter, deepspeed.utils.safe_get_full_fp32_param(parameter).cpu()
            elif self.sharded:
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield parameter, parameter.detach().to("cpu", torch.float32, copy=True)

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Context in which the module holds the fp32 master weights, not their bf16 roundings."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            whole = {p: value for p, value in self._whole() if env.rank() == 0}
        with holding(whole):
            yield

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint; our manifest beside it holds the hashes of its files."""
        self.engine.save_checkpoint(str(folder), tag="deepspeed")
        if self.average:
            save_file(self.average.state_dict(), folder / f"average-{env.rank()}.safetensors")

    def load(self, folder: Path) -> None:
        """Load a folder that `save` wrote; the caller has checked the manifest."""
        with _no_pickles():
            path, _ = self.engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise ConfigError(f"{folder}: DeepSpeed cannot read this checkpoint")
        if self.average:
            self.average.load_state_dict(load_file(folder / f"average-{env.rank()}.safetensors"))


@contextlib.contextmanager
def _no_pickles() -> Iterator[None]:
    """Context in which torch.load builds only tensors and DeepSpeed's own records, never other pickles."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with contextlib.ExitStack() as stack:
        stack.enter_context(
            torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
        )
        stack.enter_context(mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"))
        yield


def _import_deepspeed() -> Any:
    """Import the package and send its log to ours. One warning is filtered out: our own suite tests the optimiser."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("--deepspeed: the package deepspeed is not installed (pip install deepspeed)")
    with _held_output():
        import deepspeed

    chatter = deepspeed.utils.logger
    if chatter.handlers:
        chatter.handlers.clear()
        chatter.propagate = True
        chatter.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    return deepspeed


@contextlib.contextmanager
def _held_output() -> Iterator[None]:
    """Capture what DeepSpeed prints to stdout. It goes to our log, or to stderr if the block fails."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held):
            yield
    except BaseException:
        sys.stderr.write(held.getvalue())
        raise
    if held.getvalue().strip():
        logger.debug("%s", held.getvalue().strip())
