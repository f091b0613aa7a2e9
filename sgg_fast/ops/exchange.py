"""Exchange subject and object of relations of a packed batch. Letters: N objects, E relations."""

from __future__ import annotations

import dataclasses

import torch

from sgg_fast.graph import SceneGraphBatch


def exchange_ends(batch: SceneGraphBatch, chosen_E: torch.Tensor) -> SceneGraphBatch:
    """A new batch: `batch` with subject and object exchanged in the relations `chosen` [E] bool, plan included.

    An object keeps its messages and only their roles change, so a running sum partitions its slots by role; nothing is
    sorted or read back. Slots keep their order within a role, which may no longer ascend. Phrases are not changed:
    they keep the original order of subject and object.

    Equivalent PyTorch: `SceneGraphBatch.from_arrays(..., subject=where(chosen, object, subject), object=...)`
    """
    subject, object_ = (
        torch.where(chosen_E, there, here)
        for here, there in ((batch.subject, batch.object), (batch.object, batch.subject))
    )
    ptr, slot = batch.message_ptr.long(), batch.message_slot.long()
    place = torch.arange(len(slot), device=slot.device)
    owner = torch.searchsorted(ptr, place, right=True) - 1
    as_object = (place >= batch.message_mid.long()[owner]) ^ chosen_E[slot]
    before = torch.nn.functional.pad((~as_object).long().cumsum(0), (1, 0))  # messages as subject in front of each
    start, stop = before[ptr[:-1]], before[ptr[1:]]
    mid = ptr[:-1] + stop - start
    rank = before[:-1] - start[owner]
    target = torch.where(as_object, mid[owner] + place - ptr[owner] - rank, ptr[owner] + rank)
    return dataclasses.replace(
        batch,
        subject=subject,
        object=object_,
        message_mid=mid.int(),
        message_slot=torch.empty_like(batch.message_slot).scatter_(0, target, batch.message_slot),
    )
