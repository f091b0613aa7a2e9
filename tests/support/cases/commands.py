"""Every command of the project, found by walking its files, with its flags as its own parser has them."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from sgg_fast.commands.flags import OneLineParser
from support import ROOT

Main = Callable[[list[str] | None], int]


def names() -> list[str]:
    """Modules that `python -m` or `python FILE` runs: those that end in a command, tests aside."""
    files = [path for top in ("sgg_fast", "benchmarks", "kernels") for path in sorted((ROOT / top).rglob("*.py"))]
    return [module_of(path) for path in [*files, *sorted(ROOT.glob("*.py"))] if _runs(path)]


def _runs(path: Path) -> bool:
    """True if the last statement is a function under `@command`, which runs it, or an `if __name__ == "__main__"`."""
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1:]
    for node in last:
        if isinstance(node, ast.FunctionDef):
            return any(ast.unparse(decorator).startswith("command(") for decorator in node.decorator_list)
        return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    return False


def module_of(path: Path) -> str:
    """The name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "kernels" else parts)


def main_of(name: str) -> Main:
    """The command's function."""
    return importlib.import_module(name).main


class _FoundError(BaseException):
    pass


def parsers_of(name: str) -> list[tuple[list[str], argparse.ArgumentParser]]:
    """(words in front, parser) of a command: its own, or those of its subcommands."""
    found: list[argparse.ArgumentParser] = []

    def take(self: argparse.ArgumentParser, args: object = None, namespace: object = None) -> None:
        found.append(self)
        raise _FoundError

    with mock.patch.object(OneLineParser, "parse_args", take), contextlib.suppress(_FoundError):
        main_of(name)([])
    (parser,) = found
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [([word], sub) for action in subs for word, sub in action.choices.items()] or [([], parser)]


WILD = ("", "0", "1", "2", "-1", "3.5", "nan", "inf", "1e999", "9" * 30, "toy", "none", "g.json", "gone", "folder",
        "bad.json", "log.jsonl", "rows.csv", "x/../..", "/dev/null", "\x1b[2J", "\u202e", "\udcff", "a" * 300, "--",
        "cpu", "cuda", "vg256")  # fmt: skip
"""Values of any flag. Files of these names lie in the folder of the attack."""
SOUND = {int: ("1", "2", "32"), float: ("1.0", "0.5"), Path: ("g.json", "folder", "new"), None: ("toy", "g.json")}


def random_line(name: str, random_: random.Random) -> list[str]:
    """Words for a command: some of its flags, values that are sound or not, now and then a flag that does not exist."""
    front, parser = random_.choice(parsers_of(name))
    words, actions = list(front), [a for a in parser._actions if a.dest != "help"]
    wild = random_.random() < 0.6
    for action in actions:
        if not (action.required or random_.random() < min(0.3, 3 / len(actions))):
            continue
        values = [] if action.nargs == 0 else [_value(action, random_, wild)]
        if action.option_strings:
            words += [random_.choice(action.option_strings), *values]
        else:
            words += values
    if random_.random() < 0.1:
        flags = [flag for action in actions for flag in action.option_strings]
        words.append(_mistyped(random_.choice(flags), random_) if flags else "--nonsense")
    return words


def _value(action: argparse.Action, random_: random.Random, wild: bool) -> str:
    if wild and random_.random() < 0.5:
        return random_.choice(WILD)
    if action.choices is not None:
        return str(random_.choice(list(action.choices)))
    return random_.choice(SOUND.get(action.type, SOUND[None]))  # type: ignore[arg-type]


def _mistyped(flag: str, random_: random.Random) -> str:
    place = random_.randrange(3, len(flag)) if len(flag) > 4 else len(flag)
    return flag[:place] + "q" + flag[place:]
