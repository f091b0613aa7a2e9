"""infer.py on published scene graphs: a picture for every graph, honest about words, a function of graph and seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT

import infer
from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.drawing import draw_graphs, load_pipeline, output_paths
from sgg_fast.toy.world import draw_scene

PUBLISHED = ROOT.parent / "shared" / "data" / "sg2im_scene_graphs"
FILES = sorted(PUBLISHED.glob("*.json"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image).astype(int)


def run(capsys, *argv: object) -> tuple[list[Path], str]:
    """The files that infer.py printed, and what it said on stderr."""
    assert infer.main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    return [Path(line) for line in out.splitlines()], err


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """By far more than the last bit: over 1 % of the values by over 8 levels."""
    return bool((np.abs(a - b) > 8).mean() > 0.01)


@pytest.mark.skipif(not FILES, reason=f"sg2im's published scene graphs are not in {PUBLISHED}")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_published_graph_gets_its_picture_and_unseen_words_are_named(trained_run, tmp_path, capsys, path):
    graphs = load_scene_graphs(path)
    out = tmp_path / "new" / "g.png"
    printed, err = run(capsys, path, "--model", trained_run, "--out", out, "--steps", 2)
    assert len(graphs) > 1 and printed == [out.with_name(f"g-{i}.png") for i in range(len(graphs))]
    assert sorted(out.parent.iterdir()) == printed
    assert {pixels(p).shape for p in printed} == {(64, 64, 3)}
    seen = {name for i in range(8) for name in draw_scene(0, i).graph.names}
    unseen = sorted({name for graph in graphs for name in graph.names} - seen)
    assert unseen, "these files are interesting because their words are not the toy's"
    assert f"words that the model never saw in training: {', '.join(unseen)}" in err
    assert f"model: {trained_run / 'finetune' / 'pipeline'}" in err


def test_words_of_the_training_set_are_not_called_unseen(trained_run, tmp_path, capsys):
    graph = draw_scene(0, 3).graph
    path = tmp_path / "g.json"
    path.write_text(json.dumps({"objects": graph.objects, "relationships": graph.relations}))
    _, err = run(capsys, path, "--model", trained_run, "--out", tmp_path / "a.png", "--steps", 1)
    assert "never saw" not in err


@pytest.fixture(scope="module")
def pipeline(trained_run):
    pipeline, _ = load_pipeline(str(trained_run))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def graphs():
    return [draw_scene(0, i).graph for i in range(3)]


def test_different_graphs_differ_and_the_same_graph_is_the_same_file(pipeline, graphs, tmp_path):
    """One seed for all, so nothing but the graph tells the pictures apart; neighbours in the batch do not matter."""
    paths = output_paths(tmp_path / "a.png", 4)
    draw_graphs(pipeline, [*graphs, graphs[0]], paths, steps=4, guidance=7.5, seed=0)
    a, b, c, again = map(pixels, paths)
    assert differ(a, b) and differ(b, c) and differ(a, c)
    assert np.abs(a - again).max() <= 1, "another row of one batch: the last bit at most"
    draw_graphs(pipeline, [*graphs, graphs[0]], output_paths(tmp_path / "b.png", 4), steps=4, guidance=7.5, seed=0)
    for i, path in enumerate(paths):
        assert path.read_bytes() == (tmp_path / f"b-{i}.png").read_bytes()


def test_the_same_command_gives_the_same_bytes_and_every_flag_counts(trained_run, tmp_path, capsys):
    path = tmp_path / "g.json"
    path.write_text('{"objects": ["sheep", "grass"], "relationships": [[0, "standing on", 1]]}')

    def drawn(name: str, *more: object) -> np.ndarray:
        run(capsys, path, "--model", trained_run, "--out", tmp_path / name, *more)
        return pixels(tmp_path / name)

    first = drawn("a.png")
    drawn("b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    drawn("b.png", "--steps", 4, "--guidance", 4, "--seed", 0, "--size", 64)  # the recipe's own
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for more in (("--steps", 3), ("--guidance", 1), ("--seed", 1)):
        assert (drawn("c.png", *more) != first).any(), more
    assert drawn("c.png", "--size", 32).shape == (32, 32, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.png", "g.json"], "nothing left aside"


def test_one_graph_keeps_the_name_and_many_are_numbered_alike(tmp_path):
    assert output_paths(tmp_path / "a.png", 1) == [tmp_path / "a.png"]
    assert [p.name for p in output_paths(tmp_path / "a.png", 11)][::5] == ["a-00.png", "a-05.png", "a-10.png"]


def test_without_a_run_it_draws_with_the_shipped_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graph = ROOT / "graph.json"
    printed, err = run(capsys, graph, "--steps", 1)
    assert printed == [Path("outputs/graph.png")] and pixels(printed[0]).shape == (64, 64, 3)
    assert "the toy model of this package" in err and "never saw in training" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
