"""Published figures, for the table of `--protocol paper`. Nothing here was measured by this package.

FID (lower is better) and Inception Score (higher is better) by set and resolution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Cell = tuple[str, int]
"""Set and resolution in pixels."""

COCO, VG, LAION = "COCO-Stuff", "Visual Genome", "LAION-SG"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
"""The original Inception network of 2015-12-05 as torch-fidelity publishes it."""
TABLE_1 = "Table 1 of Wang et al., AAAI-25"


@dataclasses.dataclass(frozen=True)
class Published:
    """The figures of one method."""

    figures: Mapping[Cell, tuple[float, float | None]]
    """Cell -> (FID, IS); None for an IS that the source does not give."""
    source: str
    verified: bool
    """True if the figures were read in the publication itself."""
    note: str = ""


def _table_1(*values: float) -> Published:
    """A row of Table 1: FID and IS of COCO-Stuff 128 and 256, then of Visual Genome 128 and 256."""
    cells = [(name, side) for name in (COCO, VG) for side in (128, 256)]
    pairs = zip(values[::2], values[1::2], strict=True)
    return Published(dict(zip(cells, pairs, strict=True)), TABLE_1, verified=True)


PUBLISHED: dict[str, Published] = {
    "SG2IM": _table_1(93.3, 7.1, 99.1, 8.2, 82.7, 6.1, 90.5, 7.9),
    "PasteGAN": _table_1(70.7, 11.1, 79.1, 12.3, 61.2, 7.6, 66.5, 8.1),
    "WSGC": _table_1(108.6, 5.1, 121.7, 6.5, 80.4, 7.2, 84.1, 9.8),
    "SGDiff": _table_1(30.2, 14.6, 36.2, 17.8, 20.1, 11.4, 26.0, 16.4),
    "SGG-IG": _table_1(26.2, 19.3, 31.4, 22.5, 16.3, 15.2, 21.9, 20.4),
    "VAR-CLIP": Published(
        {(VG, 256): (56.45, 16.03)},
        "abstract of SATURN, arXiv 2508.14502",
        verified=False,
        note="SATURN's starting point; the abstract gives neither resolution (256 is VAR-CLIP's own) nor test images",
    ),
    "SATURN": Published(
        {(VG, 256): (21.62, 24.78)},
        "abstract of arXiv 2508.14502",
        verified=False,
        note="the abstract gives neither resolution (256 is VAR-CLIP's own) nor test images",
    ),
    "SDXL-SG": Published(
        {(LAION, 1024): (20.1, None)},
        "a public review that quotes tables 2 and 4 of LAION-Comp, the later version of LAION-SG (arXiv 2412.08580)",
        verified=False,
        note="on its own test images; there SG-IoU 0.558, entity IoU 0.884, relation IoU 0.856, read by a language "
        "model from the pictures; resolution assumed from SDXL; not comparable with the other columns",
    ),
}
