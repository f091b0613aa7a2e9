"""What ZeRO 1 and 2 allocate in order, by hand: flat groups and masters, an update's temporaries, state made once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from support import ROOT

from sgg_fast.recipes import recipe
from sgg_fast.train.engines.choose import plan_engine
from sgg_fast.train.memory import zero
from sgg_fast.train.memory.allocator import MIB, CachingAllocator
from sgg_fast.train.memory.parts import EngineLayout, WeightGroup

GROUPS = [WeightGroup((8 * MIB, 8 * MIB), 8, torch.bfloat16), WeightGroup((16 * MIB,), 32, torch.bfloat16)]
ORDER = [(8 * MIB, 0), (16 * MIB, 1), (8 * MIB, 0)]


def layout(path: str = "ds.json") -> EngineLayout:
    config = recipe("vg256")
    ds = plan_engine(config.optim, "finetune", torch.device("cuda"), str(ROOT / path))
    return EngineLayout(config.optim, config.model.kernels, "cuda", ds)


def keys():
    return itertools.count(-1, -1)


def test_setting_up_leaves_flat_weights_and_masters():
    """Of 32 Mi weights: 64 MiB flat in bf16 and 128 in fp32, in segments of those that moved there first."""
    allocator = CachingAllocator()
    zero.set_up(allocator, layout(), GROUPS, ORDER, keys())
    assert sorted(block.size // MIB for block in allocator._live.values()) == [32, 32, 64, 64]
    assert allocator.reserved >= 192 * MIB
    assert allocator.peak >= (128 + 32) * MIB, "all weights in fp32, and the first ones in bf16 beside them"
    offloaded = CachingAllocator()
    zero.set_up(offloaded, layout("configs/ds_offload.json"), GROUPS, ORDER, keys())
    assert [block.size // MIB for block in offloaded._live.values()] == [32, 32]


def test_an_update_takes_a_group_at_a_time_and_makes_the_state_once():
    numel = 16 * MIB
    later = [("flat", 2 * numel), ("in fp32", 4 * numel), ("flat", -1), ("in fp32", -1)]
    assert zero.update(layout(), GROUPS, keys(), first=False) == later * 2
    in_8_bits, in_32_bits = numel + numel // 64, 4 * numel
    state = [[(-1, in_8_bits), (-2, in_8_bits)], [(-3, in_32_bits), (-4, in_32_bits)]]
    assert zero.update(layout(), GROUPS, keys(), first=True) == [
        event for made in state for event in [*later[:3], *made, later[3]]
    ]
    assert zero.update(layout("configs/ds_offload.json"), GROUPS, keys(), first=True) == []
    halved = zero.update(replace(layout(), world_size=2), GROUPS, keys(), first=False)
    assert halved[0] == ("flat", numel)
