"""Adam on flat buffers for both stages: 8-bit or 32-bit state by parameter group, a few launches a step.

It computes what `adam_bnb.GroupedAdam8bit` computes through bitsandbytes, on our kernels. Weights are fp32, or bf16
(rounded stochastically, or with their low halves kept). Gradients are read where backward left them. Nothing is read
back, so the step can be captured. Its checkpoints have bitsandbytes' format, and each optimiser loads the other's.
Letters: G groups, K chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.ops import adam as op
from sgg_fast.train.optim.flat import FlatParameters, in_memory_order

QUANT_STATE = "__bnb_optimizer_quant_state__"
"""Key of a parameter's tensors in bitsandbytes' state_dict."""

PAD_32BIT = 16
"""Alignment, in elements, of each parameter in a buffer with 32-bit state."""


Gradients = list[tuple[list[torch.Tensor], list[int]]]
"""For each group: flat gradients in their parameters' memory order, and their offsets in the group's buffers."""


class _Group:
    """A parameter group's weights and moments in flat buffers."""

    def __init__(self, group: dict[str, Any], seed: int, split: bool) -> None:
        self.bits = group["optim_bits"]
        self.flat = FlatParameters(group["params"], op.BLOCK_8BIT if self.bits == 8 else PAD_32BIT)
        buffer = self.flat.buffer
        low = torch.zeros_like(buffer, dtype=torch.int16) if split and buffer.dtype == torch.bfloat16 else None
        self.weights = op.Weights(buffer, low, seed)
        if self.bits == 32:
            self.moments: op.Moments | tuple[torch.Tensor, torch.Tensor] = (
                torch.zeros_like(buffer, dtype=torch.float32),
                torch.zeros_like(buffer, dtype=torch.float32),
            )
            return
        scale = torch.zeros(buffer.numel() // op.BLOCK_8BIT, device=buffer.device)
        self.moments = op.Moments(
            torch.full_like(buffer, op.ZERO_1, dtype=torch.uint8),
            torch.full_like(buffer, op.ZERO_2, dtype=torch.uint8),
            scale,
            scale.clone(),
            op.dynamic_map(True).to(buffer.device),
            op.dynamic_map(False).to(buffer.device),
        )

    def state_of(self, index: int) -> dict[str, torch.Tensor]:
        """Views of a parameter's moments under bitsandbytes' names, flat in the memory order of the weight."""
        offset, num = self.flat.offsets[index], self.flat.parameters[index].numel()
        state = {name: self.moments[k][offset : offset + num] for k, name in enumerate(("state1", "state2"))}
        if isinstance(self.moments, op.Moments):
            blocks = slice(offset // op.BLOCK_8BIT, -(-(offset + num) // op.BLOCK_8BIT))
            state |= {"absmax1": self.moments.absmax_1[blocks], "absmax2": self.moments.absmax_2[blocks]}
            state |= {"qmap1": self.moments.map_1, "qmap2": self.moments.map_2}
        if self.weights.low is not None:
            state["low"] = self.weights.low[offset : offset + num]
        return state

    def torch_state_of(self, index: int) -> dict[str, torch.Tensor]:
        """32-bit moments under the names and in the shapes of torch's Adam; empty for 8 bits."""
        if self.bits == 8:
            return {}
        parameter, offset = self.flat.parameters[index], self.flat.offsets[index]
        names = zip(("exp_avg", "exp_avg_sq"), self.moments, strict=True)
        return {name: m.as_strided(parameter.shape, parameter.stride(), offset) for name, m in names}

    def load(self, index: int, saved: dict[str, torch.Tensor]) -> None:
        """Load moments from `state_of`, from bitsandbytes (32-bit state for small tensors) or from torch's Adam."""
        own = self.state_of(index)
        if "state1" not in saved:
            stride = self.flat.parameters[index].stride()
            names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
            saved = {name: _in_layout(saved[theirs], stride) for name, theirs in names.items()}
        if self.bits == 8 and saved["state1"].dtype != torch.uint8:
            saved = {**saved, **_quantised(saved, own)}
        for name in own.keys() & {"qmap1", "qmap2"}:
            if not torch.equal(saved[name].cpu(), own[name].cpu()):
                raise ValueError(f"optimiser state: {name} is not bitsandbytes' dynamic map, which 8-bit state needs")
        for name, tensor in own.items():
            if name == "low" and name not in saved:  # the weights were stored whole: use their nearest bf16 numbers
                tensor.zero_()
                continue
            if saved[name].numel() != tensor.numel() or saved[name].dtype != tensor.dtype:
                raise ValueError(f"optimiser state: {name} is {saved[name].dtype} {list(saved[name].shape)}, which "
                                 f"does not fit {tensor.dtype} {list(tensor.shape)}")  # fmt: skip
            tensor.copy_(saved[name].flatten())


def _in_layout(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Flatten in the memory order of a tensor with this stride."""
    return in_memory_order(torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor))


def _quantised(saved: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert 32-bit moments to codes and scales."""
    made = {}
    for k in "12":
        flat = saved[f"state{k}"].float().flatten().cpu()
        rows = torch.nn.functional.pad(flat, (0, -len(flat) % op.BLOCK_8BIT)).view(-1, op.BLOCK_8BIT)
        codes, made[f"absmax{k}"] = op.quantise(rows, own[f"qmap{k}"].cpu())
        made[f"state{k}"], made[f"qmap{k}"] = codes.flatten()[: len(flat)], own[f"qmap{k}"]
    return made


class FlatAdam(torch.optim.Optimizer):
    """Adam over the groups of `optim.parameter_groups`, with clipping by the norm of all gradients and a skip flag.

    The interface for a captured step:

    * `gradients()` after backward. `table` of them gives the host's table [K, 3]. `launch` of them and the table on the
      device is the step itself; it may be captured with a table that is filled later.
    * `rates`: fp32 [G] on the device, a learning rate for each of `param_groups`. `step()` fills it from there; a
      caller of `launch` fills it itself (`rates.copy_(..)`).
    * `control`: fp32 [8] on the device by the places of `ops.adam` (INVERSE_SCALE: NaN makes a step that changes
      nothing). `num_steps`: int32 [1], the number of applied steps.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], seed: int, max_norm: float = 0.0, split: bool = False) -> None:
        """Move the weights into flat buffers.

        groups: with "params", "lr" and "optim_bits", each of one dtype, fp32 or bf16. seed: of stochastic rounding.
        max_norm: the norm of all gradients is clipped to this; 0 turns clipping off. split: keep the low halves of bf16
        weights, which makes them fp32 master weights in two parts. Raises ValueError as `FlatParameters` does.
        """
        self.hyper = op.Hyper(max_norm=max_norm)
        betas = (self.hyper.beta_1, self.hyper.beta_2)
        super().__init__(groups, {"betas": betas, "eps": self.hyper.eps, "weight_decay": 0.0})
        # Each group has random draws of its own for rounding.
        self._groups = [_Group(group, (64 * seed + g) % 2**31, split) for g, group in enumerate(self.param_groups)]
        device = self._groups[0].flat.buffer.device
        self.num_steps = torch.zeros(1, dtype=torch.int32, device=device)
        self.control = torch.zeros(op.CONTROL_SIZE, device=device)
        self.control[op.INVERSE_SCALE] = 1
        self._rates_G4 = torch.zeros(len(self._groups), 4, device=device)  # the kernels need 16 bytes each
        self._known_rates: list[float] = []

    @property
    def rates(self) -> torch.Tensor:
        """fp32 [G] on the device: the learning rates of the next launch."""
        return self._rates_G4[:, 0]

    @property
    def applied(self) -> torch.Tensor:
        """fp32 scalar on the device: 1 if the last step was applied, 0 if a gradient was not finite."""
        return self.control[op.APPLIED]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip and step if every gradient is finite (`applied`). Copies a table to the device."""
        assert closure is None
        rates = [group["lr"] for group in self.param_groups]
        if rates != self._known_rates:
            self.rates.copy_(torch.tensor(rates))
            self._known_rates = rates
        gradients = self.gradients()
        self.launch(gradients, self.table(gradients).to(self.control.device, non_blocking=True))

    def _backend(self) -> str:
        return ops.backend_for(self.control.device, torch.float32)

    def gradients(self) -> Gradients:
        """The gradients that exist."""
        return [group.flat.gradients() for group in self._groups]

    def table(self, gradients: Gradients) -> torch.Tensor:
        """The table of the gradients' addresses, on the host."""
        backend = self._backend()
        return torch.cat([op.chunk_table(*part, backend) for part in gradients])

    def launch(self, gradients: Gradients, table: torch.Tensor) -> None:
        """Run the step from device memory; it may be captured, with a table that is filled later."""
        backend = self._backend()
        tables = table.split([op.num_chunks([g.numel() for g in found], backend) for found, _ in gradients])
        given = [op.GroupGrads(*part, table) for part, table in zip(gradients, tables, strict=True)]
        op.adam_decide_([part for part in given if part.grads], self.control, self.num_steps, self.hyper)
        for group, part, rate in zip(self._groups, given, self._rates_G4, strict=True):
            if part.grads:
                op.adam_update_(group.weights, group.moments, part, self.control, rate, self.num_steps, self.hyper)

    def _parameters(self) -> list[tuple[_Group, int, nn.Parameter]]:
        """All parameters in the order of a state_dict: group, index in it, parameter."""
        return [(group, i, p) for group in self._groups for i, p in enumerate(group.flat.parameters)]

    def state_dict(self) -> dict[str, Any]:
        """A state_dict in bitsandbytes' format, made of views, plus `control`."""
        packed, step = super().state_dict(), int(self.num_steps)
        packed["state"] = {
            number: {"step": step, QUANT_STATE: group.state_of(i), **group.torch_state_of(i)}
            for number, (group, i, _) in enumerate(self._parameters())
        } if step else {}  # fmt: skip
        return {**packed, "control": self.control}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `state_dict`, or of bitsandbytes' Adam8bit, for parameters of equal sizes and groups.

        A parameter without saved state starts from zero. All continue from the largest number of steps. Raises
        ValueError if the state does not fit.
        """
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("optimiser state: other parameter groups than here")
        numbers = [number for group in saved_groups for number in group["params"]]
        steps = [0]
        for number, (group, i, _) in zip(numbers, self._parameters(), strict=True):
            saved = dict(state_dict["state"].get(number, {}))
            saved |= saved.pop(QUANT_STATE, {})
            if saved:
                steps.append(int(saved["step"]))
                group.load(i, saved)
        for own, saved_group in zip(self.param_groups, saved_groups, strict=True):
            own.update({name: saved_group[name] for name in ("lr", "base_lr") if name in saved_group})
        self.num_steps.fill_(max(steps))
        betas = (op.CORRECTION_1, self.hyper.beta_1), (op.CORRECTION_2, self.hyper.beta_2)
        for place, beta in betas:
            self.control[place] = 1 - beta ** max(steps)
        if "control" in state_dict:
            self.control.copy_(state_dict["control"])
        self._known_rates = []
