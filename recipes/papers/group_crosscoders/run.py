"""Group crosscoders on a stand-in network: classes, types and their tuning, beside the paper's.

    python recipes/papers/group_crosscoders/run.py                           # minutes
    python recipes/papers/group_crosscoders/run.py --networks inception_mini efficientnet_lite0
    python recipes/papers/group_crosscoders/run.py --photographs FOLDER --full

Gorton (2024) trains a group crosscoder on mixed3b of InceptionV1 under 16 rotations and their
mirror images. The quick form takes fire4 of the bundled SqueezeNet, photographs of scikit-image and
the group D4; `--full` all three networks, fire3 to fire5, more rows, latents and steps. Below
`--out` are the runs of `mechatlas collect`, `train` and `symmetry`, for each network and for the
same with random weights; `paper.json` and `paper.html` have our numbers beside the paper's. What is
there is not made again.
"""

import argparse
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.dictionaries.sparsity import TopK

HERE = Path(__file__).parent
_SIDE = runpy.run_path(str(HERE.parent / "side_by_side.py"))
Row, once, write_paper = (_SIDE["Row"], _SIDE["once"], _SIDE["write_paper"])
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
    "efficientnet_lite0": StandIn(231, 6, 200, ("blocks.2",), ("blocks.2",)),
}


def analyze(
    network: str, weights: Path | None, site: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Collect, train and classify one site of a network, or of one with random weights."""
    of = NETWORKS[network]
    folder = options.out / network
    root = folder / ("untrained" if weights else "trained")
    samples = Images(
        source=options.photographs, side=of.side, crops=of.crops * (2 if options.full else 1)
    )
    once(CollectConfig(
        network=Network(name=network, weights=weights),
        sites=sites_of(network, options),
        samples=samples,
        group=PoseConfig(name="D4"),
        storage=StoreConfig(
            positions=Positions(rule="norm", per_sample=of.places), dtype="float16", batch_size=32
        ),
        out=root / "store",
    ))  # fmt: skip
    train = {"store": root / "store", "n_latents": options.latents, "sparsity": TopK(k=16),
             "steps": options.steps, "batch_size": 1024}  # fmt: skip
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
    classes = result["tuning"]["classes"] or {}
    if classes.get("auc") is None:
        return "too few claims"
    return (
        f"{classes['claimed']:.2f} against {classes['none']:.2f} of features without one, AUC "
        f"{classes['auc']:.2f} [{classes['low']:.2f}, {classes['high']:.2f}]"
    )


def rows_of(site: str, own: dict[str, Any], random: dict[str, Any]) -> list[Any]:
    """Quantities of one site."""
    types, null = own["types"], random["types"]
    posed = own["tuning"]["types"]
    grades = ", ".join(f"{n} {grade}" for grade, n in own["grades"].items())
    found = ", ".join(f"{n} {name}" for name, n in own["classes"].items())
    pose = "no pairs" if not posed["n"] else (
        f"{posed['right']} of {posed['n']}, by chance {posed['by_chance']:.0%}; correlation "
        f"{posed['similarity']:.2f}, of random pairs {posed['similarity_by_chance'] or 0:.2f}"
    )  # fmt: skip
    return [
        Row(f"{site}: features by symmetry", f"{found} ({grades})",
            "invariant features, features invariant under the half-turn (lines), equivariant ones "
            "(curves); no counts"),
        Row(f"{site}: families in several orientations",
            f"{types['types']} types with {types['features']} of {types['n_clustered']} features "
            f"(by chance {types['features_by_chance']:.1f}); random weights {null['types']} with "
            f"{null['features']}", "families known from circuits: curves, lines, ..."),
        Row(f"{site}: separation of families",
            f"{types['separation'] or 0:.2f}, of null dictionaries at most "
            f"{types['null_separation'] or 0:.2f}", "more cleanly than a sparse autoencoder",
            "the autoencoder beside: benchmarks/compare_symmetry.py"),
        Row(f"{site}: responses to stimuli under the claimed symmetry",
            f"{agreed(own)}; random weights {agreed(random)}", "not measured"),
        Row(f"{site}: members of a type respond most alike in the claimed pose", pose,
            "not measured"),
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
    parser.add_argument("--sites", nargs="+", help="of one network")
    parser.add_argument("--latents", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    networks = options.networks or list(NETWORKS)[: None if options.full else 1]
    if options.sites and len(networks) > 1:
        parser.error("--sites are of one network: name it with --networks")
    options.latents = options.latents or (512 if options.full else 256)
    options.steps = options.steps or (1000 if options.full else 400)
    rows, numbers = [], {}
    for network in networks:
        untrained = options.out / network / "untrained.safetensors"
        if not untrained.is_file():
            untrained.parent.mkdir(parents=True, exist_ok=True)
            script = [sys.executable, str(HERE.parents[1] / "branches" / "untrained.py"), network]
            subprocess.run([*script, "--out", str(untrained)], check=True)
        for site in sites_of(network, options):
            random = analyze(network, untrained, site, options)
            own = analyze(network, None, site, options)
            numbers[f"{network} {site}"] = {"trained": own, "untrained": random}
            rows += rows_of(f"{network} {site}", own, random)
    write_paper(options.out, TITLE, rows, MISSING, numbers)


if __name__ == "__main__":
    main()
