"""The DeepSpeed engine: its optimiser's state, bf16, a fused UNet, what it refuses, what it leaves in the process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from support import DS_JSON, ROOT
from support.tiny_runs import TINY, flags, rows, trainer
from support.zero_runs import write_ds
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counts.kernels import triton_everywhere
from benchmarks.counts.unet import opaque_attention
from sgg_fast.config import ConfigError
from sgg_fast.nn.fuse.storage import store_stock
from sgg_fast.recipes import recipe
from sgg_fast.train.assemble import assemble
from sgg_fast.train.engines import deepspeed as engines
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.planner import _recast

FUSED = {"fuse_unet": "on", "attention": "sdpa"}
IDS = np.array([[0, 1]])


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_state_keeps_those_widths_though_a_group_is_one_tensor(tmp_path, precision):
    one = trainer(tmp_path, "finetune", DS_JSON, precision=precision, optimizer="adam8bit")
    update = one.engine.update(IDS, 0)
    assert update.applied and all(torch.isfinite(value) for value in update.losses.values())
    zero = one.engine.engine.optimizer
    assert zero.partition_gradients, "ZeRO-2 is what runs"
    assert one.engine.module.unet.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    for group, flat in zip(zero.optimizer.param_groups, zero.single_partition_of_fp32_groups, strict=True):
        state = zero.optimizer.state[flat]
        assert flat.dtype == torch.float32 and flat.ndim == 1
        assert state["state1"].dtype == (torch.uint8 if group["optim_bits"] == 8 else torch.float32), group["name"]


def test_bf16_leaves_the_measured_statistics_in_fp32(tmp_path):
    """DeepSpeed 0.19.7 casts parameters only; a version that casts buffers too would blur the vocabulary's mean."""
    one = trainer(tmp_path, "finetune", DS_JSON, precision="bf16")
    before = {name: buffer.clone() for name, buffer in one.conditioner.named_buffers()}
    assert {"name_mean", "null_states"} <= before.keys()
    assert {buffer.dtype for buffer in before.values()} == {torch.float32}
    assert not before["name_mean"].equal(before["name_mean"].bfloat16().float()), "not rounded on the way either"
    one.engine.update(IDS, 0)
    assert all(buffer.equal(before[name]) for name, buffer in one.conditioner.named_buffers())


ALONE = """
import atexit, socket, sys, torch
atexit.register(lambda: sys.stderr.write(f"left open: {torch.distributed.is_initialized()}"))  # runs last
with socket.socket() as taken:  # the port that DeepSpeed takes by default
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(("127.0.0.1", 29500))
    except OSError:
        pass  # somebody else has it: as good
    import train
    sys.exit(train.main(sys.argv[1:]))
"""


def test_deepspeed_alone_needs_no_port_prints_results_only_and_leaves_nothing_open(tmp_path):
    alone = {k: v for k, v in os.environ.items() if k not in engines.LAUNCHER}
    argv = ["--stage", "finetune", "--deepspeed", DS_JSON, "--out", str(tmp_path), *flags(finetune_steps=1)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        alone["MASTER_PORT"] = str(taken.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", ALONE, *argv], env=alone, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = f"saved {tmp_path}/finetune/pipeline\nnext: python infer.py graph.json --model {tmp_path}\n"
    assert done.stdout == said
    assert done.stderr.endswith("left open: False")
    assert "WARN" not in done.stderr and "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_what_deepspeed_itself_refuses_is_one_config_error(tmp_path, monkeypatch):
    """What our own table does not hold back."""
    monkeypatch.setattr("sgg_fast.train.engines.ds_config.check_keys", lambda ds: None)
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}')
    with pytest.raises(ConfigError, match=r"--deepspeed: DeepSpeed refuses these settings: .*reduce_bucket_size"):
        trainer(tmp_path, "finetune", str(path))


def test_output_held_back_shows_if_the_block_fails(capsys):
    with engines._held_output():
        print("built")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(RuntimeError), engines._held_output():
        print("compiler says no")
        raise RuntimeError
    assert capsys.readouterr() == ("", "compiler says no\n")


def test_the_average_is_of_the_fp32_masters_and_is_what_a_result_holds(tmp_path):
    """The decay is min(0.5, n / (n + 9)); outside of `exported` the weights are bf16 again."""
    from deepspeed.utils import safe_get_full_fp32_param

    one = trainer(tmp_path, "finetune", DS_JSON, precision="bf16", ema=0.5, unet_lr=1e-2)
    weight = one.engine.module.unet.conv_in.weight
    average = safe_get_full_fp32_param(weight).clone()
    for n in (1, 2):
        assert one.engine.update(IDS, n).applied
        decay = n / (n + 9)
        average = decay * average + (1 - decay) * safe_get_full_fp32_param(weight)
    rounded = weight.detach().clone()
    with one.engine.exported():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.detach(), average.view_as(weight))
        assert not torch.allclose(weight, rounded.float(), rtol=2**-7, atol=0)
    assert weight.equal(rounded) and weight.dtype == torch.bfloat16
