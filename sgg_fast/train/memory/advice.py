"""Memory advice for users: `--plan`, `--budget`, `--auto-batch`, and the message after an out-of-memory error.

The numbers come from `planner.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgg_fast import env
from sgg_fast.config import SETTINGS, Config, ConfigError, OptimConfig, as_flags
from sgg_fast.config.optim import BLOCKWISE
from sgg_fast.data.sources import open_source
from sgg_fast.train.engines.choose import plan_engine
from sgg_fast.train.memory.plan import GIB, OUTSIDE, MemoryPlan
from sgg_fast.train.memory.planner import ENCODING, Planner

logger = logging.getLogger(__name__)

DS_OFFLOAD = "configs/ds_offload.json"
"""The DeepSpeed configuration that needs the least memory."""

STATES_BY_SIZE = ("adam", *BLOCKWISE)
"""Optimisers, that of the largest state first."""

NUM_SHOWN = 3
"""Remedies in a message."""

PREPARE = "prepare it first (python -m sgg_fast.data.prepare cache --batch-size 1), and train on the result"
"""The remedy where a set's encoding is the peak."""


class Remedy(NamedTuple):
    """A change of settings that may save memory."""

    settings: Mapping[str, Any]
    """Flat settings."""
    ds_path: str | None = None
    """The DeepSpeed configuration that the remedy selects."""

    def typed(self, config: Config) -> str:
        """The command-line words that change `config` this way."""
        words = as_flags({name: to for name, to in self.settings.items() if SETTINGS[name].of(config) != to})
        return " ".join(words + (["--deepspeed", self.ds_path] if self.ds_path else []))


def remedies(config: Config) -> list[Remedy]:
    """Every setting that saves memory and has an effect beside the others, then smaller state, DeepSpeed with offload.

    A state of 8 bits that another setting needs does not take the place of a smaller one.
    """
    known = [
        dict(setting.rules.saves_memory)
        for setting in SETTINGS.values()
        if setting.rules.saves_memory and setting.has_effect(config)
    ]
    place = STATES_BY_SIZE.index(config.optim.optimizer)
    if place:
        for settings in known:
            settings.pop("optimizer", None)
    smaller = [Remedy({"optimizer": name}) for name in STATES_BY_SIZE[max(place, 1) + 1 :]]
    return [*map(Remedy, known), *smaller, Remedy({}, DS_OFFLOAD)]


def budget_bytes(text: str) -> int:
    """Bytes of a text such as "24GiB", "24 GB" or "900MiB". Raises `ConfigError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(i?)B\s*", text)
    if not found or float(found[1]) <= 0:
        raise ConfigError(f"--budget {text}: say it as 24GiB, 24GB or 900MiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** {"G": 3, "M": 2}[found[2]])


def device_memory(device: torch.device) -> int:
    """Memory of the GPU, or of this machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclasses.dataclass(frozen=True)
class TypedRun:
    """A run as typed on the command line, which the advice is about."""

    config: Config
    stage: str
    ds_path: str | None
    device: str
    """ "cuda" or "cpu"."""

    def planner(self) -> Planner:
        """Planner of the run. Raises `ConfigError`, also for pre-training, which fits on any device."""
        config, device = self.config, self.device
        if self.stage != "finetune":
            raise ConfigError("--plan and --auto-batch are for --stage finetune; pre-training fits any GPU")
        if config.model.conditioner != "sgg":
            raise ConfigError(f"--plan and --auto-batch know SGG-IG's graph encoder only: leave out --conditioner "
                              f"{config.model.conditioner}, whose memory is about the same")  # fmt: skip
        ds = plan_engine(config.optim, self.stage, torch.device(device), self.ds_path)
        if not config.data.source or config.data.is_drawn:
            return Planner(config, ds, device, env.world_size())
        source = open_source(config.data, config.run.seed)
        return Planner(config, ds, device, env.world_size(), len(source), stored=source.stored is not None)

    def changed(self, tried: Iterable[Remedy]) -> Iterator[tuple[str, TypedRun, Planner]]:
        """Remedies that change something and are compatible with the settings: words, changed run, its planner."""
        for remedy in tried:
            ds = remedy.ds_path
            if ds and (self.ds_path or not Path(ds).is_file()):
                continue
            try:
                config = self.config.replace(**remedy.settings)
                if not ds and config == self.config:
                    continue
                run = dataclasses.replace(self, config=config, ds_path=ds or self.ds_path)
                yield remedy.typed(self.config), run, run.planner()
            except ConfigError:  # settings that exclude each other
                continue

    def added_up(self) -> Iterator[tuple[str, Planner]]:
        """Cumulative remedies: from the first one on, then from the last one back."""
        for ordered in (remedies(self.config), remedies(self.config)[::-1]):
            settings: dict[str, Any] = {}
            ds_path, run = None, self
            for remedy in ordered:
                for _, changed, planner in run.changed([remedy]):
                    settings |= remedy.settings
                    ds_path, run = remedy.ds_path or ds_path, changed
                    yield Remedy(settings, ds_path).typed(self.config), planner

    def what_fits(self, budget: int) -> str:
        """The first settings that fit a batch of at least 1: a single remedy, or the fewest of `added_up`."""
        logger.info("not even a batch of 1 fits: looking for settings with which it does")

        def fitting(tried: Iterable[tuple[str, Planner]]) -> Iterator[str]:
            for words, planner in tried:
                if most := planner.largest_batch(budget):
                    optim = planner.config.optim
                    alone = optim.optimizer_in_backward and most < optim.batch_size  # it cannot accumulate
                    yield f"{words}{f' --batch-size {most}' if alone else ''} (batch {most})"

        single = ((words, planner) for words, _, planner in self.changed(remedies(self.config)))
        found = list(itertools.islice(fitting(single), NUM_SHOWN))
        found = found or list(itertools.islice(fitting(self.added_up()), 1))
        if not found and self.planner().plan(1, budget).when == ENCODING:
            return f": the set's encoding needs the most; {PREPARE}"
        if not found:
            return "; nor with all that saves memory together: take a larger GPU or --budget, or a lower --resolution"
        return f"; it does with {' or with '.join(found)}"


