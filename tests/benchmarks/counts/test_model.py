"""The time that the model gives a launch and a step."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.counts import model
from benchmarks.counts.model import StepCounts, Work, step_terms
from benchmarks.counts.roofline import CHIPS


def test_the_terms_of_a_step_are_its_work_on_the_chip():
    counts = StepCounts(Work(1000, 10**9, 10**12), Work(10, 10**10))
    terms = step_terms(counts, CHIPS[0])
    assert terms["bytes of the optimiser"] == pytest.approx(10**10 / 1008e9)
    assert terms["convolutions and GEMMs"] == pytest.approx(10**12 / 165e12 / 0.55)
    assert terms["gaps between kernels"] == pytest.approx(1010 * model.GAP)


def test_more_pixels_cost_activations_and_no_weights():
    small, large = (StepCounts(Work(9, 100 + 10 * n, 40 * n), Work(5, 7)) for n in (1, 4))
    scaled = StepCounts.scaled(small, large, pixels=32)
    assert scaled == StepCounts(Work(9, 100 + 320, 40 * 32), Work(5, 7))


def test_the_committed_counts_are_those_that_are_written():
    from benchmarks.counts import step

    assert model.steps().keys() == step.written().keys()
    finetune = model.steps()["finetune 256 b2"]
    assert finetune.compute.flops > 1e12 and finetune.update.bytes > 10e9


def test_a_launch_takes_the_longest_of_bytes_issue_and_latency():
    """Of 300 programs on 128 SMs the busiest has three: 12 warps, whose instructions four schedulers issue."""
    chip = next(chip for chip in CHIPS if chip.name == "RTX 4090")
    launch = model.Launch("k", programs=300, warps=4, instructions=100.0, loads=0.0, bytes=0)
    assert launch.seconds(chip) == pytest.approx(3 * 4 * 100 / 4 / 2.5e9)
    assert dataclasses.replace(launch, bytes=10**9).seconds(chip) == pytest.approx(1e9 / 1008e9)
    waiting = dataclasses.replace(launch, loads=10.0)
    assert waiting.seconds(chip) == pytest.approx(10 * 3e-7), "four such programs are there at a time"
    assert dataclasses.replace(waiting, warps=16).seconds(chip) == pytest.approx(3 * 10 * 3e-7), "one at a time"
    assert launch.times(2.5) == dataclasses.replace(launch, programs=750)


def test_a_case_is_the_sum_of_its_launches_and_large_ones_follow_the_largest_that_ran():
    for chip in CHIPS:
        forward, behind, both = (
            model.seconds("masked_pool", mode, "1e5", "bf16", chip) for mode in ("fwd", "bwd", "fwd_bwd")
        )
        passes = model.observed()["masked_pool 1e5 bf16"]
        assert forward == pytest.approx(sum(launch.seconds(chip) for launch in passes[0]))
        assert both == pytest.approx(forward + behind)
        assert model.seconds("masked_pool", "fwd", "1e6", "bf16", chip) == pytest.approx(10 * forward, rel=0.2)
        assert model.seconds("masked_pool", "fwd", "vg2", "bf16", chip) is None, "it did not run"


def test_a_device_is_known_by_its_chips_name():
    assert model.chip_of("NVIDIA H200 NVL").name == "H200"
    assert model.chip_of("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert model.chip_of("CPU, 2 threads") is None
