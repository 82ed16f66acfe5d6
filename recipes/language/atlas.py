"""Page of a whole decoder: every latent with contexts, tokens, origin, track and circuit.

    python recipes/language/run.py MODEL TEXTS --out runs/language
    python recipes/language/run.py MODEL TEXTS --out runs/language --layers 11 --train-only
    python recipes/language/run.py MODEL TEXTS --out runs/language --layers 11 12 13 14 \
        --train-only --kinds attention mlp --n-latents 2304 --steps 800 --tokens 440000
    python recipes/language/atlas.py runs/language --out atlas.html

Takes the dictionaries of `run.py`, its evaluations and its matches, as far as they are there, and
leaves a result for every claim of the page in the same folder: `effects26` and so on, `flow`, and
`circuit` for layers that follow one another. Dictionaries of attention and MLPs say where features
are born. Three tracks are steered, all layers at once and the best layer alone, beside random
directions (`steering.json`); the measure is the mean log-probability of the tokens that the last
latent of the track raises most. What is there is not made again.
"""

import argparse
import dataclasses
import itertools
import os
import re
from pathlib import Path
from typing import Any

import cattrs
import torch

import mechatlas as ma
from mechatlas.activations.positions import Positions
from mechatlas.analysis.evaluation.results import NetworkEvaluation
from mechatlas.app.cli import run_script
from mechatlas.app.commands.circuit import CircuitConfig
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.effects import (
    EffectsConfig,
    EffectsResult,
    logit_columns,
    logit_counts,
)
from mechatlas.app.commands.flow import FlowConfig, FlowResult
from mechatlas.app.inputs import open_network
from mechatlas.app.recipes import TrustConfig, from_dict
from mechatlas.app.report.runs import read_run
from mechatlas.app.run_folder import (
    CIRCUIT,
    EFFECTS,
    FLOW,
    LOGITS,
    STORE,
    RunFolder,
    as_plain,
    execute,
    read_result,
)
from mechatlas.files import read_json, write_json

SITES = {"layer": "model.layers.{}", "attention": "model.layers.{}.self_attn",
         "mlp": "model.layers.{}.mlp"}  # fmt: skip
"""Sites of each kind of dictionary, by layer."""
STEERED = 3
"""Tracks that are steered."""
RAISED = 5
"""Tokens whose mean log-probability measures a steered track."""


def settings() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of run.py")
    parser.add_argument("--out", type=Path, default=Path("atlas.html"))
    parser.add_argument("--features", type=int, default=20, help="features with a circuit")
    parser.add_argument("--scale", type=float, default=30.0, help="activation added in steering")
    return parser.parse_args()


def dictionaries(kind: str, run: Path) -> dict[int, Path]:
    """Find the folders of a kind of dictionary, by layer."""
    found = {re.fullmatch(rf"{kind}(\d+)", path.name): path for path in run.iterdir()}
    return dict(sorted((int(name[1]), path) for name, path in found.items() if name is not None))


def made(config: Any, kind: str) -> Any:
    """Run a command whose result is not there yet, and read its result."""
    if not (config.out / "result.json").is_file():
        execute(config)
    return read_result(config.out, kind)


def longest_chain(layers: list[int]) -> list[int]:
    """Find the longest run of layers that follow one another."""
    chains = itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    return max(([layer for _, layer in chain] for _, chain in chains), key=len)


