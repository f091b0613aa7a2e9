"""The training loop, one for both stages and every engine: step, log, sample, checkpoint, resume, export."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
from pathlib import Path

import numpy as np
import torch

from sgg_fast import env, ops
from sgg_fast.config import TOY_DATA, Config, ConfigError
from sgg_fast.data.cache import TrainingCache, build_cache, check_foundation, open_foundation
from sgg_fast.data.sources import PairSource, open_source
from sgg_fast.nn.attention import checkpoint_activations, set_attention
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.fuse import fuse_for
from sgg_fast.train import checkpoint
from sgg_fast.train.base import Update
from sgg_fast.train.engine import Engine, build_engine, plan_engine
from sgg_fast.train.health import Health
from sgg_fast.train.log import RunLog
from sgg_fast.train.memory import device_memory
from sgg_fast.train.optim import lr_factor
from sgg_fast.train.outputs import draw_sheet, export
from sgg_fast.train.peers import lost_process
from sgg_fast.train.plan import Planner
from sgg_fast.train.run_folder import check_folder, check_room, clear, locked, writing
from sgg_fast.train.setup import (
    SampleOrder,
    fit_conditioner,
    new_baseline,
    new_conditioner,
    read_conditioner,
)
from sgg_fast.train.signals import StopSignals
from sgg_fast.train.stages import FinetuneStage, PretrainStage
from sgg_fast.train.stops import Signalled
from sgg_fast.train.validation import Watch, ended, split_pairs

logger = logging.getLogger(__name__)

# A resumed run may change these; everything else must be as it was.
FREE_ON_RESUME = {
    "pretrain_steps", "finetune_steps", "log_every", "sample_every", "checkpoint_every", "num_samples",
    "sheet_steps", "sampling_steps", "guidance", "kernels", "attention", "fuse_unet", "max_skipped", "rank_timeout",
    "gradient_checkpointing", "validate_every", "early_stop", "cuda_graphs",
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
        if config.data in TOY_DATA:
            check_foundation(config)
        if stage == "pretrain" and config.conditioner != "sgg":
            raise ConfigError(f"--conditioner {config.conditioner} has no pre-training: go on with --stage finetune")
        if self.main:
            check_folder(self.run)
        self.ds_config = plan_engine(config, stage, self.device, ds_path)
        self._watched: dict[str, float] | None = None
        self.first_step = 0 if overwrite else self._check_resume()
        if self._watched and ended(config, self._watched):
            self.num_steps = self.first_step
        self.complete = self.first_step >= self.num_steps and self.result.is_dir()
        if self.complete:
            return
        ops.backend_for(self.device)  # raises now where an explicit --kernels cannot be met
        pretrained = self._pretrained(out, graph_encoder) if stage == "finetune" else None
        self.source: PairSource = open_source(config)
        if len(self.source) < 2:
            raise ConfigError(f"--data {config.data}: {len(self.source)} image; training needs at least 2")
        self.trained, held_out = np.arange(len(self.source)), np.arange(0)
        if stage == "pretrain":
            self.trained, held_out = split_pairs(config, self.source)
        self.foundation: Foundation = open_foundation(config)
        finetune = stage == "finetune"
        self.cache: TrainingCache = build_cache(
            self.source,
            self.foundation,
            self.device,
            with_latents=finetune,
            with_phrases=finetune and config.reads_phrases,
            with_boxes=config.needs_boxes(stage),
            progress=self.main,
        )
        if config.conditioner != "sgg":
            self.conditioner: Conditioner = new_baseline(config, self.foundation, self.cache, self.source.graphs)
        elif pretrained is None:
            self.conditioner = new_conditioner(config, self.foundation, self.cache)
        else:
            self.conditioner = fit_conditioner(pretrained, self.foundation, self.cache)
        with lost_process(config.rank_timeout):
            self.engine = self._engine()
        module = self.engine.module
        self.watch = Watch(config, module, held_out) if isinstance(module, PretrainStage) else None
        if self.watch and self._watched:
            self.watch.load_state_dict(self._watched)
        if self.first_step:
            checkpoint.load(self.engine.load, checkpoint.checkpoint_dir(self.run, self.first_step))

    def _check_resume(self) -> int:
        """Step to continue from, 0 for a new run."""
        newest = checkpoint.newest_checkpoint(self.run)
        if newest is None:
            return 0
        step, manifest = newest
        now = {**dataclasses.asdict(self.config), "engine": self._engine_name}
        for name, was in manifest["settings"].items():
            if name not in FREE_ON_RESUME and now.get(name) != was:
                raise ConfigError(
                    f"{self.run} holds a run with {name.replace('_', '-')} {was!r}, not {now.get(name)!r}: "
                    "use the same settings to continue it, another --out, or --overwrite"
                )
        self._watched = manifest.get("validation")
        return step

    @property
    def _engine_name(self) -> str:
        if self.ds_config is None:
            return "plain"
        return f"deepspeed zero-{self.ds_config['zero_optimization']['stage']} x{env.world_size()}"

    def _pretrained(self, out: Path, given: Path | None) -> SceneGraphConditioner | None:
        if self.config.conditioner != "sgg":
            if given:
                raise ConfigError(f"--graph-encoder {given} is of SGG-IG: leave out --conditioner or the folder")
            return None
        pretrained, model = out / "pretrain" / "graph_encoder", self.config.model
        # A result of ours as --model carries its graph encoder: so a run goes on under any engine.
        for folder in [given] if given else [pretrained, *([Path(model) / "graph_encoder"] if model else [])]:
            if folder.is_dir():
                return read_conditioner(folder, self.config)
        if given:
            raise ConfigError(f"--graph-encoder {given}: there is no such folder")
        if self.main:
            logger.warning("no pre-trained graph encoder in %s: it starts from fresh weights", pretrained)
        return None

    def _engine(self) -> Engine:
        torch.manual_seed(self.config.seed)  # initial weights of the decoder
        if self.stage == "pretrain":
            assert isinstance(self.conditioner, SceneGraphConditioner)
            module: torch.nn.Module = PretrainStage(self.config, self.conditioner, self.cache)
        else:
            self.foundation.vae.to(self.device)
            set_attention(self.foundation.unet, self.config.attention, self.device)
            if self.config.gradient_checkpointing:
                checkpoint_activations(self.foundation.unet)
            # ZeRO-3 gathers a layer's weights when that layer is called.
            by_layer = self.ds_config is not None and self.ds_config["zero_optimization"]["stage"] == 3
            fuse_for(self.device, self.config.fuse_unet, self.foundation.unet, merge=not by_layer)
            module = FinetuneStage(self.config, self.conditioner, self.foundation, self.cache)
        self._check_room(module)
        return build_engine(module, self.config, self.stage, self.device, self.ds_config)

    def _check_room(self, module: torch.nn.Module) -> None:
        one = checkpoint.checkpoint_bytes(module, self.config, self.stage, self.ds_config is not None)
        parts: list[torch.nn.Module] = [self.conditioner]
        if self.stage == "finetune":
            parts += [getattr(self.foundation, name) for name in ("unet", "vae", "text_encoder", "clip")]
        result = sum(p.nbytes for part in parts for p in part.parameters())
        if self.main:
            check_room(self.run, (checkpoint.KEEP + 1) * one + result)

    def train(self) -> Path:
        """Run to the last step; returns the folder of the result. Says so and returns if nothing is left to do."""
        if self.complete:
            logger.info("%s is complete at step %d; --overwrite starts over", self.run, self.first_step)
            return self.result
        with contextlib.ExitStack() as stack:
            if self.main:
                stack.enter_context(locked(self.run))
                self._take_over()
            signals = stack.enter_context(StopSignals())
            stack.enter_context(lost_process(self.config.rank_timeout))
            self.engine.barrier()
            sizes = self.first_step, self.num_steps, self._images_per_step
            log = RunLog(self.run, self.stage, *sizes, self._planned_memory())
            stack.callback(log.close)
            self._loop(log, signals)
            with self.engine.exported():
                if self.main:
                    export(self.result, self.stage, self.config, self.foundation, self.conditioner)
            self.engine.barrier()
            log.event(event="done", step=self.num_steps, result=str(self.result))
        return self.result

    def _planned_memory(self) -> int | None:
        """Bytes that a step should take, where knowing it is worth the seconds: on a GPU, or with a --model."""
        config, on_gpu = self.config, self.device.type == "cuda"
        if self.stage == "pretrain" or not self.main or not (on_gpu or config.model) or config.conditioner != "sgg":
            return None
        stored = self.source.stored is not None
        planner = Planner(config, self.ds_config, self.device.type, env.world_size(), len(self.source), stored=stored)
        return planner.plan(config.batch_size, device_memory(self.device)).peak

    @property
    def _images_per_step(self) -> int:
        micro = self.config.accumulation_steps if self.stage == "finetune" else 1
        return micro * self.config.batch_size * env.world_size()

    def _take_over(self) -> None:
        """The folder is ours: empty it for --overwrite, else see that it is as it was when this run was set up."""
        if self.overwrite:
            clear(self.run)
        elif (checkpoint.checkpoint_steps(self.run) or [0])[-1] != self.first_step:
            raise ConfigError(f"{self.run}: another run wrote a checkpoint meanwhile: the same command continues it")

    def _loop(self, log: RunLog, signals: StopSignals) -> None:
        config, engine = self.config, self.engine
        num_micro = config.accumulation_steps if self.stage == "finetune" else 1
        num_trained = len(self.trained)
        order = SampleOrder(num_trained, num_micro * config.batch_size, config.seed, env.rank(), env.world_size())
        parameters = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
        log.event(
            event="start",
            stage=self.stage,
            step=self.first_step,
            data=self.source.name,
            model=self.foundation.source,
            parameters=parameters,
            samples=num_trained,
            engine=self._engine_name,
            execution=engine.execution,
            settings=dataclasses.asdict(config),
        )
        sheet_every = config.sample_every if self.stage == "finetune" and config.num_samples else 0
        health = Health(log, config.max_skipped)
        everybody = SampleOrder(num_trained, self._images_per_step, config.seed, 0, 1)
        sums, since = None, 0
        for step in range(self.first_step, self.num_steps):
            ids_KB = self.trained[order.at(step)].reshape(num_micro, config.batch_size)
            update = engine.update(ids_KB, step, lr_factor(config, step, self.num_steps))
            log.advance()
            done = step + 1
            last, stop = done == self.num_steps, self._stopped_by(signals)
            if update.applied:
                health.applied()
                row = torch.stack([*update.values.values(), *update.chance.values()])
                sums, since = row if sums is None else sums + row, since + 1
            else:
                skipped = step - update.behind
                samples = self.trained[everybody.at(skipped)].tolist()
                loss = update.values["loss"].item() if update.lost is None else update.lost
                health.skip(skipped + 1, loss, samples)
            for skipped, loss in engine.outstanding() if last or stop else []:
                health.skip(skipped + 1, loss, self.trained[everybody.at(skipped)].tolist())
            if sums is not None and (last or done % config.log_every == 0):
                values, chance = self._means(update, sums, since)
                log.record(done, values, chance)
                health.record(done, values["loss"])
                sums, since = None, 0
            with log.paused():
                if sheet_every and (last or done % sheet_every == 0):
                    self._sample_sheet(done, log)
                enough = self.watch is not None and self.watch.look(done, last, log)
                if last or stop or enough or done % config.checkpoint_every == 0:
                    self._checkpoint(done, log)
            if enough:
                self.num_steps = done
                break
            if stop and not last:
                log.event(event="stopped", step=done, signal=stop)
                raise Signalled(stop, done)

    def _stopped_by(self, signals: StopSignals) -> int:
        """The signal that ends the run at this step, the same step for every process; 0 for none."""
        number = signals.number or 0
        if env.world_size() == 1:
            return number
        anybody = self.engine.mean(torch.tensor([float(number > 0)], device=self.device)).item() > 0
        return number or signal.SIGTERM if anybody else 0

    def _means(self, update: Update, sums: torch.Tensor, num: int) -> tuple[dict[str, float], dict[str, float]]:
        means = (self.engine.mean(sums) / num).tolist()
        half = len(means) // 2
        return dict(zip(update.values, means[:half], strict=True)), dict(zip(update.chance, means[half:], strict=True))

    def _checkpoint(self, step: int, log: RunLog) -> None:
        meta = {"stage": self.stage, "settings": {**dataclasses.asdict(self.config), "engine": self._engine_name}}
        if self.watch:
            meta["validation"] = self.watch.state_dict()
        engine = self.engine
        path = checkpoint.save_checkpoint(self.run, step, meta, engine.save, engine.barrier, env.rank())
        log.event(event="checkpoint", step=step, path=str(path))

    def _sample_sheet(self, step: int, log: RunLog) -> None:
        """samples/step-N.png: real pictures above, generated ones of the same graphs below."""
        if self.main or self.engine.sharded:  # sharded weights come together layer by layer, by everybody's doing
            sheet = draw_sheet(self.config, self.foundation, self.conditioner, self.source)
            if self.main:
                path = self.run / "samples" / f"step-{step:07d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                with writing(path):
                    sheet.save(path)
                log.event(event="samples", step=step, path=str(path))
        self.engine.barrier()
