"""Checkpoints: whole or absent, hashed, the two newest kept."""

from __future__ import annotations

import hashlib
import json

import pytest

from sgg_fast.config import ConfigError
from sgg_fast.train import checkpoint

META = {"stage": "pretrain", "settings": {"seed": 3}}


def save(run, step, write=lambda folder: (folder / "w.bin").write_bytes(b"weights")):
    return checkpoint.save_checkpoint(run, step, META, write, barrier=lambda: None, rank=0)


def test_manifest_holds_meta_and_the_hash_of_every_file(tmp_path):
    def write(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_bytes(b"a")
        (folder / "w.bin").write_bytes(b"weights")

    folder = save(tmp_path, 12, write)
    manifest = checkpoint.read_manifest(folder)
    assert (manifest["step"], manifest["stage"], manifest["settings"]) == (12, "pretrain", {"seed": 3})
    assert manifest["sha256"] == {
        "sub/a.bin": hashlib.sha256(b"a").hexdigest(),
        "w.bin": hashlib.sha256(b"weights").hexdigest(),
    }


def test_nothing_appears_under_its_name_before_it_is_whole(tmp_path):
    seen = []

    def write(folder):
        (folder / "w.bin").write_bytes(b"half")
        seen.append((folder.name, checkpoint.checkpoint_steps(tmp_path)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, write)
    assert seen == [(".step-0000005.part", [])]
    assert checkpoint.checkpoint_steps(tmp_path) == []
    assert save(tmp_path, 5).name == "step-0000005", "what a killed run left aside is not in the way"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000005"]


def test_the_two_newest_stay(tmp_path):
    for step in (100, 200, 300, 1000):
        save(tmp_path, step)
    assert checkpoint.checkpoint_steps(tmp_path) == [300, 1000]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000300", "step-0001000"]


def test_folders_without_a_manifest_are_ignored(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-0000002").mkdir()
    (tmp_path / "checkpoints" / "step-old").mkdir()
    (tmp_path / "checkpoints" / "step-old" / checkpoint.MANIFEST).write_text("{}")
    assert checkpoint.checkpoint_steps(tmp_path) == [1]
    assert checkpoint.checkpoint_steps(tmp_path / "absent") == []


def test_a_flipped_bit_is_noticed_and_the_file_named(tmp_path):
    folder = save(tmp_path, 1)
    data = bytearray((folder / "w.bin").read_bytes())
    data[3] ^= 1
    (folder / "w.bin").write_bytes(data)
    with pytest.raises(ConfigError, match=r"w\.bin: missing or damaged; delete .*step-0000001"):
        checkpoint.read_manifest(folder)


def test_a_missing_file_is_noticed(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "w.bin").unlink()
    with pytest.raises(ConfigError, match=r"w\.bin: missing or damaged"):
        checkpoint.read_manifest(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 3}', "{"])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / checkpoint.MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match=r"manifest\.json: cannot be read"):
        checkpoint.read_manifest(folder)


def test_ranks_other_than_0_write_their_part_and_publish_nothing(tmp_path):
    aside = tmp_path / "checkpoints" / ".step-0000001.part"
    aside.mkdir(parents=True)  # rank 0 made it before the barrier
    checkpoint.save_checkpoint(tmp_path, 1, META, lambda f: (f / "r1").write_bytes(b"1"), lambda: None, rank=1)
    assert [p.name for p in aside.iterdir()] == ["r1"]
    assert checkpoint.checkpoint_steps(tmp_path) == []


def test_write_json_replaces_a_whole_file(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"a": 1})
    checkpoint.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
