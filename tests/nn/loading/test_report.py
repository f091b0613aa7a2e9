"""The load report: a model with a tensor that was not in its file, or in another shape, is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.nn.folders import from_base, from_pipeline, refused, spoil

from sgg_fast.config import ConfigError
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.nn.loading import ModelError, loaded
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import recipe
from sgg_fast.train.assemble import read_conditioner

PARTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "graph_clip": "model", "graph_encoder": "diffusion_pytorch_model",
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_is_missing_is_named_with_its_file(base, part):
    """It would be computed with, uninitialised."""
    file = f"{part}/{PARTS[part]}.safetensors"
    path = base / "pipeline" / file
    first = sorted(load_file(path))[0]
    spoil(path, lambda state: {key: value for key, value in state.items() if key != first})
    assert f"{file}: lacks the tensor " in refused(from_pipeline, base)
    for loader in (SceneGraphToImagePipeline.from_pretrained, lambda folder: load_foundation(str(folder), "")):
        if part != "graph_encoder" or loader == SceneGraphToImagePipeline.from_pretrained:
            assert f"{file}: lacks the tensor " in refused(loader, base / "pipeline")
    if part == "graph_encoder":
        with pytest.raises(ConfigError, match=r"not a graph encoder: diffusion_pytorch_model\.safetensors: lacks"):
            read_conditioner(base / "pipeline" / part, recipe("toy"))


def test_a_clip_with_one_tower_is_not_pre_trained_with(base):
    path = base / "clip" / "model.safetensors"
    spoil(path, lambda state: {key: value for key, value in state.items() if not key.startswith("vision")})
    assert "cannot be loaded: model.safetensors: lacks the tensor vision_model." in refused(from_base, base)


def test_tensors_beside_the_models_own_and_names_of_older_libraries_are_allowed(base):
    """`position_ids` and the prefix of CLIP's published files, the attention of Stable Diffusion's first VAE."""
    spoil(
        base / "sd" / "text_encoder" / "model.safetensors",
        lambda state: (
            {f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}
            | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        ),
    )
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(key: str) -> str:
        for new, word in old.items():
            key = key.replace(f"attentions.0.{new}", f"attentions.0.{word}")
        return key

    before = load_foundation(str(base / "sd"), str(base / "clip")).vae.state_dict()
    path = base / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    spoil(path, lambda state: {older(key): value for key, value in state.items()})
    assert any(".query." in key for key in load_file(path))
    after = load_foundation(str(base / "sd"), str(base / "clip")).vae.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_only_a_whole_model_passes():
    model = object()
    assert (
        loaded(model, {"missing_keys": [], "unexpected_keys": ["position_ids"]}) is model and loaded(model, {}) is model
    )


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"missing_keys": {"b", "a"}}, "lacks the tensor a and 1 more: get the file again"),
        (
            {"mismatched_keys": [("w", torch.Size([3]), (2, 1))]},
            "w has the shape [3], where config.json means [2, 1]: get the file again, or the config.json that belongs "
            "to it",
        ),
        ({"error_msgs": ["\n size mismatch for w\nand more"]}, "size mismatch for w"),
        ({"missing_keys": ["a"], "error_msgs": ["later"]}, "lacks the tensor a: get the file again"),
    ],
)
def test_a_fault_of_the_report_is_one_line(info, reason):
    with pytest.raises(ModelError) as caught:
        loaded(object(), info)
    assert str(caught.value) == reason
