"""sgg_fast: scene graph to image on Stable Diffusion, after SGG-IG (Wang et al., AAAI-25)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import NameTable, SceneGraph, SceneGraphBatch, SceneGraphError

__version__ = "0.1.0"
__all__ = ["NameTable", "SceneGraph", "SceneGraphBatch", "SceneGraphError"]


def __getattr__(name: str) -> object:
    """The names above, on first use: they need torch, whose import takes seconds, and `--help` does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import graph

    return getattr(graph, name)
