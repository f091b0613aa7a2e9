"""Trains the parts of the toy's foundation and its judging networks, and ships the models, for `build.py`."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from sgg_fast.data.cache import to_bytes, to_pixels
from sgg_fast.diffusion import noise
from sgg_fast.diffusion.sampling import sample_latents
from sgg_fast.drawing.models import SHIPPED, load_model, made_scheduler
from sgg_fast.eval.pictures import through_vae
from sgg_fast.eval.report import contact_sheet, read_result
from sgg_fast.graph import SPOKEN
from sgg_fast.model_card import write_card
from sgg_fast.nn.clip import normalise_pixels
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.loading import digest, forget_places, load_weights, seal
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.recipes import toy_words
from sgg_fast.toy import world
from sgg_fast.toy.captions import caption
from sgg_fast.toy.detector import train_detector
from sgg_fast.toy.features import train_features
from sgg_fast.toy.fit import fit, save_half
from sgg_fast.toy.models import (
    make_tokenizer,
    toy_clip,
    toy_foundation,
    toy_scheduler,
    toy_tokenizer,
    toy_unet,
    toy_vae,
    weight_file,
)
from sgg_fast.toy.text_unet import build_text_unet, encode
from sgg_fast.toy.world import HELD_OUT_SEED, TRAIN_SEED

SAMPLING_STEPS = 25
"""Sampling steps of the shipped model."""
SHEET = Path(__file__).parent / "sheet.png"


def draw(seed: int, num: int, first: int = 0) -> np.ndarray:
    """uint8 [num, 64, 64, 3]: scenes of the world `seed`, from number `first` on."""
    numbers = tqdm(range(first, first + num), desc="draw", disable=None, leave=False)
    return np.stack([world.draw_scene(seed, i).image for i in numbers])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between uint8 pictures: the mean over pictures of each one's peak signal-to-noise ratio."""
    mse = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).reshape(len(a), -1).mean(axis=1)
    return float((10 * np.log10(255**2 / np.maximum(mse, 1e-10))).mean())


