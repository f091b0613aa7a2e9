"""Finds the objects in a toy picture: a dense network trained on the world's exact masks, and a count of its votes.

Every pixel predicts its category, the colour of its object and the object's whole box, hidden parts included; pixels of
one category that agree on a box are one instance. So it finds a hat on a head, and two sheep that overlap. It is not
part of the model: it judges pictures (`sgg_fast/eval`). It is trained only on drawn scenes that did not pass through
the autoencoder, so its results on the autoencoder's pictures are informative.

Letters: B pictures, K categories, P colours, H = W = size in pixels. Boxes: x0 y0 x1 y1 in picture units, y down.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from sgg_fast.data.cache import to_pixels
from sgg_fast.eval.detector import Instance, overlaps
from sgg_fast.nn.loading import load_weights
from sgg_fast.toy import world
from sgg_fast.toy.fit import fit
from sgg_fast.toy.layout import BACKDROPS
from sgg_fast.toy.models import WEIGHTS
from sgg_fast.toy.world import HELD_OUT_SEED, TRAIN_SEED

CATEGORIES, COLOURS = world.OBJECTS, world.COLOURS
UNNAMED = 255
"""Colour of an object whose name has none; excluded from the loss."""
SAME_BOX = 0.5
"""Least intersection over union of the boxes of votes for one instance."""
MIN_VOTES = 4
"""Least number of pixels of an instance."""
MIN_CONFIDENCE = 0.5
"""Mean probability of an instance's category over its pixels."""
MIN_SEEN = 0.12
"""Least share of its box that an instance's pixels fill."""
MOST = 0.7
"""An instance is part of a larger one of its category if at least this share of its box lies within that one."""
_GROUNDS = {*itertools.chain(*BACKDROPS.values())}
"""Categories of which a picture has at most one instance."""
_MAX_VOTERS = 100


