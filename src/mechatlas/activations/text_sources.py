"""Documents in files of text or of rows, read one after another in constant memory.

    documents     files below a path -> their documents
    records       any iterable of texts, token ids or rows -> its documents

Text files (.txt) are one document each, in pieces. Files of rows (.jsonl, .json, .csv, .parquet)
have a document in a column of every row. Any of them may be packed with gzip, in a folder or in a
zip.
"""

import csv
import gzip
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np

from mechatlas.base import InputError
from mechatlas.sources import MEMORY_MIB, Archive, Files, Folder, check_size, matching, reason_of

PIECE = 1 << 18
"""Characters of a text that are tokenized at once."""
LINE_LIMIT = 1 << 28
"""Bytes of a line above which a file of rows is refused."""
TEXT = ".txt"
"""Ending of files that are one document each."""
MESSAGES = "messages"
"""Column of conversations where none is named."""

Row = tuple[int, Any]
"""Number of a row, from 1, and its value: a text, or a mapping of columns."""


class Document(NamedTuple):
    """A document, or a piece of one."""

    file: str
    row: int
    """Number of the row, from 1; 0 where the file is one document."""
    content: Any
    """Text, token ids, or the messages of a conversation."""


def documents(
    source: Path, include: str, column: str | None, *, chat: bool, memory_mib: int = MEMORY_MIB
) -> Iterator[Iterator[Document]]:
    """Read the documents of a file, or of each of the files in a folder or zip.

    Args:
        source: File, folder or zip.
        include: Glob over file names inside a folder or zip.
        column: Column of the rows with the documents; by default the only one that can hold them.
        chat: Whether they are conversations.
        memory_mib: Memory that the process should stay under; for .json files, which are read
            whole.

    Returns:
        The documents of each file, by name. A file is opened when its first document is read.

    Raises:
        InputError: There is nothing there, a file is of another type or damaged, or a row has no
            such column.
    """
    files, names = _open(source, include)
    alone = isinstance(files, Folder) and source.is_file()
    for name in names:
        where = str(source) if alone else f"{source}: {name}"
        yield _documents_of_file(files, name, where, column, chat=chat, memory_mib=memory_mib)


def _documents_of_file(
    files: Files, name: str, where: str, column: str | None, *, chat: bool, memory_mib: int
) -> Iterator[Document]:
    with files.stream(name) as packed, _explained(where):
        gzipped = name.lower().endswith(".gz")
        file = cast(io.BufferedIOBase, gzip.GzipFile(fileobj=packed)) if gzipped else packed
        if _suffix(name) == TEXT:
            newline = "" if isinstance(files, Archive) else None
            yield from (Document(name, 0, text) for text in _pieces(file, where, newline))
        else:
            rows = _READERS[_suffix(name)](file, where, column, memory_mib)
            yield from _documents(rows, name, where, column, chat=chat)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file can make its reader raise anything
        raise InputError(
            f"{where} cannot be read ({reason_of(error)}). Is the file whole?"
        ) from error


def records(items: Iterable[Any], column: str | None, *, chat: bool) -> Iterator[Document]:
    """Read the documents of an iterable.

    Args:
        items: Texts, sequences of token ids, or rows (mappings).
        column: Column of the rows with the documents.
        chat: Whether they are conversations.
    """
    yield from _documents(enumerate(items, 1), "document", "The iterable", column, chat=chat)


def _open(source: Path, include: str) -> tuple[Files, list[str]]:
    """Files of a source, and the names of those that are read."""
    known = ", ".join(sorted({TEXT, *_READERS}))
    if source.is_file() and source.suffix.lower() != ".zip":
        if not is_text(source.name):
            raise InputError(
                f"{source} is no text: its name ends in {source.suffix or 'nothing'!r}, expected "
                f"one of {known}, any of them with .gz, or a folder or .zip of them."
            )
        return Folder(source.parent, [source.name]), [source.name]
    if not source.is_dir() and not source.is_file():
        raise InputError(f"There is no text file, folder or zip {source}.")
    files: Files = Folder(source) if source.is_dir() else Archive(source)
    names, _ = matching(files.names, include, {TEXT, ".gz", *_READERS})
    names = [name for name in names if is_text(name)]
    if not names:
        raise InputError(f"{source} has no file that matches {include!r} and ends in {known}.")
    return files, names


def is_text(name: str) -> bool:
    """Whether a file of that name is read as texts."""
    return _suffix(name) in (TEXT, *_READERS)


def _suffix(name: str) -> str:
    """Ending of a name that says what is in the file."""
    lower = name.lower().removesuffix(".gz")
    return PurePosixPath(lower).suffix


def _pieces(file: io.BufferedIOBase, where: str, newline: str | None) -> Iterator[str]:
    """Pieces of a text, cut where tokens of both sides are those of the whole."""
    text = io.TextIOWrapper(cast(Any, file), encoding="utf-8-sig", newline=newline)
    rest = ""
    while True:
        try:
            block = text.read(PIECE)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where} is not text in UTF-8 ({error.reason}: byte "
                f"0x{error.object[error.start]:02x}). Save it in UTF-8, or leave it out."
            ) from error
        if "\0" in block:
            raise InputError(f"{where} is not text: it has bytes that are zero.")
        rest += block
        end = _end_of_line(rest) if block else len(rest)
        if rest[:end]:
            yield rest[:end]
        rest = rest[end:]
        if not block:
            return


