"""Thousands of damaged graph files of every layout: each is read, or refused in one clear line, at once."""

from __future__ import annotations

import copy
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.published import LAYOUTS, WEIRD, places

import infer
from sgg_fast.data.formats import read_scene_graphs
from sgg_fast.graph import SceneGraph, SceneGraphError

MANY = settings(max_examples=1000, deadline=None, derandomize=True)


def reads_or_explains(content: bytes, as_text: bool = False) -> None:
    """Graphs, or one line that begins with the source; within a second of computing."""
    began = time.process_time()
    try:
        graphs = read_scene_graphs(content, "file", as_text)
    except SceneGraphError as error:
        said = str(error)
        assert said.startswith("file: ") and "\n" not in said and len(said) < 300
        said.encode()
    else:
        assert graphs and all(isinstance(graph, SceneGraph) for graph in graphs)
        "".join(name for graph in graphs for name in graph.names).encode()
    assert time.process_time() - began < 1


@MANY
@given(st.data())
def test_values_of_the_wrong_kind(data):
    document = copy.deepcopy(LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))])
    for _ in range(data.draw(st.integers(1, 3))):
        spots = places(document)
        if not spots:
            break
        container, key = spots[data.draw(st.integers(0, len(spots) - 1))]
        kind = data.draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if kind == "remove":
            del container[key]
        elif kind == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(data.draw(WEIRD))
    try:
        content = json.dumps(document).encode()
    except ValueError:  # a number too long to be written
        return
    reads_or_explains(content)


PIECES = [
    *(bytes([byte]) for byte in b'{}[]",:0-\n\r\t\\ \xff\xc3\x00'),
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"\\ud800", b"\\u0000", b'"objects": [], ', b"null",
    b"[" * 2000, b'{"a":' * 2000, b'"items": 3, ', b"\xef\xbb\xbf", b"\xed\xa0\x80",
]  # fmt: skip


@MANY
@given(st.data())
def test_bytes_that_were_damaged(data):
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    lines = data.draw(st.booleans())
    graphs = LAYOUTS[layout] if isinstance(LAYOUTS[layout], list) else [LAYOUTS[layout]]
    text = "\n".join(map(json.dumps, graphs)) if lines else json.dumps(LAYOUTS[layout])
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        until = min(len(content), at + data.draw(st.integers(0, 30)))
        kind = data.draw(st.sampled_from(["cut", "end", "put", "repeat"]))
        if kind == "cut":
            del content[at:until]
        elif kind == "end":
            del content[at:]
        elif kind == "put":
            content[at:at] = data.draw(st.sampled_from(PIECES))
        else:
            content[at:at] = content[at:until]
    reads_or_explains(bytes(content), as_text=data.draw(st.booleans()))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"objects": ["a"], "objects": ["b"]}', "the key 'objects' occurs twice"),
        (b'{"objects": [NaN]}', "NaN is not a JSON number"),
        (b'{"objects": ["\\ud800"]}', "lone surrogate"),
        (json.dumps({"objects": ["a"] * 100_000}).encode(), "more than 4096 objects"),
        (json.dumps({"objects": ["a", "b"], "relationships": [[0, str(i), 1] for i in range(9999)]}).encode(), "4096"),
        (b'{"objects": ["a"], "relationships": [[0, "on", ' + b"9" * 9999 + b"]]}", "not usable JSON"),
        (b'{"objects": ["' + b"a" * 1_000_000 + b'"]}', "a name of 1000000 characters"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "no scene graph in this picture"),
        (b"", "not JSON"),
        (b"\xff\xfe{", "not UTF-8 text"),
    ],
)
def test_the_command_says_one_line_and_exits_with_2(tmp_path, capsys, content, reason):
    path = tmp_path / "graph.json"
    path.write_bytes(content)
    assert infer.main([str(path), "--out", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"infer.py: {path}: ") and reason in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["graph.json"]
