"""Harness of faults: `python -m tests.faults [--short] [PIECE ...]`.

A piece is one of kills, damage, unfinished, inputs, limits, hostile, fuzz and memory, or of one
command only, such as `kills:train`. The table of outcomes is printed and written to a file; the
exit code is 1 if a try ended as it must not.
"""

import argparse
import gc
import os
import tempfile
from pathlib import Path

from tests.faults import damage, fuzz, hostile, kills, limits, memory
from tests.faults.fuzz import READING
from tests.faults.table import Table
from tests.faults.world import World, make

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


def run_kills(world: World, command: str, place: Path, table: Table, *, short: bool) -> None:
    """Kills and signals."""
    every, n_last, tries = (12, 1, 1) if short else (1, 0, 25)
    kills.kill_at_points(world, command, place, table, every=every, n_last=n_last)
    kills.kill_at_random(world, command, place, table, tries=tries)
    kills.interrupt(world, command, place, table, tries=1 if short else 6)


def run_damage(world: World, command: str, place: Path, table: Table, *, short: bool) -> None:
    """Damage of files that commands wrote."""
    targets = [t for t in damage.targets(world) if t.command == command]
    for target in targets[::14] if short else targets:
        flips = 1 if short else 12 if command in READING else 30
        damage.read_damaged(world, target, place, table, flips=flips, one_cut=short)


def run_inputs(world: World, command: str, place: Path, table: Table, *, short: bool) -> None:
    """Damage of files that people bring."""
    targets = [t for t in damage.input_targets(world) if t.command == command]
    for target in targets[:: 9 if short else 1]:
        flips = 1 if short else 50
        damage.read_damaged(world, target, place, table, flips=flips, one_cut=short)


def run_unfinished(world: World, command: str, place: Path, table: Table, *, short: bool) -> None:
    """Damage of what a killed run left."""
    if command == "report":
        return
    flips, most = (1, 2) if short else (20, 12)
    damage.continue_damaged(
        world, command, place, table, flips=flips, most_files=most, one_cut=short
    )


def run_limits(world: World, command: str, place: Path, table: Table, *, short: bool) -> None:
    """Disks, writers and clocks."""
    sizes = [1000] if short else [0, 1000, 5000, 30_000, 200_000]
    limits.full_disk(world, command, place / "limit", table, sizes)
    limits.full_tmpfs(world, command, place / "disk", table, [4096, 40_960, 102_400][short:])
    limits.unwritable(world, command, place / "unwritable", table)
    limits.two_writers(world, command, place / "two", table, tries=1 if short else 8)
    limits.deleted(world, command, place / "deleted", table, every=9 if short else 2)
    limits.odd_clock(world, command, place / "odd", table)


def run_hostile(world: World, command: str, place: Path, table: Table, *, short: bool) -> None:
    """Files made to do harm."""
    hostile.attack_all(world, command, place, table, every=16 if short else 1)


def run_fuzz(world: World, command: str, place: Path, table: Table, *, short: bool) -> None:
    """Odd values in manifests, results and proofs."""
    tries, every = (2, 4) if short else (40, 1)
    fuzz.fuzz_json(world, command, place, table, tries=tries, every=every)
    if command == "prove":
        fuzz.fuzz_proofs(world, place, table, tries=8 if short else 300)


def run_memory(world: World, command: str, place: Path, table: Table, *, short: bool) -> None:
    """Ceilings of memory; not in the short form."""
    del world
    if command == "collect" and not short:
        memory.keep_ceilings(place, table)


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
ONLY = {"load": ("inputs",), "verify": ("damage", "hostile", "fuzz")}
"""Pieces of commands that write no folder, so that only what they read can be at fault."""


def main() -> None:
    """Run the pieces that are asked for.

    Raises:
        SystemExit: With 1 if a try ended as it must not.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pieces", nargs="*", default=list(PIECES), metavar="PIECE")
    parser.add_argument("--short", action="store_true", help="a few tries of each kind")
    parser.add_argument("--world", type=Path, help="folder of the world, to make or use again")
    parser.add_argument("--out", type=Path, default=Path("faults.md"), help="file of the table")
    options = parser.parse_args()
    out, table = options.out.resolve(), Table()
    with tempfile.TemporaryDirectory() as temporary:
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
                    PIECES[piece](world, each, here, table, short=options.short)
                    table.write(out)
    print("\n".join(table.lines()))
    raise SystemExit(1 if table.bad() else 0)


if __name__ == "__main__":
    main()
