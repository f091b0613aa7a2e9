"""Both stages through the real `Trainer`: what they write, and that a resumed run is the undisturbed one."""

from __future__ import annotations

import io
import json
import logging

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import DS_JSON
from support.tiny_runs import lines, rows, same_weights, train, trainer

from sgg_fast.config import ConfigError
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.train.run import checkpoint
from sgg_fast.train.run.checkpoint import MANIFEST, checkpoint_dir, checkpoint_steps

TERMS = {"pretrain": {"loss", "mae", "con", "geometry"}, "finetune": {"loss", "diff", "isa", "geometry", "attention"}}
STATE = {"pretrain": {"lr_graph", "grad_norm"}, "finetune": {"lr_unet", "lr_graph", "grad_norm"}}
"""Learning rates and gradient norm, logged beside the terms."""


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_log_holds_every_term_with_its_chance_speed_and_memory(trained_run, stage):
    log = [line for line in lines(trained_run / stage) if "event" not in line]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    chances = {f"{name}_at_chance" for name in TERMS[stage]}
    for line in log:
        assert set(line) == TERMS[stage] | chances | STATE[stage] | {
            "step", "images_per_s", "remaining_s", "peak_memory_gib"
        }  # fmt: skip
        assert all(line[name] > 0 for name in STATE[stage])
        assert line["images_per_s"] > 0 and 0.1 < line["peak_memory_gib"] < 64
        assert all(line[name] > 0 for name in TERMS[stage])
    if stage == "pretrain":
        assert all(line["mae_at_chance"] == 1 for line in log)
        assert all(abs(line["loss"] - line["mae"] - line["con"] - 0.5 * line["geometry"]) < 1e-5 for line in log)
    else:
        total = [0.5 * (line["diff"] + line["isa"] + line["geometry"]) + 0.1 * line["attention"] for line in log]
        assert all(abs(line["loss"] - each) < 1e-5 for line, each in zip(log, total, strict=True))


def test_log_says_what_was_run_and_what_it_left(trained_run):
    events = [line for line in lines(trained_run / "finetune") if "event" in line]
    assert [e["event"] for e in events] == ["start", "samples", "checkpoint", "samples", "checkpoint", "done"]
    assert events[0]["settings"]["batch_size"] == 2 and events[0]["parameters"] > 1e6
    assert events[-1]["result"] == str(trained_run / "finetune" / "pipeline")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_tensorboard_has_the_same_numbers(trained_run, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run / stage / "tensorboard"))
    events.Reload()
    assert TERMS[stage] <= set(events.Tags()["scalars"])
    for scalar, (step, row) in zip(events.Scalars("loss"), rows(trained_run / stage).items(), strict=True):
        assert (scalar.step, scalar.value) == (step, pytest.approx(row["loss"], abs=1e-5))
    for name in STATE[stage]:
        found = [(scalar.step, pytest.approx(scalar.value, rel=1e-3)) for scalar in events.Scalars(name)]
        assert found == [(step, row[name]) for step, row in rows(trained_run / stage).items()]
    assert len(events.Scalars("images_per_s")) == 4


def test_tensorboard_has_the_sample_sheets(trained_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run / "finetune" / "tensorboard"))
    events.Reload()
    found = events.Images("samples")
    assert [one.step for one in found] == [2, 4]
    for one in found:
        file = trained_run / "finetune" / "samples" / f"step-{one.step:07d}.png"
        shown = Image.open(io.BytesIO(one.encoded_image_string)).convert("RGB")
        assert shown.tobytes() == Image.open(file).tobytes()


def test_fine_tuning_starts_from_the_pretrained_encoder_and_moves_it(trained_run, tmp_path):
    start = SceneGraphConditioner.from_pretrained(trained_run / "pretrain" / "graph_encoder").state_dict()
    end = SceneGraphConditioner.from_pretrained(trained_run / "finetune/pipeline/graph_encoder").state_dict()
    moved = {name: (end[name] - start[name]).abs().max().item() for name in start}
    buffers = ("mean", "scale", "std", "state", "states")
    for name, distance in moved.items():
        if name.endswith(buffers) or name == "relation_encoder.mask_token":
            assert distance == 0, name
        else:
            assert 0 < distance < 1e-2, f"{name}: four steps of 1e-4"


def test_frozen_parts_do_not_move(trained_run):
    from sgg_fast.toy.models import toy_foundation

    fresh = toy_foundation()
    folder = trained_run / "finetune" / "pipeline"
    for part, model in (("vae", fresh.vae), ("graph_clip", fresh.clip), ("text_encoder", fresh.text_encoder)):
        saved = load_file(next((folder / part).glob("*.safetensors")))
        assert all(model.state_dict()[name].equal(tensor) for name, tensor in saved.items()), part


