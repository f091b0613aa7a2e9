"""Nothing from a file is executed: malicious files are planted at each place that is read, and leave no trace."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import DS_JSON, ROOT
from support.tiny_runs import trainer

from sgg_fast import drawing
from sgg_fast.config import ConfigError, ModelConfig
from sgg_fast.data.sources import folder_source
from sgg_fast.digests import sha256_of as sha256
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.train.assemble import read_conditioner
from sgg_fast.train.run import checkpoint
from sgg_fast.train.run.checkpoint import MANIFEST, _sealed, checkpoint_dir, newest_checkpoint


class Payload:
    """Unpickling it makes the folder `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path):
    """The folder that a payload would make; the test fails if one was executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "a planted payload was executed"


def plant(path: Path, trace: Path, form: str = "zip") -> None:
    """A malicious file as torch.save writes it, zipped or in its old form, or a bare pickle."""
    if form == "bare":
        path.write_bytes(pickle.dumps(Payload(trace)))
    else:
        torch.save({"step": 1, "module": Payload(trace)}, path, _use_new_zipfile_serialization=form == "zip")


def seal(folder: Path) -> None:
    """What somebody who knows the manifest would do: make it match the planted files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["seal"]
    for name in manifest["sha256"]:
        manifest["sha256"][name] = sha256(folder / name)
    (folder / MANIFEST).write_text(_sealed(manifest))


def test_the_payload_works(tmp_path):
    for i, form in enumerate(("zip", "old")):
        plant(tmp_path / "x.pt", tmp_path / f"made-{i}", form)
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert (tmp_path / f"made-{i}").is_dir()


@pytest.fixture(scope="module", params=["plain", "deepspeed"])
def run(request, tmp_path_factory):
    """A fine-tuning run with a checkpoint, its DeepSpeed configuration, and its engine."""
    out, ds_path = tmp_path_factory.mktemp("run"), DS_JSON if request.param == "deepspeed" else None
    one = trainer(out, "finetune", ds_path, finetune_steps=1, resolution=32)
    one.train()
    return out, ds_path, one.engine


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_checkpoints_whether_their_manifest_tells_or_not(run, tmp_path, trace, form):
    out, ds_path, engine = run
    files = [p for p in checkpoint_dir(out / "finetune", 1).rglob("*") if p.suffix in (".pt", ".safetensors")]
    assert len(files) == 2
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(out, copy)
        planted = copy / file.relative_to(out)
        plant(planted, trace, form)
        with pytest.raises(ConfigError, match=rf"{file.name}: missing or damaged"):
            trainer(copy, "finetune", ds_path, finetune_steps=2, resolution=32)
        sealed = checkpoint_dir(copy / "finetune", 1)
        seal(sealed)
        assert newest_checkpoint(copy / "finetune")[0] == 1
        with pytest.raises(ConfigError, match=r"step-0000001: cannot be loaded, it was not written by train\.py"):
            checkpoint.load(engine.load, sealed)
        shutil.rmtree(copy)


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def as_pickles(folder: Path, trace: Path, keep: bool) -> None:
    """Beside or instead of each safetensors file a malicious one under the name that the older formats have."""
    for path in weights_of(folder):
        name = "pytorch_model.bin" if path.name == "model.safetensors" else f"{path.stem}.bin"
        plant(path.with_name(name), trace)
        if not keep:
            path.unlink()


def test_pipelines_with_pickled_weights(tmp_path, trace):
    folder = tmp_path / "pipeline"
    shutil.copytree(drawing.SHIPPED, folder)
    as_pickles(folder, trace, keep=True)
    drawing.load_model(str(folder))
    load_foundation(str(folder), "")
    as_pickles(folder, trace, keep=False)
    with pytest.raises(ValueError, match="cannot be loaded"):
        drawing.load_model(str(folder))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_foundation(str(folder), "")
    with pytest.raises(ConfigError, match="not a graph encoder"):
        read_conditioner(folder / "graph_encoder", ModelConfig())


def test_pickles_under_the_name_of_safetensors(tmp_path, trace):
    folder = tmp_path / "pipeline"
    for form in ("zip", "bare"):
        shutil.copytree(drawing.SHIPPED, folder)
        for path in weights_of(folder):
            plant(path, trace, form)
        with pytest.raises(ValueError, match="cannot be loaded"):
            drawing.load_model(str(folder))
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_foundation(str(folder), "")
        shutil.rmtree(folder)


CODE = "import os\nos.mkdir({trace!r})\nclass Evil:\n    pass\n"


@pytest.mark.parametrize("entry", ["pipeline", "component", "library"])
def test_code_that_a_pipeline_folder_brings_along(tmp_path, trace, entry):
    """Three ways to name code in a folder: the class in model_index.json, a component's there, auto_map in a config."""
    folder = tmp_path / "pipeline"
    shutil.copytree(drawing.SHIPPED, folder)
    code = CODE.format(trace=str(trace))
    for name in ("evil.py", "pipeline.py", "unet/evil.py", "graph_encoder/evil.py"):
        (folder / name).write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    if entry == "pipeline":
        index["_class_name"] = ["evil", "Evil"]
    elif entry == "component":
        index["graph_encoder"] = ["evil", "Evil"]
    else:
        for path in folder.rglob("config.json"):
            auto = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
            path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto}))
    (folder / "model_index.json").write_text(json.dumps(index))
    try:
        drawing.load_model(str(folder))
    except ValueError as error:
        assert "cannot be loaded" in str(error)


def test_the_checkpoint_of_the_toys_own_parts(tmp_path, trace):
    from sgg_fast.toy.fit import fit

    model = torch.nn.Linear(2, 2)
    arguments = {"folder": tmp_path / "part", "peak_lr": 1e-3}
    fit("part", model, lambda step: (model(torch.ones(1, 2)).sum(), {}), num_steps=1, **arguments)
    plant(tmp_path / "part" / "checkpoint" / "optimizer.pt", trace)
    with pytest.raises(pickle.UnpicklingError):
        fit("part", model, lambda step: (model(torch.ones(1, 2)).sum(), {}), num_steps=2, **arguments)


EXECUTES = ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "joblib.load")

WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Config")


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_line_of_ours_could_execute_a_file():
    """torch.load says weights_only=True; nothing else that unpickles, evaluates or trusts remote code is called."""
    sources = [*(ROOT / "sgg_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *ROOT.glob("*.py")]
    assert len(sources) > 40
    loads = 0
    for path in sources:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            options = {word.arg: ast.unparse(word.value) for word in call.keywords}
            where = f"{path}:{call.lineno}"
            if name == "torch.load":
                loads += 1
                assert options.get("weights_only") == "True", where
            assert options.get("trust_remote_code", "False") == "False", where
            assert options.get("allow_pickle", "False") == "False", where
            assert name not in EXECUTES, where
            if name.endswith(".from_pretrained") and not any(word in name for word in WITHOUT_WEIGHTS):
                assert options.get("use_safetensors") == "True", where
    assert loads >= 2


def bomb(path: Path, side: int) -> None:
    """A PNG that says it is side x side, in a few bytes: its pixels are zeros, deflated."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = io.BytesIO()
    for _ in range(side):
        pixels.write(deflate.compress(row))
    pixels.write(deflate.flush())
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels.getvalue()) + chunk(b"IEND", b"")
    )


def test_decompression_is_bounded(tmp_path):
    bomb(tmp_path / "a.png", 32_000)  # a gigapixel: 3 GB as RGB
    (tmp_path / "a.json").write_text('{"objects": ["sky"]}')
    assert (tmp_path / "a.png").stat().st_size < 1 << 20
    with pytest.raises(ConfigError, match=r"a\.png: "):
        folder_source(tmp_path, 64).load_image(0)


def test_weights_are_what_safetensors_says(tmp_path):
    """The format that is read instead holds tensors and nothing else."""
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    assert set(json.loads(data[8 : 8 + size])) == {"w"} and load_file(tmp_path / "w.safetensors")["w"].sum() == 2
