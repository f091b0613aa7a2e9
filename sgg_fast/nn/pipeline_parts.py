"""Reads and checks a saved pipeline's folder: settings in model_index.json, and every part.

The folder of a LoRA run has no models of its own except the graph encoder: it holds adapters, and names its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgg_fast.graph import shown
from sgg_fast.nn import loading, lora
from sgg_fast.nn.backbone import Backbone
from sgg_fast.nn.conditioners import CHOICES, KINDS, Conditioner
from sgg_fast.nn.foundation import load_clip, load_foundation, load_sd_parts
from sgg_fast.nn.loading import ModelError

PARTS = (
    "unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler", "graph_encoder",
    "graph_clip", "graph_tokenizer",
)  # fmt: skip
_TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
"""Parts that a folder may lack."""
_SETTINGS = {"resolution": 512, "sampling_steps": 100, "guidance": 7.5, "provenance": None,
             "force_zeros_for_empty_prompt": False}  # fmt: skip
"""Settings in model_index.json and their defaults."""
_INDEX = "model_index.json"
_CLASS = "SceneGraphToImagePipeline"
TOY_BASE, WORDS_BASE = "", "toy-words"
"""Names of a LoRA's base where it is a foundation of this package: that of `toy`, or of `toy-words`."""
_MOST = {"resolution": 4096, "sampling_steps": 100_000}


def load_pipeline_parts(root: Path, given: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """Parts and settings of the pipeline in `root`, as arguments of its class; `given` ones are not loaded.

    base: folder or hub id that replaces the base that a LoRA folder names. Raises `ModelError` that names the file.
    """
    index = read_index(root)
    settings = {name: index[name] for name in _SETTINGS}
    if index["base"] is not None:
        return _on_base(root, index["base"], given, base) | settings
    if base is not None:
        raise ModelError("it has its own models, no base: leave out --base")
    there = [part for part in PARTS if index[part][1] is not None]
    if lacking := loading.lacking_file(root, [part for part in there if part not in given]):
        raise ModelError(f"the folder lacks {lacking}")
    loading.check(root, there)
    with_text = "text_encoder" in there
    parts = dict.fromkeys(_TEXT) | load_sd_parts(root, with_text)
    parts["scheduler"] = loading.load_scheduler(root, "scheduler")
    if "graph_encoder" not in given:
        parts["graph_encoder"] = load_conditioner(root, "graph_encoder")
    clip = load_clip(root, "graph_clip", "graph_tokenizer")
    parts |= {"graph_clip": clip["clip"], "graph_tokenizer": clip["clip_tokenizer"]}
    check_fit({**parts, **{name: given[name] for name in PARTS if name in given}})
    return parts | settings


def _on_base(root: Path, named: Mapping[str, str], given: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The parts of a LoRA folder: those of its base, whose UNet gets the adapters, and its own graph encoder."""
    loading.check(root, ("graph_encoder",))
    parts = dict(given)
    if not {"unet", "vae", "scheduler", "graph_clip", "graph_tokenizer"} <= given.keys():
        model = base or named["model"]
        if model in (TOY_BASE, WORDS_BASE):
            raise ModelError("its base is the toy's models: sgg_fast.drawing.load_model loads it")
        with loading.border("its base; --base gives another place"):
            own = (Path(model) / "graph_clip").is_dir()
            parts = load_foundation(model, "" if own else named["clip"]).pipeline_parts() | parts
    if "graph_encoder" not in given:
        parts["graph_encoder"] = load_conditioner(root, "graph_encoder")
    check_fit(parts)
    lora.load_adapters(parts["unet"], root)
    return parts


def named_base(root: Path) -> dict[str, str] | None:
    """The base of a LoRA folder, as --model and --clip named it ("model", "clip"); None for another folder."""
    return read_index(root)["base"]


def read_index(root: Path) -> dict[str, Any]:
    """model_index.json: each part's (library, class), and the settings with checked types. Raises `ModelError`."""
    index: dict[str, Any] = {**_SETTINGS, "base": None}
    index |= loading.read_json(root / _INDEX, _INDEX)
    with loading.border(_INDEX):
        if index.get("_class_name") != _CLASS:
            raise ModelError(
                f"_class_name is {shown(index.get('_class_name'))}; needed is {_CLASS}: the folder of a finished "
                "fine-tuning run"
            )
        for part in PARTS:
            optional = part in _TEXT
            entry = index.setdefault(part, [None, None] if optional else None)
            named = isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
            if not named and not (optional and entry == [None, None]):
                raise ModelError(f"{part} must be [library, class], not {shown(entry)}")
        for name, most in _MOST.items():
            value = index[name]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ModelError(f"{name} must be a whole number from 1 to {most}, not {shown(value)}")
        if not isinstance(zeros := index["force_zeros_for_empty_prompt"], bool):
            raise ModelError(f"force_zeros_for_empty_prompt must be true or false, not {shown(zeros)}")
        guidance = index["guidance"]
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 1 <= guidance <= 10_000:
            raise ModelError(f"guidance must be a number from 1 (none) to 10000, not {shown(guidance)}")
        provenance = index["provenance"]
        if provenance is not None and not (
            isinstance(provenance, dict)
            and all(isinstance(provenance.get(key, {}), dict) for key in ("settings", "metrics"))
        ):
            raise ModelError("provenance must be null or an object with the objects settings and metrics")
        base = index["base"]
        if base is not None and not (
            isinstance(base, dict) and all(isinstance(base.get(name), str) for name in ("model", "clip"))
        ):
            raise ModelError("base must be null or an object with the texts model and clip")
    return index


def load_conditioner(root: Path, part: str) -> Conditioner:
    """The conditioner in `root / part`, of any kind. Raises `ModelError`."""
    config = loading.load_config(root, part, _check_conditioner, "_class_name", *KINDS)
    return loading.load_part(root, part, KINDS[config["_class_name"]], config)


def _check_conditioner(config: Mapping[str, Any]) -> None:
    for key, allowed in CHOICES.items():
        if key in config and config[key] not in allowed:
            raise ModelError(f"{key} must be one of {', '.join(allowed)}, not {shown(config[key])}")
    names = config.get("trained_names", ())
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ModelError("trained_names must be a list of strings")


def check_fit(parts: dict[str, Any]) -> None:
    """Raise `ModelError` if the conditioner was made for another UNet or CLIP."""
    encoder, width = parts["graph_encoder"].config, parts["graph_clip"].config.projection_dim
    backbone = Backbone.of(parts["unet"].config)
    wanted = {"context_dim": backbone.context_dim, "name_dim": width, "image_dim": width}
    found = {name: encoder.get(name, value) for name, value in wanted.items()}
    # Encoders from before SDXL have no such entry.
    wanted, found = wanted | {"pooled_dim": backbone.pooled_dim}, found | {"pooled_dim": encoder.get("pooled_dim", 0)}
    for name, value in wanted.items():
        if found[name] != value:
            raise ModelError(f"graph_encoder has {name} {found[name]}, but unet and graph_clip need {value}")
    reads_text = encoder.get("token_init") == "text" or "form" in encoder
    needed = _TEXT[: 2 * backbone.num_towers] if reads_text else ()
    if lacking := [part for part in needed if parts.get(part) is None]:
        raise ModelError(f"graph_encoder reads SD's text states, but the folder has no {' and '.join(lacking)}")
