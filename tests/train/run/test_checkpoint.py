"""Checkpoints: whole or absent, hashed, the two newest kept."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import DS_JSON
from support.tiny_runs import trainer

from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.run import checkpoint

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
    with pytest.raises(ConfigError, match=r"step-0000001/w\.bin: missing or damaged"):
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


@pytest.mark.parametrize(
    "change",
    [
        {"step": "1"}, {"step": 2}, {"step": None}, {"step": True}, {"step": -1}, {"sha256": []}, {"sha256": {}},
        {"sha256": {"w.bin": 3}}, {"sha256": {"../w.bin": "0"}}, {"sha256": {"/etc/passwd": "0"}}, {"stage": 3},
        {"settings": []}, {"settings": None}, {"settings": {"seed": {}}}, {"validation": 3}, {"validation": None},
        {"validation": {"best": "0", "since": 0}}, {"validation": {"best": 0.5}},
        {"validation": {"best": float("nan"), "since": 0}},
    ],
)  # fmt: skip
def test_a_manifest_sealed_anew_with_wrong_content_is_one_line(tmp_path, change):
    folder = save(tmp_path, 1)
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["seal"]
    path.write_text(checkpoint._sealed({**manifest, **change}))
    with pytest.raises(ConfigError) as caught:
        checkpoint.newest_checkpoint(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{path}: not what train.py writes: ") and "--overwrite starts over" in said
    assert "\n" not in said
    path.write_text(checkpoint._sealed(manifest))
    assert checkpoint.newest_checkpoint(tmp_path)[0] == 1


def reseal(folder, **changes):
    """The manifest of `folder` with changes, and its files as they are now, under a seal that holds."""
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["seal"]
    files = {p.name: checkpoint.sha256_of(p) for p in folder.iterdir() if p.name != checkpoint.MANIFEST}
    path.write_text(checkpoint._sealed({**manifest, "sha256": files, **changes}))


@pytest.mark.parametrize("fault", ["tensor gone", "other shape", "no optimiser", "no state", "list", "other stage"])
def test_a_checkpoint_sealed_anew_over_other_files_is_one_line_and_overwrite_cures_it(tmp_path, fault):
    settings = {"resolution": 32, "pretrain_steps": 1, "checkpoint_every": 1}
    trainer(tmp_path, "pretrain", **settings).train()
    folder = checkpoint.checkpoint_dir(tmp_path / "pretrain", 1)
    weights = load_file(folder / "weights.safetensors")
    name = min(weights)
    if fault == "tensor gone":
        save_file({k: v for k, v in weights.items() if k != name}, folder / "weights.safetensors")
    elif fault == "other shape":
        save_file({**weights, name: torch.zeros(3, 5, 7)}, folder / "weights.safetensors")
    elif fault == "no optimiser":
        (folder / "optimizer.pt").unlink()
    elif fault in ("no state", "list"):
        torch.save({} if fault == "no state" else [1], folder / "optimizer.pt")
    reseal(folder, **({"stage": "finetune"} if fault == "other stage" else {}))
    longer = {**settings, "pretrain_steps": 2}
    with pytest.raises(ConfigError) as caught:
        trainer(tmp_path, "pretrain", **longer)
    said = str(caught.value)
    assert "--overwrite" in said and "\n" not in said, said
    assert said.startswith(str(tmp_path / "pretrain")), said
    trainer(tmp_path, "pretrain", overwrite=True, **longer).train()
    assert checkpoint.newest_checkpoint(tmp_path / "pretrain")[0] == 2


def test_deleting_one_that_cannot_be_loaded_goes_on_from_the_one_before(tmp_path):
    """The other cure that the message names."""
    settings = {"resolution": 32, "checkpoint_every": 1}
    trainer(tmp_path, "pretrain", pretrain_steps=2, **settings).train()
    folder = checkpoint.checkpoint_dir(tmp_path / "pretrain", 2)
    torch.save([1], folder / "optimizer.pt")
    reseal(folder)
    with pytest.raises(ConfigError, match=r"step-0000002: cannot be loaded, .*; delete it to go on from an older one"):
        trainer(tmp_path, "pretrain", pretrain_steps=3, **settings)
    shutil.rmtree(folder)
    one = trainer(tmp_path, "pretrain", pretrain_steps=3, **settings)
    assert one.first_step == 1
    one.train()
    assert checkpoint.newest_checkpoint(tmp_path / "pretrain")[0] == 3


def test_ranks_other_than_0_write_their_part_and_publish_nothing(tmp_path):
    aside = tmp_path / "checkpoints" / ".step-0000001.part"
    aside.mkdir(parents=True)  # rank 0 made it before the barrier
    checkpoint.save_checkpoint(tmp_path, 1, META, lambda f: (f / "r1").write_bytes(b"1"), lambda: None, rank=1)
    assert [p.name for p in aside.iterdir()] == ["r1"]
    assert checkpoint.checkpoint_steps(tmp_path) == []


def test_any_damage_anywhere_is_noticed_named_and_an_older_one_offered(tmp_path):
    """A byte changed, or the file cut, at 400 random places of a real checkpoint's files, the manifest among them."""
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    module.config = recipe("toy")
    engine = EagerEngine(module, torch.device("cpu"))
    for step in (1, 2, 3):
        module(torch.ones(2, 16)).square().mean().backward()
        engine.optimizer.step()
        folder = save(tmp_path, step, engine.save)
    rng, files = random.Random(0), sorted(folder.iterdir())
    assert len(files) == 3 and checkpoint.newest_checkpoint(tmp_path)[0] == 3
    for i in range(400):
        path = files[i % 3]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :]
        path.write_bytes(flipped if i % 2 else whole[:place])
        with pytest.raises(ConfigError) as caught:
            checkpoint.newest_checkpoint(tmp_path)
        assert str(caught.value).startswith(f"{path}: "), (path.name, place)
        assert f"; delete {folder} to go on from step 2" in str(caught.value)
        path.write_bytes(whole)
    assert checkpoint.newest_checkpoint(tmp_path)[0] == 3


