"""The folders that commands write: never among files of somebody else, and always whole.

    refuse_strangers    before any work: is this folder free, or ours?
    finish              `recipe.toml` and `result.json`
    write_table         columns -> parquet
    write_tensors       arrays -> safetensors
    cost                CPU seconds and peak memory, as every `result.json` has them

Every folder holds the data, `recipe.toml`, `manifest.json` and `result.json`.
"""

import io
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from safetensors.numpy import save

from mechatlas.app.recipes import as_dict
from mechatlas.base import DiskError
from mechatlas.files import write, write_json

Result = dict[str, Any]


def refuse_strangers(out: Path, kind: str, *, unfinished: str | None = None) -> None:
    """Refuse a folder that holds anything but an earlier run of the same kind.

    Args:
        out: Where a command is about to write.
        kind: The `kind` in the manifest of what it writes.
        unfinished: A file or folder that a run which was killed leaves alone in `out`.

    Raises:
        DiskError: `out` is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise DiskError(f"{out} is a file, expected a folder.")
    inside = [path.name for path in out.iterdir()] if out.is_dir() else []
    if not inside or inside == [unfinished]:
        return
    try:
        found = json.loads((out / "manifest.json").read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != kind:
        raise DiskError(f"{out} is not empty and is not a {kind}. Choose another --out.")


def finish(out: Path, recipe: Any, result: Result, clock: float) -> Result:
    """Write `recipe.toml` and `result.json`, and return the result with its folder.

    Args:
        out: The folder.
        recipe: What it was made from, a dataclass.
        result: What was found.
        clock: `time.process_time()` when the work began.
    """
    write(out / "recipe.toml", tomli_w.dumps(as_dict(recipe)).encode())
    whole = {**result, **cost(clock)}
    write_json(out / "result.json", whole)
    return {"out": str(out), **whole}


def write_table(path: Path, columns: Mapping[str, np.ndarray | list[Any]]) -> bytes:
    """Write columns of equal length as parquet, and return the bytes for a checksum."""
    packed = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), packed)
    write(path, packed.getvalue())
    return packed.getvalue()


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> bytes:
    """Write arrays as safetensors, and return the bytes for a checksum."""
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    write(path, data)
    return data


def cost(clock: float) -> Result:
    """Process CPU seconds since `clock`, and the largest memory the process had."""
    return {"seconds": round(time.process_time() - clock, 3), "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The largest resident memory the process had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
