"""Runs with --lora: what trains, what a checkpoint and a result hold, and who loads them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from support.cases.stage import GRAPHS, cache, conditioner, settings  # noqa: F401  (fixtures)
from support.sd_folder import write_clip, write_sd
from support.tiny_runs import TINY, rows, same_weights, train, trainer

from sgg_fast.config import ConfigError
from sgg_fast.drawing import load_model
from sgg_fast.graph import SceneGraph
from sgg_fast.nn import lora
from sgg_fast.nn.loading import ModelError
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.assemble import assemble, summary
from sgg_fast.train.engines import captured as capturing
from sgg_fast.train.engines.captured import CapturedEngine
from sgg_fast.train.engines.choose import plan_engine
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.meter import Meter
from sgg_fast.train.memory.planner import Planner

CPU = torch.device("cpu")
BOTH = {"lora": 4, "lora_targets": "convolutions", "lora_lr": 1e-2}
SHEEP = SceneGraph(("sheep", "grass"), ((0, "standing on", 1),))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("lora")
    train(out, "finetune", **BOTH)
    return out


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(SHEEP, num_inference_steps=3, output_type="np", generator=generator).images


def test_a_result_is_adapters_and_graph_encoder_and_changes_the_picture(lora_run):
    folder = lora_run / "finetune" / "pipeline"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == {
        "README.md", "graph_encoder/config.json", "graph_encoder/diffusion_pytorch_model.safetensors",
        "model_index.json", "pipeline.py", "pytorch_lora_weights.safetensors", "sha256.json",
    }  # fmt: skip
    assert json.loads((folder / "model_index.json").read_text())["base"] == {"model": "", "clip": ""}
    pipeline = SceneGraphToImagePipeline.from_pretrained(folder, **toy_foundation().pipeline_parts())
    tuned = draw(pipeline)
    merged = load_model(str(lora_run)).pipeline
    assert not lora.has_adapters(merged.unet)
    np.testing.assert_allclose(draw(merged), tuned, atol=1e-3)
    pipeline.disable_lora()
    plain = draw(pipeline)
    assert np.abs(tuned - plain).max() > 0.05
    base = SceneGraphToImagePipeline(
        **toy_foundation().pipeline_parts(), graph_encoder=pipeline.graph_encoder, resolution=64, guidance=4.0
    )
    assert np.array_equal(draw(base), plain), "without the adapters it is the base"


def test_stock_diffusers_loads_the_file(lora_run):
    """As Stable Diffusion's own pipeline, and by a UNet alone: the prediction is that of our pipeline."""
    folder, parts = lora_run / "finetune" / "pipeline", toy_foundation().pipeline_parts()
    ours = SceneGraphToImagePipeline.from_pretrained(folder, **toy_foundation().pipeline_parts())
    parts = {name: parts[name] for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    stock = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    z, context = torch.randn(1, 4, 16, 16), torch.randn(1, 8, 128)

    @torch.no_grad()
    def predicted(unet):
        return unet(z, 500, context).sample

    before = predicted(stock.unet)
    stock.load_lora_weights(folder)
    assert torch.equal(predicted(stock.unet), predicted(ours.unet)) and not torch.equal(predicted(stock.unet), before)
    alone = toy_foundation().unet
    alone.load_lora_adapter(str(folder), prefix="unet", weight_name=lora.WEIGHTS)
    assert torch.equal(predicted(alone), predicted(ours.unet))


def test_a_checkpoint_holds_what_trains_and_a_resumed_run_is_the_same(lora_run, tmp_path):
    train(tmp_path, "finetune", **BOTH, finetune_steps=2, ema=0.9)
    held = load_file(tmp_path / "finetune" / "checkpoints" / "step-0000002" / "weights.safetensors")
    of_unet = {name for name in held if name.startswith("unet.")}
    assert of_unet and all(".lora_" in name for name in of_unet) and held.keys() > of_unet
    train(tmp_path, "finetune", **BOTH, ema=0.9)
    whole = tmp_path / "whole"
    train(whole, "finetune", **BOTH, ema=0.9)
    assert same_weights(tmp_path / "finetune" / "pipeline", whole / "finetune" / "pipeline")
    assert rows(tmp_path / "finetune") == rows(whole / "finetune") == rows(lora_run / "finetune")
    assert not same_weights(whole / "finetune" / "pipeline", lora_run / "finetune" / "pipeline"), "the average"


def test_in_bf16_the_frozen_weights_take_half_and_sheets_are_drawn(tmp_path):
    run = trainer(tmp_path, "finetune", **BOTH, precision="bf16", sample_every=2, finetune_steps=2)
    unet = run.engine.module.unet
    types = {".lora_" in name: p.dtype for name, p in unet.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    assert all(p.requires_grad == (".lora_" in name) for name, p in unet.named_parameters())
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    run.train()
    changed = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    assert (tmp_path / "finetune" / "samples" / "step-0000002.png").is_file()
    exact = trainer(tmp_path / "exact", "finetune", **BOTH, finetune_steps=2)
    exact.train()
    low, full = (rows(folder / "finetune")[1]["loss"] for folder in (tmp_path, tmp_path / "exact"))
    assert low == pytest.approx(full, rel=0.02)


def module(cache, **changes):
    torch.manual_seed(0)
    config = settings(**{**BOTH, "batch_size": 2, "optimizer": "adam", **changes})
    return assemble(config, "finetune", toy_foundation(weights=None), conditioner(config, cache), cache, CPU)


@pytest.mark.parametrize("targets", lora.TARGETS)
def test_a_fused_unet_with_adapters_has_the_stock_ones_terms_and_gradients(cache, targets):
    """Frozen layers inside adapters are merged as without them."""
    stock, fused = (module(cache, lora_targets=targets, fuse_unet=choice) for choice in ("off", "on"))
    merged = {"attention": 9, "convolutions": 8}[targets]  # time shifts need a stock convolution in front
    assert (summary(fused).fused, summary(fused).merged) == (83, merged) and summary(stock).fused == 0
    for one in (stock, fused):
        for name, parameter in one.unet.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        one(np.array([0, 4]), 3).total.backward()
    theirs = dict(stock.named_parameters())
    checked = 0
    for name, parameter in fused.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
            checked += 1
    assert checked == 2 * sum(hasattr(layer, "lora_A") for layer in fused.unet.modules()) > 0


def test_a_captured_step_trains_adapters_like_the_plain_one(cache, monkeypatch):
    monkeypatch.setattr(capturing, "WARM_UP_STEPS", 1)
    plain, captured = EagerEngine(module(cache), CPU), CapturedEngine(module(cache), CPU)
    for step, ids in enumerate(([[0, 4]], [[1, len(GRAPHS) - 1]], [[2, 3]])):
        expected, found = (one.update(np.array(ids), step) for one in (plain, captured))
        assert found.applied
        torch.testing.assert_close(found.losses["loss"], expected.losses["loss"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_the_plan_counts_what_trains_and_what_is_frozen(changes):
    """Activations as real tensors take them; frozen weights in half precision; state for the adapters alone."""
    config = recipe("toy", **{**TINY, **BOTH, **changes})
    planned = Planner(config, device="cpu")._trace(2).peaks
    models = blank_foundation(config.model)
    stage = assemble(
        config, "finetune", models, blank_conditioner(config.model, models), blank_cache(config, models, 1), CPU
    )
    with Meter() as meter:
        meter.keep_gradients([p for p in stage.parameters() if p.requires_grad])
        meter.phase = "forward"
        total = stage(np.zeros(2, np.int64), 0).total
        meter.phase = "backward"
        total.backward()
    for phase in ("forward", "backward"):
        assert sum(planned[phase].values()) == pytest.approx(sum(meter.peaks[phase].values()), rel=0.01)

    on_gpu = Planner(config).plan(2).resident
    base = sum(p.numel() for p in toy_foundation().unet.parameters())
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    assert on_gpu["frozen weights of the UNet (LoRA)"] == 2 * base
    assert on_gpu["weights"] == pytest.approx(4 * trained, rel=0.2) and on_gpu["weights"] < 4 * base / 2


def test_the_base_of_a_run_may_move(tmp_path):
    """The message names the cure, and the cure gives the same picture."""
    model, clip = write_sd(tmp_path / "sd"), write_clip(tmp_path / "clip")
    run = tmp_path / "run"
    train(run, "finetune", **BOTH, model=str(model), clip=str(clip), token_init="none", resolution=32)
    first = draw(load_model(str(run)).pipeline)
    by_class = SceneGraphToImagePipeline.from_pretrained(run / "finetune" / "pipeline")
    np.testing.assert_allclose(draw(by_class), first, atol=1e-3)
    shutil.move(model, tmp_path / "moved")
    with pytest.raises(ModelError, match=r"its base; --base gives another place: --model .*sd: there is no such") as e:
        load_model(str(run))
    assert "\n" not in str(e.value)
    assert np.array_equal(draw(load_model(str(run), base=str(tmp_path / "moved")).pipeline), first)


def test_what_cannot_be_combined_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--lora 4 runs without --deepspeed"):
        plan_engine(recipe("toy", lora=4).optim, "finetune", CPU, "ds.json")
    with pytest.raises(ConfigError, match="leave out --weights lean"):
        recipe("toy", lora=4, weights="lean")
    recipe("toy", weights="lean")
    with pytest.raises(ModelError, match=r"it has its own models, no base: leave out --base$"):
        load_model("toy", base="elsewhere")


def test_a_whole_pipeline_takes_the_adapters_and_gives_them_back(trained_run, lora_run, tmp_path):
    """load_lora_weights brings the graph encoder too; fused into the weights it saves as any pipeline."""
    tuned = draw(load_model(str(lora_run)).pipeline)
    whole = load_model(str(trained_run)).pipeline
    whole.fuse_unet = "on"
    plain = draw(whole)
    whole.register_modules(**toy_foundation().pipeline_parts())
    whole.load_lora_weights(lora_run / "finetune" / "pipeline")
    np.testing.assert_allclose(draw(whole), tuned, atol=1e-3)
    assert np.abs(plain - tuned).max() > 0.01
    with pytest.raises(ValueError, match=r"call fuse_lora\(\) and unload_lora_weights\(\)"):
        whole.save_pretrained(tmp_path)
    whole.fuse_lora()
    whole.unload_lora_weights()
    whole.save_pretrained(tmp_path / "fused")
    np.testing.assert_allclose(draw(load_model(str(tmp_path / "fused")).pipeline), tuned, atol=1e-3)


def test_a_damaged_file_is_one_line(lora_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(lora_run / "finetune" / "pipeline", folder)
    (folder / "sha256.json").unlink()
    (folder / lora.WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="adapters: ") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
