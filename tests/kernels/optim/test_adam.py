"""The Adam kernels against their reference and against torch's own, through the interpreter or compiled."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels import launch as launching
from sgg_kernels.optim.adam import BLOCK, adam_table
from torch import nn

from sgg_fast import ops
from sgg_fast.ops import adam as adam_op
from sgg_fast.train.optim.adam_flat import FlatAdam
from sgg_fast.train.optim.adam_state import PAD_32BIT
from sgg_fast.train.optim.flat import PAD, FlatParameters

NUMELS = [1, 3, 4, 256, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5]


def optimizer(device: str, max_norm: float = 0.0, numels: list[int] = NUMELS) -> FlatAdam:
    """Of one parameter for each size, and one more without a gradient."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(num).to(device)) for num in [*numels, 7]]
    return FlatAdam([{"params": parameters, "lr": 1e-2, "optim_bits": 32}], 0, max_norm)


def flat_of(one: FlatAdam) -> FlatParameters:
    (group,) = one._groups
    return group.flat


def moments_of(one: FlatAdam) -> tuple[torch.Tensor, torch.Tensor]:
    return one._groups[0].moments


def give(one: FlatAdam, step: int, size: float = 1.0) -> list[torch.Tensor]:
    """Gradients of a step, the last parameter's left out."""
    generator = torch.Generator().manual_seed(step)
    for parameter in flat_of(one).parameters[:-1]:
        grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (size * grad * torch.rand((), generator=generator)).to(parameter.device)
    return [p.grad for p in flat_of(one).parameters[:-1]]


def buffers(one: FlatAdam) -> list[torch.Tensor]:
    return [flat_of(one).buffer, *moments_of(one), one.control, one.num_steps]


def state(one: FlatAdam) -> list[torch.Tensor]:
    return [t.clone() for t in buffers(one)]


def steps(backend: str, device: str, num: int, **options: object) -> list[torch.Tensor]:
    ops.use_kernels(backend)
    one = optimizer(device, **options)
    for step in range(num):
        one.param_groups[0]["lr"] = 1e-2 / (step + 1)
        give(one, step)
        one.step()
    return state(one)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("max_norm", [0.0, 3.0])
