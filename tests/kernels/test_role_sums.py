"""`role_sums`: sums of relation rows by subject and by object, against float64."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels import role_sums
from support.cases.graph import BATCHES, randn


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("most_programs", [2048, 3])
@pytest.mark.parametrize("name", ["unsorted", "empty_groups"])
def test_sums_by_role(name, most_programs, chunk, relu, device, poisoned, launched, monkeypatch):
    """Both sums, the product that the subject walk stores, and the programs' rows; in one stage and in two."""
    monkeypatch.setattr(role_sums, "chunk_size", lambda num_rows: chunk)
    monkeypatch.setattr(role_sums, "MAX_PARTIALS", most_programs)
    batch = BATCHES[name]().to(device)
    g, h = (randn(seed, batch.num_relations, 33).to(device) for seed in (0, 1))
    h[:, ::3] = 0
    sums = torch.full((batch.num_objects, 2 * 33), torch.nan, device=device)
    product, of_programs = role_sums.role_sums(
        g, h if relu else None, sums[:, :33], sums[:, 33:], batch.subject, batch.object, *batch.plan
    )
    assert launched == [*["role_sums_hub_kernel"] * bool(chunk), "role_sums_kernel"]
    assert len(of_programs) <= most_programs
    want = g.double() * (h > 0) if relu else g.double()
    exact = torch.zeros(batch.num_objects, 2 * 33, dtype=torch.float64, device=device)
    exact[:, :33].index_add_(0, batch.subject.long(), want)
    exact[:, 33:].index_add_(0, batch.object.long(), want)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_programs.double().sum(0), want.sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(product, want.float()) if relu else product is None
