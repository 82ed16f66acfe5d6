"""Commands in forked children of one warm process, and what became of them.

Everything is imported and compiled already, so that a try costs no more than the command itself.
"""

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mechatlas.app.cli import fail, main
from mechatlas.app.commands import serve
from mechatlas.app.report import server
from mechatlas.base import UserError
from mechatlas.dictionaries.formats import load
from mechatlas.files import checksum
from mechatlas.tensorfiles import read_table

HANG_SECONDS = 10.0
"""Seconds after which a command that should take less than one counts as hung."""
VOLATILE = re.compile(rb'"?\b(\w*seconds\w*|peak_bytes|n_kept)"?( =|:) (\[[^]]*\]|[0-9.e+-]+|null)')
"""Entries of JSON that differ between two runs of one command."""
MANIFEST_SUM = re.compile(rb'"(result\.json|history\.json|runs\.parquet|checksum)": "[0-9a-f]+"')
"""Checksums of files with such entries."""

Prepare = Callable[[], object]
"""Callback that runs in the child before the command."""


class Ended(NamedTuple):
    """End of one command."""

    code: int | None
    """Exit code, minus the signal that ended it, or None if it hung."""
    output: str
    errors: str

    @property
    def said(self) -> str:
        """Everything that was said; `sweep` and `verify` list faults in their result."""
        return self.errors + self.output

    @property
    def message(self) -> str:
        """Last line of what was said about an error, or of the result."""
        lines = self.errors.strip().splitlines()
        told = [line for line in lines if line.startswith("mechatlas: ")] or lines[-1:]
        return " / ".join([*told, *self.output.strip().splitlines()[-4:]])


class Child:
    """Command in a forked process.

    Args:
        words: Words of the command line; a function is called instead.
        here: Folder in which it runs.
        prepare: Callback before the command.
    """

    def __init__(
        self,
        words: Sequence[str] | Callable[[], object],
        here: Path,
        prepare: Prepare | None = None,
    ) -> None:
        here.mkdir(parents=True, exist_ok=True)
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.pid: int = os.fork()
        if self.pid == 0:
            _run(words, here, prepare, [file.fileno() for file in self._files])

    def send(self, signal_: int) -> None:
        """Send a signal, if the child still runs."""
        os.kill(self.pid, signal_)

    def wait(self, seconds: float = HANG_SECONDS) -> Ended:
        """Wait for the end, and kill the child if it hangs.

        One that sleeps for some wall seconds, or works for as many seconds of CPU time, hangs.
        """
        limit, worked = time.monotonic() + seconds, 0.0
        while (found := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            time.sleep(0.005)
            if time.monotonic() > limit:
                now, waits_for_processor = progress(self.pid)
                if now < seconds and (worked < now or waits_for_processor):
                    limit, worked = limit + seconds, now
                    continue
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ended(None, *self._said())
        return Ended(os.waitstatus_to_exitcode(found[1]), *self._said())

    def _said(self) -> tuple[str, str]:
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return texts[0], texts[1]


def run(
    words: Sequence[str] | Callable[[], object], here: Path, prepare: Prepare | None = None
) -> Ended:
    """Run a command in a child to its end."""
    return Child(words, here, prepare).wait()


def answer(words: Sequence[str]) -> None:
    """Run a command, or the verb `load`, which no command has for its own.

    Raises:
        SystemExit: As the command line does.
    """
    if words[0] == "serve":
        _fetch_when_served()
    if words[0] != "load":
        main(words)
        return
    try:
        dictionary = load(Path(words[1]))
    except UserError as error:
        fail(str(error))
    for name, tensor in sorted(dictionary.state_dict().items()):
        print(name, checksum(tensor.contiguous().numpy().tobytes()))


def _fetch_when_served() -> None:
    """Let `serve` end after all that it serves was fetched, into a folder beside."""
    served: list[tuple[Path, str]] = []

    @contextlib.contextmanager
    def watched(folder: Path, port: int) -> Iterator[str]:
        with server.serve(folder, port) as address:
            served.append((folder, address))
            yield address

    def fetch() -> None:
        for folder, address in served:
            for path in sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()):
                to = Path("served", path)
                to.parent.mkdir(parents=True, exist_ok=True)
                with urllib.request.urlopen(address + urllib.parse.quote(str(path))) as answer:
                    to.write_bytes(answer.read())

    serve.serve, serve.wait = watched, fetch


def _run(
    words: Sequence[str] | Callable[[], object],
    here: Path,
    prepare: Prepare | None,
    outputs: list[int],
) -> None:
    """Run the command and end the process, never returning to the harness."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, descriptor in enumerate(outputs, start=1):
            os.dup2(descriptor, number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(here)
        if prepare is not None:
            prepare()
        words() if callable(words) else answer(words)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def progress(pid: int) -> tuple[float, bool]:
    """CPU seconds of a child, and whether it could go on if the machine were not busy."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, False
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds, fields[0] in "RD"


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder by name, without what differs between two runs of one command."""
    if folder.is_file():
        return {folder.name: _lasting(folder)}
    return {
        str(path.relative_to(folder)): _lasting(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _lasting(file: Path) -> bytes:
    data = file.read_bytes()
    if file.name == "runs.parquet":
        return repr(read_table(file).drop_columns("seconds").to_pydict()).encode()
    if file.suffix not in (".json", ".html", ".js"):
        return data
    return MANIFEST_SUM.sub(b"", VOLATILE.sub(b"", data))