class _Block(nn.Module):
    """Two 3x3 convolutions with a residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class ToyDetector(nn.Module):
    """A small U-Net from pixels [B, 3, H, W] in -1..1 to three outputs.

    They are category [B, K, H, W] and colour [B, P, H, W] logits, and the distances [B, 4, H, W] from each pixel to the
    left, upper, right and lower side of its object's box, in picture units. H must be a multiple of 16. It works at
    half resolution and below; the last map holds 2 x 2 pixels.
    """

    WIDTHS = (32, 48, 80, 96)

    def __init__(self) -> None:
        super().__init__()
        w = self.WIDTHS
        self.stem = nn.Conv2d(12, w[0], 3, padding=1)
        self.down = nn.ModuleList(_Block(n) for n in w)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in itertools.pairwise(w))
        self.up = nn.ModuleList(_Block(n) for n in w[:-1])
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(w))
        self.head = nn.Sequential(
            nn.GroupNorm(8, w[0]),
            nn.SiLU(),
            nn.Conv2d(w[0], 4 * (len(CATEGORIES) + len(COLOURS) + 4), 1),
        )

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.stem(functional.pixel_unshuffle(pixels, 2))
        kept = []
        for level, block in enumerate(self.down):
            x = block(x)
            if level < len(self.shrink):
                kept.append(x)
                x = self.shrink[level](x)
        for level in reversed(range(len(self.up))):
            grown = functional.interpolate(self.grow[level](x), scale_factor=2.0)
            x = self.up[level](grown + kept[level])
        out = functional.pixel_shuffle(self.head(x), 2)
        category, colour, sides = out.split([len(CATEGORIES), len(COLOURS), 4], dim=1)
        return category, colour, sides

    @torch.no_grad()
    def find(self, images: np.ndarray, batch_size: int = 64) -> list[list[Instance]]:
        """The instances of each picture, uint8 [B, H, W, 3]."""
        found = []
        for start in range(0, len(images), batch_size):
            category, colour, sides = self(to_pixels(images[start : start + batch_size]))
            boxes = boxes_of(sides).permute(0, 2, 3, 1).numpy()
            share, colour = category.softmax(dim=1).numpy(), colour.log_softmax(dim=1).numpy()
            found += [count_votes(*maps) for maps in zip(share, colour, boxes, strict=True)]
        return found


def boxes_of(sides: torch.Tensor) -> torch.Tensor:
    """Distances to the sides [B, 4, H, W] as boxes [B, 4, H, W]."""
    size = sides.shape[-1]
    centre = (torch.arange(size, device=sides.device) + 0.5) / size
    x, y = centre.expand(size, size), centre[:, None].expand(size, size)
    return torch.stack([x, y, x, y]) + sides * torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None, None]


def count_votes(share_KHW: np.ndarray, colour_PHW: np.ndarray, boxes_HW4: np.ndarray) -> list[Instance]:
    """Instances from category probabilities, colour log-probabilities and voted boxes.

    Per category, the vote that most others agree with takes their pixels; this repeats with the remaining pixels. Few
    votes for a large box, or for a box within one with more votes, come from the rim of an object and are dropped.
    """
    category_HW = share_KHW.argmax(axis=0)
    num_pixels, found = category_HW.size, []
    for k in np.unique(category_HW):
        rows, cols = np.nonzero(category_HW == k)
        kept: list[np.ndarray] = []
        while len(rows) >= MIN_VOTES:
            votes = boxes_HW4[rows, cols]
            agree = np.ones(len(rows), bool)
            if CATEGORIES[k] not in _GROUNDS:
                some = votes[:: -(-len(votes) // _MAX_VOTERS)]  # evenly spread, so the number of pairs stays small
                seed = some[(overlaps(some, some) >= SAME_BOX).sum(axis=1).argmax()]
                agree = overlaps(votes, seed[None])[:, 0] >= SAME_BOX
            if agree.sum() < MIN_VOTES:
                break
            r, c = rows[agree], cols[agree]
            rows, cols = rows[~agree], cols[~agree]
            box = np.median(votes[agree], axis=0).clip(0, 1).astype(np.float32)
            confidence = float(share_KHW[k, r, c].mean())
            seen = len(r) / num_pixels / max(float(np.prod(box[2:] - box[:2])), 1e-9)
            if confidence < MIN_CONFIDENCE or seen < MIN_SEEN or any(_covered(box, other) for other in kept):
                continue
            kept.append(box)
            mask = np.zeros(category_HW.shape, bool)
            mask[r, c] = True
            colour = COLOURS[colour_PHW[:, r, c].mean(axis=1).argmax()]
            found.append(Instance(CATEGORIES[k], colour, box, mask, confidence))
    return found


def _covered(box: np.ndarray, other: np.ndarray) -> bool:
    """Whether most of `box` lies within `other`."""
    shared = np.prod(np.maximum(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0.0))
    return bool(shared > MOST * np.prod(box[2:] - box[:2]))


SPOKEN_WEIGHTS = WEIGHTS / "detector_words.safetensors"
"""The detector of `toy-words`. The detector of `toy` stays, so older figures compare."""


def load_detector(path: Path = WEIGHTS / "detector.safetensors") -> ToyDetector:
    """The trained detector. Raises ValueError if its weights are missing or have another shape."""
    detector = ToyDetector()
    words = "detector_words --data-set toy-words" if path == SPOKEN_WEIGHTS else "detector"
    load_weights(path, detector, f"train it by `python -m sgg_fast.toy.build {words} --install`")
    return detector.requires_grad_(False).eval()


@dataclasses.dataclass(frozen=True)
class Targets:
    """Per-pixel targets of M scenes."""

    images: np.ndarray
    """uint8 [M, H, W, 3]."""
    category: np.ndarray
    """uint8 [M, H, W]."""
    colour: np.ndarray
    """uint8 [M, H, W], `UNNAMED` if the object's name has no colour."""
    boxes: np.ndarray
    """float16 [M, H, W, 4], the box of the object at the pixel."""
    weight: np.ndarray
    """float16 [M, H, W]: 1 / sqrt(visible pixels of its object), so a bird counts beside a sky."""


