"""bitsandbytes' 8-bit Adam for weights of any layout and width. Only this module uses bitsandbytes.

It adds three things. The width of the state comes from the parameter group: DeepSpeed flattens a group into one tensor,
so a rule by size would not find the norms in it. Weights in channels_last keep their layout: bitsandbytes would make
every parameter contiguous at its first step. bf16 weights are rounded stochastically: at a learning rate of 1e-6 an
update is less than half of their last digit, and rounding to nearest would lose it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import bitsandbytes
import numpy as np
import torch

from sgg_fast.train.optim.flat import CHUNK, flat_gradient, in_memory_order

BLOCK = 256
"""Elements that share a scale in 8-bit state; `CHUNK` is a multiple."""


def stochastic_round(wide: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the expectation exact; infinities and NaN stay.

    Adds 16 uniform bits below bf16's last bit and cuts them off. A value that bf16 holds exactly is unchanged.
    """
    low = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    rounded = (wide.view(torch.int32) + low).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide).to(torch.bfloat16)


class GroupedAdam8bit(bitsandbytes.optim.Adam8bit):
    """Adam with `optim_bits` (8 or 32) per group. The state is flat, in the memory order of the weight."""

    def __init__(self, groups: Iterable[dict[str, Any]], seed: int) -> None:
        """Build the optimiser. seed: of stochastic rounding, which depends only on it, the parameter and its step."""
        super().__init__(groups)
        self._seed = seed
        self._places = {p: (i, k) for i, group in enumerate(self.param_groups) for k, p in enumerate(group["params"])}

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """bitsandbytes' configuration with the state's width from the group."""
        return {**super().get_config(gindex, pindex, group), "optim_bits": group["optim_bits"]}

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Flat zeros for a parameter's state."""
        return super().get_state_buffer(in_memory_order(p.data), dtype)

    @torch.no_grad()
    def step_one(self, parameter: torch.Tensor) -> torch.Tensor:
        """Step one parameter, for hooks in backward. Returns on the device whether its gradient was finite.

        If it was not, the weight is unchanged and the moments use a gradient of 0.
        """
        gindex, pindex = self._places[parameter]
        assert parameter.grad is not None
        finite = torch.linalg.vector_norm(parameter.grad, math.inf).isfinite()  # needs no memory of the gradient's size
        parameter.grad.masked_fill_(finite.logical_not(), 0)
        group = self.param_groups[gindex]
        if not self.state[parameter]:
            self.init_state(group, parameter, gindex, pindex)
        self._update(group, parameter, gindex, pindex, finite)
        return finite

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """bitsandbytes' step on flat fp32 tensors: the weight's own memory, or copies that are rounded back."""
        self._update(group, p, gindex, pindex)

    def _update(
        self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int, finite: torch.Tensor | None = None
    ) -> None:
        """Step `CHUNK` elements at a time. finite: on the device; the weight changes only where it is true."""
        weight, grad, state = in_memory_order(p.data), flat_gradient(p), self.state[p]
        step, narrow = state["step"], p.dtype == torch.bfloat16
        generator = torch.Generator(p.device)
        if narrow:
            draw = np.random.SeedSequence([self._seed, gindex, pindex, step + 1])
            generator.manual_seed(int(draw.generate_state(1, np.uint32)[0]))
        for start in range(0, weight.numel(), CHUNK):
            part = weight[start : start + CHUNK]
            before = None if narrow or finite is None else part.clone()
            stand_in = part.float()
            stand_in.grad = grad[start : start + CHUNK].float()
            self.state[stand_in] = _chunk_of(state, start)
            super().update_step(group, stand_in, gindex, pindex)
            del self.state[stand_in]
            after = stochastic_round(stand_in, generator) if narrow else stand_in
            if finite is not None:
                torch.where(finite, after, part if before is None else before, out=part)
            elif narrow:
                part.copy_(after)
        state["step"] = step + 1


def _chunk_of(state: dict[str, Any], start: int) -> dict[str, Any]:
    """Views of the state of `CHUNK` elements from `start` on."""
    elements, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
    cut = {"state1": elements, "state2": elements, "absmax1": blocks, "absmax2": blocks}
    return {name: value[cut[name]] if name in cut else value for name, value in state.items()}
