"""Counted launches and bytes of a UNet's step, and the table that holds them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from support.cases.benchmark import SMALL_UNET
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counts import unet as unet_counts
from benchmarks.counts.kernels import Count
from benchmarks.counts.unet import FORMS, UNetCounter
from sgg_fast.nn import attention
from sgg_fast.train.memory.sizes import PUBLISHED


@pytest.fixture
def small(monkeypatch):
    """A small UNet in place of Stable Diffusion's."""
    monkeypatch.setitem(PUBLISHED, "sd", SMALL_UNET)
    unet_counts.count.cache_clear()
    yield
    unet_counts.count.cache_clear()


@pytest.mark.slow
def test_kernels_readme_holds_the_unets_table():
    assert unet_counts.TABLE.committed() == unet_counts.TABLE.section(), "run: python -m benchmarks.counts.unet --write"


def test_launches_of_the_stock_unet_are_those_of_its_modules(small):
    with torch.device("meta"):
        modules = list(UNet2DConditionModel.from_config(SMALL_UNET.unet).modules())
    forward, behind = (counter.named() for counter in unet_counts.count(FORMS[0], 8, False))

    def number(kind: type) -> int:
        return sum(isinstance(module, kind) for module in modules)

    assert forward["convolution"] == behind["convolution_backward"] == number(torch.nn.Conv2d)
    assert forward["addmm"] + forward["mm"] == number(torch.nn.Linear)
    assert forward["native_group_norm"] == number(torch.nn.GroupNorm)
    assert forward["attention"] == number(Attention) and behind["attention_bwd"] == 2 * number(Attention)


def test_each_fused_form_launches_less_than_the_one_before_and_does_the_same_work(small):
    found = [[counter.total for counter in unet_counts.count(form, 8, False)] for form in FORMS[1:]]
    launches = [forward.launches + behind.launches for forward, behind in found]
    assert launches == sorted(set(launches), reverse=True)
    assert found[0][0].flops == found[1][0].flops == found[2][0].flops


def test_a_row_adds_up_its_passes(small, monkeypatch):
    monkeypatch.setattr(unet_counts, "FORMS", FORMS[:1])
    tables = unet_counts.body().split("\n\n")
    assert [text.split(";")[0] for text in tables[::2]] == [
        "256 x 256, batch 2, bf16 weights",
        "256 x 256, batch 2, fp32 weights under autocast to bf16",
        "512 x 512, batch 2, bf16 weights",
    ]
    for text in tables[1::2]:
        row = text.splitlines()[2].strip("| ").split(" | ")
        forward, behind, both = (int(cell.split(" / ")[0].replace(",", "")) for cell in row[1:])
        assert row[0] == "stock" and forward + behind == both > forward


@pytest.mark.parametrize(("layout", "copies"), [(torch.contiguous_format, 1), (torch.channels_last, 0)])
def test_a_weight_that_does_not_lie_as_its_images_is_copied(layout, copies):
    with FakeTensorMode():
        images = torch.empty(2, 4, 8, 8).to(memory_format=torch.channels_last)
        weight = torch.empty(4, 4, 3, 3).to(memory_format=layout).requires_grad_()
        with UNetCounter() as forward:
            out = F.conv2d(images, weight)
        with UNetCounter() as behind:
            out.backward(torch.empty_like(out))
    found = [counter.launches["weight to channels last"] for counter in (forward, behind)]
    assert found == [copies, 2 * copies], "and its gradient"
    assert forward.total.flops == 2 * 2 * 4 * 6 * 6 * 4 * 9


def test_attention_is_one_operator_by_whichever_door_and_never_computes():
    q, k = torch.empty(2, 4, 16, 8), torch.empty(2, 4, 5, 8)
    with FakeTensorMode(allow_non_fake_inputs=True), unet_counts.opaque_attention(), UNetCounter() as counter:
        out = F.scaled_dot_product_attention(q, k, k)
        rows = attention.attend(None, q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))
        assert attention.find_operators(q, k, k).forward.NAME == "counted"
    assert out.shape == q.shape and rows.shape == (2, 16, 4, 8)
    bytes_of_one = 4 * 2 * 4 * 8 * (16 + 5 + 5 + 16)
    assert counter.total == Count(2, 2 * bytes_of_one, 2 * 2 * 2 * 2 * 4 * 16 * 5 * 8)
    for call in (lambda: unet_counts._attention(q, k, k), lambda: unet_counts._attention_bwd(q, q, k, k)):
        with pytest.raises(NotImplementedError, match="for counting only"):
            call()


def test_norms_are_in_fp32_as_under_cudas_autocast():
    x = torch.randn(2, 8, 4, dtype=torch.bfloat16)
    calls = (lambda: F.group_norm(x, 2), lambda: F.layer_norm(x, (4,)))
    with unet_counts.cuda_norms():
        found = [call() for call in calls]
    assert [out.dtype for out in found] == [torch.float32] * 2
    assert [call().dtype for call in calls] == [torch.bfloat16] * 2
    torch.testing.assert_close(found[0], F.group_norm(x.float(), 2))
