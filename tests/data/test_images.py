"""Usable pictures are read as Pillow has them, upright; what cannot be used says why; boxes follow the resizing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.small_sets import png_of, tagged, unusable

from sgg_fast.data.images import (
    ImageError,
    boxes_in_square,
    graph_beside,
    open_rgb,
    original_and_crop,
    size_of,
    stays_inside,
    to_square,
)

UNUSABLE = unusable()


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_refused_by_name_and_reason(tmp_path, name):
    content, said = UNUSABLE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        open_rgb(path)
    assert said in caught.value.reason and str(caught.value) == f"{path}: {caught.value.reason}"
    assert str(tmp_path) not in caught.value.reason, "reasons are counted: they must not name the file"


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ImageError, match="there is no such file"):
        open_rgb(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be read as an image"):
        open_rgb(tmp_path)


def test_the_bound_holds_before_anything_is_decoded(tmp_path, monkeypatch):
    """At the limit a picture is read, one pixel more is refused."""
    path = tmp_path / "a.png"
    path.write_bytes(png_of(40, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert open_rgb(path).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="more than 1199 pixels"):
        open_rgb(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
@pytest.mark.parametrize("form", ["png", "webp"])
def test_usable_forms_lose_nothing(tmp_path, mode, form):
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).convert(mode)
    picture = picture if form == "png" else picture.convert("RGBA" if "A" in mode else "RGB")
    picture.save(tmp_path / f"a.{form}", **({"lossless": True, "exact": True} if form == "webp" else {}))
    found = open_rgb(tmp_path / f"a.{form}")
    assert found.mode == "RGB" and (np.asarray(found) == np.asarray(picture.convert("RGB"))).all()


def test_squash_keeps_the_whole_picture_and_crop_its_middle():
    ramp = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (100, 1, 3))
    squashed, cropped = (to_square(Image.fromarray(ramp), 50, how)[:, :, 0].astype(float) for how in ("squash", "crop"))
    assert squashed.shape == (50, 50) and abs(squashed[0] - np.linspace(2.5, 252.5, 50)).max() < 3
    assert abs(cropped[0] - np.linspace(85.8, 169.2, 50)).max() < 3


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (64, 64)])
def test_boxes_lie_on_the_same_pixels_after_resizing(size):
    """A white box on black is found where the box says, for both ways of resizing."""
    box = np.array([[size[0] // 2 - 12, size[1] // 2 - 20, 24, 30]])
    picture = Image.new("RGB", size)
    x, y, w, h = box[0].tolist()
    picture.paste((255, 255, 255), (x, y, x + w, y + h))
    for how in ("squash", "crop"):
        white = to_square(picture, 128, how)[:, :, 0] > 127
        x0, y0, x1, y1 = boxes_in_square(box, size, how)[0] * 128
        columns, rows = np.flatnonzero(white.any(0)), np.flatnonzero(white.any(1))
        assert abs(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - [x0, y0, x1, y1]).max() <= 1


def test_boxes_over_the_edge_are_clipped():
    assert boxes_in_square(np.array([[-10, -5, 1000, 20]]), (100, 50), "squash").tolist() == [
        [0, 0, 1, pytest.approx(0.3)]
    ]


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (64, 64), (200, 40)])
def test_the_crop_lies_where_the_square_is_cut(size):
    """The resized picture, cut at the crop's place, is the square."""
    noise = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    height, width, top, left = original_and_crop(size, 80, "crop")
    assert (width, height) == size
    scale = 80 / min(size)
    box = (left / scale, top / scale, (left + 80) / scale, (top + 80) / scale)
    expected = np.asarray(picture.resize((80, 80), Image.Resampling.LANCZOS, box=box)).astype(int)
    found = to_square(picture, 80, "crop").astype(int)
    assert np.abs(found - expected)[8:-8, 8:-8].max() <= 1, "at the edges the resampling sees past the square"


def test_the_whole_picture_is_not_cut():
    assert original_and_crop((60, 40), 80, "squash") == (40, 60, 0, 0)


@pytest.mark.parametrize("value", [9, 60678])
def test_a_damaged_orientation_tag_is_named_not_guessed(tmp_path, value):
    path = tmp_path / "a.jpg"
    tagged(path, 6)
    with Image.open(path) as picture:
        exif = picture.getexif()
        exif[0x0112] = value
        picture.save(path, exif=exif)
    with pytest.raises(ImageError, match=f"its orientation tag is {value}, not 1 to 8; save the picture anew"):
        open_rgb(path, upright=True)
    Image.fromarray(np.asarray(open_rgb(path))).save(path)  # the cure
    assert open_rgb(path, upright=True).size == (24, 48)


def test_the_size_of_a_picture_is_its_headers(tmp_path):
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    assert size_of(tmp_path / "a.png") == (7, 5)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"b\.png: cannot be read"):
        size_of(tmp_path / "b.png")


def test_a_graph_lies_beside_its_picture_under_any_spelling_of_its_ending(tmp_path):
    for name in ("a.json", "a.JSON", "b.Json", "c.json.png"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "d.json").mkdir()
    found = {stem: graph_beside(tmp_path / f"{stem}.png") for stem in "abcd"}
    assert found == {"a": tmp_path / "a.json", "b": tmp_path / "b.Json", "c": None, "d": None}


@pytest.mark.parametrize(
    ("path", "inside"),
    [("a/b.png", True), ("b..png", True), ("./a", True), ("a/../b", False), ("/b", False), ("C:b", False),
     ("a\\b", False), ("a\0b", False), ("", False)],
)  # fmt: skip
def test_only_paths_below_a_folder_stay_inside(path, inside):
    assert stays_inside(path) == inside
