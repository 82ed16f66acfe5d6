"""Features of branches on a stand-in network, beside the figures of the paper.

    python recipes/papers/branch_specialization/run.py                         # minutes
    python recipes/papers/branch_specialization/run.py --photographs FOLDER --full
    python recipes/papers/branch_specialization/run.py --inception-v1 WEIGHTS --photographs FOLDER

Bozoukov (2025) trains tied k-sparse autoencoders (k = 32) on mixed4a to mixed4e of InceptionV1. The
quick form takes two Fire modules of the bundled SqueezeNet; `--full` eight. Dictionaries, tests and
matches are made by `recipes/branches/run.py` below `--out`, for the network and for one with random
weights; `paper.json` and `paper.html` have our numbers beside the paper's.
"""

import argparse
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images
from mechatlas.app.cli import run_script
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.recipes import read_recipe
from mechatlas.files import read_json

HERE = Path(__file__).parent
RECIPES = HERE.parents[1]
_SIDE = runpy.run_path(str(HERE.parent / "side_by_side.py"))
Row, once, untrained = (_SIDE[name] for name in ("Row", "once", "untrained"))
TITLE = "Branch specialization with k-sparse autoencoders (Bozoukov, 2025)"
MISSING = [
    "InceptionV1: --inception-v1 WEIGHTS with your file of its weights (either naming)",
    "labels by eye (animals): mechatlas branches ... --labels FILE:COLUMN asks which labels of "
    "yours the features of a branch carry more often",
]


def analyze(name: str, network: Network, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Collect a store of one network and test the features of every site."""
    root = options.out / name
    if options.inception_v1:
        recipe = read_recipe(RECIPES / "branches" / "collect_inception_v1.toml", CollectConfig)
        samples = type(recipe.samples)(**{**vars(recipe.samples), "source": options.photographs})
        changes = {"network": network, "samples": samples, "out": root / "store"}
        config = CollectConfig(**{**vars(recipe), **changes})
    else:
        config = CollectConfig(
            network=network,
            sites=("fire?",) if options.full else ("fire6", "fire7"),
            samples=Images(source=options.photographs, side=127, crops=40),
            storage=StoreConfig(
                positions=Positions(rule="norm", per_sample=10 if options.full else 25),
                paired=True,
                dtype="float16",
                batch_size=16,
            ),
            out=root / "store",
        )
    once(config)
    words = {
        "--steps": options.steps or (2000 if options.full else 250),
        "--expansion": options.expansion or (16 if options.inception_v1 else 2),
        "--rows": 8192 if options.full else 2048,
        "--match-rows": 4096 if options.full else 2048,
    }
    script = [sys.executable, str(RECIPES / "branches" / "run.py"), str(root / "store")]
    subprocess.run([*script, *(str(w) for pair in words.items() for w in pair)], check=True)
    return read_json(root / "table.json")


def agreement(found: dict[str, Any]) -> str:
    """How often matched features keep their kind of branch."""
    if not found["pairs"]:
        return "no pairs"
    return (
        f"{found['value']:.0%} [{found['low']:.0%}, {found['high']:.0%}] of {found['pairs']}, by "
        f"chance {found['chance']:.0%}"
    )


def rows_of(own: list[dict[str, Any]], random: list[dict[str, Any]]) -> list[Any]:
    """Quantities of every site."""
    rows = []
    for here, there in zip(own, random, strict=True):
        by_branch = ", ".join(f"{n} in {name}" for name, n in here["branches"].items() if n)
        rows.append(Row(
            f"{here['site']}: features with a branch of their own (q < 0.05)",
            f"{here['n_specialized']} of {here['n_tested']} ({by_branch or 'no branch'}); permuted "
            f"{here['n_specialized_permuted']}; random weights {there['n_specialized']} of "
            f"{there['n_tested']}",
            "5x5 branches of mixed4b to mixed4e carry animal features (by eye, no null)",
            f"FVU {here['fvu']:.2f}; random weights {there['fvu']:.2f}",
        ))  # fmt: skip
        rows += [
            Row(f"{found['a']} to {found['b']}: matched features in the same kind of branch",
                agreement(found["nearest_branch"]["same_branch"]),
                "features of one kind sit in the same branch across layers (by eye)",
                "by the nearest branch of all matched features")
            for found in here["consistency"]
            if found["b"] == here["site"]
        ]  # fmt: skip
    return rows


def main() -> None:
    """Collect, train, test, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/papers/branch_specialization"))
    parser.add_argument("--photographs", default="photos", help="folder or zip of photographs")
    parser.add_argument("--inception-v1", type=Path, help="file of the weights of InceptionV1")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--expansion", type=int, help="latents for each channel")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    name = "inception_v1" if options.inception_v1 else "squeezenet"
    fresh = untrained(name, options.out, options.inception_v1)
    own = analyze("trained", Network(name=name, weights=options.inception_v1), options)
    random = analyze("untrained", Network(name=name, weights=fresh), options)
    numbers = {"trained": own, "untrained": random}
    _SIDE["write_paper"](options.out, TITLE, rows_of(own, random), MISSING, numbers)


if __name__ == "__main__":
    run_script(main)
