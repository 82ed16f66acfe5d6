"""Find which features of a site are computed from which features of the site before.

    mechatlas circuit runs/mixed4a runs/mixed4b runs/mixed4c --out runs/circuit --features 12

The folder has `edges.parquet` (a row for each pair of features and route), `kernels.safetensors`
(their spatial kernels) and `pictures.safetensors` (of the features drawn).
"""

import dataclasses
import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import cattrs
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from tyro.conf import Positional, arg

from mechatlas.activations.images import ImageSamples
from mechatlas.activations.positions import Positions, TokenSamples, left_out
from mechatlas.activations.samples import Samples
from mechatlas.activations.sites import place_sites
from mechatlas.activations.store import Store
from mechatlas.analysis.circuits.circuit import (
    Connection,
    ablation_evidence,
    draw_sources,
    find_circuit,
    record,
    repeated,
    site_maps,
)
from mechatlas.analysis.circuits.direct import N_TARGETS, PlacedDictionary, find_direct_circuit
from mechatlas.analysis.circuits.effects import (
    STEPS,
    Ablation,
    Attribution,
    ablate,
    attribute,
    bootstrap_interval,
    reproduced_variance,
)
from mechatlas.analysis.circuits.paths import CircuitPath, strongest_paths
from mechatlas.analysis.circuits.transformer_layer import connect
from mechatlas.analysis.circuits.virtual_weights import (
    BLOCK_BYTES,
    CircuitEdges,
    compose_responses,
    strongest_edges,
)
from mechatlas.analysis.circuits.wiring import Masked
from mechatlas.analysis.visualization import VisualizeConfig, visualize
from mechatlas.app.circuit_results import (
    CircuitResult,
    PairResult,
    describe_circuits,
    edge_columns,
    explained_features,
    kernel_tensors,
    pair_result,
    write_edges,
)
from mechatlas.app.estimates import Estimate, bytes_of, of_work
from mechatlas.app.inputs import (
    OpenedDictionary,
    expect_several,
    expect_sites,
    find_store,
    open_dictionaries,
    open_network,
    refuse_other_network,
    sites_of,
)
from mechatlas.app.progress import bar
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.run_folder import CIRCUIT, PICTURES, RunConfig, RunFolder
from mechatlas.base import InputError, Progress, Site, StoreError
from mechatlas.dictionaries.ends import ends_of
from mechatlas.dictionaries.ends import in_words as ends_in_words
from mechatlas.ranges import COUNT, COUNT_OR_NONE, RATE, SEED, check_ranges

KIND = CIRCUIT
PROBE_SAMPLES, PROBE_STEPS, PROBE_BYTES = 2, 4, 16 << 20
"""Samples in a batch, steps of a picture and memory of a block where the cost is estimated."""
LONG, LONG_LATENTS = 20.0, 8192
"""Seconds of runs, and latents, from which on the cost is estimated beforehand."""
LONG_TARGETS = 1 << 15
"""Samples times targets of dictionaries of several sites from which on it is estimated too."""
EDGE_BYTES = 120
"""Size of an edge in the tables, with its kernel."""
PICTURE_BATCH = 16
"""Pictures optimized together."""
DIRECT_BATCH = 8
"""Samples that the network runs on at once for dictionaries of several sites."""
MAP_NUMBERS = 1 << 22
"""Entries of the source's maps that the network runs on at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitConfig(TrustConfig, RunConfig):
    """Find which features of a site are computed from which features of the site before."""

    dictionaries: Annotated[Positional[tuple[Path, ...]], arg(metavar="DICT_A DICT_B ...")]
    """Folders of dictionaries of consecutive sites, in the order of the network. A cross-layer
    transcoder can be alone."""
    sites: tuple[str, ...] = ()
    """Site of each dictionary, in the same order, where the dictionaries do not say it; of one of
    several sites all with commas, those that it reads and then others that it writes."""
    store: Path | None = None
    """Store whose network and samples to run; by default the one of the first dictionary."""
    samples: int = 256
    """Samples on which codes and gates are recorded."""
    held_out: int = 128
    """Held-out samples on which features are ablated and pre-activations attributed."""
    n_ablated: int = 32
    """Features of each site, drawn at random, that are ablated to validate the weights."""
    n_targets: int = N_TARGETS
    """Features, drawn at random, whose sources are found, of dictionaries of several sites."""
    top_k_sources: int = 8
    """Strongest sources kept of each feature."""
    features: int = 8
    """Features of the last site whose paths are traced, attributed and drawn."""
    fdr: float = 0.05
    """False discovery rate at which an edge counts as significant."""
    visualize_steps: int = 96
    """Steps of activation maximization for the picture of each feature drawn; 0: no pictures."""
    seed: int = 0
    """Seed of the activations followed, the null, the ablations, the intervals and the pictures."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            samples=COUNT,
            held_out="[2, 1000000000]",
            n_ablated="[2, 1000000000]",
            n_targets=COUNT,
            top_k_sources=COUNT,
            features=COUNT,
            fdr=RATE,
            visualize_steps=COUNT_OR_NONE,
            seed=SEED,
        )


