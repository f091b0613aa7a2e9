"""Graphs of the page from words, JSON and files; errors and notices are the readers' own."""

from __future__ import annotations

import json
import threading

import pytest

pytest.importorskip("starlette", reason="the page's server: starlette is not installed: pip install -e '.[app]'")

from PIL import Image
from support.app_server import SHEEP

from sgg_fast.app import reading
from sgg_fast.data import layouts
from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.data.png_record import encode_png
from sgg_fast.graph import SceneGraph, SceneGraphError

MEADOW = {"objects": ["sheep", "grass", "sky"], "relationships": [[0, "standing on", 1], [2, "above", 1]]}


def test_deep_nesting_is_an_error_of_its_reader(client):
    deep = {"json": "[" * 30_000 + "]" * 30_000}
    assert "nested too deeply" in client.json("POST", "/api/graph", deep)["error"]


@pytest.mark.parametrize(
    "text", ['{"objects": [], "relationships": []}', '{"objects": ["a"], "relationships": [[0, "on", 0, 1]]}',
             '{"objects": ["a"], "relationships": [[0, "on", 9]]}', '{"objects": ["__image__"]}', '{"objects": [7]}']
)  # fmt: skip
def test_errors_are_the_readers_words(client, text):
    with pytest.raises(SceneGraphError) as caught:
        parse_scene_graphs(json.loads(text), "JSON")
    assert client.json("POST", "/api/graph", {"json": text}) == {"error": str(caught.value)}


def test_words_and_json_are_read(client):
    found = client.json("POST", "/api/graph", {"text": "a sheep standing on grass; sky above grass"})
    assert found == {"graph": MEADOW, "text": "sheep (standing on) grass; sky (above) grass", "notices": []}
    assert client.json("POST", "/api/graph", {"json": json.dumps(found["graph"])}) == found
    twice = {**SHEEP, "relationships": [*SHEEP["relationships"], *SHEEP["relationships"], [1, "on", 1]]}
    found = client.json("POST", "/api/graph", {"json": json.dumps(twice)})
    assert found["graph"] == SHEEP
    assert found["notices"] == ["JSON: relationships[1]: left out: an exact duplicate",
                                "JSON: relationships[2]: left out: object 1 is related to itself"]  # fmt: skip


def test_a_file_is_read_by_its_content_and_named_by_its_last_part():
    data = json.dumps([SHEEP, MEADOW]).encode()
    found = reading.file_graphs(data, "C:\\pictures\\two.json")
    assert [each["graph"] for each in found["graphs"]] == [SHEEP, MEADOW] and found["notices"] == []
    assert found["graphs"][0]["text"] == "sheep (standing on) grass" and found["graphs"][0]["settings"] == {}
    with pytest.raises(SceneGraphError, match=r"^passwd: "):
        reading.file_graphs(b"\0", "../../etc/passwd")
    with pytest.raises(SceneGraphError, match=r"^file: "):
        reading.file_graphs(b"\0", "folder/")


def test_a_picture_brings_its_settings():
    settings = {"seed": 3, "steps": 5, "guidance": 4.0, "relation_guidance": 0.0, "size": 64, "scheduler": "ddim",
                "model": "toy", "weights": "0"}  # fmt: skip
    picture = encode_png(Image.new("RGB", (8, 8)), {**settings, "graph": SHEEP})
    (found,) = reading.file_graphs(picture, "p.png")["graphs"]
    assert (found["graph"], found["settings"]) == (SHEEP, settings)


def test_of_a_long_file_the_first_graphs_are_offered():
    data = "".join(json.dumps({"objects": [f"thing {k}"]}) + "\n" for k in range(reading.MAX_GRAPHS + 3)).encode()
    found = reading.file_graphs(data, "long.jsonl")
    assert len(found["graphs"]) == reading.MAX_GRAPHS and found["graphs"][-1]["text"] == "thing 199"
    assert found["notices"] == ["long.jsonl: the first 200 of 203 graphs"]


def test_notices_are_those_of_the_own_thread():
    """Requests are read in threads beside each other."""
    with reading.noticed() as notices:
        other = threading.Thread(target=layouts.logger.warning, args=("of another request",))
        other.start()
        other.join()
        layouts.logger.warning("left %s", "out")
    layouts.logger.warning("too late")
    assert notices == ["left out"]


def test_the_graph_of_a_request_is_an_object():
    assert reading.item_of(MEADOW).graph == SceneGraph(
        ("sheep", "grass", "sky"), ((0, "standing on", 1), (2, "above", 1))
    )
    for document in (None, [SHEEP], "sheep"):
        with pytest.raises(SceneGraphError, match=r"^graph: must be an object"):
            reading.item_of(document)
    with pytest.raises(SceneGraphError, match=r"^graph: relationships\[0\]: "):
        reading.item_of({**SHEEP, "relationships": [[0, "on", 9]]})
