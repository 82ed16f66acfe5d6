"""What could be found in a dictionary like this: partners planted at known cosines.

    python recipes/matching/planted.py runs/branches/inception_mini/seed0/mixed3a

A second dictionary is made in the same spectrum: 60 % of its decoder rows are partners of rows of
the first at one cosine, the others are chance. Prints which share of the partners stands at a false
match rate of 5 %, and which share of what stands is wrong.

    python recipes/matching/planted.py runs/seed0/mixed3b runs/seed1/mixed4a --store runs/store

By codes on a paired store: a fifth of the second dictionary's codes are replaced by those that a
fifth of the first's latents have on noisy activations. Prints which share of these stands, by the
correlation with their partner, and which share of what stands of both has another partner.
"""

import argparse
import functools
import itertools
from pathlib import Path

import numpy as np
import torch

import mechatlas as ma
from mechatlas.analysis.matching.codes import correlate, reordered, together
from mechatlas.analysis.matching.folding import fold, unit_rows
from mechatlas.analysis.matching.nulls import NULLS, Null
from mechatlas.app.commands.match import CODES, ROWS, first_rows, site_of

COSINES = 0.4, 0.5, 0.6, 0.7
PARTNERS = 0.6
REPLACED = 0.2
NOISES = 0.7, 1.5
"""Of activations, in their standard deviations."""


def found(rows: np.ndarray, cosine: float, null: Null, seed: int) -> tuple[float, float]:
    """Share of planted partners that stand, and share of what stands that is wrong."""
    random = np.random.default_rng([seed, 23])
    n = len(rows)
    noise, chance = (unit_rows(null(rows, random)) for _ in range(2))
    partner = random.random(n) < PARTNERS
    alike = cosine * rows + (1 - cosine**2) ** 0.5 * noise
    order = random.permutation(n)
    one = ma.match(rows, unit_rows(np.where(partner[:, None], alike, chance))[order], seed=seed)
    right = one.matched & partner & (order[one.columns] == np.arange(n))
    return right.sum() / partner.sum(), 1 - right.sum() / max(int(one.matched.sum()), 1)


def by_codes(paths: tuple[Path, Path], store: ma.Store, seed: int) -> None:
    """Print what stands of partners planted among the codes of two dictionaries."""
    random, generator = np.random.default_rng([seed, 29]), torch.Generator().manual_seed(seed)
    (x, samples), (y, _) = (first_rows(store.rows(site_of(p)), CODES * ROWS) for p in paths)
    one, other = (ma.load(path) for path in paths)
    code = functools.partial(correlate, samples=samples)
    a, b = code(one, x), code(other, y)
    latents, places = (random.permutation(len(c))[: int(REPLACED * len(b))] for c in (a, b))
    planted = np.full(len(a), -1)
    planted[latents] = places
    null = functools.partial(reordered, together=together(samples))
    print("| noise | correlation | planted | stand |\n|---|---|---|---|")
    for noise in NOISES:
        noisy = x + noise * x.std(dim=0) * torch.randn(x.shape, generator=generator)
        b[places] = code(one, noisy)[latents]
        found = ma.match(a, b, parts="codes", nulls=(null,), seed=seed)
        right = found.matched & (planted >= 0) & (found.columns == planted)
        alike = np.einsum("nd,nd->n", a[latents], b[places])
        for low, high in itertools.pairwise((0, 0.1, 0.2, 0.3, 1.01)):
            here = (alike >= low) & (alike < high)
            stand = right[latents][here].mean() if here.any() else float("nan")
            print(f"| {noise} | {low} to {min(high, 1)} | {here.sum()} | {stand:.2f} |", flush=True)
        either = found.matched & ((planted >= 0) | np.isin(found.columns, places))
        print(f"with another partner: {(either & ~right).sum()} of {either.sum()}; "
              f"stand of all: {found.matched.sum()}", flush=True)  # fmt: skip


def main() -> None:
    """Plant, match, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dictionaries", type=Path, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="plant among codes on it")
    options = parser.parse_args()
    if options.store:
        one, other = options.dictionaries
        by_codes((one, other), ma.Store(options.store), options.seed)
        return
    print("| dictionary | chance | cosine | partners that stand | wrong |\n|---|---|---|---|---|")
    for path in options.dictionaries:
        rows = unit_rows(fold(ma.load(path)).decoder)
        for null in NULLS:
            for cosine in COSINES:
                stand, wrong = found(rows, cosine, null, options.seed)
                name = getattr(null, "__name__", "")
                print(
                    f"| {path.name} | {name} | {cosine} | {stand:.3f} | {wrong:.3f} |", flush=True
                )


if __name__ == "__main__":
    main()
