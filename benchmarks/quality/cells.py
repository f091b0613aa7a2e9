"""Runs the cells of `benchmarks.quality`, each as train.py and `sgg_fast.eval` would, several at a time.

A finished part is kept and an interrupted one continues: training from its checkpoint, an evaluation from its pictures.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.plan import COMMON, GRAPHS, LEAST, NOISE_SEEDS, SCHEDULER, Cell, Pretraining, Sizes, Speeds

RECIPE = "toy-words"
DATA_SEED = 7
"""Seed of the training scenes; held-out scenes come from another world."""
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of Linux's prctl


@contextlib.contextmanager
def _written_to(log: Path) -> Iterator[None]:
    """Context in which output goes to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def prepare(out: Path, sizes: Sizes, model: str) -> Path:
    """Make the training set, with all frozen computations done once for all cells. Raises ValueError or OSError.

    model: the foundation of all systems.
    """
    folder = out / "set"
    if not (folder / "index.json").is_file():
        from sgg_fast.data.prepare.__main__ import main

        words = ["cache", "--out", str(folder), "--recipe", RECIPE, "--data", RECIPE, "--model", model]
        with _written_to(out / "set.log"):
            code = main([*words, "--num-scenes", str(sizes.num_scenes), "--seed", str(DATA_SEED), "--workers", "1"])
        if code:
            raise ValueError(f"the training set could not be prepared: see {out / 'set.log'}")
    return folder


def settings(out: Path, sizes: Sizes, seed: int, given: dict[str, str]) -> dict[str, Any]:
    """Fields of the recipe for a run; `given` are those that the command names."""
    sized = {name: getattr(sizes, name) for name in ("batch_size", "pretrain_steps", "finetune_steps")}
    every = max(50, sizes.finetune_steps // 4)
    return {**COMMON, **sized, **given, "data": str(out / "set"), "seed": seed, "checkpoint_every": every}


def pretrain(out: Path, sizes: Sizes, task: Pretraining, given: dict[str, str]) -> None:
    """Run one pre-training."""
    _train(task.folder(out), "pretrain", {**settings(out, sizes, task.seed, given), **dict(task.own)}, None)


def run_cell(out: Path, sizes: Sizes, cell: Cell, given: dict[str, str]) -> None:
    """Run one cell: fine-tuning, then the evaluation."""
    folder, system = cell.folder(out), cell.system
    own = {**settings(out, sizes, cell.seed, given), **system.settings}
    if system.trained:
        before = Pretraining.of(cell)
        _train(folder, "finetune", own, before and before.folder(out) / "pretrain" / "graph_encoder")
    else:
        _untrained(folder, own)
    _evaluate(folder, sizes, cell.seed)
    shutil.rmtree(folder / "finetune" / "checkpoints", ignore_errors=True)


def _train(folder: Path, stage: str, own: dict[str, Any], encoder: Path | None) -> None:
    from sgg_fast.config import as_flags
    from sgg_fast.recipes import recipe
    from sgg_fast.train.trainer import Trainer

    words = ["python", "train.py", "--recipe", RECIPE, "--stage", stage, "--out", str(folder), *as_flags(own)]
    folder.mkdir(parents=True, exist_ok=True)
    words += ["--graph-encoder", str(encoder)] if encoder else []
    (folder / f"{stage}.command").write_text(shlex.join(words) + "\n", encoding="utf-8")
    Trainer(recipe(RECIPE, **own), stage, folder, graph_encoder=encoder).train()


def _untrained(folder: Path, own: dict[str, Any]) -> None:
    """Save the untrained foundation like the result of a fine-tuning."""
    from sgg_fast import env
    from sgg_fast.data.cache import build_cache, open_foundation
    from sgg_fast.data.sources import open_source
    from sgg_fast.recipes import recipe
    from sgg_fast.train.assemble import new_conditioner
    from sgg_fast.train.outputs import export, make_pipeline

    result = folder / "finetune" / "pipeline"
    if result.is_dir():
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    config = recipe(RECIPE, **own)
    source, foundation = open_source(config.data, config.run.seed), open_foundation(config.model)
    cache = build_cache(source, foundation, env.device(), with_latents=False, progress=False)
    conditioner = new_conditioner(config.model, config.run.seed, foundation, cache, source.graphs)
    export(result, make_pipeline(config, foundation, conditioner))


def _evaluate(folder: Path, sizes: Sizes, seed: int) -> None:
    """Evaluate a cell. Its noise differs between seeds and is equal for every system of one seed."""
    from sgg_fast.eval.__main__ import parse
    from sgg_fast.eval.evaluate import evaluate

    words = ["--model", folder, "--out", folder / "eval", "--data", GRAPHS, "--num", sizes.num_graphs, "--pairs",
             sizes.num_graphs, "--seeds", NOISE_SEEDS, "--first-seed", NOISE_SEEDS * seed, "--steps", sizes.draw_steps,
             "--scheduler", SCHEDULER]  # fmt: skip
    flags = [str(word) for word in words]
    (folder / "eval.command").write_text(shlex.join(["python", "-m", "sgg_fast.eval", *flags]) + "\n", encoding="utf-8")
    print(evaluate(parse(flags)))


Task = Pretraining | Cell


def run_task(out: Path, sizes: Sizes, task: Task, given: dict[str, str]) -> float:
    """Run one task in this process; returns its seconds. Raises the errors of training and evaluation."""
    begun = time.monotonic()
    with _written_to(task.folder(out) / "log.txt"):
        (run_cell if isinstance(task, Cell) else pretrain)(out, sizes, task, given)  # type: ignore[operator]
    return time.monotonic() - begun


def _begin_worker(parent: int) -> None:
    """Initialise a worker process: it ends with the process that started it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()


class _Here(concurrent.futures.Executor):
    """Runs a task immediately in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except (ValueError, OSError, RuntimeError) as error:
            future.set_exception(error)
        return future


def _executor(jobs: int) -> concurrent.futures.Executor:
    if jobs == 1:
        return _Here()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))  # before the workers load torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)
    )


