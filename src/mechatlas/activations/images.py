"""Images as samples: squares cut from photographs, with the colors that a viewer shows.

    Images         recipe: source of the images, and how they are cut
    ImageSamples   the squares of a recipe
    decode         an image file -> bytes of red, green and blue, or of gray

The orientation that a camera noted is applied, images of 16 bits are brought to 8, floats in 0..1
to bytes, and transparent pixels are laid over a background.
"""

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence
from importlib import resources, util
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from mechatlas.base import InputError, Result
from mechatlas.ranges import SEED, check_ranges
from mechatlas.sources import (
    MEMORY_MIB,
    Archive,
    Files,
    Folder,
    check_size,
    matching,
    open_array,
    reason_of,
)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
"""Endings of names of image files."""
SCIKIT_IMAGE = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png motorcycle_right.png retina.jpg "
    "rocket.jpg"
)
"""Photographs in scikit-image's wheel; the rest of its data are drawings and scans."""
CACHE_BYTES = 64 << 20
"""Size of the cache of decoded images."""
PIXEL_BYTES = 12
"""Memory per pixel while an image is decoded: as in the file, converted, and as an array."""
WHITE_IS_ZERO = 262, 0
"""Tag of a TIFF, and its value where small numbers are bright."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Photographs from a folder, a zip, an array file, or bundled with the package."""

    source: str = "photos"
    """"photos" (in the package), "scikit-image" (the [demo] extra), or the path of a folder,
    a .zip, or an .npz or .npy with (n, height, width, channels) bytes or floats in 0..1."""
    include: str = "*"
    """Glob over file names inside the source, such as "train/*"."""
    side: int | None = None
    """Side of the square given to the network, in pixels; by default the network's own."""
    crops: int = 1
    """Samples taken from each image. 1: the largest centered square. More: random squares."""
    smallest_crop: float = 0.3
    """Side of the smallest random square, as a fraction of the image's shorter side."""
    seed: int = 0
    """Seed of the random squares."""
    background: str = "white"
    """Color under transparent pixels: a name of CSS or "#rrggbb"."""

    def __post_init__(self) -> None:
        check_ranges(
            self, crops="[1, 1000000]", smallest_crop="(0, 1]", side="[1, 65536]", seed=SEED
        )
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f'background must be a color such as "white" or "#ff8000", got {self.background!r}.'
            ) from None


class ImageSamples(Result):
    """Squares cut from images; sample i is crop i % crops of image i // crops."""

    def __init__(
        self, recipe: Images, side: int, channels: int, *, memory_mib: int = MEMORY_MIB
    ) -> None:
        self.recipe: Images = recipe
        self.side: int = side
        self.channels: int = channels
        self._images = _open_images(recipe, memory_mib)
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()  # a small cache
        self._cached = 0  # bytes
        self._lock = threading.Lock()  # `collect` reads ahead in threads
        if not len(self._images.names):
            raise InputError(
                f"{recipe.source} has no image whose name matches {recipe.include!r} "
                f"(of {', '.join(sorted(SUFFIXES))}){self._hidden()}."
            )

    def __len__(self) -> int:
        return len(self._images.names) * self.recipe.crops

    def summary(self) -> str:
        """Number of samples, their size and their source."""
        n = self.recipe.crops
        crops = f"{n} random squares" if n > 1 else "the largest centered square"
        images = f"{len(self._images.names):,} images of {self.recipe.source}{self._hidden()}"
        return f"{len(self):,} samples: {crops} of side {self.side} from each of {images}"

    def _hidden(self) -> str:
        n = self._images.n_hidden
        return f" ({n:,} hidden files are passed over)" if n else ""

    def name(self, index: int) -> str:
        """File name inside the source, with the number of the crop if there are several."""
        image, crop = divmod(index, self.recipe.crops)
        return self._images.names[image] + (f" crop {crop}" if self.recipe.crops > 1 else "")

    def read(self, index: int) -> UInt8[np.ndarray, "side side channel"]:
        """Cut and resize one square.

        Raises:
            InputError: The image cannot be read or has the wrong number of channels.
        """
        image, crop = divmod(index, self.recipe.crops)
        pixels = self._pixels(image)
        height, width = pixels.shape[:2]
        size = min(height, width)
        left, top = (width - size) / 2, (height - size) / 2
        if self.recipe.crops > 1:
            random = np.random.default_rng([self.recipe.seed, image, crop])
            smallest = max(self.recipe.smallest_crop, min(1.0, self.side / size))
            size *= random.uniform(smallest, 1.0)
            left, top = random.uniform(0, width - size), random.uniform(0, height - size)
        box = (left, top, left + size, top + size)
        square = pixels[:, :, 0] if self.channels == 1 else pixels
        resized = Image.fromarray(square).resize(
            (self.side, self.side), Image.Resampling.BICUBIC, box=box
        )
        return np.asarray(resized).reshape(self.side, self.side, self.channels)

    def stack(
        self, samples: Sequence[UInt8[np.ndarray, "side side channel"]]
    ) -> Float[Tensor, "batch channel side side"]:
        """Stack squares to floats in 0..1, channels first in shape and last in memory."""
        return torch.from_numpy(np.stack(samples)).permute(0, 3, 1, 2).float().div_(255)

    def _pixels(self, image: int) -> UInt8[np.ndarray, "h w channel"]:
        with self._lock:
            if image in self._decoded:
                self._decoded.move_to_end(image)
                return self._decoded[image]
        name = f"{self.recipe.source}: {self._images.names[image]}"
        pixels = self._images.read(image, self.channels)
        if pixels.shape[2] != self.channels:
            raise InputError(
                f"{name} has {pixels.shape[2]} channels, the network expects {self.channels}."
            )
        with self._lock:
            if image not in self._decoded:  # another thread may have been faster
                self._decoded[image] = pixels
                self._cached += pixels.nbytes
            while self._cached > CACHE_BYTES:
                self._cached -= self._decoded.popitem(last=False)[1].nbytes
        return pixels


