"""Page of a whole decoder: every latent with contexts, tokens, origin and track; tracks steered.

    python recipes/language/run.py MODEL TEXTS --out runs/language
    python recipes/language/atlas.py MODEL runs/language --out atlas.html

Takes the dictionaries of `run.py`, its held-out rows, its evaluations and its matches, as far as
they are there. Dictionaries of what attention and MLPs add to the stream, in folders `attention9`,
`mlp9` and so on, say where features are born. Three tracks are steered, all layers at once and the
best layer alone, beside random directions; the measure is the mean log-probability of the tokens
that the last latent of the track raises most.
"""

import argparse
import itertools
import os
import re
from pathlib import Path
from typing import Any

import cattrs
import torch

import mechatlas as ma
from mechatlas.activations.networks import Network
from mechatlas.analysis.evaluation.results import NetworkEvaluation
from mechatlas.app.run_folder import as_plain
from mechatlas.files import read_json, write_json

STEERED = 3
"""Tracks that are steered."""
RAISED = 5
"""Tokens whose mean log-probability measures a steered track."""


def settings() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder or .gguf file of the model")
    parser.add_argument("run", type=Path, help="folder of run.py")
    parser.add_argument("--out", type=Path, default=Path("atlas.html"))
    parser.add_argument("--layers", type=int, nargs="*", help="layers to show; by default all")
    parser.add_argument(
        "--n-random", type=int, default=10_000, help="random directions of the null"
    )
    parser.add_argument("--scale", type=float, default=30.0, help="activation added in steering")
    return parser.parse_args()


def numbered(kind: str) -> dict[int, Any]:
    """Open the dictionaries in folders of a kind, by layer."""
    found = [(re.fullmatch(rf"{kind}(\d+)", path.name), path) for path in Path().iterdir()]
    return {int(name[1]): ma.load(path) for name, path in found if name is not None}


def flow_of(layers: list[int], stream: dict[int, Any]) -> Any:
    """Follow features through the layers, with the modules in between that are there."""
    between = {}
    for kind in ("attention", "mlp"):
        modules = numbered(kind)
        steps = [
            [modules[m] for m in range(a + 1, b + 1) if m in modules]
            for a, b in itertools.pairwise(layers)
        ]
        between[kind] = steps if any(steps) else []
    return ma.feature_flow([stream[layer] for layer in layers], **between)


def steer(
    network: Any, tokens: Any, layers: list[int], stream: dict[int, Any], flow: Any, effects: Any,
    scale: float,
) -> list[Any]:  # fmt: skip
    """Steer the longest tracks that end in a latent which raises some token; one entry each."""
    compared = []
    for layer, latent in flow.longest(200):
        found = effects.get(layers[layer])
        if found is None or len(compared) == STEERED or found.q_top[latent] > 0.5:
            continue
        raised = found.top_tokens[latent][:RAISED].tolist()
        points = [
            (stream[layers[p.layer]], p.latent, f"model.layers.{layers[p.layer]}")
            for p in flow.track(layer, latent)
        ]
        result = ma.compare_steering(
            network, points, tokens, lambda y, ids=raised: y.log_softmax(-1)[..., ids].mean(), scale
        )
        with ma.steer_track(network, points, scale):
            written = network.generate(tokens[:1, :12], max_new_tokens=16, do_sample=False)
        words = [found.words[i] for i in raised] if found.words else raised
        text = "".join(network.input.decode(written[0].tolist()))
        print(f"track to layer {layers[layer]}, latent {latent}, raises {words}: {text!r}")
        print(result, flush=True)
        compared.append({"layer": layers[layer], "latent": latent, "tokens": words,
                         "text": text, "comparison": as_plain(result)})  # fmt: skip
    return compared


def main() -> None:
    """Make the page."""
    given = settings()
    model, out = given.model.resolve(), given.out.resolve()
    os.chdir(given.run)  # names of folders are then those of the dictionaries
    network = ma.load_network(
        Network(name="transformer", arguments={"path": str(model), "dtype": "bfloat16"})
    )
    stream = numbered("layer")
    layers = sorted(given.layers or stream)
    store = ma.Store("held_out_rows")
    samples = ma.open_samples(cattrs.structure(store.manifest["recipe"]["samples"], ma.Texts),
                              network)  # fmt: skip
    tokens = samples.stack([samples.read(i) for i in range(8)])
    effects: dict[int, Any] = {}
    results: dict[Any, Any] = {}
    for layer in layers:
        effects[layer] = ma.logit_effects(
            network, stream[layer], tokens=tokens, site=f"model.layers.{layer}",
            n_random=given.n_random,
        )  # fmt: skip
        print(f"layer {layer}: {effects[layer]}", flush=True)
        results[f"layer{layer}"] = [effects[layer]]
        worth = Path(f"layer{layer}/worth.json")
        if worth.is_file():
            values = cattrs.structure(read_json(worth), NetworkEvaluation)
            results[f"layer{layer}"].append(values)
    if len(layers) > 1:
        flow = flow_of(layers, stream)
        print(flow, flush=True)
        results[tuple(f"layer{layer}" for layer in layers)] = flow
        steered = steer(network, tokens, layers, stream, flow, effects, given.scale)
        write_json(out.with_suffix(".steering.json"), steered)
    page = ma.report(
        out,
        "match" if Path("match/result.json").is_file() and not given.layers else None,
        stores=store,
        dictionaries={
            f"layer{layer}": (f"model.layers.{layer}", stream[layer]) for layer in layers
        },
        results=results,
    )
    print(page, f"{page.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
