"""What DeepSpeed's ZeRO 1 and 2 allocate, in order, for the allocator's arithmetic: setting up and an update.

Source: `stage_1_and_2.py` of DeepSpeed 0.19. A part that is offloaded is not on the device.
"""

from __future__ import annotations

from collections.abc import Iterator

from sgg_fast.train.memory.allocator import CachingAllocator, Event
from sgg_fast.train.memory.parts import EngineLayout, WeightGroup, state_bytes

FP32 = 4
"""Bytes of a number."""


def set_up(
    allocator: CachingAllocator,
    layout: EngineLayout,
    groups: list[WeightGroup],
    order: list[tuple[int, int]],
    keys: Iterator[int],
) -> None:
    """Move the fp32 weights to the device, narrow each, and flatten a group at a time, with its fp32 masters.

    order: (elements, index of the group) of each weight in the module's order.
    """
    width, names = groups[0].dtype.itemsize, [f"weight {number}" for number in range(len(order))]
    for name, (numel, _) in zip(names, order, strict=True):
        allocator.allocate(f"wide {name}", FP32 * numel)
    for name, (numel, _) in zip(names, order, strict=True):
        allocator.allocate(name, width * numel)
        allocator.release(f"wide {name}")
    for number, group in enumerate(groups):
        allocator.empty_cache()
        allocator.allocate(next(keys), width * group.numel)
        for name, (_, of) in zip(names, order, strict=True):
            if of == number:
                allocator.release(name)
        share = -(-group.numel // layout.shards)
        if not layout.offloads("optimizer"):
            allocator.run([("clone", width * share), (next(keys), FP32 * share), ("clone", -1)])


def update(layout: EngineLayout, groups: list[WeightGroup], keys: Iterator[int], first: bool) -> list[Event]:
    """An update: the gradients of a group flat, then in fp32. The first one also makes the state of the optimiser."""
    events: list[Event] = []
    if layout.offloads("optimizer"):
        return events
    for group in groups:
        share = -(-group.numel // layout.shards)
        events += [("flat", group.dtype.itemsize * share), ("in fp32", FP32 * share), ("flat", -1)]
        if first:
            half = state_bytes(group, layout.optim.optimizer, layout.shards) // 2
            events += [(next(keys), half), (next(keys), half)]
        events.append(("in fp32", -1))
    return events
