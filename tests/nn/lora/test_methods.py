"""The pipeline's LoRA methods: files of other trainers, folders of our runs, and the way back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sgg_fast.graph import SceneGraph
from sgg_fast.nn import lora
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.loading import ModelError
from sgg_fast.pipeline import SceneGraphToImagePipeline

SHEEP = SceneGraph(("sheep", "grass"), ((0, "standing on", 1),))


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipeline([SHEEP, SHEEP], num_inference_steps=3, output_type="np", generator=generators).images


@pytest.fixture
def pipeline(made):
    return SceneGraphToImagePipeline.from_pretrained(made / "pipeline")


@pytest.fixture(scope="module")
def plain(made):
    return draw(SceneGraphToImagePipeline.from_pretrained(made / "pipeline"))


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


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


def test_the_folder_of_a_run_brings_its_graph_encoder_which_stays(pipeline, plain, made, tmp_path):
    """Written with the name of its base; loaded into another pipeline, in its precision; unloaded again."""
    lora.add_adapters(pipeline.unet, 2, "attention")
    for name, parameter in pipeline.unet.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        pipeline.graph_encoder.f_relation.bias.add_(1)
    base = {"model": str(made / "sd"), "clip": str(made / "clip")}
    pipeline.save_lora(tmp_path / "run", base)
    index = json.loads((tmp_path / "run" / "model_index.json").read_text())
    assert index["base"] == base and index["resolution"] == 64
    tuned = draw(pipeline)
    assert np.abs(tuned - plain).max() > 0.01

    other = SceneGraphToImagePipeline.from_pretrained(made / "pipeline")
    other.fuse_unet = "on"
    np.testing.assert_allclose(draw(other), plain, atol=1e-3)
    other.load_lora_weights(str(tmp_path / "run"))
    np.testing.assert_allclose(draw(other), tuned, atol=1e-3)
    other.unload_lora_weights()
    assert not lora.has_adapters(other.unet)
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(draw(other), draw(pipeline), atol=1e-3)

    other.graph_encoder.half()
    other.load_lora_weights(str(tmp_path / "run"))
    bias = other.graph_encoder.f_relation.bias
    assert bias.dtype == torch.float16
    torch.testing.assert_close(bias.float(), pipeline.graph_encoder.f_relation.bias, rtol=1e-3, atol=1e-3)


def test_a_graph_encoder_of_another_unet_is_refused_before_anything_changes(pipeline, plain, tmp_path):
    encoder = SceneGraphConditioner(16, 16, 99, 8, 1)
    encoder.save_pretrained(tmp_path / "graph_encoder")
    with pytest.raises(ModelError, match="its adapters cannot be loaded: graph_encoder has context_dim 99") as error:
        pipeline.load_lora_weights(tmp_path)
    one_line(error)
    assert np.array_equal(draw(pipeline), plain) and not lora.has_adapters(pipeline.unet)
