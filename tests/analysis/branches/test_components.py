import numpy as np
import pytest
import torch
from scipy import stats

from mechatlas.analysis.branches.components import (
    ComponentStatistics,
    ComponentTest,
    OfComponents,
    component_statistics,
    tail_of_ratio,
)
from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.sparsity import TopK

NAMES, D = ("input", "head0", "head1", "mlp"), 48


def world(seed=0, *, rank=12):
    """Components as in a layer: the input has most of the variance, heads have a low rank."""
    random = np.random.default_rng(seed)

    def covariance(r, size):
        factor = random.standard_normal((D, r)) * np.exp(random.standard_normal(r) / 2)
        return size * factor @ factor.T / r

    parts = covariance(D, 3.0), covariance(rank, 1.0), covariance(rank, 1.0), covariance(D, 1.0)
    return ComponentStatistics(NAMES, 10**5, np.zeros((4, D)), np.stack(parts))


def spread(n, seed, *, heavy=False):
    """Features of random directions, some coordinates larger than others."""
    random = np.random.default_rng([seed, 7])
    rows = random.standard_t(3, (n, D)) if heavy else random.standard_normal((n, D))
    return rows * np.exp(np.linspace(0, 1.5, D))


@pytest.mark.parametrize(("k", "r"), [(3, 12), (10, 40), (40, 64)])
def test_the_tail_is_that_of_a_beta_distribution_where_it_is_one(k, r):
    own = np.diag((np.arange(r) < k).astype(float))
    shares = stats.beta.isf([0.5, 0.1, 1e-3, 1e-8, 1e-20], k / 2, (r - k) / 2)
    for share in shares:
        exact = stats.beta.sf(share, k / 2, (r - k) / 2)
        assert tail_of_ratio(share, own, np.eye(r)) == pytest.approx(exact, rel=0.06)


def test_the_tail_is_that_of_drawn_directions():
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((9, 9)) for _ in "ab")
    own, whole = a @ a.T, a @ a.T + 2 * b @ b.T
    drawn = random.standard_normal((200_000, 9))
    ratio = ((drawn @ own) * drawn).sum(1) / ((drawn @ whole) * drawn).sum(1)
    for share in np.quantile(ratio, [0.3, 0.7, 0.95, 0.999]):
        wanted = (ratio >= share).mean()
        assert tail_of_ratio(share, own, whole) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("heavy", [False, True])
def test_features_of_no_component_are_rarely_specialized(heavy):
    p = np.concatenate(
        [ComponentTest(spread(400, s, heavy=heavy), world(s)).run().p_values for s in range(5)]
    )
    assert (p < 0.05).mean() < 0.06
    for seed in range(5):
        found = ComponentTest(spread(400, seed, heavy=heavy), world(seed)).run()
        assert found.specialized().sum() <= (8 if heavy else 2)


def test_planted_features_are_found_and_others_are_not():
    wrong = n_found = 0
    for seed in range(5):
        known, rows = world(seed), spread(400, seed)
        axes = np.linalg.eigh(known.covariance[2])[1][:, -8:]
        others = np.linalg.inv(known.covariance[[0, 1, 3]].sum(0))
        rows[:30] = np.random.default_rng(seed).standard_normal((30, 8)) @ axes.T @ others
        test = ComponentTest(rows, known)
        found = test.run()
        assert found.specialized()[:30, 2].mean() > 0.9
        wrong += found.specialized()[30:].any(axis=1).sum()
        n_found += found.specialized().any(axis=1).sum()
        assert test.permuted().specialized().sum() <= 2
    assert wrong / n_found < 0.08


def test_power_is_low_only_where_no_direction_belongs_to_a_component():
    known = world()
    power = ComponentTest(spread(800, 0), known).power()
    assert (power[1:3] > 0.9).all(), power
    alike = ComponentStatistics(NAMES, 10**5, known.mean, np.stack([known.covariance.sum(0)] * 4))
    assert ComponentTest(spread(800, 0), alike).power().max() < 0.2


def test_statistics_are_those_of_all_rows_and_the_share_is_of_the_variance():
    random = torch.Generator().manual_seed(0)
    blocks = [torch.randn(3, n, 5, generator=random) + 100 for n in (7, 40, 9)]
    known = component_statistics(blocks, ("a", "b", "c"))
    rows = torch.cat(blocks, dim=1).double().numpy()
    for part, covariance in zip(rows, known.covariance, strict=True):
        assert covariance == pytest.approx(np.cov(part.T), abs=1e-9)
    assert known.mean == pytest.approx(rows.mean(1))
    feature = np.random.default_rng(0).standard_normal((6, 5))
    variances = np.var(rows @ feature.T, axis=1, ddof=1).T
    share = ComponentTest(feature, known).run().share
    assert share == pytest.approx(np.sqrt(variances / variances.sum(1, keepdims=True)))
    with pytest.raises(InputError, match="not finite in the 9 rows after row 47"):
        component_statistics([*blocks[:2], blocks[2] / 0], ("a", "b", "c"))


def test_a_dictionary_of_the_sum_reads_its_components_side_by_side():
    dictionary = Autoencoder(d_in=5, n_latents=8, sparsity=TopK(k=2), seed=0)
    parts = torch.randn(3, 10, 5, generator=torch.Generator().manual_seed(0))
    beside = OfComponents(dictionary, 3)
    side_by_side = parts.transpose(0, 1).flatten(1)
    assert torch.equal(beside.encode(side_by_side), dictionary.encode(parts.sum(0)))
    through = side_by_side @ beside.W_enc
    assert torch.allclose(through, parts.sum(0) @ dictionary.W_enc, atol=1e-5)
