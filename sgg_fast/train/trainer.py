"""The training loop, one for both stages and every engine: step, log, sample, checkpoint, resume, export."""

from __future__ import annotations

import dataclasses
import logging
import os
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
from sgg_fast.train.engine import DeepSpeedEngine, PlainEngine, build_engine, plan_engine
from sgg_fast.train.log import RunLog
from sgg_fast.train.optim import lr_factor
from sgg_fast.train.setup import (
    SampleOrder,
    fit_conditioner,
    make_pipeline,
    new_conditioner,
    open_foundation,
    read_conditioner,
)
from sgg_fast.train.stages import FinetuneStage, PretrainStage, Terms

logger = logging.getLogger(__name__)

# A resumed run may change these; everything else must be as it was.
FREE_ON_RESUME = {
    "pretrain_steps", "finetune_steps", "log_every", "sample_every", "checkpoint_every", "num_samples",
    "sheet_steps", "sampling_steps", "guidance", "kernels", "attention",
}  # fmt: skip


class Trainer:
    """One run of one stage in `out/stage`. Raises `ConfigError` for settings that cannot run, before it writes."""

    def __init__(
        self,
        config: Config,
        stage: str,
        out: Path,
        ds_path: str | None = None,
        graph_encoder: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        self.config, self.stage, self.run, self.overwrite = config, stage, out / stage, overwrite
        self.result = self.run / ("graph_encoder" if stage == "pretrain" else "pipeline")
        self.num_steps = config.pretrain_steps if stage == "pretrain" else config.finetune_steps
        self.device = env.device()
        self.main = env.rank() == 0
        # Settings are refused here, before anything slow is loaded.
        ops.use_kernels(config.kernels)
        _check_folder(self.run)
        self.ds_config = plan_engine(config, stage, self.device, ds_path)
        self.first_step = 0 if overwrite else self._check_resume()
        self.complete = self.first_step >= self.num_steps and self.result.is_dir()
        if self.complete:
            return
        ops.backend_for(self.device)  # raises now where an explicit --kernels cannot be met
        pretrained = self._pretrained(out, graph_encoder) if stage == "finetune" else None
        self.source: PairSource = open_source(config)
        if len(self.source) < 2:
            raise ConfigError(f"--data {config.data}: {len(self.source)} image; training needs at least 2")
        self.foundation: Foundation = open_foundation(config)
        finetune = stage == "finetune"
        self.cache: TrainingCache = build_cache(
            self.source,
            self.foundation,
            self.device,
            with_latents=finetune,
            with_phrases=finetune and config.token_init == "text",
            progress=self.main,
        )
        if pretrained is None:
            self.conditioner = new_conditioner(config, self.foundation, self.cache)
        else:
            self.conditioner = fit_conditioner(pretrained, self.foundation, self.cache)
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
        return f"deepspeed x{env.world_size()}" if self.ds_config is not None else "plain"

    def _pretrained(self, out: Path, given: Path | None) -> SceneGraphConditioner | None:
        folder = given or out / "pretrain" / "graph_encoder"
        if folder.is_dir():
            return read_conditioner(folder, self.config)
        if given:
            raise ConfigError(f"--graph-encoder {given}: there is no such folder")
        if self.main:
            logger.warning("no pre-trained graph encoder in %s: it starts from fresh weights", folder)
        return None

    def _engine(self) -> PlainEngine | DeepSpeedEngine:
        torch.manual_seed(self.config.seed)  # initial weights of the decoder
        if self.stage == "pretrain":
            module: torch.nn.Module = PretrainStage(self.config, self.conditioner, self.cache)
        else:
            self.foundation.vae.to(self.device)
            set_attention(self.foundation.unet, self.config.attention, self.device)
            module = FinetuneStage(self.config, self.conditioner, self.foundation, self.cache)
        return build_engine(module, self.config, self.stage, self.device, self.ds_config)

    def train(self) -> Path:
        """Run to the last step; returns the folder of the result. Says so and returns if nothing is left to do."""
        if self.complete:
            logger.info("%s is complete at step %d; --overwrite starts over", self.run, self.first_step)
            return self.result
        if self.overwrite and self.main:
            shutil.rmtree(self.run, ignore_errors=True)
        self.engine.barrier()
        log = RunLog(self.run, self.stage, self.first_step, self.num_steps, self.config.batch_size * env.world_size())
        try:
            self._loop(log)
            if self.main:
                self._export()
            self.engine.barrier()
            log.event(event="done", step=self.num_steps, result=str(self.result))
        finally:
            log.close()
        return self.result

    def _loop(self, log: RunLog) -> None:
        config, engine = self.config, self.engine
        order = SampleOrder(len(self.source), config.batch_size, config.seed, env.rank(), env.world_size())
        parameters = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
        log.event(
            event="start",
            stage=self.stage,
            step=self.first_step,
            data=self.source.name,
            model=self.foundation.source,
            parameters=parameters,
            engine=self._engine_name,
            settings=dataclasses.asdict(config),
        )
        sheet_every = config.sample_every if self.stage == "finetune" and config.num_samples else 0
        sums, since = None, 0
        for step in range(self.first_step, self.num_steps):
            terms = engine.forward(order.at(step), step)
            engine.update(terms.total, lr_factor(config, step, self.num_steps))
            log.advance()
            row = torch.stack([*terms.values.values(), *terms.chance.values()])
            sums, since, done = row if sums is None else sums + row, since + 1, step + 1
            last = done == self.num_steps
            if last or done % config.log_every == 0:
                log.record(done, *self._means(terms, sums, since))
                sums, since = None, 0
            with log.paused():
                if sheet_every and (last or done % sheet_every == 0):
                    self._sample_sheet(done, log)
                if last or done % config.checkpoint_every == 0:
                    self._checkpoint(done, log)

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
            pipeline = make_pipeline(self.config, self.foundation, self.conditioner, with_text=False)
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

    def _export(self) -> None:
        """Write the result aside and rename it, so that it is whole or absent."""
        result = self.result
        aside = result.with_name(f".{result.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        if self.stage == "pretrain":
            self.conditioner.save_pretrained(aside)
        else:
            self.foundation.unet.eval()
            make_pipeline(self.config, self.foundation, self.conditioner).save_pretrained(aside)
        shutil.rmtree(result, ignore_errors=True)
        aside.rename(result)


def _check_folder(folder: Path) -> None:
    """Raises `ConfigError` where `folder` cannot be made or written to; makes nothing."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--out: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: {nearest} is not writable")
