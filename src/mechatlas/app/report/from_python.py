"""Page of runs made in Python, with any network and no recipe.

    report       stores, dictionaries and results -> one page, with the runs of a folder if wanted
    draw         one result -> its chapter, for a notebook

Main path: every dictionary and every result becomes a `MemoryRun`, which gives a chapter what the
folder of a command gives it; results are described by the functions of the commands themselves.
The network and the samples are those given, instead of those that the recipe of a store names.
"""

import contextlib
import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import nn

from mechatlas import deprecated
from mechatlas.activations.samples import open_samples
from mechatlas.activations.sites import as_site
from mechatlas.activations.store import Store
from mechatlas.analysis.branches.specialization import Specialization
from mechatlas.analysis.circuits.circuit import Circuit
from mechatlas.analysis.circuits.direct import DirectCircuit
from mechatlas.analysis.effects.attribution import Attribution
from mechatlas.analysis.effects.logits import LogitEffects
from mechatlas.analysis.evaluation.results import NetworkEvaluation
from mechatlas.analysis.interaction.results import InteractionBasis
from mechatlas.analysis.matching.chains import Tracks, survival, tracks_table
from mechatlas.analysis.matching.flow import KINDS, FeatureFlow
from mechatlas.analysis.matching.pairing import Match, matches_table
from mechatlas.analysis.proofs.prove import AccuracyBound
from mechatlas.analysis.symmetry.classify import Symmetry
from mechatlas.app.basis_spectra import spectra_of
from mechatlas.app.block_artifacts import ArtifactsResult
from mechatlas.app.circuit_results import CircuitResult, describe_circuits
from mechatlas.app.commands import (
    basis,
    branches,
    circuit,
    effects,
    evaluate,
    flow,
    match,
    prove,
    symmetry,
)
from mechatlas.app.feature_labels import read_feature_labels
from mechatlas.app.inputs import OpenedNetwork
from mechatlas.app.pose_interventions import InterventionsResult
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.report.chapters.symmetry import PREDICTORS
from mechatlas.app.report.page import (
    OnProblem,
    assemble,
    make_chapters,
    no_problem,
    refuse_nothing,
    write_page,
)
from mechatlas.app.report.runs import MemoryRun, Run, Runs, find_runs, read_run
from mechatlas.app.run_folder import (
    DICTIONARY,
    FEATURES,
    FLOWS,
    HISTORY,
    LOGITS,
    MATCHES,
    SCHEMA,
    SPECTRA,
    TRACKS,
    as_plain,
)
from mechatlas.app.symmetry_tables import write_features
from mechatlas.base import InputError, Progress, Site, SiteError, no_progress
from mechatlas.dictionaries.ends import UNNAMED as UNNAMED_SITES
from mechatlas.dictionaries.ends import ends_of, in_words
from mechatlas.files import write

UNNAMED = ("dictionary", "A", "B")
"""Names of dictionaries that nobody has named: a single one, and those of a pair."""
HEIGHT = 640
"""Height of a chapter in a notebook, in pixels."""


