"""`prepare check`: a whole download passes; every fault of one is named with its cure, and the cure works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.vg_files import SAMPLE, real

from sgg_fast.data.prepare import check
from sgg_fast.data.prepare.__main__ import main as prepare
from sgg_fast.toy import sets


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("downloads")
    sets.write_vg(base / "vg", 20, size=64)
    sets.write_coco(base / "coco", 20, size=64)
    return {"vg": base / "vg", "coco": base / "coco"}


@pytest.fixture
def sized(monkeypatch) -> None:
    """The small sets' counts in place of the published ones."""
    monkeypatch.setattr(check, "VG_IMAGES", 20)
    monkeypatch.setattr(check, "COCO_IMAGES", {"train": 16, "val": 4})
    monkeypatch.setattr(check, "COCO_LISTED", {"train": 16, "val": 4})


@pytest.mark.parametrize("form", ["vg", "coco"])
def test_a_whole_download_passes_and_every_file_has_its_line(downloads, sized, capsys, form):
    assert prepare(["check", str(downloads[form])]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and lines[-1] == f"{downloads[form]}: whole"
    assert all(line.startswith("ok ") for line in lines[:-2])
    files = {
        "vg": ("objects.json", "relationship_alias.txt", "version 1.4", "20 of 20 listed pictures", "train 16, val 2"),
        "coco": ("stuff_val2017.json", "train-ids.txt", "16 of 16 listed pictures", "4 of 4 listed pictures"),
    }[form]
    assert all(name in out for name in files)


def test_counts_that_are_not_the_published_ones_stop_it_until_they_are_meant(downloads, capsys):
    assert prepare(["check", str(downloads["vg"])]) == 2
    out, err = capsys.readouterr()
    assert "differs  image_data.json: 20 images where the published file has 108077" in out
    assert err.count("\n") == 1 and "go on with --any-size" in err
    assert prepare(["check", str(downloads["vg"]), "--any-size"]) == 0, "the cure"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def as_before_1_4(path: Path) -> None:
    path.write_text(path.read_text().replace("merged_object_ids", "something"))


def pack(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.zip"))


@pytest.mark.parametrize(
    ("form", "spoil", "file", "said"),
    [
        ("vg", Path.unlink, "relationship_alias.txt", "relationship_alias.txt: missing in"),
        ("vg", pack, "objects.json", "objects.json.zip"),
        ("vg", cut, "relationships.json", "cut or not JSON: download it again"),
        ("vg", as_before_1_4, "objects.json", "an earlier version than 1.4"),
        ("vg", Path.unlink, "images/VG_100K/7.jpg", "19 of 20 listed pictures; missing or empty: 7.jpg"),
        ("vg", shutil.rmtree, "images/VG_100K", "it holds images.zip and images2.zip, unpacked there"),
        ("coco", Path.unlink, "annotations/stuff_train2017.json", "stuff_annotations_trainval2017.zip"),
        ("coco", cut, "annotations/instances_val2017.json", "cut or not JSON"),
        ("coco", Path.unlink, "annotations/deprecated-challenge2017/val-ids.txt", "val-ids.txt: missing in"),
        ("coco", lambda path: path.write_bytes(b""), f"val2017/{17:012d}.jpg", "3 of 4 listed pictures; missing or e"),
    ],
)
def test_each_fault_of_a_download_is_named(
    downloads, sized, tmp_path, capsys, form: str, spoil: Callable[[Path], object], file: str, said: str
):
    root = tmp_path / form
    shutil.copytree(downloads[form], root)
    spoil(root / file)
    assert prepare(["check", str(root)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "1 findings are WRONG" in err
    (wrong,) = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert said in wrong


def test_an_earlier_version_on_purpose_goes_on(downloads, sized, tmp_path):
    root = tmp_path / "vg"
    shutil.copytree(downloads["vg"], root)
    as_before_1_4(root / "objects.json")
    assert prepare(["check", str(root), "--any-version", "--any-size"]) == 0


@real
def test_the_published_annotations_of_1_2_are_recognised(capsys):
    assert prepare(["check", str(SAMPLE)]) == 2
    assert "WRONG    objects.json: an earlier version than 1.4" in capsys.readouterr().out


def test_a_folder_of_neither_or_both_is_one_line(downloads, tmp_path, capsys):
    for folder, said in ((tmp_path, "holds neither set's"), (tmp_path / "no", "there is no such folder")):
        assert prepare(["check", str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err
    for path in (downloads["vg"] / "objects.json", downloads["coco"] / "annotations" / "stuff_val2017.json"):
        shutil.copy(path, tmp_path)
    assert prepare(["check", str(tmp_path)]) == 2
    assert "holds both sets" in capsys.readouterr().err


def test_images_elsewhere_are_found_by_the_flag(downloads, sized, tmp_path):
    root = tmp_path / "vg"
    shutil.copytree(downloads["vg"], root)
    (root / "images").rename(tmp_path / "pictures")
    assert prepare(["check", str(root)]) == 2
    assert prepare(["check", str(root), "--images", str(tmp_path / "pictures")]) == 0


def test_only_the_heads_of_large_files_are_read(downloads, sized, tmp_path, monkeypatch):
    """A file whose middle is broken passes: `prepare` reads it whole."""
    root = tmp_path / "vg"
    shutil.copytree(downloads["vg"], root)
    records = json.loads((root / "objects.json").read_text())
    text = json.dumps(records)
    (root / "objects.json").write_text(text[: len(text) // 2] + "@" + text[len(text) // 2 :])
    monkeypatch.setattr(check, "HEAD", 2)
    assert prepare(["check", str(root)]) == 0
