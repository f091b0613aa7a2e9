"""What is drawn beside the pictures: edits, file names, the graph's drawing, attention maps, sheets, models by name."""

from __future__ import annotations

import doctest
import io
import itertools
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import sgg_fast.drawing
from sgg_fast.data.inputs import Item, model_of, read_inputs
from sgg_fast.data.png_record import save_png
from sgg_fast.data.text_form import parse_text, to_text
from sgg_fast.drawing import Options, picture_paths
from sgg_fast.drawing.edit import apply_edit
from sgg_fast.drawing.explain import AttentionMaps, explain_sheet, token_labels
from sgg_fast.drawing.notices import untaught_notice
from sgg_fast.drawing.talk import Talk
from sgg_fast.graph import SceneGraph, SceneGraphError
from sgg_fast.nn.loading import digest
from sgg_fast.pictures import graph_picture as drawer
from sgg_fast.pictures.sheets import grid, text_width, wrapped, zoomed

FLOCK = parse_text("sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; boat")


@pytest.mark.parametrize(
    ("edit", "after"),
    [
        ("sheep#2 -> cow", "sheep left of cow; sheep standing on grass; hat on sheep; boat"),
        ("boat -> red boat", "sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; red boat"),
        ("add boat", "sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; boat#1; boat#2"),
        ("add dog left of boat", "sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; dog left of boat"),
        ("add hat#2 on sheep#2",
         "sheep#1 left of sheep#2; sheep standing on grass; hat on sheep; hat#2 on sheep#2; boat"),
        ("remove hat", "sheep#1 left of sheep#2; sheep standing on grass; boat"),
        ("remove sheep#1", "sheep; grass; hat; boat"),
        ("remove hat on sheep#1", "sheep#1 left of sheep#2; sheep standing on grass; hat; boat"),
        ("sheep#1 left of sheep#2 -> sheep#1 right of sheep#2",
         "sheep#1 right of sheep#2; sheep standing on grass; hat on sheep; boat"),
    ],
)  # fmt: skip
def test_an_edit_changes_what_it_names(edit, after):
    changed, wanted = apply_edit(FLOCK, edit), parse_text(after)
    assert sorted(changed.objects) == sorted(wanted.objects)
    said = [sorted((g.objects[s], p, g.objects[o]) for s, p, o in g.relations) for g in (changed, wanted)]
    assert said[0] == said[1]
    kept = [name for name in FLOCK.objects if name in changed.objects]
    places = [changed.objects.index(name) for name in kept]
    assert places == sorted(places), "what is not named keeps its order"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("remove sheep", "the graph has 2 of that name: write sheep#1, sheep#2"),
        ("cow -> dog", "the graph has no cow; it has sheep#1, sheep#2, grass, hat, boat"),
        ("sheep#3 -> cow", "the graph has no sheep#3"),
        ("hat -> hat on sheep#1", "an object becomes an object"),
        ("remove hat on grass", "the graph has no such relation"),
        ("add hat on sheep#1", "changes nothing; the graph is "),
        ("boat -> boat", "changes nothing"),
        ("paint the hat", 'write "sheep -> cow"'),
        ("remove", 'write "sheep -> cow"'),
        (" -> cow", 'write "sheep -> cow"'),
        ("boat -> hat on", "an object is missing beside 'on'"),
    ],
)
def test_an_edit_that_cannot_be_made_says_why(edit, message):
    with pytest.raises(SceneGraphError) as caught:
        apply_edit(FLOCK, edit)
    assert str(caught.value).startswith("--edit ") and message in str(caught.value)
    with pytest.raises(SceneGraphError, match="it is the only object"):
        apply_edit(SceneGraph(("boat",)), "remove boat")


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


@pytest.mark.parametrize("provenance", [None, {}, {"settings": {"seed": 0}}, {"settings": {"relation_dropout": 0.1}}])
def test_relation_guidance_is_called_a_guess_only_where_training_is_known_to_lack_it(provenance):
    pipeline = types.SimpleNamespace(config={"provenance": provenance})
    assert untaught_notice(pipeline, 2.0) == "" == untaught_notice(types.SimpleNamespace(config={}), 2.0)
    pipeline.config["provenance"] = {"settings": {"relation_dropout": 0.0}}
    assert "--relation-dropout" in untaught_notice(pipeline, 2.0) and untaught_notice(pipeline, 0.0) == ""


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


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(((a[:2] < b[2:]) & (b[:2] < a[2:])).all())


@pytest.mark.parametrize("seed", range(2))
def test_up_to_thirty_objects_are_drawn_without_overlap(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    pairs = {tuple(rng.choice(30, 2, replace=False).tolist()) for _ in range(40)}
    words = ("left of", "standing on", "in front of")
    graph = SceneGraph(
        tuple(rng.choice(["sheep", "old purple umbrella", "sky"], 30).tolist()),
        tuple((s, words[(s + o) % 3], o) for s, o in sorted(pairs)[:30]),
    )
    boxes, write = [], drawer._box

    def noted(draw, centre, size, *rest):
        boxes.append(np.concatenate([centre - size / 2, centre + size / 2]))
        write(draw, centre, size, *rest)

    monkeypatch.setattr(drawer, "_box", noted)
    image = drawer.draw_graph(graph)
    assert len(boxes) == 60 and not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
    corners = np.array(boxes)
    assert corners.min() >= 0 and (corners[:, 2:].max(axis=0) <= image.size).all() and max(image.size) < 3000
    assert image.tobytes() == drawer.draw_graph(graph).tobytes()


def test_a_drawing_is_squeezed_into_its_place_without_overlap(monkeypatch):
    boxes, write = [], drawer._box

    def noted(draw, centre, size, *rest):
        boxes.append(np.concatenate([centre - size / 2, centre + size / 2]))
        write(draw, centre, size, *rest)

    monkeypatch.setattr(drawer, "_box", noted)
    chain = SceneGraph(tuple("abcdefgh"), tuple((k, "left of", k + 1) for k in range(7)))
    free = drawer.draw_graph(chain)
    assert max(free.size) > 420
    boxes.clear()
    image = drawer.draw_graph(chain, (420, 320))
    assert image.width <= 420 and image.height <= 320
    assert len(boxes) == 15 and not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]


