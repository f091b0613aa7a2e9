"""What `GradientSum` makes of gradients in each process of a launch: `torchrun tests/support/cases/processes.py`.

Every check runs in both processes and compares with what one process computes of both batches. It prints its name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[3]))

from sgg_fast import env
from sgg_fast.train.engines import all_reduce
from sgg_fast.train.engines.all_reduce import GradientSum
from sgg_fast.train.run import processes

CPU = torch.device("cpu")
LIMIT = 60.0


class Net(nn.Module):
    """Three layers of two types, a weight that only the second process uses, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 9).bfloat16()
        self.convolution = nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
        self.sometimes, self.never = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(3))

    def forward(self, x_B5: torch.Tensor, use: int) -> torch.Tensor:
        y = self.second(self.first(x_B5).bfloat16()).float()
        if use:
            y = y * self.sometimes
        return y.square().mean() + self.convolution(y.reshape(-1, 3, 3, 1)).sum()


def batches(num: int) -> Iterator[list[torch.Tensor]]:
    """The batches of both processes at each step."""
    for step in range(num):
        yield [torch.randn(2, 5, generator=torch.Generator().manual_seed(10 * step + rank)) for rank in (0, 1)]


def expected(batch_of: list[torch.Tensor], times: int = 1, uses: tuple[int, int] = (0, 1)) -> list[torch.Tensor]:
    """The sum of the gradients of both processes, by autograd alone. uses: whether each uses the weight `sometimes`."""
    grads = []
    for x, use in zip(batch_of, uses, strict=True):
        net = Net()
        for _ in range(times):
            net(x, use).backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
    return [a + b for a, b in zip(*grads, strict=True)]


def sums_in_buckets() -> None:
    """Three steps: bits of the sum, in the parameters' layouts, and buckets that start before backward ends."""
    net = Net()
    parameters = list(net.parameters())
    gradients = GradientSum(parameters)
    begun: list[int] = []
    net.first.weight.register_post_accumulate_grad_hook(lambda _: begun.append(gradients._num_started))
    for both in batches(3):
        gradients.expect()
        net(both[env.rank()], env.rank()).backward()
        gradients.finish()
        for p, want in zip(parameters, expected(both), strict=True):
            assert p.grad is not None and p.grad.equal(want) and p.grad.dtype == p.dtype
            assert p.grad.stride() == p.stride() and p.grad.storage_offset() * p.element_size() % 16 == 0
            p.grad = None
    assert gradients.buckets is not None and len(gradients.buckets) > 3
    assert {len(bucket) for bucket in gradients.buckets} > {1}, "some weights share a bucket"
    assert begun[0] == 0 < begun[1] == begun[2] < len(gradients.buckets)


def sums_once_for_several_micro_batches() -> None:
    """Backward before `expect` exchanges nothing; the sum is of all micro-batches."""
    net = Net()
    gradients = GradientSum(list(net.parameters()))
    for both in batches(2):
        for last in (False, False, True):
            if last:
                gradients.expect()
            net(both[env.rank()], env.rank()).backward()
        gradients.finish()
        for p, want in zip(net.parameters(), expected(both, 3), strict=True):
            assert p.grad is not None and p.grad.equal(want)
            p.grad = None


def updates_in_backward() -> None:
    """Each weight is handed over once, with its whole sum, and few gradients live at a time."""
    net = Net()
    parameters = list(net.parameters())
    found: dict[int, torch.Tensor] = {}
    most = 0

    def update(index: int) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in parameters))
        grad = parameters[index].grad
        assert index not in found and grad is not None
        found[index], parameters[index].grad = grad.clone(), None

    gradients = GradientSum(parameters, update)
    for both in batches(3):
        found.clear()
        gradients.expect()
        net(both[env.rank()], 1).backward()
        gradients.finish()
        want = expected(both, uses=(1, 1))
        assert len(found) == len(want) and all(found[i].equal(grad) for i, grad in enumerate(want))
    assert most < len(parameters)


def silent_steps_exchange_nothing() -> None:
    """As in a warm-up, which the other process may not take: only the first one does here."""
    net = Net()
    gradients = GradientSum(list(net.parameters()))
    for step, both in enumerate(batches(3)):
        if step == 1 and env.rank():
            continue
        gradients.expect()
        with gradients.silent():
            net(both[env.rank()], env.rank()).backward()
            gradients.finish()
        alone = Net()
        alone(both[env.rank()], env.rank()).backward()
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            assert p.grad is not None and p.grad.equal(torch.zeros_like(q) if q.grad is None else q.grad)
            p.grad = None


CHECKS = (
    sums_in_buckets,
    sums_once_for_several_micro_batches,
    updates_in_backward,
    silent_steps_exchange_nothing,
)

if __name__ == "__main__":
    all_reduce.BUCKET_BYTES = 100
    processes.meet(CPU, LIMIT)
    for check in CHECKS:
        check()
        if env.rank() == 0:
            print(check.__name__, flush=True)
