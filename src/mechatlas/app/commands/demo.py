"""Take the whole tour on bundled inputs, in about a minute and without network access.

mechatlas demo --out runs/demo
"""

import dataclasses
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.positions import Positions
from mechatlas.analysis.interaction.results import InteractionConfig
from mechatlas.app.commands import (
    basis,
    branches,
    circuit,
    group_net,
    match,
    prove,
    report,
    symmetry,
)
from mechatlas.app.commands.collect import CollectConfig, CollectResult
from mechatlas.app.commands.train import TrainConfig, TrainResult
from mechatlas.app.run_folder import RESULT, as_plain, execute
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import write_json

SITES = ("fire6", "fire7")
SEEDS = "fire7_seed1"
"""Second dictionary of the last site, from another seed."""
POSED = "fire4"
FEW = "fire4_few"
"""Small dictionary, whose features are active often enough to know their symmetry."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Take the whole tour on bundled inputs: collect, train, analyze, prove, draw the page."""

    out: Path
    """Folder for the runs and the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Result of every command of the tour."""

    out: str
    """Folder of the runs."""
    store: CollectResult
    dictionaries: dict[str, TrainResult]
    seeds: match.MatchResult
    match: match.MatchResult
    branches: Any
    circuit: circuit.CircuitResult
    posed: CollectResult
    symmetry: symmetry.SymmetryResult
    proof: prove.ProveResult
    basis: basis.BasisResult
    page: report.ReportResult
    wall_seconds: float
    """Wall seconds of the whole tour."""


def run(config: DemoConfig) -> DemoResult:
    """Collect, train, match, analyze, prove and report.

    Raises:
        UserError: `out` is not writable or holds something else.
    """
    started, out = time.perf_counter(), config.out
    collect = CollectConfig(
        network=Network(name="squeezenet"),
        sites=(POSED, *SITES),
        samples=_photographs(side=111, crops=40),
        storage=StoreConfig(positions=Positions(per_sample=60), paired=True),
        out=out / "store",
    )
    posed = dataclasses.replace(
        collect,
        sites=(POSED,),
        samples=_photographs(side=79, crops=24),
        storage=StoreConfig(positions=Positions(per_sample=40)),
        group=PoseConfig(name="D4"),
        out=out / "posed",
    )
    sites = tuple(out / site for site in SITES)
    seeds = match.MatchConfig(
        dictionaries=(sites[1], out / SEEDS), out=out / "seeds", store=collect.out, samples=0
    )
    layers = match.MatchConfig(
        dictionaries=sites, out=out / "match", cost="codes", store=collect.out, rows=2000, samples=0
    )
    few = symmetry.SymmetryConfig(
        dictionary=out / FEW, store=posed.out, out=out / "symmetry", interventions=0
    )
    whole = branches.BranchesConfig(
        dictionary=sites[1], store=collect.out, match=layers.out, out=out / "branches"
    )
    result = DemoResult(
        out=str(out),
        store=execute(collect),
        dictionaries=_train(collect, out),
        seeds=execute(seeds),
        match=execute(layers),
        branches=execute(whole),
        circuit=execute(_circuit(out)),
        posed=execute(posed),
        symmetry=execute(few),
        proof=_prove(out),
        basis=execute(_basis(out)),
        page=execute(report.ReportConfig(folder=out, out=out / "atlas.html")),
        wall_seconds=round(time.perf_counter() - started, 1),
    )
    write_json(out / RESULT, as_plain(result))
    return result


def _circuit(out: Path) -> circuit.CircuitConfig:
    return circuit.CircuitConfig(
        dictionaries=tuple(out / site for site in SITES),
        out=out / "circuit",
        samples=24,
        held_out=16,
        n_ablated=16,
        features=4,
        visualize_steps=0,
    )


def _basis(out: Path) -> basis.BasisConfig:
    return basis.BasisConfig(
        network=Network(name="inception_mini"),
        layers=("classify:input", "classify"),
        samples=_photographs(side=31, crops=40),
        n_samples=320,
        settings=InteractionConfig(kinds=("lib", "pca")),
        out=out / "basis",
    )


def _photographs(*, side: int, crops: int) -> Images:
    source = "scikit-image" if find_spec("skimage") else "photos"
    return Images(source=source, side=side, crops=crops)


def _train(collect: CollectConfig, out: Path) -> dict[str, TrainResult]:
    """Train a dictionary for each site, a second one from another seed, and a small one."""
    whole = TrainConfig(
        store=collect.out,
        n_latents=512,
        sparsity=TopK(k=16),
        revival=AuxK(),
        steps=1500,
        batch_size=512,
    )
    few = dataclasses.replace(whole, n_latents=96, sparsity=TopK(k=8), steps=1000)
    configs = [dataclasses.replace(whole, site=site, out=out / site) for site in SITES]
    configs.append(dataclasses.replace(whole, site=SITES[1], seed=1, out=out / SEEDS))
    configs.append(dataclasses.replace(few, site=POSED, out=out / FEW))
    return {config.out.name: execute(config) for config in configs}


def _prove(out: Path) -> prove.ProveResult:
    """Train a network on the table of S4 and prove how accurate it is."""
    net = group_net.GroupNetConfig(group="S4", steps=1200, batch_size=256, out=out / "s4_net")
    execute(net)
    proof = prove.ProveConfig(
        weights=net.out / group_net.NET,
        table=net.out / group_net.TABLE,
        out=out / "s4_proof",
        exact=True,
    )
    return execute(proof)


def in_words(result: DemoResult) -> str:
    """Findings of the tour, a line each."""
    lines = [f"{result.store.samples} crops of photographs through SqueezeNet"]
    for name, trained in result.dictionaries.items():
        lines.append(
            f"{name}: {trained.n_latents} latents, fvu {trained.fvu:.3f} held out, "
            f"l0 {trained.l0:.1f}, dead {trained.dead_share:.1%}"
        )
    lines.append(
        f"S4 net: accuracy at least {result.proof.accuracy_bound:.2%} proved, "
        f"{result.proof.accuracy_exact:.2%} exact"
    )
    commands = (match, match, branches, circuit, symmetry, basis)
    parts = (result.seeds, result.match, result.branches, result.circuit, result.symmetry,
             result.basis)  # fmt: skip
    for command, part in zip(commands, parts, strict=True):
        lines += command.in_words(part).splitlines()[:-1]  # without the folder
    lines.append(f"Done in {result.wall_seconds:.0f} s.")
    lines.append(f"Page: {Path(result.page.page).resolve()}")
    return "\n".join(lines)
