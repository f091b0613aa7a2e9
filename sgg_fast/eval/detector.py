"""What a picture shows, by a detector: the toy's own for toy pictures, an open-vocabulary one for real pictures.

Letters: B pictures, N things asked for, H, W = size in pixels. Boxes: x0 y0 x1 y1 in picture units (0..1), y down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from sgg_fast.graph import SceneGraph
from sgg_fast.nn.clip import normalise_pixels


@dataclasses.dataclass(frozen=True)
class Instance:
    """One thing in a picture."""

    category: str
    colour: str | None
    """The likeliest, whatever the category; None where the detector reads none."""
    box: np.ndarray
    """float32 [4], hidden parts included where the detector guesses them."""
    mask: np.ndarray | None
    """bool [H, W], the pixels that show it; None where the detector gives boxes only."""
    confidence: float
    """0..1."""


class Detector(Protocol):
    """Finds instances; says how it reads a graph's names."""

    name: str
    """Printed beside every number."""

    def find(self, images: np.ndarray, graphs: Sequence[SceneGraph]) -> list[list[Instance]]:
        """The instances of each picture, uint8 [B, H, W, 3]; an open-vocabulary one looks for the graph's names."""
        ...

    def parse(self, name: str) -> tuple[str, str | None]:
        """Category and colour that a name of a graph asks for."""
        ...


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [N, 4] and [M, 4], as [N, M]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=-1)
    area_a, area_b = (np.prod(np.maximum(box[:, 2:] - box[:, :2], 0.0), axis=-1) for box in (a, b))
    return shared / np.maximum(area_a[:, None] + area_b[None] - shared, 1e-9)


class ToyWorldDetector:
    """The detector of `sgg_fast/toy/detector.py`: knows the toy's categories, and looks for all of them.

    spoken: the one that was trained on `toy-words` as well.
    """

    def __init__(self, spoken: bool = False) -> None:
        from sgg_fast.toy.detector import SPOKEN_WEIGHTS, load_detector

        self.name = "toy-words detector" if spoken else "toy detector"
        self.network = load_detector(SPOKEN_WEIGHTS) if spoken else load_detector()

    def find(self, images: np.ndarray, graphs: Sequence[SceneGraph]) -> list[list[Instance]]:
        return self.network.find(images)

    def parse(self, name: str) -> tuple[str, str | None]:
        words = name.split()
        return words[-1], words[0] if len(words) > 1 else None


class OpenVocabularyDetector:
    """OWL-ViT (Minderer et al., 2022) or OWLv2 of transformers: boxes for any name, neither masks nor colours.

    It is asked for the graph's own names, attributes included, so its precision is about those alone.
    `threshold`: least sigmoid score of a box; `same`: boxes of one name that overlap more (IoU) are one thing.
    """

    def __init__(self, place: str, threshold: float = 0.1, same: float = 0.5) -> None:
        from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoTokenizer

        if not Path(place).is_dir() and (place.startswith((".", "/", "~")) or place.count("/") != 1):
            raise ValueError(f"--detector {place}: there is no such folder, and it is not a hub id (owner/name)")
        try:
            kind = AutoConfig.from_pretrained(place).model_type
            if kind not in ("owlvit", "owlv2"):
                raise ValueError(f"it is a {kind}; OWL-ViT and OWLv2 are supported")
            self.model = AutoModelForZeroShotObjectDetection.from_pretrained(place, use_safetensors=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"--detector {place}: cannot be loaded: {reason}") from error
        self.name, self.threshold, self.same = f"{kind} {place}", threshold, same

    def parse(self, name: str) -> tuple[str, str | None]:
        return name, None

    @torch.no_grad()
    def find(self, images: np.ndarray, graphs: Sequence[SceneGraph]) -> list[list[Instance]]:
        found = []
        for image, graph in zip(images, graphs, strict=True):
            names = list(dict.fromkeys(graph.objects))
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                [f"a photo of a {name}" for name in names],
                padding="max_length", max_length=length, truncation=True, return_tensors="pt",
            )  # fmt: skip
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            out = self.model(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                pixel_values=normalise_pixels(self.model, pixels),
            )
            score_RN, (x, y, w, h) = out.logits[0].sigmoid(), out.pred_boxes[0].unbind(-1)
            boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1).clamp(0, 1).numpy()
            found.append(
                [
                    Instance(name, None, boxes[r], None, float(score_RN[r, n]))
                    for n, name in enumerate(names)
                    for r in self._distinct(boxes, score_RN[:, n].numpy())
                ]
            )
        return found

    def _distinct(self, boxes: np.ndarray, scores: np.ndarray) -> list[int]:
        """Boxes above the threshold, best first, without those that overlap a better one (non-maximum suppression)."""
        kept: list[int] = []
        for r in np.argsort(-scores):
            if scores[r] < self.threshold:
                break
            if not kept or overlaps(boxes[r][None], boxes[kept]).max() <= self.same:
                kept.append(int(r))
        return kept


def open_detector(which: str) -> Detector:
    """ "toy", "toy-words", or folder or hub id of an open-vocabulary detector. Raises ValueError naming --detector."""
    if which in ("toy", "toy-words"):
        return ToyWorldDetector(spoken=which == "toy-words")
    return OpenVocabularyDetector(which)
