"""A resumable training loop for the parts of the toy's foundation; the stages themselves are in `build.py`.

It is not the trainer of SGG-IG: `sgg_fast/train` is, and it trains on the toy as on any other set.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from sgg_fast.files import replace_folder, write_aside

Loss = Callable[[int], tuple[torch.Tensor, dict[str, float]]]
"""Step number -> loss with gradient, and figures for the progress bar. It draws its own batch from the step number."""


def learning_rate(
    step: int, num_steps: int, peak: float, warmup: int = 100, constant_until: float = 0.0, first: int = 0
) -> float:
    """Linear warm-up from the step `first`, `peak` up to the share `constant_until` of all steps, then a cosine.

    The cosine ends at a hundredth of `peak`.
    """  # fmt: skip
    falls = max(warmup, round(constant_until * num_steps))
    done = max(step - falls, 0) / max(num_steps - falls, 1)
    warm = min(1.0, (step - first + 1) / warmup)
    return warm * peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def _save(folder: Path, step: int, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint to one folder that appears whole or not at all."""
    aside = folder.with_name(folder.name + ".part")
    aside.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, aside / "weights.safetensors")
    save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, aside / "ema.safetensors")
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, aside / "optimizer.pt")
    replace_folder(aside, folder)


def save_half(model: nn.Module, path: Path) -> None:
    """Write fp16 safetensors to a temporary file and rename it."""
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with write_aside(path) as aside:
        save_file({k: v.contiguous() for k, v in halves.items()}, aside)


def fit(
    name: str,
    model: nn.Module,
    loss_of: Loss,
    folder: Path,
    num_steps: int,
    peak_lr: float,
    ema_decay: float = 0.999,
    save_every: int = 100,
    look: Callable[[nn.Module, int], str] | None = None,
    look_every: int = 500,
    weight_decay: float = 1e-4,
    constant_until: float = 0.0,
    first: int = 0,
) -> nn.Module:
    """Train `model` for `num_steps` with AdamW and return its moving average; continues from `folder` if possible.

    While the rate is still constant (`constant_until`), a run may continue with another number of steps. Without a
    checkpoint `model` counts as trained for `first` steps.

    `look(ema, step)` is called at intervals; it may write pictures, and returns a line for the log.
    """
    model.train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
    )
    start, last_look = first, folder / "checkpoint"
    if (last_look / "optimizer.pt").is_file():
        model.load_state_dict(load_file(last_look / "weights.safetensors"))
        ema.load_state_dict(load_file(last_look / "ema.safetensors"))
        state = torch.load(last_look / "optimizer.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tqdm(total=num_steps, initial=start, desc=name, unit="step", mininterval=5, disable=None) as bar:
        for step in range(start, num_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps, peak_lr, constant_until=constant_until, first=first)
            torch.manual_seed(step)
            loss, figures = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            bar.update(1)
            done = step + 1
            if done % 20 == 0:
                bar.set_postfix_str(", ".join(f"{k} {v:.4f}" for k, v in figures.items()), refresh=False)
            if done % save_every == 0 or done == num_steps:
                _save(folder / "checkpoint", done, model, ema, optimizer)
            if look is not None and (done % look_every == 0 or done == num_steps):
                line = f"step {done} after {time.monotonic() - started:.0f} s: {look(ema, done)}"
                bar.write(line)
                with (folder / "log.txt").open("a", encoding="utf-8") as log:
                    log.write(line + "\n")
    return ema
