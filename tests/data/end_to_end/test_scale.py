"""Preparation of a hundred thousand generated images: time grows with their number, memory with what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

MEASURE = """
import resource, sys, time
from sgg_fast.data.prepare.__main__ import main
before = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
began = time.perf_counter()
assert main(sys.argv[1:]) == 0
usage = resource.getrusage(resource.RUSAGE_SELF)
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print("\\n%f %f %d" % (time.perf_counter() - began, usage.ru_utime, peak - before))
"""


def generate(root: Path, num: int) -> Path:
    """Visual Genome's files with `num` images of 3 to 12 objects and 1 to 8 relations; written record by record."""
    root.mkdir()
    rng = np.random.default_rng(0)
    files = {
        name: (root / f"{name}.json").open("w") for name in ("image_data", "objects", "attributes", "relationships")
    }
    for file in files.values():
        file.write("[")
    for i in range(1, num + 1):
        count, related = rng.integers(3, 13), rng.integers(1, 9)
        objects = [
            {"object_id": 100 * i + k, "names": [f"name {n}"], "merged_object_ids": [], "synsets": [],
             "x": int(x), "y": int(x) // 2, "w": 60, "h": 50}
            for k, (n, x) in enumerate(zip(rng.integers(0, 150, count), rng.integers(0, 300, count), strict=True))
        ]  # fmt: skip
        ends = rng.integers(0, count, (related, 2)).tolist()
        rows = {
            "image_data": {"image_id": i, "width": 400, "height": 300, "url": f"https://x.org/VG_100K/{i}.jpg"},
            "objects": {"image_id": i, "objects": objects},
            "attributes": {"image_id": i, "attributes": [{**objects[0], "attributes": ["red"]}]},
            "relationships": {"image_id": i, "relationships": [
                {"relationship_id": 10 * i + k, "predicate": f"relation {k}", "subject": objects[s],
                 "object": objects[o]} for k, (s, o) in enumerate(ends)]},
        }  # fmt: skip
        for name, file in files.items():
            file.write(("," if i > 1 else "") + json.dumps(rows[name]))
    for file in files.values():
        file.write("]")
        file.close()
    (root / "object_alias.txt").write_text("man,men\n")
    (root / "relationship_alias.txt").write_text("on,on top of\n")
    splits = {"train": list(range(1, num - 1)), "val": [num - 1], "test": [num]}
    (root / "vg_splits.json").write_text(json.dumps(splits))
    return root


@pytest.mark.slow
def test_a_hundred_thousand_images_cost_four_times_a_quarter(tmp_path, capsys):
    """Processor time, for other processes share the machine; peak memory over what the imports took."""
    figures = {}
    for num in (25_000, 100_000):
        root, out = generate(tmp_path / f"root{num}", num), tmp_path / f"out{num}"
        least = [f"--min-{what}-instances=10" for what in ("object", "relation", "attribute")]
        argv = ["vg", "--root", str(root), "--out", str(out), "--any-version", *least]
        done = subprocess.run([sys.executable, "-c", MEASURE, *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        wall, processor, peak = map(float, done.stdout.split()[-3:])
        kept = json.loads((out / "report.json").read_text())["images"]["train"]["kept"]
        assert kept == num - 2
        figures[num] = (processor, peak)
        with capsys.disabled():
            print(f"\n{num} images: {wall:.1f} s ({processor:.1f} s of processor), {num / wall:.0f} images/s, "
                  f"peak {peak / 1024:.0f} MiB over the imports")  # fmt: skip
    assert figures[100_000][0] < 1.3 * 4 * figures[25_000][0]
    assert figures[100_000][1] < 1.3 * 4 * figures[25_000][1] and figures[100_000][1] < 1.5 * 2**20, "KiB"
