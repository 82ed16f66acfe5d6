"""Group crosscoders on a stand-in network: classes, types and their tuning, beside the paper's.

    python recipes/papers/group_crosscoders/run.py                           # minutes
    python recipes/papers/group_crosscoders/run.py --networks inception_mini efficientnet_lite0
    python recipes/papers/group_crosscoders/run.py --photographs FOLDER --crops 3 --full

Gorton (2024) trains a group crosscoder on mixed3b of InceptionV1 under 16 rotations and their
mirror images. The quick form takes fire4 of the bundled SqueezeNet, photographs of scikit-image and
the group D4; `--full` all three networks, fire3 to fire5, more latents and steps, and
interventions. Hundreds of photographs decide more than many crops of a few. Below `--out` are the
runs of `mechatlas collect`, `train` and `symmetry`, for each network and for the same with random
weights; `paper.json` and `paper.html` have our numbers beside the paper's. What is there is not
made again.
"""

import argparse
import runpy
from pathlib import Path
from typing import Any, NamedTuple

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images
from mechatlas.app.cli import run_script
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.dictionaries.sparsity import TopK

HERE = Path(__file__).parent
_SIDE = runpy.run_path(str(HERE.parent / "side_by_side.py"))
Row, once, untrained = (_SIDE[name] for name in ("Row", "once", "untrained"))
TITLE = "Group crosscoders for mechanistic analysis of symmetry (Gorton, 2024)"
MISSING = [
    "mixed3b of InceptionV1 under D16: mechatlas collect recipes/inception_v1/collect_d16.toml "
    "--network.weights YOUR_FILE, then train and symmetry; the weights are not bundled",
]


class StandIn(NamedTuple):
    """Network, and the size of its images at which all poses of a square are exact."""

    side: int
    crops: int
    """Crops of each photograph."""
    places: int
    """Places of each crop."""
    sites: tuple[str, ...]
    """Sites of the quick form."""
    all_sites: tuple[str, ...]


NETWORKS = {
    "squeezenet": StandIn(95, 30, 100, ("fire4",), ("fire3", "fire4", "fire5")),
    "inception_mini": StandIn(63, 60, 40, ("mixed3b",), ("mixed3b", "mixed4a")),
    "efficientnet_lite0": StandIn(135, 12, 100, ("blocks.2",), ("blocks.2",)),
}


