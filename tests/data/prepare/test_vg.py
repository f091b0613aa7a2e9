"""`prepare vg` as a command: what is written is whole and can be read; what is refused, in one line, with its cure."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.tiny_runs import flags
from support.vg_files import LOW, SAMPLE, draw_images, plain_set, real, sample_root

import train
from sgg_fast.config import ConfigError
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.prepare.records import PrepareError
from sgg_fast.data.prepare.vg import RESULT, prepare
from sgg_fast.data.sources import vg_source


@real
def test_real_annotations_train(tmp_path):
    root, out = sample_root(tmp_path / "root", {"train": [1, 2, 3], "val": [4], "test": [5]}), tmp_path / "out"
    low = ["--min-object-instances", "2", "--min-relation-instances", "2", "--min-attribute-instances", "2"]
    assert main(["vg", "--root", str(root), "--out", str(out), "--any-version", *low]) == 0
    sizes = {
        "/".join(record["url"].split("/")[-2:]): (record["width"], record["height"])
        for record in json.loads((SAMPLE / "image_data.json").read_text())
    }
    draw_images(out / "images", sizes)
    source = vg_source(out, 64)
    assert len(source) == 3 and source.load_image(0).shape == (64, 64, 3)
    argv = ["--stage", "pretrain", "--data", str(out), "--out", str(tmp_path / "run"), *flags()]
    assert train.main(argv) == 0
    assert (tmp_path / "run" / "pretrain" / "graph_encoder").is_dir()


def spoil(name: str, content: str | bytes | None):
    def change(root: Path) -> None:
        if content is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil("attributes.json", None), "attributes.json missing; annotations (version 1.4)"),
        (spoil("objects.json", '[{"image_id": 1, "objects": [}]'), "objects.json: not usable JSON: "),
        (spoil("objects.json", '[{"image_id": 1, "objects": []}, {"ima'), "at character 34"),
        (spoil("objects.json", '[{"image_id": 1, "objects": []}'), "the list ends early at character 31"),
        (spoil("objects.json", "[] []"), "more text after the list"),
        (spoil("image_data.json", "{}"), "image_data.json: not usable JSON: must be a list of records"),
        (spoil("relationships.json", "[" * 100_000), "relationships.json: not usable JSON: nested too deeply"),
        (spoil("objects.json", '[{"id": 1, "objects": []}]'), "objects.json is not Visual Genome 1.4 but an earlier"),
        (spoil("objects.json", '[{"file": 1, "objects": []}]'), "objects.json: no record has an image_id"),
        (spoil("vg_splits.json", "[1]"), "vg_splits.json: must be an object with the lists train, val, test"),
        (spoil("vg_splits.json", '{"train": [], "val": [], "test": []}'), "no training image passes the first filters"),
        (spoil("vg_splits.json", b"\xff"), "vg_splits.json: not usable JSON"),
        (spoil("vocab.json", '{"object_idx_to_name": 3}'), "vocab.json: object_idx_to_name must be a list"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_2(tmp_path, capsys, change, reason):
    root = plain_set().write(tmp_path / "root")
    change(root)
    low = [f"--min-{what}-instances=2" for what in ("object", "relation", "attribute")]
    assert main(["vg", "--root", str(root), "--out", str(tmp_path / "out"), *low]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("prepare:")]
    assert len(said) == 1 and reason in said[0] and out == "" and "Traceback" not in err
    assert not (tmp_path / "out" / "vocab.json").exists()


def test_same_bytes_twice_and_nothing_else_left_behind(tmp_path):
    root, out = plain_set().write(tmp_path / "root"), tmp_path / "out"
    prepare(root, out, LOW)
    assert sorted(os.listdir(out)) == sorted([*RESULT, "lock"])
    first = {name: (out / name).read_bytes() for name in RESULT}
    with pytest.raises(PrepareError, match=r"already holds a set; --overwrite replaces it \(there: train\.h5, "):
        prepare(root, out, LOW)
    (out / "images").mkdir()
    prepare(root, out, LOW, overwrite=True)
    assert {name: (out / name).read_bytes() for name in RESULT} == first
    assert sorted(os.listdir(out)) == sorted([*RESULT, "images", "lock"])


def test_a_failure_while_writing_leaves_the_earlier_result(tmp_path, monkeypatch):
    root, out = plain_set().write(tmp_path / "root"), tmp_path / "out"
    prepare(root, out, LOW)
    before = {name: (out / name).read_bytes() for name in RESULT}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sgg_fast.data.prepare.report.Report.text", full)
    with pytest.raises(OSError, match="No space"):
        prepare(plain_set(2).write(tmp_path / "other"), out, LOW, overwrite=True)
    assert {name: (out / name).read_bytes() for name in RESULT} == before
    assert sorted(os.listdir(out)) == sorted([*RESULT, "lock"])


def test_refusals_name_the_cause_and_the_report_is_written(tmp_path, capsys):
    """`name` for `names`, ids in quotes: not merely that no image passes the last filter."""
    root, out = plain_set().write(tmp_path / "root"), tmp_path / "out"
    low = [f"--min-{what}-instances=2" for what in ("object", "relation", "attribute")]
    argv = ["vg", "--root", str(root), "--out", str(out), *low]
    objects = json.loads((root / "objects.json").read_text())
    good = json.dumps(objects)
    for change, said in (
        (lambda o: {**{k: v for k, v in o.items() if k != "names"}, "name": "man"},
         "object without names: it has name, in place of the list names"),
        (lambda o: {**o, "object_id": str(o["object_id"])},
         "object without a usable object_id: it is text in quotes, and ids are numbers"),
        (lambda o: {**o, "object_id": float(o["object_id"])}, "it is written with a decimal point"),
    ):  # fmt: skip
        rows = [{**image, "objects": list(map(change, image["objects"]))} for image in objects]
        (root / "objects.json").write_text(json.dumps(rows))
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert said in err and str(out / "report.json") in err
        assert any(said in fault["reason"] for fault in json.loads((out / "report.json").read_text())["faults"])
    (root / "objects.json").write_text(good)
    assert main(argv) == 0, "the report of a refusal is no set: the same command needs no --overwrite"
    whole = (out / "report.json").read_bytes()
    (root / "objects.json").write_text("[]")
    assert main([*argv, "--overwrite"]) == 2 and (out / "report.json").read_bytes() == whole
    assert (out / "refused.json").is_file() and "refused.json" in capsys.readouterr().err


def test_a_changed_byte_of_a_prepared_set_is_noticed_and_both_cures_work(tmp_path, capsys):
    root, out = plain_set().write(tmp_path / "root"), tmp_path / "out"
    prepare(root, out, LOW)
    for name in ("train.h5", "vocab.json"):
        spoilt = bytearray((out / name).read_bytes())
        spoilt[len(spoilt) // 2] ^= 1
        (out / name).write_bytes(spoilt)
        with pytest.raises(ConfigError, match=rf"{name}: its bytes are not those .*--overwrite.*delete sha256\.json"):
            vg_source(out, 32, check=False)
        prepare(root, out, LOW, overwrite=True)
        assert len(vg_source(out, 32, check=False)) == 4
    (out / "vocab.json").write_text((out / "vocab.json").read_text().replace('"man"', '"woman"'))
    with pytest.raises(ConfigError, match=r"vocab\.json: its bytes"):
        vg_source(out, 32, check=False)
    (out / "sha256.json").unlink()
    assert "woman" in vg_source(out, 32, check=False).graphs[0].objects
