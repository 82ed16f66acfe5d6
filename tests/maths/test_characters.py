import numpy as np
import pytest
from hypothesis import given, settings

from mechatlas.maths.characters import RepresentationLimitError
from mechatlas.maths.named_groups import group
from tests.maths.group_strategies import build, specs

quick = settings(max_examples=25)

DEGREES = {
    "S5": [1, 1, 4, 4, 5, 5, 6],
    "PSL(2,7)": [1, 3, 3, 6, 7, 8],
    "Q8": [1, 1, 1, 1, 2],
    "C5": [1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("name", DEGREES)
def test_degrees_over_the_complex_numbers_are_the_known_ones(name):
    assert group(name).character_table().degrees.tolist() == DEGREES[name]


def test_indicators_tell_the_types_apart():
    assert group("Q8").character_table().indicators.tolist() == [1, 1, 1, 1, -1]
    assert group("C3").character_table().indicators.tolist() == [1, 0, 0]
    assert group("D4").character_table().indicators.tolist() == [1, 1, 1, 1, 1]


def test_the_characters_of_a5_hold_the_golden_ratio():
    golden = (1 + 5**0.5) / 2
    values = group("A5").character_table().values
    assert sorted(map(len, group("A5").classes)) == [1, 12, 12, 15, 20]
    expected = [
        [1, 1, 1, 1, 1],
        [3, -1, 0, golden, 1 - golden],
        [3, -1, 0, 1 - golden, golden],
        [4, 0, 1, -1, -1],
        [5, 1, -1, 0, 0],
    ]
    np.testing.assert_allclose(values, expected, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 5, 12, 113])
def test_the_characters_of_a_cyclic_group_are_powers_of_roots_of_unity(n):
    cyclic = group(f"C{n}")
    values = cyclic.character_table().values[:, cyclic.class_of]
    expected = np.exp(2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n)
    assert {tuple(np.round(row, 9) + 0) for row in values} == {
        tuple(np.round(row, 9) + 0) for row in expected
    }


@quick
@given(specs(120))
def test_rows_and_columns_of_the_character_table_are_orthogonal(spec):
    each = build(spec)
    characters = each.character_table()
    sizes = np.array([len(c) for c in each.classes])
    values = characters.values
    assert values.shape == (len(sizes), len(sizes))
    rows = values * sizes @ values.conj().T / each.order
    columns = values.conj().T @ values * sizes / each.order
    np.testing.assert_allclose(rows, np.eye(len(sizes)), atol=1e-10)
    np.testing.assert_allclose(columns, np.eye(len(sizes)), atol=1e-10)
    assert np.square(characters.degrees).sum() == each.order
    roots_of_unity = np.abs(characters.values).max(axis=1) <= characters.degrees + 1e-10
    assert roots_of_unity.all()
    # Elements that square to the identity are counted by degrees and indicators.
    involutions = (each.element_orders <= 2).sum()
    assert characters.degrees @ characters.indicators == involutions


def test_too_many_classes_are_refused_rather_than_taking_for_ever():
    with pytest.raises(RepresentationLimitError, match="has 1501 conjugacy classes"):
        group("C1501").irreps()
