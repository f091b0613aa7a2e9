"""Shards of a cache: unusable pictures are named; workers make the same bytes, and their end is told."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT
from support.small_sets import SIDE, draw, files_of, small_job, small_source, unusable, write_small

from sgg_fast.config import ConfigError
from sgg_fast.data import jsonl
from sgg_fast.data.prepare import shard_work
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.data.prepare.shard_work import _work, is_done, make_shards, shard_path
from sgg_fast.data.shards import read_tensors
from sgg_fast.data.stored import StoredCache


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


@pytest.fixture
def forked(monkeypatch):
    """Workers that are forks of this process, which has the libraries already, in place of new interpreters."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)


def test_workers_share_the_shards_and_each_has_the_bytes_of_one_process(data, tmp_path, foundation, forked):
    folder = Path(shutil.copytree(data, tmp_path / "set"))
    one, two = (dataclasses.replace(small_job(folder, tmp_path / f"{k}"), workers=k) for k in (1, 2))
    for job in (one, two):
        job.out.mkdir()
        source = job.open_source()
        assert not is_done(job, source, 0, "mark")
        make_shards(job, source, foundation, [0, 1, 2], "mark")
        assert all(is_done(job, source, k, "mark") for k in range(3)) and not is_done(job, source, 0, "other")
    assert files_of(one.out) == files_of(two.out) and len(files_of(one.out)) == 3
    tensors, note = read_tensors(shard_path(two.out, 2), verify=True)
    assert tensors["item"].tolist() == [10, 11] and note == {"job": "mark", "faults": [], "turned": []}
    os.utime(source.place(11), ns=(1, 1))
    assert [is_done(two, source, k, "mark") for k in range(3)] == [True, True, False], "its picture's file changed"


def test_a_worker_that_fails_or_is_killed_ends_the_preparation_with_the_reason(data, tmp_path, forked, monkeypatch):
    job = dataclasses.replace(small_job(data, tmp_path / "out"), workers=2)
    job.out.mkdir()

    def fail(model):
        raise OSError("no such\nmodel")

    monkeypatch.setattr(shard_work, "open_foundation", fail)
    with pytest.raises(ConfigError, match=r"^worker [01]: no such model$"):
        make_shards(job, job.open_source(), None, [0, 1], "mark")
    monkeypatch.setattr(shard_work, "open_foundation", lambda model: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ConfigError, match=r"^a worker process ended with code -9 .*the same command goes on"):
        make_shards(job, job.open_source(), None, [0, 1], "mark")
    assert files_of(job.out) == {}


def test_a_worker_stops_for_its_sentinel_and_reports_each_image(data, tmp_path, foundation, monkeypatch):
    """The same function, called here: what it puts into its queue, and the file."""
    monkeypatch.setattr(shard_work, "open_foundation", lambda model: foundation)
    job, shards, news = small_job(data, tmp_path / "out"), queue.Queue(), queue.Queue()
    job.out.mkdir()
    for number in (1, None):
        shards.put(number)
    before = signal.getsignal(signal.SIGINT)
    try:
        _work(job, 0, 1, os.getppid(), shards, news, "mark")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "its parent ends it"
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(news.queue) == [("images", 1)] * 5 + [("shard", 1)]
    assert is_done(job, job.open_source(), 1, "mark")
