"""The text baseline: a graph as text for SD's frozen text encoder, without any graph module.

The text of objects "sheep", "red hat", "sheep", "sun" and relations (0 wearing 1), (0 left of 2), by form:

* `sentence`: "sheep wearing red hat, sheep left of sheep, sun". One phrase a relation, "subject predicate object" in
  the graph's order, then the names of objects without relations; joined by ", ". The toy's foundation was trained on
  such sentences.
* `numbered`: names that occur more than once in the graph are numbered in its order, from 1:
  "sheep 1 wearing red hat, sheep 1 left of sheep 2, sun".
* `phrases`: each relation and each object's name is a separate text: "sheep wearing red hat", "sheep left of sheep",
  "sheep", "red hat", "sheep", "sun". Its end-of-text state is one token of the context. SGG-IG's tokens start from the
  same states with `--token-init text`.

The first two give Stable Diffusion's context: all 77 states, unmasked; longer texts are cut.
Letters: B images, L text length, C width of SD's text states, K width of SDXL's pooled text state, P phrases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch

from .baseline import BaselineConditioner, first_rows
from .clip import TextTowers
from .conditioner import NULL_TOKENS, GraphCondition, context_length, pooled_phrases


def phrases(graph: SceneGraph) -> list[str]:
    """One phrase a relation, in order, then the names of objects without relations."""
    related = {i for s, _, o in graph.relations for i in (s, o)}
    triples = [f"{graph.objects[s]} {predicate} {graph.objects[o]}" for s, predicate, o in graph.relations]
    return triples + [name for i, name in enumerate(graph.objects) if i not in related]


def numbered(graph: SceneGraph) -> SceneGraph:
    """The graph with numbers after repeated names: "sheep 1", "sheep 2"."""
    total, seen, names = Counter(graph.objects), Counter[str](), []
    for name in graph.objects:
        seen[name] += 1
        names.append(f"{name} {seen[name]}" if total[name] > 1 else name)
    return SceneGraph(tuple(names), graph.relations)


def sentence(graph: SceneGraph, form: str = "sentence") -> str:
    """The text of `graph`, with `form` "sentence" or "numbered"."""
    return ", ".join(phrases(numbered(graph) if form == "numbered" else graph))


class TextConditioner(BaselineConditioner, ModelMixin, ConfigMixin):
    """The text baseline as a conditioner without trained parameters; only the UNet trains."""

    @register_to_config
    def __init__(
        self,
        image_dim: int = 512,
        context_dim: int = 768,
        form: str = "sentence",
        null_tokens: int = NULL_TOKENS,
        trained_names: tuple[str, ...] = (),
        pooled_dim: int = 0,
    ) -> None:
        super().__init__()
        self._add_frame(image_dim, context_dim, pooled_dim, 0)

    def read(
        self,
        graphs: Sequence[SceneGraph],
        table: NameTable,
        towers: TextTowers | None,
    ) -> torch.Tensor:
        """The rows of every graph's text, [B, L, C + K], or with "phrases" those of the table's phrases, [P, C + K]."""
        assert towers is not None, "the text baseline needs SD's text encoder"
        if self.config.form == "phrases":
            return towers.phrases(table.phrases)
        return towers.read([sentence(graph, self.config.form) for graph in graphs])[0]

    def forward(self, names_VD: torch.Tensor, batch: SceneGraphBatch, rows: torch.Tensor) -> GraphCondition:
        """The condition of every graph. names: not read. rows: what `read` returns."""
        states, pooled = rows[..., : len(self.start_state)], rows[..., len(self.start_state) :]
        if self.config.form != "phrases":
            mask_BT = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            return self.condition(states, mask_BT, pooled[:, 0])
        num = context_length(int(batch.sizes[:, 1].max()), self.config.null_tokens) - 1
        tokens_BTC, there_BT = first_rows(batch, states[batch.phrase.long()].float(), num)
        start = self.start_state.to(tokens_BTC.dtype).expand(len(tokens_BTC), 1, -1)
        return self.condition(
            torch.cat([start, tokens_BTC], dim=1),
            torch.cat([there_BT.new_ones(len(there_BT), 1), there_BT], dim=1),
            pooled_phrases(pooled, batch) if pooled.shape[1] else None,
        )
