"""The fused layers: each takes the place of a stock layer of diffusers by its class alone, with the same parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from sgg_fast import ops
from sgg_fast.nn.merge import MergedLinear

from .storage import StoredConv2d, kernel_of


def may_wait(layer: nn.Module) -> bool:
    """True for a convolution whose bias may be added later: no hook or adapter waits for its call."""
    if type(layer) not in (nn.Conv2d, StoredConv2d) or layer.bias is None or layer._forward_hooks:
        return False
    return (layer.padding_mode, layer.dilation, layer.groups) == ("zeros", (1, 1), 1)


class Summed:
    """A norm whose weight and bias get their gradients together with those of the model's other norms."""

    column_sums: ops.ColumnSums | None = None

    def slot(self, *more: torch.Tensor) -> Any:
        """Where the backward leaves its sums, also those of `more`; None outside of a call of the model."""
        sums = self.column_sums
        return None if sums is None else sums.of(self.weight, self.bias, *more)  # type: ignore[attr-defined]


class FusedGroupNorm(Summed, nn.GroupNorm):
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


class FusedLayerNorm(Summed, nn.LayerNorm):
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
        elif type(project) is MergedLinear and may_wait(self.conv1):  # it applies the SiLU and adds the bias of conv1
            shift = project(temb)
            hidden = F.conv2d(hidden, kernel_of(self.conv1), None, self.conv1.stride, self.conv1.padding)
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

    gradient_checkpointing: bool
    _past: torch.Tensor | None = None
    """The stream that goes past the norm, between the two methods of one call."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of the stock model. Checkpointed, backward recomputes the whole of it if it has one block.

        The stock model recomputes its blocks alone, and keeps three more tensors of the size of the input. With more
        blocks (SDXL has up to 10) that is less than the activations of all of them at once.
        """
        forward = super().forward
        if not (torch.is_grad_enabled() and self.gradient_checkpointing) or len(self.transformer_blocks) > 1:
            return forward(hidden_states, *args, **kwargs)

        def whole(hidden_states: torch.Tensor) -> Any:
            self.gradient_checkpointing = False  # of the blocks
            try:
                return forward(hidden_states, *args, **kwargs)
            finally:
                self.gradient_checkpointing = True

        return self._gradient_checkpointing_func(whole, hidden_states)

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
