"""Adapters in diffusers' file: written by us and read by diffusers, and back; what is no such file is one line."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.nn.unets import randn, sd_unet
from torch import nn

from sgg_fast.nn import loading, lora
from sgg_fast.nn.loading import ModelError


@torch.no_grad()
def predicted(unet: nn.Module) -> torch.Tensor:
    return unet(randn(0, 1, 4, 8, 8), 500, randn(1, 1, 6, 12)).sample


@pytest.fixture
def adapted() -> UNet2DConditionModel:
    """A UNet with adapters of rank 2 that change its prediction."""
    unet = sd_unet()
    lora.add_adapters(unet, 2, "attention")
    for k, (name, parameter) in enumerate(unet.named_parameters()):
        if ".lora_B" in name:
            parameter.data = randn(k, *parameter.shape)
    return unet


def test_what_is_saved_is_read_by_diffusers_and_by_us(adapted, tmp_path):
    lora.save_adapters(adapted.half(), tmp_path)
    adapted.float()
    assert {tensor.dtype for tensor in load_file(tmp_path / lora.WEIGHTS).values()} == {torch.float32}
    stock = sd_unet()
    stock.load_lora_adapter(str(tmp_path), prefix="unet", weight_name=lora.WEIGHTS)
    for source in (tmp_path, tmp_path / lora.WEIGHTS, load_file(tmp_path / lora.WEIGHTS)):
        ours = sd_unet()
        lora.load_adapters(ours, source if isinstance(source, dict) else str(source))
        assert torch.equal(predicted(ours), predicted(stock))
    torch.testing.assert_close(predicted(stock), predicted(adapted), rtol=1e-2, atol=1e-2)
    assert (predicted(stock) - predicted(sd_unet())).abs().max() > 0.05


def test_adapters_of_other_models_are_left_out_with_a_warning_or_refused_alone(adapted, tmp_path, caplog):
    lora.save_adapters(adapted, tmp_path)
    state = load_file(tmp_path / lora.WEIGHTS)
    text = {
        "text_encoder.q_proj.lora_A.weight": torch.zeros(2, 4),
        "text_encoder.q_proj.lora_B.weight": torch.zeros(4, 2),
    }
    unet = sd_unet()
    lora.load_adapters(unet, {**state, **text})
    assert "2 adapter weights are not the UNet's and are left out" in caplog.text
    torch.testing.assert_close(predicted(unet), predicted(adapted))
    for others in (text, {}, {"unet.conv_in.weight": torch.zeros(1)}):
        with pytest.raises(ModelError, match=r"^adapters: ") as caught:
            lora.load_adapters(sd_unet(), others)
        assert "\n" not in str(caught.value)


def test_a_file_that_was_changed_after_its_export_is_refused(adapted, tmp_path):
    lora.save_adapters(adapted, tmp_path)
    loading.seal(tmp_path)
    lora.load_adapters(sd_unet(), str(tmp_path))
    path = tmp_path / lora.WEIGHTS
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ModelError, match=rf"^adapters: {lora.WEIGHTS}: "):
        lora.load_adapters(sd_unet(), str(tmp_path))
