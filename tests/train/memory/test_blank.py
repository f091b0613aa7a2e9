"""Random models and sets for plans: shapes and types of the real ones, widths of a folder, the largest graphs."""

from __future__ import annotations

import json

import pytest
import torch
from support.memory_child import write_sizes
from support.tiny_runs import TINY

from sgg_fast.config import ConfigError
from sgg_fast.data.cache import build_cache
from sgg_fast.data.sources import open_source
from sgg_fast.graph import NameTable, SceneGraphBatch
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.assemble import new_conditioner
from sgg_fast.train.memory.blank import (
    LARGEST_GRAPH,
    blank_cache,
    blank_conditioner,
    blank_foundation,
    largest_graph,
)

PARTS = ("unet", "vae", "text_encoder", "clip")


def forms(module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}


def test_the_toys_blank_run_has_the_forms_of_a_real_one():
    """Models, graph encoder and each table of the set, per image or per word."""
    config = recipe("toy", **{**TINY, "num_scenes": 2})
    real, blank = toy_foundation(weights=None), blank_foundation(config.model)
    for part in PARTS:
        assert forms(getattr(blank, part)) == forms(getattr(real, part)), part
        assert not any(p.requires_grad for p in getattr(blank, part).parameters()), part
    source = open_source(config.data, config.run.seed)
    cache = build_cache(source, real, torch.device("cpu"), True, with_phrases=True, with_boxes=True, progress=False)
    made = blank_cache(config, blank, 2)
    for name in ("names", "images", "moments", "phrases", "boxes"):
        found, expected = getattr(made, name), getattr(cache, name)
        assert (found.shape[1:], found.dtype) == (expected.shape[1:], expected.dtype), name
    assert len(made.images) == len(made.moments) == 2 and len(made.boxes) == made.graphs.num_objects
    assert len(made.names) == len(made.table) and made.sizes is None
    trained = new_conditioner(config.model, 0, real, cache)
    assert forms(blank_conditioner(config.model, blank)) == forms(trained)


def test_the_largest_graph_is_one_and_no_kept_graph_is_larger():
    graph = largest_graph()
    assert (len(graph.objects), len(graph.relations)) == LARGEST_GRAPH == (30, 30)
    packed = SceneGraphBatch.from_graphs([graph], NameTable())
    assert packed.sizes.tolist() == [[31, 60]], "with the image node and its relation to each object"


def test_models_of_a_folder_have_its_widths_and_need_no_weights(tmp_path):
    folder = write_sizes(tmp_path / "sd", (32, 64, 64, 64))
    model = recipe("vg128", model=str(folder)).model
    blank = blank_foundation(model)
    assert blank.source == str(folder)
    assert tuple(blank.unet.config.block_out_channels) == (32, 64, 64, 64)
    assert blank.text_encoder.config.hidden_size == 256 and blank.clip.config.projection_dim == 128
    (folder / "graph_clip" / "config.json").rename(tmp_path / "config.json")
    (folder / "graph_clip").rmdir()
    assert blank_foundation(model).clip.config.projection_dim == 512, "the default of CLIP"
    other = tmp_path / "clip"
    other.mkdir()
    sizes = json.loads((tmp_path / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**sizes, "projection_dim": 48}))
    with_clip = recipe("vg128", model=str(folder), clip=str(other)).model
    assert blank_foundation(with_clip).clip.config.projection_dim == 48
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"--model {folder}: its configuration cannot be read") as caught:
        blank_foundation(model)
    assert "\n" not in str(caught.value)
