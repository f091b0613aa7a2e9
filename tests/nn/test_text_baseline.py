"""The text baseline: what it says to the letter, and that the frozen text encoder's states of it are the condition."""

from __future__ import annotations

import pytest
import torch

from sgg_fast.diffusion.sampling import sample_latents
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.text_baseline import TextConditioner, numbered, sentence
from sgg_fast.recipes import recipe
from sgg_fast.toy.captions import caption
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.assemble import new_conditioner
from sgg_fast.train.outputs import make_pipeline

GRAPH = SceneGraph(("sheep", "red hat", "sheep", "sun"), ((0, "wearing", 1), (0, "left of", 2)))
LONE = SceneGraph(("dog",))


@pytest.fixture(scope="module")
def foundation():
    return toy_foundation()


def test_what_is_said_to_the_letter():
    assert sentence(GRAPH) == "sheep wearing red hat, sheep left of sheep, sun"
    assert sentence(GRAPH, "numbered") == "sheep 1 wearing red hat, sheep 1 left of sheep 2, sun"
    assert numbered(GRAPH).objects == ("sheep 1", "red hat", "sheep 2", "sun")
    assert sentence(LONE) == sentence(LONE, "numbered") == "dog"
    assert sentence(GRAPH) == caption(GRAPH), "the form that the toy's foundation was trained on"


def said_by(model: TextConditioner, graphs: list[SceneGraph], foundation):
    table = NameTable()
    batch = SceneGraphBatch.from_graphs(graphs, table)
    said = model.read(graphs, table, foundation.towers)
    return model(torch.zeros(len(table), 128), batch, said)


@pytest.mark.parametrize("form", ["sentence", "numbered"])
def test_a_text_is_read_as_stable_diffusion_reads_it(foundation, form):
    model = TextConditioner(128, 128, form)
    given = said_by(model, [GRAPH, LONE], foundation)
    texts = {"sentence": "sheep wearing red hat, sheep left of sheep, sun",
             "numbered": "sheep 1 wearing red hat, sheep 1 left of sheep 2, sun"}  # fmt: skip
    states, _ = foundation.towers.read([texts[form], "dog"])
    torch.testing.assert_close(given.context[:, :77], states)
    assert given.context.shape == (2, 80, 128) and given.x_global.shape == (2, 128)
    assert given.mask[:, :77].all() and not given.mask[:, 77:].any()


def test_a_phrase_is_a_token(foundation):
    model = TextConditioner(128, 128, "phrases")
    model.calibrate_null(foundation.towers.read([""])[0][0])
    given = said_by(model, [GRAPH, LONE], foundation)
    phrases = [["sheep wearing red hat", "sheep left of sheep", "sheep", "red hat", "sheep", "sun"], ["dog"]]
    start = foundation.towers.read([""])[0][0, 0]
    for b, own in enumerate(phrases):
        states = foundation.towers.phrases(own).float()
        torch.testing.assert_close(given.context[b, : len(own) + 1], torch.cat([start[None], states]))
        assert given.mask[b].tolist() == [True] * (len(own) + 1) + [False] * (80 - len(own) - 1)


def test_zero_shot_is_the_foundation_called_with_that_text(foundation):
    """The pipeline's picture against diffusers' parts alone: 77 states, no mask, guidance written out."""
    config = recipe("toy", conditioner="text", num_scenes=2)
    cache = trainer_cache(config, foundation)
    conditioner = new_conditioner(config.model, config.run.seed, foundation, cache, [GRAPH, LONE])
    pipeline = make_pipeline(config, foundation, conditioner)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = pipeline([GRAPH, LONE], 3, 4.0, latents=noise, output_type="latent").images
    context, _ = foundation.towers.read(["", "", sentence(GRAPH), "dog"])

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return foundation.unet(z, t, context).sample

    expected = sample_latents(denoise, foundation.scheduler, noise, 3, 4.0)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


def trainer_cache(config, foundation):
    from sgg_fast.data.cache import build_cache
    from sgg_fast.data.sources import PairSource
    from sgg_fast.toy.world import draw_scene

    image = draw_scene(0, 0).image
    source = PairSource([GRAPH, LONE], lambda i: image, "two graphs")
    return build_cache(source, foundation, torch.device("cpu"), with_latents=False, progress=False)
