"""A fused UNet under DeepSpeed: its convolutions lie as its images do, and every file has stock shapes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from support.tiny_runs import TINY, rows, trainer
from support.zero_runs import write_ds
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counts.kernels import triton_everywhere
from benchmarks.counts.unet import opaque_attention
from sgg_fast.nn.fuse.storage import store_stock
from sgg_fast.recipes import recipe
from sgg_fast.train.assemble import assemble
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.planner import _recast

FUSED = {"fuse_unet": "on", "attention": "sdpa"}


def layout(x: torch.Tensor) -> str:
    last, plain = x.is_contiguous(memory_format=torch.channels_last), x.is_contiguous()
    return "either" if last and plain else "NHWC" if last else "NCHW" if plain else "neither"


class Convolutions(TorchDispatchMode):
    """Counts (layout of the images, layout of the weight) of every convolution, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func._schema.name:
            images, weight = args[1:3] if "backward" in func._schema.name else args[:2]
            self.layouts[layout(images), layout(weight)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("stored", [True, False])
def test_no_channels_last_image_meets_a_contiguous_weight(stage, stored):
    """Of the toy's 51 convolutions, as DeepSpeed's flat buffers return the weights. Without storage: 27 each way do."""
    config = recipe("toy", **{**TINY, **FUSED, "batch_size": 2})
    with FakeTensorMode(allow_non_fake_inputs=True), opaque_attention(), triton_everywhere():
        models = blank_foundation(config.model)
        parts = models, blank_conditioner(config.model, models), blank_cache(config, models, 2)
        ds = {"zero_optimization": {"stage": stage}}
        made = assemble(config, "finetune", *parts, torch.device("cpu"), ds)
        if not stored:
            store_stock(made.unet)
        for module in made.modules():
            for name, p in list(module._parameters.items()):  # flat buffers keep shapes, not strides
                module._parameters[name] = None if p is None else torch.nn.Parameter(p.detach().contiguous())
        _recast(made, torch.bfloat16)
        with Convolutions() as found:
            made(np.array([0, 1]), 0).total.backward()
    assert sum(found.layouts.values()) > 60
    assert found.layouts["NHWC", "NCHW"] == (0 if stored else 54), found.layouts


@pytest.mark.parametrize("name", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_fused_run_is_an_unfused_one_and_resumes(tmp_path, name):
    """The losses of an unfused run; a result in stock shapes with its weights; the same steps after a stop."""
    ds = str(write_ds(tmp_path, name))

    def run(out: str, **changes: object) -> list[float]:
        trainer(tmp_path / out, "finetune", ds, **{"log_every": 1, "sample_every": 0, **changes}).train()
        return [row["loss"] for row in rows(tmp_path / out / "finetune").values()]

    plain = run("plain", fuse_unet="off", finetune_steps=3)
    fused = run("fused", **FUSED, finetune_steps=3)
    assert fused == pytest.approx(plain, rel=1e-3)
    run("twice", **FUSED, finetune_steps=2)
    assert run("twice", **FUSED, finetune_steps=3)[-1] == pytest.approx(fused[-1], rel=1e-6)

    unets = [
        UNet2DConditionModel.from_pretrained(tmp_path / out / "finetune" / "pipeline" / "unet").state_dict()
        for out in ("plain", "fused", "twice")
    ]
    for key, value in unets[0].items():
        assert torch.equal(unets[1][key], unets[2][key])
        torch.testing.assert_close(unets[1][key], value, atol=2e-3, rtol=0, msg=key)
