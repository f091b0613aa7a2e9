"""Reads pictures from files, with a bound on their size. Pictures with ambiguous pixels are refused by name.

Letters: H, W height and width, R side of the training square, in pixels.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from sgg_fast.config import ConfigError
from sgg_fast.graph import shown

T = TypeVar("T")

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
RESIZE = ("squash", "crop")
"""squash: the whole picture, as in sg2im, so that no object of the graph is cut off; crop: the central square."""
_MODES = {"1", "L", "P", "RGB", "LA", "PA", "RGBA"}
_ORIENTATION = 0x0112
_ORIENTATIONS = range(9)
"""Values of the orientation tag (EXIF 2.3, 4.6.4). 1 is upright, and so is 0, which some cameras write for unknown."""
_LAST_UNROTATED = 4
"""Values above it exchange width and height."""
TURNED = "turned"
"""Key in the `info` of a picture from `open_rgb`."""
_PNG = b"\x89PNG\r\n\x1a\n"


def graph_beside(picture: Path) -> Path | None:
    """The graph file of a picture: same stem, ending .json in any case; None if there is none."""
    usual = picture.with_suffix(".json")
    if usual.is_file():
        return usual
    near = (p for p in picture.parent.iterdir() if p.stem == picture.stem and p.suffix.lower() == ".json")
    return next((p for p in sorted(near) if p.is_file()), None)


class ImageError(ConfigError):
    """A picture that cannot be used: "FILE: REASON"."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def stays_inside(path: str) -> bool:
    """True if a path from an annotation is relative and stays inside the folder that it is joined to."""
    windows = PureWindowsPath(path)
    escapes = windows.drive or windows.root or "\\" in path or "\0" in path
    return bool(path) and not escapes and ".." not in PurePosixPath(path).parts


def open_rgb(path: Path, upright: bool = False) -> Image.Image:
    """The picture in `path` as 8-bit RGB. Raises `ImageError`.

    Grey and palette pictures are converted without loss. Refused are CMYK (its colours depend on a profile), 16-bit and
    floating-point pictures (their range is unknown) and transparent pixels (their background is unknown). `upright`
    applies the orientation tag, for pictures without boxes; boxes refer to the stored pixels. `info[TURNED]` says
    whether that turned the picture.
    """
    limit = Image.MAX_IMAGE_PIXELS or 2**63
    try:
        if not os.path.getsize(path):
            raise ImageError(path, "cannot be read as an image: the file is empty")
        with Image.open(path) as image:
            if image.width * image.height > limit:  # Pillow itself only warns up to twice the limit
                raise ImageError(path, f"too large: more than {limit} pixels")
            if image.mode == "CMYK":
                raise ImageError(path, "CMYK colours, which have no exact RGB; convert the file to RGB")
            if image.mode not in _MODES or _is_deep_png(path):
                raise ImageError(path, "more than 8 bits a channel; convert the file to 8 bits")
            opaque = _opaque(path, image)
            turned = upright and orientation_of(image, path) > 1  # after decoding, which detects truncated files
            found = ImageOps.exif_transpose(opaque) if turned else opaque
            found.info[TURNED] = turned
            return found
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(path, "there is no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(path, f"too large: more than {limit} pixels") from error
    except Exception as error:  # border: a damaged file makes Pillow raise anything, struct.error and KeyError included
        reason = str(error).replace(repr(str(path)), "the file")
        raise ImageError(path, f"cannot be read as an image: {reason}") from error


def orientation_of(image: Image.Image, path: Path) -> int:
    """The EXIF orientation of an opened picture, above 1 if it is not upright. Raises `ImageError`."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # border: Pillow raises anything on a damaged tag
        raise ImageError(path, f"its orientation tag cannot be read: {error}; save the picture anew") from error
    if value not in _ORIENTATIONS:
        raise ImageError(path, f"its orientation tag is {shown(value)}, not 1 to 8; save the picture anew")
    return value


def size_of(path: Path, upright: bool = False) -> tuple[int, int]:
    """Width and height from the header, without decoding; with `upright`, of the picture that `open_rgb` turns.

    A PNG without an orientation tag before its pixels is decoded then, because the tag may follow. Raises `ImageError`.
    """
    try:
        with Image.open(path) as image:
            lies = upright and orientation_of(image, path) > _LAST_UNROTATED
            return image.size[::-1] if lies else image.size
    except ImageError:
        raise
    except Exception as error:  # border
        raise ImageError(path, "cannot be read as an image") from error


def _is_deep_png(path: Path) -> bool:
    """True for a 16-bit PNG: Pillow silently drops the lower eight bits."""
    with path.open("rb") as file:
        head = file.read(25)
    return head[:8] == _PNG and head[24:] == b"\x10"


def _opaque(path: Path, image: Image.Image) -> Image.Image:
    """RGB of a picture without transparent pixels."""
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise ImageError(path, "transparent pixels; put the picture on a ground of your choice")
    return image.convert("RGB")


def to_square(image: Image.Image, resolution: int, resize: str) -> np.ndarray:
    """uint8 [R, R, 3], antialiased, from the whole picture (bilinear) or its central square (Lanczos)."""
    if resize == "squash":
        return np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR))
    x0, y0, x1, y1 = central_square(image.size)
    return np.asarray(image.crop((x0, y0, x1, y1)).resize((resolution, resolution), Image.Resampling.LANCZOS))


def central_square(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the largest square in the middle of a picture of `size` (W, H)."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def original_and_crop(size: tuple[int, int], resolution: int, resize: str) -> tuple[float, float, float, float]:
    """Height and width of a picture of `size` (W, H), and top and left of `to_square` in pixels of the resized picture.

    SDXL's conditions (Podell et al., 2023, section 2.2). A crop between two pixels keeps its fraction.
    """
    left, top, right, _ = central_square(size) if resize == "crop" else (0, 0, *size)
    scale = resolution / (right - left)
    return size[1], size[0], top * scale, left * scale


def boxes_in_square(boxes: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """Boxes x, y, w, h in pixels [N, 4] of a picture of `size` (W, H) -> x0, y0, x1, y1 in 0..1 of `to_square`.

    Parts outside the square are clipped.
    """
    x0, y0, x1, y1 = central_square(size) if resize == "crop" else (0, 0, *size)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float64)
    scaled = (corners - [x0, y0, x0, y0]) / [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
    return np.clip(scaled, 0, 1).astype(np.float32)
