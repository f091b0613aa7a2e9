"""Counted launches and bytes of a whole step, on its chip and by its host."""

from __future__ import annotations

from support.cases.benchmark import small_vg256  # noqa: F401  (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counts import model, step
from benchmarks.counts import unet as unet_counts
from benchmarks.counts.kernels import Count, triton_everywhere
from benchmarks.counts.roofline import CHIPS


def test_the_host_decides_where_it_is_slower():
    work = Count(1000, 10**9)
    captured, eager = (step.StepCount(work, Count(0, 0), captured) for captured in (True, False))
    assert captured.host == step.HOST_CALLS and eager.host == 1000
    assert all(eager.seconds(chip) >= captured.seconds(chip) for chip in CHIPS)
    assert eager.seconds(CHIPS[1]) == 1000 * step.HOST


def test_an_update_with_adam_in_fp32_moves_32_bytes_a_weight(small_vg256):
    """Weight and two moments read and written, the gradient read twice."""
    config = small_vg256.replace(optimizer="adam")
    with FakeTensorMode(allow_non_fake_inputs=True), triton_everywhere():
        engine = step.engine_of(config, "pretrain")
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        assert step.update_bytes(engine) == 32 * sum(p.numel() for p in trained) > 0


def test_a_step_of_every_command(small_vg256, monkeypatch, capsys):
    """A captured one takes three calls; DeepSpeed's host launches each kernel, and its optimiser is not counted."""
    names = ("--stage pretrain", "--stage finetune --deepspeed ds.json")
    monkeypatch.setattr(step, "FORMS", {name: step.FORMS[name] for name in names})
    assert step.main(["--recipe", "vg256"]) == 0
    heading, ours, deepspeeds = capsys.readouterr().out.splitlines()
    assert heading == "vg256, 256 x 256, batch 2"
    assert ours.startswith("--stage pretrain ") and " of them the optimiser's; " in ours
    assert ours.endswith("; 3 by the host") and "without the optimiser's" in deepspeeds
    launches = deepspeeds.split(" launches,")[0].split()[-1]
    assert deepspeeds.endswith(f"; {launches} by the host") and int(launches.replace(",", "")) > 200


def test_a_drawn_step_is_one_graph(small_vg256):
    found = step.count_sampling(small_vg256)
    assert found.captured and found.update == Count(0, 0) and found.host == 3
    assert found.total == found.compute and found.compute.launches > 100


def test_what_is_written_is_what_the_model_reads(small_vg256, monkeypatch, tmp_path):
    monkeypatch.setattr(model, "STEPS", tmp_path / "steps.json")
    some = {"unet 256 b2": step.written()["unet 256 b2"]}
    monkeypatch.setattr(step, "written", lambda: some)
    step.write(model.STEPS)
    forward, behind = (counter.total for counter in unet_counts.count(unet_counts.FORMS[-1], 32, False))
    both = forward + behind
    assert both.flops > 0
    assert model.steps() == {
        "unet 256 b2": model.StepCounts(model.Work(both.launches, both.bytes, both.flops), model.Work(0, 0))
    }
