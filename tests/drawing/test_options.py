"""Settings of drawing within their bounds, names of the files, and which files are replaced unasked."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from PIL import Image

from sgg_fast.data.inputs import Item
from sgg_fast.data.png_record import save_png
from sgg_fast.drawing import Options, picture_paths
from sgg_fast.drawing.options import BOUNDS, SCHEDULERS, grid_path, is_lost, names_picture
from sgg_fast.graph import SceneGraph


def names(stems: list[str], **options) -> list[str]:
    items = [Item(SceneGraph(("a",)), stem) for stem in stems]
    return [str(path) for path in picture_paths(items, Options(**options))]


def test_names_of_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names(["g"]) == ["outputs/g.png"]
    assert names(["g"] * 11)[::5] == ["outputs/g-00.png", "outputs/g-05.png", "outputs/g-10.png"]
    assert names(["g", "h", "g"]) == ["outputs/g-0.png", "outputs/h.png", "outputs/g-1.png"]
    assert names(["g", "h"], num_images=2)[1:3] == ["outputs/g-1.png", "outputs/h-0.png"]
    assert names(["g"], out=Path("x/a.png")) == ["x/a.png"]
    assert names(["g", "h"], out=Path("a.PNG")) == ["a-0.png", "a-1.png"]
    assert names(["g", "h"], out=Path("x")) == ["x/g.png", "x/h.png"]
    with pytest.raises(ValueError, match=r"two pictures would be called outputs/g-0.png"):
        names(["g", "g", "g-0"])
    with pytest.raises(ValueError, match="over 1000000 pictures"):
        names(["g"] * 11, num_images=100_000)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h.png", {}),
        ("g-graph.png", {"show_graph": True}),
        ("h-explain.png", {"explain": True}),
        ("g-edit.png", {"edits": ("add boat",)}),
        ("grid.png", {"grid": True}),
    ],
)
def test_every_kind_of_file_is_replaced_unasked_only_where_it_is_ours(tmp_path, name, options):
    path, given = tmp_path / name, {"out": tmp_path, **options}
    save_png(Image.new("RGB", (64, 64)), path, None)
    theirs = path.read_bytes()
    huge = theirs[:16] + bytes([0, 0, 80, 0]) * 2 + theirs[24:]
    huge = huge[:29] + zlib.crc32(huge[12:29]).to_bytes(4, "big") + huge[33:]  # refused unseen, as a bomb
    for content in (theirs, theirs[:60], b"sgg_fast", huge):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: not drawn by .*--overwrite .*another --out"):
            names(["g", "h"], **given)
        assert len(names(["g", "h"], overwrite=True, **given)) == 2
        assert not options or len(names(["g", "h"], out=tmp_path)) == 2, "not written without the flag"
    save_png(Image.new("RGB", (64, 64)), path, {"seed": 0})
    ours = path.read_bytes()
    for content in (ours, ours[:60], b""):
        path.write_bytes(content)
        assert len(names(["g", "h"], **given)) == 2


def test_a_sheet_that_would_be_another_graphs_picture_is_refused(tmp_path):
    assert len(names(["g", "g-graph"], out=tmp_path)) == 2
    with pytest.raises(ValueError, match=r"two pictures would be called .*/g-graph\.png"):
        names(["g", "g-graph"], out=tmp_path, show_graph=True)


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_stay_within_their_bounds(name):
    low, high = BOUNDS[name]
    for value in (low, high):
        assert getattr(Options(**{name: value}), name) == value
    for value in (low - 1, high + 1, float("nan")):
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} must lie between {low} and {high}, not"):
            Options(**{name: value})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"seed": -1}, "--seed must lie between"),
        ({"seed": 2**63 - 1, "num_images": 2}, "--seed must lie between"),
        ({"size": 60}, "--size must be a multiple of 8"),
        ({"size": 4104}, "--size must be a multiple of 8 up to 4096"),
        ({"scheduler": "DDIM"}, "there are ddim, ddpm, "),
    ],
)
def test_a_seed_a_size_or_a_scheduler_that_cannot_be_is_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        Options(**bad)


def test_what_is_possible_is_taken_as_it_is():
    assert Options(seed=2**63 - 1).seed == 2**63 - 1 and Options(size=4096).size == 4096
    assert [Options(scheduler=name).scheduler for name in SCHEDULERS] == list(SCHEDULERS)


def test_a_picture_is_lost_only_where_another_one_can_be_read(tmp_path):
    path, ours = tmp_path / "a.png", {"seed": 0}
    assert not is_lost(path, ours), "nothing is there"
    save_png(Image.new("RGB", (8, 8)), path, ours)
    assert not is_lost(path, ours) and is_lost(path, {"seed": 1})
    path.write_bytes(b"\x89PNG cut")
    assert not is_lost(path, {"seed": 1})


def test_a_path_with_an_ending_is_a_picture_unless_it_is_a_folder(tmp_path):
    assert names_picture(tmp_path / "a.png") and names_picture(tmp_path / "a.jpg")
    assert not names_picture(None) and not names_picture(tmp_path / "a")
    (tmp_path / "v1.5").mkdir()
    assert not names_picture(tmp_path / "v1.5")


def test_the_grid_lies_beside_the_pictures_under_the_name_that_they_share(tmp_path):
    def at(stems: list[str], out: Path) -> Path:
        items, options = [Item(SceneGraph(("a",)), stem) for stem in stems], Options(out=out)
        return grid_path(picture_paths(items, options), items, options)

    assert at(["g", "g"], tmp_path) == tmp_path / "g-grid.png"
    assert at(["g", "h"], tmp_path) == tmp_path / "grid.png"
    assert at(["g", "h"], tmp_path / "x.PNG") == tmp_path / "x-grid.png"
