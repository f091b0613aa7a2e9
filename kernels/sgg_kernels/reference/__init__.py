"""Pure-torch form of every kernel: the definition that the Triton kernels are tested against. Runs on every device."""

from .graph_ops import gather_add_relu, graph_mean, masked_pool, scatter_mean, triple_context
from .hash import hash_normal, hash_u32, hash_uniform, hash_words
from .pack import mae_mask, pack
from .unet_ops import add_layer_norm, cross_attention, geglu, group_norm_silu

__all__ = [
    "add_layer_norm",
    "cross_attention",
    "gather_add_relu",
    "geglu",
    "graph_mean",
    "group_norm_silu",
    "hash_normal",
    "hash_u32",
    "hash_uniform",
    "hash_words",
    "mae_mask",
    "masked_pool",
    "pack",
    "scatter_mean",
    "triple_context",
]
