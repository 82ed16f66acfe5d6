"""Dictionaries of consecutive sites, the circuit through them, and its page.

    mechatlas collect recipes/branches/collect_inception_mini.toml --samples.source cifar10.zip
    python recipes/circuits/chain.py runs/branches/inception_mini/store mixed4a mixed4b mixed4c

    mechatlas collect recipes/text/collect_paired.toml --samples.source my_texts.zip
    python recipes/circuits/chain.py runs/text/paired encoder.layer.1 encoder.layer.2 \
        encoder.layer.3 --expansion 4

Beside the store: a folder a site, `circuit`, and `circuit.html`, which draws the strongest paths as
the paper does. A dictionary that is there already is not trained again.
"""

import argparse
import dataclasses
from pathlib import Path

import mechatlas as ma
from mechatlas.app.cli import run_script
from mechatlas.app.commands import circuit, report
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.recipes import read_recipe
from mechatlas.app.run_folder import execute

HERE = Path(__file__).parent


def train(site: str, options: argparse.Namespace) -> Path:
    """Train the dictionary of a site, unless it is there."""
    out = options.out / site.replace("/", "~").replace(":", "~")
    if not (out / "result.json").is_file():
        width = ma.Store(options.store).rows(site).d_in
        recipe = read_recipe(options.recipe, TrainConfig)
        found = execute(
            dataclasses.replace(
                recipe,
                store=options.store,
                site=site,
                out=out,
                n_latents=options.expansion * width,
                steps=options.steps or recipe.steps,
            )
        )
        print(f"{site}: fvu {found.fvu:.3f}, dead {found.dead_share:.1%}", flush=True)
    return out


def main() -> None:
    """Train, weigh, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("sites", nargs="+", help="consecutive sites, in the order of the network")
    parser.add_argument("--out", type=Path, help="by default the folder of the store")
    parser.add_argument("--recipe", type=Path, default=HERE.parent / "branches" / "train.toml")
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--steps", type=int, help="by default the recipe's")
    parser.add_argument("--features", type=int, default=8, help="features of the last site drawn")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--visualize-steps", type=int, default=96, help="steps of activation maximization; 0: none"
    )
    options = parser.parse_args()
    options.out = options.out or options.store.parent
    paths = tuple(train(site, options) for site in options.sites)
    found = execute(
        circuit.CircuitConfig(
            dictionaries=paths,
            out=options.out / "circuit",
            store=options.store,
            samples=options.samples,
            features=options.features,
            visualize_steps=options.visualize_steps,
        )
    )
    print(circuit.in_words(found))
    page = report.ReportConfig(folder=options.out, out=options.out / "circuit.html")
    print(report.in_words(execute(page)))


if __name__ == "__main__":
    run_script(main)
