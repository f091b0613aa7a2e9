"""Settings of drawing and its output: the values of infer.py's flags, and the names of its files."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgg_fast.data.inputs import Item
from sgg_fast.data.png_record import KEYWORD, raw_record, record_text
from sgg_fast.graph import shown

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Short names of diffusers' schedulers."""
MAX_PICTURES = 1_000_000
"""Upper bound of the pictures of one command."""
_LONGEST = 255 - len(".part") - len("-v999999")
"""Bytes of a file's name, with room for prefix and suffix."""
BOUNDS = {
    "num_images": (1, MAX_PICTURES),
    "batch_size": (1, MAX_PICTURES),
    "steps": (1, 100_000),
    "guidance": (1, 10_000),
    "relation_guidance": (0, 10_000),
    "scale": (1, 16),
}
"""Setting -> least and greatest value. Above them numbers overflow, or sampling does not end."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of drawing. None is the picture's own value if the input is a picture, else the model's.

    Raises ValueError for bad values.
    """

    out: Path | None = None
    """A PNG, or a folder (default: outputs)."""
    steps: int | None = None
    """Denoising steps."""
    guidance: float | None = None
    """Classifier-free guidance; 1 turns it off."""
    relation_guidance: float | None = None
    """Additional guidance by the relations alone; 0 turns it off."""
    seed: int | None = None
    """Seed of the first picture of each graph, 0 by default; the next pictures count on."""
    num_images: int = 1
    """Pictures of each graph."""
    scheduler: str | None = None
    """Short name of a diffusers scheduler."""
    size: int | None = None
    """Resolution in pixels."""
    scale: int = 1
    """Integer factor by which a saved picture is enlarged, pixel by pixel; its record keeps the size that was drawn."""
    batch_size: int = 8
    """Pictures drawn at a time."""
    edits: tuple[str, ...] = ()
    """Changes to every graph, in order."""
    show_graph: bool = False
    """Also write the graph beside each picture."""
    explain: bool = False
    """Also write each picture's attention maps."""
    grid: bool = False
    """Also write all pictures on one sheet."""
    overwrite: bool = False
    """Draw existing pictures again."""

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():  # the scheduler's own limit of the steps is checked later
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}, not {value}")
        if self.seed is not None and not 0 <= self.seed <= 2**63 - self.num_images:
            raise ValueError(f"--seed must lie between 0 and 2^63 - 1, not {self.seed}")
        if self.size is not None and (not 8 <= self.size <= 4096 or self.size % 8):
            raise ValueError(f"--size must be a multiple of 8 up to 4096, not {self.size}")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ValueError(
                f"--scheduler {shown(self.scheduler)[1:-1]}: there is no such one; there are {', '.join(SCHEDULERS)}"
            )


def picture_paths(items: Sequence[Item], options: Options, variant: int = 1) -> list[Path]:
    """A file for each picture, graph by graph: outputs/STEM.png, or outputs/STEM-0.png, -1, ... for several of a stem.

    variant: above 1 the names are STEM-v2, STEM-v3, ... Raises ValueError, before anything is drawn, for a place that
    cannot be written to. Without `overwrite` it also raises for a foreign file in the place of a picture, one of its
    sheets or the grid.
    """
    out = options.out
    single = names_picture(out)
    if out is not None and (not str(out).isprintable() or len(os.fsencode(out)) > 4000):
        raise ValueError(
            f"--out {shown(str(out))}: a path of printable characters, and of at most 4000 bytes, is needed"
        )
    if out is not None and single and out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: must end in .png, or be a folder")
    folder = (out.parent if single else out) if out is not None else Path("outputs")
    assert folder is not None
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out or folder}: {nearest} is not a folder that can be written to")
    if len(items) * options.num_images > MAX_PICTURES:
        raise ValueError(f"{len(items)} graphs with --num-images {options.num_images}: over {MAX_PICTURES} pictures")
    stems = [out.stem if out is not None and single else item.stem for item in items for _ in range(options.num_images)]
    totals, taken = Counter(stems), Counter[str]()
    paths = []
    for stem in stems:
        number = f"-{taken[stem]:0{len(str(totals[stem] - 1))}d}" if totals[stem] > 1 else ""
        taken[stem] += 1
        path = folder / f"{stem}{f'-v{variant}' if variant > 1 else ''}{number}.png"
        if max(len(os.fsencode(each.name)) for each in (path, *sheet_paths(path, options).values())) > _LONGEST:
            raise ValueError(f"{shown(stem)}: too long for a picture's name: rename the file, or give --out FILE.png")
        paths.append(path)
    targets = [target for path in paths for target in (path, *sheet_paths(path, options).values())]
    _check_free([*targets, grid_path(paths, items, options)] if options.grid else targets, options.overwrite)
    return paths


def names_picture(out: Path | None) -> bool:
    """Whether --out is a picture's file and not a folder."""
    return out is not None and out.suffix != "" and not out.is_dir()


def _check_free(targets: Sequence[Path], overwrite: bool) -> None:
    """Raise ValueError for a folder, a file that would be written twice, and without `overwrite` for a foreign file."""
    if clash := next((path for path in targets if path.is_dir()), None):
        raise ValueError(f"--out {clash}: is a folder")
    if len(set(targets)) < len(targets):
        double = next(path for path, count in Counter(targets).items() if count > 1)
        raise ValueError(f"--out: two pictures would be called {double}; name the inputs apart")
    if not overwrite and (others := next((path for path in targets if path.exists() and not _is_ours(path)), None)):
        raise ValueError(f"{others}: not drawn by infer.py: give --overwrite to replace it, or another --out")


def _is_ours(path: Path) -> bool:
    """Whether a file is empty or carries a record, which precedes the pixels and so survives truncation in them."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(64)
    return not head or f"tEXt{KEYWORD}\0".encode() in head or raw_record(path) is not None


def is_lost(path: Path, record: dict[str, Any]) -> bool:
    """Whether writing a picture of this record to `path` would overwrite another picture that can still be read."""
    if not path.is_file():
        return False
    there = raw_record(path)
    return there is not None and there != record_text(record)


def sheet_paths(path: Path, options: Options) -> dict[str, Path]:
    """Kind ("graph", "explain", "edit") -> file of each further sheet of the picture at `path`."""
    kinds = [("graph", options.show_graph), ("explain", options.explain), ("edit", bool(options.edits))]
    return {kind: path.with_name(f"{path.stem}-{kind}.png") for kind, wanted in kinds if wanted}


def grid_path(paths: Sequence[Path], items: Sequence[Item], options: Options) -> Path:
    """File of the sheet of all pictures."""
    if options.out is not None and options.out.suffix.lower() == ".png" and not options.out.is_dir():
        return options.out.with_name(f"{options.out.stem}-grid.png")
    stems = {item.stem for item in items}
    return paths[0].with_name(f"{stems.pop()}-grid.png" if len(stems) == 1 else "grid.png")
