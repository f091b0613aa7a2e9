"""Counts the launches and bytes of a whole training step as its settings run it on a GPU, and by the host.

    python -m benchmarks.counts.step                     # the paper's fine-tuning, by the storage of its weights
    python -m benchmarks.counts.step --recipe toy

These are counts, not measurements: the step runs on tensors without memory, as `unet.py` runs the UNet. Eagerly the
host launches each of these kernels. A captured step needs one graph launch and two copies from the host. What the host
cannot foresee is left out: DeepSpeed's own optimiser, and that of a step without our kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counts import model
from benchmarks.counts import unet as unet_counts
from benchmarks.counts.kernels import Count, triton_everywhere
from benchmarks.counts.roofline import Chip
from benchmarks.counts.unet import UNetCounter, cuda_norms, make_channels_last, opaque_attention
from sgg_fast import ops
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import Config
from sgg_fast.diffusion import sampling
from sgg_fast.diffusion.captured import CapturedUNet
from sgg_fast.nn import attention
from sgg_fast.recipes import recipe
from sgg_fast.train.assemble import assemble
from sgg_fast.train.engines.base import resolve_precision, resolved
from sgg_fast.train.engines.captured import CapturedEngine
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.planner import _recast
from sgg_fast.train.stages import FinetuneStage, Stage

HOST_CALLS = 3
"""Host calls of a captured step: copying the table, launching the graph, copying back the applied flag."""
GAP, HOST = 1e-6, 5e-6
"""Seconds between two kernels of a graph, and of a launch by the host; assumed."""
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ZERO = {"zero_optimization": {"stage": 2}}
"""What a count needs to know of ds.json."""


@dataclasses.dataclass(frozen=True)
class StepCount:
    """Launches and bytes of a step with one micro-batch."""

    compute: Count
    """Forward and backward."""
    update: Count
    """The optimiser after or behind backward; updates in backward take four launches a weight. 0 where it is not
    counted."""
    captured: bool

    @property
    def total(self) -> Count:
        """Kernels in the graph, or launches without it."""
        return self.compute + self.update

    @property
    def host(self) -> int:
        """Calls of the host."""
        return HOST_CALLS if self.captured else self.total.launches

    def seconds(self, chip: Chip) -> float:
        """Time of what is counted, without arithmetic: bytes and gaps, or the host, whichever is longer.

        Gaps of an update behind backward count too, though backward fills them.
        """
        on_chip = self.total.bytes / chip.bytes_per_second + self.total.launches * GAP
        return max(on_chip, self.host * HOST)


def on_cuda(config: Config, stage: str, by_deepspeed: bool = False) -> Config:
    """The settings as a GPU resolves them, for a stage that is built on tensors without memory."""
    has_kernels = config.model.kernels != "reference"
    config = resolved(config, stage, CUDA, has_kernels, by_deepspeed)
    fuse = "on" if config.model.fuse_unet == "auto" else config.model.fuse_unet
    return config.replace(fuse_unet=fuse, precision=resolve_precision(config.optim, CUDA))


def stage_of(config: Config, stage: str, ds: dict[str, Any] | None = None) -> Stage:
    """The module that a GPU's engine steps, on tensors without memory. Call it under a `FakeTensorMode`."""
    given, config = config, on_cuda(config, stage, ds is not None)
    models = blank_foundation(config.model)
    if stage == "finetune":
        if ds is None:
            make_channels_last(models.unet)
        if config.optim.bf16_weights or ds is not None:
            _recast(models.unet, torch.bfloat16)
    parts = models, blank_conditioner(config.model, models), blank_cache(config, models, config.optim.batch_size)
    made = assemble(config.replace(attention="sdpa", cross_attention="auto"), stage, *parts, CPU, ds)
    if isinstance(made, FinetuneStage):
        choice = "xformers" if given.model.attention == "auto" else given.model.attention
        attention.put_processors(made.unet, choice, given.model.cross_attention)
        if ds is not None:
            for name, module in made.named_children():
                if name != "unet":
                    _recast(module, torch.bfloat16)
    return made


