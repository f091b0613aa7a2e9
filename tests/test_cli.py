"""Bad input to the two commands: one clear line on stderr, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import DS_JSON, ROOT
from support.tiny_runs import flags

import infer
import train
from sgg_fast.train.run.checkpoint import checkpoint_steps

GRAPH = {"objects": ["sky", "sheep"], "relationships": [[0, "above", 1]]}


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def refused(main, argv: list[str], capsys, folder: Path, reason: str) -> None:
    """`main(argv)` exits with 2 and one line that holds `reason`, and leaves `folder` as it was."""
    before = files(folder)
    code = main(argv)
    out, err = capsys.readouterr()
    name = main.__module__.rpartition(".")[2]
    said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith(f"{name}.py:")]
    assert code == 2
    assert len(said) == 1 and reason in said[0], err
    assert "Traceback" not in err and out == ""
    assert files(folder) == before


@pytest.fixture
def graph(tmp_path) -> Path:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(GRAPH))
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "graph.json: cannot be read: No such file or directory"),
        ('{"objects": [', "graph.json: not JSON: "),
        (json.dumps({**GRAPH, "relationships": [[0, "above", 7]]}),
         "graph.json: relationships[0]: object index 7, but the graph has 2 objects"),
        (json.dumps([GRAPH, {"objects": []}]), "graph.json: [1].objects: must be a non-empty list"),
        ("[]", "graph.json: the list of graphs is empty"),
        ("\ud800".encode("utf-8", "surrogatepass"), "graph.json: not UTF-8"),
    ],
)  # fmt: skip
def test_infer_refuses_a_graph(tmp_path, capsys, content, reason):
    path = tmp_path / "graph.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(infer.main, [str(path), "--out", str(tmp_path / "o" / "a.png")], capsys, tmp_path, reason)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--steps", "0"], "--steps must lie between 1 and 1000"),
        (["--num-images", "0"], "--num-images must lie between 1 and"),
        (["--num-images", "9999999"], "--num-images must lie between 1 and"),
        (["--batch-size", "0"], "--batch-size must lie between 1 and"),
        (["--scheduler", "best"], "--scheduler best: there is no such one; there are ddim, "),
        (["--edit", "sheep"], "--edit 'sheep': write"),
        (["--edit", "cow -> dog"], "--edit 'cow -> dog': the graph has no cow; it has sky, sheep"),
        (["--guidance", "nan"], "--guidance must lie between 1 and"),
        (["--guidance", "0"], "--guidance must lie between 1 and"),
        (["--relation-guidance", "nan"], "--relation-guidance must lie between 0 and"),
        (["--relation-guidance", "-1"], "--relation-guidance must lie between 0 and"),
        (["--seed", "-1"], "--seed must lie between"),
        (["--seed", str(2**63)], "--seed must lie between"),
        (["--size", "60"], "--size must be a multiple of 8"),
        (["--size", "0"], "--size must be a multiple of 8"),
        (["--out", "{folder}/a.jpg"], "must end in .png"),
        (["--out", "{folder}/graph.json/a.png"], "is not a folder that can be written to"),
        (["--out", "{folder}/taken"], "--out {folder}/taken/graph.png: is a folder"),
        (["--model", "{folder}/absent"], "no pipeline there"),
        (["--model", "{folder}"], "no pipeline there"),
    ],
)
def test_infer_refuses_a_setting(tmp_path, graph, capsys, more, reason):
    (tmp_path / "taken" / "graph.png").mkdir(parents=True)
    reason = reason.format(folder=tmp_path)
    argv = [str(graph), *(word.format(folder=tmp_path) for word in more)]
    argv += [] if "--out" in more else ["--out", str(tmp_path / "a.png")]
    refused(infer.main, argv, capsys, tmp_path, reason)


def unwritable(tmp_path: Path) -> Path:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("root may write anywhere")
    return folder


def test_infer_refuses_a_folder_without_permission(tmp_path, graph, capsys):
    folder = unwritable(tmp_path)
    argv = [str(graph), "--out", str(folder / "a.png")]
    refused(infer.main, argv, capsys, tmp_path, "is not a folder that can be written to")


def test_a_disk_that_refuses_leaves_no_half_picture(tmp_path, graph, capsys, trained_run, monkeypatch):
    def half(self, file, **_):
        if isinstance(file, Path):
            file.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    argv = [str(graph), "--model", str(trained_run), "--out", str(tmp_path / "a.png"), "--steps", "1"]
    refused(infer.main, argv, capsys, tmp_path, "No space left on device")


@pytest.mark.parametrize(
    "lost", ["unet", "vae/diffusion_pytorch_model.safetensors", "graph_encoder/config.json", "graph_tokenizer"]
)
def test_infer_refuses_a_model_that_lacks_a_part(tmp_path, graph, capsys, trained_run, lost):
    model = tmp_path / "model"
    shutil.copytree(trained_run / "finetune" / "pipeline", model)
    path = model / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    argv = [str(graph), "--model", str(model), "--out", str(tmp_path / "a.png")]
    refused(infer.main, argv, capsys, tmp_path, f"--model {model}: cannot be loaded: ")


def test_infer_refuses_a_truncated_model(tmp_path, graph, capsys, trained_run):
    model = tmp_path / "model"
    shutil.copytree(trained_run / "finetune" / "pipeline", model)
    weights = next((model / "graph_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    argv = [str(graph), "--model", str(model), "--out", str(tmp_path / "a.png")]
    refused(infer.main, argv, capsys, tmp_path, f"--model {model}: cannot be loaded: ")


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


@pytest.mark.parametrize(
    ("main", "argv", "reason"),
    [
        (train.main, ["--stage", "pretrain", "--colour", "red"], "no flag --colour"),
        (train.main, ["--stage", "sideways"], "invalid choice: 'sideways'"),
        (train.main, [], "required: --stage"),
        (train.main, ["--stage", "pretrain", "--encoder", "wide"], "argument --encoder: invalid choice"),
        (train.main, ["--stage", "pretrain", "--width", "many"], "argument --width: invalid int value"),
        (infer.main, [], "required: INPUT"),
        (infer.main, ["graph.json", "--steps", "few"], "argument --steps: invalid int value"),
    ],
)
def test_argparse_refuses(capsys, main, argv, reason):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_each_command_names_the_next_one_and_that_runs(tmp_path, capsys, monkeypatch):
    """From pre-training to the picture by typing what was printed; --steps is the chosen stage's."""
    monkeypatch.chdir(ROOT)

    def say(main, argv: list[str]) -> tuple[str, list[str]]:
        assert main(argv) == 0
        saved, following = capsys.readouterr().out.splitlines()
        assert following.startswith("next: python ")
        return saved, shlex.split(following)[2:]

    first = ["--stage", "pretrain", *flags(finetune_steps=1), "--steps", "2", "--out", str(tmp_path)]
    saved, (script, *argv) = say(train.main, first)
    assert (saved, script) == (f"saved {tmp_path}/pretrain/graph_encoder", "train.py")
    assert checkpoint_steps(tmp_path / "pretrain") == [2]
    saved, (script, *argv) = say(train.main, argv)
    assert (saved, script) == (f"saved {tmp_path}/finetune/pipeline", "infer.py")
    assert checkpoint_steps(tmp_path / "finetune") == [1]
    assert infer.main([*argv, "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a.png\n"


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


def test_the_commands_themselves_say_one_line_and_exit_with_2(tmp_path):
    """As a user runs them, one process each, their streams apart."""
    argv = ["train.py", "--stage", "finetune", "--deepspeed", str(tmp_path / "no.json"), "--out", str(tmp_path / "run")]
    for words, said in (
        (argv, f"train.py: --deepspeed {tmp_path}/no.json: cannot be read: No such file or directory\n"),
        (["infer.py", str(tmp_path / "no.json")], f"infer.py: {tmp_path}/no.json: cannot be read: No such file"),
    ):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert files(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_deepspeed_which_saving_a_model_imports_does_not_say_that_it_looked_for_a_gpu():
    pytest.importorskip("deepspeed")
    imported = "from sgg_fast.quiet import quiet_libraries; quiet_libraries(); import deepspeed"
    unset = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", imported], cwd=ROOT, env=unset, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
