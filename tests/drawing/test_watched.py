"""A drawing that is watched: steps, previews, an end from outside; the same bits as one that is not."""

from __future__ import annotations

import io

import numpy as np
import pytest

from sgg_fast.data.inputs import read_content
from sgg_fast.data.png_record import encode_png, read_record, save_png
from sgg_fast.data.text_form import parse_text
from sgg_fast.drawing import Options, Step, load_model, make_records, sample
from sgg_fast.drawing.models import SCHEDULERS

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
