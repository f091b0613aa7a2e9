"""train.py and infer.py together: from pre-training to a picture, and what both refuse as users type them."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from support import ROOT
from support.cases.refusals import files
from support.tiny_runs import flags

import infer
import train
from sgg_fast.train.run.checkpoint import checkpoint_steps


@pytest.mark.parametrize(
    ("main", "argv", "reason"),
    [
        (train.main, ["--stage", "pretrain", "--colour", "red"], "no flag --colour"),
        (train.main, ["--stage", "sideways"], "invalid choice: 'sideways'"),
        (train.main, [], "required: --stage"),
        (train.main, ["--stage", "pretrain", "--encoder", "wide"], "argument --encoder: invalid choice"),
        (train.main, ["--stage", "pretrain", "--width", "many"], "argument --width: invalid int value"),
        (infer.main, [], "required: INPUT"),
        (infer.main, ["graph.json", "--steps", "few"], "argument --steps: invalid int value"),
    ],
)
def test_argparse_refuses(capsys, main, argv, reason):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_each_command_names_the_next_one_and_that_runs(tmp_path, capsys, monkeypatch):
    """From pre-training to the picture by typing what was printed; --steps is the chosen stage's."""
    monkeypatch.chdir(ROOT)

    def say(main, argv: list[str]) -> tuple[str, list[str]]:
        assert main(argv) == 0
        saved, following = capsys.readouterr().out.splitlines()
        assert following.startswith("next: python ")
        return saved, shlex.split(following)[2:]

    first = ["--stage", "pretrain", *flags(finetune_steps=1), "--steps", "2", "--out", str(tmp_path)]
    saved, (script, *argv) = say(train.main, first)
    assert (saved, script) == (f"saved {tmp_path}/pretrain/graph_encoder", "train.py")
    assert checkpoint_steps(tmp_path / "pretrain") == [2]
    saved, (script, *argv) = say(train.main, argv)
    assert (saved, script) == (f"saved {tmp_path}/finetune/pipeline", "infer.py")
    assert checkpoint_steps(tmp_path / "finetune") == [1]
    assert infer.main([*argv, "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a.png\n"


def test_the_commands_themselves_say_one_line_and_exit_with_2(tmp_path):
    """As a user runs them, one process each, their streams apart."""
    argv = ["train.py", "--stage", "finetune", "--deepspeed", str(tmp_path / "no.json"), "--out", str(tmp_path / "run")]
    for words, said in (
        (argv, f"train.py: --deepspeed {tmp_path}/no.json: cannot be read: No such file or directory\n"),
        (["infer.py", str(tmp_path / "no.json")], f"infer.py: {tmp_path}/no.json: cannot be read: No such file"),
    ):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert files(tmp_path) == []
