"""`benchmarks.infer`: its words, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from benchmarks import infer


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_the_true_sizes_are_refused_without_a_gpu(capsys):
    assert infer.main([]) == 2
    assert capsys.readouterr().err == "infer: the true sizes need a GPU; --quick draws with the toy model here\n"


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    (tmp_path / "g.json").write_text("{}")
    assert infer.main(["--model", str(tmp_path / "g.json"), "--resolution", "32", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("infer: ") and "no pipeline there" in err[-1]


def test_defaults_are_of_the_true_sizes_or_quick_and_quick_ones_do_not_compile():
    full, quick = infer.parse([]), infer.parse(["--quick"])
    assert (full.model, full.resolution, full.batch, full.steps) == (None, [256, 512], [1, 8], 100)
    assert (quick.model, quick.resolution, quick.batch, quick.steps) == ("toy", [64], [1, 2], 4)
    assert [name for name in full.form if name not in quick.form] == [
        name for name in full.form if "compiled" in name or "autotune" in name
    ]
    assert infer.parse(["--quick", "--model", "run", "--form", "compiled", "--steps", "9"]).form == ["compiled"]
