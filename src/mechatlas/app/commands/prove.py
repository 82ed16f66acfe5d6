"""Bound the accuracy of a group-operation network, with a proof that anyone can check.

mechatlas prove net.safetensors --table table.npy --out proof --exact --compare
mechatlas prove --check proof net.safetensors --reference
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from mechatlas.analysis.proofs.prove import (
    COMPUTE_BUDGET,
    AccuracyBound,
    bound_again,
    exact_accuracy,
)
from mechatlas.analysis.proofs.prove import prove as prove_bound
from mechatlas.analysis.proofs.structure import bi_equivariance
from mechatlas.analysis.proofs.verifier.exact import brute_force_accuracy, decide_exactly
from mechatlas.analysis.proofs.verifier.explanation import ProofError
from mechatlas.analysis.proofs.verifier.proof import as_weights, load_proof
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.analysis.proofs.verifier.verify import LogitBudget, Verification, verify
from mechatlas.app.estimates import Estimate, of_products
from mechatlas.app.proof_details import CosetSummary, describe, measure_cosets, summarize_cosets
from mechatlas.app.run_folder import (
    NEURONS,
    PROOF,
    PROOF_FILE,
    CommandResult,
    Outputs,
    RunFolder,
)
from mechatlas.base import RecipeError, WeightsError
from mechatlas.files import about, checksum, checksum_file
from mechatlas.maths.groups import Group
from mechatlas.ranges import check_ranges
from mechatlas.tensorfiles import read_array, read_arrays

KIND = PROOF
KEPT = "explanation"
"""Name of the part from which an interrupted run is continued."""
PREPARATION = 1.0
"""Seconds of a proof whatever the size: irreps, and loops that are read or compiled."""
SEARCH = 8.0
"""Time of looking for an explanation, of verifying some and of describing the network, in times of
brute force in float32, from S5 on."""
REPEATS = 5
"""Number of times that brute force and verification are run in turn; once for large groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProveConfig:
    """Bound the accuracy of logits = relu(left[x] + right[y]) @ unembed on a group's table."""

    weights: Annotated[Positional[Path], arg(metavar="WEIGHTS")]
    """Safetensors with left (n, m), right (n, m), unembed (m, n)."""
    table: Path | None = None
    """The group's table as .npy: table[x, y] is the right answer."""
    out: Path | None = None
    """Folder for the proof and the result."""
    exact: bool = False
    """Finish the pairs that are not certified by brute force, for the exact accuracy."""
    compare: bool = False
    """Also run and time brute force."""
    compute_budget: float = COMPUTE_BUDGET
    """Multiply-adds for the later stages, as a share of those of brute force."""
    check: Path | None = None
    """Verify this proof (a file or its folder) instead of making one. With --table as well, the
    proof must be about that table."""
    reference: bool = False
    """Check with the short verifier in numpy, which is slower and meant to be audited."""

    def __post_init__(self) -> None:
        check_ranges(self, compute_budget="[0, 1e12]")
        if self.check is not None and self.out is not None:
            raise RecipeError("To check a proof writes nothing: leave out --out.")


