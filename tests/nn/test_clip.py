"""CLIP's towers: text states, pooled vectors and embeddings are those of diffusers and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from support.sd_folder import CLIP_WIDTH, CONTEXT, POOLED
from transformers import CLIPImageProcessor

from sgg_fast.nn.backbone import Backbone
from sgg_fast.nn.clip import embed_images, embed_names, normalise_pixels, token_ids

TEXTS = ["sheep standing on grass", "red hat", ""]


def test_v2s_states_are_stock_diffusers(kinds, foundations):
    stock = StableDiffusionPipeline.from_pretrained(kinds / "sd21", safety_checker=None)
    rows, last = foundations["sd21"].towers.read(TEXTS)
    expected, empty = stock.encode_prompt(TEXTS, "cpu", 1, True)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(rows[2], empty[0])
    assert stock.tokenizer.pad_token == "!" and stock.scheduler.config.prediction_type == "v_prediction"
    assert foundations["sd21"].scheduler.config.prediction_type == "v_prediction"
    assert last.shape == (3, CONTEXT) and not foundations["sd21"].empty_is_zero


def test_sdxls_rows_are_stock_diffusers_states_and_pooled_vectors(kinds, foundations):
    stock = StableDiffusionXLPipeline.from_pretrained(kinds / "sdxl")
    rows, last = foundations["sdxl"].towers.read(TEXTS)
    states, no_states, pooled, no_pooled = stock.encode_prompt(TEXTS, device="cpu", do_classifier_free_guidance=True)
    width = Backbone.of(stock.unet.config).context_dim
    torch.testing.assert_close(rows[..., :width], states)
    for row in rows.unbind(1):
        torch.testing.assert_close(row[:, width:], pooled)
    ends = [len(stock.tokenizer(text).input_ids) - 1 for text in TEXTS]
    torch.testing.assert_close(last, torch.stack([rows[i, end] for i, end in enumerate(ends)]))
    assert not no_states.any() and not no_pooled.any() and foundations["sdxl"].empty_is_zero
    assert foundations["sdxl"].towers.phrases([]).shape == (0, width + POOLED)


def test_ids_are_padded_and_cut_to_the_towers_length(foundations):
    words = foundations["sd21"].tokenizer
    ids = token_ids(words, ["red hat", "sheep " * 100], torch.device("cpu"))
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    short = words("red hat").input_ids
    assert ids[0].tolist() == short + [words.pad_token_id] * (77 - len(short))
    assert ids[1, -1] == words.eos_token_id and words.pad_token_id not in ids[1, :-1], "cut, with an end"


@torch.no_grad()
def test_names_are_clips_projected_texts_in_any_batches(foundations):
    """Each name by itself and without padding: the pooled state of the text tower, through its projection."""
    models, names = foundations["sd21"], ["sheep", "red hat", "grass"]
    found = embed_names(models.clip, models.clip_tokenizer, names, batch_size=2)
    assert found.shape == (3, CLIP_WIDTH) and found.dtype == torch.float32
    for row, name in zip(found, names, strict=True):
        ids = torch.tensor([models.clip_tokenizer(name).input_ids])
        expected = models.clip.text_projection(models.clip.text_model(ids).pooler_output)
        torch.testing.assert_close(row, expected[0], rtol=1e-4, atol=1e-5)


def test_phrases_are_the_last_states_in_any_batches(foundations):
    towers = foundations["sdxl"].towers
    assert towers.to(torch.device("cpu")) is towers
    found = towers.phrases(TEXTS, batch_size=2)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, towers.read(TEXTS)[1].half(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(32, 32), (48, 80)])
def test_pixels_are_those_of_transformers_processor(foundations, shape):
    """At the tower's resolution the same numbers; of another one the same picture, resized by another library."""
    clip = foundations["sd21"].clip
    ramp = np.linspace(0, 255, shape[0] * shape[1] * 3).reshape(*shape, 3).astype(np.uint8)
    processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    expected = processor(Image.fromarray(ramp), return_tensors="pt").pixel_values
    pixels = torch.from_numpy(ramp).permute(2, 0, 1)[None] / 127.5 - 1
    tolerance = 1e-5 if shape == (32, 32) else 0.03
    torch.testing.assert_close(normalise_pixels(clip, pixels), expected, rtol=0, atol=tolerance)


def test_images_are_clips_projected_pictures_and_pull_at_their_pixels(foundations):
    clip = foundations["sd21"].clip
    pixels = (0.5 * torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))).requires_grad_()
    found = embed_images(clip, pixels)
    state = clip.vision_model(normalise_pixels(clip, pixels)).pooler_output
    torch.testing.assert_close(found, clip.visual_projection(state))
    found[0].sum().backward()
    assert pixels.grad[0].abs().sum() > 0 and not pixels.grad[1].any()
