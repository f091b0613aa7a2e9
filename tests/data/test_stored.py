"""Caches: what is read is what the models gave; every damaged byte is noticed; killed and resumed they are the same."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from support import ROOT
from support.sd_folder import KINDS
from support.small_sets import (
    SIDE,
    cache_of,
    derived,
    draw,
    files_of,
    records,
    small_job,
    small_source,
    unusable,
    write_small,
)
from support.tiny_runs import TINY

import train
from sgg_fast.commands import NotFiniteError
from sgg_fast.config import ConfigError, DataConfig, as_flags
from sgg_fast.data import jsonl
from sgg_fast.data.cache import build_cache
from sgg_fast.data.prepare import cache as writer
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.prepare.cache import write_cache
from sgg_fast.data.shards import DamagedError, entry_of, read_index, read_tensors, write_index, write_tensors
from sgg_fast.data.stored import StoredCache
from sgg_fast.files import LOCK, locked
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.order import SampleOrder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    return cache_of(data, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def foundation():
    return toy_foundation()


@pytest.mark.parametrize("flip", ["none", "swap"])
def test_what_is_read_is_what_the_models_give(data, tmp_path, foundation, flip):
    """Same batches in memory and on disk: same bits, for images, latents, names, phrases and packed graphs."""
    out = cache_of(data, tmp_path / "cache", shard_size=4, flip=flip)
    direct, stored = (
        build_cache(small_source(folder, flip=flip), foundation, CPU, True, True, batch_size=4, progress=False)
        for folder in (data, out)
    )
    assert len(stored) == len(direct) == (24 if flip == "swap" else 12)
    assert list(stored.table.names) == direct.table.names
    assert list(stored.table.phrases) == list(direct.table.phrases)
    for name in ("names", "images", "phrases"):
        assert getattr(stored, name).equal(getattr(direct, name)), name
    every = torch.arange(len(direct))
    assert stored.moments[every].equal(direct.moments)
    stored.moments.bring(every.numpy(), CPU)
    assert stored.latents(every, torch.zeros(1)).equal(direct.latents(every, torch.zeros(1)))
    for name, value in vars(direct.graphs).items():
        assert (np.asarray(getattr(stored.graphs, name)) == np.asarray(value)).all(), name
    assert list(small_source(out, flip=flip).graphs) == list(small_source(data, flip=flip).graphs)


def test_a_mirrored_sample_is_the_mirrored_picture_with_its_words_swapped(data):
    source = small_source(data, flip="swap")
    for i in range(12):
        assert (source.load_image(12 + i) == source.load_image(i)[:, ::-1]).all()
        assert source.graphs[12 + i].objects == source.graphs[i].objects
        assert source.graphs[12 + i].relations == ((0, "right of", 2), (0, "standing on", 1))
        left, right = source.boxes(i), source.boxes(12 + i)
        assert np.allclose(left[:, 0], 1 - right[:, 2]) and np.allclose(left[:, [1, 3]], right[:, [1, 3]])
        assert (left[:, 2] > left[:, 0]).all() and (right[:, 2] > right[:, 0]).all()


def test_each_draw_of_relations_is_a_sample_of_the_same_image(tmp_path, foundation):
    rows = derived(draw(tmp_path / "set" / "images", 6))
    header = {"kind": "coco", "resize": "squash", "relations": "derived"}
    jsonl.write_set(tmp_path / "set", header, {"train": rows}, lambda: "{}")
    out = cache_of(tmp_path / "set", tmp_path / "cache", shard_size=4, relation_draws=3, flip="swap")
    cache = build_cache(small_source(out, relation_draws=3, flip="swap"), foundation, CPU, True)
    source = small_source(tmp_path / "set", relation_draws=3, flip="swap")
    assert len(source) == len(cache) == 3 * 2 * 6 and source.num_images == 12
    assert cache.images[:12].equal(cache.images[12:24]) and cache.images[:12].equal(cache.images[24:])
    index = torch.tensor([1, 13, 25])
    assert cache.moments[index][0].equal(cache.moments[index][1]) and cache.moments[index][0].equal(
        cache.moments[index][2]
    )
    assert not cache.moments[index][0].equal(cache.moments[torch.tensor([7])][0]), "7 is 1 mirrored"
    drawn = [source.graphs[d * 12 : d * 12 + 6] for d in range(3)]
    assert all(a != b for k, a in enumerate(drawn) for b in drawn[:k]), "draws differ"
    assert all(len(set(g.relations)) == len(g.relations) > 0 for graphs in drawn for g in graphs)
    with pytest.raises(ConfigError, match=r"prepared with --relation-draws 3, not 1; give that flag"):
        small_source(out, flip="swap")


def without_sizes(folder: Path) -> Path:
    """The cache in `folder` as an older version wrote it."""
    tensors, note = read_tensors(folder / "graphs.safetensors")
    kept = {name: np.array(value) for name, value in tensors.items() if name != "picture_sizes"}
    write_tensors(folder / "graphs.safetensors", kept, note)
    write_index(folder, {**read_index(folder), "graphs": entry_of(folder / "graphs.safetensors")})
    return folder


@pytest.fixture(scope="module")
def xl(foundation):
    """The toy's models around a UNet that reads sizes."""
    return dataclasses.replace(foundation, unet=UNet2DConditionModel(**KINDS["sdxl"].unet, norm_num_groups=8))


