"""The settings of a run: five dataclasses (model, data, objective, optim, run) and `Config`, which holds one of each.

A part is the only place that describes its settings: docstring (the help of the flag), default, and rules as metadata
of the field (bounds, choices, whether a resumed run may change it, ...; `fields.Rules`). Functions take the part that
they need. `SETTINGS`, `Config.flat` and `Config.replace` give the same settings by the names of their flags. Named
settings are in `sgg_fast/recipes.py`. Nothing here loads torch.
"""

from .data import DRAWN_SETS, DataConfig
from .facade import SETTINGS, Config, Setting
from .fields import ConfigError, flag
from .flags import add_flags, as_flags
from .model import ModelConfig
from .objective import ObjectiveConfig
from .optim import OptimConfig
from .run import RunConfig
from .settings_file import read_settings, settings_text

__all__ = [
    "DRAWN_SETS",
    "SETTINGS",
    "Config",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "Setting",
    "add_flags",
    "as_flags",
    "flag",
    "read_settings",
    "settings_text",
]
