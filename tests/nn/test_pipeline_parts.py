"""A saved pipeline's folder: its keys, its parts together, and a folder of adapters on the base that it names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cases.conditioner import of_foundation
from support.nn.folders import change, from_pipeline, refused
from support.sd_folder import CLIP_WIDTH

from sgg_fast.config import SETTINGS
from sgg_fast.nn import loading, lora
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.conditioners import CHOICES
from sgg_fast.nn.loading import ModelError
from sgg_fast.nn.pipeline_parts import PARTS, check_fit, load_conditioner, load_pipeline_parts, named_base, read_index
from sgg_fast.pipeline import SceneGraphToImagePipeline


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


def test_an_encoder_of_another_kind_is_refused(foundations):
    parts = {**foundations["sdxl"].pipeline_parts(), "graph_encoder": of_foundation(foundations["sdxl"])}
    check_fit(parts)
    plain = SceneGraphConditioner(CLIP_WIDTH, CLIP_WIDTH, foundations["sdxl"].backbone.context_dim, 8, 1)
    with pytest.raises(ModelError, match="graph_encoder has pooled_dim 0"):
        check_fit({**parts, "graph_encoder": plain})
    with pytest.raises(ModelError, match="the folder has no text_encoder_2 and tokenizer_2"):
        check_fit({**parts, "text_encoder_2": None, "tokenizer_2": None})


def test_a_folder_gives_the_arguments_of_its_pipeline(made):
    found = load_pipeline_parts(made / "pipeline", {})
    assert (found.pop("resolution"), found.pop("sampling_steps"), found.pop("guidance")) == (64, 2, 3.0)
    assert found.pop("provenance") is None and found.pop("force_zeros_for_empty_prompt") is False
    assert found.keys() == set(PARTS) and [part for part in PARTS if found[part] is None] == [
        "text_encoder_2", "tokenizer_2",
    ]  # fmt: skip
    assert named_base(made / "pipeline") is None
    with pytest.raises(ModelError, match=r"^it has its own models, no base: leave out --base$"):
        load_pipeline_parts(made / "pipeline", {}, base=str(made / "sd"))


def test_given_parts_are_neither_loaded_nor_asked_for(base):
    own = load_conditioner(base / "pipeline", "graph_encoder")
    shutil.rmtree(base / "pipeline" / "graph_encoder")
    with pytest.raises(ModelError, match=r"^the folder lacks graph_encoder/config\.json$"):
        load_pipeline_parts(base / "pipeline", {})
    assert "graph_encoder" not in load_pipeline_parts(base / "pipeline", {"graph_encoder": own})
    wrong = SceneGraphConditioner(CLIP_WIDTH, CLIP_WIDTH, 99, 8, 1)
    with pytest.raises(ModelError, match=r"^graph_encoder has context_dim 99, but unet and graph_clip need"):
        load_pipeline_parts(base / "pipeline", {"graph_encoder": wrong})


@pytest.fixture(scope="module")
def run(made, tmp_path_factory) -> Path:
    """A sealed folder of adapters that are not 0, on `made`/sd and `made`/clip. Read only."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    pipeline = SceneGraphToImagePipeline.from_pretrained(made / "pipeline")
    lora.add_adapters(pipeline.unet, 2, "attention")
    for name, parameter in pipeline.unet.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    pipeline.save_lora(folder, {"model": str(made / "sd"), "clip": str(made / "clip")})
    return folder


@pytest.fixture
def adapters(run, tmp_path) -> Path:
    """A copy of `run` to change."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / loading.MANIFEST).unlink()
    return tmp_path / "run"


def has_adapters_of(folder: Path, unet: torch.nn.Module) -> bool:
    """Whether the adapters of `unet` are those of the file, by the values of their second matrices."""
    file = [tensor for name, tensor in load_file(folder / lora.WEIGHTS).items() if "lora_B" in name]
    own = [p for name, p in unet.named_parameters() if ".lora_B" in name]
    return len(own) == len(file) > 0 and all(any(torch.equal(p, tensor) for tensor in file) for p in own)


def test_a_folder_of_adapters_is_loaded_on_the_base_that_it_names(run, made):
    assert named_base(run) == {"model": str(made / "sd"), "clip": str(made / "clip")}
    found = load_pipeline_parts(run, {})
    assert has_adapters_of(run, found["unet"]) and found["resolution"] == 64


def test_a_base_that_moved_is_named_with_the_cure_which_cures(adapters, made):
    """The other place is an exported pipeline here, with a CLIP of its own."""
    change(adapters / "model_index.json", base={"model": "/moved/sd", "clip": "/moved/clip"})
    with pytest.raises(ModelError, match=r"^its base; --base gives another place: --model /moved/sd: there is no such"):
        load_pipeline_parts(adapters, {})
    assert has_adapters_of(adapters, load_pipeline_parts(adapters, {}, base=str(made / "pipeline"))["unet"])
    change(adapters / "model_index.json", base={"model": "", "clip": ""})
    with pytest.raises(ModelError, match=r"^its base is the toy's models"):
        load_pipeline_parts(adapters, {})


def test_an_index_has_defaults_and_a_base_of_two_texts(adapters):
    change(adapters / "model_index.json", resolution=..., text_encoder=..., guidance=...)
    found = read_index(adapters)
    assert (found["resolution"], found["guidance"], found["text_encoder"]) == (512, 7.5, [None, None])
    change(adapters / "model_index.json", base={"model": "x"})
    with pytest.raises(
        ModelError, match=r"^model_index\.json: base must be null or an object with the texts model and"
    ):
        read_index(adapters)
