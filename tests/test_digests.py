"""What we write is read byte by byte once for each (path, size, time of change): models, sets and caches alike."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.small_sets import cache_of, draw, records
from support.vg_files import plain_set

from sgg_fast import digests
from sgg_fast.config import ConfigError
from sgg_fast.data import jsonl
from sgg_fast.data.prepare import __main__ as prepare
from sgg_fast.data.prepare import cache as writer
from sgg_fast.data.sources import jsonl_source, vg_source
from sgg_fast.data.stored import StoredCache
from sgg_fast.toy.models import toy_foundation

LOW = [f"--min-{what}-instances=2" for what in ("object", "relation", "attribute")]


@pytest.fixture
def read(tmp_path, monkeypatch) -> list[str]:
    """Names of the files that were read whole, in order; every file counts as a large one, and the notes are new."""
    seen, original = [], digests.sha256_of
    monkeypatch.setenv("SGG_FAST_CACHE", str(tmp_path / "notes"))
    monkeypatch.delenv(digests.VERIFY, raising=False)
    monkeypatch.setattr(digests, "_SMALL", 0)
    monkeypatch.setattr(digests, "sha256_of", lambda path: seen.append(path.name) or original(path))
    return seen


def vg_set(tmp_path: Path) -> tuple[Path, str]:
    plain_set().write(tmp_path / "vg")
    assert prepare.main(["vg", "--root", str(tmp_path / "vg"), "--out", str(tmp_path / "set"), *LOW]) == 0
    return tmp_path / "set", "train.h5"


def own_set(tmp_path: Path) -> tuple[Path, str]:
    rows = records(draw(tmp_path / "set" / "images", 3))
    jsonl.write_set(tmp_path / "set", {"kind": "folder", "resize": "squash"}, {"train": rows}, lambda: "{}")
    return tmp_path / "set", "train.jsonl"


def cache(tmp_path: Path) -> tuple[Path, str]:
    own_set(tmp_path)
    return cache_of(tmp_path / "set", tmp_path / "cache", token_init="none"), "shard-00000.safetensors"


@pytest.mark.parametrize(
    ("make", "opened"),
    [
        (vg_set, lambda folder: vg_source(folder, 32, check=False)),
        (own_set, lambda folder: jsonl_source(folder, 32)),
        (cache, StoredCache),
    ],
    ids=["vg", "own", "cache"],
)
def test_a_set_is_read_whole_at_its_first_opening_and_after_a_change(tmp_path, monkeypatch, read, make, opened):
    foundation = toy_foundation()
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    folder, name = make(tmp_path)
    read.clear()
    opened(folder)
    assert name in read
    read.clear()
    opened(folder)
    assert read == []
    os.utime(folder / name, ns=(1, 1))
    opened(folder)
    assert read == [name]
    was = digests.sha256s(folder, [name])
    read.clear()
    spoilt = bytearray((folder / name).read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    (folder / name).write_bytes(spoilt)
    os.utime(folder / name, ns=(1, 1))
    assert digests.sha256s(folder, [name]) == was and read == [], "as documented: the note is believed"
    monkeypatch.setenv(digests.VERIFY, "1")
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        opened(folder)
    monkeypatch.delenv(digests.VERIFY)
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        opened(folder)


def test_notes_are_of_places_and_a_difference_is_read_twice(tmp_path, read):
    for folder, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").write_bytes(content)
        os.utime(tmp_path / folder / "x", ns=(1, 1))
    one, two = (digests.sha256s(tmp_path / folder, ["x"]) for folder in ("a", "b"))
    assert one != two and read == ["x", "x"]
    assert digests.changed(tmp_path / "a", one) == "" and digests.changed(tmp_path / "a", two) == "x"
    assert len(read) == 3, "no note is believed against the file"
    with pytest.raises(FileNotFoundError):
        digests.sha256s(tmp_path, ["gone"])
    notes = [json.loads(path.read_text())["files"] for path in sorted((tmp_path / "notes").rglob("*.json"))]
    assert sorted(entry["x"][2] for entry in notes) == sorted([one["x"], two["x"]])
