"""Checkpoints on disk: written to a temporary folder, synced, renamed; each has a manifest of its files' SHA-256.

A checkpoint holds weights, optimiser and position. Random numbers are hashes of (seed, step, sample), so there is no
generator state. The engine decides the contents of the files (`engines/state.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sgg_fast.config import ConfigError, OptimConfig
from sgg_fast.digests import sha256_of
from sgg_fast.files import discard, replace_folder
from sgg_fast.train.run.folder import writing
from sgg_fast.train.run.interrupts import is_lost_process
from sgg_fast.train.stages import checkpoint_state

MANIFEST = "manifest.json"
KEEP = 2
"""Number of checkpoints on disk; older ones are deleted once a new one is complete."""


def checkpoint_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint in `run`, ascending. `read_manifest` checks whether they are undamaged."""
    names = (p.parent.name for p in (run / "checkpoints").glob(f"step-*/{MANIFEST}"))
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdecimal())


def checkpoint_dir(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:07d}"


def checkpoint_bytes(module: nn.Module, optim: OptimConfig, stage: str, deepspeed: bool) -> int:
    """Approximate size of a checkpoint: weights, two moments, DeepSpeed's master weights, an average of the weights."""
    weights = sum(tensor.nbytes for tensor in checkpoint_state(module).values())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    moments = (
        {"adam8bit": 2.0, "adam4bit": 1.1, "adafactor": 0.0}.get(optim.optimizer, 8.0) if stage == "finetune" else 8.0
    )
    moments += 2 * (optim.weights == "split")  # the low halves
    return weights + int(trained * (moments + 4 * deepspeed + 4 * (optim.ema > 0)))


def save_checkpoint(
    run: Path, step: int, meta: dict[str, Any], write: Callable[[Path], None], barrier: Callable[[], None], rank: int
) -> Path:
    """Let every rank `write` into a temporary folder; then rank 0 completes it and deletes the oldest checkpoint.

    Raises OSError if it cannot be written. Its files are then deleted, and the older checkpoints stay.
    """
    final = checkpoint_dir(run, step)
    aside = final.with_name(f".{final.name}.part")
    try:
        with writing(final):
            if rank == 0:
                for left in (run / "checkpoints").glob(".step-*"):  # left by a killed run
                    shutil.rmtree(left)
                aside.mkdir(parents=True)
        barrier()
        with writing(final):
            write(aside)
        barrier()
        with writing(final):
            if rank == 0:
                _publish(aside, final, {"step": step, **meta})
                for old in checkpoint_steps(run)[:-KEEP]:
                    discard(checkpoint_dir(run, old))
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    barrier()
    return final


def _publish(aside: Path, final: Path, meta: dict[str, Any]) -> None:
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    digests = {str(p.relative_to(aside)): sha256_of(p) for p in files}
    (aside / MANIFEST).write_text(_sealed({**meta, "sha256": digests}), encoding="utf-8")
    replace_folder(aside, final)


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest as JSON text that includes its own SHA-256."""
    seal = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files, and no others, have the recorded hashes.

    Raises `ConfigError` naming the file that is damaged, missing or does not belong there.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["seal"]
        if _sealed(manifest) != text:
            raise ValueError("damaged, or not written by this version")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error!r}") from error
    if fault := _fault(manifest, folder):
        raise ConfigError(f"{path}: not what train.py writes: {fault}")
    digests: dict[str, str] = manifest["sha256"]
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            raise ConfigError(f"{path}: missing or damaged")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in (MANIFEST, *digests):
            raise ConfigError(f"{path}: does not belong to this checkpoint")
    return manifest


def _fault(manifest: dict[str, Any], folder: Path) -> str | None:
    """The first entry of a sealed manifest that `save_checkpoint` cannot have written; None if there is none."""
    step, digests, settings = manifest.get("step"), manifest.get("sha256"), manifest.get("settings")
    if type(step) is not int or folder.name != checkpoint_dir(folder, max(step, 0)).name:
        return f"step {step!r} in {folder.name}"[:200]
    if not isinstance(digests, dict) or not digests:
        return "sha256 must name its files"
    for name, digest in digests.items():
        if not isinstance(digest, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            return f"sha256 names {name!r}"[:200]
    if not isinstance(manifest.get("stage"), str) or not isinstance(settings, dict):
        return "stage must be a word and settings an object"
    if type(num := manifest.get("processes", 1)) is not int or num < 1:
        return f"processes {num!r}"[:200]
    if nested := [name for name, value in settings.items() if isinstance(value, dict)]:
        return f"setting {nested[0]!r} is an object"[:200]
    watched = manifest.get("validation", {"best": 0.0, "since": 0})
    numbers = isinstance(watched, dict) and set(watched) == {"best", "since"}
    if not numbers or any(type(value) not in (int, float) or not 0 <= value < 1e9 for value in watched.values()):
        return "validation must hold the numbers best and since"
    return None


def newest_checkpoint(run: Path) -> tuple[int, dict[str, Any]] | None:
    """Step and manifest of the newest checkpoint; None if there is none.

    Raises `ConfigError` for a damaged one and names the newest older one that is complete. The user decides whether to
    fall back to it.
    """
    steps = checkpoint_steps(run)
    if not steps:
        return None
    newest = checkpoint_dir(run, steps[-1])
    try:
        return steps[-1], read_manifest(newest)
    except ConfigError as error:
        whole = next((step for step in reversed(steps[:-1]) if _is_whole(checkpoint_dir(run, step))), None)
        cure = "no older one is whole: --overwrite starts over"
        if whole is not None:
            cure = f"delete {newest} to go on from step {whole}"
        raise ConfigError(f"{error}; {cure}") from error


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except ConfigError:
        return False
    return True


def load(read: Callable[[Path], None], folder: Path) -> None:
    """Let the engine `read` a checkpoint. Raises `ConfigError` for complete files that this engine does not write."""
    from sgg_fast.train.memory.advice import is_out_of_memory  # late: it imports the planner

    try:
        read(folder)
    except Exception as error:  # border
        if is_out_of_memory(error) or is_lost_process(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"{folder}: cannot be loaded, it was not written by train.py with these settings: {reason}; delete it to "
            "go on from an older one, or start over with --overwrite"
        ) from error
