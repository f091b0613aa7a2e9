"""sgg_fast: scene graph to image on Stable Diffusion, after SGG-IG (Wang et al., AAAI-25)."""

from .graph import NameTable, SceneGraph, SceneGraphBatch, SceneGraphError

__version__ = "0.1.0"
__all__ = ["NameTable", "SceneGraph", "SceneGraphBatch", "SceneGraphError"]
