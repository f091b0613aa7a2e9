"""infer.py at its edges: no picture is lost, what cannot be used is one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import ROOT
from support.cases.refusals import GRAPH, refused

from sgg_fast import drawing
from sgg_fast import pipeline as pipeline_module
from sgg_fast.commands import infer
from sgg_fast.data.png_record import is_drawn, read_record
from sgg_fast.drawing.models import load_model
from sgg_fast.nn.loading import digest
from sgg_fast.pipeline import SceneGraphToImagePipeline

SHEEP = '{"objects": ["sheep", "grass"], "relationships": [[0, "standing on", 1]]}'


@pytest.fixture(scope="module")
def toy():
    return drawing.load_model("toy")


@pytest.fixture
def here(tmp_path, monkeypatch, toy) -> Path:
    """An empty working folder with g.json; models are loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "load_model", lambda *_, **__: toy)
    Path("g.json").write_text(SHEEP)
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(drawing, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))


def run(capsys, *argv: str, code: int = 0) -> tuple[list[str], str]:
    capsys.readouterr()
    assert infer.main(list(argv)) == code
    out, err = capsys.readouterr()
    if code:
        assert err.count("\n") == 1 and err.startswith("infer.py: ") and err[:-1].isprintable() and out == ""
    return out.splitlines(), err


def test_another_seed_setting_or_edit_never_replaces_a_picture(here, capsys):
    argv = ("g.json", "--steps", "1", "--guidance", "1")
    assert run(capsys, *argv)[0] == ["outputs/g.png"]
    first = Path("outputs/g.png").read_bytes()
    assert run(capsys, *argv)[0] == ["outputs/g.png"], "the same one again"
    lines, err = run(capsys, *argv, "--seed", "1", "--grid")
    assert lines == ["outputs/g-v2.png", "outputs/g-grid.png"] and "stay: the new ones end in -v2" in err
    assert run(capsys, *argv, "--edit", "sheep -> horse")[0] == ["outputs/g-v3.png", "outputs/g-v3-edit.png"]
    assert run(capsys, *argv, "--seed", "1")[0] == ["outputs/g-v2.png"]
    assert run(capsys, *argv, "--grid")[0] == ["outputs/g.png", "outputs/g-grid-v2.png"]
    assert Path("outputs/g.png").read_bytes() == first
    _, err = run(capsys, *argv, "--seed", "2", "--out", "outputs/g.png", code=2)
    assert "outputs/g.png: holds another picture: give --overwrite to replace it, or another --out" in err
    run(capsys, *argv, "--seed", "2", "--out", "outputs/g.png", "--overwrite")  # the cure
    assert read_record(Path("outputs/g.png"))[1]["seed"] == 2


def test_a_picture_that_was_cut_in_its_pixels_is_not_taken_for_done(here, capsys):
    argv = ("g.json", "--steps", "1", "--guidance", "1")
    run(capsys, *argv)
    path = Path("outputs/g.png")
    whole, (_, record) = path.read_bytes(), read_record(path)
    graph = json.loads(SHEEP)
    assert is_drawn(path, {**record, "graph": graph})
    path.write_bytes(whole[:-40])
    assert not is_drawn(path, {**record, "graph": graph})
    assert run(capsys, *argv)[0] == ["outputs/g.png"] and path.read_bytes() == whole


def test_the_record_tells_a_scheduler_or_a_tokenizer_from_another(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(drawing.SHIPPED, copy)
    seen = {digest(copy)}
    for name in ("scheduler/scheduler_config.json", "graph_tokenizer/tokenizer.json", "unet/config.json"):
        path = copy / name
        path.write_bytes(path.read_bytes() + b"\n")
        seen.add(digest(copy))
    assert len(seen) == 4


def test_steps_that_the_scheduler_cannot_take_are_refused_and_what_it_says_it_can_is_drawn(here, capsys):
    for name in ("dpm++", "ddim"):
        _, err = run(capsys, "g.json", "--steps", "1000", "--scheduler", name, code=2)
        assert f"--steps 1000 with --scheduler {name}: this scheduler takes at most 99" in err
    assert not Path("outputs").exists()


def test_numbers_that_are_not_finite_are_never_saved(here, capsys, monkeypatch, toy):
    weight = toy.pipeline.unet.conv_in.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0, 0, 0] = float("nan")
        err = _code_three(capsys)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert "not saved: conv_in.weight of unet holds such numbers already: get the model again" in err
    assert not list(here.rglob("*.png"))
    monkeypatch.setattr(pipeline_module, "decode_latents", lambda vae, z: torch.full((len(z), 3, 8, 8), torch.nan))
    assert "lower --guidance" in _code_three(capsys) and not list(here.rglob("*.png"))


