"""Proofs in files: everything that a verifier needs and no more.

AccuracyProof  an explanation, a table, and a claim; `check` verifies it without the prover
load_proof     a file -> AccuracyProof
as_weights     arrays of any kind -> the three arrays of a network in float32
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from mechatlas.analysis.proofs.verifier.explanation import (
    Explanation,
    Grid,
    IrrepCircuit,
    ProofError,
)
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.analysis.proofs.verifier.verify import Verification, verify
from mechatlas.base import InputError, NonFiniteError, Result
from mechatlas.files import checksum, read, write
from mechatlas.maths.arrays import as_array
from mechatlas.maths.groups import Group

SCHEMA = "mechatlas.proof/3"
"""Name and version of the format that `AccuracyProof.save` writes."""
OLD_SCHEMA = "mechatlas.proof/2"
"""Format of version 0.1: the same arrays under the names of `OLD_NAMES`."""
OLD_NAMES = {
    "dead": "silent",
    "representative_of": "leaders",
    "scale_factors": "ratios",
    "representatives": "order",
    "additive_x": "row",
    "additive_y": "column",
    "block_offsets": "blocks",
    "first_neuron": "start",
    "coefficients": "weights",
    "mean_matrix": "mean",
    "second_stage_budget": "second_share",
    "third_stage_budget": "third_share",
    "weights_checksum": "weights",
    "saves_time": "worth",
}
"""Names of today -> names in files of version 0.1, where they differ."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AccuracyProof(Result):
    """Proof of a bound: an explanation, the table, and the weights that both are about."""

    explanation: Explanation
    """Claims of the prover."""
    table: Int[np.ndarray, "order order"]
    """Right answers."""
    weights_checksum: str
    """Checksum of the three arrays."""
    accuracy_bound: float
    """Claim: the least share of pairs that the float32 network gets right."""
    saves_time: bool = True
    """Whether the prover expects it to save time before brute force. Only a hint."""

    def summary(self) -> str:
        """Claim of the proof, and what it is about."""
        n, e = len(self.table), self.explanation
        return (
            f"Proof: claims an accuracy of at least {self.accuracy_bound:.4%} over {n**2:,} pairs\n"
            f"About a network of {len(e.dead)} neurons with the checksum {self.weights_checksum}\n"
            f"Explanation: {len(e.circuits)} circuits, {len(e.grids)} grids; check() verifies it"
        )

    def check(
        self, left: ArrayLike, right: ArrayLike, unembed: ArrayLike, *, reference: bool = False
    ) -> Verification:
        """Verify anew, without the prover.

        Args:
            left: Array (order, m).
            right: Array (order, m).
            unembed: Array (m, order).
            reference: Run the short loops of `reference`, in numpy, instead of the compiled ones.

        Raises:
            ProofError: The proof is damaged, about other weights, or claims too much.
            GroupError: Its table is not that of a group.
        """
        weights = as_weights(left, right, unembed, len(self.table))
        if checksum_weights(weights) != self.weights_checksum:
            raise ProofError("The proof is about other weights: their checksums differ.")
        group = Group(self.table)
        verification = verify(*weights, group, self.explanation, reference=reference)
        if not self.accuracy_bound <= verification.accuracy_bound:
            raise ProofError(
                f"The proof claims an accuracy of at least {self.accuracy_bound:.6g}, but its "
                f"explanation gives {verification.accuracy_bound:.6g}."
            )
        return verification

    def save(self, path: Path) -> Path:
        """Write one file.

        Raises:
            DiskError: The place is not writable.
        """
        write(Path(path), self.as_bytes())
        return Path(path)

    def as_bytes(self) -> bytes:
        """Contents of the file."""
        arrays: dict[str, np.ndarray] = {"table": self.table.astype(np.int32)}
        e = self.explanation
        for kind, parts in (("circuits", e.circuits), ("grids", e.grids)):
            for number, part in enumerate(parts):
                for field in dataclasses.fields(part):
                    value = getattr(part, field.name)
                    if not isinstance(value, str):
                        array = np.ascontiguousarray(np.atleast_1d(value))
                        arrays[f"{kind}.{number}.{field.name}"] = array
        for name in _EXPLANATION_ARRAYS:
            arrays[name] = np.ascontiguousarray(getattr(e, name))
        about = {
            "schema": SCHEMA,
            "weights_checksum": self.weights_checksum,
            "accuracy_bound": self.accuracy_bound,
            "saves_time": self.saves_time,
            "second_stage_budget": e.second_stage_budget,
            "third_stage_budget": e.third_stage_budget,
            "circuits": [c.name for c in e.circuits],
            "grids": [g.name for g in e.grids],
        }
        return save_arrays(arrays, {"proof": json.dumps(about, allow_nan=False)})


