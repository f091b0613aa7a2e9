"""Every conditioner there is."""

from __future__ import annotations

from .conditioner import SceneGraphConditioner
from .sgdiff import SGDiffConditioner
from .text_baseline import TextConditioner

Baseline = TextConditioner | SGDiffConditioner
Conditioner = SceneGraphConditioner | Baseline
"""What `--conditioner` chooses from; one interface: `names_of`, `read`, `forward`, `null_condition`, `drop`."""
