"""Models of other kinds than Stable Diffusion's are refused by their configurations alone, in one line."""

from __future__ import annotations

import json
import shutil

import pytest
from support.nn.folders import change, from_base, refused
from support.sd_folder import CONTEXT, KINDS, POOLED

from sgg_fast.nn.foundation import load_foundation
from sgg_fast.nn.loading import ModelError
from sgg_fast.nn.loading import kinds as kind_checks
from sgg_fast.train.memory.sizes import PUBLISHED


@pytest.mark.parametrize(
    ("file", "keys", "reason"),
    [
        ("unet/config.json", {"in_channels": 9}, "a UNet of 9 input and 4 output channels"),
        (
            "unet/config.json",
            {"addition_embed_type": "text_time"},
            "projection_class_embeddings_input_dim must be a whole number",
        ),
        ("unet/config.json", {"class_embed_type": "timestep"}, "a UNet with a further condition"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "_class_name is 'UNet3DConditionModel'"),
        ("unet/config.json", {"in_channels": "4"}, "in_channels must be a whole number"),
        ("unet/config.json", {"cross_attention_dim": 32}, None),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000, but the weights have 686"),
        ("vae/config.json", {"latent_channels": 16}, "unet reads 4 channels, but the latents of vae have 16"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor must be a positive number"),
        ("vae/config.json", {"shift_factor": 0.1}, "a VAE with shift_factor"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type is 't5'; needed is clip_text_model"),
        ("text_encoder/config.json", {"max_position_embeddings": 64}, "a text tower of 64 tokens"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is"),
        ("scheduler/scheduler_config.json", {"_class_name": ["evil", "Evil"]}, "_class_name is a list"),
        ("scheduler/scheduler_config.json", {"beta_end": 9.0}, "its betas give no alpha_bar"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}, "num_train_timesteps must be"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, None),
    ],
)
def test_what_is_of_another_kind_is_refused_by_its_configuration(base, file, keys, reason):
    change(base / "sd" / file, **keys)
    said = refused(from_base, base)
    assert said.startswith(f"--model {base / 'sd'}: cannot be loaded: ")
    assert (reason or "") in said and (file in said or (reason and reason.startswith("unet reads")) or not reason)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"addition_time_embed_dim": 20}, "which leaves no text beside 6 sizes of width 20"),
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim must be a whole number from 1"),
        ({"addition_embed_type": "image"}, "a UNet with a further condition (addition_embed_type is 'image')"),
        ({"cross_attention_dim": 99}, f"of width 99, but those of text_encoder and text_encoder_2 have {CONTEXT} + 32"),
        ({"projection_class_embeddings_input_dim": 50},
         f"a pooled text of width 2 beside 6 sizes, but text_encoder_2 projects to {POOLED}"),
    ],
)  # fmt: skip
def test_a_unet_of_another_kind_is_refused_in_one_line(kinds, tmp_path, keys, reason):
    model = tmp_path / "model"
    shutil.copytree(kinds / "sdxl", model)
    file = model / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    with pytest.raises(ModelError) as caught:
        load_foundation(str(model), str(kinds / "clip"))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_kinds_pass(name):
    """By the sizes of the published configurations, without a file."""
    sizes = PUBLISHED[name]
    kind_checks.check_unet(sizes.unet)
    for text in sizes.texts:
        kind_checks.check_text_tower({"max_position_embeddings": 77, **text})
    kind_checks.check_fit(sizes.unet, {"latent_channels": 4}, sizes.texts)
    kind_checks.check_fit(sizes.unet, {}, [])
    kind_checks.check_scheduler(dict(KINDS["sd14" if name == "sd" else name].scheduler.config))


def test_a_class_must_be_named_and_be_one_of_those_that_fit():
    kind_checks.check_class({"_class_name": "B"}, "_class_name", ("A", "B"))
    for config, reason in (({}, "does not say kind; needed is A or B"), ({"kind": 3}, "kind is 3; needed is A or B")):
        with pytest.raises(ModelError, match=f"^{reason}$"):
            kind_checks.check_class(config, "kind", ("A", "B"))


@pytest.mark.parametrize("key", ["shift_factor", "latents_mean", "latents_std"])
def test_latents_are_scaled_by_one_number(key):
    kind_checks.check_vae({"scaling_factor": 0.5, key: None})
    with pytest.raises(ModelError, match=f"a VAE with {key}"):
        kind_checks.check_vae({key: 0.1})
    for factor in (0, -1.0, float("inf"), float("nan"), True):
        with pytest.raises(ModelError, match="scaling_factor must be a positive number"):
            kind_checks.check_vae({"scaling_factor": factor})


def test_more_layers_than_tensors_are_refused_wherever_they_are_named():
    """Before a library builds a billion layers of a small file."""
    kind_checks.check_depth({"num_layers": 7, "layers_per_block": [2, 7], "hidden_size": 999}, 7)
    for config in ({"num_layers": 8}, {"layers_per_block": (1, 8)}, {"text_config": {"num_hidden_layers": 8}}):
        with pytest.raises(ModelError, match=r"layers.* is .*, but the weights have 7 tensors$"):
            kind_checks.check_depth(config, 7)
