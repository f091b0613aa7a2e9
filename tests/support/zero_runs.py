"""Fine-tuning under several DeepSpeed configurations in one process, or in each process of one launch: for tests.

`torchrun tests/support/zero_runs.py OUT NAME=DS_JSON ... -- FLAG VALUE ...` trains in OUT/NAME with each configuration.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import train  # noqa: E402
from sgg_fast.train.engines.deepspeed import LAUNCHER  # noqa: E402

CPU = {"device": "cpu", "pin_memory": True}
ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": {"stage": 3},
    "zero3-offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
"""Names and their zero_optimization."""


def write_ds(folder: Path, name: str) -> Path:
    """A ds.json in `folder` for one of `ZERO`."""
    path = folder / f"{name}.json"
    zero = {"reduce_bucket_size": 500_000, **ZERO[name]}
    path.write_text(json.dumps({"bf16": {"enabled": "auto"}, "zero_optimization": zero, "steps_per_print": 10**9}))
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(num_processes: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `words` (a script and its flags) under torchrun on this machine."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes),
                "--master_addr", "127.0.0.1", "--master_port", str(_free_port())]  # fmt: skip
    return subprocess.run([*launcher, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def train_each(out: Path, names: list[str], num_processes: int, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Train in out/NAME with each of `names`, all in one launch."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [f"{name}={write_ds(out, name)}" for name in names]
    return launch(num_processes, [str(Path(__file__)), str(out), *runs, "--", *flags])


def main() -> int:
    """Exit code of the first run that fails, or 0."""
    split = sys.argv.index("--")
    out, runs, flags = Path(sys.argv[1]), sys.argv[2:split], sys.argv[split + 1 :]
    for run in runs:
        name, path = run.split("=")
        code = train.main(["--stage", "finetune", "--deepspeed", path, "--out", str(out / name), *flags])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
