import dataclasses
import functools
import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechatlas
from mechatlas.analysis.matching.chains import compose, cycle_agreement, survival, track
from mechatlas.analysis.matching.codes import correlate, permute_samples, sample_block
from mechatlas.analysis.matching.folding import fold, mean_active, varying, vectors
from mechatlas.analysis.matching.held_out import (
    baselines,
    co_firing,
    explained,
    paired_codes,
    transport,
)
from mechatlas.analysis.matching.nulls import (
    PairEvidence,
    _draw_replaced,
    local_fdr,
    rotate,
    shuffle,
)
from mechatlas.analysis.matching.pairing import _pairs_above, feature_splitting, match
from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK
from mechatlas.maths import pricing
from tests.analysis.matching.planted import LEVELS, chain, dictionary, jump_relu_pair, units

seeds = st.integers(0, 10**6)


def jump_relu(one, x):
    pre = x @ one.W_enc + one.b_enc
    return pre * (pre > one.threshold)


def test_folding_leaves_the_output_as_it_was():
    one = chain(40, 16, 1).dictionaries[0]
    atoms = fold(one)
    x = torch.randn(50, 16)
    code = jump_relu(one, x)
    assert atoms.encoder is not None
    pre = x.numpy() @ atoms.encoder.T + atoms.bias
    folded = np.where(pre > 1, pre, 0)
    np.testing.assert_allclose(folded * atoms.scale, code.numpy(), atol=1e-4)
    np.testing.assert_allclose(folded @ atoms.decoder, (code @ one.W_dec).numpy(), atol=1e-4)


def test_the_bias_absorbs_what_the_format_subtracts_from_the_input():
    autoencoder = Autoencoder(d_in=8, n_latents=12, sparsity=TopK(k=12), seed=1)
    torch.nn.init.normal_(autoencoder.b_dec)
    torch.nn.init.normal_(autoencoder.b_enc)
    x = torch.randn(20, 8)
    atoms = fold(autoencoder)
    assert atoms.encoder is not None
    pre = x.numpy() @ atoms.encoder.T + atoms.bias
    np.testing.assert_allclose(np.maximum(pre, 0), autoencoder.encode(x).detach(), atol=1e-5)


def test_thresholds_that_were_learnt_are_folded():
    jumping = Autoencoder(d_in=8, n_latents=12, sparsity=JumpReLU(threshold=0.3))
    theta = torch.linspace(0.1, 2.0, 12)
    with torch.no_grad():
        jumping.get_parameter("log_threshold").copy_(theta.log())
    np.testing.assert_allclose(fold(jumping).scale, theta, rtol=1e-6)
    np.testing.assert_allclose(
        fold(jumping).decoder, jumping.W_dec.detach() * theta[:, None], rtol=1e-5
    )


def paired(*dictionaries, **options):
    """Match without a null, for what the pairing alone says."""
    nothing = PairEvidence(np.ones(1), 0, np.zeros(1))
    return match(*dictionaries, evidence=nothing, **options)


@given(seeds, st.floats(0.05, 20))
@settings(max_examples=5)
def test_rescaling_a_whole_layer_does_not_change_the_pairing(seed, scale):
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, 30, 6)).astype(np.float32)
    scaled = paired(a, (scale * b).astype(np.float32))
    assert (scaled.columns == paired(a, b).columns).mean() > 0.99


@given(seeds)
@settings(max_examples=3)
def test_the_scale_of_single_latents_does_not_matter_once_they_are_folded(seed):
    random = np.random.default_rng(seed)
    rows = units(random.standard_normal((30, 6))).astype(np.float32)
    other = units(random.standard_normal((30, 6))).astype(np.float32)
    plain = paired(rows, other)
    for name in ("decoder", "cosine", "encoder", "all", "balanced"):
        a, b, c = (
            dictionary(x, random.lognormal(0, 1, 30), np.random.default_rng(seed))
            for x in (rows, other, other)
        )
        one, two = paired(a, b, cost=name), paired(a, c, cost=name)
        assert (one.columns == two.columns).mean() > 0.9
        if name == "decoder":
            np.testing.assert_array_equal(one.columns, plain.columns)


