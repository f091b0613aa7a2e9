"""Unseen combinations with the tokens of seen ones: neighbours, exchanged tokens, and the table."""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from support.cases.benchmark import SYSTEM

from benchmarks.quality import composition
from benchmarks.quality.composition import Tokens, neighbour, run, share, unseen
from benchmarks.quality.plan import Cell
from sgg_fast.drawing.models import load_model, made_scheduler
from sgg_fast.eval import pictures
from sgg_fast.eval.metrics import PictureScore
from sgg_fast.eval.pictures import through_vae
from sgg_fast.graph import SceneGraph
from sgg_fast.toy.world import HELD_OUT, held_out_relations

GRAPH = SceneGraph(("brown dog", "red boat", "sea"), ((1, "in", 2), (0, "riding", 1), (0, "above", 2)))


@pytest.fixture(scope="module")
def tokens(compared) -> Tokens:
    return Tokens(load_model(str(Cell(SYSTEM["sgg"], 0).folder(compared[0]))).pipeline)


def test_a_neighbour_has_no_unseen_combination_and_the_same_relations():
    assert neighbour(GRAPH) == SceneGraph(("person", "red boat", "sea"), GRAPH.relations)
    known = {tuple(sorted((s, o))) for s, _, o in HELD_OUT}
    assert set(composition.SEEN_INSTEAD) == known
    scenes = pictures.open_graphs("toy-words-combinations", 64)
    for i in range(40):
        graph = scenes.graph(i)
        other = neighbour(graph)
        assert not held_out_relations(other) and other.relations == graph.relations
        changed = [k for k, pair in enumerate(zip(graph.objects, other.objects, strict=True)) if pair[0] != pair[1]]
        ends = {k for e in held_out_relations(graph) for k in graph.relations[e][::2]}
        assert changed and set(changed) <= ends
    assert unseen(other, graph).relations == tuple(graph.relations[k] for k in held_out_relations(graph))


def test_only_the_unseen_relations_tokens_are_exchanged(tokens):
    graphs = [GRAPH, SceneGraph(("dog", "cloud"), ((1, "above", 0),))]
    others = [neighbour(GRAPH), graphs[1]]
    own, theirs = (tokens.context(some) for some in (graphs, others))
    token = tokens.encoder.first_triple + 1
    for text, graph in ((False, False), (True, True), (True, False), (False, True)):
        given = tokens.exchanged(text, graph)(graphs, others)
        rest = torch.ones(own.shape[:2], dtype=torch.bool)
        rest[0, token] = False
        assert torch.equal(given[rest], own[rest])
        if text == graph:
            assert torch.equal(given[0, token], (theirs if text else own)[0, token])
    text, graph = (tokens.exchanged(*which)(graphs, others)[0, token] for which in ((True, False), (False, True)))
    torch.testing.assert_close(text + graph, own[0, token] + theirs[0, token])
    phrase = tokens.pipeline.towers.phrases(["person riding red boat"])[0]
    torch.testing.assert_close(tokens.said(others, own.shape[1])[0, token], phrase[: own.shape[2]].float())
    assert not torch.allclose(text, own[0, token]) and not torch.allclose(graph, own[0, token])


def test_shares_count_relations_whose_objects_are_both_there():
    def score(*relations: tuple[str, bool, bool]) -> PictureScore:
        return PictureScore([True], [], 1, [True], list(relations), 1.0, 1.0, 1.0)

    scores = [score(("riding", True, True), ("riding", False, False)), score(("holding", True, False))]
    assert share(scores, None).startswith("0.500") and share(scores, None).endswith(" of 2")
    assert share(scores, ("riding",)).startswith("1.000") and share(scores, ("on",)) == "-"


def test_the_table_has_a_row_for_each_way_and_a_sheet(compared, tmp_path):
    model = str(Cell(SYSTEM["sgg"], 0).folder(compared[0]))
    text = run(argparse.Namespace(model=model, num=2, steps=6, out=tmp_path))
    ways = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert ways == [
        *("asked", "neighbour", "neighbour's tokens", "neighbour's text", "neighbour's graph"),
        *("neighbour's text everywhere", "neighbour's graph everywhere"),
        *("from its scene at t = 800", "from its scene at t = 600"),
    ]
    with Image.open(tmp_path / "composition.png") as sheet:
        assert np.asarray(sheet).std() > 10 and sheet.width > 400


def test_each_way_draws_pictures_of_its_own(compared, monkeypatch):
    """Contexts that the pipeline keeps from an earlier way would give the same pictures again."""
    kept = []
    monkeypatch.setattr(composition, "write_sheet", lambda path, graphs, sheets: kept.append(sheets))
    model = str(Cell(SYSTEM["sgg"], 0).folder(compared[0]))
    run(argparse.Namespace(model=model, num=2, steps=6, out=compared[0]))
    (sheets,) = kept
    for one, other in itertools.combinations(sheets, 2):
        assert not np.array_equal(sheets[one], sheets[other]), (one, other)


def test_drawing_from_a_scene_late_gives_the_scene():
    """From t = 41 hardly any noise is left to remove."""
    pipeline = load_model("toy").pipeline
    tokens, pipeline.keep_conditions = Tokens(pipeline), False
    pipeline.scheduler = made_scheduler(pipeline, "ddim")
    given = pictures.open_graphs("toy-words-combinations", 64)
    graphs, images = [given.graph(i) for i in range(2)], [given.image(i) for i in range(2)]
    own = partial(composition.encode_some, tokens.exchanged(False, False), graphs, graphs)
    late, early = (
        composition.draw(pipeline, graphs, own, 25, partial(composition.from_scene, pipeline, images, start))
        for start in (41, 960)
    )
    seen = through_vae(pipeline.vae, np.stack(images)).astype(float)
    apart = [np.abs(drawn - seen).mean() for drawn in (late, early)]
    assert apart[0] < 6 < 20 < apart[1], apart


def test_a_baseline_has_no_such_tokens(compared):
    model = str(Cell(SYSTEM["text, zero-shot"], 0).folder(compared[0]))
    with pytest.raises(ValueError, match="--model is of a baseline; give one of SGG-IG"):
        run(argparse.Namespace(model=model, num=1, steps=2, out=None))
