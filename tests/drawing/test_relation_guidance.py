"""Relation guidance on its way from a flag to the pipeline, and in what is kept: folders of evaluations, pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sgg_fast.data.png_record import graph_json, read_record, save_png
from sgg_fast.drawing import load_model
from sgg_fast.eval import __main__ as command
from sgg_fast.eval import pictures
from sgg_fast.graph import SceneGraph

SHEEP = SceneGraph(("sheep", "grass"), ((0, "standing on", 1),))


def test_pictures_of_an_evaluation_are_drawn_with_it(trained_run, tmp_path):
    pipeline = load_model(str(trained_run)).pipeline
    pipeline.set_progress_bar_config(disable=True)
    for pull in (0.0, 500.0):
        job = pictures.EvalJob(tmp_path / f"{pull}.png", SHEEP, 3)
        assert pictures.draw_missing(pipeline, [job], 1, 4.0, relation_guidance=pull) == 1
        (own,) = pipeline(
            SHEEP, num_inference_steps=1, guidance_scale=4.0, relation_guidance=pull,
            generator=[torch.Generator().manual_seed(3)],
        ).images  # fmt: skip
        assert np.array_equal(pictures.load([job.path])[0], np.asarray(own))
    off, on = pictures.load([tmp_path / "0.0.png", tmp_path / "500.0.png"]).astype(int)
    assert (off != on).any()


def test_a_folder_from_before_it_was_a_setting_is_one_without_it(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 4}))
    pictures.check_settings(tmp_path, {"steps": 4, "relation_guidance": 0.0})
    with pytest.raises(ValueError, match=r"holds pictures with relation_guidance 0\.0, not 2\.0: give another"):
        pictures.check_settings(tmp_path, {"steps": 4, "relation_guidance": 2.0})


def test_so_is_a_picture(tmp_path):
    record = {"seed": 0, "steps": 4, "guidance": 7.5, "size": 64, "scheduler": "ddim", "model": "toy", "weights": "x"}
    for name, more, expected in (("old", {}, 0.0), ("new", {"relation_guidance": 1.5}, 1.5)):
        path = tmp_path / f"{name}.png"
        save_png(Image.new("RGB", (8, 8)), path, {**record, **more, "graph": graph_json(SHEEP)})
        assert read_record(path) == (SHEEP, {**record, "relation_guidance": expected})


@pytest.mark.parametrize("pull", ["-1", "nan", "inf"])
def test_an_evaluation_refuses_what_is_no_pull(pull, tmp_path, capsys):
    assert command.main(["--relation-guidance", pull, "--out", str(tmp_path)]) == 2
    assert "--relation-guidance must lie between 0 and" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
