"""Puts faults that were once there back into a copy of the tree, and runs the row that must then be red.

    python -m fake_cuda.faults --folder FOLDER [NAME ..]     # as matrix.py runs, by the same Python

Each line says what the row found. Exit status 1 if a row stays green.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("sgg_fast", "kernels", "benchmarks", "tests", "configs", "train.py", "infer.py", "ds.json", "graph.json",
          "pyproject.toml", "constraints.txt")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fault:
    """A text of a file, the faulty one in its place, and the row that finds it."""

    name: str
    path: str
    right: str
    wrong: str
    row: str


FAULTS = (
    Fault(
        "xformers gets a bias in fp32 and queries in bf16",
        "sgg_fast/nn/attention.py", "mask.detach().to(dtype)", "mask.detach().float()",
        "finetune",
    ),
    Fault(
        "xformers is refused where its binary does not load, and SDPA attends",
        "sgg_fast/nn/attention.py", '("xFormers wasn\'t build with CUDA", "(too new)")', '("(too new)",)',
        "finetune",
    ),
    Fault(
        "an update in backward asks the host about each weight",
        "sgg_fast/train/optim/adam_flat.py",
        "parameters[i].grad = None\n", "parameters[i].grad = None if self._controls_U8[number, op.APPLIED] else None\n",
        "finetune-in-backward",
    ),
    Fault(
        "updates behind backward are not joined before the end of the capture",
        "sgg_fast/train/backward/behind.py",
        "torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)", "pass",
        "finetune-behind",
    ),
    Fault(
        "updates behind backward do not wait for their gradients",
        "sgg_fast/train/backward/behind.py",
        "self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))", "pass",
        "finetune-behind",
    ),
    Fault(
        "weight gradients aside are not joined before the end of a micro-batch's capture",
        "sgg_fast/train/backward/aside.py", "self.behind.join()", "pass",
        "finetune-weight-gradients-aside",
    ),
    Fault(
        "merged weights lie apart after .to(device)",
        "sgg_fast/nn/merge.py", "        self.merged[0].rejoin()\n", "", "finetune",
    ),
    Fault(
        "merged weights lie apart in the flat buffer",
        "sgg_fast/train/optim/flat.py",
        "sorted(range(len(parameters)), key=lambda i: (first[storages[i]], parameters[i].storage_offset(), i))",
        "list(range(len(parameters)))",
        "finetune",
    ),
    Fault(
        "merged weights lie apart in DeepSpeed's flat tensors",
        "sgg_fast/train/optim/groups.py", "names if most == math.inf else merged_first(module)", "names",
        "finetune-ds",
    ),
    Fault(
        "a failed capture ends the run",
        "sgg_fast/train/engines/captured.py", "except Exception as error:  # border", "except KeyError as error:",
        "finetune-capture-refused",
    ),
    Fault(
        "a failed capture leaves its gradients",
        "sgg_fast/train/engines/captured.py",
        "self.optimizer.zero_grad(set_to_none=True)  # the remaining gradients lie in", "pass  # ",
        "finetune-capture-refused",
    ),
)  # fmt: skip


def plant(fault: Fault, tree: Path) -> None:
    """Raises ValueError where the right text is not there exactly once."""
    path = tree / fault.path
    text = path.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.path} has {fault.right!r} {text.count(fault.right)} times")
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def copy_tree(to: Path) -> None:
    """Files that commands need, with their times, so that nothing is built again."""
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, to / name)


def found(fault: Fault, folder: Path) -> str:
    """What the row says with this fault in the tree; "" where it is green."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        copy_tree(tree)
        plant(fault, tree)
        path = os.pathsep.join(str(tree / part) for part in ("", "kernels", "tests"))
        words = [sys.executable, "-m", "fake_cuda.matrix", "--folder", str(folder), "--rows", fault.row]
        done = subprocess.run(words, cwd=tree, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
                              check=False)  # fmt: skip
        if done.returncode == 0:
            return ""
        lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("       ")]
        return lines[0] if lines else done.stderr.strip()[-300:]


def main() -> int:
    """Exit status 1 if a fault stays unfound."""
    parser = argparse.ArgumentParser(prog="python -m fake_cuda.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="parts of faults' names; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "first-contact", help="that of matrix.py")
    args = parser.parse_args()
    green = 0
    for fault in FAULTS:
        if args.names and not any(name in fault.name for name in args.names):
            continue
        said = found(fault, args.folder.resolve())
        green += not said
        print(f"{'red ' if said else 'GREEN'} {fault.row}: {fault.name}\n       {said[:300]}", flush=True)
    return int(green > 0)


if __name__ == "__main__":
    sys.exit(main())
