"""Our numbers beside those of a paper: `paper.json` and a page.

once          run a command unless its folder is there
untrained     weights of the control
write_paper   rows of numbers -> paper.json and paper.html
"""

import dataclasses
import html
import subprocess
import sys
from pathlib import Path
from typing import Any

from mechatlas.app.run_folder import RESULT, RunConfig, execute
from mechatlas.files import read_json, write, write_json

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ccc;padding:.4rem;"
    "text-align:left;vertical-align:top}"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity of a paper."""

    quantity: str
    """What was measured, and on what."""
    ours: str
    """Our number, with its control or interval."""
    paper: str
    """The paper's number, or what it says in words."""
    note: str = ""
    """What differs between the two."""


def once(config: RunConfig) -> dict[str, Any]:
    """Run a command unless its folder has a result, and read the result.

    Raises:
        UserError: The command refuses the configuration.
    """
    if not (config.out / RESULT).is_file():
        execute(config)
    return read_json(config.out / RESULT)


def untrained(network: str, out: Path, weights: Path | None = None, *, seed: int = 0) -> Path:
    """Write weights drawn anew for a network, unless they are there, and return their file.

    Args:
        network: Bundled name of the network.
        out: Folder.
        weights: File of weights, if the network needs one.
        seed: Seed of the weights.
    """
    fresh = out / "untrained.safetensors"
    if not fresh.is_file():
        out.mkdir(parents=True, exist_ok=True)
        given = ["--weights", str(weights)] if weights else []
        script = Path(__file__).parents[1] / "branches" / "untrained.py"
        seeded = ["--out", str(fresh), "--seed", str(seed)]
        words = [sys.executable, str(script), network, *given, *seeded]
        subprocess.run(words, check=True)
    return fresh


def write_paper(
    out: Path, title: str, rows: list[Row], missing: list[str], numbers: dict[str, Any]
) -> None:
    """Write `paper.json` and `paper.html`, and print the table.

    Args:
        out: Folder.
        title: Title of the paper.
        rows: Quantities, ours beside the paper's.
        missing: What cannot be had here, and what to type when one has it.
        numbers: All numbers behind the rows.
    """
    plain = [dataclasses.asdict(row) for row in rows]
    content = {"paper": title, "rows": plain, "missing": missing, "numbers": numbers}
    write_json(out / "paper.json", content)
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>"
        for row in plain
    )
    heads = "".join(f"<th>{name}</th>" for name in plain[0])
    left_out = "".join(f"<li>{html.escape(each)}</li>" for each in missing)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><table><tr>{heads}</tr>{cells}"
        f"</table><h2>What cannot be had here</h2><ul>{left_out}</ul></html>"
    )
    write(out / "paper.html", page.encode())
    print(f"\n{title}")
    for row in rows:
        print(f"  {row.quantity}: {row.ours}   (paper: {row.paper})")
    for each in missing:
        print(f"  not here: {each}")
    print(f"Written: {out / 'paper.json'}, {out / 'paper.html'}")
