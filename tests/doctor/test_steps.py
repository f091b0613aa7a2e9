"""The doctor's checks of steps: launches against the committed count, captured losses against eager ones."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sgg_fast.doctor import steps
from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN


class Engine:
    """Stands for an engine, which needs a GPU to launch anything: it records the step that it is asked for."""

    def __init__(self) -> None:
        self.module = SimpleNamespace(config=SimpleNamespace(optim=SimpleNamespace(batch_size=3)))
        self.taken: list[tuple[list[list[int]], int, float]] = []

    def update(self, ids: np.ndarray, step: int, lr: float) -> None:
        self.taken.append((ids.tolist(), step, lr))


@pytest.mark.parametrize(("on", "expected"), [("CCPC", 3), ("PP", None), ("", None)])
def test_launches_are_the_gpus_own_events_of_one_step(monkeypatch, on, expected):
    """C is an event of the GPU, P one of the host. A profiler that sees no kernel gives no number."""
    kinds = {"C": torch.autograd.DeviceType.CUDA, "P": torch.autograd.DeviceType.CPU}
    profiled = SimpleNamespace(events=lambda: [SimpleNamespace(device_type=kinds[letter]) for letter in on])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiled))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    engine = Engine()
    assert steps.launches_of(engine) == expected
    assert engine.taken == [([[0, 1, 2]], steps.NUM_STEPS, 0.0)], "one step, which changes no weight"


def test_launches_are_judged_by_the_committed_count(monkeypatch, tmp_path):
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({steps.versions(): {"pretrain": 900}}))
    monkeypatch.setattr(steps, "COUNTS", counts)
    verdicts = [steps.judge_launches("pretrain", n).verdict for n in (900, 940, 1000, None)]
    assert verdicts == [OK, OK, FAILED, UNKNOWN]
    assert steps.judge_launches("finetune", 5).verdict == UNKNOWN
    monkeypatch.undo()
    committed = json.loads(steps.COUNTS.read_text())
    assert committed and all(set(each) == {"pretrain", "finetune"} for each in committed.values())


def test_losses_that_differ_are_not_close():
    assert steps._close([1.0, 2.0], [1.001, 2.0])
    assert not steps._close([1.0, 2.2], [1.0, 2.0]) and not steps._close([float("nan")], [1.0])
