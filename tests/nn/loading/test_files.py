"""The manifest of an export: every byte counts, is compared once, and a note never says more than was seen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgg_fast import digests
from sgg_fast.digests import VERIFY
from sgg_fast.nn import loading
from sgg_fast.nn.loading import MANIFEST, ModelError, check, digest, forget_places, read_json, seal


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An export of three small files and one of over a MiB, and a cache of its own."""
    monkeypatch.setenv("SGG_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VERIFY, raising=False)
    root = tmp_path / "model"
    (root / "unet").mkdir(parents=True)
    (root / "model_index.json").write_text('{"_class_name": "X", "provenance": {"seed": 1}}')
    (root / "unet" / "config.json").write_text('{"a": 1}')
    (root / "unet" / "w.safetensors").write_bytes(bytes(range(256)) * 5000)
    (root / "README.md").write_text("a card")
    seal(root)
    return root


def flip(path: Path, place: int) -> None:
    """Another byte, the size and the time of change kept."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_every_file_that_loading_reads_is_listed_and_cards_are_not(folder):
    assert list(json.loads((folder / MANIFEST).read_text())["files"]) == [
        "model_index.json", "unet/config.json", "unet/w.safetensors",
    ]  # fmt: skip
    check(folder)
    (folder / "README.md").write_text("another card")
    check(folder)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "unet/w.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_any_damage_is_named_and_the_cures_cure(folder, name, damage):
    path, whole = folder / name, (folder / name).read_bytes()
    if damage == "flip":
        flip(path, 7)
    elif damage == "cut":
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
    with pytest.raises(ModelError, match=rf"^{name}: ") as caught:
        check(folder)
    if damage != "gone":
        assert "get the folder again; if you changed it yourself, delete its sha256.json" in str(caught.value)
        (folder / MANIFEST).rename(folder / "aside")
        check(folder)  # the second cure
        (folder / "aside").rename(folder / MANIFEST)
    path.write_bytes(whole)  # the first
    check(folder)


def test_a_file_that_was_added_is_named(folder):
    (folder / "unet" / "w.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^unet/w\.safetensors\.index\.json: not among the files"):
        check(folder)
    check(folder, parts=("vae",))
    (folder / "unet" / "w.safetensors.index.json").unlink()
    check(folder)


def test_a_part_alone_is_checked_by_the_manifest_above(folder):
    flip(folder / "unet" / "w.safetensors", 0)
    with pytest.raises(ModelError, match=r"unet/w\.safetensors: its bytes"):
        check(folder / "unet")
    with pytest.raises(ModelError, match=r"unet/w\.safetensors: its bytes"):
        loading.check_file(folder / "unet" / "w.safetensors")


def test_every_byte_of_the_manifest_counts(folder):
    size = (folder / MANIFEST).stat().st_size
    for place in range(0, size, 7):
        flip(folder / MANIFEST, place)
        with pytest.raises(ModelError, match=r"^sha256\.json: "):
            check(folder)
        flip(folder / MANIFEST, place)
    check(folder)


def test_large_files_are_read_once_for_each_path_size_and_time(folder, monkeypatch):
    read, original = [], digests.sha256_of
    monkeypatch.setattr(digests, "sha256_of", lambda path: read.append(path.name) or original(path))
    check(folder)
    check(folder)
    assert read.count("w.safetensors") == 1
    os.utime(folder / "unet" / "w.safetensors", ns=(1, 1))
    check(folder)
    assert read.count("w.safetensors") == 2
    monkeypatch.setenv(VERIFY, "1")
    check(folder)
    assert read.count("w.safetensors") == 3


def test_verify_finds_what_kept_its_size_and_time(folder, monkeypatch):
    check(folder)
    flip(folder / "unet" / "w.safetensors", 1000)
    check(folder)  # as documented: the note of this path, size and time is believed
    monkeypatch.setenv(VERIFY, "1")
    with pytest.raises(ModelError, match="SHA-256 differs"):
        check(folder)


def test_a_damaged_note_costs_time_only(folder, tmp_path):
    before = digest(folder)
    (note,) = (tmp_path / "cache").rglob("*.json")
    for content in ('{"seal": "x", "files": {"unet/w.safetensors": [1, 2, "3"]}}', "[" * 100_000, "", '{"files": 3}'):
        note.write_text(content)
        check(folder)
        assert digest(folder) == before
    note.unlink()
    note.mkdir()  # cannot be written either
    check(folder)


def test_the_digest_is_of_every_byte_but_of_what_the_index_says_of_the_past(folder):
    before = digest(folder)
    (folder / MANIFEST).unlink()
    assert digest(folder) == before, "with a manifest or without"
    (folder / "model_index.json").write_text('{"_class_name": "X", "provenance": {"seed": 2}}')
    assert digest(folder) == before
    seen = {before}
    for name, place in (("unet/config.json", 6), ("unet/w.safetensors", 12345), ("model_index.json", 17)):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)
        seen.add(digest(folder))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff{}", r"not UTF-8 text \(byte 0\)"),
        (b'{"a": 1,}', "not JSON: .* at line 1, column"),
        (b"[" * 100_000, "not usable JSON: nested too deeply"),
        (b'{"a":' * 100_000, "not usable JSON: nested too deeply"),
        (b"[]", "must be a JSON object, not a list"),
        (b"", "not JSON"),
    ],
)
def test_json_that_cannot_be_used_is_one_line_with_the_file(tmp_path, content, reason):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"^unet/config\.json: {reason}") as caught:
        read_json(tmp_path / "c.json", "unet/config.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"^x: No such file or directory"):
        read_json(tmp_path / "d.json", "x")


def test_weights_are_told_apart(tmp_path):
    for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
        (tmp_path / name / "unet").mkdir(parents=True)
        save_file({"w": torch.full((300_000,), value)}, tmp_path / name / "unet" / "x.safetensors")
    assert digest(tmp_path / "a") == digest(tmp_path / "c") != digest(tmp_path / "b")


def test_an_export_does_not_say_where_its_parts_lay(folder):
    """Equal models give equal bytes; configurations alone are rewritten."""
    expected = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in (folder / "unet" / "config.json", folder / "model_index.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": "/home/me/unet"}))
    forget_places(folder)
    assert json.loads((folder / "unet" / "config.json").read_text()) == {"a": 1}
    assert json.loads((folder / "model_index.json").read_text()) == {"_class_name": "X", "provenance": {"seed": 1}}
    before = {path: path.read_bytes() for path in expected}
    forget_places(folder)
    assert {path: path.read_bytes() for path in expected} == before, "what names no place keeps its bytes"
    assert before[folder / "unet" / "w.safetensors"] == expected[folder / "unet" / "w.safetensors"]
