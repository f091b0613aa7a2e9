"""Model folders for the tests of networks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.sd_folder import write_clip, write_pipeline, write_sd

from sgg_fast.nn import loading
from sgg_fast.nn.foundation import Foundation, load_foundation


@pytest.fixture(scope="session")
def kinds(tmp_path_factory) -> Path:
    """Folders shaped like Stable Diffusion v2.1 (sd21) and SDXL base (sdxl), and clip. Read only."""
    folder = tmp_path_factory.mktemp("kinds")
    write_clip(folder / "clip")
    for kind in ("sd21", "sdxl"):
        write_sd(folder / kind, kind=kind)
    return folder


@pytest.fixture(scope="session")
def foundations(kinds) -> dict[str, Foundation]:
    """The base models of `kinds`. Read only."""
    return {kind: load_foundation(str(kinds / kind), str(kinds / "clip")) for kind in ("sd21", "sdxl")}


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Folders shaped like Stable Diffusion v1.4: sd, clip, and a sealed pipeline. Read only."""
    base = tmp_path_factory.mktemp("made")
    write_pipeline(base)
    return base


@pytest.fixture
def base(made, tmp_path) -> Path:
    """A copy to spoil: sd, clip, pipeline (without its manifest, as other people's folders are)."""
    shutil.copytree(made, tmp_path / "base")
    (tmp_path / "base" / "pipeline" / loading.MANIFEST).unlink()
    return tmp_path / "base"
