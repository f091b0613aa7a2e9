"""Weights of merged layers stay end to end through whatever moves them; no result outlives its call."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.nn.unets import assert_same, randn, sd_unet, unet_results

from sgg_fast.config import OptimConfig
from sgg_fast.nn.fuse import _STATE, fuse, merged_first, unfuse
from sgg_fast.nn.merge import Merged, MergedLinear, adjacent, adjoin, join, separate
from sgg_fast.train.optim.flat import FlatParameters
from sgg_fast.train.optim.groups import parameter_groups

KINDS = {"self-attention", "context", "time"}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Fused, every weight of a merged layer a multiple of 256 elements, as SD v1.4's are."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    fuse(unet)
    return unet


def groups(unet: UNet2DConditionModel) -> dict[str, list[Merged]]:
    """The merged GEMMs by what they read."""
    state = unet.__dict__[_STATE]
    found: dict[str, list[Merged]] = {"self-attention": state.leading, "context": [], "time": []}
    for merged in state.shared:
        found["context" if merged.activation is None else "time"].append(merged)
    assert found.keys() == KINDS and all(found.values())
    return found


def apart(unet: UNet2DConditionModel) -> list[str]:
    """The kinds of which a GEMM would have to concatenate."""
    return [
        kind
        for kind, all_merged in groups(unet).items()
        for merged in all_merged
        if not all(adjacent(parameters) for parameters in merged.parameters)
    ]


MOVES = {
    "cast": lambda unet: unet.bfloat16(),
    "cast there and back": lambda unet: unet.double().float(),
    "moved, channels last": lambda unet: unet.to(memory_format=torch.channels_last, dtype=torch.bfloat16),
    "as part of another module": lambda unet: torch.nn.ModuleList([unet]).to(torch.bfloat16),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_moved_model_has_its_weights_end_to_end_before_the_next_call(unet, move):
    assert apart(unet) == []
    move(unet)
    assert apart(unet) == []


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_so_a_flat_buffer_keeps_them_and_no_forward_concatenates(unet, move, monkeypatch):
    """The optimisers flatten what was moved before: matrices in one buffer, the rest in another."""
    move(unet)
    parameters = list(unet.parameters())
    for matrices, pad in ((True, 256), (False, 16)):
        FlatParameters([p for p in parameters if (p.ndim >= 2) == matrices], pad)
    assert apart(unet) == []
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *a, **k: joined.append(len(tensors)) or cat(tensors, *a, **k))
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 16)
    unet(z.to(unet.dtype), 10, context.to(unet.dtype))
    assert all(num == 2 for num in joined), "skip connections only"


def test_a_half_moved_group_is_left_alone(unet):
    """Until the last of them is there, nothing can be joined; then a cast of all joins them, the values kept."""
    merged = groups(unet)["self-attention"][0]
    before = [layer.weight.detach().clone() for layer in merged.layers]
    merged.layers[0].double()
    assert not adjacent(merged.parameters[0])
    unet.double()
    assert adjacent(merged.parameters[0])
    assert all(torch.equal(layer.weight, was.double()) for layer, was in zip(merged.layers, before, strict=True))


def flatten_as_deepspeed(module: torch.nn.Module, most: float) -> None:
    """ZeRO 1 and 2: the weights of each group become views of one tensor, in the group's order."""
    for group in parameter_groups(module, OptimConfig(), most):
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        for p, part in zip(group["params"], flat.split([p.numel() for p in group["params"]]), strict=True):
            p.data = part.view(p.shape)


def test_flat_tensors_of_groups_keep_merged_weights_end_to_end(unet):
    module = torch.nn.ModuleDict({"unet": unet})
    flatten_as_deepspeed(module, math.inf)
    assert set(apart(unet)) == {"context", "time"}, "merged across blocks, so apart in the model's own order"
    flatten_as_deepspeed(module, 10**9)
    assert apart(unet) == []


def test_the_order_of_groups_does_not_depend_on_fusing(unet):
    """A run may resume with another --fuse-unet."""
    fused = [id(p) for p in merged_first(unet)]
    assert len(fused) == len(list(unet.parameters()))
    unfuse(unet)
    assert [id(p) for p in merged_first(unet)] == fused


def merged_groups(model: torch.nn.Module) -> list:
    state = model.__dict__["_sgg_fused"]
    return [parameters for merged in (*state.leading, *state.shared) for parameters in merged.parameters]


