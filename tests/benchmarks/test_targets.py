"""`benchmarks.targets`: the table beside the rows of a GPU."""

from __future__ import annotations

import contextlib

from benchmarks import targets as command


def test_a_row_of_a_gpu_is_judged_on_its_chip_alone(tmp_path, capsys):
    path = tmp_path / "train_step.csv"
    path.write_text("op,backend,size,ms_p50,device\ntrain_step,captured,256x256 b2,26.5,NVIDIA GeForce RTX 4090\n")
    command.main([str(path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "step, 256x256 batch 2" in line]
    assert "26.5 (GPU)" in lines[0] and lines[0].rstrip(" |").endswith("| met")
    assert "GPU)" not in lines[1]


def test_what_cannot_be_measured_is_refused_in_one_line(capsys):
    with contextlib.suppress(SystemExit):
        assert command.main(["nowhere.csv"]) == 2
    printed = capsys.readouterr()
    assert "nowhere.csv: there is no such file" in printed.err and len(printed.err.splitlines()) == 1
    assert not printed.out
