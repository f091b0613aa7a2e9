"""Every conditioner there is."""

from __future__ import annotations

from .conditioner import SceneGraphConditioner
from .sgdiff import SGDiffConditioner
from .text_baseline import TextConditioner

Baseline = TextConditioner | SGDiffConditioner
Conditioner = SceneGraphConditioner | Baseline
"""What `--conditioner` chooses from; one interface: `names_of`, `read`, `forward`, `null_condition`, `drop`."""

KINDS = {kind.__name__: kind for kind in (SceneGraphConditioner, TextConditioner, SGDiffConditioner)}
"""By the class name that their config.json says."""
CHOICES = {
    "encoder": ("residual", "plain"),
    "triple": ("roles", "shared"),
    "context": ("triples", "global"),
    "token_init": ("none", "text"),
    "form": ("sentence", "phrases", "numbered"),
}
"""What their settings of these names may be."""
