"""Puts fused kernels and merged GEMMs into a stock diffusers UNet or VAE, and takes them out again.

`fuse` changes only the class of modules and the storage of parameters. Parameters keep their names, so weights load in
stock diffusers and back; hooks stay; attention processors may be set before or after. `fuse` matches exact types: a
replaced layer or a layer with another configuration does not change. In a layer with an adapter (LoRA) it finds the
layer that the adapter wraps.

* GroupNorm with the SiLU behind it (or none): `ops.group_norm_silu`. GEGLU: `ops.geglu`. LayerNorm with the residual
  sum before it, and the bias of an attention's last layer in that sum: `ops.add_layer_norm`.
* The gradient that goes past a norm is added in the norm's backward. The gradients of all norms' weights are summed
  together at the end of a backward (`ops.ColumnSums`).
* to_q, to_k, to_v of self-attention: one GEMM. to_k and to_v of all cross-attentions, which read the same context: one
  GEMM a model call. The time projections of all residual blocks: one GEMM, which also adds the biases of the
  convolutions before them. The norm behind adds both (its statistics move, no pixel is touched).
* Removed: diffusers' copies that undo channels last (before the 1x1 shortcut of residual blocks in training, and after
  the last block of a transformer), and divisions by an output scale of 1.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from sgg_fast import env, ops
from sgg_fast.nn.merge import Merged, MergedLinear, separate

from .layers import (
    FusedBasicTransformerBlock,
    FusedGEGLU,
    FusedGroupNorm,
    FusedGroupNormSiLU,
    FusedLayerNorm,
    FusedResnetBlock2D,
    FusedTransformer2DModel,
    LateLinear,
    One,
    PassThrough,
    Summed,
    may_wait,
)
from .storage import store_channels_last, store_stock

logger = logging.getLogger(__name__)

_STATE = "_sgg_fused"


_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    FusedGroupNorm: nn.GroupNorm,
    FusedGroupNormSiLU: nn.GroupNorm,
    FusedLayerNorm: nn.LayerNorm,
    FusedBasicTransformerBlock: BasicTransformerBlock,
    LateLinear: nn.Linear,
    PassThrough: nn.SiLU,
    FusedGEGLU: GEGLU,
    FusedResnetBlock2D: ResnetBlock2D,
    FusedTransformer2DModel: Transformer2DModel,
    MergedLinear: nn.Linear,
}
"""Fused class -> stock class."""


@dataclasses.dataclass
class _State:
    """State of a fused model."""

    model: nn.Module
    shared: list[Merged]
    """Merged GEMMs that share results during a call of the model."""
    leading: list[Merged]
    sums: ops.ColumnSums = dataclasses.field(default_factory=ops.ColumnSums)
    """Of the model's norms during a call."""
    norms: list[Any] = dataclasses.field(default_factory=list)
    late: list[Any] = dataclasses.field(default_factory=list)
    handles: list[RemovableHandle] = dataclasses.field(default_factory=list)

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Share results in this call. Checkpointed models share nothing: a recomputed block must see the same state."""
        if not (torch.is_grad_enabled() and getattr(self.model, "is_gradient_checkpointing", False)):
            for merged in self.shared:
                merged.begin()
            parameters = [p for norm in self.norms for p in (norm.weight, norm.bias)]
            self.sums.begin(parameters + [layer.bias for layer in self.late])

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Release the shared results."""
        for merged in self.shared:
            merged.end()
        self.sums.end()


def _is_norm(module: nn.Module | None) -> bool:
    return type(module) is nn.GroupNorm and module.affine


def _become(module: Any, fused: type[nn.Module]) -> None:
    assert type(module) is _STOCK[fused]
    module.__class__ = fused


def _fusable(block: ResnetBlock2D) -> bool:
    """True if `FusedResnetBlock2D` computes the same as `block`. The VAE's blocks have no time embedding."""
    adds_time = block.time_embedding_norm == "default"
    return (
        (adds_time or (block.time_emb_proj is None and block.time_embedding_norm != "scale_shift"))
        and block.upsample is None
        and block.downsample is None
        and not block.skip_time_act
        and type(block.nonlinearity) is nn.SiLU
        and _is_norm(block.norm1)
        and _is_norm(block.norm2)
    )


