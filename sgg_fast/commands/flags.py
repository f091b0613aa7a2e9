"""Argument parsers that report a mistake in one line, with the flag that was probably meant; without torch."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sgg_fast.commands import refuse


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text before an error, without abbreviated flags, and with a docstring's own lines."""

    def __init__(self, **settings: object) -> None:
        usual = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**{**usual, **settings})  # type: ignore[arg-type]
        self._typed: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but words that it does not know are an error, in a subcommand too."""
        self._typed = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"no {'flag' if unknown[0].startswith('-') else 'place for the argument'} {unknown[0]}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with 2. A flag that does not exist comes before what is lacking."""
        text, near = " ".join(message.split()), ""
        flags = list(self._option_string_actions)
        words = (word.split("=")[0] for word in self._typed[: self._typed.index("--") if "--" in self._typed else None])
        strays = [word for word in words if word.startswith("--") and word not in flags]
        if strays and not self._subparsers:  # a parser with subcommands does not know the flags of these
            text = f"no flag {strays[0]}"
            found = difflib.get_close_matches(strays[0], flags, n=1)
            near = f" (did you mean {found[0]}?)" if found else ""
        sys.exit(refuse(self.prog, f"{text[:1000]}{near}; --help lists the flags"))