def run_all(
    out: Path, sizes: Sizes, cells: list[Cell], given: dict[str, str], jobs: int, after: Callable[[Task, float], None]
) -> list[str]:
    """Run every cell and its dependencies, `jobs` at a time, seed after seed; returns a line for each failure.

    given: fields of the recipe that the command names. after(task, seconds) is called after each success.
    """
    todo: list[Task] = []
    for cell in cells:
        if not cell.done(out):
            before = Pretraining.of(cell)
            todo += [before] if before and before not in todo and not before.done(out) else []
            todo.append(cell)
    failed: list[str] = []
    running: dict[concurrent.futures.Future[Any], Task] = {}
    with _executor(jobs) as pool:
        try:
            while todo or running:
                while len(running) < jobs and (task := _next(out, todo)) is not None:
                    todo.remove(task)
                    running[pool.submit(run_task, out, sizes, task, given)] = task
                if not running:  # the remaining tasks depend on a failed one
                    break
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    error = future.exception()
                    if error is None:
                        after(task, future.result())
                    else:
                        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                        failed.append(f"{task.folder(out)}: {reason}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _next(out: Path, todo: list[Task]) -> Task | None:
    """The first task that needs no pre-training or whose pre-training is done."""
    for task in todo:
        before = Pretraining.of(task) if isinstance(task, Cell) else None
        if before is None or before.done(out):
            return task
    return None


def measure(folder: Path, given: dict[str, str]) -> Speeds:
    """Measure the seconds of a fine-tuning image, a pre-training graph and a sampling step, with a few of each."""
    import torch

    from sgg_fast import env
    from sgg_fast.data.prepare.__main__ import main  # noqa: F401  (its import is not what is timed)
    from sgg_fast.graph import SceneGraph
    from sgg_fast.recipes import recipe
    from sgg_fast.train.outputs import make_pipeline
    from sgg_fast.train.trainer import Trainer

    on_gpu, batch = env.device().type == "cuda", 8

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    def timed(act: Callable[[int], object], times: int) -> float:
        act(0)
        begun = clock()
        for step in range(1, times + 1):
            act(step)
        return (clock() - begun) / times

    found = []
    for stage in ("finetune", "pretrain"):
        with _written_to(folder / "measure.log"):
            config = recipe(RECIPE, **{**COMMON, **given}, num_scenes=16, batch_size=batch)
            trainer = Trainer(config, stage, folder / "measure", overwrite=True)
            ids = trainer.trained[:batch][None]
            found.append(timed(lambda step, t=trainer, i=ids: t.engine.update(i, step), 3) / batch)  # type: ignore[misc]
    pipeline = make_pipeline(config, trainer.foundation, trainer.conditioner)
    pipeline.set_progress_bar_config(disable=True)
    graphs = [SceneGraph(("dog", "house", "sun"), ((0, "left of", 1),))] * batch

    def draw(step: int) -> object:
        return pipeline(
            graphs, num_inference_steps=LEAST.draw_steps, guidance_scale=4.0, generator=torch.Generator().manual_seed(0)
        )

    found.append(timed(draw, 1) / (LEAST.draw_steps * batch))
    shutil.rmtree(folder / "measure", ignore_errors=True)
    return Speeds(*found)


def result_of(out: Path, cell: Cell) -> dict[str, Any]:
    """The result of the cell's evaluation. Raises ValueError for a damaged one."""
    from sgg_fast.eval.report import read_result

    return read_result(cell.folder(out) / "eval")
