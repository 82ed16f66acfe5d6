"""`mechatlas circuit`: dictionaries of consecutive sites -> which feature is made of which.

The folder has `result.json`, `edges.parquet` (a row for each pair of features and branch),
`kernels.safetensors` (their spatial kernels), `pictures.safetensors` (of the features drawn),
`recipe.toml` and `manifest.json`.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tyro.conf import Positional, arg

from mechatlas.activations.networks import digest
from mechatlas.activations.samples import ImageSamples, Samples
from mechatlas.activations.sites import read
from mechatlas.activations.store import Store
from mechatlas.analysis.circuits import attention
from mechatlas.analysis.circuits.attention import AttentionRecording
from mechatlas.analysis.circuits.compose import Response
from mechatlas.analysis.circuits.effects import (
    Ablation,
    AblationAgreement,
    Attribution,
    ablate,
    ablation_agreement,
    attribute,
    bootstrap_interval,
    reproduced_variance,
)
from mechatlas.analysis.circuits.paths import Path as Strongest
from mechatlas.analysis.circuits.paths import strongest_paths
from mechatlas.analysis.circuits.recording import Recording, record
from mechatlas.analysis.circuits.transformer_layer import TransformerLayer, as_maps, connect
from mechatlas.analysis.circuits.virtual_weights import (
    CircuitEdges,
    compose_responses,
    edge_kernels,
    pair_blocks,
    strongest_edges,
)
from mechatlas.analysis.circuits.wiring import Wiring
from mechatlas.analysis.visualization import VisualizeConfig, visualize
from mechatlas.app.progress import bar
from mechatlas.app.recipes import reopen
from mechatlas.app.run_folder import Result, finish, refuse_strangers, write_table, write_tensors
from mechatlas.base import InputError, RecipeError, Site, StoreError
from mechatlas.dictionaries.formats import load
from mechatlas.files import checksum, read_json, write_json

KIND = "circuit"
PICTURES = "pictures.safetensors"
AT_ONCE = 16
"""Pictures that are climbed together."""
MAP_NUMBERS = 1 << 22
"""Numbers of the source's maps that are run on at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitConfig:
    """Find which features of a site are made of which of the site before, and by which branch.

    Examples:  mechatlas circuit runs/mixed4a runs/mixed4b --out runs/circuit
               mechatlas circuit runs/4b runs/4c runs/4d --out runs/circuit --features 12
    """

    dictionaries: Annotated[Positional[tuple[Path, ...]], arg(metavar="DICT_A DICT_B ...")]
    """Folders of dictionaries of consecutive sites, in the order of the network."""
    out: Path
    """Folder for the result."""
    store: Path | None = None
    """Store whose network and samples to run; by default the one of the first dictionary."""
    samples: int = 256
    """Samples whose activations are counted; some of each feature are followed through the gates
    that they meet."""
    held_out: int = 128
    """Held-out samples on which features are removed and drives attributed."""
    n_ablated: int = 32
    """Features of each site, at random, that are removed to validate the weights."""
    top_k_sources: int = 8
    """Strongest sources kept of each feature."""
    features: int = 8
    """Features of the last site whose paths are traced, attributed and drawn."""
    fdr: float = 0.05
    """False discovery rate at which an edge stands."""
    visualize_steps: int = 96
    """Steps of activation maximisation for a picture of each feature drawn; 0 for no pictures."""
    seed: int = 0
    """Seed of the activations followed, the null, the features removed, the intervals and the
    pictures."""


def run(words: list[str]) -> tuple[Result, str]:
    """Find circuits, from the words of the command line."""
    result = circuit(tyro.cli(CircuitConfig, args=words, prog="mechatlas circuit"))
    return result, in_words(result)


def in_words(result: Result) -> str:
    """What was found."""
    lines = []
    for pair in result["pairs"]:
        found = pair["agreement"]
        lines.append(
            f"{pair['a']} -> {pair['b']}: weights and ablations agree with rank correlation "
            f"{found['spearman']:.3f} [{found['low']:.3f}, {found['high']:.3f}], random pairs "
            f"{found['null']:.3f} [{found['null_low']:.3f}, {found['null_high']:.3f}]; "
            f"{pair['edges_that_stand']} of {pair['edges']} edges kept stand at a false "
            f"discovery rate of {result['rate']:.0%}"
        )
    stand = sum(path["significant"] for path in result["paths"])
    lines.append(f"{len(result['paths'])} paths traced, {stand} of which stand")
    return "\n".join([*lines, f"Result: {result['out']}"])


