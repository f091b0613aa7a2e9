"""Distribution metrics of drawn pictures: Frechet and kernel distance of features, and diversity.

A figure depends on its features, so every result carries their name. Toy runs use a small network of the toy's own
(`sgg_fast/toy/features.py`), trained only for this. Their figures compare with each other, not with published ones. For
real data: torch-fidelity with the original Inception network. Letters: M pictures, D feature width, S seeds, G graphs.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from sgg_fast.digests import sha256s

PUBLISHED_PICTURES = 5000
"""Number of pictures on each side behind this field's published figures (Visual Genome's test split has 5 096)."""
IS_SPLITS = 10
INCEPTION_SHA256 = "6726825d"
"""Prefix of the hash of the published weights file; the file's name contains it too."""


def frechet_distance(a_MD: np.ndarray, b_MD: np.ndarray) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Heusel et al., 2017).

    The trace of the root comes from the eigenvalues of the symmetric A^(1/2) B A^(1/2), which are those of A B. Few
    pictures bias it upward: compare only figures of equally many pictures.
    """
    a_MD, b_MD = np.asarray(a_MD, np.float64), np.asarray(b_MD, np.float64)
    cov_a, cov_b = np.cov(a_MD, rowvar=False), np.cov(b_MD, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    shift = a_MD.mean(axis=0) - b_MD.mean(axis=0)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kernel_distance(a_MD: np.ndarray, b_MD: np.ndarray) -> float:
    """Squared maximum mean discrepancy under k(x, y) = (x.y / D + 1)^3 (Binkowski et al., 2018).

    It is unbiased, so it may be slightly negative; computed over all pairs at once.
    """
    a_MD, b_MD = np.asarray(a_MD, np.float64), np.asarray(b_MD, np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(a_MD) + within(b_MD) - 2 * kernel(a_MD, b_MD).mean())


def spread(features_SGD: np.ndarray) -> np.ndarray:
    """Mean pairwise distance between the S pictures of each graph, [G]; NaN for a single picture."""
    num_seeds = len(features_SGD)
    if num_seeds < 2:
        return np.full(features_SGD.shape[1], np.nan)
    pairs = [(i, j) for i in range(num_seeds) for j in range(i)]
    return np.mean([np.linalg.norm(features_SGD[i] - features_SGD[j], axis=-1) for i, j in pairs], axis=0)


def toy_distances(drawn_SGhwc: np.ndarray, real: np.ndarray, floor: np.ndarray) -> dict[str, float | str | int]:
    """Distances of drawn pictures, uint8 [S, G, H, W, 3], from as many real ones [S G, H, W, 3], in toy features.

    `floor`: as many real pictures again; their distance from `real` is the distance of perfect pictures.
    """
    from sgg_fast.toy.features import load_features

    network = load_features()
    flat = drawn_SGhwc.reshape(-1, *drawn_SGhwc.shape[2:])
    drawn_MD, real_MD, floor_MD = (network.read(images) for images in (flat, real, floor))
    return {
        "features": network.name,
        "pictures a side": len(flat),
        "FID (toy features)": frechet_distance(drawn_MD, real_MD),
        "FID floor, real against real": frechet_distance(floor_MD, real_MD),
        "KID (toy features)": kernel_distance(drawn_MD, real_MD),
        "KID floor, real against real": kernel_distance(floor_MD, real_MD),
    }


def check_inception(weights: Path, num_drawn: int, num_real: int) -> list[str]:
    """Warnings to print beside the figures. Raises ValueError if no figure is possible; computes nothing yet."""
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--inception needs torch-fidelity ({error}): pip install 'sgg_fast[eval]' where torch has its CUDA build"
        ) from error
    if min(num_drawn, num_real) < 2:
        raise ValueError(
            f"--inception: {num_drawn} drawn and {num_real} real pictures; FID needs two of each at least: raise --num"
        )
    warnings = []
    if min(num_drawn, num_real) < PUBLISHED_PICTURES:
        warnings.append(
            f"FID of {num_drawn} drawn and {num_real} real pictures: published figures take {PUBLISHED_PICTURES} or "
            "more of each, and FID falls with their number; compare only figures of as many"
        )
    if num_drawn < IS_SPLITS:
        warnings.append(f"IS is left out: it needs {IS_SPLITS} drawn pictures at least, one for each of its parts")
    if not sha256s(weights.parent, [weights.name])[weights.name].startswith(INCEPTION_SHA256):
        warnings.append(
            f"{weights} is not the published Inception network (its SHA-256 does not begin with {INCEPTION_SHA256}): "
            "these figures compare with no published ones"
        )
    return warnings


class _Pictures(Dataset):
    """uint8 [3, H, W] of each picture of a list, as torch-fidelity takes them."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1)


def inception_distances(drawn: np.ndarray, real: np.ndarray, weights: Path) -> dict[str, float | str | int]:
    """FID and IS of these pictures, uint8 [M, H, W, 3] each, by torch-fidelity.

    weights: file of the original Inception network. Raises ValueError where `check_inception` does, and for a file that
    is not this network.
    """
    check_inception(weights, len(drawn), len(real))
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity itself would run a pickle's code
        import torch_fidelity

        found = torch_fidelity.calculate_metrics(
            input1=_Pictures(drawn),
            input2=_Pictures(real),
            isc=len(drawn) >= IS_SPLITS,
            isc_splits=IS_SPLITS,
            fid=True,
            cuda=torch.cuda.is_available(),
            feature_extractor_weights_path=str(weights),
            save_cpu_ram=True,  # no worker processes
            verbose=False,
        )
    except Exception as error:  # border
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--inception {weights}: torch-fidelity cannot use it: {reason}; download it again") from error
    return {
        "features": f"Inception 2015-12-05, {weights.name}",
        "drawn pictures": len(drawn),
        "real pictures": len(real),
        "FID": float(found["frechet_inception_distance"]),
        "IS": float(found.get("inception_score_mean", math.nan)),
        "IS standard deviation": float(found.get("inception_score_std", math.nan)),
    }
