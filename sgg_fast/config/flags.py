"""Settings as flags of a command line."""

from __future__ import annotations

import argparse
from typing import Any

from .facade import SETTINGS
from .fields import flag


def add_flags(parser: argparse._ActionsContainer, for_cache: bool = False) -> None:
    """One flag a setting that is not the recipe's own; for_cache: only those that `prepare cache` takes.

    Flags have no defaults: what is absent comes from the recipe.
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
    """Flat settings -> the words that set them on a command line."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag(name)}")
        else:
            words += [f"--{flag(name)}", str(value)]
    return words
