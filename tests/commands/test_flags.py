"""A mistyped command line is one line with the flag that was probably meant."""

from __future__ import annotations

import argparse

import pytest

from sgg_fast.commands import infer
from sgg_fast.commands.flags import OneLineParser


def test_a_mistyped_flag_is_one_line_with_the_one_that_was_meant(capsys):
    for argv, said in (
        (["g.json", "--steeps", "3"], "infer.py: no flag --steeps (did you mean --steps?); --help lists the flags\n"),
        (["g.json", "--seed", "x"], "infer.py: argument --seed: invalid int value: 'x'; --help lists the flags\n"),
        ([], "infer.py: the following arguments are required: INPUT; --help lists the flags\n"),
    ):
        with pytest.raises(SystemExit) as caught:
            infer.main(argv)
        assert caught.value.code == 2 and capsys.readouterr().err == said


def words_of(*argv: str) -> argparse.Namespace:
    """A command line of a small command with two subcommands."""
    parser = OneLineParser(prog="bake", description="Bakes:\n  bread\n  cake")
    kinds = parser.add_subparsers(required=True)
    bread, cake = kinds.add_parser("bread"), kinds.add_parser("cake")
    bread.add_argument("--minutes", type=int, default=40)
    bread.add_argument("--seeded", action="store_true")
    bread.add_argument("name", nargs="?")
    cake.add_argument("--icing")
    return parser.parse_args(argv)


def test_flags_are_written_out_and_words_after_two_dashes_are_none():
    assert vars(words_of("bread", "--minutes", "5")) == {"minutes": 5, "seeded": False, "name": None}
    assert words_of("bread", "--", "--minuets").name == "--minuets"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("bread --minuets 5", "bake bread: no flag --minuets (did you mean --minutes?)"),
        ("bread --minuets=5", "bake bread: no flag --minuets (did you mean --minutes?)"),
        ("bread --min 5", "bake bread: no flag --min"),
        ("bread --zzz", "bake bread: no flag --zzz"),
        ("bread -q", "bake bread: no flag -q"),
        ("bread rye wheat", "bake bread: no place for the argument wheat"),
        ("bread --minutes many -- --minuets", "bake bread: argument --minutes: invalid int value: 'many'"),
        ("cake --minutes 5", "bake cake: no flag --minutes"),
        ("pie", "bake: argument {bread,cake}: invalid choice: 'pie' (choose from"),
    ],
)
def test_a_mistake_in_a_subcommand_is_one_line_with_a_flag_of_that_one(argv, said, capsys):
    with pytest.raises(SystemExit) as caught:
        words_of(*argv.split())
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith(said) and err.endswith("; --help lists the flags\n") and err.count("\n") == 1


def test_help_keeps_the_lines_of_a_description(capsys):
    with pytest.raises(SystemExit) as caught:
        words_of("--help")
    assert caught.value.code == 0 and "Bakes:\n  bread\n  cake\n" in capsys.readouterr().out
