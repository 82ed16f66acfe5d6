"""Samples of texts: windows of token ids, cut once and kept in a temporary file.

    Texts          recipe: source of the texts, and how they are cut
    TextSamples    the windows, with the padding and the special tokens of each
    text_samples   any iterable of texts, token ids or rows -> `TextSamples`

Memory stays the same however many tokens there are.
"""

import dataclasses
import itertools
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mechatlas.activations.text_input import TextInput
from mechatlas.activations.text_sources import Document, documents, records
from mechatlas.base import InputError, Result
from mechatlas.outputs import temporary_room
from mechatlas.ranges import COUNT, check_ranges
from mechatlas.sources import MEMORY_MIB

BLOCK = 1024
"""Windows that are written at once."""
OPEN_FILES = 32
"""Files that windows are taken from in turn, where not all are read."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts, cut into windows of tokens by the network's own tokenizer."""

    source: Path
    """A .txt, .jsonl, .json, .csv or .parquet file, any of them with .gz, or a folder or zip of
    them."""
    include: str = "*"
    """Glob over file names inside the source."""
    column: str | None = None
    """Column of the rows with the text, or with token ids; by default the only column of text."""
    chat: bool = False
    """Lay out conversations in the tokenizer's chat template: rows have a list of messages."""
    context: int = 128
    """Tokens in a window, special tokens included."""
    packing: Literal["cut", "packed", "document"] | None = None
    """cut: windows of each document one after another, without its last tokens that fill none;
    packed: documents joined by the token that ends a text, then cut; document: the last window of
    each document is padded. By default cut for .txt files, document for conversations, packed
    for all else."""
    max_samples: int | None = None
    """Largest number of windows; with a largest number, windows of all files are taken in turn."""
    max_tokens: int | None = None
    """Largest number of tokens, special tokens included."""

    def __post_init__(self) -> None:
        check_ranges(self, context=COUNT, max_samples=COUNT, max_tokens="[1, 1000000000000]")


class _Window(NamedTuple):
    """Place of a window in the source."""

    file: int
    row: int
    start: int
    """First of its tokens among those of its document."""
    n_tokens: int
    """Tokens before the padding, special tokens included."""