def as_weights(left: ArrayLike, right: ArrayLike, unembed: ArrayLike, order: int) -> Weights:
    """Convert the three arrays of a network to float32.

    Args:
        left: Array (order, m): numpy, torch or lists.
        right: Array (order, m).
        unembed: Array (m, order).
        order: Order of the group.

    Raises:
        InputError: Shapes do not fit, or numbers are not exact in float32.
        NonFiniteError: A weight is NaN or infinite.
    """
    axes = {"left": "order neuron", "right": "order neuron", "unembed": "neuron order"}
    weights = Weights(
        *(_exact_float32(v, axes[k], k) for k, v in zip(axes, (left, right, unembed), strict=True))
    )
    width = weights.left.shape[1]
    shapes = ((order, width), (order, width), (width, order))
    for name, array, shape in zip(axes, weights, shapes, strict=True):
        if array.shape != shape:
            raise InputError(
                f"{name} must have the shape {shape} for a group of order {order} and "
                f"{width} neurons, got {array.shape}."
            )
        if array.size and float(np.abs(array).max()) > 1e12:
            raise InputError(f"{name} has a weight above 1e12: float32 logits could overflow.")
    if not width:
        raise InputError("The network has no neurons.")
    return weights


def _exact_float32(value: ArrayLike, axes: str, name: str) -> np.ndarray:
    """Convert a matrix to float32 without rounding."""
    given = as_array(value, axes, name)
    bad = np.argwhere(~np.isfinite(given))
    if len(bad):
        i, j = bad[0]
        raise NonFiniteError(
            f"{name}[{i}, {j}] is {given[i, j]}: a network with such a weight proves nothing."
        )
    array = given.astype(np.float32, copy=False)
    if given.dtype != np.float32 and not np.array_equal(array.astype(given.dtype), given):
        raise InputError(
            f"{name} has {given.dtype} numbers that float32 cannot hold. The statement is "
            "about a float32 network: round the weights first, and measure that network."
        )
    return array


def checksum_weights(weights: Weights) -> str:
    """Checksum of the shapes and bytes of the three arrays."""
    parts = (f"{w.shape}".encode() + np.ascontiguousarray(w).tobytes() for w in weights)
    return checksum(b"".join(parts))


def load_proof(path: Path) -> AccuracyProof:
    """Read a proof. Nothing in it is believed before `AccuracyProof.check`.

    Raises:
        DiskError: There is no such file, or it is not the one that a manifest beside it states.
        ProofError: It is damaged or not a proof.

    Examples:
        A network that adds modulo 2, its proof in a file, and the check of a reader:

        >>> from pathlib import Path
        >>> import mechatlas as ma, numpy as np
        >>> left = np.float32([[1, -1, 1, -1], [-1, 1, -1, 1]])
        >>> right = np.float32([[1, -1, -1, 1], [-1, 1, 1, -1]])
        >>> unembed = np.float32([[1, -1], [1, -1], [-1, 1], [-1, 1]])
        >>> bound = ma.prove(left, right, unembed, ma.group("C2"))
        >>> file = bound.proof.save(Path("proof.safetensors"))
        >>> proof = ma.load_proof(file)
        >>> proof.check(left, right, unembed).accuracy_bound
        1.0
    """
    return read_proof(read(Path(path)), str(path))


