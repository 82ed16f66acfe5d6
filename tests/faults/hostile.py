"""Folders and files made to do harm: none may run code, write outside, or take the memory.

Every attack is on a file of the world, which is set back afterwards.
"""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mechatlas.files import MANIFEST, SEAL, checksum, write_manifest
from tests.faults.child import run
from tests.faults.damage import damaged
from tests.faults.table import Table, outcome_of
from tests.faults.world import FIRST_SHARD, PARENTS, READ_ALL, SITES, World

CANARY = "/tmp/mechatlas-canary"
"""File that is there if the code of an attack ran."""
SPARE_BYTES = 2 << 30
"""Address space that a command may take beyond what the warm process has."""
BOMB_BYTES = 3 << 30
"""Size that small files claim or inflate to."""


class Attack(NamedTuple):
    """Something in the place of a file."""

    name: str
    file: str
    attack: Callable[[Path, bytes], object]


class Trap:
    """Object that runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Name the code."""
        return os.system, (f"touch {CANARY}",)


def edited(**changes: Any) -> Callable[[Path, bytes], object]:
    """Attack that sets entries of a JSON file; `a__b` is the entry b of the entry a."""

    def edit(file: Path, data: bytes) -> None:
        values = json.loads(data)
        for key, value in changes.items():
            *parents, last = key.split("__")
            inner = values
            for name in parents:
                inner = inner[name]
            inner[last] = value(inner.get(last)) if callable(value) else value
        rewrite(file, values)

    return edit


def rewrite(file: Path, values: Any) -> None:
    """Write other JSON, with all checksums right again, as whoever means harm would."""
    if file.name == MANIFEST:
        write_manifest(file, {key: values[key] for key in values if key != SEAL})
        return
    file.write_text(json.dumps(values))
    forge(file)


def forge(file: Path) -> None:
    """State the checksum that a file has now in the manifest beside it, if there is one."""
    manifest = file.with_name(MANIFEST)
    if not manifest.is_file():
        return
    facts = json.loads(manifest.read_text())
    facts.get("files", {})[file.name] = checksum(file.read_bytes())
    rewrite(manifest, facts)


def replaced(data: bytes | str) -> Callable[[Path, bytes], object]:
    """Attack that writes other contents."""
    content = data.encode() if isinstance(data, str) else data

    def replace(file: Path, _: bytes) -> None:
        file.write_bytes(content)
        if file.name != MANIFEST:
            forge(file)

    return replace


CALLABLES = (
    ("os:system", {"command": f"touch {CANARY}"}),
    ("posix:system", {"command": f"touch {CANARY}"}),
    ("subprocess:getoutput", {"cmd": f"touch {CANARY}"}),
    ("builtins:exec", {"source": f"open({CANARY!r}, 'w')"}),
    ("tests.faults.hostile:trap", {}),
)


def trap() -> None:
    """Run the code of an attack."""
    Path(CANARY).touch()


def attacks(command: str) -> list[Attack]:
    """All attacks on files of the world that a command reads."""
    found: list[Attack] = []
    for folder in PARENTS.get(command, ("store", SITES[0])):
        found += _on_store(folder) if folder in FIRST_SHARD else _on_dictionary(folder)
    if command in READ_ALL:
        found += _naming_code("posed")
        for file in ("match/manifest.json", "match/result.json", "basis/spectra.json",
                     "proof/neurons.json", "branches/picture.json", "effects/result.json",
                     "flow/result.json", f"{SITES[0]}/history.json"):  # fmt: skip
            found += _no_json(file)
    return found


def _naming_code(store: str) -> list[Attack]:
    return [
        Attack(f"a manifest names {name}", f"{store}/manifest.json",
               edited(recipe__network={"name": name, "arguments": arguments}))
        for name, arguments in CALLABLES
    ]  # fmt: skip


