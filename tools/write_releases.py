# pyright: reportMissingImports=false
"""Write the table of releases from the registry in SAELens' package.

    .venv-peers/bin/python tools/write_releases.py

`src/mechatlas/dictionaries/foreign/releases.json.gz` has, by the name of each release, its
repository, format and model, and its ids with their paths (null where the path is the id).
"""

import gzip
import json
from importlib import metadata
from pathlib import Path

import yaml

OUT = Path(__file__).parents[1] / "src/mechatlas/dictionaries/foreign/releases.json.gz"


def main() -> None:
    """Read the registry of the installed package, and write the table."""
    place = metadata.distribution("sae-lens").locate_file("sae_lens/pretrained_saes.yaml")
    text = Path(str(place)).read_text()
    registry = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    table = {
        name: {
            "repository": entry["repo_id"],
            "format": entry.get("conversion_func") or "sae_lens",
            "model": entry["model"],
            "ids": {
                each["id"]: None if each["path"] == each["id"] else str(each["path"])
                for each in entry["saes"]
            },
        }
        for name, entry in sorted(registry.items())
    }
    data = json.dumps(table, separators=(",", ":")).encode()
    OUT.write_bytes(gzip.compress(data, 9, mtime=0))


if __name__ == "__main__":
    main()
