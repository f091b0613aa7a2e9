"""The toy's foundation: Stable Diffusion's own classes in miniature, with random weights from a fixed seed.

Nothing here is trained: pictures from these weights are textures, not scenes. The architecture is SD v1's scaled
down (AutoencoderKL f4 with 4 channels, text-conditioned UNet, CLIP with both towers), so code that runs here runs there.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from sgg_fast.nn.foundation import Foundation

from . import world

START, END = "<|startoftext|>", "<|endoftext|>"


def toy_tokenizer() -> CLIPTokenizer:
    """CLIP's own byte-level BPE with merges learned from the toy's words; any other string falls into bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    words = sorted({word for name in world.vocabulary() for word in name.split()} | {"image", "in"})
    bpe.train_from_iterator(words, trainer)
    learned = [tuple(pair) for pair in _merges(bpe)]
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in learned), START, END]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=77)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(bpe.to_str())["model"]["merges"]


def _text_config(tokenizer: CLIPTokenizer, width: int) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_factor": 2.0,
    }


def toy_unet(width: int = 128) -> UNet2DConditionModel:
    """SD v1's UNet scaled down: 64 x 64 pixels are 16 x 16 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def toy_foundation(seed: int = 0, width: int = 128) -> Foundation:
    """Every part with random weights from `seed`; `width` is C and CLIP's projection width."""
    tokenizer, clip_tokenizer = toy_tokenizer(), toy_tokenizer()
    text, vision = _text_config(tokenizer, width), CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=4, image_size=64, patch_size=8, initializer_factor=2.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_config = CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=width)
        foundation = Foundation(
            unet=toy_unet(width),
            vae=AutoencoderKL(
                block_out_channels=(16, 32, 32),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                latent_channels=4,
                norm_num_groups=8,
                sample_size=64,
            ),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            tokenizer=tokenizer,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),  # fmt: skip
            clip=CLIPModel(clip_config),
            clip_tokenizer=clip_tokenizer,
            source="toy models with random weights",
        ).freeze()
    _unit_latents(foundation.vae)
    return foundation


@torch.no_grad()
def _unit_latents(vae: AutoencoderKL) -> None:
    """Set the VAE's scaling factor so that latents of toy scenes have unit variance, as SD's 0.18215 does."""
    images = np.stack([world.draw_scene(0, i).image for i in range(16)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    vae.register_to_config(scaling_factor=1 / float(vae.encode(pixels).latent_dist.mean.std()))