def sheet(rows: list[np.ndarray], path: Path, zoom: int = 3) -> None:
    """Write rows of pictures [num, H, W, 3], one below the other, enlarged without smoothing."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    picture = Image.fromarray(grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def build_vae(out: Path, num_steps: int, num_scenes: int, batch: int = 16) -> nn.Module:
    """AutoencoderKL f4 with 4 channels: squared and absolute error, and a light KL term. Gate: 32 dB held out."""
    images, held_out = draw(TRAIN_SEED, num_scenes), draw(HELD_OUT_SEED, 256)
    torch.manual_seed(0)
    vae = toy_vae().to(memory_format=torch.channels_last)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([TRAIN_SEED, step])
        chosen = images[rng.integers(len(images), size=batch)]
        mirrored = rng.random(batch) < 0.5
        chosen[mirrored] = chosen[mirrored, :, ::-1]
        pixels = to_pixels(chosen).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        square = error.square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return 5 * square + error.abs().mean() + 1e-4 * kl, {
            "dB": 10 * math.log10(4 / float(square.detach())),
            "kl": float(kl.detach()),
        }

    def look(ema: nn.Module, step: int) -> str:
        through = through_vae(ema, held_out)
        sheet([held_out[:10], through[:10]], out / "vae" / "samples" / f"step-{step:06d}.png")
        return f"held-out PSNR {psnr(held_out, through):.2f} dB"

    return fit("vae", vae, loss_of, out / "vae", num_steps, peak_lr=2e-3, look=look)


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    """Tokens padded to the longest text of the batch, not to 77: under causal attention the rest changes nothing."""
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt"))


def build_clip(out: Path, num_steps: int, num_scenes: int, batch: int = 96, spoken: bool = False) -> nn.Module:
    """CLIP on (sentence, picture) pairs, symmetric InfoNCE. Monitored: held-out retrieval, 256 pairs, chance 1/256.

    spoken: train on scenes of `toy-words`, with a tokenizer of its words, which is saved beside the weights.
    """
    tokenizer = toy_tokenizer()
    if spoken:
        words = {word for name in world.vocabulary(spoken=True) for word in name.split()}
        tokenizer = make_tokenizer(words | {word for name in SPOKEN.values() for word in name.split()})
        tokenizer.save_pretrained(out / "tokenizer")
    numbers = tqdm(range(num_scenes), desc="draw", disable=None, leave=False)
    scenes = [world.draw_scene(TRAIN_SEED, i, spoken=spoken) for i in numbers]
    held_out = [world.draw_scene(HELD_OUT_SEED, i, spoken=spoken) for i in range(256)]
    torch.manual_seed(0)
    clip = toy_clip(tokenizer)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([TRAIN_SEED, step])
        chosen = [scenes[i] for i in rng.integers(len(scenes), size=batch)]
        texts = _tokens(tokenizer, [caption(s.graph, rng, partial=0.3) for s in chosen])
        out = clip(**texts, pixel_values=clip_pixels(clip, np.stack([s.image for s in chosen])), return_loss=True)
        return out.loss, {"loss": float(out.loss.detach()), "scale": float(clip.logit_scale.detach().exp())}

    @torch.no_grad()
    def look(ema: nn.Module, step: int) -> str:
        texts = _tokens(tokenizer, [caption(s.graph) for s in held_out])
        logits = ema(**texts, pixel_values=clip_pixels(ema, np.stack([s.image for s in held_out]))).logits_per_image
        right = logits.argmax(dim=1) == torch.arange(len(held_out))
        return f"held-out image to text top-1 {right.float().mean():.3f} (chance {1 / len(held_out):.3f})"

    return fit("clip", clip, loss_of, out / "clip", num_steps, peak_lr=1e-3, look=look, weight_decay=0.02)


def build_unet(out: Path, num_steps: int, num_scenes: int, batch: int = 32) -> nn.Module:
    """The text-conditioned UNet: v-prediction on latents, sentences through CLIP's text tower, 10 % unconditional."""
    foundation = toy_foundation(weights=out)
    graphs = [
        world.draw_scene(TRAIN_SEED, i).graph for i in tqdm(range(num_scenes), desc="graphs", disable=None, leave=False)
    ]
    latents = torch.cat([encode(foundation, draw(TRAIN_SEED, 1000, i)) for i in range(0, num_scenes, 1000)])
    torch.manual_seed(0)
    unet = toy_unet()
    abar = foundation.scheduler.alphas_cumprod

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([TRAIN_SEED, step])
        chosen = rng.integers(len(graphs), size=batch)
        texts = ["" if rng.random() < 0.1 else caption(graphs[i], rng, partial=0.1) for i in chosen]
        context, _ = foundation.towers.read(texts)
        z_0, t = latents[chosen], torch.from_numpy(rng.integers(len(abar), size=batch))
        eps = torch.randn(z_0.shape)
        target = noise.target_of("v_prediction", z_0, eps, abar[t])
        predicted = unet(noise.add_noise(z_0, eps, abar[t]), t, context).sample
        loss = (predicted - target).square().mean()
        return loss, {"loss": float(loss.detach())}

    held_out = [world.draw_scene(HELD_OUT_SEED, i) for i in range(12)]

    def look(ema: nn.Module, step: int) -> str:
        drawn = draw_texts(foundation, ema, [caption(s.graph) for s in held_out])
        sheet([np.stack([s.image for s in held_out]), drawn], out / "unet" / "samples" / f"step-{step:06d}.png")
        return "sample sheet written"

    return fit("unet", unet, loss_of, out / "unet", num_steps, peak_lr=1e-3, ema_decay=0.9995, look=look)


def clip_pixels(clip: nn.Module, images: np.ndarray) -> torch.Tensor:
    """uint8 pictures as input of CLIP's image tower."""
    return normalise_pixels(clip, to_pixels(images))


@torch.no_grad()
def draw_texts(foundation: Foundation, unet: nn.Module, texts: list[str], guidance: float = 4.0) -> np.ndarray:
    """uint8 pictures of sentences, 40 DDIM steps, noise from seed 0."""
    context, _ = foundation.towers.read([""] * len(texts) + texts)
    start = torch.randn(len(texts), 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return unet(z, t, context).sample

    latents = sample_latents(denoise, toy_scheduler(), start, 40, guidance)
    return to_bytes(foundation.vae.decode(latents / foundation.vae.config.scaling_factor).sample)


def ship(run: Path, folder: Path, other: Path | None = None) -> None:
    """Copy the pipeline of a finished `train.py --out RUN`, in fp16, to the place of infer.py's default model.

    It samples with 25 steps of DPM-Solver++, whose pictures are no worse than those of 100 of DDIM, and with the
    guidance of the recipe `toy-words` (benchmarks/LOG.md). other: the run that it continued; the weights are then the
    mean of both (Wortsman et al., Model soups, ICML 2022). Raises ValueError for a run with weights of other shapes.
    """
    pipeline, *more = (
        SceneGraphToImagePipeline.from_pretrained(out / "finetune" / "pipeline", use_safetensors=True)
        for out in (run, other)
        if out is not None
    )
    for name in ("unet", "graph_encoder"):
        for end in more:
            here, there = (getattr(each, name).state_dict() for each in (pipeline, end))
            if {key: value.shape for key, value in here.items()} != {key: value.shape for key, value in there.items()}:
                raise ValueError(f"{other}: its {name} has other weights than that of {run}")
            for key, value in here.items():
                value.add_(there[key]).div_(2)
    pipeline.to(dtype=torch.float16)
    pipeline.scheduler = made_scheduler(pipeline, "dpm++")
    pipeline.register_to_config(sampling_steps=SAMPLING_STEPS, guidance=toy_words().run.guidance)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)