def test_every_match_carries_its_proof():
    a, b = chain(200, 24, 2).dictionaries
    for name in ("decoder", "encoder", "all", "balanced", "cosine"):
        found = paired(a, b, cost=name)
        assert abs(found.gap) < 1e-9 * max(1, found.cost)
        assert found.lower_bound == pytest.approx(found.cost)
        assert found.assignment.certify(found.costs).gap < 1e-8
        rows = np.arange(200)
        x, y = vectors(fold(a), fold(b), name), vectors(fold(b), fold(a), name)
        cost = np.square(x.astype(float)[rows] - y[found.columns]).sum(axis=1)
        np.testing.assert_allclose(found.pair_costs, cost, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("level", ["low", "middle"])
def test_planted_partners_are_found_at_the_stated_false_match_rate(level):
    found, wrong = [], []
    for seed in range(2):
        planted = chain(600, 96, 3, noise=LEVELS[level], seed=seed)
        for layer in range(2):
            one = match(*planted.dictionaries[layer : layer + 2], seed=seed)
            right, false, _ = planted.score(
                np.where(one.matched, one.columns, -1), layer, layer + 1
            )
            found.append(right)
            wrong.append(false)
    assert np.mean(found) > {"low": 0.99, "middle": 0.95}[level]
    # Nominal 0.05; the parts of a split feature are wrong in the null, and right here.
    assert 0.015 < np.mean(wrong) < 0.075


def test_a_cluster_of_similar_latents_does_not_hide_the_partners_of_others():
    found, clustered, alone = [], [], []
    for seed in range(4):
        random = np.random.default_rng(seed)
        a, b = (units(random.standard_normal((300, 64))) for _ in range(2))
        b[:40] = 0.72 * a[:40] + (1 - 0.72**2) ** 0.5 * b[:40]
        center = units(random.standard_normal((1, 64)))
        for rows in (a, b):  # any latent here is as similar to any of the other side: 0.86 to 0.92
            rows[40:52] = units(center + 0.35 * rows[40:52])
        matched = match(a, b, seed=seed).matched
        found.append(matched[:40].mean())
        clustered.append(matched[40:52].mean())
        alone.append(matched[52:].sum())
    assert np.mean(found) > 0.95
    assert np.mean(clustered) < 0.3
    assert np.mean(alone) < 6


def test_nothing_matches_where_there_is_nothing_to_match():
    random = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(1 + np.arange(32))
    for n, m in ((300, 300), (300, 200)):
        a, b = (random.standard_normal((k, 32)) * spectrum for k in (n, m))
        found = match(a.astype(np.float32), b.astype(np.float32))
        assert found.matched.mean() < 0.01
        assert found.q_values.min() > 0.01


@pytest.mark.parametrize("sizes", [(700, 250), (250, 700)])
def test_the_stated_rate_holds_where_one_side_is_much_larger(sizes):
    wrong, found = [], []
    for seed in range(3):
        random = np.random.default_rng(seed)
        spectrum = 1 / np.sqrt(1 + np.arange(96) / 8)
        a, b = (units(random.standard_normal((n, 96)) * spectrum) for n in sizes)
        noise = units(random.standard_normal((120, 96)) * spectrum)
        b[:120] = units(a[:120] + 1.1 * noise)
        one = match(a.astype(np.float32), b.astype(np.float32), seed=seed)
        right = (one.columns == np.arange(sizes[0]))[:120] & one.matched[:120]
        wrong.append(1 - right.sum() / one.matched.sum())
        found.append(right.mean())
    assert np.mean(found) > 0.7
    assert 0.02 < np.mean(wrong) < 0.08


@pytest.mark.parametrize("sizes", [(50, 1), (1, 50), (3, 60), (60, 3), (2, 2)])
def test_a_few_latents_without_partners_do_not_match(sizes):
    random = np.random.default_rng(0)
    any_matched = [
        match(*(random.standard_normal((n, 32)) for n in sizes)).matched.any() for _ in range(20)
    ]
    assert np.mean(any_matched) <= 0.1


def test_partners_hardly_more_alike_than_chance_are_found_at_the_stated_rate():
    scores = []
    for seed in (1, 2):
        planted = chain(1000, 128, noise=LEVELS["high"], seed=seed)
        one = match(planted.dictionaries[0], planted.dictionaries[5])
        scores.append(planted.score(np.where(one.matched, one.columns, -1), 0, 5)[:2])
    found, wrong = np.mean(scores, axis=0)
    assert found > 0.44  # by cosines alone 0.36
    assert wrong < 0.065


def test_what_is_alike_without_being_partners_mostly_does_not_match():
    random = np.random.default_rng(0)
    kinds = units(random.standard_normal((40, 96)))

    def fresh(n):  # in loose clusters, which both dictionaries have
        return units(
            kinds[random.integers(0, 40, n)] + 1.3 * units(random.standard_normal((n, 96)))
        )

    a, b = fresh(500), fresh(500)
    b[:60] = units(a[:60] + 0.6 * units(random.standard_normal((60, 96))))
    one = match(a.astype(np.float32), b.astype(np.float32))
    assert (one.matched & (one.columns == np.arange(500)))[:60].mean() > 0.9
    assert one.matched[60:].mean() < 0.25


def test_chances_rise_with_the_q_value_and_add_up_to_what_is_wrong():
    random = np.random.default_rng(0)
    q_values = np.sort(random.random(200)) ** 3
    probability = local_fdr(q_values[::-1])[::-1]
    assert (np.diff(probability) >= 0).all()
    assert probability.min() >= 0
    assert probability.max() <= 1
    wrong = q_values * np.arange(1, 201)
    assert (np.cumsum(probability) <= wrong + 1e-9).all()  # less where a chance would exceed 1
    np.testing.assert_allclose(local_fdr(np.full(5, 0.3)), 0.3)
    assert len(local_fdr(np.empty(0))) == 0


def test_a_dictionary_matches_itself():
    rows = np.random.default_rng(0).standard_normal((150, 20)).astype(np.float32)
    order = np.random.default_rng(1).permutation(150)
    found = match(rows, rows[order])
    np.testing.assert_array_equal(order[found.columns], np.arange(150))
    assert found.matched.all()
    assert found.cost == pytest.approx(0, abs=1e-3)


def test_the_larger_side_keeps_latents_without_a_pair():
    random = np.random.default_rng(0)
    b = random.standard_normal((40, 16)).astype(np.float32)
    a = np.concatenate([b + 0.05 * random.standard_normal(b.shape), -b]).astype(np.float32)
    found = match(a, b)
    np.testing.assert_array_equal(found.columns[:40], np.arange(40))
    assert (found.columns[40:] == -1).all()
    assert np.isnan(found.pair_costs[40:]).all()
    assert not found.matched[40:].any()
    assert (found.partial_assignment()[40:] == -1).all()


def test_a_partial_assignment_leaves_the_unmatched_out():
    planted = chain(400, 64, 2, churn=0.3, splits=0)
    found = match(*planted.dictionaries)
    right, wrong, _ = planted.score(found.partial_assignment(), 0, 1)
    assert right > 0.98
    assert wrong < 0.12
    assert planted.score(found.columns, 0, 1)[1] > 0.25


def test_nulls_keep_the_second_moments_of_directions():
    x = np.random.default_rng(0).standard_normal((4000, 12)) / np.arange(1, 13)
    x = units(x).astype(np.float32)
    for make in (rotate, shuffle):
        null = units(make(x, np.random.default_rng(1))(np.arange(4000)))
        # At length 1 the leading axis would have less, had the rows been at length 1 before.
        np.testing.assert_allclose(null.T @ null / 4000, x.T @ x / 4000, atol=0.015)
        assert (np.einsum("nd,nd->n", x, null) > 0.99).mean() < 0.1


def test_splitting_and_merging_are_seen_from_both_sides():
    random = np.random.default_rng(0)
    b = units(random.standard_normal((120, 48))).astype(np.float32)
    half = 0.3 * units(random.standard_normal((10, 48)))
    parts = [units(b[:10] + half), units(b[:10] - half)]
    a = np.concatenate([*parts, b[10:]]).astype(np.float32)
    near = feature_splitting(match(a, b))
    assert set(range(10)) <= set(near.merged().tolist())
    near = feature_splitting(match(b, a))
    assert set(range(10)) <= set(near.split().tolist())
    assert near.reduced_cost.min() > -1e-9


def test_the_joint_solution_reaches_further_than_composition():
    planted = chain(120, 96, 6, noise=LEVELS["high"], turn=0.2, seed=3)
    matches = [match(*planted.dictionaries[k : k + 2]) for k in range(5)]
    composed = compose([np.where(m.matched, m.columns, -1) for m in matches])
    layers = [m.unit_a for m in matches] + [matches[-1].unit_b]
    tracks = track(layers, matches)
    joint = tracks.between(0, 5, n=len(layers[0]))
    assert planted.score(joint, 0, 5)[0] > planted.score(composed, 0, 5)[0] + 0.1
    for distance in range(1, 6):  # the stated rate, 0.05, is meant along a track too
        wrong = [
            planted.score(tracks.between(k, k + distance, n=len(layers[k])), k, k + distance)[1]
            for k in range(6 - distance)
        ]
        assert np.mean(wrong) < 0.08
    for layer, x in enumerate(layers):
        own = tracks.latents[:, layer]
        assert sorted(own[own >= 0].tolist()) == list(range(len(x)))


def test_through_two_layers_tracks_are_pairs_that_stand_from_both_sides():
    planted = chain(300, 64, 2, noise=0.7)
    one = match(*planted.dictionaries)
    tracks = track([one.unit_a, one.unit_b], [one])
    columns = tracks.between(0, 1, n=300)
    found = np.flatnonzero(columns >= 0)
    np.testing.assert_array_equal(columns[found], one.columns[found])
    assert one.matched[found].all()
    linked = (tracks.latents >= 0).all(axis=1)
    assert (tracks.link_error_probability[~linked] == 0).all()
    assert (tracks.q_values[~linked] == 1).all()
    np.testing.assert_array_equal(tracks.q_values[linked, 0], tracks.q_values[linked, 1])
    assert (tracks.q_values[linked] <= 0.05).all()
    assert (tracks.link_error_probability[linked, 1] > 0).all()


def test_life_lines_of_a_chain_show_its_births_and_deaths():
    planted = chain(150, 64, 4, noise=0.3, churn=0.2, splits=0)
    matches = [match(*planted.dictionaries[k : k + 2]) for k in range(3)]
    tracks = track([m.unit_a for m in matches] + [matches[-1].unit_b], matches)
    lines = survival(tracks, matches)
    true = [np.isin(planted.names[0], planted.names[k]).mean() for k in (1, 2, 3)]
    assert lines.persistence[0] == pytest.approx(true[0], abs=0.08)
    assert lines.persistence[2] == pytest.approx(true[2], abs=0.1)
    assert (lines.low <= lines.persistence).all()
    assert (lines.persistence <= lines.high).all()
    assert (lines.earliest_birth <= lines.birth).all()
    assert (lines.death <= lines.latest_death).all()
    assert lines.birth_share[0] == 1
    assert lines.death_share[-1] == 1


def test_composing_with_the_way_back_is_where_one_began():
    there = np.array([2, 0, -1, 1])
    back = np.array([1, 3, 0])
    assert compose([there, back]).tolist() == [0, 1, -1, 3]
    assert cycle_agreement(there, back, n=4) == 1
    assert cycle_agreement(there, np.array([1, 0, 0]), n=4) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def two():
    """An autoencoder, the same with its latents shuffled, and rows for both."""
    a = Autoencoder(d_in=12, n_latents=24, sparsity=TopK(k=4), seed=0)
    b = Autoencoder(d_in=12, n_latents=24, sparsity=TopK(k=4), seed=0)
    order = torch.from_numpy(np.random.default_rng(0).permutation(24))
    b.load_state_dict({
        name: value[order] if name in ("W_dec", "b_enc") else value[:, order] if "enc" in name
        else value for name, value in a.state_dict().items()
    })  # fmt: skip
    return a, b, torch.randn(300, 12)


def test_shuffled_latents_fire_together_and_decode_alike(two):
    a, b, x = two
    found = match(a, b)
    fired = paired_codes(a, b, x, x)
    ways = baselines(a, b, found)
    assert co_firing(fired, found.columns).jaccard.value == pytest.approx(1)
    assert co_firing(fired, ways["random"]).jaccard.value < 0.5
    assert {"match", "partial", "same_index", "nearest", "unfolded"} <= set(ways)
    own = explained(x, a.decode(a.encode(x)))
    moved = transport(fired, b, x, found.columns)
    assert moved.value == pytest.approx(own.value, abs=1e-5)
    assert moved.low <= moved.value <= moved.high
    assert transport(fired, b, x, ways["random"]).value < own.value - 0.1


def test_rescaling_is_distinguished_from_permuting(two):
    a, b, x = two
    found = match(a, b)
    fired = paired_codes(a, b, x, x)
    doubled = dataclasses.replace(fired, a=2 * fired.a)
    half = np.full(24, 0.5)
    assert transport(doubled, b, x, found.columns).value < 0.5
    again = transport(doubled, b, x, found.columns, half).value
    assert again == pytest.approx(transport(fired, b, x, found.columns).value)


def test_sparse_codes_give_what_dense_ones_give(two):
    a, b, x = two
    fired = paired_codes(a, b, x, x)
    assert fired.a.nnz <= 4 * len(x)  # of 24 latents
    random = np.random.default_rng(1)
    columns, gain = random.integers(-1, 24, 24), random.uniform(0.5, 2, 24)  # some meet
    code_a, code_b = a.encode(x).detach().numpy(), b.encode(x).detach().numpy()
    moved = np.zeros_like(code_b)
    for latent in np.flatnonzero(columns >= 0):
        moved[:, columns[latent]] += gain[latent] * code_a[:, latent]
    dense = explained(x, b.decode(torch.from_numpy(moved)))
    assert transport(fired, b, x, columns, gain).value == pytest.approx(dense.value, rel=1e-5)
    alive = [k for k in range(24) if columns[k] >= 0 and code_a[:, k].any()]
    both = [(code_a[:, k] > 0) & (code_b[:, columns[k]] > 0) for k in alive]
    either = [(code_a[:, k] > 0) | (code_b[:, columns[k]] > 0) for k in alive]
    firing = fired.firing(columns)
    assert firing.latent_a.tolist() == alive
    shares = [x.sum() / (code_a[:, k] > 0).sum() for x, k in zip(both, alive, strict=True)]
    np.testing.assert_allclose(firing.p_b_given_a, shares)
    ratios = [x.sum() / y.sum() for x, y in zip(both, either, strict=True)]
    np.testing.assert_allclose(firing.jaccard, ratios)


def test_codes_match_dictionaries_of_different_widths(two):
    a, _, x = two
    wide = torch.nn.functional.pad(x, (0, 5))
    b = Autoencoder(d_in=17, n_latents=24, sparsity=TopK(k=4))
    with torch.no_grad():
        b.W_dec[:, :12], b._W_enc[:12] = a.W_dec, a._W_enc
        b.W_dec[:, 12:], b._W_enc[12:] = 0, 0
    with pytest.raises(InputError, match=r"A has 12 numbers for a latent and B has 17"):
        match(a, b)
    found = match(correlate(a, x), correlate(b, wide), cost="codes")
    np.testing.assert_array_equal(found.columns, np.arange(24))


def test_latents_that_are_hardly_active_are_not_paired_by_their_codes(two):
    a, b, x = two
    codes = [correlate(one, x) for one in (a, b)]
    whole = match(*codes, cost="codes", nulls=(permute_samples,))
    codes[0][[3, 7]] = 0
    codes[1][5] = 0
    found = match(*codes, cost="codes", nulls=(permute_samples,))
    assert found.columns[[3, 7]].tolist() == [-1, -1]
    assert 5 not in found.columns
    kept = np.setdiff1d(np.arange(24), [3, 7, np.flatnonzero(whole.columns == 5)[0]])
    np.testing.assert_array_equal(found.columns[kept], whole.columns[kept])
    assert found.assignment.certify(found.costs).gap < 1e-9
    rows = np.flatnonzero(found.columns >= 0)
    cosine = (codes[0][rows] * codes[1][found.columns[rows]]).sum(axis=1)
    np.testing.assert_allclose(found.cosines[rows], cosine, atol=1e-5)
    np.testing.assert_allclose(found.pair_costs[rows], 2 - 2 * cosine, atol=1e-5)
    assert (found.partial_assignment()[[3, 7]] == -1).all()
    near = feature_splitting(found)
    assert not set(near.latent_a.tolist()) & {3, 7}
    prices = near.reduced_cost[near.latent_b == found.columns[near.latent_a]]
    np.testing.assert_allclose(prices, 0, atol=1e-9)
    with pytest.raises(InputError, match="No latent of B is active often enough"):
        match(codes[0], np.zeros_like(codes[1]), cost="codes")


def test_codes_of_many_rows_are_added_up_and_keep_their_products():
    one = Autoencoder(d_in=12, n_latents=40, sparsity=TopK(k=6), seed=0)
    x = torch.randn(4000, 12)
    exact, added = correlate(one, x), correlate(one, x, sketch_size=1500)
    assert exact.shape == (40, 4000)
    assert added.shape == (40, 1500)
    off = added @ added.T - exact @ exact.T
    assert np.abs(off).max() < 5 / np.sqrt(1500)
    assert off.std() < 1.3 / np.sqrt(1500)
    rare = one.encode(x).count_nonzero(dim=0).numpy() < 500
    assert not correlate(one, x, min_active_rows=500)[rare].any()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("n", "d", "k"), [(500, 2, 3), (400, 6, 5)])
