"""Low-rank adapters (LoRA, Hu et al., 2021) of a UNet by peft; the only package that uses peft.

`assemble` adds them before the UNet is fused, so the frozen layers inside them run fused and merged as without them.
The files are those of diffusers: any `load_lora_weights` reads them.
"""

from .files import WEIGHTS, load_adapters, save_adapters
from .layers import TARGETS, add_adapters, autocast_mixed, has_adapters, store_frozen, train, whole_weight

__all__ = [
    "TARGETS",
    "WEIGHTS",
    "add_adapters",
    "autocast_mixed",
    "has_adapters",
    "load_adapters",
    "save_adapters",
    "store_frozen",
    "train",
    "whole_weight",
]
