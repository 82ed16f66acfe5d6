"""Verifying a proof against brute force on the same core, in turn, process CPU seconds.

Run: `make bench`, or `pytest benchmarks/bench_proofs.py -o python_files='bench_*.py'
--benchmark-only -s`. Quality stands beside time: the bound, and the multiply-adds of the
verification as a share of those of brute force, which is the figure without noise.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mechatlas.analysis.proofs.prove import exact_accuracy, prove
from mechatlas.analysis.proofs.verifier.exact import brute_force_accuracy
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.analysis.proofs.verifier.verify import verify
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.analysis.proofs.planted import wide

DATA = Path(os.environ.get("MECHATLAS_DATA", "shared/data")) / "group_nets"
NETS = sorted(p.stem for p in DATA.glob("*.safetensors")) if DATA.is_dir() else []
ROUNDS = 7


def seconds(work) -> float:
    clock = time.process_time()
    work()
    return time.process_time() - clock


def compare(weights: Weights, of: Group, rounds: int) -> dict[str, float]:
    """Medians of verification, exact count and brute force, taken in turn."""
    bound = prove(*weights, of)
    work = {
        "verify": lambda: verify(*weights, of, bound.proof.explanation),
        "exact": lambda: exact_accuracy(bound, *weights),
        "f32": lambda: brute_force_accuracy(*weights, of.table, dtype=np.float32),
        "f64": lambda: brute_force_accuracy(*weights, of.table, dtype=np.float64),
    }
    times = [[seconds(run) for run in work.values()] for _ in range(rounds)]
    medians = dict(zip(work, map(statistics.median, zip(*times, strict=True)), strict=True))
    return {
        "accuracy": exact_accuracy(bound, *weights).accuracy,
        "accuracy_bound": bound.accuracy_bound,
        "multiply_adds_share": bound.verification.multiply_adds
        / (of.order**3 * weights[0].shape[1]),
        "verify_over_f32": medians["verify"] / medians["f32"],
        "verify_over_f64": medians["verify"] / medians["f64"],
        "exact_over_f32": medians["exact"] / medians["f32"],
        "exact_over_f64": medians["exact"] / medians["f64"],
        "seconds_prove": bound.seconds_prove,
        **{f"seconds_{name}": value for name, value in medians.items()},
    }


@pytest.mark.parametrize("name", NETS)
def test_nets_trained_elsewhere(benchmark, name):
    arrays = load_file(DATA / f"{name}.safetensors")
    of = Group(np.load(DATA / f"{name.split('_')[0]}_table.npy"))
    weights = Weights(arrays["left"], arrays["right"], arrays["unembed"])
    benchmark.extra_info.update(compare(weights, of, ROUNDS if of.order < 300 else 1))
    print(f"\n{name} {benchmark.extra_info}")
    bound = prove(*weights, of)
    benchmark.pedantic(lambda: verify(*weights, of, bound.proof.explanation), rounds=3)


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.02])
@pytest.mark.parametrize("name", ["S4", "A5", "S5", "PSL(2,7)", "A6", "S6"])
def test_planted_circuits(benchmark, name, noise):
    of = group(name)
    weights = wide(of, noise=noise, seed=0)
    measured = compare(weights, of, 3 if of.order < 300 else 1)
    benchmark.extra_info.update(order=of.order, noise=noise, width=weights[0].shape[1], **measured)
    print(f"\n{name} noise {noise} {benchmark.extra_info}")
    bound = prove(*weights, of)
    benchmark.pedantic(lambda: verify(*weights, of, bound.proof.explanation), rounds=1)
