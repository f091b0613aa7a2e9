"""The pipeline in diffusers' own ways: generators, callbacks, schedulers, saving, loading in stock diffusers."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys

import diffusers.utils.hub_utils
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from support import ROOT
from support.graphs import all_graphs

from sgg_fast.commands import NotFiniteError
from sgg_fast.drawing import load_model
from sgg_fast.drawing.models import SCHEDULERS, made_scheduler, scheduler_name
from sgg_fast.graph import SceneGraph
from sgg_fast.nn import loading, lora
from sgg_fast.pipeline import SceneGraphToImagePipeline, decode_latents

SHEEP = SceneGraph(("sheep", "grass"), ((0, "standing on", 1),))


@pytest.fixture(scope="module")
def pipeline(trained_run):
    pipeline = load_model(str(trained_run)).pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.keep_conditions = False
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipeline, graphs, **settings) -> np.ndarray:
    settings = {"num_inference_steps": 3, "output_type": "np", **settings}
    return pipeline(graphs, **settings).images


def test_output_types_agree(pipeline):
    as_np = draw(pipeline, SHEEP, generator=seeded(0))
    assert as_np.shape == (1, 64, 64, 3) and as_np.dtype == np.float32 and 0 <= as_np.min() <= as_np.max() <= 1
    (pil,) = draw(pipeline, SHEEP, generator=seeded(0), output_type="pil")
    assert np.array_equal(np.asarray(pil), (as_np[0] * 255).round().astype(np.uint8))
    as_pt = draw(pipeline, SHEEP, generator=seeded(0), output_type="pt")
    assert np.array_equal(as_pt.permute(0, 2, 3, 1).numpy(), as_np)
    latents = draw(pipeline, SHEEP, generator=seeded(0), output_type="latent")
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    np.testing.assert_allclose((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), as_np, atol=1e-6)
    (images,) = pipeline(SHEEP, num_inference_steps=3, generator=seeded(0), output_type="np", return_dict=False)
    assert np.array_equal(images, as_np)


def test_pictures_of_one_graph_lie_together_and_each_has_its_noise(pipeline):
    graphs = all_graphs()[:2]
    several = draw(pipeline, graphs, num_images_per_prompt=2, generator=seeded(3, 4, 5, 6))
    assert several.shape[0] == 4
    for i, seed in enumerate((3, 4, 5, 6)):
        alone = draw(pipeline, graphs[i // 2], generator=seeded(seed))
        np.testing.assert_allclose(several[i], alone[0], atol=1e-3)
    one = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(4, 16, 16, generator=one) for _ in range(2)])
    np.testing.assert_array_equal(
        draw(pipeline, graphs, latents=noise), draw(pipeline, graphs, generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": seeded(0, 1)}, "2 generators for 1 pictures"),
        ({"resolution": 30}, "resolution 30 is not a multiple of 4"),
        ({"height": 64, "width": 2}, "resolution 2 is not a multiple of 4"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents of shape"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline(SHEEP, num_inference_steps=1, **settings)


def test_height_and_width(pipeline):
    assert draw(pipeline, SHEEP, height=32, width=64, generator=seeded(0)).shape == (1, 32, 64, 3)


def test_callbacks_see_and_change_the_latents_and_may_stop(pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        assert pipe is pipeline and set(tensors) == {"latents"} and tensors["latents"].shape == (1, 4, 16, 16)
        seen.append((step, int(timestep)))
        return tensors

    plain = draw(pipeline, SHEEP, generator=seeded(0))
    watched = draw(pipeline, SHEEP, generator=seeded(0), callback_on_step_end=watch)
    assert np.array_equal(plain, watched)
    assert seen == [(i, int(t)) for i, t in enumerate(pipeline.scheduler.timesteps)] and len(seen) == 3

    last = len(seen) - 1
    zeros = draw(pipeline, SHEEP, generator=seeded(0), output_type="latent",
                 callback_on_step_end=lambda p, i, t, x: {"latents": 0 * x["latents"]} if i == last else x)  # fmt: skip
    assert torch.equal(zeros, torch.zeros_like(zeros))

    seen.clear()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return watch(pipe, step, timestep, tensors)

    stopped = draw(pipeline, SHEEP, generator=seeded(0), callback_on_step_end=stop)
    assert [step for step, _ in seen] == [0, 1] and not np.array_equal(stopped, plain)
    assert np.array_equal(draw(pipeline, SHEEP, generator=seeded(0)), plain), "the next call is not stopped"


def test_guidance_one_is_the_condition_alone_and_more_moves_away_from_the_null(pipeline):
    """After one step of DDIM the latents are affine in the guidance."""
    one, two, three = (
        draw(pipeline, SHEEP, guidance_scale=w, generator=seeded(0), num_inference_steps=1, output_type="latent")
        for w in (1.0, 2.0, 3.0)
    )
    torch.testing.assert_close(three - two, two - one, rtol=1e-3, atol=1e-3)
    assert (two - one).abs().max() > 1e-4 and pipeline.guidance_scale == 3.0


def test_relation_guidance_pulls_away_from_the_graph_without_its_relations(pipeline):
    """A step of DDIM is affine in the prediction, so its result is guided as the prediction is.

    A model of a few steps hardly looks at relations: hence the pull of 500.
    """
    bare, settings = SceneGraph(SHEEP.objects), {"num_inference_steps": 1, "output_type": "latent"}

    def latents(graph, **more):
        return draw(pipeline, graph, generator=seeded(0), **settings, **more)

    full, without = latents(SHEEP, guidance_scale=1.0), latents(bare, guidance_scale=1.0)
    found = latents(SHEEP, guidance_scale=1.0, relation_guidance=500.0)
    torch.testing.assert_close(found, full + 500 * (full - without), rtol=1e-3, atol=5e-3)
    assert (found - full).abs().max() > 0.1
    both, alone = (latents(SHEEP, guidance_scale=4.0, relation_guidance=r) for r in (500.0, 0.0))
    torch.testing.assert_close(both - alone, found - full, rtol=1e-3, atol=5e-3)
    unmoved = latents(bare, guidance_scale=4.0, relation_guidance=500.0)
    torch.testing.assert_close(unmoved, latents(bare, guidance_scale=4.0), rtol=1e-3, atol=5e-3)


def test_a_step_is_one_call_of_the_unet_and_graphs_are_encoded_once(pipeline):
    calls = []
    hooks = [
        pipeline.unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0]))),
        pipeline.graph_encoder.register_forward_pre_hook(lambda *_: calls.append("graphs")),
    ]
    try:
        draw(pipeline, [SHEEP, SHEEP], generator=seeded(0, 1))
        draw(pipeline, [SHEEP, SHEEP], generator=seeded(0, 1), relation_guidance=1.0)
        draw(pipeline, [SHEEP, SHEEP], generator=seeded(0, 1), guidance_scale=1.0)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == ["graphs", 4, 4, 4, "graphs", 6, 6, 6, "graphs", 2, 2, 2]


def test_equal_graphs_are_one_row_and_each_picture_gets_its_own(pipeline):
    graphs = [SHEEP, all_graphs()[0], SceneGraph(SHEEP.objects, list(SHEEP.relations))]
    encoded = []
    hook = pipeline.graph_encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[1].num_graphs))
    with torch.no_grad():
        context, mask = pipeline.encode_graphs(graphs, num_images_per_prompt=2, guided=False)
        hook.remove()
        for i, graph in enumerate(graphs):
            alone, of_alone = pipeline.encode_graphs([graph], guided=False)
            torch.testing.assert_close(context[2 * i : 2 * i + 2, : alone.shape[1]], alone.expand(2, -1, -1))
            assert torch.equal(mask[2 * i, : alone.shape[1]], of_alone[0])
    assert encoded == [2]


def test_conditions_are_kept_where_asked_for_each_set_of_graphs(pipeline):
    encoded, bird = [], SceneGraph(("bird",))
    hook = pipeline.graph_encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    try:
        for kept, number in ((False, 6), (True, 3)):
            pipeline.keep_conditions = kept
            found = [draw(pipeline, graph, generator=seeded(0)) for graph in (SHEEP, bird, SHEEP, SHEEP, bird)]
            found.append(draw(pipeline, SHEEP, generator=seeded(0), guidance_scale=1.0))
            assert len(encoded) == number
            assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[4])
            assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[5])
            encoded.clear()
    finally:
        hook.remove()
        pipeline.keep_conditions = False


def test_a_unet_in_half_precision_works_on_latents_in_full(pipeline):
    exact = draw(pipeline, SHEEP, generator=seeded(0), output_type="latent")
    stock = copy.deepcopy(pipeline.unet.state_dict())
    try:
        pipeline.unet.to(torch.bfloat16)
        found = draw(pipeline, SHEEP, generator=seeded(0), output_type="latent")
    finally:
        pipeline.unet.to(torch.float32).load_state_dict(stock)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    assert (found - exact).norm() < 0.05 * exact.norm()
    assert torch.equal(draw(pipeline, SHEEP, generator=seeded(0), output_type="latent"), exact)


def test_what_does_not_fit_into_memory_is_decoded_in_parts(pipeline, monkeypatch):
    """Of five pictures first five, then two at a time; one that is too large in tiles, for this once."""
    latents, sizes, decode = torch.randn(5, 4, 16, 16, generator=seeded(0)[0]), [], pipeline.vae.decode

    def short_of_memory(part):
        sizes.append(tuple(part.shape))
        if len(part) > 2 or (part.shape[2] > 16 and not pipeline.vae.use_tiling):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(part)

    with torch.no_grad():
        whole = decode(latents).sample
        monkeypatch.setattr(pipeline.vae, "decode", short_of_memory)
        torch.testing.assert_close(decode_latents(pipeline.vae, latents), whole, rtol=1e-4, atol=1e-5)
        assert [shape[0] for shape in sizes] == [5, 2, 2, 1]
        large = torch.randn(1, 4, 24, 24, generator=seeded(0)[0])
        assert decode_latents(pipeline.vae, large).shape == (1, 3, 96, 96) and not pipeline.vae.use_tiling
        monkeypatch.setattr(pipeline.vae, "tile_latent_min_size", 32)
        with pytest.raises(torch.OutOfMemoryError):
            decode_latents(pipeline.vae, large)


def test_a_scheduler_is_swapped_the_usual_way(pipeline):
    usual = pipeline.scheduler
    plain = draw(pipeline, SHEEP, generator=seeded(0))
    try:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(usual.config)
        assert not np.array_equal(draw(pipeline, SHEEP, generator=seeded(0)), plain)
    finally:
        pipeline.scheduler = usual
    assert np.array_equal(draw(pipeline, SHEEP, generator=seeded(0)), plain)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_and_the_seed_decides(pipeline, name):
    """Also those that draw noise at each step: it comes from the picture's own generator."""
    usual = pipeline.scheduler
    try:
        pipeline.scheduler = made_scheduler(pipeline, name)
        assert scheduler_name(pipeline) == name
        first, again = (draw(pipeline, [SHEEP, SHEEP], generator=seeded(0, 1)) for _ in range(2))
    finally:
        pipeline.scheduler = usual
    assert np.array_equal(first, again) and np.isfinite(first).all() and np.abs(first[0] - first[1]).max() > 0.01


