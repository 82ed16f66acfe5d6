"""First screen of the page: what was looked at, the strongest findings, and what was not found.

first_screen    chapters -> the chapter that stands before them
"""

from pathlib import Path

from mechatlas.activations.images import ImageSamples
from mechatlas.activations.samples import TextSamples
from mechatlas.app.report.chapter import Chapter, count_of, render
from mechatlas.app.report.dossiers import Finding
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.run_folder import DICTIONARY, STORE
from mechatlas.base import UserError

MOST = 6
"""Upper limit on the findings shown."""
LAST = ("features",)
"""Chapters whose findings fill what the others leave free."""


def first_screen(runs: Runs, chapters: list[Chapter]) -> Chapter:
    """Make the chapter of findings from those of all other chapters."""
    chosen = _choose(chapters)
    return Chapter(
        name="findings",
        title="Findings",
        html=render(
            "findings.html",
            sentences=_sentences(runs),
            findings=[{"chapter": c, "finding": f} for c, f in chosen],
            absences=[absence for chapter in chapters for absence in chapter.absences],
        ),
        data=[finding.rows for _, finding in chosen],
        scripts=("findings.js",),
    )


def _choose(chapters: list[Chapter]) -> list[tuple[str, Finding]]:
    """Choose the strongest finding of every chapter, then the second of each, and so on."""
    ordered = [c for c in chapters if c.name not in LAST] + [c for c in chapters if c.name in LAST]
    ranked = [(c.name, sorted(c.findings, key=lambda f: -f.strength)) for c in ordered]
    depth = max((len(found) for _, found in ranked), default=0)
    every = [(name, found[k]) for k in range(depth) for name, found in ranked if k < len(found)]
    return every[:MOST]


def _sentences(runs: Runs) -> list[str]:
    """Say for each network what it is, what it was shown, and which dictionaries there are."""
    stores: dict[tuple[str, str], list[Run]] = {}
    for run in runs.of_kind(STORE):
        key = (run.network_name, str(run.manifest.get("network")))
        stores.setdefault(key, []).append(run)
    dictionaries = runs.of_kind(DICTIONARY)
    sentences = []
    for own in stores.values():
        largest = max(own, key=lambda run: run.manifest.get("n_samples") or 0)
        of_store = f"{_network(largest, runs)}, on {_data(largest, runs)}"
        sentences.append(f"{of_store}{_dictionaries(own, dictionaries)}.")
    others = sorted({run.kind.replace("_", " ") for run in runs.all} - {STORE, DICTIONARY})
    if not sentences:
        sentences.append(f"Runs without a store of activations: {', '.join(others) or 'none'}.")
    return sentences


def _network(run: Run, runs: Runs) -> str:
    name = run.network_name or "without a name"
    try:
        network, _ = runs.reopen(run.folder)
    except UserError:
        return f"The network {name}"
    n = sum(parameter.numel() for parameter in network.parameters())
    return f"The network {name} ({type(network).__name__}, {n:,} parameters)"


def _data(run: Run, runs: Runs) -> str:
    n = run.manifest.get("n_samples")
    number = "samples" if n is None else f"{n:,} samples"
    written = run.manifest.get("recipe", {}).get("samples")
    source = str(written.get("source", "")) if isinstance(written, dict) else ""
    try:
        _, samples = runs.reopen(run.folder)
        kind = (
            "images" if isinstance(samples, ImageSamples)
            else "texts" if isinstance(samples, TextSamples) else "samples"
        )  # fmt: skip
        number = number.replace("samples", kind)
    except UserError:
        pass
    return f"{number} from {Path(source).name or source}" if source else number


def _dictionaries(stores: list[Run], dictionaries: list[Run]) -> str:
    sites = {site for run in stores for site in run.manifest.get("sites", {})}
    own = [d for d in dictionaries if str(d.manifest.get("site")) in sites]
    if not own:
        return ""
    n = sum(int(d.result.get("n_latents") or 0) for d in own)
    names = list(dict.fromkeys(str(d.manifest.get("site")) for d in own))
    written = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    listed = " and ".join([", ".join(written[:-1]), written[-1]] if len(written) > 1 else written)
    features = f" with {n:,} features" if n else ""
    return f", read by {count_of(len(own), 'dictionary', 'dictionaries')} of {listed}{features}"