def test_sdxl_gets_the_sizes_of_its_pictures_from_the_set_and_from_the_cache(tmp_path, foundation, xl):
    rows = derived(draw(tmp_path / "set" / "images", 6))
    for i, row in enumerate(rows):
        draw(tmp_path / "other", 1, size=(48 + i, 40))
        shutil.copy(tmp_path / "other" / "p0.png", tmp_path / "set" / "images" / row["image"])
    header = {"kind": "coco", "resize": "crop", "relations": "derived"}
    jsonl.write_set(tmp_path / "set", header, {"train": rows}, lambda: "{}")
    out = cache_of(tmp_path / "set", tmp_path / "cache", shard_size=4, relation_draws=2, flip="swap")
    expected = torch.tensor([[40, 48 + i, 0, (8 + i) // 2 * SIDE / 40] for i in range(6)]).repeat(4, 1)
    for folder in (tmp_path / "set", out):
        source = small_source(folder, relation_draws=2, flip="swap")
        assert build_cache(source, xl, CPU, True, progress=False).sizes.equal(expected), folder
        assert build_cache(source, xl, CPU, False, progress=False).sizes is None, "pre-training has no UNet"
        assert build_cache(source, foundation, CPU, True, progress=False).sizes is None


def test_an_older_cache_says_that_it_lacks_sizes_and_the_same_command_adds_them(
    data, made, tmp_path, foundation, xl, monkeypatch, caplog
):
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    folder = without_sizes(Path(shutil.copytree(made, tmp_path / "cache")))
    build_cache(small_source(folder), foundation, CPU, True)
    assert not caplog.records, "only SDXL reads them"
    assert build_cache(small_source(folder), xl, CPU, True).sizes.tolist() == [[SIDE, SIDE, 0, 0]] * 12
    (record,) = caplog.records
    assert "lacks the sizes of its pictures" in record.getMessage() and "same `prepare cache`" in record.getMessage()
    said: list[str] = []
    write_cache(small_job(data, folder), say=said.append)
    assert said == ["3 of 3 shards are there already"] and files_of(folder) == files_of(made)
    assert build_cache(small_source(folder), xl, CPU, True).sizes.tolist() == [[40, 48, 0, 0]] * 12
    assert len(caplog.records) == 1


def test_sizes_that_do_not_fit_the_images_are_refused(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    tensors, note = read_tensors(folder / "graphs.safetensors")
    whole = {name: np.array(value) for name, value in tensors.items()}
    write_tensors(folder / "graphs.safetensors", whole | {"picture_sizes": whole["picture_sizes"][:-1]}, note)
    write_index(folder, {**read_index(folder), "graphs": entry_of(folder / "graphs.safetensors")})
    with pytest.raises(DamagedError, match="picture_sizes must have four numbers an image"):
        StoredCache(folder)


def test_a_changed_or_missing_byte_anywhere_is_noticed_and_the_file_named(made, tmp_path):
    """Hundreds of random places in every file that is read; then cuts, growth, absence and exchanged files."""
    folder = tmp_path / "cache"
    shutil.copytree(made, folder)
    assert len(StoredCache(folder).graphs) == 12
    rng = random.Random(0)
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "index.json")
    assert len(files) == 3 + 2
    for path in files:
        whole = path.read_bytes()
        for _ in range(120):
            spoilt = bytearray(whole)
            spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(spoilt)
            with pytest.raises(DamagedError) as caught:
                StoredCache(folder)
            assert str(caught.value).startswith(f"{path}: ") and "run the same `prepare cache` command" in str(
                caught.value
            )
        for length in {0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))}:
            path.write_bytes(whole[:length])
            with pytest.raises(DamagedError) as caught:
                StoredCache(folder)
            assert str(caught.value).startswith(f"{path}: ")
        path.write_bytes(whole + b"\0")
        with pytest.raises(DamagedError, match=path.name):
            StoredCache(folder)
        path.write_bytes(whole)
    first, second = files[2], files[3]
    assert first.stat().st_size == second.stat().st_size
    held = first.read_bytes()
    shutil.copy(second, first)
    with pytest.raises(DamagedError, match=first.name):
        StoredCache(folder)
    first.unlink()
    with pytest.raises(DamagedError, match=f"{first.name}: cannot be read: No such file"):
        StoredCache(folder)
    first.write_bytes(held)
    assert len(StoredCache(folder).graphs) == 12


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


def test_an_index_that_is_sealed_anew_around_wrong_content_is_one_line(made, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(made, folder)
    index = read_index(folder)
    wrong = [{**index, key: value} for key in index for value in (None, 7, [], {}, "x")
             if not (key in ("data", "split") and value == "x")]  # fmt: skip
    wrong += [{k: v for k, v in index.items() if k != key} for key in ("shards", "graphs", "draws", "settings")]
    entry = index["shards"][0]
    wrong += [{**index, "shards": [{**entry, key: None}]} for key in entry]
    wrong += [{**index, "shards": [{**entry, "file": "../../etc/passwd"}]}]
    refused = 0
    for content in wrong:
        write_index(folder, content)
        try:
            StoredCache(folder).check_settings(DataConfig(source=str(folder), resolution=SIDE))
        except ConfigError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            refused += 1
    assert refused >= len(wrong) - 25, "sizes and such are read by who needs them"


def test_the_next_command_is_complete(tmp_path, capsys):
    """Typed as it stands, it trains; the cache of a set without boxes says so to train.py."""
    rows = [{key: value for key, value in row.items() if key != "boxes"}
            for row in records(draw(tmp_path / "set" / "images", 6))]  # fmt: skip
    jsonl.write_set(tmp_path / "set", {"kind": "folder", "resize": "squash"}, {"train": rows}, lambda: "{}")
    out = tmp_path / "a cache"
    argv = ["cache", "--data", str(tmp_path / "set"), "--out", str(out), "--resolution", str(SIDE), "--flip", "swap"]
    assert main(argv) == 0
    said = capsys.readouterr()
    command = shlex.split(said.out.splitlines()[-1].removeprefix("next: "))
    assert command[:4] == ["python", "train.py", "--stage", "pretrain"] and str(out) in command
    assert "encode images" not in said.err, "a bar is for terminals"
    cheap = {k: v for k, v in TINY.items() if k not in ("num_scenes", "pretrain_steps", "checkpoint_every")}
    assert train.main([*command[2:], "--steps", "2", "--out", str(tmp_path / "run"), *as_flags(cheap)]) == 0


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


@pytest.mark.slow
def test_several_workers_make_the_same_bytes(data, tmp_path):
    """Real processes: the command line with --workers 2, beside the same in this process."""
    argv = ["cache", "--data", str(data), "--resolution", str(SIDE), "--shard-size", "5", "--batch-size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sgg_fast.data.prepare", *argv, "--workers", "2", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 images, 12 samples" in done.stdout and "encode images" not in done.stderr
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed_and_the_same_command_goes_on(data, tmp_path):
    argv = ["cache", "--data", str(data), "--resolution", str(SIDE), "--shard-size", "2", "--batch-size", "4"]
    command = [sys.executable, "-m", "sgg_fast.data.prepare", *argv, "--workers", "2", "--out", str(tmp_path / "two")]
    parent = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "two").glob("shard-*")):
        assert parent.poll() is None
        time.sleep(0.05)
    workers = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < until, "nobody would wait for what they make"
        time.sleep(0.1)
    assert len(workers) >= 2
    assert main([*argv, "--out", str(tmp_path / "two")]) == 0
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_pictures_that_cannot_be_used_are_counted_named_and_left_out(tmp_path, capsys):
    folder, names = tmp_path / "set", draw(tmp_path / "set" / "images", 4)
    bad = unusable()
    for name, (content, _) in bad.items():
        (folder / "images" / name).write_bytes(content)
    listed = [names[0], *bad, names[1], "gone.png", names[2], names[3]]
    rows = [{"id": i, "image": name, "objects": [f"thing {i}", "grass"], "relationships": [[0, "on", 1]]}
            for i, name in enumerate(listed)]  # fmt: skip
    jsonl.write_set(folder, {"kind": "folder", "resize": "squash"}, {"train": rows}, lambda: "{}")
    argv = [
        "cache",
        "--data",
        str(folder),
        "--resolution",
        str(SIDE),
        "--shard-size",
        "5",
        "--out",
        str(tmp_path / "c"),
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert f"4 of {len(listed)} images, 4 samples" in out and "left out: there is no such file: 1 (" in out
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    assert report["images"] == {"listed": len(listed), "kept": 4, "left_out": len(bad) + 1}
    named = {Path(image).name: fault["reason"] for fault in report["faults"] for image in fault["images"]}
    assert named.keys() == {*bad, "gone.png"} and all(said in named[name] for name, (_, said) in bad.items())
    cache = StoredCache(tmp_path / "c")
    kept = [i for i, name in enumerate(listed) if name in names]
    assert [graph.objects[0] for graph in cache.graphs] == [f"thing {i}" for i in kept], "graphs stay with their images"
    assert cache.num_images == 4 and cache.moments().shape[0] == 4
    source = small_source(folder, check=False)
    for k, i in enumerate(kept):
        assert (cache.picture(k) == source.load_image(i)).all()
    with pytest.raises(ConfigError, match=r"images missing, first .*gone\.png"):
        small_source(folder)


def test_a_set_without_a_usable_picture_says_why(tmp_path, capsys):
    folder = write_small(tmp_path / "set", 3)
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    assert main(["cache", "--data", str(folder), "--out", str(tmp_path / "c"), "--resolution", str(SIDE)]) == 2
    assert "none of 3 images can be used: 3 cannot be read as an image: the file is empty" in capsys.readouterr().err


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


def test_a_cache_of_other_models_is_refused(data, made, tmp_path, monkeypatch):
    other = toy_foundation(seed=1, weights=None)
    source = small_source(made)
    with pytest.raises(ConfigError, match="prepared with another clip; give the same --clip"):
        build_cache(source, other, CPU, False)
    mixed = toy_foundation()
    mixed.vae = other.vae
    assert len(build_cache(source, mixed, CPU, False)) == 12, "pre-training does not read latents"
    with pytest.raises(ConfigError, match="prepared with another vae; give the same --model"):
        build_cache(source, mixed, CPU, True)
    monkeypatch.setattr("sgg_fast.data.prepare.cache.open_foundation", lambda config: other)
    with pytest.raises(ConfigError, match="another clip, another vae"):
        write_cache(small_job(data, made))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resolution": 64}, "prepared with --resolution 32, not 64"),
        ({"flip": "swap"}, "prepared with --flip none, not swap"),
        ({"attributes": "first"}, "prepared with --attributes none, not first"),
    ],
)
def test_settings_of_a_run_must_be_those_of_the_cache(made, change, reason):
    with pytest.raises(ConfigError, match=reason):
        small_source(made, **change)
    with pytest.raises(ConfigError, match="is a cache already"):
        small_job(made, made)


