"""The three kinds of Stable Diffusion, and what their UNets read beside latents, time and text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from support.sd_folder import POOLED

from sgg_fast.nn.backbone import Backbone, added
from sgg_fast.train.memory.sizes import PUBLISHED


def test_published_sizes_are_told_apart_by_their_configurations():
    found = {name: dataclasses.astuple(Backbone.of(sizes.unet)) for name, sizes in PUBLISHED.items()}
    assert found == {
        "sd": ("Stable Diffusion v1", 768, 0),
        "sd21": ("Stable Diffusion v2", 1024, 0),
        "sdxl": ("SDXL", 2048, 1280),
    }
    for sizes in PUBLISHED.values():
        assert sum(text["hidden_size"] for text in sizes.texts) == Backbone.of(sizes.unet).context_dim


def test_sizes_are_those_that_stock_diffusers_passes(kinds):
    stock = StableDiffusionXLPipeline.from_pretrained(kinds / "sdxl")
    expected = stock._get_add_time_ids((1024, 768), (0, 0), (1024, 768), torch.float32, POOLED)
    found = Backbone.of(stock.unet.config).sizes(1024, 768, 2, "cpu")
    assert torch.equal(found, expected.expand(2, -1))


@torch.no_grad()
def test_a_unet_is_called_with_what_stock_diffusers_adds(kinds, foundations):
    """The pooled vector of the text and the sizes, of a drawing by stock diffusers."""
    stock, seen = StableDiffusionXLPipeline.from_pretrained(kinds / "sdxl"), []
    stock.set_progress_bar_config(disable=True)
    stock.unet.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    stock("red hat", num_inference_steps=1, guidance_scale=1.0, height=64, width=32, output_type="latent")
    backbone = foundations["sdxl"].backbone
    pooled = foundations["sdxl"].towers.read(["red hat"])[0][:, 0, backbone.context_dim :]
    found, expected = added(pooled, backbone.sizes(64, 32, 1, "cpu")), seen[0]["added_cond_kwargs"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert added(None, backbone.sizes(64, 32, 1, "cpu")) is None and added(pooled, None) is None


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_a_row_of_the_text_encoders_has_the_width_that_the_unet_reads(foundations, kind):
    models = foundations[kind]
    assert models.backbone.num_towers == len(models.text_encoders) == (2 if kind == "sdxl" else 1)
    assert models.towers.read(["red hat"])[0].shape[-1] == models.backbone.row_dim


def test_sizes_of_a_cropped_picture_name_its_original():
    found = Backbone("SDXL", 2048, 1280).sizes(512, 768, 2, "cpu", original=(600, 900), crop=(44, 7))
    assert found.tolist() == [[600, 900, 44, 7, 512, 768]] * 2
