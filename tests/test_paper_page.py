"""docs/paper.md is followed: its shell blocks run as they stand on small sets in Visual Genome's and COCO's formats.

A `python` in front of the real one adds sizes to the commands (`SMALL`) and changes nothing else. The models are small
folders of Stable Diffusion's and CLIP's form with random weights. Blocks that cannot run say why in the page.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, sd_folder

from sgg_fast.data.prepare import check, coco, vg
from sgg_fast.eval.distances import INCEPTION_SHA256
from sgg_fast.eval.protocol import TEST_IMAGES
from sgg_fast.eval.published import COCO, INCEPTION_URL, VG
from sgg_fast.toy import sets

PAGE = ROOT / "docs" / "paper.md"
TRAIN = "--resolution 64 --width 32 --num-layers 2 --log-every 1 --num-samples 1 --sample-every 0 --steps 2"
SMALL = {
    "-m sgg_fast.data.prepare check": "--any-size",
    "-m sgg_fast.data.prepare vg": "--min-object-instances 1 --min-attribute-instances 1 --min-relation-instances 1 "
    "--min-object-size 8",
    "-m sgg_fast.data.prepare coco": "--num-val 4 --num-test 4",
    "-m sgg_fast.data.prepare cache": "--resolution 64",
    "train.py": TRAIN,
    "infer.py": "--steps 2",
    "-m sgg_fast.eval": "--dry",
    "-c": "",
}
"""Beginning of a command -> flags of the small sets."""
SHIM = """#!{python}
import json, os, sys
said = " ".join(sys.argv[1:])
added = [flags for start, flags in json.loads({small!r}).items() if said.startswith(start)]
if len(added) != 1:
    sys.exit(f"no command of the page: {{said}}")
os.execv({python!r}, [{python!r}, *sys.argv[1:], *added[0].split()])
"""


def blocks() -> list[tuple[str, str]]:
    """(reason why it cannot run or "", text) of every shell block of the page, in order."""
    found = re.findall(r"(?:<!-- page: skip, ([^>]+) -->\n)?```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return [(reason, text) for reason, text in found]


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as the page leaves it after the downloads, with the checkout's scripts in it."""
    base = tmp_path_factory.mktemp("page")
    for name in ("train.py", "infer.py", "graph.json"):
        (base / name).symlink_to(ROOT / name)
    sd_folder.write_sd(base / "sd-v1-4")
    clip = sd_folder.write_clip(base / "clip-vit-base-patch32")
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")  # as it may be published
    (clip / "model.safetensors").unlink()
    sets.write_vg(base / "vg", 40, seed=1, size=208)
    sets.write_coco(base / "coco", 40, seed=1, size=128)
    (base / INCEPTION_URL.rpartition("/")[2]).write_bytes(b"not read by a dry run")
    (base / "bin").mkdir()
    shim = base / "bin" / "python"
    shim.write_text(SHIM.format(python=sys.executable, small=json.dumps(SMALL)))
    shim.chmod(0o755)
    return base


def follow(place: Path, text: str) -> str:
    """Run a block in bash as it stands; its output."""
    environment = {
        **os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }  # fmt: skip
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=place, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name"), [("vg256", VG), ("coco256", COCO)])
def test_the_page_is_followed_word_for_word(place, capsys, recipe, name):
    """From the check of a download to its table: seven commands each, about a minute of a core.

    A block that mentions COCO belongs to the second half, the others to the first; the conversion of CLIP to both.
    """
    said, skipped = "", []
    for reason, text in blocks():
        if ("coco" in text) != (name == COCO) and "-c " not in text:
            continue
        if reason:
            skipped += [f"{reason}: {line}" for line in commands(text)]
        else:
            said += follow(place, text)
    with capsys.disabled():
        print("\nnot run:", *skipped, sep="\n  ")
    assert f"{'vg' if name == VG else 'coco'}: whole\n" in said and ("version 1.4" in said) == (name == VG)
    found = json.loads((place / "eval" / recipe / "manifest.json").read_text())
    assert found["set"]["name"] == name and found["set"]["test graphs"] == 4 == len(found["pairs"])
    assert "| this run" in (place / "eval" / recipe / "table.md").read_text()
    assert (place / "runs" / recipe / "finetune" / "pipeline" / "model_index.json").is_file()
    if name == COCO:
        return
    assert (place / "outputs" / "vg256.png").is_file()
    again = next(text for reason, text in blocks() if "prepare cache --recipe vg256" in text)
    kept = {path: path.stat().st_mtime_ns for path in (place / "vg256_cache").glob("*.safetensors")}
    follow(place, again)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished step is not repeated"


def test_every_command_that_cannot_run_has_its_reason():
    """Downloads, uploads, installs and two GPUs are left out; nothing else is."""
    wanted = {"wget": "downloads", "hf download": "downloads", "hf upload": "uploads", "pip install": "installs",
              "torchrun": "two GPUs"}  # fmt: skip
    assert len(blocks()) > 10
    for reason, text in blocks():
        for word, why in wanted.items():
            assert word not in text or why in reason, text
        if not reason:
            for line in commands(text):
                starts = [start for start in SMALL if line.removeprefix("python ").startswith(start)]
                assert line.startswith("python ") and len(starts) == 1, line
    runs = "".join(text for reason, text in blocks() if not reason)
    for start in SMALL:
        assert f"python {start}" in runs, "SMALL has no flags for commands that the page does not have"


def test_the_first_command_of_the_page_runs(place):
    """The check of both downloads, through the same machinery, in seconds."""
    for form in ("vg", "coco"):
        (text,) = [line for _, text in blocks() for line in commands(text) if line.endswith(f"prepare check {form}")]
        assert follow(place, text).splitlines()[-1] == f"{form}: whole"


def test_the_page_has_the_counts_and_links_of_the_code():
    page = PAGE.read_text(encoding="utf-8").replace("\n", " ")
    for counts in (vg.PAPER, coco.PAPER):
        assert " / ".join(f"{number:,}".replace(",", " ") for number in counts.values()) in page
    for number in (check.VG_IMAGES, *check.COCO_IMAGES.values(), *check.COCO_LISTED.values(), coco.WITHOUT_LISTS):
        assert f"{number:,}".replace(",", " ") in page
    assert (TEST_IMAGES[VG], TEST_IMAGES[COCO]) == (vg.PAPER["test"], coco.PAPER["test"])
    assert INCEPTION_URL in page and INCEPTION_SHA256 in page


@pytest.mark.slow
def test_the_plan_is_what_the_page_shows():
    """`--plan` for the true sizes: the same lines, and each number within 5 % or 0.1 of the page's."""
    page = PAGE.read_text(encoding="utf-8")
    (command,) = [line for _, text in blocks() for line in commands(text) if "--plan" in line]
    words = [sys.executable, *command.split()[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    number = re.compile(r"\d+(?:\.\d+)?")
    shown = [line.strip() for line in page[page.index(command) :].split("```")[1].splitlines() if line[:4] == "    "]
    printed = [line.strip() for line in done.stdout.splitlines()]
    assert len(shown) == len(printed)
    for ours, theirs in zip(sorted(shown), sorted(printed), strict=True):
        assert re.sub(r" +", " ", number.sub("N", ours)) == re.sub(r" +", " ", number.sub("N", theirs))
        found = list(map(float, number.findall(ours)))
        assert found == pytest.approx(list(map(float, number.findall(theirs))), rel=0.05, abs=0.1)