class _Photographs:
    """Images as files of a folder, or as members of a zip."""

    def __init__(
        self, files: Files, names: Sequence[str], hidden: int, recipe: Images, memory: int
    ):
        self.files, self.names, self.n_hidden = files, names, hidden
        self.source, self.background, self.memory = recipe.source, recipe.background, memory
        self._large = threading.Lock()  # threads decode small images at once, large ones in turn

    def read(self, image: int, channels: int) -> UInt8[np.ndarray, "h w channel"]:
        name = f"{self.source}: {self.names[image]}"
        with self.files.open(self.names[image], self.memory // 4) as file:
            try:
                with Image.open(cast(Any, file)) as opened:
                    size = opened.width * opened.height * PIXEL_BYTES
                    check_size(size, self.memory // 2, name)
                    large = size > self.memory // 16
                    with self._large if large else contextlib.nullcontext():
                        return decode(opened, channels, self.background)
            except InputError:
                raise
            except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
                raise InputError(f"{name} is too large to be a photograph ({error}).") from error
            except UnidentifiedImageError as error:  # its message holds an address of memory
                reason = "it is damaged, or in no known format"
                raise InputError(f"{name} cannot be read as an image ({reason}).") from error
            except Exception as error:  # a damaged image can make its reader raise anything
                reason = reason_of(error)
                raise InputError(f"{name} cannot be read as an image ({reason}).") from error


class _Array:
    """Images as rows of one array."""

    n_hidden = 0

    def __init__(self, path: Path, memory_mib: int) -> None:
        self.path = path
        self.images = open_array(path, memory_mib=memory_mib)
        if len(self.images.shape) != 4 or self.images.shape[3] > 4:
            raise InputError(
                f"{path} has shape {self.images.shape}, expected images of shape "
                "(n, height, width, channels)."
            )
        self.names = [f"image {i}" for i in range(len(self.images))]

    def read(self, image: int, channels: int) -> UInt8[np.ndarray, "h w channel"]:
        del channels
        pixels = self.images[image]
        if pixels.dtype == np.uint8:
            return pixels
        name = f"{self.path}: {self.names[image]}"
        if pixels.dtype.kind not in "fb":
            raise InputError(
                f"{name} holds {pixels.dtype} values; values must be bytes, or floats in 0..1."
            )
        try:
            return _bytes_of(pixels.astype(np.float32))
        except ValueError as error:
            raise InputError(f"{name} cannot be read as an image ({error}).") from error


def _open_images(recipe: Images, memory_mib: int) -> "_Photographs | _Array":
    memory = memory_mib << 20
    if recipe.source == "photos":
        folder = Folder(Path(str(resources.files("mechatlas") / "bundled" / "photos")))
        return _Photographs(folder, *matched(folder, "*"), recipe, memory)
    if recipe.source == "scikit-image":
        package = util.find_spec("skimage")
        if package is None or package.origin is None:
            raise InputError("Images of scikit-image need it: pip install 'mechatlas[demo]'.")
        folder = Folder(Path(package.origin).parent / "data", SCIKIT_IMAGE.split())
        return _Photographs(folder, SCIKIT_IMAGE.split(), 0, recipe, memory)
    path = Path(recipe.source)
    if path.is_dir():
        folder = Folder(path)
        return _Photographs(folder, *matched(folder, recipe.include), recipe, memory)
    if not path.exists():
        raise InputError(f"There is no folder or file {path} to read images from.")
    if path.suffix.lower() == ".zip":
        archive = Archive(path)
        return _Photographs(archive, *matched(archive, recipe.include), recipe, memory)
    if path.suffix.lower() in (".npz", ".npy"):
        return _Array(path, memory_mib)
    raise InputError(f"{path} is not a folder, a .zip, an .npz or an .npy of images.")


def matched(files: Files, include: str) -> tuple[list[str], int]:
    """Pick the images among some files.

    Returns:
        Their names, and the number of those that are hidden and passed over.
    """
    names, hidden = matching(files.names, include, SUFFIXES)
    return names, len(hidden)


def decode(
    image: Image.Image, channels: int, background: str = "white"
) -> UInt8[np.ndarray, "h w channel"]:
    """Decode an image to the colors that a viewer shows.

    Args:
        image: Opened image.
        channels: 1 for gray; else the result is red, green and blue.
        background: Color under transparent pixels.

    Raises:
        ValueError: Nothing says how bright the numbers of the image are, or it is damaged.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_gray_of(image))
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, ImageColor.getrgb(background)[:3])
        image.alpha_composite(layer)
    shown = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(shown).reshape(shown.height, shown.width, -1)


def _gray_of(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """Bytes of an image of one channel with more than 8 bits."""
    if image.mode == "F":
        gray = _bytes_of(np.asarray(image))
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        gray = (np.asarray(image) >> 8).astype(np.uint8)
    else:
        raise ValueError(
            "its pixels are whole numbers of 32 bits, and nothing says which is white; "
            "save it with 8 or 16 bits"
        )
    tag, inverted = WHITE_IS_ZERO
    return 255 - gray if getattr(image, "tag_v2", {}).get(tag) == inverted else gray


def _bytes_of(pixels: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Bytes of floats in 0..1."""
    low, high = float(pixels.min()), float(pixels.max())
    if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 1):
        raise ValueError(
            f"its floats are in {low:.4g}..{high:.4g}; values must be bytes, or floats in 0..1"
        )
    return np.round(pixels * np.float32(255)).astype(np.uint8)
