"""`mechatlas prove`: from the weights of a group-operation network to a proof on disk.

prove    weights, table -> a folder with proof, result and what the page draws
check    proof, weights -> the bound, verified anew
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mechatlas.analysis.proofs.explain import NeuronDirections
from mechatlas.analysis.proofs.prove import COMPUTE_BUDGET, AccuracyBound, exact_accuracy
from mechatlas.analysis.proofs.prove import prove as prove_bound
from mechatlas.analysis.proofs.structure import (
    CosetConcentration,
    bi_equivariance,
    coset_concentration,
)
from mechatlas.analysis.proofs.verifier.exact import brute_force_accuracy, decide_exactly
from mechatlas.analysis.proofs.verifier.explanation import NOT_TRIED, Explanation, Grid, ProofError
from mechatlas.analysis.proofs.verifier.proof import as_weights, load_proof
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.analysis.proofs.verifier.verify import Verification, verify
from mechatlas.app.run_folder import Result, refuse_strangers
from mechatlas.base import InputError, WeightsError
from mechatlas.files import checksum, write_json
from mechatlas.maths.groups import Group

FILE = "proof.safetensors"
KEYS = ("left", "right", "unembed")
SOUND = {
    "float32": "accuracy_bound: relu(left[x] + right[y]) @ unembed in IEEE float32, in any order "
    "of summation, fused or not",
    "real": "accuracy_bound_real: the same in exact arithmetic on the stored weights",
    "checked": "the table is a group (all axioms, Light's test); each irrep is an orthogonal "
    "homomorphism (on generators, with word length); rho-sets are permuted and stay opposite; "
    "everything else in the proof may be wrong without harm",
    "rounding": "a-priori bounds for every float32 and float64 operation (Higham 2002, 3.1)",
}
REPEATS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProveConfig:
    """Bound the accuracy of a group-operation network, with a proof that anyone can check."""

    weights: Path
    """Safetensors with left (n, m), right (n, m), unembed (m, n)."""
    table: Path
    """The group's table as .npy: table[x, y] is the right answer."""
    out: Path
    """Folder for the proof and the result."""
    exact: bool = False
    """Finish the pairs that are not certified by brute force."""
    compare: bool = False
    """Also time brute force, in the same run."""
    compute_budget: float = COMPUTE_BUDGET
    """Share of the multiply-adds of brute force that the later stages may use."""


def prove(recipe: ProveConfig) -> Result:
    """Prove, and write the folder.

    Raises:
        UserError: The weights or the table are not what they should be.
    """
    weights_given = read_weights(recipe.weights)
    table = read_table(recipe.table)
    group = Group(table, name=recipe.table.stem.removesuffix("_table"))
    weights = as_weights(*weights_given, group.order)
    refuse_strangers(recipe.out, "proof")
    bound = prove_bound(*weights, group, compute_budget=recipe.compute_budget)
    verdict = bound.verification
    recipe.out.mkdir(parents=True, exist_ok=True)
    file = bound.proof.save(recipe.out / FILE)
    macs = group.order**3 * weights[0].shape[1]
    result: Result = {
        "order": group.order,
        "width": weights[0].shape[1],
        "accuracy_bound": bound.accuracy_bound,
        "accuracy_bound_real": verdict.accuracy_bound_real,
        "sound": SOUND,
        "verifier": _in_stages(verdict),
        "seconds_verify": bound.seconds_verify,
        "seconds_prove": bound.seconds_prove,
        "multiply_adds": verdict.multiply_adds,
        "multiply_adds_share": verdict.multiply_adds / macs,
        "budget": dataclasses.asdict(verdict.logit_budget),
        "why": explain_in_words(bound),
    }
    if recipe.exact:
        decide_exactly(weights, group.table, np.eye(group.order, dtype=bool))  # loads compiled code
        result["accuracy_exact"], result["seconds_exact"] = exact_accuracy(bound, *weights)
    if recipe.compare:
        result |= _compare(weights, group, bound, exact=recipe.exact)
    cosets = {
        side: coset_concentration(w, group, side)
        for side, w in zip(KEYS[:2], weights, strict=False)
    }
    result["bi_equivariance"] = bi_equivariance(*weights, group)
    result["cosets"] = {side: _summarise(found) for side, found in cosets.items()}
    details = describe(weights, group, bound) | {
        "cosets": {
            side: {
                "order": found.order.tolist(),
                "concentration": np.round(found.concentration, 4).tolist(),
            }
            for side, found in cosets.items()
        }
    }
    write_json(recipe.out / "neurons.json", details)
    manifest = {
        "schema": 1,
        "kind": "proof",
        "group": group.name,
        "weights": str(recipe.weights.resolve()),
        "files": {FILE: checksum(file.read_bytes())},
    }
    write_json(recipe.out / "manifest.json", manifest)
    write_json(recipe.out / "result.json", result)
    return {"out": str(recipe.out), **result}


