"""Counts of each backbone's UNet: operations against a run of its modules, launches of its stock and fused forms."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from support.cases.benchmark import SMALL_UNET

from benchmarks.counts import backbones
from benchmarks.counts.unet import BATCH, CONTEXT, FORMS, count
from sgg_fast.train.memory.sizes import PUBLISHED


@pytest.fixture
def small(monkeypatch) -> str:
    monkeypatch.setitem(PUBLISHED, "small", SMALL_UNET)
    return "small"


def operations_of_modules() -> tuple[int, int]:
    """(all, those of layers whose input needs no gradient) of a true forward, by the shapes that each module saw."""
    unet, seen, first = UNet2DConditionModel.from_config(SMALL_UNET.unet), [], []

    def see(module, given, out):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(2 * out.numel() * math.prod(module.weight.shape[1:]))
        elif isinstance(module, torch.nn.Linear):
            seen.append(2 * out.numel() * module.in_features)
        if module is unet.conv_in or module is unet.time_embedding.linear_1:
            first.append(seen[-1])

    def attend(module, given, named, out):
        queries = given[0].flatten(2).shape[1]
        keys = queries if named.get("encoder_hidden_states") is None else named["encoder_hidden_states"].shape[1]
        seen.append(2 * 2 * len(out) * queries * keys * module.inner_dim)

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(see)
        elif isinstance(module, Attention):
            module.register_forward_hook(attend, with_kwargs=True)
    side = SMALL_UNET.resolution // 8
    context = torch.randn(BATCH, CONTEXT, SMALL_UNET.unet["cross_attention_dim"])
    with torch.no_grad():
        unet(torch.randn(BATCH, 4, side, side), 5, context)
    return sum(seen), sum(first)


def test_operations_are_those_of_the_modules_and_twice_as_many_backward(small):
    forward, both = backbones.operations(small)
    expected, without_input = operations_of_modules()
    assert forward == expected
    assert both == 3 * expected - without_input


def test_a_row_of_a_backbone(small, capsys):
    assert backbones.main(["--names", small]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    cells = row.strip("| ").split(" | ")
    assert len(cells) == len(header.strip("|").split("|"))
    assert cells[:2] == ["Small UNet", "64"]
    unet = UNet2DConditionModel.from_config(SMALL_UNET.unet)
    assert cells[2] == f"{sum(p.numel() for p in unet.parameters()):,}"
    stock, fused = (int(cell.split(" / ")[0].replace(",", "")) for cell in cells[4:6])
    assert stock == sum(counter.total.launches for counter in count(FORMS[0], 8, False, small)) > fused
    modules, gemms = map(int, cells[6].split(" + "))
    # A self-attention each of two blocks, all cross-attentions together, all time projections together.
    blocks = sum(name.endswith("attn1") for name, _ in unet.named_modules())
    assert gemms == blocks + 2 and modules > blocks
