"""A setting is a field of a part, with its docstring as help and its rules as metadata of the field.

All code about settings (flags, resuming, the model card, the memory advice) reads the rules here; no file keeps a
second list of names.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """Settings that cannot work together or do not exist; the message is one line and names the cure."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Properties of a field beside its name, type, default and docstring."""

    choices: tuple[str, ...] = ()
    """Allowed words; empty for any value."""
    at_least: float = -math.inf
    """Lower bound, inclusive."""
    at_most: float = math.inf
    """Upper bound, inclusive."""
    below: float = math.inf
    """Upper bound, exclusive."""
    multiple_of: int = 0
    """The value must be a multiple of this; 0 for any value."""
    hint: str = ""
    """Words after the bound in the message."""
    flag: str = ""
    """Name of its flag and of its key in flat settings; empty for the field's own name."""
    of_recipe: bool = False
    """Only the recipe sets it; it has no flag."""
    may_change: bool = False
    """A resumed run may change it."""
    in_encoder: bool = False
    """A pre-trained graph encoder fixes it."""
    in_cache: bool = False
    """A prepared cache fixes it."""
    makes_cache: bool = False
    """`prepare cache` has its flag."""
    in_card: bool = False
    """The model card shows it."""
    resolved: str = ""
    """The part's property that resolves "auto"; the card shows the resolved value."""
    saves_memory: Mapping[str, Any] | None = None
    """Flat settings that need less memory, together with the settings that they require."""
    exact: tuple[Any, ...] | None = None
    """Values that change how a step runs and, up to rounding, no result: the default must be the fastest of them by
    count (tests/benchmarks/counts). Empty if every value changes the result, or none the
    work of a step; None if that follows from other rules."""
    only_with: str = ""
    """Field of the same part without which this setting has no effect."""

    def fault(self, value: Any) -> str | None:
        """The fault of `value`, as the end of "--name must ..."; None if there is none."""
        if self.choices:
            return None if value in self.choices else f"be one of {', '.join(self.choices)}, not {value!r}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not math.isfinite(value):
            return f"be a finite number, not {value}"
        low, high = self.at_least, self.at_most
        if low <= value <= high and value < self.below and not (self.multiple_of and value % self.multiple_of):
            return None
        hint = self.hint and f" ({self.hint})"
        if self.multiple_of:
            bound = f"be a multiple of {self.multiple_of}, at least {low}"
        elif math.isfinite(high):
            bound = f"lie between {low} and {high}"
        elif value >= self.below:
            bound = f"be below {self.below}{hint}"
        else:
            bound = f"be at least {low}{hint}" if low else "not be negative"
        return f"{bound}, not {value}"


_RULES = "rules"


def setting(default: Any, **rules: Any) -> Any:
    """A dataclass field with this default and the `Rules` of these keywords."""
    return dataclasses.field(default=default, metadata={_RULES: Rules(**rules)})


def rules_of(field: dataclasses.Field[Any]) -> Rules:
    """The rules of a part's field."""
    return field.metadata[_RULES]


def name_of(field: dataclasses.Field[Any]) -> str:
    """The field's name in flat settings; with dashes, the name of its flag."""
    return rules_of(field).flag or field.name


def flag(name: str) -> str:
    """Name of a flag without its leading dashes."""
    return name.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Part:
    """Base of the parts of a `Config`. Raises `ConfigError` for a value that breaks a field's rules."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if fault := rules_of(field).fault(getattr(self, field.name)):
                raise ConfigError(f"--{flag(name_of(field))} must {fault}")
        self.check()

    def check(self) -> None:
        """Raises `ConfigError` for fields of this part that exclude each other."""

    @classmethod
    @functools.cache
    def docs(cls) -> dict[str, str]:
        """Field name -> the docstring under it."""
        body = ast.parse(inspect.getsource(cls)).body[0]
        assert isinstance(body, ast.ClassDef)
        return {
            a.target.id: b.value.value
            for a, b in itertools.pairwise(body.body)
            if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
            and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant) and isinstance(b.value.value, str)
        }  # fmt: skip