SPOKEN_KINDS: tuple[dict[str, bool], ...] = (
    {},
    {"spoken": True},
    {"spoken": True, "mixed": True},
    {"spoken": True, "held_out": True},
)
"""Scenes that the detector of `toy-words` sees in turn. It judges pictures of combinations that no model saw, so it
must know them: without the last two it found no dog in a boat, in real scenes either."""


def draw_targets(seed: int, num: int, spoken: bool = False) -> Targets:
    """The first `num` scenes of the world `seed`; with `spoken` in turn of `SPOKEN_KINDS`."""
    rows = []
    for i in tqdm(range(num), desc="draw", disable=None, leave=False):
        scene = world.draw_scene(seed, i, **(SPOKEN_KINDS[i % len(SPOKEN_KINDS)] if spoken else {}))
        owner_HW = scene.masks.argmax(axis=0)
        names = [name.split() for name in scene.graph.objects]
        category_N = np.array([CATEGORIES.index(words[-1]) for words in names], np.uint8)
        colour_N = np.array([COLOURS.index(w[0]) if len(w) > 1 else UNNAMED for w in names], np.uint8)
        weight_N = scene.masks.sum(axis=(1, 2)) ** -0.5
        per_thing = (category_N, colour_N, scene.boxes.astype(np.float16), weight_N.astype(np.float16))
        rows.append((scene.image, *(values[owner_HW] for values in per_thing)))
    return Targets(*(np.stack(column) for column in zip(*rows, strict=True)))


def _batch(targets: Targets, rng: np.random.Generator, size: int) -> list[torch.Tensor]:
    """`size` random scenes, half of them mirrored: pixels, category, colour, boxes [B, 4, H, W], weight."""
    chosen, mirrored = rng.integers(len(targets.images), size=size), rng.random(size) < 0.5
    columns = []
    for field in dataclasses.fields(targets):
        column = getattr(targets, field.name)[chosen]
        column[mirrored] = column[mirrored, :, ::-1]
        columns.append(column)
    images, category, colour, boxes, weight = columns
    x0, x1 = boxes[mirrored, ..., 0].copy(), boxes[mirrored, ..., 2].copy()
    boxes[mirrored, ..., 0], boxes[mirrored, ..., 2] = 1 - x1, 1 - x0
    pixels = to_pixels(images)
    # Light noise keeps the detector from relying on the drawing's exact values.
    grain = torch.from_numpy(rng.uniform(0.0, 0.08, (size, 1, 1, 1)).astype(np.float32))
    pixels = pixels + grain * torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return [
        pixels,
        torch.from_numpy(category).long(),
        torch.from_numpy(colour).long(),
        torch.from_numpy(boxes).float().permute(0, 3, 1, 2),
        torch.from_numpy(weight).float(),
    ]


