import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechatlas as ma
from mechatlas.analysis.branches.null import (
    Components,
    channel_groups,
    covariance_of_squares,
    tail_probability,
)
from mechatlas.analysis.branches.specialization import (
    BranchTest,
    branches,
    channel_statistics,
)
from mechatlas.base import InputError
from tests.analysis.branches.planted import (
    BRANCHES,
    WIDTH,
    WIDTHS,
    clusters,
    factors,
    few_entries,
    mixed,
    null_atoms,
    placed,
    world,
)

RANDOM = np.random.default_rng(0)
FEW = {"a": slice(0, 3), "b": slice(3, 8)}


def test_the_share_is_the_papers_and_its_squares_add_up_to_one():
    atoms = np.array([[3.0, -9, 0, 4, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]])
    found = ma.branches(atoms, FEW)
    assert found.names == ("a", "b")
    assert found.share == pytest.approx(np.array([[0.6, 0.8], [1, 0]]))
    assert np.square(found.share).sum(axis=1) == pytest.approx(1)


def test_without_activations_width_is_expected():
    found = branches(RANDOM.normal(size=(50, WIDTH)), BRANCHES)
    assert found.expected == pytest.approx(
        np.tile(np.sqrt(np.array(list(WIDTHS.values())) / WIDTH), (50, 1))
    )


def test_with_activations_the_share_of_variance_is_expected():
    rows = RANDOM.normal(size=(20_000, 8)) * np.array([3, 3, 3, 1, 1, 1, 1, 1]) + 5
    found = branches(RANDOM.normal(size=(4, 8)), FEW, rows)
    assert found.expected[0] == pytest.approx(np.sqrt([27 / 32, 5 / 32]), rel=0.01)


def brute_force(energy, inside, variance, t, n, random):
    """Probability of a share of at least t when components are put at channels drawn at random."""
    order = np.argsort(random.random((n, len(energy))), axis=1)
    moved = energy[order] * variance
    return np.mean(moved[:, inside].sum(axis=1) >= t * moved.sum(axis=1))


@pytest.mark.parametrize("uneven", [0.0, 0.5])
@pytest.mark.parametrize("tails", ["gaussian", "heavy", "positive"])
def test_a_p_value_is_that_of_a_permutation_of_the_channels(uneven, tails):
    at = world(uneven=uneven, scales=True)
    variance = at.deviation**2 / np.square(at.deviation).mean()
    inside = np.zeros(WIDTH, dtype=bool)
    inside[BRANCHES["3x3"]] = True
    place = channel_groups(variance, inside, None)
    random = np.random.default_rng(3)
    energy = np.square(np.maximum(null_atoms(at, 3, tails) / at.deviation, 0))
    for one in energy:
        shares = [place.share * f for f in (0.8, 1.1, 1.3)]
        permuted = [brute_force(one, inside, variance, t, 4000, random) for t in shares]
        exact, _ = tail_probability(
            Components.of(np.tile(one / one.sum(), (3, 1))), np.array(shares), place
        )
        margin = 0.12  # of draws that are few, and conservative where channels are uneven
        assert exact == pytest.approx(np.array(permuted), abs=margin)


def test_the_far_tail_is_right_to_a_factor():
    # Gaussian directions: the share of a branch has a Beta distribution.
    from scipy import stats

    inside = np.zeros(WIDTH, dtype=bool)
    inside[BRANCHES["3x3"]] = True
    place = channel_groups(np.ones(WIDTH), inside, None)
    energy = np.square(np.random.default_rng(0).standard_normal((200, WIDTH)))
    for t in (0.4, 0.5, 0.6):
        p, _ = tail_probability(
            Components.of(energy / energy.sum(axis=1, keepdims=True)), np.full(200, t), place
        )
        exact = stats.beta.logsf(t, 40, 88)
        assert exact - 1 < np.log(p.mean()) < exact + 1 + 0.1 * abs(exact)


def test_a_feature_of_one_channel_is_where_it_is_by_chance():
    atoms = np.eye(WIDTH)
    p = branches(atoms, BRANCHES).p_values
    inside = branches(atoms, BRANCHES).share == 1
    share = np.array(list(WIDTHS.values())) / WIDTH
    assert p[inside] == pytest.approx(np.repeat(share, list(WIDTHS.values())), rel=0.05)
    assert p[~inside] == pytest.approx(1)