def read_proof(data: bytes, source: str = "The file") -> AccuracyProof:
    """Read the contents of a file. Nothing in it is believed before `AccuracyProof.check`.

    Args:
        data: Contents, as `AccuracyProof.as_bytes` gives them.
        source: Name of the file in messages.

    Raises:
        ProofError: They are damaged or not a proof.
    """
    try:
        arrays = load_arrays(data)
        length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["proof"])
        if about["schema"] not in (SCHEMA, OLD_SCHEMA):
            raise ProofError(f"{source} is not a proof of this version: {about['schema']!r}.")
        return _Reader(arrays, about, OLD_NAMES if about["schema"] == OLD_SCHEMA else {}).read()
    except ProofError:
        raise
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ProofError(f"{source} is damaged or is not a proof ({error}).") from error


Part = TypeVar("Part", IrrepCircuit, Grid)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """Contents of a file, by the names of today."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]
    names: dict[str, str]
    """Names of today -> names in the file, where they differ."""

    def read(self) -> AccuracyProof:
        """Put the proof together."""
        explanation = Explanation(
            **{name: self._array("", name, kind) for name, kind in _EXPLANATION_ARRAYS.items()},  # pyright: ignore[reportArgumentType]
            circuits=tuple(
                self._part(IrrepCircuit, f"circuits.{i}.", str(name))
                for i, name in enumerate(self.about["circuits"])
            ),
            grids=tuple(
                self._part(Grid, f"grids.{i}.", str(name))
                for i, name in enumerate(self.about["grids"])
            ),
            second_stage_budget=float(self._entry("second_stage_budget")),
            third_stage_budget=float(self._entry("third_stage_budget")),
        )
        return AccuracyProof(
            explanation,
            _typed(self.arrays["table"], 2, np.int32),
            str(self._entry("weights_checksum")),
            float(self._entry("accuracy_bound")),
            bool(self._entry("saves_time")),
        )

    def _entry(self, name: str) -> Any:
        """Entry of the metadata."""
        return self.about[self.names.get(name, name)]

    def _array(self, prefix: str, name: str, kind: tuple[int, type]) -> np.ndarray:
        """Array of a known kind."""
        return _typed(self.arrays[prefix + self.names.get(name, name)], *kind)

    def _part(self, kind: type[Part], prefix: str, name: str) -> Part:
        """A circuit or a grid."""
        fields = [field.name for field in dataclasses.fields(kind) if field.name != "name"]
        values: dict[str, Any] = {f: self._array(prefix, f, _PART_ARRAYS[f]) for f in fields}
        values["first_neuron"] = values["first_neuron"].item()
        return kind(name=name, **values)


_EXPLANATION_ARRAYS: dict[str, tuple[int, type]] = {
    "dead": (1, np.bool_), "representative_of": (1, np.int64), "scale_factors": (1, np.float32),
    "representatives": (1, np.int64), "exponents": (1, np.int64), "additive_x": (2, np.float32),
    "additive_y": (2, np.float32), "block_offsets": (1, np.int64),
}  # fmt: skip
_PART_ARRAYS: dict[str, tuple[int, type]] = {
    "first_neuron": (1, np.int64), "matrices": (3, np.float64), "coefficients": (2, np.float32),
    "mean_matrix": (2, np.float64), "left_action": (2, np.int64), "right_action": (2, np.int64),
    "left_points": (1, np.int64), "right_points": (1, np.int64),
    "left_antipodes": (1, np.int64), "right_antipodes": (1, np.int64),
    "scale": (1, np.float32), "table": (2, np.float32),
    "left_vectors": (2, np.float64), "right_vectors": (2, np.float64),
}  # fmt: skip


def _typed(array: np.ndarray, ndim: int, dtype: type) -> np.ndarray:
    """The array, if its numbers are of this kind."""
    wanted = np.dtype(dtype)
    integral = wanted.kind == "i" and array.dtype.kind == "i"
    if array.ndim != ndim or not (array.dtype == wanted or integral):
        raise ProofError(f"An array is {array.dtype} with shape {array.shape}, expected {wanted}.")
    return np.ascontiguousarray(array.astype(wanted))
