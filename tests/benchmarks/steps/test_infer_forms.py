"""The forms of sampling: all draw what diffusers draws, and leave stock models behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.steps import forms, infer_forms
from benchmarks.steps.forms import Size
from sgg_fast.nn.fuse import FusedResnetBlock2D
from sgg_fast.pipeline import SceneGraphToImagePipeline

ONE = Size(64, 1)


@pytest.fixture(scope="module")
def pipeline() -> SceneGraphToImagePipeline:
    return infer_forms.open_models("toy", torch.device("cpu"), torch.float32)


def test_without_a_model_it_is_of_stable_diffusions_size():
    """Built without memory."""
    pipeline = infer_forms.open_models(None, torch.device("meta"), torch.float16)
    assert sum(p.numel() for p in pipeline.unet.parameters()) == 859_520_964
    assert (pipeline.unet.dtype, pipeline.vae.dtype, pipeline.vae_scale_factor) == (torch.float16, torch.float32, 8)
    assert pipeline.graph_encoder.config.context_dim == 768 and pipeline.scheduler.config.steps_offset == 1


def test_a_closed_form_leaves_stock_models_behind(pipeline):
    form = infer_forms.FORMS["fused"](pipeline, ONE)
    assert any(type(module) is FusedResnetBlock2D for module in pipeline.unet.modules())
    form.close()
    assert not any(type(module) is FusedResnetBlock2D for module in pipeline.unet.modules())
    assert all(p.is_contiguous() for p in pipeline.unet.parameters())
    form = infer_forms.FORMS["diffusers"](pipeline, ONE)
    assert pipeline.unet._forward_pre_hooks
    form.close()
    assert not pipeline.unet._forward_pre_hooks and pipeline.vae.dtype == torch.float32


def test_our_latents_are_those_of_diffusers(pipeline):
    exact, low = infer_forms.reference(pipeline, ONE, 2)
    assert exact.dtype == np.float64 and (exact == low).all(), "the UNet is in fp32 already"
    form = infer_forms.FORMS["eager"](pipeline, ONE)
    found = infer_forms.latents(form, 2)
    pictures = form.draw(1)
    form.close()
    assert found.shape == exact.shape == form.noise.shape
    assert np.linalg.norm(found - exact) < 1e-4 * np.linalg.norm(exact)
    assert pictures.shape == (1, 64, 64, 3) and 0 <= pictures.min() < pictures.max() <= 1


def test_a_call_of_the_unet_is_of_both_guided_halves(pipeline):
    form = infer_forms.FORMS["diffusers"](pipeline, Size(64, 3))
    seen = []
    hook = pipeline.unet.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[0]))
    form.unet_call()()
    hook.remove()
    form.close()
    assert seen == [6]


def test_every_name_has_a_form_and_its_graph_is_of_average_size():
    assert list(infer_forms.FORMS) == list(forms.SAMPLING)
    graph = infer_forms.graph()
    assert (len(graph.objects), len(graph.relations)) == (10, 6)
