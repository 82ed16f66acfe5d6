import numpy as np
import pytest

from mechatlas.maths.groups import GroupError
from mechatlas.maths.named_groups import direct_product, group, permutation_group
from tests.maths.group_strategies import semidirect_product


def test_permutations_multiply_right_factor_first():
    found, permutations = permutation_group([[1, 0, 2], [1, 2, 0]], name="mine")
    assert found.name == "mine"
    assert found.order == 6
    np.testing.assert_array_equal(permutations[0], [0, 1, 2])
    for a in range(6):
        for b in range(6):
            composed = permutations[a][permutations[b]]
            np.testing.assert_array_equal(permutations[found.table[a, b]], composed)
    assert found.element_names[3] == "(1 2 3)"


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        ([[0, 0, 1]], r"Generator 0 is not a permutation of 0 to 2: \[0, 0, 1\]"),
        ([[0, 1], [1, 2]], r"Generator 1 is not a permutation of 0 to 1: \[1, 2\]"),
        ([[1, 0, *range(2, 8)], [*range(1, 8), 0]], "generate more than 5040 elements"),
    ],
)
def test_bad_generators_are_refused(generators, message):
    with pytest.raises(GroupError, match=message):
        permutation_group(generators)


def test_products_multiply_part_by_part():
    a, b = group("S3"), group("C4")
    both = direct_product(a, b)
    assert both.name == "S3xC4"
    for x in range(24):
        for y in range(24):
            (i, j), (k, m) = divmod(x, 4), divmod(y, 4)
            assert both.table[x, y] == a.table[i, k] * 4 + b.table[j, m]
    assert both.element_names[5] == "((2 3), r)"


def test_a_semidirect_product_with_inversion_is_dihedral():
    made = semidirect_product(group("C5"), group("C2"), [[0, 1, 2, 3, 4], [0, 4, 3, 2, 1]])
    dihedral = group("D5")
    swapped = [2 * k for k in range(5)] + [2 * k + 1 for k in range(5)]
    assert dihedral.relabel(swapped) == made


def test_a_product_that_is_too_large_is_refused_before_it_is_built():
    with pytest.raises(GroupError, match="order 518400 is too large"):
        direct_product(group("S6"), group("S6"))
