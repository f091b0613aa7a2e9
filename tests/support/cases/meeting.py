"""What processes of a run agree on, in each of two that `run/test_processes.py` starts with a launcher's environment.

It prints the name of each check.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[3]))

from sgg_fast import env
from sgg_fast.train.run import processes

CPU = torch.device("cpu")
LIMIT = 60.0


def agreements() -> None:
    """Means, numbers of the first process, equal beginnings, and refusals of what differs."""
    rank = env.rank()
    assert processes.mean(torch.tensor([1.0, 3.0 * rank])).tolist() == [1.0, 1.5]
    assert processes.first_says([rank + 5, 7]) == [5, 7]
    held = [torch.full((2, 3), float(rank)).t(), torch.tensor(rank == 0), torch.empty(0)]
    processes.spread(held)
    assert held[0].eq(0).all() and bool(held[1])
    processes.same_everywhere({"seed": 1})
    processes.barrier()
    try:
        processes.same_everywhere({"batch_size": 4 + rank})
    except ValueError as error:
        assert "batch_size is 4 in the first process and 5 in process 1" in str(error)
    else:
        raise AssertionError("not refused")


def signals() -> None:
    """A signal of one process at any step ends both after the same one, at most 16 steps later."""
    for at in range(1, 18):
        exchange, stopped = processes.SignalExchange(), 0
        for done in range(1, 100):
            if number := exchange.stopped_by(15 if env.rank() == 1 and done >= at else 0, done):
                assert number == 15
                stopped = done
                break
        exchange.settle()
        assert at < stopped <= at + 16
        assert processes.first_says([stopped]) == [stopped]


def refusals() -> None:
    """The first process tells that it ends with a line; the second one hears it in time."""
    assert processes.have_met() and processes.is_by_host()
    if env.rank():
        assert processes.first_refused()
    else:
        processes.say_refused()
    processes.barrier()


def leaving() -> None:
    """Afterwards nothing is exchanged any more."""
    processes.leave()
    assert not processes.have_met() and not torch.distributed.is_initialized()
    assert processes.first_says([env.rank()]) == [env.rank()]


CHECKS = (agreements, signals, refusals, leaving)

if __name__ == "__main__":
    processes.meet(CPU, LIMIT)
    for check in CHECKS:
        check()
        print(check.__name__, flush=True)
