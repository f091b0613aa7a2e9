"""Settings as command-line flags."""

from __future__ import annotations

import argparse
from typing import Any

from .facade import SETTINGS
from .fields import flag


def add_flags(parser: argparse._ActionsContainer, for_cache: bool = False) -> None:
    """Add one flag for each setting, except settings that only the recipe sets.

    for_cache: add only the flags of `prepare cache`. Flags have no defaults: the recipe supplies absent values.
    """
    for setting in SETTINGS.values():
        if setting.rules.of_recipe or (for_cache and not setting.rules.makes_cache):
            continue
        kind: dict[str, Any] = {"type": type(setting.default), "choices": setting.rules.choices or None}
        if isinstance(setting.default, bool):  # --name and --no-name
            kind = {"action": argparse.BooleanOptionalAction}
        text = f"{setting.help} (toy: {setting.default})".replace("%", "%%")
        parser.add_argument(f"--{flag(setting.name)}", default=argparse.SUPPRESS, help=text, **kind)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The command-line words that set these flat settings."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag(name)}")
        else:
            words += [f"--{flag(name)}", str(value)]
    return words
