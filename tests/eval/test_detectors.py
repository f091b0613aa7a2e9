"""The detectors: the toy's own, one for any names, and which of them is chosen for a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgg_fast.commands import NotFiniteError
from sgg_fast.eval.detector import overlaps
from sgg_fast.eval.detectors import OpenVocabularyDetector, choose_detector, open_detector
from sgg_fast.graph import SceneGraph
from sgg_fast.toy import world


def test_an_open_vocabulary_detector_looks_for_the_graphs_own_names(owl):
    detector = OpenVocabularyDetector(str(owl), threshold=0.0, same=0.5)
    image = world.draw_scene(0, 0).image
    graph = SceneGraph(("red hat", "dog", "dog"), ((1, "left of", 2),))
    (found,) = detector.find(image[None], [graph])
    assert {instance.category for instance in found} == {"red hat", "dog"}
    assert detector.parse("red hat") == ("red hat", None)
    for instance in found:
        assert instance.box.shape == (4,)
        assert (instance.box >= 0).all() and (instance.box <= 1).all()
    for name in ("red hat", "dog"):
        boxes = np.stack([i.box for i in found if i.category == name])
        shared = overlaps(boxes, boxes) - np.eye(len(boxes))
        assert shared.max(initial=0.0) <= 0.5
        scores = [i.confidence for i in found if i.category == name]
        assert scores == sorted(scores, reverse=True)
    # Another name's presence changes nothing of a name's own scores.
    (alone,) = detector.find(image[None], [SceneGraph(("dog",))])
    np.testing.assert_allclose(
        [i.confidence for i in alone], [i.confidence for i in found if i.category == "dog"], atol=1e-5
    )
    none = OpenVocabularyDetector(str(owl), threshold=1.1)
    assert none.find(image[None], [graph]) == [[]]


def test_a_detector_that_gives_nan_is_no_picture_without_objects(owl):
    detector = OpenVocabularyDetector(str(owl), threshold=0.0)
    with torch.no_grad():
        detector.model.box_head.dense0.bias[0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"--detector: .* gives numbers that are not finite: get the model again"):
        detector.find(world.draw_scene(0, 0).image[None], [SceneGraph(("dog",))])


def test_another_kind_of_model_is_no_detector(tmp_path):
    from sgg_fast.toy.models import toy_clip, toy_tokenizer

    toy_clip(toy_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"it is a clip; OWL-ViT and OWLv2 are supported"):
        open_detector(str(tmp_path))


@pytest.mark.parametrize("which", ["toy", "toy-words"])
def test_the_toys_detectors_find_what_the_graph_names(which):
    detector = open_detector(which)
    scenes = [world.draw_scene(77, i, spoken=which == "toy-words") for i in range(6)]
    asked, there = [], []
    found = detector.find(np.stack([scene.image for scene in scenes]), [scene.graph for scene in scenes])
    for scene, instances in zip(scenes, found, strict=True):
        asked += [detector.parse(name)[0] for name in scene.graph.objects]
        there += [instance.category for instance in instances]
    shared = sum(min(asked.count(name), there.count(name)) for name in set(asked))
    assert detector.name == f"{which} detector" and shared >= 0.9 * max(len(asked), len(there))
    assert detector.parse("red hat") == ("hat", "red") and detector.parse("dog") == ("dog", None)


def test_the_toys_detector_is_chosen_only_for_names_it_knows():
    known, alien = SceneGraph(("red hat", "dog")), SceneGraph(("zebra", "pink hat", "big red hat"))
    assert choose_detector(None, [known]) == choose_detector("toy", [known]) == ("toy", "")
    with pytest.raises(ValueError, match=r"3 of 5 objects .* \('zebra', 'pink hat', 'big red hat'\).*or none to leave"):
        choose_detector(None, [known, alien])
    chosen, warning = choose_detector("toy", [known, alien])
    assert chosen == "toy" and warning.startswith("--detector toy: 3 of 5 objects")
    with pytest.raises(ValueError, match="3 of 3 objects"):
        choose_detector("toy", [alien])
    assert choose_detector("./owl", [alien]) == ("./owl", "")
    assert choose_detector("none", [alien]) == ("none", "") and open_detector("none") is None
