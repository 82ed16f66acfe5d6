"""Circuit between two sites: which features of the later one are computed from which earlier ones.

    circuit             a network, two dictionaries and samples -> a `Circuit`
    find_circuit        the same from a connection that is known and activations batch by batch
    ablation_evidence   rank agreement of a circuit's weights with ablations

Main path: `connect` reads the computation between the sites, `record_gates` or `record_layer` its
gates on samples, `compose_responses` the effect of every feature, `strongest_edges` all pairs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mechatlas.activations.passes import unwrapped
from mechatlas.activations.positions import skips_first
from mechatlas.activations.samples import whole_batch
from mechatlas.activations.sites import place_sites, read_activations
from mechatlas.analysis.circuits.attention import AttentionRecording, record_layer
from mechatlas.analysis.circuits.compose import LinearDictionary, Response
from mechatlas.analysis.circuits.direct import (
    N_TARGETS,
    DirectCircuit,
    PlacedDictionary,
    find_direct_circuit,
)
from mechatlas.analysis.circuits.effects import (
    Ablation,
    AblationAgreement,
    AblationEvidence,
    ablate,
    ablation_agreement,
    reproduced_variance,
)
from mechatlas.analysis.circuits.layer_parts import AttentionLayer, as_maps
from mechatlas.analysis.circuits.recording import Recording, record_gates, stacked
from mechatlas.analysis.circuits.transformer_layer import connect
from mechatlas.analysis.circuits.virtual_weights import (
    CircuitEdges,
    compose_responses,
    edge_kernels,
    pair_blocks,
    strongest_edges,
)
from mechatlas.analysis.circuits.wiring import Masked, SiteMap, Wiring
from mechatlas.base import InputError, Progress, Result, Site, no_progress
from mechatlas.devices import refuse_half_precision
from mechatlas.dictionaries.ends import ends_of, in_words

Connection = Wiring | AttentionLayer
"""Computation between two sites."""
AnySites = Site | str | Sequence[Site | str] | None
"""Site of a dictionary, or all sites of one of several."""
Maps = Callable[[], Iterable[SiteMap | Masked]]
"""Source of the activations (sample, channel, y, x) of the earlier site's module, in batches."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """Virtual weights between the features of two sites, with the evidence for them."""

    connection: Connection
    """Computation from the earlier site to the later one."""
    a: LinearDictionary
    """Dictionary of the earlier site."""
    b: LinearDictionary
    """Dictionary of the later site."""
    recording: Recording | AttentionRecording
    """Codes at both sites, and the gates on samples."""
    responses: Sequence[Response]
    """Effect of every feature of `a` on the later site, route by route."""
    edges: CircuitEdges
    """Strongest sources of each feature of `b`, with q-values."""
    reproduced_variance: Float[np.ndarray, " target"]
    """Fraction of the variance of each pre-activation that the composed kernels reproduce."""
    fdr: float
    """False discovery rate at which an edge counts as significant."""
    evidence: AblationEvidence | None = None
    """Agreement with ablations; None if no feature was ablated."""

    @property
    def sites(self) -> tuple[str, str]:
        """Both sites."""
        return str(self.connection.source), str(self.connection.target)

    @property
    def n_latents(self) -> tuple[int, int]:
        """Latents of both dictionaries."""
        return self.a.W_enc.shape[1], self.b.W_enc.shape[1]

    @property
    def n_samples(self) -> int:
        """Samples recorded."""
        return self.recording.n_samples

    @property
    def routes(self) -> tuple[str, ...]:
        """Names of the routes, such as branches or attention heads."""
        return tuple(route.name for route in self.connection.routes)

    @property
    def taps(self) -> list[Int[np.ndarray, "_ 2"]]:
        """Positions of the kernels of each route."""
        return [response.taps for response in self.responses]

    @property
    def significant(self) -> Bool[np.ndarray, " edge"]:
        """Edges whose q-value is at most the false discovery rate."""
        return self.edges.q_value <= self.fdr

    def kernels(self) -> list[Float[np.ndarray, "_ _"]]:
        """Spatial kernels of the edges of each route."""
        return edge_kernels(self.connection, self.responses, self.b.W_enc.detach(), self.edges)

    def summary(self) -> str:
        """Number of significant edges, reproduced variance and agreement with ablations."""
        known = self.reproduced_variance[np.isfinite(self.reproduced_variance)]
        share = f"{np.median(known):.0%}" if len(known) else "undefined"
        lines = [
            f"Circuit: {self.connection.source} -> {self.connection.target}, "
            f"{self.significant.sum():,} of {len(self.edges.source):,} edges significant at a "
            f"false discovery rate of {self.fdr:.0%}",
            f"by {', '.join(self.routes)}; {self.edges.tested:,} pairs of features tested",
            f"median fraction of pre-activation variance reproduced: {share}",
        ]
        if self.evidence is not None:
            lines.append(f"weights and {self.evidence.n_ablated} ablations: "
                         f"{self.evidence.agreement.in_words()}")  # fmt: skip
        return "\n".join(lines)