NULLS = {
    "widths alone": (world(), "gaussian"),
    "heavy tails": (world(), "heavy"),
    "variances": (world(scales=True), "gaussian"),
    "uneven variances": (world(uneven=0.6, scales=True), "gaussian"),
    "uneven, heavy": (world(uneven=0.5, scales=True), "heavy"),
    "uneven, positive": (world(uneven=0.6, scales=True), "positive"),
    "correlated": (world(scales=True, within=0.1), "gaussian"),
    "correlated, signed": (world(scales=True, within=0.1, signed=True), "gaussian"),
    "much correlated": (world(uneven=0.4, within=0.5), "gaussian"),
    "much correlated, positive": (world(uneven=0.4, within=0.5), "positive"),
    "factors": (factors(per_branch=False), "gaussian"),
    "factors in branches": (factors(), "gaussian"),
}


@pytest.mark.parametrize("name", NULLS)
def test_features_of_no_branch_are_no_discoveries(name):
    at, draw = NULLS[name]
    found = branches(null_atoms(at, 1000, draw), BRANCHES, at.statistics)
    assert not found.specialized().any()
    rates = [np.mean(found.p_values <= alpha) / alpha for alpha in (0.2, 0.05, 0.01)]
    assert max(rates) < 1.5
    if "much" not in name and "positive" not in name:  # conservative there
        assert min(rates[:2]) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", NULLS)
def test_p_values_of_8192_null_features_are_uniform_or_larger(name):
    at, draw = NULLS[name]
    found = branches(null_atoms(at, 8192, draw, seed=7), BRANCHES, at.statistics)
    assert found.specialized().sum() <= 1
    for alpha, most in ((0.2, 1.15), (0.05, 1.2), (0.01, 1.4), (0.001, 3)):
        assert np.mean(found.p_values <= alpha) < most * alpha, alpha
    if name in ("widths alone", "heavy tails"):
        ordered = np.sort(found.p_values.ravel())
        even = (np.arange(len(ordered)) + 0.5) / len(ordered)
        assert np.abs(ordered - even).max() < 0.05


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_features_of_few_channels_are_no_discoveries(k):
    assert not branches(few_entries(1000, k), BRANCHES).specialized().any()


@pytest.mark.parametrize(("size", "rho"), [(8, 0.5), (16, 0.5), (16, 0.8), (4, 0.9)])
@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_few_entries_mixed_with_channels_that_go_along_are_no_discoveries(size, rho, k):
    # Each entry is as many components as it has companions, all in one branch.
    at = clusters(size, rho)
    found = branches(mixed(few_entries(2000, k), at), BRANCHES, at.statistics)
    assert not found.specialized().any()
    for alpha, most in ((0.05, 1.1), (0.01, 1.5), (0.001, 3)):
        assert np.mean(found.p_values <= alpha, axis=0).max() <= most * alpha, alpha


def test_permuted_features_are_like_those_of_few_mixed_entries():
    at = clusters(8, 0.5)
    atoms = mixed(few_entries(500, 2), at)
    again = BranchTest(atoms, BRANCHES, at.statistics).permuted()
    there = branches(atoms, BRANCHES, at.statistics)
    assert np.median(again.n_effective) == pytest.approx(np.median(there.n_effective), rel=0.05)
    assert np.mean(again.share > 0.99) == pytest.approx(np.mean(there.share > 0.99), rel=0.2)
    assert not again.specialized().any()


@pytest.mark.parametrize(
    "name", ["widths alone", "heavy tails", "variances", "factors in branches"]
)
def test_features_placed_in_a_branch_are_found_at_the_stated_rate(name):
    at, draw = NULLS[name]
    truth = np.zeros((1200, 4), dtype=bool)
    for k in range(4):
        truth[50 * k : 50 * (k + 1), k] = True
    power, false = [], []
    for seed in range(5, 15):  # the rate holds on average, not in each draw
        atoms = null_atoms(at, 1200, draw, seed=seed)
        for k, branch in enumerate(BRANCHES):
            mine = slice(50 * k, 50 * (k + 1))
            atoms[mine] = placed(atoms[mine], at, branch, 0.8)
        found = branches(atoms, BRANCHES, at.statistics).specialized()
        power.append(found[truth].mean())
        false.append((found & ~truth).sum() / found.sum())
    assert np.mean(power) >= 0.95
    assert np.mean(false) <= 0.05


