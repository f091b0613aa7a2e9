"""The stand-in keeps CUDA's rules. Runs on it: `python -m pytest -p fake_cuda.plugin tests/fake_cuda`; else skipped."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = pytest.mark.skipif(not os.environ.get("FAKE_CUDA"), reason="runs on the stand-in: make first-contact")


def captured(body) -> None:
    """`body` within a capture, the state restored however it ends."""
    stream, graph, before = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            body()
    finally:
        torch.cuda.set_stream(before)


TORCH_REFUSES = {"a number read back", "a copy from pageable memory", "a copy to the host"}
"""Of these, before CUDA is asked."""

FORBIDDEN = {
    "a number read back": lambda x: x.sum().item(),
    "a synchronisation": lambda x: torch.cuda.synchronize(),
    "a copy from pageable memory": lambda x: x.copy_(torch.ones(8), non_blocking=True),
    "a copy to the host": lambda x: x.cpu(),
    "an event's query": lambda x: x.event.query(),
    "work on a stream that does not join": lambda x: _wander(x),
    "its event, for which no other stream waits": lambda x: _wander(x).record_event(),
}


def _wander(x: torch.Tensor) -> torch.cuda.Stream:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x.add_(1)
    return other


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_device_refuses_in_a_capture_is_refused(name, refusals):
    from . import device

    x = torch.zeros(8, device="cuda")
    x.event = torch.cuda.Event()
    x.event.record()
    with pytest.raises(RuntimeError):
        captured(lambda: FORBIDDEN[name](x))
    assert bool(device.complaints()) == (name not in TORCH_REFUSES), "and noted"


def test_what_a_device_allows_is_allowed_and_counted():
    from . import device

    x, pinned = torch.zeros(8, device="cuda"), torch.ones(8).pin_memory()
    num, before = len(device.graphs()), device.counts()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        x.copy_(pinned, non_blocking=True)
        y = x * 2
    assert device.graphs()[num:] == [2] and device.complaints() == []
    assert device.counts().since(before).captured == 2
    before = device.counts()
    graph.replay()
    after = device.counts().since(before)
    assert (after.replays, after.launches, after.syncs) == (1, 0, 0)
    assert x.cpu().tolist() == [1.0] * 8, "a replay repeats its copies"
    assert y.shape == (8,)


def test_flags_read_one_and_memory_has_an_end():
    from . import device

    x = torch.zeros(4, device="cuda")
    assert bool(x.isfinite().all()) and bool((x > 0).any())
    word = torch.zeros(2, device="cuda")
    device.declare_flag(word)
    assert word.cpu().tolist()[0] == 1.0
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**40, dtype=torch.uint8, device="cuda")


def test_convolutions_take_what_cudnn_takes_and_no_more():
    x = torch.zeros(2, 8, 16, 16, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    layer = torch.nn.Conv2d(8, 4, 3, padding=1, stride=2, device="cuda")
    before = torch.cuda.memory_allocated()
    out = layer(x)
    assert out.shape == (2, 4, 8, 8) and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.cuda.memory_allocated() - before < 2 * out.nbytes + 1024, "no buffers of im2col"
    out.sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape
    with pytest.raises(RuntimeError, match="should be the same"):
        layer(x.half())
