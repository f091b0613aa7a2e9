"""Which form of a kernel runs: decided once per process, by request and device, and said once in the log."""

from __future__ import annotations

import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "triton")
_requested = "auto"
_announced: set[tuple[str, str]] = set()


def use_kernels(choice: str) -> None:
    """Set the process-wide choice: "auto" (Triton on CUDA, reference elsewhere), "reference" or "triton".

    Raises ValueError for another word, and for "triton" where Triton cannot be imported.
    """
    global _requested
    if choice not in ("auto", *BACKENDS):
        raise ValueError(f"kernels must be auto, reference or triton, not {choice!r}")
    if choice == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("--kernels triton: the package triton is not installed (pip install triton)")
    _requested = choice


def backend_for(device: torch.device) -> str:
    """ "reference" or "triton" for tensors on `device`, by the current choice."""
    if _requested != "auto":
        backend, reason = _requested, f"--kernels {_requested}"
    elif device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        backend, reason = "triton", "CUDA tensors"
    else:
        backend, reason = "reference", f"{device.type} tensors"
    if (backend, reason) not in _announced:
        _announced.add((backend, reason))
        logger.info("graph kernels: %s (%s)", backend, reason)
    return backend
