"""Group crosscoders on a stand-in network: classes, types and their tuning, beside the paper's.

    python recipes/papers/group_crosscoders/run.py                           # minutes
    python recipes/papers/group_crosscoders/run.py --photographs FOLDER --full

Gorton (2024) trains a group crosscoder on mixed3b of InceptionV1 under 16 rotations and their
mirror images. The quick form takes fire4 of the bundled SqueezeNet, photographs of scikit-image and
the group D4; `--full` fire3 to fire5, more rows, latents and steps. Below `--out` are the runs of
`mechatlas collect`, `train` and `symmetry`, for the network and for one with random weights;
`paper.json` and `paper.html` have our numbers beside the paper's. What is there is not made again.
"""

import argparse
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def analyze(
    name: str, weights: Path | None, site: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Collect, train and classify one site of one network, with an autoencoder beside."""
    root = options.out / name
    samples = Images(source=options.photographs, side=95, crops=30 if not options.full else 60)
    once(CollectConfig(
        network=Network(name="squeezenet", weights=weights),
        sites=options.sites,
        samples=samples,
        group=PoseConfig(name="D4"),
        storage=StoreConfig(
            positions=Positions(rule="norm", per_sample=100), dtype="float16", batch_size=32
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
        control=options.out / "untrained" / f"{site}-symmetry" if name == "trained" else None,
    ))  # fmt: skip


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
    parser.add_argument("--sites", nargs="+")
    parser.add_argument("--latents", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    options.sites = tuple(
        options.sites or (("fire3", "fire4", "fire5") if options.full else ("fire4",))
    )
    options.latents = options.latents or (512 if options.full else 256)
    options.steps = options.steps or (1000 if options.full else 400)
    untrained = options.out / "untrained.safetensors"
    if not untrained.is_file():
        options.out.mkdir(parents=True, exist_ok=True)
        script = [sys.executable, str(HERE.parents[1] / "branches" / "untrained.py"), "squeezenet"]
        subprocess.run([*script, "--out", str(untrained)], check=True)
    rows, numbers = [], {}
    for site in options.sites:
        random = analyze("untrained", untrained, site, options)
        own = analyze("trained", None, site, options)
        numbers[site] = {"trained": own, "untrained": random}
        rows += rows_of(site, own, random)
    write_paper(options.out, TITLE, rows, MISSING, numbers)


if __name__ == "__main__":
    main()
