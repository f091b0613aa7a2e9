"""Attacks on everything that `sgg_fast.data` reads and writes: flipped bits, random flags, kills at any operation.

Never a traceback, and never another result in silence. A small selection runs always, the whole with --slow.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.forks import die_at
from support.published import places
from support.small_sets import SIDE, cache_of, draw, dump, files_of, laion_root, own_root, records
from support.vg_files import plain_set

from sgg_fast.config import ConfigError
from sgg_fast.data import jsonl, show
from sgg_fast.data.images import ImageError, open_rgb
from sgg_fast.data.prepare import __main__ as prepare
from sgg_fast.data.prepare import cache as writer
from sgg_fast.data.sources import folder_source, jsonl_source, vg_source
from sgg_fast.data.stored import StoredCache
from sgg_fast.eval import __main__ as measure
from sgg_fast.eval import evaluate
from sgg_fast.graph import SceneGraphError
from sgg_fast.toy.models import toy_foundation

MANY = pytest.param(100, marks=pytest.mark.slow, id="100")
FEW = pytest.param(2, id="2")
LOW = [f"--min-{what}-instances=2" for what in ("object", "relation", "attribute")]


def flipped(path: Path, rng: random.Random) -> bytes:
    """The file with one bit changed; what it was is returned."""
    whole = path.read_bytes()
    spoilt = bytearray(whole)
    spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    path.write_bytes(spoilt)
    return whole


def coco_root(root: Path) -> Path:
    """The smallest set that passes the filters: three training images, one of each other split."""
    for split, ids in (("train", (5, 2, 9)), ("val", (30, 31))):
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in ids]
        for kind, first in (("instances", 1), ("stuff", 106)):
            rows = [
                {"id": 10 * i + k, "image_id": i, "category_id": first, "bbox": [5 * k, 10, 20.5, 30], "iscrowd": 0,
                 "segmentation": [[5 * k, 10, 5 * k + 20, 10, 5 * k + 20, 40]]}
                for i in ids for k in range(2)
            ]  # fmt: skip
            content = {"images": images, "annotations": rows, "categories": [{"id": first, "name": f"{kind} thing"}]}
            dump(root / "annotations" / f"{kind}_{split}2017.json", content)
        path = root / "deprecated-challenge2017" / f"{split}-ids.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{i}\n" for i in ids))
    return root


def commands(tmp_path: Path) -> dict[str, tuple[list[str], Path, Callable[[Path], Any]]]:
    """Kind -> the command, the folder of its input, and who reads its result."""
    vg, coco, laion, own = (tmp_path / name for name in ("vg", "coco", "laion", "own"))
    plain_set().write(vg), coco_root(coco), laion_root(laion), own_root(own)
    return {
        "vg": (["vg", "--root", str(vg), *LOW], vg, lambda out: vg_source(out, 32, check=False)),
        "coco": (["coco", "--root", str(coco), "--num-val", "1", "--num-test", "1"], coco,
                 lambda out: jsonl_source(out, 32, check=False)),
        "laion": (["laion-sg", "--train", str(laion / "train.json")], laion,
                  lambda out: jsonl_source(out, 32, check=False)),
        "own": (["folder", "--root", str(own)], own, lambda out: jsonl_source(out, 32)),
    }  # fmt: skip


def one_line(err: str, command: str) -> bool:
    said = [line for line in err.splitlines() if line.startswith(f"{command}:")]
    return len(said) == 1 and "Traceback" not in err


def kinds_of(root: Path) -> dict[str, Path]:
    """Kind of file -> one of it: files whose names differ by a number are of one kind."""
    files = sorted((path for path in root.rglob("*") if path.is_file()), reverse=True)
    return {re.sub(r"\d+", "N", path.relative_to(root).as_posix()): path for path in files}


@pytest.mark.parametrize("num", [FEW, MANY])
@pytest.mark.parametrize("kind", ["vg", "coco", "laion", "own"])
def test_a_flipped_bit_in_an_annotation_is_read_named_or_refused_in_one_line(tmp_path, capsys, kind, num):
    argv, root, reader = commands(tmp_path)[kind]
    rng, out = random.Random(kind), tmp_path / "out"
    for name, path in kinds_of(root).items():
        ends = Counter()
        for _ in range(num):
            whole = flipped(path, rng)
            code = prepare.main([*argv, "--out", str(out), "--overwrite"])
            said = capsys.readouterr()
            assert code in (0, 2) and (code == 0 or one_line(said.err, "prepare")), said.err
            if code == 0:
                assert len(reader(out)) > 0, "what is written can be read"
            ends["refused" if code else "read, or left out by name"] += 1
            path.write_bytes(whole)
        told(capsys, f"{kind} {name}", num, ends)


OTHER_VALUES = [None, True, 0, -1, 7, 1.5, 10**30, "", "a", "7", [], {}, [[]], [7], {"a": 1}]


@pytest.mark.parametrize("num", [pytest.param(12, id="12"), MANY])
@pytest.mark.parametrize("kind", ["vg", "coco", "laion", "own"])
def test_a_value_of_another_type_in_an_annotation_is_read_named_or_refused_in_one_line(tmp_path, capsys, kind, num):
    argv, root, reader = commands(tmp_path)[kind]
    rng, out = random.Random(kind), tmp_path / "out"
    for name, path in kinds_of(root).items():
        if path.suffix != ".json":
            continue
        whole, ends = path.read_bytes(), Counter()
        for _ in range(num):
            document = json.loads(whole)
            container, key = rng.choice(places(document))
            container[key] = rng.choice(OTHER_VALUES)
            path.write_text(json.dumps(document))
            code = prepare.main([*argv, "--out", str(out), "--overwrite"])
            said = capsys.readouterr()
            assert code in (0, 2) and (code == 0 or one_line(said.err, "prepare")), said.err
            if code == 0:
                assert len(reader(out)) > 0, "what is written can be read"
            ends["refused" if code else "read, or left out by name"] += 1
        path.write_bytes(whole)
        told(capsys, f"{kind} {name}, other types", num, ends)


def told(capsys: pytest.CaptureFixture[str], what: str, num: int, ends: Counter[str]) -> None:
    with capsys.disabled():
        print(f"\n{what}: {num} flips: {dict(ends)}" if num > 9 else "", end="")


@pytest.mark.parametrize("num", [FEW, MANY])
@pytest.mark.parametrize("kind", ["vg", "laion"])
def test_a_flipped_bit_in_a_prepared_set_never_gives_another_set(tmp_path, capsys, kind, num):
    argv, _, reader = commands(tmp_path)[kind]
    rng, out = random.Random(kind), tmp_path / "out"
    assert prepare.main([*argv, "--out", str(out)]) == 0
    graphs = list(reader(out).graphs)
    names = ("train.h5", "vocab.json", "sha256.json") if kind == "vg" else ("train.jsonl", "set.json")
    for name in names:
        ends = Counter()
        for _ in range(num):
            whole = flipped(out / name, rng)
            try:
                assert list(reader(out).graphs) == graphs, name
                ends["as it was"] += 1
            except (ConfigError, SceneGraphError) as error:
                assert str(out) in str(error) and "\n" not in str(error)
                ends["refused"] += 1
            (out / name).write_bytes(whole)
        told(capsys, f"prepared {kind} {name}", num, ends)


@pytest.mark.parametrize("num", [FEW, MANY])
def test_a_flipped_bit_in_files_of_other_tools_is_read_or_refused(tmp_path, num):
    """h5 and vocab.json without digests, as sg2im publishes them; graphs beside pictures; the pictures."""
    argv, _, reader = commands(tmp_path)["vg"]
    rng, out = random.Random(1), tmp_path / "out"
    assert prepare.main([*argv, "--out", str(out)]) == 0
    (out / "sha256.json").unlink()
    for name in ("train.h5", "vocab.json"):
        for _ in range(num):
            whole = flipped(out / name, rng)
            try:
                assert len(reader(out)) > 0
            except (ConfigError, SceneGraphError) as error:
                assert str(out) in str(error) and "\n" not in str(error).strip()
            (out / name).write_bytes(whole)
    own = tmp_path / "own"
    for ending in ("png", "jpg", "webp"):
        open_rgb(own / "p0.png").save(own / f"x.{ending}")
        for _ in range(num):
            whole = flipped(own / f"x.{ending}", rng)
            try:
                assert open_rgb(own / f"x.{ending}", upright=True).mode == "RGB"
            except ImageError as error:
                assert str(own) in str(error)
            (own / f"x.{ending}").write_bytes(whole)
    for _ in range(num):
        whole = flipped(own / "p1.json", rng)
        try:
            assert len(folder_source(own, 32)) in (3, 4)
        except (ConfigError, SceneGraphError) as error:
            assert "p1.json" in str(error)
        (own / "p1.json").write_bytes(whole)


VALUES = ["", "0", "1", "2", "-1", "3.5", "nan", "1e999", "9" * 30, "toy", "none", "ROOT", "FILE", "GONE", "clean",
          "crop", "x/../..", "\udcff", "--", "swap", "32"]  # fmt: skip
FLAGS = {
    "prepare": ["--root", "--out", "--overwrite", "--images", "--resize", "--val-share", "--train", "--names",
                "--min-objects", "--max-objects", "--min-image-size", "--min-object-share", "--num-val", "--all-images",
                "--any-version", "--compare-vocab", "--data", "--split", "--shard-size", "--workers", "--recipe",
                "--resolution", "--flip", "--nonsense", "--outt"],
    "show": ["--n", "--split", "--seed", "--first", "--out", "--nn", "--help"],
    "eval": ["--model", "--data", "--num", "--pairs", "--seeds", "--first-seed", "--steps", "--scheduler", "--guidance",
             "--relation-guidance", "--detector", "--inception", "--against", "--out", "--nums"],
}  # fmt: skip
BARE = ("--overwrite", "--all-images", "--any-version", "--help")


@pytest.mark.parametrize("num", [pytest.param(8, id="8"), pytest.param(40, marks=pytest.mark.slow, id="40")])
@pytest.mark.parametrize("command", ["prepare", "show", "eval"])
def test_random_flags_give_a_result_or_one_line(tmp_path, capsys, monkeypatch, command, num):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "NUM_ACCURACY", 2)
    foundation = toy_foundation()
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    kinds, rng = commands(tmp_path), random.Random(command)
    mains = {"prepare": prepare.main, "show": show.main, "eval": measure.main}
    for k in range(num):
        root = rng.choice(list(kinds.values()))[1]
        known = {"ROOT": str(root), "FILE": str(tmp_path / "laion" / "train.json"), "GONE": str(tmp_path / "gone")}
        words = {"prepare": rng.choice([*(argv for argv, _, _ in kinds.values()), ["cache", "--data", str(root)]]),
                 "show": [rng.choice(["toy", str(root), "gone"])],
                 "eval": ["--model", "toy", "--num", "1", "--pairs", "0", "--steps", "1"]}[command]  # fmt: skip
        words = [*words, "--out", f"{k}.png" if command == "show" else str(tmp_path / f"o{k}")]
        for flag in rng.sample(FLAGS[command], rng.randint(0, 3)):
            value = rng.choice(VALUES)
            words += [flag] if flag in BARE else [flag, known.get(value, value)]
        if "--seeds" in words or "99" in "".join(words[4:]):  # a day's work is no fault
            continue
        try:
            code = mains[command](words)
        except SystemExit as ended:  # argparse
            code = ended.code
        said = capsys.readouterr()
        assert code in (0, 2), words
        lines = [
            line for line in said.err.splitlines() if ": " in line and not line.startswith(("reading", "checking"))
        ]
        assert "Traceback" not in said.err and (code == 0 or len(lines) == 1), (words, said.err)


def _run(argv: list[str], out: Path, kill_at: int, counted: Path) -> None:
    """In a child: the command, killed at its operation `kill_at` on files below OUT."""
    seen = die_at(str(out), kill_at)
    code = prepare.main(argv)
    counted.write_text(str(len(seen)))
    raise SystemExit(code)


def _in_child(argv: list[str], out: Path, kill_at: int, counted: Path) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=_run, args=(argv, out, kill_at, counted))
    child.start()
    child.join(120)
    return child.exitcode


@pytest.mark.parametrize("num", [pytest.param(3, id="3"), pytest.param(14, marks=pytest.mark.slow, id="14")])
@pytest.mark.parametrize("kind", ["vg", "coco", "own", "cache"])
def test_killed_at_any_operation_the_same_command_gives_the_same_set(tmp_path, monkeypatch, kind, num):
    if kind == "cache":
        foundation = toy_foundation()
        monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
        rows = records(draw(tmp_path / "set" / "images", 6))
        jsonl.write_set(tmp_path / "set", {"kind": "folder", "resize": "squash"}, {"train": rows}, lambda: "{}")
        argv = ["cache", "--data", str(tmp_path / "set"), "--resolution", str(SIDE), "--shard-size", "3",
                "--token-init", "none"]  # fmt: skip
    else:
        argv = commands(tmp_path)[kind][0]
    whole, counted = tmp_path / "whole", tmp_path / "counted"
    assert _in_child([*argv, "--out", str(whole)], whole, 0, counted) == 0
    operations = int(counted.read_text())
    expected = files_of(whole)
    assert operations > 10 and len(expected) > 3
    for k in range(num):
        out = tmp_path / f"out{k}"
        at = 1 + k * (operations - 1) // max(1, num - 1)
        assert _in_child([*argv, "--out", str(out)], out, at, counted) == -signal.SIGKILL, (at, operations)
        mark = {"vg": "vocab.json", "cache": "index.json"}.get(kind, "set.json")
        killed_whole = (out / mark).is_file()
        code = prepare.main([*argv, "--out", str(out)])
        assert code == 0 or (killed_whole and kind != "cache" and code == 2), "a whole set is not replaced unasked"
        assert {name: content for name, content in files_of(out).items() if name in expected} == expected
        left = {path.name for path in out.iterdir()} - {*expected, "lock", "images"}
        assert killed_whole or not left, left
        shutil.rmtree(out)


@pytest.mark.slow
def test_flipped_bits_of_a_cache_are_noticed_or_do_not_matter(tmp_path, monkeypatch):
    """100 a kind of file: shards, graphs, index, job, report; then the same command makes the same bytes."""
    foundation, rng = toy_foundation(), random.Random(5)
    monkeypatch.setattr(writer, "open_foundation", lambda config: foundation)
    rows = records(draw(tmp_path / "set" / "images", 4))
    jsonl.write_set(tmp_path / "set", {"kind": "folder", "resize": "squash"}, {"train": rows}, lambda: "{}")
    out = cache_of(tmp_path / "set", tmp_path / "cache", shard_size=4, token_init="none")
    made = files_of(out)
    for name in made:
        for _ in range(100):
            whole = flipped(out / name, rng)
            try:  # what training does
                StoredCache(out)
                assert name in ("report.json", "job.json"), "of these the content is not read"
            except ConfigError as error:
                assert str(out / name) in str(error) and "delete this file and run" in str(error)
            try:
                cache_of(tmp_path / "set", out, shard_size=4, token_init="none")
                assert files_of(out)[name] == whole or json.loads((out / name).read_text()) == json.loads(whole), name
            except ConfigError as error:
                assert name == "job.json" and "or --overwrite to start over" in str(error)
            (out / name).write_bytes(whole)
