"""Learning rates, parameter groups and the choice of optimiser."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sgg_fast.config import ConfigError, OptimConfig
from sgg_fast.nn.fuse import merged_first
from sgg_fast.train.optim.adam_flat import FlatAdam

MIN_8BIT_ELEMENTS = 4096
"""Tensors below this keep 32-bit state, as bitsandbytes advises."""

STATES: dict[str, dict[str, Any]] = {
    "adam": {"optim_bits": 32},
    "adam8bit": {"optim_bits": 8},
    "adam4bit": {"optim_bits": 4},
    "adafactor": {"optim_bits": 32, "factored": True},
}
"""--optimizer -> the state of the groups of matrices on flat buffers."""


def lr_factor(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Share of the learning rates at `step` (from 0) of `num_steps`. A pure function, so resume needs no state."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    if optim.lr_schedule == "constant":
        return warm
    done = max(0, step - optim.warmup_steps) / max(1, num_steps - 1 - optim.warmup_steps)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its initial value."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


def parameter_groups(module: nn.Module, optim: OptimConfig, most: float = math.inf) -> list[dict[str, Any]]:
    """Fine-tuning groups: UNet and graph modules apart (learning rates), matrices and the rest apart (state width).

    Norms, biases, embeddings and small tensors get 32-bit state by group, not by size alone, because ZeRO flattens a
    group into one tensor. The others get 8-bit state, or that of `STATES` on flat buffers. most: elements after which
    a new group of the same kind begins. Where groups are split so, for DeepSpeed, merged weights come first, so that
    its flat tensors keep them adjacent.
    """
    names = {p: name for name, p in module.named_parameters()}
    ordered = names if most == math.inf else merged_first(module)
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[tuple[str, int], list[list[nn.Parameter]]] = {}
    for parameter in ordered:
        if parameter.requires_grad:
            small = parameter.ndim < 2 or parameter.numel() < MIN_8BIT_ELEMENTS or id(parameter) in embeddings
            part = "unet" if names[parameter].startswith("unet.") else "graph"
            same = groups.setdefault((part, 32 if small else 8), [[]])
            if same[-1] and sum(p.numel() for p in same[-1]) + parameter.numel() > most:
                same.append([])
            same[-1].append(parameter)
    lr = optim.learning_rates("finetune")
    return [
        {"params": parameters, "lr": lr[part], "optim_bits": bits, "name": f"{part}/{bits}"}
        for (part, bits), same in groups.items()
        for parameters in same
    ]


def is_flat(optim: OptimConfig, has_kernels: bool) -> bool:
    """Whether an eager step without DeepSpeed is by `FlatAdam`: where our kernels run, and where nothing else can.

    A CPU would run its reference, so fp32 weights are stepped by torch or bitsandbytes there, after backward.
    """
    only_ours = optim.optimizer not in ("adam", "adam8bit")
    return has_kernels or optim.bf16_weights or optim.optimizer_in_backward or only_ours


def build_optimizer(
    module: nn.Module, optim: OptimConfig, seed: int, stage: str, most: float = math.inf, flat: bool = False
) -> torch.optim.Optimizer:
    """Build the optimiser: Adam with 32-bit state in pre-training, `--optimizer` on `parameter_groups` in fine-tuning.

    flat: put it on flat buffers by our kernels, which a captured step needs; else it is torch's, or bitsandbytes'.
    """
    if stage == "pretrain":
        group = {
            "params": list(module.parameters()),
            "lr": optim.learning_rates(stage)["graph"],
            "optim_bits": 32,
            "name": "graph/32",
        }
        return FlatAdam([group], seed, optim.max_grad_norm)
    groups = parameter_groups(module, optim, most)
    if flat:
        groups = [group if group["optim_bits"] == 32 else {**group, **STATES[optim.optimizer]} for group in groups]
        split, in_backward = optim.weights == "split", optim.optimizer_in_backward
        return FlatAdam(groups, seed, optim.max_grad_norm, split=split, in_backward=in_backward)
    if optim.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError("--optimizer adam8bit: bitsandbytes cannot be imported; install it or use adam") from error
    from sgg_fast.train.optim.adam_bnb import GroupedAdam8bit

    return GroupedAdam8bit(groups)
