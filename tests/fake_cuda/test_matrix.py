"""The matrix turns red for what it is there to find; its own logic, without the stand-in."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from . import faults, matrix, workers

NOT_YET: set[str] = set()
"""Training rows whose counts are not committed for the tree of today: `python -m fake_cuda.matrix --new`."""

STEP = {"launches": 2, "to_device": 1, "to_host": 1, "syncs": 0, "waits": 0, "replays": 1, "graphs": 0, "applied": 1}
FIRST = {**STEP, "launches": 9000, "syncs": 11, "graphs": 1}


def reports(kind: str) -> list[dict[str, Any]]:
    """Of a row that is as it should be: two commands of a training row."""
    steps = [FIRST, STEP, STEP] if kind == "captured" else [{**STEP, "replays": 0, "syncs": 3, "launches": 9000}] * 3
    one = {"command": "train.py", "code": 0, "error": "", "complaints": [], "outside": {}, "updates": steps,
           "graphs": [2660] if kind == "captured" else []}  # fmt: skip
    return [copy.deepcopy(one), copy.deepcopy(one)]


def row(kind: str) -> matrix.Row:
    return matrix.Row("some", kind, train="--stage finetune")


@pytest.mark.parametrize("kind", ["captured", "eager"])
def test_what_is_as_committed_is_green(kind):
    found = reports(kind)
    assert matrix.judge(row(kind), found, matrix.counts_of(row(kind), found)) == []


def spoil(kind: str, name: str) -> list[dict[str, Any]]:
    """Reports with the symptom of a fault."""
    found = reports(kind)
    last = found[1]
    last.update(
        {
            "a crash": {"code": 1, "error": "RuntimeError: invalid dtype for bias"},
            "a refused call": {"complaints": ["cudaMalloc during a capture"]},
            "a launch beside a capture": {"outside": {"fill": 1}},
            "a capture that failed": {"graphs": [], "updates": [{**STEP, "replays": 0, "launches": 2600}] * 3},
            "one more launch in the graph": {"graphs": [2661]},
            "a host that waits": {"updates": [*last["updates"][:-1], {**last["updates"][-1], "syncs": 1}]},
            "a flag for every weight": {"updates": [*last["updates"][:-1], {**last["updates"][-1], "syncs": 686}]},
            "a step that was skipped": {"updates": [*last["updates"][:-1], {**last["updates"][-1], "applied": 0}]},
            "no resumed step": {"updates": last["updates"][:1]},
        }[name]
    )
    return found


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("captured", "a crash", "exit 1 RuntimeError: invalid dtype for bias"),
        ("captured", "a refused call", "refused: cudaMalloc"),
        ("captured", "a launch beside a capture", "launched beside a capture: 1 x fill"),
        ("captured", "a capture that failed", "no step was captured"),
        ("captured", "one more launch in the graph", "2661"),
        ("captured", "a host that waits", "1 synchronisations"),
        ("eager", "a flag for every weight", "686"),
        ("eager", "a step that was skipped", "not applied"),
        ("captured", "no resumed step", "1 updates; two are wanted"),
    ],
)
def test_the_symptom_of_a_fault_is_red(kind, name, said):
    wrong = matrix.judge(row(kind), spoil(kind, name), matrix.counts_of(row(kind), reports(kind)))
    assert any(said in line for line in wrong), wrong


def test_where_a_capture_is_refused_the_first_step_counts_too():
    """It adds to gradients that the capture left."""
    refused = matrix.Row("some", "eager", train="--stage finetune", env={"FAKE_CUDA_REFUSES_CAPTURES": "1"})
    expected, found = matrix.counts_of(refused, reports("eager")), reports("eager")
    assert matrix.judge(refused, found, expected) == []
    found[0]["updates"][0] = {**STEP, "replays": 0, "syncs": 3, "launches": 9001}
    assert any("9001" in line for line in matrix.judge(refused, found, expected))
    assert matrix.judge(row("eager"), found, matrix.counts_of(row("eager"), reports("eager"))) == []


def test_the_committed_rows_are_sound():
    rows = matrix.read_rows()
    assert len({(r.kind, r.train, r.run, str(r.env), r.processes) for r in rows}) == len(rows) >= 60
    places = dict.fromkeys(("out", "sd", "sd21", "sdxl", "clip", "set", "graphs"), "x")
    for one in rows:
        assert bool(one.train) != bool(one.run), one.name
        assert all(command for command in one.commands(places))
    assert 10 <= len(matrix.chosen(rows, None, quick=True)) <= 14, "a dozen for CI"
    with pytest.raises(ValueError, match="no row nowhere"):
        matrix.chosen(rows, ["nowhere"], quick=False)


def test_every_training_row_has_committed_counts():
    for name, committed in json.loads(matrix.EXPECTED.read_text()).items():
        lacking = {row.name for row in matrix.read_rows() if row.kind != "command" and row.name not in committed}
        assert lacking == NOT_YET, name


def test_a_row_of_two_processes_has_a_rank_and_a_port():
    assert workers.launcher(1) == [{}]
    first, second = workers.launcher(2)
    assert (first["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_what_a_child_was_refused_is_found_once():
    said = "step 1\nfake CUDA: cudaMalloc during a capture\nfake CUDA: cudaMalloc during a capture\n"
    assert matrix.refused(said) == {"cudaMalloc during a capture"}
    assert matrix.refused(said) - matrix.refused_here([{"complaints": ["cudaMalloc during a capture"]}]) == set()


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_every_fault_can_still_be_planted(fault, tmp_path):
    path = tmp_path / fault.path
    path.parent.mkdir(parents=True)
    path.write_text((matrix.ROOT / fault.path).read_text())
    faults.plant(fault, tmp_path)
    assert path.read_text() != (matrix.ROOT / fault.path).read_text()
    assert fault.row in {row.name for row in matrix.read_rows()}


def test_every_test_about_numbers_is_there():
    """`plugin.ABOUT_NUMBERS` is read as text: its module needs the stand-in."""
    text = (matrix.HERE / "plugin.py").read_text(encoding="utf-8")
    names = re.findall(r'^    "(test_\w+)": "', text, re.MULTILINE)
    tests = "".join(path.read_text(encoding="utf-8") for path in (matrix.ROOT / "tests").rglob("*.py"))
    assert names and [name for name in names if f"def {name}(" not in tests] == []
