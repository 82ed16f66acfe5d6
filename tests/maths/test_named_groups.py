import numpy as np
import pytest

from mechatlas.maths.groups import Group, GroupError
from mechatlas.maths.named_groups import group

# Order, number of conjugacy classes, and how many elements there are of each order.
FACTS = {
    "C1": (1, 1, {1: 1}),
    "C12": (12, 12, {1: 1, 2: 1, 3: 2, 4: 2, 6: 2, 12: 4}),
    "D1": (2, 2, {1: 1, 2: 1}),
    "D2": (4, 4, {1: 1, 2: 3}),
    "D8": (16, 7, {1: 1, 2: 9, 4: 2, 8: 4}),
    "D59": (118, 31, {1: 1, 2: 59, 59: 58}),
    "S1": (1, 1, {1: 1}),
    "S2": (2, 2, {1: 1, 2: 1}),
    "S3": (6, 3, {1: 1, 2: 3, 3: 2}),
    "S5": (120, 7, {1: 1, 2: 25, 3: 20, 4: 30, 5: 24, 6: 20}),
    "A1": (1, 1, {1: 1}),
    "A2": (1, 1, {1: 1}),
    "A3": (3, 3, {1: 1, 3: 2}),
    "A4": (12, 4, {1: 1, 2: 3, 3: 8}),
    "A5": (60, 5, {1: 1, 2: 15, 3: 20, 5: 24}),
    "A6": (360, 7, {1: 1, 2: 45, 3: 80, 4: 90, 5: 144}),
    "S6": (720, 11, {1: 1, 2: 75, 3: 80, 4: 180, 5: 144, 6: 240}),
    "Q8": (8, 5, {1: 1, 2: 1, 4: 6}),
    "Q16": (16, 7, {1: 1, 2: 1, 4: 10, 8: 4}),
    "Q12": (12, 6, {1: 1, 2: 1, 3: 2, 4: 6, 6: 2}),
    "PSL(2,2)": (6, 3, {1: 1, 2: 3, 3: 2}),
    "PSL(2,3)": (12, 4, {1: 1, 2: 3, 3: 8}),
    "PSL(2,4)": (60, 5, {1: 1, 2: 15, 3: 20, 5: 24}),
    "PSL(2,5)": (60, 5, {1: 1, 2: 15, 3: 20, 5: 24}),
    "PSL(2,7)": (168, 6, {1: 1, 2: 21, 3: 56, 4: 42, 7: 48}),
    "PSL(2,8)": (504, 9, {1: 1, 2: 63, 3: 56, 7: 216, 9: 168}),
    "PSL(2,9)": (360, 7, {1: 1, 2: 45, 3: 80, 4: 90, 5: 144}),
    "PSL(2,11)": (660, 8, {1: 1, 2: 55, 3: 110, 5: 264, 6: 110, 11: 120}),
    "C2xC4": (8, 8, {1: 1, 2: 3, 4: 4}),
    "C3^2": (9, 9, {1: 1, 3: 8}),
    "S3xC2": (12, 6, {1: 1, 2: 7, 3: 2, 6: 2}),
    "PSL(2,5)xC2": (120, 10, {1: 1, 2: 31, 3: 20, 5: 24, 6: 20, 10: 24}),
}


@pytest.mark.parametrize("name", FACTS)
def test_named_groups_are_the_groups_of_that_name(name):
    found = group(name)
    orders, counts = np.unique(found.element_orders, return_counts=True)
    tally = dict(zip(orders.tolist(), counts.tolist(), strict=True))
    assert (found.order, len(found.classes), tally) == FACTS[name]
    assert found.identity == 0
    assert found.element_names[0].strip("(), ").startswith("e")
    assert len(set(found.element_names)) == found.order


def test_names_are_forgiving_about_spaces_and_powers():
    assert group("C2 x C2 x C2") == group("C2^3")
    assert group("PSL(2, 7)") is group("PSL(2,7)")
    assert group("C2^3").name == "C2xC2xC2"
    assert group("C2xC4").element_names[5] == "(r, r)"


def test_dihedral_labels_are_rotations_then_mirrors():
    n = 7
    d7 = group("D7")
    turn = np.exp(2j * np.pi / n)
    for a in range(2 * n):
        for b in range(2 * n):
            # r^k multiplies by turn^k; r^k s takes the conjugate first.
            z = np.exp(0.3j) + 0.2
            inner = turn ** (b % n) * (z.conjugate() if b >= n else z)
            outer = turn ** (a % n) * (inner.conjugate() if a >= n else inner)
            c = int(d7.table[a, b])
            whole = turn ** (c % n) * (z.conjugate() if c >= n else z)
            assert abs(outer - whole) < 1e-12
    assert d7.element_names[n + 2] == "r^2 s"


def test_the_quaternion_group_has_the_table_of_the_quaternions():
    q8 = group("Q8")
    i, j = np.array([[1j, 0], [0, -1j]]), np.array([[0, 1], [-1, 0]])
    matrices = np.array(
        [np.linalg.matrix_power(i, k % 4) @ (j if k >= 4 else np.eye(2)) for k in range(8)]
    )
    for a in range(8):
        for b in range(8):
            np.testing.assert_allclose(matrices[a] @ matrices[b], matrices[q8.table[a, b]])


@pytest.mark.parametrize(("one", "other"), [("A5", "PSL(2,5)"), ("PSL(2,4)", "A5"), ("S3", "D3")])
def test_groups_with_two_names_have_one_lattice(one, other):
    def shape(each: Group) -> list[tuple[int, int]]:
        return [(c.order, c.size) for c in each.lattice().classes]

    assert sorted(shape(group(one))) == sorted(shape(group(other)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Z5", "no group called 'Z5': 'Z5' is not understood. Names are C12, D8 .order 16."),
        ("", "no group called ''"),
        ("C2xfoo", "'foo' is not understood"),
        ("C2^0", "'C2.0' is not understood"),
        ("PSL(3,2)", "is not understood"),
        ("C0", "C0 does not exist: the number must be at least 1"),
        ("Q4", "Q4 does not exist: the number must be at least 8"),
        ("Q10", "Q10 does not exist: the order must be a multiple of 4"),
        ("PSL(2,6)", r"PSL\(2,6\) does not exist: 6 is not a power of a prime"),
        ("S8", "S8 has more than 5040 elements"),
        ("S999999", "S999999 has more than 5040 elements"),
        ("C2^13", "has more than 5040 elements"),
        ("PSL(2,23)", "has more than 5040 elements"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, message):
    with pytest.raises(GroupError, match=message):
        group(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "order", "n_classes", "n_irreps"),
    [("S7", 5040, 15, 15), ("PSL(2,16)", 4080, 17, 17), ("A7", 2520, 9, 8)],
)
def test_the_largest_groups_that_are_taken(name, order, n_classes, n_irreps):
    found = group(name)
    assert (found.order, len(found.classes)) == (order, n_classes)
    assert len(found.irreps()) == n_irreps
    assert max(irrep.error for irrep in found.irreps()) < 1e-10
