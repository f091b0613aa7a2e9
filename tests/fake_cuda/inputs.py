"""Small inputs of the matrix's rows, made once on the CPU: `python -m fake_cuda.inputs FOLDER`.

sd, sd21, sdxl, clip: folders shaped like Stable Diffusion v1.4, v2.1, SDXL base and CLIP ViT-B/32. set: a prepared set
with boxes. cache: one of it by the toy's models. graphs.json: ten graphs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

DONE = "complete 2"
"""Marks a finished folder; another number where inputs are added, so that an older folder is made anew."""


def make(folder: Path) -> None:
    """What is finished stays."""
    if (folder / DONE).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    from support import sd_folder, small_sets  # which load diffusers

    from sgg_fast.toy.world import draw_scene

    folder.mkdir(parents=True, exist_ok=True)
    for kind, name in (("sd14", "sd"), ("sd21", "sd21"), ("sdxl", "sdxl")):
        sd_folder.write_sd(folder / name, kind=kind)
    sd_folder.write_clip(folder / "clip")
    small_sets.write_small(folder / "set", 24)
    graphs = [draw_scene(0, k).graph for k in range(10)]
    said = [{"objects": g.objects, "relationships": [list(r) for r in g.relations]} for g in graphs]
    (folder / "graphs.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / DONE).touch()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
