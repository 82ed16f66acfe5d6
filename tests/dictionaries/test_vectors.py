import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechatlas.dictionaries.engine.vectors import add_rows, dot_rows


@numba.njit
def added(row, low, table, index, weights, first, last):
    add_rows(row, low, table, index, weights, first, last)


@numba.njit
def multiplied(row, low, table, index, out, first, last):
    dot_rows(row, low, table, index, out, first, last)


@settings(max_examples=60)
@given(
    st.integers(1, 300),
    st.integers(0, 5),
    st.integers(0, 9),
    st.integers(0, 99),
    st.sampled_from([np.float32, np.float64]),
)
def test_sums_and_products_are_those_of_numpy(width, low, n, seed, dtype):
    random = np.random.default_rng(seed)
    table = random.standard_normal((7, low + width + 3)).astype(dtype)
    index = random.integers(0, 7, n + 4).astype(np.int32)
    numbers, row = (random.standard_normal(size).astype(dtype) for size in (n + 4, width))
    part = table[:, low : low + width]
    mine, wanted = row.copy(), row + numbers[2 : n + 2] @ part[index[2 : n + 2]]
    added(mine, low, table, index, numbers, 2, n + 2)
    tolerance = 1e-4 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(mine, wanted, rtol=0, atol=tolerance)
    out = numbers.copy()
    multiplied(row, low, table, index, out, 2, n + 2)
    wanted = numbers.copy()
    wanted[2 : n + 2] += part[index[2 : n + 2]] @ row
    np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance)


def test_arrays_of_different_kinds_are_not_compiled():
    row, table = np.zeros(4, np.float32), np.zeros((3, 4))
    with pytest.raises((numba.TypingError, AttributeError)):
        added(row, 0, table, np.zeros(2, np.int32), np.zeros(2, np.float32), 0, 2)
