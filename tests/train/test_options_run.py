"""Runs with every option of the model and its losses at once: resumed, and under DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.tiny_runs import rows, same_weights, train
from support.zero_runs import write_ds

from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.train.run.checkpoint import checkpoint_dir

BOTH = {"geometry": 0.5, "instance_codes": True, "num_scenes": 8}
STAGES = {
    "pretrain": {**BOTH, "graph_negatives": True, "pretrain_steps": 3},
    "finetune": {**BOTH, "relation_dropout": 0.5, "image_embedding": "latent", "finetune_steps": 3},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of both stages that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    for stage, changes in STAGES.items():
        train(out, stage, **changes)
    return out


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_resumed_run_is_the_undisturbed_run(whole, tmp_path, stage):
    changes = {**STAGES[stage], "graph_encoder": whole / "pretrain" / "graph_encoder" if stage == "finetune" else None}
    train(tmp_path, stage, **{**changes, f"{stage}_steps": 2})
    result = train(tmp_path, stage, **changes)
    found = rows(result.parent)
    assert found == rows(whole / stage) and len(found) == 3
    terms = {"pretrain": {"mae", "con", "geometry"}, "finetune": {"diff", "isa", "reader", "geometry"}}[stage]
    assert terms < set(found[3])
    assert same_weights(result, whole / stage / result.name)
    encoder = result if stage == "pretrain" else result / "graph_encoder"
    assert SceneGraphConditioner.from_pretrained(encoder).config.instance_codes
    assert not any("head" in name or "reader" in name for name in load_file(next(encoder.glob("*.safetensors"))))
    kept = load_file(checkpoint_dir(tmp_path / stage, 3) / "weights.safetensors")
    assert {"pretrain": {"geometry"}, "finetune": {"geometry", "reader"}}[stage] < {name.split(".")[0] for name in kept}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_takes_the_plain_engines_steps(whole, tmp_path, name):
    encoder = whole / "pretrain" / "graph_encoder"
    result = train(tmp_path, "finetune", str(write_ds(tmp_path, name)), **STAGES["finetune"], graph_encoder=encoder)
    found, expected = rows(result.parent), rows(whole / "finetune")
    assert found[1] == pytest.approx(expected[1], rel=1e-3)
    assert found[3]["loss"] == pytest.approx(expected[3]["loss"], rel=2e-2)
    assert found[1]["reader"] != found[3]["reader"]
