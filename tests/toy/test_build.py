"""The command line of the toy's parts: which fit each other, and which of them exist."""

from __future__ import annotations

import pytest

from sgg_fast.toy import build


def test_only_what_it_has_of_its_own_is_built_for_toy_words(capsys):
    assert build.main(["detector", "--data-set", "toy-words"]) == 2
    assert "--data-set toy-words has clip, unet, detector_words of its own" in capsys.readouterr().err


def test_a_part_needs_those_it_is_made_of(tmp_path):
    """And takes them as soon as they are there."""
    argv = ["unet", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="has no vae and no clip: build that first"):
        build.parse(argv)
    for part in ("vae", "clip"):
        (tmp_path / f"{part}.safetensors").touch()
    assert build.parse(argv).steps == build.STEPS["unet"] and build.parse([*argv, "--steps", "3"]).steps == 3
    start = ["--start", str(tmp_path)]
    assert build.parse(["unet", "--data-set", "toy-words", *start]).start == tmp_path
    with pytest.raises(ValueError, match="--start is of unet with --data-set toy-words"):
        build.parse([*argv, *start])


def test_each_command_reaches_its_own_function(tmp_path, capsys):
    """By what each refuses: an evaluation that is not there, a folder without parts."""
    assert build.main(["card", "--eval", str(tmp_path)]) == 2
    assert f"{tmp_path / 'eval.json'}: cannot be read" in capsys.readouterr().err
    assert build.main(["foundation", "--out", str(tmp_path)]) == 2
    assert "build that first" in capsys.readouterr().err