def test_two_preparations_of_one_folder_do_not_meet(data, tmp_path):
    out = tmp_path / "cache"
    out.mkdir()
    with locked(out), pytest.raises(OSError, match=f"in use by process {os.getpid()}"):
        cache_of(data, out)


def test_reading_is_sharded_over_ranks_shuffled_by_seed_and_resumes_where_it_was(made, foundation):
    """What the trainer does: each rank's ids of a step, and the cache's rows of them."""
    moments = StoredCache(made).moments()
    world, batch, epochs = 2, 3, 4
    orders = [SampleOrder(12, batch, 5, rank, world) for rank in range(world)]
    steps = epochs * 12 // (world * batch)
    read = [[order.at(step) for order in orders] for step in range(steps)]
    flat = np.concatenate([ids for step in read for ids in step])
    epochs_of = flat.reshape(epochs, 12)
    assert (np.sort(epochs_of, axis=1) == np.arange(12)).all(), "each epoch has every sample once"
    assert len({tuple(epoch) for epoch in epochs_of.tolist()}) == epochs, "in another order"
    assert (np.concatenate([SampleOrder(12, 6, 5, 0, 1).at(s) for s in range(steps)]) == flat).all()
    assert (SampleOrder(12, batch, 6, 0, world).at(0) != orders[0].at(0)).any(), "another seed, another order"
    for step in (3, 7, 0, 5):  # a resumed run begins anywhere
        for rank in range(world):
            ids = SampleOrder(12, batch, 5, rank, world).at(step)
            assert (ids == read[step][rank]).all()
            assert moments[torch.from_numpy(ids)].equal(torch.stack([moments[torch.tensor([i])][0] for i in ids]))


