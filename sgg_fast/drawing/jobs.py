"""Draws many graphs: in batches of like size, one batch in memory at a time, going on where an earlier run stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sgg_fast.data.inputs import Item
from sgg_fast.data.png_record import graph_json, is_drawn, save_png
from sgg_fast.drawing.edit import apply_edit
from sgg_fast.drawing.explain import AttentionMaps, explain_sheet
from sgg_fast.drawing.models import Model, scheduler_name, set_scheduler
from sgg_fast.drawing.options import Options, grid_path, picture_paths, sheet_paths
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.conditioner import context_length
from sgg_fast.pictures.graph_picture import draw_graph
from sgg_fast.pictures.sheets import beside, enlarged, grid, tiles, zoomed

Progress = Callable[[float], None]
"""Told after each denoising step how many pictures' worth of work it was."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture to draw."""

    graph: SceneGraph
    before: SceneGraph
    """The graph before it was edited."""
    path: Path
    record: dict[str, Any]
    """Graph, seed and settings, as the PNG carries them; what is there with the same record is not drawn again."""
    sheets: dict[str, Path]
    """Kind ("graph", "explain", "edit") -> file of each further sheet."""
    edits: tuple[str, ...] = ()

    def group(self, null_tokens: int) -> tuple:
        """Jobs of one group can share a batch; a context holds at least the null condition's tokens."""
        triples = max(len(g.objects) + len(g.relations) for g in (self.graph, self.before))
        shared = ("size", "scheduler", "steps", "guidance", "relation_guidance")
        return context_length(triples, null_tokens), *(self.record[name] for name in shared)

    def is_done(self) -> bool:
        """Whether all its files are there."""
        sheets = (is_drawn(path, self.sheet_record(kind)) for kind, path in self.sheets.items())
        return is_drawn(self.path, self.record) and all(sheets)

    def sheet_record(self, kind: str) -> dict[str, Any]:
        """The picture's record, and what else the sheet shows."""
        return {**self.record, "sheet": kind, "edits": list(self.edits)}


def make_jobs(items: Sequence[Item], model: Model, options: Options) -> list[Job]:
    """A job for each picture. Raises ValueError for an edit or a setting that cannot be followed."""
    config, scheduler = model.pipeline.config, scheduler_name(model.pipeline)
    defaults = {"steps": config.sampling_steps, "guidance": config.guidance, "size": config.resolution,
                "relation_guidance": 0.0, "scheduler": scheduler, "seed": 0}  # fmt: skip
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    paths = iter(picture_paths(items, options))
    jobs = []
    for item in items:
        graph = item.graph
        for edit in options.edits:
            graph = apply_edit(graph, edit)
        settings = {**defaults, **item.settings, **given}
        # A picture's own settings are checked as the flags are.
        checked = [name for name in defaults if name != "scheduler" or settings[name] != scheduler]
        Options(num_images=options.num_images, **{name: settings[name] for name in checked})
        for number in range(options.num_images):
            record = {name: settings[name] for name in defaults}
            record |= {"seed": settings["seed"] + number, "graph": graph_json(graph)}
            record |= {name: float(record[name]) for name in ("guidance", "relation_guidance")}
            record |= {"model": model.name, "weights": model.weights}
            record |= {"scale": options.scale} if options.scale > 1 else {}
            path = next(paths)
            jobs.append(Job(graph, item.graph, path, record, sheet_paths(path, options), options.edits))
    return jobs


def draw_jobs(
    jobs: Sequence[Job], model: Model, options: Options, progress: Progress = lambda share: None
) -> Iterator[Job]:
    """Draw what is not there yet, and yield every job once its files are. A stopped run goes on to the same bytes:
    batches are cut from all jobs, and one of which anything is missing is drawn whole.
    """
    groups: dict[tuple, list[Job]] = {}
    null_tokens = model.pipeline.graph_encoder.config.null_tokens
    for job in jobs:
        groups.setdefault(job.group(null_tokens), []).append(job)
    for group in groups.values():
        for start in range(0, len(group), options.batch_size):
            batch = group[start : start + options.batch_size]
            missing = [options.overwrite or not job.is_done() for job in batch]
            if any(missing):
                _draw_batch(batch, missing, model, options, progress)
            else:
                progress(len(batch) * work(options))
            yield from batch


def work(options: Options) -> int:
    """Samplings for each picture: an edited one is drawn before and after."""
    return 2 if options.edits else 1


def _draw_batch(
    batch: Sequence[Job], missing: Sequence[bool], model: Model, options: Options, progress: Progress
) -> None:
    images, maps = _sample([job.graph for job in batch], batch, model, progress, explain=options.explain)
    befores = _sample([job.before for job in batch], batch, model, progress)[0] if options.edits else images
    for i, job in enumerate(batch):
        if missing[i]:
            save_png(enlarged(images[i], options.scale), job.path, job.record)
            for kind, path in job.sheets.items():
                sheet = _sheet(kind, job, befores[i], images[i], maps[i] if maps is not None else None)
                save_png(sheet, path, job.sheet_record(kind))


def _sheet(kind: str, job: Job, before: Image.Image, image: Image.Image, maps: Any) -> Image.Image:
    if kind == "graph":
        drawing = draw_graph(job.graph)
        return beside(drawing, zoomed(image, max(384, drawing.height // 2)))
    if kind == "explain":
        return explain_sheet(image, job.graph, maps)
    return tiles([zoomed(before, 256), zoomed(image, 256)], ["before", "; ".join(job.edits)], columns=2)


def _sample(
    graphs: Sequence[SceneGraph], batch: Sequence[Job], model: Model, progress: Progress, explain: bool = False
) -> tuple[list[Image.Image], Any]:
    """The pictures of `graphs` with the jobs' seeds and settings, and with `explain` their attention maps."""
    pipeline, record = model.pipeline, batch[0].record
    if record["scheduler"] != scheduler_name(pipeline):
        set_scheduler(pipeline, record["scheduler"])

    def tick(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(len(graphs) / len(pipe.scheduler.timesteps))
        return tensors

    def call() -> list[Image.Image]:
        try:
            return pipeline(
                graphs,
                num_inference_steps=record["steps"],
                guidance_scale=record["guidance"],
                relation_guidance=record["relation_guidance"],
                generator=[torch.Generator().manual_seed(job.record["seed"]) for job in batch],
                resolution=record["size"],
                callback_on_step_end=tick,
            ).images
        except torch.OutOfMemoryError as error:
            raise ValueError("out of GPU memory: lower --batch-size or --size") from error

    if not explain:
        return call(), None
    encoder = pipeline.graph_encoder.config
    if encoder.get("context") != "triples":
        own = "has --context global" if "context" in encoder else "is a baseline"
        raise ValueError(f"--explain needs a model with a token for each triple; this one {own}")
    side = record["size"] // pipeline.vae_scale_factor
    with AttentionMaps(pipeline.unet, len(graphs), (side, side)) as maps:
        images = call()
    return images, maps.maps()


def draw_grid(items: Sequence[Item], jobs: Sequence[Job], options: Options) -> Path:
    """Write all pictures on one sheet, a row a graph where there are several of each; its path."""
    paths = [job.path for job in jobs]
    columns = options.num_images if options.num_images > 1 and len(items) > 1 else None
    path = grid_path(paths, items, options)
    save_png(grid(paths, columns), path, {"sheet": "grid"})  # no graph of its own, but known as ours
    return path