def engine_of(config: Config, stage: str = "finetune") -> CapturedEngine:
    """The captured engine of a GPU, on tensors without memory. Call it under a `FakeTensorMode`."""
    made = stage_of(config, stage)
    for module in (made, *([made.unet] if isinstance(made, FinetuneStage) else [])):
        # Already on the device; tensors without memory cannot be moved.
        module.to = module.bfloat16 = lambda *args, module=module, **kwargs: module  # type: ignore[assignment]
    return CapturedEngine(made, CPU)


@contextlib.contextmanager
def _without_memory(config: Config, stage: str, by_deepspeed: bool) -> Iterator[None]:
    """Context in which a stage is built and run: no memory, kernels and attention as operators, CUDA's autocast."""
    with contextlib.ExitStack() as stack:
        kernels = ops.assumed("reference") if config.model.kernels == "reference" else triton_everywhere()
        for context in (FakeTensorMode(allow_non_fake_inputs=True), opaque_attention(), kernels):
            stack.enter_context(context)
        if stage == "finetune" and not by_deepspeed and not on_cuda(config, stage).optim.bf16_weights:
            stack.enter_context(cuda_norms())
        yield


def _counted(function: Callable[[], object]) -> Count:
    with UNetCounter() as counter:
        function()
    return counter.total


def count(config: Config, stage: str = "finetune", ds: dict[str, Any] | None = None) -> StepCount:
    """Count the step that these settings run on a GPU. ds: what is known of ds.json (`ZERO`), None without it."""
    with _without_memory(config, stage, ds is not None):
        if ds is not None or config.model.kernels == "reference":
            return StepCount(_counted(_eager(config, stage, ds)), Count(0, 0), captured=False)
        engine = engine_of(config, stage)
        bucket = engine.buckets.of(np.zeros((1, config.optim.batch_size), np.int64))
        if engine.behind:
            engine.behind.expect()
        compute = _counted(lambda: engine.add(bucket, first=True))
        update = _counted(_update(engine))
        update = dataclasses.replace(update, bytes=update_bytes(engine))
        return StepCount(compute, update, captured=config.run.cuda_graphs)


def _update(engine: CapturedEngine) -> Callable[[], object]:
    """The optimiser's step on the gradients that there are: all at once, or the segments of one behind backward."""
    optimizer, behind = engine.optimizer, engine.behind
    gradients = [optimizer.gradients()]
    if behind:
        behind.form()
        gradients = [optimizer.gradients(segment) for segment in behind.buckets or ()]
    num_rows = sum(num for each in gradients for num in optimizer.lengths(each))
    addresses = torch.zeros(num_rows, 3, dtype=torch.int64)

    def run() -> None:
        if behind:
            behind.addresses = addresses
            behind.finish()
        engine.apply(addresses)

    return run


def update_bytes(engine: CapturedEngine) -> int:
    """Bytes of a step of the optimiser: weights and moments read and written, gradients read twice (their norm first).

    The kernels find gradients by addresses, so their operands do not show these bytes.
    """
    moved = 0
    for group in engine.optimizer.param_groups:
        numel, width = sum(p.numel() for p in group["params"]), group["params"][0].element_size()
        weights = 4 if engine.module.config.optim.weights == "lean" and width == 2 else 8
        moments = 16 if group["optim_bits"] == 32 else 4
        moved += numel * (weights + moments + 2 * width)
    return moved


def _eager(config: Config, stage: str, ds: dict[str, Any] | None) -> Callable[[], None]:
    """Forward and backward of a stage that is built now; outside of DeepSpeed under autocast."""
    made, ids = stage_of(config, stage, ds), np.arange(config.optim.batch_size)
    cast = torch.bfloat16 if ds is None and stage == "finetune" else None

    def run() -> None:
        with torch.autocast("cpu", cast) if cast else contextlib.nullcontext():
            total = made(ids, 0).total
        total.backward()

    return run


