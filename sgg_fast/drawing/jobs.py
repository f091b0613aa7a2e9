"""Draws many graphs in batches of like size, one batch in memory at a time; a stopped run can continue."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sgg_fast.data.inputs import Item
from sgg_fast.data.png_record import graph_json, is_drawn, record_text, save_png
from sgg_fast.diffusion import limits
from sgg_fast.drawing.edit import edited
from sgg_fast.drawing.explain import AttentionMaps, explain_sheet
from sgg_fast.drawing.models import Model, made_scheduler, scheduler_name
from sgg_fast.drawing.options import Options, grid_path, is_lost, names_picture, picture_paths, sheet_paths
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.conditioner import context_length
from sgg_fast.pictures.graph_picture import draw_graph
from sgg_fast.pictures.sheets import beside, enlarged, grid, tiles, zoomed
from sgg_fast.pipeline import SceneGraphToImagePipeline

Progress = Callable[[float], None]
"""Called after each denoising step with the work done, as a number of pictures."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A denoising step that a batch has completed."""

    number: int
    """Counts from 1."""
    total: int
    preview: Callable[[], Image.Image]
    """Decodes the first picture as this step predicts it; costs one pass of the VAE."""


OnStep = Callable[[Step], None]
"""Called after each denoising step; an exception from it ends the drawing."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture to draw."""

    graph: SceneGraph
    before: SceneGraph
    """The graph before it was edited."""
    path: Path
    record: dict[str, Any]
    """Graph, seed and settings, as the PNG carries them; a file with the same record is not drawn again."""
    sheets: dict[str, Path]
    """Kind ("graph", "explain", "edit") -> file of each further sheet."""
    edits: tuple[str, ...] = ()
    variant: int = 1
    """Above 1 if other pictures already have these names."""

    def group(self, null_tokens: int) -> tuple:
        """Jobs of one group can share a batch; a context holds at least the null condition's tokens."""
        triples = max(len(g.objects) + len(g.relations) for g in (self.graph, self.before))
        shared = ("size", "scheduler", "steps", "guidance", "relation_guidance")
        return context_length(triples, null_tokens), *(self.record[name] for name in shared)

    def is_done(self) -> bool:
        """Whether all its files exist."""
        return all(is_drawn(path, record) for path, record in self.files())

    def files(self) -> list[tuple[Path, dict[str, Any]]]:
        """(file, record) of the picture and of its sheets."""
        return [(self.path, self.record), *((path, self.sheet_record(kind)) for kind, path in self.sheets.items())]

    def sheet_record(self, kind: str) -> dict[str, Any]:
        """The picture's record plus the contents of the sheet."""
        return {**self.record, "sheet": kind, "edits": list(self.edits)}


def make_records(graph: SceneGraph, settings: Mapping[str, Any], model: Model, options: Options) -> list[dict]:
    """The record of each picture of `graph`: the options, else `settings` that came with it, else the model's own.

    Raises ValueError for a setting that is not possible.
    """
    config, scheduler = model.pipeline.config, scheduler_name(model.pipeline)
    defaults = {"steps": config.sampling_steps, "guidance": config.guidance, "size": config.resolution,
                "relation_guidance": 0.0, "scheduler": scheduler, "seed": 0}  # fmt: skip
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    used = {**defaults, **settings, **given}
    # A picture's own settings are checked like the flags.
    checked = [name for name in defaults if name != "scheduler" or used[name] != scheduler]
    Options(num_images=options.num_images, **{name: used[name] for name in checked})
    if refusal := limits.refusal(made_scheduler(model.pipeline, used["scheduler"]), used["steps"]):
        raise ValueError(f"--steps {used['steps']} with --scheduler {used['scheduler']}: {refusal}")
    record = {name: used[name] for name in defaults} | {"graph": graph_json(graph)}
    record |= {name: float(record[name]) for name in ("guidance", "relation_guidance")}
    record |= {"model": model.name, "weights": model.weights}
    record |= {"scale": options.scale} if options.scale > 1 else {}
    return [{**record, "seed": used["seed"] + number} for number in range(options.num_images)]