def _on_store(store: str) -> list[Attack]:
    file = f"{store}/manifest.json"
    escape = edited(shards=lambda shards: [[*s[:2], f"../{s[2]}", *s[3:]] for s in shards])
    absolute = edited(shards=lambda shards: [[*s[:2], "/etc/passwd", *s[3:]] for s in shards])
    found = [
        *_naming_code(store),
        Attack("shards outside the store", file, escape),
        Attack("absolute paths of shards", file, absolute),
    ]
    for n in (-5, 10**12, "7", 0, 2.5, None, True):
        wrong = edited(shards=lambda shards, n=n: [[*s[:3], n, *s[4:]] for s in shards])
        found.append(Attack(f"{n!r} rows in a shard", file, wrong))
    header = Attack("a header of 2^60 bytes", FIRST_SHARD[store], _long_header)
    return [*found, *_no_json(file), header]


def _on_dictionary(folder: str) -> list[Attack]:
    weights = f"{folder}/dictionary.safetensors"
    found = [
        Attack(f"a dictionary that claims {dims}", weights, _claim(*dims))
        for dims in ((30_000, 30_000), (184, 10**7), (2**31, 2**31), (0, 0), (-1, 5))
    ]
    header = Attack("a header of 2^60 bytes", weights, _long_header)
    return [*_no_json(f"{folder}/manifest.json"), *found, header]


def _no_json(file: str) -> list[Attack]:
    return [
        Attack(f"{what} in {file}", file, replaced(text))
        for what, text in (
            ("deep lists", "[" * 100_000 + "]" * 100_000),
            ("deep objects", '{"a":' * 100_000 + "1" + "}" * 100_000),
            ("a number of 5,000 digits", '{"schema": ' + "9" * 5000 + "}"),
            ("a list", "[]"), ("null", "null"), ("NaN", '{"a": NaN}'), ("a lone string", '"a"'),
            ("an empty object", "{}"), ("bytes that are no text", b"\xff\xfe\x00{}"),
        )
    ]  # fmt: skip


def _claim(d_in: int, n_latents: int) -> Callable[[Path, bytes], object]:
    """Attack that changes the sizes in the metadata of a dictionary, and mends its checksum."""

    def claim(file: Path, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        settings = json.loads(header["__metadata__"]["mechatlas"])
        text = json.dumps(settings)
        for key, value in (("d_in", d_in), ("n_latents", n_latents)):
            old = _find(settings, key)
            text = text.replace(f'"{key}": {old}', f'"{key}": {value}')
        header["__metadata__"]["mechatlas"] = text
        packed = json.dumps(header).encode()
        changed = struct.pack("<Q", len(packed)) + packed + data[8 + length :]
        file.write_bytes(changed)
        forge(file)

    return claim


def _find(values: Any, key: str) -> Any:
    if isinstance(values, dict):
        if key in values:
            return values[key]
        return next((f for v in values.values() if (f := _find(v, key)) is not None), None)
    return None


def _long_header(file: Path, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", 2**60) + data[8:])


def input_attacks(
    world: World,
) -> list[tuple[str, str, Callable[[Path, bytes], object], list[str]]]:
    """Attacks on files that people bring: name, file, attack, words."""
    place = world.place
    images = ["collect", place("collect.toml"), "--out", "out", "--samples.source"]
    arrays = ["collect", place("arrays.toml"), "--out", "out", "--samples.source"]
    language = ["collect", place("language.toml"), "--out", "out"]
    pickled = pickle.dumps(Trap())
    weights = ["collect", place("collect.toml"), "--out", "out", "--network.weights"]
    return [
        ("a pickle", "weights.pt", replaced(pickled), [*weights, place("weights.pt")]),
        ("a pickle", "rows.npy", replaced(_pickled_npy()), [*arrays, place("rows.npy")]),
        ("a pickle", "rows.npz", lambda f, _: f.write_bytes(_archive("rows.npy", _pickled_npy())),
         [*arrays, place("rows.npz")]),
        ("a pickle", "net/table.npy", replaced(_pickled_npy()), world.words("prove")),
        ("a bomb", "photos.zip", lambda f, _: _bomb(f, "a.jpg"), [*images, place("photos.zip")]),
        ("a bomb", "rows.npz", lambda f, _: _bomb(f, "rows.npy"), [*arrays, place("rows.npz")]),
        ("a bomb", "texts.zip", lambda f, _: _bomb(f, "a.txt"),
         ["collect", place("texts.toml"), "--out", "out", "--samples.source", place("texts.zip")]),
        ("a header of 10^14 numbers", "rows.npy", replaced(_long_npy()),
         [*arrays, place("rows.npy")]),
        ("a header of 10^14 numbers", "net/table.npy", replaced(_long_npy()),
         world.words("prove")),
        ("a pickle", "llama/model.safetensors", replaced(pickled), language),
        ("code of its own", "llama/config.json", _with_code, language),
        *((what, f"{command}.toml", replaced(text), words)
          for command, words in (("train", world.words("train")), ("sweep", world.words("sweep")),
                                 ("collect", ["sites", place("collect.toml")]))
          for what, text in (
            ("deep lists", "a = " + "[" * 100_000 + "]" * 100_000),
            ("a number of 5,000 digits", "steps = " + "9" * 5000),
            ("a key of 50,000 parts", "a" + ".a" * 50_000 + " = 1"),
            ("bytes that are no text", b"\xff\xfe"),
        )),
    ]  # fmt: skip


def _with_code(file: Path, data: bytes) -> None:
    """Let the configuration of a language model name code in its folder."""
    file.with_name("own.py").write_text(f"open({CANARY!r}, 'w')")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edited(auto_map=names, model_type="own", architectures=["OwnForCausalLM"])(file, data)


def _pickled_npy() -> bytes:
    data = io.BytesIO()
    np.save(data, np.array([Trap()], object), allow_pickle=True)
    return data.getvalue()


def _archive(name: str, content: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, content)
    return data.getvalue()


def _bomb(file: Path, name: str) -> None:
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as member,
    ):
        for _ in range(BOMB_BYTES >> 24):
            member.write(bytes(1 << 24))


def _long_npy() -> bytes:
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        data, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)}
    )
    return data.getvalue() + bytes(1000)


