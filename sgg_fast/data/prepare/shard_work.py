"""Makes the shards of a cache: selects images, decodes and encodes them, here or in worker processes.

A shard has a fixed content, and one worker writes it atomically. So stopped, killed and restarted runs with any number
of workers give the same images in the same batches and the same bytes. (On CPUs this needs the same number of torch
threads: another order of sums changes the last bits.)
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sgg_fast import env
from sgg_fast.commands import NotFiniteError
from sgg_fast.config import ConfigError
from sgg_fast.data.cache import encode_images, open_foundation
from sgg_fast.data.images import ImageError
from sgg_fast.data.prepare.job import CacheJob
from sgg_fast.data.shards import DamagedError, read_tensors, write_tensors
from sgg_fast.data.sources import PairSource
from sgg_fast.nn.foundation import Foundation

Stat = tuple[int, int]
"""Bytes and modification time in ns of a file."""
_POLL = 0.2
"""Seconds between checks that the workers are alive."""


def shard_path(out: Path, number: int) -> Path:
    """Path of a shard's file."""
    return out / f"shard-{number:05d}.safetensors"


def _stat(source: PairSource, index: int) -> Stat:
    """Size and modification time of an image's file; zeros for toy or absent images."""
    if source.place is None:
        return 0, 0
    with contextlib.suppress(OSError):
        status = os.stat(source.place(index))
        return status.st_size, status.st_mtime_ns
    return 0, 0


def _items(job: CacheJob, source: PairSource, number: int) -> range:
    return range(number * job.shard_size, min((number + 1) * job.shard_size, source.num_images))


def is_done(job: CacheJob, source: PairSource, number: int, started: str) -> bool:
    """True if the shard of this job exists with its original bytes and its images' files did not change."""
    path = shard_path(job.out, number)
    if not path.is_file():
        return False
    try:
        tensors, note = read_tensors(path, verify=True)
        seen = {int(i): tuple(s) for i, s in zip(tensors["item"], tensors["stat"].tolist(), strict=True)}
        seen |= {item: tuple(stat) for item, stat, _ in note["faults"]}
        of_job = note["job"] == started
    except (DamagedError, KeyError, TypeError, ValueError):
        return False
    return of_job and seen == {i: _stat(source, i) for i in _items(job, source, number)}


def make_shards(job: CacheJob, source: PairSource, foundation: Foundation, todo: Sequence[int], started: str) -> None:
    """Make the missing shards, here or in worker processes, with a progress bar and the remaining time."""
    total = sum(len(_items(job, source, number)) for number in todo)
    with tqdm(total=total, desc="encode images", unit="image", disable=None if total else True) as bar:
        if job.workers == 1 or len(todo) < 2:
            device = env.device()
            for number in todo:
                _make_shard(job, source, foundation, device, number, started, bar.update)
        else:
            _in_workers(job, todo, started, bar.update)


def _make_shard(
    job: CacheJob, source: PairSource, foundation: Foundation, device: torch.device, number: int, started: str,
    advance: Callable[[int], Any],
) -> None:  # fmt: skip
    """Decode, encode in batches, write. Unusable pictures are noted in the shard."""
    foundation.clip.to(device), foundation.vae.to(device)
    faults: list[tuple[int, Stat, str]] = []
    kept, stats, images, moments = [], [], [], []
    for batch in _batches(_decoded(source, _items(job, source, number), faults, advance), job.batch_size):
        pictures = np.stack([picture for _, _, picture in batch])
        embedded, parameters = encode_images(pictures, foundation, device, with_latents=True)
        assert parameters is not None
        kept += [index for index, _, _ in batch]
        stats += [stat for _, stat, _ in batch]
        images.append(embedded.cpu().numpy())
        moments.append(parameters.cpu().numpy())
    if not kept:  # empty tensors with the right widths
        blank = np.zeros((1, job.data.resolution, job.data.resolution, 3), np.uint8)
        embedded, parameters = encode_images(blank, foundation, device, with_latents=True)
        assert parameters is not None
        images, moments = [embedded[:0].cpu().numpy()], [parameters[:0].cpu().numpy()]
    tensors = {
        "item": np.array(kept, np.int64),
        "stat": np.array(stats, np.int64).reshape(-1, 2),
        "images": np.concatenate(images),
        "moments": np.concatenate(moments),
    }
    turned = [index for index in kept if index in source.turned]
    write_tensors(shard_path(job.out, number), tensors, {"job": started, "faults": faults, "turned": turned})


def _decoded(
    source: PairSource, items: Sequence[int], faults: list[tuple[int, Stat, str]], advance: Callable[[int], Any]
) -> Iterator[tuple[int, Stat, np.ndarray]]:
    """(index, stat, picture) of the usable images, in order; threads decode a few images ahead."""

    def load(index: int) -> tuple[Stat, np.ndarray | ImageError]:
        stat = _stat(source, index)  # before reading: the next run detects a file that changes meanwhile
        try:
            return stat, source.load_image(index)
        except ImageError as error:
            return stat, error

    threads = max(1, min(8, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(load, i) for i in items[: 4 * threads])
        for k, index in enumerate(items):
            stat, found = waiting.popleft().result()
            waiting.extend(pool.submit(load, i) for i in items[k + 4 * threads : k + 4 * threads + 1])
            if isinstance(found, ImageError):
                faults.append((index, stat, found.reason))
            else:
                yield index, stat, found
            advance(1)


def _batches(found: Iterator[tuple[int, Stat, np.ndarray]], size: int) -> Iterator[list[tuple[int, Stat, np.ndarray]]]:
    while batch := list(itertools.islice(found, size)):
        yield batch


def _in_workers(job: CacheJob, todo: Sequence[int], started: str, advance: Callable[[int], Any]) -> None:
    """Worker processes take shards from a queue until it is empty. Raises the error that ends a worker."""
    context = multiprocessing.get_context("spawn")
    shards, news = context.Queue(), context.Queue()
    num = min(job.workers, len(todo))
    for number in [*todo, *[None] * num]:
        shards.put(number)
    workers = [
        context.Process(target=_work, args=(job, rank, num, os.getpid(), shards, news, started), daemon=True)
        for rank in range(num)
    ]
    try:
        for worker in workers:
            worker.start()
        left = len(todo)
        while left:
            try:
                kind, value = news.get(timeout=_POLL)
            except queue.Empty:
                if dead := [worker for worker in workers if worker.exitcode]:
                    raise ConfigError(
                        f"a worker process ended with code {dead[0].exitcode} (killed for memory?); the same command "
                        "goes on from the finished shards"
                    ) from None
                continue
            if kind == "failed":
                raise ConfigError(value)
            if kind == "images":
                advance(value)
            left -= kind == "shard"
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _work(job: CacheJob, rank: int, num: int, parent: int, shards: Any, news: Any, started: str) -> None:
    """One worker with its own models and its share of the GPUs or of the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the workers
    try:
        if torch.cuda.is_available():
            device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            torch.set_num_threads(max(1, torch.get_num_threads() // num))
        source, foundation = job.open_source(), open_foundation(job.model)

        def advance(count: int) -> None:
            if os.getppid() != parent:
                os._exit(1)  # the parent was killed
            news.put(("images", count))

        while True:
            try:
                number = shards.get(timeout=_POLL)
            except queue.Empty:
                advance(0)
                continue
            if number is None:
                return
            _make_shard(job, source, foundation, device, number, started, advance)
            news.put(("shard", number))
    except (ValueError, OSError, RuntimeError, NotFiniteError) as error:
        news.put(("failed", f"worker {rank}: {' '.join(str(error).split())}"))
