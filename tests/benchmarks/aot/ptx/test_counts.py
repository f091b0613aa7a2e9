"""`benchmarks.aot.ptx.counts`: instructions by kind, sectors, bank conflicts and barriers of a launch."""

from __future__ import annotations

import numpy as np
import pytest
from support.aot.programs import EXCHANGE, aligned, at_lane, run, words

from benchmarks.aot.ptx.counts import KINDS, Requests, Row, Traffic, header, kind_of
from benchmarks.aot.ptx.kernel import Kernel
from benchmarks.aot.ptx.memory import Access
from benchmarks.aot.ptx.program import Instruction


def row_of(kernel: Kernel) -> Row:
    row = Row("hand")
    kernel.add_to(row)
    return row


@pytest.mark.parametrize(("stride", "sectors", "share"), [(4, 4, 1), (8, 8, 0.5), (32, 32, 0.125)])
def test_sectors_and_their_useful_share(stride, sectors, share):
    big = aligned(np.zeros(400, "u4"))
    body = at_lane(stride, "%rd1", "%rd10") + "\tld.global.b32 %r5, [%rd10];"
    loads = row_of(run(body, big, count=True)).loads
    assert (loads.requests, loads.sectors, loads.useful / (32 * loads.sectors)) == (1, sectors, share)


@pytest.mark.parametrize(("stride", "width", "passes", "least"), [(4, 32, 1, 1), (8, 32, 2, 1), (128, 32, 32, 1),
                                                                  (8, 64, 2, 2), (16, 64, 4, 2)])  # fmt: skip
def test_bank_conflicts(stride, width, passes, least):
    source = "%rd1" if width == 64 else "%r1"
    body = f"\tmul.lo.u32 %r5, %r1, {stride};\n\tst.shared.b{width} [%r5], {source};"
    shared = row_of(run(body, words(), shared=4096, count=True)).shared
    assert (shared.requests, shared.sectors, shared.useful) == (1, passes, least)


def test_instructions_by_kind_and_barriers():
    body = EXCHANGE.format(barrier="bar.sync 0;", other=128)
    kernel = run(body, words(64), aligned(np.zeros(64, "u4")), threads=64, shared=256, count=True)
    row = row_of(kernel)
    assert row.warps == 2 and row.barriers == 2
    assert {k: n // 2 for k, n in row.instructions.items() if n} == {
        "integer": 6, "global": 2, "shared": 2, "move": 4, "control": 2,
    }  # fmt: skip
    assert not Traffic().by_instruction and "hand" in row.line()


@pytest.mark.parametrize(
    ("op", "kind"),
    [("add.f32", "float"), ("fma.rn.bf16x2", "float"), ("add.s32", "integer"), ("div.full.f32", "special"),
     ("div.s32", "integer"), ("mad.lo.s32", "integer"), ("cvt.rn.f32.s32", "convert"), ("setp.lt.s32", "select"),
     ("ld.param.b64", "move"), ("mov.b32", "move"), ("ld.global.v4.b32", "global"), ("st.local.b32", "global"),
     ("cp.async.commit_group", "global"), ("st.shared.b32", "shared"), ("ldmatrix.sync", "shared"),
     ("shfl.sync.bfly.b32", "warp"), ("bra.uni", "control"), ("bar.sync", "control"), ("mma.sync", "matrix")],
)  # fmt: skip
def test_kinds_of_instructions(op, kind):
    assert kind_of(Instruction(None, op, (), 1, "")) == kind and kind in KINDS


def test_a_row_is_written_by_the_warp():
    """Two warps: 3 + 1 float, 20 integer instructions; 8 sectors in 2 requests, of which half the bytes are used."""
    row = Row("hand_kernel", warps=2, barriers=3)
    row.instructions |= {"float": 4, "integer": 20, "global": 2, "shared": 4}
    row.loads, row.shared = Requests(2, 8, 128), Requests(4, 10, 4)
    assert row.cells() == [
        "`hand`", "15", "2.0", "0.0", "10.0", "0.0", "1.0", "2.0", "0.0", "4.0", "50%", "", "", "1.50", "1.5",
    ]  # fmt: skip
    line = row.line()
    assert line.split() == ["hand_kernel", "15", "2.0", "0.0", "10.0", *["0.0"] * 3, "1.0", "2.0", *["0.0"] * 3,
                            "4.0", "50", "%", "-", "-", "1.50", "1.5"]  # fmt: skip
    ends = [header().index(word) + len(word) for word in ("all", "float", "integer", "matrix", "bank +", "bar")]
    assert [line[:end].split()[-1] for end in ends] == ["15", "2.0", "10.0", "0.0", "1.50", "1.5"], "under its name"


def test_sectors_that_are_touched_are_listed_once_a_request():
    traffic, inst = Traffic(), Instruction(None, "ld.global.b32", (), 1, "")
    lanes = np.arange(64)
    access = Access(np.array(64 + 4 * (lanes % 16), "u8"), lanes, lanes // 64, 64, inst)
    traffic.request("global", access, 4)
    assert traffic.touched is None
    traffic.touched = []
    traffic.request("global", access, 4)
    assert [sectors.tolist() for sectors in traffic.touched] == [[2, 3]]
    counted = traffic.by_instruction[inst]
    assert (counted.requests, counted.sectors, counted.useful) == (4, 8, 256), "of two launches of two warps"
