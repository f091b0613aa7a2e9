"""`benchmarks.aot.ptx.host`: launches on tensors' memory, tables of addresses, and what launchers have not written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.aot.programs import DOUBLED, at_lane, compiled, entry, geglu_on_the_machine

from benchmarks.aot.ptx.host import Fresh, Host, Living, _holds, _parameters
from benchmarks.aot.ptx.program import PtxError, digest
from benchmarks.aot.rules import in_fresh_process

TEXT = entry(DOUBLED, 4)
SIGNATURE = {"x_ptr": "*i32", "out_ptr": "*i32", "BLOCK": "constexpr"}


def test_a_launch_runs_on_the_memory_of_its_tensors():
    """A program is read once, and named by its digest; another text is another program."""
    host, (kernel, made) = Host("sm_89"), compiled(TEXT, SIGNATURE)
    x = torch.arange(64, dtype=torch.int32)
    out = torch.zeros(70, dtype=torch.int32)
    host.run(kernel, made, (2,), (x, out), {"BLOCK": 32})
    assert out.tolist() == [2 * n for n in range(64)] + [0] * 6
    host.run(kernel, made, (1, 1), (out, x, 32), {})
    assert x.tolist() == [4 * n for n in range(32)] + list(range(32, 64))
    name = digest(TEXT, 0)
    assert host.launches == 2 and host.launched == {name} and host.names == {name: "hand_kernel"}
    other, changed = compiled(TEXT.replace("shl.b32 %r5, %r5, 1", "shl.b32 %r5, %r5, 2"), SIGNATURE)
    assert host.text_of(changed) != TEXT
    assert host.program_of(kernel, made)[1] is host.kernels[name]
    assert host.program_of(other, changed)[0] != name and len(host.kernels) == 2


def test_a_sample_of_the_programs_runs():
    host, (kernel, made) = Host("sm_89", check=False), compiled(TEXT, SIGNATURE)
    host.sample = 2
    x, out = torch.ones(5, 32, dtype=torch.int32), torch.zeros(5, 32, dtype=torch.int32)
    host.run(kernel, made, (5,), (x, out), {"BLOCK": 32})
    assert out[:, 0].tolist() == [2, 0, 0, 0, 2]


def test_faults_name_the_kernel_and_are_told_once():
    host, (kernel, made) = Host("sm_89"), compiled(TEXT, SIGNATURE)
    x, out = torch.ones(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    with pytest.raises(PtxError, match="outside of every buffer"):
        host.run(kernel, made, (2,), (x, out), {})
    host.fresh.add(x)
    with pytest.raises(PtxError, match=r"^hand_kernel \(sm_89\): line \d+ .* nothing wrote in x_ptr \(1 times\)$"):
        host.run(kernel, made, (1,), (x, out), {})
    assert not host.program_of(kernel, made)[1].notes
    host.fresh.forget()
    host.run(kernel, made, (1,), (x, out), {})


def test_memory_is_fresh_until_a_kernel_writes_it():
    host, (kernel, made) = Host("sm_89"), compiled(TEXT, SIGNATURE)
    x, out = torch.ones(32, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    host.fresh.add(out)
    host.run(kernel, made, (1,), (x, out), {})
    host.run(kernel, made, (1,), (out, x), {})
    assert x.tolist() == [4] * 32
    fresh = Fresh()
    for nothing in (torch.empty(0), torch.empty(4, device="meta")):
        fresh.add(nothing)
    assert not fresh.tensors and not fresh.written


def test_tensors_behind_a_table_of_addresses_are_found():
    body = "\tld.global.b64 %rd9, [%rd1];\n" + at_lane(4, "%rd9", "%rd10") + at_lane(4, "%rd2", "%rd11")
    text = entry(body + "\tld.global.b32 %r5, [%rd10];\n\tst.global.b32 [%rd11], %r5;", 4)
    host, (kernel, made) = Host("sm_89"), compiled(text, SIGNATURE)
    x, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    host.run(kernel, made, (1,), (torch.tensor([x.data_ptr()]), out), {})
    assert torch.equal(out, x)
    array, living = np.zeros(32, "i4"), Living()
    with pytest.raises(PtxError, match="outside of every buffer"):
        host.run(kernel, made, (1,), (torch.tensor([array.ctypes.data]), out), {})
    part, base = x[4:8], x.data_ptr()
    assert living.at(part.data_ptr()) == living.at(base + 127) == _holds(x, base) == (base, 128)
    assert _holds(part, base + 128) is None and living.at(1) is None


def test_arguments_by_their_types():
    """Constants of the compiler are left out, floats are bits, and two scratch pointers follow."""
    signature = {"x_ptr": "*fp32", "N": "constexpr", "rate": "fp32", "num": "i32"}
    kernel, made = compiled(TEXT, signature)
    x = torch.zeros(4)
    values, tensors = _parameters(kernel, made, (x, 5, 1.5), {"num": -3})
    assert values == [x.data_ptr(), 0x3FC00000, -3, 0, 0] and values[1].dtype == np.uint32
    assert [(name, t is x) for name, t in tensors] == [("x_ptr", True)]
    with pytest.raises(PtxError, match="argument num of type i32 is not known"):
        _parameters(kernel, made, (x, 5, 1.5), {"num": "many"})


def test_launches_of_triton_are_taken_over_and_given_back():
    found = in_fresh_process(geglu_on_the_machine, "sm_89")
    assert found == {
        "kernels": ["geglu_fwd_kernel"],
        "launches": 2,
        "off by": pytest.approx(0, abs=1e-6),
        "fresh": 2,
        "given back": True,
    }