class _Windows:
    """A user's own module that cuts texts into windows, and does nothing else of `TextInput`."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()
    special_ids: frozenset[int] = frozenset()
    pad = separator = None
    vocabulary = 2**31

    def __init__(self, name: str, windows: Any, context: int) -> None:
        self.name, self.windows, self.context = name, windows, context

    def room(self, context: int) -> int:
        """Tokens of text in a window: its module puts special tokens there itself."""
        return context

    def check_length(self, length: int) -> None:
        """Do nothing; the module refuses windows itself."""

    def tokens(self, text: str) -> Int[np.ndarray, " n"]:
        """Token ids of whole windows, one after another."""
        return np.asarray(self.windows(text, self.context), dtype=np.int64).reshape(-1)

    def chat_tokens(self, messages: Sequence[Any]) -> Int[np.ndarray, " n"]:
        """Refuse a conversation."""
        raise InputError(f"The tokenizer of {self.name} has no chat template.")


def _text_input(network: nn.Module, context: int) -> TextInput | _Windows:
    """The tokenizer of a network."""
    text_input = getattr(network, "input", None)
    if isinstance(text_input, TextInput):
        return text_input
    name, windows = type(network).__name__, getattr(text_input, "windows", None)
    if windows is None:
        raise InputError(
            f"{name} has no tokenizer; texts need a network of "
            "`mechatlas.activations.architectures.language`, or a module `input` with a method "
            "`windows(text, context)`."
        )
    return _Windows(name, windows, context)


class TextSamples(Result):
    """Windows of tokens, from texts read one after another."""

    special_ids: frozenset[int]
    """Token ids that are no part of a text: start, end, separator, padding, roles of a chat."""

    def __init__(
        self,
        recipe: Texts,
        network: nn.Module,
        *,
        texts: Iterable[Any] | None = None,
        memory_mib: int = MEMORY_MIB,
    ) -> None:
        """Read and cut the texts.

        Args:
            recipe: Source of the texts, and how they are cut.
            network: Network with a tokenizer as `.input`.
            texts: Texts, token ids or rows to read in place of the source.
            memory_mib: Memory that the process should stay under.

        Raises:
            InputError: The network has no tokenizer, or the texts cannot be read or fill no window.
            DiskError: The tokens do not fit on the disk.
        """
        self.recipe: Texts = recipe
        self._input: TextInput | _Windows = _text_input(network, recipe.context)
        self.special_ids = self._input.special_ids
        self._files: list[str] = []
        self._tokens = _Spool(recipe.context)
        self._windows = _Spool(len(_Window._fields))
        self._before = self._after = self._separator = np.zeros(0, dtype=np.int64)
        source, chat = Path(recipe.source), recipe.chat
        if texts is None:
            found = documents(
                source, recipe.include, recipe.column, chat=chat, memory_mib=memory_mib
            )
        else:
            found = iter([records(texts, recipe.column, chat=chat)])
        self.packing: str = recipe.packing or ("document" if chat else "")
        self._spool(found)
        self._tokens.flush()
        self._windows.flush()
        if not len(self):
            raise InputError(self._nothing())

    def _nothing(self) -> str:
        if (most := self.recipe.max_tokens) is not None and most < self.recipe.context:
            return f"max_tokens = {most} is less than one window of {self.recipe.context} tokens."
        return (
            f"{self.recipe.source} has no text of at least {self.recipe.context} tokens in a file "
            f"that matches {self.recipe.include!r}. Take a smaller `context`, or packing = "
            "'document', which pads short texts."
        )

    def __len__(self) -> int:
        return len(self._tokens)

    def summary(self) -> str:
        """Number of samples, their length and their source."""
        windows = f"windows of {self.recipe.context} tokens of {self.recipe.source}"
        return f"{len(self):,} samples: {windows}"

    def name(self, index: int) -> str:
        """File and row of the window, and its number or first token in that document."""
        window = self._window(index)
        row = f" row {window.row}" if window.row else ""
        if self.packing == "packed":
            return f"{self._files[window.file]}{row} from token {window.start}"
        room = self.recipe.context - len(self._before) - len(self._after)
        return f"{self._files[window.file]}{row} window {window.start // room}"

    def read(self, index: int) -> Int[np.ndarray, " token"]:
        """Read the token ids of one window."""
        return self._tokens[index]

    def token_ids(self, index: int) -> Int[np.ndarray, " token"]:
        """Read the token ids of one window, padding included."""
        return self._tokens[index]

    def padding(self, index: int) -> Bool[np.ndarray, " token"]:
        """Positions of one window that hold no token of a text, but fill it up."""
        return np.arange(self.recipe.context) >= self._window(index).n_tokens

    def stack(self, samples: Sequence[Int[np.ndarray, " token"]]) -> Int[Tensor, "batch token"]:
        """Stack the token ids of windows."""
        return torch.from_numpy(np.stack(samples)).long()

    def _window(self, index: int) -> _Window:
        return _Window(*self._windows[index].tolist())

    def _spool(self, found: Iterator[Iterator[Document]]) -> None:
        """Cut the documents and write the windows, until there are as many as are asked for."""
        most_samples, most_tokens = self.recipe.max_samples, self.recipe.max_tokens
        everything = most_samples is None and most_tokens is None
        windows = (
            self._cut(itertools.chain.from_iterable(found)) if everything else self._mix(found)
        )
        total = 0
        for window, tokens in windows:
            total += window.n_tokens
            if most_tokens is not None and total > most_tokens:
                break
            self._tokens.append(tokens)
            self._windows.append(np.array(window, dtype=np.int32))
            if len(self) == most_samples:
                break

    def _mix(
        self, found: Iterator[Iterator[Document]]
    ) -> Iterator[tuple[_Window, Int[np.ndarray, " n"]]]:
        """Windows of the files in turn, in a random order; where packed, documents in turn."""
        files = list(found)
        shuffled = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
        first = next(shuffled[0], None)
        if first is not None:
            self._choose_packing(first)
            shuffled[0] = itertools.chain([first], shuffled[0])
        if self.packing != "packed":
            return interleaved(map(self._cut, shuffled))
        whole = (itertools.groupby(file, key=lambda piece: piece.row) for file in shuffled)
        pieces = (pieces for _, pieces in interleaved(whole))
        return self._cut(itertools.chain.from_iterable(pieces))

    def _choose_packing(self, first: Document) -> None:
        self.packing = self.packing or ("cut" if first.row == 0 else "packed")

    def _cut(self, found: Iterable[Document]) -> Iterator[tuple[_Window, Int[np.ndarray, " n"]]]:
        """Windows of the documents, one after another."""
        pending = _Pending()
        last: tuple[str, int] | None = None
        file = start = room = 0
        for document in found:
            if last is None:
                room = self._prepare(document)
            if last != (document.file, document.row):
                if self.packing == "document" and len(pending):
                    yield self._filled(pending.take(len(pending)))
                elif self.packing == "cut":
                    pending = _Pending()
                elif self.packing == "packed" and last is not None and len(self._separator):
                    pending.put(_Piece(file, last[1], start, self._separator))
                if last is None or last[0] != document.file:
                    file = len(self._files)
                    self._files.append(document.file)
                last, start = (document.file, document.row), 0
            ids = self._ids(document)
            pending.put(_Piece(file, document.row, start, ids))
            start += len(ids)
            while len(pending) >= room:
                yield self._filled(pending.take(room))
        if self.packing == "document" and len(pending):
            yield self._filled(pending.take(len(pending)))

    def _prepare(self, first: Document) -> int:
        """Decide how windows are filled, by the first document.

        Token ids and conversations are taken as they are; texts get the special tokens of the
        tokenizer.

        Returns:
            Tokens of documents in a window.
        """
        text = self._input
        plain = isinstance(first.content, str)
        self._choose_packing(first)
        if plain:
            self._before, self._after = (
                np.array(t, dtype=np.int64) for t in (text.before, text.after)
            )
        if plain and self.packing == "packed":
            if text.separator is None:
                raise InputError(
                    f"{text.name} has no token that ends a text, to join documents with. Take "
                    "packing = 'cut' or 'document'."
                )
            self._separator = np.array([text.separator])
        if self.packing == "document" and text.pad is None:
            raise InputError(
                f"{text.name} has no token for padding. Take packing = 'cut' or 'packed'."
            )
        text.check_length(self.recipe.context)
        return text.room(self.recipe.context) if plain else self.recipe.context

    def _ids(self, document: Document) -> Int[np.ndarray, " n"]:
        """Token ids of a document."""
        if isinstance(document.content, str):
            return self._input.tokens(document.content)
        if isinstance(document.content, list):
            return self._input.chat_tokens(document.content)
        ids = document.content
        if ids.min() < 0 or ids.max() >= self._input.vocabulary:
            raise InputError(
                f"{document.file} row {document.row} has token ids {ids.min()}..{ids.max()}; "
                f"{self._input.name} has 0..{self._input.vocabulary - 1}."
            )
        return ids

    def _filled(self, piece: "_Piece") -> tuple[_Window, Int[np.ndarray, " n"]]:
        """A window of some tokens, with special tokens around them and padding after them."""
        tokens = np.concatenate([self._before, piece.ids, self._after])
        window = _Window(piece.file, piece.row, piece.start, len(tokens))
        short = self.recipe.context - len(tokens)
        if short:
            tokens = np.pad(tokens, (0, short), constant_values=self._input.pad or 0)
        return window, tokens


def interleaved(files: Iterable[Iterator[T]]) -> Iterator[T]:
    """Items of several files in turn, of `OPEN_FILES` at a time.

    Args:
        files: Items of each file; the next file takes the place of one that has ended.
    """
    waiting = iter(files)
    opened = deque(itertools.islice(waiting, OPEN_FILES))
    while opened:
        file = opened.popleft()
        try:
            yield next(file)
            opened.append(file)
        except StopIteration:
            opened.extend(itertools.islice(waiting, 1))


class _Piece(NamedTuple):
    """Tokens of one document."""

    file: int
    row: int
    start: int
    ids: Int[np.ndarray, " n"]


class _Pending:
    """Tokens that wait for a window, in order."""

    def __init__(self) -> None:
        self._pieces: deque[_Piece] = deque()
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def put(self, piece: _Piece) -> None:
        """Add tokens."""
        if len(piece.ids):
            self._pieces.append(piece)
            self._n += len(piece.ids)

    def take(self, n: int) -> _Piece:
        """Remove the first `n` tokens; the piece says where the first of them is from."""
        self._n -= n
        first = self._pieces[0]
        parts: list[np.ndarray] = []
        while n:
            piece = self._pieces.popleft()
            parts.append(piece.ids[:n])
            if len(piece.ids) > n:
                rest = piece._replace(start=piece.start + n, ids=piece.ids[n:])
                self._pieces.appendleft(rest)
            n -= len(parts[-1])
        return first._replace(ids=np.concatenate(parts))


class _Spool:
    """Rows of whole numbers in a temporary file, which is gone when the rows are."""

    def __init__(self, width: int) -> None:
        self._row_bytes = width * 4
        with temporary_room():
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed below
        weakref.finalize(self, self._file.close)
        self._ahead: list[bytes] = []
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def append(self, row: Int[np.ndarray, " width"]) -> None:
        """Add a row."""
        self._ahead.append(row.astype(np.int32).tobytes())
        self._n += 1
        if len(self._ahead) == BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        data = b"".join(self._ahead)
        self._ahead = []
        with temporary_room():
            while data:
                data = data[self._file.write(data) :]

    def __getitem__(self, index: int) -> Int[np.ndarray, " width"]:
        row = range(self._n)[index]
        data = os.pread(self._file.fileno(), self._row_bytes, row * self._row_bytes)
        return np.frombuffer(bytearray(data), np.int32)


def text_samples(texts: Iterable[Any], network: nn.Module, **settings: Any) -> TextSamples:
    """Cut any texts into windows of tokens for a network.

    Args:
        texts: Texts, sequences of token ids, or rows with a column of either, such as a streaming
            data set of the `datasets` library; read once.
        network: Network with a tokenizer as `.input`.
        settings: Fields of `Texts` but for its source.

    Examples:
        >>> import mechatlas as ma
        >>> network = ma.load_network(
        ...     ma.Network(name="transformer", arguments={"path": "all_minilm_l6_v2"})
        ... )  # doctest: +SKIP
        >>> ma.text_samples(["A cat.", "A dog."], network, packing="document")  # doctest: +SKIP
        2 samples: windows of 128 tokens of texts
    """
    return TextSamples(Texts(source=Path("texts"), **settings), network, texts=texts)
