"""The detectors: the toy's own for toy pictures, an open-vocabulary one for real pictures.

Letters: B pictures, N requested objects, R boxes, H, W = size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sgg_fast.commands import NotFiniteError
from sgg_fast.data.cache import to_pixels
from sgg_fast.eval.detector import Detector, Instance, overlaps
from sgg_fast.graph import SceneGraph
from sgg_fast.nn import loading
from sgg_fast.nn.clip import normalise_pixels
from sgg_fast.toy.detector import SPOKEN_WEIGHTS, load_detector


class ToyWorldDetector:
    """The detector of `sgg_fast/toy/detector.py`; it looks for all categories of the toy.

    spoken: use the detector that was also trained on `toy-words`.
    """

    def __init__(self, spoken: bool = False) -> None:
        self.name = "toy-words detector" if spoken else "toy detector"
        self.network = load_detector(SPOKEN_WEIGHTS) if spoken else load_detector()

    def find(self, images: np.ndarray, graphs: Sequence[SceneGraph]) -> list[list[Instance]]:
        return self.network.find(images)

    def parse(self, name: str) -> tuple[str, str | None]:
        words = name.split()
        return words[-1], words[0] if len(words) > 1 else None


class OpenVocabularyDetector:
    """OWL-ViT (Minderer et al., 2022) or OWLv2 of transformers: boxes for any name, neither masks nor colours.

    It looks for the graph's own names, attributes included, so its precision is about those alone. `threshold`: least
    sigmoid score of a box; `same`: boxes of one name that overlap more (IoU) are one object.
    """

    def __init__(self, place: str, threshold: float = 0.1, same: float = 0.5) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

        root = loading.find_folder("--detector", place, ("",))
        with loading.border(f"--detector {place}: cannot be loaded"):
            kind = str(loading.read_json(root / "config.json", "config.json").get("model_type"))
            if kind not in ("owlvit", "owlv2"):
                raise loading.ModelError(f"it is a {kind}; OWL-ViT and OWLv2 are supported")
            with loading.border("its weights"):
                model, info = AutoModelForZeroShotObjectDetection.from_pretrained(
                    root, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
                )
                self.model = loading.loaded(model, info).eval()
            with loading.border("its tokenizer"):
                self.tokenizer = AutoTokenizer.from_pretrained(root)
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
            out = self.model(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                pixel_values=normalise_pixels(self.model, to_pixels(image[None])),
            )
            if not (out.logits.isfinite().all() and out.pred_boxes.isfinite().all()):
                raise NotFiniteError(f"--detector: {self.name} gives numbers that are not finite: get the model again")
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


def open_detector(which: str) -> Detector | None:
    """Open "toy", "toy-words", "none", or the folder or hub id of an open-vocabulary detector.

    Raises ValueError naming --detector.
    """
    if which == "none":
        return None
    if which in ("toy", "toy-words"):
        return ToyWorldDetector(spoken=which == "toy-words")
    return OpenVocabularyDetector(which)


def choose_detector(which: str | None, graphs: Sequence[SceneGraph]) -> tuple[str, str]:
    """The detector for these graphs, as `open_detector` takes it, and a warning, "" for none.

    Without --detector it is the toy's, if that knows every name of the graphs. Raises ValueError if it knows none of
    them, or if --detector is not given and it does not know all: its figures would be about other objects.
    """
    if which not in (None, "toy"):
        return which, ""
    from sgg_fast.toy.world import COLOURS, OBJECTS

    def is_known(name: str) -> bool:
        *before, category = name.split()
        return category in OBJECTS and (not before or (len(before) == 1 and before[0] in COLOURS))

    names = [name for graph in graphs for name in graph.objects]
    unknown = [name for name in names if not is_known(name)]
    if not unknown:
        return "toy", ""
    few = ", ".join(repr(name) for name in list(dict.fromkeys(unknown))[:3])
    reason = f"{len(unknown)} of {len(names)} objects have names that the toy detector does not know ({few})"
    if which is None or len(unknown) == len(names):
        raise ValueError(
            f"--detector: {reason}; give the folder or hub id of an OWL-ViT or OWLv2 (google/owlv2-base-patch16, say), "
            "or none to leave objects and relations unmeasured"
        )
    return "toy", f"--detector toy: {reason}: they count as missing, whatever the pictures show"