def test_a_saved_pipeline_loads_by_name_by_stock_diffusers_and_its_unet_alone(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")), "safetensors only"
    plain = draw(pipeline, SHEEP, generator=seeded(0))
    by_name = SceneGraphToImagePipeline.from_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    for loaded in (by_name, stock):
        assert isinstance(loaded, SceneGraphToImagePipeline)
        loaded.set_progress_bar_config(disable=True)
        assert np.array_equal(draw(loaded, SHEEP, generator=seeded(0)), plain)
        assert loaded.config.provenance == pipeline.config.provenance
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path))
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert unet.state_dict().keys() == pipeline.unet.state_dict().keys()
    assert all(torch.equal(tensor, pipeline.unet.state_dict()[name]) for name, tensor in unet.state_dict().items())


def test_push_to_hub_uploads_our_card(pipeline, tmp_path, monkeypatch):
    """The hub itself is not here: what would be uploaded is looked at."""
    found = {}

    def upload_folder(repo_id, folder_path, **_):
        found.update({p.name: p.read_text() for p in tmp_path.__class__(folder_path).glob("*.*")})

    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", upload_folder)
    (tmp_path / "README.md").write_text("an empty card")
    pipeline._upload_folder(str(tmp_path), "someone/model")
    assert (
        "# Scene graph to image (SGG-IG)" in found["README.md"] and "SceneGraphToImagePipeline" in found["pipeline.py"]
    )


