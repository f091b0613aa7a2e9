"""Counted launches and bytes of every form, and the table that holds them."""

from __future__ import annotations

import torch
from support import pinned
from support.cases.benchmark import small_case

from benchmarks.counts import kernels as counts
from benchmarks.ops import registry


def test_counter_sees_operators_and_bytes():
    def form(given, tensors):
        return (tensors["rows"].t().contiguous()[given.index["relation_graph"][:3]].relu(),)

    given = registry.inputs(small_case("graph_mean"), "cpu")
    rows, (counter,) = given.tensors["rows"], counts.observe(form, given, backward=False)
    assert dict(counter.names) == {"clone": 1, "index": 1, "relu": 1}
    taken = 3 * rows.shape[0] * 4
    assert counter.count() == counts.Count(3, 2 * rows.nbytes + (2 * taken + 3 * 8) + 2 * taken)


@pinned
def test_kernels_readme_holds_the_counted_table():
    assert counts.TABLE.committed() == counts.TABLE.section(), "run: python -m benchmarks.counts --write"


def test_an_operator_moves_what_it_touches():
    """Three rows of 16 bytes, by an index of 24, out of or into a table of five."""
    table, rows, index = torch.empty(5, 4), torch.empty(3, 4), torch.empty(3, dtype=torch.int64)
    for name, arguments, outputs, expected in (
        ("index_select", [table, index], [rows], 2 * 48 + 24),
        ("index_add_", [table, index, rows], [table], 24 + 48 + 2 * 48),
        ("index_add", [table, index, rows], [table.clone()], 24 + 48 + 2 * 48 + 2 * 80),
        ("zeros_like", [table], [table.clone()], 80),
        ("add", [table, torch.empty(1, 4).expand(5, 4)], [table.clone()], 80 + 16 + 80),
    ):
        assert counts.operator_bytes(name, arguments, outputs) == expected, name


def test_counted_launches_do_not_run_and_ours_are_counted_in_both_passes():
    before = counts.os.environ.get("TRITON_INTERPRET", "0")
    forward, behind = counts.count_kernels("graph_mean", "vg2")
    assert forward.launches >= 1 and behind.launches >= 1 and forward.bytes > 0
    assert counts.os.environ["TRITON_INTERPRET"] == before, "the choice of kernels is put back"
    both = forward + behind
    assert (both.launches, both.bytes) == (forward.launches + behind.launches, forward.bytes + behind.bytes)
