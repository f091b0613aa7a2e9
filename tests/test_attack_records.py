"""Flipped bits in every kind of file that is neither model nor set: of runs, evaluations, drawings, the doctor, people.

Each is read as it was, read as other sound content where it has no digest, or refused in one line.

A few of each by default; --slow makes it a hundred, and prints the counts.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import DS_JSON, ROOT
from support.published import LAYOUTS, SCENES

from benchmarks import regress
from benchmarks.quality import plan as quality_plan
from sgg_fast import digests, env
from sgg_fast.config import Config
from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.data.inputs import read_inputs
from sgg_fast.data.png_record import graph_json, read_record, save_png
from sgg_fast.data.text_form import to_text
from sgg_fast.eval import pictures, report
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.ds_config import load_ds_config
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.run import checkpoint
from sgg_fast.train.run.log import read_log

MANY = pytest.param(100, marks=pytest.mark.slow, id="100")
FEW = pytest.param(8, id="8")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of file."""

    make: Callable[[Path], Path]
    """Writes it below a folder; returns its path."""
    read: Callable[[Path], Any]
    """Whatever reads it. ValueError is the refusal."""
    sealed: bool = False
    """True if a digest, or a checksum, finds any change: then a changed file is never read as other content."""
    only_saves_time: bool = False
    """True if a damaged file is as good as none."""


def _checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    module.config = recipe("toy")  # type: ignore[assignment]
    engine = EagerEngine(module, torch.device("cpu"))  # type: ignore[arg-type]
    meta = {"stage": "pretrain", "settings": {}}
    return checkpoint.save_checkpoint(folder, 3, meta, engine.save, lambda: None, 0)


