"""The FVU-L0 curve of every architecture on one site, trained on the same batches.

    mechatlas collect recipes/inception_mini/collect.toml
    python recipes/curves/draw.py runs/inception_mini/store mixed3b --out runs/curves/mixed3b

Writes `curves.json` and `curves.html`, and prints the table. FVU and L0 are of rows that no
dictionary was trained on; latents that not one of 65,536 rows uses count as unused. A killed run
goes on where it stopped.
"""

import argparse
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

import mechatlas as ma
from mechatlas.app.cli import run_script
from mechatlas.app.progress import bar
from mechatlas.files import read_json, write, write_json

KINDS = {
    "TopK": lambda level: {"sparsity": ma.TopK(k=level)},
    "TopK, tied": lambda level: {"sparsity": ma.TopK(k=level), "tied": True},
    "BatchTopK": lambda level: {"sparsity": ma.BatchTopK(k=level)},
    "Matryoshka BatchTopK": lambda level: {"sparsity": ma.BatchTopK(k=level), "nested": True},
    "JumpReLU": lambda level: {"sparsity": ma.JumpReLU(l0=45 / level)},
    "ReLU": lambda level: {"sparsity": ma.ReLU(l1=190.4 / (level + 8))},
    "Gated": lambda level: {"sparsity": ma.Gated(l1=217.6 / (level + 6))},
}
"""What a kind is built with, given the level. A penalty only says where on its curve a dictionary
lies: these aim at about `level` latents of a row in short runs, and end below it in longer ones."""


REVIVALS = {
    "AuxK": (
        lambda n: ma.AuxK(k=min(256, n // 8), auxk_alpha=0.25, dead_after_rows=25_000),
        ("TopK", "TopK, tied", "BatchTopK", "Matryoshka BatchTopK", "JumpReLU"),
    ),
    "Resample": (
        lambda _: ma.Resample(every=50, until=0.8, dead_after_rows=25_000),
        ("ReLU", "Gated"),
    ),
}
"""How dead latents are brought back, and in which kinds: a penalty on the code's size keeps them
down, so they start anew."""
USED_BY_ROWS = 65_536


def trained(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What every dictionary with this revival came to."""
    rows = ma.Store(options.store).rows(options.site)
    n_latents = options.expansion * rows.d_in
    revival, kinds = REVIVALS[name]
    names, built = [], []
    for kind in kinds:
        for level in options.levels:
            chosen = KINDS[kind](level)
            nested = (n_latents // 16, n_latents // 4) if chosen.pop("nested", False) else ()
            names.append((kind, level))
            built.append(
                ma.Autoencoder(
                    d_in=rows.d_in, n_latents=n_latents, matryoshka_widths=nested, **chosen
                )
            )
    with bar(f"training {len(built)} dictionaries") as progress:
        ma.train(
            built,
            rows,
            steps=options.steps,
            batch_size=options.batch_size,
            revival=revival(n_latents),
            checkpoint=options.out / "checkpoints" / name,
            on_progress=progress,
        )
    some = next(rows.batches(USED_BY_ROWS)).x
    found = []
    for (kind, level), dictionary in zip(names, built, strict=True):
        history = dictionary.history
        assert history is not None
        found.append(
            {
                "kind": kind,
                "level": level,
                "l0": history.l0[-1],
                "fvu": history.fvu[-1],
                "unused": float((~ma.evaluate(dictionary, some).fired).float().mean()),
                "seconds_per_step": history.seconds_per_step[-1],
            }
        )
    return found


def draw(found: list[dict[str, Any]], title: str) -> go.Figure:
    """The curves; a dictionary that says nothing (L0 below 1) is in the table alone."""
    figure = go.Figure()
    for kind in KINDS:
        mine = [f for f in found if f["kind"] == kind and f["l0"] >= 1]
        mine.sort(key=lambda f: f["l0"])
        figure.add_scatter(x=[f["l0"] for f in mine], y=[f["fvu"] for f in mine], name=kind)
    figure.update_xaxes(type="log", title="L0 (mean latents of a held-out row)")
    figure.update_yaxes(type="log", title="FVU (held out)")
    figure.update_layout(title=title, height=500, margin={"l": 70, "r": 20, "t": 60, "b": 60})
    return figure


def main() -> None:
    """Train, measure and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("site")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--levels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=512)
    options = parser.parse_args()
    kept = options.out / "curves.json"
    if not kept.is_file():
        every = [each for name in REVIVALS for each in trained(name, options)]
        write_json(kept, {"site": options.site, "dictionaries": every})
    found = read_json(kept)["dictionaries"]
    for each in found:
        print("{kind:22} l0 {l0:7.1f}  fvu {fvu:.4f}  unused {unused:.2%}".format(**each))
    figure = draw(
        found, f"{options.site}, {options.expansion} latents a column, {options.steps} steps"
    )
    page = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
    write(options.out / "curves.html", page.encode())


if __name__ == "__main__":
    run_script(main)