def test_without_an_older_whole_one_the_cure_is_to_start_over(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "w.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"step-0000002/w\.bin: .*no older one is whole: --overwrite starts over"):
        checkpoint.newest_checkpoint(tmp_path)


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path):
    (save(tmp_path, 1) / "planted.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"planted\.pt: does not belong to this checkpoint"):
        checkpoint.newest_checkpoint(tmp_path)


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_a_disk_that_fills_anywhere_on_the_way_leaves_the_one_before(tmp_path, writer):
    """Free space is what a checkpoint takes, less a part of it: the writer fails early, late, or at the manifest."""

    def write(folder):
        state = {f"w{i}": torch.full((40_000,), float(i)) for i in range(8)}
        if writer == "torch":
            torch.save(state, folder / "optimizer.pt")
        else:
            save_file(state, folder / "weights.safetensors")

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        before = shutil.disk_usage(disk).free
        save(disk, 1, write)
        size = before - shutil.disk_usage(disk).free
        save(disk, 2, write)
        for free in [*range(0, size - 8192, size // 12), size - 4096]:
            filler = disk / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - free))
            with pytest.raises(OSError, match=r"step-0000003: cannot be written \(.*No space left on device"):
                save(disk, 3, write)
            filler.unlink()
            assert [p.name for p in sorted((disk / "checkpoints").iterdir())] == ["step-0000001", "step-0000002"]
            assert checkpoint.newest_checkpoint(disk)[0] == 2
        assert save(disk, 3, write).name == "step-0000003"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("stage", "ds_path", "changes"),
    [("pretrain", None, {"ema": 0.99}), ("finetune", None, {}), ("finetune", DS_JSON, {"optimizer": "adam"})],
)
def test_the_size_foreseen_is_the_size_written(tmp_path, stage, ds_path, changes):
    one = trainer(tmp_path, stage, ds_path, resolution=32, **{f"{stage}_steps": 1}, **changes)
    foreseen = checkpoint.checkpoint_bytes(one.engine.module, one.config.optim, stage, ds_path is not None)
    one.train()
    folder = checkpoint.checkpoint_dir(tmp_path / stage, 1)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 0.85 < foreseen / written < 1.3, (foreseen, written)