def test_clusters_that_both_have_do_not_make_partners(n, d, k, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(pricing, "KEPT_BYTES", 0)
    random = np.random.default_rng(0)
    centers = random.standard_normal((k, d))
    a, b = (
        centers[random.integers(0, k, n)] + 1e-3 * random.standard_normal((n, d)) for _ in range(2)
    )
    assert match(a.astype(np.float32), b.astype(np.float32)).matched.mean() < 0.02


def test_progress_tells_of_the_pairing_and_then_of_its_null():
    told: list[tuple[int, int]] = []
    rows = np.random.default_rng(0).normal(size=(2, 90, 12)).astype(np.float32)
    match(*rows, on_progress=lambda *each: told.append(each))
    shares = [done / total for done, total in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert sum(share <= 0.5 for share in shares) >= 2  # the pairing
    assert sum(share > 0.5 for share in shares) >= 3  # rounds of the null


def test_rare_codes_that_coincide_by_chance_do_not_match():
    random = np.random.default_rng(0)
    rate = random.beta(0.3, 10, (2, 250, 1))  # many latents are active on a handful of rows
    codes = (random.random((2, 250, 600)) < rate) * random.gamma(2, 1, (2, 250, 600))
    codes -= codes.mean(axis=2, keepdims=True)
    a, b = (x.astype(np.float32) for x in codes)
    assert match(a, b, cost="codes", nulls=(permute_samples,)).matched.mean() < 0.02


def test_rows_of_one_sample_that_are_alike_do_not_make_partners():
    random = np.random.default_rng(0)
    n_samples, rows, d = 300, 30, 150
    samples = np.repeat(np.arange(n_samples), rows)
    # Each latent fires in some samples, on most of their rows; none has to do with another.
    there = random.random((2, n_samples, 1, d)) < 0.03
    x = torch.from_numpy(there & (random.random((2, n_samples, rows, d)) < 0.8)).float()
    a, b = x.reshape(2, -1, d)
    plain: Any = SimpleNamespace(d_in=d, n_latents=d, encode=lambda x: x, decode=lambda code: code)
    for sums in (len(samples), 3000):
        kept = [correlate(plain, y, samples=samples, sketch_size=sums) for y in (a, b)]
        assert kept[0].shape[1] == sums
        null = functools.partial(permute_samples, block=sample_block(samples))
        assert match(*kept, cost="codes", nulls=(null,)).matched.mean() < 0.02
        assert match(*kept, cost="codes", nulls=(permute_samples,)).matched.mean() > 0.1
    # Partners are still found, and a sample of very many rows does not need as many numbers.
    order = torch.from_numpy(random.permutation(d))
    kept = [correlate(plain, y, samples=samples // 50, sketch_size=2048) for y in (a, a[:, order])]
    null = functools.partial(permute_samples, block=sample_block(samples // 50))
    assert sample_block(samples // 50) == 64
    found = match(*kept, cost="codes", nulls=(null,))
    assert found.matched.all()
    np.testing.assert_array_equal(order[found.columns], np.arange(d))


@pytest.mark.parametrize(
    "rule", [TopK(k=4), BatchTopK(k=4), ReLU(), Gated(), JumpReLU(threshold=0.1)]
)
def test_every_rule_is_folded_by_what_its_latents_are_when_active(rule):
    a = Autoencoder(d_in=12, n_latents=24, sparsity=rule, seed=0)
    order = torch.from_numpy(np.random.default_rng(0).permutation(24))
    x = torch.randn(300, 12)
    factor = np.linspace(0.5, 3, 24)
    unit = mean_active(a, x)
    found = match(a, a.W_dec.detach()[order], scale=(unit, unit[order]))
    np.testing.assert_array_equal(order[found.columns], np.arange(24))
    assert found.cost == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(
        fold(a, scale=unit * factor).decoder,
        factor[:, None] * fold(a, scale=unit).decoder,
        rtol=1e-5,
    )
    code = a.encode(x).detach().double()
    active = (code != 0).sum(dim=0)
    mean = code.sum(dim=0) / active.clamp_min(1)
    np.testing.assert_allclose(unit[active > 0], mean[active > 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: fold(object()), "pass a dictionary with encode"),
        (lambda: fold(np.zeros((0, 3))), "no latents"),
        (lambda: fold(np.array([[1.0, 2.0], [np.nan, 0.0]])), "not finite at latent 1"),
        (
            lambda: fold(np.ones((2, 2)), scale=np.array([1.0, -1.0])),
            "Latent 1 of A .* must be > 0",
        ),
        (lambda: match(np.ones((2, 2)), np.ones((2, 2)), fdr=1.5), "false match rate must lie"),
        (lambda: match(np.ones((2, 2)), np.ones((2, 2)), cost="encoder"), "with an encoder"),
        (lambda: match(np.ones((2, 2)), np.ones((2, 2)), seed=-1), "seed must be at least 0"),
        (
            lambda: match(np.ones((2, 2)) + 1j, np.ones((2, 2))),
            "complex128 values, .* of real numbers",
        ),
        (lambda: match(np.full((2, 2), 1e30), np.ones((2, 2))), "more than float32 holds"),
        (lambda: match(np.full((2, 2), 1e60), np.ones((2, 2))), "not finite at latent 0"),
        (lambda: track([np.eye(3)] * 3, [match(np.eye(3), np.eye(3))]), "matches of 3 with 3"),
    ],
)
def test_what_cannot_be_matched_is_named(mistake, message):
    with pytest.raises(InputError, match=message):
        mistake()


def test_a_cost_that_is_not_known_is_named():
    unchecked = inspect.unwrap(match)  # tests check types before
    with pytest.raises(InputError, match=r"one of decoder, .* got 'rows'"):
        unchecked(np.eye(2), np.eye(2), cost="rows")  # pyright: ignore


def test_the_front_door_offers_matching():
    found = mechatlas.match(np.eye(4), np.eye(4)[::-1].copy())
    assert found.columns.tolist() == [3, 2, 1, 0]
    assert math.isclose(found.gap, 0, abs_tol=1e-12)
    assert found.matched.shape == found.q_values.shape == (4,)


def test_spellings_of_version_0_1_still_work():
    a, b = chain(60, 16, 2).dictionaries
    with pytest.warns(DeprecationWarning, match="is now called") as warned:
        result = mechatlas.match(a, b, parts="cosine", rate=0.1)  # pyright: ignore
    assert ["match(cost=)" in str(w.message) for w in warned] == [True, False]
    with pytest.warns(DeprecationWarning, match="cosine_threshold"):
        assert result.threshold == result.cosine_threshold
    with pytest.warns(DeprecationWarning, match="feature_splitting"):
        old = mechatlas.relatives(result)  # pyright: ignore
    np.testing.assert_array_equal(old.latent_a, feature_splitting(result).latent_a)


def test_lists_tensors_and_bfloat16_match_like_arrays():
    rows = np.random.default_rng(0).integers(-3, 4, (12, 6)) / 2  # exact in bfloat16
    columns = match(rows, rows[::-1].copy()).columns
    converters: list[Any] = [np.ndarray.tolist, torch.tensor, lambda x: torch.tensor(x).bfloat16()]
    for convert in converters:
        result = match(convert(rows), convert(rows[::-1].copy()))
        np.testing.assert_array_equal(result.columns, columns)


class Stranger:
    """A dictionary that shows nothing but `encode` and `decode`."""

    d_in, n_latents = 8, 20

    def __init__(self, power=1):
        self.atoms = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
        self.power = power

    def encode(self, x):
        return (x @ self.atoms.T).relu()

    def decode(self, code):
        return code.pow(self.power) @ self.atoms + 0.5


def test_a_strangers_dictionary_is_matched_by_what_it_decodes():
    stranger = Stranger()
    result = match(stranger, stranger.atoms.flip(0))
    np.testing.assert_array_equal(result.columns, np.arange(20)[::-1])
    assert result.cost == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="not affine"):
        match(Stranger(power=2), stranger)
    with pytest.raises(InputError, match="with an encoder"):
        match(stranger, stranger, cost="all")


def test_a_result_prints_as_what_was_found():
    result = match(np.eye(4), np.eye(4))
    assert repr(result).startswith("Match: ")
    assert "optimality gap" in repr(result)
    assert repr(feature_splitting(result)).startswith("FeatureSplitting: ")
    tracks = track([np.eye(4)] * 2, [result])
    assert repr(tracks).startswith("Tracks: ")
    assert repr(survival(tracks, [result])).startswith("SurvivalCurves: ")


def with_more(dictionary, random):
    """The dictionary with degenerate latents in between, and where the others are now."""
    rows = dictionary.W_dec.numpy()
    n, d = rows.shape
    n_zero, n_constant, n_copies, n_never = random.integers(1, 6, 4)
    copied = random.choice(n, n_copies, replace=False)
    extra = [np.zeros((n_zero, d)), np.ones((n_constant, d)), 3.0 * rows[copied]]
    extra.append(rows[random.integers(n, size=n_never)] + random.standard_normal((n_never, d)))
    theta = np.ones(n_zero + n_constant + n_copies + n_never)
    theta[-n_never:] = np.inf
    # Copies come after their originals, so that the originals stay the first of their direction.
    place = np.concatenate([
        np.arange(n), random.random(n_zero + n_constant) * n, n + np.arange(n_copies),
        random.random(n_never) * n,
    ])  # fmt: skip
    order = np.argsort(place, kind="stable")
    made = SimpleNamespace(**vars(dictionary))
    made.W_dec = torch.from_numpy(np.concatenate([rows, *extra])[order].astype(np.float32))
    made.W_enc = torch.cat([dictionary.W_enc, torch.ones(d, len(theta))], dim=1)[:, order]
    made.b_enc = torch.zeros(len(order))
    made.threshold = torch.cat([dictionary.threshold, torch.from_numpy(theta).float()])[order]
    made.n_latents = len(order)
    where = np.argsort(order)[:n]
    return made, where, copied


@given(seeds)
@settings(max_examples=3)
def test_degenerate_latents_are_never_matched_and_change_nothing_for_others(seed):
    random = np.random.default_rng(seed)
    plain = chain(150, 24, 2, noise=0.5, seed=seed).dictionaries
    before = match(*plain)
    (a, in_a, copied_a), (b, in_b, copied_b) = (with_more(x, random) for x in plain)
    after = match(a, b)
    other_a = np.setdiff1d(np.arange(a.n_latents), in_a)
    for wrong in (other_a, in_a[copied_a]):
        assert not after.matched[wrong].any()
        assert (after.q_values[wrong] == 1).all()
        assert after.degenerate_a[wrong].all()
    np.testing.assert_array_equal(in_b[before.columns], after.columns[in_a])
    same = ~np.isin(np.arange(len(in_a)), copied_a) & ~np.isin(before.columns, copied_b)
    np.testing.assert_array_equal(before.q_values[same], after.q_values[in_a][same])
    np.testing.assert_array_equal(before.matched[same], after.matched[in_a][same])
    assert after.cosine_threshold == before.cosine_threshold
    np.testing.assert_array_equal(after.evidence.null, before.evidence.null)
    assert f"{after.degenerate_a.sum()} latents of A" in repr(after)


def test_one_zero_atom_is_not_matched():
    rows = np.random.default_rng(0).standard_normal((256, 64))
    dead = rows.copy()
    dead[7] = 0
    result = match(dead, rows[::-1])
    assert np.flatnonzero(~result.matched).tolist() == [7]
    assert result.cosine_threshold > 0.4


def test_tracks_have_no_links_of_degenerate_latents():
    rows = np.random.default_rng(0).standard_normal((64, 16))
    layers = [rows.copy(), rows.copy(), rows.copy()]
    for x in layers:
        x[3], x[5] = 0, x[9]
    matches = [match(layers[0], layers[1]), match(layers[1], layers[2])]
    tracks = track(layers, matches)
    linked = tracks.latents[(tracks.latents >= 0).sum(axis=1) > 1]
    assert not np.isin(linked, [3, 5, 9]).any()
    assert len(linked) == 61


def test_latents_that_are_never_active_or_constant_are_told_from_rows(two):
    a, _, x = two
    plain: Any = SimpleNamespace(d_in=12, n_latents=24, W_dec=a.W_dec.detach(), decode=a.decode)

    def encode(x):
        code = a.encode(x).clone()
        code[:, 2], code[:, 5] = 0, 0.3
        return code

    plain.encode = encode
    live = varying(plain, x)
    assert np.flatnonzero(~live).tolist() == [2, 5]
    result = match(plain, a, live=(live, None))
    assert np.flatnonzero(~result.matched).tolist() == [2, 5]
    assert result.columns[[2, 5]].tolist() == [-1, -1]
    codes = correlate(plain, x)
    assert np.flatnonzero(~codes.any(axis=1)).tolist() == [2, 5]
    with pytest.raises(InputError, match=r"B has 24 latents, its mask of live ones 3: give"):
        match(plain, a, live=(None, [True] * 3))
    with pytest.raises(InputError, match="No latent of A can be paired"):
        match(np.zeros((4, 3)), np.eye(3))


@pytest.mark.parametrize("cost", ["all", "balanced"])
@pytest.mark.parametrize(("tied", "spread"), [(True, 0.5), (False, 0.0)])
def test_the_stated_rate_holds_where_several_parts_are_compared(cost, tied, spread):
    found, wrong = [], []
    for seed in range(3):
        a, b, partner = jump_relu_pair(600, 96, tied=tied, spread=spread, seed=seed)
        columns = match(a, b, cost=cost, seed=seed).matched_columns()
        right = (columns >= 0) & (columns == partner)
        found.append(right.sum() / (partner >= 0).sum())
        wrong.append(1 - right.sum() / (columns >= 0).sum())
    assert np.mean(found) > 0.98
    assert 0.025 < np.mean(wrong) < 0.08  # 0.09 to 0.13 where the parts' lengths are not kept


@pytest.mark.parametrize("cost", ["decoder", "encoder", "all", "balanced"])
def test_independent_dictionaries_do_not_match_by_any_cost(cost):
    a, b, _ = jump_relu_pair(400, 64, tied=False, spread=0.5, alone=1.0)
    assert match(a, b, cost=cost).matched.mean() < 0.01


def test_pairs_are_replaced_as_often_as_they_are_likely_to_be_chance():
    random = np.random.default_rng(0)
    q = np.concatenate([np.zeros(20), np.full(20, 0.1), np.linspace(0.2, 0.6, 40)])
    likely = local_fdr(q)
    n = round(likely.sum())
    draws = np.zeros(len(q))
    for _ in range(1500):
        drawn = _draw_replaced(-q, q, n, random)
        assert len(drawn) == len(set(drawn))
        assert abs(len(drawn) - n) <= 1
        draws[drawn] += 1 / 1500
    assert draws == pytest.approx(np.minimum(likely * n / likely.sum(), 1), abs=0.06)


@pytest.mark.slow
def test_chance_pairs_of_a_large_dictionary_are_counted_without_bias():
    a, b, partner = jump_relu_pair(8192, 256, tied=True, spread=0.0)
    result = match(a, b)
    wrong = (result.matched & (result.columns != partner)).sum() / result.matched.sum()
    assert result.evidence.n_null == pytest.approx(
        (partner < 0).sum(), rel=0.04
    )  # else 1.07 times as many
    assert 0.04 < wrong < 0.06  # 0.033 where the draws of the first, rough round count


def test_pairs_above_a_cosine_are_found_whatever_the_product_is_computed_in():
    random = np.random.default_rng(0)
    a, b = (units(random.standard_normal((n, 64))).astype(np.float32) for n in (300, 400))
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    largest = np.sort(exact.ravel())[::-1]
    for k in (*range(1, 100), len(largest) // 5):
        least = float(largest[k - 1 : k + 1].mean())  # between two of them
        i, j, cosine = _pairs_above(a, b, least)
        np.testing.assert_array_equal(np.stack([i, j], axis=1), np.argwhere(exact >= least))
        np.testing.assert_allclose(cosine, exact[i, j], atol=1e-6)


def test_evidence_is_the_same_whichever_dictionary_is_the_larger():
    farthest = []
    for seed in range(6):
        random = np.random.default_rng(seed)
        a = random.standard_normal((240, 24))
        b = a[:160] + 1.2 * random.standard_normal((160, 24))
        one, other = match(a, b), match(b, a)
        partners = other.columns
        assert 0 < other.matched.sum() < 160
        np.testing.assert_array_equal(one.columns[partners], np.arange(160))
        farthest.append(np.abs(one.q_values[partners] - other.q_values).max())
    # The draws differ; with vectors of another length the null would be off by .08 and more.
    assert np.mean(farthest) < 0.04
