"""Samples, the inputs of a network: images, arrays or texts, read one at a time.

    Images, Arrays, Texts     recipes: source of the samples, and how they are cut
    open_samples              a recipe and a network -> `Samples`

Reading a sample depends on nothing but the recipe and the sample's number, so a run can
be resumed anywhere and a page can show later exactly what the network saw.
"""

import dataclasses
import io
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import resources, util
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image
from torch import Tensor, nn

from mechatlas.base import InputError, RecipeError, Result

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

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"crops must be at least 1, got {self.crops}.")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop must be in (0, 1], got {self.smallest_crop}.")
        if self.side is not None and self.side < 1:
            raise ValueError(f"side must be at least 1 pixel, got {self.side}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays:
    """Rows of an array, each given to the network as it is."""

    source: Path
    """An .npy file, or an .npz with one array. The first axis counts the samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Plain text, cut into windows of tokens by the network's own tokenizer."""

    source: Path
    """A text file, or a folder or zip of them."""
    include: str = "*.txt"
    """Glob over file names inside the source."""
    context: int = 128
    """Tokens in a window, special tokens included."""


SampleRecipe = Images | Arrays | Texts


@runtime_checkable
class Samples(Protocol):
    """Numbered inputs of a network."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def name(self, index: int) -> str:
        """Name of a sample, by which a person finds it in its source."""
        ...

    def read(self, index: int) -> Shaped[np.ndarray, "..."]:
        """Read one sample: bytes (h, w, channel) of an image, else as the network takes it.

        Raises:
            InputError: The sample cannot be read.
        """
        ...

    def stack(self, samples: Sequence[Shaped[np.ndarray, "*shape"]]) -> Shaped[Tensor, "batch ..."]:
        """Stack samples to a batch for the network."""
        ...


def open_samples(recipe: SampleRecipe, network: nn.Module) -> Samples:
    """Open the samples that a recipe describes, cut to the input that a network expects.

    Raises:
        InputError: There is nothing there, or it does not fit the network.
        RecipeError: The network does not say how large its images are, nor does the recipe.

    Examples:
        >>> import mechatlas as ma
        >>> network = ma.load_network(ma.Network(name="inception_mini"))
        >>> samples = ma.open_samples(ma.Images(source="photos", crops=5), network)
        >>> samples
        40 samples: 5 random squares of side 31 from each of 8 images of photos
        >>> samples.stack([samples.read(0), samples.read(39)]).shape
        torch.Size([2, 3, 31, 31])
    """
    if isinstance(recipe, Arrays):
        return ArraySamples(recipe.source)
    if isinstance(recipe, Texts):
        return TextSamples(recipe, network)
    expected = getattr(network, "input", None)
    side = recipe.side or getattr(expected, "side", None)
    if side is None:
        raise RecipeError(
            f"{type(network).__name__} does not say how large its images are; "
            "set `side` in the recipe."
        )
    return ImageSamples(recipe, side, getattr(expected, "channels", 3))


class ImageSamples(Result):
    """Squares cut from images; sample i is crop i % crops of image i // crops."""

    def __init__(self, recipe: Images, side: int, channels: int) -> None:
        self.recipe: Images = recipe
        self.side: int = side
        self.channels: int = channels
        self._images = _open_images(recipe)
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()  # a small cache
        self._cached = 0  # bytes
        self._lock = threading.Lock()  # `collect` reads ahead in threads
        if not len(self._images.names):
            raise InputError(
                f"{recipe.source} has no image whose name matches {recipe.include!r} "
                f"(of {', '.join(sorted(SUFFIXES))})."
            )

    def __len__(self) -> int:
        return len(self._images.names) * self.recipe.crops

    def summary(self) -> str:
        """Number of samples, their size and their source."""
        n = self.recipe.crops
        crops = f"{n} random squares" if n > 1 else "the largest centered square"
        images = f"{len(self._images.names):,} images of {self.recipe.source}"
        return f"{len(self):,} samples: {crops} of side {self.side} from each of {images}"

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
        try:
            pixels = self._images.read(image, self.channels)
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
            raise InputError(f"{name} cannot be read as an image ({error}).") from error
        except Image.DecompressionBombError as error:
            raise InputError(f"{name} is too large to be a photograph ({error}).") from error
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


class _Files:
    """Images as files of a folder, or as members of a zip."""

    def __init__(self, folder: Path | zipfile.ZipFile, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def read(self, image: int, channels: int) -> UInt8[np.ndarray, "h w channel"]:
        name = self.names[image]
        if isinstance(self.folder, zipfile.ZipFile):
            return _decode(io.BytesIO(self.folder.read(name)), channels)
        return _decode(self.folder / name, channels)


class _Array:
    """Images as rows of one array."""

    def __init__(self, path: Path) -> None:
        self.images = _load_array(path)
        if self.images.ndim != 4 or self.images.shape[3] > 4:
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
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("values must be bytes, or floats in 0..1")
        return np.round(pixels * 255).astype(np.uint8)


def _open_images(recipe: Images) -> _Files | _Array:
    if recipe.source == "photos":
        folder = Path(str(resources.files("mechatlas") / "bundled" / "photos"))
        return _Files(folder, sorted(p.name for p in folder.glob("*.jpg")))
    if recipe.source == "scikit-image":
        package = util.find_spec("skimage")
        if package is None or package.origin is None:
            raise InputError("Images of scikit-image need it: pip install 'mechatlas[demo]'.")
        return _Files(Path(package.origin).parent / "data", SCIKIT_IMAGE.split())
    path = Path(recipe.source)
    if path.is_dir():
        names = (str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        return _Files(path, _matching(names, recipe.include, SUFFIXES))
    if not path.exists():
        raise InputError(f"There is no folder or file {path} to read images from.")
    if path.suffix == ".zip":
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path} cannot be read as a zip ({error}).") from error
        return _Files(archive, _matching(archive.namelist(), recipe.include, SUFFIXES))
    if path.suffix in (".npz", ".npy"):
        return _Array(path)
    raise InputError(f"{path} is not a folder, a .zip, an .npz or an .npy of images.")


def _matching(names: Iterable[str], include: str, suffixes: set[str]) -> list[str]:
    return sorted(
        n for n in names if fnmatchcase(n, include) and Path(n).suffix.lower() in suffixes
    )


def _decode(file: Path | io.BytesIO, channels: int) -> UInt8[np.ndarray, "h w channel"]:
    with Image.open(file) as image:
        converted = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(converted).reshape(converted.height, converted.width, -1)


def _load_array(path: Path) -> Shaped[np.ndarray, "..."]:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} cannot be read as an array ({error}).") from error
    if isinstance(loaded, np.ndarray):
        return loaded
    if len(loaded.files) != 1:
        raise InputError(f"{path} holds {len(loaded.files)} arrays, expected one.")
    return loaded[loaded.files[0]]


class ArraySamples(Result):
    """Rows of one array, given to the network as they are."""

    def __init__(self, source: Path) -> None:
        self.source: Path = source
        self.array: np.ndarray = _load_array(source)
        if self.array.ndim < 1 or not len(self.array):
            raise InputError(f"{source} is empty; expected at least one sample.")

    def __len__(self) -> int:
        return len(self.array)

    def summary(self) -> str:
        """Number of samples, their shape and their source."""
        return f"{len(self):,} samples: arrays of shape {self.array.shape[1:]} from {self.source}"

    def name(self, index: int) -> str:
        """File and number of the row."""
        return f"{self.source} row {index}"

    def read(self, index: int) -> Shaped[np.ndarray, "..."]:
        """Read one row.

        Raises:
            InputError: The row has a NaN or an infinity.
        """
        row = np.asarray(self.array[index])
        if np.issubdtype(row.dtype, np.floating) and not np.isfinite(row).all():
            where = np.argwhere(~np.isfinite(np.atleast_1d(row)))[0].tolist()
            raise InputError(f"{self.name(index)} is NaN or infinite at {where}.")
        return row

    def stack(self, samples: Sequence[Shaped[np.ndarray, "*shape"]]) -> Shaped[Tensor, "batch ..."]:
        """Stack rows: floats as float32, integers as int64."""
        rows = torch.from_numpy(np.stack(samples))
        return rows.float() if rows.is_floating_point() else rows.long()


class TextSamples(Result):
    """Windows of tokens, from texts read one after another."""

    def __init__(self, recipe: Texts, network: nn.Module) -> None:
        self.recipe: Texts = recipe
        tokenizer = getattr(network, "input", None)
        if tokenizer is None or not hasattr(tokenizer, "windows"):
            raise InputError(
                f"{type(network).__name__} has no tokenizer; texts need a network of "
                "`mechatlas.activations.architectures.language`."
            )
        tokens: list[np.ndarray] = []
        self._names: list[str] = []
        for name, text in _read_texts(recipe):
            windows = tokenizer.windows(text, recipe.context)
            tokens.append(windows.astype(np.int32))
            self._names += [f"{name} window {i}" for i in range(len(windows))]
        if not self._names:
            raise InputError(
                f"{recipe.source} has no text of at least {recipe.context} tokens in a file "
                f"that matches {recipe.include!r}."
            )
        self._tokens = np.concatenate(tokens)
        self._special = frozenset(tokenizer.before + tokenizer.after)

    def __len__(self) -> int:
        return len(self._tokens)

    def summary(self) -> str:
        """Number of samples, their length and their source."""
        windows = f"windows of {self.recipe.context} tokens of {self.recipe.source}"
        return f"{len(self):,} samples: {windows}"

    def name(self, index: int) -> str:
        """File and number of the window."""
        return self._names[index]

    def read(self, index: int) -> Int[np.ndarray, " token"]:
        """Read the token ids of one window."""
        return self._tokens[index]

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens that stand in every window."""
        return self._special

    def token_ids(self, index: int) -> Int[np.ndarray, " token"]:
        """Token ids of one window."""
        return self._tokens[index]

    def padding(self, index: int) -> Bool[np.ndarray, " token"]:
        """Positions of a window that are padding: none."""
        return np.zeros(len(self._tokens[index]), dtype=bool)

    def stack(self, samples: Sequence[Int[np.ndarray, " token"]]) -> Int[Tensor, "batch token"]:
        """Stack the token ids of windows."""
        return torch.from_numpy(np.stack(samples)).long()


def _read_texts(recipe: Texts) -> Iterator[tuple[str, str]]:
    path = recipe.source
    if path.is_dir():
        files = (p for p in path.rglob("*") if p.is_file())
        names = _matching((str(p.relative_to(path)) for p in files), recipe.include, {".txt"})
        for name in names:
            yield name, (path / name).read_text(encoding="utf-8", errors="replace")
    elif path.suffix == ".zip" and path.exists():
        with zipfile.ZipFile(path) as archive:
            for name in _matching(archive.namelist(), recipe.include, {".txt"}):
                yield name, archive.read(name).decode("utf-8", errors="replace")
    elif path.is_file():
        yield path.name, path.read_text(encoding="utf-8", errors="replace")
    else:
        raise InputError(f"There is no text file, folder or zip {path}.")
