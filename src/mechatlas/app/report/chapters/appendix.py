"""Appendix: networks, stores and dictionaries with their numbers and checksums."""

import dataclasses
import re
from typing import Any

import torch
from torch import nn

from mechatlas.activations.networks import has_weights
from mechatlas.activations.samples import Samples
from mechatlas.activations.sites import SiteInfo, list_sites
from mechatlas.app.report.chapter import MISSING, Chapter, render
from mechatlas.app.report.palette import N_BRANCHES
from mechatlas.app.report.runs import Run, Runs
from mechatlas.base import Progress, UserError

FEW = 4
"""Sites that have rows of their own among the branches, however much they are alike."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """Segment of the picture of a site."""

    name: str
    width: int
    share: float
    color: int


@dataclasses.dataclass(frozen=True)
class Subject:
    """Network as the page describes it."""

    name: str
    kind: str
    parameters: int | None
    checksum: str
    """Checksum of the weights, from the store's manifest."""
    problem: str
    """Reason why the network cannot be shown, or is not the one of the store; else empty."""
    sites: list[SiteInfo]
    hidden: list[SiteInfo]
    """Sites inside other sites, folded away at first."""
    branched: dict[str, list[Branch]]
    bars: list[tuple[str, int, list[Branch]]]
    """Sites with branches, and their number where several of equal branches share a row."""
    samples: int | None


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Show networks, stores and dictionaries with their numbers."""
    stores = runs.of_kind("store")
    subjects: dict[str, Subject] = {}
    for done, run in enumerate(stores):
        key = f"{run.manifest.get('network')} {run.manifest.get('recipe', {}).get('network')}"
        if key not in subjects:
            subjects[key] = _subject(run, runs)
        on_progress(done + 1, len(stores))
    return Chapter(
        name="appendix",
        title="Appendix",
        html=render(
            "appendix.html",
            subjects=list(subjects.values()),
            stores=[_store(run) for run in stores],
            dictionaries=[_dictionary(run) for run in runs.of_kind("dictionary")],
            others=[r for r in runs.all if r.kind not in ("store", "dictionary")],
        ),
    )


def _subject(run: Run, runs: Runs) -> Subject:
    name = run.network_name or "unknown network"
    written = str(run.manifest.get("network", ""))
    try:
        network, samples = runs.reopen(run.folder)
        infos = list_sites(network, _one(network, samples))
    except UserError as error:
        runs.problems[run.name] = str(error)
        return Subject(str(name), "", None, written, str(error), [], [], {}, [], None)
    problem = ""
    if not has_weights(network, written):
        problem = "The weights found now are not those that the store was collected from."
    branched = {str(i.site): _branches(i) for i in infos if i.branches}
    inside = [i for i in infos if any(str(i.site).startswith(f"{b}.") for b in branched)]
    return Subject(
        name=str(name),
        kind=type(network).__name__,
        parameters=sum(p.numel() for p in network.parameters()),
        checksum=written,
        problem=problem,
        sites=[i for i in infos if i not in inside],
        hidden=inside,
        branched=branched,
        bars=branch_rows(branched),
        samples=len(samples),
    )


def _one(network: nn.Module, samples: Samples) -> torch.Tensor:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    return samples.stack([samples.read(0)]).to(device)


def branch_rows(branched: dict[str, list[Branch]]) -> list[tuple[str, int, list[Branch]]]:
    """Join sites that differ by a number alone, such as the layers of a transformer, if many do."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for site, branches in branched.items():
        key = (re.sub(r"\d+", "*", site), tuple((b.name, b.width) for b in branches))
        alike.setdefault(key, []).append(site)
    bars: list[tuple[str, int, list[Branch]]] = []
    for (pattern, _), sites in alike.items():
        if len(sites) > FEW:
            bars.append((pattern, len(sites), branched[sites[0]]))
        else:
            bars += [(site, 1, branched[site]) for site in sites]
    return bars


def _branches(info: SiteInfo) -> list[Branch]:
    widths = {
        n: len(range(info.width)[c]) if isinstance(c, slice) else len(c)
        for n, c in info.branches.items()
    }
    total = max(sum(widths.values()), 1)
    return [
        Branch(name, width, width / total, number % N_BRANCHES)
        for number, (name, width) in enumerate(widths.items())
    ]


def _store(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    settings = manifest.get("settings", {})
    source = manifest.get("recipe", {}).get("samples", {})
    rows: dict[str, dict[str, int]] = {}
    for site, split, _file, n_rows, *_ in manifest.get("shards", []):
        rows.setdefault(site, {"train": 0, "held": 0})[split] += n_rows
    return {
        "name": run.name,
        "complete": manifest.get("complete", False),
        "samples": manifest.get("n_samples"),
        "source": source.get("source", MISSING) if isinstance(source, dict) else "arrays in memory",
        "skipped": len(manifest.get("skipped", [])),
        "dtype": settings.get("dtype", MISSING),
        "positions": settings.get("positions", {}).get("rule", MISSING),
        "per_sample": settings.get("positions", {}).get("per_sample"),
        "bytes": sum(shard[4] for shard in manifest.get("shards", [])),
        "sites": [
            {"name": name, **shape, **rows.get(name, {"train": 0, "held": 0})}
            for name, shape in manifest.get("sites", {}).items()
        ],
    }


def _dictionary(run: Run) -> dict[str, Any]:
    keys = ("n_latents", "d_in", "fvu", "l0", "dead_share", "steps", "seconds_per_step")
    return {
        "name": run.name,
        "site": run.manifest.get("site", MISSING),
        **{key: run.result.get(key) for key in keys},
    }
