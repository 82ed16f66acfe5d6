"""Group crosscoders of every site of a store of poses, two seeds each, and a table of results.

    mechatlas collect recipes/symmetry/collect_squeezenet.toml --samples.source photographs.zip
    python recipes/symmetry/run.py runs/symmetry/squeezenet/store

With a randomly re-initialized control network (see `collect_inception_mini.toml`), run first:

    python recipes/symmetry/run.py runs/symmetry/untrained/store
    python recipes/symmetry/run.py runs/symmetry/squeezenet/store --control runs/symmetry/untrained

Beside the store: a folder `SITE-SEED` for each dictionary, a folder `SITE-SEED-symmetry` for the
symmetries of its features, and `table.json`. Folders that exist are not made again.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

import mechatlas as ma
from mechatlas.analysis.symmetry.shift_evidence import SUPPORT_THRESHOLD
from mechatlas.app.commands import symmetry
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.recipes import read_recipe
from mechatlas.app.run_folder import FEATURES, SYMMETRY_TENSORS, execute, read_result
from mechatlas.files import read_json, write_json

HERE = Path(__file__).parent


def trained(site: str, seed: int, options: argparse.Namespace) -> Path:
    """Train a dictionary unless its folder exists, and return the folder."""
    out = options.out / f"{site}-{seed}"
    if not (out / "result.json").is_file():
        recipe = read_recipe(options.recipe, TrainConfig)
        changed = dataclasses.replace(
            recipe,
            store=options.store,
            site=site,
            out=out,
            seed=seed,
            steps=options.steps or recipe.steps,
            n_latents=options.latents or recipe.n_latents,
        )
        execute(changed)
    return out


def classified(dictionary: Path, options: argparse.Namespace) -> Path:
    """Classify the features of a dictionary unless the folder exists, and return the folder."""
    out = dictionary.with_name(f"{dictionary.name}-symmetry")
    control = options.control / out.name if options.control else None
    if not (out / "result.json").is_file():
        config = symmetry.SymmetryConfig(
            dictionary=dictionary,
            store=options.store,
            out=out,
            interventions=options.interventions,
            control=control,
        )
        execute(config)
    return out


def agreement(dictionaries: list[Path], folders: list[Path]) -> dict[str, Any]:
    """Compare the classes of features that the best pairing of two seeds puts together.

    For pairs of reliable features: the share of equal classes, and the share in which the second
    has a symmetry if the first has one, each with its value by chance from the counts of classes.
    For all pairs: the median cosine, and the number that is significant in `match`.
    """
    a, b = (ma.load(path).W_dec.detach().numpy() for path in dictionaries)
    match = ma.match(a, b)
    tables = [pq.read_table(folder / FEATURES) for folder in folders]
    names = [np.array(table["class"].to_pylist()) for table in tables]
    orders = [table["stabilizer_order"].to_numpy() for table in tables]
    reliable = [table["reliable"].to_numpy() for table in tables]
    both = np.flatnonzero(reliable[0] & reliable[1][match.columns])
    first, second = names[0][both], names[1][match.columns[both]]
    has, other_has = orders[0][both] > 1, orders[1][match.columns[both]] > 1
    return {
        "median_cosine": float(np.median(match.cosines)),
        "matched": int(match.matched.sum()),
        "both_reliable": len(both),
        "same_class": float((first == second).mean()),
        "same_class_by_chance": sum(
            float((first == n).mean() * (second == n).mean()) for n in np.unique(first)
        ),
        "symmetric_too": float(other_has[has].mean()) if has.any() else None,
        "symmetric_by_chance": float(other_has.mean()),
    }


def beyond_invariance(folder: Path) -> dict[str, int]:
    """Count the symmetric features that stay symmetric without the mean over their poses.

    The blocks of a feature minus their mean have the stabilizer function (s - mean) / (1 - mean);
    little is left of a blur, which is nearly the same in every pose. It must stay above the
    threshold of support for all elements of the claimed stabilizer.
    """
    table = pq.read_table(folder / FEATURES)
    s = load_file(folder / SYMMETRY_TENSORS)["stabilizer_function"]
    mean = s.mean(axis=1, keepdims=True)
    rest = (s - mean) / np.maximum(1 - mean, 1e-9)
    counts = {"symmetric": 0, "beyond": 0}
    for i, stabilizer in enumerate(table["stabilizer_elements"].to_pylist()):
        if table["reliable"][i].as_py() and 1 < len(stabilizer) < s.shape[1]:
            counts["symmetric"] += 1
            counts["beyond"] += bool((rest[i, stabilizer] > SUPPORT_THRESHOLD).all())
    return counts


def row(dictionary: Path, folder: Path) -> dict[str, Any]:
    """Make one row of the table."""
    result, training = read_json(folder / "result.json"), read_json(dictionary / "result.json")
    others = [g for g, r2 in enumerate(result["r2"]["invariant"]) if r2 != 1]
    keys = (
        "n_features", "reliable", "classes", "discoveries", "discoveries_shuffled",
        "families", "features_in_families", "largest_family", "noise_ceiling", "agreement",
        "interventions", "control",
    )  # fmt: skip
    return {
        "name": dictionary.name,
        "l0": training["l0"],
        "dead_share": training["dead_share"],
        **{key: result[key] for key in keys},
        "r2": {way: [result["r2"][way][g] for g in others] for way in ("dictionary", "linear")},
        "r2_mean": result["r2_mean"],
        "beyond_invariance": beyond_invariance(folder),
    }


def describe(row: dict[str, Any], folder: Path) -> str:
    """Describe one row of the table in words."""
    r2 = "; ".join(f"{way} {min(v):.3f} to {max(v):.3f}" for way, v in row["r2"].items())
    beyond = row["beyond_invariance"]
    result: Any = read_result(folder, symmetry.KIND)
    return (
        f"{row['name']}: {symmetry.in_words(result)}\n"
        f"  dead {row['dead_share']:.1%}; R2 by pose: {r2}; {beyond['beyond']} of "
        f"{beyond['symmetric']} reliable symmetric features beyond what all poses share"
    )


def main() -> None:
    """Train, classify, compare seeds and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, help="by default the folder of the store")
    parser.add_argument("--recipe", type=Path, default=HERE / "train.toml")
    parser.add_argument("--sites", nargs="*", help="by default all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="by default the recipe's")
    parser.add_argument("--latents", type=int, help="by default the recipe's")
    parser.add_argument("--interventions", type=int, default=40)
    parser.add_argument("--control", type=Path, help="--out of a run on random weights")
    options = parser.parse_args()
    options.out = options.out or options.store.parent
    table = []
    for site in options.sites or ma.Store(options.store).sites:
        dictionaries = [trained(site, seed, options) for seed in range(options.seeds)]
        folders = [classified(path, options) for path in dictionaries]
        rows = [row(*pair) for pair in zip(dictionaries, folders, strict=True)]
        if options.seeds > 1:
            rows[0]["seeds_agree"] = agreement(dictionaries[:2], folders[:2])
        for each, folder in zip(rows, folders, strict=True):
            print(describe(each, folder), flush=True)
        if options.seeds > 1:
            print(f"  seeds {rows[0]['seeds_agree']}", flush=True)
        table += rows
        write_json(options.out / "table.json", {"rows": table})


if __name__ == "__main__":
    main()
