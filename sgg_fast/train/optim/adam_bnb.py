"""bitsandbytes' 8-bit Adam of fp32 weights, for DeepSpeed and for CPUs. Only this module uses bitsandbytes.

It adds two things. The width of the state comes from the parameter group: DeepSpeed flattens a group into one tensor,
so a rule by size would not find the norms in it. Weights in channels_last keep their layout: bitsandbytes would make
every parameter contiguous at its first step.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch

from sgg_fast.train.optim.flat import flat_gradient, in_memory_order


class GroupedAdam8bit(bitsandbytes.optim.Adam8bit):
    """Adam with `optim_bits` (8 or 32) per group. The state is flat, in the memory order of the weight."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """bitsandbytes' configuration with the state's width from the group."""
        return {**super().get_config(gindex, pindex, group), "optim_bits": group["optim_bits"]}

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Flat zeros for a parameter's state."""
        return super().get_state_buffer(in_memory_order(p.data), dtype)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """bitsandbytes' step on the weight's own memory, flat."""
        stand_in = in_memory_order(p.data)
        stand_in.grad = flat_gradient(p).float()
        self.state[stand_in] = self.state[p]
        super().update_step(group, stand_in, gindex, pindex)
        del self.state[stand_in]
