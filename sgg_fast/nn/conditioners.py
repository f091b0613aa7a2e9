"""All conditioners."""

from __future__ import annotations

from .conditioner import SceneGraphConditioner
from .sgdiff import SGDiffConditioner
from .text_baseline import TextConditioner

Baseline = TextConditioner | SGDiffConditioner
Conditioner = SceneGraphConditioner | Baseline
"""The choices of `--conditioner`, with one interface: `names_of`, `read`, `forward`, `null_condition`, `drop`."""

KINDS = {kind.__name__: kind for kind in (SceneGraphConditioner, TextConditioner, SGDiffConditioner)}
"""Conditioners by the class name in config.json."""
CHOICES = {
    "encoder": ("residual", "plain"),
    "triple": ("roles", "shared"),
    "context": ("triples", "global"),
    "token_init": ("none", "text"),
    "form": ("sentence", "phrases", "numbered"),
}
"""Allowed values of the conditioners' settings."""