def attack_all(world: World, command: str, place: Path, table: Table, *, every: int = 1) -> None:
    """Run a command on every hostile file that it reads."""
    tried: list[tuple[str, str, Callable[[Path, bytes], object], list[str]]] = []
    if command in (*READ_ALL, *PARENTS):
        for attack in attacks(command):
            folder = world.place(attack.file.split("/")[0])
            words = world.reads(command, folder) if command in READ_ALL else world.words(command)
            if (world.root / attack.file).is_file():
                tried.append((attack.name, attack.file, attack.attack, words))
    tried += [
        each for each in input_attacks(world)
        if each[3][0] == command and (world.root / each[1]).is_file()
    ]  # fmt: skip
    for name, file, attack, words in tried[::every]:
        _try(world, name, world.root / file, attack, words, place, table)


def _try(
    world: World,
    name: str,
    file: Path,
    attack: Callable[[Path, bytes], object],
    words: list[str],
    place: Path,
    table: Table,
) -> None:
    Path(CANARY).unlink(missing_ok=True)
    here, beside = place / "here", file.with_name("manifest.json")
    kept = beside.read_bytes() if beside.is_file() else None
    with damaged(file, attack):
        ended = run(words, here, _limit_memory)
    outside = [p for p in place.iterdir() if p.name != "here"]
    if kept is not None:
        beside.write_bytes(kept)
    outcome = outcome_of(ended.code)
    example = f"{name}: {words[0]}: exit {ended.code}: {ended.message}"
    if Path(CANARY).exists() or outside:
        outcome, example = "harm", f"{example}; ran code or wrote {outside}"
    names = (file.name, file.parent.name)
    if outcome == "named" and not any(name in ended.said for name in names):
        outcome = "unnamed"
    kind = f"hostile {file.relative_to(world.root)}"
    table.add(kind, words[0], outcome, example)
    shutil.rmtree(here, ignore_errors=True)


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    size = next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmSize" in line)
    resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_BYTES, resource.RLIM_INFINITY))
