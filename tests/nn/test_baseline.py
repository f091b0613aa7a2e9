"""The baselines: what the text baseline says to the letter, SGDiff against loops, both through the real stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_runs import same_weights, train, trainer

from sgg_fast.config import ConfigError
from sgg_fast.diffusion.sampling import sample_latents
from sgg_fast.drawing.models import load_model
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.baseline import first_rows
from sgg_fast.nn.sgdiff import NUM_LOCAL, SGDiffConditioner
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


def test_first_rows_are_each_graphs_own():
    batch = SceneGraphBatch.from_graphs([GRAPH, LONE], NameTable())
    rows = torch.arange(float(batch.num_relations))[:, None] + 1
    found, there = first_rows(batch, rows, 3)
    assert found[..., 0].tolist() == [[1, 2, 3], [7, 0, 0]]
    assert there.tolist() == [[True, True, True], [True, False, False]]


def many(num: int) -> SceneGraph:
    """A graph of more triples than get a token."""
    return SceneGraph(tuple("abcdef"), tuple((i % 6, "by", (i + 1) % 6) for i in range(num)))


def test_sgdiff_against_loops():
    torch.manual_seed(0)
    graphs = [GRAPH, many(18), LONE]
    table = NameTable()
    batch = SceneGraphBatch.from_graphs(graphs, table)
    model = SGDiffConditioner(8, 12, width=16, trained_names=tuple(n for n in table.names if n != "sun")).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    given = model(model.names_of(table, torch.zeros(len(table), 4)), batch)
    for b, graph in enumerate(graphs):
        objects = [*graph.objects, "__image__"]
        image = len(graph.objects)
        triples = [*graph.relations, *((i, "__in_image__", image) for i in range(image))]
        rows = {name: row for row, name in enumerate(model.config.trained_names, start=1)}

        def embed(name: str, rows: dict[str, int] = rows) -> torch.Tensor:
            return model.embedding.weight[rows[name]] if name in rows else torch.zeros(16).double()

        x, r = [embed(name) for name in objects], [embed(p) for _, p, _ in triples]
        assert len(model.relation_encoder.layers) == 6
        for layer in model.relation_encoder.layers:
            ws, wo = layer.object_weight.chunk(2)
            messages: list[list[torch.Tensor]] = [[] for _ in objects]
            r_new = []
            for (s, _, o), r_e in zip(triples, r, strict=True):
                hidden = torch.relu(ws @ x[s] + layer.relation_weight @ r_e + wo @ x[o] + layer.bias)
                m_s, r_e, m_o = torch.relu(layer.second.weight @ hidden + layer.second.bias).chunk(3)
                messages[s].append(m_s)
                messages[o].append(m_o)
                r_new.append(r_e)
            first, last = layer.update[0], layer.update[2]
            means = [torch.stack(own).mean(0) for own in messages]
            x = [torch.relu(last.weight @ torch.relu(first.weight @ m + first.bias) + last.bias) for m in means]
            r = r_new
        pooled = torch.cat([torch.stack(x).mean(0), torch.stack(r).mean(0)])
        tokens = [model.to_global.weight @ pooled + model.to_global.bias]
        for k in range(NUM_LOCAL):
            local = torch.zeros(48).double()
            if k < len(triples):
                local = torch.cat([x[triples[k][0]], r[k], x[triples[k][2]]])
            tokens.append(model.to_local.weight @ local + model.to_local.bias)
        torch.testing.assert_close(given.context[b, :16], torch.stack(tokens))
    assert given.mask[:, :16].all() and not given.mask[:, 16:].any(), "all sixteen are attended to"


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


BASELINES = {
    "text": {"conditioner": "text", "text_form": "numbered"},
    "sgdiff": {"conditioner": "sgdiff"},
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_trains_and_draws_and_one_resumes(tmp_path, name):
    settings = {**BASELINES[name]}
    result = train(tmp_path / "once", "finetune", **settings)
    if name == "sgdiff":
        train(tmp_path / "twice", "finetune", **settings, finetune_steps=2)
        assert same_weights(result, train(tmp_path / "twice", "finetune", **settings))
    pipeline = load_model(str(tmp_path / "once")).pipeline
    before = toy_foundation().unet.state_dict()
    assert any(not before[k].equal(v) for k, v in pipeline.unet.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    graphs = [
        pipeline(g, 2, generator=torch.Generator().manual_seed(0), output_type="np").images for g in (GRAPH, LONE)
    ]
    assert not np.allclose(*graphs), "the graph decides"


def test_a_baselines_loss_is_the_diffusion_loss_alone(tmp_path):
    run = trainer(tmp_path, "finetune", conditioner="sgdiff")
    terms = run.engine.module(np.arange(2), 0)
    torch.testing.assert_close(terms.losses["loss"], terms.losses["diff"])
    terms.total.backward()
    missing = [k for k, p in run.conditioner.named_parameters() if p.grad is None and not k.endswith("mask_token")]
    assert not missing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioner": "text", "loss_weight": 0.5}, "--conditioner text has no X_global.*leave out --loss-weight"),
        ({"conditioner": "text", "geometry": 0.5}, r"--conditioner text has none .* --geometry: leave it out"),
        ({"conditioner": "words"}, "--conditioner must be one of sgg, text, sgdiff"),
        ({"text_form": "poem"}, "--text-form must be one of sentence, phrases, numbered"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe("toy", **changes)


def test_a_baseline_has_no_pretraining(tmp_path):
    with pytest.raises(ConfigError, match="--conditioner sgdiff has no pre-training"):
        trainer(tmp_path, "pretrain", conditioner="sgdiff")
    with pytest.raises(ConfigError, match="is of SGG-IG: leave out --conditioner"):
        trainer(tmp_path, "finetune", conditioner="sgdiff", graph_encoder=tmp_path)
    assert recipe("toy").model.conditioner == "sgg"
