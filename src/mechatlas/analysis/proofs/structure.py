"""Measurements of earlier work on such networks, for comparison; no bound uses them.

    bi_equivariance       weights -> share of the logits that depends on x^-1 z y^-1 alone
    coset_concentration   functions on a group -> the subgroups on whose cosets they are constant
    CosetConcentration    subgroup and concentration of each function

Source: Stander, Yu, Fan and Biderman, Grokking group multiplication with cosets (2023), for
cosets; Wu et al. (ICLR 2025), section 4, for bi-equivariance and how both belong together:
l(x) = b^T rho(x) a is constant on the cosets Hx of the subgroup H that fixes b.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mechatlas.maths.groups import Group

MAX_SHIFTS = 24
"""Largest number of x, spread evenly, that equivariance is measured at."""
MIN_CORRELATION = 0.8
"""Least correlation of a function with itself moved by an element, for it to be in H."""


@dataclasses.dataclass(frozen=True, eq=False)
class CosetConcentration:
    """Subgroup of each function, and the share of its variance that the cosets explain."""

    order: Int[np.ndarray, " function"]
    """Order of the subgroup; 1 where none was found."""
    concentration: Float[np.ndarray, " function"]
    """Share of the variance that is between cosets: 1 where the function is constant on each,
    1 / order or so by chance, 0 where no subgroup was found."""


def coset_concentration(
    functions: Float[np.ndarray, "order function"], group: Group, side: Literal["left", "right"]
) -> CosetConcentration:
    """Find the subgroup on whose cosets each function is about constant.

    Args:
        functions: Values at each element, such as l_i(x) or r_i(y).
        group: The group.
        side: "left" for f(hx) = f(x), as l has it; "right" for f(xh) = f(x), as r has it.
    """
    moves = group.table if side == "left" else group.table.T  # moves[h, x] is hx or xh
    centered = np.asarray(functions, np.float64) - np.mean(functions, axis=0, dtype=np.float64)
    orders = np.ones(centered.shape[1], np.int64)
    shares = np.zeros(centered.shape[1])
    for i, f in enumerate(centered.T):
        total = float(f @ f)
        members = np.flatnonzero(f[moves] @ f > MIN_CORRELATION * total)
        if not total or not 1 < len(members) < group.order:
            continue
        if not group.is_subgroup(members.tolist()):
            continue
        # The mean over H of f moved by it is the part of f that is constant on cosets.
        mean = f[moves[members]].mean(axis=0)
        orders[i], shares[i] = len(members), float(mean @ mean) / total
    return CosetConcentration(orders, shares)


def bi_equivariance(
    left: Float[np.ndarray, "order neuron"],
    right: Float[np.ndarray, "order neuron"],
    unembed: Float[np.ndarray, "neuron order"],
    group: Group,
) -> float:
    """Measure the share of the variance of the logits that moving x, y and z together preserves.

    Moving x to gx, y to yh and z to gzh leaves x^-1 z y^-1 as it is: a share of 1 says that
    the logits, without their mean over z, depend on nothing else.

    Args:
        left: l_i(x).
        right: r_i(y).
        unembed: u_i(z).
        group: The group.
    """
    n = group.order
    first, second, last = (np.asarray(w, np.float32) for w in (left, right, unembed))
    last = last - last.mean(axis=1, keepdims=True)
    back = group.table.T[group.inverses]  # back[y, z] is z y^-1
    sums, counts, total = np.zeros(n), 0, 0.0
    for x in np.unique(np.linspace(0, n - 1, min(n, MAX_SHIFTS)).astype(int)):
        logits = np.maximum(first[x] + second, 0) @ last
        moved = group.table[group.inverses[x]][back]
        sums += np.bincount(moved.ravel(), weights=logits.ravel(), minlength=n)
        total += float(np.square(logits, dtype=np.float64).sum())
        counts += n
    return float(np.square(sums).sum() / counts / total) if total else 0.0
