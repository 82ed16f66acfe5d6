"""Galleries: the samples that a page shows, each stored once.

gallery    samples -> sheets of equal tiles, and their names
"""

import dataclasses
import io
import math

import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image

from mechatlas.activations.samples import Samples
from mechatlas.base import Progress, no_progress

SHEET_SIDE = 2048
"""Upper limit on the width and height of a sheet, in pixels."""
PIXELS = 20_000_000
"""Upper limit on the pixels of all sheets of a page; tiles are made smaller to fit."""
QUALITY = 88
"""WebP quality of a sheet."""


@dataclasses.dataclass(frozen=True, eq=False)
class Gallery:
    """Samples laid out on sheets, row by row, in the order of their numbers."""

    samples: Int[np.ndarray, " n"]
    """Numbers of the samples, ascending."""
    names: list[str]
    """Names of the samples."""
    side: int
    """Side of a sample, in pixels of the network's input; 0 if samples are not images."""
    tile: int
    """Side of a tile, in pixels of the sheet."""
    columns: int
    """Tiles in a row of a sheet, and rows of a sheet."""
    sheets: list[bytes]
    """WebP files."""


def gallery(
    samples: Samples, needed: Int[np.ndarray, " n"], *, on_progress: Progress = no_progress
) -> Gallery:
    """Draw samples on sheets; samples that are no images have names only.

    Args:
        samples: The samples of a store.
        needed: Numbers of the samples to draw, ascending.
        on_progress: Callback with the number of samples drawn.

    Raises:
        InputError: A sample cannot be read any more.
    """
    names = [samples.name(int(i)) for i in needed]
    first = samples.read(int(needed[0])) if len(needed) else np.zeros(0)
    if not is_image(first):
        return Gallery(needed, names, 0, 0, 1, [])
    side = first.shape[0]
    tile = max(8, min(side, math.isqrt(PIXELS // len(needed))))
    columns = max(1, SHEET_SIDE // tile)
    sheets = []
    for i in range(0, len(needed), columns * columns):
        part = needed[i : i + columns * columns]
        rows = math.ceil(len(part) / columns)
        sheet = np.zeros((rows * tile, min(len(part), columns) * tile, 3), dtype=np.uint8)
        for n, sample in enumerate(part):
            y, x = divmod(n, columns)
            picture = _picture(samples.read(int(sample)), tile)
            sheet[y * tile : (y + 1) * tile, x * tile : (x + 1) * tile] = picture
            on_progress(i + n + 1, len(needed))
        encoded = io.BytesIO()
        Image.fromarray(sheet).save(encoded, "WEBP", quality=QUALITY, method=2)
        sheets.append(encoded.getvalue())
    return Gallery(needed, names, side, tile, columns, sheets)


def is_image(sample: Shaped[np.ndarray, "..."]) -> bool:
    """Tell whether a sample is a square of bytes with one or three channels."""
    return (
        sample.dtype == np.uint8
        and sample.ndim == 3
        and sample.shape[0] == sample.shape[1]
        and sample.shape[2] in (1, 3)
    )


def _picture(pixels: np.ndarray, tile: int) -> np.ndarray:
    color = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if pixels.shape[0] == tile:
        return color
    image = Image.fromarray(np.ascontiguousarray(color))
    return np.asarray(image.resize((tile, tile), Image.Resampling.LANCZOS))
