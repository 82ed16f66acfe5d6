"""Dictionaries of all sites of a paired store, three seeds each, matched through layers and seeds.

    mechatlas collect recipes/text/collect_paired.toml --samples.source my_texts.zip
    python recipes/matching/run.py runs/text/paired --n-latents 2048

    mechatlas collect recipes/branches/collect_inception_mini.toml --samples.source cifar10.zip
    python recipes/matching/run.py runs/branches/inception_mini/store --n-latents 1024 --cost codes

Beside the store: `seed0/SITE` and so on, the dictionaries; `layers0`, ... each seed through all
sites; `seeds-SITE` all seeds of a site. What is there already is not made again. Prints tables:
what pairs are worth on held-out rows and samples, by way to pair, and how well seeds agree.
"""

import argparse
from pathlib import Path
from typing import Any

import mechatlas as ma
from mechatlas.app.commands import match as matching
from mechatlas.app.commands import train as jobs
from mechatlas.app.recipes import TrainConfig
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import read_json

WAYS = (
    "matched", "match", "partial", "cosine", "unfolded", "nearest by cosine", "same number",
    "random",
)  # fmt: skip
MOVED = (*WAYS, "layer drop", "mean of B", "B itself")


def trained(sites: list[str], k: int, seed: int, options: argparse.Namespace) -> Path:
    """The dictionary of a site, trained unless it is there.

    No two start alike: latents keep so much of their start that dictionaries of one seed match by
    number, whatever their sites have in common.
    """
    site = sites[k]
    out = options.out / f"seed{seed}" / site
    if not (out / "result.json").is_file():
        found = jobs.train(
            TrainConfig(
                store=options.store,
                site=site,
                out=out,
                n_latents=options.n_latents,
                sparsity=TopK(k=options.k),
                revival=AuxK(k=4 * options.k),
                steps=options.steps,
                batch_size=1024,
                seed=seed * len(sites) + k,
            )
        )
        print(f"{site}, seed {seed}: fvu {found['fvu']:.3f}, dead {found['dead_share']:.1%}, "
              f"{found['seconds']:.0f} s", flush=True)  # fmt: skip
    return out


def matched(paths: list[Path], out: Path, cost: str, options: argparse.Namespace) -> dict[str, Any]:
    """The match of dictionaries in a row, made unless it is there."""
    if not (out / "result.json").is_file():
        recipe = matching.MatchConfig(
            dictionaries=tuple(paths),
            out=out,
            cost=cost,
            store=options.store,
            samples=options.samples,
            seed=options.seed,
        )
        print(matching.in_words(matching.match_dictionaries(recipe)), flush=True)
    return read_json(out / "result.json")


def over_seeds(estimates: list[dict[str, Any]]) -> str:
    """The mean over seeds, and the widest interval around all of theirs."""
    if not estimates:
        return "-"
    value = sum(e["value"] for e in estimates) / len(estimates)
    low, high = min(e["low"] for e in estimates), max(e["high"] for e in estimates)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def print_table(
    results: list[dict[str, Any]], ways: tuple[str, ...], key: str, part: str, title: str
) -> None:
    """One row a way to pair, one column a pair of sites."""
    names = [f"{pair['a']} → {pair['b']}" for pair in results[0]["pairs"]]
    lines = []
    for way in ways:
        cells = []
        for k in range(len(names)):
            told = [r["pairs"][k].get(key, {}).get(way, {}) for r in results]
            parts = [one.get(part) or one.get("permuted") for one in told]
            cells.append(over_seeds([one for one in parts if one]))
        if set(cells) != {"-"}:
            lines.append(f"| {way} | {' | '.join(cells)} |")
    if lines:
        print(f"\n| {title} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
        print("\n".join(lines))


def print_agreement(results: dict[str, dict[str, Any]]) -> None:
    """How well the seeds of each site agree."""
    print("\n| site | latents | matched with the next seed | in all seeds | first to last seed: "
          "the direct match agrees | fire together, matched | same number | random |\n|"
          + "---|" * 8)  # fmt: skip
    for site, result in results.items():
        pairs, tracks = result["pairs"], result["tracks"]
        n = pairs[0]["n_a"]
        both = [f"{pair['matched'] / n:.3f}" for pair in pairs]
        cells = [site, n, ", ".join(both), f"{tracks['persistence'][-1]:.3f} "
                 f"[{tracks['low'][-1]:.3f}, {tracks['high'][-1]:.3f}]"]  # fmt: skip
        cycle = result["cycle_agreement"]
        cells.append("-" if cycle is None else f"{cycle:.3f}")
        cells += [
            over_seeds([pair["co_firing"][way]["given_a"] for pair in pairs])
            for way in ("matched", "same number", "random")
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    """Train, match, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--n-latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64, help="on which the network runs")
    parser.add_argument("--cost", default="decoder", help="decoder rows, or codes")
    parser.add_argument("--seed", type=int, default=0, help="of nulls and intervals")
    parser.add_argument("--train-only", action="store_true")
    options = parser.parse_args()
    options.out = options.out or options.store.parent
    sites = list(ma.Store(options.store).sites)
    paths = [
        [trained(sites, k, s, options) for k in range(len(sites))] for s in range(options.seeds)
    ]
    if options.train_only:
        return
    layers = [
        matched(own, options.out / f"layers{s}", options.cost, options)
        for s, own in enumerate(paths)
    ]
    seeds = {
        site: matched(
            [own[k] for own in paths], options.out / f"seeds-{site}", options.cost, options
        )
        for k, site in enumerate(sites)
    }
    print_table(layers, WAYS, "co_firing", "given_a", "fire together")
    print_table(layers, WAYS, "co_firing", "either", "of either")
    print_table(layers, MOVED, "explained_variance", "permuted and rescaled", "explained variance")
    for part, title in (
        ("lost", "output variance lost"), ("divergence", "loss added"), ("agreement", "same answer")
    ):  # fmt: skip
        print_table(layers, MOVED, "spliced", part, title)
    print_agreement(seeds)


if __name__ == "__main__":
    main()
