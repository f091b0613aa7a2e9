"""Random damage to each kind of file of a model folder, random command lines: no traceback, no wrong in silence.

A few of each by default; --slow makes it a hundred.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from support.sd_folder import write_pipeline
from transformers import CLIPTextModel

from sgg_fast import drawing
from sgg_fast.commands import infer
from sgg_fast.data.png_record import read_record
from sgg_fast.drawing.models import load_model
from sgg_fast.nn import loading
from sgg_fast.nn.foundation import load_clip, load_sd_configs
from sgg_fast.nn.loading import ModelError
from sgg_fast.nn.pipeline_parts import load_conditioner, read_index
from sgg_fast.quiet import quiet_libraries

FILES = (
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
    "text_encoder/model.safetensors", "graph_clip/config.json", "graph_clip/model.safetensors",
    "graph_encoder/config.json", "graph_encoder/diffusion_pytorch_model.safetensors", "graph_tokenizer/vocab.json",
    "graph_tokenizer/merges.txt", "graph_tokenizer/tokenizer_config.json",
)  # fmt: skip
FEW, MANY = 4, 100


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    quiet_libraries()
    root = write_pipeline(tmp_path_factory.mktemp("attack"))
    folder = root / "graph_tokenizer"  # the other form of a tokenizer
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    loading.seal(root)
    return root


def load(root: Path, file: str) -> None:
    """What is read of a pipeline when this file counts."""
    part = file.split("/")[0]
    if part == file:
        read_index(root)
    elif part == "scheduler":
        loading.load_scheduler(root, part)
    elif part.endswith("tokenizer"):
        loading.load_tokenizer(root, part)
    elif part == "graph_encoder":
        load_conditioner(root, part)
    elif part == "graph_clip":
        load_clip(root, part, "graph_tokenizer")
    else:
        configs = dict(zip(("unet", "vae", "text_encoder"), load_sd_configs(root), strict=True))
        kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
        loading.load_part(root, part, kind, configs[part])


def flips(whole: bytes, num: int, seed: str) -> list[bytes]:
    """`num` copies, each with another byte somewhere; half of those of a large file in its first 4 KiB, its header."""
    random_ = random.Random(seed)
    found = []
    for i in range(num):
        place = random_.randrange(min(len(whole), 4096) if i % 2 else len(whole))
        found.append(whole[:place] + bytes([whole[place] ^ random_.randrange(1, 256)]) + whole[place + 1 :])
    return found


def attack(root: Path, file: str, num: int) -> str:
    """How `num` flips of a file end, as text."""
    path, seal = root / file, root / loading.MANIFEST
    whole, sealed = path.read_bytes(), seal.read_bytes()
    found = Counter()
    try:
        for damaged in flips(whole, num, file):
            path.write_bytes(damaged)
            with pytest.raises(ModelError, match=rf"^{file}: "):  # an export: always found, always named
                loading.check(root)
            seal.unlink()  # somebody else's folder, which carries no digests: refused in one line, or of use
            try:
                load(root, file)
                found["of use"] += 1
            except ModelError as error:
                said = str(error)
                found["refused"] += 1
                assert "\n" not in said and said.isprintable() and len(said) < 1000
                part = file.split("/")[0]
                assert part in said, said
            seal.write_bytes(sealed)
    finally:
        path.write_bytes(whole)
        seal.write_bytes(sealed)
    return f"{file}: {num} flips: all named by the digests; without digests {dict(found)}"


@pytest.mark.parametrize("file", FILES)
def test_a_few_flips_of_each_kind_of_file(pipeline, file, capfd):
    attack(pipeline, file, FEW)
    assert capfd.readouterr() == ("", ""), "the libraries say nothing of their own"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_hundred_flips_of_each_kind_of_file(pipeline, file, capfd):
    told = attack(pipeline, file, MANY)
    assert capfd.readouterr() == ("", "")
    with capfd.disabled():
        print(f"\n{told}", end="")


FLAGS: dict[str, tuple[str, ...]] = {
    "--seed": ("0", "7", "-1", "9223372036854775807", "9223372036854775808", "x", "1e3"),
    "--num-images": ("1", "2", "0", "-3", "99999999999"),
    "--steps": ("1", "2", "3", "0", "-1", "1000", "1001", "100001", "2.5"),
    "--guidance": ("1", "4", "0.5", "nan", "inf", "1e30", "9999", "-1"),
    "--relation-guidance": ("0", "2", "-1", "nan", "1e38", "9999"),
    "--scheduler": (
        "ddim",
        "ddpm",
        "deis",
        "dpm++",
        "euler",
        "euler-a",
        "heun",
        "pndm",
        "unipc",
        "DDIM",
        "",
        "\x1b[2J",
    ),
    "--size": ("8", "16", "24", "32", "40", "64", "0", "12", "4104", "-8"),
    "--edit": ("sheep -> cow", "add hat on sheep", "remove sheep", "remove grass", "x", "->", "add \u202e", ""),
    "--out": ("a.png", "folder", "a.jpg", "g.json", "g.json/x.png", "", ".", "/proc/x.png", "\x07.png", "n" * 300),
    "--batch-size": ("1", "3", "0"),
    "--model": ("toy", "nowhere/at/all", "g.json", "", "\x1b]0;x\x07"),
}
SWITCHES = ("--show-graph", "--explain", "--grid", "--overwrite", "--quiet", "--json", "--verify", "--stepz")
INPUTS = ("g.json", "two.jsonl", "sheep on grass", "sheep", "", " ; ", "missing.json", "/dev/null", "empty.json", ".",
          "bad.json", "photo.png", "outputs/g.png", "x" * 300, "(((")  # fmt: skip


def command_line(random_: random.Random) -> list[str]:
    argv = random_.sample(INPUTS, 1) if random_.random() < 0.8 else random_.sample(INPUTS, 2)
    sound = random_.random() < 0.5  # half of them by values that come first, which are sound
    for flag in random_.sample(sorted(FLAGS), random_.randrange(5)):
        argv += [flag, random_.choice(FLAGS[flag][: 2 if sound else None])]
    argv += [switch for switch in SWITCHES[: 7 if sound else None] if random_.random() < 0.15]
    if "--steps" not in argv:
        argv += ["--steps", "1"]
    return argv


def try_out(argv: list[str], capsys: Any) -> int:
    """Run infer.py; whatever it does, it says so as promised. Its exit code."""
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path().rglob("*.png")}
    try:
        code = infer.main(argv)
    except SystemExit as end:  # argparse
        code = int(str(end.code))
    out, err = capsys.readouterr()
    assert "Traceback" not in err and code in (0, 2, 3), (argv, err)
    assert all(line.isprintable() for text in (out, err) for line in text.splitlines()), argv
    if code:
        assert err.strip() and err.splitlines()[-1].startswith("infer.py: "), (argv, err)
        assert "--overwrite" in argv or all(path.read_bytes() == was for path, was in before.items()), argv
        return code
    if "--overwrite" not in argv:
        assert all(path.read_bytes() == was for path, was in before.items()), (argv, "a picture was lost")
    for line in out.splitlines():
        given = json.loads(line) if "--json" in argv else {}
        files = [given["grid"]] if "grid" in given else given.get("files", [line])
        with Image.open(files[0]) as image:
            assert np.asarray(image).std() > 0, (argv, "one colour")
        if files[0].endswith(("-graph.png", "-explain.png", "-edit.png")) or "-grid" in files[0] or "grid" in given:
            continue
        _, record = read_record(Path(files[0]))
        asked = dict(itertools.pairwise(argv))
        for flag in ("--steps", "--guidance", "--size", "--scheduler"):
            if flag in asked and argv.count(flag) == 1:
                assert str(record[flag[2:]]) in (
                    asked[flag],
                    str(float(asked[flag])) if flag == "--guidance" else "",
                ), argv
    return 0


def attack_flags(num: int, seed: int, capsys: Any) -> None:
    codes = [try_out(command_line(random.Random(f"{seed} {i}")), capsys) for i in range(num)]
    assert {0, 2} <= set(codes), codes


@pytest.fixture
def here(tmp_path, monkeypatch):
    toy = load_model("toy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        drawing, "load_model", lambda model, verify=False: toy if model in (None, "toy") else load_model(model)
    )
    graph = {"objects": ["sheep", "grass"], "relationships": [[0, "standing on", 1]]}
    Path("g.json").write_text(json.dumps(graph))
    Path("two.jsonl").write_text(f"{json.dumps(graph)}\n{json.dumps({'objects': ['zeppelin']})}\n")
    Path("empty.json").write_text("")
    Path("bad.json").write_bytes(b'{"objects": ["\xff"]}')
    Image.new("RGB", (8, 8)).save("photo.png")


def test_some_random_command_lines(here, capsys):
    attack_flags(20, 0, capsys)


@pytest.mark.slow
def test_a_hundred_random_command_lines(here, capsys):
    attack_flags(120, 1, capsys)
