"""Networks trained here, proved: accuracy, bound and cost of the proof, five seeds a group.

Run: `python benchmarks/trained_proofs.py --nets runs/nets`. Trains what is not there yet with
the recipes of `recipes/groups` (S5: half a minute each, the others ten seconds). Times are
medians of process CPU seconds, verification and brute force in turn.
"""

import argparse
import statistics
import time
import tomllib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mechatlas.analysis.proofs.exact import brute_force
from mechatlas.analysis.proofs.prove import Weights, count_exactly, prove
from mechatlas.analysis.proofs.training import Settings, train_net
from mechatlas.analysis.proofs.verify import verify
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group

RECIPES = Path(__file__).parent.parent / "recipes" / "groups"
SEEDS = 5
ROUNDS = 9
KEYS = ("left", "right", "unembed")


def seconds(work) -> float:
    """Process CPU seconds of one call."""
    clock = time.process_time()
    work()
    return time.process_time() - clock


def find_net(recipe: dict, of: Group, seed: int, file: Path) -> Weights:
    """The network in a file, or a new one that is then put there."""
    if not file.exists():
        names = ("width", "steps", "batch_size", "lr", "weight_decay")
        settings = Settings(seed=seed, **{name: recipe[name] for name in names})
        found = train_net(np.asarray(of.table), settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(zip(KEYS, found, strict=True)), file)
    arrays = load_file(file)
    return arrays["left"], arrays["right"], arrays["unembed"]


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
            bound = prove(*weights, of)
            times: dict[str, list[float]] = {"verify": [], "exact": [], "f32": [], "f64": []}
            for _ in range(ROUNDS):
                explanation = bound.proof.explanation
                times["verify"].append(seconds(lambda: verify(*weights, of, explanation)))  # noqa: B023
                times["exact"].append(count_exactly(bound, weights)[1])
                times["f32"].append(seconds(lambda: brute_force(weights, of.table, np.float32)))  # noqa: B023
                times["f64"].append(seconds(lambda: brute_force(weights, of.table, np.float64)))  # noqa: B023
            t = {name: statistics.median(values) for name, values in times.items()}
            share = bound.verdict.multiply_adds / (of.order**3 * weights[0].shape[1])
            accuracy = count_exactly(bound, weights)[0]
            bounds.append(bound.accuracy_bound)
            print(
                f"{recipe['group']:5} {seed:5}  {accuracy:8.4%}  {bounds[-1]:.4f}"
                f"  {share:13.3f}  {t['verify'] / t['f64']:10.3f}  {t['exact'] / t['f32']:9.3f}",
                flush=True,
            )
        print(f"{recipe['group']:5}  mean bound {statistics.mean(bounds):.4f}", flush=True)


if __name__ == "__main__":
    main()
