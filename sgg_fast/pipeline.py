"""Scene graphs to pictures as a diffusers pipeline; infer.py uses it."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sgg_fast.commands import NotFiniteError
from sgg_fast.diffusion.captured import CapturedUNet, watched
from sgg_fast.diffusion.compiled import CompiledUNet
from sgg_fast.diffusion.sampling import conditions, sample_latents
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.model_card import write_card
from sgg_fast.nn import loading, lora
from sgg_fast.nn.backbone import Backbone, added
from sgg_fast.nn.clip import TextTowers, embed_names
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.fuse import fuse_for, unfuse
from sgg_fast.nn.lora.methods import LoraMethods
from sgg_fast.nn.pipeline_parts import PARTS, load_pipeline_parts

Generators = torch.Generator | Sequence[torch.Generator] | None

MAX_KEPT = 8
"""Most kept conditions; the oldest is removed first."""


class SceneGraphToImagePipeline(LoraMethods, DiffusionPipeline):
    """Stable Diffusion conditioned on scene graphs (SGG-IG, Wang et al., AAAI-25).

    `save_pretrained` writes a diffusers folder, safetensors only, with a model card; its UNet loads in stock diffusers.
    `text_encoder` and `tokenizer` come from the base model and are kept for further training, as are SDXL's second ones
    and its `force_zeros_for_empty_prompt`. `provenance` holds the facts of the training for the model card
    (`sgg_fast.model_card.provenance`).
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->graph_clip->graph_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "pred_x0"]

    fuse_unet: str = "auto"
    """Fused kernels and merged projections in UNet and VAE, set in place at the next call: auto (on CUDA), on, off."""
    capture_unet: str = "auto"
    """The UNet's step as a CUDA graph: auto (if it can be captured), on (or ValueError), off. CUDA-graph replay
    bypasses Python hooks of the UNet: use off with hooks."""
    compile_unet: bool = False
    """Run the UNet by torch.compile, in place of the fused kernels. A compiled UNet is captured, too."""
    deterministic: bool = False
    """The same numbers in every process on a GPU: cuDNN does not try its algorithms before a capture."""
    keep_conditions: bool = False
    """Keep the conditions of the last graphs for the next calls. The weights of the encoders must not change."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        graph_encoder: Conditioner,
        graph_clip: CLIPModel,
        graph_tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        resolution: int = 512,
        sampling_steps: int = 100,
        guidance: float = 7.5,
        provenance: dict[str, Any] | None = None,
        force_zeros_for_empty_prompt: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2, unet=unet, scheduler=scheduler, graph_encoder=graph_encoder,
            graph_clip=graph_clip, graph_tokenizer=graph_tokenizer,
        )  # fmt: skip
        self.register_to_config(
            resolution=resolution, sampling_steps=sampling_steps, guidance=guidance, provenance=provenance,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )  # fmt: skip
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._interrupt, self._guidance_scale = False, guidance
        self._captured = CapturedUNet()
        self._compiled: CompiledUNet | None = None
        self._kept: dict[Hashable, tuple[torch.Tensor, ...]] = {}

    @property
    def towers(self) -> TextTowers | None:
        """SD's text encoders with their tokenizers; None for a pipeline without them."""
        pairs = ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2))
        there = [pair for pair in pairs if pair[0] is not None]
        return TextTowers(tuple(encoder for encoder, _ in there), tuple(words for _, words in there)) if there else None

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """True after a callback set `pipe._interrupt = True`: sampling ends after the current step."""
        return self._interrupt

    def unseen_names(self, graphs: Sequence[SceneGraph]) -> list[str]:
        """Sorted words of `graphs` outside the training vocabulary. They still work: the README has the details."""
        trained = set(self.graph_encoder.config.trained_names)
        return sorted({name for graph in graphs for name in graph.names} - trained)

    def encode_graphs(
        self,
        graphs: Sequence[SceneGraph],
        num_images_per_prompt: int = 1,
        guided: bool = True,
        relation_guided: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Context [k B, T, C] and mask [k B, T] of every picture, in the order of `sampling.conditions`; for SDXL also
        the pooled vectors [k B, K].

        With `guided` the B rows of the null condition are first; with `relation_guided` the graphs without their
        relations follow; the graphs' own rows are last. Equal graphs are encoded once.
        """
        bare = [SceneGraph(graph.objects) for graph in graphs] if relation_guided else []
        content = [_content(graph) for graph in (*bare, *graphs) for _ in range(num_images_per_prompt)]
        distinct = [SceneGraph(*of_graph) for of_graph in dict.fromkeys(content)]
        table = NameTable()
        batch = SceneGraphBatch.from_graphs(distinct, table).to(self._execution_device)
        raw = embed_names(self.graph_clip, self.graph_tokenizer, table.spoken()).to(self.graph_encoder.device)
        said = self.graph_encoder.read(distinct, table, self.towers)
        given = self.graph_encoder(self.graph_encoder.names_of(table, raw), batch, said)
        own = [x for x in (given.context, given.mask, given.pooled) if x is not None]
        row = {of_graph: number for number, of_graph in enumerate(dict.fromkeys(content))}
        rows = torch.tensor([row[of_graph] for of_graph in content]).to(given.context.device)
        own = [x[rows] for x in own]
        if guided:
            num_images = len(graphs) * num_images_per_prompt
            null = [*self.graph_encoder.null_condition(num_images, given.context.shape[1])]
            if self.graph_encoder.null_pooled is not None:
                null.append(self.graph_encoder.null_pooled.expand(num_images, -1))
            own = [torch.cat([none.to(x), x]) for none, x in zip(null, own, strict=True)]
        return tuple(own)

    @torch.no_grad()
    def __call__(
        self,
        graphs: SceneGraph | Sequence[SceneGraph],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        resolution: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        relation_guidance: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
    ) -> ImagePipelineOutput:
        """Draw `num_images_per_prompt` pictures a graph; the pictures of one graph are adjacent.

        Defaults of steps and guidance come from the recipe (the paper's: DDIM with 100 steps). Set another scheduler
        with `pipe.scheduler = X.from_config(pipe.scheduler.config)`.

        generator: one for all pictures, or one a picture (then a picture's noise does not depend on the others).
        latents: [B, c, height / f, width / f] unit noise in place of drawn noise. height, width: pixels;
        `resolution` sets both and defaults to the trained one. output_type: "pil", "np" for float [B, H, W, 3] in
        0..1, "pt" for [B, 3, H, W], or "latent". return_dict: False gives (images,).
        callback_on_step_end(pipe, step, timestep, {"latents": ...}), or a diffusers `PipelineCallback`, returns a dict;
        sampling continues with its latents. With "pred_x0" in callback_on_step_end_tensor_inputs it also gets the
        clean latents that the step predicts. relation_guidance: weight of the guidance by relations alone
        (`sampling.guided`); 0 turns it off, otherwise the UNet's batch has one more copy of every picture.
        original_size (height, width; by default those of the picture), crops_coords_top_left: SDXL's conditions.
        Raises ValueError for arguments that do not fit, `NotFiniteError` as `decode`.
        """
        graphs = [graphs] if isinstance(graphs, SceneGraph) else list(graphs)
        side = resolution or self.config.resolution
        shape = self._latent_shape(height or side, width or side)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        num_images, device = len(graphs) * num_images_per_prompt, self._execution_device
        if strays := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {sorted(strays)}: only {self._callback_tensor_inputs}"
            )
        num_steps = self.config.sampling_steps if num_inference_steps is None else num_inference_steps
        self._guidance_scale = self.config.guidance if guidance_scale is None else guidance_scale
        self._interrupt = False
        fuse_for(device, self.fuse_unet, *([] if self.compile_unet else [self.unet]), self.vae, channels_last=True)
        noise = self._noise(num_images, shape, generator) if latents is None else latents
        if noise.shape != (num_images, *shape):
            raise ValueError(f"latents of shape {tuple(noise.shape)}, not {(num_images, *shape)}")
        noise = noise.to(device, torch.promote_types(self.unet.dtype, torch.float32))
        given_sizes = original_size, crops_coords_top_left
        denoise = self._denoiser(graphs, num_images_per_prompt, noise, relation_guidance, given_sizes)
        further: dict[str, torch.Tensor] = {}

        def on_x0(pred_x0: torch.Tensor) -> None:
            further["pred_x0"] = pred_x0

        def on_step(step: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
            if callback_on_step_end is not None:
                tensors = {"latents": latents, **further}
                latents = (callback_on_step_end(self, step, t, tensors) or {}).get("latents", latents)
            return None if self.interrupt else latents

        with lora.autocast_mixed(self.unet):
            latents = sample_latents(
                denoise,
                self.scheduler,
                noise,
                num_steps,
                track=self.progress_bar,
                generator=generator,
                on_step=on_step,
                on_x0=on_x0 if "pred_x0" in callback_on_step_end_tensor_inputs else None,
            )
        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _execution_device(self) -> torch.device:
        """The UNet's device: a training run's sample sheet may leave the frozen models in CPU memory."""
        return super()._execution_device if hasattr(self.unet, "_hf_hook") else self.unet.device

    def _denoiser(
        self,
        graphs: Sequence[SceneGraph],
        num_images_per_prompt: int,
        noise: torch.Tensor,
        relation_guidance: float,
        given_sizes: tuple[tuple[int, int] | None, tuple[int, int]],
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The guided UNet in its own dtype with the graphs' context, as a function of time and latents like `noise`."""
        asked = conditions(self.guidance_scale, relation_guidance)
        context, mask, *pooled = self._conditions(graphs, num_images_per_prompt, asked)
        if not pooled and (given_sizes[0] or any(given_sizes[1])):
            raise ValueError("original_size and crops_coords_top_left: only SDXL's UNet reads them")
        height, width = (self.vae_scale_factor * side for side in noise.shape[2:])
        sizes = Backbone.of(self.unet.config).sizes(height, width, len(context), noise.device, *given_sizes)
        more = added(pooled[0].to(self.unet.dtype), sizes) if pooled else None
        self._captured.search = not self.deterministic
        with lora.autocast_mixed(self.unet):  # the capture is made here
            return self._captured.denoiser(
                self.unet, noise, context.to(self.unet.dtype), mask, self.capture_unet, more,
                self.guidance_scale, relation_guidance, self._compiled_unet(),
            )  # fmt: skip

    def _conditions(
        self, graphs: Sequence[SceneGraph], num_images_per_prompt: int, asked: tuple[str, ...]
    ) -> tuple[torch.Tensor, ...]:
        """`encode_graphs`, or its result for the same graphs with `keep_conditions`."""
        kept = self._kept if self.keep_conditions else {}
        key = self.graph_encoder, self._execution_device, num_images_per_prompt, asked, *map(_content, graphs)
        if key not in kept:
            while len(kept) >= MAX_KEPT:
                del kept[next(iter(kept))]
            kept[key] = self.encode_graphs(graphs, num_images_per_prompt, "null" in asked, "bare" in asked)
        return kept[key]

    def _compiled_unet(self) -> CompiledUNet | None:
        """The compiled UNet with `compile_unet`, if no attention processor looks at the calls."""
        if not self.compile_unet or watched(self.unet):
            return None
        unfuse(self.unet)
        if self._compiled is None or self._compiled.unet is not self.unet:
            self._compiled = CompiledUNet(self.unet)
        return self._compiled

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self.vae_scale_factor
        for side in (height, width):
            if side < factor or side % factor:
                raise ValueError(f"resolution {side} is not a multiple of {factor}")
        return self.unet.config.in_channels, height // factor, width // factor

    @staticmethod
    def _noise(num_images: int, shape: tuple[int, int, int], generator: Generators) -> torch.Tensor:
        """Unit noise [B, c, h, w], drawn on the CPU, so that a seed gives the same picture on every device."""
        generators = [generator] * num_images if not isinstance(generator, Sequence) else list(generator)
        if len(generators) != num_images:
            raise ValueError(f"{len(generators)} generators for {num_images} pictures")
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Pictures of latents [B, c, h, w] in the form `output_type` of `__call__`.

        "pil", whose bytes cannot show NaN or Inf, raises `NotFiniteError` for them, naming the weight at fault.
        """
        latents = latents / self.vae.config.scaling_factor
        fragile = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        with _in_fp32(self.vae) if fragile and self.text_encoder_2 is not None else contextlib.nullcontext():
            decoded = decode_latents(self.vae, latents)
        if output_type == "pil" and not (latents.isfinite().all() and decoded.isfinite().all()):
            raise NotFiniteError(f"a picture ends in numbers that are not finite, and is not saved: {self._culprit()}")
        return self.image_processor.postprocess(decoded.float(), output_type=output_type)

    def _culprit(self) -> str:
        """A weight that is not finite, or advice about the settings."""
        for part in ("graph_encoder", "graph_clip", "text_encoder", "text_encoder_2", "unet", "vae"):
            module = getattr(self, part)
            tensors = module.state_dict().items() if module is not None else ()
            if name := next((name for name, tensor in tensors if not tensor.isfinite().all()), None):
                return f"{name} of {part} holds such numbers already: get the model again"
        return "lower --guidance or --relation-guidance, or take another --scheduler or number of --steps"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """The pipeline in a folder or of a hub id. Parts and settings in `kwargs` replace those of the folder.

        Raises `ModelError`, one line that names file and cause, for a part that is missing, damaged or of another kind.
        The folder of a LoRA run names its base; `base` gives another place of it. With other arguments of diffusers
        than `torch_dtype` (such as `variant`), diffusers loads the parts, with fewer checks.
        """
        dtype, base = kwargs.pop("torch_dtype", None), kwargs.pop("base", None)
        kwargs.pop("use_safetensors", None)
        place = str(pretrained_model_name_or_path)
        if kwargs.keys() - inspect.signature(cls).parameters.keys():
            more = {} if dtype is None else {"torch_dtype": dtype}
            with loading.border(f"{place}: cannot be loaded"):
                return super().from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **more, **kwargs)
        root = loading.find_folder("model", place, ("", *PARTS))
        with loading.border(f"{place}: cannot be loaded"):
            pipeline = cls(**{**load_pipeline_parts(root, kwargs, base), **kwargs})
        return pipeline if dtype is None else pipeline.to(dtype=dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write a diffusers folder with a model card (README.md), a `pipeline.py` for stock diffusers, and the SHA-256
        of each file. Raises ValueError if the UNet has adapters: its own layers cannot be read through them."""
        if lora.has_adapters(self.unet):
            raise ValueError(
                "the UNet has LoRA adapters: call fuse_lora() and unload_lora_weights(), or save_lora(FOLDER, base)"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        loading.forget_places(Path(save_directory))
        write_card(self, save_directory)
        loading.seal(Path(save_directory))

    def save_lora(self, folder: str | os.PathLike, base: dict[str, str]) -> None:
        """Write what a LoRA run trained: the UNet's adapters in diffusers' file, and the graph encoder, with a card.

        base: "model" and "clip", folder or hub id of the models that were not trained; "" for those of the toy.
        """
        self._write_lora(Path(folder), base)
        loading.forget_places(Path(folder))
        write_card(self, folder)
        loading.seal(Path(folder))

    def enable_vae_slicing(self) -> None:
        """Decode one picture at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all pictures at once, if they fit in memory."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in tiles."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode pictures whole, if they fit in memory."""
        self.vae.disable_tiling()

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: the encoders are read outside of their layers' calls."""
        raise ValueError("enable_sequential_cpu_offload does not work here: use enable_model_cpu_offload()")

    def _upload_folder(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Upload for `push_to_hub`, with this model card in place of its empty one."""
        write_card(self, working_dir)
        loading.seal(Path(working_dir))
        return super()._upload_folder(working_dir, *args, **kwargs)


def _content(graph: SceneGraph) -> tuple[tuple[str, ...], tuple[tuple[int, str, int], ...]]:
    """Objects and relations as tuples, equal for equal graphs."""
    return tuple(graph.objects), tuple((subject, predicate, obj) for subject, predicate, obj in graph.relations)


@contextlib.contextmanager
def _in_fp32(vae: AutoencoderKL) -> Iterator[None]:
    """SDXL's autoencoder in fp32: its activations exceed fp16's range."""
    vae.float()
    try:
        yield
    finally:
        vae.half()


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Unscaled latents [B, c, h, w] -> pictures [B, 3, H, W] in the VAE's dtype, as many at once as fit in memory.

    A single picture that is too large is decoded in tiles if the VAE supports tiles of a smaller size; diffusers blends
    the seams.
    """
    latents, at_once = latents.to(vae.dtype), len(latents)
    tiled = vae.use_tiling
    try:
        while True:
            try:
                return torch.cat([vae.decode(part).sample for part in latents.split(at_once)])
            except torch.OutOfMemoryError:
                if at_once == 1 and (vae.use_tiling or max(latents.shape[2:]) <= vae.tile_latent_min_size):
                    raise
            if at_once == 1:
                vae.enable_tiling()
            at_once = max(at_once // 2, 1)
    finally:
        vae.use_tiling = tiled
