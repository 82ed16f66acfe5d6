"""From the weights of a group-operation network to a bound on its accuracy, with its proof.

    prove        weights, table -> Bound
    Bound        the bound, its proof, and what it cost
    Proof        what a verifier needs and no more: it can be saved, and checked by anyone
    load_proof   a file -> Proof

Main path: `explain` looks for structure, `verify` turns it into a bound that holds whatever
was found. Explanations of two degrees of detail are tried; the cheaper one that suffices wins.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from mechatlas.analysis.proofs import exact
from mechatlas.analysis.proofs.explain import Directions, explain, find_directions
from mechatlas.analysis.proofs.explanation import Circuit, Explanation, Grid, ProofError
from mechatlas.analysis.proofs.verify import Verdict, verify
from mechatlas.base import DiskError, InputError, NonFiniteError
from mechatlas.files import checksum, write
from mechatlas.maths.groups import Group

Weights = tuple[
    Float32[np.ndarray, "order neuron"],
    Float32[np.ndarray, "order neuron"],
    Float32[np.ndarray, "neuron order"],
]

GAIN = 0.001
"""What more multiply-adds must add to the bound to be worth it."""
DETAILS = (0, 1)
"""0: the unembedding of each neuron within its own irrep; 1: in a second irrep as well."""
EFFORT = 0.6
"""Multiply-adds that the later stages may use, as a share of those of brute force."""
SCHEMA = "mechatlas.proof/2"


@dataclasses.dataclass(frozen=True, eq=False)
class Proof:
    """An explanation, the table, and which weights it is about."""

    explanation: Explanation
    table: Int[np.ndarray, "order order"]
    weights: str
    """Checksum of the three arrays."""
    accuracy_bound: float
    """What is claimed."""
    worth: bool = True
    """Whether the prover thinks that it saves time before brute force. Only a hint."""

    def check(self, left: ArrayLike, right: ArrayLike, unembed: ArrayLike) -> Verdict:
        """Verify anew, without the prover.

        Raises:
            ProofError: The proof is damaged, about other weights, or claims too much.
            GroupError: Its table is not that of a group.
        """
        weights = as_weights(left, right, unembed, len(self.table))
        if _checksum(weights) != self.weights:
            raise ProofError("The proof is about other weights: their checksums differ.")
        verdict = verify(*weights, Group(self.table), self.explanation)
        if not self.accuracy_bound <= verdict.accuracy_bound:
            raise ProofError(
                f"The proof claims an accuracy of at least {self.accuracy_bound:.6g}, but its "
                f"explanation gives {verdict.accuracy_bound:.6g}."
            )
        return verdict

    def save(self, path: Path) -> Path:
        """Write one file.

        Raises:
            DiskError: The place is not writable.
        """
        arrays: dict[str, np.ndarray] = {"table": self.table.astype(np.int32)}
        e = self.explanation
        for kind, parts in (("circuits", e.circuits), ("grids", e.grids)):
            for number, part in enumerate(parts):
                for field in dataclasses.fields(part):
                    value = getattr(part, field.name)
                    if not isinstance(value, str):
                        array = np.ascontiguousarray(np.atleast_1d(value))
                        arrays[f"{kind}.{number}.{field.name}"] = array
        for name in _WHOLE:
            arrays[name] = np.ascontiguousarray(getattr(e, name))
        about = {
            "schema": SCHEMA,
            "weights": self.weights,
            "accuracy_bound": self.accuracy_bound,
            "worth": self.worth,
            "second_share": e.second_share,
            "third_share": e.third_share,
            "circuits": [c.name for c in e.circuits],
            "grids": [g.name for g in e.grids],
        }
        write(Path(path), save_arrays(arrays, {"proof": json.dumps(about, allow_nan=False)}))
        return Path(path)


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """What `prove` returns."""

    proof: Proof
    verdict: Verdict
    group: Group
    directions: Directions
    """What was seen of each neuron, for people; the proof does not use it."""
    seconds_prove: float
    """Process CPU seconds of looking for the explanation, trials included."""
    seconds_verify: float
    """Process CPU seconds of one verification."""

    @property
    def accuracy_bound(self) -> float:
        """Least share of all pairs that the float32 network gets right."""
        return self.verdict.accuracy_bound


def prove(
    left: ArrayLike,
    right: ArrayLike,
    unembed: ArrayLike,
    table: ArrayLike | Group,
    *,
    effort: float = EFFORT,
) -> Bound:
    """Bound the accuracy of logits = relu(left[x] + right[y]) @ unembed on a group's table.

    Args:
        left: Array (order, m).
        right: Array (order, m).
        unembed: Array (m, order).
        table: `table[x, y]` is the right answer for x, y; or the group.
        effort: Multiply-adds that the second and third stage may use together, as a share of
            those of brute force. They take only pairs that the first stage left.

    Raises:
        InputError: Shapes do not fit.
        NonFiniteError: A weight is NaN or infinite; it is named.
        GroupError: The table is not that of a group; the axiom and the place are named.
    """
    clock = time.process_time()
    group = table if isinstance(table, Group) else Group(table)
    weights = as_weights(left, right, unembed, group.order)
    tried = []
    for detail in DETAILS:
        found = _with_effort(explain(*weights, group, detail=detail), effort)
        tried.append((verify(*weights, group, found), found))
    most = max(verdict.accuracy_bound for verdict, _ in tried)
    enough = [pair for pair in tried if pair[0].accuracy_bound >= most - GAIN]
    _, found = min(enough, key=lambda pair: pair[0].multiply_adds)
    directions = find_directions(*weights, group.irreps())
    middle = time.process_time()
    verdict = verify(*weights, group, found)
    end = time.process_time()
    proof = Proof(
        found, np.asarray(group.table), _checksum(weights), verdict.accuracy_bound,
        _saves_time(verdict, found, group.order**3 * weights[0].shape[1]),
    )  # fmt: skip
    return Bound(proof, verdict, group, directions, middle - clock, end - middle)


def _saves_time(verdict: Verdict, found: Explanation, whole: int) -> bool:
    """Whether verifying before brute force is likely to be faster than brute force alone.

    Measured over many networks, verification takes as long as brute force in float32 with
    this many multiply-adds: 1.1 for each of its own, twenty for each logit of a pair in the
    second stage, 15,000 for each x and circuit, and ten million that depend on nothing.
    """
    n = len(found.row)
    logits, products = n * int((verdict.stages > 1).sum()), n * len(found.circuits)
    work = 1.1 * verdict.multiply_adds + 20 * logits + 1.5e4 * products + 1e7
    return work < 0.85 * verdict.accuracy_bound * whole


def _with_effort(found: Explanation, effort: float) -> Explanation:
    if not 0 <= effort <= 1:
        raise InputError(f"effort must be from 0 to 1, got {effort}.")
    third = min(0.01, effort / 4)
    return dataclasses.replace(found, second_share=effort - third, third_share=third)


def count_exactly(bound: Bound, weights: Weights) -> tuple[float, float]:
    """The exact accuracy in real arithmetic: proof first where that helps, then brute force.

    Returns:
        Accuracy, and process CPU seconds.
    """
    table = bound.proof.table
    group = bound.group
    clock = time.process_time()
    if bound.proof.worth:
        certified = verify(*weights, group, bound.proof.explanation).margins > 0
        right = certified | exact.finish(weights, table, ~certified)
    else:
        right = exact.finish(weights, table, np.ones(table.shape, bool))
    return float(right.mean()), time.process_time() - clock


def as_weights(left: ArrayLike, right: ArrayLike, unembed: ArrayLike, order: int) -> Weights:
    """The three arrays in float32.

    Raises:
        InputError: Shapes do not fit, or numbers are not exact in float32.
        NonFiniteError: A weight is NaN or infinite.
    """
    arrays = []
    for name, value in (("left", left), ("right", right), ("unembed", unembed)):
        given = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)  # pyright: ignore[reportAttributeAccessIssue]
        if given.ndim != 2 or given.dtype.kind not in "fiu":
            raise InputError(
                f"{name} must be a matrix of numbers, got shape {given.shape}, {given.dtype}."
            )
        bad = np.argwhere(~np.isfinite(given))
        if len(bad):
            i, j = bad[0]
            raise NonFiniteError(
                f"{name}[{i}, {j}] is {given[i, j]}: a network with such a weight proves nothing."
            )
        array = np.ascontiguousarray(given, np.float32)
        if given.dtype != np.float32 and not np.array_equal(array.astype(given.dtype), given):
            raise InputError(
                f"{name} has {given.dtype} numbers that float32 cannot hold. The statement is "
                "about a float32 network: round the weights first, and measure that network."
            )
        arrays.append(array)
    width = arrays[0].shape[1]
    for name, array, shape in zip(
        ("left", "right", "unembed"),
        arrays,
        ((order, width), (order, width), (width, order)),
        strict=True,
    ):
        if array.shape != shape:
            raise InputError(
                f"{name} must have the shape {shape} for a group of order {order} and "
                f"{width} neurons, got {array.shape}."
            )
        if array.size and float(np.abs(array).max()) > 1e12:
            raise InputError(f"{name} has a weight above 1e12: float32 logits could overflow.")
    if not width:
        raise InputError("The network has no neurons.")
    return arrays[0], arrays[1], arrays[2]


def load_proof(path: Path) -> Proof:
    """Read a proof. Nothing in it is believed before `Proof.check`.

    Raises:
        DiskError: There is no such file.
        ProofError: It is damaged or not a proof.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        arrays = load_arrays(data)
        length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["proof"])
        if about["schema"] != SCHEMA:
            raise ProofError(f"{path} is not a proof of this version: {about['schema']!r}.")
        return _from_arrays(arrays, about)
    except ProofError:
        raise
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:
        raise ProofError(f"{path} is damaged or is not a proof ({error}).") from error