def in_words(result: CircuitResult) -> str:
    """Findings for the terminal."""
    lines = [
        f"{pair.a} -> {pair.b}: weights and ablations agree with {pair.agreement.in_words()}; "
        f"{pair.n_significant} of {pair.edges} edges kept are significant at a false discovery "
        f"rate of {result.fdr:.0%}"
        for pair in result.pairs
    ]
    significant = sum(path.significant for path in result.paths)
    lines.append(f"{len(result.paths)} paths traced, {significant} of them significant")
    return "\n".join([*lines, f"Result: {result.out}"])


@dataclasses.dataclass(frozen=True, eq=False)
class _Inputs:
    """Dictionaries, network and samples of a run."""

    names: list[str]
    checksums: list[str]
    sites: list[Site]
    dictionaries: list[Any]
    store: Store
    network: nn.Module
    samples: Samples
    known: Int[np.ndarray, " sample"]
    unseen: Int[np.ndarray, " held_out"]

    def batches(self, numbers: Int[np.ndarray, " n"]) -> Iterator[Tensor]:
        """Inputs of the network, batch by batch."""
        for part in np.array_split(numbers, -(-len(numbers) // DIRECT_BATCH)):
            yield self.samples.stack([self.samples.read(int(i)) for i in part])

    def maps(self, site: Site, numbers: Int[np.ndarray, " n"], most: int = 64) -> Iterator[Masked]:
        """Activations of a site's module in batches, without the rows that the store lacks."""
        size = 1
        while len(numbers):
            now, numbers = [int(i) for i in numbers[:size]], numbers[size:]
            batch = self.samples.stack([self.samples.read(i) for i in now])
            (x,) = site_maps(self.network, site, [batch])
            size = max(1, min(most, MAP_NUMBERS // max(1, x[0].numel())))
            yield Masked(x, self._left_out(now, x.shape[2] * x.shape[3]))

    def _left_out(
        self, numbers: list[int], n_positions: int
    ) -> Bool[Tensor, "sample position"] | None:
        """Positions of some samples that the store leaves out; `None` if it has all."""
        if not (isinstance(self.samples, TokenSamples) and self.store.manifest.get("left_out")):
            return None
        rule = Positions.of_store(self.store.manifest)
        found = left_out(self.samples, numbers, rule, Counter())
        return found if found.shape[1] == n_positions else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """Circuit of two sites, without the recording that it was made from."""

    connection: Connection
    edges: CircuitEdges
    taps: list[Int[np.ndarray, "_ 2"]]
    kernels: list[Float[np.ndarray, "_ _"]]
    ablation: Ablation
    result: PairResult


def run(config: CircuitConfig, folder: RunFolder) -> CircuitResult:
    """Weigh all pairs of features of consecutive sites, and validate them by ablation.

    Raises:
        DiskError: The folder cannot be written.
        InputError: A dictionary does not fit its sites, or is not linear in its rows.
        RecipeError: Fewer than two dictionaries, or one that does not say its site.
        SiteError: Two sites are not consecutive, or an operation between them cannot be composed.
        StoreError: The store is missing or damaged, or of another network.
    """
    opened = _opened(config)
    inputs = _open(config, opened)
    if any(_is_several(each) for each in opened):
        return _run_direct(config, folder, opened, inputs)
    first = inputs.samples.stack([inputs.samples.read(int(inputs.known[0]))])
    connections = [
        connect(inputs.network, a, b, first) for a, b in itertools.pairwise(inputs.sites)
    ]  # every refusal comes before any work
    for name, mark in zip(inputs.names, inputs.checksums, strict=True):
        folder.parent(name, mark)
    folder.parent("store", inputs.store.digest)
    is_long = _is_long(config, inputs, connections[0])
    folder.expect(lambda: _expected(config, inputs, connections), is_long=is_long)
    folder.facts(
        dictionaries=[str(path.resolve()) for path in config.dictionaries],
        store=str(inputs.store.root.resolve()),
    )
    pairs = []
    for k, connection in enumerate(connections):
        kept = folder.kept(f"pair{k}")
        pair = _weigh(config, inputs, k, connection) if kept is None else _read(kept, connection)
        if kept is None:
            folder.keep(f"pair{k}", _arrays(pair))
        pairs.append(pair)
    paths = strongest_paths([p.edges for p in pairs], features=config.features, fdr=config.fdr)
    tables, explained = [], []
    for k, pair in enumerate(pairs):
        ablation, attribution = _measure(inputs, k, pair, paths)
        tables.append(_table(inputs, k, pair, ablation, attribution))
        explained += explained_features(k, pair.edges, attribution, paths)
    kernels: dict[str, np.ndarray] = {}
    for k, pair in enumerate(pairs):
        routes = [route.name for route in pair.connection.routes]
        kernels |= kernel_tensors(k, routes, pair.taps, pair.kernels)
    write_edges(folder, tables, kernels)
    if pictures := _pictures(config, inputs, paths):
        folder.tensors(PICTURES, pictures)
    return CircuitResult(
        dictionaries=inputs.names,
        sites=[str(site) for site in inputs.sites],
        fdr=config.fdr,
        samples=len(inputs.known),
        held_out_samples=len(inputs.unseen),
        pairs=[pair.result for pair in pairs],
        paths=paths,
        features=explained,
    )


def _is_long(config: CircuitConfig, inputs: _Inputs, first: Connection) -> bool:
    """Whether the work may take minutes, from the time that one sample takes."""
    start = time.perf_counter()
    ((x, _),) = inputs.maps(inputs.sites[0], inputs.known[:1])
    first.run(x)  # which warms up
    read = time.perf_counter()
    first.run(x)
    to_read, to_run = read - start, time.perf_counter() - read
    held = len(inputs.unseen)
    runs = held * (config.n_ablated + config.features * (1 + 2 * STEPS))
    most = max(each.n_latents for each in inputs.dictionaries)
    seconds = (len(inputs.known) + 4 * held) * to_read + runs * to_run
    return seconds > LONG or most >= LONG_LATENTS


def _expected(
    config: CircuitConfig, inputs: _Inputs, connections: Sequence[Connection]
) -> Estimate:
    """Estimate recording, weighing and validating each two sites, and drawing their features."""
    works = [work for k, each in enumerate(connections) for work in _works(config, inputs, k, each)]
    samples, n_sites = inputs.samples, len(inputs.sites)
    pictures = 0
    if config.visualize_steps and isinstance(samples, ImageSamples) and samples.channels == 3:
        pictures = n_sites * config.features
        n_steps = n_sites * -(-config.features // PICTURE_BATCH) * config.visualize_steps
        rows = inputs.dictionaries[0].W_enc.detach().T[: min(config.features, PICTURE_BATCH)]
        side = samples.side

        def draw(progress: Progress) -> None:
            settings = VisualizeConfig(steps=PROBE_STEPS)
            for done in range(0, n_steps, PROBE_STEPS):
                visualize(inputs.network, inputs.sites[0], rows, side=side, config=settings)
                progress(min(done + PROBE_STEPS, n_steps), n_steps)

        works.append(draw)
    later = zip(inputs.dictionaries[1:], connections, strict=True)
    edges = config.top_k_sources * sum(b.n_latents * len(each.routes) for b, each in later)
    return of_work(
        works,
        memory=2 * BLOCK_BYTES + 3 * bytes_of(inputs.network, *inputs.dictionaries),
        disk=EDGE_BYTES * edges + 3 * pictures * getattr(samples, "side", 0) ** 2,
    )  # fmt: skip


def _works(
    config: CircuitConfig, inputs: _Inputs, k: int, connection: Connection
) -> list[Callable[[Progress], object]]:
    """Parts of the work on two sites, by samples or by targets, for `of_work`."""
    a, b = inputs.dictionaries[k : k + 2]

    def counted(numbers: Int[np.ndarray, " n"], progress: Progress) -> Iterator[Masked]:
        for done, each in enumerate(inputs.maps(connection.source, numbers, 1), start=1):
            yield each
            progress(done, len(numbers))

    own, unseen = (connection, a, b), inputs.unseen
    few = record(*own, inputs.maps(connection.source, inputs.known[:PROBE_SAMPLES]))
    responses = compose_responses(connection, a, few.gates)
    sources, targets = (np.unique(codes.indices) for codes in (few.codes_a, few.codes_b))
    sources = sources[: config.n_ablated + config.features].astype(np.int64)
    targets = targets[: config.features].astype(np.int64)
    parts = [route.channels for route in connection.routes]

    def weigh(progress: Progress) -> None:
        strongest_edges(
            connection, responses, b, repeated(few, len(inputs.known)),
            block_bytes=PROBE_BYTES, on_progress=progress,
        )  # fmt: skip

    return [
        lambda on: record(*own, counted(inputs.known, on)),
        weigh,
        lambda on: reproduced_variance(connection, responses, a, b, counted(unseen, on)),
        lambda on: ablate(connection, a, counted(unseen, on), sources),
        lambda on: attribute(*own, counted(unseen, on), targets, parts),
    ]


def _arrays(pair: _Pair) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Arrays from which a pair is read again after an interruption."""
    parts = {"edges": pair.edges, "ablation": pair.ablation}
    arrays = {
        f"{part}.{name}": np.asarray(value)
        for part, values in parts.items()
        for name, value in vars(values).items()
    }
    for r, (taps, kernels) in enumerate(zip(pair.taps, pair.kernels, strict=True)):
        arrays |= {f"taps.{r}": taps, f"kernels.{r}": kernels}
    result = json.dumps(dataclasses.asdict(pair.result)).encode()
    return arrays | {"result": np.frombuffer(result, np.uint8)}


def _read(arrays: dict[str, Shaped[np.ndarray, "..."]], connection: Connection) -> _Pair:
    edges: dict[str, Any] = {f.name: arrays[f"edges.{f.name}"] for f in fields(CircuitEdges)}
    edges["tested"] = int(edges["tested"].item())
    ablation = {f.name: arrays[f"ablation.{f.name}"] for f in fields(Ablation)}
    routes = range(len(connection.routes))
    return _Pair(
        connection,
        CircuitEdges(**edges),
        [arrays[f"taps.{r}"] for r in routes],
        [arrays[f"kernels.{r}"] for r in routes],
        Ablation(**ablation),
        cattrs.structure(json.loads(arrays["result"].tobytes()), PairResult),
    )


def _opened(config: CircuitConfig) -> list[OpenedDictionary]:
    """Open the dictionaries, and refuse what cannot be part of a circuit."""
    listed = any("," in site for site in config.sites)
    opened = open_dictionaries(config.dictionaries, sites=() if listed else config.sites)
    several = [_is_several(each) for each in opened]
    if not any(several):
        expect_several(config.dictionaries, "circuit")
    if not listed:
        expect_sites([each for each, is_several in zip(opened, several, strict=True)
                      if not is_several])  # fmt: skip
    for each in opened:
        if getattr(each.dictionary, "norm", None) is not None:
            raise InputError(
                f"{each.path} cannot be part of a circuit: it scales every row by itself, so its "
                "pre-activations are not linear."
            )
    return opened


def _is_several(opened: OpenedDictionary) -> bool:
    """Whether a dictionary reads or writes several sites, or others than it reads."""
    return len(ends_of(opened.dictionary).names) > 1


def _run_direct(
    config: CircuitConfig,
    folder: RunFolder,
    opened: Sequence[OpenedDictionary],
    inputs: _Inputs,
) -> CircuitResult:
    """Find the direct effects of dictionaries of several sites.

    Raises:
        InputError: A dictionary does not fit its sites, or none follows another.
        SiteError: The network has no such site.
    """
    given = config.sites or [sites_of(each) for each in opened]
    placed = [
        PlacedDictionary(
            each.dictionary,
            place_sites(
                inputs.network, ends_of(each.dictionary).names,
                None if sites is None else sites.split(","), ends_in_words(each.dictionary),
            ),
        )
        for each, sites in zip(opened, given, strict=True)
    ]  # fmt: skip
    for name, mark in zip(inputs.names, inputs.checksums, strict=True):
        folder.parent(name, mark)
    folder.parent("store", inputs.store.digest)
    twice = [0, 0] if len(opened) == 1 else range(len(opened))
    weigh = functools.partial(
        find_direct_circuit, inputs.network,
        known=lambda: inputs.batches(inputs.known), held_out=lambda: inputs.batches(inputs.unseen),
        top_k_sources=config.top_k_sources, n_targets=config.n_targets, fdr=config.fdr,
        seed=config.seed,
    )  # fmt: skip
    pairs = [(placed[i], placed[j]) for i, j in itertools.pairwise(twice)]
    n_edges = config.top_k_sources * config.n_targets * sum(len(a.writes) for a, _ in pairs)
    folder.expect(
        lambda: of_work(
            [lambda on, both=both: weigh(*both, on_progress=on) for both in pairs],
            memory=BLOCK_BYTES + 3 * bytes_of(inputs.network, *inputs.dictionaries),
            disk=EDGE_BYTES * n_edges,
        ),
        is_long=config.n_targets * len(inputs.known) >= LONG_TARGETS,
    )
    folder.facts(
        dictionaries=[str(config.dictionaries[i].resolve()) for i in twice],
        store=str(inputs.store.root.resolve()),
    )
    circuits, seconds, names = [], [], [inputs.names[i] for i in twice]
    for both, (a, b) in zip(pairs, itertools.pairwise(names), strict=True):
        clock = time.process_time()
        with bar(f"weighing {a} -> {b}") as progress:
            circuits.append(weigh(*both, n_ablated=config.n_ablated, on_progress=progress))
        seconds.append(round(time.process_time() - clock, 3))
    return describe_circuits(circuits, names, folder, features=config.features, seconds=seconds)


def _open(config: CircuitConfig, opened: Sequence[OpenedDictionary]) -> _Inputs:
    """Open the network and samples of the store of dictionaries.

    Raises:
        StoreError: The store is missing, of another network, or has no held-out samples.
    """
    store = Store(config.store) if config.store is not None else find_store(opened[0])
    for each in opened[1:] if config.store is None else ():
        if find_store(each).manifest["network"] != store.manifest["network"]:
            raise StoreError(
                f"{each.path} was trained on another network than {opened[0].path}: their "
                "stores have different weights."
            )
    for each in opened:
        refuse_other_network(each, store)
    network, samples = open_network(store, config)
    # Rounding to half precision would hide the effects of single features. (transformers refuses
    # `network.float()` of what was quantized in its file.)
    nn.Module.float(network)
    known = np.array(store.samples("train", config.samples), np.int64)
    unseen = np.array(store.samples("held", config.held_out), np.int64)
    if len(unseen) < 2:
        raise StoreError(f"{store.root} has no held-out samples to ablate features on.")
    return _Inputs(
        [each.name for each in opened],
        [each.checksum for each in opened],
        [Site.parse(str(each.site or "")) for each in opened],
        [each.dictionary.cpu() for each in opened],
        store, network, samples, known, unseen,
    )  # fmt: skip


def _weigh(config: CircuitConfig, inputs: _Inputs, k: int, connection: Connection) -> _Pair:
    """Find the circuit of two sites and validate it by ablations of features drawn at random."""
    a, b = inputs.dictionaries[k : k + 2]
    clock = time.process_time()
    with bar(f"weighing {inputs.names[k]} -> {inputs.names[k + 1]}") as progress:
        circuit = find_circuit(
            connection, a, b,
            lambda: inputs.maps(connection.source, inputs.known),
            lambda: inputs.maps(connection.source, inputs.unseen),
            top_k_sources=config.top_k_sources, fdr=config.fdr, seed=config.seed,
            on_progress=progress,
        )  # fmt: skip
    seconds = round(time.process_time() - clock, 3)
    sources = draw_sources(circuit, config.n_ablated, config.seed, pair=k)
    ablation = ablate(connection, a, inputs.maps(connection.source, inputs.unseen), sources)
    evidence = ablation_evidence(circuit, ablation, sources, seed=config.seed)
    result = pair_result(circuit, evidence, *inputs.names[k : k + 2], seconds=seconds)
    taps = [response.taps for response in circuit.responses]
    return _Pair(connection, circuit.edges, taps, circuit.kernels(), ablation, result)


def _of_layer(paths: Sequence[CircuitPath], layer: int) -> Int[np.ndarray, " latent"]:
    return np.unique([path.latents[layer] for path in paths]).astype(np.int64)


def _measure(
    inputs: _Inputs, k: int, pair: _Pair, paths: Sequence[CircuitPath]
) -> tuple[Ablation, Attribution]:
    """Ablate the features of the paths too, and attribute the pre-activations of paths."""
    a, b = inputs.dictionaries[k : k + 2]
    drawn, source = pair.ablation, pair.connection.source
    missing = np.setdiff1d(_of_layer(paths, k), drawn.sources)
    more = ablate(pair.connection, a, inputs.maps(source, inputs.unseen), missing)
    order = np.argsort(np.concatenate([drawn.sources, more.sources]))
    pairs = zip(vars(drawn).values(), vars(more).values(), strict=True)
    both = Ablation(*(np.concatenate(pair)[order] for pair in pairs))
    parts = [route.channels for route in pair.connection.routes]
    maps = inputs.maps(source, inputs.unseen)
    return both, attribute(pair.connection, a, b, maps, _of_layer(paths, k + 1), parts)


def _table(
    inputs: _Inputs, k: int, pair: _Pair, ablation: Ablation, attribution: Attribution
) -> dict[str, Shaped[np.ndarray, " edge"]]:
    """Rows of `edges.parquet` of two sites."""
    edges, routes = pair.edges, pair.connection.routes
    columns = edge_columns(edges, [route.name for route in routes], k)
    effects = {name: columns[name] for name in ("effect", "effect_low", "effect_high")}
    encoder = inputs.dictionaries[k + 1].W_enc.detach().float().numpy()
    row = {int(source): r for r, source in enumerate(ablation.sources)}
    measured = np.isin(edges.target, attribution.targets) & np.isin(edges.source, ablation.sources)
    for edge in np.flatnonzero(measured):
        first, own = pair.connection.reads.start, routes[edges.route[edge]].channels
        part = slice(max(0, own.start - first), max(0, own.stop - first))
        lost = ablation.lost[row[int(edges.source[edge])]][:, part]
        pre_activation = lost @ encoder[part, edges.target[edge]]
        low, high = bootstrap_interval(pre_activation[None])
        for name, value in zip(effects, (pre_activation.mean(), low[0], high[0]), strict=True):
            effects[name][edge] = value
    attributed, targets = columns["attribution"], attribution.targets
    at = np.searchsorted(targets, edges.target).clip(0, max(0, len(targets) - 1))
    known = np.isin(edges.target, targets[attribution.places > 0])
    part_of_edge = attribution.part[edges.route[known]]
    attributed[known] = attribution.attributed[at[known], part_of_edge, edges.source[known]]
    return columns


def _pictures(
    config: CircuitConfig, inputs: _Inputs, paths: Sequence[CircuitPath]
) -> dict[str, Shaped[np.ndarray, "_ ..."]]:
    """Pictures of the features on paths, by layer; none if the network does not take photos."""
    samples = inputs.samples
    if not config.visualize_steps or not isinstance(samples, ImageSamples) or samples.channels != 3:
        return {}
    pictures: dict[str, np.ndarray] = {}
    settings = VisualizeConfig(steps=config.visualize_steps, seed=config.seed)
    for layer, (site, dictionary) in enumerate(zip(inputs.sites, inputs.dictionaries, strict=True)):
        latents = _of_layer(paths, layer)
        rows = dictionary.W_enc.detach().T[torch.from_numpy(latents)]
        parts = []
        with bar(f"drawing features of {site}") as progress:
            for part in rows.split(PICTURE_BATCH):
                drawn = visualize(inputs.network, site, part, side=samples.side, config=settings)
                parts.append(drawn.images)
                progress(sum(map(len, parts)), len(rows))
        if len(rows):
            pictures[f"{layer}.latents"] = latents.astype(np.int32)
            pictures[f"{layer}.pictures"] = np.rint(255 * np.concatenate(parts)).astype(np.uint8)
    return pictures
