"""`benchmarks.aot.ptx.onchip`: shared and local memory, their bounds, and barriers that are missing."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from support.aot.programs import ARRIVED, COPIES, EXCHANGE, aligned, at_lane, run, words

from benchmarks.aot.ptx.memory import Access
from benchmarks.aot.ptx.onchip import Local, Shared
from benchmarks.aot.ptx.program import Instruction, PtxError

WIDTHS = [("", 8), ("", 16), ("", 32), ("", 64), (".v2", 16), (".v2", 32), (".v2", 64), (".v4", 8), (".v4", 16),
          (".v4", 32), (".v8", 32)]  # fmt: skip


@pytest.mark.parametrize(("vector", "width"), WIDTHS)
@pytest.mark.parametrize("space", ["global", "shared", "local"])
def test_every_width_of_every_memory(space, vector, width):
    """In through global memory, through `space`, and out again."""
    num = int(vector[2:] or 1)
    size = num * width // 8
    kind = {8: "rs", 16: "rs", 32: "r", 64: "rd"}[width]
    regs = ", ".join(f"%{kind}{50 + i}" for i in range(num))
    regs = f"{{{regs}}}" if num > 1 else regs
    one = aligned(np.random.default_rng(0).integers(0, 256, 32 * size, dtype="u1"))
    two = aligned(np.zeros_like(one))
    form = f"{vector}.b{width}"
    body = at_lane(size, "%rd1", "%rd10") + at_lane(size, "%rd2", "%rd11")
    body += f"\tld.global{form} {regs}, [%rd10];\n"
    if space == "shared":
        body += f"\tmul.lo.u32 %r9, %r1, {size};\n\tst.shared{form} [%r9], {regs};\n\tbar.sync 0;\n"
        body += f"\tld.shared{form} {regs}, [%r9];\n"
    elif space == "local":
        body += "\tmov.b64 %SPL, __local_depot0;\n\tcvta.local.u64 %SP, %SPL;\n\tadd.s64 %rd12, %SPL, 0;\n"
        body += f"\tst.local{form} [%rd12+32], {regs};\n\tld.local{form} {regs}, [%rd12+32];\n"
    body += f"\tst.global{form} [%rd11], {regs};"
    kernel = run(body, one, two, shared=32 * size, local=64)
    assert np.array_equal(one, two) and not kernel.notes


@pytest.mark.parametrize(
    ("body", "reason"),
    [("\tst.shared.b32 [%r6], %r1;", "outside of the 64 bytes"), ("\tst.shared.b32 [%r1], %r1;", "does not divide")],
)
def test_bounds_of_shared_memory(body, reason):
    with pytest.raises(PtxError, match=reason):
        run(f"\tshl.b32 %r6, %r1, 2;\n{body}", words(), shared=64)


def test_bounds_of_local_memory():
    with pytest.raises(PtxError, match="local memory"):
        run("\tmov.b64 %SPL, __local_depot0;\n\tst.local.b64 [%SPL+16], %rd1;", words(), local=16)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"wait": ""}, "unfinished copy"),
        ({"second": 1024}, "unfinished copy"),
        ({"barrier": ""}, "no barrier between"),
    ],
)
def test_a_copy_that_was_not_waited_for_is_found(changed, fault):
    """No wait, a wait for the group before, and a wait that orders only the thread's own copies."""
    x, out = words(512), aligned(np.zeros(256, "u4"))
    kernel = run(COPIES.format(**ARRIVED | changed), x, out, threads=64, shared=2048)
    assert fault in str(kernel.notes)


def test_a_barrier_orders_warps():
    x, out = words(64), aligned(np.zeros(64, "u4"))
    kernel = run(EXCHANGE.format(barrier="bar.sync 0;", other=128), x, out, threads=64, shared=256)
    assert np.array_equal(out, np.roll(x, 32)) and not kernel.notes


def test_a_missing_barrier_is_found():
    x, out = words(64), aligned(np.zeros(64, "u4"))
    kernel = run(EXCHANGE.format(barrier="", other=128), x, out, threads=64, shared=256)
    assert "no barrier between" in str(kernel.notes)
    kernel = run(EXCHANGE.format(barrier="", other=4), x, out, threads=64, shared=256)
    assert not kernel.notes, "within a warp"


def test_a_missing_barrier_before_the_next_write_is_found():
    body = EXCHANGE.format(barrier="bar.sync 0;", other=128) + "\n\tadd.s32 %r5, %r5, 1;\n\tst.shared.b32 [%r6], %r5;"
    kernel = run(body, words(64), aligned(np.zeros(64, "u4")), threads=64, shared=256)
    assert "over what another warp reads" in str(kernel.notes)


def test_memory_that_nothing_wrote_holds_poison_and_is_noted():
    """Until a copy arrives its place is poison too. The CTAs of a batch, and threads, have rows of their own."""
    notes: collections.Counter[str] = collections.Counter()
    inst = Instruction(None, "ld.shared.b32", (), 7, "hand.py:3:1")
    lanes = np.array([0, 1, 32, 33])
    access = Access(np.array([8, 12, 8, 12], "u4"), lanes, lanes // 32, 32, inst)
    shared = Shared(2, 20, True, notes)
    assert shared.load(access, 4, 1)[0].tolist() == [2**32 - 1] * 4
    shared.barrier()
    shared.store(access, [np.arange(4, dtype="u4")], 4)
    assert shared.load(access, 4, 1)[0].tolist() == [0, 1, 2, 3]
    assert notes.pop("line 7 (hand.py:3:1): ld.shared.b32 reads shared memory that nothing wrote") == 1 and not notes
    shared.begin_copy(access, 4)
    assert shared.load(access, 4, 1)[0].tolist() == [2**32 - 1] * 4
    assert any("unfinished copy" in note for note in notes)
    notes.clear()
    shared.end_copy(access, [np.arange(4, 8, dtype="u4")], 4)
    assert shared.load(access, 4, 1)[0].tolist() == [4, 5, 6, 7] and not notes
    local = Local(2, 32, 16, notes)
    mine = access.only(np.array([2, 3]))
    assert local.load(mine, 4, 1)[0].tolist() == [2**32 - 1] * 2
    assert "local memory that nothing wrote" in str(notes.popitem())
    local.store(mine, [np.array([8, 9], "u4")], 4)
    assert local.load(mine, 4, 1)[0].tolist() == [8, 9] and not notes