def _from_arrays(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> Proof:
    circuits = tuple(
        _part(Circuit, f"circuits.{i}", str(name), arrays)
        for i, name in enumerate(about["circuits"])
    )
    grids = tuple(
        _part(Grid, f"grids.{i}", str(name), arrays) for i, name in enumerate(about["grids"])
    )
    whole = {name: _typed(arrays[name], *kind) for name, kind in _WHOLE.items()}
    explanation = Explanation(
        **whole,
        circuits=circuits,
        grids=grids,
        second_share=float(about["second_share"]),
        third_share=float(about["third_share"]),
    )
    table = _typed(arrays["table"], 2, np.int32)
    return Proof(
        explanation, table, str(about["weights"]), float(about["accuracy_bound"]),
        bool(about["worth"]),
    )  # fmt: skip


_WHOLE: dict[str, tuple[int, type]] = {
    "silent": (1, np.bool_), "leaders": (1, np.int64), "ratios": (1, np.float32),
    "order": (1, np.int64), "exponents": (1, np.int64), "row": (2, np.float32),
    "column": (2, np.float32), "blocks": (1, np.int64),
}  # fmt: skip
_PARTS: dict[str, tuple[int, type]] = {
    "start": (1, np.int64), "matrices": (3, np.float64), "weights": (2, np.float32),
    "mean": (2, np.float64), "left_action": (2, np.int64), "right_action": (2, np.int64),
    "left_points": (1, np.int64), "right_points": (1, np.int64),
    "left_antipodes": (1, np.int64), "right_antipodes": (1, np.int64),
    "scale": (1, np.float32), "table": (2, np.float32),
    "left_vectors": (2, np.float64), "right_vectors": (2, np.float64),
}  # fmt: skip


def _part(kind: Any, prefix: str, name: str, arrays: dict[str, np.ndarray]) -> Any:
    fields = [field.name for field in dataclasses.fields(kind) if field.name != "name"]
    values = {f: _typed(arrays[f"{prefix}.{f}"], *_PARTS[f]) for f in fields}
    return kind(name=name, **(values | {"start": values["start"].item()}))


def _typed(array: np.ndarray, ndim: int, dtype: type) -> np.ndarray:
    """The array, if its numbers are of this kind.

    Raises:
        ProofError: They are not.
    """
    wanted = np.dtype(dtype)
    integral = wanted.kind == "i" and array.dtype.kind == "i"
    if array.ndim != ndim or not (array.dtype == wanted or integral):
        raise ProofError(f"An array is {array.dtype} with shape {array.shape}, expected {wanted}.")
    return np.ascontiguousarray(array.astype(wanted))


def _checksum(weights: Weights) -> str:
    parts = (f"{w.shape}".encode() + np.ascontiguousarray(w).tobytes() for w in weights)
    return checksum(b"".join(parts))
