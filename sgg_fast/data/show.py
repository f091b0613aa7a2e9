"""Shows a training set: `python -m sgg_fast.data.show DIR --n 16` writes a sheet of pictures, boxes and graphs.

DIR is a value of train.py --data: a prepared set, a cache (shown from its set, or from the pictures in the cache if
the set is missing), a folder of pictures with graphs beside them, "toy", "toy-rare", "toy-words", "toy-words-mixed",
"toy-words-crowded" or "toy-words-spread".
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import DRAWN_SETS, ConfigError, DataConfig
from sgg_fast.data.images import ImageError
from sgg_fast.data.sources import PairSource, open_source, stored_source
from sgg_fast.data.stored import StoredCache, is_cache
from sgg_fast.files import check_text
from sgg_fast.graph import SceneGraph
from sgg_fast.pictures.graph_picture import draw_graph
from sgg_fast.pictures.sheets import GAP, INK, font, padded, tiles, wrapped

SEED = 0
"""Seed of toy scenes."""
SIDE = 320
"""Side of a picture on the sheet in pixels."""
GRAPH = 420
"""Width of a graph on the sheet in pixels."""
HEAD = 22
SMALL, NORMAL = 12, 14
_COLUMNS = 2
_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 140, 44), (148, 103, 189), (200, 100, 10), (23, 150, 165),
            (190, 60, 140), (110, 85, 60), (90, 100, 30), (70, 70, 160), (130, 30, 60), (80, 80, 80))  # fmt: skip


def colour_of(k: int) -> tuple[int, int, int]:
    """Colour of object k on picture and graph; dark enough for white text."""
    return _COLOURS[k % len(_COLOURS)]


def open_for_show(data: str, split: str, resolution: int = SIDE, num_scenes: int = 256) -> tuple[PairSource, str]:
    """(set, title of its sheet). Raises `ConfigError`."""
    folder, asked = Path(data), DataConfig(source=data, resolution=resolution, num_scenes=num_scenes)
    if asked.is_drawn or not is_cache(folder):
        source = open_source(asked, SEED, split, check=False)
        return source, source.name
    stored = StoredCache(folder)
    prepared = dataclasses.replace(asked, **stored.index["settings"])
    origin = stored.index["data"]
    if origin in DRAWN_SETS or Path(origin).is_dir():
        seen = dataclasses.replace(prepared, resolution=resolution, source=origin)
        source = open_source(seen, SEED, stored.index["split"], check=False)
        return source, f"{folder}, a cache of {source.name}"
    source = stored_source(folder, prepared)
    return source, f"{folder}, a cache of {origin}, which is gone: no boxes, the pictures that the cache keeps"


def sheet(source: PairSource, title: str, indices: Sequence[int]) -> Image.Image:
    """Pictures with boxes, each beside its graph, in two columns."""
    cells = [cell(source, index) for index in indices]
    page = ImageOps.expand(tiles(cells, [""] * len(cells), _COLUMNS), (0, HEAD, 0, 0), "white")
    ImageDraw.Draw(page).text((GAP, GAP // 2), title, INK, font(NORMAL))
    return page


def cell(source: PairSource, index: int) -> Image.Image:
    """One sample: its number and file, the picture with the objects' boxes, the graph."""
    graph, place = source.graphs[index], source.place
    page = Image.new("RGB", (SIDE + GRAPH + GAP, SIDE + HEAD), "white")
    draw = ImageDraw.Draw(page)
    name = place(index % source.num_images).name if place else ""
    draw.text((0, 3), f"{index}  {name}".strip(), INK, font(SMALL))
    try:
        picture = Image.fromarray(source.load_image(index)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        boxes = source.boxes(index % source.num_images) * SIDE if source.boxes else None
    except ConfigError as error:
        picture, boxes = _unreadable(error.reason if isinstance(error, ImageError) else str(error)), None
    if boxes is not None:
        _draw_boxes(picture, graph.objects, boxes)
    page.paste(picture, (0, HEAD))
    page.paste(padded(graph_of(graph), (GRAPH, SIDE)), (SIDE + GAP, HEAD))
    return page


def graph_of(graph: SceneGraph) -> Image.Image:
    """The graph within `GRAPH` x `SIDE`; its objects have the numbers and colours of their boxes."""
    labels = [f"{k} {name}" for k, name in enumerate(graph.objects)]
    return draw_graph(graph, (GRAPH, SIDE), labels, [colour_of(k) for k in range(len(labels))])


def _unreadable(reason: str) -> Image.Image:
    """A grey picture with the reason as text."""
    picture = Image.new("RGB", (SIDE, SIDE), (225, 225, 225))
    for k, line in enumerate(wrapped(reason, SIDE - 40, NORMAL, most=8)):
        ImageDraw.Draw(picture).text((20, SIDE // 3 + 20 * k), line, INK, font(NORMAL))
    return picture


def _draw_boxes(picture: Image.Image, names: Sequence[str], boxes: np.ndarray) -> None:
    """Draw large boxes first, so that labels of small ones stay readable; labels move down to avoid overlap."""
    draw = ImageDraw.Draw(picture)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-area, kind="stable").tolist()
    taken: list[tuple[float, float, float, float]] = []
    for k in order:
        x0, y0, x1, y1 = boxes[k].tolist()
        # One white pixel on each side makes the frame visible on any background.
        frame = [x0, y0, max(x0 + 1, x1 - 1), max(y0 + 1, y1 - 1)]
        draw.rectangle([frame[0] - 1, frame[1] - 1, frame[2] + 1, frame[3] + 1], outline="white")
        draw.rectangle(frame, outline=colour_of(k), width=2)
    for k in order:
        x0, y0, _, _ = boxes[k].tolist()
        text = f"{k} {names[k]}"
        width, height = draw.textlength(text, font(SMALL)) + 6, SMALL + 5
        x = min(max(0, x0), SIDE - width)
        y = min(max(0, y0), SIDE - height)
        while y + 2 * height <= SIDE and any(
            x < r and x + width > a and y < b and y + height > t for a, t, r, b in taken
        ):
            y += 4
        taken.append((x, y, x + width, y + height))
        draw.rectangle([x, y, x + width, y + height], fill=colour_of(k))
        draw.text((x + 3, y + 1), text, "white", font(SMALL))


@command("show")
def main(argv: list[str] | None) -> None:
    """Exit code: 0 done, 2 for an unusable set or settings (one line on stderr)."""
    parser = OneLineParser(prog="python -m sgg_fast.data.show", description=__doc__)
    parser.add_argument("data", metavar="DIR", help="the set")
    parser.add_argument("--n", type=int, default=16, help="samples on the sheet (%(default)s)")
    parser.add_argument("--split", default="train", help="which split (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples (%(default)s)")
    parser.add_argument("--first", type=int, help="show N samples from this one on in place of a choice")
    parser.add_argument("--out", type=Path, default=Path("outputs/set.png"), help="the sheet (%(default)s)")
    args = parser.parse_args(argv)
    check_text(vars(args))
    if args.n < 1 or args.seed < 0:
        raise ConfigError("--n must be at least 1 and --seed not negative")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--out {args.out}: must end in .png or .jpg")
    source, title = open_for_show(args.data, args.split, num_scenes=args.n)
    num = len(source) if source.stored is None else len(source.stored.arrays["previews"])
    if args.first is None:
        chosen = np.sort(np.random.default_rng(args.seed).permutation(num)[: args.n]).tolist()
    elif 0 <= args.first < num:
        chosen = list(range(args.first, min(num, args.first + args.n)))
    else:
        raise ConfigError(f"--first {args.first}: the set has {num} samples")
    page = sheet(source, f"{title}: {len(chosen)} of {len(source)} samples", chosen)
    if source.turned:
        print(source.said_turned, file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(args.out)
    print(args.out)
