"""infer.py: a picture for every graph, honest about words, a function of graph, seed and settings; jobs that go on."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import PUBLISHED, ROOT

import infer
from sgg_fast.data.formats import load_scene_graphs
from sgg_fast.data.png_record import read_record
from sgg_fast.drawing import jobs as jobs_module
from sgg_fast.graph import SceneGraph
from sgg_fast.toy.world import draw_scene

FILES = [*sorted(PUBLISHED.glob("sg2im_scene_graphs/*.json")), *PUBLISHED.glob("*v1.2_sample/relationships.json")]
MORE = [pytest.param(path, marks=pytest.mark.slow) for path in sorted(PUBLISHED.glob("*v1.2_sample/[ao]*s.json"))]
SHEEP = '{"objects": ["sheep", "grass"], "relationships": [[0, "standing on", 1]]}'


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


@pytest.fixture
def draw(trained_run, tmp_path, capsys):
    """Runs infer.py with the tiny model and few steps; the files of it."""

    def drawn(*argv: object) -> list[Path]:
        steps = () if "--steps" in argv else ("--steps", 2)
        return run(capsys, *argv, "--model", trained_run, *steps)[0]

    return drawn


@pytest.fixture
def graph_file(tmp_path) -> Path:
    path = tmp_path / "g.json"
    path.write_text(SHEEP)
    return path


@pytest.mark.skipif(not FILES, reason=f"the published scene graphs are not in {PUBLISHED}")
@pytest.mark.parametrize("path", [*FILES, *MORE], ids=lambda path: path.stem)
def test_every_published_graph_gets_its_picture_and_unseen_words_are_named(trained_run, tmp_path, capsys, path):
    graphs = load_scene_graphs(path)
    out = tmp_path / "new" / "g.png"
    printed, err = run(capsys, path, "--model", trained_run, "--out", out, "--steps", 1)
    assert len(graphs) > 1 and set(printed) == {out.with_name(f"g-{i}.png") for i in range(len(graphs))}
    assert sorted(out.parent.iterdir()) == sorted(printed)
    assert {pixels(p).shape for p in printed} == {(64, 64, 3)}
    assert [read_record(out.with_name(f"g-{i}.png"))[0] for i in range(len(graphs))] == graphs
    seen = {name for i in range(8) for name in draw_scene(0, i).graph.names}
    unseen = sorted({name for graph in graphs for name in graph.names} - seen)
    assert unseen, "these files are interesting because their words are not the toy's"
    (said,) = [line for line in err.splitlines() if line.startswith("words that the model never saw in training: ")]
    assert all(word in said for word in unseen[:20])
    assert f"model: {trained_run / 'finetune' / 'pipeline'}" in err


def test_words_of_the_training_set_are_not_called_unseen_and_typos_get_a_suggestion(trained_run, tmp_path, capsys):
    graph = draw_scene(0, 3).graph
    path = tmp_path / "g.json"
    path.write_text(json.dumps({"objects": graph.objects, "relationships": graph.relations}))
    _, err = run(capsys, path, "--model", trained_run, "--out", tmp_path / "a.png", "--steps", 1)
    assert "never saw" not in err
    typo = f"{graph.objects[0]}s"
    path.write_text(json.dumps({"objects": [typo]}))
    _, err = run(capsys, path, "--model", trained_run, "--out", tmp_path / "b.png", "--steps", 1)
    assert f"never saw in training: {typo} (did you mean {graph.objects[0]}?)\n" in err


def test_different_graphs_differ_and_the_same_graph_is_the_same_picture(draw, tmp_path):
    """One seed for all, so nothing but the graph tells the pictures apart; neighbours in the batch do not matter."""
    graphs = [draw_scene(0, i).graph for i in (0, 1, 2, 0)]
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(json.dumps({"objects": g.objects, "relationships": g.relations}) for g in graphs))
    a, b, c, again = map(pixels, draw(path, "--out", tmp_path / "a.png", "--steps", 4, "--guidance", 7.5))
    assert differ(a, b) and differ(b, c) and differ(a, c)
    assert np.abs(a - again).max() <= 1, "another row of one batch: the last bit at most"
    draw(path, "--out", tmp_path / "b.png", "--steps", 4, "--guidance", 7.5)
    for i in range(4):
        assert (tmp_path / f"a-{i}.png").read_bytes() == (tmp_path / f"b-{i}.png").read_bytes()


def test_the_same_command_gives_the_same_bytes_and_every_flag_counts(draw, graph_file, tmp_path):
    def drawn(name: str, *more: object) -> np.ndarray:
        steps = () if "--steps" in more else ("--steps", 2)
        (path,) = draw(graph_file, "--out", tmp_path / name, "--overwrite", *steps, *more)
        return pixels(path)

    first = drawn("a.png")
    drawn("b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    drawn("b.png", "--guidance", 4, "--seed", 0, "--size", 64, "--scheduler", "ddim")  # the recipe's own
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for more in (
        ("--guidance", 1), ("--seed", 1), ("--scheduler", "dpm++"), ("--steps", 3), ("--relation-guidance", 500),
    ):  # fmt: skip
        assert (drawn("c.png", *more) != first).any(), more
    assert drawn("c.png", "--size", 32).shape == (32, 32, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.png", "g.json"], "nothing left aside"


def test_a_scaled_picture_is_the_same_in_squares_and_keeps_its_own_size(
    draw, graph_file, tmp_path, capsys, trained_run
):
    (plain,), (large,) = (draw(graph_file, "--out", tmp_path / f"{n}.png", "--scale", n) for n in (1, 3))
    assert (pixels(large) == pixels(plain).repeat(3, axis=0).repeat(3, axis=1)).all()
    assert read_record(large) == read_record(plain) and read_record(large)[1]["size"] == 64
    (again,), _ = run(capsys, large, "--out", tmp_path)
    assert np.abs(pixels(again) - pixels(plain)).max() <= 1, "drawn again at its own size"
    draw(graph_file, "--out", large, "--scale", 2, "--overwrite")
    assert pixels(large).shape == (128, 128, 3), "another scale is another picture"
    assert infer.main([str(graph_file), "--model", str(trained_run), "--scale", "17"]) == 2
    assert capsys.readouterr().err == "infer.py: --scale must lie between 1 and 16, not 17\n"


def test_words_lists_what_the_model_was_trained_on(trained_run, capsys):
    assert infer.main(["--words", "--model", str(trained_run)]) == 0
    things, relations = capsys.readouterr().out.splitlines()
    known = {name for i in range(8) for name in draw_scene(0, i).graph.objects}
    said = {p for i in range(8) for _, p, _ in draw_scene(0, i).graph.relations}
    assert relations == f"relations: {', '.join(sorted(said))}"
    told: set[str] = set()
    for kind, attributes in re.findall(r"([a-z ]+?)(?: \(([a-z, ]*)\))?(?:, |$)", things.removeprefix("things: ")):
        told |= {kind, *(f"{colour} {kind}" for colour in attributes.split(", ") if colour)}
    assert known <= told and {name for name in told if " " in name} <= known
    with pytest.raises(SystemExit):
        infer.main([])
    assert "required: INPUT" in capsys.readouterr().err


def test_a_picture_is_drawn_again_from_itself(draw, graph_file, tmp_path, capsys, trained_run):
    flags = ("--steps", 3, "--guidance", 2.5, "--size", 32, "--scheduler", "euler", "--relation-guidance", 1.5)
    first, second = draw(graph_file, "--out", tmp_path, "--seed", 5, "--num-images", 2, *flags)
    assert (pixels(first) != pixels(second)).any()
    (again,), err = run(capsys, second, "--out", tmp_path)
    assert again == tmp_path / "g-1-again.png" and "differ" not in err
    assert np.abs(pixels(again) - pixels(second)).max() <= 1
    assert read_record(again) == read_record(second) and read_record(second)[1]["seed"] == 6
    alone, = draw(graph_file, "--out", tmp_path / "alone.png", "--seed", 6, *flags)  # fmt: skip
    assert run(capsys, alone, "--out", tmp_path)[0][0].read_bytes() == alone.read_bytes()
    other, _ = run(capsys, second, "--out", tmp_path / "other.png", "--seed", 9)
    assert read_record(other[0])[1] == {**read_record(second)[1], "seed": 9}
    _, err = run(capsys, second, "--out", tmp_path / "toy.png", "--model", "toy", "--steps", 1)
    assert "g-1-again: drawn with other weights than the toy model of this package: it will differ" in err


def test_many_inputs_standard_input_and_words(draw, graph_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{SHEEP}\n{SHEEP}".encode())))
    out = tmp_path / "pictures"
    found = draw(graph_file, "-", "two boats#1 on sea; kite", "--out", out, "--steps", 1)
    assert [p.name for p in found] == ["g.png", "stdin-0.png", "stdin-1.png", "two-boats-1-on-sea-kite.png"]
    assert read_record(found[3])[0] == SceneGraph(("two boats", "sea", "kite"), ((0, "on", 1),))


def test_a_stopped_job_goes_on_to_the_same_bytes(draw, tmp_path, capsys, monkeypatch, trained_run):
    """What is whole is left alone, what is missing or drawn otherwise is drawn; nothing else changes."""
    path = tmp_path / "g.jsonl"
    names = [name for i in range(8) for name in draw_scene(0, i).graph.objects]
    path.write_text("\n".join(json.dumps({"objects": names[i : i + 2]}) for i in range(7)))
    whole = draw(path, "--out", tmp_path / "whole", "--batch-size", 3)
    argv = [str(path), "--out", str(tmp_path / "part"), "--batch-size", "3", "--model", str(trained_run)]
    argv += ["--steps", "2"]
    save, saved = jobs_module.save_png, []

    def stopping(*given):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(given[1])
        save(*given)

    monkeypatch.setattr(jobs_module, "save_png", stopping)
    assert infer.main(argv) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == [f"g-{i}.png" for i in range(4)]
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "part").iterdir()}
    (tmp_path / "part" / "g-0.png").write_bytes(whole[0].read_bytes()[:200])
    monkeypatch.setattr(jobs_module, "save_png", save)
    assert infer.main(argv) == 0
    capsys.readouterr()
    for a in whole:
        assert a.read_bytes() == (tmp_path / "part" / a.name).read_bytes()
    kept = [p for p, then in times.items() if p.stat().st_mtime_ns == then]
    assert sorted(p.name for p in kept) == ["g-1.png", "g-2.png", "g-3.png"]
    draw(path, "--out", tmp_path / "part", "--batch-size", 3, "--overwrite")
    assert all(p.stat().st_mtime_ns != then for p, then in times.items())


def test_graphs_of_all_sizes_in_one_command(draw, tmp_path):
    """Thirty objects and thirty relations, one object alone, no relation: batches hold graphs of like size only."""
    large = {"objects": ["tree"] * 50, "relationships": [[i, "on", i + 1] for i in range(40)]}
    thirty = {"objects": ["sheep"] * 30, "relationships": [[i, "left of", (i + 1) % 30] for i in range(30)]}
    graphs = [thirty, {"objects": ["boat"]}, large, {"objects": ["sky", "sea"], "relationships": []}]
    path = tmp_path / "g.json"
    path.write_text(json.dumps(graphs))
    found = draw(path, "--out", tmp_path, "--steps", 1, "--show-graph", "--explain")
    assert sorted(p.name for p in found) == sorted(
        f"g-{i}{kind}.png" for i in range(4) for kind in ("", "-graph", "-explain")
    )
    objects, tile = 1 + 60, 192 + 12
    with Image.open(tmp_path / "g-0-explain.png") as sheet:  # the picture, 30 objects, 30 relations in rows of 8
        assert sheet.width == 8 * tile + 12 and sheet.height > objects // 8 * tile


def test_sheets_and_grid_and_json(draw, graph_file, tmp_path, capsys, trained_run):
    argv = [str(graph_file), "--model", str(trained_run), "--steps", "2", "--out", str(tmp_path / "a.png"), "--json",
            "--num-images", "2", "--edit", "sheep -> dog", "--edit", "add hat on dog", "--grid"]  # fmt: skip
    assert infer.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *rows, grid = [json.loads(line) for line in out.splitlines()]
    assert grid == {"grid": str(tmp_path / "a-grid.png")}
    assert pixels(tmp_path / "a-grid.png").shape == (64 + 4, 2 * (64 + 2) + 2, 3)
    edited = {"objects": ["dog", "grass", "hat"], "relationships": [[0, "standing on", 1], [2, "on", 0]]}
    assert [(row["graph"], row["seed"], row["steps"]) for row in rows] == [(edited, 0, 2), (edited, 1, 2)]
    assert rows[1]["files"] == [str(tmp_path / "a-1.png"), str(tmp_path / "a-1-edit.png")]
    # Before and after are those of the two graphs with the same seed, side by side.
    before, = draw(graph_file, "--out", tmp_path / "before.png", "--seed", 1)  # fmt: skip
    sheet = pixels(tmp_path / "a-1-edit.png")
    assert np.abs(sheet[12 : 12 + 256 : 4, 12 : 12 + 256 : 4] - pixels(before)).max() <= 1
    assert np.abs(sheet[12 : 12 + 256 : 4, 280 : 280 + 256 : 4] - pixels(tmp_path / "a-1.png")).max() == 0


def test_quiet_prints_paths_only_and_words_are_read_back(trained_run, tmp_path, capsys):
    words = ("sheap on gras", "--model", trained_run, "--steps", 1, "--out", tmp_path / "a.png")
    _, err = run(capsys, *words)
    assert "read as: sheap (on) gras" in err and "never saw" in err
    printed, err = run(capsys, *words, "--quiet", "--overwrite")
    assert (printed, err) == ([tmp_path / "a.png"], "")


def test_without_a_run_it_draws_with_the_shipped_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graph = ROOT / "graph.json"
    printed, err = run(capsys, graph, "--steps", 1)
    assert printed == [Path("outputs/graph.png")] and pixels(printed[0]).shape == (64, 64, 3)
    assert "model: the toy model of this package\n" in err and "never saw in training" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]


def test_the_run_taken_by_default_names_the_model_that_ships(trained_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(trained_run)
    monkeypatch.chdir(tmp_path)
    line, more = "model: runs/toy/finetune/pipeline", "; --model toy is the one that ships, trained for hours"
    (path,), err = run(capsys, "sheep", "--steps", 1)
    assert f"{line}{more}\n" in err
    for argv in (("sheep", "--model", "runs/toy"), (path,)):  # asked for, by the flag and by a picture
        assert f"{line}\n" in run(capsys, *argv, "--steps", 1)[1]


def test_relation_guidance_of_a_model_that_was_not_taught_it_is_called_a_guess(trained_run, tmp_path, capsys):
    said = "relation guidance is a guess: this model was last trained without --relation-dropout\n"
    for model, pull, told in ((trained_run, 2, 1), (trained_run, 0, 0), ("toy", 2, 0)):
        argv = ("sheep on grass", "--steps", 1, "--relation-guidance", pull, "--model", model)
        _, err = run(capsys, *argv, "--out", tmp_path / f"{told}.png", "--overwrite")
        assert err.count(said) == told, (model, pull)
    _, err = run(capsys, tmp_path / "1.png", "--steps", 1, "--out", tmp_path)
    assert said in err, "a picture brings its model and its pull"


def test_a_file_that_was_not_drawn_here_is_kept(graph_file, trained_run, tmp_path, capsys, monkeypatch):
    """Refused before a model is loaded, beside its json too; --overwrite replaces it, and then it is ours."""
    photo = graph_file.with_suffix(".png")
    Image.new("RGB", (9, 9)).save(photo)
    theirs = photo.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("sgg_fast.drawing.load_model", lambda _: pytest.fail("a model was loaded"))
        for out in (photo, tmp_path):
            assert infer.main([str(graph_file), "--out", str(out)]) == 2
            said = f"infer.py: {photo}: not drawn by infer.py: give --overwrite to replace it, or another --out\n"
            assert capsys.readouterr() == ("", said)
    assert photo.read_bytes() == theirs
    argv = (graph_file, "--model", trained_run, "--out", tmp_path, "--grid", "--steps")
    run(capsys, *argv, 1, "--overwrite")
    grid = tmp_path / "g-grid.png"
    assert run(capsys, *argv, 2, "--overwrite")[0] == [photo, grid] and read_record(photo)[1]["steps"] == 2
    assert infer.main([str(grid)]) == 2 and capsys.readouterr().err.startswith(f"infer.py: {grid}: ")


def test_help_names_every_flag_with_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        infer.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "examples:" in out and "exit codes:" in out
    assert all(
        flag in out for flag in ("--seed", "--scheduler", "--grid", "--explain", "--edit", "--json", "--words", "INPUT")
    )
