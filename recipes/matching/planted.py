"""Power of matching on a dictionary like this: partners planted at known cosines.

    python recipes/matching/planted.py runs/branches/inception_mini/seed0/mixed3a

A second dictionary is made with the same spectrum: 60 % of its decoder rows are partners of rows of
the first at one cosine, the others are chance. Prints the share of partners that are matched at a
false match rate of 5 %, and the share of matched pairs that are wrong.

    python recipes/matching/planted.py runs/seed0/mixed3b runs/seed1/mixed4a --store runs/store

By codes on a paired store: a fifth of the second dictionary's codes are replaced by those that a
fifth of the first's latents have on noisy activations. Prints the share of these that are matched,
by the correlation with their partner, and how many matched pairs of either have another partner.
"""

import argparse
import functools
import itertools
from pathlib import Path

import numpy as np
import torch

import mechatlas as ma
from mechatlas.analysis.matching.codes import correlate, permute_samples, sample_block
from mechatlas.analysis.matching.folding import fold, unit_rows
from mechatlas.analysis.matching.nulls import NULLS, Null
from mechatlas.app.cli import run_script
from mechatlas.app.commands.match import CODES, ROWS
from mechatlas.app.match_quality import first_rows
from mechatlas.files import read_json

COSINES = 0.4, 0.5, 0.6, 0.7
PARTNERS = 0.6
REPLACED = 0.2
NOISES = 0.7, 1.5
"""Sizes of the noise on activations, in their standard deviations."""


def recovery(rows: np.ndarray, cosine: float, null: Null, seed: int) -> tuple[float, float]:
    """Share of planted partners that are matched, and share of matched pairs that are wrong."""
    random = np.random.default_rng([seed, 23])
    n = len(rows)
    noise, chance = (unit_rows(null(rows, random)) for _ in range(2))
    partner = random.random(n) < PARTNERS
    similar = cosine * rows + (1 - cosine**2) ** 0.5 * noise
    order = random.permutation(n)
    planted = unit_rows(np.where(partner[:, None], similar, chance))[order]
    result = ma.match(rows, planted, seed=seed)
    right = result.matched & partner & (order[result.columns] == np.arange(n))
    return right.sum() / partner.sum(), 1 - right.sum() / max(int(result.matched.sum()), 1)


def by_codes(paths: tuple[Path, Path], sites: tuple[str, str], store: ma.Store, seed: int) -> None:
    """Print how many partners planted among the codes of two dictionaries are matched."""
    random, generator = np.random.default_rng([seed, 29]), torch.Generator().manual_seed(seed)
    (x, samples), (y, _) = (first_rows(store.rows(site), CODES * ROWS) for site in sites)
    first, second = (ma.load(path) for path in paths)
    code = functools.partial(correlate, samples=samples)
    a, b = code(first, x), code(second, y)
    latents, places = (random.permutation(len(c))[: int(REPLACED * len(b))] for c in (a, b))
    planted = np.full(len(a), -1)
    planted[latents] = places
    null = functools.partial(permute_samples, block=sample_block(samples))
    print("| noise | correlation | planted | matched |\n|---|---|---|---|")
    for noise in NOISES:
        noisy = x + noise * x.std(dim=0) * torch.randn(x.shape, generator=generator)
        b[places] = code(first, noisy)[latents]
        result = ma.match(a, b, cost="codes", nulls=(null,), seed=seed)
        right = result.matched & (planted >= 0) & (result.columns == planted)
        correlation = np.einsum("nd,nd->n", a[latents], b[places])
        for low, high in itertools.pairwise((0, 0.1, 0.2, 0.3, 1.01)):
            here = (correlation >= low) & (correlation < high)
            share = right[latents][here].mean() if here.any() else float("nan")
            print(f"| {noise} | {low} to {min(high, 1)} | {here.sum()} | {share:.2f} |", flush=True)
        either = result.matched & ((planted >= 0) | np.isin(result.columns, places))
        print(f"with another partner: {(either & ~right).sum()} of {either.sum()}; "
              f"matched of all: {result.matched.sum()}", flush=True)  # fmt: skip


def main() -> None:
    """Plant, match, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dictionaries", type=Path, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="plant among codes on it")
    parser.add_argument("--sites", nargs=2, help="of the two dictionaries, if they do not say")
    options = parser.parse_args()
    if options.store:
        first, second = options.dictionaries
        sites = options.sites or [read_json(p / "manifest.json")["site"] for p in (first, second)]
        by_codes((first, second), tuple(sites), ma.Store(options.store), options.seed)
        return
    print("| dictionary | chance | cosine | partners matched | wrong |\n|---|---|---|---|---|")
    for path in options.dictionaries:
        rows = unit_rows(fold(ma.load(path)).decoder)
        for null in NULLS:
            for cosine in COSINES:
                matched, wrong = recovery(rows, cosine, null, options.seed)
                name = getattr(null, "__name__", "")
                print(
                    f"| {path.name} | {name} | {cosine} | {matched:.3f} | {wrong:.3f} |", flush=True
                )


if __name__ == "__main__":
    run_script(main)
