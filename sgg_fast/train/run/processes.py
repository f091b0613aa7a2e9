"""The processes of a run on the host: they meet, agree and wait for each other, by gloo and torch's store.

What they exchange here is small and lies in host memory, so no step waits for it. Gradients travel elsewhere
(`engines/all_reduce.py`, or DeepSpeed). A single process exchanges nothing, and every function returns at once.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist

from sgg_fast import env
from sgg_fast.config import ConfigError
from sgg_fast.train.run.interrupts import LostProcess

EXCHANGE_EVERY = 8
"""Steps between two exchanges of signals. One that comes in between is sent at the next and read at the one after."""

REFUSED = "sgg_fast/refused"
"""Key of the store: there once the first process has refused to go on."""

WAIT_FOR_REFUSAL = 3.0
"""Seconds that another process waits for that key before it gives a reason of its own."""


class _Met:
    """What `meet` made."""

    host: dist.ProcessGroup | None = None
    timeout = 0.0
    num_questions = 0
    """Calls of `same_everywhere`: the store keeps what was said at earlier ones."""


def meet(device: torch.device, timeout: float) -> None:
    """Join the process group of the launcher, and one of the hosts beside it; a single process joins none.

    timeout: seconds that a process waits for the others, here and in every later exchange. Raises `ConfigError` for
    more processes than GPUs on a machine that has some.
    """
    _Met.timeout = timeout
    if device.type == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or env.local_rank() + 1)
        if here > torch.cuda.device_count():
            raise ConfigError(
                f"{here} processes need as many GPUs; this machine has {torch.cuda.device_count()}: lower "
                "--nproc_per_node"
            )
        torch.cuda.set_device(device)
    if env.world_size() == 1 or _Met.host is not None:
        return
    limit = datetime.timedelta(seconds=timeout)
    if not dist.is_initialized():
        atexit.register(leave)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    _Met.host = dist.new_group(backend="gloo", timeout=limit)


def leave() -> None:
    """Destroy the process group, at exit."""
    _Met.host = None
    if dist.is_initialized():
        dist.destroy_process_group()


def have_met() -> bool:
    """Whether this is one of several processes that have met."""
    return _Met.host is not None


def is_by_host() -> bool:
    """Whether gradients of several processes go through gloo, on the host."""
    return env.world_size() > 1 and dist.get_backend() == "gloo"


def same_everywhere(what: dict[str, object]) -> None:
    """Raises `ConfigError`, in every process, if not all of them say the same."""
    if _Met.host is None:
        return
    _Met.num_questions += 1
    store, key = dist.distributed_c10d._get_default_store(), f"sgg_fast/same/{_Met.num_questions}"
    store.set(f"{key}/{env.rank()}", json.dumps(what))
    first = json.loads(store.get(f"{key}/0"))
    for rank in range(1, env.world_size()):
        theirs = json.loads(store.get(f"{key}/{rank}"))
        for name in first:
            if first[name] != theirs.get(name):
                raise ConfigError(
                    f"{name} is {first[name]!r} in the first process and {theirs.get(name)!r} in process {rank}: give "
                    "all of them the same command, and an --out that every machine sees"
                )


def barrier() -> None:
    """Wait for this process's device, then for every process."""
    if _Met.host is not None:
        _wait_for_device()
        dist.barrier(group=_Met.host)


def mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of a vector over the processes, in host memory."""
    if _Met.host is None:
        return values
    _wait_for_device()
    on_host = values.detach().to("cpu", copy=True)
    dist.all_reduce(on_host, group=_Met.host)
    return on_host / env.world_size()


def first_says(values: Iterable[int]) -> list[int]:
    """The whole numbers of the first process, as many as here."""
    own = list(values)
    if _Met.host is None:
        return own
    said = torch.tensor(own, dtype=torch.int64)
    dist.broadcast(said, 0, group=_Met.host)
    return said.tolist()


def spread(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite dense tensors by those of the first process, so that all begin with the same bits."""
    if env.world_size() == 1:
        return
    for tensor in tensors:
        if tensor.numel():
            flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
            dist.broadcast(flat.view(torch.uint8), 0)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        event = torch.cuda.Event()
        event.record()
        wait_for(event)


def wait_for(event: torch.cuda.Event) -> None:
    """Wait until the device has reached an event.

    With several processes the wait is bounded: on the device a sum whose peer is lost never ends. Raises `LostProcess`.
    """
    if _Met.host is None:
        event.synchronize()
        return
    end = time.monotonic() + _Met.timeout
    while not event.query():
        if time.monotonic() > end:
            raise LostProcess.after(_Met.timeout)
        time.sleep(1e-4)


class SignalExchange:
    """Tells every process of a signal that one of them got; they stop after the same step, within 16 of the signal.

    Every `EXCHANGE_EVERY` steps the processes exchange a number on the host and read the one before, which has long
    arrived. So no step waits for another process, and none reads the device.
    """

    def __init__(self) -> None:
        self._said: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def stopped_by(self, number: int, done: int) -> int:
        """The signal that ends the run after `done` steps, the same in every process; 0 for none.

        number: the signal that this process got, or 0.
        """
        if _Met.host is None:
            return number
        if done % EXCHANGE_EVERY:
            return 0
        if self.settle():
            return self.settle()
        self._said = torch.tensor([number])
        self._work = dist.all_reduce(self._said, dist.ReduceOp.MAX, group=_Met.host, async_op=True)
        return 0

    def settle(self) -> int:
        """Wait for the last exchange; returns the signal that it brought, or 0."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return 0 if self._said is None else int(self._said)


def say_refused() -> None:
    """In the first process: tell the others that it ends with a line of its own, so that they add none.

    Waits a little until they have heard: without a launcher the store ends with this process.
    """
    if _Met.host is not None:
        store, others = dist.distributed_c10d._get_default_store(), range(1, env.world_size())
        with contextlib.suppress(RuntimeError):
            store.set(REFUSED, "1")
            store.wait([f"{REFUSED}/{rank}" for rank in others], datetime.timedelta(seconds=WAIT_FOR_REFUSAL))


def first_refused() -> bool:
    """In another process: whether the first one has ended with a line of its own, or does so soon."""
    if _Met.host is None:
        return False
    store = dist.distributed_c10d._get_default_store()
    try:
        store.wait([REFUSED], datetime.timedelta(seconds=WAIT_FOR_REFUSAL))
        store.set(f"{REFUSED}/{env.rank()}", "1")
        return True
    except RuntimeError:
        return False