def test_is_the_reference(device, max_norm):
    found = steps("triton", device, 4, max_norm=max_norm)
    for one, other in zip(found, steps("reference", device, 4, max_norm=max_norm), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
    again = steps("triton", device, 4, max_norm=max_norm)
    assert all(map(torch.equal, found, again)), "the same bits twice"


def test_is_torchs_adam_over_many_steps(device):
    """A small set, so that the interpreter can take 30 steps; clipped at each."""
    ops.use_kernels("triton")
    ours = optimizer(device, 0.5, [1, 5, BLOCK + 3])
    copies = [nn.Parameter(p.detach().clone()) for p in flat_of(ours).parameters]
    theirs = torch.optim.Adam(copies, 1e-2)
    for step in range(30):
        for parameter, grad in zip(copies, give(ours, step), strict=False):
            parameter.grad = grad.clone()
        nn.utils.clip_grad_norm_(copies, 0.5)
        ours.step()
        theirs.step()
    assert ours.num_steps.item() == 30
    for one, other in zip(flat_of(ours).parameters, copies, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_corrections_keep_their_digits(backend, device):
    """1 - beta^t in float64; computed in fp32 it would be off by 1e-4 at the first step."""
    ops.use_kernels(backend)
    one = optimizer(device, numels=[4])
    for t in range(1, 31):
        give(one, t)
        one.step()
        for place, beta in ((adam_op.CORRECTION_1, 0.9), (adam_op.CORRECTION_2, 0.999)):
            assert one.control[place].item() == pytest.approx(1 - beta**t, rel=5e-7)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_skips_what_is_not_finite(backend, bad, device):
    """One element of one gradient, the largest included whose square overflows."""
    ops.use_kernels(backend)
    one = optimizer(device, 1.0)
    give(one, 0)
    one.step()
    before = state(one)
    give(one, 1)[6][BLOCK] = bad
    one.step()
    assert one.applied == 0
    for place, (was, now) in enumerate(zip(before, state(one), strict=True)):
        assert torch.equal(was[:4], now[:4]) if place == 3 else torch.equal(was, now)
    give(one, 2)
    one.step()
    assert one.applied == 1 and one.num_steps == 2


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_loss_scale_is_taken_out(backend, device):
    ops.use_kernels(backend)
    plain, scaled = optimizer(device, 0.5), optimizer(device, 0.5)
    scaled.control[adam_op.INVERSE_SCALE] = 2.0**-10
    give(plain, 0)
    give(scaled, 0, size=2.0**10)
    plain.step()
    scaled.step()
    assert torch.equal(flat_of(plain).buffer, flat_of(scaled).buffer)
    assert plain.control[adam_op.NORM] == scaled.control[adam_op.NORM] > 0.5


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_padding_and_parameters_without_gradient_stay(backend, device):
    ops.use_kernels(backend)
    one = optimizer(device)
    idle = flat_of(one).parameters[-1].detach().clone()
    for step in range(2):
        give(one, step)
        one.step()
    assert torch.equal(flat_of(one).parameters[-1], idle)
    covered = torch.zeros_like(flat_of(one).buffer, dtype=torch.bool)
    for parameter, offset in zip(flat_of(one).parameters, flat_of(one).offsets, strict=True):
        covered[offset : offset + parameter.numel()] = True
    assert (~covered).sum() > PAD_32BIT
    for buffer in (flat_of(one).buffer, *moments_of(one)):
        assert not buffer[~covered].any()


def test_three_launches_whatever_the_number_of_parameters(device):
    for numels in ([4], [4] * 50):
        ops.use_kernels("triton")
        one = optimizer(device, numels=numels)
        give(one, 0)
        seen: list[str] = []
        with launching.intercept(lambda kernel, *rest, seen=seen: seen.append(kernel.__name__) or False):
            one.step()
        assert seen == ["adam_squares_kernel", "adam_decide_kernel", "adam_kernel"]


def test_table_covers_every_element_once():
    table = adam_table([1600, 8000], [0, 2 * PAD], [300, 2 * BLOCK + 5], 4)
    assert table.tolist() == [
        [1600, 0, 300],
        [8000, 2 * PAD, BLOCK],
        [8000 + 4 * BLOCK, 2 * PAD + BLOCK, BLOCK],
        [8000 + 8 * BLOCK, 2 * PAD + 2 * BLOCK, 5],
    ]
    with pytest.raises(AssertionError, match="16 bytes"):
        adam_table([4], [0], [1], 4)


@pytest.mark.gpu
def test_captured_step_follows_rate_gradients_and_skip_flag():
    """Replays with new values in the same gradients and control; nothing is read back."""
    ops.use_kernels("triton")
    ours, eager = optimizer("cuda", 1.0), optimizer("cuda", 1.0)
    grads = give(ours, 0)
    gradients = ours.gradients()
    table = ours.table(gradients).cuda()
    ours.launch(gradients, table)
    give(eager, 0)
    ours.rates.fill_(eager.param_groups[0]["lr"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.launch(gradients, table)
    fresh = optimizer("cuda", 1.0)
    for mine, other in zip(buffers(ours), buffers(fresh), strict=True):
        mine.copy_(other)
    for step in range(4):
        lr = 1e-2 / (step + 1)
        for mine, other in zip(grads, give(eager, step), strict=True):
            mine.copy_(other)
            if step == 2:
                mine[0], other[0] = float("nan"), float("nan")
        eager.param_groups[0]["lr"] = lr
        ours.rates.fill_(lr)
        torch.cuda.set_sync_debug_mode("error")
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        eager.step()
        assert all(map(torch.equal, state(ours)[:3], state(eager)[:3]))
    assert ours.num_steps == 3
