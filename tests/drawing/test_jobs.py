"""Drawing in batches: files that are drawn once, sheets beside them, and a drawing that is watched step by step."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from sgg_fast.data.inputs import Item, read_content
from sgg_fast.data.png_record import encode_png, read_record, save_png
from sgg_fast.data.text_form import parse_text
from sgg_fast.drawing import Options, Step, draw_grid, draw_jobs, load_model, make_jobs, make_records, sample, work
from sgg_fast.drawing.jobs import unexplained
from sgg_fast.drawing.models import SCHEDULERS
from sgg_fast.graph import SceneGraph

GRAPH = parse_text("sheep standing on grass; sky above grass")


@pytest.fixture(scope="module")
def model():
    return load_model("toy")


def drawn(model, on_step, **settings):
    """(pictures, maps) of `GRAPH`."""
    records = make_records(GRAPH, {}, model, Options(**settings))
    return sample([GRAPH] * len(records), records, model, on_step)[0]


def test_previews_change_nothing_and_come_nearer(model):
    plain = drawn(model, lambda step: None, steps=8, seed=3)[0]
    seen: list[Step] = []
    previews = []

    def watch(step: Step) -> None:
        seen.append(step)
        previews.append(np.asarray(step.preview(), dtype=float))

    watched = drawn(model, watch, steps=8, seed=3)[0]
    assert np.array_equal(np.asarray(plain), np.asarray(watched))
    assert [(step.number, step.total) for step in seen] == [(i, 8) for i in range(1, 9)]
    away = [np.abs(preview - np.asarray(plain, dtype=float)).mean() for preview in previews]
    assert away[-1] < 2 < away[3] < away[0], "in steps of 0..255"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_last_preview_is_nearly_the_picture_under_every_scheduler(model, scheduler):
    last = {}

    def watch(step: Step) -> None:
        last["preview"] = np.asarray(step.preview(), dtype=float)

    own = model.pipeline.scheduler
    try:
        picture = np.asarray(drawn(model, watch, steps=6, scheduler=scheduler)[0], dtype=float)
    finally:
        model.pipeline.scheduler = own
    assert np.abs(last["preview"] - picture).mean() < 6, "the mean over pixels, in steps of 0..255"


def test_what_a_watcher_raises_ends_the_drawing_at_its_step(model):
    taken = []

    def watch(step: Step) -> None:
        taken.append(step.number)
        if step.number == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        drawn(model, watch, steps=50)
    assert taken == [1, 2, 3]
    assert len(drawn(model, lambda step: None, steps=1)) == 1, "and the model draws on"


def test_records_count_seeds_and_need_no_folder(model):
    records = make_records(GRAPH, {"steps": 7, "seed": 5}, model, Options(num_images=2, guidance=3))
    assert [record["seed"] for record in records] == [5, 6]
    assert all(record["steps"] == 7 and record["guidance"] == 3.0 for record in records)


def test_a_png_in_memory_is_the_file(model, tmp_path):
    picture = drawn(model, lambda step: None, steps=1)[0]
    (record,) = make_records(GRAPH, {}, model, Options(steps=1))
    save_png(picture, tmp_path / "a.png", record)
    data = encode_png(picture, record)
    assert data == (tmp_path / "a.png").read_bytes()
    assert read_record(io.BytesIO(data), "a.png") == read_record(tmp_path / "a.png")
    (item,) = read_content(data, "folder/a.png")
    assert (item.graph, item.stem, item.settings["steps"]) == (GRAPH, "a-again", 1)


def test_files_of_a_job_are_drawn_once_and_a_missing_one_again(model, tmp_path):
    """A picture and three sheets of each graph; a batch with a missing picture is drawn whole and written in part."""
    items = [Item(GRAPH, "a"), Item(parse_text("boat"), "b"), Item(parse_text("sheep on grass"), "c")]
    options = Options(
        out=tmp_path, steps=1, guidance=1, batch_size=2, show_graph=True, explain=True, edits=("add hat",)
    )
    jobs, shares = make_jobs(items, model, options), []
    assert list(draw_jobs(jobs, model, options, shares.append)) == jobs and all(job.is_done() for job in jobs)
    assert sum(shares) == pytest.approx(len(jobs) * work(options)) and work(options) == 2
    kinds = ("", "-edit", "-explain", "-graph")
    assert {p.name for p in tmp_path.iterdir()} == {f"{stem}{kind}.png" for stem in "abc" for kind in kinds}
    assert read_record(jobs[0].path)[0] == jobs[0].graph != jobs[0].before == GRAPH
    whole = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    lost = jobs[1].sheets["edit"]
    lost.unlink()
    assert [job.is_done() for job in jobs] == [True, False, True]
    assert list(draw_jobs(jobs, model, options)) == jobs
    assert {path: path.read_bytes() for path in whole} == {path: content for path, (content, _) in whole.items()}
    again = {path for path, (_, when) in whole.items() if path.stat().st_mtime_ns != when}
    assert again == {path for path, _ in jobs[1].files()}, "the files of the other jobs stay"


def test_a_batch_holds_graphs_of_like_size_and_one_setting(model, tmp_path):
    large = SceneGraph(("tree",) * 90)
    jobs = make_jobs([Item(GRAPH, "a"), Item(parse_text("boat"), "b"), Item(large, "c")], model, Options(out=tmp_path))
    small, boat, forest = (job.group(77) for job in jobs)
    assert small == boat != forest and jobs[0].group(2) != jobs[2].group(2)
    (other,) = make_jobs([Item(GRAPH, "a")], model, Options(out=tmp_path, steps=3))
    assert other.group(77) != small


def test_another_picture_keeps_its_name_and_the_new_ones_get_another(model, tmp_path):
    items, options = [Item(GRAPH, "a")], Options(out=tmp_path, steps=1)
    (first,) = make_jobs(items, model, options)
    save_png(Image.new("RGB", (8, 8)), first.path, first.record)
    assert make_jobs(items, model, options) == [first]
    other = dataclasses.replace(options, seed=1)
    (second,) = make_jobs(items, model, other)
    assert (second.path.name, second.variant) == ("a-v2.png", 2)
    assert make_jobs(items, model, dataclasses.replace(other, overwrite=True))[0].path == first.path
    with pytest.raises(ValueError, match=r"a\.png: holds another picture: give --overwrite"):
        make_jobs(items, model, dataclasses.replace(other, out=first.path))


def test_a_grid_has_a_row_for_each_graph_and_never_replaces_another(model, tmp_path):
    items, options = [Item(GRAPH, "a"), Item(parse_text("boat"), "b")], Options(out=tmp_path, num_images=3)
    jobs = make_jobs(items, model, options)
    for job in jobs:
        save_png(Image.new("RGB", (64, 64)), job.path, job.record)
    path = draw_grid(items, jobs, options)
    with Image.open(path) as sheet:
        assert path.name == "grid.png" and sheet.size == (3 * 66 + 2, 2 * 66 + 2)
    assert draw_grid(items, jobs, options) == path, "the same sheet again"
    assert draw_grid(items, jobs[:3], options).name == "grid-v2.png"
    assert draw_grid(items, jobs[:3], dataclasses.replace(options, overwrite=True)) == path


def test_settings_that_a_model_cannot_follow_are_refused(model):
    with pytest.raises(ValueError, match=r"^--steps 1000 with --scheduler dpm\+\+: this scheduler takes at most 99"):
        make_records(GRAPH, {}, model, Options(steps=1000, scheduler="dpm++"))
    with pytest.raises(ValueError, match="--guidance must lie between 1 and"):
        make_records(GRAPH, {"guidance": 0.5}, model, Options())


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"context": "triples"}, ""), ({"context": "global"}, "has --context global"), ({"form": "x"}, "is a baseline")],
)
def test_maps_need_a_token_for_each_triple(model, monkeypatch, config, reason):
    monkeypatch.setattr(model.pipeline.graph_encoder, "_internal_dict", FrozenDict(config))
    assert unexplained(model.pipeline).endswith(reason) and bool(unexplained(model.pipeline)) is bool(reason)
    if reason:
        with pytest.raises(ValueError, match=f"--explain needs a model .*{reason}"):
            sample([GRAPH], make_records(GRAPH, {}, model, Options()), model, lambda step: None, explain=True)
