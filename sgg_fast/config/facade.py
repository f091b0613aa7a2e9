"""`Config`: the five parts together, and the same settings as a flat dict by the names of their flags."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from .data import DataConfig
from .fields import ConfigError, Part, Rules, name_of, rules_of
from .model import ModelConfig
from .objective import ObjectiveConfig
from .optim import OptimConfig
from .run import RunConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run, for both stages. Values that the paper fixes are marked P in `recipes.py`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.objective.check_model(self.model)
        self.optim.check_model(self.model)
        self.run.check_form(self.optim, self.model)

    def flat(self) -> dict[str, Any]:
        """Every setting by its flat name, as logs and checkpoints store it."""
        return {setting.name: setting.of(self) for setting in SETTINGS.values()}

    def replace(self, **settings: Any) -> Config:
        """A copy with these flat settings changed. Raises `ConfigError` for a bad value or an unknown name."""
        changes: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in SETTINGS:
                near = difflib.get_close_matches(name, SETTINGS, 1)
                raise ConfigError(f"there is no setting {name}{f'; {near[0]} is near' if near else ''}")
            changes.setdefault(SETTINGS[name].part, {})[SETTINGS[name].field] = value
        parts = {part: dataclasses.replace(getattr(self, part), **own) for part, own in changes.items()}
        return dataclasses.replace(self, **parts)

    def check_given(self) -> None:
        """Raises `ConfigError` if the recipe needs data or models that no flag names."""
        self.data.check_given()
        self.model.check_given()


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a part, as a flat setting."""

    name: str
    """Name in flat settings; with dashes, the name of its flag."""
    part: str
    """Field of `Config` that holds it."""
    kind: type[Part]
    """Class of that part."""
    field: str
    """Name in that class."""
    default: Any
    rules: Rules

    def of(self, config: Config) -> Any:
        """Its value in `config`."""
        return getattr(getattr(config, self.part), self.field)

    def has_effect(self, config: Config) -> bool:
        """Whether the setting that it depends on is set."""
        return not self.rules.only_with or bool(getattr(getattr(config, self.part), self.rules.only_with))

    def shown(self, config: Config) -> tuple[str, Any]:
        """Name and value on a model card; "auto" is resolved if the part resolves it."""
        resolved = self.rules.resolved
        return (resolved, getattr(getattr(config, self.part), resolved)) if resolved else (self.name, self.of(config))

    @property
    def help(self) -> str:
        """The docstring under the field."""
        return self.kind.docs()[self.field]


def _settings() -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for part in dataclasses.fields(Config):
        kind = part.default_factory
        assert isinstance(kind, type) and issubclass(kind, Part)
        for field in dataclasses.fields(kind):
            name = name_of(field)
            assert name not in found, name
            found[name] = Setting(name, part.name, kind, field.name, field.default, rules_of(field))
    return found


SETTINGS = _settings()
"""Every setting by its flat name, in the order of the parts."""
