"""train.py: bad settings and data are one line, a stopped run continues, the next command is named."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import DS_JSON
from support.cases.refusals import GRAPH, refused
from support.tiny_runs import flags

import train
from sgg_fast.commands.train import next_command
from sgg_fast.train.run.checkpoint import checkpoint_steps


def data_folder(tmp_path: Path, image: bytes | None = None) -> Path:
    """Two pictures with graphs; `image` instead of the second one's bytes."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 50), "green").save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text(json.dumps(GRAPH))
    if image is not None:
        (folder / "b.png").write_bytes(image)
    return folder


@pytest.mark.parametrize(
    ("stage", "more", "reason"),
    [
        ("pretrain", ["--recipe", "vg512"], "--recipe vg512: there is no such recipe; there are toy, toy-words, vg128"),
        ("pretrain", ["--recipe", "vg256"], "this recipe needs --data: a folder"),
        ("pretrain", ["--recipe", "vg256", "--data", "toy"], "this recipe needs --model: a Stable Diffusion v1.4"),
        ("pretrain", ["--model", "{folder}"], "the folder lacks unet/config.json"),
        ("pretrain", ["--model", "{folder}/absent"], "absent: there is no such folder, and it is not a hub id"),
        ("pretrain", ["--model", "owner/name", "--clip", "./absent"], "--clip ./absent: there is no such folder"),
        ("pretrain", ["--data", "{folder}/absent"], "there is no such folder"),
        ("pretrain", ["--data", "{folder}/empty"], "no image with a graph beside it"),
        ("pretrain", ["--steps", "0"], "--pretrain-steps must be at least 1"),
        ("finetune", ["--steps", "0"], "--finetune-steps must be at least 1"),
        ("pretrain", ["--num-scenes", "1"], "needs at least 2"),
        ("pretrain", ["--resolution", "60"], "--resolution must be a multiple of 8"),
        ("pretrain", ["--kernels", "triton"], "--kernels triton: the tensors are on cpu"),
        ("pretrain", ["--deepspeed", DS_JSON], "--stage pretrain runs without --deepspeed"),
        ("pretrain", ["--out", "{folder}/file"], "file is a file, not a folder"),
        ("pretrain", ["--out", "{folder}/file/run"], "file is a file, not a folder"),
        ("finetune", ["--attention", "xformers"], "--attention xformers needs a CUDA device"),
        ("finetune", ["--graph-encoder", "{folder}/absent"], "absent: there is no such folder"),
        ("finetune", ["--graph-encoder", "{folder}/empty"], "not a graph encoder"),
        ("finetune", ["--deepspeed", "{folder}/absent.json"], "absent.json: cannot be read: No such file"),
        ("finetune", ["--deepspeed", "{folder}/bad.json"], "bad.json: not JSON"),
        ("finetune", ["--deepspeed", "{folder}/other.json"], "train_micro_batch_size_per_gpu is 64, but --batch-size"),
    ],
)
def test_train_refuses(tmp_path, capsys, monkeypatch, stage, more, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("sgg_fast.ops.dispatch._requested", "auto")  # put back afterwards
    monkeypatch.setattr("sgg_fast.env.device", lambda: torch.device("cpu"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"train_micro_batch_size_per_gpu": 64}')
    words = [word.format(folder=tmp_path) for word in more]
    settings = [] if "--recipe" in more else flags()
    argv = ["--stage", stage, *settings, "--out", str(tmp_path / "run"), *words]
    refused(train.main, argv, capsys, tmp_path, reason)


@pytest.mark.parametrize("image", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_train_names_an_image_that_cannot_be_read(tmp_path, capsys, image):
    data = data_folder(tmp_path, image)
    argv = ["--stage", "pretrain", *flags(data=data, geometry=0.0), "--out", str(tmp_path / "run")]
    refused(train.main, argv, capsys, tmp_path, f"{data}/b.png: cannot be read as an image")


def test_train_names_an_image_that_breaks_off(tmp_path, capsys):
    data = data_folder(tmp_path)
    Image.effect_noise((64, 64), 50).save(data / "b.png")
    whole = (data / "b.png").read_bytes()
    for at in (40, len(whole) // 2, len(whole) - 30):
        (data / "b.png").write_bytes(whole[:at])
        argv = ["--stage", "pretrain", *flags(data=data, geometry=0.0), "--out", str(tmp_path / "run")]
        refused(train.main, argv, capsys, tmp_path, f"{data}/b.png: cannot be read as an image")


def test_train_names_a_bad_graph_of_the_set(tmp_path, capsys):
    data = data_folder(tmp_path)
    (data / "b.json").write_text(json.dumps([GRAPH, GRAPH]))
    argv = ["--stage", "pretrain", *flags(data=data, geometry=0.0), "--out", str(tmp_path / "run")]
    refused(train.main, argv, capsys, tmp_path, f"{data}/b.json: must hold one graph, that of b.png")


def test_train_refuses_a_graph_encoder_of_another_width(tmp_path, capsys, trained_run):
    encoder = str(trained_run / "pretrain" / "graph_encoder")
    argv = ["--stage", "finetune", *flags(width=64), "--graph-encoder", encoder, "--out", str(tmp_path / "run")]
    refused(train.main, argv, capsys, tmp_path, "was pre-trained with width 32, not 64")


def test_train_refuses_other_settings_for_a_run_that_exists(capsys, trained_run):
    argv = ["--stage", "finetune", *flags(unet_lr=0.5), "--out", str(trained_run)]
    refused(train.main, argv, capsys, trained_run, "holds a run with unet-lr 0.0003, not 0.5")


def test_an_interrupt_is_one_line_and_the_run_continues(tmp_path, capsys, monkeypatch):
    from sgg_fast.train.engines.choose import EagerEngine

    update, calls = EagerEngine.update, []

    def interrupted(self, ids, step, lr_factor):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(step)
        return update(self, ids, step, lr_factor)

    monkeypatch.setattr(EagerEngine, "update", interrupted)
    argv = ["--stage", "pretrain", *flags(), "--out", str(tmp_path)]
    assert train.main(argv) == 130
    err = capsys.readouterr().err
    assert "Traceback" not in err and "train.py: interrupted; the same command continues" in err
    monkeypatch.setattr(EagerEngine, "update", update)
    assert train.main(argv) == 0
    assert "saved" in capsys.readouterr().out


def test_the_next_command_repeats_what_was_given_but_not_what_its_file_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert next_command("finetune", "toy", Path("runs/a b"), {}) == "python infer.py graph.json --model 'runs/a b'"
    given = {"batch_size": 3, "width": 64, "pretrain_steps": 9, "graph_negatives": False}
    start, more = "python train.py --stage finetune ", "--width 64 --no-graph-negatives"
    said = next_command("pretrain", "vg256", Path("runs/x"), given)
    assert said == f"{start}--recipe vg256 --out runs/x --batch-size 3 {more}"
    file = tmp_path / "s.toml"
    file.write_text("batch-size = 3\nwidth = 32")
    said = next_command("pretrain", "vg256", Path("runs/x"), given, file)
    assert said == f"{start}--settings {file} --out runs/x {more}"


def test_a_signal_ends_the_step_saves_and_is_the_exit_code(tmp_path, capsys, monkeypatch):
    from sgg_fast.train.engines.choose import EagerEngine

    update = EagerEngine.update

    def signalled(self, ids, step, lr_factor):
        done = update(self, ids, step, lr_factor)
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(EagerEngine, "update", signalled)
    assert train.main(["--stage", "pretrain", *flags(), "--out", str(tmp_path)]) == 143
    assert "train.py: SIGTERM: stopped and saved at step 1; the same command continues\n" in capsys.readouterr().err
    assert checkpoint_steps(tmp_path / "pretrain") == [1]
