"""What diffusers' users call on any pipeline: each method works here, or refuses in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
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


def test_vae_slicing_decodes_one_picture_at_a_time(pipeline, plain, monkeypatch):
    sizes, decoder = [], pipeline.vae.decoder.forward
    monkeypatch.setattr(pipeline.vae.decoder, "forward", lambda z, *more: sizes.append(len(z)) or decoder(z, *more))
    pipeline.enable_vae_slicing()
    np.testing.assert_allclose(draw(pipeline), plain, atol=1e-4)
    pipeline.disable_vae_slicing()
    np.testing.assert_allclose(draw(pipeline), plain, atol=1e-6)
    assert sizes == [1, 1, 2]


def test_vae_tiling_decodes_large_pictures_in_tiles(pipeline, monkeypatch):
    sizes, decoder = [], pipeline.vae.decoder.forward
    monkeypatch.setattr(
        pipeline.vae.decoder, "forward", lambda z, *more: sizes.append(tuple(z.shape[2:])) or decoder(z, *more)
    )
    whole = draw(pipeline, resolution=96)
    pipeline.enable_vae_tiling()
    tiled = draw(pipeline, resolution=96)
    pipeline.disable_vae_tiling()
    assert sizes[0] == (24, 24) and len(sizes) > 3 and max(max(size) for size in sizes[1:]) <= 16
    assert tiled.shape == whole.shape and not np.array_equal(draw(pipeline, resolution=96), tiled)
    assert np.abs(tiled - whole).mean() < 0.1, "but for the seams"


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


def test_sequential_cpu_offload_names_what_works(pipeline, plain):
    with pytest.raises(ValueError, match=r"use enable_model_cpu_offload\(\)$") as error:
        pipeline.enable_sequential_cpu_offload()
    one_line(error)
    assert np.array_equal(draw(pipeline), plain)


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


class Zero(PipelineCallback):
    """Sets the latents to zero after the last step."""

    tensor_inputs = ["latents", "pred_x0"]  # noqa: RUF012 - diffusers' form

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert set(callback_kwargs) == {"latents", "pred_x0"}
        return {"latents": 0 * callback_kwargs["latents"]} if step_index == 2 else callback_kwargs


def test_diffusers_own_callbacks(pipeline):
    latents = draw(pipeline, output_type="latent", callback_on_step_end=Zero())
    assert torch.equal(latents, torch.zeros_like(latents))
    with pytest.raises(ValueError, match=r"prompt_embeds.*only") as error:  # there is no text to cut off here
        draw(pipeline, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
    one_line(error)


def test_lora_weights_of_other_trainers(pipeline, plain, tmp_path, caplog):
    """kohya's names, with an alpha and adapters of a text encoder: the UNet's are used, the others are named."""
    generator, prefix = torch.Generator().manual_seed(0), "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    layer = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    state = {}
    for name, (rows, columns) in ((f"lora_unet_{prefix}", layer.weight.shape), (text, (128, 128))):
        state[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    change = state[f"lora_unet_{prefix}.lora_up.weight"] @ state[f"lora_unet_{prefix}.lora_down.weight"] * 1.0 / 2
    before = layer.weight.detach().clone()
    pipeline.load_lora_weights(state)
    assert "are not the UNet's and are left out" in caplog.text
    adapted = draw(pipeline)
    pipeline.unload_lora_weights()
    assert np.array_equal(draw(pipeline), plain)
    with torch.no_grad():
        pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.copy_(before + change)
    np.testing.assert_allclose(draw(pipeline), adapted, atol=1e-3)
    assert np.abs(adapted - plain).max() > 0.01


@pytest.mark.parametrize("source", ["absent", {}, {"unet.x.lora_A.weight": torch.zeros(1, 1)}])
def test_lora_weights_that_do_not_fit_are_one_line(pipeline, plain, tmp_path, source):
    with pytest.raises(ModelError, match="its adapters cannot be loaded") as error:
        pipeline.load_lora_weights(str(tmp_path / source) if source == "absent" else source)
    one_line(error)
    assert np.array_equal(draw(pipeline), plain)
