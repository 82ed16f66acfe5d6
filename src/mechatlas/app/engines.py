"""Engines: where the pieces of a large piece of work run.

    Here        one after another in this process
    Processes   processes of this machine, each with its share of the cores
    Ray         workers of a Ray cluster, or of one that is started here (extra `[ray]`)
    as_engine   "here", "processes:4", "ray" or "ray://host:10001" -> the engine

Each `map` gives results as they finish, with the numbers of their pieces. The piece of a worker
that is lost runs again; one that loses three workers ends the work, with what is finished kept.
Work and pieces go to other processes, so the work is a function of a module and the pieces are
plain values. Workers end with the process that they work for, however that ends.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mechatlas.app.progress import silence
from mechatlas.base import Engine, Here, RecipeError, UserError, Work

TRIES = 3
"""Workers that a piece may lose."""
GO_ON = "What is finished is kept; the same command goes on from there."


class LostPieceError(UserError):
    """Piece of work that ended its worker again and again."""


class LostClusterError(UserError):
    """Cluster that went away while it had work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Fields of commands whose work comes in pieces."""

    engine: str = "here"
    """Engine that does the work: "here", "processes:N" for N processes of this machine, "ray", or
    "ray://HOST:PORT" for a cluster that sees the same files."""

    def elsewhere(self) -> Engine | None:
        """Engine that runs in other processes; None for this one.

        Raises:
            RecipeError: There is no such engine.
        """
        engine = as_engine(self.engine)
        return None if isinstance(engine, Here) else engine


@dataclasses.dataclass(frozen=True)
class Processes:
    """Engine that runs the pieces in processes of this machine."""

    n: int
    """Number of processes."""

    def map(
        self, work: Work, pieces: Iterable[Any], *, shared: Any = None
    ) -> Iterator[tuple[int, Any]]:
        """Run all pieces, `n` at once; see `Engine`.

        Raises:
            LostPieceError: A piece ended its process three times.
        """
        left, again = enumerate(pieces), []
        lost: Counter[int] = Counter()
        running: dict[Connection, tuple[Any, int, Any]] = {}
        idle: list[tuple[Any, Connection]] = []
        try:
            while True:
                while len(running) < self.n and (
                    taken := again.pop() if again else next(left, None)
                ):
                    process, line = idle.pop() if idle else _worker(work, shared, self.n)
                    running[line] = (process, taken[0], taken[1])
                    with contextlib.suppress(BrokenPipeError):  # seen below, as a lost worker
                        line.send(taken[1])
                if not running:
                    return
                for line in wait(list(running)):
                    assert isinstance(line, Connection)
                    process, number, piece = running.pop(line)
                    try:
                        succeeded, result = line.recv()
                    except (EOFError, ConnectionResetError):
                        process.join()
                        lost[number] += 1
                        if lost[number] >= TRIES:
                            reason = f"exit code {process.exitcode}"
                            raise LostPieceError(_lost(number, piece, reason)) from None
                        again.append((number, piece))
                        continue
                    if not succeeded:
                        raise result
                    idle.append((process, line))
                    yield number, result
        finally:
            for process, line in [*idle, *((p, line) for line, (p, *_) in running.items())]:
                process.terminate()
                process.join()
                line.close()


def _worker(work: Work, shared: Any, n: int) -> tuple[Any, Connection]:
    """Start a process that runs pieces, and the line to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    n_threads = max(1, (os.cpu_count() or 1) // n)
    process = context.Process(target=_run_pieces, args=(theirs, work, shared, n_threads))
    process.start()
    theirs.close()
    return process, ours


def _run_pieces(line: Connection, work: Work, shared: Any, n_threads: int) -> None:
    """Run the pieces that come along a line, until it is closed."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    silence()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(n_threads)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            piece = line.recv()
            try:
                answer = (True, work(piece, shared))
            except Exception as error:  # raised again by the first process
                answer = (False, error)
            line.send(answer)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, in the middle of a piece too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _lost(number: int, piece: Any, reason: str) -> str:
    """Sentence on a piece that ended all workers that it may."""
    return (
        f"Piece {number} ({str(piece)[:200]}) ended its process {TRIES} times ({reason}). Is there "
        "memory enough? What other pieces finished is kept; fewer processes need less."
    )


@dataclasses.dataclass(frozen=True)
class Ray:
    """Engine that runs the pieces on a Ray cluster."""

    address: str | None = None
    """Address such as "ray://host:10001"; by default a cluster is started on this machine."""

    def map(
        self, work: Work, pieces: Iterable[Any], *, shared: Any = None
    ) -> Iterator[tuple[int, Any]]:
        """Run all pieces, at most two at once for each worker; see `Engine`.

        Raises:
            LostClusterError: The cluster cannot be reached, or no more.
            LostPieceError: A piece ended its worker three times.
            RecipeError: Ray is not installed.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise RecipeError("The engine ray needs Ray: pip install 'mechatlas[ray]'.") from error
        names = ("RaySystemError", "RayActorError", "LocalRayletDiedError", "NodeDiedError",
                 "ObjectLostError")  # fmt: skip
        lost = (*(getattr(ray.exceptions, name) for name in names), ConnectionError)
        crashed = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
        own, context = not ray.is_initialized(), contextlib.ExitStack()
        try:
            context.enter_context(_last_words())
            if own:
                # Not the cluster that Ray remembers, of a driver that may have been killed.
                address = self.address or os.environ.get("RAY_ADDRESS") or "local"
                try:
                    ray.init(address, log_to_driver=False, include_dashboard=False)
                except ValueError as error:  # no address, or one of another kind
                    raise RecipeError(f"Ray has no cluster at {address!r}: {error}") from error
            at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            everywhere, left = ray.put(shared), enumerate(pieces)
            remote = ray.remote(max_retries=TRIES - 1)(_run_in)
            home = str(Path.cwd())
            running: dict[Any, tuple[int, Any]] = {}
            while True:
                while len(running) < at_once and (taken := next(left, None)):
                    running[remote.remote(home, work, taken[1], everywhere)] = taken
                if not running:
                    return
                (done,), _ = ray.wait(list(running), num_returns=1)
                number, piece = running.pop(done)
                try:
                    yield number, ray.get(done)
                except crashed as error:
                    raise LostPieceError(_lost(number, piece, str(error))) from error
                except ray.exceptions.RayTaskError as error:
                    raise error.cause or error from error
        except lost as error:
            raise LostClusterError(
                f"The Ray cluster {self.address or 'of this machine'} cannot be reached: "
                f"{str(error).partition(chr(10))[0]}. {GO_ON}"
            ) from error
        finally:
            if own:
                ray.shutdown()
            context.close()


@contextlib.contextmanager
def _last_words() -> Iterator[None]:
    """Say how to go on if this process is ended meanwhile, as Ray does where its cluster is gone.

    A process that waits says it, since this one is not asked.
    """
    code = "import sys; sys.stdin.read(1) or sys.exit(sys.argv[1])"
    sentence = f"mechatlas: this process was ended, with its Ray cluster or by itself. {GO_ON}"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, sentence],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    ) as waiting:
        try:
            yield
        finally:
            waiting.communicate(b".")


def _run_in(home: str, work: Work, piece: Any, shared: Any) -> Any:
    """Run a piece in a folder of the driver's, where the worker has it too."""
    with contextlib.suppress(OSError):
        os.chdir(home)
    return work(piece, shared)


def n_processes() -> int:
    """Number of processes that `torchrun` has started to work together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all those of `torchrun`."""
    return n_processes() == 1 or os.environ.get("RANK") == "0"


def as_engine(text: str) -> Engine:
    """Parse the name of an engine.

    Args:
        text: "here", "processes:N", "ray", or the address of a cluster, "ray://HOST:PORT".

    Raises:
        RecipeError: It is none of these.
    """
    name, _, rest = text.partition(":")
    if text == "here":
        return Here()
    if name == "processes" and rest.isdecimal() and 0 < int(rest) <= 1024:
        return Processes(int(rest))
    if text == "ray" or text.startswith("ray://"):
        return Ray(None if text == "ray" else text)
    raise RecipeError(
        f"engine {text!r} is not known; engines are here, processes:N with N from 1 to 1024, ray, "
        "and the address of a cluster, ray://HOST:PORT."
    )
