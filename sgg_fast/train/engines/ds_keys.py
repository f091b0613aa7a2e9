"""The allowed keys of a ds.json and their types, as one table. Any other key is refused, because it would be ignored.

Types and bounds are DeepSpeed's own if it has any. Upper bounds are far above the needs of any run, and below values
for which DeepSpeed allocates a buffer that no machine has.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgg_fast.config import ConfigError


@dataclass(frozen=True)
class Flag:
    """True or false; `only` if the engine supports only that value."""

    only: bool | None = None
    may_be_auto: bool = True

    def fault(self, value: object) -> str | None:
        """The required value; None if `value` meets it."""
        if self.only is None:
            return None if isinstance(value, bool) else "must be true or false"
        return None if value is self.only else f"must be {json.dumps(self.only)}: train.py needs it"


@dataclass(frozen=True)
class Number:
    """A number from `least` to `most`, whole unless `fraction`. 5e8 is whole."""

    least: float
    most: float
    fraction: bool = False
    may_be_auto: bool = True

    def fault(self, value: object) -> str | None:
        """The required value; None if `value` meets it."""
        right = isinstance(value, int | float) and not isinstance(value, bool) and self.least <= value <= self.most
        if right and (self.fraction or value == int(value)):  # type: ignore[call-overload]
            return None
        return f"must be a {'' if self.fraction else 'whole '}number, {self.least:.12g} to {self.most:.12g}"


@dataclass(frozen=True)
class Word:
    """One of `words`."""

    words: tuple[str, ...]
    may_be_auto: bool = False

    def fault(self, value: object) -> str | None:
        """The required value; None if `value` meets it."""
        return None if value in self.words else f"must be {' or '.join(map(json.dumps, self.words))}"


Rule = Flag | Number | Word
Section = Mapping[str, "Rule | Section"]

_BUCKET = Number(1, 2**31 - 1)  # DeepSpeed allocates buckets of the given size
_ELEMENTS = Number(0, 2**63 - 1)
_OFFLOAD: Section = {"device": Word(("none", "cpu", "nvme")), "pin_memory": Flag()}

KEYS: Section = {
    "train_batch_size": Number(1, 10**9),
    "train_micro_batch_size_per_gpu": Number(1, 10**6),
    "gradient_accumulation_steps": Number(1, 10**6),
    "gradient_clipping": Number(0, 1e12, fraction=True),
    "steps_per_print": Number(1, 2**63 - 1),
    "wall_clock_breakdown": Flag(),
    "memory_breakdown": Flag(),
    "dump_state": Flag(),
    "prescale_gradients": Flag(only=False),
    "communication_data_type": Word(("fp32", "bf16", "fp16")),
    "zero_allow_untested_optimizer": Flag(only=True),
    "zero_force_ds_cpu_optimizer": Flag(only=False),
    "bf16": {"enabled": Flag(), "check_grad_overflow": Flag(only=True), "immediate_grad_update": Flag(only=False)},
    "fp16": {
        "enabled": Flag(),
        "loss_scale": Number(0, 2**24, fraction=True),
        "initial_scale_power": Number(0, 24),
        "loss_scale_window": Number(1, 10**9),
        "hysteresis": Number(1, 10**6),
        "consecutive_hysteresis": Flag(),
        "min_loss_scale": Number(1, 2**24),
    },
    "zero_optimization": {
        "stage": Number(0, 3),
        "contiguous_gradients": Flag(),
        "reduce_scatter": Flag(),
        "reduce_bucket_size": _BUCKET,
        "use_multi_rank_bucket_allreduce": Flag(),
        "allgather_partitions": Flag(),
        "allgather_bucket_size": _BUCKET,
        "overlap_comm": Flag(),
        "offload_optimizer": _OFFLOAD,
        "offload_param": _OFFLOAD,
        "sub_group_size": Number(1, 2**63 - 1),
        "stage3_prefetch_bucket_size": Number(0, 2**31 - 1),
        "stage3_param_persistence_threshold": _ELEMENTS,
        "stage3_model_persistence_threshold": _ELEMENTS,
        "stage3_max_live_parameters": _ELEMENTS,
        "stage3_max_reuse_distance": _ELEMENTS,
        "stage3_gather_16bit_weights_on_model_save": Flag(),
        "memory_efficient_linear": Flag(),
        "ignore_unused_parameters": Flag(),
        "round_robin_gradients": Flag(),
    },
}
"""Keys, at any depth, with their rules. "auto" passes here; `load_ds_config` checks whether it can be resolved."""

_MAY_BE_NULL = ("offload_optimizer", "offload_param")


def check_keys(given: dict[str, Any], rules: Section = KEYS, where: str = "") -> None:
    """Raises `ConfigError` naming the first key that is unknown, has another type or is out of bounds.

    Whole numbers written with a point or an exponent become integers in `given`; a section that is null is removed.
    """
    for key, value in list(given.items()):
        name, rule = f"{where}{key}", rules.get(key)
        if rule is None:
            raise ConfigError(_unknown(key, name, rules))
        if isinstance(rule, Mapping):
            if value is None and key in _MAY_BE_NULL:
                del given[key]
            elif not isinstance(value, dict):
                example = '{"enabled": "auto"}' if "enabled" in rule else f'{{"{next(iter(rule))}": ...}}'
                raise ConfigError(f"{name} must be an object, such as {example}, not {_shown(value)}")
            else:
                check_keys(value, rule, f"{name}.")
        elif not (value == "auto" and rule.may_be_auto):
            if fault := rule.fault(value):
                raise ConfigError(f"{name} {fault}, not {_shown(value)}")
            if isinstance(rule, Number) and not rule.fraction:
                given[key] = int(value)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _unknown(key: str, name: str, rules: Section) -> str:
    near = difflib.get_close_matches(key, list(rules), n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"{name[:100]} is no key that train.py takes{meant}: leave it out, it would do nothing"
