"""Shared by the tests of evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def owl(tmp_path_factory) -> Path:
    """A tiny OWL-ViT with random weights and the toy's tokenizer, as transformers saves it."""
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    from sgg_fast.toy.models import toy_tokenizer

    folder = tmp_path_factory.mktemp("owl")
    tokenizer = toy_tokenizer()
    tokenizer.model_max_length = 16
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = OwlViTConfig(
        text_config=text, vision_config={**size, "image_size": 48, "patch_size": 16}, projection_dim=32
    )
    torch.manual_seed(0)
    OwlViTForObjectDetection(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