def _log(folder: Path) -> Path:
    rows: list[dict[str, Any]] = [{"event": "start", "step": 0}, {"step": 1, "loss": 2.0, "images_per_s": 3.5}]
    rows += [{"event": "validation", "step": k, "retrieval": 0.5, "retrieval_at_chance": 0.1} for k in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "log.jsonl"


def _picture(folder: Path) -> Path:
    record = {"graph": graph_json(SCENES[0]), "seed": 3, "steps": 5, "guidance": 4.0, "size": 64, "scheduler": "ddim",
              "model": "toy", "weights": "0"}  # fmt: skip
    save_png(Image.new("RGB", (8, 8), (9, 99, 199)), folder / "p.png", record)
    return folder / "p.png"


RESULT = {"data": "toy", "weights": "0", "rows": {"drawn": {"entity recall": 0.5}}, "counterfactual pairs": {},
          "per picture": {"entity recall": [[0.5, 1.0]]}}  # fmt: skip
SETTINGS = {"model": "0" * 32, "data": "toy", "steps": 1, "guidance": 4.0, "relation_guidance": 0.0,
            "scheduler": "ddim", "graphs": "1" * 16}  # fmt: skip


def _result(folder: Path) -> Path:
    report.write_result(folder, RESULT)
    return folder / report.RESULT


def _figures(path: Path) -> Any:
    result = report.read_result(path.parent)
    return {key: result[key] for key in RESULT}


def _settings(folder: Path) -> Path:
    pictures.check_settings(folder, SETTINGS)
    return folder / "settings.json"


def _rows(folder: Path) -> Path:
    (folder / "new.csv").write_text(
        "op,ms_p50,device,commit,date\na,1.5,NVIDIA,c,2026-01-01\nb,2,NVIDIA,c,2026-01-01\n"
    )
    return folder / "new.csv"


def _doctor(folder: Path) -> Path:
    (folder / "doctor.json").write_text(json.dumps({"machine": "CPU", "unfit": {"kernels": "it differs"}}, indent=1))
    return folder / "doctor.json"


def _note(folder: Path) -> Path:
    path = folder / "note.json"
    path.write_text(digests.sealed({"unet/w.safetensors": [1, 2, "3"]}))
    return path


_GIVEN = {"model": "runs/foundation", "precision": "auto"}


def _plan(folder: Path) -> Path:
    quality_plan.store(folder, "1h", quality_plan.LEAST, _GIVEN)
    return folder / "plan.json"


def _lines(layout: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "g.jsonl").write_text("".join(json.dumps(graph) + "\n" for graph in LAYOUTS[layout]))
        return folder / "g.jsonl"

    return make


def _words(folder: Path) -> Path:
    (folder / "g.txt").write_text("".join(to_text(scene) + "\n" for scene in SCENES))
    return folder / "g.txt"


def _json(layout: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "g.json").write_text(json.dumps(LAYOUTS[layout]))
        return folder / "g.json"

    return make


def _copy(source: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / source.name).write_bytes(source.read_bytes())
        return folder / source.name

    return make


def _validations(path: Path) -> Any:
    return [fields for _, _, fields in read_log(path)]


def _ds(path: Path) -> Any:
    return load_ds_config(path, Config().optim, None, 1)


KINDS: dict[str, Kind] = {
    "checkpoint weights": Kind(lambda f: _checkpoint(f) / "weights.safetensors",
                               lambda p: checkpoint.read_manifest(p.parent), sealed=True),
    "checkpoint optimiser": Kind(lambda f: _checkpoint(f) / "optimizer.pt",
                                 lambda p: checkpoint.read_manifest(p.parent), sealed=True),
    "checkpoint manifest": Kind(lambda f: _checkpoint(f) / checkpoint.MANIFEST,
                                lambda p: checkpoint.read_manifest(p.parent), sealed=True),
    "log.jsonl": Kind(_log, _validations),
    "ds.json": Kind(_copy(Path(DS_JSON)), _ds),
    "ds_offload.json": Kind(_copy(ROOT / "configs" / "ds_offload.json"), _ds),
    "ds_zero3.json": Kind(_copy(ROOT / "configs" / "ds_zero3.json"), _ds),
    "drawn picture": Kind(_picture, read_record, sealed=True),
    "evaluation's result": Kind(_result, _figures, sealed=True),
    "evaluation's settings": Kind(_settings, lambda p: pictures.check_settings(p.parent, SETTINGS), sealed=True),
    "benchmark rows": Kind(_rows, regress.read),
    "comparison's plan": Kind(_plan, lambda p: quality_plan.stored(p.parent, "1h", _GIVEN)),
    "doctor's record": Kind(_doctor, env.read_doctor, only_saves_time=True),
    "note of digests": Kind(_note, digests._read_note, only_saves_time=True),
    "graphs in words": Kind(_words, load_scene_graphs),
    "graphs in JSON lines": Kind(_lines("sg2im"), load_scene_graphs),
    **{f"graphs of {layout}": Kind(_json(layout), load_scene_graphs) for layout in LAYOUTS},
}  # fmt: skip


def attack(kind: Kind, path: Path, num: int, seed: str) -> Counter[str]:
    """Flip a bit, read, restore; `num` times. How it ended."""
    whole, was, ends = path.read_bytes(), kind.read(path), Counter[str]()
    rng = random.Random(seed)
    for _ in range(num):
        spoilt = bytearray(whole)
        spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        try:
            same = kind.read(path) == was
        except ValueError as error:
            said = str(error)
            assert str(path.parent) in said, said
            assert "\n" not in said and len(said) < 1000 and not kind.only_saves_time
            ends["refused"] += 1
        else:
            assert same or not kind.sealed, bytes(spoilt)
            ends["as it was" if same else "other sound content"] += 1
    path.write_bytes(whole)
    assert kind.read(path) == was
    return ends


@pytest.mark.parametrize("num", [FEW, MANY])
@pytest.mark.parametrize("name", KINDS)
def test_flipped_bits(tmp_path, name, num):
    kind = KINDS[name]
    ends = attack(kind, kind.make(tmp_path), num, name)
    print(f"{name}: {num} flips: {dict(ends)}")
    assert sum(ends.values()) == num


def test_graphs_are_read_the_same_by_the_command(tmp_path):
    """What the attack reads is what infer.py reads."""
    for name, relations in (
        ("graphs of psg", lambda path: load_scene_graphs(path)[0].relations),
        ("graphs in words", lambda path: load_scene_graphs(path)[0].relations),
        ("drawn picture", lambda path: SCENES[0].relations),
    ):
        path = KINDS[name].make(tmp_path)
        assert next(iter(read_inputs([str(path)]))).graph.relations == relations(path)
