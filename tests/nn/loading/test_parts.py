"""Models of the wrong kind and models with parts missing are refused at the door, each in one line that names the file.

Every folder is made here; the wrong ones are those that people have: inpainting and SDXL UNets, variants, pickles.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support import sd_folder
from support.sd_folder import write_pipeline

from sgg_fast.config import SETTINGS, ConfigError
from sgg_fast.drawing import SHIPPED
from sgg_fast.drawing.models import load_model
from sgg_fast.nn import loading
from sgg_fast.nn.conditioners import CHOICES
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.nn.loading.__main__ import main as command
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import WEIGHTS, toy_foundation
from sgg_fast.train.assemble import read_conditioner
from sgg_fast.train.memory.blank import blank_foundation


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("made")
    write_pipeline(base)
    return base


@pytest.fixture
def base(made, tmp_path) -> Path:
    """A copy to spoil: sd, clip, pipeline (without its manifest, as other people's folders are)."""
    shutil.copytree(made, tmp_path / "base")
    (tmp_path / "base" / "pipeline" / loading.MANIFEST).unlink()
    return tmp_path / "base"


def from_base(base: Path) -> None:
    load_foundation(str(base / "sd"), str(base / "clip"))


def from_pipeline(base: Path) -> None:
    load_model(str(base / "pipeline"))


def refused(load: Callable[[Path], Any], base: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(base)
    said = str(caught.value)
    assert "\n" not in said and said.isprintable()
    return said


def change(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file; ... takes one away."""
    content = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def spoil(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


PARTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "graph_clip": "model", "graph_encoder": "diffusion_pytorch_model",
}  # fmt: skip


def test_the_whole_folders_load(base):
    from_base(base)
    from_pipeline(base)


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


def test_a_tensor_of_another_shape_or_type_is_named(base):
    path = base / "pipeline" / "text_encoder" / "model.safetensors"
    first = sorted(load_file(path))[0]
    whole = path.read_bytes()
    spoil(path, lambda state: {**state, first: torch.zeros(3)})
    assert f"text_encoder/model.safetensors: {first} has the shape [3]" in refused(from_pipeline, base)
    path.write_bytes(whole)
    spoil(path, lambda state: {**state, first: state[first].to(torch.int16)})
    assert f"text_encoder/model.safetensors: {first} is stored as I16" in refused(from_pipeline, base)


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


@pytest.mark.parametrize("file", [
    "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
    "graph_encoder/config.json", "graph_clip/config.json", "model_index.json", "tokenizer/tokenizer.json",
    "graph_tokenizer/tokenizer_config.json",
])  # fmt: skip
@pytest.mark.parametrize("content", ["{}", "[]", "[" * 50_000, '{"a": 1', "\ufeffnull"])
def test_a_configuration_that_says_nothing_or_is_damaged_is_named(base, file, content):
    (base / "pipeline" / file).write_text(content, encoding="utf-8")
    if (file, content) == ("graph_tokenizer/tokenizer_config.json", "{}"):
        from_pipeline(base)  # all of it has defaults
        return
    said = refused(from_pipeline, base)
    assert f"cannot be loaded: {file}: " in said, said


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"unet": []}, r"unet must be [library, class], not a list"),
        ({"unet": ["diffusers", 3]}, r"unet must be [library, class], not a list"),
        ({"graph_encoder": ...}, r"graph_encoder must be [library, class]"),
        ({"_class_name": "StableDiffusionPipeline"}, "_class_name is 'StableDiffusionPipeline'"),
        ({"resolution": "64"}, "resolution must be a whole number from 1 to 4096, not '64'"),
        ({"resolution": True}, "resolution must be a whole number from 1 to 4096, not True"),
        ({"sampling_steps": 0}, "sampling_steps must be"),
        ({"guidance": None}, "guidance must be a number from 1 (none) to 10000, not None"),
        ({"provenance": []}, "provenance must be null or an object"),
        ({"force_zeros_for_empty_prompt": 1}, "force_zeros_for_empty_prompt must be true or false, not 1"),
        ({"provenance": {"settings": 3}}, "provenance must be null or an object"),
    ],
)
def test_our_own_keys_have_types(base, keys, reason):
    change(base / "pipeline" / "model_index.json", **keys)
    assert f"cannot be loaded: model_index.json: {reason}" in refused(from_pipeline, base)


def test_a_graph_encoder_of_unknown_form_or_for_other_models_is_refused(base):
    assert {**CHOICES, "text_form": CHOICES["form"]}.items() >= {
        (name, SETTINGS[name].rules.choices) for name in ("encoder", "triple", "context", "token_init", "text_form")
    }
    path = base / "pipeline" / "graph_encoder" / "config.json"
    whole = path.read_text()
    change(path, triple="rolex")
    assert "graph_encoder/config.json: triple must be one of roles, shared, not 'rolex'" in refused(from_pipeline, base)
    path.write_text(whole)
    change(path, trained_names=["a", 3])
    assert "graph_encoder/config.json: trained_names must be a list of strings" in refused(from_pipeline, base)
    path.write_text(whole)
    change(base / "pipeline" / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    assert "graph_encoder reads SD's text states" in refused(from_pipeline, base)


def test_a_setting_that_no_library_knows_is_not_left_out_silently(base, caplog):
    change(base / "sd" / "unet" / "config.json", attention_head_dim=..., attention_head_dil=8)
    from_base(base)
    assert "unet/config.json: attention_head_dil: no setting that this version knows; left out" in caplog.text


@pytest.mark.parametrize("form", ["fp16", "bin"])
def test_variants_and_pickles_are_refused_with_the_command_that_converts_them(base, form, capsys):
    path = base / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_foundation(str(base / "sd"), str(base / "clip")).unet.state_dict()
    if form == "fp16":
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    else:
        torch.save(load_file(path), path.with_name("diffusion_pytorch_model.bin"))
        path.unlink()
    said = refused(from_base, base)
    assert f"unet/diffusion_pytorch_model.{'fp16.safetensors' if form == 'fp16' else 'bin'}: only " in said
    words = said.split("`")[1].split()
    assert words[:4] == ["python", "-m", "sgg_fast.nn.loading", "convert"]
    assert command(words[3:]) == 0
    after = load_foundation(str(base / "sd"), str(base / "clip")).unet.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    capsys.readouterr()
    assert command(words[3:]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_first_schedule_of_stable_diffusion_is_read_as_pndm_and_its_pipeline_meant_it(base):
    path = base / "sd" / "scheduler" / "scheduler_config.json"
    change(path, steps_offset=..., set_alpha_to_one=...)
    found = load_foundation(str(base / "sd"), str(base / "clip")).scheduler
    assert isinstance(found, DDIMScheduler)
    assert (found.config.set_alpha_to_one, found.config.steps_offset, found.config.clip_sample) == (False, 1, False)
    assert PNDMScheduler().config.set_alpha_to_one is False, "PNDM's own default"
    change(path, set_alpha_to_one=True, steps_offset=0)
    found = load_foundation(str(base / "sd"), str(base / "clip")).scheduler.config
    assert (found.set_alpha_to_one, found.steps_offset) == (True, 0), "what the file says stays"
    FlowMatchEulerDiscreteScheduler().save_pretrained(path.parent)
    assert "scheduler/scheduler_config.json: _class_name is 'FlowMatchEuler" in refused(from_base, base)


def test_a_tokenizer_takes_the_towers_length_and_must_fit_it(base):
    folder = base / "clip"
    change(folder / "tokenizer_config.json", model_max_length=...)
    assert load_foundation(str(base / "sd"), str(base / "clip")).clip_tokenizer.model_max_length == 77
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "zzz": len(vocab) + 5}))
    assert "vocab.json: has ids up to" in refused(from_base, base)
    (folder / "vocab.json").write_text(json.dumps({**vocab, "a": 7, "b": 7}))
    assert "vocab.json: two of its tokens have one id" in refused(from_base, base)


def test_planning_reads_configurations_by_the_same_door(base):
    small = recipe("vg256", model=str(base / "sd"), clip=str(base / "clip"), data=str(base))
    assert blank_foundation(small.model).unet.config.cross_attention_dim == sd_folder.CONTEXT
    change(base / "sd" / "unet" / "config.json", in_channels=9)
    with pytest.raises(ConfigError, match=r"--model .*unet/config\.json: a UNet of 9 input"):
        blank_foundation(small.model)


def test_a_shard_outside_the_folder_is_not_followed(base):
    folder = base / "sd" / "unet"
    UNet2DConditionModel.from_config(json.loads((folder / "config.json").read_text())).save_pretrained(
        folder, max_shard_size="100KB"
    )
    (folder / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    from_base(base)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={**shards, "conv_in.bias": "../vae/diffusion_pytorch_model.safetensors"})
    assert "unet/diffusion_pytorch_model.safetensors.index.json: a shard must be" in refused(from_base, base)
    change(index, weight_map={**shards, "conv_in.bias": "gone.safetensors"})
    assert "gone.safetensors is not there" in refused(from_base, base)


def test_what_ships_is_sealed_and_holds(tmp_path):
    for folder in (SHIPPED, WEIGHTS):
        assert (folder / loading.MANIFEST).is_file()
        loading.check(folder)
    copy = tmp_path / "weights"
    shutil.copytree(WEIGHTS, copy)
    (path,) = copy.glob("unet.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"unet\.safetensors: its bytes are not those"):
        toy_foundation(weights=copy)
