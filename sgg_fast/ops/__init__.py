"""The operators of the graph encoder as the model calls them: validated, dispatched, without parameters.

`use_kernels` chooses the form once; every function documents shapes and what an empty group gives.
"""

from sgg_kernels.reference import hash_normal, hash_u32, hash_uniform

from .dispatch import BACKENDS, backend_for, use_kernels
from .graph_ops import gather_add_relu, masked_pool, scatter_mean, triple_context
from .pack import mae_mask, pack

__all__ = [
    "BACKENDS",
    "backend_for",
    "gather_add_relu",
    "hash_normal",
    "hash_u32",
    "hash_uniform",
    "mae_mask",
    "masked_pool",
    "pack",
    "scatter_mean",
    "triple_context",
    "use_kernels",
]
