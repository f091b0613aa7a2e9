"""The rehearsal takes the steps that training and drawing take, and says what it did."""

from __future__ import annotations

import re

import torch
from support.tiny_runs import TINY

from sgg_fast.recipes import recipe
from sgg_fast.train import rehearsal
from sgg_fast.train.engines.eager import EagerEngine


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
