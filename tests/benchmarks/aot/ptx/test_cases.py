"""`benchmarks.aot.ptx.cases`: the small runs pass with the kernels, and none passes without them."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels import masked_pool
from sgg_kernels.launch import intercept
from support.cases.interpreter import (  # noqa: F401 - pytest finds them here
    automatic_kernels,
    bf16_products,
    bf16_rounds_to_nearest,
    floats_are_fp32,
    poisoned,
)

from benchmarks.aot.cases import cases
from benchmarks.aot.ptx.cases import _batch, lowered, small_cases

SMALL = small_cases()


def test_every_aot_case_has_a_small_run():
    assert list(small_cases()) == [case.name for case in cases()]


QUICK = (
    "pack padded masked",
    "hash_draw uniform",
    "hash_draw normal",
    "adam paper",
    "adam8bit 8 unet lean",
    "adam4bit unet split",
    "adafactor odd lean",
    "masked_pool odd bf16",
    "geglu odd bfloat16",
)
SLOWER = (
    "scatter_mean narrow fp32",
    "gather_add_relu odd bf16",
    "triple_context odd bf16",
    "group_norm_silu odd bfloat16",
    "add_layer_norm odd bfloat16",
    "cross_attention odd bfloat16",
)
"""One of each kind; the first of these with lowered thresholds."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled instead, on CUDA")
@pytest.mark.parametrize("name", QUICK)
def test_a_small_run_passes(name, poisoned):
    """In Triton's interpreter; `benchmarks.aot.run` runs the compiled ones."""
    SMALL[name]()


@pytest.mark.skipif(torch.cuda.is_available(), reason="its tensors are the interpreter's")
@pytest.mark.parametrize("name", [*QUICK, *SLOWER])
def test_a_small_run_fails_without_its_kernels(name, poisoned):
    with intercept(lambda *launch: True), pytest.raises(AssertionError):
        SMALL[name]()


def test_thresholds_are_lowered_for_a_block():
    most = masked_pool.chunk_size
    with lowered(masked_pool__chunk_size=len):
        assert masked_pool.chunk_size is len
    assert masked_pool.chunk_size is most


@pytest.mark.parametrize("hubs", [False, True])
def test_relations_stay_in_their_graphs(hubs):
    """With hubs half of the first graph's relations start at one object, else six do."""
    batch = _batch(4, 60, 90, hubs)
    sizes = [(30, 60), (10, 10), (10, 10), (10, 10)] if hubs else [(15, 23), (15, 23), (15, 22), (15, 22)]
    assert list(zip(batch.object_ptr.diff().tolist(), batch.relation_ptr.diff().tolist(), strict=True)) == sizes
    graph = batch.object_graph
    for ends in (batch.subject, batch.object):
        assert (graph[ends.long()] == batch.relation_graph).all()
    assert (batch.subject == 0).sum() >= (30 if hubs else 6)
    assert 0 < batch.object_pooled.sum() < 60 and 0 < batch.relation_pooled.sum() < 90
