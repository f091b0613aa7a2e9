"""The operators of the graph encoder as the model calls them: validated, dispatched, without parameters.

`use_kernels` chooses the form once; every function documents shapes and what an empty group gives.
"""

from sgg_kernels.reference import hash_normal, hash_u32, hash_uniform

from .dispatch import BACKENDS, backend_for, use_kernels
from .graph_ops import gather_add_relu, graph_mean, masked_pool, scatter_mean, triple_context
from .pack import MaskDraw, pack, pack_masked

__all__ = [
    "BACKENDS",
    "MaskDraw",
    "backend_for",
    "gather_add_relu",
    "graph_mean",
    "hash_normal",
    "hash_u32",
    "hash_uniform",
    "masked_pool",
    "pack",
    "pack_masked",
    "scatter_mean",
    "triple_context",
    "use_kernels",
]