def test_the_power_of_the_test_falls_with_the_effect():
    at = world(scales=True)
    atoms = null_atoms(at, 1000, "gaussian", seed=4)
    before = atoms.copy()
    most, some, none = (
        BranchTest(atoms, BRANCHES, at.statistics).power(excess=excess)
        for excess in (0.9, 0.5, 0.0)
    )
    assert (most >= 0.95).all()
    assert (some <= most).all()
    assert some.mean() < 0.95
    assert none.max() <= 0.05
    assert (atoms == before).all()
    tested = np.zeros(1000, dtype=bool)
    tested[:8] = True
    assert np.isnan(BranchTest(atoms, BRANCHES, at.statistics, tested=tested).power()).all()


def test_activations_and_their_statistics_say_the_same():
    rows = RANDOM.exponential(size=(3000, 8))
    atoms = RANDOM.normal(size=(20, 8))
    one = branches(atoms, FEW, rows)
    for other in (torch.from_numpy(rows), channel_statistics([rows[:1000], rows[1000:]])):
        assert branches(torch.from_numpy(atoms), FEW, other).p_values == pytest.approx(one.p_values)
    exact = np.cov(rows.T)
    assert channel_statistics(rows).variance == pytest.approx(np.diag(exact))
    assert channel_statistics(rows).correlation == pytest.approx(np.corrcoef(rows.T))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_neither_the_length_of_an_atom_nor_its_place_among_others_matters(seed, length):
    random = np.random.default_rng(seed)
    atoms = random.standard_t(2, size=(9, WIDTH))
    order = random.permutation(9)
    whole = branches(atoms, BRANCHES)
    other = branches(length * atoms[order], BRANCHES)
    for name in ("share", "p_values", "q_values", "low", "high"):
        assert getattr(other, name) == pytest.approx(getattr(whole, name)[order], rel=1e-6)
    assert (whole.low <= whole.share + 1e-9).all()
    assert (whole.share <= whole.high + 1e-9).all()


def test_the_order_of_channels_inside_a_branch_does_not_matter():
    atoms = RANDOM.normal(size=(30, WIDTH))
    order = np.concatenate([RANDOM.permutation(np.arange(s.start, s.stop)) for s in
                            BRANCHES.values()])  # fmt: skip
    assert branches(atoms[:, order], BRANCHES).p_values == pytest.approx(
        branches(atoms, BRANCHES).p_values
    )


def test_what_all_channels_share_is_no_reason_to_doubt_a_branch():
    # A factor common to the whole site scales a share's numerator and denominator alike.
    at = world()
    shared = at._replace(correlation=0.8 * at.correlation + 0.2)
    atoms = placed(null_atoms(at, 20), at, "5x5", 0.8)
    assert branches(atoms, BRANCHES, shared.statistics).p_values[:, 2].max() < 1e-6


def test_latents_without_a_row_are_not_tested():
    atoms = RANDOM.normal(size=(6, WIDTH))
    atoms[2] = 0
    atoms[4] = -np.abs(atoms[4])
    found = branches(atoms, BRANCHES, tested=np.arange(6) != 5)
    for name in ("share", "p_values", "q_values"):
        assert np.isnan(getattr(found, name)[[2, 4]]).all()
    assert np.isnan(found.q_values[5]).all()
    assert np.isfinite(found.share[5]).all()
    assert not found.specialized(1.0)[[2, 4, 5]].any()
    assert (found.branch_of(1.0)[[2, 4, 5]] == -1).all()


def test_signed_activations_count_both_parts_of_a_row():
    atoms = np.array([[-3.0, 0, 0, 4, 0, 0, 0, 0]])
    rows = RANDOM.normal(size=(100, 8))
    assert branches(atoms, FEW, rows).share == pytest.approx(np.array([[0.6, 0.8]]))
    assert branches(atoms, FEW, np.abs(rows)).share == pytest.approx(np.array([[0, 1.0]]))


def test_the_covariance_of_squares_is_that_of_gaussians():
    random = np.random.default_rng(0)
    for rho in (-0.7, 0.0, 0.4, 1.0):
        x = random.normal(size=400_000)
        y = rho * x + np.sqrt(1 - rho**2) * random.normal(size=400_000)
        for positive in (True, False):
            u, v = (np.square(np.maximum(z, 0) if positive else z) for z in (x, y))
            sampled = np.cov(u, v)[0, 1] / (u.mean() * v.mean())
            exact = covariance_of_squares(np.array([[rho]]), positive=positive)[0, 0]
            assert exact == pytest.approx(sampled, abs=0.06)


