"""The base models: what a folder gives, what it lacks, and the parts by the names of a pipeline."""

from __future__ import annotations

import shutil

import pytest
import torch
from support import sd_folder
from support.nn.folders import change

from sgg_fast.config import ConfigError
from sgg_fast.data.cache import fingerprint
from sgg_fast.drawing import SHIPPED
from sgg_fast.nn.foundation import _forces_zeros, load_clip, load_foundation, load_sd_configs, load_sd_parts
from sgg_fast.nn.loading import ModelError
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.memory.blank import blank_foundation


def test_it_is_loaded_as_published(made):
    foundation = load_foundation(str(made / "sd"), str(made / "clip"))
    ids = foundation.tokenizer("red sheep", padding="max_length").input_ids
    assert len(ids) == 77 and ids[0] == foundation.tokenizer.bos_token_id
    assert ids.count(foundation.tokenizer.eos_token_id) == 77 - 3
    scheduler = foundation.scheduler.config
    assert (scheduler.clip_sample, scheduler.set_alpha_to_one, scheduler.steps_offset) == (False, False, 1)
    assert (scheduler.prediction_type, scheduler.beta_schedule) == ("epsilon", "scaled_linear")
    assert foundation.vae.config.scaling_factor == 0.18215
    assert not any(p.requires_grad for m in (foundation.unet, foundation.vae, foundation.clip) for p in m.parameters())


def test_the_models_that_ship_in_half_precision_are_the_ones_that_a_cache_knows():
    """As --model they are those that prepared caches were made by without one: by fingerprint, so in fp32 too."""
    shipped, toy = load_foundation(str(SHIPPED), ""), toy_foundation(wide=True)
    for part in ("vae", "clip", "text_encoder"):
        assert fingerprint(getattr(shipped, part)) == fingerprint(getattr(toy, part)), part
    parts = (shipped.unet, shipped.vae, shipped.clip, shipped.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("text_encoder_2", "the folder lacks text_encoder_2/config.json"),
        ("tokenizer_2", "the folder lacks tokenizer_2/tokenizer.json"),
    ],
)
def test_sdxl_without_its_second_text_encoder_is_refused(kinds, tmp_path, lost, reason):
    model = tmp_path / "model"
    shutil.copytree(kinds / "sdxl", model)
    shutil.rmtree(model / lost)
    with pytest.raises(ModelError, match=reason):
        load_foundation(str(model), str(kinds / "clip"))


def test_planning_reads_configurations_by_the_same_door(base):
    small = recipe("vg256", model=str(base / "sd"), clip=str(base / "clip"), data=str(base))
    assert blank_foundation(small.model).unet.config.cross_attention_dim == sd_folder.CONTEXT
    change(base / "sd" / "unet" / "config.json", in_channels=9)
    with pytest.raises(ConfigError, match=r"--model .*unet/config\.json: a UNet of 9 input"):
        blank_foundation(small.model)


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_parts_have_their_names_in_a_pipeline_and_latents_their_width(foundations, kind):
    models = foundations[kind]
    two = ("_2",) if kind == "sdxl" else ()
    texts = {f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", *two)}
    assert models.pipeline_parts().keys() == {"unet", "vae", "scheduler", "graph_clip", "graph_tokenizer", *texts}
    assert all(part is not None for part in models.pipeline_parts().values())
    latents = models.vae.encode(torch.zeros(1, 3, 64, 32)).latent_dist.mean
    assert latents.shape[2:] == (64 // models.latent_factor, 32 // models.latent_factor)
    assert models.towers.encoders == models.text_encoders and len(models.towers.tokenizers) == len(models.text_encoders)
    assert models.backbone.name == {"sd21": "Stable Diffusion v2", "sdxl": "SDXL"}[kind]


def test_the_empty_text_is_zeros_as_the_index_says_and_by_default(kinds, foundations, tmp_path):
    """SDXL alone has the entry; the text encoders of others give the empty text's states."""
    index = tmp_path / "model_index.json"
    shutil.copy(kinds / "sdxl" / "model_index.json", index)
    for entry, zeros in ((False, False), (True, True), (..., True)):
        change(index, force_zeros_for_empty_prompt=entry)
        assert _forces_zeros(tmp_path) == zeros
    change(index, force_zeros_for_empty_prompt="no")
    with pytest.raises(ModelError, match=r"^model_index\.json: force_zeros_for_empty_prompt must be true or false"):
        _forces_zeros(tmp_path)
    index.unlink()
    assert _forces_zeros(tmp_path)
    assert foundations["sdxl"].empty_is_zero and not foundations["sd21"].empty_is_zero


def test_a_folder_is_read_without_its_text_side_where_nobody_reads_text(base):
    shutil.rmtree(base / "sd" / "text_encoder")
    with pytest.raises(ModelError, match=r"^the folder lacks text_encoder/config\.json$"):
        load_sd_configs(base / "sd")
    unet, vae, texts = load_sd_configs(base / "sd", with_text=False)
    assert (unet["_class_name"], vae["_class_name"], texts) == ("UNet2DConditionModel", "AutoencoderKL", [])
    assert load_sd_parts(base / "sd", with_text=False).keys() == {"unet", "vae"}


def test_clip_lies_in_a_folder_of_its_own_or_in_an_exported_pipeline(made):
    alone, within = load_clip(made / "clip", "", ""), load_clip(made / "pipeline", "graph_clip", "graph_tokenizer")
    assert alone.keys() == within.keys() == {"clip", "clip_tokenizer"}
    assert fingerprint(alone["clip"]) == fingerprint(within["clip"])
    assert alone["clip_tokenizer"].get_vocab() == within["clip_tokenizer"].get_vocab()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("sd", ""), "--model {base}/sd has no CLIP for names and images: give --clip"),
        (("sd", "vae"), "--clip {base}/vae: there is no such folder"),
        (("clip", "clip"), "--model {base}/clip: the folder lacks unet/config.json; it must be in diffusers format"),
        (("sd", "sd/vae"), "--clip {base}/sd/vae: the folder lacks tokenizer.json"),
    ],
)
def test_a_place_that_does_not_fit_its_flag_is_named_with_it(made, flags, reason):
    model, clip = (str(made / flag) if flag else "" for flag in flags)
    with pytest.raises(ModelError) as caught:
        load_foundation(model, clip)
    assert str(caught.value).startswith(reason.format(base=made)) and "\n" not in str(caught.value)