def test_storage_stays_one_through_what_a_training_does_to_it():
    unet, optimizer_of = sd_unet(), torch.optim.Adam
    fuse(unet)
    assert all(map(adjacent, merged_groups(unet)))
    stock = sd_unet()
    optimizers = [optimizer_of(model.parameters(), lr=1e-3) for model in (unet, stock)]
    for _ in range(2):
        for model, optimizer in zip((unet, stock), optimizers, strict=True):
            unet_results(model)
            optimizer.step()
    exact = unet_results(copy.deepcopy(stock).double(), torch.float64)
    assert all(map(adjacent, merged_groups(unet)))
    again = copy.deepcopy(unet)
    pointers = {p.data_ptr() for p in unet.parameters()} & {p.data_ptr() for p in again.parameters()}
    assert not pointers, "a copy shares nothing"
    # Adam divides by the root of tiny squares, so after a step trajectories agree to rounding of the step, not of fp32.
    torch.testing.assert_close(unet_results(again)["out"].double(), exact["out"], rtol=1e-3, atol=1e-3)
    assert all(map(adjacent, merged_groups(again)))
    unet.load_state_dict(stock.state_dict())
    assert_same(unet_results(unet), unet_results(stock), exact)
    unet.double()
    assert all(map(adjacent, merged_groups(unet))), "a cast keeps each group in one storage"
    torch.testing.assert_close(unet_results(unet, torch.float64), exact, rtol=1e-9, atol=1e-9)
    assert all(map(adjacent, merged_groups(unet)))


def test_views_into_somebody_elses_buffer_stay_there():
    """As DeepSpeed and flat optimisers lay parameters out, with or without gaps between them."""
    low, exact = unet_results(sd_unet()), unet_results(sd_unet().double(), torch.float64)
    unet = sd_unet()
    fuse(unet)
    flat = torch.zeros(sum(p.numel() + 3 for p in unet.parameters()))
    offset = 0
    for p in unet.parameters():
        view = flat[offset : offset + p.numel()].as_strided(p.shape, p.stride(), offset)
        p.data = view.copy_(p.data)
        offset += p.numel() + 3
    assert_same(unet_results(unet), low, exact)
    assert {p.untyped_storage().data_ptr() for p in unet.parameters()} == {flat.untyped_storage().data_ptr()}


def test_no_result_outlives_its_call_or_serves_another_input():
    unet, stock = sd_unet(), sd_unet()
    fuse(unet)
    z, context = randn(0, 1, 4, 4, 4), randn(1, 1, 8, 12)
    with torch.no_grad():
        first = unet(z, 10, context).sample
        context.mul_(-2)  # the same tensor, another value
        second = unet(z, 10, context).sample
        wanted = stock(z, 10, context).sample
    torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-3)
    kept = weakref.ref(context)
    del context
    gc.collect()
    assert kept() is None
    with pytest.raises(RuntimeError):
        unet(z, 10, randn(1, 1, 8, 13))
    again = unet(z, 10, randn(2, 1, 8, 12)).sample
    torch.testing.assert_close(again, stock(z, 10, randn(2, 1, 8, 12)).sample, rtol=1e-4, atol=1e-5)


def test_joined_parameters_are_one_tensor_without_a_copy_and_each_has_its_gradient():
    parameters = [torch.nn.Parameter(torch.randn(rows, 3)) for rows in (2, 4)]
    before = torch.cat([p.detach() for p in parameters])
    joined = join(parameters)
    assert torch.equal(joined, before) and joined.data_ptr() == parameters[0].data_ptr() and adjacent(parameters)
    assert joined.parts == parameters
    weight = torch.arange(18.0).view(6, 3)
    (joined * weight).sum().backward()
    assert torch.equal(torch.cat([p.grad for p in parameters]), weight)
    separate(parameters)
    assert not adjacent(parameters) and torch.equal(torch.cat([p.detach() for p in parameters]), before)
    flat = torch.zeros(40)
    for k, p in enumerate(parameters):  # views into a foreign storage, with a gap: joined by a copy, and left there
        p.data = flat[20 * k : 20 * k + p.numel()].view(p.shape).copy_(p.data)
    adjoin(parameters)
    assert torch.equal(join(parameters), before)
    assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in parameters)


@pytest.mark.parametrize("leading", [True, False])
def test_one_gemm_serves_the_layers_of_one_input(leading):
    """Between `begin` and `end`, or from the first layer on; another input is computed by itself."""
    torch.manual_seed(0)
    layers, gemms = [torch.nn.Linear(3, width) for width in (2, 5)], []
    stock = copy.deepcopy(layers)
    merged = Merged(layers, leading)
    for index, layer in enumerate(layers):
        layer.merged, layer.__class__ = (merged, index), MergedLinear
    compute, x, other = merged._compute, torch.randn(4, 3), torch.randn(4, 3)
    merged._compute = lambda given: gemms.append(given) or compute(given)
    for _ in range(2):
        merged.begin()
        for given in (x, other) if not leading else (x,):
            for layer, own in zip(layers, stock, strict=True):
                torch.testing.assert_close(layer(given), own(given))
        merged.end()
    assert len(gemms) == 2 and all(given is x for given in gemms)
    torch.testing.assert_close(layers[1](x), stock[1](x))
    assert len(gemms) == 2, "after the call nothing is shared"
