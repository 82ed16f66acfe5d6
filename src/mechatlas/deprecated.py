"""Spellings of version 0.1, which keep working until 0.3 with a warning that names the new one.

This module is the one table of old names:

    NAMES        names of the front door and of `mechatlas.base`
    ARGUMENTS    keyword arguments, by function
    ATTRIBUTES   attributes of results, by class
    FLAGS        flags of commands and keys of recipes, by command
    COLUMNS      columns of parquet files, written under both names
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

NAMES: dict[str, str] = {
    "ArrayRows": "mechatlas.dictionaries.rows.ArrayRows",
    "Analysing": "mechatlas.analysis.interaction.results.InteractionConfig",
    "Collecting": "mechatlas.activations.collect.StoreConfig",
    "Group": "mechatlas.maths.groups.Group",
    "Interaction": "mechatlas.analysis.interaction.results.InteractionBasis",
    "Posing": "mechatlas.activations.posing.PoseConfig",
    "Positions": "mechatlas.activations.positions.Positions",
    "Pretrained": "mechatlas.dictionaries.pretrained.Pretrained",
    "Rows": "mechatlas.base.Rows",
    "StreamRows": "mechatlas.dictionaries.rows.StreamRows",
    "build": "mechatlas.activations.networks.load_network",
    "edited": "mechatlas.activations.sites.intervene",
    "fvu": "mechatlas.dictionaries.metrics.fvu",
    "read": "mechatlas.activations.sites.read_activations",
    "relatives": "mechatlas.analysis.matching.pairing.feature_splitting",
}
"""Old name -> full path of the new one."""

ARGUMENTS: dict[str, dict[str, str]] = {
    "Autoencoder": {"prefixes": "matryoshka_widths"},
    "AuxK": {"weight": "auxk_alpha"},
    "Crosscoder": {"prefixes": "matryoshka_widths"},
    "Objective": {"relative": "normalize_mse"},
    "Schedule": {"pressure": "sparsity_warm_up"},
    "Transcoder": {"prefixes": "matryoshka_widths"},
    "InteractionConfig": {
        "allowed_fall": "max_accuracy_drop",
        "nulls": "n_null_graphs",
        "points": "quadrature_points",
        "relative": "rank_threshold",
        "sources": "gradient_probes",
        "synchrony": "synchrony_tolerance",
    },
    "basis": {"how": "settings", "kept": "checkpoints"},
    "between": {"rate": "fdr"},
    "branch_of": {"rate": "fdr"},
    "feature_splitting": {"found": "matching", "most": "max_partners"},
    "match": {"parts": "cost", "rate": "fdr", "units": "scale"},
    "prove": {"effort": "compute_budget"},
    "specialized": {"rate": "fdr"},
    "symmetry": {"alike": "equality_threshold", "rate": "fdr", "turns": "acts_by_rotation"},
    "track": {"rate": "fdr"},
}
"""Name of a function or dataclass -> old keyword -> new keyword."""

ATTRIBUTES: dict[str, dict[str, str]] = {
    "AblationCurve": {"number": "n_needed", "of": "n"},
    "InteractionBasis": {
        "ledger": "degeneracy",
        "q_rotated": "rotated_q",
        "stable": "stability",
    },
    "LayerResult": {
        "account": "degeneracy",
        "activations": "activation_eigenvalues",
        "all_edges": "edges_by_basis",
        "blocks": "synchronized_blocks",
        "gradients": "gradient_eigenvalues",
        "how": "map_description",
        "needed": "edge_curves",
        "rows": "n_rows",
        "vectors": "vector_curves",
    },
    "Match": {
        "of_a": "active_a",
        "of_b": "active_b",
        "partial": "partial_assignment",
        "rate": "fdr",
        "threshold": "cosine_threshold",
    },
    "Tracks": {"breaks": "link_error_probability", "stand": "significant"},
    "Specialization": {
        "leaning": "nearest_branch",
        "lumps": "n_effective",
        "specialised": "specialized",
    },
    "AccuracyBound": {"verdict": "verification"},
    "Verification": {"budget": "logit_budget"},
    "Symmetry": {
        "alike": "equality_threshold",
        "chance": "chance_similarity",
        "errors": "standard_errors",
        "inflation": "variance_inflation",
        "likeness_to_reference": "similarity_to_reference",
        "rate": "fdr",
        "stabiliser_function": "stabilizer_function",
        "stabilisers": "stabilizers",
    },
}
"""Name of a class -> old attribute -> new attribute."""

FLAGS: dict[str, dict[str, str]] = {
    "branches": {"rate": "fdr"},
    "basis": {
        "how.allowed_fall": "settings.max_accuracy_drop",
        "how.nulls": "settings.n_null_graphs",
        "how.points": "settings.quadrature_points",
        "how.relative": "settings.rank_threshold",
        "how.sources": "settings.gradient_probes",
        "how.synchrony": "settings.synchrony_tolerance",
        "how": "settings",
    },
    "match": {"rate": "fdr", "units": "scale"},
    "circuit": {
        "keep": "top_k_sources",
        "pictures": "visualize_steps",
        "rate": "fdr",
        "removed": "n_ablated",
    },
    "collect": {"collecting": "storage"},
    "prove": {"effort": "compute_budget"},
    "report": {"pictures": "visualize"},
    "symmetry": {"alike": "equality_threshold", "rate": "fdr", "swaps": "interventions"},
    "train": {
        "objective.relative": "objective.normalize_mse",
        "prefixes": "matryoshka_widths",
        "revival.weight": "revival.auxk_alpha",
        "schedule.pressure": "schedule.sparsity_warm_up",
    },
}
"""Name of a command -> old flag or recipe key -> new one; with dots inside tables."""

COLUMNS: dict[str, str] = {
    "stabiliser": "stabilizer",
    "stabiliser_order": "stabilizer_order",
}
"""Old column -> the column that has its values."""

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")
Class = TypeVar("Class", bound=type)


def warn(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that a spelling is old.

    Args:
        old: Old spelling.
        new: Spelling today.
        stacklevel: Frames up to the line that is to change.
    """
    warnings.warn(
        f"{old} is now called {new}; the old spelling goes in version 0.3.",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def renamed_arguments(
    function: Callable[Parameters, Returned],
) -> Callable[Parameters, Returned]:
    """Accept the old keyword arguments that the table lists for a function.

    Raises:
        TypeError: The same argument is given under both spellings.
    """
    name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    table = ARGUMENTS[name]

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        for old in [old for old in kwargs if old in table]:
            new = table[old]
            if new in kwargs:
                raise TypeError(f"{name}() got both {old}= and {new}=, which are the same.")
            warn(f"{name}({old}=)", f"{name}({new}=)")
            kwargs[new] = kwargs.pop(old)
        return function(*args, **kwargs)

    return call


def renamed_fields(cls: Class) -> Class:
    """Accept the old keyword arguments that the table lists for the fields of a dataclass."""
    cls.__init__ = renamed_arguments(cls.__init__)
    return cls


def renamed_attributes(cls: Class) -> Class:
    """Give a class the old attributes that the table lists for it.

    Raises:
        AttributeError: From the class, for a name that is neither old nor new.
    """
    table = ATTRIBUTES[cls.__name__]

    def look_up(self: Any, name: str) -> Any:
        if name not in table:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warn(f"{cls.__name__}.{name}", f"{cls.__name__}.{table[name]}")
        return getattr(self, table[name])

    cls.__getattr__ = look_up  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def _new_flag(command: str, old: str) -> str | None:
    """Name today of a flag or key, `None` if it has not changed; tables are renamed with it."""
    for name, new in FLAGS.get(command, {}).items():
        if old == name or old.startswith(f"{name}."):
            return new + old.removeprefix(name)
    return None


def renamed_flags(command: str, words: list[str]) -> list[str]:
    """Replace the old flags that the table lists for a command."""
    renamed = []
    for word in words:
        flag, equals, value = word.partition("=")
        new = _new_flag(command, flag[2:].replace("-", "_")) if flag.startswith("--") else None
        if new is not None:
            new = f"--{new.replace('_', '-')}"
            warn(f"{command} {flag}", f"{command} {new}")
            word = new + equals + value
        renamed.append(word)
    return renamed


def renamed_keys(
    command: str, values: Mapping[str, Any], *, quiet: bool = False, table: str = ""
) -> dict[str, Any]:
    """Replace the old keys of a recipe that the table lists for a command.

    Args:
        command: Name of the command.
        values: Values by key.
        quiet: Whether nobody is warned, as for the files of an earlier version.
        table: Name of the table that the values stand in, with a dot at its end.
    """
    renamed = {}
    for key, value in values.items():
        new = _new_flag(command, table + key)
        if new is not None and not quiet:
            warn(f"key {table}{key} of a recipe for {command}", new)
        name = key if new is None else new.rpartition(".")[2]
        if isinstance(value, Mapping):
            value = renamed_keys(command, value, quiet=quiet, table=f"{table}{key}.")
        renamed[name] = value
    return renamed
