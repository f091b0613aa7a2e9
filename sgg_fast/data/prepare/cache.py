"""`prepare cache`: runs the frozen models over a whole set once; `sgg_fast/data/stored.py` reads the files.

job.json is written first and lists all inputs of the bytes; a folder with a different job.json is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sgg_fast import env
from sgg_fast.config import ConfigError, flag
from sgg_fast.data.cache import fingerprint, open_foundation, text_fingerprint
from sgg_fast.data.packed import PackedStrings
from sgg_fast.data.prepare.job import CacheJob
from sgg_fast.data.prepare.shard_work import is_done, make_shards, shard_path
from sgg_fast.data.shards import (
    INDEX,
    DamagedError,
    check_files,
    entry_of,
    read_index,
    read_tensors,
    write_index,
    write_tensors,
    write_whole,
)
from sgg_fast.data.sources import PairSource
from sgg_fast.data.stored import FORMAT, GRAPH_TENSORS, GRAPHS, JOB, fixed_settings
from sgg_fast.files import ASIDE, locked
from sgg_fast.graph import NameTable, SceneGraph, SceneGraphBatch
from sgg_fast.nn.clip import embed_names
from sgg_fast.nn.foundation import Foundation

REPORT = "report.json"
NUM_PREVIEWS = 64
"""Number of pictures kept as pixels, for the sample sheets of training."""


def write_cache(
    job: CacheJob, overwrite: bool = False, say: Callable[[str], None] = print, source: PairSource | None = None
) -> dict[str, Any]:
    """Make the cache, or what is left to make of it; returns report.json's content. Raises `ConfigError`.

    A cache that was made from something else (another set, models, settings) is refused, by name of what changed,
    unless `overwrite`; images that changed since are read again. source: the job's set where it is open already.
    """
    source = source or job.open_source()
    foundation = open_foundation(job.model)
    with locked(job.out):
        described = _describe(job, source, foundation)
        started = _accept(job.out, described, overwrite)
        shards = [shard_path(job.out, k) for k in range(-(-source.num_images // job.shard_size))]
        todo = [k for k in range(len(shards)) if not is_done(job, source, k, started)]
        if not todo and _is_whole(job.out, described, shards):
            say(f"{job.out} is complete; the set, its images and the settings are as they were")
            return _report(job, source, shards)
        (job.out / INDEX).unlink(missing_ok=True)
        if len(todo) < len(shards):
            say(f"{len(shards) - len(todo)} of {len(shards)} shards are there already")
        if outdated := [k for k in todo if shards[k].is_file()]:
            say(f"{len(outdated)} shards are made again: files of their images changed, or they are damaged")
        make_shards(job, source, foundation, todo, started)
        return _finish(job, source, foundation, described, shards)


def _is_whole(out: Path, described: dict[str, Any], shards: list[Path]) -> bool:
    """True if the index exists, belongs to this job, and matches every file."""
    try:
        index = read_index(out)
        entries = [*index["shards"], index["graphs"]]
        check_files(out, entries)
        tensors, _ = read_tensors(out / GRAPHS, verify=True)  # every byte, as `is_done` reads the shards
        named = [entry["file"] for entry in entries] == [*(path.name for path in shards), GRAPHS]
        named = named and "picture_sizes" in tensors  # older caches lack them
    except (DamagedError, KeyError, TypeError):
        return False
    # "graphs" is the file in the index, and the digest of its content in job.json.
    return named and all(index.get(key) == value for key, value in described.items() if key != "graphs")


def _describe(job: CacheJob, source: PairSource, foundation: Foundation) -> dict[str, Any]:
    """All inputs of the bytes except the pixels; `stat` identifies the pixels."""
    digest = hashlib.sha256()
    for graph in source.graphs:
        digest.update(repr((graph.objects, graph.relations)).encode("utf-8", "surrogatepass"))
    if source.place is not None:
        for i in range(source.num_images):
            digest.update(os.fsencode(os.path.relpath(source.place(i), job.data.source)) + b"\0")
    text = text_fingerprint(foundation) if job.model.token_init == "text" else None
    return {
        "format": FORMAT,
        "split": job.split,
        "graphs": digest.hexdigest(),
        "settings": fixed_settings(job.data),
        "models": {"text_encoder": text, **{part: fingerprint(getattr(foundation, part)) for part in ("clip", "vae")}},
        "shard_size": job.shard_size,
        "batch_size": job.batch_size,
        # Pictures without boxes are turned upright; older caches lack this entry.
        **({"upright": True} if source.place is not None and source.boxes is None else {}),
    }


def _accept(out: Path, described: dict[str, Any], overwrite: bool) -> str:
    """Compare with an earlier job.json in `out`, or write it; returns the digest that marks this job's shards."""
    path, text = out / JOB, json.dumps(described, indent=1, sort_keys=True) + "\n"
    overwrite = overwrite or not ((out / INDEX).exists() or any(out.glob("shard-*.safetensors")))  # nothing to lose
    if path.is_file() and not overwrite:
        try:
            earlier = json.loads(path.read_text())
            changed = [key for key in described if earlier.get(key) != described[key]]
        except (OSError, ValueError, AttributeError):
            changed = [JOB]
        if changed:
            was = ", ".join(_difference(key, earlier.get(key), described[key]) for key in changed if key != JOB)
            raise ConfigError(
                f"{out} was begun from something else ({was or f'{JOB} is damaged'}); give another --out, "
                "or --overwrite to start over"
            )
    elif overwrite:
        for old in (out / INDEX, *out.glob("shard-*.safetensors"), path):
            old.unlink(missing_ok=True)
    for stale in [*out.glob(".*.part"), *out.glob(".*.safetensors-*"), *out.glob(".*.json-*")]:
        stale.unlink(missing_ok=True)  # left by a killed process, also of an older version
    for scratch in out.glob(f"{ASIDE}words-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    if not path.is_file():
        write_whole(path, text.encode())
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(key: str, was: Any, now: Any) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        inner = [k for k in now if was.get(k) != now[k]]
        show = key == "settings"
        return ", ".join(f"--{flag(k)} {was.get(k)}, now {now[k]}" if show else f"another {k}" for k in inner)
    return f"other {key}" if key == "graphs" else f"{key} {was}, now {now}"


def _finish(
    job: CacheJob, source: PairSource, foundation: Foundation, described: dict[str, Any], shards: list[Path]
) -> dict[str, Any]:
    """Write report.json, graphs.safetensors of the kept images, and last the index."""
    report = _report(job, source, shards)
    # Verify again: the index must describe exactly the models' outputs.
    kept = np.concatenate([read_tensors(path, verify=True)[0]["item"] for path in shards])
    if not len(kept):
        why = "; ".join(f"{fault['count']} {fault['reason']}" for fault in report["faults"])
        raise ConfigError(
            f"--data {job.data.source}: none of {source.num_images} images can be used: {why}; each is named in "
            f"{job.out / REPORT}"
        )
    graphs = (source.graphs[d * source.num_images + int(i)] for d in range(source.draws) for i in kept)
    pictures = {
        "previews": np.stack([source.load_image(int(i)) for i in kept[:NUM_PREVIEWS]]),
        "picture_sizes": source.size_rows(kept.tolist()),
    }
    boxes = source.box_rows(kept.tolist())
    _write_graphs(job, graphs, pictures if boxes is None else {**pictures, "boxes": boxes}, foundation)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        entries = list(pool.map(entry_of, shards))
    data = job.data.source if job.data.is_drawn else str(Path(job.data.source).resolve())
    index = {**described, "data": data, "draws": source.draws, "images": len(kept), "shards": entries,
             "graphs": entry_of(job.out / GRAPHS)}  # fmt: skip
    write_index(job.out, index)
    return report


def _report(job: CacheJob, source: PairSource, shards: list[Path]) -> dict[str, Any]:
    """report.json's content from the notes of the shards; the file is written if it differs."""
    num_kept, turned, faults = 0, 0, dict[str, list[str]]()
    for path in shards:
        tensors, note = read_tensors(path)
        num_kept += len(tensors["item"])
        turned += len(note.get("turned", ()))  # shards of older versions lack it
        for item, _, reason in note["faults"]:
            assert source.place is not None  # toy pictures have no faults
            faults.setdefault(reason, []).append(str(source.place(item)))
    report = {
        "data": job.data.source,
        "images": {"listed": source.num_images, "kept": num_kept, "left_out": source.num_images - num_kept},
        "turned_upright": turned,
        "samples": num_kept * source.draws,
        "boxes": source.boxes is not None,
        "faults": [{"reason": reason, "count": len(paths), "images": paths} for reason, paths in faults.items()],
    }
    path, text = job.out / REPORT, (json.dumps(report, indent=1) + "\n").encode("ascii")
    if not path.is_file() or path.read_bytes() != text:
        write_whole(path, text)
    return report


def _write_graphs(
    job: CacheJob, graphs: Iterable[SceneGraph], pictures: dict[str, np.ndarray], foundation: Foundation
) -> None:
    """graphs.safetensors. Embeddings of names and phrases go through files beside it, a batch in memory at a time."""
    device, table = env.device(), NameTable()
    batch = SceneGraphBatch.from_graphs(graphs, table)
    words = PackedStrings.of(table.names)
    tensors = {name: getattr(batch, name).numpy() for name in GRAPH_TENSORS}
    tensors |= pictures | {"sizes": batch.sizes}
    tensors |= {"text": words.text, "text_ends": words.ends, "phrase_rows": table.phrases.rows_P3}
    clip = foundation.clip.to(device)
    with tempfile.TemporaryDirectory(prefix=f"{ASIDE}words-", dir=job.out) as scratch:
        tensors["names"] = _embedded(
            Path(scratch) / "names", table.spoken(), lambda some: embed_names(clip, foundation.clip_tokenizer, some)
        )
        if job.model.token_init == "text":
            towers = foundation.towers.to(device)
            tensors["phrases"] = _embedded(Path(scratch) / "phrases", table.phrases, towers.phrases)
        write_tensors(job.out / GRAPHS, tensors, {})


_WORDS = 4096
"""Names or phrases that are embedded before their rows go to the disk."""


def _embedded(scratch: Path, strings: Sequence[str], embed: Callable[[Sequence[str]], torch.Tensor]) -> np.ndarray:
    """Rows of all strings as a memory map of the file `scratch`."""
    with scratch.open("wb") as file:
        for first in tqdm(range(0, len(strings), _WORDS), desc=f"embed {scratch.name}", leave=False, disable=None):
            rows = embed(strings[first : first + _WORDS]).cpu().numpy()
            file.write(rows.tobytes())
    return np.memmap(scratch, rows.dtype, "r", shape=(len(strings), rows.shape[1]))
