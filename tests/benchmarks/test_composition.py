"""The command `benchmarks.composition`: what it refuses, in one line."""

from __future__ import annotations

import pytest

from benchmarks import composition


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model"),
        (["--model", "toy", "--num", "0"], "--num must be at least 1, --steps at least 2"),
        (["--model", "{folder}/absent"], "absent"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(words, message, tmp_path, capsys):
    with_folder = [word.format(folder=tmp_path) for word in words]
    try:
        code = composition.main(with_folder)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(error) == 1 and message in error[0]
