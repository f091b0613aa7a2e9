"""Files of a cache: the bytes that safetensors writes, always the same; any change of one is noticed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import pytest
from safetensors.numpy import load, save

from sgg_fast import digests
from sgg_fast.data import shards
from sgg_fast.data.shards import (
    INDEX,
    DamagedError,
    check_files,
    entry_of,
    read_index,
    read_tensors,
    write_index,
    write_tensors,
    write_whole,
)


def test_the_same_tensors_give_the_same_bytes_and_read_back(tmp_path):
    tensors = {"b": np.arange(6).reshape(2, 3), "a": np.float32([1.5]), "c": np.zeros((0, 4), np.float32)}
    for name in ("x", "y"):
        write_tensors(tmp_path / name, dict(sorted(tensors.items(), reverse=name == "y")), {"z": 1, "y": ["é"]})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    found, note = read_tensors(tmp_path / "x")
    assert note == {"z": 1, "y": ["é"]}
    assert all(
        (found[k] == v).all() and found[k].dtype == v.dtype and found[k].shape == v.shape for k, v in tensors.items()
    )


def test_a_file_is_written_as_safetensors_writes_it(tmp_path, monkeypatch):
    """Piece by piece, with the library's own bytes."""
    monkeypatch.setattr(shards, "_CHUNK", 7)
    tensors = {"b": np.arange(12, dtype=np.int64).reshape(3, 4), "a": np.ones((2, 0, 3), np.float32),
               "c": np.arange(5, dtype=np.uint8), "d": np.linspace(0, 1, 9, dtype=np.float16)}  # fmt: skip
    write_tensors(tmp_path / "x", tensors, {"k": "\u00e9"})
    raw = (tmp_path / "x").read_bytes()
    assert all((load(raw)[name] == array).all() for name, array in tensors.items())
    length = int.from_bytes(raw[:8], "little")
    note = shards.json.loads(raw[8 : 8 + length])["__metadata__"]
    assert raw == save(tensors, note)
    found, told = read_tensors(tmp_path / "x", verify=True)
    assert told == {"k": "\u00e9"} and all((found[name] == array).all() for name, array in tensors.items())


def test_the_bytes_of_a_large_file_are_read_once_and_again_after_a_change(tmp_path, monkeypatch):
    monkeypatch.setenv("SGG_FAST_CACHE", str(tmp_path / "notes"))
    path = tmp_path / "big"
    content = bytearray(np.random.default_rng(0).bytes(2 << 20))
    path.write_bytes(content)
    entry, read = entry_of(path), []
    original = digests.sha256_of
    monkeypatch.setattr(digests, "sha256_of", lambda path: read.append(path.name) or original(path))
    for _ in range(3):
        check_files(tmp_path, [entry])
    assert read == ["big"], "once"
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="SHA-256 differs"):
        check_files(tmp_path, [entry])


def flips(content: bytes) -> Iterator[bytes]:
    """Copies of a file's content, each with one bit changed; a copy for every byte."""
    rng = random.Random(0)
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def test_a_changed_byte_is_noticed_without_an_index(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.ones(3, np.float16)}, {"k": [1]})
    for content in flips(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(DamagedError) as caught:
            read_tensors(path, verify=True)
        assert str(caught.value).startswith(f"{path}: ") and "delete this file and run the same" in str(caught.value)


def test_the_index_knows_its_own_bytes_and_those_of_every_file(tmp_path):
    contents = {"one": b"first file", "two": b"other file"}
    for name, content in contents.items():
        write_whole(tmp_path / name, content)
    entries = [entry_of(tmp_path / name) for name in contents]
    assert entries[0] == {"file": "one", "bytes": 10, "sha256": hashlib.sha256(b"first file").hexdigest()}
    write_index(tmp_path, {"files": entries, "é": 1})
    assert read_index(tmp_path) == {"files": entries, "é": 1}
    whole = (tmp_path / INDEX).read_bytes()
    for content in flips(whole):
        (tmp_path / INDEX).write_bytes(content)
        with pytest.raises(DamagedError, match=rf"^{tmp_path / INDEX}: damaged: "):
            read_index(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(DamagedError, match=r"index\.json: cannot be read: No such file"):
        read_index(tmp_path)

    check_files(tmp_path, entries)
    for change, said in (
        (lambda path: path.write_bytes(b"short"), "two: has 5 bytes where 10 were written"),
        (lambda path: path.write_bytes(b"Other file"), "two: its bytes are not those that were written"),
        (lambda path: path.unlink(), "two: cannot be read: No such file"),
    ):
        change(tmp_path / "two")
        with pytest.raises(DamagedError, match=said):
            check_files(tmp_path, entries)