def analyze(
    network: str, weights: Path | None, site: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Collect, train and classify one site of a network, or of one with random weights."""
    of = NETWORKS[network]
    folder = options.out / network
    root = folder / ("untrained" if weights else "trained")
    crops = options.crops or of.crops
    once(CollectConfig(
        network=Network(name=network, weights=weights),
        sites=sites_of(network, options),
        samples=Images(source=options.photographs, side=of.side, crops=crops),
        group=PoseConfig(name="D4"),
        storage=StoreConfig(
            positions=Positions(rule="norm", per_sample=of.places), dtype="float16",
            batch_size=32, skip_bad=True,
        ),
        out=root / "store",
    ))  # fmt: skip
    train = {"store": root / "store", "n_latents": options.latents, "sparsity": TopK(k=16),
             "steps": options.steps, "batch_size": 1024, "seed": options.seed}  # fmt: skip
    once(TrainConfig(site=site, out=root / site, **train))
    return once(SymmetryConfig(
        dictionary=root / site,
        store=root / "store",
        out=root / f"{site}-symmetry",
        interventions=20 if options.full else 0,
        control=None if weights else folder / "untrained" / f"{site}-symmetry",
    ))  # fmt: skip


def sites_of(network: str, options: argparse.Namespace) -> tuple[str, ...]:
    """Sites of a network that are analyzed."""
    of = NETWORKS[network]
    return tuple(options.sites or (of.all_sites if options.full else of.sites))


def agreed(result: dict[str, Any]) -> str:
    """Agreement of claimed symmetries with stimuli."""
    classes = result["tuning"]["classes"]
    if classes["auc"] is None:
        return f"{classes['n_claimed']} claims and {classes['n_none']} features without one respond"
    return (
        f"{classes['n_claimed']} claims {classes['claimed']:.2f}, {classes['n_none']} features "
        f"without one {classes['none']:.2f}, AUC {classes['auc']:.2f} [{classes['low']:.2f}, "
        f"{classes['high']:.2f}] (p {classes['p_value']:.2g})"
    )


def posed(each: dict[str, Any]) -> str:
    """Agreement of the poses of members of families or types with stimuli."""
    if not each["n"]:
        return "no pairs"
    return (
        f"{each['right']} of {each['n']} ({each['low']:.0%} to {each['high']:.0%}), by chance "
        f"{each['by_chance']:.0%}; correlation {each['similarity']:.2f}, of random pairs in their "
        f"best pose {each['similarity_by_chance'] or 0:.2f}"
    )


def rows_of(site: str, own: dict[str, Any], random: dict[str, Any]) -> list[Any]:
    """Quantities of one site."""
    types = own["types"]
    found = ", ".join(f"{n} {name}" for name, n in own["classes"].items())
    grades, others = (", ".join(f"{n} {g}" for g, n in r["grades"].items()) for r in (own, random))
    gathered, by_chance = (
        f"{r['families']} families with {r['features_in_families']} features, "
        f"{r['types']['types']} types with {r['types']['features']} of "
        f"{r['types']['n_clustered']} (by chance {r['types']['features_by_chance']:.1f})"
        for r in (own, random)
    )
    return [
        Row(f"{site}: features by symmetry", f"{found} ({grades}); random weights {others}",
            "invariant features, features invariant under the half-turn (lines), equivariant ones "
            "(curves); no counts"),
        Row(f"{site}: families in several orientations",
            f"{gathered}; random weights {by_chance}",
            "families known from circuits: curves, lines, ..."),
        Row(f"{site}: separation of families",
            f"{types['separation'] or 0:.2f}, of null dictionaries at most "
            f"{types['null_separation'] or 0:.2f}", "more cleanly than a sparse autoencoder",
            "the autoencoder beside: benchmarks/compare_symmetry.py"),
        Row(f"{site}: correlation of responses to stimuli under the claimed symmetry",
            f"{agreed(own)}; random weights {agreed(random)}", "not measured"),
        *(Row(f"{site}: members of {kind} that respond most alike in the claimed pose",
              f"{posed(own['tuning'][kind])}; random weights {posed(random['tuning'][kind])}",
              "not measured") for kind in ("families", "types")),
        Row(f"{site}: R2 of other poses, held out",
            f"crosscoder {own['r2_mean']['dictionary']:.2f}, linear map "
            f"{own['r2_mean']['linear']:.2f}, shuffled {own['r2_mean']['shuffled']:.2f}",
            "not measured"),
    ]  # fmt: skip


def main() -> None:
    """Collect, train, classify, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/papers/group_crosscoders"))
    parser.add_argument("--photographs", default="scikit-image", help="folder or zip")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--sites", nargs="+", help="of a single network")
    parser.add_argument("--crops", type=int, help="of each photograph")
    parser.add_argument("--latents", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of dictionaries and random weights")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    networks = options.networks or list(NETWORKS)[: None if options.full else 1]
    options.latents = options.latents or (512 if options.full else 256)
    options.steps = options.steps or (1000 if options.full else 400)
    rows, numbers = [], {}
    for network in networks:
        fresh = untrained(network, options.out / network, seed=options.seed)
        for site in sites_of(network, options):
            random = analyze(network, fresh, site, options)
            own = analyze(network, None, site, options)
            numbers[f"{network} {site}"] = {"trained": own, "untrained": random}
            rows += rows_of(f"{network} {site}", own, random)
    _SIDE["write_paper"](options.out, TITLE, rows, MISSING, numbers)


if __name__ == "__main__":
    run_script(main)