def _end_of_line(text: str) -> int:
    """Place after the last newline between two words, where tokens are those of the whole.

    After another newline or space if there is none for long, as with line ends of Windows; a token
    may then be cut in two.
    """
    at = len(text) - 1
    while (at := text.rfind("\n", 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    if len(text) < 2 * PIECE:
        return 0
    return max(text.rfind("\n"), text.rfind(" ")) + 1 or len(text)


def _documents(
    rows: Iterable[Row], file: str, where: str, column: str | None, *, chat: bool
) -> Iterator[Document]:
    """Documents in a column of rows; empty ones are passed over."""
    n_rows = n_documents = 0
    for number, value in rows:
        n_rows += 1
        if isinstance(value, Mapping):
            column = column or _guess(value, f"{where}, row {number}", chat=chat)
            if column not in value:
                raise InputError(
                    f"{where}, row {number}, has no column {column!r}; it has "
                    f"{', '.join(map(str, value)) or 'none'}."
                )
            value = value[column]
        content = _content(value, f"{where}, row {number}", column, chat=chat)
        if content is not None:
            n_documents += 1
            parts = _split(content) if isinstance(content, str) else (content,)
            yield from (Document(file, number, part) for part in parts)
    if not n_documents:
        what = f"no text in the column {column!r} of its {n_rows:,} rows" if column else "no text"
        raise InputError(f"{where} has {what}.")


def _split(text: str) -> Iterator[str]:
    """Pieces of a document that is in memory, cut as those of a file are."""
    stream, rest = io.StringIO(text), ""
    while block := stream.read(PIECE):
        rest += block
        if end := _end_of_line(rest):
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _guess(row: Mapping[str, Any], where: str, *, chat: bool) -> str:
    """Column that holds the documents, where there is only one that can."""
    if chat:
        return MESSAGES
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) == 1:
        return texts[0]
    if not texts and "input_ids" in row:
        return "input_ids"
    talk = f" It has conversations in {MESSAGES!r}: set chat = true." if MESSAGES in row else ""
    raise InputError(
        f"{where}, has {len(texts) or 'no'} columns of text; name one with `column`. Columns: "
        f"{', '.join(map(str, row))}.{talk}"
    )


def _content(value: Any, where: str, column: str | None, *, chat: bool) -> Any:
    """A document; `None` if it is empty."""
    if value is None or (isinstance(value, str | Sequence) and not len(value)):
        return None
    within = f" in the column {column!r}" if column else ""
    if chat:
        turns = isinstance(value, Sequence) and not isinstance(value, str)
        if not turns or not all(isinstance(m, Mapping) and "role" in m for m in value):
            raise InputError(
                f"{where}, holds no conversation{within}: expected a list of messages, each with "
                "its role and content."
            )
        return list(value)
    if isinstance(value, str):
        return value if not value.isspace() else None
    try:
        ids = np.asarray(value)
    except Exception:  # whatever an object of the user's raises
        ids = np.zeros(())
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{where}, holds a {type(value).__name__}{within}, expected a text or token ids."
        )
    return ids.astype(np.int64) if len(ids) else None


def _json_lines(
    file: io.BufferedIOBase, where: str, column: str | None, memory_mib: int
) -> Iterator[Row]:
    del column, memory_mib
    for number in itertools.count(1):
        line = file.readline(LINE_LIMIT)
        if not line:
            return
        if len(line) == LINE_LIMIT:
            raise InputError(f"{where}, line {number}, is longer than {LINE_LIMIT >> 20} MiB.")
        if line.strip():
            yield number, _json(line, f"{where}, line {number},")


def _json(data: bytes, where: str) -> Any:
    """Value of some JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        hint = " Rows of JSON one a line are a .jsonl file." if "Extra data" in str(error) else ""
        raise InputError(f"{where} is not JSON ({reason_of(error)}).{hint}") from error


def _json_list(
    file: io.BufferedIOBase, where: str, column: str | None, memory_mib: int
) -> Iterator[Row]:
    del column
    limit = (memory_mib << 20) // 4
    data = file.read(limit + 1)
    check_size(len(data), limit, f"{where}, which is read whole (rows of a .jsonl file are not),")
    value = _json(data, where)
    if isinstance(value, Mapping) and len(value) == 1:
        value = next(iter(value.values()))
    if not isinstance(value, list):
        raise InputError(f"{where} holds a {type(value).__name__}, expected a list of rows.")
    yield from enumerate(value, 1)


def _csv(file: io.BufferedIOBase, where: str, column: str | None, memory_mib: int) -> Iterator[Row]:
    del column, memory_mib
    csv.field_size_limit(LINE_LIMIT)
    text = io.TextIOWrapper(cast(Any, file), encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, strict=True)
    for number, row in enumerate(rows, 1):
        if None in row:
            raise InputError(
                f"{where}, row {number}, has more fields than the first row names columns."
            )
        yield number, row


def _parquet(
    file: io.BufferedIOBase, where: str, column: str | None, memory_mib: int
) -> Iterator[Row]:
    del memory_mib
    from pyarrow import parquet

    with tempfile.TemporaryFile() as whole:
        table = parquet.ParquetFile(_seekable(file, whole))
        names = table.schema_arrow.names
        columns = [column] if column in names else names  # a missing column is refused with its row
        numbers = itertools.count(1)
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from ((next(numbers), row) for row in batch.to_pylist())


def _seekable(file: io.BufferedIOBase, copy: Any) -> Any:
    """A file in which any place is near: a member of a zip is unpacked first."""
    if isinstance(file, io.BufferedReader):
        return file
    while block := file.read(1 << 20):
        copy.write(block)
    copy.seek(0)
    return copy


_READERS: dict[str, Callable[[io.BufferedIOBase, str, str | None, int], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Ending of a file of rows -> its reader."""
