"""A set of LAION-SG's size on one machine: time and memory of preparing, caching, opening and reading it.

    python -m benchmarks.large_set --out DIR                    # 540 005 synthetic records, on a CPU
    python -m benchmarks.large_set --out DIR --num 20000        # a smaller one
    python -m benchmarks.large_set --out DIR --direct           # a cache of that size from arrays: opened and read

The records have the fields and the published means of LAION-SG (dataset card: 6.64 items and 4.39 relations an image,
from its running numbers; the most frequent attribute has 7.36 % and relation 3.78 % of all); names follow Zipf's law.
Two attributes an item and the sizes of the vocabularies are assumptions. There are no pictures, and no model runs: a
blank is cached for each image, with embeddings of `WIDTH` numbers in place of 512 and latents of two in place of 8 192.
So the figures are those of records, graphs, words and order; the size of embeddings and latents is known by count.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

NUM, ITEMS, RELATIONS = 540_005, 6.64, 4.39
LABELS, ATTRIBUTES, PREDICATES = (20_000, 0.0378), (10_000, 0.0736), (5_000, 0.0378)
"""Size of a vocabulary, and share of its most frequent word."""
WIDTH = 8
CHUNK = 1024


def zipf(size: int, top: float) -> np.ndarray:
    """Cumulative probabilities of `size` words, with the exponent that gives the first word the share `top`."""
    low, high = 0.1, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 / (np.arange(1, size + 1) ** -middle).sum() < top else (low, middle)
    weights = np.arange(1, size + 1) ** -low
    return np.cumsum(weights / weights.sum())


def generate(path: Path, num: int) -> None:
    """LAION-SG's annotation file, written record by record."""
    rng = np.random.default_rng(0)
    tables = [zipf(*which) for which in (LABELS, ATTRIBUTES, PREDICATES)]

    def words(which: int, count: int) -> list[int]:
        return np.searchsorted(tables[which], rng.random(count)).tolist()

    with path.open("w") as file:
        file.write("[")
        for first in range(0, num, CHUNK):
            some = min(CHUNK, num - first)
            items = 2 + np.minimum(rng.poisson(ITEMS - 2, some), 28)
            relations = 1 + np.minimum(rng.poisson(RELATIONS - 1, some), 28)
            labels, attributes = iter(words(0, items.sum())), iter(words(1, 2 * items.sum()))
            said, ends = iter(words(2, relations.sum())), iter(rng.random((relations.sum(), 2)).tolist())
            for k, (n, m) in enumerate(zip(items.tolist(), relations.tolist(), strict=True)):
                rows = [
                    {"item_id": i, "label": f"thing{next(labels)}", "global_item_id": i,
                     "attributes": [f"trait{next(attributes)}", f"trait{next(attributes)}"]}
                    for i in range(n)
                ]  # fmt: skip
                drawn = [(int(a * n), int(b * (n - 1))) for a, b in (next(ends) for _ in range(m))]
                pairs = [(s, (s + 1 + shift) % n) for s, shift in drawn]
                links = [
                    {
                        "triple_id": i,
                        "item1": s,
                        "relation": f"relation{next(said)}",
                        "item2": o,
                        "global_relation_id": i,
                    }
                    for i, (s, o) in enumerate(pairs)
                ]
                record = {"img_id": str(first + k), "name": f"{first + k:019d}.jpg", "caption_ori": "a caption " * 8,
                          "score": "6.67", "url": f"http://example.org/{first + k}.jpg", "items": rows,
                          "relations": links}  # fmt: skip
                file.write(("," if first + k else "") + json.dumps(record))
        file.write("]")


def prepare(out: Path) -> dict[str, Any]:
    """`prepare laion-sg`."""
    from sgg_fast.data.prepare.__main__ import main

    assert main(["laion-sg", "--train", str(out / "train.json"), "--out", str(out / "set"), "--overwrite"]) == 0
    return {"MB of jsonl": (out / "set" / "train.jsonl").stat().st_size / 1e6}


def _source(out: Path) -> Any:
    from sgg_fast.data.sources import jsonl_source

    blank = np.zeros((8, 8, 3), np.uint8)
    return dataclasses.replace(jsonl_source(out / "set", 8, check=False), load_image=lambda i: blank, sizes=None)


