"""The files beside a saved pipeline: a model card (README.md) and the loader of stock diffusers (pipeline.py).

The card describes the weights, their training, their licence and the missing measurements. Its source is the pipeline's
`provenance` in model_index.json, which the function `provenance` makes from the settings of a run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sgg_fast.config import SETTINGS, Config

KNOWN_LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
}
"""Licences of the base weights, by hub id; the card of a folder names its own licence."""

SHEET = "samples.png"
"""File of the last sample sheet, beside the card."""

_LOADER = '''"""Lets stock diffusers load this folder; the classes are those of the installed package sgg_fast."""

from sgg_fast.pipeline import SceneGraphToImagePipeline

__all__ = ["SceneGraphToImagePipeline"]
'''
_HEADER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^license: *([\w.-]+) *$", re.MULTILINE)


def provenance(
    config: Config, base: str, metrics: dict[str, float] | None = None, figures: dict[str, float] | None = None
) -> dict[str, Any]:
    """Facts of a run for the card: settings, base weights and their licence; JSON values only.

    base: folder, hub id or description of the base model. metrics: measured numbers by name, if any.
    figures: numbers of the training by name, such as its last losses.
    """
    is_folder = Path(base).is_dir()
    data = config.data.source
    return {
        "recipe": config.run.recipe,
        "data": Path(data).name if os.sep in data else data,  # a card contains no local paths
        "base": Path(base).resolve().name if is_folder else base,
        "base_licence": _base_licence(base),
        "settings": dict(
            setting.shown(config)
            for setting in SETTINGS.values()
            if setting.rules.in_card and setting.has_effect(config)
        ),
        "metrics": dict(metrics or {}),
        **({"figures": dict(figures)} if figures else {}),
    }


def _base_licence(base: str) -> str:
    """An SPDX-like name, "" if unknown."""
    if base.startswith("toy models"):
        return "apache-2.0"
    card = Path(base) / "README.md"
    if card.is_file():
        header = _HEADER.match(card.read_text(encoding="utf-8", errors="replace"))
        found = _LICENCE.search(header.group(1)) if header else None
        return found.group(1) if found else ""
    return KNOWN_LICENCES.get(base, "")


def write_card(pipeline: Any, folder: str | os.PathLike) -> None:
    """Write README.md and pipeline.py to `folder`."""
    sheet = SHEET if (Path(folder) / SHEET).is_file() else ""
    card = model_card(pipeline.config, pipeline.graph_encoder.config, sheet)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")
    (Path(folder) / "pipeline.py").write_text(_LOADER, encoding="utf-8")


def model_card(config: Any, encoder: Any, sheet: str = "") -> str:
    """The card of a pipeline with this configuration and conditioner. sheet: file of samples beside it, if any."""
    told = config.get("provenance") or {}
    licence, base = told.get("base_licence", ""), told.get("base", "")
    header = ["---", f"license: {licence or 'unknown'}", "library_name: diffusers", "pipeline_tag: text-to-image"]
    is_lora = bool(told.get("settings", {}).get("lora"))
    if base in KNOWN_LICENCES:
        header += [f"base_model: {base}", *(["base_model_relation: adapter"] if is_lora else [])]
    header += ["tags:", "- scene-graph-to-image", "- stable-diffusion", "- sgg-ig", *(["- lora"] if is_lora else [])]
    header.append("---")
    parts = [
        "\n".join(header),
        "# Scene graph to image (SGG-IG)",
        "Draws pictures from scene graphs: objects by name, relations between them. The method is that of Wang et al., "
        "*Scene Graph-Grounded Image Generation* (AAAI-25), reimplemented in `sgg_fast`; not the authors' weights.",
        _LORA_USE if is_lora else _USE,
        "## Training\n\n" + _training(told, sheet),
        "## Vocabulary\n\n" + _vocabulary(encoder),
        "## Measured\n\n" + _metrics(told.get("metrics") or {}),
        "## Licence\n\n" + _licence(licence, base),
    ]
    return "\n\n".join(parts) + "\n"


_USE = """## Use

    python infer.py "sheep standing on grass; sky above grass" --model THIS_FOLDER

```python
from sgg_fast import SceneGraph
from sgg_fast.pipeline import SceneGraphToImagePipeline

pipe = SceneGraphToImagePipeline.from_pretrained("THIS_FOLDER")
graph = SceneGraph(("sheep", "grass", "sky"), ((0, "standing on", 1), (2, "above", 1)))
pipe(graph).images[0].save("sheep.png")
```

Without importing it by name, with `sgg_fast` installed:
`DiffusionPipeline.from_pretrained("THIS_FOLDER", custom_pipeline="THIS_FOLDER", trust_remote_code=True)`.
The UNet alone loads in stock diffusers: `UNet2DConditionModel.from_pretrained("THIS_FOLDER", subfolder="unet")`."""


_LORA_USE = """## Use

This is a LoRA: adapters of the base's UNet in diffusers' file, and the graph encoder that was trained with them. The
base is not here.

    python infer.py "sheep standing on grass; sky above grass" --model THIS_FOLDER --base BASE

In a pipeline of sgg_fast `pipe.load_lora_weights("THIS_FOLDER")` loads both. In stock diffusers
`DiffusionPipeline.from_pretrained(BASE).load_lora_weights("THIS_FOLDER")` loads the adapters alone, whose context is
then text."""


def _training(told: dict[str, Any], sheet: str) -> str:
    if not told:
        return "This folder does not say how its weights were trained."
    rows = {"recipe": told["recipe"], "data": told["data"], "base weights": told["base"], **told["settings"]}
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()]
    parts = ["\n".join(["| | |", "|---|---|", *lines])]
    if figures := told.get("figures"):
        lines = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
        parts.append("\n".join(["| at the end of training | |", "|---|---|", *lines]))
    if sheet:
        parts.append(f"Training pictures above, pictures drawn from the same graphs at the end below:\n\n![]({sheet})")
    return "\n\n".join(parts)


def _vocabulary(encoder: Any) -> str:
    names = len(encoder.trained_names)
    return (
        f"Open: names are read by CLIP's text tower. {names} names and predicates occurred in training; expect little "
        "of others. Pictures show what the training data showed, its gaps and biases included."
    )


def _metrics(metrics: dict[str, float]) -> str:
    if not metrics:
        return (
            "Nothing. Not measured for these weights: FID, IS, how well pictures follow their graphs, and any "
            "comparison with other systems."
        )
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join(["| | |", "|---|---|", *rows, "", "What does not stand here was not measured."])


def _licence(licence: str, base: str) -> str:
    if licence:
        return (
            f"The base weights{f' ({base})' if base else ''} are under `{licence}`; what is derived from them is too."
        )
    return (
        f"That of the base weights{f' ({base})' if base else ''}, which is not known here: look it up before you share "
        "or use these."
    )
