from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from mechatlas.maths import subgroups
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group
from mechatlas.maths.subgroups import SubgroupLimitError
from tests.maths.group_strategies import (
    all_subgroups,
    build,
    relabelled,
    seeds,
    semidirect_product,
    specs,
)

quick = settings(max_examples=25)

# Number of subgroups, and of conjugacy classes of them.
COUNTS = {
    "C1": (1, 1),
    "C12": (6, 6),
    "C113": (2, 2),
    "D8": (19, 11),
    "D59": (62, 4),
    "Q8": (6, 6),
    "Q16": (11, 9),
    "C2^4": (67, 67),
    "C2^6": (2825, 2825),
    "C3^3": (28, 28),
    "A4": (10, 5),
    "S4": (30, 11),
    "A5": (59, 9),
    "S5": (156, 19),
    "A6": (501, 22),
    "PSL(2,7)": (179, 15),
    "A5xC2": (164, 22),
}
SLOW_COUNTS = {
    "PSL(2,8)": (386, 12),
    "PSL(2,11)": (620, 16),
    "S6": (1455, 56),
    "C2^7": (29212,) * 2,
}
NAMES = (
    "C1 C7 C12 C2xC2 C2xC4 C3xC3 C2xC2xC6 C2xC12 S3 D4 D7 D8 D59 Q8 Q12 Q16 A4 S4 A5 S5 "
    "C2xA4 C4xA4 C3xS3 C2xD4 C2xC2xD4 C3xQ8 C2xA5 C6xS4 PSL(2,7) C2xC2xC2xC2"
)
S4_NAMES = "C1 C2 C2 C3 C2xC2 C2xC2 C4 S3 D4 A4 S4"


@pytest.mark.parametrize("name", COUNTS)
def test_numbers_of_subgroups_are_the_known_ones(name):
    lattice = group(name).lattice()
    assert (lattice.n_subgroups, len(lattice.classes)) == COUNTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_COUNTS)
def test_numbers_of_subgroups_of_harder_groups_are_the_known_ones(name):
    lattice = group(name).lattice()
    assert (lattice.n_subgroups, len(lattice.classes)) == SLOW_COUNTS[name]
    assert name == "C2^7" or lattice.names[-1] == name


@quick
@given(specs(32))
def test_no_subgroup_is_missed_and_none_is_made_up(spec):
    each = build(spec)
    found = each.subgroups()
    assert len(set(found)) == len(found)
    assert set(found) == all_subgroups(each)
    assert [len(subgroup) for subgroup in found] == sorted(map(len, found))


@quick
@given(specs(48))
def test_classes_are_the_orbits_of_conjugation(spec):
    each = build(spec)
    lattice = each.lattice()
    assert lattice.classes[0].representative == {each.identity}
    assert lattice.classes[-1].order == each.order
    for number, found in enumerate(lattice.classes):
        conjugates = [each.conjugate(found.representative, x) for x in range(each.order)]
        assert set(found.members) == set(conjugates)
        assert found.size * conjugates.count(found.representative) == each.order
        assert {lattice.class_of(member) for member in found.members} == {number}
        assert all(each.is_subgroup(member) for member in found.members)


@quick
@given(specs(48))
def test_containment_is_counted_right(spec):
    each = build(spec)
    lattice = each.lattice()
    for i, one in enumerate(lattice.classes):
        for j, other in enumerate(lattice.classes):
            inside = sum(member <= one.representative for member in other.members)
            assert lattice.contains[i, j] == inside


@quick
@given(specs(60), seeds)
def test_subgroups_do_not_depend_on_labels(spec, seed):
    original, renamed, label = relabelled(spec, seed)
    moved = {frozenset(label[list(subgroup)].tolist()) for subgroup in original.subgroups()}
    assert set(renamed.subgroups()) == moved

    def shape(each: Group) -> Counter[tuple[int, int, str]]:
        lattice = each.lattice()
        return Counter(
            (c.order, c.size, name) for c, name in zip(lattice.classes, lattice.names, strict=True)
        )

    assert shape(renamed) == shape(original)


def test_the_classes_of_s4_are_named_and_ordered():
    lattice = group("S4").lattice()
    assert " ".join(lattice.names) == S4_NAMES
    assert [c.size for c in lattice.classes].count(1) == 4
    by_name = dict(zip(lattice.names, range(11), strict=True))
    assert lattice.contains[by_name["S4"], by_name["D4"]] == 3
    assert lattice.contains[by_name["A4"], by_name["D4"]] == 0
    assert lattice.contains[by_name["S4"], by_name["C3"]] == 4


@pytest.mark.parametrize(
    "name",
    NAMES.split(),
)
def test_isomorphism_types_are_recognised(name):
    assert group(name).lattice().names[-1] == name


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        ("C3xC4", "C12"),
        ("C6xC4", "C2xC12"),
        ("C9xC3xC2", "C3xC18"),
        ("S3xC2", "D6"),
        ("D2", "C2xC2"),
        ("PSL(2,3)", "A4"),
        ("S3xS3", "order 36"),
        ("Q8xQ8", "order 64"),
    ],
)
def test_other_names_mean_the_same_type(name, type_name):
    assert group(name).lattice().names[-1] == type_name


def test_frobenius_groups_are_recognised():
    action = [[pow(2, h, 7) * x % 7 for x in range(7)] for h in range(3)]
    frobenius = semidirect_product(group("C7"), group("C3"), action)
    assert frobenius.lattice().names == ("C1", "C3", "C7", "C7:C3")
    assert "C5:C4" in group("S5").lattice().names


def test_groups_of_order_16_that_no_name_fits_are_called_by_their_order():
    # The modular group of order 16: its elements have the orders of those of C2xC8.
    action = [[x * (5 if h else 1) % 8 for x in range(8)] for h in range(2)]
    modular = semidirect_product(group("C8"), group("C2"), action)
    assert modular.lattice().names[-1] == "order 16"
    assert modular.lattice().n_subgroups == 11


def test_what_is_too_large_is_refused_rather_than_taking_for_ever(monkeypatch):
    with pytest.raises(SubgroupLimitError, match="order 2520 are not listed: the limit is order"):
        group("C2520").lattice()
    monkeypatch.setattr(subgroups, "MAX_SUBGROUPS", 2824)
    with pytest.raises(SubgroupLimitError, match="order 64 has more than 2824 subgroups"):
        Group(group("C2^6").table).lattice()


@pytest.mark.slow
@pytest.mark.parametrize("power", [8, 9, 10])
def test_groups_with_far_too_many_subgroups_are_refused_in_seconds(power):
    with pytest.raises(SubgroupLimitError, match=f"order {2**power} has more than 50000 subgroups"):
        group(f"C2^{power}").lattice()


def test_a_lattice_that_is_too_wide_is_listed_but_not_tabulated(monkeypatch):
    monkeypatch.setattr(subgroups, "MAX_CONTAINMENT_CLASSES", 10)
    lattice = Group(group("S4").table).lattice()
    with pytest.raises(SubgroupLimitError, match="has 11 classes of subgroups"):
        _ = lattice.contains


@pytest.mark.parametrize("name", ["A5", "C113", "D59", "S5"])
def test_the_tables_of_trained_networks_have_the_subgroups_of_their_groups(name, data):
    lattice = Group(np.load(data(f"group_nets/{name}_table.npy"))).lattice()
    assert (lattice.n_subgroups, len(lattice.classes)) == COUNTS[name]
