"""Checks whether the installed packages fit each other, from their own metadata, without the network."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN, Finding

PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "bitsandbytes", "deepspeed", "safetensors")
CURES = {"deepspeed 0.19.8": "it crashes on channels_last weights: pip install deepspeed==0.19.7"}
"""Versions that are known not to work, and the cure."""


def installed() -> dict[str, str]:
    """Package -> version, "" where it is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def wanted_triton() -> str | None:
    """The version that torch's own metadata pins; None if it pins none."""
    for line in requires("torch") or []:
        if pinned := re.match(r"triton==([\w.]+)", line.replace(" ", "")):
            return pinned.group(1)
    return None


def check(found: dict[str, str], pinned: str | None, cuda: str | None) -> Iterator[Finding]:
    """Findings about packages. cuda: what torch was built for, None for a CPU build."""
    listed = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    absent = [name for name, number in found.items() if not number]
    note = f"; absent: {', '.join(absent)}" if absent else ""
    yield Finding("versions", OK, f"python {sys.version.split()[0]}, {listed}{note}")
    for name, number in found.items():
        if cure := CURES.get(f"{name} {number}"):
            yield Finding(name, FAILED, f"{number}: {cure}")
    if cuda is None:
        yield Finding("CUDA", UNKNOWN, "this torch is built for CPUs; on a GPU machine install its CUDA build")
    elif pinned and found["triton"].partition("+")[0] != pinned:
        conflict = f"torch {found['torch']} wants triton {pinned}, not {found['triton'] or 'none'}"
        yield Finding("triton", FAILED, f"{conflict}: pip install triton=={pinned}", "kernels")
