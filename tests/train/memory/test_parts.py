"""Memory arithmetic of the engines on the published UNet: bytes a weight, what an update needs, buckets, offload."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sgg_kernels.reference.adam import BLOCK
from support import DS_JSON, ROOT
from torch import nn

from sgg_fast.recipes import recipe
from sgg_fast.train.engines.choose import plan_engine
from sgg_fast.train.memory.parts import (
    EngineLayout,
    WeightGroup,
    address_bytes,
    bucket_blocks,
    gradient_bytes,
    in_backward_bytes,
    resident_blocks,
    resident_parts,
    state_bytes,
    update_bytes,
)
from sgg_fast.train.memory.planner import Planner
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.groups import STATES, parameter_groups

SD_WEIGHTS = 859_520_964


@pytest.fixture(scope="module")
def sd():
    return Planner(recipe("vg256"))


def unet_groups(sd, dtype, most=math.inf):
    module = nn.Module()
    module.unet = sd.foundation.unet
    return [
        WeightGroup(tuple(p.numel() for p in group["params"]), group["optim_bits"], dtype)
        for group in parameter_groups(module, sd.config.optim, most)
    ]


def test_our_kernels_update_in_place_and_their_references_a_weight_at_a_time():
    group = WeightGroup((1000, 10), 8, torch.bfloat16)
    for changes, each in (({}, 0), ({"kernels": "reference"}, 56), ({"optimizer_in_backward": True}, 0)):
        config = recipe("vg256", weights="lean", max_grad_norm=0.0, **changes)
        assert update_bytes(EngineLayout(config.optim, config.model.kernels, "cuda", None), [group]) == each * 1000


@pytest.mark.parametrize("changes", [{}, {"weights": "split"}, {"weights": "lean"}])
def test_blocks_are_the_resident_parts(sd, changes):
    """One block a group and part: weights, low halves, state."""
    config = recipe("vg256", **changes)
    layout = EngineLayout(config.optim, config.model.kernels, "cuda", None)
    groups = unet_groups(sd, torch.bfloat16 if changes else torch.float32)
    blocks, parts = resident_blocks(layout, groups), resident_parts(layout, groups)[0]
    assert len(blocks) == len(groups) * len(parts)
    assert sum(blocks) == pytest.approx(sum(parts.values()), abs=len(blocks))


def test_the_table_of_addresses_has_three_numbers_a_block_of_weights():
    groups = [WeightGroup((8 * 1024,), 8, torch.float32)]
    assert address_bytes(groups, "adam8bit") == 24 * -(-8 * 1024 // BLOCK)


@pytest.mark.parametrize(
    ("changes", "ds", "dtype", "gigabytes"),
    [
        ({}, None, torch.float32, 8.62),
        ({"ema": 0.999}, None, torch.float32, 8.62 + 3.44),
        ({"ema": 0.999, "ema_device": "cpu"}, None, torch.float32, 8.62),
        ({"weights": "lean"}, None, torch.bfloat16, 5.19),
        ({"weights": "split"}, None, torch.bfloat16, 5.19 + 1.72),
        ({"weights": "lean", "optimizer_in_backward": True, "max_grad_norm": 0.0}, None, torch.bfloat16, 3.47),
        ({}, "ds.json", torch.bfloat16, 8.62),
        ({"optimizer": "adam"}, None, torch.float32, 16e-9 * SD_WEIGHTS),
    ],
)
def test_what_stays_on_a_gpu_is_so_many_bytes_a_weight(sd, changes, ds, dtype, gigabytes):
    config = recipe("vg256", **changes)
    layout = EngineLayout(
        config.optim,
        config.model.kernels,
        "cuda",
        plan_engine(config.optim, "finetune", torch.device("cuda"), ds and DS_JSON),
    )
    groups = unet_groups(sd, dtype)
    resident, _ = resident_parts(layout, groups)
    assert (sum(resident.values()) + gradient_bytes(layout, groups)) / 1e9 == pytest.approx(gigabytes, abs=0.02)


def test_zero_flattens_a_groups_gradients_and_widens_them(sd):
    """2 + 4 bytes an element of the largest group beside what is there; its two buckets only during backward."""
    config = recipe("vg256")
    layout = EngineLayout(
        config.optim, config.model.kernels, "cuda", plan_engine(config.optim, "finetune", torch.device("cuda"), DS_JSON)
    )
    groups = unet_groups(sd, torch.bfloat16, layout.largest_group)
    assert update_bytes(layout, groups) == 6 * max(group.numel for group in groups) <= 6 * 50_000_000
    assert bucket_blocks(layout, groups) == [2 * 50_000_000] * 2
    four = replace(layout, world_size=4)
    resident, _ = resident_parts(four, groups)
    assert resident["weights"] == pytest.approx(2 * SD_WEIGHTS, rel=1e-3)
    assert resident["fp32 master weights"] == SD_WEIGHTS and gradient_bytes(four, groups) < 0.51 * SD_WEIGHTS


def test_several_processes_without_deepspeed_need_a_bucket_more(sd):
    """Gradients become the buckets, so one is there twice; in backward those on their way are there too."""
    config = recipe("vg256")
    one = EngineLayout(config.optim, config.model.kernels, "cuda", None)
    eight = replace(one, world_size=8)
    groups = unet_groups(sd, torch.bfloat16)
    assert bucket_blocks(one, groups) == [] and bucket_blocks(eight, groups) == [64 << 20]
    assert gradient_bytes(eight, groups) == gradient_bytes(one, groups) and "8 processes" in eight.describe()
    in_backward = replace(eight, optim=replace(config.optim, optimizer_in_backward=True, max_grad_norm=0))
    assert bucket_blocks(in_backward, groups) == [64 << 20] * 3


def test_offload_moves_master_state_and_gradients_to_the_cpu(sd):
    config = recipe("vg256")
    ds = plan_engine(config.optim, "finetune", torch.device("cuda"), str(ROOT / "configs/ds_offload.json"))
    resident, host = resident_parts(
        EngineLayout(config.optim, config.model.kernels, "cuda", ds), unet_groups(sd, torch.bfloat16)
    )
    assert set(resident) == {"weights"} and resident["weights"] / 1e9 == pytest.approx(1.72, abs=0.01)
    assert sum(host.values()) / 1e9 == pytest.approx((4 + 2.03 + 4 + 2) * 0.8595, abs=0.02)


@pytest.mark.parametrize("optimizer", list(STATES))
@pytest.mark.parametrize("bits", [8, 32])
def test_state_is_what_the_flat_optimiser_keeps(optimizer, bits):
    """Bytes of its moments, the scales of blocks included, or of Adafactor's means of rows and columns."""
    weights = [nn.Parameter(torch.zeros(96, 64)), nn.Parameter(torch.zeros(32, 128))]
    kind = {"optim_bits": 32} if bits == 32 else STATES[optimizer]
    (made,) = FlatAdam([{"params": weights, "lr": 1e-3, **kind}], seed=0)._groups
    kept = [tensor.nbytes for i in (0, 1) for name, tensor in made.state_of(i).items() if not name.startswith("qmap")]
    group = WeightGroup((96 * 64, 32 * 128), bits, torch.float32, factors=96 + 64 + 32 + 128)
    assert state_bytes(group, optimizer) == sum(kept)