@pytest.mark.parametrize(("stage", "ds_path"), [("pretrain", None), ("finetune", None), ("finetune", DS_JSON)])
def test_a_resumed_run_is_the_undisturbed_run_bit_for_bit(tmp_path, stage, ds_path):
    """Sample sheets, too, leave no trace: one run draws them at every step, the other never."""
    steps = f"{stage}_steps"
    whole = train(tmp_path / "whole", stage, ds_path, **{steps: 4}, sample_every=1)
    train(tmp_path / "parts", stage, ds_path, **{steps: 2})
    second = trainer(tmp_path / "parts", stage, ds_path, **{steps: 4})
    assert second.first_step == 2
    parts = second.train()
    assert rows(parts.parent) == rows(whole.parent)
    assert len(rows(whole.parent)) == 4
    assert same_weights(parts, whole)


def test_the_weights_do_move_and_the_seed_matters(tmp_path):
    two = train(tmp_path / "two", "pretrain", pretrain_steps=2)
    again = train(tmp_path / "again", "pretrain", pretrain_steps=2)
    assert same_weights(two, again)
    assert not same_weights(two, train(tmp_path / "one", "pretrain", pretrain_steps=1))
    assert not same_weights(two, train(tmp_path / "seed", "pretrain", pretrain_steps=2, seed=1))


def test_other_settings_do_not_continue_a_run_but_free_ones_may_change(tmp_path):
    train(tmp_path, "pretrain", pretrain_steps=2)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"holds a run with batch-size 2, not 4: .*--overwrite"):
        trainer(tmp_path, "pretrain", batch_size=4)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert trainer(tmp_path, "pretrain", pretrain_steps=3, log_every=2, checkpoint_every=3).first_step == 2


def test_a_run_of_two_processes_goes_on_in_one_with_as_many_images_a_step(tmp_path):
    """The checkpoint is that of one process with batch 4, which is two with batch 2."""
    train(tmp_path, "pretrain", batch_size=4, pretrain_steps=2)
    path = checkpoint_dir(tmp_path / "pretrain", 2) / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["seal"]
    manifest |= {"processes": 2, "settings": {**manifest["settings"], "batch_size": 2}}
    path.write_text(checkpoint._sealed(manifest))
    with pytest.raises(ConfigError, match=r"holds a run with 4 images a step, not 2 \(--batch-size x"):
        trainer(tmp_path, "pretrain", batch_size=2, pretrain_steps=3)
    assert trainer(tmp_path, "pretrain", batch_size=4, pretrain_steps=3).first_step == 2


def test_a_complete_run_is_left_alone_and_a_lost_result_is_written_again(tmp_path, caplog):
    result = train(tmp_path, "pretrain", pretrain_steps=2)
    stamp = (result / "config.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="sgg_fast"):
        assert train(tmp_path, "pretrain", pretrain_steps=2) == result
    assert "complete at step 2" in caplog.text
    assert (result / "config.json").stat().st_mtime_ns == stamp
    result.rename(tmp_path / "kept")  # as if killed between the last checkpoint and the result
    assert same_weights(train(tmp_path, "pretrain", pretrain_steps=2), tmp_path / "kept")


def test_overwrite_starts_over_but_not_for_settings_that_cannot_run(tmp_path):
    train(tmp_path, "pretrain", pretrain_steps=2)
    marker = tmp_path / "pretrain" / "marker"
    marker.touch()
    with pytest.raises(ConfigError, match="there is no such folder"):
        trainer(tmp_path, "pretrain", overwrite=True, data=str(tmp_path / "absent"))
    assert marker.exists() and checkpoint_steps(tmp_path / "pretrain") == [2]
    train(tmp_path, "pretrain", pretrain_steps=1, overwrite=True, seed=1)
    assert not marker.exists() and checkpoint_steps(tmp_path / "pretrain") == [1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path):
    train(tmp_path, "pretrain", checkpoint_every=1, pretrain_steps=3)
    run = tmp_path / "pretrain"
    assert checkpoint_steps(run) == [2, 3]
    path = checkpoint_dir(run, 3) / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{path}: missing or damaged; delete"):
        trainer(tmp_path, "pretrain", pretrain_steps=4)
    (checkpoint_dir(run, 3) / MANIFEST).unlink()
    assert trainer(tmp_path, "pretrain", pretrain_steps=4).first_step == 2


def test_a_checkpoint_reads_without_pickles(tmp_path):
    train(tmp_path, "finetune", finetune_steps=1)
    folder = checkpoint_dir(tmp_path / "finetune", 1)
    assert {p.name for p in folder.iterdir()} == {"weights.safetensors", "optimizer.pt", MANIFEST}
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert len(state["param_groups"]) == 4


def test_an_encoder_of_another_width_is_refused(trained_run, tmp_path):
    encoder = trained_run / "pretrain" / "graph_encoder"
    with pytest.raises(ConfigError, match="was pre-trained with width 32, not 48"):
        trainer(tmp_path, "finetune", width=48, graph_encoder=encoder)
    config = json.loads((encoder / "config.json").read_text())
    foreign = tmp_path / "foreign"
    SceneGraphConditioner(**{k: v for k, v in config.items() if k[0] != "_"} | {"context_dim": 64}).save_pretrained(
        foreign
    )
    with pytest.raises(ConfigError, match=r"a UNet of cross-attention width 64, but .* have 128"):
        trainer(tmp_path, "finetune", graph_encoder=foreign)
    assert not (tmp_path / "finetune").exists()
