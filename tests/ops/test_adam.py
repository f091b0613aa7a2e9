"""The optimiser's operators: tables of chunks, a decided and applied step of two groups against torch's, refusals."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels.reference.adam import BLOCK
from torch import nn

from sgg_fast import ops
from sgg_fast.ops import adam as op

BACKENDS = ["reference", "triton"]
RATE = 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numbers", [None, [3, 0, 7]], ids=["flat", "factored"])
def test_a_table_holds_every_element_once(numbers, dtype):
    """Addresses advance with offsets; factored groups have each gradient's own row behind the chunks."""
    numels, offsets = [1, BLOCK, 2 * BLOCK + 5], [0, 256, 256 + BLOCK]
    grads = [torch.zeros(num, dtype=dtype) for num in numels]
    table = op.chunk_table(grads, offsets, "triton", numbers)
    assert len(table) == op.num_chunks(numels, "triton", numbers is not None)
    num = op.num_chunks(numels, "triton")
    assert num % 4 == len(table) % 4 == 0, "parts of a longer table start on 16 bytes"
    held = [0, 0, 0]
    for address, offset, last in table[:num].tolist():
        size, number = last % 2**32, last >> 32
        k = max(i for i, first in enumerate(offsets) if first <= offset)
        assert address == grads[k].data_ptr() + (offset - offsets[k]) * grads[k].element_size()
        assert size <= BLOCK and (size == 0 or number == (numbers or [0] * 3)[k])
        held[k] += size
    assert held == numels
    if numbers:
        heads = zip(grads, offsets, numbers, strict=True)
        assert table[num : num + 3].tolist() == [[grad.data_ptr(), first, k << 32] for grad, first, k in heads]


def test_the_reference_takes_no_table():
    grads = [torch.zeros(5)]
    assert op.chunk_table(grads, [0], "reference").shape == op.chunk_table([], [], "triton").shape == (0, 3)
    assert op.num_chunks([5], "reference") == op.num_chunks([5], "reference", factored=True) == 0


class Group:
    """Weights in fp32 with their moments, and a copy in float64 for torch."""

    def __init__(self, numels: list[int], dtype: torch.dtype, device: str) -> None:
        self.numels, self.dtype = numels, dtype
        self.offsets = [256 * i for i in range(len(numels))]
        self.weights = op.Weights(torch.linspace(-1, 1, 256 * len(numels) + 1024, device=device))
        self.moments = torch.zeros_like(self.weights.param), torch.zeros_like(self.weights.param)
        self.theirs = [nn.Parameter(part) for part in self.parts()]

    def parts(self) -> list[torch.Tensor]:
        """The weights that have gradients, in float64 on the CPU."""
        param = self.weights.param.double().cpu()
        return [param[first : first + num].clone() for first, num in zip(self.offsets, self.numels, strict=True)]

    def grads(self, seed: int) -> op.GroupGrads:
        """Drawn gradients; torch's copies get them, too."""
        generator = torch.Generator().manual_seed(seed)
        device = self.weights.param.device
        grads = [torch.randn(num, generator=generator).to(device, self.dtype) for num in self.numels]
        for parameter, grad in zip(self.theirs, grads, strict=True):
            parameter.grad = grad.double().cpu()
        backend = ops.backend_for(device, torch.float32)
        return op.GroupGrads(grads, self.offsets, op.chunk_table(grads, self.offsets, backend).to(device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_of_two_groups_are_torchs(backend, device):
    """One norm over both clips both, gradients in fp32 and bf16; a step with a NaN changes nothing."""
    ops.use_kernels(backend)
    groups = [Group([200, 5], torch.float32, device), Group([1030], torch.bfloat16, device)]
    theirs = [parameter for group in groups for parameter in group.theirs]
    optimizer, hyper = torch.optim.Adam(theirs, RATE), op.Hyper(max_norm=0.5)
    control, rate = torch.zeros(op.CONTROL_SIZE, device=device), torch.tensor([RATE, 0, 0, 0], device=device)
    control[op.INVERSE_SCALE] = 1
    count = torch.zeros(1, dtype=torch.int32, device=device)
    for step in range(4):
        given = [group.grads(10 * step + k) for k, group in enumerate(groups)]
        if step == 2:
            given[1].grads[0][7] = torch.nan
        else:
            nn.utils.clip_grad_norm_(theirs, 0.5)
            optimizer.step()
        op.adam_decide_(given, control, count, hyper)
        for group, grads in zip(groups, given, strict=True):
            op.adam_update_(group.weights, group.moments, grads, control, rate, count, hyper)
            for ours, parameter in zip(group.parts(), group.theirs, strict=True):
                torch.testing.assert_close(ours, parameter.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(count, torch.full_like(count, 3))


def test_refused():
    given = op.Weights(torch.zeros(1024))
    state = torch.zeros(1024), torch.zeros(1024)
    control, step, one = torch.zeros(op.CONTROL_SIZE), torch.ones(1, dtype=torch.int32), torch.zeros(4)
    for grads, reason in (
        ([], "at least one"),
        ([one[:, None]], "flat"),
        ([one.half()], "fp32 or bf16"),
        ([one, one.bfloat16()], "one dtype"),
    ):
        with pytest.raises(ValueError, match=reason):
            op.adam_update_(given, state, op.GroupGrads(grads, [0] * len(grads), None), control, one, step, op.Hyper())
    with pytest.raises(ValueError, match="at least one gradient"):
        op.adam_decide_([], control, step, op.Hyper())
