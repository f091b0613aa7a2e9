"""The training loop of both stages and every engine: step, log, sample, checkpoint, resume, export."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgg_fast import env, ops
from sgg_fast.commands import NotFiniteError
from sgg_fast.config import SETTINGS, Config, ConfigError, settings_text
from sgg_fast.data.cache import TrainingCache, build_cache, open_foundation
from sgg_fast.data.moments import AHEAD, MomentRows
from sgg_fast.data.sources import PairSource, open_source
from sgg_fast.files import locked, write_text
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.conditioners import Conditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.fuse import is_on
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.train.assemble import assemble, fit_conditioner, new_conditioner, read_conditioner
from sgg_fast.train.engines.base import Engine, StepResult, resolved
from sgg_fast.train.engines.choose import build_engine, plan_engine
from sgg_fast.train.memory.advice import device_memory
from sgg_fast.train.memory.planner import Planner
from sgg_fast.train.optim.groups import lr_factor
from sgg_fast.train.order import SampleOrder
from sgg_fast.train.outputs import check_steps, draw_sheet, export, lora_base, make_pipeline
from sgg_fast.train.preflight import preflight
from sgg_fast.train.run import checkpoint, processes
from sgg_fast.train.run.folder import check_room, clear, writing
from sgg_fast.train.run.health import Health
from sgg_fast.train.run.interrupts import Caught, Signalled, lost_process, stops_after_step
from sgg_fast.train.run.log import RunLog
from sgg_fast.train.stages import PretrainStage, Stage
from sgg_fast.train.validation import Watch, ended, split_pairs

logger = logging.getLogger(__name__)


class Trainer:
    """One run of one stage in `out/stage`. Raises `ConfigError` for settings that cannot run, before any writing."""

    def __init__(
        self,
        config: Config,
        stage: str,
        out: Path,
        ds_path: str | None = None,
        graph_encoder: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        self.stage, self.run, self.overwrite = stage, out / stage, overwrite
        encoder = None if graph_encoder is None else str(graph_encoder)
        self._typed = {"stage": stage, "deepspeed": ds_path, "graph_encoder": encoder}
        self.result = self.run / ("graph_encoder" if stage == "pretrain" else "pipeline")
        self.num_steps = config.optim.num_steps(stage)
        self.device = env.device()
        self.main = env.rank() == 0
        preflight(config, stage, out, ds_path, graph_encoder)
        ops.use_kernels(config.model.kernels)
        with lost_process(config.run.rank_timeout):
            processes.meet(self.device, config.run.rank_timeout)
        self.ds_config = plan_engine(config.optim, stage, self.device, ds_path)
        self._figures: dict[str, float] = {}
        self._watched: dict[str, float] | None = None
        by_kernels = ops.backend_for(self.device) == "triton"  # raises now if an explicit --kernels cannot be met
        self.config = config
        self.first_step = 0 if overwrite else self._check_resume()
        with lost_process(config.run.rank_timeout):
            said = {"--stage": stage, "--deepspeed": ds_path is not None, "the step to go on from": self.first_step}
            processes.same_everywhere({**config.flat(), **said})
        self.config = resolved(self.config, stage, self.device, by_kernels, ds_path is not None)
        if stage == "finetune" and self.config != config and self.main:
            logger.info("--weights %s: %s", config.optim.weights, self.config.optim.weights)
        config = self.config
        if self._watched and ended(config.run, self._watched):
            self.num_steps = self.first_step
        self.complete = self.first_step >= self.num_steps and self.result.is_dir()
        if self.complete:
            return
        finetune = stage == "finetune"
        pretrained = self._pretrained(out, graph_encoder) if finetune else None
        self.source: PairSource = open_source(config.data, config.run.seed)
        if self.source.stored is not None and config.run.sample_every:
            self.source.stored.check_pictures(config.run.num_samples)
        if len(self.source) < 2:
            raise ConfigError(f"--data {config.data.source}: {len(self.source)} image; training needs at least 2")
        self.trained, held_out = np.arange(len(self.source)), np.arange(0)
        if not finetune:
            self.trained, held_out = split_pairs(config.run, self.source, config.data.flip == "swap")
        self.foundation: Foundation = open_foundation(config.model)
        if finetune:
            check_steps(config.run, self.foundation.scheduler)
        self.cache: TrainingCache = build_cache(
            self.source,
            self.foundation,
            self.device,
            with_latents=finetune,
            with_phrases=finetune and config.model.reads_phrases,
            with_boxes=config.objective.needs_boxes(stage),
            progress=self.main,
            latents_device=config.data.latents_device,
        )
        if pretrained is None:
            self.conditioner: Conditioner = new_conditioner(
                config.model, config.run.seed, self.foundation, self.cache, self.source.graphs
            )
        else:
            self.conditioner = fit_conditioner(pretrained, self.foundation, self.cache)
        with lost_process(config.run.rank_timeout):
            self.engine = self._engine()
        module = self.engine.module
        self.watch = None
        if isinstance(module, PretrainStage):
            self.watch = Watch(config.run, module, held_out, self._watched)
        if self.first_step:
            with lost_process(config.run.rank_timeout):
                checkpoint.load(self.engine.load, checkpoint.checkpoint_dir(self.run, self.first_step))

    def _check_resume(self) -> int:
        """The step to continue from; 0 for a new run."""
        newest = checkpoint.newest_checkpoint(self.run)
        if newest is None:
            return 0
        step, manifest = newest
        if manifest["stage"] != self.stage:
            raise ConfigError(
                f"{self.run} holds a checkpoint of --stage {manifest['stage']}: give another --out, or --overwrite"
            )
        now = {**self.config.flat(), "engine": self._engine_name}
        free = {name for name, setting in SETTINGS.items() if setting.rules.may_change}
        if self.ds_config is None and manifest.get("processes", 1) != env.world_size():
            self._check_images(manifest)
            free |= {"batch_size", "accumulation_steps"}
        if self.config.optim.weights == "auto":  # what it was resolved to is not typed again
            free.add("weights")
        for name, was in manifest["settings"].items():
            if name not in free and now.get(name) != was:
                raise ConfigError(
                    f"{self.run} holds a run with {name.replace('_', '-')} {was!r}, not {now.get(name)!r}: "
                    "use the same settings to continue it, another --out, or --overwrite"
                )
        if "weights" in free:
            self.config = self.config.replace(weights=manifest["settings"]["weights"])
        self._watched = manifest.get("validation")
        return step

    def _check_images(self, manifest: dict[str, Any]) -> None:
        """Raise `ConfigError` if another number of processes makes other images a step: batch x micro-batches x it."""
        sizes = [manifest["settings"].get(name) for name in ("batch_size", "accumulation_steps") if self._counts(name)]
        known = all(type(size) is int for size in sizes)
        was = math.prod([manifest.get("processes", 1), *sizes]) if known else sizes
        if was != (now := self._images_per_step):
            raise ConfigError(
                f"{self.run} holds a run with {was} images a step, not {now} (--batch-size x --accumulation-steps x "
                "processes): use as many to continue it, another --out, or --overwrite"
            )

    def _counts(self, name: str) -> bool:
        """Whether a setting decides how many images a step has; pre-training does not accumulate."""
        return self.stage == "finetune" or name == "batch_size"

    @property
    def _engine_name(self) -> str:
        """Under DeepSpeed with the order of its flat tensors, since its state is loaded by place."""
        if self.ds_config is None:
            return "plain"
        stage, fused = self.ds_config["zero_optimization"]["stage"], is_on(self.device, self.config.model.fuse_unet)
        order = f"merged weights first{', convolutions channels last' if fused else ''}"
        return f"deepspeed zero-{stage} x{env.world_size()}, {order}"

    def _pretrained(self, out: Path, given: Path | None) -> SceneGraphConditioner | None:
        if self.config.model.conditioner != "sgg":
            return None
        pretrained, model = out / "pretrain" / "graph_encoder", self.config.model.source
        # One of our results as --model carries its graph encoder, so a run can continue under any engine.
        for folder in [given] if given else [pretrained, *([Path(model) / "graph_encoder"] if model else [])]:
            if folder.is_dir():
                return read_conditioner(folder, self.config.model)
        if self.main:
            logger.warning("no pre-trained graph encoder in %s: it starts from fresh weights", pretrained)
        return None

    def _engine(self) -> Engine:
        module = assemble(
            self.config, self.stage, self.foundation, self.conditioner, self.cache, self.device, self.ds_config
        )
        self._check_room(module)
        return build_engine(module, self.device, self.ds_config)

    def _check_room(self, module: Stage) -> None:
        one = checkpoint.checkpoint_bytes(module, self.config.optim, self.stage, self.ds_config is not None)
        parts: list[torch.nn.Module] = [self.conditioner]
        if self.stage == "finetune" and not self.config.optim.lora:
            parts += [self.foundation.unet, self.foundation.vae, *self.foundation.text_encoders, self.foundation.clip]
        result = sum(p.nbytes for part in parts for p in part.parameters())
        if self.main:
            check_room(self.run, (checkpoint.KEEP + 1) * one + result)

    def train(self) -> Path:
        """Run to the last step; returns the folder of the result. If nothing is left to do, logs it and returns."""
        if self.complete:
            logger.info("%s is complete at step %d; --overwrite starts over", self.run, self.first_step)
            return self.result
        with contextlib.ExitStack() as stack:
            if self.main:
                stack.enter_context(locked(self.run))
                self._take_over()
                self._write_settings()
            caught = stack.enter_context(stops_after_step())
            stack.enter_context(lost_process(self.config.run.rank_timeout))
            processes.barrier()
            sizes = self.first_step, self.num_steps, self._images_per_step
            log = stack.enter_context(RunLog(self.run, self.stage, *sizes, self._planned_memory()))
            self._loop(log, caught)
            with self.engine.exported():
                if self.main:
                    self._export()
            processes.barrier()
            log.event(event="done", step=self.num_steps, result=str(self.result))
        return self.result

    def _export(self) -> None:
        """Write the result of the stage."""
        if self.stage == "pretrain":
            return export(self.result, self.conditioner)
        sheets = sorted((self.run / "samples").glob("step-*.png"))
        export(self.result, self._pipeline(), lora_base(self.config), sheets[-1] if sheets else None)

    def _pipeline(self, with_text: bool = True) -> SceneGraphToImagePipeline:
        """The pipeline of fine-tuning with the current weights."""
        self.foundation.unet.eval()
        return make_pipeline(self.config, self.foundation, self.conditioner, with_text, self._figures)

    def _planned_memory(self) -> int | None:
        """Planned bytes of a step, on a GPU or with a --model; None where the plan is not worth its seconds."""
        config, worthwhile = self.config, self.device.type == "cuda" or self.config.model.source
        if self.stage == "pretrain" or not self.main or not worthwhile or config.model.conditioner != "sgg":
            return None
        stored = self.source.stored is not None
        planner = Planner(config, self.ds_config, self.device.type, env.world_size(), len(self.source), stored=stored)
        return planner.plan(config.optim.batch_size, device_memory(self.device)).peak

    @property
    def _images_per_step(self) -> int:
        optim = self.config.optim
        micro = optim.accumulation_steps if self._counts("accumulation_steps") else 1
        return micro * optim.batch_size * env.world_size()

    def _take_over(self) -> None:
        """Take the folder over: empty it for --overwrite, else check that it is unchanged since this run was set up."""
        if self.overwrite:
            clear(self.run)
        elif (checkpoint.checkpoint_steps(self.run) or [0])[-1] != self.first_step:
            raise ConfigError(f"{self.run}: another run wrote a checkpoint meanwhile: the same command continues it")

    def _write_settings(self) -> None:
        """settings.toml, which repeats the run."""
        path = self.run / "settings.toml"
        with writing(path):
            write_text(path, settings_text(self.config, self._typed))

    def _loop(self, log: RunLog, caught: Caught) -> None:
        config, engine = self.config, self.engine
        num_trained, images = len(self.trained), self._images_per_step
        order = SampleOrder(num_trained, images // env.world_size(), config.run.seed, env.rank(), env.world_size())
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
            settings=config.flat(),
        )
        sheet_every = config.run.sample_every if self.stage == "finetune" and config.run.num_samples else 0
        health, exchange = Health(log, config.run.max_skipped), processes.SignalExchange()
        everybody = SampleOrder(num_trained, images, config.run.seed, 0, 1)
        sums, since = None, 0
        for step in range(self.first_step, self.num_steps):
            ids_KB = self._samples(order, step)
            if env.world_size() > 1 and isinstance(engine.module, PretrainStage):
                engine.module.meet(self.trained[everybody.at(step)], env.world_size())
            result = engine.update(ids_KB, step, lr_factor(config.optim, step, self.num_steps))
            log.advance()
            done = step + 1
            last, stop = done == self.num_steps, exchange.stopped_by(caught.number, done)
            if result.applied:
                health.applied()
                row = torch.stack([*result.losses.values(), *result.chance.values()])
                sums, since = row if sums is None else sums + row, since + 1
            else:
                skipped = step - result.behind
                samples = self.trained[everybody.at(skipped)].tolist()
                loss = result.losses["loss"].item() if result.lost is None else result.lost
                health.skip(skipped + 1, loss, samples)
            for skipped, loss in engine.outstanding() if last or stop else []:
                health.skip(skipped + 1, loss, self.trained[everybody.at(skipped)].tolist())
            if sums is not None and (last or done % config.run.log_every == 0):
                losses, chance = self._means(result, sums, since)
                log.record(done, losses, chance, self._state(result, step))
                self._figures = {**losses, **{f"{name} at chance": value for name, value in chance.items()}}
                health.record(done, losses["loss"])
                sums, since = None, 0
            with log.paused():
                if sheet_every and (last or done % sheet_every == 0):
                    self._sample_sheet(done, log)
                enough = self.watch is not None and self.watch.look(done, last, log)
                if last or stop or enough or done % config.run.checkpoint_every == 0:
                    self._checkpoint(done, log)
            if enough:
                self.num_steps = done
                break
            if stop and not last:
                log.event(event="stopped", step=done, signal=stop)
                raise Signalled(stop, done)
        exchange.settle()

    def _samples(self, order: SampleOrder, step: int) -> np.ndarray:
        """[K, B] samples of a step. The latents of the next steps are read meanwhile, if they stay in files."""
        moments, batch = self.cache.moments, self.config.optim.batch_size

        def at(number: int) -> np.ndarray:
            return self.trained[order.at(number)].reshape(-1, batch)

        if isinstance(moments, MomentRows):
            first = step if step == self.first_step else step + AHEAD
            for ids_B in (ids_B for k in range(first, min(step + AHEAD + 1, self.num_steps)) for ids_B in at(k)):
                moments.expect(ids_B)
        return at(step)

    def _means(self, result: StepResult, sums: torch.Tensor, num: int) -> tuple[dict[str, float], dict[str, float]]:
        means = (processes.mean(sums) / num).tolist()
        half = len(means) // 2
        return dict(zip(result.losses, means[:half], strict=True)), dict(zip(result.chance, means[half:], strict=True))

    def _state(self, result: StepResult, step: int) -> dict[str, float]:
        """Learning rates of a step and the norm of its gradients, for the log."""
        factor = lr_factor(self.config.optim, step, self.num_steps)
        state = {f"lr_{part}": rate * factor for part, rate in self.config.optim.learning_rates(self.stage).items()}
        norm = math.nan if result.grad_norm is None else result.grad_norm.item()
        return {**state, "grad_norm": norm} if math.isfinite(norm) else state

    def _checkpoint(self, step: int, log: RunLog) -> None:
        settings = {**self.config.flat(), "engine": self._engine_name}
        meta = {"stage": self.stage, "settings": settings, "processes": env.world_size()}
        if self.watch:
            meta["validation"] = self.watch.state
        path = checkpoint.save_checkpoint(self.run, step, meta, self.engine.save, processes.barrier, env.rank())
        log.event(event="checkpoint", step=step, path=str(path))

    def _sample_sheet(self, step: int, log: RunLog) -> None:
        """samples/step-N.png: real pictures above, generated ones of the same graphs below."""
        if self.main or self.engine.sharded:  # sharded weights are gathered layer by layer, by all processes
            try:
                sheet = draw_sheet(self._pipeline(with_text=False), self.config.run, self.source, self.device)
            except NotFiniteError as error:  # the losses decide whether the run goes on
                logger.warning("no sample sheet at step %d: %s", step, error)
                log.event(event="no samples", step=step, reason=str(error))
                sheet = None
            if self.main and sheet is not None:
                path = self.run / "samples" / f"step-{step:07d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                with writing(path):
                    sheet.save(path)
                log.picture(step, "samples", sheet)
                log.event(event="samples", step=step, path=str(path))
        processes.barrier()
