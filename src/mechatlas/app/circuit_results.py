"""Results of circuits: the fields of `result.json`, and the tables and kernels of their edges.

    describe_circuits    circuits of a chain of dictionaries -> their tables and a `CircuitResult`
    pair_result          one circuit -> counts of its edges, beside its evidence
    edge_columns         edges -> columns of `edges.parquet`
    explained_features   what the sources shown explain of a feature

The command and the page of runs made in Python both write them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from mechatlas.analysis.circuits.circuit import Circuit
from mechatlas.analysis.circuits.direct import DirectCircuit
from mechatlas.analysis.circuits.effects import (
    AblationEvidence,
    Attribution,
    bootstrap_interval,
)
from mechatlas.analysis.circuits.paths import CircuitPath, strongest_paths
from mechatlas.analysis.circuits.virtual_weights import CircuitEdges
from mechatlas.app.run_folder import EDGES, KERNELS, CommandResult, Outputs
from mechatlas.base import InputError


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """Quartiles over the features of a site."""

    low_quartile: float
    """Lower quartile."""
    median: float
    """Median."""
    high_quartile: float
    """Upper quartile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairResult(AblationEvidence):
    """Circuit of two consecutive dictionaries, with its agreement with ablations."""

    a: str
    """Name of the earlier dictionary."""
    b: str
    """Name of the later dictionary."""
    n_a: int
    """Latents of the earlier dictionary."""
    n_b: int
    """Latents of the later dictionary."""
    branches: list[str]
    """Routes between the sites: branches, or attention heads past and through the MLP."""
    kernel_taps: list[int]
    """Positions in the kernels of each route."""
    pairs_tested: int
    """Pairs of features tested by each route."""
    edges: int
    """Edges kept."""
    n_significant: int
    """Edges kept that are significant at the false discovery rate."""
    discoveries: dict[str, float]
    """Fraction of all pairs that is significant at 5 %, by route."""
    variance_reproduced: Quartiles | None
    """Fraction of the variance of pre-activations that the kernels reproduce; None if undefined."""
    seconds: float
    """CPU seconds of recording and weighing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainedFeature:
    """Share of a feature's pre-activation that its sources explain, on held-out samples."""

    layer: int
    """Number of its dictionary."""
    latent: int
    """Number of the latent in its dictionary."""
    places: int
    """Positions where it is active."""
    pre_activation: float | None
    """Mean pre-activation that all features of the earlier site make together."""
    explained_by_paths: float | None
    """Fraction of it by the sources on the paths shown."""
    explained_by_kept: float | None
    """Fraction of it by all sources kept."""
    attribution_gap: float | None
    """Fraction that the integrated gradients miss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitResult(CommandResult):
    """Fields of `result.json`."""

    dictionaries: list[str]
    """Names of the dictionaries."""
    sites: list[str]
    """Their sites."""
    fdr: float
    """False discovery rate asked for."""
    samples: int
    """Samples recorded."""
    held_out_samples: int
    """Samples of ablations and attributions."""
    pairs: list[PairResult]
    """Circuits of consecutive dictionaries."""
    paths: list[CircuitPath]
    """Strongest paths through all sites."""
    features: list[ExplainedFeature]
    """Features on the paths, and how much of each is explained."""


def describe_circuits(
    circuits: Sequence[Circuit | DirectCircuit],
    names: Sequence[str],
    out: Outputs,
    *,
    features: int = 8,
    seconds: Sequence[float] = (),
) -> CircuitResult:
    """Write the edges of the circuits of a chain of dictionaries, and sum them up.

    Args:
        circuits: Circuits of each two consecutive dictionaries.
        names: Names of the dictionaries.
        out: Run that holds the tables.
        features: Features of the last site that are given paths.
        seconds: CPU seconds of each circuit, where known.

    Raises:
        InputError: No feature was ablated for a circuit.
    """
    pairs, kernels, tables = [], {}, []
    for k, each in enumerate(circuits):
        if each.evidence is None:
            raise InputError(
                "The circuit has no evidence: no feature was ablated. Find it with "
                "`ma.circuit(..., n_ablated=32)`."
            )
        took = seconds[k] if seconds else 0.0
        pairs.append(pair_result(each, each.evidence, *names[k : k + 2], seconds=took))
        kernels |= kernel_tensors(k, each.routes, each.taps, each.kernels())
        tables.append(edge_columns(each.edges, each.routes, k))
        if isinstance(each, DirectCircuit):
            _add_effects(tables[-1], each)
    write_edges(out, tables, kernels)
    evidence = circuits[0].evidence
    return CircuitResult(
        dictionaries=list(names),
        sites=[each.sites[0] for each in circuits] + [circuits[-1].sites[1]],
        fdr=circuits[0].fdr,
        samples=circuits[0].n_samples,
        held_out_samples=evidence.n_samples if evidence else 0,
        pairs=pairs,
        paths=strongest_paths([c.edges for c in circuits], features=features, fdr=circuits[0].fdr),
        features=[],
    )


def _add_effects(columns: dict[str, Shaped[np.ndarray, " edge"]], circuit: DirectCircuit) -> None:
    """Fill in what ablations of the sources of edges did, by all routes together."""
    if circuit.ablation is None:
        return
    row = {int(source): r for r, source in enumerate(circuit.ablation.sources)}
    for edge, source in enumerate(circuit.edges.source.tolist()):
        if source in row:
            encoder = circuit.encoder[:, circuit.edges.target[edge]]
            lost = circuit.ablation.lost[row[source]] @ encoder
            low, high = bootstrap_interval(lost[None])
            for name, value in zip(
                ("effect", "effect_low", "effect_high"), (lost.mean(), low[0], high[0]), strict=True
            ):
                columns[name][edge] = value


def pair_result(
    circuit: Circuit | DirectCircuit,
    evidence: AblationEvidence,
    a: str,
    b: str,
    *,
    seconds: float = 0.0,
) -> PairResult:
    """Count the edges of a circuit, beside its agreement with ablations.

    Args:
        circuit: Circuit of two dictionaries.
        evidence: Agreement with ablations.
        a: Name of the earlier dictionary.
        b: Name of the later dictionary.
        seconds: CPU seconds of recording and weighing.
    """
    return PairResult(
        a=a,
        b=b,
        n_a=circuit.n_latents[0],
        n_b=circuit.n_latents[1],
        branches=list(circuit.routes),
        kernel_taps=[len(taps) for taps in circuit.taps],
        pairs_tested=circuit.edges.tested,
        edges=len(circuit.edges.source),
        n_significant=int(circuit.significant.sum()),
        discoveries=dict(zip(circuit.routes, circuit.edges.discoveries.tolist(), strict=True)),
        variance_reproduced=(
            _quartiles(circuit.reproduced_variance) if isinstance(circuit, Circuit) else None
        ),
        seconds=seconds,
        **vars(evidence),
    )


def _quartiles(values: Float[np.ndarray, " feature"]) -> Quartiles | None:
    if np.isnan(values).all():
        return None
    return Quartiles(*(float(v) for v in np.nanquantile(values, [0.25, 0.5, 0.75])))


def edge_columns(
    edges: CircuitEdges, routes: Sequence[str], k: int
) -> dict[str, Shaped[np.ndarray, " edge"]]:
    """Columns of the table of edges; effects and attributions are NaN until they are measured.

    Args:
        edges: Edges of two sites.
        routes: Names of the routes.
        k: Number of the pair of sites.
    """
    n = len(edges.source)
    kernel = np.zeros(n, np.int32)
    for r in range(len(routes)):
        kernel[edges.route == r] = np.arange((edges.route == r).sum())
    unknown = ("attribution", "effect", "effect_low", "effect_high")
    return {
        "pair": np.full(n, k, np.int32),
        "latent_a": edges.source.astype(np.int32),
        "latent_b": edges.target.astype(np.int32),
        "branch": np.array([routes[r] for r in edges.route], dtype=object),
        "weight": edges.weight,
        "norm": edges.norm,
        "contribution": edges.contribution,
        "share": edges.share.astype(np.float32),
        "q_value": edges.q_value,
        **{name: np.full(n, np.nan) for name in unknown},
        "kernel": kernel,
    }


def kernel_tensors(
    k: int,
    routes: Sequence[str],
    taps: Sequence[Int[np.ndarray, "_ 2"]],
    kernels: Sequence[Float[np.ndarray, "_ _"]],
) -> dict[str, Shaped[np.ndarray, "_ ..."]]:
    """Name the kernels of the edges of pair `k` of sites, route by route, and their positions."""
    arrays = {}
    for route, positions, kernel in zip(routes, taps, kernels, strict=True):
        arrays[f"{k}.{route}.taps"] = positions.astype(np.int32)
        arrays[f"{k}.{route}.kernels"] = kernel
    return arrays


def write_edges(
    folder: Outputs,
    tables: Sequence[dict[str, Shaped[np.ndarray, " _"]]],
    kernels: dict[str, Shaped[np.ndarray, "_ ..."]],
) -> None:
    """Write the edges of all pairs of sites, and their kernels."""
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    columns["branch"] = columns["branch"].astype(str)
    folder.table(EDGES, columns)
    folder.tensors(KERNELS, kernels)


def explained_features(
    k: int, edges: CircuitEdges, attribution: Attribution, paths: Sequence[CircuitPath]
) -> list[ExplainedFeature]:
    """Compute the fractions of pre-activations that the shown and the kept sources explain.

    Args:
        k: Number of the pair of sites.
        edges: Edges that were kept.
        attribution: Attribution of the pre-activations of features at the later site.
        paths: Paths that are shown.
    """
    pairs = {(path.latents[k], path.latents[k + 1]) for path in paths}
    explained = []
    for t, target in enumerate(attribution.targets.tolist()):
        by_source = attribution.attributed[t].sum(axis=0)
        kept = np.unique(edges.source[edges.target == target])
        shown = np.array(sorted(j for j, i in pairs if i == target), np.int64)
        whole = float(attribution.pre_activation[t])
        known = bool(attribution.places[t] > 0) and whole != 0
        explained.append(
            ExplainedFeature(
                layer=k + 1,
                latent=int(target),
                places=int(attribution.places[t]),
                pre_activation=whole if known else None,
                explained_by_paths=float(by_source[shown].sum() / whole) if known else None,
                explained_by_kept=float(by_source[kept].sum() / whole) if known else None,
                attribution_gap=float(attribution.gap[t]) if known else None,
            )
        )
    return explained
