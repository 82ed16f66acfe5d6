"""Match the dictionaries of all sites of a paired store through layers and through seeds.

    mechatlas collect recipes/text/collect_paired.toml --samples.source my_texts.zip
    python recipes/matching/run.py runs/text/paired --n-latents 2048

    mechatlas collect recipes/branches/collect_inception_mini.toml --samples.source cifar10.zip
    python recipes/matching/run.py runs/branches/inception_mini/store --n-latents 1024 --cost codes

Beside the store it writes `seed0/SITE`, ... (the dictionaries), `layers0`, ... (each seed matched
through all sites) and `seeds-SITE` (all seeds of a site, if there are two or more). Runs that are
there already are not made again. Prints tables of co-firing, explained variance and effect on the
network's output by way of pairing, and of the agreement of seeds.
"""

import argparse
from pathlib import Path
from typing import Any

import mechatlas as ma
from mechatlas.app.cli import run_script
from mechatlas.app.commands import match as matching
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.old_runs import renamed
from mechatlas.app.run_folder import execute
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import read_json

WAYS = ("matched", "match", "partial", "cosine", "unfolded", "nearest", "same_index", "random")
WRITTEN = (*WAYS, "layer_drop", "b_mean", "b_reconstruction")


def train(sites: list[str], k: int, seed: int, options: argparse.Namespace) -> Path:
    """Train the dictionary of a site, unless it is there.

    Every dictionary has a seed of its own: latents stay so close to their initialization that
    dictionaries of one seed match by index, whatever their sites have in common.
    """
    site = sites[k]
    out = options.out / f"seed{seed}" / site
    if not (out / "result.json").is_file():
        result = execute(
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
        print(f"{site}, seed {seed}: fvu {result.fvu:.3f}, dead {result.dead_share:.1%}, "
              f"{result.seconds:.0f} s", flush=True)  # fmt: skip
    return out


def match(paths: list[Path], out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Match consecutive dictionaries, unless that is done."""
    if not (out / "result.json").is_file():
        config = matching.MatchConfig(
            dictionaries=tuple(paths),
            out=out,
            cost=options.cost,
            store=options.store,
            samples=options.samples,
            seed=options.seed,
        )
        print(matching.in_words(execute(config)), flush=True)
    return renamed(read_json(out / "result.json"), matching.KIND)


def over_seeds(estimates: list[dict[str, Any]]) -> str:
    """Mean over seeds, and the widest interval around all of their intervals."""
    if not estimates:
        return "-"
    value = sum(e["value"] for e in estimates) / len(estimates)
    low, high = min(e["low"] for e in estimates), max(e["high"] for e in estimates)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def print_table(
    results: list[dict[str, Any]], ways: tuple[str, ...], key: str, measure: str, title: str
) -> None:
    """Print one row for each way of pairing, one column for each pair of sites."""
    if not results:
        return
    names = [f"{pair['a']} → {pair['b']}" for pair in results[0]["pairs"]]
    lines = []
    for way in ways:
        cells = []
        for k in range(len(names)):
            values = [(r["pairs"][k].get(key) or {}).get(way, {}) for r in results]
            estimates = [each.get(measure) or each.get("permuted") for each in values]
            cells.append(over_seeds([each for each in estimates if each]))
        if set(cells) != {"-"}:
            lines.append(f"| {way} | {' | '.join(cells)} |")
    if lines:
        print(f"\n| {title} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
        print("\n".join(lines))


def print_agreement(results: dict[str, dict[str, Any]]) -> None:
    """Print how well the seeds of each site agree; tracks need three seeds or more."""
    if not results:
        return
    ways = "matched", "same_index", "random"
    titles = ["site", "latents", "matched with the next seed", "in all seeds",
              "cycle agreement", *(f"P(B fires given A), {way}" for way in ways)]  # fmt: skip
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for site, result in results.items():
        pairs, tracks = result["pairs"], result.get("tracks")
        n, cycle = pairs[0]["n_a"], result.get("cycle_agreement")
        through = tracks and {key: tracks[key][-1] for key in ("low", "high")}
        cells = [
            site,
            n,
            ", ".join(f"{pair['matched'] / n:.3f}" for pair in pairs),
            over_seeds([{"value": tracks["persistence"][-1], **through}] if tracks else []),
            "-" if cycle is None else f"{cycle:.3f}",
            *(over_seeds([pair["co_firing"][w]["p_b_given_a"] for pair in pairs]) for w in ways),
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
    parser.add_argument("--seeds", type=int, default=3, help="dictionaries of each site")
    parser.add_argument("--samples", type=int, default=64, help="on which the network runs")
    parser.add_argument("--cost", default="decoder", help="decoder rows, or codes")
    parser.add_argument("--seed", type=int, default=0, help="of nulls and intervals")
    parser.add_argument("--train-only", action="store_true")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    options.out = options.out or options.store.parent
    sites = list(ma.Store(options.store).sites)
    paths = [
        [train(sites, k, seed, options) for k in range(len(sites))] for seed in range(options.seeds)
    ]
    if options.train_only:
        return
    layers, seeds = [], {}
    if len(sites) > 1:
        layers = [
            match(own, options.out / f"layers{seed}", options) for seed, own in enumerate(paths)
        ]
    if options.seeds > 1:
        seeds = {
            site: match([own[k] for own in paths], options.out / f"seeds-{site}", options)
            for k, site in enumerate(sites)
        }
    print_table(layers, WAYS, "co_firing", "p_b_given_a", "P(B fires given A)")
    print_table(layers, WAYS, "co_firing", "jaccard", "Jaccard")
    print_table(layers, WRITTEN, "explained_variance", "rescaled", "explained variance")
    for measure, title in (
        ("variance_lost", "output variance lost"),
        ("kl_divergence", "loss added"),
        ("agreement", "same answer"),
    ):
        print_table(layers, WRITTEN, "spliced", measure, title)
    print_agreement(seeds)


if __name__ == "__main__":
    run_script(main)
