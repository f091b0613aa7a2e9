"""Two processes under torchrun give the losses of one process with twice the batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tiny_runs import DS_JSON, ROOT, flags, lines, rows, train

from sgg_fast.train.engine import LAUNCHER

SETTINGS = {"finetune_steps": 4, "checkpoint_every": 4, "sample_every": 4}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """At each step the difference is at most twice what low precision makes of it, plus 1e-5."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
                "--master_port", str(free_port())]  # fmt: skip
    argv = ["train.py", "--stage", "finetune", "--deepspeed", DS_JSON, "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [*launcher, *argv, *flags(**SETTINGS, batch_size=2)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"saved {tmp_path}/two/finetune/pipeline", "said once, by the first process"
    assert done.stdout.count("saved") == 1 and "Traceback" not in done.stderr

    train(tmp_path / "one", "finetune", DS_JSON, **SETTINGS, batch_size=4)
    train(tmp_path / "low", "finetune", DS_JSON, **SETTINGS, batch_size=4, precision="bf16")
    two, one, low = (rows(tmp_path / name / "finetune") for name in ("two", "one", "low"))
    assert list(two) == list(one) == [1, 2, 3, 4]
    for step in one:
        assert two[step].keys() == one[step].keys()
        for name in one[step]:
            allowed = 2 * abs(low[step][name] - one[step][name]) + 1e-5
            assert abs(two[step][name] - one[step][name]) <= allowed, (step, name, two[step], one[step], low[step])
    start = lines(tmp_path / "two" / "finetune")[0]
    assert (start["engine"], start["settings"]["batch_size"]) == ("deepspeed x2", 2)
    manifest = tmp_path / "two" / "finetune" / "checkpoints" / "step-0000004" / "manifest.json"
    assert manifest.read_text().count("_optim_states.pt") == 2, "each process saved its part of the optimiser"