def make_jobs(items: Sequence[Item], model: Model, options: Options) -> list[Job]:
    """A job for each picture. Raises ValueError for an edit or a setting that is not possible.

    If a job's file holds another picture, all files of the command get names STEM-v2, -v3, ..., the first that is free.
    With a picture's name as --out the command raises instead. Without `overwrite` no picture is lost.
    """
    wanted = [
        (graph, item.graph, record)
        for item, graph in ((item, edited(item.graph, options.edits)) for item in items)
        for record in make_records(graph, item.settings, model, options)
    ]
    for variant in itertools.count(1):
        paths = picture_paths(items, options, variant)
        jobs = [
            Job(graph, before, path, record, sheet_paths(path, options), options.edits, variant)
            for path, (graph, before, record) in zip(paths, wanted, strict=True)
        ]
        files = ((path, record) for job in jobs for path, record in job.files())
        lost = None if options.overwrite else next((each for each in files if is_lost(*each)), None)
        if lost is None:
            return jobs
        if names_picture(options.out):
            raise ValueError(f"{lost[0]}: holds another picture: give --overwrite to replace it, or another --out")
    raise AssertionError("the count has no end")


def draw_jobs(
    jobs: Sequence[Job], model: Model, options: Options, progress: Progress = lambda share: None
) -> Iterator[Job]:
    """Draw the missing pictures, and yield every job once its files exist. A stopped run continues to the same bytes
    (on a GPU with the pipeline's `deterministic`).

    Batches are cut from all jobs, and a batch with a missing picture is drawn whole.
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
    """Samplings for each picture: an edited one is drawn before and after the edit."""
    return 2 if options.edits else 1


def _draw_batch(
    batch: Sequence[Job], missing: Sequence[bool], model: Model, options: Options, progress: Progress
) -> None:
    def on_step(step: Step) -> None:
        progress(len(batch) / step.total)

    records = [job.record for job in batch]
    images, maps = sample([job.graph for job in batch], records, model, on_step, explain=options.explain)
    befores = sample([job.before for job in batch], records, model, on_step)[0] if options.edits else images
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


def sample(
    graphs: Sequence[SceneGraph],
    records: Sequence[Mapping[str, Any]],
    model: Model,
    on_step: OnStep,
    explain: bool = False,
) -> tuple[list[Image.Image], torch.Tensor | None]:
    """The pictures of `graphs`, each with its record's seed; all have the first record's other settings.

    With `explain` also their attention maps, [B, T, h, w] (`AttentionMaps`). Raises ValueError if there are none, and
    `NotFiniteError` for NaN or Inf: then nothing of the batch is saved.
    """
    pipeline, record = model.pipeline, records[0]
    pipeline.scheduler = made_scheduler(pipeline, record["scheduler"])

    def tick(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        def preview() -> Image.Image:
            return pipe.decode(tensors["pred_x0"][:1])[0]

        on_step(Step(step + 1, len(pipe.scheduler.timesteps), preview))
        return tensors

    def draw() -> list[Image.Image]:
        try:
            return pipeline(
                graphs,
                num_inference_steps=record["steps"],
                guidance_scale=record["guidance"],
                relation_guidance=record["relation_guidance"],
                generator=[torch.Generator().manual_seed(each["seed"]) for each in records],
                resolution=record["size"],
                callback_on_step_end=tick,
                callback_on_step_end_tensor_inputs=("latents", "pred_x0"),
            ).images
        except (RuntimeError, MemoryError) as error:
            short = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not (short or "allocate memory" in str(error)):  # torch's message on a CPU
                raise
            raise ValueError("out of memory: lower --batch-size or --size") from error

    if not explain:
        return draw(), None
    if refusal := unexplained(pipeline):
        raise ValueError(refusal)
    side = record["size"] // pipeline.vae_scale_factor
    with AttentionMaps(pipeline.unet, len(graphs), (side, side)) as maps:
        images = draw()
    return images, maps.maps()


def unexplained(pipeline: SceneGraphToImagePipeline) -> str:
    """The reason why this model has no attention map for each object and relation; "" if it has them."""
    encoder = pipeline.graph_encoder.config
    if encoder.get("context") == "triples":
        return ""
    own = "has --context global" if "context" in encoder else "is a baseline"
    return f"--explain needs a model with a token for each triple; this one {own}"


def draw_grid(items: Sequence[Item], jobs: Sequence[Job], options: Options) -> Path:
    """Write all pictures on one sheet, a row for each graph if there are several of each; returns its path."""
    paths = [job.path for job in jobs]
    columns = options.num_images if options.num_images > 1 and len(items) > 1 else None
    shown = hashlib.sha256("\n".join(record_text(job.record) for job in jobs).encode()).hexdigest()
    record = {"sheet": "grid", "pictures": shown}  # it has no graph, but this record marks the file as ours
    first = grid_path(paths, items, options)
    names = (first.with_stem(f"{first.stem}-v{i}") if i > 1 else first for i in itertools.count(1))
    path = first if options.overwrite else next(path for path in names if not is_lost(path, record))
    save_png(grid(paths, columns), path, record)
    return path
