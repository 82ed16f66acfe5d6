"""Manifests, results and proofs with odd values at random places, drawn by hypothesis."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mechatlas.files import MANIFEST
from tests.faults.child import run
from tests.faults.damage import damaged
from tests.faults.hostile import forge, rewrite
from tests.faults.table import Table, outcome_of
from tests.faults.world import PARENTS, READ_ALL, RUNS, SITES, World

NASTY: list[Any] = [
    None, True, False, "", "x", "../x", "\x00", [], {}, [[]], {"a": 1}, 0, -1, 1, 2**31, 2**63,
    -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 1e-308, "nan", "inf",
]  # fmt: skip
"""Values that a field of a file or recipe may be given."""


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all entries of JSON values, of long lists only the first and last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places_in(item, (*path, key))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from places_in(value[i], (*path, i))


def changed(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Copy with another value at a path; `KeyError` as the value deletes the entry."""
    copied = copy.deepcopy(values)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    if new is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return copied


def fuzz_json(
    world: World, command: str, place: Path, table: Table, *, tries: int, every: int = 1
) -> None:
    """Change entries of every JSON file that a command reads."""
    files = [(f"{name}/{file}", world.reads(command, world.place(name)))
             for name in (SITES[0], "store", *RUNS.values())
             for file in ("manifest.json", "result.json", "history.json", "spectra.json",
                          "neurons.json", "picture.json")
             if (world.root / name / file).is_file()]  # fmt: skip
    if command not in READ_ALL:
        files = [(f"{name}/manifest.json", world.words(command))
                 for name in PARENTS.get(command, ())]  # fmt: skip
    for name, words in files[::every]:
        _fuzz_one(world.root / name, name, words, place, table, tries=tries)


def _fuzz_one(
    file: Path, name: str, words: list[str], place: Path, table: Table, *, tries: int
) -> None:
    values = json.loads(file.read_text())
    paths = list(places_in(values))

    @settings(max_examples=tries, database=None, deadline=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(st.sampled_from(paths), st.sampled_from([*NASTY, KeyError]))
    def attempt(path: tuple[Any, ...], new: Any) -> None:
        here, beside = place / "here", file.with_name(MANIFEST)
        kept = beside.read_bytes()
        with damaged(file, lambda f, _: rewrite(f, changed(values, path, new))):
            ended = run(words, here)
        beside.write_bytes(kept)
        shutil.rmtree(here)
        outcome = outcome_of(ended.code)
        example = f"{path} = {new!r}: exit {ended.code}: {ended.message}"
        table.add(f"fuzzed {name}", words[0], outcome, example)

    attempt()


def fuzz_proofs(world: World, place: Path, table: Table, *, tries: int) -> None:
    """Change numbers of a proof: it is refused, or what it says is still true."""
    file, net = world.root / "proof" / "proof.safetensors", world.place("net", "net.safetensors")
    words = ["prove", "--check", world.place("proof"), net, "--json"]
    true = json.loads((world.root / "proof" / "result.json").read_text())["accuracy_exact"]
    arrays = load_file(file)
    manifest = file.with_name("manifest.json")

    @settings(max_examples=tries, database=None, deadline=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(st.sampled_from(sorted(arrays)), st.integers(0, 2**32), st.sampled_from(
        [0, -1, 1, 2, 0.5, -1e9, 1e9, 1e30, float("nan"), float("inf")]))  # fmt: skip
    def attempt(key: str, number: int, new: float) -> None:
        other = {k: v.copy() for k, v in arrays.items()}
        if not other[key].size:
            return
        with np.errstate(all="ignore"):
            other[key].reshape(-1)[number % other[key].size] = np.array(new).astype(
                other[key].dtype
            )
        header = _metadata(file)
        kept = manifest.read_bytes()

        def write(path: Path, _: bytes) -> None:
            save_file(other, path, metadata=header)
            forge(path)

        with damaged(file, write):
            ended = run(words, place / "here")
        manifest.write_bytes(kept)
        outcome = outcome_of(ended.code)
        if ended.code == 0 and json.loads(ended.output)["accuracy_bound"] > true:
            outcome = "harm"
        table.add("fuzzed proof", "prove", outcome, f"{key} {new}: {ended.code} {ended.message}")

    attempt()


def _metadata(file: Path) -> dict[str, str]:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__") or {}