SAVE = """
import sys
from sgg_fast.drawing import load_model
load_model(sys.argv[1]).pipeline.save_pretrained(sys.argv[2])
"""


def test_two_processes_export_the_same_bytes_wherever_the_models_lay(pipeline, trained_run, tmp_path):
    """Another process with another hash seed, from a copy in another folder: every file, the manifest included."""
    pipeline.save_pretrained(tmp_path / "a")
    shutil.copytree(trained_run, tmp_path / "moved")
    places = [str(tmp_path / "moved"), str(tmp_path / "b")]
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", SAVE, *places], check=True, cwd=ROOT, env=environment, timeout=600)
    names = [sorted(p.relative_to(tmp_path / x).as_posix() for p in (tmp_path / x).rglob("*.*")) for x in "ab"]
    assert names[0] == names[1] and loading.MANIFEST in names[0] and len(names[0]) > 15
    for name in names[0]:
        if (tmp_path / "a" / name).is_file():
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    loading.check(tmp_path / "a")
    assert not any(str(trained_run).encode() in p.read_bytes() for p in (tmp_path / "a").rglob("*.json"))


def test_nan_is_refused_where_bytes_would_hide_it_and_given_where_it_can_be_seen(pipeline):
    latents = torch.zeros(1, 4, 16, 16)
    latents[0, 0, 0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="not finite, and is not saved: lower --guidance"):
        pipeline.decode(latents)
    assert not pipeline.decode(latents, "pt").isfinite().all()