def test_memory_does_not_grow_with_the_cache(tmp_path):
    """All of 74 MB of latents read at random: the process's own memory (not the page cache) stays as it was."""
    rows = np.zeros((40, 8, 120, 120), np.float32)
    for k in range(4):
        rows[:] = np.arange(40 * k, 40 * k + 40)[:, None, None, None]
        write_tensors(tmp_path / f"{k}.safetensors", {"moments": rows}, {})
    code = (
        "import sys, torch, numpy as np; from pathlib import Path\n"
        "from sgg_fast.data.shards import read_tensors; from sgg_fast.data.moments import MomentRows\n"
        "def own(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "shards = [read_tensors(Path(sys.argv[1]) / f'{k}.safetensors')[0]['moments'] for k in range(4)]\n"
        "moments = MomentRows(shards, 1); order = np.random.default_rng(0).permutation(160)\n"
        "moments[torch.from_numpy(order[:8])]; before = own()\n"
        "for i in range(0, 160, 8):\n"
        "    ids = torch.from_numpy(order[i:i+8]); assert (moments[ids][:, 3, 4, 5].long() == ids).all()\n"
        "print(own() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 9_000, "KiB, of 72 000 read"


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


@pytest.mark.parametrize(("part", "flag"), [("vae", "--model: the VAE"), ("clip", "--clip: the image tower")])
def test_a_model_that_gives_nan_makes_no_cache(tmp_path, monkeypatch, part, flag):
    foundation = toy_foundation()
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    weight = foundation.vae.encoder.conv_out.bias if part == "vae" else foundation.clip.visual_projection.weight
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    rows = records(draw(tmp_path / "set" / "images", 3))
    jsonl.write_set(tmp_path / "set", {"kind": "folder", "resize": "squash"}, {"train": rows}, lambda: "{}")
    with pytest.raises(NotFiniteError, match=f"{flag} gives numbers that are not finite: get the model again"):
        cache_of(tmp_path / "set", tmp_path / "cache", token_init="none")
    assert not (tmp_path / "cache" / "index.json").exists() and not list((tmp_path / "cache").glob("*.safetensors"))
    foundation = toy_foundation()  # the cure
    assert len(StoredCache(cache_of(tmp_path / "set", tmp_path / "cache", token_init="none")).graphs) == 3
