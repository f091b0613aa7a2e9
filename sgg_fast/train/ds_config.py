"""Reading a DeepSpeed configuration: "auto" values resolved from the recipe, contradictions refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgg_fast.config import Config, ConfigError


def load_ds_config(path: str | Path, config: Config, precision: str, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. precision: "bf16" or "fp32".

    "auto" takes the recipe's value, as users of Accelerate and transformers expect; a number that
    contradicts the recipe raises `ConfigError`.
    """
    path = Path(path)
    try:
        ds = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--deepspeed {path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--deepspeed {path}: not JSON: {error}") from error
    if not isinstance(ds, dict):
        raise ConfigError(f"--deepspeed {path}: must be a JSON object")
    if "optimizer" in ds or "scheduler" in ds:
        raise ConfigError(f"--deepspeed {path}: leave out optimizer and scheduler; the recipe's --optimizer is used")
    for key in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(ds.setdefault(key, {}), dict):
            raise ConfigError(f'--deepspeed {path}: {key} must be an object, such as {{"enabled": "auto"}}')
    if ds["zero_optimization"].get("stage", 0) == 3:
        raise ConfigError(f"--deepspeed {path}: ZeRO stage 3 splits the weights that samples and results need; use 2")
    if ds["fp16"].get("enabled") not in (None, False, "auto"):
        raise ConfigError(f"--deepspeed {path}: fp16 is not supported; use bf16 or fp32")
    expected = {
        "train_micro_batch_size_per_gpu": (config.batch_size, "--batch-size"),
        "gradient_accumulation_steps": (1, "gradient accumulation"),
        "train_batch_size": (config.batch_size * world_size, "--batch-size x processes"),
        "gradient_clipping": (config.max_grad_norm, "--max-grad-norm"),
    }
    for key, (value, source) in expected.items():
        given = ds.get(key, "auto")
        if given != "auto" and given != value:
            raise ConfigError(f'--deepspeed {path}: {key} is {given}, but {source} is {value}; set it to "auto"')
        ds[key] = value
    bf16 = ds["bf16"]
    enabled = bf16.get("enabled", "auto")
    if enabled != "auto" and bool(enabled) != (precision == "bf16"):
        raise ConfigError(f'--deepspeed {path}: bf16.enabled is {enabled}, but precision is {precision}; set "auto"')
    bf16["enabled"] = precision == "bf16"
    ds.pop("fp16", None)
    if unresolved := list(_autos(ds)):
        raise ConfigError(f'--deepspeed {path}: "auto" is not known for {unresolved[0]}; give a value')
    ds["zero_allow_untested_optimizer"] = True
    ds.setdefault("zero_force_ds_cpu_optimizer", False)  # offload keeps the recipe's optimiser
    return ds


def _autos(node: Any, where: str = "") -> Any:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{where}{key}.")
        elif value == "auto":
            yield f"{where}{key}"
