"""The state of `FlatAdam`: a group's weights and moments in flat buffers, and their form in a checkpoint.

Letters: P elements of the flat buffers, R rows and C columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import torch

from sgg_fast.ops import adam as op
from sgg_fast.train.optim.flat import PAD, FlatParameters, as_matrix, in_memory_order, take_low_halves

PAD_32BIT = 16
"""Alignment, in elements, of each parameter in a buffer with 32-bit state."""


class FlatGroup:
    """A parameter group's weights and moments in flat buffers.

    Its "optim_bits" is 32, 8 or 4. With "factored", which needs 32, there is no first moment, and the second is kept by
    rows and columns.
    """

    def __init__(self, group: dict[str, Any], seed: int, split: bool) -> None:
        """Move the weights. seed: of stochastic rounding. split: keep the low halves of bf16 weights.

        Raises ValueError as `FlatParameters` does.
        """
        self.bits, self.factored = group["optim_bits"], bool(group.get("factored"))
        self.flat = FlatParameters(group["params"], PAD_32BIT if self.bits == 32 else PAD)
        buffer = self.flat.buffer
        low = take_low_halves(self.flat) if split and buffer.dtype == torch.bfloat16 else None
        self.weights = op.Weights(buffer, low, seed)
        self._shapes = [as_matrix(p) for p in self.flat.parameters] if self.factored else []
        self._number = {offset: number for number, offset in enumerate(self.flat.offsets)}
        self.moments = self._zeros(buffer)

    def _zeros(self, buffer: torch.Tensor) -> op.Moments | op.Factored | tuple[torch.Tensor, torch.Tensor]:
        """Moments of zero."""
        num, device = buffer.numel(), buffer.device
        if self.factored:
            *firsts, ends = op.first_means(self._shapes)
            places = zip(self.flat.offsets, self._shapes, firsts, strict=True)
            matrices = torch.tensor([[offset, *shape, *first, 0] for offset, shape, first in places], device=device)
            row, column = (torch.zeros(end, device=device) for end in ends)
            return op.Factored(row, column, matrices)
        if self.bits == 32:
            return torch.zeros(num, device=device), torch.zeros(num, device=device)
        zero = op.ZERO_1[self.bits]
        byte = zero << 4 | zero if self.bits == 4 else zero
        code_1 = torch.full((num * self.bits // 8,), byte, dtype=torch.uint8, device=device)
        scale = torch.zeros(num // op.BLOCKS[self.bits], device=device)
        maps = [op.dynamic_map(signed, self.bits).to(device) for signed in (True, False)]
        return op.Moments(code_1, torch.zeros_like(code_1), scale, scale.clone(), *maps)

    def numbers(self, offsets: list[int]) -> list[int] | None:
        """The numbers of the parameters at `offsets` among the matrices; None without factored moments."""
        return [self._number[offset] for offset in offsets] if self.factored else None

    def shapes(self, offsets: list[int]) -> list[tuple[int, int]] | None:
        """(R, C) of each parameter at `offsets`; None without factored moments."""
        return [self._shapes[self._number[offset]] for offset in offsets] if self.factored else None

    def state_of(self, index: int) -> dict[str, torch.Tensor]:
        """Views of a parameter's moments in the memory order of the weight.

        Names are bitsandbytes', and torch's Adafactor's for the factors. Codes of 4 bits are two to a byte.
        """
        offset, num = self.flat.offsets[index], self.flat.parameters[index].numel()
        moments = self.moments
        if isinstance(moments, op.Factored):
            state = self._factors(moments, index)
        elif not isinstance(moments, op.Moments):
            state = {name: m[offset : offset + num] for name, m in zip(("state1", "state2"), moments, strict=True)}
        else:
            codes = slice(offset * self.bits // 8, -(-(offset + num) * self.bits // 8))
            size = op.BLOCKS[self.bits]
            blocks = slice(offset // size, -(-(offset + num) // size))
            state = {"state1": moments.code_1[codes], "absmax1": moments.absmax_1[blocks], "qmap1": moments.map_1}
            state |= {"state2": moments.code_2[codes], "absmax2": moments.absmax_2[blocks], "qmap2": moments.map_2}
        if self.weights.low is not None:
            state["low"] = self.weights.low[offset : offset + num]
        return state

    def _factors(self, moments: op.Factored, index: int) -> dict[str, torch.Tensor]:
        """Views of a matrix's means of rows and columns."""
        (num_rows, num_columns), (row, column) = self._shapes[index], op.first_means(self._shapes[:index])[-1]
        return {"row_var": moments.row[row : row + num_rows], "col_var": moments.column[column : column + num_columns]}

    def wide(self, index: int) -> torch.Tensor:
        """A split weight as fp32 numbers in CPU memory, in its own shape and layout."""
        parameter, offset = self.flat.parameters[index], self.flat.offsets[index]
        assert self.weights.low is not None
        place = slice(offset, offset + parameter.numel())
        halves = op.Weights(self.weights.param[place].cpu(), self.weights.low[place].cpu())
        return op.read_weights(halves, slice(None)).as_strided(parameter.shape, parameter.stride())

    def torch_state_of(self, index: int) -> dict[str, torch.Tensor]:
        """32-bit moments under the names and in the shapes of torch's Adam; else empty."""
        if self.bits != 32 or self.factored:
            return {}
        parameter, offset = self.flat.parameters[index], self.flat.offsets[index]
        names = zip(("exp_avg", "exp_avg_sq"), self.moments, strict=True)
        return {name: m.as_strided(parameter.shape, parameter.stride(), offset) for name, m in names}

    def load(self, index: int, saved: dict[str, torch.Tensor]) -> None:
        """Load moments from `state_of`, from bitsandbytes (32-bit state for small tensors) or from torch's Adam.

        Raises ValueError for moments of another width.
        """
        own = self.state_of(index)
        if "state1" in own and "exp_avg" in saved and "state1" not in saved:
            stride = self.flat.parameters[index].stride()
            names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
            saved = {name: _in_layout(saved[theirs], stride) for name, theirs in names.items()}
        if "qmap2" in own and "state1" in saved and saved["state1"].dtype != torch.uint8:
            saved = {**saved, **_quantised(saved, own)}
        for name in own.keys() & {"qmap1", "qmap2"}:
            if name not in saved or not torch.equal(saved[name].cpu(), own[name].cpu()):
                raise ValueError(f"optimiser state: {name} is not the map of {self.bits}-bit state: go on with the "
                                 "--optimizer that the run was started with")  # fmt: skip
        for name, tensor in own.items():
            if name == "low" and name not in saved:  # the weights were stored whole: use their nearest bf16 numbers
                tensor.zero_()
                continue
            found = saved.get(name, torch.empty(0))
            if found.numel() != tensor.numel() or found.dtype != tensor.dtype:
                raise ValueError(f"optimiser state: {name} is {found.dtype} {list(found.shape)}, which "
                                 f"does not fit {tensor.dtype} {list(tensor.shape)}")  # fmt: skip
            tensor.copy_(found.flatten())


def _in_layout(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Flatten in the memory order of a tensor with this stride."""
    return in_memory_order(torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor))


def _quantised(saved: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert 32-bit moments to codes and scales."""
    made, bits = {}, op.bits_of(own["qmap1"])
    for k in "12":
        flat = saved[f"state{k}"].float().flatten().cpu()
        rows = torch.nn.functional.pad(flat, (0, -len(flat) % op.BLOCKS[bits])).view(-1, op.BLOCKS[bits])
        codes, made[f"absmax{k}"] = op.quantise(rows, own[f"qmap{k}"].cpu())
        codes = codes.flatten()
        if bits == 4:
            codes = codes[::2] << 4 | codes[1::2]
        made[f"state{k}"], made[f"qmap{k}"] = codes[: own[f"state{k}"].numel()], own[f"qmap{k}"]
    return made
