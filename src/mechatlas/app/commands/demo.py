"""The whole tour on bundled inputs, in about a minute and without network access."""

import dataclasses
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images
from mechatlas.analysis.interaction.results import InteractionConfig
from mechatlas.app import group_nets
from mechatlas.app.commands import basis as interact
from mechatlas.app.commands import match as matching
from mechatlas.app.commands import prove as proving
from mechatlas.app.commands import symmetry as symmetry_command
from mechatlas.app.commands import train as jobs
from mechatlas.app.commands.branches import BranchesConfig, specialise
from mechatlas.app.commands.circuit import CircuitConfig, circuit
from mechatlas.app.recipes import BasisConfig, CollectConfig, TrainConfig
from mechatlas.app.symmetry_folder import execute
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import write_json

SITES = ("mixed3b", "mixed4a")
FEW = "mixed3b_few"
"""A dictionary so small that its features are active often enough to know their symmetry."""


def run(out: Path) -> dict[str, Any]:
    """Collect, train, match, analyse, prove and report.

    Raises:
        UserError: `out` is not writable or holds something else.
    """
    started = time.perf_counter()
    source = "scikit-image" if find_spec("skimage") else "photos"
    collect = CollectConfig(
        network=Network(name="inception_mini"),
        sites=SITES,
        samples=Images(source=source, side=47, crops=32),
        collecting=StoreConfig(positions=Positions(per_sample=50), paired=True),
        out=out / "store",
    )
    stages = {"store": jobs.collect(collect)}
    for name, site, n_latents, k in (*((s, s, 1024, 16) for s in SITES), (FEW, SITES[0], 128, 8)):
        recipe = TrainConfig(
            store=collect.out,
            site=site,
            out=out / name,
            n_latents=n_latents,
            sparsity=TopK(k=k),
            steps=400,
            batch_size=512,
        )
        stages[name] = jobs.train(recipe)
    config = matching.MatchConfig(
        dictionaries=tuple(out / site for site in SITES),
        out=out / "match",
        cost="codes",  # the two sites have different widths
        store=collect.out,
        rows=2000,
    )
    stages["match"] = dataclasses.asdict(execute(matching, config))
    stages |= _look_inside(collect, out)
    stages["proof"] = _prove(out)
    stages["basis"] = interact.interact(
        BasisConfig(
            network=collect.network,
            layers=("classify:input", "classify"),
            samples=Images(source=source, side=31, crops=40),
            n_samples=320,
            how=InteractionConfig(kinds=("lib", "pca")),
            out=out / "basis",
        )
    )
    stages["page"] = jobs.report(out, out / "atlas.html")
    result = {**stages, "wall_seconds": round(time.perf_counter() - started, 1)}
    write_json(out / "result.json", result)
    return {"out": str(out), **result}


def _look_inside(collect: CollectConfig, out: Path) -> dict[str, Any]:
    """Branches, circuits and symmetry of what was trained.

    Raises:
        UserError: `out` is not writable or holds something else.
    """
    stages = {}
    stages["branches"] = specialise(
        BranchesConfig(dictionary=out / SITES[1], store=collect.out, out=out / "branches")
    )
    config = CircuitConfig(
        dictionaries=tuple(out / site for site in SITES),
        out=out / "circuit",
        samples=24,
        held_out=16,
        n_ablated=8,
        features=4,
        visualize_steps=0,
    )
    stages["circuit"] = dataclasses.asdict(circuit(config))
    posed = dataclasses.replace(
        collect,
        sites=SITES[:1],
        samples=dataclasses.replace(collect.samples, side=63, crops=12),
        collecting=StoreConfig(positions=Positions(per_sample=40)),
        group=PoseConfig(name="D4"),
        out=out / "posed",
    )
    stages["posed"] = jobs.collect(posed)
    config = symmetry_command.SymmetryConfig(
        dictionary=out / FEW, store=posed.out, out=out / "symmetry", interventions=0
    )
    stages["symmetry"] = dataclasses.asdict(execute(symmetry_command, config))
    return stages


def _prove(out: Path) -> dict[str, Any]:
    """Train a network on the table of S4 and prove how accurate it is.

    Raises:
        UserError: `out` is not writable or holds something else.
    """
    net = group_nets.GroupNetConfig(group="S4", steps=1200, batch_size=256, out=out / "s4_net")
    group_nets.train(net)
    proof = proving.ProveConfig(
        weights=net.out / group_nets.NET,
        table=net.out / group_nets.TABLE,
        out=out / "s4_proof",
        exact=True,
    )
    return dataclasses.asdict(proving.prove(proof))


def _in_words(result: dict[str, Any]) -> list[str]:
    """What was found about branches, circuits and symmetry."""
    branches, symmetry = result["branches"], result["symmetry"]
    edges = result["circuit"]["pairs"][0]
    return [
        f"{branches['site']}: {branches['specialised']} of {branches['tested']} features "
        "specialised to a branch at a false discovery rate of "
        f"{branches['rate']:.0%}",
        f"{edges['a']} -> {edges['b']}: weights of edges and ablations agree with rank "
        f"correlation {edges['agreement']['spearman']:.2f}, random pairs "
        f"{edges['agreement']['null']:.2f}",
        f"{FEW}: {symmetry['discoveries']} of {symmetry['n_features']} features have a "
        f"symmetry of the square at a false discovery rate of {symmetry['fdr']:.0%}, "
        f"{symmetry['discoveries_shuffled']} with shuffled pairing; "
        f"{symmetry['families']} families",
    ]


def in_words(result: dict[str, Any]) -> str:
    """What the tour found."""
    lines = [f"{result['store']['samples']} crops of photographs through inception_mini"]
    for site in SITES:
        r = result[site]
        lines.append(
            f"{site}: {r['n_latents']} latents, fvu {r['fvu']:.3f} held out, l0 {r['l0']:.1f}, "
            f"dead {r['dead_share']:.1%}"
        )
    proof = result["proof"]
    lines.append(
        f"S4 net: accuracy at least {proof['accuracy_bound']:.2%} proved, "
        f"{proof['accuracy_exact']:.2%} exact"
    )
    pair = result["match"]["pairs"][0]
    lines.append(
        f"{pair['a']} -> {pair['b']}: {pair['matched']} of {pair['n_a']} latents matched by "
        f"codes at a false match rate of {result['match']['fdr']:.0%}, gap {pair['gap']:.1e}"
    )
    lines += _in_words(result)
    head = result["basis"]["layers"][0]
    lines.append(
        f"{head['name']}: {head['edges_needed']} edges and {head['vectors_needed']} vectors of its "
        f"interaction basis give the same answers ({result['basis']['samples']} crops)"
    )
    lines.append(f"Done in {result['wall_seconds']:.0f} s.")
    lines.append(f"Page: {Path(result['page']['page']).resolve()}")
    return "\n".join(lines)
