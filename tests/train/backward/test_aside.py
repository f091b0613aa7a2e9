"""Weight gradients aside: the bits of torch's own backward, and which layers leave theirs."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from support.cases.engine import assert_same, built, train  # noqa: F401  (fixtures)
from support.cases.stage import cache, foundation  # noqa: F401  (fixtures)
from torch import nn

from sgg_fast.recipes import recipe
from sgg_fast.train.backward import aside as module
from sgg_fast.train.backward.aside import Aside, goes_aside

FORMS = [
    {"weights": "split", "fuse_unet": "on", "accumulation_steps": 2},
    {"weights": "split", "optimizer": "adam8bit"},
    {"weights": "master", "precision": "bf16", "fuse_unet": "on", "accumulation_steps": 2},
]


@pytest.mark.parametrize("changes", FORMS)
def test_the_bits_of_inline(built, changes):
    inline, aside = built("behind", **changes), built("behind", weight_gradients="aside", **changes)
    assert inline.aside is None and aside.aside is not None
    assert train(aside, range(5)) == train(inline, range(5))
    assert_same(aside, inline)


def test_every_layer_of_the_unet_leaves_its_weight(built):
    """Torch accumulates no gradient of a linear layer or convolution, merged ones included."""
    engine = built("behind", weights="split", fuse_unet="on", weight_gradients="aside")
    layers = [m for m in engine.module.unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    accumulated: list[torch.Tensor] = []
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(accumulated.append)
    train(engine, range(1))
    assert not accumulated
    assert {engine.aside._numbers[layer.weight] for layer in layers} <= engine.behind._arrived


class Stream:
    """In place of a device's; knows the events that it waits for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.waited: list[str] = []

    def wait_event(self, event: str) -> None:
        self.waited.append(event)


def test_backward_waits_for_the_oldest_gradient_beyond_the_limit(monkeypatch):
    """Then its tensors are free."""
    backward = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: backward)
    monkeypatch.setattr(module, "HELD_BYTES", 1000)
    aside = Aside(SimpleNamespace(parameters=[], stream=Stream()), [])
    tensors = [torch.zeros(100) for _ in range(4)]
    refs = [weakref.ref(tensor) for tensor in tensors]
    for number in range(4):
        aside.done(f"end {number}", ([], []), tensors.pop(0))
        assert backward.waited == [f"end {k}" for k in range(number - 1)]
    assert [ref() is None for ref in refs] == [True, True, False, False]
    aside.forget()
    assert all(ref() is None for ref in refs)


def test_only_behind_backward():
    plain = recipe("toy", max_grad_norm=0.0)
    asked = plain.replace(weight_gradients="aside")
    assert goes_aside(asked, 1)
    assert not goes_aside(asked, 2) and not goes_aside(plain, 1)
