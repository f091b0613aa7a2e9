"""The command that measures denoising by noise level: a run, both worlds, and what cannot be measured."""

from __future__ import annotations

from sgg_fast.toy import gates
from sgg_fast.toy.noise_levels import BANDS


def test_a_run_is_measured_and_what_cannot_be_is_refused(trained_run, capsys):
    for data in ("toy", "toy-words"):
        assert gates.main(["--model", str(trained_run), "--data", data, "--num", "4"]) == 0
        said = capsys.readouterr().out
        assert said.startswith("x0 error: t 100-200 ") and said.count("objects") == len(BANDS)
    assert gates.main(["--model", "./nowhere"]) == 2
    assert capsys.readouterr().err.startswith("toy.gates: --model ./nowhere")