class _Contents:
    """Tables, tensors and values of a run, kept in memory; fits `Outputs`."""

    def __init__(self) -> None:
        self.manifest: dict[str, Any] = {}
        self.files: dict[str, Any] = {}

    def facts(self, **values: Any) -> None:
        """Add plain values to the manifest."""
        self.manifest |= values

    def table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Keep columns."""
        self.files[name] = columns

    def tensors(self, name: str, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
        """Keep arrays."""
        self.files[name] = arrays

    def json(self, name: str, value: Any) -> None:
        """Keep plain values."""
        self.files[name] = value


def report(
    out: Path | str,
    folder: Path | str | None = None,
    *,
    stores: Store | Path | str | Sequence[Store | Path | str] = (),
    dictionaries: Mapping[str, Any] | None = None,
    results: Mapping[Any, Any] | None = None,
    network: nn.Module | str | Sequence[str] | None = None,
    samples: Any = None,
    visualize: int = 0,
    trust: bool = False,
    labels: Path | str | None = None,
    on_progress: Progress = no_progress,
    on_problem: OnProblem = no_problem,
) -> Path:
    """Write one page about stores, dictionaries and results, and about the runs in a folder.

    Args:
        out: File to write.
        folder: Folder whose runs are on the page too.
        stores: Stores, or their folders.
        dictionaries: Site, or a name of your own -> dictionary. Under a name of your own give
            `(site, dictionary)`, as for two dictionaries of one site.
        results: Name or names of the dictionaries -> what an analysis returned for them, or a list
            of results: `{("a", "b"): ma.match(a, b)}`. Several matches, and their tracks, are in
            the order of the names. A basis, a proof or the like may have any name.
        network: Network of the stores, which need not be one that a recipe can name; or names
            `package.module:factory` of networks that stores may name, whose code then runs.
        samples: Inputs of the network that the stores were collected from, whatever
            `open_samples` takes.
        visualize: Number of features per dictionary to visualize by activation maximization.
        trust: Whether the code of whatever network a store names may run.
        labels: A `labels.json` that an earlier page saved; its names and notes are on this one.
        on_progress: Callback with the steps done.
        on_problem: Callback with each run that is left out, or not drawn whole.

    Returns:
        `out`.

    Raises:
        InputError: A name is not that of a dictionary, or no chapter draws such a result.
        UserError: There is nothing to show, or the page cannot be written.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> import mechatlas as ma
        >>> here = Path(tempfile.mkdtemp())
        >>> x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> store = ma.collect(network, x, ["1"], here / "store")
        >>> sae = ma.Autoencoder(d_in=8, n_latents=16, sparsity=ma.TopK(k=2))
        >>> sae = ma.train(sae, store.rows("1"), steps=50, batch_size=64)
        >>> page = ma.report(here / "atlas.html", stores=store, dictionaries={"1": sae},
        ...                  network=network, samples=x)
        >>> page.name
        'atlas.html'
    """
    out, folder = Path(out), None if folder is None else Path(folder)
    if folder is not None and out.is_dir() and not folder.is_dir():
        deprecated.warn("ma.report(folder, out)", "ma.report(out, folder)")
        out, folder = folder, out
    module = network if isinstance(network, nn.Module) else None
    named = () if network is None or isinstance(network, nn.Module) else network
    trusted = TrustConfig(network=(named,) if isinstance(named, str) else tuple(named), trust=trust)
    if (module is None) != (samples is None):
        raise InputError("Give `network` and `samples` together: examples need both.")
    opened = None if module is None else OpenedNetwork(module, open_samples(samples, module))
    runs: list[Run] = []
    problems: dict[str, str] = {}
    if folder is not None:
        found = find_runs(folder, visualize=visualize, trust=trusted)
        named_here = {Path(name).resolve() for name in dictionaries or {}}
        runs, problems = found.all, {
            name: problem for name, problem in found.problems.items()
            if (folder / name).resolve() not in named_here
        }  # fmt: skip
    given = [stores] if isinstance(stores, Store | str | Path) else list(stores)
    stored = [each if isinstance(each, Store) else Store(each) for each in given]
    there = {run.folder.resolve() for run in runs}
    new = [store.root for store in stored if store.root.resolve() not in there]
    runs += [read_run(root, root.name) for root in new]
    known = {
        name: _dictionary_run(name, each, stored, module)
        for name, each in (dictionaries or {}).items()
    }
    runs += known.values()
    for name, result in (results or {}).items():
        runs += _result_runs(name, result, known)
    read = read_feature_labels(Path(labels)) if labels is not None else None
    page = Runs(folder or Path(), runs, visualize, trusted, problems, opened, read)
    return write_page(page, out, on_progress=on_progress, on_problem=on_problem)


def _dictionary_run(
    name: str, value: Any, stores: Sequence[Store], network: nn.Module | None
) -> MemoryRun:
    """Make a run of a dictionary, and find its site and its store."""
    given, dictionary = value if isinstance(value, tuple) else (None, value)
    names = [name for name in ends_of(dictionary).reads if name not in UNNAMED_SITES]
    if isinstance(given, str | Site):
        names = [str(given)]
    elif given is not None:
        names = [str(each) for each in given]
    wanted = [[each] for each in names] or [[name]]
    if len(wanted) == 1 and given is None:
        wanted[0] = [name, *names]
    found, store = [each[0] for each in wanted], None
    for each in stores:
        there = [_site_in(each, spellings, network) for spellings in wanted]
        if all(there):
            found, store = [str(site) for site in there], each
    site = found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
    if store is None and stores:
        sites = ", ".join(site for each in stores for site in each.sites)
        if len(found) > 1:
            raise InputError(
                f"The dictionary {name!r} {in_words(dictionary)}, and no store has them all; there "
                f"are {sites}. Give those of a store in their place: "
                f'dictionaries={{"{name}": (["SITE", "SITE"], dictionary)}}.'
            )
        raise InputError(
            f"No store has the site {site!r} of the dictionary {name!r}; there are {sites}. "
            f"Name the dictionary by its site, or give (site, dictionary): "
            f'dictionaries={{"{name}": ("SITE", dictionary)}}.'
        )
    history = getattr(dictionary, "history", None)
    measured = {} if history is None else as_plain(history)
    last = {key: values[-1] for key, values in measured.items() if values}
    sizes = {key: getattr(dictionary, key, None) for key in ("n_latents", "d_in")}
    facts: dict[str, Any] = {"site": site, "complete": True}
    if len(found) > 1:
        facts["reads"] = found
    if store is not None:
        facts |= {"store": str(store.root.resolve()), "parents": {"store": store.digest}}
    return MemoryRun(
        folder=Path(name),
        name=name,
        manifest={"schema": SCHEMA, "kind": DICTIONARY, **facts},
        result={**sizes, **last, "steps": last.get("step")},
        contents={} if history is None else {HISTORY: measured},
        returned=dictionary,
    )


def _site_in(store: Store, spellings: list[str], network: nn.Module | None) -> str | None:
    """Site of a store in one of some spellings, the first that fits; None if it has none."""
    every = [*spellings, *_own_spellings(network, spellings)]
    return next(
        (s for s in every if s in store.shapes or s.partition("/")[0] in store.shapes), None
    )


def _own_spellings(network: nn.Module | None, spellings: Sequence[str]) -> Iterator[str]:
    """Give the network's own spelling of sites that are named as in another library."""
    for spelling in spellings if network is not None else ():
        with contextlib.suppress(SiteError):
            assert network is not None
            yield str(as_site(network, spelling))


