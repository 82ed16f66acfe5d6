"""Rows far longer than the others are found, left out and told, whatever they come from."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.rows import ArrayRows
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.dictionaries.training import train
from mechatlas.maths.outliers import farthest, norm_limit, variance_share

RANDOM = torch.Generator().manual_seed(0)
ATOMS = torch.nn.functional.normalize(torch.randn(48, 24, generator=RANDOM), dim=1)
CODES = torch.rand(6400, 48, generator=RANDOM) * (torch.rand(6400, 48, generator=RANDOM) < 0.06)
X = CODES @ ATOMS + 0.01 * torch.randn(6400, 24, generator=RANDOM)
FIRST = torch.arange(6400) % 64 == 0
PLANTED = X + 300 * X.norm(dim=1).mean() * FIRST[:, None] * ATOMS[0]


def trained(data, **options) -> Any:
    sae = Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=4))
    return train(sae, data, steps=250, batch_size=256, lr=1e-3, **options)


def test_a_planted_first_token_costs_the_other_tokens_nothing():
    alone = evaluate(trained(X[~FIRST]), X[~FIRST]).fvu
    with pytest.warns(UserWarning, match=r"of 320 held-out rows \(the first is row \d+\) are"):
        beside = trained(PLANTED)
    assert evaluate(beside, X[~FIRST]).fvu < 1.1 * alone
    with pytest.warns(UserWarning, match="`fvu` says little of all the others"):
        spoiled = trained(PLANTED, outlier_norms=float("inf"))
    assert spoiled.history.fvu[-1] < 0.01, "it says that all is well,"
    assert evaluate(spoiled, X[~FIRST]).fvu > 2 * alone, "and is not"


def test_common_tokens_that_carry_most_of_the_variance_are_told_of_and_trained_on():
    """As spaces in layers 2 to 8 of SmolLM2: three percent of the rows, far longer than others."""
    common = torch.arange(6400) % 32 == 0
    x = X + 8 * X.norm(dim=1).median() * common[:, None] * ATOMS[0]
    assert variance_share(x, common) > 0.5 > variance_share(X, common)
    assert (farthest(x) & common).sum() == common.sum()
    with pytest.warns(UserWarning, match="16 of 320 .* carry .*`fvu_median` says more"):
        sae = trained(x)
    assert sae.history.fvu[-1] == sae.history.fvu_with_outliers[-1]
    assert sae.history.fvu[-1] < 0.6 * sae.history.fvu_median[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(X)


def test_the_history_has_the_error_without_and_with_outliers_and_of_the_median_row():
    with pytest.warns(UserWarning, match="neither trained on nor counted"):
        sae = trained(PLANTED)
    history, found = sae.history, evaluate(sae, ArrayRows(PLANTED).held_out(4096).x)
    assert found.n_outliers > 0
    assert history.fvu[-1] == pytest.approx(found.fvu, rel=1e-3)
    assert history.fvu_with_outliers[-1] == pytest.approx(found.fvu_with_outliers, rel=1e-3)
    assert history.fvu_with_outliers[-1] != pytest.approx(history.fvu[-1], rel=0.1)
    assert len(history.fvu_median) == len(history.step)


def test_rows_without_outliers_are_trained_on_as_they_are():
    one, other = trained(X), trained(X, outlier_norms=float("inf"))
    assert torch.equal(one.W_dec, other.W_dec)
    assert one.history.fvu == one.history.fvu_with_outliers == other.history.fvu


def test_an_evaluation_counts_each_row_as_by_hand():
    sae = trained(X)
    found = evaluate(sae, PLANTED, batch_size=100)
    with torch.no_grad():
        left = (PLANTED - sae.decode(sae.encode(PLANTED))).double().square().sum(dim=1)
        fired = (sae.encode(PLANTED)[~FIRST] != 0).sum(dim=1).double()
    mean = X[~FIRST].double().mean(dim=0)
    total = (PLANTED.double() - mean).square().sum(dim=1)
    assert found.n_outliers == 100
    assert found.fvu == pytest.approx(float(left[~FIRST].sum() / total[~FIRST].sum()), rel=1e-5)
    assert found.fvu_median == pytest.approx(
        float(torch.sort((left / total)[~FIRST]).values[(6300 - 1) // 2]), rel=1e-4
    )
    around = (PLANTED.double() - PLANTED.double().mean(dim=0)).square().sum()
    assert found.fvu_with_outliers == pytest.approx(float(left.sum() / around), rel=1e-5)
    assert found.l0 == pytest.approx(float(fired.mean()))
    assert "100 outlier rows are left out" in repr(found)


@pytest.mark.filterwarnings("ignore:.*median rows")
def test_a_killed_run_beside_outliers_ends_with_the_same_weights(tmp_path):
    def stop(done, total):
        if done == 170:
            raise KeyboardInterrupt

    options = {"checkpoint": tmp_path / "killed", "checkpoint_every": 50}
    whole = trained(PLANTED, checkpoint=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(PLANTED, on_progress=stop, **options)
    continued = trained(PLANTED, **options)
    assert torch.equal(whole.W_dec, continued.W_dec)
    assert torch.equal(whole.W_enc, continued.W_enc)


def test_batches_of_nothing_but_outliers_are_passed_over():
    often = torch.arange(6400) % 12 == 0  # in batches of two, both are about every 144 steps
    rows = X + 3000 * often[:, None] * ATOMS[0]
    sae = Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=4))
    with pytest.warns(UserWarning, match="median"):
        train(sae, rows, steps=800, batch_size=2)
    assert float(sae.b_dec.detach().norm()) < 10


def test_a_row_that_is_an_outlier_at_one_site_is_none_for_a_crosscoder():
    rows = torch.cat([X, PLANTED], dim=1)
    both = Crosscoder(widths={"a": 24, "b": 24}, n_latents=48, sparsity=TopK(k=4))
    with pytest.warns(UserWarning, match="median"):
        train(both, rows, steps=250, batch_size=256)
    others = rows[~FIRST]
    assert evaluate(both, others).fvu < 0.4


def test_a_long_tail_is_no_outlier_and_zeros_do_not_count():
    norms = torch.ones(100)
    assert norm_limit(norms) == 10
    norms[:10] = 50
    assert norm_limit(norms) == 10
    norms[:11] = 50
    assert norm_limit(norms) == float("inf")
    assert norm_limit(torch.cat([torch.zeros(900), torch.ones(100)])) == 10
    assert norm_limit(torch.zeros(5)) == float("inf")


def test_the_share_of_the_variance_is_around_the_mean_of_all():
    x = np.random.default_rng(0).normal(size=(50, 3)) + 5
    some = np.arange(50) < 7
    squares = ((x - x.mean(axis=0)) ** 2).sum(axis=1)
    found = variance_share(torch.from_numpy(x), torch.from_numpy(some))
    assert found == pytest.approx(squares[some].sum() / squares.sum())
    assert variance_share(torch.ones(4, 2), torch.ones(4, dtype=torch.bool)) == 0
