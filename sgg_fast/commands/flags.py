"""Argument parsers that report a mistake in one line, with the flag that was probably meant; without torch."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import NoReturn

from sgg_fast.commands import refuse

_UNKNOWN = "unrecognized arguments: "


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text before an error, without abbreviated flags, and with a docstring's own lines."""

    def __init__(self, **settings: object) -> None:
        usual = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**{**usual, **settings})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with 2."""
        text, near = " ".join(message.split()), ""
        if text.startswith(_UNKNOWN):
            word = text.removeprefix(_UNKNOWN).split("=")[0].split()[0]
            text = f"no flag {word}"
            found = difflib.get_close_matches(word, list(self._option_string_actions), n=1)
            near = f" (did you mean {found[0]}?)" if found else ""
        sys.exit(refuse(self.prog, f"{text[:1000]}{near}; --help lists the flags"))