def test_vae_slicing_decodes_one_picture_at_a_time(pipeline, monkeypatch):
    sizes, decoder = [], pipeline.vae.decoder.forward
    monkeypatch.setattr(pipeline.vae.decoder, "forward", lambda z, *more: sizes.append(len(z)) or decoder(z, *more))
    plain = draw(pipeline, [SHEEP, SHEEP], generator=seeded(0, 1))
    pipeline.enable_vae_slicing()
    np.testing.assert_allclose(draw(pipeline, [SHEEP, SHEEP], generator=seeded(0, 1)), plain, atol=1e-4)
    pipeline.disable_vae_slicing()
    np.testing.assert_allclose(draw(pipeline, [SHEEP, SHEEP], generator=seeded(0, 1)), plain, atol=1e-6)
    assert sizes == [2, 1, 1, 2]


def test_vae_tiling_decodes_large_pictures_in_tiles(pipeline, monkeypatch):
    sizes, decoder = [], pipeline.vae.decoder.forward
    monkeypatch.setattr(
        pipeline.vae.decoder, "forward", lambda z, *more: sizes.append(tuple(z.shape[2:])) or decoder(z, *more)
    )
    whole = draw(pipeline, SHEEP, generator=seeded(0), resolution=96)
    pipeline.enable_vae_tiling()
    tiled = draw(pipeline, SHEEP, generator=seeded(0), resolution=96)
    pipeline.disable_vae_tiling()
    assert sizes[0] == (24, 24) and len(sizes) > 3 and max(max(size) for size in sizes[1:]) <= 16
    assert tiled.shape == whole.shape and not np.array_equal(
        draw(pipeline, SHEEP, generator=seeded(0), resolution=96), tiled
    )
    assert np.abs(tiled - whole).mean() < 0.1, "but for the seams"


