"""Every way to run a step that changes no result, counted beside the defaults: no flag may be faster than none.

The flags come from the settings themselves: those whose rules name `exact` values. A new flag with words to choose from
must say what it is (`unclassified`). Ways that no flag selects are listed here, too: GEMMs that are not merged, weights
that do not lie as their images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from benchmarks.counts import step
from benchmarks.counts.roofline import CHIPS
from benchmarks.counts.step import ZERO, StepCount, on_cuda
from sgg_fast.config import SETTINGS, Config
from sgg_fast.nn import fuse

Counter = Callable[[Config], StepCount]

PATHS: dict[str, Counter] = {
    "pretrain": lambda config: step.count(config, "pretrain"),
    "finetune": step.count,
    "deepspeed": lambda config: step.count(config, "finetune", ZERO),
    "sampling": step.count_sampling,
}
"""What a user runs -> its count."""

UNET_ONLY = ("attention", "cross_attention", "fuse_unet", "gradient_checkpointing")
"""Settings that pre-training does not have."""


def exact_settings() -> dict[str, tuple[Any, ...]]:
    """Settings that change no result -> their values."""
    return {name: setting.rules.exact for name, setting in SETTINGS.items() if setting.rules.exact}


def unclassified() -> list[str]:
    """Settings with words to choose from that no rule classifies: add `exact` to their rules.

    A setting that the model card, the cache or a graph encoder records changes the result.
    """
    return [
        name
        for name, setting in SETTINGS.items()
        if (setting.rules.choices or isinstance(setting.default, bool))
        and setting.rules.exact is None
        and not (setting.rules.in_card or setting.rules.in_cache or setting.rules.in_encoder or setting.rules.of_recipe)
    ]


def _applies(path: str, name: str) -> bool:
    if path == "pretrain":
        return name not in (*UNET_ONLY, "weights")
    if path == "finetune":
        return True
    if path == "sampling":  # as `fuse_unet` and `capture_unet` of the pipeline
        return name in ("fuse_unet", "cuda_graphs")
    return name not in ("weights", "cuda_graphs")


ON_THE_STAND_IN = {"kernels"}
"""Settings whose other values read numbers from tensors, which fake tensors lack. The stand-in for CUDA counts them:
rows `pretrain-reference-kernels` and `finetune-reference-kernels` beside `pretrain-eager` and `finetune-eager`.
"""


def alternatives(config: Config, path: str) -> Iterator[tuple[str, Config]]:
    """Every exact value of every flag that the path has and the default is not, as words and settings."""
    stage, ds = ("pretrain" if path == "pretrain" else "finetune"), path == "deepspeed"
    default = _resolved(config, stage, ds)
    for name, values in exact_settings().items():
        for value in values if name not in ON_THE_STAND_IN else ():
            changed = config.replace(**{name: value})
            if _applies(path, name) and _resolved(changed, stage, ds) != default:
                yield f"--{name.replace('_', '-')} {value}", changed


def _resolved(config: Config, stage: str, by_deepspeed: bool) -> Config:
    """Settings in which "auto" of the operators is resolved as on a GPU, too."""
    found = on_cuda(config, stage, by_deepspeed)
    words = {"attention": "xformers", "kernels": "triton"}
    changes = {name: word for name, word in words.items() if SETTINGS[name].of(found) == "auto"}
    return found.replace(**changes)


def unflagged(config: Config, path: str) -> Iterator[tuple[str, StepCount]]:
    """Counts of ways that no flag selects."""
    if path in ("finetune", "deepspeed"):
        whole = fuse.fuse_for

        def unmerged(*args: Any, **options: Any) -> None:
            whole(*args, **{**options, "merge": False})

        with mock.patch.object(fuse, "fuse_for", unmerged):
            yield "GEMMs that are not merged", PATHS[path](config)
    if path == "deepspeed":
        with mock.patch.object(fuse, "store_channels_last", lambda model: None):
            yield "contiguous weights", PATHS[path](config)


@dataclasses.dataclass(frozen=True)
class Faster:
    """A way that is faster by count than the default."""

    what: str
    chip: str
    default: StepCount
    found: StepCount


def faster(default: StepCount, others: Iterator[tuple[str, StepCount]]) -> list[Faster]:
    """Ways that take less time than the default on some chip, by launches, bytes and the host."""
    return [
        Faster(what, chip.name, default, found)
        for what, found in others
        for chip in CHIPS
        if found.seconds(chip) < default.seconds(chip)
    ]


def check(config: Config, path: str) -> list[Faster]:
    """What is faster than the default of `config` on a path; empty if the default is the fastest."""
    run = PATHS[path]
    found = ((words, run(changed)) for words, changed in alternatives(config, path))
    default = run(config)
    return faster(default, found) + faster(default, unflagged(config, path))
