"""Help, and every refusal that needs no model, without loading torch: each in a fresh Python that may not import it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

RUN = """
import runpy, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers"}:
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refused())
kind, name, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = name
try:
    runpy.run_path(name, run_name="__main__") if kind == "file" else runpy.run_module(name, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
"""Runs a script or a module as a command; an import of torch ends it with a traceback."""


def run(command: str, *words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command in `folder`, in a process without torch."""
    kind = "file" if command.endswith(".py") else "module"
    name = str(ROOT / command) if kind == "file" else command
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", RUN, kind, name, *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def test_an_import_of_torch_would_be_seen(tmp_path):
    (tmp_path / "loads.py").write_text("import torch\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN, "file", str(tmp_path / "loads.py")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "torch is imported" in done.stderr


COMMANDS = sorted(
    {
        re.sub(r"(\.__main__)?\.py$|/__main__\.py$", "", str(path.relative_to(ROOT))).replace("/", ".")
        for folder in ("sgg_fast", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^@command\(", path.read_text(encoding="utf-8"), re.MULTILINE) and path.parent.name != "commands"
    }
    - {"benchmarks.counts.backbones", "benchmarks.counts.step", "sgg_fast.nn.loading"}
)
"""Every module of ours that ends as a command, but three for developers that are about torch's own objects."""


def test_the_commands_are_found():
    assert {"benchmarks.run", "sgg_fast.eval", "sgg_fast.train.warmup", "sgg_fast.toy.build"} <= set(COMMANDS)


@pytest.mark.parametrize("command", ["train.py", "infer.py", *COMMANDS])
def test_help(command):
    done = run(command, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


@pytest.mark.parametrize(
    ("command", "words", "reason"),
    [
        ("benchmarks.run", "--op softmax", "argument --op: invalid choice: 'softmax'"),
        ("benchmarks.run", "--device tpu", "argument --device: tpu is not cpu, cuda or cuda:NUMBER"),
        ("benchmarks.train_step", "--stage finetune --form naive", "--form naive is not of --stage finetune"),
        ("benchmarks.train_step", "--stage pretrain --form plain", "--form plain is not of --stage pretrain"),
        ("benchmarks.infer", "--form fastest", "argument --form: invalid choice: 'fastest'"),
        ("benchmarks.optimiser", "--bakcend ours", "no flag --bakcend (did you mean --backend?)"),
        ("sgg_fast.train.warmup", "--recipe vg512", "--recipe vg512: there is no such recipe"),
        ("sgg_fast.train.warmup", "--batch-size 0", "--batch-size must be at least 1, not 0"),
        ("sgg_fast.toy.build", "detector --data-set toy-words", "--data-set toy-words has clip, unet, detector_words"),
        ("sgg_fast.toy.build", "vae --start x", "--start is of unet with --data-set toy-words"),
        ("sgg_fast.toy.build", "foundation --out {folder}", "has no vae and no clip: build that first"),
    ],
)
def test_a_command_refuses(tmp_path, command, words, reason):
    done = run(command, *words.format(folder=tmp_path).split())
    assert (done.returncode, done.stdout) == (2, "") and reason in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--recipe", "vg512"], "--recipe vg512: there is no such recipe; there are toy, "),
        (["--recipe", "vg256"], "this recipe needs --data: a folder"),
        (["--recipe", "vg256", "--data", "toy"], "this recipe needs --model: a Stable Diffusion v1.4 folder"),
        (["--data", "{folder}/absent"], "there is no such folder, and it is not toy or toy-rare"),
        (["--resolution", "60"], "--resolution must be a multiple of 8, at least 32, not 60"),
        (["--steps", "0"], "--pretrain-steps must be at least 1, not 0"),
        (["--conditioner", "text", "--geometry", "0.5"], "has none of SGG-IG's own tokens for --geometry"),
        (["--budget", "24GiB"], "--budget is for --plan and --auto-batch"),
        (["--conditioner", "text"], "--conditioner text has no pre-training: go on with --stage finetune"),
        (["--deepspeed", "{folder}/absent.json"], "--stage pretrain runs without --deepspeed"),
        (["--out", "{folder}/file"], "file is a file, not a folder"),
        (["--stage", "finetune", "--graph-encoder", "{folder}/absent"], "absent: there is no such folder"),
        (["--stage", "finetune", "--deepspeed", "{folder}/absent.json"], "absent.json: cannot be read: No such file"),
        (["--stage", "finetune", "--deepspeed", "{folder}/file"], "file: not JSON"),
    ],
)
def test_train_refuses(tmp_path, words, reason):
    (tmp_path / "file").touch()
    words = [word.format(folder=tmp_path) for word in words]
    done = run("train.py", "--stage", "pretrain", "--out", str(tmp_path / "run"), *words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train.py: ") and reason in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["absent.json"], "absent.json: cannot be read: No such file or directory"),
        (["bad.json"], "bad.json: relationships[0]: object index 7, but the graph has 2 objects"),
        (["graph.json", "--steps", "0"], "--steps must lie between 1 and 1000"),
        (["graph.json", "--scheduler", "best"], "--scheduler best: there is no such one; there are ddim, "),
        (["graph.json", "--out", "a.jpg"], "must end in .png"),
        (["graph.json", "--edit", "cow -> dog"], "the graph has no cow; it has sky, sheep"),
    ],
)
def test_infer_refuses(tmp_path, words, reason):
    graph = {"objects": ["sky", "sheep"], "relationships": [[0, "above", 1]]}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    (tmp_path / "bad.json").write_text(json.dumps({**graph, "relationships": [[0, "above", 7]]}))
    done = run("infer.py", *words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("infer.py: ") and reason in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data", "{folder}"], "no image with a graph beside it"),
        (["--data", "{folder}", "--shard-size", "0"], "--shard-size must be at least 1, not 0"),
        (["--data", "{folder}", "--workers", "0"], "--workers must be at least 1, not 0"),
        (["--data", "{folder}/set", "--split", "val"], "has a vocab.json and no val.h5"),
        (["--data", "{folder}/cut"], "/cut/set.json"),
        (["--data", "{folder}/absent"], "there is no such folder"),
    ],
)
def test_a_cache_of_data_that_cannot_be_used_is_refused(tmp_path, words, reason):
    for name in ("set", "cut"):
        (tmp_path / name).mkdir()
    (tmp_path / "set" / "vocab.json").write_text("{}")
    (tmp_path / "cut" / "set.json").write_text('{"format": "sgg_fast.jsonl/1", "resize": "crop"}')
    (tmp_path / "cut" / "train.jsonl").write_text('{"image": "a.png", "obj')
    words = [word.format(folder=tmp_path) for word in words]
    done = run("sgg_fast.data.prepare", "cache", *words, "--out", str(tmp_path / "c"))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("prepare: ") and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "c").exists()


def test_prepare_refuses(tmp_path):
    done = run("sgg_fast.data.prepare", "cache", "--recipe", "vg256", "--out", str(tmp_path / "c"))
    assert done.returncode == 2 and done.stderr.startswith("prepare: this recipe needs --data")
    done = run("sgg_fast.data.prepare", "vg", "--root", str(tmp_path), "--out", str(tmp_path / "c"))
    assert done.returncode == 2 and done.stderr.startswith("prepare: ") and done.stderr.count("\n") == 1