def check(proof_path: Path, weights_path: Path, table_path: Path | None = None) -> Result:
    """Verify a saved proof, without the prover; it must be about the table, if one is given.

    Raises:
        ProofError: It is damaged, forged, or about other weights or another table.
        UserError: A file cannot be read.
    """
    path = proof_path / FILE if proof_path.is_dir() else proof_path
    proof = load_proof(path)
    weights = read_weights(weights_path)
    if table_path is not None and not np.array_equal(proof.table, read_table(table_path)):
        raise ProofError(f"The proof is about another table than {table_path}.")
    clock = time.process_time()
    verdict = proof.check(*weights)
    return {
        "order": len(proof.table),
        "width": verdict.sample.terms.weights.left.shape[1],
        "accuracy_bound": verdict.accuracy_bound,
        "accuracy_bound_real": verdict.accuracy_bound_real,
        "claimed": proof.accuracy_bound,
        "table": checksum(np.ascontiguousarray(proof.table, np.int64).tobytes()),
        "sound": SOUND,
        "verifier": _in_stages(verdict),
        "seconds_verify": time.process_time() - clock,
    }


def in_words(result: Result) -> str:
    """What was proved."""
    lines = [
        f"Accuracy is at least {result['accuracy_bound']:.4%} over all {result['order'] ** 2:,} "
        f"pairs (float32, any order of sums; {result['accuracy_bound_real']:.4%} in exact "
        "arithmetic).",
        f"Verified in {result['seconds_verify']:.4f} s of CPU time.",
    ]
    if "why" in result:
        lines[1:1] = [result["why"]]
    if "accuracy_exact" in result:
        lines.append(
            f"Exact accuracy {result['accuracy_exact']:.6%} in {result['seconds_exact']:.4f} s."
        )
    if "seconds_brute_force_f32" in result:
        lines.append(
            f"Brute force: {result['seconds_brute_force_f32']:.4f} s in float32, "
            f"{result['seconds_brute_force_f64']:.4f} s in float64."
        )
    if "out" in result:
        lines.append(f"Proof: {Path(result['out']) / FILE}")
    return "\n".join(lines)


