"""Quality of a match on held-out rows of a store, and in the network that the store is of.

open_rows            a paired store -> rows to fold with, and held-out rows to measure on
pairings             a match -> the match and its baselines, with the scale of each pair
held_out_quality     co-firing and explained variance, for each pairing
open_held_samples    the network of the store and batches of held-out samples
effects_on_output    the network's output with a site written through each pairing
seconds_of_effects   how long that takes
find_combinations    latents of each dictionary as boolean combinations of those before
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechatlas.activations.positions import Positions, TokenSamples, left_out
from mechatlas.activations.store import Store, StoreRows
from mechatlas.analysis.matching.boolean import OPERATIONS, BooleanFeatures, boolean_features
from mechatlas.analysis.matching.folding import fold
from mechatlas.analysis.matching.held_out import (
    CoFiring,
    Estimate,
    baselines,
    co_firing,
    explained,
    paired_codes,
    transport,
)
from mechatlas.analysis.matching.pairing import Match
from mechatlas.analysis.matching.splicing import SpliceEffect, permuted, references, splice
from mechatlas.app.estimates import of_work
from mechatlas.app.inputs import open_network
from mechatlas.app.recipes import TrustConfig
from mechatlas.base import (
    Dictionary,
    Progress,
    Site,
    StoreError,
    TrustError,
    UserError,
    no_progress,
)

SAMPLES_AT_ONCE = 32
"""Samples in one forward pass."""
N_WAYS = 8
"""Number of the matched pairs, the optimum and the baselines."""


@dataclasses.dataclass(frozen=True, eq=False)
class PairedRows:
    """Rows of a paired store, the same samples and positions for every dictionary."""

    known: list[Float[Tensor, "row _d_in"]]
    """Rows of the training split at each dictionary's site, to fold with."""
    samples: Int[np.ndarray, " row"]
    """Sample of each of these rows."""
    held_out: list[Float[Tensor, "held_out_row _d_in"]]
    """Rows of the held-out split at each dictionary's site, to measure on."""


def open_rows(
    store: Store,
    dictionaries: Sequence[Dictionary],
    sites: Sequence[str],
    paths: Sequence[Path],
    *,
    n_known: int,
    n_held_out: int,
) -> PairedRows:
    """Read the rows of each dictionary's site.

    Args:
        store: Store collected with `paired = true`.
        dictionaries: The dictionaries.
        sites: Site of each.
        paths: Path of each, for messages.
        n_known: Rows of the training split.
        n_held_out: Rows of the held-out split.

    Raises:
        StoreError: The store is not paired, misses a site, or has rows of another width.
    """
    if not store.manifest.get("settings", {}).get("paired", False):
        raise StoreError(
            f"The rows of different sites of {store.root} do not belong together. Collect a "
            "store with `paired = true` in [storage]."
        )
    known, held_out, samples = [], [], np.empty(0, np.int64)
    for dictionary, site, path in zip(dictionaries, sites, paths, strict=True):
        rows = store.rows(site)
        if rows.d_in != dictionary.d_in:
            raise StoreError(
                f"{store.root} has {rows.d_in} numbers a row at {site}, {path} reads "
                f"{dictionary.d_in}."
            )
        first, samples = first_rows(rows, n_known)
        known.append(first)
        held_out.append(rows.held_out(n_held_out).x)
    if min(len(x) for x in held_out) < 2:
        raise StoreError(f"{store.root} has no held-out rows to measure on.")
    return PairedRows(known, samples, held_out)


def first_rows(
    rows: StoreRows, n: int
) -> tuple[Float[Tensor, "row d_in"], Int[np.ndarray, " row"]]:
    """Read the first rows of the training split, the same for all sites.

    Returns:
        The rows sorted by sample, and the sample of each.
    """
    parts, places, missing = [], [], n
    for batch, where in rows.scan():
        if missing <= 0 or int(batch.row[0]) >= rows.n_rows:
            break
        parts.append(batch.x[:missing])
        places.append(where[:missing])
        missing -= len(parts[-1])
    place = torch.cat(places).numpy()
    order = np.lexsort(place.T[::-1])
    return torch.cat(parts)[torch.from_numpy(order)], place[order, 0]


