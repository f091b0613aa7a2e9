"""The text-conditioned UNet of `toy-words`: v-prediction on latents, 10 % without a condition.

The condition of a batch has one of two forms. Sentences give all states of each text. Phrases, as in the first tokens
of SGG-IG and in `--text-form phrases`, give the end-of-text state of every relation and every name. Either context is
as long as its batch needs, with the padding masked; the empty text is its start and end. Letters: B pictures, T context
tokens, C their width.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from sgg_fast.data.cache import to_pixels
from sgg_fast.diffusion import noise
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.clip import token_ids
from sgg_fast.nn.foundation import Foundation, load_foundation
from sgg_fast.toy import world
from sgg_fast.toy.captions import caption
from sgg_fast.toy.fit import fit, save_half
from sgg_fast.toy.models import toy_foundation
from sgg_fast.toy.noise_levels import x0_errors
from sgg_fast.toy.world import HELD_OUT_SEED, TRAIN_SEED

NULL_TOKENS = 2
"""States of the empty text, its start and its end."""
_LOOKED_AT = 128

Context = tuple[torch.Tensor, torch.Tensor]
"""[B, T, C] context and [B, T] bool, the mask of attended tokens."""


@torch.no_grad()
def read_texts(foundation: Foundation, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """States [B, T, C] of the texts up to the end of the longest, and the index [B] of each one's end.

    Attention is causal, so leaving out later positions changes nothing.
    """
    ids = token_ids(foundation.tokenizer, texts, torch.device("cpu"))
    end = (ids == foundation.tokenizer.eos_token_id).int().argmax(dim=1)
    return foundation.text_encoder(ids[:, : int(end.max()) + 1]).last_hidden_state, end


def read_sentences(foundation: Foundation, texts: Sequence[str]) -> Context:
    """Each text's states; an empty text is the null condition."""
    states, end = read_texts(foundation, texts)
    return states, torch.arange(states.shape[1]) <= end[:, None]


class Phrases:
    """End-of-text states of the phrases of graphs, computed once."""

    def __init__(self, foundation: Foundation, graphs: Sequence[SceneGraph], batch: int = 512) -> None:
        phrases = dict.fromkeys(text for graph in graphs for text in _phrases(graph))
        self.row = {text: k for k, text in enumerate(phrases)}
        rows, texts = [], list(phrases)
        for k in tqdm(range(0, len(texts), batch), desc="phrases", disable=None, leave=False):
            states, end = read_texts(foundation, texts[k : k + batch])
            rows.append(states[torch.arange(len(states)), end])
        self.states_PC = torch.cat(rows)
        self.null_TC = read_texts(foundation, [""])[0][0]

    def read(self, graphs: Sequence[SceneGraph | None]) -> Context:
        """The start token, then a token for each relation and each object; None is the null condition."""
        rows = [self.null_TC if g is None else self._tokens(g) for g in graphs]
        longest = max(len(row) for row in rows)
        context = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        return context, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]

    def _tokens(self, graph: SceneGraph) -> torch.Tensor:
        tokens = self.states_PC[[self.row[text] for text in _phrases(graph)]]
        return torch.cat([self.null_TC[:1], tokens])


def _phrases(graph: SceneGraph) -> list[str]:
    """Every relation, then every object, as in SGG-IG's triples."""
    return [f"{graph.objects[s]} {p} {graph.objects[o]}" for s, p, o in graph.relations] + list(graph.objects)


def training_set(foundation: Foundation, out: Path, num: int) -> tuple[list[SceneGraph], torch.Tensor]:
    """Graphs and scaled latents (posterior means) of the first `num` training scenes; stored in `out`."""
    kept = out / f"toy-words-{num}"
    if not (kept / "latents.safetensors").is_file():
        graphs, parts = [], []
        for first in tqdm(range(0, num, 50), desc="draw", disable=None, leave=False):
            scenes = [world.draw_scene(TRAIN_SEED, i, spoken=True) for i in range(first, min(first + 50, num))]
            graphs += [scene.graph for scene in scenes]
            parts.append(encode(foundation, np.stack([scene.image for scene in scenes])).half())
        kept.mkdir(parents=True, exist_ok=True)
        content = [[graph.objects, graph.relations] for graph in graphs]
        (kept / "graphs.json").write_text(json.dumps(content), encoding="utf-8")
        save_file({"latents": torch.cat(parts).contiguous()}, kept / "latents.part")
        (kept / "latents.part").rename(kept / "latents.safetensors")
    read = json.loads((kept / "graphs.json").read_text(encoding="utf-8"))
    graphs = [SceneGraph(tuple(objects), tuple(map(tuple, relations))) for objects, relations in read]
    return graphs, load_file(kept / "latents.safetensors")["latents"].float()


