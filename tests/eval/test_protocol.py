"""`--protocol paper`: fixed settings, a manifest of what was compared, published figures, refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgg_fast.data.prepare.__main__ import main as prepare
from sgg_fast.data.sources import vg_source
from sgg_fast.eval import distances
from sgg_fast.eval.__main__ import main
from sgg_fast.eval.protocol import drawn_objects
from sgg_fast.eval.published import PUBLISHED, TABLE_1, VG
from sgg_fast.graph import SceneGraph
from sgg_fast.toy import sets
from sgg_fast.toy.features import load_features

SIZE = 208


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A hundred toy scenes in Visual Genome's files, prepared: ten test images."""
    base = tmp_path_factory.mktemp("vg")
    sets.write_vg(base / "vg", 100, seed=3, size=SIZE)
    least = [f"--min-{what}-instances=1" for what in ("object", "attribute", "relation")]
    where = ["--root", str(base / "vg"), "--out", str(base / "set"), "--images", str(base / "vg" / "images")]
    assert prepare(["vg", *where, *least, "--min-object-size", "8"]) == 0
    return base / "set"


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return ["--protocol", "paper", "--model", "toy", "--data", str(data), "--out", str(out), "--dry", *more]


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> Path:
    """A dry run; read only."""
    out = tmp_path_factory.mktemp("protocol")
    assert main(flags(data, out)) == 0
    return out


def test_the_manifest_says_what_was_compared(done, data):
    """Figures and digests by hand, from the files of the folder and of the set."""
    found = json.loads((done / "manifest.json").read_text())
    assert (found["protocol"]["split"], found["protocol"]["guidance"], found["protocol"]["steps"]) == ("test", 7.5, 2)
    assert found["set"] == {"name": VG, "folder": str(data), "resolution": 64, "test graphs": 10}
    drawn = np.stack([np.asarray(Image.open(done / pair["drawn"])) for pair in found["pairs"]])
    source = vg_source(data, 64, "test")
    real = np.stack([source.load_image(i) for i in range(10)])
    assert [pair["real"] for pair in found["pairs"]] == [source.place(i).name for i in range(10)]
    assert [pair["relations"] for pair in found["pairs"]] == [len(graph.relations) for graph in source.graphs]
    assert found["drawn pixels sha256"] == hashlib.sha256(drawn.tobytes()).hexdigest()
    assert found["real pixels sha256"] == hashlib.sha256(real.tobytes()).hexdigest()
    read = load_features().read
    expected = distances.frechet_distance(read(drawn), read(real))
    assert found["figures"]["FID"] == pytest.approx(expected, rel=1e-5) and found["figures"]["IS"] >= 1
    assert found["features"]["published"] is False and len(found["features"]["sha256"]) == 64
    assert found["dry"] is True and "compare with nothing" in found["warnings"][0]


def test_published_figures_stand_beside_the_runs_own_and_name_their_source(done):
    text = (done / "table.md").read_text()
    (ours,) = [line for line in text.splitlines() if "SGG-IG" in line]
    for figure in ("26.2 / 19.3", "31.4 / 22.5", "16.3 / 15.2", "21.9 / 20.4"):
        assert figure in ours
    fid = json.loads((done / "manifest.json").read_text())["figures"]["FID"]
    (own,) = [line for line in text.splitlines() if line.startswith("| this run")]
    assert f"{fid:.4g} / " in own
    for name, entry in PUBLISHED.items():
        assert entry.verified == (entry.source == TABLE_1)
        assert entry.verified or f"- {name}: {entry.source} (unverified)" in text
    assert "WARNING: DRY RUN" in text


def test_it_goes_on_draws_nothing_twice_and_prints_what_it_fixes(done, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in (done / "pictures").iterdir()}
    whole = (done / "manifest.json").read_bytes()
    lost = sorted(before)[-1]
    content = np.asarray(Image.open(lost)).astype(int)
    lost.unlink()
    assert main(flags(data, done)) == 0
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before if path != lost} == {
        path: time for path, time in before.items() if path != lost
    }
    assert np.abs(np.asarray(Image.open(lost)) - content).max() <= 2
    assert json.loads((done / "manifest.json").read_text()).keys() == json.loads(whole).keys()
    for line in ("guidance: 7.5", "sampler: ddim", "images per graph: 1", "resizing: whole picture", "split: test"):
        assert f"  {line}" in said
    assert main(flags(data, done, "--max-objects", "3")) == 2
    assert "holds pictures with" in capsys.readouterr().err


def test_ten_objects_are_drawn_as_sg2im_draws_them():
    """All of a small graph; objects with relations first; relations among the drawn ones; one fixed draw a graph."""
    small = SceneGraph(("a", "b"), ((0, "on", 1),))
    assert drawn_objects(small, 10, 0) is small
    names = tuple(f"n{i}" for i in range(14))
    related = SceneGraph(names, ((13, "on", 2), (2, "near", 7)))
    found = drawn_objects(related, 10, 4)
    assert len(found.objects) == 10 and {"n13", "n2", "n7"} <= set(found.objects)
    assert [(found.objects[s], p, found.objects[o]) for s, p, o in found.relations] == [
        ("n13", "on", "n2"), ("n2", "near", "n7")]  # fmt: skip
    chain = SceneGraph(names, tuple((i, "on", i + 1) for i in range(13)))
    cut = drawn_objects(chain, 10, 4)
    assert len(cut.objects) == 10 and len(cut.relations) < 13
    assert all(int(cut.objects[o][1:]) == int(cut.objects[s][1:]) + 1 for s, _, o in cut.relations)
    assert drawn_objects(chain, 10, 4) == cut
    assert len({drawn_objects(chain, 10, i).objects for i in range(20)}) > 10


def test_max_objects_reaches_the_graphs_that_are_drawn(data, tmp_path):
    assert main(flags(data, tmp_path, "--max-objects", "3")) == 0
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert max(pair["objects"] for pair in found["pairs"]) == 3 == found["protocol"]["max_objects"]
