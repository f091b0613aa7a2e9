"""The viewer: boxes lie where objects are, the graph is drawn whole, every kind of set opens, faults are shown."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_sets import cache_of, write_small

from sgg_fast.config import DRAWN_SETS
from sgg_fast.data import show
from sgg_fast.data.show import colour_of
from sgg_fast.graph import SceneGraph


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("set"), 6)


def count(page: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((page == colour).all(-1).sum())


def test_every_object_and_box_is_drawn_in_its_colour_where_it_is(data):
    source, _ = show.open_for_show(str(data), "train")
    page = np.asarray(show.cell(source, 2))
    picture, graph = page[show.HEAD :, : show.SIDE], page[show.HEAD :, show.SIDE + show.GAP :]
    for k, (x, y, w, h) in enumerate([[4, 10, 12, 12], [0, 20, 48, 20], [30, 8, 10, 14]]):
        rows, columns = np.nonzero((picture == colour_of(k)).all(-1))
        scale = show.SIDE / 48, show.SIDE / 40
        found = columns.min(), rows.min(), rows.max()
        assert np.abs(np.subtract(found, [x * scale[0], y * scale[1], (y + h) * scale[1]])).max() < 3, k
        assert columns.max() >= (x + w) * scale[0] - 3
        assert count(graph, colour_of(k)) > 300
    assert count(graph, colour_of(3)) == 0


@pytest.mark.parametrize("num", [1, 2, 9, 30])
def test_graphs_of_any_size_fit_with_every_object_in_its_colour(num):
    names = tuple(f"a rather long name of object {k}" if k % 3 == 0 else f"thing {k}" for k in range(num))
    graph = SceneGraph(
        names, tuple((k, "standing on", (k * 7 + 1) % num) for k in range(num) if k != (k * 7 + 1) % num)
    )
    page = np.asarray(show.graph_of(graph))
    assert page.shape[0] <= show.SIDE and page.shape[1] <= show.GRAPH
    assert num == 30 or all(count(page, colour_of(k)) > 100 for k in range(num)), "30 are made smaller: no pure colour"


def test_sets_caches_folders_and_the_toy_open(data, tmp_path, capsys):
    cache = cache_of(data, tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(2):
        shutil.copy(data / "images" / f"p{k}.png", folder)
        (folder / f"p{k}.json").write_text('{"objects": ["a", "b"], "relationships": [[0, "on", 1]]}')
    for place in (data, cache, folder, *DRAWN_SETS):
        out = tmp_path / "sheet.png"
        assert show.main([str(place), "--n", "4" if place in DRAWN_SETS else "16", "--out", str(out)]) == 0, place
        assert capsys.readouterr().out == f"{out}\n"
        width, height = Image.open(out).size
        assert width == 2 * (show.SIDE + show.GRAPH + 2 * show.GAP) + show.GAP and height > show.SIDE


def test_a_cache_shows_its_set_with_boxes_and_what_it_keeps_where_that_is_gone(data, tmp_path):
    moved = tmp_path / "set"
    shutil.copytree(data, moved)
    cache = cache_of(moved, tmp_path / "cache")
    source, title = show.open_for_show(str(cache), "train")
    assert source.boxes is not None and title == f"{cache}, a cache of {moved} (train)"
    shutil.rmtree(moved)
    source, title = show.open_for_show(str(cache), "train")
    assert source.boxes is None and "is gone" in title and len(source) == 6
    assert np.asarray(show.sheet(source, title, [0, 5])).std() > 10


def test_an_unreadable_picture_is_shown_as_such(data, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(data, folder)
    (folder / "images" / "p1.png").unlink()
    (folder / "images" / "p2.png").write_bytes(b"")
    source, _ = show.open_for_show(str(folder), "train")
    for index in (1, 2):
        page = np.asarray(show.cell(source, index))
        assert count(page[show.HEAD :, : show.SIDE], (225, 225, 225)) > 50_000
        assert count(page[show.HEAD :, show.SIDE :], colour_of(0)) > 300, "the graph is drawn all the same"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["none"], "there is no such folder"),
        (["toy", "--n", "0"], "--n must be"),
        (["toy", "--out", "a.txt"], "end in .png"),
        (["toy", "--n", "2", "--first", "9"], "--first 9: the set has 2 samples"),
    ],
)
def test_what_cannot_run_is_one_line(tmp_path, capsys, monkeypatch, argv, reason):
    monkeypatch.chdir(tmp_path)
    assert show.main(argv) == 2
    out, err = capsys.readouterr()
    assert (
        err.startswith("show: ")
        and reason in err
        and err.count("\n") == 1
        and out == ""
        and not list(tmp_path.iterdir())
    )