def read_weights(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """left, right and unembed from a file.

    Raises:
        WeightsError: The file is missing, damaged or lacks one of them.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            missing = [key for key in KEYS if key not in names]
            if missing:
                raise WeightsError(
                    f"{path} has no {', '.join(map(repr, missing))}; it has "
                    f"{', '.join(map(repr, names)) or 'nothing'}. `mechatlas prove` needs left "
                    "(n, m), right (n, m) and unembed (m, n)."
                )
            left, right, unembed = (file.get_tensor(key) for key in KEYS)
    except WeightsError:
        raise
    except FileNotFoundError as error:
        raise WeightsError(f"There is no file {path}.") from error
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors ({error}).") from error
    return left, right, unembed


def read_table(path: Path) -> np.ndarray:
    """The table from a .npy file.

    Raises:
        InputError: The file is missing or is not an array.
    """
    try:
        with open(path, "rb") as file:
            return np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a .npy array ({error}).") from error


def explain_in_words(bound: AccuracyBound) -> str:
    """Why the bound is what it is."""
    verdict = bound.verification
    budget, share = dataclasses.asdict(verdict.logit_budget), verdict.accuracy_bound
    losses = {name: -value for name, value in budget.items() if name != "ideal_margin"}
    worst = max(losses, key=lambda name: losses[name])
    reason = {
        "additive": "parts of neurons that depend on x or y alone differ between answers",
        "non_equivariance": "circuits are not equivariant: cells of B x B' are empty, or `a` is "
        "not the same over a circuit",
        "unembedding_noise": "the unembedding has noise that the interaction of a circuit can "
        "reach",
        "residual": "neurons that fit no circuit, or only roughly",
        "rounding": "rounding",
    }[worst]
    if share == 1:
        against = (
            f"The ideal margin of {budget['ideal_margin']:.1f} logits stands against losses of "
            f"{sum(losses.values()):.1f} for a typical pair"
        )
        if float((verdict.stages == 1).mean()) > 0.5:
            return f"Every pair is certified. {against}."
        return (
            f"Every pair is certified. {against}, most of them ({losses[worst]:.1f}) because "
            f"{reason}: the circuits alone do not prove it, the low rank of the unembedding does."
        )
    return (
        f"{1 - share:.1%} of the pairs are not certified. For a typical pair the ideal margin is "
        f"{budget['ideal_margin']:.1f} logits and the losses are {sum(losses.values()):.1f}; most "
        f"of them ({losses[worst]:.1f}) because {reason}."
    )


def describe(weights: Weights, group: Group, bound: AccuracyBound) -> Result:
    """What the page draws: neurons, rho-sets, cells, budget and margins."""
    seen: NeuronDirections = bound.directions
    explanation = bound.proof.explanation
    irreps = group.irreps()
    names = [irreps[k].name if k >= 0 else "" for k in seen.irrep]
    grids = [
        {
            "irrep": grid.name,
            "neurons": _neurons(explanation, grid).tolist(),
            "left": grid.left_points.tolist(),
            "right": grid.right_points.tolist(),
            "scale": np.round(grid.scale.astype(float), 6).tolist(),
            "left_vectors": np.round(grid.left_vectors, 6).tolist(),
            "right_vectors": np.round(grid.right_vectors, 6).tolist(),
            "spread_of_a": _spread_of_a(seen, _neurons(explanation, grid)),
        }
        for grid in explanation.grids
    ]
    edges, certified, true = _histograms(weights, group, bound.verification)
    return {
        "group": group.name,
        "irreps": sorted({name for name in names if name}),
        "irrep": names,
        "shares": {
            part: np.round(values, 4).tolist()
            for part, values in zip(KEYS, seen.shares, strict=True)
        },
        "grids": grids,
        "unplaced": len(explanation.representatives) - sum(len(g.scale) for g in explanation.grids),
        "silent": int(explanation.dead.sum()),
        "merged": len(explanation.dead)
        - int(explanation.dead.sum())
        - len(explanation.representatives),
        "histogram": {"edges": edges, "certified": certified, "true": true},
    }


def _summarise(found: CosetConcentration) -> Result:
    """How many neurons have a subgroup, and the median of how concentrated they are."""
    some = found.order > 1
    median = float(np.median(found.concentration[some])) if some.any() else 0.0
    return {"neurons": int(some.sum()), "concentration": median}


def _neurons(explanation: Explanation, grid: Grid) -> np.ndarray:
    """Those of a grid that stand for themselves, as the network numbers them."""
    return explanation.representatives[grid.first_neuron : grid.first_neuron + len(grid.scale)]


def _spread_of_a(seen: NeuronDirections, neurons: np.ndarray) -> float:
    """1 - mean |cosine| of each neuron's a with that of the circuit: 0 where it is constant."""
    a = np.array([seen.a[i] for i in neurons])
    main = np.linalg.svd(a, full_matrices=False)[2][0]
    return round(float(1 - np.abs(a @ main).mean()), 4)


def _histograms(weights: Weights, group: Group, verdict: Verification) -> tuple[list, list, list]:
    """Certified and true margins; of large groups, of some x only."""
    xs = np.linspace(0, group.order - 1, min(group.order, 120)).astype(int)
    left, right, unembed = (w.astype(np.float64) for w in weights)
    true = []
    for x in xs:
        logits = np.maximum(left[x] + right, 0) @ unembed
        pairs, answers = np.arange(group.order), group.table[x]
        mine = logits[pairs, answers].copy()
        logits[pairs, answers] = -np.inf
        true.append(mine - logits.max(axis=1))
    certified = verdict.margins[xs].ravel()
    certified = certified[certified > NOT_TRIED]
    margins = np.concatenate(true)
    low, high = np.quantile(np.concatenate([certified, margins]), [0.001, 1])
    edges = np.linspace(low, high, 61)
    counts = [np.histogram(np.clip(v, low, high), edges)[0].tolist() for v in (certified, margins)]
    return np.round(edges, 4).tolist(), *counts


def _in_stages(verdict: Verification) -> str:
    ok = verdict.margins > verdict.float32_errors
    shares = [float((ok & (verdict.stages == k)).mean()) for k in (1, 2, 3)]
    names = ("equivariant circuits", "low rank", "outright")
    return ", ".join(f"{name} {s:.2%}" for name, s in zip(names, shares, strict=True))


def _compare(weights: Weights, group: Group, bound: AccuracyBound, *, exact: bool) -> Result:
    """Brute force, verification and exact count in turn, medians."""
    times: dict[type, list[float]] = {np.float32: [], np.float64: []}
    ours, counts = [bound.seconds_verify], []
    accuracy = 0.0
    for _ in range(REPEATS if group.order < 300 else 1):
        for dtype, seconds in times.items():
            clock = time.process_time()
            accuracy = brute_force_accuracy(*weights, group.table, dtype=dtype)
            seconds.append(time.process_time() - clock)
        clock = time.process_time()
        verify(*weights, group, bound.proof.explanation)
        ours.append(time.process_time() - clock)
        if exact:
            counts.append(exact_accuracy(bound, *weights).seconds)
    medians = {"seconds_exact": float(np.median(counts))} if exact else {}
    return medians | {
        "accuracy_brute_force": accuracy,
        "seconds_brute_force_f32": float(np.median(times[np.float32])),
        "seconds_brute_force_f64": float(np.median(times[np.float64])),
        "seconds_verify": float(np.median(ours)),
    }
