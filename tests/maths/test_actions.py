"""Actions follow their group's law, exactly or to the error of interpolating."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechatlas.base import InputError
from mechatlas.maths.actions import (
    Action,
    Custom,
    Hue,
    Rotate,
    Scale,
    Shift,
    corners_of,
    grid_points,
    law_error,
)
from mechatlas.maths.groups import GroupError
from mechatlas.maths.named_groups import group, permutation_group
from tests.maths.permutations import Permute

A4, TETRAHEDRON = permutation_group([[1, 2, 0, 3], [1, 0, 3, 2]], name="A4")
EXACT: dict[str, Action] = {
    "D4": Rotate(group("D4")),
    "C4": Rotate(group("C4")),
    "C2": Rotate(group("C2")),
    "D1": Rotate(group("D1")),
    "D2": Rotate(group("D2")),
    "hue C3": Hue(group("C3")),
    "hue D3": Hue(group("D3")),
    "shift": Shift(group("C6")),
    "A4 on rows": Permute(A4, TETRAHEDRON, axis=-3),
}
COMPUTED: dict[str, Action] = {
    "D16": Rotate(group("D16")),
    "C5": Rotate(group("C5")),
    "hue C7": Hue(group("C7")),
    "hue D5": Hue(group("D5")),
}


def smooth(n: int, side: int, channels: int = 3) -> torch.Tensor:
    """Images without fine detail, which interpolation would lose."""
    random = torch.Generator().manual_seed(n)
    coarse = torch.rand(n, channels, 7, 7, generator=random, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, side, mode="bicubic", align_corners=True)


def inner(x: torch.Tensor, margin: int = 6) -> torch.Tensor:
    side = x.shape[-1]
    y, z = np.indices((side, side)) - (side - 1) / 2
    return x[..., torch.from_numpy(np.hypot(y, z) < (side - 1) / 2 - margin)]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("side", [12, 24])
@settings(max_examples=8)
@given(data=st.data())
def test_what_moves_numbers_follows_the_law_bit_for_bit(name, side, data):
    action = EXACT[name]
    g, h = (data.draw(st.integers(0, action.group.order - 1)) for _ in "gh")
    channels = 4 if isinstance(action, Permute) else 3
    x = smooth(2, side + (name[0] in "CD"), channels).float()  # odd sides for turns, too
    both: list[Any] = [x, x.numpy()]
    for array in both:
        twice, once = action(g, action(h, array)), action(int(action.group.table[g, h]), array)
        assert type(twice) is type(array)
        assert np.array_equal(np.asarray(twice), np.asarray(once))
        assert np.array_equal(np.asarray(action(0, array)), np.asarray(array))


@pytest.mark.parametrize("name", COMPUTED)
@settings(max_examples=8)
@given(data=st.data())
def test_what_computes_follows_the_law_to_the_error_of_interpolating(name, data):
    action = COMPUTED[name]
    g, h = (data.draw(st.integers(0, action.group.order - 1)) for _ in "gh")
    x = smooth(2, 61) / 4 + 0.4
    twice, once = action(g, action(h, x)), action(int(action.group.table[g, h]), x)
    assert float((inner(twice) - inner(once)).abs().max()) < 1e-3
    assert once.min() >= 0
    assert once.max() <= 1


def test_the_law_would_notice_the_other_convention():
    class Backwards(Rotate):
        def act(self, element, x):
            return super().act(int(self.group.inverses[element]), x)

    x = smooth(1, 15)
    assert law_error(Rotate(group("D4")), x)[0] == 0
    error, (g, h) = law_error(Backwards(group("D4")), x)
    assert error > 0.3
    assert group("D4").table[g, h] != group("D4").table[h, g]


def test_a_quarter_turn_is_counter_clockwise_and_the_first_mirror_exchanges_left_and_right():
    d4 = group("D4")
    x = torch.arange(9.0).reshape(1, 3, 3)
    action = Rotate(d4)
    assert torch.equal(action(1, x), torch.rot90(x, 1, dims=(1, 2)))
    assert torch.equal(action(4, x), x.flip(2))
    assert [d4.element_names[g] for g in (1, 4)] == ["r", "s"]


@pytest.mark.parametrize("side", [7, 8])
@settings(max_examples=16)
@given(g=st.integers(0, 7))
def test_pulling_back_undoes_quarter_turns_and_mirrors_bit_for_bit(side, g):
    action = Rotate(group("D4"))
    maps = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(g))
    assert torch.equal(action.pull_back(g, action(g, maps)), maps)
    inverse = int(action.group.inverses[g])
    assert np.array_equal(action.pull_back(g, maps.numpy()), action(inverse, maps).numpy())


@settings(max_examples=16)
@given(g=st.integers(0, 31))
def test_pulling_back_undoes_other_turns_to_the_error_of_interpolating(g):
    action = Rotate(group("D16"))
    maps = smooth(1, 61)
    left = inner(action.pull_back(g, action(g, maps))) - inner(maps)
    assert float(left.abs().max()) < 0.02, "linear, as maps are read"


@pytest.mark.parametrize("name", ["D4", "shift", "D16"])
def test_moved_says_where_content_goes(name):
    action = {**EXACT, **COMPUTED}[name]
    side = 24 if name == "shift" else 25
    y, x = np.indices((side, side))
    for place in ((12, 12), (12, 17), (8, 14)):
        blob = np.exp(-((y - place[0]) ** 2 + (x - place[1]) ** 2) / 8)[None]
        for g in range(action.group.order):
            posed = action(g, blob)[0]
            found = np.unravel_index(posed.argmax(), posed.shape)
            said = action.moved(g, np.array([place], np.float64), side)[0]
            assert np.abs(found - said).max() <= 0.75


def test_matched_blur_takes_away_the_four_fold_harmonic():
    # Fine detail that a turn by other than a quarter blurs: without the control its energy has a
    # period of a quarter-turn though nothing in the images has.
    action = Rotate(group("C16"))
    x = torch.rand(4, 1, 61, 61, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = [float(inner(action(g, x)).var()) for g in range(16)]
    matched = [float(inner(action.matched(g, x)).var()) for g in range(16)]

    def harmonic(energies) -> float:
        spectrum = np.abs(np.fft.rfft(energies))
        return float(spectrum[4] / spectrum[0])

    assert harmonic(plain) > 0.03
    assert harmonic(matched) < 0.1 * harmonic(plain)


def test_hues_turn_and_greys_stay():
    red = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)
    action = Hue(group("C6"))
    assert torch.equal(action(2, red), red[:, [1, 0, 2]])  # a third: red to green
    torch.testing.assert_close(action(1, red)[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))
    grey = torch.full((1, 3, 2, 2), 0.3)
    for g in range(6):
        torch.testing.assert_close(action(g, grey), grey)


def test_scale_says_that_it_is_not_a_group_of_its_order():
    action = Scale(group("C4"))
    x = smooth(1, 61)
    assert not action.closes
    twice, once = inner(action(1, action(1, x)), 0), inner(action(2, x), 0)
    assert float((twice - once).abs().max()) < 5e-3, "two steps that do not wrap"
    assert law_error(action, x)[0] > 0.2, "steps that wrap"
    with pytest.raises(ValueError, match="step must be above 1"):
        Scale(group("C4"), step=0.5)


def test_permutations_act_from_the_left():
    action = Permute(A4, TETRAHEDRON)
    x = torch.arange(4.0)[None]
    for g in range(12):
        assert action(g, x)[0, int(TETRAHEDRON[g, 2])] == 2
        assert torch.equal(action.pull_back(g, action(g, x)), x)


def test_groups_that_cannot_act_so_are_refused():
    with pytest.raises(GroupError, match=r"rotate needs a group C_n .* got S3"):
        Rotate(group("S3"))
    with pytest.raises(GroupError, match="shift needs a cyclic group"):
        Shift(group("D4"))
    with pytest.raises(InputError, match="rotate acts on square images"):
        Rotate(group("C4"))(1, torch.zeros(1, 3, 4, 5))
    with pytest.raises(InputError, match="hue acts on images with three channels"):
        Hue(group("C4"))(1, torch.zeros(1, 1, 4, 4))
    with pytest.raises(InputError, match="a length that 4 divides, got 6"):
        Shift(group("C4"))(1, torch.zeros(1, 6))
    with pytest.raises(GroupError, match="9 is not an element of D4"):
        Rotate(group("D4"))(9, torch.zeros(1, 3, 5, 5))
    with pytest.raises(InputError, match=r"mine returned \(1, 2\), expected shape \(1, 3\)"):
        Custom(group("C2"), lambda g, x: x[:, :2], name="mine")(1, torch.zeros(1, 3))


def test_a_sample_is_posed_alike_whatever_its_neighbours():
    x = smooth(3, 31)
    for action in COMPUTED.values():
        for g in (1, action.group.order - 1):
            assert torch.equal(action(g, x)[1:2], action(g, x[1:2]))


def test_a_place_is_a_weighted_sum_of_four_positions():
    corners = corners_of(np.array([[1.0, 2.0], [0.5, 0.25], [-0.5, 0.0]]), (3, 4))
    field = np.arange(12.0)
    assert (field[corners.index] * corners.weight).sum(axis=1).tolist() == [6.0, 2.25, 0.0]
    assert corners.index[0, 0] == 6
    assert corners.weight[2].sum() == 0.5, "half of it is outside"
    assert len(grid_points(3, 4)) == 12
