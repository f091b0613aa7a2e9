"""`benchmarks.gemm_precision`: curves beside that of fp32."""

from __future__ import annotations

import pytest

from benchmarks import gemm_precision
from benchmarks.steps import gemm_precision as curves


def test_a_curve_is_shown_with_its_distance_from_the_first(monkeypatch, capsys):
    losses = {"fp32": [2.0, 1.0], "bf16": [2.3, 0.6]}
    monkeypatch.setattr(
        curves, "curve", lambda precision, seed, steps: (losses[precision][:steps], {"objects": 0.5, "relations": 0.25})
    )
    words = ["--steps", "2", "--seeds", "7", "--precision", "fp32", "bf16"]
    assert gemm_precision.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "seed 7 fp32: 2.0000 1.0000; rms from fp32 0.00000; held-out accuracy 0.3750",
        "seed 7 bf16: 2.3000 0.6000; rms from fp32 0.35355; held-out accuracy 0.3750",
    ]


def test_no_steps_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        gemm_precision.main(["--steps", "0"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out and len(printed.err.splitlines()) == 1
    assert "--steps must be at least 1, not 0" in printed.err