def cache(out: Path) -> dict[str, Any]:
    """`prepare cache` with the outputs of the models replaced by zeros."""
    import torch

    from sgg_fast.config import Config
    from sgg_fast.data.prepare import cache as writer
    from sgg_fast.data.prepare import shard_work
    from sgg_fast.data.prepare.job import CacheJob

    def encoded(images: np.ndarray, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(images), WIDTH), torch.zeros(len(images), 2, 1, 1)

    blank = np.zeros((8, 8, 3), np.uint8)
    vars(shard_work)["encode_images"] = encoded
    vars(shard_work)["_decoded"] = lambda source, items, faults, advance: ((i, (0, 0), blank) for i in items)
    vars(writer)["embed_names"] = lambda clip, tokenizer, strings: torch.zeros(len(strings), WIDTH)
    made = Config().replace(data=str(out / "set"), resolution=32)
    job = CacheJob(made.model, made.data, 0, out / "cache", batch_size=1024)
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, token_init="none"))
    began = time.perf_counter(), time.process_time()
    source = _source(out)
    opened = time.perf_counter() - began[0], time.process_time() - began[1]
    report = writer.write_cache(job, overwrite=True, say=lambda line: None, source=source)
    files = list((out / "cache").iterdir())
    graphs = (out / "cache" / "graphs.safetensors").stat().st_size / 1e9
    return {
        "s to open the set": opened[0],
        "processor s to open it": opened[1],
        "samples": report["samples"],
        "shards": len(files) - 4,
        "GB of graphs and names": graphs,
    }


def direct(out: Path) -> dict[str, Any]:
    """The files of such a cache written from arrays, without preparation: for `open_cache` and `iterate` alone."""
    from sgg_fast.config import DataConfig
    from sgg_fast.data.packed import PackedStrings
    from sgg_fast.data.shards import entry_of, write_index, write_tensors
    from sgg_fast.data.stored import FORMAT, GRAPH_TENSORS, GRAPHS, fixed_settings
    from sgg_fast.graph import IMAGE_OBJECT, IN_IMAGE, NameTable, SceneGraphBatch

    num, rng, folder = int((out / "num").read_text()), np.random.default_rng(1), out / "cache"
    folder.mkdir(exist_ok=True)
    items, links = 2 + rng.poisson(ITEMS - 2, num), 1 + rng.poisson(RELATIONS - 1, num)
    tables = [zipf(*which) for which in (LABELS, ATTRIBUTES, PREDICATES)]
    drawn = [np.searchsorted(tables[k], rng.random(items.sum())) for k in (0, 1, 1)]
    keys, own = np.unique((drawn[1] * 10_000 + drawn[2]) * 20_000 + drawn[0], return_inverse=True)
    first = np.cumsum(items + 1) - (items + 1)
    image = first + items
    place = np.arange(items.sum()) + np.repeat(np.arange(num), items)
    names = np.zeros(items.sum() + num, np.int32)
    names[place] = own + 2
    graph = np.repeat(np.arange(num), links)
    ends = (rng.random((2, len(graph))) * items[graph]).astype(np.int64)
    ends[1] = (ends[0] + 1 + ends[1] % (items[graph] - 1)) % items[graph]
    start = np.cumsum(links + items) - (links + items)
    said = np.arange(links.sum()) - np.repeat(np.cumsum(links) - links, links) + start[graph]
    shown = np.arange(items.sum()) - np.repeat(np.cumsum(items) - items, items) + np.repeat(start + links, items)
    subject, other, predicate = (np.empty(links.sum() + items.sum(), np.int32) for _ in range(3))
    subject[said], other[said] = first[graph] + ends[0], first[graph] + ends[1]
    subject[shown], other[shown] = place, np.repeat(image, items)
    predicate[said], predicate[shown] = len(keys) + 2 + np.searchsorted(tables[2], rng.random(len(said))), 1
    rows = np.stack([names[subject], predicate, names[other]], axis=1)
    rows[shown, 1:] = -1
    words = [IMAGE_OBJECT, IN_IMAGE, *(f"trait{k // 20_000 // 10_000} trait{k // 20_000 % 10_000} thing{k % 20_000}"
             for k in keys.tolist()), *(f"relation{k}" for k in range(PREDICATES[0]))]  # fmt: skip
    strings, table = PackedStrings.of(words), NameTable(stored=words)
    phrase = table.add_phrases(rows)
    batch = SceneGraphBatch.from_arrays(
        names, predicate, subject, other, np.stack([items + 1, links + items], axis=1), phrase
    )
    tensors = {name: getattr(batch, name).numpy() for name in GRAPH_TENSORS}
    tensors |= {"sizes": batch.sizes, "previews": np.zeros((1, 8, 8, 3), np.uint8), "text": strings.text,
                "text_ends": strings.ends, "phrase_rows": table.phrases.rows_P3,
                "names": np.zeros((len(words), WIDTH), np.float32)}  # fmt: skip
    write_tensors(folder / GRAPHS, tensors, {})
    shards = []
    for at in range(0, num, CHUNK):
        some, path = min(CHUNK, num - at), folder / f"shard-{at // CHUNK:05d}.safetensors"
        write_tensors(path, {"images": np.zeros((some, WIDTH), np.float32), "item": np.arange(at, at + some),
                             "moments": np.zeros((some, 2, 1, 1), np.float32)}, {})  # fmt: skip
        shards.append(entry_of(path))
    models = dict.fromkeys(("clip", "vae", "text_encoder"))
    index = {"format": FORMAT, "draws": 1, "shards": shards, "graphs": entry_of(folder / GRAPHS)}
    write_index(folder, {**index, "settings": fixed_settings(DataConfig()), "models": models, "data": "",
                         "split": "train"})  # fmt: skip
    return {"names": len(words), "phrases": len(table.phrases)}


