"""sgg-doctor: every check gives a verdict, also where one raises or the time is over."""

from __future__ import annotations

import json
import types

import pytest
import torch

from sgg_fast.doctor import __main__ as doctor
from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN, Finding


def test_on_a_cpu_it_says_what_it_cannot_check(tmp_path, capsys):
    out = tmp_path / "doctor.json"
    assert doctor.main(["--json", str(out)]) == 0
    said = capsys.readouterr().out
    for name in ("device", "attention", "captured pretrain", "captured finetune", "memory"):
        assert any(line.startswith(UNKNOWN) and name in line for line in said.splitlines()), name
    found = json.loads(out.read_text())
    assert found["left out"] == {} and found["machine"].startswith("CPU, torch")
    assert {f["verdict"] for f in found["findings"]} == {OK, UNKNOWN}


def test_a_check_that_raises_does_not_end_the_others_and_the_time_is_kept():
    def fail():
        raise RuntimeError("device-side assert")

    some = [("captured pretrain", fail), ("memory", lambda: [Finding("memory", OK, "")])]
    first, second = doctor.run(some, 60, lambda line: None)
    assert (first.verdict, first.leaves_out, second.verdict) == (FAILED, "capture", OK)
    assert [f.verdict for f in doctor.run(some, -1, lambda line: None)] == [UNKNOWN, UNKNOWN]


@pytest.mark.parametrize(
    ("capability", "verdict", "said"),
    [((7, 0), FAILED, "torch's kernels start at sm_75"), ((7, 5), OK, "use --precision fp16"), ((9, 0), OK, "free")],
)
def test_a_card_is_judged_by_its_compute_capability(monkeypatch, capability, verdict, said):
    """The numbers of a card that is not here."""
    card = types.SimpleNamespace(name="Card", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 29, 2 << 30))
    finding = doctor._device(torch.device("cuda"))
    assert finding.verdict == verdict and finding.detail.endswith(said)
    assert finding.detail.startswith(f"Card, sm_{capability[0]}{capability[1]}, 1.5 of 2.0 GiB free")
