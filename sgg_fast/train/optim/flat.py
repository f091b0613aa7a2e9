"""Adam whose parameters, and both moments, are flat buffers: a few launches a step however many parameters there are.

Gradients are not flat: backward leaves each where it likes, and the step finds them through a table of addresses.
Fine-tuning's, with parameter groups and 8-bit state, is in `flat8bit.py`. Letters: P elements of the flat buffers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.ops import adam as adam_op

PAD = 256
"""Elements that each parameter's place is a multiple of: 1 KiB, and a block of 8-bit state."""


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in one dimension as they lie in memory; a view. The tensor must be dense, in any order."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _places(parameters: list[nn.Parameter]) -> list[int]:
    """Indices in the order in which parameters go into a buffer: as given, but views of one storage follow each other.

    Weights that lie end to end, so that one GEMM reads them all, then still do.
    """
    first: dict[int, int] = {}
    storages = [p.untyped_storage()._cdata for p in parameters]
    for i, storage in enumerate(storages):
        first.setdefault(storage, i)
    return sorted(range(len(parameters)), key=lambda i: (first[storages[i]], parameters[i].storage_offset(), i))


class FlatParameters:
    """Parameters moved into one buffer of their type, each a view with the strides it had. Padding holds zeros."""

    def __init__(self, parameters: Iterable[nn.Parameter], pad: int = PAD) -> None:
        """pad: elements that each one's place is a multiple of. Raises ValueError for parameters that are not all fp32

        or all bf16, not dense, or none.
        """
        self.parameters = list(parameters)
        dtypes = {p.dtype for p in self.parameters}
        if dtypes not in ({torch.float32}, {torch.bfloat16}):
            raise ValueError("flat parameters: there must be some, all in fp32 or all in bf16")
        if not all(torch.ops.aten.is_non_overlapping_and_dense(p) for p in self.parameters):
            raise ValueError("flat parameters: a parameter is not dense")
        self.offsets, end = [0] * len(self.parameters), 0
        for i in _places(self.parameters):
            self.offsets[i] = end
            end += -(-self.parameters[i].numel() // pad) * pad
        first = self.parameters[0]
        self.buffer = torch.zeros(-(-end // PAD) * PAD, dtype=first.dtype, device=first.device)
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            place = self.buffer.as_strided(parameter.shape, parameter.stride(), offset)
            parameter.data = place.copy_(parameter.data)

    def gradients(self) -> tuple[list[torch.Tensor], list[int]]:
        """The gradients that exist, each flat in the memory order of its parameter, and their offsets."""
        found = [
            (flat_gradient(p), offset)
            for p, offset in zip(self.parameters, self.offsets, strict=True)
            if p.grad is not None
        ]
        return [grad for grad, _ in found], [offset for _, offset in found]


def flat_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient in its parameter's layout, from 16 bytes on: as backward left it, but for rare copies."""
    grad = parameter.grad
    assert grad is not None
    if not _same_layout(grad, parameter) or grad.storage_offset() * grad.element_size() % 16:
        grad = torch.empty_strided(parameter.shape, parameter.stride(), dtype=grad.dtype, device=grad.device).copy_(
            grad
        )
    return in_memory_order(grad)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether elements lie in one order; the stride of a dimension of size 1 (1 x 1 convolutions) says nothing."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(of_a == of_b for size, of_a, of_b in strides if size > 1)


class FlatAdam(torch.optim.Optimizer):
    """torch's Adam (no weight decay) with gradient clipping and a skip flag inside, on `FlatParameters`."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, max_norm: float = 0.0) -> None:
        """max_norm: the gradient norm is clipped to this; 0 leaves it alone."""
        parameters = list(parameters)
        self.flat = FlatParameters(parameters)
        if self.flat.buffer.dtype != torch.float32:
            raise ValueError("FlatAdam: its parameters must be in fp32")
        super().__init__(parameters, {"lr": lr})
        self.hyper = adam_op.Hyper(max_norm=max_norm)
        buffer = self.flat.buffer
        self.moments = torch.zeros_like(buffer), torch.zeros_like(buffer)
        self.num_steps = torch.zeros(1, dtype=torch.int32, device=buffer.device)
        self.control = torch.zeros(adam_op.CONTROL_SIZE, device=buffer.device)
        self.control[adam_op.INVERSE_SCALE] = 1
        self._lr: float | None = None

    @property
    def applied(self) -> torch.Tensor:
        """fp32 scalar on the device, 1 where the last step was applied, 0 where a gradient was not finite."""
        return self.control[adam_op.APPLIED]

    @property
    def rates(self) -> torch.Tensor:
        """fp32 [1] on the device: the learning rate that the next launch takes."""
        return self.control[adam_op.LR : adam_op.LR + 1]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip and step, unless a gradient is not finite: see `applied`. Copies a table to the device."""
        assert closure is None
        lr = self.param_groups[0]["lr"]
        if lr != self._lr:
            self.control[adam_op.LR], self._lr = lr, lr
        grads, offsets = self.flat.gradients()
        self.launch(grads, offsets, self.table(grads, offsets).to(self.flat.buffer.device, non_blocking=True))

    def table(self, grads: list[torch.Tensor], offsets: list[int]) -> torch.Tensor:
        """On the host: where the kernel finds `grads`."""
        return adam_op.adam_table(grads, offsets, ops.backend_for(self.flat.buffer.device, torch.float32))

    def launch(self, grads: list[torch.Tensor], offsets: list[int], table: torch.Tensor) -> None:
        """The step itself, from what lies on the device: may be captured, with a table that is filled later."""
        buffers = self.flat.buffer, *self.moments
        adam_op.adam_(*buffers, grads, offsets, table, self.control, self.num_steps, self.hyper)

    def state_dict(self) -> dict[str, Any]:
        """Moments, corrections and number of steps."""
        state = {"moment_1": self.moments[0], "moment_2": self.moments[1], "num_steps": self.num_steps}
        return {**state, "control": self.control}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, of parameters of the same sizes in the same order."""
        own = self.state_dict()
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        self._lr = None
