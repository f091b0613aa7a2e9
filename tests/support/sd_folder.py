"""Stable Diffusion v1.4, v2.1, SDXL base and CLIP ViT-B/32 as their diffusers and transformers folders, scaled down,
random weights.

Architecture, class names and configuration follow the published folders; only widths, depths and sizes are smaller.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.toy.models import toy_tokenizer

CONTEXT = 24
FULL_CONTEXT = 768
CLIP_WIDTH = 16
POOLED = 20

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 8,
}

_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A published model, scaled down: what differs from Stable Diffusion v1.4."""

    pipeline: str
    """Class in model_index.json."""
    unet: dict[str, Any]
    scheduler: SchedulerMixin
    texts: tuple[dict[str, Any], ...] = ({"hidden_size": CONTEXT},)
    """The text encoders; the second has a projection."""
    pads: tuple[str, ...] = ("<|endoftext|>",)
    """Pad token of each tokenizer."""
    vae: dict[str, Any] = dataclasses.field(default_factory=dict)
    index: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further entries of model_index.json."""


KINDS = {
    "sd14": Kind(
        "StableDiffusionPipeline",
        {**UNET, "block_out_channels": (16, 32, 64, 64), "cross_attention_dim": CONTEXT},
        PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1),
    ),
    "sd21": Kind(
        "StableDiffusionPipeline",
        {
            **UNET,
            "block_out_channels": (16, 32, 64, 64),
            "cross_attention_dim": CONTEXT,
            "attention_head_dim": (1, 2, 4, 4),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        DDIMScheduler(
            **_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
        ({"hidden_size": CONTEXT, "num_hidden_layers": 3, "hidden_act": "gelu"},),
        ("!",),
    ),
    "sdxl": Kind(
        "StableDiffusionXLPipeline",
        {
            **UNET,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32, 64),
            "transformer_layers_per_block": (1, 2, 4),
            "cross_attention_dim": CONTEXT + 32,
            "attention_head_dim": (1, 2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
        },
        EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading"),
        ({"hidden_size": CONTEXT}, {"hidden_size": 32, "hidden_act": "gelu", "projection_dim": POOLED}),
        ("<|endoftext|>", "!"),
        {"scaling_factor": 0.13025},
        {"force_zeros_for_empty_prompt": True},
    ),
}
"""Tests' models by name; SDXL's 10 transformer layers are 4."""


def _save_tokenizer(tokenizer: CLIPTokenizer, folder: Path, pad: str = "<|endoftext|>") -> None:
    """As published: vocab.json, merges.txt, special_tokens_map.json and tokenizer_config.json."""
    folder.mkdir(parents=True)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    start, end = "<|startoftext|>", "<|endoftext|>"
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _text_config(tokenizer: CLIPTokenizer, width: int) -> dict[str, object]:
    """With the token ids that the published folders carry, which are not the tokenizer's."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": CLIP_WIDTH,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _full_unet() -> UNet2DConditionModel:
    """All 859 520 964 weights, in bf16, drawn so that activations keep their size; made without a second copy."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET, sample_size=64, block_out_channels=(320, 640, 1280, 1280),
                                    cross_attention_dim=FULL_CONTEXT, norm_num_groups=32)  # fmt: skip
    unet = unet.bfloat16().to_empty(device="cpu")
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
    return unet


def write_sd(folder: Path, full_size: bool = False, kind: str = "sd14") -> Path:
    """The parts of a published folder and model_index.json. kind: key of `KINDS`; `full_size`: the UNet is SD v1.4's
    own."""
    torch.manual_seed(0)
    tokenizer, own = toy_tokenizer(), KINDS[kind]
    unet = _full_unet() if full_size else UNet2DConditionModel(**own.unet, sample_size=8, norm_num_groups=16)
    unet.save_pretrained(folder / "unet")
    AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        **own.vae,
    ).save_pretrained(folder / "vae")
    width = {"hidden_size": FULL_CONTEXT, "intermediate_size": 4 * FULL_CONTEXT} if full_size else {}
    towers = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for (name, tower), text in zip(towers.items(), own.texts, strict=False):
        config = {**_text_config(tokenizer, text["hidden_size"]), **text, **width}
        tower(CLIPTextConfig(**config)).save_pretrained(folder / name)
    for name, pad in zip(("tokenizer", "tokenizer_2"), own.pads, strict=False):
        _save_tokenizer(tokenizer, folder / name, pad)
    own.scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": own.pipeline,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{name: ["transformers", tower.__name__] for name, tower in list(towers.items())[: len(own.texts)]},
        **{name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")[: len(own.pads)]},
        "scheduler": ["diffusers", type(own.scheduler).__name__],
        "feature_extractor": [None, None],
        **({"safety_checker": [None, None]} if len(own.texts) == 1 else {"image_encoder": [None, None]}),
        **own.index,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_clip(folder: Path) -> Path:
    """A CLIP with both towers; its widths are not Stable Diffusion's, as ViT-B/32's are not."""
    torch.manual_seed(1)
    tokenizer = toy_tokenizer()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 16, "projection_dim": CLIP_WIDTH}  # fmt: skip
    config = CLIPConfig(text_config=_text_config(tokenizer, 32), vision_config=vision, projection_dim=CLIP_WIDTH)
    CLIPModel(config).save_pretrained(folder)
    _save_tokenizer(tokenizer, folder / "staging")
    for path in (folder / "staging").iterdir():
        path.rename(folder / path.name)
    (folder / "staging").rmdir()
    return folder


def write_pairs(folder: Path) -> Path:
    """Four photographs of noise in three formats and shapes, each with its graph."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width, ending) in enumerate([(70, 90, "png"), (96, 64, "jpg"), (64, 64, "webp"), (40, 200, "png")]):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"p{i}.{ending}")
        names, relations = ["sky", "sheep", "grass"][: i % 3 + 1], [[0, "above", 1]] if i % 3 else []
        (folder / f"p{i}.json").write_text(json.dumps({"objects": names, "relationships": relations}))
    return folder


def write_pipeline(folder: Path, kind: str = "sd14") -> Path:
    """`folder`/pipeline, sealed; the base models lie beside it in sd and clip."""
    foundation = load_foundation(str(write_sd(folder / "sd", kind=kind)), str(write_clip(folder / "clip")))
    torch.manual_seed(2)
    backbone = foundation.backbone
    encoder = SceneGraphConditioner(
        name_dim=CLIP_WIDTH, image_dim=CLIP_WIDTH, context_dim=backbone.context_dim, width=16, num_layers=1,
        token_init="text", trained_names=("__image__", "__in_image__", "sheep", "grass", "above"),
        pooled_dim=backbone.pooled_dim,
    )  # fmt: skip
    SceneGraphToImagePipeline(
        **foundation.pipeline_parts(), graph_encoder=encoder, resolution=64, sampling_steps=2, guidance=3.0,
        force_zeros_for_empty_prompt=foundation.empty_is_zero,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"
