"""Relation embedding: the stack of triple convolutions of SGG-IG eqs 3-6.

Letters: N objects, E relations, D width, V names. `sgg_fast.ops` chooses the backend; this module does not.
"""

from __future__ import annotations

import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.graph import SceneGraphBatch


def kaiming_linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A linear layer that keeps the variance through a relu (He et al., 2015), bias 0.

    With torch's default initialisation six plain layers keep 3e-14 of the energy of the names.
    """
    linear = nn.Linear(fan_in, fan_out)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return linear


class TripleConv(nn.Module):
    """One triple convolution, SGG-IG eqs 3-6 with sg2im's index sets.

    h = relu(W1 [x_s; x_r; x_o] + b1); (m_s, r', m_o) = split(relu(W2 h + b2)); x' = MLP(mean of the messages).
    `form` "residual": layer norm before, sum after; "plain": the equations as printed.
    """

    def __init__(self, width: int, form: str = "residual") -> None:
        super().__init__()
        self.residual = form == "residual"
        self.object_norm = nn.LayerNorm(width) if self.residual else nn.Identity()
        self.relation_norm = nn.LayerNorm(width) if self.residual else nn.Identity()
        # W1 = [Ws | Wr | Wo], applied before the gather: no [E, 3D] input ever exists.
        first = kaiming_linear(3 * width, width)
        ws, wr, wo = first.weight.detach().chunk(3, dim=1)
        self.object_weight = nn.Parameter(torch.cat([ws, wo]).contiguous())
        self.relation_weight = nn.Parameter(wr.contiguous())
        self.bias = nn.Parameter(torch.zeros(width))
        self.second = kaiming_linear(width, 3 * width)
        update = [kaiming_linear(width, width), nn.ReLU(), kaiming_linear(width, width)]
        self.update = nn.Sequential(*update, *([] if self.residual else [nn.ReLU()]))

    def forward(
        self, x_ND: torch.Tensor, r_ED: torch.Tensor, batch: SceneGraphBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [N, D] objects, r: [E, D] relations -> the same shapes after one hop of message passing."""
        x_in, r_in = self.object_norm(x_ND), self.relation_norm(r_ED)
        ac_N2D = nn.functional.linear(x_in, self.object_weight)
        b_ED = nn.functional.linear(r_in, self.relation_weight)
        h_ED = ops.gather_add_relu(ac_N2D, b_ED, self.bias, batch)
        # The kernel that reads and writes the rows adds the bias of `second` and the relations' residual.
        y_E3D = nn.functional.linear(h_ED, self.second.weight)
        mean_ND, r_new = ops.scatter_mean(y_E3D, self.second.bias, batch, r_ED if self.residual else None)
        x_new = self.update(mean_ND)
        return (x_ND + x_new if self.residual else x_new), r_new


class RelationEncoder(nn.Module):
    """Embeddings of names -> contextual embeddings of objects and relations."""

    def __init__(self, name_dim: int, width: int, num_layers: int, form: str) -> None:
        super().__init__()
        self.project = nn.Identity() if name_dim == width else nn.Linear(name_dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(TripleConv(width, form) for _ in range(num_layers))
        self.object_norm = nn.LayerNorm(width) if form == "residual" else nn.Identity()
        self.relation_norm = nn.LayerNorm(width) if form == "residual" else nn.Identity()

    def forward(
        self, names_VD: torch.Tensor, batch: SceneGraphBatch, masked_N: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """names: [V, name_dim] standardised name embeddings; masked: [N] bool, objects replaced by [MASK].

        Returns x [N, D] and r [E, D].
        """
        table = self.project(names_VD.to(self.mask_token.dtype))
        x_ND = table.index_select(0, batch.object_name)
        if masked_N is not None:
            x_ND = torch.where(masked_N[:, None], self.mask_token.to(x_ND.dtype), x_ND)
        r_ED = table.index_select(0, batch.predicate_name)
        for layer in self.layers:
            x_ND, r_ED = layer(x_ND, r_ED, batch)
        return self.object_norm(x_ND), self.relation_norm(r_ED)
