"""Circuits of dictionaries of several sites: direct effects of latents, by derivatives.

    find_direct_circuit    network, dictionaries and batches of samples -> a `DirectCircuit`
    _Pass                  one batch: rows of both dictionaries, and what the source writes
    _blocks                contributions of all sources to some targets, by the site written
    _ablate                latents removed one at a time, with the others held

A cross-layer transcoder stands for the MLPs of a network, so its latents act on each other through
what lies between: the residual stream, attention, norms. All that the source's dictionary writes is
held at its values on data but for the latent that is followed; the derivative of the network from
there to what the target reads is its direct effect. Nothing is frozen and no operation is refused:
whatever can be differentiated has a circuit. Routes are the sites that a latent writes.

One backward pass gives the contributions of all sources, at all distances, to one target. Ablations
remove a latent from all that it writes and run the network itself.

Source: Ameisen et al., Circuit tracing (2025), for direct effects with all other features held;
there attention and norms are frozen as well.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor, nn

from mechatlas.activations.layouts import Layout, layouts_of
from mechatlas.activations.networks import as_input, call_network, running
from mechatlas.activations.positions import skips_first
from mechatlas.activations.sites import intervene
from mechatlas.analysis.circuits.effects import Ablation, AblationEvidence, ablation_agreement
from mechatlas.analysis.circuits.recording import only, stacked
from mechatlas.analysis.circuits.virtual_weights import (
    BLOCK_BYTES,
    DECOYS,
    MIN_ACTIVE,
    CircuitEdges,
    PairBlock,
    select_edges,
)
from mechatlas.base import InputError, Progress, Result, Site, no_progress
from mechatlas.dictionaries.ends import Ends, ends_of, in_words, parts_of
from mechatlas.maths.arrays import SparseMatrix

N_TARGETS = 256
"""Latents whose sources are found, drawn at random among the active ones."""
Batches = Callable[[], Iterable[Any]]
"""Source of inputs of the network, in batches."""


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedDictionary:
    """Dictionary with the sites of a network that it reads and writes."""

    dictionary: Any
    sites: dict[str, Site]
    """Sites by the names that the dictionary has for them."""

    @functools.cached_property
    def ends(self) -> Ends:
        """Columns of the sites."""
        return ends_of(self.dictionary)

    @property
    def reads(self) -> dict[Site, slice]:
        """Columns of each site that it reads."""
        return {self.sites[name]: span for name, span in self.ends.reads.items()}

    @property
    def writes(self) -> dict[Site, slice]:
        """Columns of each site that it writes."""
        return {self.sites[name]: span for name, span in self.ends.writes.items()}

    @functools.cached_property
    def encoder(self) -> Float[Tensor, "d_in latent"]:
        """Encoder weights."""
        return self.dictionary.W_enc.detach()

    @functools.cached_property
    def atoms(self) -> Float[Tensor, "latent d_out"]:
        """Atoms over all sites that are written."""
        return self.dictionary.W_dec.detach()

    @functools.cached_property
    def part_of(self) -> Int[np.ndarray, " latent"]:
        """Number of the part of each latent: of a cross-layer transcoder, its layer."""
        parts = parts_of(self.dictionary)
        return np.repeat(np.arange(len(parts)), [p.latents.stop - p.latents.start for p in parts])

    def refuse_nonlinear(self) -> None:
        """Refuse a dictionary whose pre-activations are not linear in its rows.

        Raises:
            InputError: It scales every row by itself, or has no pre-activations.
        """
        rule = getattr(self.dictionary, "sparsity", None)
        why = None
        if getattr(self.dictionary, "norm", None) or getattr(rule, "pursues", False):
            why = "its pre-activations are not linear in its rows"
        elif getattr(rule, "by_site", False):
            why = "it opens its latents site by site, so a code does not say what is written where"
        if why:
            raise InputError(
                f"The dictionary that {in_words(self.dictionary)} cannot be part of a circuit: "
                f"{why}."
            )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DirectCircuit(Result):
    """Direct effects between latents of two dictionaries, with the evidence for them."""

    sites: tuple[str, str]
    """Sites that the earlier dictionary writes, and those that the later one reads."""
    n_latents: tuple[int, int]
    """Latents of both dictionaries."""
    routes: tuple[str, ...]
    """Sites that the sources write, by which an effect is counted."""
    targets: Int[np.ndarray, " target"]
    """Latents of the later dictionary whose sources were looked for."""
    encoder: Float[np.ndarray, "d_in latent"]
    """Encoder weights of the later dictionary."""
    edges: CircuitEdges
    """Strongest sources of each of them, with q-values."""
    fdr: float
    """False discovery rate at which an edge counts as significant."""
    n_samples: int
    """Samples recorded."""
    evidence: AblationEvidence | None = None
    """Agreement with ablations; None if no latent was ablated."""
    ablation: Ablation | None = None
    """Ablations, the rows lost by sample at all sites that the later dictionary reads."""

    @property
    def significant(self) -> Bool[np.ndarray, " edge"]:
        """Edges whose q-value is at most the false discovery rate."""
        return self.edges.q_value <= self.fdr

    @property
    def taps(self) -> list[Int[np.ndarray, "tap 2"]]:
        """Positions of the kernels: one of each, for effects at all distances together."""
        return [np.zeros((1, 2), np.int64) for _ in self.routes]

    def kernels(self) -> list[Float[np.ndarray, "edge tap"]]:
        """Weights of the edges of each route, as kernels of one position."""
        own = (self.edges.weight[self.edges.route == k] for k in range(len(self.routes)))
        return [weight.astype(np.float32)[:, None] for weight in own]

    def summary(self) -> str:
        """Number of significant edges, and agreement with ablations."""
        lines = [
            f"Circuit: {self.sites[0]} -> {self.sites[1]}, {self.significant.sum():,} of "
            f"{len(self.edges.source):,} edges significant at a false discovery rate of "
            f"{self.fdr:.0%}",
            f"direct effects on {len(self.targets):,} latents by {len(self.routes)} sites; "
            f"{self.edges.tested:,} pairs tested",
        ]
        if self.evidence is not None:
            lines.append(f"weights and {self.evidence.n_ablated} ablations: "
                         f"{self.evidence.agreement.in_words()}")  # fmt: skip
        return "\n".join(lines)


def find_direct_circuit(
    network: nn.Module,
    a: PlacedDictionary,
    b: PlacedDictionary,
    known: Batches,
    held_out: Batches,
    *,
    top_k_sources: int = 8,
    n_targets: int = N_TARGETS,
    n_ablated: int = 0,
    fdr: float = 0.05,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> DirectCircuit:
    """Find the direct effects of the latents of one dictionary on those of another, or on its own.

    Args:
        network: Network of both.
        a: Dictionary of the sources.
        b: Dictionary of the targets; may be the same.
        known: Inputs on which effects are measured.
        held_out: Inputs on which latents are ablated.
        top_k_sources: Strongest sources kept of each target.
        n_targets: Latents of `b`, drawn at random among the active ones, whose sources are found.
        n_ablated: Active latents of `a`, drawn at random, that are ablated; 0 for none.
        fdr: False discovery rate at which an edge counts as significant.
        seed: Seed of the draws and of the null.
        on_progress: Called with the samples done, counted once for each target, and their total.

    Raises:
        InputError: There are no samples, nothing that `b` reads follows what `a` writes, a
            dictionary does not fit its sites, or too few of its latents are active.
    """
    a.refuse_nonlinear()
    b.refuse_nonlinear()
    recording = _record(network, a, b, known)
    alive_a = np.bincount(recording.codes_a.indices, minlength=recording.codes_a.shape[1])
    alive_b = np.bincount(recording.codes_b.indices, minlength=recording.codes_b.shape[1])
    possible = recording.reached(a, b)
    alive_a, alive_b = alive_a >= MIN_ACTIVE, alive_b >= MIN_ACTIVE
    random = np.random.default_rng([seed, 50])
    followed, acting = np.any(possible, axis=0), np.any(possible, axis=1)
    able = np.flatnonzero(alive_b & np.asarray(followed)[b.part_of])
    targets = np.sort(random.permutation(able)[:n_targets])
    sources = np.flatnonzero(alive_a & np.asarray(acting)[a.part_of])
    if not len(targets) or not len(sources):
        raise InputError(
            f"No latent of the {'earlier' if len(targets) else 'later'} dictionary that can take "
            f"part is active at {MIN_ACTIVE} positions of the samples; give more samples."
        )
    sources = np.sort(random.permutation(sources)[:n_ablated])
    chosen = np.zeros(len(alive_b), bool)
    chosen[targets] = True
    weights = np.zeros((len(sources), len(targets)))

    def blocks() -> Iterator[PairBlock]:
        done = 0
        for block in _blocks(network, a, b, known, recording, targets, random, on_progress):
            n = block.weight.shape[1]
            weights[:, done : done + n] = block.weight.sum(axis=0)[:, sources].T
            done += n
            yield block

    routes = tuple(str(site) for site in a.writes)
    edges = select_edges(blocks(), alive_a, chosen, len(routes), top_k_sources=top_k_sources)
    found = DirectCircuit(
        sites=(_listed(routes), _listed([str(site) for site in b.reads])),
        encoder=b.encoder.float().cpu().numpy(),
        n_latents=(len(alive_a), len(alive_b)),
        routes=routes, targets=targets, edges=edges, fdr=fdr, n_samples=recording.n_samples,
    )  # fmt: skip
    if not n_ablated:
        return found
    compared = possible[a.part_of[sources]][:, b.part_of[targets]]
    ablation = _ablate(network, a, b, held_out, sources, skip_first=recording.skip_first)
    return _validated(found, ablation, weights, compared, seed)


def _validated(
    found: DirectCircuit,
    ablation: Ablation,
    weights: Float[np.ndarray, "source target"],
    compared: Bool[np.ndarray, "source target"],
    seed: int,
) -> DirectCircuit:
    """Add the agreement of weights times mean activations with ablations of the sources."""
    measured = (ablation.lost.mean(axis=1) @ found.encoder)[:, found.targets]
    agreement = ablation_agreement(
        weights * ablation.mean[:, None], measured, seed=seed, possible=compared
    )
    evidence = AblationEvidence(
        n_ablated=len(ablation.sources), agreement=agreement, n_samples=ablation.lost.shape[1]
    )
    return dataclasses.replace(found, evidence=evidence, ablation=ablation)


def _listed(sites: Sequence[str]) -> str:
    """Sites in words, the first and the last of many."""
    if len(sites) < 4:
        return ", ".join(sites)
    return f"{sites[0]} to {sites[-1]} ({len(sites)} sites)"


@dataclasses.dataclass(frozen=True, eq=False)
class _Pass:
    """One batch: rows that both dictionaries read, and activations that the source writes."""

    rows_a: Float[Tensor, "row d_in_a"]
    rows_b: Float[Tensor, "row d_in_b"]
    written: dict[Site, Tensor]
    layouts: dict[Site, Layout]
    n_samples: int
    order: dict[Site, int]
    """Number of each site, in the order in which the network reaches them."""


def _as_rows(layout: Layout, activation: Tensor) -> Float[Tensor, "row d"]:
    whole = layout.rows(activation)
    return whole.reshape(-1, whole.shape[-1])


def _run(
    network: nn.Module,
    a: PlacedDictionary,
    b: PlacedDictionary,
    batch: Any,
    change: Callable[[Site, Tensor], Tensor] | None = None,
) -> _Pass:
    """Run the network on a batch with what the source writes held.

    Args:
        network: The network.
        a: Dictionary of the sources.
        b: Dictionary of the targets.
        batch: Inputs.
        change: What is written at each site of `a`, from what the network has there; by default
            the same, as leaves to differentiate by.

    Raises:
        InputError: A dictionary does not fit its sites, or sites have other positions.
    """
    sites = list(dict.fromkeys([*a.reads, *a.writes, *b.reads]))
    batch = as_input(network, batch)
    layouts = layouts_of(network, batch, sites)
    seen: dict[Site, Tensor] = {}
    written: dict[Site, Tensor] = {}

    def edit(site: Site, old: Tensor) -> Tensor:
        seen[site] = old.clone()
        if site not in a.writes:
            return old
        new = old.detach().clone().requires_grad_() if change is None else change(site, old)
        written[site] = new
        return new

    edits = {site: functools.partial(edit, site) for site in sites}
    with torch.set_grad_enabled(change is None), intervene(network, edits):
        with running(network, batch):
            call_network(network, batch)
        rows = {site: _as_rows(layouts[site], x) for site, x in seen.items()}
        _refuse_other_widths((a, b), rows)
        rows_a, rows_b = (torch.cat([rows[s] for s in each.reads], dim=1) for each in (a, b))
    n = len(layouts[sites[0]].rows(seen[sites[0]]))
    return _Pass(
        rows_a.detach(), rows_b, written, layouts, n, {site: i for i, site in enumerate(seen)}
    )


def _refuse_other_widths(both: Sequence[PlacedDictionary], rows: dict[Site, Tensor]) -> None:
    """Refuse sites that are not as wide as a dictionary says, or have other positions.

    Raises:
        InputError: Some are.
    """
    for each in both:
        for site, span in (*each.reads.items(), *each.writes.items()):
            if rows[site].shape[1] != span.stop - span.start:
                raise InputError(
                    f"Site {site} is {rows[site].shape[1]} wide, the dictionary "
                    f"{in_words(each.dictionary)}, at this site {span.stop - span.start}."
                )
    lengths = {len(own) for own in rows.values()}
    if len(lengths) > 1:
        raise InputError(
            f"The sites {', '.join(map(str, rows))} have {sorted(lengths)} positions in a batch; a "
            "circuit of dictionaries of several sites needs the same."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorded:
    """Codes of all samples."""

    codes_a: SparseMatrix
    codes_b: SparseMatrix
    n_samples: int
    order: dict[Site, int]
    skip_first: bool
    """Whether no latent counts as active at the first position of a sample."""

    def reached(
        self, a: PlacedDictionary, b: PlacedDictionary
    ) -> Bool[np.ndarray, "part_a part_b"]:
        """Whether a part of `b` reads something that comes after what a part of `a` writes.

        Raises:
            InputError: None does.
        """
        writes = [[self.order[a.sites[n]] for n in part.ends.writes]
                  for part in parts_of(a.dictionary)]  # fmt: skip
        reads = [[self.order[b.sites[n]] for n in part.ends.reads]
                 for part in parts_of(b.dictionary)]  # fmt: skip
        found = np.array([[min(w) < max(r) for r in reads] for w in writes])
        if not found.any():
            raise InputError(
                f"Nothing that the later dictionary reads ({', '.join(map(str, b.reads))}) follows "
                f"what the earlier one writes ({', '.join(map(str, a.writes))})."
            )
        return found


def _encoded(
    each: PlacedDictionary, rows: Float[Tensor, "row d"], n_samples: int, *, skip_first: bool
) -> SparseMatrix:
    """Codes of rows, part by part, so that no dense code of all latents is made."""
    parts = [
        sparse.csr_matrix(part.dictionary.encode(rows[:, part.reads]).detach().cpu().numpy())
        for part in parts_of(each.dictionary)
    ]
    codes = sparse.csr_matrix(sparse.hstack(parts))
    if not skip_first:
        return codes
    place = np.arange(len(rows)) % (len(rows) // n_samples)
    return only(codes, (place > 0)[:, None])


@torch.no_grad()
def _record(
    network: nn.Module, a: PlacedDictionary, b: PlacedDictionary, batches: Batches
) -> _Recorded:
    """Record the codes of both dictionaries.

    Raises:
        InputError: There are no samples, or a dictionary does not fit its sites.
    """
    codes: tuple[list[SparseMatrix], list[SparseMatrix]] = ([], [])
    n_samples, order, skip_first = 0, {}, False
    for batch in batches():
        if not n_samples:
            skip_first = skips_first(network, batch[:1], list(a.sites.values()))
        done = _run(network, a, b, batch, lambda _site, old: old)
        for kept, each, rows in zip(codes, (a, b), (done.rows_a, done.rows_b), strict=True):
            kept.append(_encoded(each, rows, done.n_samples, skip_first=skip_first))
        n_samples, order = n_samples + done.n_samples, done.order
    if not n_samples:
        raise InputError("There are no samples to find a circuit on.")
    return _Recorded(stacked(codes[0]), stacked(codes[1]), n_samples, order, skip_first)


def _blocks(
    network: nn.Module,
    a: PlacedDictionary,
    b: PlacedDictionary,
    known: Batches,
    recording: _Recorded,
    targets: Int[np.ndarray, " target"],
    random: np.random.Generator,
    on_progress: Progress,
) -> Iterator[PairBlock]:
    """Contributions of all sources to some targets at a time."""
    n_a, n_routes = recording.codes_a.shape[1], len(a.writes)
    size = max(1, BLOCK_BYTES // (8 * n_a * n_routes * (2 + DECOYS)))
    total = np.asarray(recording.codes_a.sum(axis=0)).ravel()
    n_done, n_all = 0, len(targets) * recording.n_samples
    for first in range(0, len(targets), size):
        own = targets[first : first + size]
        sums = np.zeros((2 + DECOYS, n_routes, len(own), n_a))
        decoys = np.stack([_decoys(b, own, random) for _ in range(DECOYS)])
        start = 0
        for batch in known():
            done = _run(network, a, b, batch)
            rows = slice(start, start + len(done.rows_a))
            start = rows.stop
            codes = recording.codes_a[rows]
            on = recording.codes_b[rows][:, own].toarray() > 0
            for t, target in enumerate(own):
                active = torch.from_numpy(on[:, t]).to(done.rows_b)
                ways = [(active, target), (torch.ones_like(active), target)]
                for way, (mask, latent) in enumerate([*ways, *((active, d[t]) for d in decoys)]):
                    if bool(mask.any()):
                        sums[way, :, t] += _carried(a, b, done, codes, mask, int(latent))
                n_done += done.n_samples
                on_progress(n_done, n_all)
        count = np.maximum(np.bincount(recording.codes_b.indices, minlength=b.encoder.shape[1]), 1)
        lengths = np.maximum(b.encoder.norm(dim=0).double().cpu().numpy(), 1e-30)
        contribution = sums[0] / count[own][:, None]
        weight = sums[1] / np.maximum(total, 1e-30)
        scale = (lengths[own] / lengths[decoys])[:, None, :, None]
        chance = sums[2:] / count[own][:, None] * scale
        yield PairBlock(own, weight, np.abs(weight), contribution, chance)


def _decoys(
    b: PlacedDictionary, targets: Int[np.ndarray, " target"], random: np.random.Generator
) -> Int[np.ndarray, " target"]:
    """Another latent of the same part for each target, whose encoder serves as its null."""
    found = []
    for target in targets:
        same = np.flatnonzero(b.part_of == b.part_of[target])
        same = same[same != target]
        found.append(int(random.choice(same)) if len(same) else int(target))
    return np.array(found)


def _carried(
    a: PlacedDictionary,
    b: PlacedDictionary,
    done: _Pass,
    codes: SparseMatrix,
    mask: Float[Tensor, " row"],
    latent: int,
) -> Float[np.ndarray, "route source"]:
    """Sum over positions of what each source carries into pre-activations, by site written.

    Args:
        a: Dictionary of the sources.
        b: Dictionary of the target.
        done: Batch that ran with leaves.
        codes: Codes of the sources in it.
        mask: Weight of each position of the target.
        latent: Target, or the latent in its place.
    """
    column = b.encoder[:, latent].to(done.rows_b)
    leaves = list(done.written.values())
    slopes = torch.autograd.grad(
        done.rows_b, leaves, mask[:, None] * column, retain_graph=True, allow_unused=True
    )
    found = np.zeros((len(a.writes), codes.shape[1]))
    by_site = dict(zip(done.written, slopes, strict=True))
    for k, (site, span) in enumerate(a.writes.items()):
        slope = by_site[site]
        if slope is not None:
            rows = _as_rows(done.layouts[site], slope).double().cpu().numpy()
            atoms = a.atoms[:, span].double().cpu().numpy()
            found[k] = ((codes.T @ rows) * atoms).sum(axis=1)
    return found


@torch.no_grad()
def _ablate(
    network: nn.Module,
    a: PlacedDictionary,
    b: PlacedDictionary,
    batches: Batches,
    sources: Int[np.ndarray, " source"],
    *,
    skip_first: bool,
) -> Ablation:
    """Remove latents one at a time from all that they write, with the others held.

    Args:
        network: The network.
        a: Dictionary of the sources.
        b: Dictionary whose rows are compared.
        batches: Inputs.
        sources: Latents to remove.
        skip_first: Whether they stay at the first position of a sample.
    """
    parts: list[np.ndarray] = []
    total, positions = np.zeros(len(sources)), 0
    for batch in batches():
        kept = _run(network, a, b, batch, lambda _site, old: old)
        codes = _encoded(a, kept.rows_a, kept.n_samples, skip_first=skip_first)
        codes = codes[:, sources].toarray()
        total, positions = total + codes.sum(axis=0), positions + len(codes)
        lost = np.zeros((len(sources), kept.n_samples, kept.rows_b.shape[1]))
        for k, source in enumerate(sources):
            if codes[:, k].any():
                less = functools.partial(
                    _without, a, kept, torch.from_numpy(codes[:, k]), int(source)
                )
                after = _run(network, a, b, batch, less)
                off = (kept.rows_b - after.rows_b).double()
                lost[k] = off.unflatten(0, (kept.n_samples, -1)).mean(dim=1).cpu().numpy()
        parts.append(lost)
    return Ablation(sources, np.concatenate(parts, axis=1), total / max(positions, 1))


def _without(
    a: PlacedDictionary, kept: _Pass, activation: Tensor, latent: int, site: Site, old: Tensor
) -> Tensor:
    """Activations held at a site, less those that a latent writes there."""
    held = kept.written[site]
    atom = a.atoms[latent, a.writes[site]].to(held)
    rows = _as_rows(kept.layouts[site], held) - activation.to(held)[:, None] * atom
    return kept.layouts[site].undo(rows.unflatten(0, (kept.n_samples, -1)), old)