def _result_runs(name: Any, value: Any, known: Mapping[str, MemoryRun]) -> list[Run]:
    """Make the runs of the results under one name."""
    names = (name,) if isinstance(name, str) else tuple(map(str, name))
    results = list(value) if isinstance(value, list | tuple) else [value]
    chains = [[r for r in results if isinstance(r, Match | Tracks)],
              [r for r in results if isinstance(r, Circuit | DirectCircuit)]]  # fmt: skip
    alone = [[r] for r in results if not isinstance(r, Match | Tracks | Circuit | DirectCircuit)]
    return [memory_run(names, part, known) for part in [*chains, *alone] if part]


def memory_run(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun]
) -> MemoryRun:
    """Make a run of one result, or of the results of a chain of dictionaries.

    Args:
        names: Names of the dictionaries.
        results: What the analysis returned.
        known: Runs of the dictionaries, by name; nothing is known of them if there are none.

    Raises:
        InputError: A name is not that of a dictionary, or no chapter draws such a result.
    """
    kind = next((k for k in DESCRIBED if isinstance(results[0], k)), None)
    if kind is None:
        raise InputError(
            f"No chapter of the page draws a {type(results[0]).__name__}; chapters draw "
            f"{', '.join(each.__name__ for each in DESCRIBED)}."
        )
    describe, command, of_dictionaries = DESCRIBED[kind]
    if of_dictionaries and known and (unknown := [name for name in names if name not in known]):
        raise InputError(
            f"A {kind.__name__} is under {', '.join(map(repr, unknown))}, which is not the "
            f"name of a dictionary; there are {', '.join(map(repr, known))}."
        )
    contents = _Contents()
    result = describe(names, results, known, contents)
    return MemoryRun(
        folder=Path(" ".join(names)),
        name=" \N{RIGHTWARDS ARROW} ".join(names),
        manifest={
            "schema": SCHEMA, "kind": command.KIND, "complete": True, "dictionary": names[0],
            "dictionaries": list(names), **contents.manifest,
        },
        result=as_plain(result),
        contents=contents.files,
        returned=result,
    )  # fmt: skip


