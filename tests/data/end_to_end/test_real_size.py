"""A cache of Visual Genome's size (62 565 graphs of true statistics) opens in seconds and little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

from benchmarks.ops.registry import sizes_like_visual_genome
from sgg_fast.data.packed import PackedStrings
from sgg_fast.data.shards import entry_of, write_index, write_tensors
from sgg_fast.data.stored import FORMAT, GRAPH_TENSORS, GRAPHS
from sgg_fast.graph import IMAGE_OBJECT, IN_IMAGE, NameTable, SceneGraphBatch

NUM_IMAGES, NUM_OBJECT_NAMES, NUM_PREDICATES, WIDTH = 62_565, 178, 45, 512
SHARD = 4096


def packed(num: int) -> tuple[SceneGraphBatch, np.ndarray]:
    """All graphs, names by a power law, and the distinct phrases as name ids [P, 3]."""
    rng = np.random.default_rng(0)
    real = sizes_like_visual_genome(num, rng)
    sizes = np.stack([real[:, 0] + 1, real[:, 1] + real[:, 0]], axis=1)
    first_n = np.cumsum(sizes[:, 0]) - sizes[:, 0]
    graph = np.repeat(np.arange(num), sizes[:, 1])
    within = np.arange(len(graph)) - np.repeat(np.cumsum(sizes[:, 1]) - sizes[:, 1], sizes[:, 1])
    said = within < real[graph, 1]
    ends = rng.random((2, len(graph)))
    subject = np.where(said, ends[0] * real[graph, 0], within - real[graph, 1]).astype(np.int64)
    other = np.where(said, ends[1] * (real[graph, 0] - 1), real[graph, 0]).astype(np.int64)
    other += said & (other >= subject)
    names = 2 + (NUM_OBJECT_NAMES * rng.random(sizes[:, 0].sum()) ** 2).astype(np.int64)
    names[first_n + real[:, 0]] = 0
    predicates = np.where(
        said, 2 + NUM_OBJECT_NAMES + (NUM_PREDICATES * rng.random(len(graph)) ** 2).astype(np.int64), 1
    )
    ends_N = first_n[graph] + subject, first_n[graph] + other
    rows = np.stack([names[ends_N[0]], np.where(said, predicates, -1), np.where(said, names[ends_N[1]], -1)], axis=1)
    table = NameTable()
    phrase = table.add_phrases(rows)
    return SceneGraphBatch.from_arrays(names, predicates, *ends_N, sizes, phrase), table.phrases.rows_P3


def write(folder: Path) -> None:
    """The cache's files, of images and graphs; the moments, which pre-training does not read, are one number each."""
    rng, (batch, phrases) = np.random.default_rng(1), packed(NUM_IMAGES)
    words = [
        IMAGE_OBJECT,
        IN_IMAGE,
        *(f"object {i}" for i in range(NUM_OBJECT_NAMES)),
        *(f"predicate {i}" for i in range(NUM_PREDICATES)),
    ]
    tensors = {name: getattr(batch, name).numpy() for name in GRAPH_TENSORS}
    tensors["sizes"], tensors["previews"] = batch.sizes, np.zeros((1, 8, 8, 3), np.uint8)
    tensors["names"] = rng.standard_normal((len(words), WIDTH), np.float32)
    strings = PackedStrings.of(words)
    tensors |= {"text": strings.text, "text_ends": strings.ends, "phrase_rows": phrases}
    folder.mkdir()
    write_tensors(folder / GRAPHS, tensors, {})
    shards = []
    for first in range(0, NUM_IMAGES, SHARD):
        num = min(SHARD, NUM_IMAGES - first)
        path = folder / f"shard-{len(shards):05d}.safetensors"
        images = rng.standard_normal((num, WIDTH), np.float32)
        write_tensors(path, {"images": images, "moments": np.zeros((num, 2, 1, 1), np.float32)}, {})
        shards.append(entry_of(path))
    write_index(folder, {"format": FORMAT, "draws": 1, "shards": shards, "graphs": entry_of(folder / GRAPHS)})


OPEN = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
from sgg_fast.config import Config
from sgg_fast.data.cache import TrainingCache
from sgg_fast.data.stored import StoredCache
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.order import SampleOrder
from sgg_fast.train.stages import PretrainStage

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) / 1000

before, began, began_cpu = resident(), time.perf_counter(), time.process_time()
stored = StoredCache(Path(sys.argv[1]))
names = torch.from_numpy(np.array(stored.arrays["names"]))
cache = TrainingCache(stored.batch(), stored.table(), names, stored.images(), None)
opened, loaded = time.perf_counter() - began, resident() - before
conditioner = SceneGraphConditioner(512, 512, 768, 512, 6)
conditioner.calibrate_names(cache.names, cache.graphs.object_name[cache.graphs.object_pooled.bool()])
stage = PretrainStage(recipe("vg256", model="x", data="x"), conditioner, cache)
engine = EagerEngine(stage, torch.device("cpu"))
order = SampleOrder(len(cache), 2, 0, 0, 1)
engine.update(order.at(0)[None], 0)
print(json.dumps({"opened_s": opened, "first_step_cpu_s": time.process_time() - began_cpu, "loaded_mb": loaded,
                  "samples": len(cache), "relations": cache.graphs.num_relations,
                  "held_mb": (sum(getattr(cache.graphs, n).nbytes for n in sys.argv[2].split(","))
                              + cache.images.nbytes + cache.names.nbytes) / 1e6}))
"""


@pytest.mark.slow
def test_a_set_of_visual_genomes_size_opens_in_seconds_within_400_mb(tmp_path):
    write(tmp_path / "cache")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OPEN, str(tmp_path / "cache"), ",".join(GRAPH_TENSORS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["samples"] == NUM_IMAGES and 14 < found["relations"] / NUM_IMAGES < 17
    assert found["loaded_mb"] < 400
    # The rest, new weights and the first step at D = 512, in CPU seconds: a busy machine must not decide.
    assert found["opened_s"] < 30 and found["first_step_cpu_s"] < 60
