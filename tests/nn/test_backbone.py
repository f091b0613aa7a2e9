"""The three kinds of Stable Diffusion: their text states and null conditions are stock diffusers', fused UNets too."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from support.graphs import embeddings, pack
from support.sd_folder import CLIP_WIDTH, CONTEXT, KINDS, POOLED, write_clip, write_sd
from torch import nn

from sgg_fast.config import ModelConfig
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.backbone import Backbone, added
from sgg_fast.nn.conditioner import SceneGraphConditioner, pooled_phrases
from sgg_fast.nn.foundation import Foundation, load_foundation
from sgg_fast.nn.fuse import fuse, unfuse
from sgg_fast.nn.loading import ModelError
from sgg_fast.train.assemble import conditioner_of
from sgg_fast.train.memory.sizes import PUBLISHED

TEXTS = ["sheep standing on grass", "red hat", ""]
GRAPHS = [SceneGraph(("sheep", "grass"), ((0, "standing on", 1),)), SceneGraph(("red hat",))]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_clip(folder / "clip")
    for kind in ("sd21", "sdxl"):
        write_sd(folder / kind, kind=kind)
    return folder


@pytest.fixture(scope="module")
def foundations(base) -> dict[str, Foundation]:
    return {kind: load_foundation(str(base / kind), str(base / "clip")) for kind in ("sd21", "sdxl")}


def test_published_sizes_are_told_apart_by_their_configurations():
    found = {name: dataclasses.astuple(Backbone.of(sizes.unet)) for name, sizes in PUBLISHED.items()}
    assert found == {
        "sd": ("Stable Diffusion v1", 768, 0),
        "sd21": ("Stable Diffusion v2", 1024, 0),
        "sdxl": ("SDXL", 2048, 1280),
    }
    for sizes in PUBLISHED.values():
        assert sum(text["hidden_size"] for text in sizes.texts) == Backbone.of(sizes.unet).context_dim


def test_v2s_states_are_stock_diffusers(base, foundations):
    stock = StableDiffusionPipeline.from_pretrained(base / "sd21", safety_checker=None)
    rows, last = foundations["sd21"].towers.read(TEXTS)
    expected, empty = stock.encode_prompt(TEXTS, "cpu", 1, True)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(rows[2], empty[0])
    assert stock.tokenizer.pad_token == "!" and stock.scheduler.config.prediction_type == "v_prediction"
    assert foundations["sd21"].scheduler.config.prediction_type == "v_prediction"
    assert last.shape == (3, CONTEXT) and not foundations["sd21"].empty_is_zero


def test_sdxls_rows_are_stock_diffusers_states_and_pooled_vectors(base, foundations):
    stock = StableDiffusionXLPipeline.from_pretrained(base / "sdxl")
    rows, last = foundations["sdxl"].towers.read(TEXTS)
    states, no_states, pooled, no_pooled = stock.encode_prompt(TEXTS, device="cpu", do_classifier_free_guidance=True)
    width = Backbone.of(stock.unet.config).context_dim
    torch.testing.assert_close(rows[..., :width], states)
    for row in rows.unbind(1):
        torch.testing.assert_close(row[:, width:], pooled)
    ends = [len(stock.tokenizer(text).input_ids) - 1 for text in TEXTS]
    torch.testing.assert_close(last, torch.stack([rows[i, end] for i, end in enumerate(ends)]))
    assert not no_states.any() and not no_pooled.any() and foundations["sdxl"].empty_is_zero
    assert foundations["sdxl"].towers.phrases([]).shape == (0, width + POOLED)


def test_sizes_are_those_that_stock_diffusers_passes(base):
    stock = StableDiffusionXLPipeline.from_pretrained(base / "sdxl")
    expected = stock._get_add_time_ids((1024, 768), (0, 0), (1024, 768), torch.float32, POOLED)
    found = Backbone.of(stock.unet.config).sizes(1024, 768, 2, "cpu")
    assert torch.equal(found, expected.expand(2, -1))


def conditioner(foundation: Foundation, kind: str = "sgg", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(conditioner=kind, width=8, num_layers=1, **settings)
    return conditioner_of(config, CLIP_WIDTH, CLIP_WIDTH, foundation.backbone, ("sheep", "grass", "standing on"))


def test_the_null_condition_is_the_empty_text_or_zeros_as_the_folder_says(foundations):
    model, rows = conditioner(foundations["sdxl"]), foundations["sdxl"].towers.read([""])[0][0]
    width = foundations["sdxl"].backbone.context_dim
    for zeros in (True, False):
        model.calibrate_null(rows, zeros)
        context, mask = model.null_condition(1, 80)
        torch.testing.assert_close(context[0, :77], rows[:, :width] * (not zeros))
        torch.testing.assert_close(model.null_pooled, rows[0, width:] * (not zeros))
        torch.testing.assert_close(model.start_state, rows[0, :width])
        assert mask.sum() == 77


@pytest.mark.parametrize("token_init", ["none", "text"])
def test_the_pooled_vector_starts_at_the_texts_and_is_dropped_with_the_context(foundations, token_init):
    foundation = foundations["sdxl"]
    model, towers, width = (
        conditioner(foundation, token_init=token_init),
        foundation.towers,
        foundation.backbone.context_dim,
    )
    batch, table = pack(*GRAPHS)
    phrases, names = towers.phrases(table.phrases), embeddings(table, CLIP_WIDTH)
    vocabulary = towers.read(table.spoken())[1]
    model.calibrate_null(towers.read([""])[0][0], foundation.empty_is_zero)
    model.calibrate_tokens(vocabulary)
    given = model(names, batch, phrases if token_init == "text" else None)
    expected = vocabulary[:, width:].mean(0).expand(2, -1)
    if token_init == "text":
        expected = pooled_phrases(phrases[:, width:], batch)
        own = [phrases[batch.phrase[a:b].long(), width:].float() for a, b in batch.relation_ptr.long().unfold(0, 2, 1)]
        for row, told in zip(expected, own, strict=True):
            torch.testing.assert_close(row.norm(), told.norm(dim=1).mean())
            torch.testing.assert_close(row / row.norm(), nn.functional.normalize(told.mean(0), dim=0))
    torch.testing.assert_close(given.pooled, expected)
    dropped = model.drop(given, torch.tensor([True, False]))
    assert not dropped.pooled[0].any() and torch.equal(dropped.pooled[1], given.pooled[1])
    dropped.pooled.sum().backward()
    assert model.to_pooled.weight.grad.any(), "the map of X_global trains from the first step"


@pytest.mark.parametrize(("kind", "form"), [("text", "sentence"), ("text", "phrases"), ("sgdiff", "sentence")])
def test_baselines_have_a_pooled_vector_too(foundations, kind, form):
    foundation = foundations["sdxl"]
    model = conditioner(foundation, kind, text_form=form)
    batch, table = pack(*GRAPHS)
    names = model.names_of(table, embeddings(table, CLIP_WIDTH))
    given = model(names, batch, model.read(GRAPHS, table, foundation.towers))
    assert given.context.shape[2] == foundation.backbone.context_dim and given.pooled.shape == (2, POOLED)
    if form == "sentence" and kind == "text":
        said = foundation.towers.read(["sheep standing on grass", "red hat"])[1]
        torch.testing.assert_close(given.pooled, said[:, foundation.backbone.context_dim :])


def test_v1_and_v2_have_no_pooled_vector(foundations):
    model = conditioner(foundations["sd21"])
    batch, table = pack(*GRAPHS)
    given = model(embeddings(table, CLIP_WIDTH), batch, foundations["sd21"].towers.phrases(table.phrases))
    assert given.pooled is None and model.drop(given, torch.tensor([True, False])).pooled is None
    assert not any("pooled" in name for name in model.state_dict())


Results = dict[str, torch.Tensor]


def results(unet: nn.Module, dtype: torch.dtype = torch.float32) -> Results:
    """Output and every gradient of a call, by name."""
    unet.zero_grad()
    draw, backbone = torch.Generator().manual_seed(0), Backbone.of(unet.config)
    shapes = (2, 4, 8, 8), (2, 8, backbone.context_dim), (2, max(backbone.pooled_dim, 1))
    z, context, pooled = (torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in shapes)
    more = added(pooled, backbone.sizes(64, 64, 2, "cpu")) if backbone.pooled_dim else None
    mask = (torch.arange(8) < 5).expand(2, 8)
    out = unet(z, torch.tensor([10, 700]), context, encoder_attention_mask=mask, added_cond_kwargs=more).sample
    out.backward(torch.randn(out.shape, generator=draw).to(out))
    grads = {name: p.grad for name, p in unet.named_parameters()}
    inputs = {"z": z.grad, "context": context.grad, **({"pooled": pooled.grad} if more else {})}
    return {"out": out.detach(), **inputs, **grads}


COUNTS = {
    "sd21": {"FusedResnetBlock2D": 22, "FusedTransformer2DModel": 16, "FusedBasicTransformerBlock": 16,
             "FusedGEGLU": 16, "FusedGroupNormSiLU": 45, "FusedGroupNorm": 16, "FusedLayerNorm": 48, "GEMMs": 16 + 2},
    # 17 residual blocks; no attention in the outer level; levels of 2 and 4 layers, 5 and 5 + 1 transformers
    "sdxl": {"FusedResnetBlock2D": 17, "FusedTransformer2DModel": 11, "FusedBasicTransformerBlock": 34,
             "FusedGEGLU": 34, "FusedGroupNormSiLU": 35, "FusedGroupNorm": 11, "FusedLayerNorm": 102, "GEMMs": 34 + 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", COUNTS)
def test_the_fused_unet_is_the_stock_one(kind):
    """Error against float64 at most twice the stock model's own in fp32, for the output and every gradient."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**KINDS[kind].unet, sample_size=8, norm_num_groups=16)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    exact, stock = results(unet.double(), torch.float64), results(unet.float())
    names = list(unet.state_dict())
    unet.to(memory_format=torch.channels_last)
    found = fuse(unet)
    assert {name: found[name] for name in COUNTS[kind]} == COUNTS[kind]
    fused = results(unet)
    assert list(unet.state_dict()) == names and fused.keys() == exact.keys()
    for name, want in exact.items():
        error, allowed = ((x[name].double() - want).norm().item() for x in (fused, stock))
        assert error <= 2 * allowed + 1e-6 * (want.numel() ** 0.5 + want.norm().item()), name
    unfuse(unet)
    torch.testing.assert_close(results(unet)["out"], stock["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"addition_time_embed_dim": 20}, "which leaves no text beside 6 sizes of width 20"),
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim must be a whole number from 1"),
        ({"addition_embed_type": "image"}, "a UNet with a further condition (addition_embed_type is 'image')"),
        ({"cross_attention_dim": 99}, f"of width 99, but those of text_encoder and text_encoder_2 have {CONTEXT} + 32"),
        ({"projection_class_embeddings_input_dim": 50},
         f"a pooled text of width 2 beside 6 sizes, but text_encoder_2 projects to {POOLED}"),
    ],
)  # fmt: skip
def test_a_unet_of_another_kind_is_refused_in_one_line(base, tmp_path, change, reason):
    model = tmp_path / "model"
    shutil.copytree(base / "sdxl", model)
    file = model / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError) as caught:
        load_foundation(str(model), str(base / "clip"))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("text_encoder_2", "the folder lacks text_encoder_2/config.json"),
        ("tokenizer_2", "the folder lacks tokenizer_2/tokenizer.json"),
    ],
)
def test_sdxl_without_its_second_text_encoder_is_refused(base, tmp_path, lost, reason):
    model = tmp_path / "model"
    shutil.copytree(base / "sdxl", model)
    shutil.rmtree(model / lost)
    with pytest.raises(ModelError, match=reason):
        load_foundation(str(model), str(base / "clip"))


def test_an_encoder_of_another_kind_is_refused(foundations):
    from sgg_fast.nn.pipeline_parts import check_fit

    parts = {**foundations["sdxl"].pipeline_parts(), "graph_encoder": conditioner(foundations["sdxl"])}
    check_fit(parts)
    plain = SceneGraphConditioner(CLIP_WIDTH, CLIP_WIDTH, foundations["sdxl"].backbone.context_dim, 8, 1)
    with pytest.raises(ModelError, match="graph_encoder has pooled_dim 0"):
        check_fit({**parts, "graph_encoder": plain})
    with pytest.raises(ModelError, match="the folder has no text_encoder_2 and tokenizer_2"):
        check_fit({**parts, "text_encoder_2": None, "tokenizer_2": None})
