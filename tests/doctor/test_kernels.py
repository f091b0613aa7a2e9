"""The doctor's comparison of kernels: right ones pass, wrong ones and those that do not compile do not."""

from __future__ import annotations

import pytest
import torch

from sgg_fast.doctor import kernels
from sgg_fast.doctor.findings import FAILED, OK

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(kernels.calls()))
def test_a_kernel_that_is_right_passes_and_a_wrong_one_does_not(name, monkeypatch):
    """On the interpreter; then with the kernel's form off by a tenth in one tensor."""
    call, shapes = kernels.calls()[name]
    batch, generator = kernels.graphs(), torch.Generator().manual_seed(0)
    drawn = {key: torch.randn(shape, generator=generator) for key, shape in shapes(batch).items()}
    assert kernels._judge(call, batch, drawn, (torch.float32,)) == ""
    results = kernels._results

    def off(call, batch, values, dtype, form):
        found = results(call, batch, values, dtype, form)
        return [*found[:-1], found[-1] * 1.1] if form == "triton" else found

    monkeypatch.setattr(kernels, "_results", off)
    assert "differs from the reference" in kernels._judge(call, batch, drawn, (torch.float32,))


def test_the_optimiser_and_the_packed_batches_are_compared():
    assert kernels._adam(CPU) == "" and kernels._pack(CPU) == ""


def test_a_kernel_that_does_not_compile_is_a_finding_in_its_own_words(monkeypatch):
    def fail(device):
        raise RuntimeError("PTXAS error:\nno kernel image")

    monkeypatch.setattr(kernels, "_pack", fail)
    monkeypatch.setattr(kernels, "_adam", lambda device: "")
    monkeypatch.setattr(kernels, "calls", dict)
    pack, adam = kernels.check(CPU)
    assert (pack.verdict, pack.detail) == (FAILED, "RuntimeError: PTXAS error: no kernel image")
    assert adam.verdict == OK


def test_a_kernel_may_err_twice_as_much_as_the_reference_in_its_type():
    exact = torch.tensor([0.0, 1.0, -10.0])
    narrow = exact + torch.tensor([0.1, 0.0, 0.0])
    assert kernels.agrees(exact + torch.tensor([0.0, 0.0, 0.2]), narrow, exact)
    assert not kernels.agrees(exact + torch.tensor([0.0, 0.0, 0.21]), narrow, exact)
    assert kernels.agrees(exact + 0.0009, exact, exact) and not kernels.agrees(exact + 0.0011, exact, exact)
    assert not kernels.agrees(exact * torch.nan, narrow, exact)
