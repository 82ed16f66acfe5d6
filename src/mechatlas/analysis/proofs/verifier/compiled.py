"""All compiled loops in one namespace, with the names and signatures of `reference`."""

from mechatlas.analysis.proofs.verifier.compiled_checks import find_fault, preserves_antipodes
from mechatlas.analysis.proofs.verifier.compiled_pairs import (
    bound_pairs,
    hidden_values,
    judge_margins,
)
from mechatlas.analysis.proofs.verifier.compiled_terms import (
    absolute_sums,
    additive_losses,
    class_minima,
    float32_error_sums,
    grid_spans,
    ideal_margins,
    index_tables,
    merge_neurons,
    residual_distances,
    unembedding_residual,
)

__all__ = [
    "absolute_sums",
    "additive_losses",
    "bound_pairs",
    "class_minima",
    "find_fault",
    "float32_error_sums",
    "grid_spans",
    "hidden_values",
    "ideal_margins",
    "index_tables",
    "judge_margins",
    "merge_neurons",
    "preserves_antipodes",
    "residual_distances",
    "unembedding_residual",
]
