"""Reads and checks a saved pipeline's folder: settings in model_index.json, and every part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgg_fast.graph import shown
from sgg_fast.nn import loading
from sgg_fast.nn.conditioners import CHOICES, KINDS, Conditioner
from sgg_fast.nn.foundation import load_clip, load_sd_parts
from sgg_fast.nn.loading import ModelError

PARTS = (
    "unet", "vae", "text_encoder", "tokenizer", "scheduler", "graph_encoder", "graph_clip", "graph_tokenizer",
)  # fmt: skip
_INDEX = "model_index.json"
_CLASS = "SceneGraphToImagePipeline"
_MOST = {"resolution": 4096, "sampling_steps": 100_000}


def load_pipeline_parts(root: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parts and settings of the pipeline in `root`, as arguments of its class; `given` ones are not loaded.

    Raises `ModelError` that names the file.
    """
    index = read_index(root)
    there = [part for part in PARTS if index[part][1] is not None]
    if lacking := loading.lacking_file(root, [part for part in there if part not in given]):
        raise ModelError(f"the folder lacks {lacking}")
    loading.check(root, there)
    with_text = "text_encoder" in there
    parts = dict.fromkeys(("text_encoder", "tokenizer")) | load_sd_parts(root, with_text)
    parts["scheduler"] = loading.load_scheduler(root, "scheduler")
    if "graph_encoder" not in given:
        parts["graph_encoder"] = load_conditioner(root, "graph_encoder")
    clip = load_clip(root, "graph_clip", "graph_tokenizer")
    parts |= {"graph_clip": clip["clip"], "graph_tokenizer": clip["clip_tokenizer"]}
    _check_fit({**parts, **{name: given[name] for name in PARTS if name in given}})
    return parts | {name: index[name] for name in ("resolution", "sampling_steps", "guidance", "provenance")}


def read_index(root: Path) -> dict[str, Any]:
    """model_index.json: each part's (library, class), and the settings with checked types. Raises `ModelError`."""
    index: dict[str, Any] = {"resolution": 512, "sampling_steps": 100, "guidance": 7.5, "provenance": None}
    index |= loading.read_json(root / _INDEX, _INDEX)
    with loading.border(_INDEX):
        if index.get("_class_name") != _CLASS:
            raise ModelError(
                f"_class_name is {shown(index.get('_class_name'))}; needed is {_CLASS}: the folder of a finished "
                "fine-tuning run"
            )
        for part in PARTS:
            optional = part in ("text_encoder", "tokenizer")
            entry = index.setdefault(part, [None, None] if optional else None)
            named = isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
            if not named and not (optional and entry == [None, None]):
                raise ModelError(f"{part} must be [library, class], not {shown(entry)}")
        for name, most in _MOST.items():
            value = index[name]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ModelError(f"{name} must be a whole number from 1 to {most}, not {shown(value)}")
        guidance = index["guidance"]
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 1 <= guidance <= 10_000:
            raise ModelError(f"guidance must be a number from 1 (none) to 10000, not {shown(guidance)}")
        provenance = index["provenance"]
        if provenance is not None and not (
            isinstance(provenance, dict)
            and all(isinstance(provenance.get(key, {}), dict) for key in ("settings", "metrics"))
        ):
            raise ModelError("provenance must be null or an object with the objects settings and metrics")
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


def _check_fit(parts: dict[str, Any]) -> None:
    """Raise `ModelError` if the conditioner was made for another UNet or CLIP."""
    encoder, width = parts["graph_encoder"].config, parts["graph_clip"].config.projection_dim
    wanted = {"context_dim": parts["unet"].config.cross_attention_dim, "name_dim": width, "image_dim": width}
    for name, value in wanted.items():
        if encoder.get(name, value) != value:
            raise ModelError(f"graph_encoder has {name} {encoder[name]}, but unet and graph_clip need {value}")
    reads_text = encoder.get("token_init") == "text" or "form" in encoder
    if reads_text and (parts["text_encoder"] is None or parts["tokenizer"] is None):
        raise ModelError("graph_encoder reads SD's text states, but the folder has no text_encoder and tokenizer")
