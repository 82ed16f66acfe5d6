"""What could be found in a dictionary like this: partners planted at known cosines.

    python recipes/matching/planted.py runs/branches/inception_mini/seed0/mixed3a

A second dictionary is made in the same spectrum: 60 % of its decoder rows are partners of rows of
the first at one cosine, the others are chance. Prints which share of the partners stands at a false
match rate of 5 %, and which share of what stands is wrong.
"""

import argparse
from pathlib import Path

import numpy as np

import mechatlas as ma
from mechatlas.analysis.matching.folding import fold, unit_rows
from mechatlas.analysis.matching.nulls import NULLS, Null

COSINES = 0.4, 0.5, 0.6, 0.7
PARTNERS = 0.6


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


def main() -> None:
    """Plant, match, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dictionaries", type=Path, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
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
