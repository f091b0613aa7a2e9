"""`benchmarks.aot.observe`: what a launch is counted to move, and what counts as a difference."""

from __future__ import annotations

import json

import pytest

from benchmarks.aot import observe as observing
from benchmarks.aot.observe import differences, observe
from benchmarks.aot.rules import in_fresh_process
from benchmarks.counts import model


@pytest.fixture(scope="module")
def pooled():
    return in_fresh_process(observe, ["masked_pool"])


def test_both_kernels_of_a_pool_move_its_compulsory_bytes_together(pooled):
    """The one for hubs gets all rows as an argument and reads those of hubs."""
    from benchmarks.counts.roofline import compulsory
    from benchmarks.ops import registry
    from benchmarks.ops.cases import Case

    forward = pooled["masked_pool 1e4 bf16"][0]
    shape = registry.inputs(Case("masked_pool", "fwd", "1e4", "bf16"), "meta").shape
    least = compulsory("masked_pool", "fwd", shape, 2).bytes
    assert len(forward) == 2 and sum(launch["bytes"] for launch in forward) == pytest.approx(least, rel=0.02)


def test_a_count_may_differ_by_a_tenth(pooled):
    other = {name: [[dict(x) for x in each] for each in passes] for name, passes in pooled.items()}
    launch = other["masked_pool 1e4 bf16"][0][0]
    launch["bytes"] = round(1.05 * launch["bytes"])
    assert differences(pooled, other) == []
    launch["bytes"] = round(1.2 * launch["bytes"])
    assert len(differences(pooled, other)) == 1
    launch["programs"] += 1
    del other["masked_pool paper bf16"]
    assert len(differences(pooled, other)) == 2


def test_the_command_compares_and_writes(pooled, tmp_path, monkeypatch, capsys):
    """With --op the lines of other operators stay."""
    data = tmp_path / "launches.json"
    monkeypatch.setattr(observing, "in_fresh_process", lambda function, ops: pooled)  # counted above
    monkeypatch.setattr(model, "DATA", data)
    assert observing.main(["--op", "masked_pool"]) == 1
    assert f"{len(pooled)} cases, {len(pooled)} differences" in capsys.readouterr().out
    data.write_text('{"other": []}')
    assert observing.main(["--op", "masked_pool", "--write"]) == 0
    assert json.loads(data.read_text()) == {"other": [], **pooled}
    assert observing.main(["--op", "masked_pool"]) == 0
    assert observing.main(["--write"]) == 0 and json.loads(data.read_text()) == pooled
