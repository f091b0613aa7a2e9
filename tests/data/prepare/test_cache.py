"""`prepare cache`, damaged, killed, changed or begun twice: the same bytes, or a refusal that says why."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_sets import cache_of, draw, files_of, small_job, small_source, tagged, write_graph

from sgg_fast.config import ConfigError
from sgg_fast.data import show
from sgg_fast.data.cache import build_cache
from sgg_fast.data.prepare import cache as writer
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.prepare.cache import write_cache
from sgg_fast.data.sources import folder_source
from sgg_fast.data.stored import StoredCache
from sgg_fast.eval import pictures
from sgg_fast.files import LOCK, locked
from sgg_fast.toy.models import toy_foundation


def names_of(made: Path) -> list[str]:
    return sorted(path.name for path in made.iterdir() if path.name != LOCK)


@pytest.mark.parametrize("how", ["deleted", "damaged", "empty"])
def test_the_cure_that_the_message_names_works_for_every_file(data, made, tmp_path, foundation, monkeypatch, how):
    """Delete the file, or leave it as it is, and run the same command again: the same bytes as never touched."""
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    assert names_of(made) == ["graphs.safetensors", "index.json", "job.json", "report.json",
                              *(f"shard-0000{k}.safetensors" for k in range(3))]  # fmt: skip
    folder = tmp_path / "cache"
    for name in names_of(made):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
        whole = (folder / name).read_bytes()
        if how == "deleted":
            (folder / name).unlink()
        else:
            middle = len(whole) // 2
            spoilt = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
            (folder / name).write_bytes(spoilt if how == "damaged" else b"")
        if name == "job.json" and how != "deleted":
            with pytest.raises(ConfigError, match=r"was begun from something else .*or --overwrite to start over"):
                cache_of(data, folder)
            write_cache(small_job(data, folder), overwrite=True, say=lambda line: None)
        if name not in ("job.json", "report.json"):
            with pytest.raises(ConfigError, match="run the same `prepare cache` command"):
                StoredCache(folder)
        assert files_of(cache_of(data, folder)) == files_of(made), name
        assert len(StoredCache(folder).graphs) == 12


def test_damage_before_the_index_is_there_is_not_vouched_for(data, made, tmp_path, foundation, monkeypatch):
    """A shard has a digest from its first write: a preparation that goes on must not adopt what changed since."""
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    folder, rng = tmp_path / "cache", random.Random(4)
    shutil.copytree(made, folder)
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    for _ in range(8):
        (folder / "index.json").unlink()
        spoilt = bytearray(whole)
        spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        assert files_of(cache_of(data, folder)) == files_of(made)


def test_what_killed_processes_left_is_cleaned(data, made, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(made, folder)
    for name in (".index.json.part", ".report.json.part", ".shard-00000.safetensors.part", ".index.json-x1y2",
                 ".shard-00000.safetensors-abc"):  # fmt: skip
        (folder / name).write_bytes(b"half")
    assert files_of(cache_of(data, folder)) == files_of(made)


def prepare_here(data: Path, out: Path, foundation) -> None:
    """The child that gets killed. Its models are loaded already: kills shall come while files are written."""
    writer.open_foundation = lambda config: foundation
    cache_of(data, out, shard_size=2, token_init="none")


def test_killed_at_random_moments_and_resumed_it_has_the_same_bytes(data, tmp_path, foundation, monkeypatch):
    """Ten kills, each at a random moment; nothing that an undisturbed run does not have is left behind."""
    monkeypatch.setattr(writer, "open_foundation", writer.open_foundation)  # put back at the end
    began, undisturbed = time.monotonic(), tmp_path / "whole"
    prepare_here(data, undisturbed, foundation)
    usual = time.monotonic() - began
    context, rng, out = multiprocessing.get_context("fork"), random.Random(1), tmp_path / "killed"
    stages = []
    for _ in range(10):
        child = context.Process(target=prepare_here, args=(data, out, foundation))
        child.start()
        time.sleep(rng.uniform(0.0, 1.0) * usual)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        stages.append(len(list(out.glob("shard-*"))) if out.is_dir() else 0)
        if (out / "index.json").is_file():  # it was finished: begin again somewhere in the middle
            for name in ("index.json", "shard-00001.safetensors", "shard-00004.safetensors"):
                (out / name).unlink()
        if (out / "job.json").is_file():
            with pytest.raises(ConfigError, match="this cache is not finished; run the same"):
                StoredCache(out)
    assert len(set(stages)) > 1, f"the kills came at different stages: {stages}"
    prepare_here(data, out, foundation)
    assert files_of(out) == files_of(undisturbed)


def test_changes_are_noticed(data, tmp_path, capsys, foundation, monkeypatch):
    """An image: its shard is made again. A graph, a model, a setting: refused, by name."""
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)  # loaded once: five runs follow
    folder = tmp_path / "set"
    shutil.copytree(data, folder)
    out = cache_of(folder, tmp_path / "cache")
    before = files_of(out)
    said: list[str] = []
    write_cache(small_job(folder, out), say=said.append)
    assert said == [f"{out} is complete; the set, its images and the settings are as they were"]
    assert files_of(out) == before

    pixels = np.asarray(small_source(folder).load_image(0))
    draw(tmp_path / "other", 1, size=(60, 60))
    shutil.copy(tmp_path / "other" / "p0.png", folder / "images" / "p7.png")
    said.clear()
    write_cache(small_job(folder, out), say=said.append)
    assert said == ["2 of 3 shards are there already",
                    "1 shards are made again: files of their images changed, or they are damaged"]  # fmt: skip
    after = files_of(out)
    assert {name for name in before if before[name] != after[name]} == {
        "shard-00001.safetensors", "graphs.safetensors", "index.json"}  # fmt: skip
    assert (StoredCache(out).picture(0) == pixels).all()

    argv = ["cache", "--data", str(folder), "--out", str(out), "--shard-size", "5", "--batch-size", "4"]
    for change, reason in (
        (["--resolution", "40"], "--resolution 32, now 40"),
        (["--resolution", "32", "--flip", "swap"], "other graphs, --flip none, now swap"),
        (["--resolution", "32", "--batch-size", "3"], "batch_size 4, now 3"),
    ):
        assert main([*argv, *change]) == 2
        err = capsys.readouterr().err
        assert f"was begun from something else ({reason}); give another --out, or --overwrite" in err
    lines = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(lines.replace("standing on", "near", 1))
    assert main([*argv, "--resolution", "32"]) == 2 and 'delete "files" and "sha256"' in capsys.readouterr().err
    header = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps({k: v for k, v in header.items() if k not in ("files", "sha256")}))
    assert main([*argv, "--resolution", "32"]) == 2 and "other graphs" in capsys.readouterr().err
    assert main([*argv, "--resolution", "32", "--overwrite"]) == 0
    assert StoredCache(out).graphs[0].relations[1] == (0, "near", 1)


def test_two_preparations_of_one_folder_do_not_meet(data, tmp_path):
    out = tmp_path / "cache"
    out.mkdir()
    with locked(out), pytest.raises(OSError, match=f"in use by process {os.getpid()}"):
        cache_of(data, out)


def test_turned_pictures_are_counted_by_cache_and_training_and_sheet(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foundation = toy_foundation()
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    root = tmp_path / "mine"
    root.mkdir()
    for orientation in (1, 6, 8):
        tagged(root / f"{orientation}.jpg", orientation)
        write_graph(root / f"{orientation}.json", "a", "b")
    argv = ["cache", "--data", str(root), "--resolution", "32", "--out", "cache", "--shard-size", "2"]
    for _ in range(2):  # made, then found complete
        assert main([*argv, "--token-init", "none"]) == 0
        assert "- turned upright by their orientation tag: 2\n" in capsys.readouterr().out
    assert json.loads(Path("cache/report.json").read_text())["turned_upright"] == 2
    build_cache(folder_source(root, 32), foundation, torch.device("cpu"), with_latents=False)
    assert "2 pictures are turned as their orientation tag says" in caplog.text
    assert show.main([str(root), "--n", "3", "--out", "sheet.png"]) == 0
    assert "2 pictures are turned as their orientation tag says" in capsys.readouterr().err
    graphs = pictures.open_graphs(str(root), 32)
    assert graphs.image(1).shape == (32, 32, 3) and graphs.turned == {1}
