"""The toy's foundation: Stable Diffusion's own classes in miniature (AutoencoderKL, UNet2DConditionModel, CLIP, DDIM).

The architecture is SD v1's scaled down, so code that runs here also runs there. There are two foundations, that of
`toy` and the wide one of `toy-words`. Weights come from `weights/`, or from `pipeline/` if the shipped model has the
same ones; `sgg_fast/toy/build.py` made them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.loading import MANIFEST, border, check, load_weights

from . import world

WIDTH = 128
"""C of the toy: cross-attention width, and CLIP's hidden and projection width."""

WEIGHTS = Path(__file__).parent / "weights"
"""fp16 safetensors of the foundation's parts that the shipped model does not contain, and of the judging networks."""


_PIPELINE = WEIGHTS.with_name("pipeline")
_SHARED = {"vae": _PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"}
_OWN_OF_WIDE = {
    "clip": _PIPELINE / "graph_clip" / "model.safetensors",
    "unet": WEIGHTS / "unet_words.safetensors",
}


def weight_file(part: str, folder: Path = WEIGHTS, wide: bool = False) -> Path:
    """fp16 safetensors of a part; `wide`: of the foundation of `toy-words`.

    What the shipped model has unchanged is stored there only: the VAE, and the CLIP of `toy-words`. A part without a
    file keeps its random weights.
    """
    shipped = {**_SHARED, **(_OWN_OF_WIDE if wide else {})} if folder == WEIGHTS else {}
    return shipped.get(part, folder / f"{part}.safetensors")


TOKENIZER, SPOKEN_TOKENIZER = WEIGHTS / "tokenizer", _PIPELINE / "tokenizer"
"""The tokenizers of the CLIP of `toy` and of `toy-words`; these are their only copies."""

START, END = "<|startoftext|>", "<|endoftext|>"


def toy_tokenizer(folder: Path = TOKENIZER) -> CLIPTokenizer:
    """The tokenizer in `folder`: CLIP's byte-level BPE with the toy's words; any other string becomes bytes."""
    return CLIPTokenizer.from_pretrained(folder)


def make_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer in which each of `words` is one token.

    The same words give the same merges. A trained BPE does not: its library breaks ties differently from call to call.
    """  # fmt: skip
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        pieces = _pieces([*word[:-1], f"{word[-1]}</w>"], {pair: rank for rank, pair in enumerate(merges)})
        while len(pieces) > 1:  # appended to the existing merges, so those keep their results
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges), START, END]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(made))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _pieces(pieces: list[str], rank: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of a word after the merges, the earliest merge first."""
    while True:
        pairs = [pair for pair in itertools.pairwise(pieces) if pair in rank]
        if not pairs:
            return pieces
        best = min(pairs, key=rank.__getitem__)
        k = 0
        while k < len(pieces) - 1:
            if (pieces[k], pieces[k + 1]) == best:
                pieces = [*pieces[:k], "".join(best), *pieces[k + 2 :]]
            k += 1


def toy_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """CLIP with both towers in miniature, projection width 128; it replaces CLIP ViT-B/32."""
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_factor": 2.0,
    }
    text = {
        **size,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**size, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def toy_vae() -> AutoencoderKL:
    """SD's autoencoder scaled down, f4 with 4 channels: 64 x 64 pixels are 16 x 16 latents."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def toy_unet(wide: bool = False) -> UNet2DConditionModel:
    """SD v1's UNet scaled down to 16 x 16 latents; cross-attention at 16 x 16, 8 x 8 and in the middle block.

    `wide`: twice the channels; attention has one head, and only at 8 x 8 and in the middle block. It denoises better at
    equal CPU time; `toy-words` uses it.
    """
    own: dict[str, Any] = {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    }
    if wide:
        own = {
            "block_out_channels": (64, 96, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 1,
        }
    return UNet2DConditionModel(
        sample_size=16, layers_per_block=1, cross_attention_dim=WIDTH, norm_num_groups=16, **own
    )


def toy_scheduler() -> DDIMScheduler:
    """SD's noise schedule with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def toy_foundation(seed: int = 0, weights: Path | None = WEIGHTS, wide: bool = False) -> Foundation:
    """Every part, with weights from the folder `weights` if the file exists, else random ones from `seed`.

    wide: the foundation of `toy-words`, with the wide UNet of `toy_unet`. A folder other than `WEIGHTS` may have a
    tokenizer of its own.
    """
    merges = SPOKEN_TOKENIZER if wide else TOKENIZER
    if weights and weights != WEIGHTS and (weights / "tokenizer").is_dir():
        merges = weights / "tokenizer"
    tokenizer, clip_tokenizer = toy_tokenizer(merges), toy_tokenizer(merges)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"unet": toy_unet(wide), "vae": toy_vae(), "clip": toy_clip(clip_tokenizer)}
    if weights and (weights / MANIFEST).is_file():
        with border(str(weights)):
            check(weights)
    files = {name: weight_file(name, weights, wide) for name in parts} if weights else {}
    found = [name for name, file in files.items() if file.is_file()]
    for name in found:
        load_weights(files[name], parts[name], f"train it by `python -m sgg_fast.toy.build {name}`")
    # As in SD: the text encoder is CLIP's text tower.
    text_encoder = CLIPTextModel(parts["clip"].config.text_config)
    text_encoder.load_state_dict(parts["clip"].text_model.state_dict())
    _unit_latents(parts["vae"])
    trained = f"trained: {', '.join(found)}" if found else "random weights"
    return Foundation(
        unet=parts["unet"],
        vae=parts["vae"],
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=toy_scheduler(),
        clip=parts["clip"],
        clip_tokenizer=clip_tokenizer,
        source=f"toy models ({trained})",
    ).freeze()


@torch.no_grad()
def _unit_latents(vae: AutoencoderKL) -> None:
    """Set the VAE's scaling factor so latents of toy scenes have unit variance, like SD's 0.18215."""
    images = np.stack([world.draw_scene(0, i).image for i in range(16)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    posterior = vae.encode(pixels).latent_dist
    vae.register_to_config(scaling_factor=float((posterior.mean.var() + posterior.var.mean()).rsqrt()))
