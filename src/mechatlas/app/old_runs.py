"""Names in the files of version 0.1 (manifests of schema 1), and their names today.

    KEYS        keys of `result.json` and other JSON files, by kind of folder
    COLUMNS     columns of tables and names of tensors, by kind of folder
    VALUES      words in columns of tables, by kind of folder and column

Folders of version 0.1 are read through these tables and never written again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

KEYS: dict[str, dict[str, str]] = {
    "branches": {
        "enriched": "n_enriched",
        "false_discovery_rate_by_lot": "fdr_permuted",
        "from": "source",
        "home_of": "n_assigned",
        "kinds": "n_labels",
        "leaning": "nearest_branch",
        "never_active": "n_never_active",
        "rate": "fdr",
        "rows": "n_rows",
        "shares_agree": "rank_correlations",
        "specialised": "n_specialized",
        "specialised_by_lot": "n_specialized_permuted",
        "specialised_share": "specialized_share",
        "tested": "n_tested",
    },
    "basis": {
        "account": "degeneracy",
        "activations": "low_rank_activations",
        "dead": "dead_units",
        "gradients": "low_rank_gradients",
        "joint": "low_rank_products",
        "parameters": "n_parameters",
        "scale": "relu_scaling",
        "section": "layer_map",
        "synchronised": "synchronized_nonlinearities",
        "synchronised_blocks": "synchronized_blocks",
    },
    "circuit": {
        "agreement_gates_open": "agreement_open_gates",
        "agreement_one_gate_for_all": "agreement_shared_gates",
        "drive": "pre_activation",
        "edges_that_stand": "n_significant",
        "features_removed": "n_ablated",
        "rate": "fdr",
        "stands": "significant",
    },
    "matching": {
        "B itself": "b_reconstruction",
        "born": "birth_share",
        "divergence": "kl_divergence",
        "dying": "death_share",
        "either": "jaccard",
        "given_a": "p_b_given_a",
        "layer drop": "layer_drop",
        "least_cosine": "cosine_threshold",
        "looks": "passes",
        "lost": "variance_lost",
        "mean of B": "b_mean",
        "nearest by cosine": "nearest",
        "permuted and rescaled": "rescaled",
        "rate": "fdr",
        "same number": "same_index",
        "without_partner": "n_null",
    },
    "proof": {
        "budget": "logit_budget",
        "cells": "unembedding_noise",
        "ideal": "ideal_margin",
        "merged": "n_merged",
        "moved": "non_equivariance",
        "rest": "residual",
        "silent": "n_dead",
        "unplaced": "n_unplaced",
    },
    "spectra": {  # a file in a folder of kind basis
        "activations": "activation_eigenvalues",
        "all_edges": "n_edges",
        "blocks": "synchronized_blocks",
        "edges": "edge_curves",
        "gradients": "gradient_eigenvalues",
        "is": "description",
        "needed": "n_needed",
        "of": "n",
        "score": "scores",
        "stand": "significant",
        "vectors": "vector_curves",
    },
    "symmetry": {
        "alike": "equality_threshold",
        "alignment_null": "null_alignment",
        "alignment_wrong_pose": "wrong_pose_alignment",
        "causal": "interventions",
        "chance_likeness": "chance_similarity",
        "change_if_unchanged": "symmetric_change",
        "change_of_others": "change",
        "repaired": "recovered",
        "repaired_null": "null_recovered",
        "repaired_together": "recovered_by_all",
        "share_of_null": "null_share",
    },
}
"""Kind -> old key -> key today, at any depth."""
COLUMNS: dict[str, dict[str, str]] = {
    "branches": {"lumps": "n_effective"},
    "symmetry": {
        "errors": "standard_errors",
        "likeness": "similarity",
        "stabiliser": "stabilizer",
        "stabiliser_elements": "stabilizer_elements",
        "stabiliser_function": "stabilizer_function",
        "stabiliser_order": "stabilizer_order",
        "swap_alignment": "intervention_alignment",
        "swap_change": "intervention_symmetric_change",
        "swap_null": "intervention_null_alignment",
        "swap_p_value": "intervention_p_value",
        "swap_pose_p_value": "intervention_pose_p_value",
        "swap_pose_q_value": "intervention_pose_q_value",
        "swap_q_value": "intervention_q_value",
        "swap_wrong_pose": "intervention_wrong_pose_alignment",
    },
}
"""Kind -> old column or tensor -> its name today."""
VALUES: dict[str, dict[str, dict[str, str]]] = {
    "symmetry": {"class": {"not reliable": "not shown"}},
}
"""Kind -> column -> old word -> word today."""


def renamed(value: Any, kind: str) -> Any:
    """Replace the old keys of plain values, at any depth."""
    table = KEYS.get(kind, {})
    if isinstance(value, Mapping):
        if kind == "matching" and {"pairs", "given_a", "either"} <= set(value):
            value = {"pairs": value["pairs"], "co_firing": value}  # now in a table of its own
        return {table.get(key, key): renamed(item, kind) for key, item in value.items()}
    return [renamed(item, kind) for item in value] if isinstance(value, list) else value


def renamed_columns(columns: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Replace the old names of columns or tensors, and old words in them.

    A name stays where the new one is there too: it means something else today.
    """
    table, words = COLUMNS.get(kind, {}), VALUES.get(kind, {})
    new = {
        name if table.get(name) in columns else table.get(name, name): values
        for name, values in columns.items()
    }
    for name in words.keys() & new.keys():
        listed = [words[name].get(value, value) for value in new[name]]
        new[name] = np.array(listed) if isinstance(new[name], np.ndarray) else listed
    return new
