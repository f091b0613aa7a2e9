"""Checks this machine before the first run, within 90 seconds and without the network.

It prints a line for each verdict and writes a JSON file to send with a report. Automatic choices of later runs leave
out a part that failed, and log it, until the doctor passes. An explicit flag still selects the part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN, Finding, record

NAME = "sgg-doctor"
SECONDS = 90.0
"""Seconds after which no new check starts."""

Check = tuple[str, Callable[[], Iterable[Finding]]]


def checks() -> list[Check]:
    """All checks in order; a check comes after those that it depends on."""
    import torch

    from sgg_fast import env
    from sgg_fast.doctor import kernels, steps, versions

    device = env.device()
    first: list[Check] = [
        ("versions", lambda: versions.check(versions.installed(), versions.wanted_triton(), torch.version.cuda)),
        ("device", lambda: [_device(device)]),
        ("kernels", lambda: kernels.check(device)),
    ]
    names = ("attention", "captured pretrain", "captured finetune", "memory")
    if not torch.cuda.is_available():
        needed = "it needs a CUDA device, and there is none here"
        return [*first, *((name, lambda name=name: [Finding(name, UNKNOWN, needed)]) for name in names)]
    runs: tuple[Callable[[], Iterable[Finding]], ...] = (
        lambda: [steps.check_attention(device)],
        lambda: steps.check_capture("pretrain", device),
        lambda: steps.check_capture("finetune", device),
        lambda: [steps.check_memory(device)],
    )
    return [*first, *zip(names, runs, strict=True)]


def _device(device: Any) -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("device", UNKNOWN, "no CUDA device: what follows is checked as far as a CPU can")
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    described = f"{found.name}, sm_{found.major}{found.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if (found.major, found.minor) < (7, 5):
        return Finding("device", FAILED, f"{described}: torch's kernels start at sm_75")
    narrow = "" if found.major >= 8 else "; bf16 is emulated: use --precision fp16"
    return Finding("device", OK, described + narrow)


def run(all_checks: Iterable[Check], seconds: float, say: Callable[[str], None]) -> Iterator[Finding]:
    """Yield every finding as it is made; a check that raises is a failure, and the others continue."""
    deadline = time.monotonic() + seconds
    for name, check in all_checks:
        if time.monotonic() > deadline:
            found: Iterable[Finding] = [Finding(name, UNKNOWN, f"{seconds:.0f} s are over")]
        else:
            found = _guarded(name, check)
        for finding in found:
            say(finding.line())
            yield finding


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # border: an error of any library is the finding
        part = {"attention": "attention"}.get(name, "capture" if name.startswith("captured") else "")
        yield Finding(name, FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", part)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog=NAME, description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=Path("sgg-doctor.json"), help="file to send (sgg-doctor.json)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which nothing new is checked (90)")
    return parser.parse_args(argv)


@command(NAME)
def main(argv: list[str] | None) -> int:
    """Exit code: 0 if nothing failed, 1 if something failed, 2 for a wrong command line."""
    args, began = parse(argv), time.monotonic()
    from sgg_fast import env
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    with env.everything_fit():
        found = list(run(checks(), args.seconds, lambda line: print(line, flush=True)))
    unfit = record(found, env.machine(), env.doctor_record())
    summary = {"seconds": round(time.monotonic() - began, 1), "machine": env.machine(), "left out": unfit}
    args.json.write_text(json.dumps({**summary, "findings": [dataclasses.asdict(f) for f in found]}, indent=1) + "\n")
    for part, reason in unfit.items():
        print(f"left out of later runs: {part} ({reason}), until {NAME} passes")
    failed = sum(f.verdict == FAILED for f in found)
    unknown = sum(f.verdict == UNKNOWN for f in found)
    print(f"{len(found) - failed - unknown} ok, {failed} failed, {unknown} not checked; {args.json}")
    return int(failed > 0)