def loss_terms(detector: ToyDetector, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weighted means over pixels: cross-entropy of category and of named colours, and two losses of the boxes.

    These are the absolute error (picture units, sum of the sides) and 1 - generalised IoU (Rezatofighi et al., 2019),
    which helps small objects.
    """
    pixels, category, colour, boxes, weight = batch
    category_logits, colour_logits, sides = detector(pixels)
    predicted, named = boxes_of(sides), weight * (colour != UNNAMED)
    colour = colour.where(colour != UNNAMED, 0)

    def mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (values * weight).sum() / weight.sum().clamp(min=1e-6)

    return {
        "category": mean(functional.cross_entropy(category_logits, category, reduction="none"), weight),
        "colour": mean(functional.cross_entropy(colour_logits, colour, reduction="none"), named),
        "box": mean((predicted - boxes).abs().sum(dim=1), weight),
        "iou": mean(1 - generalised_iou(predicted, boxes), weight),
    }


def generalised_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of boxes [B, 4, ...]: intersection over union minus the uncovered share of their common bounding box."""

    def area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (high - low).clamp(min=0).prod(dim=1)

    (a_low, a_high), (b_low, b_high) = a.chunk(2, dim=1), b.chunk(2, dim=1)
    shared = area(torch.maximum(a_low, b_low), torch.minimum(a_high, b_high))
    union = area(a_low, a_high) + area(b_low, b_high) - shared
    around = area(torch.minimum(a_low, b_low), torch.maximum(a_high, b_high))
    return shared / union.clamp(min=1e-6) - (around - union) / around.clamp(min=1e-6)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Accuracy of a detector on drawn scenes with known objects; category and box must match."""

    recall: float
    """Share of the objects that were found."""
    precision: float
    """Share of the instances that match an object."""
    colour: float
    """Share of the found objects with a named colour whose colour was read correctly."""
    missed: Counter[str]
    """Category -> its objects that were not found."""
    invented: Counter[str]
    """Category -> instances that match no object."""

    def __str__(self) -> str:
        worst = ", ".join(f"{name} {n}" for name, n in self.missed.most_common(6))
        extra = ", ".join(f"{name} {n}" for name, n in self.invented.most_common(6))
        return (
            f"recall {self.recall:.4f}, precision {self.precision:.4f}, colour {self.colour:.4f}"
            f" (missed: {worst or 'none'}; invented: {extra or 'none'})"
        )


def accuracy(detector: ToyDetector, scenes: list[world.Scene], images: np.ndarray | None = None) -> Accuracy:
    """Measure on the scenes' own pictures, or on `images` of the same scenes, uint8 [M, H, W, 3]."""
    found = detector.find(np.stack([scene.image for scene in scenes]) if images is None else images)
    num_things = num_found = num_named = num_right = 0
    missed: Counter[str] = Counter()
    invented: Counter[str] = Counter()
    for scene, instances in zip(scenes, found, strict=True):
        free = list(instances)
        for name, box in zip(scene.graph.objects, scene.boxes, strict=True):
            num_things += 1
            same = [i for i in free if i.category == name.split()[-1]]
            overlap = overlaps(box[None], np.array([i.box for i in same]).reshape(-1, 4))[0]
            if not same or overlap.max() < SAME_BOX:
                missed[name.split()[-1]] += 1
                continue
            best = same[int(overlap.argmax())]
            free = [i for i in free if i is not best]
            num_found += 1
            if " " in name:
                num_named += 1
                num_right += best.colour == name.split()[0]
        invented.update(i.category for i in free)
    num_instances = max(sum(map(len, found)), 1)
    return Accuracy(num_found / num_things, num_found / num_instances, num_right / max(num_named, 1), missed, invented)


def train_detector(out: Path, num_steps: int, num_scenes: int, spoken: bool = False) -> nn.Module:
    """The detector's moving average after `num_steps`; continues from `out` if possible. Monitored: held-out accuracy.

    spoken: train the detector of `toy-words`, which starts from the shipped one and uses scenes of `SPOKEN_KINDS`.
    """
    targets = draw_targets(TRAIN_SEED, num_scenes, spoken)
    kinds = SPOKEN_KINDS[1::2] if spoken else ({},)
    held_out = [world.draw_scene(HELD_OUT_SEED, i, **kinds[i % len(kinds)]) for i in range(200)]
    torch.manual_seed(0)
    detector = load_detector(SPOKEN_WEIGHTS).requires_grad_(True) if spoken else ToyDetector()

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        terms = loss_terms(detector, _batch(targets, np.random.default_rng([TRAIN_SEED, step]), 16))
        loss = terms["category"] + 0.3 * terms["colour"] + 2 * terms["box"] + terms["iou"]
        return loss, {name: float(term.detach()) for name, term in terms.items()}

    def look(ema: nn.Module, step: int) -> str:
        assert isinstance(ema, ToyDetector)
        return str(accuracy(ema, held_out))

    peak, every = (7e-4, 100) if spoken else (2e-3, 300)
    folder = out / ("detector_words" if spoken else "detector")
    return fit("detector", detector, loss_of, folder, num_steps, peak, ema_decay=0.998, look=look, look_every=every)
