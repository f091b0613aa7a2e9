"""What diffusers' users call on any pipeline: each method works here, or refuses in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor

from sgg_fast.graph import SceneGraph
from sgg_fast.nn import lora
from sgg_fast.nn.loading import ModelError
from sgg_fast.pipeline import SceneGraphToImagePipeline

SHEEP = SceneGraph(("sheep", "grass"), ((0, "standing on", 1),))


def draw(pipeline, **settings) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "np", **settings}
    return pipeline([SHEEP, SHEEP], generator=[torch.Generator().manual_seed(i) for i in range(2)], **settings).images


@pytest.fixture(scope="module")
def folder(trained_run):
    return trained_run / "finetune" / "pipeline"


@pytest.fixture(scope="module")
def plain(folder):
    return draw(SceneGraphToImagePipeline.from_pretrained(folder))


@pytest.fixture
def pipeline(folder):
    return SceneGraphToImagePipeline.from_pretrained(folder)


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("fused", ["off", "on"])
def test_attention_slicing(pipeline, plain, fused):
    pipeline.fuse_unet = fused
    pipeline.enable_attention_slicing()
    assert {type(processor) for processor in pipeline.unet.attn_processors.values()} == {SlicedAttnProcessor}
    np.testing.assert_allclose(draw(pipeline), plain, atol=1e-3)
    pipeline.disable_attention_slicing()
    assert SlicedAttnProcessor not in {type(processor) for processor in pipeline.unet.attn_processors.values()}


def test_model_cpu_offload(pipeline, plain):
    """With the CPU as the device to compute on: every model is moved by a hook, and the picture is the same."""
    pipeline.enable_model_cpu_offload(device="cpu")
    hooked = {name for name, part in pipeline.components.items() if hasattr(part, "_hf_hook")}
    assert hooked == {"text_encoder", "graph_clip", "graph_encoder", "unet", "vae"}
    for _ in range(2):  # weights that were moved lie at other addresses, where a CPU may round otherwise
        np.testing.assert_allclose(draw(pipeline), plain, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to offload from")
def test_model_cpu_offload_without_a_device(pipeline):
    with pytest.raises(RuntimeError, match="requires accelerator") as error:
        pipeline.enable_model_cpu_offload()
    one_line(error)


@pytest.mark.gpu
def test_model_cpu_offload_on_a_gpu(pipeline, plain):
    pipeline.enable_model_cpu_offload()
    assert {part.device.type for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {"cpu"}
    np.testing.assert_allclose(draw(pipeline), plain, atol=0.05)
    assert pipeline.unet.device.type == "cpu", "it went back"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_dtype(folder, plain, dtype):
    pipeline = SceneGraphToImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.graph_encoder, pipeline.graph_clip)
    assert {part.dtype for part in parts} == {dtype}
    found = draw(pipeline)
    assert not np.array_equal(found, plain) and np.abs(found - plain).mean() < 0.02


def test_a_step_with_adapters_of_another_type_is_captured_under_autocast(pipeline, plain, monkeypatch):
    captured, denoiser = [], pipeline._captured.denoiser
    monkeypatch.setattr(
        pipeline._captured,
        "denoiser",
        lambda *args: captured.append(torch.is_autocast_enabled("cpu")) or denoiser(*args),
    )
    lora.add_adapters(pipeline.unet, 2, "attention")
    lora.store_frozen(lora.train(pipeline.unet), torch.bfloat16)
    assert np.abs(draw(pipeline) - plain).mean() < 0.02 and captured == [True]


def test_a_variant_is_saved_and_loaded(pipeline, plain, folder, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert np.array_equal(draw(SceneGraphToImagePipeline.from_pretrained(tmp_path, variant="fp16")), plain)
    with pytest.raises(ModelError, match="variant=fp16") as error:
        SceneGraphToImagePipeline.from_pretrained(folder, variant="fp16")
    assert str(folder) in one_line(error)
    with pytest.raises(ModelError, match="only weights of a variant") as error:
        SceneGraphToImagePipeline.from_pretrained(tmp_path)
    one_line(error)