def _code_three(capsys) -> str:
    capsys.readouterr()
    assert infer.main(["g.json", "--steps", "1", "--quiet"]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_machine_without_memory_is_one_line(here, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 1 bytes")

    monkeypatch.setattr(SceneGraphToImagePipeline, "__call__", full)
    capsys.readouterr()
    assert infer.main(["g.json", "--steps", "1", "--quiet"]) == 2
    assert capsys.readouterr().err == "infer.py: out of memory: lower --batch-size or --size\n"


def test_notices_are_of_the_edited_graph_and_json_carries_them(here, capsys):
    (line,), err = run(capsys, "g.json", "--steps", "1", "--edit", "sheep -> zeppelin", "--json")
    assert json.loads(line)["notices"] == ["never seen in training: zeppelin"] and err == ""
    _, err = run(capsys, "zeppelin on grass", "--steps", "1", "--edit", "zeppelin -> sheep")
    assert "zeppelin" not in err.split("read as: ")[1].split("\n", 1)[1]
    _, err = run(capsys, "sheep frobs grass", "--steps", "1")
    assert 'read as: sheep frobs grass ("sheep frobs grass" is one object)\n' in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/dev/zero"], "/dev/zero: not text (byte 0 is zero)"),
        (["."], "cannot be read: Is a directory"),
        (["g.json", "--guidance", "1e30"], "--guidance must lie between 1 and 10000"),
        (["g.json", "--relation-guidance", "inf"], "--relation-guidance must lie between"),
        (["g.json", "--out", "a\x1b[31m.png"], r"--out 'a\x1b[31m.png': a path of printable characters"),
        (["g.json", "--out", "a\udcff.png"], r"argument 3 (a\udcff.png): not UTF-8 text"),
        (["g.json", "--scheduler", "\u202eddim"], r"--scheduler \u202eddim: there is no such one"),
        (["g.json", "--edit", "cow -> sheep"], "the graph has no cow"),
        (["g.json", "--steps", "100001"], "--steps must lie between 1 and 100000"),
        (["sheep\x1b[31m on grass"], "control character"),
    ],
)
def test_what_is_wrong_without_a_model_is_one_line_before_it_is_loaded(here, no_model, capsys, argv, said):
    assert said in run(capsys, *argv, code=2)[1]
    assert not (here / "outputs").exists()


def test_bidi_and_escape_characters_are_never_written_raw(here, capsys, monkeypatch):
    lines, err = run(capsys, "she\u202eep on grass", "--steps", "1")
    assert "\u202e" not in err and "she\\u202eep" in err and lines == ["outputs/she-ep-on-grass.png"]
    Path("a\x1b[31m\u2066.json").write_text(SHEEP)
    lines, err = run(capsys, "a\x1b[31m\u2066.json", "--steps", "1")
    assert lines == ["outputs/a-[31m-.png"] and "\x1b" not in err
    monkeypatch.setattr(drawing, "load_model", load_model)
    _, err = run(capsys, "g.json", "--model", "./x\x1b[31m\u202e", code=2)
    assert r"x\x1b[31m\u202e" in err


def test_a_stem_that_is_too_long_is_refused_before_anything_is_drawn(here, no_model, capsys):
    Path(f"{'a' * 245}.json").write_text(SHEEP)
    assert "too long for a picture's name" in run(capsys, f"{'a' * 245}.json", "--explain", code=2)[1]


def test_a_reader_that_goes_away_costs_its_lines_only(here, capsys, monkeypatch):
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    assert infer.main(["g.json", "sheep on sand", "--steps", "1", "--quiet"]) == 0
    assert len(list(Path("outputs").iterdir())) == 2


@pytest.mark.parametrize(
    ("redirection", "said"),
    [("- <&-", "standard input: is closed"), ("g.json >&-", "standard output is closed")],
)
def test_closed_streams_are_one_line(here, redirection, said):
    command = f"{sys.executable} {ROOT / 'infer.py'} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=here, timeout=300)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and said in done.stderr


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
