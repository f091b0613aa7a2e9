"""Adam on flat buffers for both stages: its state's form by parameter group, a few launches a step.

State in 32 and 8 bits computes what bitsandbytes computes, on our kernels; state in 4 bits is torchao's, and factored
second moments are Adafactor's (`adam_state.py`). Weights are fp32, or bf16 (rounded stochastically, or with their
low halves kept). It steps all weights after backward, or each one inside backward. Gradients are read where backward
left them. Nothing is read back, so the step can be captured. Its checkpoints have bitsandbytes' format, and with 8 and
32 bits each optimiser loads the other's. Letters: G groups, K chunks, U updates that count for themselves: one, or one
a weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.ops import adam as op
from sgg_fast.train.optim.adam_state import FlatGroup
from sgg_fast.train.optim.flat import flat_gradient

QUANT_STATE = "__bnb_optimizer_quant_state__"
"""Key of a parameter's tensors in bitsandbytes' state_dict."""

Gradients = list[tuple[list[torch.Tensor], list[int]]]
"""For each group: flat gradients in their parameters' memory order, and their offsets in the group's buffers."""


class FlatAdam(torch.optim.Optimizer):
    """Adam over the groups of `optim.parameter_groups`, with clipping by the norm of all gradients and a skip flag.

    The interface for a captured step, in which nothing may be copied from the host:

    * `gradients()` after backward. `table` of them gives the host's table [K, 3]. `launch` of them and the table on the
      device is the step itself; it may be captured with a table that is filled later.
    * With `in_backward` also `begin()` and the rates before backward. Afterwards no gradient is left, the table is
      empty, and `launch` only sums up what the updates decided.
    * `rates`: fp32 [G] on the device, a learning rate for each of `param_groups`. `send_rates()`, which `step()` calls,
      fills it from there; a caller of `launch` fills it itself (`rates.copy_(..)`).
    * `control`: fp32 [8] on the device by the places of `ops.adam`. `scale_by(..)`: a factor of all gradients. NaN
      makes a step that changes nothing.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        seed: int,
        max_norm: float = 0.0,
        split: bool = False,
        in_backward: bool = False,
    ) -> None:
        """Move the weights into flat buffers.

        groups: with "params", "lr" and the keys of `FlatGroup`, each of one dtype, fp32 or bf16. seed: of stochastic
        rounding. max_norm: the norm of all gradients is clipped to this; 0 turns clipping off. split: keep the low
        halves of bf16 weights, which makes them fp32 master weights in two parts. in_backward: hooks step each weight
        and free its gradient, without clipping; a weight whose gradient is not finite is skipped alone. Raises
        ValueError as `FlatParameters` does.
        """
        assert not (in_backward and max_norm)
        self.hyper = op.Hyper(max_norm=max_norm)
        betas = (self.hyper.beta_1, self.hyper.beta_2)
        super().__init__(groups, {"betas": betas, "eps": self.hyper.eps, "weight_decay": 0.0})
        # Each group has random draws of its own for rounding.
        self._groups = [FlatGroup(group, (64 * seed + g) % 2**31, split) for g, group in enumerate(self.param_groups)]
        device = self._groups[0].flat.buffer.device
        self._places = [(g, i) for g, group in enumerate(self._groups) for i in range(len(group.flat.parameters))]
        num_updates = len(self._places) if in_backward else 1
        self._steps_U4 = torch.zeros(num_updates, 4, dtype=torch.int32, device=device)  # 16 bytes each, for the kernels
        self._controls_U8 = torch.zeros(num_updates, op.CONTROL_SIZE, device=device)
        self.control = torch.zeros(op.CONTROL_SIZE, device=device) if in_backward else self._controls_U8[0]
        self.in_backward = in_backward
        self.waits = False
        """Whether updates in backward are left to a caller of `step_one`, who has the gradients of all processes."""
        self.scale_by(1)
        self._rates_G4 = torch.zeros(len(self._groups), 4, device=device)
        self._known_rates: list[float] = []
        if in_backward:
            self._step_in_backward()

    @property
    def rates(self) -> torch.Tensor:
        """fp32 [G] on the device: the learning rates of the next launch."""
        return self._rates_G4[:, 0]

    @property
    def applied(self) -> torch.Tensor:
        """fp32 scalar on the device: 1 if the last step was applied, 0 if a gradient was not finite."""
        return self.control[op.APPLIED]

    @property
    def norm(self) -> torch.Tensor:
        """fp32 scalar on the device: the norm of all gradients of the last step, before clipping."""
        return self.control[op.NORM]

    @property
    def num_steps(self) -> torch.Tensor:
        """int32 [U] on the device: the numbers of applied steps."""
        return self._steps_U4[:, 0]

    def scale_by(self, factor: float) -> None:
        """Multiply all gradients of the next steps by this."""
        self._controls_U8[:, op.INVERSE_SCALE] = factor

    def send_rates(self) -> None:
        """Copy the learning rates of `param_groups` to the device if they have changed."""
        rates = [group["lr"] for group in self.param_groups]
        if rates != self._known_rates:
            self.rates.copy_(torch.tensor(rates))
            self._known_rates = rates

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip and step if every gradient is finite (`applied`). Copies a table to the device."""
        assert closure is None
        self.send_rates()
        gradients = self.gradients()
        self.launch(gradients, self.table(gradients).to(self.rates.device, non_blocking=True))

    def _step_in_backward(self) -> None:
        """Hook the parameters. Their tables lie on the device, and each lacks only its gradient's address."""
        tables = []
        for group, i, parameter in self._parameters():
            offsets = [group.flat.offsets[i]]
            tables.append(op.chunk_table([parameter], offsets, self._backend(), group.numbers(offsets)))
            tables[-1][:, 0] -= parameter.data_ptr()
        device = self.rates.device
        self._tables = torch.cat(tables).to(device).split([len(table) for table in tables])
        self._address = torch.tensor([1, 0, 0], device=device)
        # Autograd holds a hook where Python's collector does not look: a hook that held its optimiser would keep it.
        own = weakref.ref(self)
        for number, (_, _, parameter) in enumerate(self._parameters()):
            parameter.register_post_accumulate_grad_hook(partial(_step_by, own, number))

    def begin(self) -> None:
        """Before backward: forget what the last step's updates in backward decided."""
        if self.in_backward:
            self._controls_U8[:, op.APPLIED] = 1
            self._controls_U8[:, op.NORM] = 0

    @torch.no_grad()
    def step_one(self, number: int) -> None:
        """Step one weight, counted over all groups, by its gradient, and free that. A few launches, no copy."""
        g, i = self._places[number]
        group, parameter = self._groups[g], self._groups[g].flat.parameters[i]
        grad = flat_gradient(parameter)
        table = torch.add(self._tables[number], self._address, alpha=grad.data_ptr())
        offsets = [group.flat.offsets[i]]
        part = op.GroupGrads([grad], offsets, table, group.shapes(offsets))
        control, step = self._controls_U8[number], self._steps_U4[number, :1]
        op.adam_decide_([part], control, step, self.hyper)
        op.adam_update_(group.weights, group.moments, part, control, self._rates_G4[g], step, self.hyper)
        parameter.grad = None

    def _backend(self) -> str:
        return ops.backend_for(self.rates.device, torch.float32)

    def gradients(self) -> Gradients:
        """The gradients that exist."""
        return [group.flat.gradients() for group in self._groups]

    def table(self, gradients: Gradients) -> torch.Tensor:
        """The table of the gradients' addresses, on the host."""
        backend = self._backend()
        pairs = zip(gradients, self._groups, strict=True)
        return torch.cat([op.chunk_table(*part, backend, group.numbers(part[1])) for part, group in pairs])

    def launch(self, gradients: Gradients, table: torch.Tensor) -> None:
        """Run the step from device memory; it may be captured, with a table that is filled later."""
        if self.in_backward:
            self.control[op.APPLIED] = self._controls_U8[:, op.APPLIED].amin()
            self.control[op.NORM] = torch.linalg.vector_norm(self._controls_U8[:, op.NORM])
            return
        backend = self._backend()
        pairs = list(zip(gradients, self._groups, strict=True))
        lengths = [op.num_chunks([g.numel() for g in found], backend, group.factored) for (found, _), group in pairs]
        given = [
            op.GroupGrads(*part, of_part, group.shapes(part[1]))
            for (part, group), of_part in zip(pairs, table.split(lengths), strict=True)
        ]
        control, step = self.control, self._steps_U4[0, :1]
        op.adam_decide_([part for part in given if part.grads], control, step, self.hyper)
        for group, part, rate in zip(self._groups, given, self._rates_G4, strict=True):
            if part.grads:
                op.adam_update_(group.weights, group.moments, part, control, rate, step, self.hyper)

    def split_weights(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each weight that is kept in two halves, with its fp32 numbers in CPU memory."""
        for group, i, parameter in self._parameters():
            if group.weights.low is not None:
                yield parameter, group.wide(i)

    def _parameters(self) -> list[tuple[FlatGroup, int, nn.Parameter]]:
        """All parameters in the order of a state_dict: group, index in it, parameter."""
        return [(self._groups[g], i, self._groups[g].flat.parameters[i]) for g, i in self._places]

    def state_dict(self) -> dict[str, Any]:
        """A state_dict in bitsandbytes' format, made of views, plus `control`."""
        packed, steps = super().state_dict(), self.num_steps.tolist()
        packed["state"] = {
            number: {"step": step, QUANT_STATE: group.state_of(i), **group.torch_state_of(i)}
            for number, (group, i, _) in enumerate(self._parameters())
            if (step := steps[number % len(steps)])
        }
        return {**packed, "control": self._controls_U8}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `state_dict`, or of bitsandbytes' Adam8bit, for parameters of equal sizes and groups.

        A parameter without saved state starts from zero. All continue from the largest number of steps, unless each
        counts its own. Raises ValueError if the state does not fit.
        """
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("optimiser state: other parameter groups than here")
        numbers = [number for group in saved_groups for number in group["params"]]
        steps = [0] * len(numbers)
        for k, (number, (group, i, _)) in enumerate(zip(numbers, self._parameters(), strict=True)):
            saved = dict(state_dict["state"].get(number, {}))
            saved |= saved.pop(QUANT_STATE, {})
            if saved:
                steps[k] = int(saved["step"])
                group.load(i, saved)
        for own, saved_group in zip(self.param_groups, saved_groups, strict=True):
            own.update({name: saved_group[name] for name in ("lr", "base_lr") if name in saved_group})
        counts_U = torch.tensor(steps if len(self._steps_U4) > 1 else [max(steps)])
        self.num_steps.copy_(counts_U)
        for place, beta in (op.CORRECTION_1, self.hyper.beta_1), (op.CORRECTION_2, self.hyper.beta_2):
            self._controls_U8[:, place] = (1 - beta ** counts_U.double()).to(self._controls_U8)
        if state_dict.get("control", self.rates).shape == self._controls_U8.shape:
            self._controls_U8.copy_(state_dict["control"])
        self._known_rates = []


def _step_by(optimizer: weakref.ref[FlatAdam], number: int, parameter: torch.Tensor) -> None:
    """Step one weight by its optimiser, if that is still there."""
    found = optimizer()
    if found is not None and not found.waits:
        found.step_one(number)
