"""Networks trained here, proved: accuracy, bound and cost of the proof, five seeds a group.

Run: `python benchmarks/trained_proofs.py --nets runs/nets`. Trains what is not there yet with
the recipes of `recipes/groups` (S5: half a minute each, the others ten seconds). Times are
medians of process CPU seconds, verification and brute force in turn.
"""

import argparse
import statistics
import tomllib
from pathlib import Path

import numpy as np
from bench_proofs import compare
from safetensors.numpy import load_file, save_file

from mechatlas.analysis.proofs.group_training import GroupTrainingConfig, train_group_net
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group

RECIPES = Path(__file__).parent.parent / "recipes" / "groups"
SEEDS = 5
ROUNDS = 9


def find_net(recipe: dict, of: Group, seed: int, file: Path) -> Weights:
    """The network in a file, or a new one that is then put there."""
    if not file.exists():
        names = ("width", "steps", "batch_size", "lr", "weight_decay")
        settings = GroupTrainingConfig(seed=seed, **{name: recipe[name] for name in names})
        trained = train_group_net(np.asarray(of.table), settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(trained._asdict(), file)
    arrays = load_file(file)
    return Weights(arrays["left"], arrays["right"], arrays["unembed"])


def main() -> None:
    """Train, prove and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", type=Path, default=Path("runs/nets"))
    parser.add_argument("--only", default="*", help="name of one recipe, such as s4")
    options = parser.parse_args()
    nets = options.nets
    print("group  seed  accuracy   bound  multiply-adds  verify/f64  exact/f32")
    for path in sorted(RECIPES.glob(f"{options.only}.toml")):
        recipe = tomllib.loads(path.read_text())
        of = group(recipe["group"])
        bounds = []
        for seed in range(SEEDS):
            weights = find_net(recipe, of, seed, nets / f"{recipe['group']}_{seed}.safetensors")
            row = compare(weights, of, ROUNDS)
            bounds.append(row["accuracy_bound"])
            print(
                f"{recipe['group']:5} {seed:5}  {row['accuracy']:8.4%}  {bounds[-1]:.4f}"
                f"  {row['multiply_adds_share']:13.3f}  {row['verify_over_f64']:10.3f}"
                f"  {row['exact_over_f32']:9.3f}",
                flush=True,
            )
        print(f"{recipe['group']:5}  mean bound {statistics.mean(bounds):.4f}", flush=True)


if __name__ == "__main__":
    main()
