"""What the graph kernels share: block sizes, runs cut in chunks at every border, and sums of columns.

Each case of `RUNS` is what a chunk can meet; `test_drawn_graphs_cut_into_tiny_chunks` draws what nobody thought of.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sgg_kernels import segments
from support.cases.graph import OPS, batch_of, compare, randn
from support.kernels.graph_checks import cut_in_chunks

from sgg_fast.graph import SceneGraphBatch

CHUNK = 4

RUNS: dict[str, list[tuple[int, int]]] = {
    "start_at_a_chunk": [(4, 4), (4, 4)],
    "exactly_k_chunks": [(8, 4), (4, 8)],
    "one_row_short": [(3, 4), (7, 7), (1, 0)],
    "one_row_long": [(5, 4), (4, 5)],
    "role_changes_in_a_chunk": [(2, 2), (6, 6), (2, 2)],
    "role_changes_at_a_chunk": [(4, 8), (8, 4)],
    "adjacent_hubs": [(12, 12), (12, 12)],
    "empty_rows_at_a_border": [(4, 0), (0, 0), (0, 4), (0, 0), (4, 4)],
    "empty_ends": [(0, 0), (5, 5), (0, 0)],
    "all_one_object": [(13, 13)],
    "last_chunk_is_partial": [(1, 0), (0, 1), (4, 0), (0, 4), (1, 1)],
    "more_partials_than_a_block": [(60, 0), (0, 60), (1, 1)],
}
"""By what a chunk of CHUNK messages meets: how many relations each object is subject and object of."""


def batch_of_runs(runs: list[tuple[int, int]]) -> SceneGraphBatch:
    """One graph; the first object's relations go to the last objects first."""
    subject, object_ = (np.repeat(np.arange(len(runs)), [run[role] for run in runs]) for role in (0, 1))
    return batch_of(subject, object_[::-1].copy(), [(len(runs), len(subject))])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("op", OPS)
def test_runs_against_chunk_borders(op, name, device, poisoned, monkeypatch):
    cut_in_chunks(monkeypatch, CHUNK)
    compare(op, batch_of_runs(RUNS[name]), 3, torch.float32, device)


@pytest.mark.parametrize("op", ["gather_add_relu", "scatter_mean_residual", "triple_context"])
def test_runs_around_the_first_block(op, device, poisoned):
    """Every run length from 0 to 22, in both roles."""
    lengths = np.arange(23)
    long = np.repeat(lengths, lengths)
    other = np.zeros_like(long)
    batch = batch_of(np.concatenate([long, other]), np.concatenate([other, long]), [(23, 2 * len(long))], 0)
    compare(op, batch, 16, torch.float32, device)


@st.composite
def drawn_batches(draw):
    """Up to three graphs of up to six objects and twelve relations, zero among them; ends in any order."""
    sizes, subject, object_, first = [], [], [], 0
    for i in range(draw(st.integers(1, 3))):
        num_n = draw(st.integers(i == 0, 6))
        num_e = draw(st.integers(0, 12)) if num_n else 0
        node = st.integers(first, first + max(num_n, 1) - 1)
        subject += draw(st.lists(node, min_size=num_e, max_size=num_e))
        object_ += draw(st.lists(node, min_size=num_e, max_size=num_e))
        sizes.append((num_n, num_e))
        first += num_n
    return batch_of(np.asarray(subject, np.int64), np.asarray(object_, np.int64), sizes, draw(st.integers(0, 9)))


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=drawn_batches(), chunk=st.sampled_from([1, 2, 3, 5]))
def test_drawn_graphs_cut_into_tiny_chunks(op, monkeypatch, poisoned, batch, chunk):
    """Runs of every length against every chunk boundary."""
    cut_in_chunks(monkeypatch, chunk)
    compare(op, batch, 16 if chunk == 5 else 3, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")


def test_chunk_size_is_a_rule_of_shapes():
    sizes = [segments.chunk_size(num) for num in (0, 1, 512, 1024)]
    assert sizes == [0, 0, 0, 0], "up to the worst-case bucket of the paper's batch nothing is split"
    for num in (1025, 10**4, 10**6, 10**7, 2**31 - 2):
        chunk = segments.chunk_size(num)
        assert 64 <= chunk <= 1024 and chunk & (chunk - 1) == 0 and chunk <= num


def test_rows_are_few_where_their_width_rules_wide_loads_out():
    """Triton proves alignment from multiples of 16 only: at D = 120 sixteen rows at a time spilled 56 bytes."""
    blocks = {d: segments.run_options(60, d, 2, fp32_residual=True)["BLOCK_M"] for d in (112, 120, 128, 77)}
    assert blocks[112] == blocks[128] == 8 and blocks[120] == blocks[77] == 2


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [1, 3, 77, 512, 520, 4096])
@pytest.mark.parametrize("num_rows", [0, 1, 60, 10**5])
def test_blocks_are_what_a_gpu_takes(num_rows, width, itemsize):
    """Powers of two, as `tl.arange` asks; a block of 1,024 threads at most, whose registers an SM has."""
    runs = segments.run_options(num_rows, width, itemsize)
    tiles = segments.tile_options(num_rows, width, itemsize)
    head = segments.head_rows(runs)
    for size in (*runs.values(), *tiles.values()):
        assert size > 0 and (size & (size - 1) == 0 or size == runs["maxnreg"])
    assert runs["BLOCK_D"] == tiles["BLOCK_D"] == segments.width_block(num_rows, width)
    assert width <= runs["BLOCK_D"] or runs["BLOCK_D"] >= 128, "a narrow row is one block"
    assert head < runs["BLOCK_M"] and head & (head - 1) == 0
    assert runs["num_warps"] <= 32 and 32 * runs["num_warps"] * runs["maxnreg"] <= 2**16


def test_rows_are_copied_only_where_elements_lie_apart():
    x = randn(0, 5, 12)
    for view in (x, x[:, 3:9], x[::2], x[:, 4:5].expand(5, 1)):
        assert segments.as_rows(view).data_ptr() == view.data_ptr(), "any row stride is taken"
    for view in (x.mT, x[:, ::2], x[:, :1].expand(5, 4)):
        found = segments.as_rows(view)
        assert found.stride(-1) == 1 and torch.equal(found, view)


def test_there_is_a_partial_for_each_whole_chunk():
    like = torch.zeros(1)
    shapes = [segments.chunk_partials(num, chunk, 6, like).shape for num, chunk in ((7, 0), (7, 8), (8, 8), (31, 8))]
    assert shapes == [(0, 6), (0, 6), (1, 6), (3, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "width", "rows"), [(0, 5, 128), (1, 1, 128), (300, 33, 128), (70, 130, 32)])
def test_column_sum(num_rows, width, rows, dtype, device, poisoned):
    """Against float64, rounded once to the dtype asked for; no rows give 0."""
    x = randn(0, num_rows, width).to(device)
    found = segments.column_sum(x, dtype, rows)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found, x.double().sum(0).to(dtype), rtol=tolerance, atol=1e-5)
