"""Nothing loads a model beside the door, and whatever catches everything is a border."""

from __future__ import annotations

import ast

from support import ROOT

LOADS = ("from_pretrained", "load_file", "safe_open", "snapshot_download", "load_config")
DOOR = "sgg_fast/nn/loading/"
ELSEWHERE = {
    "sgg_fast/pipeline.py": {"from_pretrained"},  # diffusers' own way, for arguments of its own
    "sgg_fast/eval/detectors.py": {"from_pretrained"},  # within a border, its report read
    "sgg_fast/toy/parts.py": {"from_pretrained"},  # our pipeline's own, which is the door
    # Checkpoints, which a manifest of SHA-256s vouches for.
    "sgg_fast/train/engines/state.py": {"load_file"},
    "sgg_fast/train/engines/deepspeed.py": {"load_file"},
    "sgg_fast/toy/fit.py": {"load_file"},
    "sgg_fast/toy/text_unet.py": {"load_file"},  # latents of its scenes
    "sgg_fast/toy/models.py": {"from_pretrained"},  # the tokenizer that ships
}


def sources() -> list[tuple[str, str]]:
    paths = [*(ROOT / "sgg_fast").rglob("*.py"), ROOT / "infer.py", ROOT / "train.py"]
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def test_models_are_loaded_by_the_door_alone():
    found: dict[str, set[str]] = {}
    for path, source in sources():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            ours = ast.unparse(node.func).startswith(("loading.", "config"))
            if name in LOADS and not path.startswith(DOOR) and not ours:
                found.setdefault(path, set()).add(name)
    allowed = {path: names for path, names in found.items() if names <= ELSEWHERE.get(path, set())}
    assert found == allowed and len(found) >= 4


def test_what_catches_everything_is_marked_or_raises_again():
    seen = 0
    for path, source in sources():
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                assert again or "# border" in lines[node.lineno - 1], f"{path}:{node.lineno}"
                seen += 1
    assert seen >= 3
