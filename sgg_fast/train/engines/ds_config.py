"""Reading a DeepSpeed configuration: "auto" values resolved from the recipe, contradictions refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgg_fast import env
from sgg_fast.config import ConfigError, OptimConfig
from sgg_fast.train.engines.ds_keys import check_keys

ZERO_AUTO = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""What "auto" means in zero_optimization: buckets of 100 MB in bf16, where DeepSpeed's own take a gigabyte."""

LARGEST = 1 << 20
"""Bytes of a configuration at most."""

GROUP_ELEMENTS = 50_000_000
"""Most of a parameter group: at its update ZeRO 1 and 2 hold the group's gradients twice more, flat and in fp32."""


def check_engine(optim: OptimConfig, stage: str, ds_path: str | None) -> None:
    """Raises `ConfigError` for an engine that cannot run the stage on any device, and for a bad DeepSpeed file."""
    if stage == "pretrain" and ds_path is not None:
        raise ConfigError("--stage pretrain runs without --deepspeed, on one GPU or several: leave it out")
    if ds_path is None:
        return
    for name, used in ((f"--weights {optim.weights}", optim.bf16_weights),
                       ("--optimizer-in-backward", optim.optimizer_in_backward),
                       (f"--optimizer {optim.optimizer}", optim.optimizer not in ("adam", "adam8bit")),
                       (f"--lora {optim.lora}", optim.lora > 0)):  # fmt: skip
        if used:
            raise ConfigError(f"{name} runs without --deepspeed, which keeps master weights of its own: leave one out")
    load_ds_config(ds_path, optim, None, env.world_size())


def load_ds_config(path: str | Path, optim: OptimConfig, precision: str | None, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. precision: "bf16", "fp16", "fp32", or None while the device is open.

    "auto" takes the recipe's value, as users of Accelerate and transformers expect; a number that
    contradicts the recipe raises `ConfigError`.
    """
    ds = _read(Path(path))
    try:
        _resolve_zero(ds["zero_optimization"])
        _resolve_sizes(ds, optim, world_size)
        if precision is not None:
            _resolve_precision(ds, precision)
        if unresolved := [name for name in _autos(ds) if precision or not name.endswith("16.enabled")]:
            raise ConfigError(f'"auto" is not known for {unresolved[0]}; give a value')
    except ConfigError as error:
        raise ConfigError(f"--deepspeed {path}: {error}") from error
    ds["zero_allow_untested_optimizer"] = True
    ds.setdefault("zero_force_ds_cpu_optimizer", False)  # offload keeps the recipe's optimiser
    return ds


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ConfigError("cannot be read: " + ("not a file" if path.exists() else "No such file or directory"))
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"larger than {LARGEST >> 20} MiB: not a DeepSpeed configuration")
        ds = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_number)
        if not isinstance(ds, dict):
            raise ConfigError("must be a JSON object")
        if "optimizer" in ds or "scheduler" in ds:
            raise ConfigError("leave out optimizer and scheduler; the recipe's --optimizer is used")
        check_keys(ds)
    except ConfigError as error:
        raise ConfigError(f"--deepspeed {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--deepspeed {path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed {path}: not JSON: {error}") from error
    for key in ("fp16", "bf16", "zero_optimization"):
        ds.setdefault(key, {})
    return ds


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two, JSON's readers take the last without a word."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ConfigError(f"{next(name for name in names if names.count(name) > 1)[:100]} is there twice")
    return made


def _no_number(word: str) -> None:
    raise ConfigError(f"{word} is no number of JSON")


def _resolve_zero(zero: dict[str, Any]) -> None:
    for key, value in ZERO_AUTO.items():
        if zero.get(key) == "auto":
            zero[key] = value
    stage = zero.setdefault("stage", 0)
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(f"{key} to {device} needs an optimiser of DeepSpeed's own; offload to cpu")
        if device == "cpu" and stage not in stages:
            raise ConfigError(
                f"{key} does nothing at ZeRO stage {stage}; it needs stage {' or '.join(map(str, stages))}"
            )


def _resolve_sizes(ds: dict[str, Any], optim: OptimConfig, world_size: int) -> None:
    per_process = optim.batch_size * optim.accumulation_steps
    expected = {
        "train_micro_batch_size_per_gpu": (optim.batch_size, "--batch-size"),
        "gradient_accumulation_steps": (optim.accumulation_steps, "--accumulation-steps"),
        "train_batch_size": (per_process * world_size, "--batch-size x --accumulation-steps x processes"),
        "gradient_clipping": (optim.max_grad_norm, "--max-grad-norm"),
    }
    for key, (value, source) in expected.items():
        given = ds.get(key, "auto")
        if given != "auto" and given != value:
            raise ConfigError(f'{key} is {given}, but {source} is {value}; set it to "auto"')
        ds[key] = value


def _resolve_precision(ds: dict[str, Any], precision: str) -> None:
    for key in ("bf16", "fp16"):
        given = ds[key].get("enabled", "auto")
        if given != "auto" and bool(given) != (precision == key):
            raise ConfigError(f'{key}.enabled is {given}, but precision is {precision}; set "auto"')
        ds[key]["enabled"] = precision == key
    if precision != "fp16":
        del ds["fp16"]


def _autos(node: Any, where: str = "") -> Any:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{where}{key}.")
        elif value == "auto":
            yield f"{where}{key}"
