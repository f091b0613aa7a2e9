"""Bootstrap intervals, distances between crowds of pictures and what is written: against formulas written out."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from sgg_fast.eval import bootstrap, distances, report
from sgg_fast.graph import SceneGraph


def test_the_interval_of_one_seed_is_that_of_independent_graphs():
    values = np.random.default_rng(0).normal(0.4, 1.0, (1, 400))
    found = bootstrap.estimate(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_what_seeds_have_in_common_widens_the_interval():
    rng = np.random.default_rng(1)
    per_seed = rng.normal(0.0, 1.0, (8, 1)) + rng.normal(0.0, 0.1, (8, 50))
    found = bootstrap.estimate(per_seed)
    naive = 1.96 * per_seed.std() / math.sqrt(per_seed.size)
    assert found.high - found.low > 3 * 2 * naive
    same = bootstrap.estimate(per_seed)
    assert (same.low, same.high) == (found.low, found.high), "a pure function"


def test_what_is_not_there_is_left_out_of_the_mean():
    values = np.array([[1.0, np.nan, 0.0], [np.nan, np.nan, 1.0]])
    assert bootstrap.estimate(values).mean == pytest.approx(2 / 3)
    assert math.isnan(bootstrap.estimate(np.full((2, 3), np.nan)).mean)
    assert math.isnan(bootstrap.estimate(np.empty((0, 0))).mean)


def test_pairing_finds_a_difference_that_graphs_would_hide():
    rng = np.random.default_rng(2)
    hardness = rng.normal(0.0, 1.0, (3, 60))
    a, b = hardness + 0.1 + rng.normal(0, 0.05, (3, 60)), hardness
    paired = bootstrap.difference(a, b)
    assert paired.low > 0.05
    assert bootstrap.estimate(a).low < bootstrap.estimate(b).high, "unpaired, they overlap"
    with pytest.raises(ValueError, match="not the same seeds and graphs"):
        bootstrap.difference(a, b[:2])


def test_frechet_distance_of_gaussians_with_known_moments():
    """Samples whose sample moments are exact: the distance is then a formula in numbers."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(500, 3))
    white = (raw - raw.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False)).T)
    a, b = white * [1.0, 2.0, 3.0], white * [2.0, 2.0, 1.0] + [1.0, 0.0, -2.0]
    # Diagonal covariances: sum of squared differences of standard deviations, plus the shift's square.
    assert distances.frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4)
    assert distances.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_correlated_features_by_the_unsymmetric_root():
    """Eigenvalues of A B itself, which numpy finds without the symmetric detour."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert distances.frechet_distance(a, b) == pytest.approx(expected)


def test_kernel_distance_by_loops():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(7, 4)), rng.normal(size=(5, 4)) + 0.5

    def k(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    within_a = sum(k(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    within_b = sum(k(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    across = sum(k(x, y) for x in a for y in b) / 35
    assert distances.kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across)


def test_kernel_distance_is_unbiased_where_both_sides_are_alike():
    rng = np.random.default_rng(7)
    found = [distances.kernel_distance(*rng.normal(size=(2, 40, 3))) for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(len(found))
    assert min(found) < 0


def test_diversity_is_nothing_for_a_model_that_repeats_itself():
    rng = np.random.default_rng(8)
    real, drawn = rng.normal(size=(50, 8)), rng.normal(size=(1, 30, 8))
    assert distances.diversity(np.concatenate([drawn, drawn]), real) == 0.0
    assert distances.diversity(rng.normal(size=(3, 30, 8)), real) == pytest.approx(1.0, abs=0.15)
    assert math.isnan(distances.diversity(drawn, real))


def test_inception_names_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--inception .*nothing.pth: there is no such file"):
        distances.inception_distances(tmp_path, tmp_path, tmp_path / "nothing.pth")
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install 'sgg_fast\[eval\]'"):
        distances.inception_distances(tmp_path, tmp_path, weights)


def test_tables_and_json_say_what_is_not_there(tmp_path):
    text = report.table({"a": {"x": 0.12345, "n": 3}, "b": {"x": math.nan}}, "row").splitlines()
    assert [cell.strip() for cell in text[0].split("|")] == ["", "row", "x", "n", ""]
    assert [cell.strip() for cell in text[2].split("|")] == ["", "a", "0.123", "3", ""]
    assert [cell.strip() for cell in text[3].split("|")] == ["", "b", "-", "-", ""]
    report.write_json(tmp_path / "x.json", {"a": math.nan, "b": np.array([[1.5, math.nan]]), "c": np.int64(3)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [[1.5, None]], "c": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_contact_sheet_holds_every_picture_beside_its_graph(tmp_path):
    graph = SceneGraph(("dog", "house"), ((0, "left of", 1),))
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    cells = [(graph, {"drawn": np.full((64, 64, 3), colour, np.uint8)}) for colour in colours]
    report.contact_sheet(tmp_path / "sheet.png", cells)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)
    for colour in colours:
        assert (pixels == colour).all(axis=1).sum() == 192 * 192
