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

logger = logging.getLogger(__name__)

_STATE = "_sgg_fused"


class _Summed:
    """A norm whose weight and bias get their gradients together with those of the model's other norms."""

    column_sums: ops.ColumnSums | None = None

    def slot(self, *more: torch.Tensor) -> Any:
        """Where the backward leaves its sums, also those of `more`; None outside of a call of the model."""
        sums = self.column_sums
        return None if sums is None else sums.of(self.weight, self.bias, *more)  # type: ignore[attr-defined]


class FusedGroupNorm(_Summed, nn.GroupNorm):
    """GroupNorm of channels-last images with fp32 statistics; keeps the dtype of its input, also under autocast."""

    silu = False

    def forward(self, input: torch.Tensor, shift: torch.Tensor | None = None, beside: bool = False) -> Any:
        """[B, C, ..] of input + shift [B, C]; with `beside` also the input, for what goes past the norm."""
        rest = self.weight, self.bias, self.num_groups, self.eps, self.silu, shift, self.slot()
        both = ops.group_norm_silu_beside(input, *rest)
        return both if beside else both[0]


class FusedGroupNormSiLU(FusedGroupNorm):
    """`FusedGroupNorm` followed by SiLU."""

    silu = True


class FusedLayerNorm(_Summed, nn.LayerNorm):
    """LayerNorm over the last dimension with fp32 statistics; keeps the dtype of its input, also under autocast."""

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        late: torch.Tensor | None = None,
        beside: bool = False,
    ) -> Any:
        """[.., D] of the sum input + residual + late [D]; with `beside` also the sum, for what goes past the norm."""
        if residual is not None and residual.dtype != input.dtype:
            input, residual = input + residual, None
        slot = self.slot() if late is None else self.slot(late)
        both = ops.add_layer_norm(input, self.weight, self.bias, self.eps, residual, late, slot)
        return both if beside else both[0]


