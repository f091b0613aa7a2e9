"""State in 4 bits and factored second moments on the flat optimiser: resume, updates in backward, sizes, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sgg_fast import ops
from sgg_fast.train.optim.adam_flat import FlatAdam

FORMS = {"fp32": torch.float32, "split": torch.bfloat16, "rounded": torch.bfloat16}
SMALL = {"adam4bit": {"optim_bits": 4}, "adafactor": {"optim_bits": 32, "factored": True}}


def network(dtype: torch.dtype) -> nn.Module:
    """A convolution in channels_last, odd sizes, an unused weight."""
    torch.manual_seed(0)
    made = nn.ModuleDict({"conv": nn.Conv2d(8, 70, 3), "norm": nn.GroupNorm(1, 70), "linear": nn.Linear(70, 99),
                          "out": nn.Linear(99, 3), "idle": nn.Linear(31, 9)})  # fmt: skip
    return made.to(dtype, memory_format=torch.channels_last)


def optimizer(net: nn.Module, kind: str, form: str, in_backward: bool = False) -> FlatAdam:
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "lr": 1e-3, **SMALL[kind]},
        {"params": [p for p in net.parameters() if p.ndim <= 1], "lr": 1e-3, "optim_bits": 32},
    ]
    return FlatAdam(groups, 7, split=form == "split", in_backward=in_backward)


def passes(net: nn.Module, one: FlatAdam, numbers: range) -> list[float]:
    """Steps, whose losses are returned."""
    losses = []
    for number in numbers:
        x = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(number)).to(net["conv"].weight.dtype)
        one.send_rates()
        one.begin()
        h = net["norm"](net["conv"](x)).relu().mean((2, 3))
        loss = (net["out"](net["linear"](h).relu()).float() - 1).square().mean()
        loss.backward()
        one.step()
        one.zero_grad()
        losses.append(loss.item())
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SMALL)
def test_learns_and_resumes_bit_for_bit(kind, form, tmp_path):
    net, other = network(FORMS[form]), network(FORMS[form])
    first, second = optimizer(net, kind, form), optimizer(other, kind, form)
    losses = passes(net, first, range(30))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(net.state_dict())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert passes(net, first, range(30, 33)) == passes(other, second, range(30, 33)) and same(net, other)
    assert net["idle"].weight.equal(network(FORMS[form])["idle"].weight)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("form", ["fp32", "rounded"])
@pytest.mark.parametrize("kind", SMALL)
def test_in_backward_is_the_ordinary_step(kind, form, backend, tmp_path):
    """Bit for bit, and over a resumed state."""
    plain, hooked, resumed = (network(FORMS[form]) for _ in range(3))
    with ops.assumed(backend):
        ordinary, own = optimizer(plain, kind, form), optimizer(hooked, kind, form, in_backward=True)
        for net, one in ((plain, ordinary), (hooked, own)):
            passes(net, one, range(2))
        assert same(plain, hooked) and not same(plain, network(FORMS[form]))
        torch.save(own.state_dict(), tmp_path / "state.pt")
        resumed.load_state_dict(hooked.state_dict())
        again = optimizer(resumed, kind, form, in_backward=True)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for net, one in ((plain, ordinary), (hooked, own), (resumed, again)):
            passes(net, one, range(2, 3))
        assert same(plain, hooked) and same(plain, resumed)


@pytest.mark.parametrize("kind", SMALL)
def test_a_bad_gradient_changes_nothing(kind):
    net = network(torch.float32)
    one = optimizer(net, kind, "fp32")
    passes(net, one, range(1))
    before = copy.deepcopy([net.state_dict(), [list(group.moments) for group in one._groups]])
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net["out"].bias.grad[1] = torch.inf
    one.step()
    assert one.applied == 0
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in net.state_dict().items())
    for group, moments in zip(one._groups, before[1], strict=True):
        assert all(map(torch.equal, group.moments, moments))


@pytest.mark.parametrize(("kind", "share"), [("adam4bit", 1.0625), ("adafactor", 8 / 1280)])
def test_bytes_a_weight(kind, share):
    """Of a matrix of the UNet's usual size: what README says."""
    weight = nn.Parameter(torch.zeros(1280, 1280))
    one = FlatAdam([{"params": [weight], "lr": 1e-3, **SMALL[kind]}], 0)
    held = sum(t.nbytes for t in one._groups[0].moments)
    assert held / weight.numel() == pytest.approx(share, rel=0.02)


def test_state_of_another_optimizer_is_refused():
    """In one line that names the cure, which is tried."""
    nets = {kind: network(torch.float32) for kind in SMALL}
    made = {kind: optimizer(net, kind, "fp32") for kind, net in nets.items()}
    eight = network(torch.float32)
    groups = [[p for p in eight.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    made["adam8bit"] = FlatAdam([{"params": ps, "lr": 1e-3, "optim_bits": 8} for ps in groups], 0)
    nets["adam8bit"] = eight
    for kind, one in made.items():
        passes(nets[kind], one, range(1))
    states = {kind: copy.deepcopy(one.state_dict()) for kind, one in made.items()}
    for kind, one in made.items():
        for other, state in states.items():
            if other == kind:
                one.load_state_dict(state)
            else:
                with pytest.raises(ValueError, match=r"optimiser state: .*(map of|go on with|does not fit)"):
                    one.load_state_dict(state)
