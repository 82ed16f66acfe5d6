r"""Find where features of the residual stream come from: passed on, transformed, or born.

    mechatlas flow runs/layer8 runs/layer10 --attention runs/attention9 runs/attention10 \
        --mlp runs/mlp9 runs/mlp10 --out runs/flow

Dictionaries of the stream are in the order of the network. Those of attention and MLPs find their
step by the number in their site, such as `model.layers.9.mlp`. The folder has `flow.parquet`, a row
for each latent of the stream.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from mechatlas.analysis.matching.flow import KINDS, ORIGINS, FeatureFlow, feature_flow
from mechatlas.analysis.matching.pairing import FDR
from mechatlas.app.estimates import of_matching
from mechatlas.app.inputs import OpenedDictionary, expect_several, open_dictionaries
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import FLOW, FLOWS, CommandResult, RunConfig, RunFolder
from mechatlas.base import RecipeError
from mechatlas.maths.statistics import Proportion
from mechatlas.ranges import RATE, SEED, check_ranges

KIND = FLOW
LONGEST = 20
"""Tracks listed in the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig(RunConfig):
    """Find where features of the residual stream come from: passed on, transformed, or born."""

    dictionaries: Annotated[Positional[tuple[Path, ...]], arg(metavar="DICT_A DICT_B ...")]
    """Folders or files of dictionaries of the residual stream, in the order of the network."""
    attention: tuple[Path, ...] = ()
    """Dictionaries of what attention adds to the stream, at any layers in between."""
    mlp: tuple[Path, ...] = ()
    """Dictionaries of what MLPs add to the stream, at any layers in between."""
    sites: tuple[str, ...] = ()
    """Site of each dictionary where they do not say it: of the stream, of attention, of MLPs."""
    fdr: float = FDR
    """False match rate of the links to each dictionary."""
    seed: int = 0
    """Seed of the nulls."""

    def __post_init__(self) -> None:
        check_ranges(self, fdr=RATE, seed=SEED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowStep:
    """Origins of the latents of one layer."""

    a: str
    """Name of the dictionary before."""
    b: str
    """Name of the dictionary of the layer."""
    n: int
    """Latents of the layer."""
    counts: dict[str, int]
    """Latents by origin."""
    shares: dict[str, Proportion]
    """Share of the latents by origin."""
    births: Proportion
    """Share of the layer's latents without a partner in the dictionary before."""
    deaths: Proportion
    """Share of the latents before without a partner in the layer."""
    thresholds: dict[str, float | None]
    """Cosine that a link takes to be significant, by the dictionary that it leads to; null where
    no link is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowPoint:
    """Latent on a track."""

    dictionary: str
    """Name of its dictionary."""
    latent: int
    """Number of the latent."""
    origin: str
    """Origin of the latent; empty in the first layer."""
    module: str
    """Name of the module's dictionary that writes its direction; empty if none is known."""
    module_latent: int
    """Latent of that dictionary; -1 if none is known."""
    cosine: float
    """Cosine with the latent before; 0 at the beginning."""
    false_match_rate: float
    """Probability that some link from here to the end of the track is wrong, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowResult(CommandResult):
    """Origins of the features of every layer of the stream."""

    fdr: float
    """False match rate asked for."""
    dictionaries: list[str]
    """Names of the dictionaries of the stream."""
    modules: list[str]
    """Names of the dictionaries of attention and MLPs."""
    steps: list[FlowStep]
    """One entry for each layer but the first."""
    tracks: list[list[FlowPoint]]
    """The longest tracks, the surest first."""


def run(config: FlowConfig, folder: RunFolder) -> FlowResult:
    """Match each dictionary with what lies before it, and tell where its latents come from.

    Raises:
        InputError: The dictionaries have different widths.
        RecipeError: There are fewer than two, or a module lies between none of the layers.
        WeightsError: A dictionary cannot be read.
    """
    expect_several(config.dictionaries, "flow")
    paths = [*config.dictionaries, *config.attention, *config.mlp]
    opened = open_dictionaries(paths, sites=config.sites)
    n, n_attention = len(config.dictionaries), len(config.attention)
    stream = opened[:n]
    given = dict(zip(KINDS, (opened[n : n + n_attention], opened[n + n_attention :]), strict=True))
    between = {kind: _between(stream, given[kind], kind) for kind in KINDS}
    for each in opened:
        folder.parent(each.name, each.checksum)
    modules = [each.name for kind in KINDS for each in given[kind]]
    paths_of = {each.name: str(each.path.resolve()) for each in opened}
    folder.facts(
        dictionaries=[paths_of[each.name] for each in stream],
        modules=[paths_of[name] for name in modules],
    )
    folder.expect(
        lambda: of_matching(
            (_shape(stream[k + 1]), _shape(before))
            for k in range(n - 1)
            for before in (stream[k], *between[KINDS[0]][k], *between[KINDS[1]][k])
        )
    )
    with bar("following features") as progress:
        flow = feature_flow(
            [each.dictionary for each in stream],
            attention=[[d.dictionary for d in step] for step in between["attention"]],
            mlp=[[d.dictionary for d in step] for step in between["mlp"]],
            fdr=config.fdr,
            seed=config.seed,
            on_progress=progress,
        )
    names = {kind: [[d.name for d in step] for step in between[kind]] for kind in KINDS}
    folder.table(FLOWS, flow_columns(flow, names, modules))
    return describe_flow(flow, [each.name for each in stream], names, modules)


def _shape(opened: OpenedDictionary) -> tuple[int, int]:
    """Latents of a dictionary and their width."""
    return opened.dictionary.n_latents, opened.dictionary.d_in


def _layer(opened: OpenedDictionary) -> int:
    """Number of the layer that a dictionary reads."""
    number = re.search(r"(?:^|\.)(\d+)(?:[.:/]|$)", opened.site or "")
    if number is None:
        raise RecipeError(
            f"{opened.path} is of site {opened.site!r}, which names no layer by its number. "
            "Attention and MLPs find their step by the layers of the sites."
        )
    return int(number[1])


def _between(
    stream: Sequence[OpenedDictionary], modules: Sequence[OpenedDictionary], kind: str
) -> list[list[OpenedDictionary]]:
    """Modules in the layers after each dictionary of the stream, up to the next."""
    if not modules:
        return [[] for _ in stream[1:]]
    layers = [_layer(each) for each in stream]
    steps: list[list[OpenedDictionary]] = [[] for _ in stream[1:]]
    for module in modules:
        layer = _layer(module)
        step = next((k for k in range(len(steps)) if layers[k] < layer <= layers[k + 1]), None)
        if step is None:
            raise RecipeError(
                f"--{kind} {module.path} is of layer {layer}, which lies after none of the layers "
                f"{', '.join(map(str, layers))} of the stream and up to the next."
            )
        steps[step].append(module)
    return steps


def describe_flow(
    flow: FeatureFlow,
    stream: Sequence[str],
    between: dict[str, list[list[str]]],
    modules: Sequence[str],
) -> FlowResult:
    """Describe a flow for `result.json`.

    Args:
        flow: The flow.
        stream: Names of the dictionaries of the stream.
        between: Names of the modules of each step, by kind.
        modules: Names of all modules.
    """
    steps = []
    for layer in range(1, len(stream)):
        links = [flow.residual[layer - 1], *flow.modules[layer - 1]]
        names = [stream[layer - 1]] + [
            between[link.kind][layer - 1][link.number] for link in links[1:]
        ]
        steps.append(FlowStep(
            a=stream[layer - 1],
            b=stream[layer],
            n=flow.sizes[layer],
            counts={o: int((flow.origins[layer - 1] == k).sum()) for k, o in enumerate(ORIGINS)},
            shares={o: flow.share(layer, k) for k, o in enumerate(ORIGINS)},
            births=flow.births(layer),
            deaths=flow.deaths(layer - 1),
            thresholds={
                name: link.cosine_threshold if np.isfinite(link.cosine_threshold) else None
                for name, link in zip(names, links, strict=True)
            },
        ))  # fmt: skip
    tracks = [
        [
            FlowPoint(
                dictionary=stream[point.layer],
                latent=point.latent,
                origin=point.origin,
                module=between[point.kind][point.layer - 1][point.number] if point.kind else "",
                module_latent=point.module_latent,
                cosine=point.cosine,
                false_match_rate=point.false_match_rate,
            )
            for point in flow.track(layer, latent)
        ]
        for layer, latent in flow.longest(LONGEST)
    ]
    return FlowResult(
        fdr=flow.fdr, dictionaries=list(stream), modules=list(modules), steps=steps, tracks=tracks
    )


def flow_columns(
    flow: FeatureFlow, between: dict[str, list[list[str]]], modules: Sequence[str]
) -> dict[str, Any]:
    """Columns of `flow.parquet`: a row for each latent of each layer but the first.

    Args:
        flow: The flow.
        between: Names of the modules of each step, by kind.
        modules: Names of all modules, to which `module` is an index.
    """
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("layer", "latent", "origin", "before", "cosine", "q_value",
                     "error_probability", "module", "module_latent", "module_cosine",
                     "module_q_value", "first_layer", "false_match_rate")
    }  # fmt: skip
    first = [np.zeros(flow.sizes[0], np.int64)]
    wrong = [np.zeros(flow.sizes[0])]
    for layer in range(1, len(flow.sizes)):
        n, link = flow.sizes[layer], flow.residual[layer - 1]
        on = link.latent >= 0
        first.append(np.where(on, first[layer - 1][link.latent], layer))
        total = np.where(on, wrong[layer - 1][link.latent] + link.error_probability, 0.0)
        wrong.append(np.minimum(total, 1.0))
        found = [flow.module(layer, i) for i in range(n)]
        links = [None if each is None else each[0] for each in found]
        columns["layer"] += [layer] * n
        columns["latent"] += range(n)
        columns["origin"] += [ORIGINS[k] for k in flow.origins[layer - 1]]
        columns["before"] += link.latent.tolist()
        columns["cosine"] += link.cosine.tolist()
        columns["q_value"] += link.q_value.tolist()
        columns["error_probability"] += link.error_probability.tolist()
        columns["module"] += [
            -1 if m is None else modules.index(between[m.kind][layer - 1][m.number]) for m in links
        ]
        columns["module_latent"] += [-1 if each is None else each[1] for each in found]
        columns["module_cosine"] += [
            0.0 if m is None else float(m.cosine[i]) for i, m in enumerate(links)
        ]
        columns["module_q_value"] += [
            1.0 if m is None else float(m.q_value[i]) for i, m in enumerate(links)
        ]
        columns["first_layer"] += first[layer].tolist()
        columns["false_match_rate"] += wrong[layer].tolist()
    return columns


def in_words(result: FlowResult) -> str:
    """Origins of each layer in a line, and the longest track."""
    lines = []
    for step in result.steps:
        counts = ", ".join(f"{n} {origin}" for origin, n in step.counts.items() if n)
        lines.append(f"{step.b}, of {step.n}: {counts} (false match rate {result.fdr:.0%})")
    if result.tracks:
        track = result.tracks[0]
        way = " -> ".join(f"{point.dictionary}/{point.latent}" for point in track)
        lines.append(
            f"longest track {way}; some link of it is wrong with a probability of at most "
            f"{track[0].false_match_rate:.2g}"
        )
    return "\n".join([*lines, f"Result: {result.out}"])
