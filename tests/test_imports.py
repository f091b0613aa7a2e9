"""The import table of CONTRIBUTING.md, by reading every file; a quick `import sgg_fast`; Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

NOUNS = ("sgg_fast.graph", "sgg_fast.config", "sgg_fast.recipes", "sgg_fast.env")

# Folder or file -> what it may import beside the standard library; the longest entry that fits a path holds.
ALLOWED = {
    "kernels/": ("torch", "triton", "sgg_kernels"),
    "kernels/reference/": ("torch", "sgg_kernels.reference"),
    "sgg_fast/": ("torch", "numpy", *NOUNS),
    "sgg_fast/quiet.py": ("diffusers", "transformers"),
    "sgg_fast/drawing/": ("torch", "numpy", "PIL", "safetensors", "diffusers", "tqdm", "sgg_fast"),
    "sgg_fast/pictures/": ("numpy", "PIL", "networkx", "sgg_fast.pictures", "sgg_fast.data.text_form",
                           "sgg_fast.graph"),
    "sgg_fast/pipeline.py": ("torch", "numpy", "diffusers", "transformers", "sgg_fast.graph", "sgg_fast.nn",
                             "sgg_fast.diffusion", "sgg_fast.data.formats", "sgg_fast.model_card"),
    "sgg_fast/ops/": ("torch", "numpy", "sgg_kernels", "sgg_fast.ops", "sgg_fast.graph"),
    "sgg_fast/nn/": ("torch", "numpy", "safetensors", "diffusers", "transformers", "sgg_fast.nn", "sgg_fast.ops",
                     "sgg_fast.graph"),
    "sgg_fast/nn/attention.py": ("torch", "diffusers", "xformers"),
    # Its draws are hashes, which are operators.
    "sgg_fast/diffusion/": ("torch", "diffusers", "sgg_fast.diffusion", "sgg_fast.ops"),
    # The toy's scenes are one of the training sets.
    "sgg_fast/data/": ("torch", "numpy", "PIL", "h5py", "pycocotools", "tqdm", "safetensors", "sgg_fast.data",
                       "sgg_fast.toy.world", *NOUNS),
    "sgg_fast/data/show.py": ("numpy", "PIL", "sgg_fast.data", "sgg_fast.pictures", *NOUNS),
    # Models run in the cache and in what writes it to files, there only.
    "sgg_fast/data/cache.py": ("torch", "numpy", "tqdm", "safetensors", "diffusers", "transformers", "sgg_fast.data",
                               "sgg_fast.nn", "sgg_fast.toy.models", *NOUNS),
    "sgg_fast/data/prepare/cache.py": ("torch", "numpy", "sgg_fast.data", "sgg_fast.nn", *NOUNS),
    "sgg_fast/data/prepare/shard_work.py": ("torch", "numpy", "tqdm", "sgg_fast.data", "sgg_fast.nn",
                                            *NOUNS),
    "sgg_fast/data/prepare/__main__.py": ("torch", "sgg_fast.data", "sgg_fast.quiet", *NOUNS),
}  # fmt: skip
FREE = ("sgg_fast/train/", "sgg_fast/eval/", "sgg_fast/toy/", "benchmarks/", "tests/", "train.py", "infer.py")
"""May import all of sgg_fast and any library but for the rules below."""

# Package -> the only places that may import it, benchmarks and tests aside.
ONLY = {
    "deepspeed": ("sgg_fast/train/",),
    "bitsandbytes": ("sgg_fast/train/",),
    "xformers": ("sgg_fast/nn/attention.py",),
    "triton": ("kernels/",),
    "sgg_kernels": ("kernels/", "sgg_fast/ops/"),
    "kernels": (),  # it is Hugging Face's name; ours is sgg_kernels
    "benchmarks": (),
    "tests": (),
}


def imported(path: str, source: str) -> list[str]:
    """Absolute names of every module and of every name taken from one, also inside functions."""
    package = path.removesuffix(".py").replace("kernels/", "sgg_kernels/", int(path.startswith("kernels/")))
    parts, names = package.split("/"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*parts[: len(parts) - node.level], *([node.module] if node.module else [])] if node.level else []
            module = ".".join(base) if node.level else node.module
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def violations(path: str, source: str) -> list[str]:
    """What `path` imports and may not."""
    names = [n for n in imported(path, source) if n.split(".")[0] not in sys.stdlib_module_names]
    outside = path.startswith(("benchmarks/", "tests/"))
    found = [
        name
        for name in names
        for package, places in ONLY.items()
        if within(name, (package,)) and not path.startswith(places or ("/",))
        and not (outside and package != "kernels")
    ]  # fmt: skip
    if not path.startswith(FREE):
        place = max((p for p in ALLOWED if path.startswith(p)), key=len)
        own = ("sgg_fast.SceneGraph",) if path == "sgg_fast/__init__.py" else ()
        found += [name for name in names if not within(name, ALLOWED[place] + own)]
    return sorted(set(found))


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("kernels/**/*.py", "sgg_fast/**/*.py", "benchmarks/**/*.py", "tests/**/*.py", "*.py")
    for path in ROOT.glob(pattern)
    if path.name != "setup.py"
)


def test_the_walk_finds_the_house():
    assert len(FILES) > 40
    assert {"train.py", "infer.py", "kernels/sgg_kernels/reference/hash.py", "sgg_fast/train/engines/choose.py"} <= set(
        FILES
    )


@pytest.mark.parametrize("path", FILES)
def test_imports_follow_the_table(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "snippet", "found"),
    [
        ("kernels/x.py", "import numpy", ["numpy"]),
        ("kernels/x.py", "from sgg_fast import ops", ["sgg_fast.ops"]),
        ("kernels/reference/x.py", "import triton", ["triton"]),
        ("kernels/reference/x.py", "from ..launch import launch", ["sgg_kernels.launch.launch"]),
        ("sgg_fast/ops/x.py", "from sgg_fast.nn import clip", ["sgg_fast.nn.clip"]),
        ("sgg_fast/ops/x.py", "import triton.language as tl", ["triton.language"]),
        ("sgg_fast/graph.py", "import diffusers", ["diffusers"]),
        ("sgg_fast/nn/x.py", "def f():\n    import xformers.ops", ["xformers.ops"]),
        ("sgg_fast/nn/x.py", "from ..train.engines import choose", ["sgg_fast.train.engines.choose"]),
        ("sgg_fast/nn/x.py", "from sgg_kernels import reference", ["sgg_kernels.reference"]),
        ("sgg_fast/diffusion/x.py", "from transformers import CLIPModel", ["transformers.CLIPModel"]),
        ("sgg_fast/data/sources.py", "from diffusers import AutoencoderKL", ["diffusers.AutoencoderKL"]),
        ("sgg_fast/data/sources.py", "from sgg_fast.nn.clip import embed_names", ["sgg_fast.nn.clip.embed_names"]),
        ("sgg_fast/pipeline.py", "from sgg_fast.data.cache import build_cache", ["sgg_fast.data.cache.build_cache"]),
        ("sgg_fast/eval/x.py", "import deepspeed", ["deepspeed"]),
        ("sgg_fast/toy/x.py", "import bitsandbytes as bnb", ["bitsandbytes"]),
        ("sgg_fast/train/x.py", "from benchmarks.ops import registry", ["benchmarks.ops.registry"]),
        ("sgg_fast/train/x.py", "import kernels", ["kernels"]),
        ("benchmarks/x.py", "from kernels import launch", ["kernels.launch"]),
        ("train.py", "import deepspeed", ["deepspeed"]),
    ],
)
def test_the_rule_can_fail(path, snippet, found):
    assert violations(path, snippet) == found


def run_python(code: str, *paths: Path) -> str:
    """stdout of `python -c code` in the repository root, where kernels/ lies on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import sys, time, torch
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        absent = name.split(".")[0] in {"triton", "xformers", "bitsandbytes", "deepspeed"}
        return None if absent else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""Python as it is where those packages are not installed."""


def test_import_is_quick_and_needs_no_optional_package():
    out = run_python(
        BLOCK
        + """