class Pairing(NamedTuple):
    """A way to pair the latents of A and B."""

    columns: Int[np.ndarray, " latent_a"]
    """Latent of B for each latent of A, -1 for none."""
    gain: Float[np.ndarray, " latent_a"]
    """Factor from the activation of each latent of A to its partner's, by their folding."""


def pairings(
    a: Dictionary, b: Dictionary, scales: tuple[Any, Any], matching: Match, *, seed: int
) -> dict[str, Pairing]:
    """List the matched pairs, the optimum and every baseline.

    Args:
        a: Dictionary A.
        b: Dictionary B.
        scales: Activation of each latent of A and of B that counts as 1, or None.
        matching: Match of A and B.
        seed: Seed of the random pairing.
    """
    columns = {"matched": matching.matched_columns(), **baselines(a, b, matching, seed=seed)}
    scale_a, scale_b = fold(a, scale=scales[0]).scale, fold(b, scale=scales[1]).scale
    return {
        way: Pairing(partners, scale_b[np.maximum(partners, 0)] / scale_a)
        for way, partners in columns.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainedVariance:
    """Explained variance of B's rows when B decodes the code of A."""

    permuted: Estimate
    """Activations are given to the partners as they are."""
    rescaled: Estimate | None = None
    """Activations are multiplied by the ratio of the two latents' scales."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairQuality:
    """Quality of a match on a store, by way of pairing; all of it None without a store."""

    held_out_rows: int | None = None
    """Rows under `co_firing` and `explained_variance`; with a store."""
    co_firing: dict[str, CoFiring] | None = None
    """Co-firing, by way of pairing; with a store."""
    explained_variance: dict[str, ExplainedVariance] | None = None
    """Explained variance of B's rows, by way of pairing; with a store."""
    samples: int | None = None
    """Samples under `spliced`."""
    spliced: dict[str, SpliceEffect] | None = None
    """Effect on the network's output when B's site is written from A's, by way of pairing."""
    not_run: str | None = None
    """Reason why the network was not run."""


def held_out_quality(
    a: Dictionary,
    b: Dictionary,
    ways: Mapping[str, Pairing],
    x: Float[Tensor, "row d_a"],
    y: Float[Tensor, "row d_b"],
    *,
    seed: int,
) -> PairQuality:
    """Measure co-firing and explained variance of every pairing.

    Args:
        a: Dictionary A.
        b: Dictionary B.
        ways: Pairings by name.
        x: Held-out rows of A's site.
        y: Held-out rows of B's site, of the same samples and positions.
        seed: Seed of the intervals.
    """
    codes = paired_codes(a, b, x, y)
    variance = {
        way: ExplainedVariance(
            permuted=transport(codes, b, y, pairing.columns, seed=seed),
            rescaled=transport(codes, b, y, pairing.columns, pairing.gain, seed=seed),
        )
        for way, pairing in ways.items()
    }
    if x.shape == y.shape:
        variance["layer_drop"] = ExplainedVariance(permuted=explained(y, x, seed=seed))
    with torch.no_grad():
        reconstruction = b.decode(b.encode(y))
    own = explained(y, reconstruction, seed=seed)
    return PairQuality(
        held_out_rows=len(x),
        co_firing={way: co_firing(codes, p.columns, seed=seed) for way, p in ways.items()},
        explained_variance={**variance, "b_reconstruction": ExplainedVariance(permuted=own)},
    )


class HeldSamples(NamedTuple):
    """A network, and batches of held-out samples to run it on."""

    network: nn.Module
    batches: list[Tensor]
    left_out: list[Bool[np.ndarray, "sample token"]]
    """Tokens of each batch that stay as they are; none for other samples."""
    padding: list[Bool[np.ndarray, "sample token"]]
    """Tokens of each batch that are padding."""


def open_held_samples(store: Store, n: int, trust: TrustConfig) -> HeldSamples | str:
    """Open the network of a store and its first held-out samples, or say why it cannot be opened.

    Args:
        store: The store.
        n: Number of samples; 0 for no network, for no reason.
        trust: Code that may run.

    Raises:
        TrustError: The store names code that the user has not named.
    """
    if not n:
        return ""
    try:
        network, samples = open_network(store, trust)
        numbers = store.samples("held", n)
        chunks = [numbers[i : i + SAMPLES_AT_ONCE] for i in range(0, len(numbers), SAMPLES_AT_ONCE)]
        batches = [samples.stack([samples.read(i) for i in chunk]) for chunk in chunks]
    except TrustError:
        raise
    except UserError as error:
        return str(error)
    same, padding = [], []
    if isinstance(samples, TokenSamples) and store.manifest.get("left_out"):
        positions = Positions.of_store(store.manifest)
        same = [left_out(samples, chunk, positions, Counter()).numpy() for chunk in chunks]
        padding = [np.stack([samples.padding(i) for i in chunk]) for chunk in chunks]
    return HeldSamples(network, batches, same, padding)


def effects_on_output(
    held: HeldSamples | str,
    sites: tuple[str, str],
    a: Dictionary,
    b: Dictionary,
    ways: Mapping[str, Pairing],
    *,
    seed: int,
    on_progress: Progress = no_progress,
) -> PairQuality:
    """Run the network with B's site written from A's, once for every pairing.

    Args:
        held: Network and samples, or the reason why there are none.
        sites: Sites of A and B.
        a: Dictionary A.
        b: Dictionary B.
        ways: Pairings by name.
        seed: Seed of the intervals.
        on_progress: Callback with the number of replacements so far, and of all.

    Returns:
        The effects by way, or why the network was not run, such as sites in the wrong order.
    """
    if isinstance(held, str):
        return PairQuality(not_run=held or None)
    writers = {way: permuted(a, b, p.columns, p.gain) for way, p in ways.items()}
    parsed = Site.parse(sites[0]), Site.parse(sites[1])
    try:
        effects = splice(
            held.network,
            held.batches,
            parsed,
            writers | references(a, b),
            left_out=held.left_out,
            padding=held.padding,
            seed=seed,
            on_progress=on_progress,
        )
    except UserError as error:
        return PairQuality(not_run=str(error))
    return PairQuality(samples=sum(map(len, held.batches)), spliced=effects)


def seconds_of_effects(
    held: HeldSamples | str, sites: Sequence[Any], dictionaries: Sequence[Dictionary]
) -> float:
    """Estimate the seconds of `effects_on_output` from the first replacements.

    Args:
        held: Network and samples, or the reason why there are none.
        sites: Sites of A and B.
        dictionaries: A and B.
    """
    if isinstance(held, str):
        return 0.0
    a, b = dictionaries
    some = Pairing(np.arange(a.n_latents) % b.n_latents, np.ones(a.n_latents))
    ways = dict.fromkeys(map(str, range(N_WAYS)), some)
    run = functools.partial(
        effects_on_output, held, (str(sites[0]), str(sites[1])), a, b, ways, seed=0
    )
    return of_work([lambda progress: run(on_progress=progress)], memory=0).seconds


def find_combinations(
    dictionaries: Sequence[Dictionary], rows: PairedRows, *, fdr: float, seed: int
) -> list[BooleanFeatures]:
    """Describe the latents of each dictionary but the first by two latents of the one before.

    Args:
        dictionaries: Dictionaries in the order of the network.
        rows: Rows of each, of which the training split is used.
        fdr: False discovery rate of the claims.
        seed: Seed of the halves.

    Raises:
        InputError: The rows are of one sample.
    """
    sides = itertools.pairwise(zip(dictionaries, rows.known, strict=True))
    codes = [paired_codes(a, b, x, y) for (a, x), (b, y) in sides]
    return [boolean_features(each, rows.samples, fdr=fdr, seed=seed) for each in codes]


def combinations_table(found: Sequence[BooleanFeatures]) -> dict[str, Any]:
    """Combination of each latent that has one, pair of dictionaries by pair."""
    parts = [(number, each, np.flatnonzero(each.first >= 0)) for number, each in enumerate(found)]
    columns: dict[str, list[Any]] = {
        "pair": [np.full(len(rows), number, np.int32) for number, _, rows in parts],
        "latent_b": [rows for _, _, rows in parts],
        "operation": [np.array(OPERATIONS)[each.operation[rows]] for _, each, rows in parts],
    }
    for name in ("first", "second", "error", "single_error", "p_value", "significant"):
        columns[name] = [getattr(each, name)[rows] for _, each, rows in parts]
    columns["q_value"] = [each.q_values[rows] for _, each, rows in parts]
    return {name: np.concatenate(values) for name, values in columns.items()}
