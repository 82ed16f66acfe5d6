import numpy as np
import pytest
import torch

from mechatlas.analysis.branches.activity import activity_shares
from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.sparsity import ReLU, TopK

BRANCHES = {"a": slice(0, 3), "b": slice(3, 8)}


class Reader:
    """Latent 0 reads branch a alone, latent 1 both alike, latent 2 nothing ever."""

    d_in, n_latents = 8, 3

    def __init__(self):
        self.W_enc = torch.zeros(8, 3)
        self.W_enc[0, 0] = 2.0
        self.W_enc[1, 1] = self.W_enc[4, 1] = 1.0

    def encode(self, x):
        return (x @ self.W_enc).relu()


def rows(n=4000, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=random)
    return x - x.mean(dim=0), torch.arange(n) // 10


def measure(dictionary, x, samples, size=1000):
    batches = zip(x.split(size), samples.split(size), strict=True)
    return activity_shares(dictionary, batches, BRANCHES, x.mean(dim=0).double().numpy())


def test_a_feature_of_one_branch_is_driven_by_it_and_lost_without_it():
    found = measure(Reader(), *rows())
    assert found.activation is not None
    assert found.activation.value[0] == pytest.approx([1, 0], abs=1e-6)
    assert found.ablation.value[0] == pytest.approx([1, 0], abs=1e-6)
    assert found.activation.value[1] == pytest.approx([0.5, 0.5], abs=0.05)
    # relu(s + t) is positive: E[relu(s + t) - relu(t)] over E[relu(s + t)], where it is active
    assert found.ablation.value[1] == pytest.approx([0.5, 0.5], abs=0.25)
    assert np.isnan(found.activation.value[2]).all()
    assert found.active[2] == 0


def test_both_shares_are_what_a_plain_loop_says():
    dictionary = Autoencoder(d_in=8, n_latents=12, sparsity=TopK(k=3), seed=3)
    x, samples = rows(300)
    found = measure(dictionary, x, samples, size=70)
    mean = x.mean(dim=0)
    with torch.no_grad():
        code = dictionary.encode(x)
        for k, s in enumerate(BRANCHES.values()):
            without = x.clone()
            without[:, s] = mean[s]
            other = dictionary.encode(without)
            through = (x - mean)[:, s] @ dictionary.W_enc[s]
            whole = (x - mean) @ dictionary.W_enc
            for latent in range(12):
                on = code[:, latent] != 0
                lost = (code - other)[on, latent].sum() / code[on, latent].sum()
                assert found.ablation.value[latent, k] == pytest.approx(float(lost), abs=1e-4)
                assert found.activation is not None
                share = through[on, latent].sum() / whole[on, latent].sum()
                assert found.activation.value[latent, k] == pytest.approx(float(share), abs=1e-4)
    assert (found.active == (code != 0).sum(dim=0).numpy()).all()


def test_intervals_cover_the_truth_though_rows_of_a_sample_are_alike():
    # The share of a large run is the truth; intervals of small runs should hold it in about 95 %.
    truth = measure(Reader(), *clustered(200_000, 999)).ablation.value[1, 0]
    hits = []
    for seed in range(120):
        found = measure(Reader(), *clustered(1000, seed)).ablation
        hits.append(found.low[1, 0] <= truth <= found.high[1, 0])
    assert np.mean(hits) > 0.88


def clustered(n, seed):
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(n // 10, 8, generator=random).repeat_interleave(10, dim=0)
    x = common + 0.3 * torch.randn(n, 8, generator=random)
    return x, torch.arange(n) // 10


def test_a_black_box_has_ablation_shares_only():
    class Box:
        d_in, n_latents = 8, 3

        def encode(self, x):
            return Reader().encode(x)

    found = measure(Box(), *rows(500))
    assert found.activation is None
    assert found.ablation.value[0] == pytest.approx([1, 0], abs=1e-6)


def test_rows_that_do_not_fit_are_named():
    dictionary = Autoencoder(d_in=8, n_latents=4, sparsity=ReLU(), seed=0)
    with pytest.raises(InputError, match="7 wide, the dictionary reads 8"):
        activity_shares(dictionary, [(torch.ones(3, 7), torch.arange(3))], BRANCHES, np.zeros(8))
    with pytest.raises(InputError, match="no rows"):
        activity_shares(dictionary, [], BRANCHES, np.zeros(8))