def show_plan(run: TypedRun, budget_text: str | None) -> str:
    """Text of the plan at the settings' batch: whether it fits the budget (24GiB), and the largest batch that fits."""
    budget = budget_bytes(budget_text or "24GiB")
    planner = run.planner()
    plan = planner.plan(run.config.optim.batch_size, budget)
    most = planner.largest_batch(budget)
    return "\n".join([
        *plan.lines(),
        f"{'fits' if plan.fits(budget) else 'does not fit'} {budget / GIB:.2f} GiB, of which {OUTSIDE / GIB:.0f} GiB "
        "is left to what is not counted (CUDA context, cuDNN's workspaces)",
        f"largest batch that fits: {most}" if most else f"not even a batch of 1 fits{run.what_fits(budget)}",
    ])  # fmt: skip


def auto_batch(run: TypedRun, budget_text: str | None) -> Config:
    """The settings with the largest micro-batch that fits the budget (the whole device by default).

    Accumulation keeps the images of a step. Raises `ConfigError` if one image does not fit, or if accumulation is
    excluded and needed.
    """
    budget = budget_bytes(budget_text) if budget_text else device_memory(torch.device(run.device))
    planner, optim = run.planner(), run.config.optim
    images, most = optim.batch_size * optim.accumulation_steps, planner.largest_batch(budget)
    if not most:
        plan, cure = planner.plan(1, budget), run.what_fits(budget)
        raise ConfigError(f"--auto-batch: not even one image fits {budget / GIB:.2f} GiB: {_peak(plan)}{cure}")
    micro = max(n for n in range(1, min(most, images) + 1) if images % n == 0)
    logger.info("--auto-batch: %d images a step as %d x %d; %d would fit", images, images // micro, micro, most)
    return run.config.replace(batch_size=micro, accumulation_steps=images // micro)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means out of memory, on GPU or CPU: torch has no class of its own for the CPU's."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


def out_of_memory(run: TypedRun) -> str:
    """One line for a run out of memory: the planned peak, its largest part, and the settings that help most."""
    if run.stage != "finetune":
        return "out of memory: lower --batch-size"
    plan = run.planner().plan(run.config.optim.batch_size)
    if plan.when == ENCODING:
        return f"out of memory: {_peak(plan)}: {PREPARE}"
    lower = {}
    for words, changed, planner in run.changed([*_smaller_batch(run.config.optim), *remedies(run.config)]):
        peak = planner.plan(changed.config.optim.batch_size).peak
        if peak < plan.peak:
            lower[words] = peak
    best = sorted(lower, key=lambda words: lower[words])[:NUM_SHOWN]
    helps = ", ".join(f"{words} ({lower[words] / GIB:.2f} GiB)" for words in best)
    return f"out of memory: {_peak(plan)}. Each of these would help: {helps or 'a lower --resolution'}"


def _smaller_batch(optim: OptimConfig) -> list[Remedy]:
    """Half the micro-batch with twice the accumulation, or half the images if accumulation is excluded."""
    if optim.batch_size == 1:
        return []
    half = optim.batch_size // 2
    if optim.optimizer_in_backward:
        return [Remedy({"batch_size": half})]
    return [Remedy({"batch_size": half, "accumulation_steps": optim.accumulation_steps * optim.batch_size // half})]


def _peak(plan: MemoryPlan) -> str:
    part, size = next(iter(plan.parts.items()))
    return (
        f"the planned peak is {plan.peak / GIB:.2f} GiB in {plan.when}, its largest part {part}, {size / GIB:.2f} GiB"
    )
