"""The process and its device: where to compute, which rank this is, how much memory was used."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its import takes seconds, which a refusal does not wait for
    import torch


def device() -> torch.device:
    """This process's device: its CUDA card by LOCAL_RANK, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def local_rank() -> int:
    """Index of this process on its machine, as torchrun and DeepSpeed's launcher set it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank() -> int:
    """Index of this process in the run."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes in the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def peak_memory() -> int:
    """Bytes at their highest so far: the CUDA allocator's, or the resident set of this process on CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
