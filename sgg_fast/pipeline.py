"""Scene graphs in, pictures out, as a diffusers pipeline. What infer.py calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from sgg_fast.diffusion.sampling import sample_latents
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.clip import embed_names, phrase_states
from sgg_fast.nn.conditioner import SceneGraphConditioner


class SceneGraphToImagePipeline(DiffusionPipeline):
    """Stable Diffusion conditioned on scene graphs (SGG-IG, Wang et al., AAAI-25).

    `save_pretrained` writes a diffusers folder, safetensors only; the UNet in it loads in stock diffusers.
    `text_encoder` and `tokenizer` are the base model's, kept for further training.
    """

    model_cpu_offload_seq = "graph_clip->graph_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        graph_encoder: SceneGraphConditioner,
        graph_clip: CLIPModel,
        graph_tokenizer: CLIPTokenizer,
        resolution: int = 512,
        sampling_steps: int = 100,
        guidance: float = 7.5,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            graph_encoder=graph_encoder, graph_clip=graph_clip, graph_tokenizer=graph_tokenizer,
        )  # fmt: skip
        self.register_to_config(resolution=resolution, sampling_steps=sampling_steps, guidance=guidance)

    def unseen_names(self, graphs: Sequence[SceneGraph]) -> list[str]:
        """Words of `graphs` that the graph encoder never saw in training, sorted. They still work: see the README."""
        trained = set(self.graph_encoder.config.trained_names)
        return sorted({name for graph in graphs for name in graph.names} - trained)

    @torch.no_grad()
    def __call__(
        self,
        graphs: SceneGraph | Sequence[SceneGraph],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        resolution: int | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One picture a graph. Steps and guidance are the recipe's unless given (the paper's: DDIM with 100 steps).

        generator: one for all graphs, or one a graph (then a graph's noise does not depend on the others).
        resolution: pixels a side, the trained one unless given. output_type: "pil", or "np" for float
        [B, H, W, 3] in 0..1. Raises ValueError for a resolution that is not a multiple of the VAE's factor.
        """
        graphs = [graphs] if isinstance(graphs, SceneGraph) else list(graphs)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side, device = resolution or self.config.resolution, self._execution_device
        if side < factor or side % factor:
            raise ValueError(f"resolution {side} is not a multiple of {factor}")
        num_steps = self.config.sampling_steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.guidance if guidance_scale is None else guidance_scale
        table = NameTable()
        batch = SceneGraphBatch.from_graphs(graphs, table).to(device)
        names = self.graph_encoder.standardise(embed_names(self.graph_clip, self.graph_tokenizer, table.spoken()))
        phrases = None
        if self.graph_encoder.config.token_init == "text":
            phrases = phrase_states(self.text_encoder, self.tokenizer, table.phrases)
        given = self.graph_encoder(names, batch, phrases)
        context, mask = given.context, given.mask
        if guidance != 1:
            null_context, null_mask = self.graph_encoder.null_condition(len(graphs), context.shape[1])
            context, mask = torch.cat([null_context.to(context), context]), torch.cat([null_mask, mask])

        generators = [generator] * len(graphs) if not isinstance(generator, Sequence) else list(generator)
        shape = (self.unet.config.in_channels, side // factor, side // factor)
        # Drawn on the CPU, so that a seed means the same picture on every device.
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device, self.unet.dtype)

        def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.unet(z, t, context.to(z.dtype), encoder_attention_mask=mask).sample

        latents = sample_latents(denoise, self.scheduler, noise, num_steps, guidance, self.progress_bar)
        decoded = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = ((decoded.float() / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).cpu().numpy()
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images if output_type == "np" else self._to_pil(images))

    @staticmethod
    def _to_pil(images: np.ndarray) -> list:
        return DiffusionPipeline.numpy_to_pil(images)