@torch.no_grad()
def encode(foundation: Foundation, images: np.ndarray) -> torch.Tensor:
    """Scaled latents (posterior means) of uint8 pictures."""
    pixels = to_pixels(images)
    parts = [foundation.vae.encode(some).latent_dist.mean for some in pixels.split(50)]
    return torch.cat(parts) * foundation.vae.config.scaling_factor


def fast_precision() -> contextlib.AbstractContextManager[object]:
    """bf16 on processors with matrix units for it (AMX), where it saves a quarter of a step; else fp32."""
    amx = torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16) if amx else contextlib.nullcontext()


def build_text_unet(
    out: Path, num_steps: int, num_scenes: int, start: Path | None = None, first: int = 0, batch: int = 32
) -> nn.Module:
    """The wide UNet's moving average. Monitored: error of the predicted latents by noise level, on held-out scenes.

    start: folder of a foundation. Training continues with its UNet, trained for `first` steps, and its other parts are
    written to `out`. Without it the parts of `out` and a new UNet are used.
    """
    if start is not None:
        foundation = load_foundation(str(start), "")
        out.mkdir(parents=True, exist_ok=True)
        save_half(foundation.vae, out / "vae.safetensors")
        save_half(foundation.clip, out / "clip.safetensors")
        foundation.tokenizer.save_pretrained(out / "tokenizer")
    else:
        foundation = toy_foundation(weights=out, wide=True)
    graphs, latents = training_set(foundation, out, num_scenes)
    scenes = [world.draw_scene(HELD_OUT_SEED, i, spoken=True) for i in range(_LOOKED_AT)]
    held_out = [scene.graph for scene in scenes]
    phrases = Phrases(foundation, [*graphs, *held_out])
    abar = foundation.scheduler.alphas_cumprod
    unet = foundation.unet.requires_grad_(True).to(memory_format=torch.channels_last)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([TRAIN_SEED, step])
        chosen, dropped = rng.integers(len(graphs), size=batch), rng.random(batch) < 0.1
        if step % 2:
            context, mask = phrases.read([None if d else graphs[i] for i, d in zip(chosen, dropped, strict=True)])
        else:
            texts = ["" if d else caption(graphs[i], rng, partial=0.1) for i, d in zip(chosen, dropped, strict=True)]
            context, mask = read_sentences(foundation, texts)
        z_0, t = latents[chosen], torch.from_numpy(rng.integers(len(abar), size=batch))
        eps = torch.randn(z_0.shape)
        target = noise.target_of("v_prediction", z_0, eps, abar[t])
        with fast_precision():
            predicted = unet(noise.add_noise(z_0, eps, abar[t]), t, context, encoder_attention_mask=mask).sample
        loss = (predicted.float() - target).square().mean()
        return loss, {"loss": float(loss.detach())}

    true_latents = encode(foundation, np.stack([scene.image for scene in scenes]))
    contexts = {
        "sentences": read_sentences(foundation, [caption(graph) for graph in held_out]),
        "phrases": phrases.read(held_out),
    }

    @torch.no_grad()
    def look(ema: nn.Module, step: int) -> str:
        lines = []
        for name, (context, mask) in contexts.items():

            def predict(
                z: torch.Tensor,
                t: torch.Tensor,
                rows: slice,
                context: torch.Tensor = context,
                mask: torch.Tensor = mask,
            ) -> torch.Tensor:
                return ema(z, t, context[rows], encoder_attention_mask=mask[rows]).sample

            lines.append(f"{name} {x0_errors(predict, true_latents, abar, scenes)}")
        return "x0 error " + "; ".join(lines)

    return fit(
        "unet", unet, loss_of, out / "unet", num_steps, peak_lr=1e-3, ema_decay=0.9995, look=look, look_every=400,
        constant_until=0.7, first=first,
    )  # fmt: skip