def assemble(out: Path, folder: Path) -> None:
    """Write the parts of `toy-words` as a foundation in diffusers format, fp16, for `train.py --model`.

    If the UNet is still in training, the average of its last checkpoint is used.
    """
    foundation = toy_foundation(weights=out, wide=True)
    unfinished = out / "unet" / "checkpoint" / "ema.safetensors"
    if not (out / "unet.safetensors").is_file() and unfinished.is_file():
        load_weights(unfinished, foundation.unet, "build unet again")
    shutil.rmtree(folder, ignore_errors=True)
    models = {"unet": foundation.unet, "vae": foundation.vae, "text_encoder": foundation.text_encoder,
              "graph_clip": foundation.clip}  # fmt: skip
    for name, model in models.items():
        model.half().save_pretrained(folder / name)
    for name in ("tokenizer", "graph_tokenizer"):
        foundation.tokenizer.save_pretrained(folder / name)
    foundation.scheduler.save_pretrained(folder / "scheduler")
    forget_places(folder)
    seal(folder)


def put_on_card(folder: Path, evaluation: Path, data: str = "") -> None:
    """Put the results of `python -m sgg_fast.eval --out EVALUATION` on the card of the shipped model."""
    result = read_result(evaluation)
    if result["data"] != "toy-words" or result.get("weights") != digest(folder):
        raise ValueError(f"{evaluation} is an evaluation of other weights or on other graphs than toy-words")
    drawn, on = result["rows"]["drawn"], "held-out graphs of toy-words"
    metrics = {f"{name}, {len(result['per picture']['entity recall'][0])} {on}": drawn[name] for name in
               ("entity recall", "entity precision", "relations if present")}  # fmt: skip
    for which, told in (("all", ""), ("two of a kind", " with two of a kind")):
        if row := result["whole"]["drawn"].get(which):
            metrics[f"pictures without any fault, {row['graphs']} {on}{told}"] = row["share"]
    for axis, pairs in result["counterfactual pairs"].items():
        seen = round(pairs["pairs"] * (pairs["both seen"] or 0))
        metrics[f"{axis} as asked, {seen} pairs of graphs that differ in it alone (chance 0.5)"] = pairs["follows"]
    metrics = {name: value for name, value in metrics.items() if value is not None}  # the evaluation had no case of it
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    provenance = content["provenance"]
    base = {"base": "toy models of toy-words (trained: unet, vae, clip)", "base_licence": "apache-2.0"}
    provenance |= {**base, "metrics": metrics}
    provenance["data"] = data or provenance["data"]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    seal(folder)
    write_card(load_model(str(folder)).pipeline, folder)


def draw_sheet(path: Path, num: int = 8) -> None:
    """Draw the graphs of the first held-out scenes, unselected, beside their scenes and the shipped model's
    pictures."""
    pipeline = load_model(str(SHIPPED)).pipeline
    scenes = [world.draw_scene(HELD_OUT_SEED, i, spoken=True) for i in range(num)]
    generators = [torch.Generator().manual_seed(i) for i in range(num)]
    drawn = [np.asarray(image) for image in pipeline([s.graph for s in scenes], generator=generators).images]
    contact_sheet(path, [(s.graph, {"scene": s.image, "drawn": d}) for s, d in zip(scenes, drawn, strict=True)])


PARTS: dict[str, Callable[..., nn.Module]] = {
    "vae": build_vae,
    "clip": build_clip,
    "unet": build_unet,
    "detector": train_detector,
    "features": train_features,
}
"""Part -> (folder, steps, scenes) to its trained average."""
SPOKEN_PARTS: dict[str, Callable[..., nn.Module]] = {
    "clip": partial(build_clip, spoken=True),
    "unet": build_text_unet,
    "detector_words": partial(train_detector, spoken=True),
}
"""Parts that `toy-words` does not share with `toy`."""


def build_part(args: argparse.Namespace) -> None:
    """Train the part that the command names, and with --install copy it into the package."""
    words = args.data_set == "toy-words"
    build = (SPOKEN_PARTS if words else PARTS)[args.part]
    if args.start:
        build = partial(build_text_unet, start=args.start, first=args.first)
    save_half(build(args.out, args.steps, args.scenes), args.out / f"{args.part}.safetensors")
    if args.install:
        installed = weight_file(args.part, wide=words)
        shutil.copy(args.out / f"{args.part}.safetensors", installed)
        seal(SHIPPED if SHIPPED in installed.parents else installed.parent)
