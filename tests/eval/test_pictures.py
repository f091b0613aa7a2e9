"""Sets of graphs, and their pictures: drawn once, kept, and bound to their settings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sgg_fast.drawing.models import load_model
from sgg_fast.eval import metrics, pictures
from sgg_fast.eval.pictures import is_spoken, is_unseen, open_graphs
from sgg_fast.toy import world


def test_repeats_are_scenes_that_words_describe_badly():
    graphs = pictures.open_graphs("toy-repeats", 64)
    for i in range(2):
        graph = graphs.graph(i)
        assert len(set(graph.objects)) < len(graph.objects), "two of a kind"
        assert {s for s, _, _ in graph.relations} & {o for _, _, o in graph.relations}, "a chain"
        assert metrics.counterfactual_pairs(i, graph), "a relation that could be the other way round"
    assert graphs.graph(0) != graphs.graph(1)
    drawn = next(k for k in range(2000) if world.draw_scene(world.HELD_OUT_SEED, k).graph == graphs.graph(0))
    assert (graphs.image(0) == world.draw_scene(world.HELD_OUT_SEED, drawn).image).all()


def test_held_out_combinations_are_in_every_scene_of_their_set():
    graphs = pictures.open_graphs("toy-combinations", 64)
    for i in range(3):
        assert world.held_out_relations(graphs.graph(i))
        assert not world.held_out_relations(pictures.open_graphs("toy", 64).graph(i))


def test_sets_of_both_worlds_lie_side_by_side():
    for data, held_out in (("toy", False), ("toy-words", False), ("toy-combinations", True),
                           ("toy-words-combinations", True)):  # fmt: skip
        scene = world.draw_scene(world.HELD_OUT_SEED, 1, held_out=held_out, spoken=is_spoken(data))
        graphs = open_graphs(data, 64)
        assert graphs.graph(1) == scene.graph and (graphs.image(1) == scene.image).all()
    assert open_graphs("toy-words-repeats", 64).graph(0) != open_graphs("toy-repeats", 64).graph(0)
    assert [is_unseen(name) for name in ("toy-combinations", "toy-words-combinations", "toy", "my-combinations")] == [
        *(True, True, False, False)
    ]
    assert [is_spoken(name) for name in ("toy-words-repeats", "toy-repeats", "toy-wordsmith")] == [True, False, False]


def test_only_missing_pictures_are_drawn_each_from_its_own_noise(tmp_path):
    pipeline, graphs = load_model("toy").pipeline, open_graphs("toy", 64)
    seeds = [pictures.noise_seed(seed, i) for seed in range(3) for i in range(1000)]
    assert len(set(seeds)) == 3000
    jobs = [pictures.EvalJob(tmp_path / f"{i}.png", graphs.graph(i), seeds[i]) for i in range(2)]
    assert pictures.draw_missing(pipeline, jobs[:1], 2, 1.0) == 1
    first = jobs[0].path.stat().st_mtime_ns
    assert pictures.draw_missing(pipeline, jobs, 2, 1.0) == 1 and jobs[0].path.stat().st_mtime_ns == first
    drawn = pictures.load([job.path for job in jobs])
    assert drawn.shape == (2, 64, 64, 3) and drawn.dtype == np.uint8
    for i, batch in ((0, jobs[:1]), (1, jobs)):  # the second was drawn with its whole batch
        noise = [torch.Generator().manual_seed(job.noise_seed) for job in batch]
        graphs_of = [job.graph for job in batch]
        own = pipeline(graphs_of, num_inference_steps=2, guidance_scale=1.0, generator=noise).images[i]
        np.testing.assert_array_equal(drawn[i], np.asarray(own))
    Image.new("RGB", (9, 8)).save(jobs[1].path)
    with pytest.raises(ValueError, match=r"1\.png: is 9 x 8 pixels where the others are 64 x 64; delete it"):
        pictures.load([job.path for job in jobs])
    real = np.stack([graphs.image(i) for i in range(2)])
    error = pictures.through_vae(pipeline.vae, real, batch_size=1).astype(float) - real
    assert 0 < np.abs(error).mean() < 8, "an autoencoder's own loss"


def test_a_folder_belongs_to_one_setting_and_to_the_graphs_it_was_drawn_of(tmp_path):
    file = tmp_path / "graphs.json"

    def digest(*names: str) -> str:
        file.write_text(
            json.dumps([{"objects": [name, "house"], "relationships": [[0, "above", 1]]} for name in names])
        )
        return pictures.graphs_digest(open_graphs(str(file), 64))

    assert digest("dog", "cat") == digest("dog", "cat") != digest("dog", "car")
    endless = [
        pictures.graphs_digest(open_graphs(name, 64)) for name in ("toy", "toy", "toy-words", "toy-combinations")
    ]
    assert endless[0] == endless[1] and len(set(endless)) == 3
    settings = {"steps": 2, "graphs": digest("dog")}
    for _ in range(2):
        pictures.check_settings(tmp_path / "out", settings)
    for name, value in (("steps", 3), ("graphs", digest("car"))):
        with pytest.raises(ValueError, match=f"holds pictures with {name} {settings[name]}, not {value}"):
            pictures.check_settings(tmp_path / "out", {**settings, name: value})
