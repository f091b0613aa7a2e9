"""Attention maps: the layers' own weights, recorded beside the drawing; each map is a tile of the sheet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from sgg_fast.data.text_form import parse_text
from sgg_fast.drawing.explain import AttentionMaps, explain_sheet, token_labels

FLOCK = parse_text("sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; boat")


def test_attention_maps_are_the_layers_own_weights_and_leave_the_output_alone():
    """Against the definition, for the one cross-attention layer of a small UNet; the condition's half alone."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None, cross_attention_dim=16, attention_head_dim=8,
    ).eval()  # fmt: skip
    z, context = torch.randn(4, 4, 8, 8), torch.randn(4, 6, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1]] * 2 + [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    layer = next(module for name, module in unet.named_modules() if name.endswith("attn2"))
    seen = []
    layer.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain = unet(z, 5, context, encoder_attention_mask=mask).sample
        with AttentionMaps(unet, num_images=2, size=(8, 8)) as maps:
            recorded = unet(z, 5, context, encoder_attention_mask=mask).sample
    assert torch.equal(plain, recorded)
    assert not any(type(p).__name__ == "_Recorder" for p in unet.attn_processors.values())
    x, given = seen[0][2:], context[2:]
    expected = torch.zeros(2, 6, 64)
    width = 32 // layer.heads
    for b in range(2):
        for head in range(layer.heads):
            rows = slice(head * width, (head + 1) * width)
            query, key = x[b] @ layer.to_q.weight[rows].T, given[b] @ layer.to_k.weight[rows].T
            scores = (query @ key.T / width**0.5).masked_fill(~mask[2 + b], -torch.inf)
            expected[b] += scores.softmax(dim=-1).T.detach() / layer.heads
    torch.testing.assert_close(maps.maps(), expected.unflatten(2, (8, 8)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no cross-attention was recorded"):
        AttentionMaps(unet, 1, (8, 8)).maps()


def test_the_explain_sheet_heats_where_the_token_was_attended_to():
    labels = token_labels(FLOCK)
    assert [label for label, _ in labels[:3]] == ["sheep#1", "sheep#2", "grass"]
    assert labels[5] == ("sheep#1 left of sheep#2", 2) and labels[0][1] == 2 + 3
    maps = torch.full((20, 16, 16), 0.01)
    maps[labels[1][1], :, 8:] = 0.5  # sheep#2: the right half
    sheet = np.asarray(explain_sheet(Image.new("RGB", (64, 64), (90, 90, 90)), FLOCK, maps)).astype(int)
    tile = sheet[12 : 12 + 192, 12 + 2 * 204 : 12 + 2 * 204 + 192].mean(axis=2)
    assert tile[:, 130:].mean() > tile[:, :60].mean() + 60
