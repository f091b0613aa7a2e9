"""Long runs with checkpoints, validation and sample sheets all along: memory, file handles and log stay bounded."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import lines, trainer

from sgg_fast.train.run.checkpoint import checkpoint_steps

LOG_LINE = 600
"""Bytes that a line of log.jsonl may have, on average."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(out: Path, stage: str, num_steps: int, every: int, **settings: object) -> str:
    """Run it, looking at the process 40 times; what was measured, in words. The first quarter is for warming up."""
    settings |= {f"{stage}_steps": num_steps, "resolution": 32, "checkpoint_every": every, "sample_every": every}
    settings |= {"num_scenes": 32}  # enough to keep some for validation
    one = trainer(out, stage, log_every=10, **settings)
    update, seen = one.engine.update, []

    def watched(ids, step, *more):
        if step % (num_steps // 40) == 0:
            seen.append((step, resident(), len(os.listdir("/proc/self/fd"))))
        return update(ids, step, *more)

    one.engine.update = watched
    one.train()
    run = out / stage
    step, memory, handles = np.array(seen[len(seen) // 4 :], dtype=float).T
    growth = np.polyfit(step, memory, 1)[0] * num_steps
    assert growth < 0.05 * memory.mean(), f"memory grows by {growth / 2**20:.1f} MiB over the run"
    assert handles.max() - handles.min() <= 1, "one may be open in passing"
    assert np.polyfit(step, handles, 1)[0] * num_steps < 0.5
    size = (run / "log.jsonl").stat().st_size
    events = [line for line in lines(run) if "event" in line]
    regular = len(lines(run)) - sum(line["event"] == "spike" for line in events)
    validations = num_steps // one.config.run.validate_every if stage == "pretrain" else 0
    sheets = num_steps // every if stage == "finetune" else 0
    assert regular == num_steps // 10 + num_steps // every + validations + sheets + 2, "and a start and an end"
    assert len(lines(run)) < 1.1 * regular and size < LOG_LINE * regular
    assert checkpoint_steps(run) == [num_steps - every, num_steps]
    assert sum(line["event"] == "checkpoint" for line in events) == num_steps // every
    if stage == "finetune":
        assert len(list((run / "samples").iterdir())) == num_steps // every
    return (
        f"{stage}, {num_steps} steps: memory {memory.mean() / 2**20:.0f} MiB, trend {growth / 2**20:+.1f} MiB over the "
        f"run; {handles[0]:.0f} file handles at its start, {handles[-1]:.0f} at its end; log {size / 2**10:.0f} KiB"
    )


def test_two_thousand_steps_leave_the_process_as_it_was(tmp_path, capsys):
    words = soak(tmp_path, "pretrain", 2000, 200)
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "num_steps"), [("pretrain", 20_000), ("finetune", 2_000)])
def test_a_day_in_an_hour(tmp_path, capsys, stage, num_steps):
    words = soak(tmp_path, stage, num_steps, 200)
    with capsys.disabled():
        print(f"\n{words}")
