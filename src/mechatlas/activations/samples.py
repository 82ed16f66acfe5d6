"""Samples, the inputs of a network: images, arrays or texts, read one at a time.

    Images, Arrays, Texts     recipes: source of the samples, and how they are cut
    open_samples              a recipe, an array, a data set or a path, and a network -> `Samples`
    whole_batch               any of these, and a network -> all samples as one batch

Reading a sample depends on nothing but the recipe and the sample's number, so a run can
be resumed anywhere and a page can show later exactly what the network saw.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from PIL import Image
from torch import Tensor, nn
from torch.utils import data as torch_data

from mechatlas.activations.images import Images, ImageSamples
from mechatlas.activations.networks import as_input, dtype_of
from mechatlas.activations.positions import TokenSamples
from mechatlas.activations.text_input import TextInput
from mechatlas.activations.text_sources import Document, documents, is_text
from mechatlas.activations.texts import Texts, TextSamples, text_samples
from mechatlas.base import InputError, RecipeError, Result
from mechatlas.files import checksum
from mechatlas.maths.arrays import as_numbers
from mechatlas.sources import (
    MEMORY_MIB,
    ArrayFile,
    open_array,
    reason_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays:
    """Rows of an array, each given to the network as it is."""

    source: Path
    """An .npy file, or an .npz with one array. The first axis counts the samples."""


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


def open_samples(recipe: Any, network: nn.Module, *, memory_mib: int = MEMORY_MIB) -> Samples:
    """Open samples for a network.

    Args:
        recipe: A recipe (`Images`, `Arrays` or `Texts`); an array, a tensor or a list, whose first
            axis counts the samples; a `Dataset` or `DataLoader` of torch, of whose tuples the
            first element is the input; for a language model any iterable of texts or rows
            (`text_samples`); a path of an array, of images or of texts; or samples.
        network: Network that reads them. It says how large images are, and has the tokenizer.
        memory_mib: Memory that the process should stay under, in MiB: an image, a compressed array
            or a JSON list that would not fit is refused before it is read.

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
    if isinstance(recipe, str | Path):
        recipe = _recipe_for(Path(recipe), network)
    if isinstance(recipe, Arrays):
        source = Path(recipe.source)
        return ArraySamples(open_array(source, memory_mib=memory_mib), str(source), network)
    if isinstance(recipe, Texts):
        return TextSamples(recipe, network, memory_mib=memory_mib)
    if not isinstance(recipe, Images):
        return _in_memory(recipe, network)
    expected = getattr(network, "input", None)
    side = recipe.side or getattr(expected, "side", None)
    if side is None:
        raise RecipeError(
            f"{type(network).__name__} does not say how large its images are; "
            "set `side` in the recipe."
        )
    channels = getattr(expected, "channels", 3)
    return ImageSamples(recipe, side, channels, memory_mib=memory_mib)


def _recipe_for(path: Path, network: nn.Module) -> SampleRecipe:
    if path.suffix.lower() in (".npy", ".npz"):
        return Arrays(source=path)
    text_input = getattr(network, "input", None)
    if is_text(path.name) or isinstance(text_input, TextInput):
        return Texts(source=path, context=_context(text_input))
    return Images(source=str(path))


def _context(text_input: Any) -> int:
    """Default length of a window, in tokens: the context of the network, at most 128."""
    most = getattr(text_input, "context", None)
    return Texts.context if most is None else min(Texts.context, most)


def _in_memory(samples: Any, network: nn.Module) -> Samples:
    """Samples of an array, a data set or a loader."""
    if isinstance(samples, Samples):
        return samples
    text_input = getattr(network, "input", None)
    if isinstance(text_input, TextInput) and _are_texts(samples):
        return text_samples(samples, network, context=_context(text_input))
    numbered = hasattr(samples, "__getitem__") and hasattr(samples, "__len__")
    array = hasattr(samples, "__array__") or isinstance(samples, Mapping | Sequence)
    if isinstance(samples, torch_data.DataLoader | torch_data.Dataset) or (numbered and not array):
        return DatasetSamples(samples, network)
    return ArraySamples(as_numbers(samples, "The array of samples"), "array", network)


def _are_texts(samples: Any) -> bool:
    """Whether values are texts or rows to be cut into windows, and not windows of token ids."""
    if isinstance(samples, np.ndarray | Tensor | torch_data.DataLoader):
        return False
    if hasattr(samples, "__getitem__") and hasattr(samples, "__len__"):
        return len(samples) > 0 and isinstance(samples[0], str | Mapping)
    return isinstance(samples, Iterable)