class LateLinear(nn.Linear):
    """The last layer of an attention; the block may leave its bias to the norm behind it."""

    taken = False
    """Set by the block for one call: it adds the bias itself."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[.., D], without the bias if the block has taken it."""
        bias, self.taken = None if self.taken else self.bias, False
        return F.linear(input, self.weight, bias)


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """Self-attention, cross-attention and feed-forward, each with its LayerNorm, on one residual stream."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, T, D]."""
        options = {k: v for k, v in (cross_attention_kwargs or {}).items() if k != "scale"}
        if self._chunk_size is not None:
            rest = attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs
            return super().forward(hidden_states, *rest, *args, **kwargs)
        normal, stream = self.norm1(hidden_states, beside=True)
        own_context = encoder_hidden_states if self.only_cross_attention else None
        given = {"encoder_hidden_states": own_context, "attention_mask": attention_mask, **options}
        normal, stream = self._attend(self.attn1, self.norm2, normal, stream, given)
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask, **options}
        normal, stream = self._attend(self.attn2, self.norm3, normal, stream, given)
        return self.ff(normal) + stream

    @staticmethod
    def _attend(
        attention: Attention, norm: Any, normal: torch.Tensor, stream: torch.Tensor, given: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(input of the next layer, the stream with this attention's result)"""
        last, late = attention.to_out[0], None
        if type(last) is LateLinear:
            last.taken, late = True, last.bias
        return norm(attention(normal, **given), stream, late, beside=True)


class PassThrough(nn.SiLU):
    """Identity in place of a SiLU that the preceding norm applies."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns `input`."""
        return input


class FusedGEGLU(GEGLU):
    """GEGLU with one kernel for the gate after the linear map."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[.., D]."""
        return ops.geglu(self.proj(hidden_states))


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block whose two norms apply the SiLU; without resampling, and with an added time embedding."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, out channels, h, w]."""
        hidden, input_tensor = self.norm1(input_tensor, beside=True)
        shift, project = None, self.time_emb_proj
        if project is None or temb is None:
            hidden = self.conv1(hidden)
        elif type(project) is MergedLinear and _plain(self.conv1):  # it applies the SiLU and adds the bias of conv1
            shift = project(temb)
            hidden = F.conv2d(hidden, self.conv1.weight, None, self.conv1.stride, self.conv1.padding)
        else:
            temb = self.nonlinearity(temb)
            shift = nn.Linear.forward(project, temb) if type(project) is MergedLinear else project(temb)
            hidden = self.conv1(hidden)
        hidden = self.conv2(self.dropout(self.norm2(hidden, shift)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        out = input_tensor + hidden
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor


class FusedTransformer2DModel(Transformer2DModel):
    """A transformer over pixels that keeps channels last."""

    _past: torch.Tensor | None = None
    """The stream that goes past the norm, between the two methods of one call."""

    def _operate_on_continuous_inputs(self, hidden_states):
        batch, _, height, width = hidden_states.shape
        if isinstance(self.norm, FusedGroupNorm) and not torch.compiler.is_compiling():
            hidden_states, self._past = self.norm(hidden_states, beside=True)
        else:
            hidden_states = self.norm(hidden_states)
        if not self.use_linear_projection:
            hidden_states = self.proj_in(hidden_states)
        inner_dim = hidden_states.shape[1]
        hidden_states = hidden_states.permute(0, 2, 3, 1).reshape(batch, height * width, inner_dim)
        return self.proj_in(hidden_states) if self.use_linear_projection else hidden_states, inner_dim

    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim):
        if self._past is not None:
            residual, self._past = self._past, None
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


class One:
    """An output scale of 1: dividing a tensor by it costs no launch."""

    def __rtruediv__(self, other: torch.Tensor) -> torch.Tensor:
        return other


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


def _wrapped(layer: Any) -> nn.Linear:
    """The layer that peft's adapter wraps; a layer without an adapter is returned as it is."""
    return getattr(layer, "base_layer", layer)


def _plain(layer: nn.Module) -> bool:
    """True for a convolution whose bias may be added later: no hook or adapter waits for its call."""
    if type(layer) is not nn.Conv2d or layer.bias is None or layer._forward_hooks:
        return False
    return (layer.padding_mode, layer.dilation, layer.groups) == ("zeros", (1, 1), 1)


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
        if isinstance(module, _Summed):
            state.norms.append(module)
            module.column_sums = state.sums
        elif type(module) is FusedBasicTransformerBlock:
            for attention in (module.attn1, module.attn2):
                if _ends_in_bias(attention):
                    state.late.append(attention.to_out[0])
                    _become(attention.to_out[0], LateLinear)
        if isinstance(module, Attention):
            layers = [_wrapped(layer) for layer in (module.to_q, module.to_k, module.to_v)]
            if any(type(layer) is not nn.Linear for layer in layers):
                continue
            if module.is_cross_attention:
                context += [] if module.norm_cross else layers[1:]
            elif len({_kind(layer) for layer in layers}) == 1:
                state.leading.append(Merged(layers, leading=True))
        elif type(module) is FusedResnetBlock2D and type(module.time_emb_proj) is nn.Linear and _plain(module.conv1):
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


def fuse_for(
    device: torch.device, choice: str, *models: nn.Module, merge: bool = True, channels_last: bool = False
) -> None:
    """`fuse` each model if `choice` is "on", or if it is "auto" and the models run on CUDA; "off" changes nothing.

    `channels_last` converts the weights of newly fused models to channels last; DeepSpeed does not accept such weights.
    """
    on = choice == "on"
    if choice == "auto" and device.type == "cuda":
        left_out = env.unfit("kernels") or env.unfit("fused")
        on = not left_out
        if left_out:
            logger.warning("the UNet is not fused: sgg-doctor found %s", left_out)
    if on:
        for model in models:
            if channels_last and _STATE not in model.__dict__:
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            fuse(model, merge)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: stock classes, and each parameter in its own storage. A stock model does not change."""
    state: _State | None = model.__dict__.pop(_STATE, None)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
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