began = time.perf_counter()
import sgg_fast
took = time.perf_counter() - began
heavy = {"diffusers", "transformers", "triton", "xformers", "bitsandbytes", "deepspeed", "h5py"} & set(sys.modules)
from sgg_fast import NameTable, SceneGraph, SceneGraphBatch, ops
store = SceneGraphBatch.from_graphs([SceneGraph(("sheep", "grass"), ((0, "on", 1),))], NameTable())
print(took, sorted(heavy), ops.pack(store, [0, 0]).num_objects)
"""
    )
    took, rest = out.split(" ", 1)
    assert rest.strip() == "[] 6"
    assert float(took) < 1.0, "seconds beside torch's own"


def test_hugging_faces_kernels_wins_its_name(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    # Stands for the package of that name: whatever is asked of it is there.
    package.joinpath("__init__.py").write_text(
        "__version__ = '99.0.0'\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n        raise AttributeError(name)\n"
        "    return type(name, (), {'__init__': lambda self, *a, **k: None})\n"
    )
    info = tmp_path / "kernels-99.0.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0.0\n")
    out = run_python(
        "import diffusers, transformers, sgg_kernels, sgg_kernels.reference, kernels\n"
        "from transformers import CLIPModel; from diffusers import UNet2DConditionModel\n"
        "print(kernels.__file__); print(sgg_kernels.reference.__file__)",
        tmp_path,
    )
    theirs, ours = out.split()
    assert Path(theirs) == package / "__init__.py"
    assert Path(ours) == ROOT / "kernels" / "sgg_kernels" / "reference" / "__init__.py"


def test_our_folder_is_no_regular_package():
    """A kernels/__init__.py here would shadow Hugging Face's package for everyone who works in the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