def _plain_block(block: Any) -> bool:
    """True if `FusedBasicTransformerBlock` computes the same as `block`."""
    norms = block.norm1, block.norm2, block.norm3
    return (
        block.norm_type == "layer_norm"
        and block.attn2 is not None
        and block.pos_embed is None
        and not hasattr(block, "fuser")
        and all(type(norm) is nn.LayerNorm and norm.bias is not None and norm.weight.ndim == 1 for norm in norms)
    )


def _ends_in_bias(attention: Attention) -> bool:
    """True if the last thing that an attention does is to add the bias of its last layer."""
    last, dropout = attention.to_out[0], attention.to_out[1]
    plain = type(last) is nn.Linear and last.bias is not None and not last._forward_hooks
    scale = attention.rescale_output_factor
    return plain and dropout.p == 0 and not attention.residual_connection and (isinstance(scale, One) or scale == 1)


def _fuse_modules(model: nn.Module) -> None:
    """Put in the fused kernels, without merged GEMMs."""
    module: Any
    for module in model.modules():
        if type(module) is ResnetBlock2D and _fusable(module):
            _become(module.norm1, FusedGroupNormSiLU)
            _become(module.norm2, FusedGroupNormSiLU)
            _become(module, FusedResnetBlock2D)
        elif type(module) is GEGLU:
            _become(module, FusedGEGLU)
        elif type(module) is BasicTransformerBlock and _plain_block(module):
            for norm in (module.norm1, module.norm2, module.norm3):
                _become(norm, FusedLayerNorm)
            _become(module, FusedBasicTransformerBlock)
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            if _is_norm(module.norm):
                _become(module.norm, FusedGroupNorm)
            _become(module, FusedTransformer2DModel)
        elif isinstance(module, Attention):
            if _is_norm(module.group_norm):
                _become(module.group_norm, FusedGroupNorm)
            if module.rescale_output_factor == 1:
                module.rescale_output_factor = One()
        elif isinstance(module, UNet2DConditionModel | Encoder | Decoder):
            norm, act = module.conv_norm_out, module.conv_act
            if _is_norm(norm) and type(act) is nn.SiLU:
                _become(norm, FusedGroupNormSiLU)
                _become(act, PassThrough)


def _kind(layer: nn.Linear) -> tuple[Any, ...]:
    """Key of a layer; layers with equal keys can share a GEMM."""
    return layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.device, layer.weight.requires_grad


def _by_kind(layers: list[nn.Linear]) -> list[list[nn.Linear]]:
    kinds: dict[tuple[Any, ...], list[nn.Linear]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer), []).append(layer)
    return [of_kind for of_kind in kinds.values() if len(of_kind) > 1]


def merged_first(model: nn.Module) -> list[nn.Parameter]:
    """All parameters, those of a GEMM that `fuse` merges across blocks in front and next to each other.

    The order is the same before and after `fuse`. A flat buffer in this order keeps the weights of a GEMM adjacent.
    """
    context: list[nn.Module] = []
    times: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            context += [module.to_k, module.to_v]
        elif isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            times.append((module.time_emb_proj, module.conv1))
    context.sort(key=lambda layer: getattr(layer, "in_features", 0))
    times.sort(key=lambda pair: getattr(pair[0], "in_features", 0))
    layers, before = [layer for layer, _ in times], [conv for _, conv in times]
    in_front = [getattr(x, "weight", None) for x in (*context, *layers)]
    in_front += [getattr(x, "bias", None) for x in (*context, *layers, *before)]
    return list(dict.fromkeys([*(p for p in in_front if p is not None), *model.parameters()]))