def steer(
    network: Any, samples: Any, flow: FlowResult, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Steer long tracks that end in a latent which surely raises some token; one entry each."""
    tokens = samples.stack([samples.read(i) for i in range(4)])
    tables = {
        name: read_run(Path(f"effects{name.removeprefix('layer')}"), name).table(LOGITS)
        for name in {track[-1].dictionary for track in flow.tracks}
    }
    ends = [(tables[track[-1].dictionary], track[-1].latent, track) for track in flow.tracks]
    ends.sort(key=lambda end: float(end[0]["q_top"][end[1]]))
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    found = []
    for table, latent, track in ends[:STEERED]:
        raised, words = table["top_tokens"][latent][:RAISED], table["top_words"][latent][:RAISED]
        points = [
            (
                ma.load(p.dictionary),
                p.latent,
                SITES["layer"].format(p.dictionary.removeprefix("layer")),
            )
            for p in track
        ]
        result = ma.compare_steering(
            network, points, tokens,
            lambda y, ids=raised: y.log_softmax(-1)[..., ids].mean(), given.scale,
        )  # fmt: skip
        best = max(range(len(points)), key=lambda k: abs(result.single[k].change))
        texts = {"as it is": network.generate(tokens[:1, :12], **options)}
        for name, chosen in (("track", points), (result.single[best].way, [points[best]])):
            with ma.steer_track(network, chosen, given.scale):
                texts[name] = network.generate(tokens[:1, :12], **options)
        written = {
            way: "".join(network.input.decode(ids[0].tolist())) for way, ids in texts.items()
        }
        print(f"{track[-1].dictionary}/{latent}, q {table['q_top'][latent]:.3f}, raises {words}")
        print("\n".join(f"  {way}: {text!r}" for way, text in written.items()))
        print(result, flush=True)
        found.append({
            "track": as_plain(track), "tokens": words, "q": float(table["q_top"][latent]),
            "texts": written, "comparison": as_plain(result),
        })  # fmt: skip
    return found


def open_store(sites: list[str], given: argparse.Namespace) -> ma.Store:
    """Open the held-out rows of `run.py`; with more sites than it has, collect those of all."""
    store = ma.Store(given.run / "held_out_rows")
    if set(sites) <= set(store.sites):
        return store
    recipe = from_dict(store.manifest["recipe"], CollectConfig, str(store.root))
    positions = Positions(per_sample=24)
    config = CollectConfig(
        network=recipe.network,
        sites=tuple(sites),
        samples=dataclasses.replace(recipe.samples, source=Path(recipe.samples.source).resolve()),
        storage=ma.StoreConfig(positions=positions, paired=True, held_out=0.3, batch_size=16),
        out=given.run / "atlas_rows",
    )
    made(config, STORE)
    return ma.Store(config.out)


def logits(network: Any, path: Path, site: str, tokens: Any, store: ma.Store) -> EffectsResult:
    """Find the tokens that each latent raises and lowers, as `mechatlas effects` does."""
    config = EffectsConfig(
        dictionary=path, site=site, store=store.root, attribute=0,
        out=Path(path.name.replace("layer", "effects")),
    )  # fmt: skip
    if not (config.out / "result.json").is_file():
        with RunFolder(config.out, EFFECTS, config) as folder:
            found = ma.logit_effects(network, ma.load(path), tokens=tokens, site=site)
            folder.facts(site=site, dictionary=str(path.resolve()))
            folder.table(LOGITS, logit_columns(found))
            folder.finish(EffectsResult(**logit_counts(found, config.fdr), site=site))
    return read_result(config.out, EFFECTS)


def main() -> None:
    """Make what is not there yet, and the page."""
    given = settings()
    given.run, out = given.run.resolve(), given.out.resolve()
    found = {kind: dictionaries(kind, given.run) for kind in SITES}
    sites = {path: SITES[kind].format(n) for kind in SITES for n, path in found[kind].items()}
    store = open_store(list(sites.values()), given)
    network, samples = open_network(store, TrustConfig())
    os.chdir(given.run)  # names of folders are then those of the dictionaries
    stream, results = found["layer"], {}
    tokens = samples.stack([samples.read(i) for i in range(32)])
    for n, path in stream.items():
        effects = logits(network, path, sites[path], tokens, store)
        print(f"layer {n}: {effects.n_raising} raise, {effects.n_lowering} lower", flush=True)
        if (path / "worth.json").is_file():
            results[path.name] = cattrs.structure(read_json(path / "worth.json"), NetworkEvaluation)
    first, last = min(stream), max(stream)
    attention, mlp = (
        tuple(path for n, path in found[kind].items() if first < n <= last)
        for kind in ("attention", "mlp")
    )
    paths = [*stream.values(), *attention, *mlp]
    flow = made(
        FlowConfig(
            dictionaries=tuple(stream.values()), attention=attention, mlp=mlp,
            sites=tuple(sites[path] for path in paths), out=Path("flow"),
        ),
        FLOW,
    )  # fmt: skip
    for step in flow.steps:
        print(step.a, step.b, step.counts, step.births, step.deaths, flush=True)
    if len(chain := longest_chain(list(stream))) > 1:
        circuit = made(
            CircuitConfig(
                dictionaries=tuple(stream[n] for n in chain),
                sites=tuple(sites[stream[n]] for n in chain),
                store=store.root, features=given.features, visualize_steps=0, out=Path("circuit"),
            ),
            CIRCUIT,
        )  # fmt: skip
        print(*circuit.pairs, sep="\n", flush=True)
    if not Path("steering.json").is_file():
        write_json(Path("steering.json"), steer(network, samples, flow, given))
    page = ma.report(
        out,
        ".",
        stores=store,
        dictionaries={path.name: (site, ma.load(path)) for path, site in sites.items()},
        results=results,
        network=network,
        samples=samples,
    )
    print(page, f"{page.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_script(main)
