"""Group crosscoders of every site of a store of poses, two seeds each, and the table of them.

    mechatlas collect recipes/symmetry/collect_squeezenet.toml --samples.source photographs.zip
    python recipes/symmetry/run.py runs/symmetry/squeezenet/store

With the control, weights drawn anew (see `collect_inception_mini.toml`), which is run first:

    python recipes/symmetry/run.py runs/symmetry/untrained/store
    python recipes/symmetry/run.py runs/symmetry/squeezenet/store --control runs/symmetry/untrained

Beside the store: a folder `SITE-SEED` for each dictionary, one `SITE-SEED-symmetry` for what leaves
its features unchanged, and `table.json`. What is there already is not made again.
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
from mechatlas.app.commands import train as jobs
from mechatlas.app.recipes import TrainConfig, read_recipe
from mechatlas.files import read_json, write_json

HERE = Path(__file__).parent


def trained(site: str, seed: int, options: argparse.Namespace) -> Path:
    """The folder of a dictionary, trained unless it is there."""
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
        jobs.train(changed)
    return out


def classified(dictionary: Path, options: argparse.Namespace) -> Path:
    """The folder of what leaves its features unchanged, made unless it is there."""
    out = dictionary.with_name(f"{dictionary.name}-symmetry")
    control = options.control / out.name if options.control else None
    if not (out / "result.json").is_file():
        symmetry.find_symmetry(
            symmetry.SymmetryConfig(
                dictionary=dictionary,
                store=options.store,
                out=out,
                interventions=options.interventions,
                control=control,
            )
        )
    return out


def agreement(dictionaries: list[Path], folders: list[Path]) -> dict[str, Any]:
    """Do the features that the best pairing of two seeds puts together belong to the same class?

    Of the pairs that are both reliable: the share of one class, and the share in which the second
    has a symmetry if the first has one, each beside what the counts of classes would give by
    chance. Of all pairs: the median cosine, and how many stand against the null of `match`.
    """
    a, b = (ma.load(path).W_dec.detach().numpy() for path in dictionaries)
    found = ma.match(a, b)
    tables = [pq.read_table(folder / symmetry.TABLE) for folder in folders]
    names = [np.array(table["class"].to_pylist()) for table in tables]
    orders = [table["stabilizer_order"].to_numpy() for table in tables]
    reliable = [table["reliable"].to_numpy() for table in tables]
    both = np.flatnonzero(reliable[0] & reliable[1][found.columns])
    one, two = names[0][both], names[1][found.columns[both]]
    has, other_has = orders[0][both] > 1, orders[1][found.columns[both]] > 1
    return {
        "median_cosine": float(np.median(found.cosines)),
        "matched": int(found.matched.sum()),
        "both_reliable": len(both),
        "same_class": float((one == two).mean()),
        "same_class_by_chance": sum(
            float((one == n).mean() * (two == n).mean()) for n in np.unique(one)
        ),
        "symmetric_too": float(other_has[has].mean()) if has.any() else None,
        "symmetric_by_chance": float(other_has.mean()),
    }


def beyond_invariance(folder: Path) -> dict[str, int]:
    """How many symmetric features are so beyond what all their poses have in common.

    The blocks of a feature less their mean have the stabilizer function (s - mean) / (1 - mean):
    of a blur, which is nearly the same in every pose, little is left. It must stay above the
    support that a symmetry needs, for all elements that are claimed.
    """
    table = pq.read_table(folder / symmetry.TABLE)
    s = load_file(folder / symmetry.TENSORS)["stabilizer_function"]
    mean = s.mean(axis=1, keepdims=True)
    rest = (s - mean) / np.maximum(1 - mean, 1e-9)
    told = {"symmetric": 0, "beyond": 0}
    for i, stabilizer in enumerate(table["stabilizer_elements"].to_pylist()):
        if table["reliable"][i].as_py() and 1 < len(stabilizer) < s.shape[1]:
            told["symmetric"] += 1
            told["beyond"] += bool((rest[i, stabilizer] > SUPPORT_THRESHOLD).all())
    return told


def row(dictionary: Path, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    found, trained = read_json(folder / "result.json"), read_json(dictionary / "result.json")
    others = [g for g, r2 in enumerate(found["r2"]["invariant"]) if r2 != 1]
    keys = (
        "n_features", "reliable", "classes", "discoveries", "discoveries_shuffled",
        "families", "features_in_families", "largest_family", "noise_ceiling", "agreement",
        "causal", "control",
    )  # fmt: skip
    return {
        "name": dictionary.name,
        "l0": trained["l0"],
        "dead_share": trained["dead_share"],
        **{key: found[key] for key in keys},
        "r2": {way: [found["r2"][way][g] for g in others] for way in ("dictionary", "linear")},
        "r2_mean": found["r2_mean"],
        "beyond_invariance": beyond_invariance(folder),
    }


def told(one: dict[str, Any]) -> str:
    """The row in words."""
    classes = ", ".join(f"{n} {name}" for name, n in one["classes"].items())
    r2 = "; ".join(
        f"{way} {one['r2_mean'][way]:.3f} ({min(values):.3f} to {max(values):.3f})"
        for way, values in one["r2"].items()
    )
    causal, ceiling = one["causal"], one["noise_ceiling"] or 0
    beyond = one["beyond_invariance"]
    swaps = (
        f"{causal['passed']}/{causal['tested']} (null {causal['share_of_null']})"
        if causal.get("tested")
        else causal.get("missing")
    )
    beside = symmetry.control_in_words(one["control"]) if one["control"] else "no control"
    return (
        f"{one['name']}: {classes}\n  {one['discoveries']} with a symmetry "
        f"({one['discoveries_shuffled']} shuffled), ceiling {ceiling:.2f}, {one['families']} "
        f"families of {one['features_in_families']} features, dead {one['dead_share']:.1%}\n"
        f"  {beyond['beyond']} of {beyond['symmetric']} reliable ones beyond what all poses share\n"
        f"  R2 {r2}; itself {one['r2_mean']['invariant']:.3f}, shuffled pairing "
        f"{one['r2_mean']['shuffled']:.3f}\n  swaps {swaps}\n  {beside}"
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
    parser.add_argument("--control", type=Path, help="--out of a run with weights drawn anew")
    options = parser.parse_args()
    options.out = options.out or options.store.parent
    table = []
    for site in options.sites or ma.Store(options.store).sites:
        dictionaries = [trained(site, seed, options) for seed in range(options.seeds)]
        folders = [classified(path, options) for path in dictionaries]
        rows = [row(*pair) for pair in zip(dictionaries, folders, strict=True)]
        if options.seeds > 1:
            rows[0]["seeds_agree"] = agreement(dictionaries[:2], folders[:2])
        for one in rows:
            print(told(one), flush=True)
        if options.seeds > 1:
            print(f"  seeds {rows[0]['seeds_agree']}", flush=True)
        table += rows
        write_json(options.out / "table.json", {"rows": table})


if __name__ == "__main__":
    main()
