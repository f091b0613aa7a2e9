"""The real recipe on a folder shaped like Stable Diffusion v1.4 and one like CLIP ViT-B/32, scaled down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from support import ROOT, sd_folder
from support.tiny_runs import rows, weights

import infer
import train

# What is shrunk for the test; every other setting is vg256's.
SHRUNK = ["--recipe", "vg256", "--resolution", "64", "--width", "32", "--num-layers", "2", "--log-every", "1",
          "--num-samples", "1", "--sheet-steps", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sd")
    return {
        "model": sd_folder.write_sd(base / "model"),
        "clip": sd_folder.write_clip(base / "clip"),
        "data": sd_folder.write_pairs(base / "data"),
        "out": base / "run",
    }


def argv(folders: dict[str, Path], stage: str, **changes: Path) -> list[str]:
    places = {**folders, **changes}
    return ["--stage", stage, *SHRUNK, *(word for name, path in places.items() for word in (f"--{name}", str(path)))]


@pytest.fixture(scope="module")
def run(folders) -> Path:
    """Both stages by their commands, three steps each."""
    for stage in ("pretrain", "finetune"):
        assert train.main([*argv(folders, stage), "--steps", "3"]) == 0
    return folders["out"]


def test_the_folder_is_stable_diffusions_own_format(folders):
    """Stock diffusers reads it, and its architecture is SD v1.4's with smaller numbers."""
    pipeline = StableDiffusionPipeline.from_pretrained(folders["model"], safety_checker=None)
    config = pipeline.unet.config
    assert len(config.block_out_channels) == 4 and config.layers_per_block == 2 and config.attention_head_dim == 8
    assert "geglu" in type(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[0]).__name__.lower()
    assert 2 ** (len(pipeline.vae.config.block_out_channels) - 1) == 8
    assert pipeline.tokenizer.model_max_length == 77
    assert len(pipeline.unet.state_dict()) == 686, "as many tensors as SD v1.4's UNet"


def test_both_stages_train_from_it(run):
    for stage in ("pretrain", "finetune"):
        log = rows(run / stage)
        assert list(log) == [1, 2, 3]
        assert all(0 <= value < 100 for row in log.values() for value in row.values())
    for row in rows(run / "pretrain").values():  # one batch has no graph with anything to mask
        assert (row["mae"] == 0) == (row["mae_at_chance"] == 0) and row["con"] > 0
    settings = json.loads((run / "finetune" / "log.jsonl").read_text().splitlines()[0])["settings"]
    assert (settings["batch_size"], settings["unet_lr"], settings["loss_weight"]) == (2, 1e-6, 0.5)


def test_only_the_unet_moves_and_by_the_papers_rate(run, folders):
    before, after = weights(folders["model"]), weights(run / "finetune" / "pipeline")
    for part in ("vae", "unet", "text_encoder"):
        file = next(name for name in before if name.startswith(part))
        assert before[file].keys() == after[file].keys(), "stock parameter names"
        moved = max((before[file][k] - after[file][k]).abs().max().item() for k in before[file])
        assert 0 < moved < 5e-6 if part == "unet" else moved == 0


def test_the_result_is_drawn_from_and_trained_from_again(run, folders, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert infer.main([str(ROOT / "graph.json"), "--model", str(run), "--out", str(out), "--steps", "2"]) == 0
    assert Image.open(out).size == (64, 64)
    capsys.readouterr()
    places = {k: v for k, v in folders.items() if k != "clip"}  # the pipeline carries CLIP
    again = argv(places, "pretrain", model=run / "finetune" / "pipeline", out=tmp_path / "run")
    assert train.main([*again, "--steps", "1"]) == 0
    first = rows(run / "pretrain")[1]
    assert rows(tmp_path / "run" / "pretrain")[1] == pytest.approx(first, rel=1e-4), "the same frozen towers"


@pytest.mark.parametrize(
    ("folder", "lost", "reason"),
    [
        ("model", "unet", "the folder lacks unet/config.json; it must be in diffusers format"),
        ("model", "vae/config.json", "the folder lacks vae/config.json"),
        ("model", "text_encoder", "the folder lacks text_encoder/config.json"),
        ("model", "tokenizer/merges.txt", "the folder lacks tokenizer/tokenizer.json"),
        ("model", "scheduler", "the folder lacks scheduler/scheduler_config.json"),
        ("model", "unet/diffusion_pytorch_model.safetensors", "cannot be loaded: "),
        ("clip", "config.json", "--clip {clip}: the folder lacks config.json"),
        ("clip", "vocab.json", "--clip {clip}: the folder lacks tokenizer.json"),
        ("clip", "model.safetensors", "cannot be loaded: "),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_in_one_line(folders, tmp_path, capsys, folder, lost, reason):
    part = tmp_path / folder
    shutil.copytree(folders[folder], part)
    path = part / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train.main(argv(folders, "pretrain", **{folder: part}, out=tmp_path / "run")) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and reason.format(clip=part) in said[0] and "Traceback" not in err and out == ""
    assert not (tmp_path / "run").exists()


def test_without_a_clip_the_flag_is_named(folders, tmp_path, capsys):
    places = {k: v for k, v in folders.items() if k != "clip"}
    assert train.main(argv(places, "pretrain", out=tmp_path / "run")) == 2
    assert "has no CLIP for names and images: give --clip" in capsys.readouterr().err


def test_weights_that_are_not_safetensors_are_not_read(folders, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folders["model"], model)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(weights(model)["unet/diffusion_pytorch_model.safetensors"], file.with_suffix(".bin"))
    file.unlink()
    assert train.main(argv(folders, "pretrain", model=model, out=tmp_path / "run")) == 2
    assert "cannot be loaded" in capsys.readouterr().err
