"""The choice of an engine: which one runs, and which is refused before anything loads."""

from __future__ import annotations

import sys

import pytest
import torch
from support import DS_JSON
from support.cases.stage import cache, pretrain_stage  # noqa: F401  (a fixture)
from support.tiny_runs import trainer

from sgg_fast.config import ConfigError
from sgg_fast.train.engines import deepspeed as engines
from sgg_fast.train.engines.choose import build_engine
from sgg_fast.train.engines.eager import EagerEngine


def test_engines_that_cannot_be_are_refused_before_anything_loads(tmp_path):
    with pytest.raises(ConfigError, match="--stage pretrain runs without --deepspeed, on one GPU or several"):
        trainer(tmp_path / "run", "pretrain", DS_JSON)
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_the_flag_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"--optimizer adam8bit: .*use adam"):
        trainer(tmp_path, "finetune", optimizer="adam8bit")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="deepspeed is not installed"):
        trainer(tmp_path, "finetune", DS_JSON)


def test_engine_of_a_cpu_run_is_eager(cache):
    stage = pretrain_stage(cache)
    engine = build_engine(stage, torch.device("cpu"))
    assert type(engine) is EagerEngine
