"""Distances between sets of pictures: against formulas written out, and what FID and IS are computed of."""

from __future__ import annotations

import math
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from sgg_fast.eval import distances
from sgg_fast.toy import world
from sgg_fast.toy.features import load_features


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


def test_the_inception_score_is_its_formula():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), 40)
    parts = [p[4 * k : 4 * k + 4] for k in range(10)]
    scores = [math.exp(np.mean([(x * np.log(x / part.mean(0))).sum() for x in part])) for part in parts]
    assert distances.inception_score(p) == pytest.approx((np.mean(scores), np.std(scores)))
    certain = np.full((40, 4), 1e-12) + np.tile(np.eye(4), (10, 1))
    assert distances.inception_score(certain)[0] == pytest.approx(4, rel=1e-3)
    assert all(math.isnan(x) for x in distances.inception_score(p[:9]))


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    """uint8 [36, 64, 64, 3]."""
    return np.stack([world.draw_scene(5, i).image for i in range(36)])


def test_toy_figures_are_of_the_drawn_pictures_and_stand_beside_their_floor(scenes):
    """Noise of two seeds against twelve scenes; the figures by hand from the features."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 6, 64, 64, 3), dtype=np.uint8)
    read = load_features().read
    found = distances.toy_distances(noise, scenes[:12], scenes[12:24])
    drawn, real, floor = read(noise.reshape(12, 64, 64, 3)), read(scenes[:12]), read(scenes[12:24])
    assert found["pictures a side"] == 12 and "toy features" in found["features"]
    assert found["FID (toy features)"] == pytest.approx(distances.frechet_distance(drawn, real))
    assert found["KID (toy features)"] == pytest.approx(distances.kernel_distance(drawn, real))
    assert found["FID floor, real against real"] == pytest.approx(distances.frechet_distance(floor, real))
    assert found["FID floor, real against real"] < 0.5 * found["FID (toy features)"]
    assert found["KID floor, real against real"] < 0.5 * found["KID (toy features)"]


def test_a_dry_run_compares_pictures_of_any_resolution(scenes):
    large = [world.draw_scene(5, i, size=128).image for i in range(12)]
    same, other = distances.toy_crowd(large, scenes[:12]), distances.toy_crowd(255 - scenes[:12], scenes[:12])
    assert same["FID"] < 0.2 * other["FID"], "the same scenes, twice as large, against negatives"
    own = distances.toy_crowd(scenes[:12], scenes[12:])
    read = load_features().read
    assert own["FID"] == pytest.approx(distances.frechet_distance(read(scenes[:12]), read(scenes[12:])))
    assert (own["drawn pictures"], own["real pictures"]) == (12, 24) and own["IS"] >= 1
    with pytest.raises(ValueError, match="--dry: 1 test graphs; FID needs two at least"):
        distances.toy_crowd(scenes[:1], scenes[:1])


def test_the_library_gets_every_picture_and_its_figures_come_back_by_name(tmp_path, monkeypatch):
    """A stand-in for torch-fidelity, which is not everywhere; `slow` runs the real one."""
    seen = []

    def calculate_metrics(input1, input2, isc, fid, **how):
        held = [np.stack([pictures[i].numpy() for i in range(len(pictures))]) for pictures in (input1, input2)]
        seen.append((*held, isc, fid, how["feature_extractor_weights_path"]))
        score = {"inception_score_mean": 3.0, "inception_score_std": 0.5} if isc else {}
        return {"frechet_inception_distance": 7.0, **score}

    library = types.ModuleType("torch_fidelity")
    library.calculate_metrics = calculate_metrics
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    rng = np.random.default_rng(0)
    drawn, real = (rng.integers(0, 256, (n, 8, 6, 3), dtype=np.uint8) for n in (distances.IS_SPLITS, 3))
    found = distances.inception_distances(drawn, real, weights)
    assert (found["FID"], found["IS"], found["IS standard deviation"]) == (7.0, 3.0, 0.5)
    assert (found["drawn pictures"], found["real pictures"]) == (10, 3)
    one, two, isc, fid, path = seen[0]
    assert (isc, fid, path) == (True, True, str(weights)) and one.dtype == np.uint8
    for row, column, channel in np.ndindex(8, 6, 3):
        assert (one[:, channel, row, column] == drawn[:, row, column, channel]).all()
        assert (two[:, channel, row, column] == real[:, row, column, channel]).all()
    few = distances.inception_distances(drawn[:9], real, weights)
    assert not seen[1][2] and math.isnan(few["IS"]) and few["FID"] == 7.0