@overload
def circuit(
    network: nn.Module,
    a: LinearDictionary,
    b: LinearDictionary,
    samples: Any,
    *,
    site_a: Site | str,
    site_b: Site | str,
    held_out: Any = None,
    top_k_sources: int = 8,
    n_ablated: int = 0,
    n_targets: int = N_TARGETS,
    fdr: float = 0.05,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> Circuit: ...


@overload
def circuit(
    network: nn.Module,
    a: LinearDictionary,
    b: LinearDictionary,
    samples: Any,
    *,
    site_a: AnySites = None,
    site_b: AnySites = None,
    held_out: Any = None,
    top_k_sources: int = 8,
    n_ablated: int = 0,
    n_targets: int = N_TARGETS,
    fdr: float = 0.05,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> Circuit | DirectCircuit: ...


def circuit(
    network: nn.Module,
    a: LinearDictionary,
    b: LinearDictionary,
    samples: Any,
    *,
    site_a: AnySites = None,
    site_b: AnySites = None,
    held_out: Any = None,
    top_k_sources: int = 8,
    n_ablated: int = 0,
    n_targets: int = N_TARGETS,
    fdr: float = 0.05,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> Circuit | DirectCircuit:
    """Find which features of a site are computed from which features of an earlier site.

    Where a dictionary is a transcoder or of several sites, effects are derivatives of the network,
    with all that `a` writes held: a `DirectCircuit`. A cross-layer transcoder may be both `a` and
    `b`.

    Args:
        network: Network in evaluation mode; called as `network(samples)`.
        a: Dictionary of the earlier site.
        b: Dictionary of the later site.
        samples: Inputs of the network on which gates and codes are recorded, as for `open_samples`.
        site_a: Site of `a`, by default as its file names it; of several sites, those that it reads
            and then others that it writes.
        site_b: Site of `b`, with no site of parallel branches in between.
        held_out: Inputs on which features are ablated and variances measured; by default the last
            third of `samples`, which is then not recorded.
        top_k_sources: Strongest sources kept of each feature of `b`.
        n_ablated: Features of `a`, drawn at random, that are removed to validate the weights; 0 to
            skip the validation.
        n_targets: Active features of `b`, drawn at random, whose sources a `DirectCircuit` has.
        fdr: False discovery rate at which an edge counts as significant.
        batch_size: Samples that the network runs on at once.
        seed: Seed of the activations that are followed, of the null and of the features ablated.
        on_progress: Called with the number of targets done and their total.

    Raises:
        InputError: There are too few samples, a dictionary does not fit its site, or the network
            computes in half precision.
        SiteError: The sites are not consecutive, or an operation between them cannot be composed.

    Source:
        Olah et al., Zoom In (2020); Elhage et al., A mathematical framework for transformer
        circuits (2021).

    Examples:
        >>> import torch
        >>> import mechatlas as ma
        >>> from mechatlas.activations.architectures.inception import inception_mini
        >>> network, images = inception_mini().eval(), torch.rand(12, 3, 31, 31)
        >>> a = ma.Autoencoder(d_in=184, n_latents=64, sparsity=ma.TopK(k=8))
        >>> b = ma.Autoencoder(d_in=184, n_latents=64, sparsity=ma.TopK(k=8), seed=1)
        >>> edges = ma.circuit(network, a, b, images, site_a="mixed4a", site_b="mixed4b")
        >>> edges.routes, edges.edges.tested > 0
        (('1x1', '3x3', '5x5', 'pool'), True)
    """
    network = unwrapped(network)
    refuse_half_precision(network, "the effects of single features")
    placed = [
        PlacedDictionary(each, place_sites(network, ends_of(each).names, site, in_words(each)))
        for each, site in ((a, site_a), (b, site_b))
    ]
    known = whole_batch(samples, network)
    if held_out is None:
        cut = len(known) - len(known) // 3
        known, unseen = known[:cut], known[cut:]
    else:
        unseen = whole_batch(held_out, network)
    if not len(known) or not len(unseen):
        raise InputError(
            f"A circuit needs samples to record and samples to validate it on, got {len(known)} "
            f"and {len(unseen)}."
        )
    if any(len(each.sites) > 1 for each in placed):
        return find_direct_circuit(
            network, placed[0], placed[1],
            lambda: known.split(batch_size), lambda: unseen.split(batch_size),
            top_k_sources=top_k_sources, n_targets=n_targets, n_ablated=n_ablated, fdr=fdr,
            seed=seed, on_progress=on_progress,
        )  # fmt: skip
    source, target = (site for each in placed for site in each.sites.values())
    connection = connect(network, source, target, known[:1])
    maps = functools.partial(
        _maps, network, source, batch_size, skips_first(network, known[:1], [source])
    )
    result = find_circuit(
        connection, a, b, maps(known), maps(unseen),
        top_k_sources=top_k_sources, fdr=fdr, seed=seed, on_progress=on_progress,
    )  # fmt: skip
    if not n_ablated:
        return result
    sources = draw_sources(result, n_ablated, seed)
    ablation = ablate(connection, a, maps(unseen)(), sources)
    evidence = ablation_evidence(result, ablation, sources, seed=seed)
    return dataclasses.replace(result, evidence=evidence)


def _maps(
    network: nn.Module, site: Site, batch_size: int, skip_first: bool, inputs: Tensor
) -> Maps:
    """Source of the activations of a site, without the first position of each sample or with it."""

    def masked(x: SiteMap) -> Masked:
        first = torch.arange(x.shape[2] * x.shape[3]) == 0
        return Masked(x, first.expand(len(x), -1) if skip_first else None)

    return lambda: map(masked, site_maps(network, site, inputs.split(batch_size)))


@torch.no_grad()
def site_maps(
    network: nn.Module, site: Site, batches: Iterable[Shaped[Tensor, "_ ..."]]
) -> Iterator[SiteMap]:
    """Yield activations of a site's whole module as maps.

    Args:
        network: The network.
        site: Site of the module.
        batches: Inputs of the network, several samples each.
    """
    whole = dataclasses.replace(site, branch=None)
    for batch in batches:
        yield as_maps(read_activations(network, batch, [whole])[whole])


def find_circuit(
    connection: Connection,
    a: LinearDictionary,
    b: LinearDictionary,
    maps: Maps,
    held_out: Maps,
    *,
    top_k_sources: int = 8,
    fdr: float = 0.05,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> Circuit:
    """Find the circuit of two dictionaries from activations of the earlier site.

    Args:
        connection: Computation from the site of `a` to that of `b`.
        a: Dictionary of the earlier site.
        b: Dictionary of the later site.
        maps: Activations on which gates and codes are recorded.
        held_out: Activations on which variances are measured.
        top_k_sources: Strongest sources kept of each feature of `b`.
        fdr: False discovery rate at which an edge counts as significant.
        seed: Seed of the activations that are followed and of the null.
        on_progress: Called with the number of targets done and their total.

    Raises:
        InputError: There are no samples, or a dictionary does not fit its site.
    """
    recording = record(connection, a, b, maps(), seed=seed)
    responses = compose_responses(connection, a, recording.gates)
    edges = strongest_edges(
        connection, responses, b, recording,
        top_k_sources=top_k_sources, seed=seed, on_progress=on_progress,
    )  # fmt: skip
    variance = reproduced_variance(connection, responses, a, b, held_out())
    return Circuit(connection, a, b, recording, responses, edges, variance, fdr)


def record(
    connection: Connection,
    a: LinearDictionary,
    b: LinearDictionary,
    maps: Iterable[SiteMap | Masked],
    *,
    seed: int = 0,
) -> Recording | AttentionRecording:
    """Record codes at both sites and the gates between them.

    Args:
        connection: Computation from the site of `a` to that of `b`.
        a: Dictionary of the earlier site.
        b: Dictionary of the later site.
        maps: Activations of the earlier site, batch by batch.
        seed: Seed of the activations that are followed.

    Raises:
        InputError: There are no samples, or a dictionary does not fit its site.
    """
    if isinstance(connection, AttentionLayer):
        return record_layer(connection, a, b, maps)
    return record_gates(connection, a, b, maps, seed=seed)


def repeated(
    recording: Recording | AttentionRecording, n_samples: int
) -> Recording | AttentionRecording:
    """Recording of as many samples, or a few more, of which all are copies: for its cost.

    Args:
        recording: Record of a few samples.
        n_samples: Number of samples.
    """
    times = -(-n_samples // recording.n_samples)
    longer: dict[str, Any] = {
        name: stacked([getattr(recording, name)] * times) for name in ("codes_a", "codes_b")
    }
    if isinstance(recording, AttentionRecording):
        longer["patterns"] = recording.patterns.repeat(times, 1, 1, 1)
    return dataclasses.replace(recording, **longer, n_samples=times * recording.n_samples)


def draw_sources(
    result: Circuit, n: int, seed: int, *, pair: int = 0
) -> Int[np.ndarray, " source"]:
    """Draw features of the earlier site that are active on samples, in ascending order.

    Args:
        result: A circuit.
        n: Number of features, or fewer if fewer are active.
        seed: Seed of the draw.
        pair: Number of the circuit in a chain of them.
    """
    active = np.unique(result.recording.codes_a.indices)
    return np.sort(np.random.default_rng([seed, pair]).permutation(active)[:n]).astype(np.int64)


def ablation_evidence(
    result: Circuit, ablation: Ablation, sources: Int[np.ndarray, " source"], *, seed: int = 0
) -> AblationEvidence:
    """Rank agreement of virtual weights times mean activations with what ablations did.

    Args:
        result: A circuit.
        ablation: Ablations of features, among them `sources`.
        sources: Features to compare; drawn at random, for features chosen by their weights would
            agree better.
        seed: Seed of the intervals and of the nulls.
    """
    compared = np.isin(ablation.sources, sources)
    measured = ablation.pre_activations(result.b.W_enc)[compared]

    def agreement(responses: Sequence[Response]) -> AblationAgreement:
        encoder = result.b.W_enc.detach()
        blocks = pair_blocks(result.connection, responses, encoder)
        weight = np.concatenate([block.weight.sum(axis=0) for block in blocks])
        predicted = weight.T[ablation.sources[compared]] * ablation.mean[compared, None]
        return ablation_agreement(predicted, measured, seed=seed)

    shared = compose_responses(result.connection, result.a, result.recording.gates.shared())
    is_wiring = isinstance(result.connection, Wiring)
    return AblationEvidence(
        n_ablated=int(compared.sum()),
        n_samples=ablation.lost.shape[1],
        agreement=agreement(result.responses),
        agreement_shared_gates=agreement(shared),
        agreement_open_gates=(
            agreement(compose_responses(result.connection, result.a)) if is_wiring else None
        ),
    )