def count_sampling(config: Config, num_images: int = 1) -> StepCount:
    """Count one guided step of drawing, up to the scheduler's: what `CapturedUNet` captures, with SDPA as infer.py."""
    with _without_memory(config, "sampling", True), torch.no_grad():
        made = stage_of(config.replace(weights="lean", optimizer="adam8bit", attention="sdpa"), "finetune")
        assert isinstance(made, FinetuneStage)
        unet, asked = made.unet.eval(), sampling.conditions(config.run.guidance)
        z = torch.empty(num_images, unet.config.in_channels, *made.cache.moments.shape[-2:])
        rows = num_images * len(asked)
        context = torch.empty(rows, 80, unet.config.cross_attention_dim, dtype=torch.bfloat16)
        mask, t = torch.ones(rows, 80, dtype=torch.bool), torch.zeros((), dtype=torch.int64)
        captured = config.run.cuda_graphs and config.model.kernels != "reference"
        denoise = CapturedUNet().denoiser(unet, z, context, mask, "off", guidance=config.run.guidance)
        return StepCount(_counted(lambda: denoise(z, t)), Count(0, 0), captured)


FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "--stage pretrain": ("pretrain", {}, None),
    "--stage finetune": ("finetune", {}, None),
    "--stage finetune --weights master": ("finetune", {"weights": "master"}, None),
    "--stage finetune --weights lean": ("finetune", {"weights": "lean", "optimizer": "adam8bit"}, None),
    "--stage finetune --deepspeed ds.json": ("finetune", {}, ZERO),
}
"""Command -> its stage, settings and ds.json."""


def written() -> dict[str, Callable[[], StepCount]]:
    """The steps of `baselines/steps.json`: the defaults of `vg256`, whose names `benchmarks.targets` reads."""
    small = recipe("vg256")
    large = small.replace(resolution=512)

    def unet() -> StepCount:
        form = unet_counts.FORMS[-1]
        forward, backward = (counter.total for counter in unet_counts.count(form, 32, autocast=False))
        return StepCount(forward + backward, Count(0, 0), captured=True)

    return {
        "pretrain b2": lambda: count(small, "pretrain"),
        "finetune 256 b2": lambda: count(small),
        "finetune 512 b2": lambda: count(large),
        "sampling 512 b2": lambda: count_sampling(large),
        "unet 256 b2": unet,
    }


def write(path: pathlib.Path = model.STEPS) -> None:
    """Count the steps of `written` and put them into `path`."""
    found = {}
    for name, step in written().items():
        counted = step()
        found[name] = {part: dataclasses.asdict(getattr(counted, part)) for part in ("compute", "update")}
        print(f"{name}: {found[name]}", flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@command("benchmarks.counts.step")
def main(argv: list[str] | None) -> None:
    """Print what each command's step takes."""
    parser = OneLineParser(prog="python -m benchmarks.counts.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="vg256", help="default %(default)s")
    parser.add_argument("--write", action="store_true", help="write the counts that benchmarks.targets reads")
    args = parser.parse_args(argv)
    if args.write:
        return write()
    base = recipe(args.recipe)
    side = base.data.resolution
    print(f"{base.run.recipe}, {side} x {side}, batch {base.optim.batch_size}", flush=True)
    for name, (stage, changes, ds) in FORMS.items():
        found = count(base.replace(**changes), stage, ds)
        update = f"{found.update.launches} of them the optimiser's" if ds is None else "without the optimiser's"
        print(f"{name:40} {found.total.launches:6,} launches, {update}; {found.total.bytes / 1e9:6.2f} GB; "
              f"{found.host:,} by the host", flush=True)  # fmt: skip
    return None
