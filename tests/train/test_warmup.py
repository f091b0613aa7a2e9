"""The warm-up command: without a GPU it says why not; with one the next process finds everything compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.tiny_runs import flags

from sgg_fast.train import warmup


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_it_says_so_in_one_line(capsys):
    assert warmup.main(["--recipe", "vg256"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "warmup: no CUDA device here: kernels are compiled on the machine that runs them\n"
    assert warmup.main(["--batch-size", "0"]) == 2
    assert capsys.readouterr().err.startswith("warmup: --batch-size")


@pytest.mark.gpu
def test_the_next_process_finds_everything_compiled(tmp_path):
    words = [sys.executable, "-m", "sgg_fast.train.warmup", *flags()]
    for anything in (True, False):
        done = subprocess.run(
            words, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        compiled = [int(line.split()[1]) for line in done.stdout.splitlines()[:3]]
        assert (sum(compiled) > 0) is anything, done.stdout
