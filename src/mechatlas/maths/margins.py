"""Determinacy of an optimal pairing: what the total cost rises by without each of its pairs.

With the prices of an optimum, the reduced cost c_ij - u_i - v_j of a pair is at least 0, and is 0
for the pairs of the optimum. Another pairing gives rows in a cycle the columns of each other, and
costs more by the reduced costs on the cycle. So the rise without a pair is the length of the
shortest cycle through it (Dijkstra), searched in short lists of the cheapest columns of each row,
which are made longer where they do not prove that the cycle is the shortest. Columns that stay free
are one more node: a row may take one, and then another column becomes free, for its price.

Source: Volgenant, An addendum on sensitivity analysis of the optimal assignment (2006), for rises
as shortest paths.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from mechatlas.base import InputError
from mechatlas.maths.certificate import Assignment
from mechatlas.maths.pricing import Costs, Factors, as_costs, block_rows, in_threads

if TYPE_CHECKING:  # compiles when it is imported
    from mechatlas.maths.cycles import Closing, Edges

LISTED = 32
"""Columns listed for each row at first."""
MAX_LISTED = 256
"""Longest list by default."""
MAX_REACHED = 256
"""Rows reached from a row, after which the search for its cycle ends unless all are to be exact."""
LONGER = 8
"""Factor by which lists that were too short are made longer."""


class Margins(NamedTuple):
    """Rise of the total cost of an optimal pairing if each of its pairs is forbidden."""

    rise: Float[np.ndarray, " n"]
    """Rise for each row, or a lower bound on it; NaN where the row has no pair, infinite where
    there is no other pairing."""
    exact: Bool[np.ndarray, " n"]
    """Rows whose rise is exact."""


def margins(
    assignment: Assignment,
    costs: Costs | ArrayLike | Tensor,
    *,
    max_listed: int | None = MAX_LISTED,
) -> Margins:
    """Find what the cost of an optimal pairing rises by if each of its pairs is forbidden.

    Args:
        assignment: Optimal pairing, with its prices.
        costs: Costs that it is optimal for.
        max_listed: Longest list of columns that is searched for each row; `None` for all columns,
            so that every rise is exact, which takes long for many rows. With shorter lists large
            rises are lower bounds.

    Raises:
        InputError: Rows may stay unmatched at a price.

    Examples:
        >>> import mechatlas as ma
        >>> from mechatlas.maths.margins import margins
        >>> costs = [[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]
        >>> margins(ma.assign(costs), costs).rise
        array([1., 1., 3.])
    """
    from mechatlas.maths.cycles import shortest_cycles  # compiles when it is imported

    graph = _Graph.of(assignment, as_costs(costs))
    n = len(graph.columns)
    m = graph.costs.n_columns
    most, reached = (m + 1, n + 2) if max_listed is None else (max_listed, MAX_REACHED)
    rises, is_open = np.full(n, np.inf), np.ones(n, bool)
    wanted, listed = np.arange(n + 1), 0
    while len(wanted):
        listed = min(listed * LONGER or LISTED, most)
        graph.list_again(wanted, listed)
        cycles, is_wanted = np.flatnonzero(is_open), np.zeros(n + 1, bool)
        is_open[:] = False

        def search(
            first: int, last: int, cycles: np.ndarray = cycles, wanted: np.ndarray = is_wanted
        ) -> None:
            edges, closing = graph.edges(), graph.closing()
            shortest_cycles(cycles[first:last], reached, edges, closing, rises, is_open, wanted)

        in_threads(search, len(cycles))
        wanted = np.flatnonzero(is_wanted & (graph.listed < most))
    found, exact = np.full(len(assignment.columns), np.nan), np.zeros(len(assignment.columns), bool)
    rows = graph.columns if graph.is_turned else np.arange(n)
    found[rows], exact[rows] = rises, ~is_open
    return Margins(found, exact)


class _Graph:
    """Graph of a pairing with at least as many columns as rows; nodes are rows, and free columns.

    An edge from row p to row q is the reduced cost of p taking the column of q.
    """

    def __init__(self, costs: Costs, u: np.ndarray, v: np.ndarray, columns: np.ndarray) -> None:
        self.costs, self._u, self._v, self.columns = costs, u, v, columns
        self.is_turned = False
        n, m = costs.n_rows, costs.n_columns
        self._node_of = np.full(m, n)
        self._node_of[columns] = np.arange(n)
        self._leaving = np.maximum(-v[columns], 0.0) if m > n else np.full(n, np.inf)
        self._least = self._leaving.copy()
        self._starts, self._counts = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
        self._nodes, self._weights = np.empty(0, np.int64), np.empty(0)
        self._horizon, self._is_new = np.zeros(n + 1), True
        self.listed = np.zeros(n + 1, np.int64)

    @classmethod
    def of(cls, assignment: Assignment, costs: Costs) -> "_Graph":
        """Build the graph."""
        if math.isfinite(assignment.unmatched):
            raise InputError(
                "Margins are of pairings in which all rows or all columns are paired; this one "
                "was made with a price of staying unmatched. Leave `unmatched` out."
            )
        u, v, columns = assignment.row_prices, assignment.column_prices, assignment.columns
        if costs.n_rows <= costs.n_columns:
            return cls(costs, u, v, columns)
        rows = np.full(costs.n_columns, -1)
        paired = np.flatnonzero(columns >= 0)
        rows[columns[paired]] = paired
        graph = cls(costs.transposed(), v, u, rows)
        graph.is_turned = True
        return graph

    def list_again(self, nodes: Int[np.ndarray, " k"], listed: int) -> None:
        """List the cheapest edges of some nodes; at first, also the least edge to each node."""
        self.listed[nodes] = listed
        n, step = len(self.columns), block_rows(self.costs)
        n_leaving, listed = min(listed, n), min(listed, self.costs.n_columns)
        rows = nodes[nodes < n]
        least = np.full(self.costs.n_columns, np.inf)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            block = self.costs.block(part) - (self._u[part, None] + self._v)
            block[np.arange(len(part)), self.columns[part]] = np.inf
            error = self.costs.rounding(part)
            np.minimum(least, (block - error[:, None]).min(axis=0), out=least)
            self._keep(part, block, error, listed)
        if self._is_new:
            self._least = np.minimum(self._least, np.maximum(least[self.columns], 0.0))
            self._is_new = False
        if len(rows) < len(nodes):
            order = np.argsort(self._leaving, kind="stable")[:n_leaving]
            horizon = self._leaving[order[-1]] if n_leaving < n else np.inf
            self._append(
                np.array([n]), order[None], self._leaving[order][None], np.array([horizon])
            )

    def _keep(self, rows: np.ndarray, block: np.ndarray, error: np.ndarray, listed: int) -> None:
        """Keep the cheapest edges of some rows, exactly."""
        from mechatlas.maths.selection import keep_cheapest_of_rows

        shape, zeros = (len(rows), listed), np.zeros(block.shape[1])
        cheapest = np.empty(shape), np.empty(shape, np.int32), np.empty(len(rows))
        in_threads(lambda i, j: keep_cheapest_of_rows(block, zeros, (i, j), *cheapest), len(rows))
        values, columns, following = cheapest
        i, j = np.repeat(rows, listed), columns.ravel()
        exact = self.costs.exact(i, j) - (self._u[i] + self._v[j])
        weights = np.where(np.isfinite(values), np.maximum(exact, 0.0).reshape(shape), np.inf)
        order = np.argsort(weights, axis=1, kind="stable")
        self._append(
            rows,
            np.take_along_axis(self._node_of[columns], order, axis=1),
            np.take_along_axis(weights, order, axis=1),
            np.maximum(following - error, 0.0),
        )

    def _append(
        self, nodes: np.ndarray, to: np.ndarray, weights: np.ndarray, horizon: np.ndarray
    ) -> None:
        self._starts[nodes] = len(self._nodes) + np.arange(len(nodes)) * to.shape[1]
        self._counts[nodes], self._horizon[nodes] = to.shape[1], horizon
        self._nodes = np.append(self._nodes, to.ravel())
        self._weights = np.append(self._weights, weights.ravel())

    def edges(self) -> "Edges":
        """Edges that are listed."""
        from mechatlas.maths.cycles import Edges

        return Edges(
            self._starts, self._counts, self._nodes, self._weights, self._horizon, self._least
        )

    def closing(self) -> "Closing":
        """Edges that are not listed, computed one by one."""
        from mechatlas.maths.cycles import Closing

        costs, empty = self.costs, np.empty((0, 0))
        prices = self._u, self._v[self.columns], self.columns, self._leaving
        if isinstance(costs, Factors):
            offsets = costs.row_offsets, costs.column_offsets
            return Closing(*prices, empty, costs.a, costs.b, *offsets)
        none = np.empty(0)
        factors = np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
        return Closing(*prices, costs.matrix(), *factors, none, none)
