"""The forms of a fine-tuning step that `finetune.py` measures: ours, and diffusers' text-to-image recipe.

Ours run through the trainer's own engines. The recipe (diffusers' `examples/text_to_image/train_text_to_image.py`) is
re-expressed in its own library calls: autoencoder and text encoder in the loop, fp32 UNet under autocast, AdamW.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import gc
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness.output import UnavailableError
from benchmarks.steps.forms import FINETUNE, NEEDS, Size, compiles
from sgg_fast.config import Config
from sgg_fast.nn.attention import set_attention
from sgg_fast.recipes import recipe
from sgg_fast.train.assemble import assemble
from sgg_fast.train.engines.choose import build_engine, plan_engine
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.planner import Planner

NUM_IMAGES = 32
"""Size of the random training set."""


def settings(quick: bool) -> Config:
    """The recipe whose settings all forms use: bf16, at SD v1.4's sizes or the toy's."""
    if quick:
        return recipe("toy", precision="bf16", token_init="none", batch_size=2, optimizer="adam8bit")
    return recipe("vg256", precision="bf16")


class Form(abc.ABC):
    """A step at a variable size. Its weights stay the initial ones, because it runs at a learning rate of 0."""

    references: dict[Size, tuple[list[float], list[float]]]
    """The first losses at each size, in fp32 and in plain bf16."""
    optimiser_bytes: int
    """Bytes that the update must read and write."""

    @abc.abstractmethod
    def prepare(self, size: Size) -> None:
        """Use images of this size from now on."""

    @abc.abstractmethod
    def step(self) -> None:
        """One training step."""

    @abc.abstractmethod
    def losses(self, num: int) -> list[float]:
        """Losses of the first steps with the current weights, in this form's own computation."""

    def planned(self, size: Size) -> int | None:
        """Planned peak in bytes; None if the planner does not cover the form."""
        return None


class Ours(Form):
    """The trainer's engine with some settings changed."""

    def __init__(
        self, config: Config, ds_path: str | None, sizes: Sequence[Size], device: torch.device, num: int
    ) -> None:
        self.config, self.device, self.ids = config, device, np.arange(config.optim.batch_size)
        self.ds = plan_engine(config.optim, "finetune", device, ds_path)
        torch.manual_seed(config.run.seed)
        with device:
            foundation = self.foundation = blank_foundation(config.model)
            conditioner = blank_conditioner(config.model, foundation)
        parts = foundation, conditioner, self._cache(sizes[0].resolution)
        self.stage = assemble(config, "finetune", *parts, device, self.ds)
        set_attention(foundation.unet, "sdpa", device)
        self.references = {}
        for size in sizes:
            Ours.prepare(self, size)
            self.references[size] = self._stage_losses(num, None), self._stage_losses(num, torch.bfloat16)
        set_attention(foundation.unet, config.model.attention, device, config.model.cross_attention)
        self.engine = build_engine(self.stage, device, self.ds)
        numel = sum(p.numel() for p in self.engine.module.parameters() if p.requires_grad)
        # Read weight, gradient and two bytes of state; write weight and state. DeepSpeed's also writes bf16 weights.
        optim = self.stage.config.optim
        weight, gradient = 2 if optim.weights == "lean" else 4, 2 if optim.bf16_weights else 4
        self.optimiser_bytes = numel * (2 * weight + gradient + 4 + (2 if self.ds else 0))
        self._step = 0

    def _cache(self, resolution: int) -> Any:
        torch.manual_seed(self.config.run.seed)
        config = self.config.replace(resolution=resolution)
        return blank_cache(config, self.foundation, NUM_IMAGES).to(self.device)

    @torch.no_grad()
    def _stage_losses(self, num: int, cast: torch.dtype | None) -> list[float]:
        with torch.autocast(self.device.type, cast) if cast else contextlib.nullcontext():
            return [self.stage(self.ids, step).total.item() for step in range(num)]

    def prepare(self, size: Size) -> None:
        self.stage.cache = self._cache(size.resolution)
        self.ids = np.arange(size.batch) % NUM_IMAGES

    def step(self) -> None:
        self.engine.update(self.ids[None], self._step, 0.0)
        self._step += 1

    @torch.no_grad()
    def losses(self, num: int) -> list[float]:
        return [self.engine.forward(self.ids, step).total.item() for step in range(num)]

    def planned(self, size: Size) -> int | None:
        return self._planner(size.resolution).plan(size.batch).peak

    @functools.cache  # noqa: B019 - as long-lived as the form
    def _planner(self, resolution: int) -> Planner:
        config = self.config.replace(resolution=resolution)
        return Planner(config, self.ds, self.device.type, num_images=NUM_IMAGES, stored=False)


class Captured(Ours):
    """The trainer's captured engine; its graphs are made for one size."""

    def losses(self, num: int) -> list[float]:
        """Losses of captured steps, because these are timed."""
        return [self.engine.update(self.ids[None], step, 0.0).losses["loss"].item() for step in range(num)]

    def prepare(self, size: Size) -> None:
        """Also releases the graphs of the previous size."""
        super().prepare(size)
        del self.engine
        gc.collect()
        self.stage.config = self.stage.config.replace(batch_size=size.batch)
        self.engine = build_engine(self.stage, self.device, self.ds)
        self._step = 0


