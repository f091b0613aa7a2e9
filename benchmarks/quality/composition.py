"""The rows of `benchmarks.composition`: unseen combinations with the tokens of seen ones.

Letters: B images, T context tokens, C their width, G graphs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.readme_table import markdown
from sgg_fast.data.cache import to_pixels
from sgg_fast.drawing.models import load_model, made_scheduler
from sgg_fast.eval import bootstrap, metrics, pictures, report
from sgg_fast.eval.detectors import open_detector
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.toy.world import held_out_relations

SEEN_INSTEAD = {
    ("boat", "dog"): ("dog", "person"),
    ("hat", "sheep"): ("sheep", "dog"),
    ("bird", "car"): ("car", "house"),
    ("ball", "person"): ("ball", "kite"),
    ("house", "leaves"): ("leaves", "snow"),
    ("house", "sheep"): ("sheep", "dog"),
    ("car", "tree"): ("tree", "house"),
}
"""The two categories of an unseen combination, sorted -> (the one that is exchanged, a seen one for it)."""
COLOURLESS = ("person", "snow")
KINDS = ("holding", "riding")
"""Predicates with rows of their own."""
STARTS = (800, 600)
"""Timesteps from which real scenes are drawn on."""
BATCH = 16
Encode = Callable[[Sequence[SceneGraph], Sequence[SceneGraph]], torch.Tensor]
"""(graphs, their neighbours) -> context [B, T, C]."""
OnStep = Callable[[SceneGraphToImagePipeline, int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def neighbour(graph: SceneGraph) -> SceneGraph:
    """The graph with one object of each unseen combination exchanged; colours stay where the new object has any."""
    names = list(graph.objects)
    for k in held_out_relations(graph):
        s, _, o = graph.relations[k]
        kinds = {i: graph.objects[i].split()[-1] for i in (s, o)}
        old, new = SEEN_INSTEAD[tuple(sorted(kinds.values()))]  # type: ignore[index]
        i = next(i for i, kind in kinds.items() if kind == old)
        colour = [] if new in COLOURLESS else names[i].split()[:-1]
        names[i] = " ".join([*colour, new])
    return SceneGraph(tuple(names), graph.relations)


def unseen(graph: SceneGraph, of: SceneGraph) -> SceneGraph:
    """`graph` with only the relations that are unseen in `of`."""
    return SceneGraph(graph.objects, tuple(graph.relations[k] for k in held_out_relations(of)))


class Tokens:
    """The context of graphs, and which of its rows are tokens of unseen relations."""

    def __init__(self, pipeline: SceneGraphToImagePipeline) -> None:
        self.pipeline, self.encoder, self.encode = pipeline, pipeline.graph_encoder, pipeline.encode_graphs
        if not isinstance(self.encoder, SceneGraphConditioner):
            raise ValueError("--model is of a baseline; give one of SGG-IG")

    def context(self, graphs: Sequence[SceneGraph]) -> torch.Tensor:
        """[B, T, C] of the graphs."""
        return self.encode(graphs, guided=False)[0]

    @torch.no_grad()
    def said(self, graphs: Sequence[SceneGraph], length: int) -> torch.Tensor:
        """[B, length, C] the text's share of the context, 0 for other tokens than relations'."""
        table = NameTable()
        batch = SceneGraphBatch.from_graphs(graphs, table)
        width = self.encoder.config.context_dim
        shares = torch.zeros(len(graphs), length, width)
        states = self.encoder.read(graphs, table, self.pipeline.towers)
        if states is not None:
            graph_E = batch.relation_graph.long()
            within_E = torch.arange(batch.num_relations) - batch.relation_ptr.long()[graph_E]
            told_EC = states[batch.phrase.long(), :width]
            shares[graph_E, within_E + self.encoder.first_triple] = told_EC.to(shares.dtype)
        return shares

    def exchanged(self, text: bool, graph: bool, everywhere: bool = False) -> Encode:
        """A function to the context of graphs whose unseen relations have the neighbours' `text` or `graph` share.

        everywhere: all tokens have it.
        """

        def encode(graphs: Sequence[SceneGraph], others: Sequence[SceneGraph]) -> torch.Tensor:
            own, theirs = self.context(graphs), self.context(others)
            if text != graph:
                told, told_theirs = (self.said(some, own.shape[1]) for some in (graphs, others))
                both = own - told + told_theirs if text else theirs - told_theirs + told
            else:
                both = theirs if text else own
            if everywhere:
                return both
            for b, one in enumerate(graphs):
                for k in held_out_relations(one):
                    own[b, self.encoder.first_triple + k] = both[b, self.encoder.first_triple + k]
            return own

        return encode


def draw(
    pipeline: SceneGraphToImagePipeline,
    graphs: list[SceneGraph],
    encode: Callable[[slice], torch.Tensor],
    steps: int,
    begin: Callable[[slice], OnStep] | None = None,
) -> np.ndarray:
    """uint8 [G, H, W, 3] of the graphs, each from the noise of its number, under the contexts of `encode`.

    begin: gives the pipeline's `callback_on_step_end` for some of the graphs.
    """
    drawn, plain = [], pipeline.encode_graphs
    try:
        for start in range(0, len(graphs), BATCH):
            some = slice(start, start + BATCH)
            own = encode(some)

            def given(*args: object, own: torch.Tensor = own) -> tuple[torch.Tensor, ...]:
                context, *rest = plain(*args)  # type: ignore[arg-type]
                return torch.cat([context[: -len(own)], own]), *rest

            pipeline.encode_graphs = given  # type: ignore[method-assign]
            numbers = range(start, start + len(graphs[some]))
            generators = [torch.Generator().manual_seed(pictures.noise_seed(0, i)) for i in numbers]
            settings = {"num_inference_steps": steps, "callback_on_step_end": begin(some) if begin else None}
            drawn.extend(pipeline(graphs[some], generator=generators, output_type="np", **settings).images)
    finally:
        pipeline.encode_graphs = plain  # type: ignore[method-assign]
    return (np.stack(drawn) * 255).round().astype(np.uint8)


@torch.no_grad()
def from_scene(pipeline: SceneGraphToImagePipeline, images: list[np.ndarray], start: int, some: slice) -> OnStep:
    """A callback that puts the scenes `images`, noised, in place of the latents at the first timestep of `start` or
    less. The scheduler must not remember earlier steps."""
    vae = pipeline.vae
    clean = vae.encode(to_pixels(np.stack(images[some]))).latent_dist.mean * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(some.start))

    def on_step(
        pipe: SceneGraphToImagePipeline, step: int, t: int, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        coming = pipe.scheduler.timesteps[step + 1 : step + 2]
        if int(t) > start and len(coming) and int(coming[0]) <= start:
            return {"latents": pipe.scheduler.add_noise(clean, noise, coming)}
        return tensors

    return on_step


def encode_some(encode: Encode, asked: Sequence[SceneGraph], others: Sequence[SceneGraph], some: slice) -> torch.Tensor:
    """The context of some of the graphs."""
    return encode(asked[some], others[some])


def run(args: argparse.Namespace) -> str:
    """The table. Raises ValueError for a baseline."""
    pipeline = load_model(args.model).pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.keep_conditions = False  # one graph is drawn under several contexts
    tokens, detector = Tokens(pipeline), open_detector("toy-words")
    assert detector is not None
    given = pictures.open_graphs("toy-words-combinations", pipeline.config.resolution)
    graphs = [given.graph(i) for i in range(args.num)]
    others = [neighbour(graph) for graph in graphs]
    assert given.image is not None
    scenes = [given.image(i) for i in range(args.num)]
    own = tokens.exchanged(False, False)
    ways = {
        "asked": (graphs, own, None),
        "neighbour": (others, own, None),
        "neighbour's tokens": (graphs, tokens.exchanged(True, True), None),
        "neighbour's text": (graphs, tokens.exchanged(True, False), None),
        "neighbour's graph": (graphs, tokens.exchanged(False, True), None),
        "neighbour's text everywhere": (graphs, tokens.exchanged(True, False, everywhere=True), None),
        "neighbour's graph everywhere": (graphs, tokens.exchanged(False, True, everywhere=True), None),
        **{f"from its scene at t = {t}": (graphs, own, t) for t in STARTS},
    }
    rows, sheets = [], {}
    for name, (asked, encode, start) in ways.items():
        pipeline.scheduler = made_scheduler(pipeline, "dpm++" if start is None else "ddim")
        begin = partial(from_scene, pipeline, scenes, start) if start is not None else None
        images = draw(pipeline, asked, partial(encode_some, encode, asked, others), args.steps, begin)
        sheets[name] = images
        found = detector.find(images, asked)
        scores = [
            metrics.score_picture(unseen(graph, of), x, detector.parse)
            for graph, of, x in zip(asked, graphs, found, strict=True)
        ]
        rows.append([name, *(share(scores, kinds) for kinds in (None, *((kind,) for kind in KINDS)))])
    if args.out:
        write_sheet(args.out / "composition.png", graphs, sheets)
    return "\n".join(markdown(["tokens of the unseen relation", "all", *KINDS], rows))


def share(scores: Sequence[metrics.PictureScore], kinds: Sequence[str] | None) -> str:
    """ "0.52 [0.41, 0.63] of 80": relations that hold where both objects are there, with their number."""
    judged = [
        holds for score in scores for kind, there, holds in score.relations if there and (not kinds or kind in kinds)
    ]
    if not judged:
        return "-"
    return f"{bootstrap.estimate(np.array([judged], dtype=float))} of {len(judged)}"


def write_sheet(path: Path, graphs: Sequence[SceneGraph], sheets: dict[str, np.ndarray], num: int = 8) -> None:
    """The first graphs beside their pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [(graphs[i], {name: images[i] for name, images in sheets.items()}) for i in range(min(num, len(graphs)))]
    report.contact_sheet(path, cells, columns=1)