def whole_batch(samples: Any, network: nn.Module) -> Any:
    """Read all samples as one batch, on the device and in the number format of a network.

    Args:
        samples: A batch, as for `as_input`, or what `open_samples` takes.
        network: Network that reads them.

    Raises:
        InputError: There are none, they do not fit the network, or windows of tokens are padded.
    """
    listed = isinstance(samples, list) and not _are_texts(samples)
    if listed or isinstance(samples, tuple | Mapping) or hasattr(samples, "__array__"):
        return as_input(network, samples)
    opened = open_samples(samples, network)
    if not len(opened):
        raise InputError("There are no samples to run the network on.")
    if isinstance(opened, TokenSamples) and any(
        opened.padding(i).any() for i in range(len(opened))
    ):
        raise InputError(
            "Some windows of the samples are padded, and all are read as one batch, without a "
            "mask. Cut the texts into full windows: packing='cut' or packing='packed'."
        )
    return as_input(network, opened.stack([opened.read(i) for i in range(len(opened))]))


def first_batch(samples: Samples, *, skip_bad: bool) -> tuple[int, Any]:
    """Number and batch of the first sample that can be read.

    Raises:
        InputError: None can be read, or the first cannot and `skip_bad` is off.
    """
    for i in range(len(samples)):
        try:
            return i, samples.stack([samples.read(i)])
        except InputError:
            if not skip_bad:
                raise
    raise InputError(f"None of the {len(samples)} samples could be read.")


def batches_of(
    samples: Samples,
    numbers: Int[np.ndarray, " sample"],
    batch_size: int,
    on_bad: Callable[[str], None] | None,
) -> Iterator[tuple[list[int], Shaped[Tensor, "..."]]]:
    """Batches of readable samples with their numbers, decoded one batch ahead in threads.

    Args:
        samples: Samples.
        numbers: Numbers of those to read, in order.
        batch_size: Samples in a batch, with those that cannot be read.
        on_bad: Callback with a message for each sample that cannot be read; by default it is
            refused.

    Raises:
        InputError: A sample cannot be read, and there is no callback.
    """

    def load(index: int) -> np.ndarray | InputError:
        try:
            return samples.read(index)
        except InputError as error:
            return error

    pieces = [numbers[i : i + batch_size].tolist() for i in range(0, len(numbers), batch_size)]
    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(load, i) for i in pieces[0]]
        for piece, following in itertools.zip_longest(pieces, pieces[1:], fillvalue=[]):
            current, ahead = ahead, [pool.submit(load, i) for i in following]
            good: list[int] = []
            loaded: list[np.ndarray] = []
            for index, future in zip(piece, current, strict=True):
                result = future.result()
                if not isinstance(result, InputError):
                    good.append(index)
                    loaded.append(result)
                elif on_bad is not None:
                    on_bad(str(result))
                else:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise result
            yield good, samples.stack(loaded) if good else torch.empty(0)


class ArraySamples(Result):
    """Rows of one array, given to the network as they are."""

    def __init__(self, array: ArrayFile | np.ndarray, source: str, network: nn.Module) -> None:
        self.source: str = source
        self.array: ArrayFile | np.ndarray = array
        self._wide = dtype_of(network) == torch.float64
        if len(array.shape) < 1 or not len(array):
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
        _refuse_non_finite(row, self.name(index))
        return row

    def made_from(self) -> dict[str, str]:
        """Checksum of an array in memory, so that a store of other samples is recognized."""
        if isinstance(self.array, ArrayFile | np.memmap):
            return {}
        kind = f"{self.array.dtype} {self.array.shape}".encode()
        data = checksum(np.ascontiguousarray(self.array).data.cast("B"))
        return {"samples": checksum(kind + data.encode())}

    def stack(self, samples: Sequence[Shaped[np.ndarray, "*shape"]]) -> Shaped[Tensor, "batch ..."]:
        """Stack rows: floats as float32 (float64 for such a network), others as int64."""
        return _stacked(samples, self.source, wide=self._wide)


def _refuse_non_finite(row: Shaped[np.ndarray, "..."], name: str) -> None:
    if row.dtype.kind == "f" and not np.isfinite(row).all():
        where = np.argwhere(~np.isfinite(np.atleast_1d(row)))[0].tolist()
        raise InputError(f"{name} is NaN or infinite at {where}.")


