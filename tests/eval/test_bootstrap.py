"""Bootstrap intervals, distances between crowds of pictures and what is written: against formulas written out."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
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


def test_pictures_that_repeat_themselves_have_no_spread():
    rng = np.random.default_rng(8)
    drawn = rng.normal(size=(1, 30, 8))
    assert (distances.spread(np.concatenate([drawn, drawn])) == 0.0).all()
    assert distances.spread(rng.normal(size=(3, 30, 8))).mean() == pytest.approx(4.0, abs=0.6)  # about sqrt(2 x 8)
    assert np.isnan(distances.spread(drawn)).all()


def test_inception_names_what_is_missing(tmp_path, monkeypatch):
    some = np.zeros((3, 8, 8, 3), np.uint8)
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install 'sgg_fast\[eval\]'"):
        distances.inception_distances(some, some, weights)


def test_what_inception_figures_lack_is_said_before_anything_is_drawn(tmp_path, monkeypatch):
    """Numbers only: the library is not asked yet."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"x")
    for drawn, real in ((1, 9), (9, 1)):
        with pytest.raises(ValueError, match=f"{drawn} drawn and {real} real pictures; FID needs two of each"):
            distances.check_inception(weights, drawn, real)
    few, no_is, other = distances.check_inception(weights, 9, 6000)
    assert "FID of 9 drawn and 6000 real pictures: published figures take 5000" in few
    assert "IS is left out" in no_is and "does not begin with 6726825d" in other
    monkeypatch.setattr(distances, "sha256s", lambda root, names: dict.fromkeys(names, "6726825d00"))
    assert distances.check_inception(weights, 5000, 5096) == []


@pytest.mark.slow
def test_fid_is_of_the_pictures_in_the_list_by_the_real_library(tmp_path):
    """torch-fidelity's own network, random weights: FID by hand from its features; a pickle's code is not run."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=Exception)
    weights = tmp_path / "random.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # its weights are a download away: those that it was made with instead
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **more: None)
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = inception.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), weights)
    rng = np.random.default_rng(0)
    drawn, real = (rng.integers(0, 255, (n, 64, 64, 3), dtype=np.uint8) for n in (4, 3))
    found = distances.inception_distances(drawn, real, weights)
    assert (found["drawn pictures"], found["real pictures"]) == (4, 3) and math.isnan(found["IS"])

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].double().numpy()

    assert found["FID"] == pytest.approx(distances.frechet_distance(features(drawn), features(real)), rel=1e-3)
    spoilt = bytearray(weights.read_bytes())
    for content in (b"", b"x" * 99, bytes(spoilt[: len(spoilt) // 2]), pickle.dumps(Payload(tmp_path / "executed"))):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"random\.pth: torch-fidelity cannot use it: [^\n]+; download it again$"):
            distances.inception_distances(drawn, real, weights)
    assert not (tmp_path / "executed").exists()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


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
