import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from mechatlas.base import UserError
from mechatlas.maths.groups import Group, GroupError
from mechatlas.maths.named_groups import group
from tests.maths.group_strategies import (
    all_subgroups,
    build,
    is_group,
    latin_squares,
    relabelled,
    seeds,
    specs,
)

quick = settings(max_examples=40)

# The smallest loop (a Latin square with an identity) that is not a group.
LOOP = [[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]]
REAL_TABLES = {"A5": (60, 0), "C113": (113, 0), "D59": (118, 0), "S5": (120, 20), "S6": (720, 60)}

BAD_TABLES = {
    "must be square and not empty, got shape (2, 3)": np.zeros((2, 3), int),
    "must be square and not empty, got shape (0, 0)": np.zeros((0, 0), int),
    "must be square and not empty, got shape (4,)": np.arange(4),
    "must hold integer labels, got float64": np.eye(2),
    "rows of a Cayley table must all have the same length": [[0, 1], [1]],
    "must hold labels 0 to 1, got 2 at row 1, column 0": [[0, 1], [2, 0]],
    "must hold labels 0 to 1, got -1 at row 0, column 1": [[0, -1], [1, 0]],
    "Row 1 of the table holds 2 twice (columns 1 and 2)": [[0, 1, 2], [1, 2, 2], [2, 0, 1]],
    "Column 0 of the table holds 0 twice (rows 0 and 1)": [[0, 1, 2], [0, 2, 1], [1, 0, 2]],
    "no identity: 2 is the only element with 2*0 = 0, but 0*2 = 1 and not 0": [
        [2, 0, 1],
        [1, 2, 0],
        [0, 1, 2],
    ],
    "no identity: 0 is the only element with 0*0 = 0, but 0*1 = 2 and not 1": [
        [0, 2, 1],
        [1, 0, 2],
        [2, 1, 0],
    ],
    "not associative: (1*1)*2 = 2, but 1*(1*2) = 4": LOOP,
    "A group of order 5041 is too large: groups up to order 5040": np.zeros((5041, 5041), np.int8),
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_a_bad_table_is_refused_in_one_sentence_that_says_where(message):
    with pytest.raises(GroupError) as refusal:
        Group(BAD_TABLES[message])
    assert message in str(refusal.value)
    assert str(refusal.value).count("\n") == 0
    assert isinstance(refusal.value, UserError)


@quick
@given(latin_squares(with_identity=True))
def test_a_loop_is_taken_exactly_when_it_is_a_group(square):
    if is_group(square):
        assert Group(square).identity == 0
    else:
        with pytest.raises(GroupError, match="not associative"):
            Group(square)


@quick
@given(latin_squares(with_identity=False))
def test_a_quasigroup_is_taken_exactly_when_it_is_a_group(square):
    if is_group(square):
        Group(square)
    else:
        with pytest.raises(GroupError, match=r"not associative|no identity"):
            Group(square)


@quick
@given(specs(60), st.data())
def test_one_wrong_product_is_always_noticed(spec, data):
    original = build(spec)
    index = st.integers(0, original.order - 1)
    row, column, change = data.draw(index), data.draw(index), data.draw(index)
    table = original.table.copy()
    table[row, column] = (table[row, column] + change) % original.order
    if change:
        with pytest.raises(GroupError, match=r"Row|Column"):
            Group(table)


@pytest.mark.parametrize("side", [8, 32])
def test_a_swap_of_four_products_that_keeps_all_else_is_noticed(side):
    table = group(f"C2^{side.bit_length() - 1}").table.copy()
    a, b = 1, side - 1
    rows, columns = [a, a ^ 2], [b, b ^ 2]
    table[np.ix_(rows, columns)] = table[np.ix_(rows, columns[::-1])]
    with pytest.raises(GroupError, match=r"not associative: \(\d+\*\d+\)\*\d+ = \d+, but"):
        Group(table)


@pytest.mark.parametrize("name", REAL_TABLES)
def test_the_tables_of_trained_networks_keep_their_labels(name, data):
    table = np.load(data(f"group_nets/{name}_table.npy"))
    taken = Group(table)
    assert (taken.order, taken.identity) == REAL_TABLES[name]
    np.testing.assert_array_equal(taken.table, table)
    assert not taken.table.flags.writeable
    expected, found = group(name), [len(each) for each in taken.classes]
    assert found == [len(each) for each in expected.classes]


@quick
@given(specs(60), seeds)
def test_what_follows_from_a_table_does_not_depend_on_labels(spec, seed):
    original, renamed, label = relabelled(spec, seed)
    assert renamed.identity == label[original.identity]
    np.testing.assert_array_equal(renamed.inverses[label], label[original.inverses])
    np.testing.assert_array_equal(renamed.element_orders[label], original.element_orders)
    assert set(renamed.classes) == {frozenset(label[list(c)].tolist()) for c in original.classes}
    assert [len(each) for each in renamed.classes] == [len(each) for each in original.classes]
    assert renamed.element_names[label[-1]] == original.element_names[-1]
    assert renamed.relabel(np.argsort(label)) == original


@quick
@given(specs(120))
def test_inverses_orders_and_generators_are_what_they_say(spec):
    each = build(spec)
    elements = np.arange(each.order)
    assert (each.table[elements, each.inverses] == each.identity).all()
    for x in elements[:: 1 + each.order // 12]:
        assert len(each.closure([x])) == each.element_orders[x]
    assert each.closure(each.generators) == frozenset(elements.tolist())
    assert 2 ** len(each.generators) <= each.order
    assert each.is_abelian == (len(each.classes) == each.order)


@quick
@given(specs(40))
def test_conjugacy_classes_are_the_orbits_of_conjugation(spec):
    each = build(spec)
    t, inverse = each.table, each.inverses
    orbits = {frozenset(t[t[:, x], inverse].tolist()) for x in range(each.order)}
    assert set(each.classes) == orbits
    assert each.classes[0] == {each.identity}
    assert all(each.class_of[x] == i for i, c in enumerate(each.classes) for x in c)


@quick
@given(specs(40), st.data())
def test_cosets_split_the_group_and_the_group_permutes_them(spec, data):
    each = build(spec)
    subgroup = data.draw(st.sampled_from(sorted(all_subgroups(each), key=sorted)))
    cosets = each.left_cosets(subgroup)
    assert frozenset(cosets[0].tolist()) == subgroup
    assert sorted(cosets.ravel().tolist()) == list(range(each.order))
    found = {frozenset(each.table[x, list(subgroup)].tolist()) for x in range(each.order)}
    assert set(map(frozenset, cosets.tolist())) == found
    action = each.coset_action(subgroup)
    np.testing.assert_array_equal(action[each.table], action[:, action])


def test_the_action_on_cosets_multiplies_as_the_group_does():
    s4 = group("S4")
    action = s4.coset_action(s4.closure([1]))
    for a in range(s4.order):
        for b in range(s4.order):
            np.testing.assert_array_equal(action[s4.table[a, b]], action[a][action[b]])


def test_a_subgroup_is_closed_and_not_empty():
    d4 = group("D4")
    assert d4.closure([4]) == {0, 4}
    assert d4.conjugate([0, 4], 1) == {0, 6}
    assert d4.is_subgroup([0, 2, 4, 6])
    assert not d4.is_subgroup([0, 1])
    assert not d4.is_subgroup([])


def test_what_is_not_a_subgroup_or_not_an_element_is_refused():
    c6 = group("C6")
    with pytest.raises(GroupError, match=r"not a subgroup of C6: 1\*1 = 2 is not in it"):
        c6.left_cosets([0, 1])
    with pytest.raises(GroupError, match="not a subgroup of C6: it is empty"):
        c6.left_cosets([])
    with pytest.raises(GroupError, match="6 is not an element of C6; its labels are 0 to 5"):
        c6.closure([6])
    with pytest.raises(GroupError, match="New labels for C6 must be 0 to 5"):
        c6.relabel([0, 1, 2, 3, 4, 4])
    with pytest.raises(GroupError, match="has 6 elements, but 2 names"):
        Group(c6.table, name="C6", element_names=["a", "b"])


def test_s6_is_ready_in_much_less_than_five_seconds():
    start = time.process_time()
    s6 = Group(group("S6").table)
    assert len(s6.classes) == 11
    assert s6.character_table().values.shape == (11, 11)
    assert [i.dimension for i in s6.irreps()] == [1, 1, 5, 5, 5, 5, 9, 9, 10, 10, 16]
    assert time.process_time() - start < 5
