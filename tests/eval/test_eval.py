"""The flags of `python -m sgg_fast.eval`: what cannot be used is refused in one line before anything is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_runs import eval_flags as flags

from sgg_fast.eval.__main__ import main


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 0}, "--num must be at least 1"),
        ({"data": "nowhere.json"}, "--data nowhere.json: neither toy"),
        ({"detector": "./nowhere"}, "--detector ./nowhere: there is no such folder"),
        ({"model": "./nowhere"}, "--model ./nowhere"),
        ({"first-seed": -1}, "--first-seed must not be negative"),
        ({"scheduler": "fast"}, "--scheduler fast: there is no such one; there are ddim"),
        ({"guidance": 0.5}, "--guidance must lie between 1 and"),
        ({"guidance": "nan"}, "--guidance must lie between 1 and"),
        ({"steps": 999, "scheduler": "dpm++"}, "--steps 999 with --scheduler dpm++: this scheduler takes at most 998"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, capsys, changes, message):
    assert main(flags(tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_mistyped_flag_is_one_line_with_the_flag_that_was_meant(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--modell", "toy"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no flag --modell (did you mean --model?)" in said


def protocol(out: Path) -> list[str]:
    """Flags of a dry run; its set is not read where the flags are refused."""
    return ["--protocol", "paper", "--model", "toy", "--data", str(out), "--out", str(out), "--dry"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--steps", "50"], "--protocol paper fixes --steps: leave it out"),
        (["--first-seed", "1"], "--protocol paper fixes --first-seed: leave it out"),
        (["--max-objects", "0"], "--max-objects must be at least 1, not 0"),
        (["--data", "toy"], "--data toy: --protocol paper needs the prepared set and its pictures"),
    ],
)
def test_what_the_protocol_fixes_cannot_be_given(tmp_path, capsys, change, said):
    assert main([*protocol(tmp_path), *change]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err
    assert not list(tmp_path.iterdir())


def test_without_the_network_one_line_says_how_to_get_it(tmp_path, capsys):
    argv = [word for word in protocol(tmp_path) if word != "--dry"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth" in err
    assert main(["--dry", "--out", str(tmp_path)]) == 2
    assert "belong to --protocol paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--out", "is a file; give a folder"),
        ("--inception", "there is no such file; it takes torch-fidelity's weights-inception-2015-12-05 file"),
        ("--against", "no eval.json there"),
    ],
)
def test_a_path_of_the_wrong_kind_is_refused(tmp_path, capsys, change, said):
    (tmp_path / "file").touch()
    path = tmp_path / ("nowhere" if change == "--inception" else "file")
    assert main([*flags(tmp_path / "out"), change, str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{change} {path}: {said}" in err
    assert not (tmp_path / "out").exists()