class Diffusers(Form):
    """The recipe's step: encode the images, encode the texts, predict the noise, AdamW, clip at 1."""

    def __init__(
        self, config: Config, optimiser: str, attention: str, mode: str, sizes: Sequence[Size], device: torch.device,
        num: int,
    ) -> None:  # fmt: skip
        """mode: of torch.compile for the UNet; "" runs it as it is."""
        self.device = device
        self.cast = torch.float32 if config.optim.precision == "fp32" else torch.bfloat16
        torch.manual_seed(config.run.seed)
        with device:
            models = blank_foundation(config.model)
        self.vae, self.text_encoder, self.scheduler = models.vae, models.text_encoder, models.scheduler
        self.unet = models.unet.requires_grad_(True).train()
        del models.clip
        self._attend_by(attention)  # it may be unavailable, so it comes before anything slow
        set_attention(self.unet, "sdpa", device)
        exact = self._at_sizes(sizes, num, torch.float32)
        self.vae.to(self.cast)
        self.text_encoder.to(self.cast)
        low = self._at_sizes(sizes, num, self.cast)
        self.references = {size: (exact[size], low[size]) for size in sizes}
        self._attend_by(attention)
        if mode:
            self.unet.compile(mode=mode)
        self.optimizer = self._optimizer(optimiser)
        numel, state = sum(p.numel() for p in self.unet.parameters()), 2 if optimiser == "adamw8bit" else 8
        self.optimiser_bytes = numel * (3 * 4 + 2 * state)
        self._step = 0

    def _attend_by(self, attention: str) -> None:
        """Select the attention as the recipe does: xformers through diffusers' own switch."""
        if attention != "xformers":
            set_attention(self.unet, attention, self.device)
            return
        try:
            self.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError) as error:
            raise UnavailableError(f"skipped: diffusers' xformers: {' '.join(str(error).split())}") from error

    def _at_sizes(self, sizes: Sequence[Size], num: int, cast: torch.dtype) -> dict[Size, list[float]]:
        found = {}
        for size in sizes:
            self.prepare(size)
            found[size] = self._first_losses(num, cast)
        return found

    def _optimizer(self, kind: str) -> torch.optim.Optimizer:
        arguments = {"lr": 0.0, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
        if kind.startswith("adamw") and kind != "adamw8bit":
            return torch.optim.AdamW(self.unet.parameters(), fused=True if kind == "adamw-fused" else None, **arguments)
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(self.unet.parameters(), **arguments)

    def prepare(self, size: Size) -> None:
        resolution, batch = size.resolution, size.batch
        generator = torch.Generator(self.device).manual_seed(0)
        self.pixels = torch.rand(batch, 3, resolution, resolution, device=self.device, generator=generator) * 2 - 1
        vocabulary, length = self.text_encoder.config.vocab_size, self.text_encoder.config.max_position_embeddings
        self.tokens = torch.randint(vocabulary, (batch, length), device=self.device, generator=generator)

    def _loss(self, step: int, cast: torch.dtype) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(step)
        posterior = self.vae.encode(self.pixels.to(cast)).latent_dist
        latents = posterior.mean + posterior.std * _normal_like(posterior.mean, generator)
        latents = latents * self.vae.config.scaling_factor
        noise = _normal_like(latents, generator)
        num_steps = self.scheduler.config.num_train_timesteps
        t_B = torch.randint(num_steps, (len(latents),), device=self.device, generator=generator)
        noisy = self.scheduler.add_noise(latents.float(), noise.float(), t_B).to(cast)
        context = self.text_encoder(self.tokens, return_dict=False)[0]
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, t_B)
        with torch.autocast(self.device.type, cast, enabled=cast != torch.float32):
            predicted = self.unet(noisy, t_B, context, return_dict=False)[0]
        return nn.functional.mse_loss(predicted.float(), target.float())

    @torch.no_grad()
    def _first_losses(self, num: int, cast: torch.dtype) -> list[float]:
        return [self._loss(step, cast).item() for step in range(num)]

    def losses(self, num: int) -> list[float]:
        return self._first_losses(num, self.cast)

    def step(self) -> None:
        self._loss(self._step, self.cast).backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._step += 1


def _normal_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(tensor.shape, device=tensor.device, generator=generator).to(tensor.dtype)


def call_of(name: str) -> str:
    """The value of `OpRow.call` for the form."""
    if name.startswith("captured"):
        return "replay"
    return "compiled" if compiles(name) else "eager"


def build(name: str, config: Config, sizes: Sequence[Size], device: torch.device, num_losses: int) -> Form:
    """The form `name` with its references at `sizes`. Raises `UnavailableError` if it cannot run here."""
    changes, other = FINETUNE[name]
    captured = call_of(name) == "replay"
    if captured and device.type != "cuda":
        raise UnavailableError("skipped: CUDA graphs need a GPU")
    if absent := [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]:
        raise UnavailableError(f"skipped: not installed here: {', '.join(absent)}")
    if name.startswith("diffusers"):
        assert other is not None
        attention = changes["attention"] if device.type == "cuda" else "sdpa"
        return Diffusers(config, other, attention, changes.get("compile", ""), sizes, device, num_losses)
    kind = Captured if captured else Ours
    return kind(config.replace(**changes), other, sizes, device, num_losses)
