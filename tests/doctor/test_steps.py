"""The doctor's checks of steps: launches against the committed count, captured losses against eager ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sgg_fast.doctor import steps
from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN

CPU = torch.device("cpu")


class Engine:
    """Stands for an engine, which needs a GPU to launch anything: it records the step that it is asked for."""

    def __init__(self, losses: Sequence[float] = (1.0,) * 5, execution: str = "") -> None:
        self.losses, self.execution = losses, execution
        self.module = SimpleNamespace(config=SimpleNamespace(optim=SimpleNamespace(batch_size=3)))
        self.taken: list[tuple[list[list[int]], int, float]] = []

    def update(self, ids: np.ndarray, step: int, lr: float) -> SimpleNamespace:
        self.taken.append((ids.tolist(), step, lr))
        return SimpleNamespace(losses={"loss": torch.tensor(self.losses[step])})


class Captured(Engine):
    """Stands for an engine whose steps are captured."""


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


def test_on_a_cpu_a_step_cannot_be_captured_and_torch_attends(monkeypatch):
    """Real engines and a real UNet, on random weights."""
    monkeypatch.setattr(steps, "NUM_STEPS", 1)
    (finding,) = steps.check_capture("pretrain", CPU)
    assert (finding.name, finding.verdict, finding.leaves_out) == ("captured pretrain", UNKNOWN, "capture")
    found = steps.check_attention(CPU)
    assert (found.verdict, found.detail, found.leaves_out) == (OK, "sdpa, by torch", "attention")


@pytest.mark.parametrize(
    ("losses", "execution", "verdicts", "said"),
    [
        ([1.0, 2.0, 3.0, 4.01], "captured", [OK, UNKNOWN], "4 losses as eagerly"),
        ([1.0, 2.0, 2.0, 4.0], "captured", [FAILED], "2.0000/3.0000"),
        ([1.0, 2.0, 3.0, 4.0], "eager: the capture failed: out of streams", [FAILED], "out of streams"),
    ],
)
def test_captured_losses_are_held_against_eager_ones(monkeypatch, losses, execution, verdicts, said):
    """Engines that stand for those of a GPU; launches are not counted."""
    engines = {False: Engine([1.0, 2.0, 3.0, 4.0]), True: Captured(losses, execution)}
    monkeypatch.setattr(steps, "CapturedEngine", Captured)
    monkeypatch.setattr(steps, "engine_of", lambda stage, config, *_: engines[config.run.cuda_graphs])
    monkeypatch.setattr(steps, "launches_of", lambda engine: None)
    findings = list(steps.check_capture("finetune", CPU))
    assert [finding.verdict for finding in findings] == verdicts
    assert said in findings[0].detail and findings[0].leaves_out == "capture"
    for engine in engines.values():
        assert engine.taken == [([[0, 1, 2]], step, 0.0) for step in range(4)], "a rate of 0: the weights stay"


@pytest.mark.parametrize(("peak", "verdict"), [(100, OK), (166, OK), (168, FAILED)])
def test_the_peak_may_exceed_the_plan_by_its_share_and_a_little(monkeypatch, peak, verdict):
    """MiB above 500 that were there before, against a plan of 100. The counters stand for CUDA's."""
    plan = SimpleNamespace(peak=100 << 20)
    monkeypatch.setattr(steps, "Planner", lambda *_, **__: SimpleNamespace(plan=lambda batch: plan))
    monkeypatch.setattr(steps, "engine_of", lambda *_: Engine())
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (500 + peak) << 20)
    finding = steps.check_memory(CPU)
    assert finding.verdict == verdict and finding.detail.startswith(f"peak {peak} MiB, planned 100 MiB")
