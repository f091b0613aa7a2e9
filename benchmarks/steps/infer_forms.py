"""The sampling forms that `sampling.py` measures: our pipeline, and diffusers' own on the same models.

Diffusers' pipeline gets the context of the graphs as its prompt embeddings, computed beforehand, while ours computes it
in every call. That pipeline has no argument for the mask of the padding, so the mask reaches its UNet through a hook.
All other settings are those of its users, including the VAE in the UNet's precision, where ours decodes in fp32.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from benchmarks.steps.forms import Size
from sgg_fast.config import ConfigError
from sgg_fast.diffusion.captured import CapturedUNet
from sgg_fast.drawing import load_model
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.fuse import fuse_for, unfuse
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_tokenizer
from sgg_fast.train.memory.blank import blank_conditioner, blank_foundation
from sgg_fast.train.outputs import make_pipeline

GUIDANCE = 7.5
NUM_OBJECTS, NUM_RELATIONS = 10, 6
"""Sizes of a graph like the average of Visual Genome's."""


def graph() -> SceneGraph:
    """The graph of every picture."""
    names = ("sheep", "grass", "sky", "house", "tree", "person", "hat", "boat", "sea", "dog")
    relations = [(k, "left of", (k + 1) % NUM_OBJECTS) for k in range(NUM_RELATIONS)]
    return SceneGraph(names, tuple(relations))


def open_models(model: str | None, device: torch.device, dtype: torch.dtype) -> SceneGraphToImagePipeline:
    """The pipeline of --model, or one of Stable Diffusion v1.4's sizes with random weights; its UNet is in `dtype`.

    Raises `ConfigError` for a model that cannot be loaded.
    """
    if model:
        try:
            pipeline = load_model(model).pipeline
        except ValueError as error:
            raise ConfigError(str(error)) from error
    else:
        config = recipe("vg256", precision="fp32", token_init="none")
        torch.manual_seed(0)
        with device:
            foundation = blank_foundation(config.model)
            conditioner = blank_conditioner(config.model, foundation).eval()
        foundation = dataclasses.replace(foundation, clip_tokenizer=toy_tokenizer())
        pipeline = make_pipeline(config, foundation, conditioner, with_text=False)
    # Diffusers' pipeline requires these values; it would otherwise change the scheduler.
    fixed = {"steps_offset": 1, "clip_sample": False}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **fixed)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device).unet.to(dtype)
    return pipeline


class SamplingForm(abc.ABC):
    """A form of sampling. `call` is how the host runs the UNet: eager, replay (captured) or compiled."""

    call = "eager"

    def __init__(self, pipeline: SceneGraphToImagePipeline, size: Size) -> None:
        self.pipeline, self.size = pipeline, size
        draw, side = torch.Generator().manual_seed(0), size.resolution // pipeline.vae_scale_factor
        self.noise = torch.randn(size.batch, pipeline.unet.config.in_channels, side, side, generator=draw)
        self.graphs = [graph()] * size.batch

    @abc.abstractmethod
    def draw(self, num_steps: int, output_type: str = "np") -> Any:
        """The pictures [B, H, W, 3] on the host, or with "latent" their latents [B, c, h, w]."""

    @torch.no_grad()
    def unet_call(self) -> Callable[[], object]:
        """One call of the UNet as in this form, with guidance and the context already computed."""
        context, mask = self.pipeline.encode_graphs(self.graphs)
        unet = self.pipeline.unet
        z, t = self.noise.to(unet.device, unet.dtype).repeat(2, 1, 1, 1), torch.zeros((), device=unet.device)
        context = context.to(unet.dtype)

        def call() -> object:
            with torch.no_grad():
                return unet(z, t, context, encoder_attention_mask=mask)

        return call

    def close(self) -> None:
        """Restore the models: stock and contiguous."""
        for model in (self.pipeline.unet, self.pipeline.vae):
            unfuse(model)
            model.to(memory_format=torch.contiguous_format)


