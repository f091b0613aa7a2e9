"""The operators of conditioner, UNet and VAE: validated, dispatched, without parameters.

`use_kernels` chooses the backend once. Every function documents its shapes and the result of an empty group.
"""

from .dispatch import BACKENDS, assumed, backend_for, use_kernels
from .exchange import exchange_ends
from .graph_ops import gather_add_relu, graph_mean, masked_pool, scatter_mean, triple_context
from .pack import MaskDraw, draw_table, num_masked, pack, pack_captured, pack_masked, table_shape
from .random import hash_normal, hash_u32, hash_uniform
from .sums import ColumnSums
from .unet_ops import add_layer_norm, cross_attention, geglu, group_norm_silu, group_norm_silu_beside, why_no_kernel

__all__ = [
    "BACKENDS",
    "ColumnSums",
    "MaskDraw",
    "add_layer_norm",
    "assumed",
    "backend_for",
    "cross_attention",
    "draw_table",
    "exchange_ends",
    "gather_add_relu",
    "geglu",
    "graph_mean",
    "group_norm_silu",
    "group_norm_silu_beside",
    "hash_normal",
    "hash_u32",
    "hash_uniform",
    "masked_pool",
    "num_masked",
    "pack",
    "pack_captured",
    "pack_masked",
    "scatter_mean",
    "table_shape",
    "triple_context",
    "use_kernels",
    "why_no_kernel",
]
