"""Folders of runs whose files and manifest were changed so that their checksums are right."""

import json
from pathlib import Path
from typing import Any

from mechatlas.files import MANIFEST, checksum, write_manifest


def forge(folder: Path, values: dict[str, Any] | None = None, **changes: Any) -> None:
    """Write a manifest that states the checksums of the files as they are now.

    Args:
        folder: Folder of the run.
        values: Values of the manifest; by default those that it has.
        changes: Keys of the manifest to change.
    """
    old: dict[str, Any] = json.loads((folder / MANIFEST).read_text()) if values is None else values
    files = [name for name in old.get("files", {}) if (folder / name).is_file()]
    stated = {name: checksum((folder / name).read_bytes()) for name in files}
    write_manifest(folder / MANIFEST, {**old, "files": stated, **changes})
