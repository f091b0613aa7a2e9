"""Settings as a TOML file: read for `--settings`, and written beside a run's results.

Keys are the names of the flags, with dashes or underscores, at the top or in a table named after their part ([model],
[data], [objective], [optim], [run]). Further keys at the top are the flags in `RUN_KEYS`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .facade import SETTINGS, Config, Setting
from .fields import ConfigError, flag

RUN_KEYS = ("stage", "recipe", "deepspeed", "graph_encoder")
"""Flags of train.py, beside the settings, that a file may hold; all of them are texts."""

_LARGEST = 1 << 20
"""Upper bound of a file in bytes."""
_PARTS = tuple(dict.fromkeys(setting.part for setting in SETTINGS.values()))
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def read_settings(path: Path) -> dict[str, Any]:
    """The flat settings of a file, and those of `RUN_KEYS` that it holds. Raises `ConfigError`, one line."""
    try:
        return _flattened(_parsed(path))
    except ConfigError as error:
        raise ConfigError(f"--settings {path}: {error}") from error


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ConfigError("there is no such file")
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"larger than {_LARGEST >> 20} MiB: not a file of settings")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"not TOML: {' '.join(str(error).split()) or type(error).__name__}") from error


def _flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            if key not in _PARTS:
                raise ConfigError(f"no table [{key}]{_near(key, _PARTS)}")
            for inner, of_inner in value.items():
                _add(found, inner, of_inner, key)
        else:
            _add(found, key, value, "")
    return found


def _add(found: dict[str, Any], key: str, value: Any, table: str) -> None:
    name = key.replace("-", "_")
    if name in found:
        raise ConfigError(f"{flag(name)} is there twice")
    if name in RUN_KEYS and not table:
        kind: type = str
    else:
        setting = _setting(name, key)
        if table and setting.part != table:
            raise ConfigError(f"{flag(name)} belongs into [{setting.part}], not [{table}]")
        kind = type(setting.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{flag(name)} must be {_TYPES[kind]}, not {str(value)[:80]!r}")
    found[name] = value


def _setting(name: str, key: str) -> Setting:
    setting = SETTINGS.get(name)
    if setting is None:
        known = [flag(other) for other, each in SETTINGS.items() if not each.rules.of_recipe]
        raise ConfigError(f"no setting {key[:80]}{_near(flag(name), [*known, *map(flag, RUN_KEYS)])}")
    if setting.rules.of_recipe:
        raise ConfigError(f"{flag(name)} cannot be set: recipe decides it")
    return setting


def _near(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else "; train.py --help lists the settings"


def settings_text(config: Config, run: Mapping[str, str | None]) -> str:
    """A file that sets every setting of `config` and those of `RUN_KEYS` that `run` holds."""
    lines = ["# Repeats this run: python train.py --settings THIS_FILE --out ELSEWHERE"]
    top = {**run, "recipe": config.run.recipe}
    lines += [f"{flag(name)} = {_literal(value)}" for name in RUN_KEYS if (value := top.get(name)) is not None]
    for part in _PARTS:
        own = [setting for setting in SETTINGS.values() if setting.part == part and not setting.rules.of_recipe]
        lines += ["", f"[{part}]", *(f"{flag(each.name)} = {_literal(each.of(config))}" for each in own)]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    """A value in TOML; JSON's texts, whole numbers and truth values are TOML's too."""
    return repr(value) if isinstance(value, float) else json.dumps(value)
