"""`benchmarks.train_step`: the forms of each stage, and what it refuses."""

from __future__ import annotations

import pytest

from benchmarks import train_step
from benchmarks.steps import forms


@pytest.mark.parametrize(("stage", "form"), [("finetune", "naive"), ("pretrain", "plain")])
def test_a_form_of_the_other_stage_is_refused(stage, form, capsys):
    assert train_step.main(["--stage", stage, "--form", form]) == 2
    assert capsys.readouterr().err == f"train_step: --form {form} is not of --stage {stage}\n"


def test_without_time_every_form_is_left_out(tmp_path, capsys):
    """By default those that do not compile for minutes."""
    words = ["--stage", "finetune", "--quick", "--device", "cpu", "--limit", "-1", "--out", str(tmp_path)]
    assert train_step.main(words) == 0
    number = sum(not forms.compiles(name) for name in forms.FINETUNE)
    said = capsys.readouterr().out
    assert "TOY SIZES" in said
    assert said.endswith(f"--limit is spent: {number} left out, the first of them {next(iter(forms.FINETUNE))}\n")
    assert (tmp_path / "train_step.csv").read_text().count("\n") == 1, "only the names of its columns"