def test_channels_of_a_branch_need_not_lie_side_by_side():
    random = np.random.default_rng(4)
    atoms, rows = np.abs(random.standard_normal((60, 9))), random.standard_normal((200, 9))
    order = np.array([0, 3, 6, 1, 2, 7, 8, 4, 5])
    even = branches(atoms[:, order], {"a": (0, 3), "b": (3, 7)}, rows[:, order])
    mask = np.isin(np.arange(9), [1, 2, 7, 8])
    for a in (slice(0, 9, 3), np.array([6, 0, 3]), [0, 3, 6]):
        found = branches(atoms, {"a": a, "b": mask}, rows)
        np.testing.assert_allclose(found.share, even.share)
        np.testing.assert_allclose(found.p_values, even.p_values)


SICK = np.ones((3, 8))
SICK[1, 6] = np.nan


@pytest.mark.parametrize(
    ("atoms", "named", "rows", "said"),
    [
        (SICK, FEW, None, "W_dec is not finite at row 1, column 6"),
        (np.ones((3, 8)), FEW, SICK, "activations is not finite at row 1, column 6"),
        (np.ones((3, 8)), {}, None, "There are no branches"),
        (np.ones((3, 8)), {"a": slice(0, 8)}, None, "'a' is all 8 channels.*nothing to compare"),
        (np.ones((3, 8)), {"a": (0, 4), "b": (3, 8)}, None, "Branches 'a' and 'b' overlap"),
        (np.ones((3, 8)), {"a": (0, 4), "b": (4, 9)}, None, r"'b' is \(4, 9\); .* channels 0 to 7"),
        (np.ones((3, 8)), {"a": np.array([1, 5, 8])}, None, r"'a' is \[1 5 8\]; expected some"),
        (np.ones((3, 8)), {"a": np.array([1, 5, 1])}, None, r"'a' is .*each once"),
        (np.ones((3, 8)), {"a": slice(4, 9)}, None, "'a' is slice.*expected some"),
        (np.ones((3, 8)), {"a": slice(0, 0)}, None, "'a' is slice.*expected some"),
        (np.ones(8), FEW, None, r"W_dec has shape \(8,\), expected an array"),
        (np.ones((3, 8)), FEW, np.ones((5, 7)), "8 channels, the activations 7"),
        (np.ones((3, 8)), FEW, np.ones((5, 8)), "All 5 rows of activations are equal"),
        (np.ones((3, 8)), FEW, np.ones((1, 8)), "two rows of activations or more, got 1"),
    ],
)
def test_mistakes_are_named(atoms, named, rows, said):
    with pytest.raises(InputError, match=said):
        branches(atoms, named, rows)


@pytest.mark.parametrize("name", ["widths alone", "correlated", "factors in branches"])
def test_intervals_of_shares_cover_what_features_are_drawn_with(name):
    at, draw = NULLS[name]
    atoms = null_atoms(at, 500, draw, seed=3)
    where = BRANCHES["3x3"]
    energy = np.square(at.deviation)
    inside, outside = energy[where].sum(), energy.sum() - energy[where].sum()
    atoms[:, where] *= 2
    found = branches(atoms, BRANCHES, at.statistics)
    truth = np.sqrt(4 * inside / (4 * inside + outside))
    k = list(BRANCHES).index("3x3")
    assert np.mean((found.low[:, k] <= truth) & (truth <= found.high[:, k])) >= 0.9


def test_a_feature_that_few_channels_carry_is_found_by_all_its_other_entries():
    at = world()
    atoms = null_atoms(at, 400)
    mine = slice(BRANCHES["5x5"].start, BRANCHES["5x5"].stop)
    atoms[:100] *= 0.1
    atoms[:100, mine] *= 10
    atoms[:100, mine.start] = 25.0  # so large that a share says nothing
    tested = branches(atoms, BRANCHES, at.statistics)
    assert tested.n_effective[:100, 2].max() < 4
    assert tested.specialized()[:100, 2].mean() > 0.9
    assert tested.specialized()[100:].sum() <= 3
    atoms[:100, mine.start] = 0.1
    atoms[:100, 0] = 25.0  # the largest entry elsewhere: less in the branch than by chance
    assert not branches(atoms, BRANCHES, at.statistics).specialized()[:100, 2].any()


@pytest.mark.parametrize("k", [2, 5])
def test_entries_that_a_larger_one_leaks_are_no_witnesses_of_their_own(k):
    at = clusters(16, 0.5)
    tested = branches(mixed(few_entries(1000, k), at), BRANCHES, at.statistics)
    assert (tested.p_values < 0.001).mean() <= 0.001
    assert not tested.specialized().any()
