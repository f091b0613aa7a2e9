"""The plan as a result: its peak and parts, the gaps, whether it fits a budget, its lines of text."""

from __future__ import annotations

from sgg_fast.train.memory.plan import GIB, OUTSIDE, MemoryPlan


def test_gaps_count_against_the_budget():
    plan = MemoryPlan("", {"all": 3 * GIB}, {"forward": {}}, {}, gaps=GIB)
    assert plan.peak == 3 * GIB and plan.reserved == 4 * GIB
    assert plan.fits(4 * GIB + OUTSIDE) and not plan.fits(4 * GIB + OUTSIDE - 1)
    assert any(line.startswith("gaps between blocks") for line in plan.lines())


def test_the_peak_is_the_highest_phase_beside_what_is_always_there():
    resident = {"weights": 2 * GIB, "frozen models": 0}
    moments = {"forward": {"activations": GIB // 2}, "update": {"gradients": 3 * GIB, "temporaries": GIB // 4}}
    plan = MemoryPlan("a run", resident, moments, {"optimiser state": GIB})
    assert plan.when == "update" and plan.peak == plan.reserved == 21 * GIB // 4
    assert list(plan.parts.items()) == [("gradients", 3 * GIB), ("weights", 2 * GIB), ("temporaries", GIB // 4)]
    title, *parts, peak, host = plan.lines()
    assert title == "a run" and [line.split()[:2] for line in parts] == [
        ["gradients", "3.000"], ["weights", "2.000"], ["temporaries", "0.250"]
    ]  # fmt: skip
    assert " ".join(peak.split()) == "peak, in update 5.250 GiB (forward 2.50, update 5.25)"
    assert " ".join(host.split()) == "in CPU memory: optimiser state 1.000 GiB"