def _merge(model: nn.Module) -> _State:
    """Merge the GEMMs of a model with fused modules."""
    state, context, times = _State(model, [], []), [], []
    for module in model.modules():
        if isinstance(module, Summed):
            state.norms.append(module)
            module.column_sums = state.sums
        elif type(module) is FusedBasicTransformerBlock:
            for attention in (module.attn1, module.attn2):
                if _ends_in_bias(attention):
                    state.late.append(attention.to_out[0])
                    _become(attention.to_out[0], LateLinear)
        if isinstance(module, Attention):
            # An adapter of peft's is passed by.
            layers = [getattr(layer, "base_layer", layer) for layer in (module.to_q, module.to_k, module.to_v)]
            if any(type(layer) is not nn.Linear for layer in layers):
                continue
            if module.is_cross_attention:
                context += [] if module.norm_cross else layers[1:]
            elif len({_kind(layer) for layer in layers}) == 1:
                state.leading.append(Merged(layers, leading=True))
        elif type(module) is FusedResnetBlock2D and type(module.time_emb_proj) is nn.Linear and may_wait(module.conv1):
            times.append(module)
    state.shared += [Merged(layers) for layers in _by_kind(context)]
    before = {block.time_emb_proj: block.conv1 for block in times}
    for layers in _by_kind(list(before)):
        state.shared.append(Merged(layers, activation=F.silu, before=[before[layer] for layer in layers]))
    for merged in (*state.leading, *state.shared):
        for index, layer in enumerate(merged.layers):
            layer.merged = (merged, index)  # type: ignore[assignment]
            _become(layer, MergedLinear)
    return state


def fuse(model: nn.Module, merge: bool = True) -> dict[str, int]:
    """Fuse a diffusers UNet2DConditionModel, AutoencoderKL or a module with such parts, in place; {class: count}.

    Best with channels-last weights. `merge` False merges no GEMMs: ZeRO-3 and sequential offloading fetch the weights
    of a layer at its call (offloaded weights have no memory). Outputs and gradients equal the stock model's up to
    rounding. A fused model does not change.
    """
    if _STATE not in model.__dict__:
        _fuse_modules(model)
        merge = merge and not any(p.is_meta for p in model.parameters())
        state = _merge(model) if merge else _State(model, [], [])
        if state.shared or state.norms:
            state.handles.append(model.register_forward_pre_hook(state.begin))
            state.handles.append(model.register_forward_hook(state.end, always_call=True))
        model.__dict__[_STATE] = state
        logger.info("fused %s: %s", type(model).__name__, summary(model))
    return summary(model)


def is_on(device: torch.device, choice: str) -> bool:
    """Whether `fuse_for` fuses: if `choice` is "on", or if it is "auto" and the models run on CUDA."""
    left_out = env.unfit("kernels") or env.unfit("fused")
    return choice == "on" or (choice == "auto" and device.type == "cuda" and not left_out)


def fuse_for(
    device: torch.device,
    choice: str,
    *models: nn.Module,
    merge: bool = True,
    channels_last: bool = False,
    stored: bool = False,
) -> None:
    """`fuse` each model if `is_on`.

    `channels_last` converts the weights of newly fused models to channels last; DeepSpeed does not accept such weights.
    `stored` has the same effect for it (`storage.py`).
    """
    if not is_on(device, choice):
        if choice == "auto" and device.type == "cuda":
            left_out = env.unfit("kernels") or env.unfit("fused")
            logger.warning("the UNet is not fused: sgg-doctor found %s", left_out)
        return
    for model in models:
        if channels_last and _STATE not in model.__dict__:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fuse(model, merge)
        if stored:
            store_channels_last(model)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: stock classes, and each parameter in its own storage. A stock model does not change."""
    state: _State | None = model.__dict__.pop(_STATE, None)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    store_stock(model)
    for merged in (*state.leading, *state.shared):
        for parameters in merged.parameters:
            separate(parameters)
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.rescale_output_factor, One):
            module.rescale_output_factor = 1.0
        if type(module) in _STOCK:
            module.__class__ = _STOCK[type(module)]
            for name in ("merged", "column_sums", "taken", "_past"):
                module.__dict__.pop(name, None)


def summary(model: nn.Module) -> dict[str, int]:
    """{name: count} of the modules of each fused class and of the merged GEMMs."""
    found = Counter(type(module).__name__ for module in model.modules() if type(module) in _STOCK)
    state: _State | None = model.__dict__.get(_STATE)
    if state is not None:
        found["GEMMs"] = len(state.leading) + len(state.shared)
    return dict(found)