def _site(name: str, known: Mapping[str, MemoryRun]) -> str:
    return str(known[name].manifest["site"]) if name in known else name


def _refuse_other_lengths(names: Sequence[str], results: Sequence[Any]) -> None:
    """Refuse a chain that has not one result for each two consecutive dictionaries."""
    if len(results) != len(names) - 1:
        raise InputError(
            f"{len(results)} results are under {len(names)} names, {', '.join(map(repr, names))}: "
            "give one for each two dictionaries that follow one another, under the names of both, "
            'as {("a", "b"): result}.'
        )


def _describe_matches(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> match.MatchResult:
    matches = [each for each in results if isinstance(each, Match)]
    tracks = next((each for each in results if isinstance(each, Tracks)), None)
    _refuse_other_lengths(names, matches)
    for each, name, other in zip(matches, names, names[1:], strict=False):
        _refuse_other_sizes(each.unit_a, name, known)
        _refuse_other_sizes(each.unit_b, other, known)
    out.table(MATCHES, matches_table(matches))
    curves = None if tracks is None else survival(tracks, matches, fdr=matches[0].fdr)
    if tracks is not None and curves is not None:
        out.table(TRACKS, tracks_table(tracks, curves))
    return match.MatchResult(
        cost="",
        fdr=matches[0].fdr,
        dictionaries=list(names),
        pairs=[match.pair_result(m, *names[k : k + 2]) for k, m in enumerate(matches)],
        tracks=tracks and curves and match.tracks_result(tracks, curves),
    )


def _refuse_other_sizes(rows: Any, name: str, known: Mapping[str, MemoryRun]) -> None:
    """Refuse a result whose number of latents is not that of the dictionary it names."""
    n = known[name].result.get("n_latents") if name in known else None
    if n is not None and len(rows) != n:
        raise InputError(
            f"A result for {len(rows)} latents is under {name!r}, a dictionary of {n}. Are the "
            "names in the order of the dictionaries?"
        )


def _describe_circuits(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> CircuitResult:
    _refuse_other_lengths(names, results)
    return describe_circuits(results, names, out)


def _describe_branches(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> branches.BranchesResult:
    tested: Specialization = results[0]
    if tested.test is None:
        raise InputError("The Specialization has no control; take the result of `ma.branches`.")
    _refuse_other_sizes(tested.share, names[0], known)
    out.table(FEATURES, branches.features_table(tested))
    return branches.summarize(tested, tested.test, site=_site(names[0], known))


def _describe_symmetry(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> symmetry.SymmetryResult:
    found: Symmetry = results[0]
    _refuse_other_sizes(found.stabilizers, names[0], known)
    n, group = len(found.stabilizers), found.group
    out.facts(group=symmetry.group_facts(group, "", found.class_names))
    atoms = found.stabilizer_function
    if names[0] in known:
        atoms = known[names[0]].returned.W_dec.detach().float().cpu().numpy()
    write_features(out, found, atoms, np.zeros(n, np.int64), {})
    unknown: dict[str, float | None] = dict.fromkeys(PREDICTORS)
    return symmetry.SymmetryResult(
        **symmetry.count_classes(found),
        artifacts=ArtifactsResult(missing="The rows of the dictionary are not known."),
        discoveries_shuffled=None,
        agreement=None,
        group=symmetry.GroupDescription(name=group.name, order=group.order, action=""),
        site=_site(names[0], known),
        blocks="",
        rows=0,
        rows_of_halves=[],
        held_out_rows=0,
        r2={key: [None] * group.order for key in unknown},
        r2_mean=unknown,
        interventions=InterventionsResult(missing="The network was not run."),
    )


def _describe_basis(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> basis.BasisResult:
    result: InteractionBasis = results[0]
    out.json(SPECTRA, spectra_of(result))
    return basis.summarize(result, names[0], result.layers[0].n_rows)


def _describe_proof(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> prove.ProveResult:
    return prove.describe_bound(results[0], out)


def _describe_evaluation(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> evaluate.EvaluateResult:
    return evaluate.EvaluateResult(site=_site(names[0], known), **vars(results[0]))


def _describe_effects(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> effects.EffectsResult:
    found: LogitEffects | Attribution = results[0]
    site = _site(names[0], known)
    if isinstance(found, LogitEffects):
        out.table(LOGITS, effects.logit_columns(found))
        return effects.EffectsResult(**effects.logit_counts(found, effects.FDR), site=site)
    _refuse_other_sizes(found.latents, names[0], known)
    places = [f"{position} " for position in range(found.values.shape[1])]
    answer = effects.describe_attribution(found, "first sample", "output", places)
    return effects.EffectsResult(site=site, attributions=[answer])


def _describe_flow(
    names: Sequence[str], results: Sequence[Any], known: Mapping[str, MemoryRun], out: _Contents
) -> flow.FlowResult:
    found: FeatureFlow = results[0]
    if len(found.sizes) != len(names):
        raise InputError(
            f"A FeatureFlow of {len(found.sizes)} layers is under {len(names)} names, "
            f"{', '.join(map(repr, names))}: give the names of all dictionaries of the stream."
        )
    between = {
        kind: [
            [f"{kind} {link.number} before {name}" for link in links if link.kind == kind]
            for links, name in zip(found.modules, names[1:], strict=True)
        ]
        for kind in KINDS
    }
    modules = [name for kind in KINDS for step in between[kind] for name in step]
    out.facts(modules=modules)
    out.table(FLOWS, flow.flow_columns(found, between, modules))
    return flow.describe_flow(found, names, between, modules)


DESCRIBED: dict[type, tuple[Any, Any, bool]] = {
    Match: (_describe_matches, match, True),
    Tracks: (_describe_matches, match, True),
    FeatureFlow: (_describe_flow, flow, True),
    Circuit: (_describe_circuits, circuit, True),
    DirectCircuit: (_describe_circuits, circuit, True),
    Specialization: (_describe_branches, branches, True),
    Symmetry: (_describe_symmetry, symmetry, True),
    NetworkEvaluation: (_describe_evaluation, evaluate, True),
    LogitEffects: (_describe_effects, effects, True),
    Attribution: (_describe_effects, effects, True),
    InteractionBasis: (_describe_basis, basis, False),
    AccuracyBound: (_describe_proof, prove, False),
}
"""Type of a result -> how it is described, its command, whether its name is of a dictionary."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Chapter of the page on one result, which a notebook shows."""

    page: str = dataclasses.field(repr=False)
    """HTML of the page."""
    title: str
    """Title of the chapter."""

    def save(self, path: Path | str) -> Path:
        """Write the chapter as a page of its own and return its path.

        Raises:
            DiskError: It cannot be written.
        """
        write(Path(path), self.page.encode())
        return Path(path)

    def _repr_html_(self) -> str:
        """Frame the page for a notebook."""
        return (
            f'<iframe title="{html.escape(self.title)}" style="border: 0; width: 100%; height: '
            f'{HEIGHT}px" srcdoc="{html.escape(self.page)}"></iframe>'
        )


def draw(result: Any, names: Sequence[str] = ()) -> Drawing:
    """Draw the chapter of the page on one result.

    Raises:
        InputError: No chapter draws such a result.
    """
    of_pair = isinstance(result, Match | Circuit | DirectCircuit)
    chosen = tuple(names) or (UNNAMED[1:] if of_pair else UNNAMED[:1])
    runs = Runs(Path(), [memory_run(chosen, [result], {})], 0, TrustConfig(), {})
    chapters = [each for each in make_chapters(runs) if each.name != "appendix"]
    refuse_nothing(runs, chapters)
    page = assemble(chapters[0].title, chapters, runs.problems)
    return Drawing(str(page), chapters[0].title)  # plain text: markup would be escaped twice
