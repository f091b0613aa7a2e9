"""One part of a folder: damaged and foreign configurations, weights, tokenizers and schedulers are one line each."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from support.nn.folders import change, from_base, from_pipeline, refused, spoil

from sgg_fast.drawing import SHIPPED
from sgg_fast.nn import loading
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.nn.loading import ModelError, parts
from sgg_fast.toy.models import WEIGHTS, toy_foundation


def test_the_whole_folders_load(base):
    from_base(base)
    from_pipeline(base)


def test_a_tensor_of_another_shape_or_type_is_named(base):
    path = base / "pipeline" / "text_encoder" / "model.safetensors"
    first = sorted(load_file(path))[0]
    whole = path.read_bytes()
    spoil(path, lambda state: {**state, first: torch.zeros(3)})
    assert f"text_encoder/model.safetensors: {first} has the shape [3]" in refused(from_pipeline, base)
    path.write_bytes(whole)
    spoil(path, lambda state: {**state, first: state[first].to(torch.int16)})
    assert f"text_encoder/model.safetensors: {first} is stored as I16" in refused(from_pipeline, base)


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


def test_a_setting_that_no_library_knows_is_not_left_out_silently(base, caplog):
    change(base / "sd" / "unet" / "config.json", attention_head_dim=..., attention_head_dil=8)
    from_base(base)
    assert "unet/config.json: attention_head_dil: no setting that this version knows; left out" in caplog.text


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


def test_settings_of_another_scheduler_do_not_stay_in_the_schedule_of_training(base, caplog):
    folder = base / "sd" / "scheduler"
    DPMSolverMultistepScheduler.from_config(PNDMScheduler.load_config(folder), solver_order=3).save_pretrained(folder)
    load_foundation(str(base / "sd"), str(base / "clip")).scheduler.save_pretrained(folder)
    written = json.loads((folder / "scheduler_config.json").read_text())
    assert written["_class_name"] == "DDIMScheduler" and "solver_order" not in written
    from_base(base)
    assert "no setting that this version knows" not in caplog.text


def test_a_tokenizer_takes_the_towers_length_and_must_fit_it(base):
    folder = base / "clip"
    change(folder / "tokenizer_config.json", model_max_length=...)
    assert load_foundation(str(base / "sd"), str(base / "clip")).clip_tokenizer.model_max_length == 77
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "zzz": len(vocab) + 5}))
    assert "vocab.json: has ids up to" in refused(from_base, base)
    (folder / "vocab.json").write_text(json.dumps({**vocab, "a": 7, "b": 7}))
    assert "vocab.json: two of its tokens have one id" in refused(from_base, base)


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


def test_a_place_is_a_folder_or_may_be_a_hub_id(tmp_path):
    for place in (str(tmp_path), "owner/name"):
        loading.check_place("--model", place)
    for place in ("absent", "/absent/folder", "./owner/name", "~/name", "a/b/c"):
        with pytest.raises(ModelError, match=f"^--model {place}: there is no such folder, and it is not a hub id"):
            loading.check_place("--model", place)


def test_of_a_hub_repository_only_what_loading_reads_is_fetched(made, tmp_path, monkeypatch):
    """The hub is not here: its own filter of names decides what it would send."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(made / "sd", hub)
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/x.non_ema.safetensors", "unet/x.bin", "x.ckpt",
                 "safety_checker/model.safetensors", "README.md"):  # fmt: skip
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_bytes(b"")

    def snapshot_download(place: str, **patterns: Any) -> str:
        assert place == "owner/name"
        names = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, **patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr(parts, "snapshot_download", snapshot_download)
    assert loading.find_folder("--model", str(hub), ("unet",)) == hub, "a folder is not fetched"
    folder = loading.find_folder("--model", "owner/name", ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    fetched = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert fetched == {path.relative_to(made / "sd").as_posix() for path in (made / "sd").rglob("*") if path.is_file()}
    load_foundation(str(folder), str(made / "clip"))

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("offline\nand a traceback")

    monkeypatch.setattr(parts, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"^--clip a/b: no such folder, and as a hub id it cannot be loaded: offline$"):
        loading.find_folder("--clip", "a/b", ("",))


def test_the_first_missing_file_of_a_part_is_named_by_its_kind(made):
    root = made / "sd"
    assert loading.lacking_file(root, ("unet", "text_encoder", "tokenizer", "scheduler")) is None
    assert loading.lacking_file(root, ("unet", "text_encoder_2")) == "text_encoder_2/config.json"
    assert loading.lacking_file(root, ("tokenizer_2",)) == "tokenizer_2/tokenizer.json"
    assert loading.lacking(root / "unet", "scheduler") == "scheduler_config.json"
    assert loading.lacking(made / "clip", "tokenizer") is None, "vocab.json and merges.txt are the other form"


def test_the_name_of_a_parts_weights_is_that_of_its_library(made):
    names = {part: parts.weights_name(made / "sd" / part) for part in ("unet", "vae", "text_encoder")}
    assert all((made / "sd" / part / name).is_file() for part, name in names.items())
    assert set(names.values()) == {"diffusion_pytorch_model.safetensors", "model.safetensors"}


def test_weights_of_our_own_are_loaded_whole_in_fp32_or_refused_with_the_cure(tmp_path):
    path, module = tmp_path / "w.safetensors", torch.nn.Linear(3, 2)
    given = {"weight": torch.randn(2, 3).half(), "bias": torch.randn(2), "more": torch.zeros(1)}
    save_file(given, path)
    loading.load_weights(path, module, "make it again")
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, given["weight"].float()) and torch.equal(module.bias, given["bias"])
    for state, reason in (
        ({"weight": given["weight"]}, "lacks the tensor bias"),
        ({**given, "bias": torch.zeros(3)}, r"bias has the shape \[3\], where config.json means \[2\]"),
        ({**given, "bias": torch.zeros(2, dtype=torch.int64)}, "its header: bias is stored as I64"),
    ):
        save_file(state, path)
        with pytest.raises(ModelError, match=reason):
            loading.load_weights(path, module, "make it again")
    path.unlink()
    with pytest.raises(ModelError, match=r"w\.safetensors: is not there; make it again$"):
        loading.load_weights(path, module, "make it again")