def test_sequential_cpu_offload_names_what_works(pipeline):
    plain = draw(pipeline, SHEEP, generator=seeded(0))
    with pytest.raises(ValueError, match=r"use enable_model_cpu_offload\(\)$") as error:
        pipeline.enable_sequential_cpu_offload()
    assert "\n" not in str(error.value)
    assert np.array_equal(draw(pipeline, SHEEP, generator=seeded(0)), plain)


def test_adapters_are_saved_alone_and_bring_their_picture_back(trained_run, tmp_path):
    folder = trained_run / "finetune" / "pipeline"
    adapted, fresh = (SceneGraphToImagePipeline.from_pretrained(folder) for _ in range(2))
    for each in (adapted, fresh):
        each.set_progress_bar_config(disable=True)
    plain = draw(adapted, SHEEP, generator=seeded(0), num_inference_steps=1)
    lora.add_adapters(adapted.unet, 2, "attention")
    for name, parameter in adapted.unet.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3, generator=seeded(1)[0])
    drawn = draw(adapted, SHEEP, generator=seeded(0), num_inference_steps=1)
    with pytest.raises(ValueError, match=r"has LoRA adapters: call fuse_lora\(\) .*, or save_lora"):
        adapted.save_pretrained(tmp_path)
    adapted.save_lora(tmp_path, {"model": "owner/name", "clip": ""})
    loading.check(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"graph_encoder"}
    assert "# Scene graph to image" in (tmp_path / "README.md").read_text()
    fresh.load_lora_weights(tmp_path)
    np.testing.assert_allclose(draw(fresh, SHEEP, generator=seeded(0), num_inference_steps=1), drawn, atol=1e-4)
    assert np.abs(drawn - plain).max() > 0.01


def test_an_autoencoder_of_sdxl_in_fp16_decodes_in_fp32(pipeline, monkeypatch):
    """Its activations exceed fp16's range; the weights are fp16 again afterwards."""
    half, seen = copy.deepcopy(pipeline.vae).half(), []
    monkeypatch.setattr(pipeline, "vae", half)
    latents = torch.randn(1, 4, 16, 16, generator=seeded(0)[0])
    hook = half.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    pipeline.decode(latents, "pt")
    monkeypatch.setattr(pipeline, "text_encoder_2", pipeline.text_encoder)
    found = pipeline.decode(latents, "pt")
    hook.remove()
    assert seen == [torch.float16, torch.float32] and half.dtype == torch.float16
    with torch.no_grad():
        exact = copy.deepcopy(half).float().decode(latents / half.config.scaling_factor).sample
    torch.testing.assert_close(found, (exact / 2 + 0.5).clamp(0, 1))


class Zero(PipelineCallback):
    """Sets the latents to zero after the last step."""

    tensor_inputs = ["latents", "pred_x0"]  # noqa: RUF012 - diffusers' form

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert set(callback_kwargs) == {"latents", "pred_x0"}
        return {"latents": 0 * callback_kwargs["latents"]} if step_index == 2 else callback_kwargs


def test_diffusers_own_callbacks(pipeline):
    latents = draw(pipeline, SHEEP, output_type="latent", callback_on_step_end=Zero())
    assert torch.equal(latents, torch.zeros_like(latents))
    with pytest.raises(ValueError, match=r"prompt_embeds.*only") as error:  # there is no text to cut off here
        draw(pipeline, SHEEP, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
    assert "\n" not in str(error.value)


def test_words_outside_the_training_vocabulary_are_named_once_in_order(pipeline):
    known = sorted(pipeline.graph_encoder.config.trained_names)[-1]
    graphs = [SceneGraph((known, "zeppelin")), SceneGraph(("zeppelin", "abbey"), ((0, "frobs", 1),))]
    assert pipeline.unseen_names(graphs) == ["abbey", "frobs", "zeppelin"]
    assert pipeline.unseen_names([SceneGraph((known,))]) == []