SOUND: dict[str, str] = {
    "float32": "accuracy_bound: relu(left[x] + right[y]) @ unembed in IEEE float32, in any order "
    "of summation, fused or not",
    "real": "accuracy_bound_real: the same in exact arithmetic on the stored weights",
    "checked": "the table is a group (all axioms, Light's test); each irrep is an orthogonal "
    "homomorphism (on generators, with word length); rho-sets are permuted and stay opposite; "
    "everything else in the proof may be wrong without harm",
    "rounding": "a-priori bounds for every float32 and float64 operation (Higham 2002, 3.1)",
}
"""Statements that are proved, the conditions that the verifier checks, and how rounding counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifiedBound:
    """Bound on the accuracy of a network that was verified."""

    order: int
    """Order of the group."""
    width: int
    """Neurons of the network."""
    accuracy_bound: float
    """Least share of all pairs that the float32 network gets right."""
    accuracy_bound_real: float
    """Bound in exact arithmetic on the stored weights."""
    sound: dict[str, str] = dataclasses.field(default_factory=SOUND.copy)
    """Statements that are proved, and what they rest on."""
    verifier: str
    """Share of pairs that each stage of the verifier certified."""
    seconds_verify: float
    """Process CPU seconds of one verification."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProveResult(CommandResult, VerifiedBound):
    """Bound on the accuracy of a network, with its evidence and its cost."""

    seconds_prove: float
    """Process CPU seconds of looking for the explanation."""
    multiply_adds: int
    """Multiply-adds of one verification."""
    multiply_adds_share: float
    """Multiply-adds as a share of those of brute force."""
    logit_budget: LogitBudget
    """Terms of the bound of a typical pair."""
    why: str
    """Reason why the bound is as large as it is, in words."""
    bi_equivariance: float | None = None
    """Share of the variance of the logits that depends on x^-1 z y^-1 alone."""
    cosets: dict[str, CosetSummary] | None = None
    """Neurons that are about constant on the cosets of a subgroup, by side of the weights."""
    accuracy_exact: float | None = None
    """Accuracy in exact arithmetic, with --exact."""
    seconds_exact: float | None = None
    """Process CPU seconds of the exact accuracy, with --exact."""
    accuracy_brute_force: float | None = None
    """Accuracy by brute force in float64, with --compare."""
    seconds_brute_force_f32: float | None = None
    """Process CPU seconds of brute force in float32, with --compare."""
    seconds_brute_force_f64: float | None = None
    """Process CPU seconds of brute force in float64, with --compare."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckResult(VerifiedBound):
    """Bound of a saved proof, verified anew."""

    claimed: float
    """Bound that the proof claims."""
    table: str
    """Checksum of the table."""
    reference: bool
    """Whether the short verifier in numpy was used."""


def run(config: ProveConfig, folder: RunFolder | None = None) -> ProveResult | CheckResult:
    """Look for an explanation, verify it, and write the proof; or check a proof.

    Raises:
        RecipeError: There is no table, or no folder.
        UserError: The weights, the table or the proof are not what they should be.
    """
    if config.check is not None:
        return check(config)
    if config.table is None or folder is None:
        raise RecipeError("`mechatlas prove WEIGHTS` needs --table TABLE.npy and --out DIR.")
    given, table = read_weights(config.weights), read_array(config.table)
    with about(config.table):
        group = Group(table, name=config.table.stem.removesuffix("_table"))
    with about(config.weights):
        weights = as_weights(*given, group.order)
    folder.expect(lambda: _estimate(config, *weights.unembed.shape), is_long=False)
    folder.facts(group=group.name, weights=str(config.weights.resolve()))
    folder.parent("weights", checksum_file(config.weights))
    folder.parent("table", checksum_file(config.table))
    with about(config.weights):
        bound = _find_bound(config, weights, group, folder)
    result = describe_bound(bound, folder)
    if config.exact:
        decide_exactly(weights, group.table, np.eye(group.order, dtype=bool))  # compiles
        accuracy, seconds = exact_accuracy(bound, *weights)
        result = dataclasses.replace(result, accuracy_exact=accuracy, seconds_exact=seconds)
    return _compare(weights, group, bound, result) if config.compare else result


def _estimate(config: ProveConfig, width: int, order: int) -> Estimate:
    """Estimate a proof from the multiply-adds of brute force."""
    repeats = REPEATS if order < 300 else 1
    times = SEARCH + config.exact + config.compare * (4 * repeats + 2)  # float64 takes two
    found = of_products(
        2.0 * times * order**3 * width,
        memory=8 * order * (12 * order + 6 * width), disk=12 * order * width + 8 * order**2,
    )  # fmt: skip
    return dataclasses.replace(found, seconds=PREPARATION + found.seconds)


def describe_bound(bound: AccuracyBound, folder: Outputs) -> ProveResult:
    """Describe a bound with its evidence, and write the details of the network."""
    weights, group, verification = bound.weights, bound.group, bound.verification
    cosets = measure_cosets(weights, group)
    folder.json(NEURONS, describe(weights, group, bound, cosets))
    return ProveResult(
        order=group.order,
        width=weights.left.shape[1],
        accuracy_bound=bound.accuracy_bound,
        accuracy_bound_real=verification.accuracy_bound_real,
        verifier=verification.stages_in_words,
        seconds_verify=bound.seconds_verify,
        seconds_prove=bound.seconds_prove,
        multiply_adds=verification.multiply_adds,
        multiply_adds_share=verification.multiply_adds / (group.order**3 * weights.left.shape[1]),
        logit_budget=verification.logit_budget,
        why=explain_in_words(verification),
        bi_equivariance=bi_equivariance(*weights, group),
        cosets={side: summarize_cosets(each) for side, each in cosets.items()},
    )


def _find_bound(
    config: ProveConfig, weights: Weights, group: Group, folder: RunFolder
) -> AccuracyBound:
    """Look for an explanation, or take that of an unfinished run of the same recipe and inputs."""
    file, kept = folder.path / PROOF_FILE, folder.kept(KEPT)
    if kept is not None:
        folder.file(PROOF_FILE, kept["proof"].tobytes())
        seconds = float(kept["seconds_prove"].item())
        return bound_again(load_proof(file), *weights, group, seconds_prove=seconds)
    bound = prove_bound(*weights, group, compute_budget=config.compute_budget)
    data = bound.proof.as_bytes()
    folder.file(PROOF_FILE, data)
    seconds = np.array(bound.seconds_prove)
    folder.keep(KEPT, {"proof": np.frombuffer(data, np.uint8), "seconds_prove": seconds})
    return bound


def check(config: ProveConfig) -> CheckResult:
    """Verify a saved proof, without the prover; it must be about the table, if one is given.

    Raises:
        ProofError: It is damaged, forged, or about other weights or another table.
        UserError: A file cannot be read.
    """
    assert config.check is not None
    path = config.check / PROOF_FILE if config.check.is_dir() else config.check
    proof = load_proof(path)
    weights = read_weights(config.weights)
    if config.table is not None and not np.array_equal(proof.table, read_array(config.table)):
        raise ProofError(f"{path} is about another table than {config.table}.")
    clock = time.process_time()
    with about(path):
        verification = proof.check(*weights, reference=config.reference)
    return CheckResult(
        order=len(proof.table),
        width=len(weights.unembed),
        accuracy_bound=verification.accuracy_bound,
        accuracy_bound_real=verification.accuracy_bound_real,
        claimed=proof.accuracy_bound,
        table=checksum(np.ascontiguousarray(proof.table, np.int64).tobytes()),
        verifier=verification.stages_in_words,
        reference=config.reference,
        seconds_verify=time.process_time() - clock,
    )


def in_words(result: ProveResult | CheckResult) -> str:
    """The bound, the reason for it, and its cost."""
    lines = [
        f"Accuracy is at least {result.accuracy_bound:.4%} over all {result.order**2:,} pairs "
        f"(float32, any order of sums; {result.accuracy_bound_real:.4%} in exact arithmetic).",
        f"Verified in {result.seconds_verify:.4f} s of CPU time.",
    ]
    if isinstance(result, CheckResult):
        by = " by the short verifier in numpy" if result.reference else ""
        return "\n".join([f"The proof holds, checked{by or ' without the prover'}.", *lines])
    lines.insert(1, result.why)
    if result.accuracy_exact is not None:
        lines.append(f"Exact accuracy {result.accuracy_exact:.6%} in {result.seconds_exact:.4f} s.")
    if result.seconds_brute_force_f32 is not None:
        lines.append(
            f"Brute force: {result.seconds_brute_force_f32:.4f} s in float32, "
            f"{result.seconds_brute_force_f64:.4f} s in float64."
        )
    return "\n".join([*lines, f"Proof: {Path(result.out) / PROOF_FILE}"])


def read_weights(path: Path) -> Weights:
    """Read left, right and unembed from a file.

    Raises:
        WeightsError: The file is missing, damaged or lacks one of them.
    """
    arrays = read_arrays(path)
    if missing := [key for key in Weights._fields if key not in arrays]:
        raise WeightsError(
            f"{path} has no {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, arrays)) or 'nothing'}. `mechatlas prove` needs left (n, m), "
            "right (n, m) and unembed (m, n)."
        )
    return Weights(*(arrays[key] for key in Weights._fields))


REASONS = {
    "additive": "parts of neurons that depend on x or y alone differ between answers",
    "non_equivariance": "circuits are not equivariant: cells of B x B' are empty, or `a` is not "
    "the same over a circuit",
    "unembedding_noise": "the unembedding has noise that the interaction of a circuit can reach",
    "residual": "neurons that fit no circuit, or only roughly",
    "rounding": "rounding",
}
"""Reasons for each loss of `LogitBudget`, in words."""


def explain_in_words(verification: Verification) -> str:
    """Explain why the bound is as large as it is."""
    budget, share = verification.logit_budget, verification.accuracy_bound
    losses = {name: -getattr(budget, name) for name in REASONS}
    worst = max(losses, key=lambda name: losses[name])
    ideal, total, reason = budget.ideal_margin, sum(losses.values()), REASONS[worst]
    if share < 1:
        return (
            f"{1 - share:.1%} of the pairs are not certified. For a typical pair the ideal margin "
            f"is {ideal:.1f} logits and the losses are {total:.1f}; most of them "
            f"({losses[worst]:.1f}) because {reason}."
        )
    against = (
        f"Every pair is certified. The ideal margin is {ideal:.1f} logits, the losses are "
        f"{total:.1f} for a typical pair"
    )
    if float((verification.stages == 1).mean()) > 0.5:
        more = "" if total < ideal else " by norms; answer by answer, the margin is larger"
        return f"{against}{more}."
    return (
        f"{against}, most of them ({losses[worst]:.1f}) because {reason}: the circuits alone do "
        "not prove it, the low rank of the unembedding does."
    )


def _compare(
    weights: Weights, group: Group, bound: AccuracyBound, result: ProveResult
) -> ProveResult:
    """Time brute force, verification and exact count in turn, and take medians."""
    table = group.table
    work = {
        "seconds_brute_force_f32": lambda: brute_force_accuracy(*weights, table, dtype=np.float32),
        "seconds_brute_force_f64": lambda: brute_force_accuracy(*weights, table, dtype=np.float64),
        "seconds_verify": lambda: verify(*weights, group, bound.proof.explanation),
    }
    if result.accuracy_exact is not None:
        work["seconds_exact"] = lambda: exact_accuracy(bound, *weights)
    repeats = REPEATS if group.order < 300 else 1
    times = [[_seconds(run_once) for run_once in work.values()] for _ in range(repeats)]
    medians = dict(zip(work, np.median(times, axis=0).tolist(), strict=True))
    accuracy = brute_force_accuracy(*weights, table, dtype=np.float64)
    return dataclasses.replace(result, accuracy_brute_force=accuracy, **medians)


def _seconds(work: Callable[[], object]) -> float:
    """Process CPU seconds of one call."""
    clock = time.process_time()
    work()
    return time.process_time() - clock
