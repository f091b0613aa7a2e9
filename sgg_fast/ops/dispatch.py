"""Choice of the backend: resolved once per process from request and device, and logged once."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

from sgg_fast import env

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Value types of the Triton kernels; the reference also takes float64."""

_requested = "auto"
_assumed: str | None = None
_announced: set[tuple[str, str]] = set()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_kernels(choice: str) -> None:
    """Set the process-wide choice: "auto" (Triton on CUDA, reference elsewhere), "reference" or "triton".

    Raises ValueError for another word, and for "triton" where Triton cannot be imported.
    """
    global _requested
    if choice not in ("auto", *BACKENDS):
        raise ValueError(f"kernels must be auto, reference or triton, not {choice!r}")
    if choice == "triton" and not _has_triton():
        raise ValueError("--kernels triton: the package triton is not installed (pip install triton)")
    _requested = choice


@contextlib.contextmanager
def assumed(backend: str) -> Iterator[None]:
    """Context in which every caller gets `backend` on any device: for tensors without memory, and for comparisons."""
    global _assumed
    before, _assumed = _assumed, backend
    try:
        yield
    finally:
        _assumed = before


def why_not_triton(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Reason why Triton cannot compute on this device with these dtypes, or None."""
    if not _has_triton():
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type}, and Triton needs CUDA (or TRITON_INTERPRET=1, its slow interpreter)"
    unknown = [str(dtype) for dtype in dtypes if dtype not in KERNEL_DTYPES]
    return f"{unknown[0]} values, and the kernels take float32, float16 and bfloat16" if unknown else None


@torch.compiler.assume_constant_result
def backend_for(device: torch.device, *dtypes: torch.dtype) -> str:
    """ "reference" or "triton" for tensors on `device` with values of `dtypes`, by the current choice.

    The automatic choice falls back to the reference. Raises ValueError if "triton" was requested and cannot run.
    A compiled caller keeps the result of its tracing.
    """
    if _assumed is not None:
        return _assumed
    obstacle = why_not_triton(device, dtypes)
    if _requested == "triton" and obstacle is not None:
        raise ValueError(f"--kernels triton: {obstacle}")
    if _requested != "auto":
        backend, reason = _requested, f"--kernels {_requested}"
    elif device.type == "cuda" and (left_out := env.unfit("kernels")):
        backend, reason = "reference", f"Triton is left out since sgg-doctor: {left_out}"
    elif device.type == "cuda" and obstacle is None:
        backend, reason = "triton", "CUDA tensors"
    else:
        backend, reason = "reference", f"{device.type} tensors"
        if device.type == "cuda" and obstacle is not None:
            reason = obstacle
    if (backend, reason) not in _announced:
        _announced.add((backend, reason))
        logger.info("kernels: %s (%s)", backend, reason)
    return backend
