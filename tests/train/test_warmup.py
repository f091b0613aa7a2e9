"""The warm-up takes the steps that training and drawing take, and says what it did; without a GPU it says why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from support.tiny_runs import TINY, flags

from sgg_fast.recipes import recipe
from sgg_fast.train import rehearsal, warmup
from sgg_fast.train.engines.eager import EagerEngine


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_it_says_so_in_one_line(capsys):
    assert warmup.main(["--recipe", "vg256"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "warmup: no CUDA device here: kernels are compiled on the machine that runs them\n"
    assert warmup.main(["--batch-size", "0"]) == 2
    assert capsys.readouterr().err.startswith("warmup: --batch-size")


def test_it_takes_real_steps_of_both_stages_and_draws(tmp_path, monkeypatch):
    """On a CPU nothing is compiled, so a kernel is put where Triton would put it, at the second stage."""
    steps, update = [], EagerEngine.update
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def watched(engine, ids, step, *rest):
        steps.append((type(engine.module).__name__, ids.shape, step))
        if len(steps) == 3:
            (tmp_path / "cache" / "hash").mkdir(parents=True)
            (tmp_path / "cache" / "hash" / "geglu_fwd_kernel.cubin").touch()
        result = update(engine, ids, step, *rest)
        assert torch.isfinite(result.losses["loss"])
        return result

    monkeypatch.setattr(EagerEngine, "update", watched)
    said = []
    rehearsal.warm_up(recipe("toy", **TINY), torch.device("cpu"), None, said.append)
    assert steps == [(kind, (1, 2), step) for kind in ("PretrainStage", "FinetuneStage") for step in (0, 1)]
    assert [re.sub(r"\d+ s$", "_ s", line) for line in said] == [
        "pretrain: 0 kernels compiled, _ s",
        "finetune: 1 kernels compiled, _ s",
        "infer: 0 kernels compiled, _ s",
        f"1 kernels in {tmp_path / 'cache'}",
    ]


@pytest.mark.gpu
def test_the_next_process_finds_everything_compiled(tmp_path):
    words = [sys.executable, "-m", "sgg_fast.train.warmup", *flags()]
    for anything in (True, False):
        done = subprocess.run(
            words, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        compiled = [int(line.split()[1]) for line in done.stdout.splitlines()[:3]]
        assert (sum(compiled) > 0) is anything, done.stdout
