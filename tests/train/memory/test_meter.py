"""The meter: bytes of what lives, by kind and phase; gradients kept, used and bucketed; CUDA's autocast on a CPU."""

from __future__ import annotations

import torch
from torch import nn

from sgg_fast.train.memory.meter import Meter, autocast_like_cuda


def test_meter_counts_what_lives():
    outside = torch.ones(1024)
    with Meter() as meter:
        meter.phase = "first"
        a = outside * 2  # 4096 bytes
        b = a.view(32, 32).t()  # a view: nothing
        outside.add_(1)  # was there before: nothing
        c = torch.cat([a, a])
        assert meter.now["activations"] == 3 * 4096
        del a, b
        meter.phase = "second"
        d = c[:1].clone()  # rounded up to the allocator's 512
        assert meter.now["activations"] == 2 * 4096 + 512
        del c, d
    assert meter.now == {"activations": 0, "gradients": 0, "temporaries": 0}
    assert {phase: parts["activations"] for phase, parts in meter.peaks.items()} == {"first": 12288, "second": 8704}


def linear_step(hook):
    """Backward of three layers of 64 x 64 at one row: gradients of 16 384 bytes each."""
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    parameters = list(module.parameters())
    with Meter() as meter:
        hook(meter, parameters)
        meter.phase = "backward"
        module(torch.ones(1, 64)).sum().backward()
        left = dict(meter.now)
    return meter, left, parameters


def test_meter_knows_gradients_from_activations():
    meter, left, parameters = linear_step(lambda meter, parameters: meter.keep_gradients(parameters))
    assert left["gradients"] == 3 * 16384 and left["activations"] == 0
    assert meter.peaks["backward"]["gradients"] >= 2 * 16384
    before = parameters[0].grad
    with Meter():  # the hooks are gone
        parameters[0].sum().backward()
    assert parameters[0].grad is before


def test_meter_frees_gradients_that_are_used_at_once():
    meter, left, parameters = linear_step(lambda m, p: m.use_gradients(p, lambda parameter: 10 * parameter.numel()))
    assert left == {"activations": 0, "gradients": 0, "temporaries": 0}
    assert all(p.grad is None for p in parameters)
    peak = meter.peaks["backward"]
    assert peak["temporaries"] == 10 * 4096 and sum(peak.values()) < 10 * 4096 + 2 * 16384


def test_meter_adds_the_buffer_of_all_gradients_when_a_bucket_is_full():
    meter, left, _ = linear_step(lambda m, p: m.bucket_gradients(p, bucket=8000, buffer=12345, aside=True))
    assert [size for key, size in meter.events if key in meter.aside] == [12345]
    assert left == {"activations": 0, "gradients": 12345, "temporaries": 0}
    _, left, _ = linear_step(lambda m, p: m.bucket_gradients(p, bucket=10**6, buffer=12345))
    assert left["gradients"] == 0


def test_autocast_runs_norms_in_fp32_as_on_a_gpu():
    def types():
        y = nn.functional.conv2d(torch.ones(1, 4, 4, 4), torch.ones(4, 4, 1, 1))
        norm, layer = nn.functional.group_norm(y, 2, torch.ones(4)), nn.functional.layer_norm(y, (4,))
        return y.dtype, norm.dtype, layer.dtype, nn.functional.silu(norm).dtype

    with autocast_like_cuda(torch.bfloat16):
        assert types() == (torch.bfloat16, torch.float32, torch.float32, torch.float32)
    with autocast_like_cuda(None):
        assert set(types()) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):  # everything is as it was
        assert types()[1] == torch.bfloat16