class OurPipeline(SamplingForm):
    """Our pipeline with its users' settings."""

    def __init__(
        self, pipeline: SceneGraphToImagePipeline, size: Size, fused: bool = False, captured: bool = False,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(pipeline, size)
        pipeline.fuse_unet, pipeline.capture_unet = ("on" if fused else "off"), ("on" if captured else "off")
        self.call = "replay" if captured else "compiled" if compiled else "eager"
        pipeline.vae.float()
        self.stock = pipeline.unet
        fuse_for(pipeline.unet.device, pipeline.fuse_unet, pipeline.unet, pipeline.vae, channels_last=True)
        if compiled:
            pipeline.unet = torch.compile(pipeline.unet)

    def draw(self, num_steps: int, output_type: str = "np") -> Any:
        return self.pipeline(
            self.graphs, num_inference_steps=num_steps, guidance_scale=GUIDANCE, latents=self.noise,
            resolution=self.size.resolution, output_type=output_type,
        ).images  # fmt: skip

    def close(self) -> None:
        self.pipeline.unet, self.pipeline._captured = self.stock, CapturedUNet()
        super().close()


class StockPipeline(SamplingForm):
    """StableDiffusionPipeline around the same UNet and VAE."""

    def __init__(self, pipeline: SceneGraphToImagePipeline, size: Size, mode: str = "") -> None:
        """mode: of torch.compile; "" compiles nothing."""
        from diffusers import (
            StableDiffusionPipeline,
        )  # it prints during its import, so it comes after `quiet_libraries`

        super().__init__(pipeline, size)
        self.call = "compiled" if mode else "eager"
        dtype, device = pipeline.unet.dtype, pipeline.unet.device
        pipeline.vae.to(dtype)
        with torch.no_grad():
            context, mask = pipeline.encode_graphs(self.graphs)
        self.null, self.given = context.to(dtype).chunk(2)
        self.hook = pipeline.unet.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "encoder_attention_mask": mask}), with_kwargs=True
        )
        self.stock = StableDiffusionPipeline(
            vae=pipeline.vae, text_encoder=None, tokenizer=None, unet=pipeline.unet,
            scheduler=DDIMScheduler.from_config(pipeline.scheduler.config), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        ).to(device)  # fmt: skip
        self.stock.set_progress_bar_config(disable=True)
        if mode:  # the recommendation of diffusers' documentation
            self.stock.unet = torch.compile(self.stock.unet, mode=mode)
            self.stock.vae.decode = torch.compile(self.stock.vae.decode, mode=mode)

    def draw(self, num_steps: int, output_type: str = "np") -> Any:
        side = self.size.resolution
        return self.stock(
            prompt_embeds=self.given, negative_prompt_embeds=self.null, num_inference_steps=num_steps,
            guidance_scale=GUIDANCE, latents=self.noise.to(self.given), height=side, width=side,
            output_type=output_type,
        ).images  # fmt: skip

    def close(self) -> None:
        self.hook.remove()
        vars(self.pipeline.vae).pop("decode", None)
        self.pipeline.vae.float()
        super().close()


FORMS: dict[str, Callable[[SceneGraphToImagePipeline, Size], SamplingForm]] = {
    "captured": partial(OurPipeline, fused=True, captured=True),
    "fused": partial(OurPipeline, fused=True),
    "eager": OurPipeline,
    "diffusers": StockPipeline,
    "compiled": partial(OurPipeline, compiled=True),
    "diffusers-compiled": partial(StockPipeline, mode="default"),
    "diffusers-max-autotune": partial(StockPipeline, mode="max-autotune"),
}
"""The forms of `forms.SAMPLING`."""


def latents(form: SamplingForm, num_steps: int) -> np.ndarray:
    """Latents after `num_steps`, float64, on the host."""
    return form.draw(num_steps, "latent").double().cpu().numpy()


def reference(pipeline: SceneGraphToImagePipeline, size: Size, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents of diffusers' pipeline in fp32, without TF32, and in the UNet's own precision."""
    dtype, allowed = pipeline.unet.dtype, torch.backends.cudnn.allow_tf32
    found = []
    for precision in dict.fromkeys((torch.float32, dtype)):
        torch.backends.cudnn.allow_tf32 = precision == dtype and allowed
        pipeline.unet.to(precision)
        form = StockPipeline(pipeline, size)
        try:
            found.append(latents(form, num_steps))
        finally:  # also after an out-of-memory error
            form.close()
            pipeline.unet.to(dtype)
            torch.backends.cudnn.allow_tf32 = allowed
    return found[0], found[-1]
