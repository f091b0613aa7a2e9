"""The house: who may import whom, no circles, how many files a folder holds, a test file for every file; a quick
`import sgg_fast`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support import ROOT

NOUNS = ("sgg_fast.graph", "sgg_fast.config", "sgg_fast.recipes", "sgg_fast.env", "sgg_fast.files",
         "sgg_fast.digests",
         *(f"sgg_fast.commands.{name}" for name in ("command", "refuse", "typed", "flags", "NotFiniteError")),
         "sgg_fast.SceneGraph", "sgg_fast.NameTable")  # fmt: skip
FORMATS = tuple(f"sgg_fast.data.{name}" for name in ("formats", "inputs", "layouts", "png_record", "text_form"))
"""Graphs as files and words: what the page reads and writes."""
MODELS = ("torch", "numpy", "PIL", "safetensors", "tqdm", "diffusers", "transformers")

# Folder or file -> what it may import beside the standard library; the longest entry that fits a path holds.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels/sgg_kernels/": ("torch", "triton", "sgg_kernels"),
    "kernels/sgg_kernels/reference/": ("torch", "sgg_kernels.reference"),
    "sgg_fast/": ("torch", "numpy", *NOUNS),
    "sgg_fast/commands/": ("sgg_fast.commands",),
    "sgg_fast/commands/train.py": ("sgg_fast",),
    "sgg_fast/commands/infer.py": ("sgg_fast",),
    "sgg_fast/files.py": ("filelock",),
    "sgg_fast/quiet.py": ("diffusers", "torch", "transformers", "sgg_fast.graph"),
    "sgg_fast/model_card.py": NOUNS,
    "sgg_fast/pipeline.py": ("torch", "numpy", "diffusers", "transformers", "sgg_fast.graph", "sgg_fast.nn",
                             "sgg_fast.diffusion", "sgg_fast.data.formats", "sgg_fast.model_card",
                             "sgg_fast.commands.NotFiniteError"),
    "sgg_fast/config/": ("sgg_fast.config",),
    "sgg_fast/ops/": ("torch", "numpy", "sgg_kernels", "sgg_fast.ops", "sgg_fast.graph", "sgg_fast.env"),
    "sgg_fast/nn/": ("torch", "numpy", "safetensors", "diffusers", "transformers", "huggingface_hub", "sgg_fast.nn",
                     "sgg_fast.ops", "sgg_fast.graph", "sgg_fast.env", "sgg_fast.digests"),
    "sgg_fast/nn/lora/": ("torch", "diffusers", "peft", "sgg_fast.nn"),
    "sgg_fast/nn/loading/__main__.py": ("torch", "safetensors", "sgg_fast.nn", *NOUNS),
    "sgg_fast/nn/attention.py": ("torch", "diffusers", "xformers", "sgg_fast.env", "sgg_fast.ops"),
    # Its draws are hashes, which are operators.
    "sgg_fast/diffusion/": ("torch", "diffusers", "sgg_fast.diffusion", "sgg_fast.ops"),
    # The toy's scenes are one of the training sets.
    "sgg_fast/data/": ("torch", "numpy", "PIL", "h5py", "pycocotools", "tqdm", "safetensors", "sgg_fast.data",
                       "sgg_fast.toy.world", *NOUNS),
    "sgg_fast/data/show.py": ("numpy", "PIL", "sgg_fast.data", "sgg_fast.pictures", *NOUNS),
    # Models run in the cache and in what writes it to files, there only.
    "sgg_fast/data/cache.py": ("torch", "numpy", "tqdm", "safetensors", "diffusers", "transformers", "sgg_fast.data",
                               "sgg_fast.nn", "sgg_fast.toy.models", *NOUNS),
    "sgg_fast/data/prepare/cache.py": ("torch", "numpy", "tqdm", "sgg_fast.data", "sgg_fast.nn", *NOUNS),
    "sgg_fast/data/prepare/shard_work.py": ("torch", "numpy", "tqdm", "sgg_fast.data", "sgg_fast.nn", *NOUNS),
    "sgg_fast/data/prepare/__main__.py": ("torch", "sgg_fast.data", "sgg_fast.quiet", *NOUNS),
    "sgg_fast/pictures/": ("numpy", "PIL", "networkx", "sgg_fast.pictures", "sgg_fast.data.text_form",
                           "sgg_fast.graph"),
    "sgg_fast/drawing/": (*MODELS, "sgg_fast"),
    "sgg_fast/eval/": (*MODELS, "torch_fidelity", "sgg_fast"),
    "sgg_fast/toy/": (*MODELS, "pycocotools", "tokenizers", "sgg_fast"),
    "sgg_fast/train/run/hub.py": ("huggingface_hub", "sgg_fast.config", "sgg_fast.nn.loading"),
    "sgg_fast/train/": (*MODELS, "deepspeed", "bitsandbytes", "sgg_fast"),
    "sgg_fast/doctor/": ("torch", "numpy", "diffusers", "sgg_fast"),
    "sgg_fast/app/": ("numpy", "PIL", "starlette", "uvicorn", "sgg_fast.app", "sgg_fast.pipeline", "sgg_fast.drawing",
                      *FORMATS, "sgg_fast.quiet", *NOUNS),
    "train.py": ("sgg_fast",),
    "infer.py": ("sgg_fast",),
    "benchmarks/": (*MODELS, "triton", "xformers", "bitsandbytes", "torchao", "torch_geometric", "matplotlib",
                    "pynvml", "sgg_kernels", "sgg_fast", "benchmarks", "train", "infer"),
}  # fmt: skip
FREE = ("tests/",)
"""May import anything but for the rules below."""

# Folder -> what it may not import although the table lets it.
NEVER = {
    "sgg_fast/drawing/": ("sgg_fast.train", "sgg_fast.eval", "sgg_fast.app"),
    "sgg_fast/eval/": ("sgg_fast.app",),
    "sgg_fast/toy/": ("sgg_fast.app",),
    "sgg_fast/train/": ("sgg_fast.app",),
}

# Package -> the only places that may import it, benchmarks and tests aside.
ONLY = {
    "deepspeed": ("sgg_fast/train/",),
    "bitsandbytes": ("sgg_fast/train/",),
    "peft": ("sgg_fast/nn/lora/",),
    "xformers": ("sgg_fast/nn/attention.py",),
    "triton": ("kernels/",),
    "sgg_kernels": ("kernels/", "sgg_fast/ops/"),
    "kernels": (),  # it is Hugging Face's name; ours is sgg_kernels
    "benchmarks": (),
    "tests": (),
}

MOST, MOST_IN_A_WING, DEEPEST = 18, 12, 2
"""Python files a folder; in a wing of sgg_fast/train/ or benchmarks/; folders down inside sgg_fast/."""
WINGS = ("sgg_fast/train/", "benchmarks/")
MIRRORS = {"sgg_fast": ("tests",), "sgg_kernels": ("tests", "kernels"), "benchmarks": ("tests", "benchmarks")}
"""Package -> the folder of its tests."""


def module_of(path: str) -> str:
    """The name by which a file is imported."""
    return path.removesuffix(".py").removesuffix("/__init__").removeprefix("kernels/").replace("/", ".")


def import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports anywhere, also inside functions, but not those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from import_nodes(other)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from import_nodes(child)


def imported(path: str, source: str) -> list[str]:
    """Absolute names of every module and of every name taken from one."""
    parts = module_of(path).split(".")
    folder = parts if path.endswith("/__init__.py") else parts[:-1]
    names = []
    for node in import_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            above = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def violations(path: str, source: str) -> list[str]:
    """What `path` imports and may not."""
    names = [n for n in imported(path, source) if n.split(".")[0] not in (*sys.stdlib_module_names, "__future__")]
    outside = path.startswith(("benchmarks/", "tests/"))
    found = [
        name
        for name in names
        for package, places in ONLY.items()
        if within(name, (package,)) and not path.startswith(places or ("/",))
        and not (outside and package != "kernels")
    ]  # fmt: skip
    found += [name for place, never in NEVER.items() if path.startswith(place) for name in names if within(name, never)]
    if not path.startswith(FREE):
        place = max((p for p in ALLOWED if path.startswith(p)), key=len)
        own = ("sgg_fast.graph",) if path == "sgg_fast/__init__.py" else ()
        found += [name for name in names if not within(name, ALLOWED[place] + own)]
    return sorted(set(found))


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Every set of files of which each imports, over others, each: the circles of the import graph."""
    modules = {module_of(path): path for path in sources}

    def file_of(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return modules.get(name)

    reached = {}
    for path, source in sources.items():
        found = {file_of(name) for name in imported(path, source)} - {None, path}
        reached[path] = found
    grown = True
    while grown:  # the transitive closure
        grown = False
        for path, found in reached.items():
            more = found.union(*(reached[other] for other in found))
            grown |= more != found
            reached[path] = more
    joined = {path: frozenset(o for o in found if path in reached[o]) for path, found in reached.items()}
    return sorted(map(sorted, {group for group in joined.values() if group}))


def crowded(paths: list[str]) -> list[str]:
    """Folders with more Python files than they may hold, and files that lie too deep."""
    lines = [f"{path}: deeper than {DEEPEST} folders" for path in paths
             if path.startswith("sgg_fast/") and path.count("/") > DEEPEST + 1]  # fmt: skip
    for folder, num in sorted(Counter(path.rpartition("/")[0] for path in paths).items()):
        most = MOST_IN_A_WING if folder.startswith(WINGS) else MOST
        lines += [f"{folder or '.'}: {num} Python files, more than {most}"] * (num > most)
    return lines


def untested(sources: Mapping[str, str]) -> list[str]:
    """Files with functions or classes and no test file of their name where `tests/` mirrors their folder.

    `a/__init__.py` and `a/__main__.py` have theirs in or beside `tests/a/`, as `test_a.py`.
    """
    missing = []
    for path, source in sources.items():
        root, *folder = path.removeprefix("kernels/").removesuffix(".py").split("/")
        if root not in MIRRORS or not defines(source):
            continue
        *folder, name = folder
        tests = [*MIRRORS[root], *folder]
        places = [tests]
        if name.startswith("__"):
            name = folder[-1] if folder else root
            places += [tests[:-1]] if folder else []
        if not any("/".join([*place, f"test_{name}.py"]) in sources for place in places):
            missing.append(path)
    return missing


def defines(source: str) -> bool:
    """Whether a file defines public or private functions or classes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    return any(node.name != "__getattr__" for node in found)  # a package's own names, loaded on request


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("kernels/**/*.py", "sgg_fast/**/*.py", "benchmarks/**/*.py", "tests/**/*.py", "*.py")
    for path in ROOT.glob(pattern)
    # pipeline/pipeline.py is part of the saved pipeline there, for diffusers to find
    if path.name != "setup.py" and path.parent != ROOT / "sgg_fast" / "toy" / "pipeline"
)
SOURCES = {path: (ROOT / path).read_text(encoding="utf-8") for path in FILES}


def test_the_walk_finds_the_house():
    assert len(FILES) > 250
    assert {"train.py", "infer.py", "kernels/sgg_kernels/reference/hash.py", "sgg_fast/train/engines/choose.py",
            "benchmarks/aot/__main__.py", "tests/support/loops.py"} <= set(FILES)  # fmt: skip
    inside = {path.split("/")[1] for path in FILES if path.startswith("sgg_fast/")}
    missing = [name for name in inside if not name.endswith(".py") and f"sgg_fast/{name}/" not in ALLOWED]
    assert not missing, "a folder without an entry in the table"


@pytest.mark.parametrize("path", FILES)
def test_imports_follow_the_table(path):
    assert violations(path, SOURCES[path]) == []


def test_no_file_imports_itself_over_others():
    assert circles(SOURCES) == []


def test_folders_are_small_and_not_deep():
    assert crowded(FILES) == []


def test_every_file_has_a_test_file_of_its_name():
    assert untested(SOURCES) == []


@pytest.mark.parametrize(
    ("path", "snippet", "found"),
    [
        ("kernels/sgg_kernels/x.py", "import numpy", ["numpy"]),
        ("kernels/sgg_kernels/x.py", "from sgg_fast import ops", ["sgg_fast.ops"]),
        ("kernels/sgg_kernels/reference/x.py", "import triton", ["triton"]),
        ("kernels/sgg_kernels/reference/x.py", "from ..launch import launch", ["sgg_kernels.launch.launch"]),
        ("kernels/sgg_kernels/reference/__init__.py", "from ..launch import launch", ["sgg_kernels.launch.launch"]),
        ("sgg_fast/ops/x.py", "from sgg_fast.nn import clip", ["sgg_fast.nn.clip"]),
        ("sgg_fast/ops/x.py", "import triton.language as tl", ["triton.language"]),
        ("sgg_fast/graph.py", "import diffusers", ["diffusers"]),
        ("sgg_fast/commands/__init__.py", "import torch", ["torch"]),
        ("sgg_fast/commands/train.py", "import torch", ["torch"]),
        ("sgg_fast/config/x.py", "from sgg_fast.nn import clip", ["sgg_fast.nn.clip"]),
        ("sgg_fast/nn/x.py", "def f():\n    import xformers.ops", ["xformers.ops"]),
        ("sgg_fast/nn/x.py", "from ..train.engines import choose", ["sgg_fast.train.engines.choose"]),
        ("sgg_fast/nn/x.py", "from sgg_kernels import reference", ["sgg_kernels.reference"]),
        ("sgg_fast/diffusion/x.py", "from transformers import CLIPModel", ["transformers.CLIPModel"]),
        ("sgg_fast/data/sources.py", "from diffusers import AutoencoderKL", ["diffusers.AutoencoderKL"]),
        ("sgg_fast/data/sources.py", "from sgg_fast.nn.clip import embed_names", ["sgg_fast.nn.clip.embed_names"]),
        ("sgg_fast/pipeline.py", "from sgg_fast.data.cache import build_cache", ["sgg_fast.data.cache.build_cache"]),
        ("sgg_fast/pictures/x.py", "from sgg_fast.drawing import jobs", ["sgg_fast.drawing.jobs"]),
        ("sgg_fast/drawing/x.py", "from sgg_fast.train import outputs", ["sgg_fast.train.outputs"]),
        ("sgg_fast/drawing/x.py", "from ..eval import metrics", ["sgg_fast.eval.metrics"]),
        ("sgg_fast/eval/x.py", "import deepspeed", ["deepspeed"]),
        ("sgg_fast/eval/x.py", "from sgg_fast.app import server", ["sgg_fast.app.server"]),
        ("sgg_fast/eval/x.py", "import pandas", ["pandas"]),
        ("sgg_fast/toy/x.py", "import bitsandbytes as bnb", ["bitsandbytes"]),
        ("sgg_fast/train/x.py", "from benchmarks.ops import registry", ["benchmarks.ops.registry"]),
        ("sgg_fast/train/run/x.py", "from sgg_fast import app", ["sgg_fast.app"]),
        ("sgg_fast/train/x.py", "import starlette", ["starlette"]),
        ("sgg_fast/train/x.py", "import kernels", ["kernels"]),
        ("sgg_fast/app/x.py", "from sgg_fast.train import trainer", ["sgg_fast.train.trainer"]),
        ("sgg_fast/app/x.py", "from sgg_fast.data.cache import Cache", ["sgg_fast.data.cache.Cache"]),
        ("benchmarks/x.py", "from kernels import launch", ["kernels.launch"]),
        ("benchmarks/x.py", "import tests.support", ["tests.support"]),
        ("tests/x.py", "import kernels", ["kernels"]),
        ("train.py", "import deepspeed", ["deepspeed"]),
    ],
)
def test_the_table_can_fail(path, snippet, found):
    assert violations(path, snippet) == found


def test_circles_are_found():
    """Over a package's own file, over a function's import and relative ones; not over types and not upwards."""
    files = {
        "sgg_fast/a.py": "from sgg_fast.b import f",
        "sgg_fast/b/__init__.py": "from .c import f",
        "sgg_fast/b/c.py": "def f():\n    from ..a import g",
        "sgg_fast/d.py": "import sgg_fast.a",
        "sgg_fast/e.py": "if TYPE_CHECKING:\n    from sgg_fast.f import T\n",
        "sgg_fast/f.py": "from sgg_fast.e import g",
    }
    assert circles(files) == [["sgg_fast/a.py", "sgg_fast/b/__init__.py", "sgg_fast/b/c.py"]]
    assert circles({**files, "sgg_fast/e.py": "from sgg_fast import f"})[1:] == [["sgg_fast/e.py", "sgg_fast/f.py"]]


def test_crowds_and_depth_are_found():
    full = [f"sgg_fast/nn/m{i}.py" for i in range(MOST)] + [f"benchmarks/aot/m{i}.py" for i in range(MOST_IN_A_WING)]
    assert crowded([*full, "sgg_fast/data/prepare/x.py"]) == []
    assert crowded([*full, "sgg_fast/nn/x.py", "benchmarks/aot/x.py", "sgg_fast/a/b/c/x.py"]) == [
        "sgg_fast/a/b/c/x.py: deeper than 2 folders",
        "benchmarks/aot: 13 Python files, more than 12",
        "sgg_fast/nn: 19 Python files, more than 18",
    ]


def test_files_without_tests_are_found():
    one = "def f(): pass"
    files = {
        "sgg_fast/nn/a.py": one, "sgg_fast/nn/__main__.py": one, "kernels/sgg_kernels/b.py": one,
        "benchmarks/c.py": one, "sgg_fast/nn/d.py": "X = 1", "sgg_fast/__init__.py": "def __getattr__(name): ...",
    }  # fmt: skip
    missing = ["sgg_fast/nn/a.py", "sgg_fast/nn/__main__.py", "kernels/sgg_kernels/b.py", "benchmarks/c.py"]
    assert untested(files) == missing
    tests = ("tests/nn/test_a.py", "tests/test_nn.py", "tests/kernels/test_b.py", "tests/benchmarks/test_c.py")
    assert untested({**files, **dict.fromkeys(tests, "")}) == []


def run_python(code: str, *paths: Path) -> str:
    """stdout of `python -c code` in the repository root, where kernels/ lies on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
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
