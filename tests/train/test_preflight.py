"""What refuses a run before torch is loaded. That torch stays away: tests/commands/test_torch_free.py."""

from __future__ import annotations

import json

import pytest
from support import DS_JSON

from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe
from sgg_fast.train.preflight import preflight


def test_a_run_that_can_start_passes_and_leaves_nothing(tmp_path):
    preflight(recipe("toy"), "pretrain", tmp_path / "run", None, None)
    preflight(recipe("toy"), "finetune", tmp_path / "run", DS_JSON, None)
    preflight(recipe("vg256", data="toy", model="a/hub-id"), "finetune", tmp_path / "run", None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "settings", "ds", "reason"),
    [
        ("pretrain", {"conditioner": "sgdiff"}, None, "no pre-training: go on with --stage finetune"),
        ("pretrain", {}, {}, "--stage pretrain runs without --deepspeed"),
        ("finetune", {"weights": "lean"}, {}, "--weights lean runs without --deepspeed"),
        ("finetune", {}, {"train_batch_size": 3}, "train_batch_size is 3, but --batch-size"),
        ("finetune", {}, {"bf16": {"enabled": "auto"}, "dump_state": "auto"}, '"auto" is not known for dump_state'),
        ("finetune", {"data": "/nowhere"}, None, "there is no such folder"),
    ],
)
def test_one_that_cannot_is_refused_on_any_device(tmp_path, stage, settings, ds, reason):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds))
    with pytest.raises(ConfigError, match=reason):
        preflight(recipe("toy", **settings), stage, tmp_path / "run", None if ds is None else str(path), None)


def test_the_precision_waits_for_the_device(tmp_path):
    """bf16 on a GPU, fp32 on a CPU: only the engine knows which contradicts the file."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}}))
    preflight(recipe("toy"), "finetune", tmp_path / "run", str(path), None)


def test_a_graph_encoder_is_for_sgg_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="is of SGG-IG: leave out --conditioner or the folder"):
        preflight(recipe("toy", conditioner="text"), "finetune", tmp_path / "run", None, tmp_path)
    with pytest.raises(ConfigError, match="absent: there is no such folder"):
        preflight(recipe("toy"), "finetune", tmp_path / "run", None, tmp_path / "absent")
