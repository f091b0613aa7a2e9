"""The command line of the preparation: each subcommand makes its set, and the command that it names next runs."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from support.small_sets import SIDE, draw, laion_root, own_root, records
from support.tiny_runs import TINY

import train
from sgg_fast.config import as_flags
from sgg_fast.data import jsonl
from sgg_fast.data.prepare.__main__ import main
from sgg_fast.toy import sets


def test_each_subcommand_makes_its_set_from_its_flags_and_says_what_it_kept(tmp_path, capsys):
    sets.write_vg(tmp_path / "vg", 20, size=64), sets.write_coco(tmp_path / "coco", 20, size=64)
    laion_root(tmp_path / "laion"), own_root(tmp_path / "own")
    low = [f"--min-{what}-instances=1" for what in ("object", "attribute", "relation")]
    filters = [*low, "--min-image-size=0", "--min-object-size=1", "--names=clean"]
    coco, laion = ["--num-val", "1", "--num-test", "1"], ["--train", str(tmp_path / "laion" / "train.json")]
    for argv, files, listed in (
        (["vg", "--root", str(tmp_path / "vg"), *filters], ["train.h5", "vocab.json"], "16"),
        (["coco", "--root", str(tmp_path / "coco"), *coco], ["train.jsonl", "set.json"], "16"),
        (["laion-sg", *laion, "--resize", "squash"], ["train.jsonl", "set.json"], "6"),
        (["folder", "--root", str(tmp_path / "own")], ["train.jsonl", "set.json"], "4"),
    ):
        out = tmp_path / f"{argv[0]}_set"
        assert main([*argv, "--out", str(out)]) == 0
        said = capsys.readouterr()
        report = out / "report.json"
        last = f"written: {out}; every image and record left out is named in {report}"
        assert said.out.splitlines()[-1] == last and re.search(rf"^listed in the splits +{listed}\b", said.out, re.M)
        assert re.match("(reading|checking) ", said.err) and all((out / name).is_file() for name in files)
        assert main([*argv, "--out", str(out)]) == 2
        assert "already holds a set; --overwrite replaces it" in capsys.readouterr().err
        assert main([*argv, "--out", str(out), "--overwrite"]) == 0
    options = json.loads((tmp_path / "vg_set" / "report.json").read_text())["options"]
    assert {"names": "clean", "min_object_size": 1, "max_objects": 30, "any_version": False}.items() <= options.items()
    assert json.loads((tmp_path / "laion-sg_set" / "set.json").read_text())["resize"] == "squash"
    assert main(["check", str(tmp_path / "vg"), "--any-size"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'vg'}: whole"
    assert main(["check", str(tmp_path)]) == 2 and f"prepare: {tmp_path}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["folder", "--root", "a\udcff", "--out", "b"], "not UTF-8"),
        (["cache", "--data", "none", "--out", "b"], "--data none"),
        (["cache", "--data", "toy", "--out", "b", "--shard-size", "0"], "--shard-size must be at least 1"),
    ],
)
def test_what_cannot_be_read_as_a_flag_is_one_line(tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("prepare: ") and said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


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
