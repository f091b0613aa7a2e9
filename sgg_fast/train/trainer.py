"""The training loop, one for both stages and every engine: step, log, sample, checkpoint, resume, export."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import torch
from PIL import Image

from sgg_fast import env, ops
from sgg_fast.config import Config, ConfigError
from sgg_fast.data.cache import TrainingCache, build_cache
from sgg_fast.data.sources import PairSource, open_source
from sgg_fast.nn.attention import set_attention
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.train import checkpoint
from sgg_fast.train.engine import DeepSpeedEngine, PlainEngine, build_engine
from sgg_fast.train.log import RunLog
from sgg_fast.train.setup import SampleOrder, load_conditioner, make_pipeline, new_conditioner, open_foundation
from sgg_fast.train.stages import FinetuneStage, PretrainStage, Terms

logger = logging.getLogger(__name__)

# A resumed run may change these; everything else must be as it was.
FREE_ON_RESUME = {
    "pretrain_steps", "finetune_steps", "log_every", "sample_every", "checkpoint_every", "num_samples",
    "sheet_steps", "sampling_steps", "guidance", "kernels", "attention",
}  # fmt: skip


class Trainer:
    """One run of one stage in `out/stage`. Raises `ConfigError` for settings that cannot run."""

    def __init__(
        self, config: Config, stage: str, out: Path, ds_path: str | None = None, graph_encoder: Path | None = None
    ) -> None:
        self.config, self.stage, self.run = config, stage, out / stage
        self.num_steps = config.pretrain_steps if stage == "pretrain" else config.finetune_steps
        self.ds_path = ds_path
        self.device = env.device()
        self.main = env.rank() == 0
        ops.use_kernels(config.kernels)
        self.first_step = self._check_resume()
        if self.first_step >= self.num_steps:
            return
        self.source: PairSource = open_source(config)
        if len(self.source) < 2:
            raise ConfigError(f"--data {config.data}: {len(self.source)} image; training needs at least 2")
        self.foundation: Foundation = open_foundation(config)
        self.cache: TrainingCache = build_cache(
            self.source, self.foundation, self.device, with_latents=stage == "finetune", progress=self.main
        )
        self.conditioner: SceneGraphConditioner = self._conditioner(out, graph_encoder)
        self.engine: PlainEngine | DeepSpeedEngine = self._engine()
        if self.first_step:
            self.engine.load(checkpoint.checkpoint_dir(self.run, self.first_step))

    def _check_resume(self) -> int:
        """Step to continue from, 0 for a new run."""
        steps = checkpoint.checkpoint_steps(self.run)
        if not steps:
            return 0
        manifest = checkpoint.read_manifest(checkpoint.checkpoint_dir(self.run, steps[-1]))
        now = {**dataclasses.asdict(self.config), "engine": self._engine_name}
        for name, was in manifest["settings"].items():
            if name not in FREE_ON_RESUME and now.get(name) != was:
                raise ConfigError(
                    f"{self.run} holds a run with {name.replace('_', '-')} {was!r}, not {now.get(name)!r}: "
                    "use the same settings to continue it, another --out, or --overwrite"
                )
        return steps[-1]

    @property
    def _engine_name(self) -> str:
        return f"deepspeed x{env.world_size()}" if self.ds_path else "plain"

    def _conditioner(self, out: Path, given: Path | None) -> SceneGraphConditioner:
        if self.stage == "pretrain":
            return new_conditioner(self.config, self.foundation, self.cache)
        folder = given or out / "pretrain" / "graph_encoder"
        if folder.is_dir():
            return load_conditioner(folder, self.config, self.cache)
        if given:
            raise ConfigError(f"--graph-encoder {given}: there is no such folder")
        if self.main:
            logger.warning("no pre-trained graph encoder in %s: it starts from fresh weights", folder)
        return new_conditioner(self.config, self.foundation, self.cache)

    def _engine(self) -> PlainEngine | DeepSpeedEngine:
        torch.manual_seed(self.config.seed)  # initial weights of the decoder
        if self.stage == "pretrain":
            module: torch.nn.Module = PretrainStage(self.config, self.conditioner, self.cache)
        else:
            self.foundation.vae.to(self.device)
            attention = set_attention(self.foundation.unet, self.config.attention, self.device)
            logger.info("UNet attention: %s", attention)
            module = FinetuneStage(self.config, self.conditioner, self.foundation, self.cache)
        return build_engine(module, self.config, self.stage, self.device, self.ds_path)

    def train(self) -> Path:
        """Run to the last step; returns the folder of the result. Says so and returns if nothing is left to do."""
        result = self.run / ("graph_encoder" if self.stage == "pretrain" else "pipeline")
        if self.first_step >= self.num_steps:
            logger.info("%s is complete at step %d; --overwrite starts over", self.run, self.first_step)
            return result
        world = env.world_size()
        order = SampleOrder(len(self.source), self.config.batch_size, self.config.seed, env.rank(), world)
        log = RunLog(self.run, self.stage, self.first_step, self.num_steps, self.config.batch_size * world)
        parameters = sum(p.numel() for p in self.engine.module.parameters() if p.requires_grad)
        log.event(event="start", stage=self.stage, step=self.first_step, data=self.source.name, parameters=parameters,
                  model=self.foundation.source, engine=self._engine_name, settings=dataclasses.asdict(self.config))  # fmt: skip
        sums, since = None, 0
        for step in range(self.first_step, self.num_steps):
            terms = self.engine.forward(order.at(step), step)
            self.engine.update(terms.total)
            log.advance()
            row = torch.stack([*terms.values.values(), *terms.chance.values()])
            sums, since, done = row if sums is None else sums + row, since + 1, step + 1
            last = done == self.num_steps
            if last or done % self.config.log_every == 0:
                log.record(done, *self._means(terms, sums, since))
                sums, since = None, 0
            if self.stage == "finetune" and self.config.sample_every and (last or done % self.config.sample_every == 0):
                self._sample_sheet(done, log)
            if last or done % self.config.checkpoint_every == 0:
                self._checkpoint(done, log)
        if self.main:
            self._export(result)
        self.engine.barrier()
        log.event(event="done", step=self.num_steps, result=str(result))
        log.close()
        return result

    def _means(self, terms: Terms, sums: torch.Tensor, num: int) -> tuple[dict[str, float], dict[str, float]]:
        means = (self.engine.mean(sums) / num).tolist()
        half = len(means) // 2
        return dict(zip(terms.values, means[:half], strict=True)), dict(zip(terms.chance, means[half:], strict=True))

    def _checkpoint(self, step: int, log: RunLog) -> None:
        meta = {"stage": self.stage, "settings": {**dataclasses.asdict(self.config), "engine": self._engine_name}}
        engine = self.engine
        path = checkpoint.save_checkpoint(self.run, step, meta, engine.save, engine.barrier, env.rank())
        log.event(event="checkpoint", step=step, path=str(path))

    def _sample_sheet(self, step: int, log: RunLog) -> None:
        """samples/step-N.png: real pictures above, generated ones of the same graphs below."""
        if self.main:
            num = min(self.config.num_samples, len(self.source))
            pipeline = make_pipeline(self.config, self.foundation, self.conditioner)
            pipeline.set_progress_bar_config(disable=True)
            self.foundation.unet.eval()
            drawn = pipeline(
                self.source.graphs[:num],
                num_inference_steps=self.config.sheet_steps,
                guidance_scale=self.config.guidance,
                generator=[torch.Generator().manual_seed(self.config.seed + i) for i in range(num)],
            ).images
            self.foundation.unet.train()
            side = self.config.resolution
            sheet = Image.new("RGB", (num * side, 2 * side))
            for i, image in enumerate(drawn):
                sheet.paste(Image.fromarray(self.source.load_image(i)), (i * side, 0))
                sheet.paste(image, (i * side, side))
            path = self.run / "samples" / f"step-{step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            log.event(event="samples", step=step, path=str(path))
        self.engine.barrier()

    def _export(self, result: Path) -> None:
        """Write the result aside and rename it, so that it is whole or absent."""
        aside = result.with_name(f".{result.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        if self.stage == "pretrain":
            self.conditioner.save_pretrained(aside)
        else:
            self.foundation.unet.eval()
            make_pipeline(self.config, self.foundation, self.conditioner).save_pretrained(aside)
        shutil.rmtree(result, ignore_errors=True)
        aside.rename(result)
