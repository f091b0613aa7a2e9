"""INPUT arguments: what is a file, a stream, a picture or words; each is read once; what cannot be used says why."""

from __future__ import annotations

import io
import json
import os
import sys
import threading

import pytest
from PIL import Image
from support.published import RECORD, SCENES

from sgg_fast.data.inputs import Item, model_of, read_content, read_inputs
from sgg_fast.data.png_record import save_png
from sgg_fast.data.text_form import to_text
from sgg_fast.graph import SceneGraphError

SHEEP = '{"objects": ["sheep", "grass"], "relationships": [[0, "standing on", 1]]}'


def test_inputs_that_can_be_read_once_are_read_once(tmp_path, monkeypatch):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    threading.Thread(target=fifo.write_bytes, args=(SHEEP.encode(),), daemon=True).start()
    (item,) = read_inputs([str(fifo)])
    assert item.graph.objects == ("sheep", "grass") and item.stem == "pipe"
    threading.Thread(target=fifo.write_text, args=("sheep on grass\ncow\n",), daemon=True).start()
    assert len(read_inputs([str(fifo)])) == 2, "words, too: a stream has no ending to know it by"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(SHEEP.encode())))
    assert [item.stem for item in read_inputs(["-"])] == ["stdin"]


def test_an_endless_input_is_cut_off_at_the_bound(monkeypatch, tmp_path):
    monkeypatch.setattr("sgg_fast.data.inputs.MAX_BYTES", 1 << 20)
    (tmp_path / "g.json").write_text(" " * (3 << 20) + SHEEP)
    with pytest.raises(SceneGraphError, match="over 1 MiB: give the graphs in several files"):
        read_inputs([str(tmp_path / "g.json")])


def test_words_that_look_like_files_are_files(tmp_path):
    for word in ("no.json", "no/such/file", "a.PNG", "x.jsonl"):
        with pytest.raises(SceneGraphError, match="cannot be read: No such file or directory"):
            read_inputs([str(tmp_path / word) if "/" not in word else word])
    (item,) = read_inputs(["a boat on the sea"])
    assert (to_text(item.graph), item.stem, item.typed) == ("boat (on) sea", "a-boat-on-the-sea", True)
    assert read_inputs(["*" * 3])[0].stem == "graph" and len(read_inputs(["boat; " * 200])[0].stem) <= 40
    with pytest.raises(SceneGraphError, match="several models \\('a', 'b'\\): give --model"):
        model_of([Item(item.graph, "x", {"model": "a"}), Item(item.graph, "y", {"model": "b"}), item])
    with pytest.raises(SceneGraphError, match="drawn with 'someone/model', which is not here: give --model"):
        model_of([Item(item.graph, "x", {"model": "someone/model"})])
    assert model_of([item]) is None and model_of([Item(item.graph, "x", {"model": "toy"})]) == "toy"


def test_every_kind_of_input_gives_its_graphs_in_order(tmp_path, caplog):
    loop = {"objects": ["boat", "sea"], "relationships": [[0, "on", 0]]}
    (tmp_path / "two.jsonl").write_text(f"{SHEEP}\n{json.dumps(loop)}\n")
    (tmp_path / "lines.txt").write_text("cat on mat\ndog\n")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "drawn.png", RECORD)
    words = [str(tmp_path / "two.jsonl"), "a hat on a man", str(tmp_path / "drawn.png"), str(tmp_path / "lines.txt")]
    items = read_inputs(words, quiet=True)
    assert [item.stem for item in items] == ["two", "two", "a-hat-on-a-man", "drawn-again", "lines", "lines"]
    assert [item.typed for item in items] == [False, False, True, False, False, False]
    assert items[3].graph == SCENES[0] and items[3].settings["steps"] == RECORD["steps"]
    assert items[1].graph.relations == () and not caplog.records, "quiet"
    assert read_inputs(words) == items and "is related to itself" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\0\0", r"not text \(byte 2 is zero\)"),
        (b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        (b"\x89PNG\r\n\x1a\n", "no scene graph in this picture"),
        (b"", "not JSON"),
    ],
)
def test_content_of_no_known_kind_is_refused_by_the_name_of_its_source(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(SceneGraphError, match=f"^{path}: {said}"):
        read_inputs([str(path)])
    with pytest.raises(SceneGraphError, match=r"^upload: "):
        read_content(content, "x.json", "upload")
    with pytest.raises(SceneGraphError, match=r"^INPUT: not UTF-8 text"):
        read_inputs(["a\udcff"])
