"""Harness of faults: `python -m tests.faults [--short] [--thin N] [PIECE ...]`.

A piece is one of kills, damage, unfinished, inputs, limits, hostile, fuzz and memory, or of one
command only, such as `kills:train`. The table of outcomes is printed and written to a file; the
exit code is 1 if a try ended as it must not.
"""

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, TypeVar

from tests.faults import damage, fuzz, hostile, kills, limits, memory
from tests.faults.table import Table
from tests.faults.world import READ_ALL, World, make

Choice = TypeVar("Choice")
SHORT_COMMANDS = {
    "kills": ("train", "prove"),
    "damage": ("train", "branches", "report", "verify"),
    "inputs": ("collect",),
    "unfinished": ("train",),
    "limits": ("prove",),
    "hostile": ("branches", "collect"),
    "fuzz": ("train", "report"),
}
"""Commands of the short form; the full one has all."""


class Effort(NamedTuple):
    """Amount of tries."""

    short: bool
    """Whether a few tries of each kind are enough."""
    thin: int
    """One in so many tries is made: up to 8 of every kind of file, beyond that of fewer files."""

    @property
    def files(self) -> int:
        """Of so many files one is damaged."""
        return max(1, self.thin // 8)

    def pick(self, short: Choice, full: Choice) -> Choice:
        """Choose by the form."""
        return short if self.short else full

    def of(self, tries: int) -> int:
        """Number of tries, of those of the full form."""
        return 1 if self.short else max(1, tries // self.thin)

    def damages(self, flips: int) -> damage.Damages:
        """Ways to damage a file."""
        return damage.Damages(flips, min(self.thin, 8), one_cut=self.short)


def run_kills(world: World, command: str, place: Path, table: Table, *, effort: Effort) -> None:
    """Kills and signals."""
    every = effort.pick(12, effort.thin)
    kills.kill_at_points(world, command, place, table, every=every)
    kills.kill_at_random(world, command, place, table, tries=effort.of(8))
    kills.interrupt(world, command, place, table, tries=effort.of(4))


def run_damage(world: World, command: str, place: Path, table: Table, *, effort: Effort) -> None:
    """Damage of files that commands wrote."""
    targets = [t for t in damage.targets(world) if t.command == command]
    flips = effort.pick(1, 4 if command in READ_ALL else 8)
    amount = effort.damages(flips)
    if command in SLOW and not effort.short:
        amount = amount._replace(thin=amount.thin * SLOW[command])
    for target in targets[:: effort.pick(14, effort.files)]:
        damage.read_damaged(world, target, place, table, amount)


def run_inputs(world: World, command: str, place: Path, table: Table, *, effort: Effort) -> None:
    """Damage of files that people bring."""
    targets = [t for t in damage.input_targets(world) if t.command == command]
    for target in targets[:: effort.pick(9, effort.files)]:
        damage.read_damaged(world, target, place, table, effort.damages(effort.pick(1, 8)))


def run_unfinished(
    world: World, command: str, place: Path, table: Table, *, effort: Effort
) -> None:
    """Damage of what a killed run left."""
    if command == "report":
        return
    flips, most = effort.pick((1, 2), (4, -(-12 // effort.files)))
    damage.continue_damaged(world, command, place, table, effort.damages(flips), most_files=most)


def run_limits(world: World, command: str, place: Path, table: Table, *, effort: Effort) -> None:
    """Disks, writers and clocks."""
    sizes = effort.pick([1000], [500, 5000, 30_000][:: effort.thin])
    limits.full_disk(world, command, place / "limit", table, sizes)
    disks = effort.pick([40_960, 102_400], [40_960, 102_400][:: effort.thin])
    limits.full_tmpfs(world, command, place / "disk", table, disks)
    limits.unwritable(world, command, place / "unwritable", table)
    limits.two_writers(world, command, place / "two", table, tries=effort.of(3))
    limits.run_twice(world, command, place / "twice", table)
    every = effort.pick(9, 6 * effort.thin)
    limits.deleted(world, command, place / "deleted", table, every=every)
    limits.odd_clock(world, command, place / "odd", table)


def run_hostile(world: World, command: str, place: Path, table: Table, *, effort: Effort) -> None:
    """Files made to do harm."""
    hostile.attack_all(world, command, place, table, every=effort.pick(16, effort.thin))


def run_fuzz(world: World, command: str, place: Path, table: Table, *, effort: Effort) -> None:
    """Odd values in manifests, results and proofs."""
    tries, every = effort.pick((2, 4), (effort.of(2 if command in SLOW else 6), effort.files))
    fuzz.fuzz_json(world, command, place, table, tries=tries, every=every)
    if command == "prove":
        fuzz.fuzz_proofs(world, place, table, tries=effort.pick(8, effort.of(200)))


def run_memory(world: World, command: str, place: Path, table: Table, *, effort: Effort) -> None:
    """Ceilings of memory; not in the short form."""
    del world, place
    if command == "collect" and not effort.short:
        memory.keep_ceilings(table)


SLOW = {"report": 4, "serve": 8}
"""Command that draws pages -> one in so many ways to damage a file is tried, others of the next."""
IN_MEMORY = Path("/dev/shm")
"""Place of the tries, which flush files all the time."""
PIECES = {
    "kills": run_kills,
    "damage": run_damage,
    "inputs": run_inputs,
    "unfinished": run_unfinished,
    "limits": run_limits,
    "hostile": run_hostile,
    "fuzz": run_fuzz,
    "memory": run_memory,
}
ONLY = {
    "load": ("inputs",),
    "sites": ("inputs", "hostile"),
    "serve": ("damage", "hostile", "fuzz"),
    "verify": ("damage", "hostile", "fuzz"),
}
"""Pieces of commands that write no folder, so that only what they read can be at fault."""


def main() -> None:
    """Run the pieces that are asked for.

    Raises:
        SystemExit: With 1 if a try ended as it must not.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pieces", nargs="*", default=list(PIECES), metavar="PIECE")
    parser.add_argument("--short", action="store_true", help="a few tries of each kind")
    parser.add_argument("--thin", type=int, default=1, help="make one in so many tries")
    parser.add_argument("--world", type=Path, help="folder of the world, to make or use again")
    parser.add_argument("--out", type=Path, default=Path("faults.md"), help="file of the table")
    options = parser.parse_args()
    out, table = options.out.resolve(), Table()
    effort = Effort(options.short, options.thin)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as temporary:
        place = Path(temporary)
        place.chmod(0o755)  # others must be able to try, and fail, to write below
        world = make(options.world or place / "world", short=options.short)
        os.chdir(place)
        gc.collect()
        gc.freeze()  # else every child copies all objects when it looks for garbage
        for word in options.pieces:
            piece, _, command = word.partition(":")
            chosen = SHORT_COMMANDS.get(piece) if options.short else None
            for each in [command] if command else chosen or [*world.commands, *ONLY]:
                if piece in ONLY.get(each, PIECES):
                    here = place / piece / each
                    here.mkdir(parents=True, exist_ok=True)
                    before, clock = table.tries(), time.monotonic()
                    PIECES[piece](world, each, here, table, effort=effort)
                    table.write(out)
                    took = time.monotonic() - clock
                    print(
                        f"{piece}:{each}: {table.tries() - before} tries in {took:.0f} s",
                        flush=True,
                    )
    print("\n".join(table.lines()))
    raise SystemExit(1 if table.bad() else 0)


if __name__ == "__main__":
    main()
