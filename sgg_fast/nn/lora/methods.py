"""The LoRA methods of the pipeline, with diffusers' names and arguments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin

from sgg_fast.nn import loading, lora
from sgg_fast.nn.fuse import unfuse
from sgg_fast.nn.pipeline_parts import check_fit, load_conditioner

_ENCODER = "graph_encoder"


class LoraMethods(StableDiffusionLoraLoaderMixin):
    """`load_lora_weights` and its relatives for a pipeline with a `unet` and a `graph_encoder`.

    Adapters go to the UNet only. The next call fuses the UNet around them.
    """

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Add adapters from a file, a folder, a hub id or a state dict of diffusers' or kohya's names.

        The folder of a LoRA run also holds the graph encoder that was trained with the adapters; it replaces the
        pipeline's. Adapters of text encoders are left out, with a warning. Raises `ModelError`.
        """
        source = pretrained_model_name_or_path_or_dict
        unfuse(self.unet)
        is_place = isinstance(source, str | os.PathLike)
        with loading.border(f"{source if is_place else 'state dict'}: its adapters cannot be loaded"):
            encoder = None
            if is_place and (Path(source) / _ENCODER).is_dir():
                loading.check(Path(source))
                encoder = load_conditioner(Path(source), _ENCODER)
                check_fit({**self.components, _ENCODER: encoder})
            lora.load_adapters(self.unet, source, adapter_name, **kwargs)
        if encoder is not None:
            encoder = encoder.to(self.graph_encoder.device)
            same = encoder.dtype == self.graph_encoder.dtype
            self.register_modules(graph_encoder=encoder if same else encoder.to(self.graph_encoder.dtype))

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Remove all adapters. A graph encoder that came with them stays."""
        unfuse(self.unet)
        super().unload_lora_weights(*args, **kwargs)

    def _write_lora(self, folder: Path, base: dict[str, str]) -> None:
        """Write adapters, graph encoder and a model_index.json that names the base."""
        lora.save_adapters(self.unet, folder)
        self.graph_encoder.save_pretrained(folder / _ENCODER)
        self.save_config(folder)
        index = folder / "model_index.json"
        content = {**json.loads(index.read_text(encoding="utf-8")), "base": base}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
