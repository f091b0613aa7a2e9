"""Pictures with a record: the graph comes back; what is damaged or wrong is one line; ours are known."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.published import RECORD, SCENES, WEIRD, places

from sgg_fast.data.png_record import encode_png, graph_json, is_drawn, raw_record, read_record, record_text, save_png
from sgg_fast.graph import SceneGraphError


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A small picture with its record."""
    path = tmp_path_factory.mktemp("picture") / "p.png"
    save_png(Image.new("RGB", (8, 8), (9, 99, 199)), path, RECORD)
    return path


def test_a_picture_gives_its_graph_back(picture):
    graph, found = read_record(picture)
    assert graph == SCENES[0] and found["seed"] == 3 and found["guidance"] == 4.0


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_pictures_that_were_damaged(picture, data):
    content = bytearray(picture.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            del content[at : at + data.draw(st.integers(1, 50))]
            content = content or bytearray(b"x")
    path = picture.with_name("damaged.png")
    path.write_bytes(content)
    try:
        read_record(path)
    except SceneGraphError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_records_of_the_wrong_kind(picture, data):
    record = copy.deepcopy(RECORD)
    spots = places(record)
    container, key = spots[data.draw(st.integers(0, len(spots) - 1))]
    container[key] = data.draw(WEIRD.filter(lambda value: value != 10**400))
    path = picture.with_name("wrong.png")
    save_png(Image.new("RGB", (8, 8)), path, record)
    try:
        graph, found = read_record(path)
    except SceneGraphError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < len(str(path)) + 300
    else:
        assert math.isfinite(found["guidance"]) and graph.objects


def test_a_picture_is_ours_with_exactly_this_record_and_all_its_pixels(tmp_path):
    path, image = tmp_path / "p.png", Image.effect_noise((64, 64), 90)
    assert not is_drawn(path, RECORD)
    save_png(image, path, RECORD)
    assert is_drawn(path, RECORD) and not is_drawn(path, {**RECORD, "seed": 4})
    assert raw_record(path) == record_text(RECORD) == record_text(dict(reversed(RECORD.items())))
    assert path.read_bytes() == encode_png(image, RECORD), "the same bytes each time"
    path.write_bytes(path.read_bytes()[:-2000])
    assert not is_drawn(path, RECORD)


def test_what_is_no_record_of_ours_says_so(tmp_path):
    image, older = Image.new("RGB", (8, 8)), {key: value for key, value in RECORD.items() if key != "size"}
    _, found = read_record(io.BytesIO(encode_png(image, RECORD)))
    assert found["relation_guidance"] == 0, "pictures from before that setting lack it"
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG")
    for content, said in (
        (encode_png(image, None), "no scene graph in this picture"),
        (jpeg.getvalue(), "no scene graph in this picture"),
        (b"", "no scene graph in this picture"),
        (encode_png(image, older), "no usable size: None"),
        (encode_png(image, {**RECORD, "seed": True}), "no usable seed: True"),
        (encode_png(image, {**RECORD, "graph": {"objects": []}}), "objects: must be a non-empty list"),
    ):
        with pytest.raises(SceneGraphError, match=f"^standard input: .*{said}"):
            read_record(io.BytesIO(content), "standard input")


def test_a_graph_is_written_in_sg2ims_form():
    assert graph_json(SCENES[0]) == {"objects": ["sky", "white sheep", "grass"],
                                     "relationships": [[1, "standing on", 2], [0, "above", 2]]}  # fmt: skip