@dataclasses.dataclass(frozen=True, eq=False)
class _Opened:
    """Everything a circuit is made from."""

    names: list[str]
    sites: list[Site]
    dictionaries: list[Any]
    store: Store
    network: nn.Module
    samples: Samples
    known: np.ndarray
    unseen: np.ndarray

    def maps(self, site: Site, numbers: np.ndarray) -> Iterator[Tensor]:
        """Activations of a site's module, batch by batch."""
        whole, size = dataclasses.replace(site, branch=None), 1
        while len(numbers):
            batch = self.samples.stack([self.samples.read(int(i)) for i in numbers[:size]])
            with torch.no_grad():
                x = as_maps(read(self.network, batch, [whole])[whole])
            numbers = numbers[size:]
            size = max(1, min(64, MAP_NUMBERS // max(1, x[0].numel())))
            yield x


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """What was found between two sites."""

    wiring: Wiring | TransformerLayer
    recording: Recording | AttentionRecording
    responses: Sequence[Response]
    edges: CircuitEdges
    facts: Result


def circuit(recipe: CircuitConfig) -> Result:
    """Weigh all pairs of features of consecutive sites, and validate them by ablation.

    Raises:
        DiskError: `out` holds something else, or cannot be written.
        InputError: A dictionary does not fit its site, or reads more than it writes.
        RecipeError: Fewer than two dictionaries, or one that does not say its site.
        SiteError: Two sites are not consecutive, or a step between them cannot be composed.
        StoreError: The store is missing or damaged, or of another network.
    """
    clock = time.process_time()
    _check(recipe)
    opened = _open(recipe)
    first = opened.samples.stack([opened.samples.read(int(opened.known[0]))])
    wirings = [
        connect(opened.network, a, b, first) for a, b in itertools.pairwise(opened.sites)
    ]  # every refusal comes before any work
    found = [_weigh(recipe, opened, k, wiring) for k, wiring in enumerate(wirings)]
    paths = strongest_paths([f.edges for f in found], features=recipe.features, fdr=recipe.fdr)
    tables, shown, pairs = [], [], []
    for k, one in enumerate(found):
        removed, given = _measure(recipe, opened, k, one, paths)
        pairs.append(one.facts | _validated(recipe, opened, k, one, removed))
        table = _table(opened, k, one, removed, given)
        shown += _explained(k, one, given, paths)
        tables.append(table)
    _write(recipe, opened, found, tables, _pictures(recipe, opened, paths))
    result: Result = {
        "dictionaries": opened.names,
        "sites": [str(site) for site in opened.sites],
        "rate": recipe.fdr,
        "samples": len(opened.known),
        "held_out_samples": len(opened.unseen),
        "pairs": pairs,
        "paths": [dataclasses.asdict(path) for path in paths],
        "features": shown,
    }
    return finish(recipe.out, recipe, result, clock)


def _check(recipe: CircuitConfig) -> None:
    """Everything that can be known before any work.

    Raises:
        DiskError: `out` is a file, or holds something else.
        RecipeError: Too few dictionaries, or a number is out of its range.
    """
    if len(recipe.dictionaries) < 2:
        raise RecipeError(
            f"`mechatlas circuit` needs two dictionaries or more, got {len(recipe.dictionaries)}: "
            "mechatlas circuit DICT_A DICT_B [DICT_C ...] --out DIR."
        )
    for name in ("samples", "held_out", "n_ablated", "top_k_sources", "features"):
        least = 2 if name in ("held_out", "n_ablated") else 1
        if getattr(recipe, name) < least:
            option = name.replace("_", "-")
            raise RecipeError(f"--{option} must be at least {least}, got {getattr(recipe, name)}.")
    if recipe.visualize_steps < 0:
        raise RecipeError(
            f"--visualize-steps must be at least 0 steps, got {recipe.visualize_steps}."
        )
    if not 0 < recipe.fdr < 1:
        raise RecipeError(f"--fdr must lie between 0 and 1, got {recipe.fdr}.")
    refuse_strangers(recipe.out, KIND)


def _open(recipe: CircuitConfig) -> _Opened:
    """Dictionaries, their sites, and the network and samples of their store.

    Raises:
        InputError: A dictionary is not linear in its rows.
        RecipeError: A dictionary does not say which site it reads.
        StoreError: The store is missing, of another network, or has no held-out samples.
    """
    dictionaries, sites = [], []
    for path in recipe.dictionaries:
        dictionary = load(path)
        manifest = _manifest(path)
        site = manifest.get("site") or getattr(dictionary, "site", None)
        if not isinstance(site, str):
            raise RecipeError(
                f"{path} does not say which site it reads (no manifest.json with a site). Give "
                "folders that `mechatlas train` wrote."
            )
        other = dictionary.d_in != dictionary.d_out or manifest.get("writes")
        if other or getattr(dictionary, "norm", None) is not None:
            raise InputError(
                f"{path} cannot be part of a circuit: "
                + ("it reads other sites than it writes." if other else
                   "it scales every row by itself, so its drives are not linear.")
            )  # fmt: skip
        dictionaries.append(dictionary.cpu())
        sites.append(Site.parse(site))
    store = Store(recipe.store or _store_of(recipe.dictionaries[0]))
    for path in recipe.dictionaries if recipe.store is None else ():
        other = Store(_store_of(path))
        if other.manifest["network"] != store.manifest["network"]:
            raise StoreError(
                f"{path} was trained on another network than {recipe.dictionaries[0]}: their "
                "stores have different weights."
            )
    network, samples = reopen(store.manifest["recipe"])
    if digest(network) != store.manifest["network"]:
        raise StoreError(
            f"The network found now has other weights than when {store.root} was made."
        )
    known = np.array(store.samples("train", recipe.samples), np.int64)
    unseen = np.array(store.samples("held", recipe.held_out), np.int64)
    if len(unseen) < 2:
        raise StoreError(f"{store.root} has no held-out samples to remove features on.")
    names = [p.name for p in recipe.dictionaries]
    names = names if len(set(names)) == len(names) else [str(p) for p in recipe.dictionaries]
    return _Opened(names, sites, dictionaries, store, network, samples, known, unseen)


def _manifest(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "manifest.json"
    return read_json(file) if file.is_file() else {}


def _store_of(path: Path) -> Path:
    """The store that a dictionary was trained on: where it was, or beside the dictionary.

    Raises:
        StoreError: It is nowhere to be found.
    """
    manifest = _manifest(path)
    written = Path(str(manifest.get("store", "")))
    beside = sorted(path.resolve().parent.glob("*/manifest.json"))
    wanted = manifest.get("parents", {}).get("store")
    for file in (written / "manifest.json", *beside):
        if wanted and file.is_file() and checksum(file.read_bytes()) == wanted:
            return file.parent
    raise StoreError(
        f"The store of {path} ({written}) is no longer there; name one of the same network with "
        "--store STORE."
    )


def _weigh(
    recipe: CircuitConfig, opened: _Opened, k: int, wiring: Wiring | TransformerLayer
) -> _Found:
    """All pairs of features of two sites, and how well their kernels reproduce drives."""
    a, b = opened.dictionaries[k : k + 2]
    clock = time.process_time()
    maps = opened.maps(wiring.source, opened.known)
    if isinstance(wiring, TransformerLayer):
        recording = attention.record(wiring, a, b, maps)
    else:
        recording = record(wiring, a, b, maps, seed=recipe.seed)
    found = compose_responses(wiring, a, recording.gates)
    with bar(f"weighing {opened.names[k]} -> {opened.names[k + 1]}") as progress:
        kept = strongest_edges(
            wiring,
            found,
            b,
            recording,
            top_k_sources=recipe.top_k_sources,
            seed=recipe.seed,
            on_progress=progress,
        )
    share = reproduced_variance(wiring, found, a, b, opened.maps(wiring.source, opened.unseen))
    names = [route.name for route in wiring.routes]
    facts = {
        "a": opened.names[k],
        "b": opened.names[k + 1],
        "n_a": a.n_latents,
        "n_b": b.n_latents,
        "branches": names,
        "kernel_taps": [len(response.taps) for response in found],
        "pairs_tested": kept.tested,
        "edges": len(kept.source),
        "edges_that_stand": int((kept.q_value <= recipe.fdr).sum()),
        "discoveries": dict(zip(names, kept.discoveries.tolist(), strict=True)),
        "variance_reproduced": _quartiles(share),
        "seconds": round(time.process_time() - clock, 3),
    }
    return _Found(wiring, recording, found, kept, facts)


def _quartiles(values: np.ndarray) -> dict[str, float] | None:
    if np.isnan(values).all():
        return None
    low, middle, high = (float(v) for v in np.nanquantile(values, [0.25, 0.5, 0.75]))
    return {"low_quartile": low, "median": middle, "high_quartile": high}


def _of_layer(paths: Sequence[Strongest], layer: int) -> np.ndarray:
    return np.unique([path.latents[layer] for path in paths]).astype(np.int64)


def _measure(
    recipe: CircuitConfig, opened: _Opened, k: int, one: _Found, paths: Sequence[Strongest]
) -> tuple[Ablation, Attribution]:
    """Remove the features of the paths and some at random, and attribute the drives of paths."""
    a, b = opened.dictionaries[k : k + 2]
    active = np.unique(one.recording.codes_a.indices)
    random = np.random.default_rng([recipe.seed, k])
    drawn = random.permutation(active)[: recipe.n_ablated]
    sources = np.union1d(drawn, _of_layer(paths, k))
    maps = opened.maps(one.wiring.source, opened.unseen)
    removed = ablate(one.wiring, a, maps, sources)
    parts = [route.channels for route in one.wiring.routes]
    maps = opened.maps(one.wiring.source, opened.unseen)
    return removed, attribute(one.wiring, a, b, maps, _of_layer(paths, k + 1), parts)


def _validated(
    recipe: CircuitConfig, opened: _Opened, k: int, one: _Found, removed: Ablation
) -> Result:
    """Rank correlation of weights times mean activations with what ablations did.

    Only over the features drawn at random: those of the paths were chosen by the weights.
    """
    a, b = opened.dictionaries[k : k + 2]
    active = np.unique(one.recording.codes_a.indices)
    random = np.random.default_rng([recipe.seed, k])
    own = np.isin(removed.sources, random.permutation(active)[: recipe.n_ablated])
    measured = removed.pre_activations(b.W_enc)[own]
    gates = {
        "agreement": one.responses,
        "agreement_one_gate_for_all": compose_responses(
            one.wiring, a, one.recording.gates.shared()
        ),
    }
    if isinstance(one.wiring, Wiring):
        gates["agreement_gates_open"] = compose_responses(one.wiring, a)
    made = {}
    for name, found in gates.items():
        weight = np.concatenate(
            [block.weight.sum(axis=0) for block in pair_blocks(one.wiring, found, b.W_enc.detach())]
        )
        predicted = weight.T[removed.sources[own]] * removed.mean[own, None]
        made[name] = _plain(ablation_agreement(predicted, measured, seed=recipe.seed))
    return {"features_removed": int(own.sum()), **made}


def _plain(found: AblationAgreement) -> Result:
    return dataclasses.asdict(found)


def _table(
    opened: _Opened, k: int, one: _Found, removed: Ablation, given: Attribution
) -> dict[str, np.ndarray]:
    """The rows of `edges.parquet` of two sites."""
    e, routes = one.edges, one.wiring.routes
    n = len(e.source)
    columns = {name: np.full(n, np.nan) for name in ("effect", "effect_low", "effect_high")}
    encoder = opened.dictionaries[k + 1].W_enc.detach().float().numpy()
    row = {int(j): r for r, j in enumerate(removed.sources)}
    for edge in np.flatnonzero(
        np.isin(e.target, given.targets) & np.isin(e.source, removed.sources)
    ):
        first, own = one.wiring.reads.start, routes[e.route[edge]].channels
        part = slice(max(0, own.start - first), max(0, own.stop - first))
        lost = removed.everywhere[row[int(e.source[edge])]][:, part]
        pre_activation = lost @ encoder[part, e.target[edge]]
        low, high = bootstrap_interval(pre_activation[None])
        columns["effect"][edge] = pre_activation.mean()
        columns["effect_low"][edge], columns["effect_high"][edge] = low[0], high[0]
    attribution = np.full(n, np.nan)
    at = np.searchsorted(given.targets, e.target).clip(0, max(0, len(given.targets) - 1))
    known = np.isin(e.target, given.targets[given.places > 0])
    attribution[known] = given.given[at[known], given.part[e.route[known]], e.source[known]]
    kernel = np.zeros(n, np.int32)
    for r in range(len(routes)):
        kernel[e.route == r] = np.arange((e.route == r).sum())
    return {
        "pair": np.full(n, k, np.int32),
        "latent_a": e.source.astype(np.int32),
        "latent_b": e.target.astype(np.int32),
        "branch": np.array([routes[r].name for r in e.route], dtype=object),
        "weight": e.weight,
        "norm": e.norm,
        "contribution": e.contribution,
        "share": e.share.astype(np.float32),
        "q_value": e.q_value,
        "attribution": attribution,
        **columns,
        "kernel": kernel,
    }


def _explained(k: int, one: _Found, given: Attribution, paths: Sequence[Strongest]) -> list[Result]:
    """What part of each shown feature's drive the shown pairs and the kept ones give."""
    pairs = {(path.latents[k], path.latents[k + 1]) for path in paths}
    found = []
    for t, target in enumerate(given.targets.tolist()):
        whole = given.given[t].sum(axis=0)
        kept = np.unique(one.edges.source[one.edges.target == target])
        shown = np.array(sorted(j for j, i in pairs if i == target), np.int64)
        pre_activation = float(given.pre_activation[t])
        known = given.places[t] > 0 and pre_activation != 0
        found.append({
            "layer": k + 1,
            "latent": int(target),
            "places": int(given.places[t]),
            "drive": pre_activation if known else None,
            "explained_by_paths": float(whole[shown].sum() / pre_activation) if known else None,
            "explained_by_kept": float(whole[kept].sum() / pre_activation) if known else None,
            "attribution_gap": float(given.gap[t]) if known else None,
        })  # fmt: skip
    return found


def _pictures(
    recipe: CircuitConfig, opened: _Opened, paths: Sequence[Strongest]
) -> dict[str, np.ndarray]:
    """A picture of each feature on a path, by layer; none if the network does not take photos."""
    samples = opened.samples
    if not recipe.visualize_steps or not isinstance(samples, ImageSamples) or samples.channels != 3:
        return {}
    made: dict[str, np.ndarray] = {}
    config = VisualizeConfig(steps=recipe.visualize_steps, seed=recipe.seed)
    for layer, (site, dictionary) in enumerate(zip(opened.sites, opened.dictionaries, strict=True)):
        latents = _of_layer(paths, layer)
        rows = dictionary.W_enc.detach().T[torch.from_numpy(latents)]
        with bar(f"drawing features of {site}") as progress:
            parts = []
            for first in range(0, len(rows), AT_ONCE):
                part = rows[first : first + AT_ONCE]
                drawn = visualize(opened.network, site, part, side=samples.side, config=config)
                parts.append(drawn.images)
                progress(first + len(part), len(rows))
        if parts:
            made[f"{layer}.latents"] = latents.astype(np.int32)
            made[f"{layer}.pictures"] = np.rint(255 * np.concatenate(parts)).astype(np.uint8)
    return made


def _write(
    recipe: CircuitConfig,
    opened: _Opened,
    found: list[_Found],
    tables: list[dict[str, np.ndarray]],
    pictures: dict[str, np.ndarray],
) -> None:
    """The table, the kernels, the pictures and the manifest."""
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    columns["branch"] = columns["branch"].astype(str)
    tensors: dict[str, np.ndarray] = {}
    for k, one in enumerate(found):
        encoder = opened.dictionaries[k + 1].W_enc.detach()
        made = edge_kernels(one.wiring, one.responses, encoder, one.edges)
        for route, response, kernel in zip(one.wiring.routes, one.responses, made, strict=True):
            tensors[f"{k}.{route.name}.taps"] = response.taps.astype(np.int32)
            tensors[f"{k}.{route.name}.kernels"] = kernel
    files = {
        "edges.parquet": write_table(recipe.out / "edges.parquet", columns),
        "kernels.safetensors": write_tensors(recipe.out / "kernels.safetensors", tensors),
    }
    if pictures:
        files[PICTURES] = write_tensors(recipe.out / PICTURES, pictures)
    else:
        (recipe.out / PICTURES).unlink(missing_ok=True)  # of an earlier run
    manifest = {
        "schema": 1,
        "kind": KIND,
        "dictionaries": [str(p.resolve()) for p in recipe.dictionaries],
        "store": str(opened.store.root.resolve()),
        "parents": {
            name: checksum(b"".join(f.read_bytes() for f in _files(path)))
            for name, path in zip(opened.names, recipe.dictionaries, strict=True)
        }
        | {"store": checksum((opened.store.root / "manifest.json").read_bytes())},
        "files": {name: checksum(data) for name, data in files.items()},
    }
    write_json(recipe.out / "manifest.json", manifest)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