def _stacked(
    samples: Sequence[Shaped[np.ndarray, "..."]], source: str, *, wide: bool
) -> Shaped[Tensor, "batch ..."]:
    """Stack samples of one shape."""
    shapes = {sample.shape for sample in samples}
    if len(shapes) > 1:
        raise InputError(
            f"{source} has samples of the shapes {' and '.join(map(str, sorted(shapes)[:3]))}; "
            "bring them to one shape, or take batch_size = 1."
        )
    rows = np.stack(list(samples))
    if rows.dtype.kind == "f":
        return torch.from_numpy(rows.astype(np.float64 if wide else np.float32))
    return torch.from_numpy(rows.astype(np.int64))


class DatasetSamples(Result):
    """Samples of a data set of torch, or of the data set of a loader in its own order.

    The input is the first element of a tuple. What a loader makes of a sample (`collate_fn`) is
    made of each sample alone.

    Raises:
        InputError: The samples cannot be read again by their number.
    """

    def __init__(self, data: Any, network: nn.Module) -> None:
        loader = data if isinstance(data, torch_data.DataLoader) else None
        dataset: Any = data if loader is None else loader.dataset
        self.source: str = type(dataset).__name__
        if isinstance(dataset, torch_data.IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"{self.source} can only be iterated; samples are read again by number. Pass the "
                "samples as one array: torch.stack(list(...))."
            )
        self.dataset: Any = dataset
        self._wide = dtype_of(network) == torch.float64
        self._collate = None if loader is None else loader.collate_fn
        self._order: Sequence[int] = range(len(dataset)) if loader is None else _order(loader)
        if not len(self._order):
            raise InputError(f"{self.source} is empty; expected at least one sample.")

    def __len__(self) -> int:
        return len(self._order)

    def summary(self) -> str:
        """Number of samples and the class of their data set."""
        return f"{len(self):,} samples of a {self.source}"

    def name(self, index: int) -> str:
        """Class of the data set and number of the sample in it."""
        return f"{self.source} sample {self._order[index]}"

    def read(self, index: int) -> Shaped[np.ndarray, "..."]:
        """Read one sample.

        Raises:
            InputError: The data set raises an error, or its sample is no array of finite numbers.
        """
        name = self.name(index)
        try:
            item = self.dataset[self._order[index]]
            if self._collate is not None:
                item = self._collate([item])
        except Exception as error:  # code of the user's own
            raise InputError(
                f"{name} cannot be read ({type(error).__name__}: {reason_of(error)})."
            ) from error
        if isinstance(item, Mapping):
            raise InputError(
                f"{name} is a mapping of {', '.join(map(str, item))}; pass a data set of tensors, "
                "or of tuples whose first element is the input."
            )
        several = isinstance(item, tuple) or (isinstance(item, list) and np.ndim(item[:1]) != 1)
        value = item[0] if several and len(item) else item
        if isinstance(value, Image.Image):
            raise InputError(
                f"{name} is an image; give the data set a transform that makes a tensor, such as "
                "ToTensor, or collect from the files with ma.Images."
            )
        array = as_numbers(value, name)
        array = array if self._collate is None else array[0]
        _refuse_non_finite(array, name)
        return array

    def stack(self, samples: Sequence[Shaped[np.ndarray, "*shape"]]) -> Shaped[Tensor, "batch ..."]:
        """Stack samples: floats as float32 (float64 for such a network), others as int64."""
        return _stacked(samples, self.source, wide=self._wide)


def _order(loader: "torch_data.DataLoader[Any]") -> Sequence[int]:
    """Numbers of the samples that a loader yields; a shuffled one is read in order."""
    sampler: Any = loader.sampler
    everything = range(len(sampler)) if hasattr(sampler, "__len__") else range(0)
    whole = len(everything) == len(getattr(loader, "dataset", ()))
    plain = isinstance(sampler, torch_data.SequentialSampler) or (
        isinstance(sampler, torch_data.RandomSampler) and not sampler.replacement and whole
    )
    if plain:
        return everything
    if isinstance(sampler, torch_data.SubsetRandomSampler):
        return sorted(int(i) for i in sampler.indices)
    raise InputError(
        f"The loader draws its samples by a {type(sampler).__name__}; pass its data set, or "
        "torch.utils.data.Subset(dataset, indices) of the samples that are meant."
    )


def _read_texts(recipe: Texts) -> Iterator[Document]:
    """Read the documents of a recipe, for scripts of version 0.2."""
    files = documents(recipe.source, recipe.include, recipe.column, chat=recipe.chat)
    return itertools.chain.from_iterable(files)
