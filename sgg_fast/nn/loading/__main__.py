"""`python -m sgg_fast.nn.loading convert FOLDER` writes a part's half-precision or pickled weights as safetensors.
`python -m sgg_fast.nn.loading seal FOLDER` writes a model folder's sha256.json again after an intended change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.files import write_aside

from .border import ModelError, border
from .files import seal
from .parts import weights_name


def convert(folder: Path) -> Path:
    """Write the missing safetensors file of a part from its variant or its pickle, which is read as tensors only.

    Raises `ModelError`.
    """
    there = [path for end in ("*.safetensors", "*.bin") for path in sorted(folder.glob(end))]
    name = weights_name(folder)
    if not there or (folder / name).is_file():
        raise ModelError(f"{folder}: " + (f"{name} is there already" if there else "no weights are there"))
    with border(str(there[0])):
        if there[0].suffix == ".bin":
            state = torch.load(there[0], map_location="cpu", weights_only=True)
        else:
            state = load_file(there[0])
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ModelError("not a table of tensors")
        with write_aside(folder / name, durable=True) as aside:  # a kill leaves no half of the file that is looked for
            save_file({k: v.clone().contiguous() for k, v in state.items()}, aside, {"format": "pt"})
    return folder / name


@command("sgg_fast.nn.loading")
def main(argv: list[str] | None) -> None:
    """Exit code: 0 done, 2 with one line on stderr."""
    parser = OneLineParser(
        prog="python -m sgg_fast.nn.loading", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", choices=("convert", "seal"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise ModelError(f"{args.folder}: there is no such folder")
    print(convert(args.folder) if args.command == "convert" else seal(args.folder))