def test_the_smallest_and_the_doubled_graph_are_drawn():
    alone = drawer.draw_graph(SceneGraph(("boat",)))
    assert alone.width < 120 and len(set(alone.getdata())) > 2
    double = SceneGraph(("a", "b"), ((0, "on", 1), (1, "on", 0), (0, "near", 1)))
    assert drawer.draw_graph(double).size != alone.size


def test_captions_are_broken_and_shortened_to_fit():
    lines = wrapped("a purple umbrella standing in front of the house " * 4 + "x" * 300, 120, 14)
    assert len(lines) == 3 and all(text_width(line, 14) <= 120 for line in lines) and lines[-1].endswith("...")
    assert zoomed(Image.new("RGB", (64, 32)), 150).size == (192, 96)


def test_a_grid_reads_files_and_stays_small(tmp_path):
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (64, 64), (i, 0, 0)).save(paths[-1])
    sheet = grid(paths, columns=3)
    assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
    assert [sheet.getpixel((30 + 66 * (i % 3), 30 + 66 * (i // 3)))[0] for i in range(5)] == list(range(5))
    Image.new("RGB", (1024, 1024)).save(paths[0])
    assert max(grid(paths * 10).size) <= 4096 < 7 * 1024


def test_attention_maps_are_the_layers_own_weights_and_leave_the_output_alone():
    """Against the definition, for the one cross-attention layer of a small UNet; the condition's half alone."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None, cross_attention_dim=16, attention_head_dim=8,
    ).eval()  # fmt: skip
    z, context = torch.randn(4, 4, 8, 8), torch.randn(4, 6, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1]] * 2 + [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    layer = next(module for name, module in unet.named_modules() if name.endswith("attn2"))
    seen = []
    layer.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain = unet(z, 5, context, encoder_attention_mask=mask).sample
        with AttentionMaps(unet, num_images=2, size=(8, 8)) as maps:
            recorded = unet(z, 5, context, encoder_attention_mask=mask).sample
    assert torch.equal(plain, recorded)
    assert not any(type(p).__name__ == "_Recorder" for p in unet.attn_processors.values())
    x, given = seen[0][2:], context[2:]
    expected = torch.zeros(2, 6, 64)
    width = 32 // layer.heads
    for b in range(2):
        for head in range(layer.heads):
            rows = slice(head * width, (head + 1) * width)
            query, key = x[b] @ layer.to_q.weight[rows].T, given[b] @ layer.to_k.weight[rows].T
            scores = (query @ key.T / width**0.5).masked_fill(~mask[2 + b], -torch.inf)
            expected[b] += scores.softmax(dim=-1).T.detach() / layer.heads
    torch.testing.assert_close(maps.maps(), expected.unflatten(2, (8, 8)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no cross-attention was recorded"):
        AttentionMaps(unet, 1, (8, 8)).maps()


def test_the_explain_sheet_heats_where_the_token_was_attended_to():
    labels = token_labels(FLOCK)
    assert [label for label, _ in labels[:3]] == ["sheep#1", "sheep#2", "grass"]
    assert labels[5] == ("sheep#1 left of sheep#2", 2) and labels[0][1] == 2 + 3
    maps = torch.full((20, 16, 16), 0.01)
    maps[labels[1][1], :, 8:] = 0.5  # sheep#2: the right half
    sheet = np.asarray(explain_sheet(Image.new("RGB", (64, 64), (90, 90, 90)), FLOCK, maps)).astype(int)
    tile = sheet[12 : 12 + 192, 12 + 2 * 204 : 12 + 2 * 204 + 192].mean(axis=2)
    assert tile[:, 130:].mean() > tile[:, :60].mean() + 60


def test_weights_are_told_apart(tmp_path):
    from safetensors.torch import save_file

    for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
        (tmp_path / name / "unet").mkdir(parents=True)
        save_file({"w": torch.full((300_000,), value)}, tmp_path / name / "unet" / "x.safetensors")
    assert digest(tmp_path / "a") == digest(tmp_path / "c") != digest(tmp_path / "b")


def test_a_bar_is_shown_in_a_terminal_and_tells_the_time_that_remains(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet in (False, True):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        with Talk(quiet).progress(4) as progress:
            for _ in range(8):
                progress(0.25)
        assert ("4 pictures" in stream.getvalue() and "to go" in stream.getvalue()) is not quiet


def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(sgg_fast.drawing, raise_on_error=True).attempted == 5
    assert len(list(tmp_path.rglob("*.png"))) == 2, "the picture, and before beside after"