def open_cache(out: Path) -> dict[str, Any]:
    """The cache as training opens it: every file checked, graphs and embeddings in memory, ready for the first step."""
    import torch

    from sgg_fast.data.cache import TrainingCache
    from sgg_fast.data.moments import read_to
    from sgg_fast.data.stored import StoredCache

    stored = StoredCache(out / "cache")
    checked = time.perf_counter()
    names = read_to([stored.arrays["names"]], "cpu")
    made = TrainingCache(stored.batch(), stored.table(), names, stored.images(), stored.moments())
    held = sum(tensor.nbytes for tensor in made.tensors()) / 1e9
    assert isinstance(made.graphs.object_name, torch.Tensor)
    return {"s after the check of the files": time.perf_counter() - checked, "GB of tensors": held,
            "names": len(made.table.names), "phrases": len(made.table.phrases), "objects": made.graphs.num_objects,
            "relations": made.graphs.num_relations}  # fmt: skip


def iterate(out: Path) -> dict[str, Any]:
    """One epoch: the order of all samples, every graph packed and every latent read, in batches of 1 024."""
    import torch

    from sgg_fast import ops
    from sgg_fast.data.stored import StoredCache
    from sgg_fast.train.order import SampleOrder

    stored = StoredCache(out / "cache")
    graphs, moments, seen = stored.batch(), stored.moments(), np.zeros(len(stored.graphs), bool)
    began = time.perf_counter()
    order = SampleOrder(len(seen), 1, 0, 0, 1)
    order.at(0)
    drawn = time.perf_counter() - began
    order = SampleOrder(len(seen), CHUNK, 0, 0, 1)
    objects = 0
    for step in range(-(-len(seen) // CHUNK)):
        ids = order.at(step)
        seen[ids] = True
        batch = ops.pack(graphs, ids)
        objects += batch.num_objects
        assert moments[torch.from_numpy(ids)].shape[0] == len(ids)
    assert seen.all()
    some = [len(stored.graphs[i].objects) for i in range(0, len(seen), 100)]
    return {"s for the order of an epoch": drawn, "objects read": objects, "objects a graph": float(np.mean(some))}


PHASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "prepare": prepare, "cache": cache, "direct": direct, "open_cache": open_cache, "open_again": open_cache,
    "iterate": iterate,
}  # fmt: skip


def _status(name: str) -> float:
    """A field of /proc/self/status in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / 1e9


def measure(phase: str, out: Path) -> None:
    """Run one phase here and print its figures as JSON. Peaks count anonymous memory and mapped files alike."""
    import torch  # noqa: F401 - the libraries are not the set's

    import sgg_fast.data.prepare.__main__
    import sgg_fast.data.prepare.cache
    import sgg_fast.ops  # noqa: F401

    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    wall, processor = time.perf_counter(), time.process_time()
    found = PHASES[phase](out)
    print(json.dumps({"phase": phase, "s": time.perf_counter() - wall, "processor s": time.process_time() - processor,
                      "peak GB": _status("VmHWM") - before, "libraries GB": before,
                      **found}))  # fmt: skip


@command("benchmarks.large_set")
def main(argv: list[str] | None) -> int:
    """Each phase in a process of its own; one line of figures each, also in OUT/figures.jsonl. 1 if a phase fails."""
    parser = OneLineParser(prog="python -m benchmarks.large_set", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the records and the set (8 GB)")
    parser.add_argument("--num", type=int, default=NUM, help="records (%(default)s)")
    parser.add_argument(
        "--direct", action="store_true", help="write the cache from arrays: only its opening and reading"
    )
    parser.add_argument("--phase", choices=tuple(PHASES), help="only this one, in this process")
    args = parser.parse_args(argv)
    if args.phase:
        measure(args.phase, args.out)
        return 0
    if args.num < CHUNK:
        raise ValueError(f"--num {args.num}: at least {CHUNK}, a batch of its reading")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "num").write_text(str(args.num))
    if not args.direct:
        generate(args.out / "train.json", args.num)
    with (args.out / "figures.jsonl").open("w") as file:
        for phase in PHASES:
            if phase in (("prepare", "cache") if args.direct else ("direct",)):
                continue
            words = [sys.executable, "-m", "benchmarks.large_set", "--out", str(args.out), "--phase", phase]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                print(f"large_set: phase {phase} ended with exit code {done.returncode}", file=sys.stderr)
                return 1
            line = done.stdout.splitlines()[-1]
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    return 0
