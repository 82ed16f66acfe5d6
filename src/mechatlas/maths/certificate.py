"""Result of an assignment, and the check of its proof by pricing every pair.

For prices u, v with u_i + v_j <= c_ij for every pair, v <= 0 where columns may stay free (and u_i
at most the price of staying unmatched), no pairing costs less than the sum of all prices. The
difference is the gap. `certify` relies on nothing that the solver did.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from mechatlas.base import Progress, Result, no_progress
from mechatlas.maths.pricing import Costs, as_costs, block_rows, in_threads


class CertificateError(AssertionError):
    """Prices do not prove what they should."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Certificate(Result):
    """Proof of optimality, checked by pricing every pair."""

    lower_bound: float
    """Cost below which no pairing lies."""
    gap: float
    """Cost less lower bound: the most that a better pairing could save."""
    breach: float
    """Largest excess of prices over a cost; the lower bound takes it into account."""
    pairs: int
    """Pairs priced."""
    exact: int
    """Pairs among them whose float32 cost was too near to its prices to tell, which were
    computed in float64."""
    rounding: float
    """Bound on the error of a float32 cost that was used."""

    def summary(self) -> str:
        """Bound and gap, and the number of pairs priced."""
        return (
            f"No pairing costs less than {self.lower_bound:.6g} (gap {self.gap:.1e})\n"
            f"{self.pairs:,} pairs priced, {self.exact:,} of them in float64; prices exceed a "
            f"cost by {self.breach:.1e} at most"
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Assignment(Result):
    """One-to-one pairing of rows and columns, and prices that prove it cheapest."""

    columns: Int[np.ndarray, " n"]
    """Column paired with each row; -1 for a row that stays unmatched."""
    row_prices: Float[np.ndarray, " n"]
    """Dual prices of rows."""
    column_prices: Float[np.ndarray, " m"]
    """Dual prices of columns."""
    cost: float
    """Cost of all pairs, and the price of each row that stays unmatched."""
    lower_bound: float
    """Sum of all prices: no pairing costs less."""
    gap: float
    """Cost less lower bound."""
    unmatched: float
    """Price of a row that stays unmatched; infinite if every row must be paired."""
    rows_priced: tuple[int, ...]
    """Rows whose costs were computed in each pricing round; all of them in the first."""

    @property
    def rounds(self) -> int:
        """Number of pricing rounds."""
        return len(self.rows_priced)

    def summary(self) -> str:
        """Cost with its lower bound, and the number of pairs."""
        n, m, paired = len(self.columns), len(self.column_prices), int((self.columns >= 0).sum())
        return (
            f"{paired:,} pairs of {n:,} rows and {m:,} columns at cost {self.cost:.6g}\n"
            f"No pairing costs less than {self.lower_bound:.6g} (gap {self.gap:.1e}); "
            "certify(costs) checks the proof"
        )

    def certify(
        self,
        costs: Costs | ArrayLike | Tensor,
        *,
        tolerance: float = 1e-9,
        on_progress: Progress = no_progress,
    ) -> Certificate:
        """Prove the pairing optimal for `costs` by pricing every pair.

        Args:
            costs: Costs that the assignment was made for.
            tolerance: Largest gap accepted, as a share of the sum of the sizes of all prices;
                the last digits of float64 are accepted besides.
            on_progress: Callback with the number of rows that are done.

        Raises:
            CertificateError: The columns are no pairing of rows with different columns, a price
                exceeds a cost, or the gap is larger than `tolerance` allows.
        """
        costs = as_costs(costs)
        n, m = costs.n_rows, costs.n_columns
        self._check_pairs(n, m)
        breach, exact = self._breaches(costs, on_progress)
        u, v, unmatched = self.row_prices, self.column_prices, self.unmatched
        cost = total_cost(costs, self.columns, unmatched if math.isfinite(unmatched) else 0.0)
        bound = math.fsum(u) + math.fsum(v) - math.fsum(breach)
        bound = min(bound - _breach_of_signs(u, v, unmatched), cost)
        size = math.fsum(np.abs(u)) + math.fsum(np.abs(v)) + abs(cost)
        certificate = Certificate(
            lower_bound=bound,
            gap=cost - bound,
            breach=float(breach.max()),
            pairs=n * m,
            exact=exact,
            rounding=float(costs.rounding(slice(0, n)).max()),
        )
        allowed = tolerance * size + (n + m) * costs.last_digits()
        if certificate.gap > allowed:
            worst = int(breach.argmax())
            raise CertificateError(
                f"A cheaper pairing may exist: duality gap {certificate.gap:.3g} at cost "
                f"{cost:.6g} (tolerance {allowed:.3g}); prices exceed a cost of row {worst} by "
                f"{breach[worst]:.3g}. Were the costs changed after `assign`?"
            )
        return certificate

    def _check_pairs(self, n: int, m: int) -> None:
        if (len(self.row_prices), len(self.column_prices), len(self.columns)) != (n, m, n):
            raise CertificateError(
                f"The pairing is of {len(self.row_prices)} x {len(self.column_prices)}, the costs "
                f"are of {n} x {m}."
            )
        paired = self.columns[self.columns >= 0]
        if len(np.unique(paired)) < len(paired) or paired.max(initial=-1) >= m:
            raise CertificateError("Two rows have the same column, or one that does not exist.")
        if math.isinf(self.unmatched) and len(paired) < min(n, m):
            raise CertificateError(f"Only {len(paired)} of {min(n, m)} could-be pairs were made.")

    def _breaches(self, costs: Costs, on_progress: Progress) -> tuple[Float[np.ndarray, " n"], int]:
        """Excess of prices over the costs of each row, and the number of exact costs computed."""
        from mechatlas.maths.selection import underpriced

        n, u, v = costs.n_rows, self.row_prices, self.column_prices
        breach, n_exact, step = np.zeros(n), 0, block_rows(costs)
        error = costs.rounding(slice(0, n))
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            block = costs.block(part)

            def low(
                first: int, last: int, block: np.ndarray = block, part: slice = part
            ) -> tuple[np.ndarray, np.ndarray]:
                room = 64 * (last - first)
                while True:
                    rows, columns = np.empty(room, np.int64), np.empty(room, np.int64)
                    prices = u[part] + error[part], v
                    n_low = underpriced(block, *prices, (first, last), rows, columns)
                    if n_low <= room:
                        return rows[:n_low], columns[:n_low]
                    room = n_low

            for rows, columns in in_threads(low, len(block)):
                rows += start
                excess = u[rows] + v[columns] - costs.exact(rows, columns)
                np.maximum.at(breach, rows, excess)
                n_exact += len(rows)
            on_progress(part.stop, n)
        return breach, n_exact


def total_cost(costs: Costs, columns: Int[np.ndarray, " n"], unmatched: float) -> float:
    """Cost of all pairs, and the price of each row that stays unmatched."""
    rows = np.flatnonzero(columns >= 0)
    alone = len(columns) - len(rows)
    return math.fsum([*costs.exact(rows, columns[rows]), unmatched * alone if alone else 0.0])


def _breach_of_signs(u: np.ndarray, v: np.ndarray, unmatched: float) -> float:
    # Who may stay alone must not have a price above what that costs: 0 for columns.
    lost = 0.0
    if math.isfinite(unmatched):
        lost += math.fsum(np.maximum(u - unmatched, 0)) + math.fsum(np.maximum(v, 0))
    elif len(u) != len(v):
        lost += math.fsum(np.maximum(v if len(u) < len(v) else u, 0))
    return lost