def test_in_backward_the_largest_weight_of_a_group_decides():
    group = WeightGroup((1000, 10), 8, torch.bfloat16)
    needs = []
    for kernels in ("auto", "reference"):
        config = recipe("vg256", weights="lean", optimizer_in_backward=True, max_grad_norm=0.0, kernels=kernels)
        layout = EngineLayout(config.optim, config.model.kernels, "cuda", None)
        needs.append(in_backward_bytes(layout, group))
        assert update_bytes(layout, [group]) == needs[-1] and gradient_bytes(layout, [group]) == 0
    assert needs == [0, 56 * 1000]


@pytest.mark.parametrize(
    ("changes", "device", "ds", "cast", "said"),
    [
        ({}, "cuda", None, torch.bfloat16, "bf16, plain engine"),
        ({}, "cpu", None, None, "fp32, plain engine"),
        ({"precision": "fp16"}, "cpu", None, torch.float16, "fp16, plain engine"),
        ({"weights": "lean"}, "cuda", None, None, "bf16 weights, plain engine"),
        ({"weights": "split"}, "cuda", None, None, "fp32 weights in two halves, plain engine"),
        ({"lora": 4}, "cuda", None, torch.bfloat16, "bf16, LoRA of rank 4 (attention), plain engine"),
        ({}, "cuda", {"zero_optimization": {"stage": 2}}, None, "bf16, DeepSpeed ZeRO-2, 1 process(es)"),
    ],
)
def test_what_compute_is_cast_to_and_how_it_is_said(changes, device, ds, cast, said):
    config = recipe("vg256", **changes)
    layout = EngineLayout(config.optim, config.model.kernels, device, ds)
    assert (layout.autocast(), layout.describe()) == (cast, said)
