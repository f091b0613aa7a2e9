"""Adam on flat buffers for both stages: its state's form by parameter group, a few launches a step.

State in 32 and 8 bits computes what bitsandbytes computes, on our kernels; state in 4 bits is torchao's, and factored
second moments are Adafactor's (`adam_state.py`). Weights are fp32, or bf16 (rounded stochastically, or with their
low halves kept). It steps all weights after backward, or each one inside backward, or some at a time for a caller
(`backward.behind`). Gradients are read where backward left them. Nothing is read back, so the step can be captured. Its
checkpoints have bitsandbytes' format, and with 8 and 32 bits each optimiser loads the other's. Letters: G groups, K
chunks, U rows of counts: one, or one a weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.ops import adam as op
from sgg_fast.train.optim.adam_state import FlatGroup

QUANT_STATE = "__bnb_optimizer_quant_state__"
"""Key of a parameter's tensors in bitsandbytes' state_dict."""

Gradients = list[tuple[list[torch.Tensor], list[int]]]
"""For each group: flat gradients in their parameters' memory order, and their offsets in the group's buffers."""


class FlatAdam(torch.optim.Optimizer):
    """Adam over the groups of `optim.parameter_groups`, with clipping by the norm of all gradients and a skip flag.

    The interface for a captured step, in which nothing may be copied from the host:

    * `gradients()` after backward. `table` of them gives the host's table [K, 3]. `launch` of them and the table on the
      device is the step itself; it may be captured with a table that is filled later.
    * After `apart`, `update` of some weights' gradients, their table and their row; then `sum_up`.
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
        self._rows = [0] * len(self._places)
        """Row of counts of each weight."""
        self._steps_U4 = torch.zeros(1, 4, dtype=torch.int32, device=device)  # 16 bytes each, for the kernels
        self._controls_U8 = torch.zeros(1, op.CONTROL_SIZE, device=device)
        self.control = self._controls_U8[0]
        self.in_backward, self.is_apart = in_backward, False
        self.waits = False
        """Whether updates in backward are left to a caller of `step_one`, who has the gradients of all processes."""
        self.scale_by(1)
        self._rates_G4 = torch.zeros(len(self._groups), 4, device=device)
        self._known_rates: list[float] = []
        if in_backward:
            self.apart()
            self._step_in_backward()

    def apart(self) -> None:
        """Before the first step: give each weight a row of counts, by which it is decided apart."""
        self._rows, self.is_apart = list(range(len(self._places))), True
        self._steps_U4, self._controls_U8 = (
            counts.repeat(len(self._rows), 1) for counts in (self._steps_U4, self._controls_U8)
        )
        self.control = torch.zeros_like(self.control)

    def unite(self, numbers: Sequence[int]) -> None:
        """Decide on these weights together, by the row of the first one, from the largest number of steps on."""
        index = torch.tensor(numbers, device=self.rates.device)
        most = self.num_steps[index].argmax().view(1)
        for counts in (self._steps_U4, self._controls_U8):
            counts[index] = counts[index][most]
        for number in numbers:
            self._rows[number] = numbers[0]

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
        """int32 [U] on the device: the numbers of applied steps, for each row."""
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
        """Before backward: forget what the last step's updates decided."""
        if self.is_apart:
            self._controls_U8[:, op.APPLIED] = 1
            self._controls_U8[:, op.NORM] = 0

    @torch.no_grad()
    def step_one(self, number: int) -> None:
        """Step one weight, counted over all groups, by its gradient, and free that. A few launches, no copy."""
        g, i = self._places[number]
        gradients = self.gradients([number])
        ((grad,), _) = gradients[g]
        self.update(gradients, torch.add(self._tables[number], self._address, alpha=grad.data_ptr()), number)
        self._groups[g].flat.parameters[i].grad = None

    def _backend(self) -> str:
        return ops.backend_for(self.rates.device, torch.float32)

    def gradients(self, numbers: Iterable[int] | None = None) -> Gradients:
        """The gradients that exist, of all weights or of those with these numbers, counted over all groups."""
        if numbers is None:
            return [group.flat.gradients() for group in self._groups]
        places = [self._places[number] for number in numbers]
        return [group.flat.gradients(i for h, i in places if h == g) for g, group in enumerate(self._groups)]

    def table(self, gradients: Gradients) -> torch.Tensor:
        """The table of the gradients' addresses, on the host."""
        backend = self._backend()
        pairs = zip(gradients, self._groups, strict=True)
        return torch.cat([op.chunk_table(*part, backend, group.numbers(part[1])) for part, group in pairs])

    def lengths(self, gradients: Gradients) -> list[int]:
        """K of each group's part of the table."""
        backend, pairs = self._backend(), zip(gradients, self._groups, strict=True)
        return [op.num_chunks([g.numel() for g in found], backend, group.factored) for (found, _), group in pairs]

    def launch(self, gradients: Gradients, table: torch.Tensor) -> None:
        """Run the step from device memory; it may be captured, with a table that is filled later."""
        if self.is_apart:
            self.sum_up()
        else:
            self.update(gradients, table, 0)

    def sum_up(self) -> None:
        """Put what the step's updates decided apart into `control`."""
        self.control[op.APPLIED] = self._controls_U8[:, op.APPLIED].amin()
        self.control[op.NORM] = torch.linalg.vector_norm(self._controls_U8[:, op.NORM])

    def update(self, gradients: Gradients, table: torch.Tensor, row: int) -> None:
        """Decide on these gradients by a row of counts, and update their weights; there must be some."""
        pairs = list(zip(gradients, self._groups, strict=True))
        given = [
            op.GroupGrads(*part, of_part, group.shapes(part[1]))
            for (part, group), of_part in zip(pairs, table.split(self.lengths(gradients)), strict=True)
        ]
        control, step = self._controls_U8[row], self._steps_U4[row, :1]
        op.adam_decide_([part for part in given if part.grads], control, step, self.hyper)
        for group, part, rate in zip(self._groups, given, self._rates_G4, strict=True):
            if part.grads:
                op.adam_update_(group.weights, group.moments, part, control, rate, step, self.hyper)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters by their numbers."""
        return [parameter for _, _, parameter in self._parameters()]

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
            if (step := steps[self._rows[number]])
        }
        return {**packed, "control": self._controls_U8.cpu()[self._rows]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `state_dict`, or of bitsandbytes' Adam8bit, for parameters of equal sizes and groups.

        A parameter without saved state starts from zero. Those of a row continue from their largest number of steps.
        Raises ValueError if the state does not fit.
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
        most = {self._rows[k]: k for k in sorted(range(len(steps)), key=steps.__getitem__)}
        chosen_U = [most[row] for row in self._rows[: len(self._steps_U4)]]
        counts_U = torch.tensor(steps)[chosen_U]
        self.num_steps.copy_(counts_U)
        for place, beta in (op.CORRECTION_1, self.hyper.beta_1), (op.CORRECTION_2, self.hyper.beta_2):
            self._controls_U8[:, place] = (1 - beta ** counts_U.double()).to(self._controls_U8)
        if (control := state_dict.get("control")) is not None:
            self._controls_U8.copy_(control.expand(len(steps), -1)[chosen_U])
        self._known_rates = []


def _step_by(optimizer: weakref.ref[FlatAdam], number: int, parameter: torch.Tensor) -> None:
    """Step one weight by its optimiser, if that is still there."""
    found = optimizer()
    if found is not None and not found.waits:
        found.step_one(number)
