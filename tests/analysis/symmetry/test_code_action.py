"""Planted representations on codes, learnt from codes and posed rows."""

import numpy as np
import pytest

from mechatlas.analysis.symmetry.classify import symmetry
from mechatlas.analysis.symmetry.code_action import fit_code_action, regular_action
from mechatlas.base import InputError
from mechatlas.maths.named_groups import group
from tests.app.posed import features

D4 = group("D4")
N, D = 1500, 30
HELD = np.arange(N) >= 1000


def irrep(name_or_dimension, g=D4):
    return next(
        r for r in g.irreps() if name_or_dimension in (r.name, r.dimension) and r.name != "1a"
    )


def rows(matrices, *, noise=0.3, seed=0, d=D):
    """Codes, posed rows and decoder of a representation that is not written in its own basis."""
    random = np.random.default_rng(seed)
    m = matrices.shape[1]
    codes = random.standard_normal((N, m)) * (random.random((N, m)) < 0.3)
    decoder = random.standard_normal((m, d))
    posed = 2 + np.einsum("gab,nb,ad->ngd", matrices, codes, decoder)
    return codes, posed + noise * random.standard_normal(posed.shape), decoder


def direct_sum(*parts):
    order, m = len(parts[0]), sum(p.shape[1] for p in parts)
    out, at = np.zeros((order, m, m)), 0
    for p in parts:
        out[:, at : at + p.shape[1], at : at + p.shape[1]] = p
        at += p.shape[1]
    return out


def test_a_sign_flip_and_an_irrep_of_dimension_two_are_recovered():
    sign, plane, trivial = irrep("1c"), irrep(2), D4.irreps()[0]
    basis = np.random.default_rng(1).standard_normal((2, 2)) + 2 * np.eye(2)
    turned = np.linalg.inv(basis) @ plane.matrices @ basis  # not orthogonal
    truth = direct_sum(sign.matrices, turned, trivial.matrices)
    codes, posed, decoder = rows(truth)
    parts = [[0], [1, 2], [3]]
    found = fit_code_action(codes, posed, decoder, D4, HELD, parts=parts)
    assert found.exact.all()
    assert found.distance.max() < 0.02
    np.testing.assert_allclose(found.matrices, truth, atol=0.06)
    products = found.matrices[:, None] @ found.matrices[None]
    np.testing.assert_allclose(found.matrices[D4.table], products, atol=1e-8)
    names = [r.name for r in D4.irreps()]
    for part, each in zip(found.multiplicities, (sign, plane, trivial), strict=True):
        assert [names[k] for k in np.flatnonzero(part)] == [each.name]
    # The regular action knows no signs: the learnt one leaves only the noise.
    spread = np.square(posed[HELD] - posed[~HELD].mean(axis=0)).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(found.fvu["learnt"], 0.09 * D / spread, rtol=0.06)
    assert found.gain_low > 0.3
    assert found.fvu["unchanged"][0] == pytest.approx(found.fvu["learnt"][0])


def test_one_part_of_all_latents_is_decomposed_into_its_irreps():
    truth = direct_sum(irrep("1b").matrices, irrep(2).matrices, irrep(2).matrices)
    mixed = np.linalg.qr(np.random.default_rng(2).standard_normal((5, 5)))[0]
    found = fit_code_action(*rows(mixed.T @ truth @ mixed), D4, HELD)
    assert found.exact.tolist() == [True]
    count = {r.name: int(k) for r, k in zip(D4.irreps(), found.multiplicities[0], strict=True)}
    assert {name: k for name, k in count.items() if k} == {"1b": 1, "2a": 2}


def test_irreps_of_complex_type_are_counted_once():
    c5 = group("C5")
    plane = next(r for r in c5.irreps() if r.dimension == 2)
    found = fit_code_action(*rows(plane.matrices), c5, HELD)
    assert found.multiplicities.sum() == 1
    assert found.multiplicities[0, c5.irreps().index(plane)] == 1


def test_random_rows_give_no_gain():
    for seed in range(3):
        random = np.random.default_rng(seed)
        codes, posed, decoder = rows(irrep(2).matrices, seed=seed)
        order = [random.permutation(N) for _ in range(8)]
        shuffled = np.stack([posed[order[g], g] for g in range(8)], axis=1)
        found = fit_code_action(codes, shuffled, decoder, D4, HELD)
        assert found.gain_low <= 0
        assert found.gain < 0
        assert found.distance > 0.8


def test_a_regular_action_is_learnt_but_gains_nothing():
    regular = np.eye(8)[D4.table].swapaxes(1, 2)  # element h goes to gh
    codes, posed, decoder = rows(regular)
    moves = D4.table.copy()
    found = fit_code_action(codes, posed, decoder, D4, HELD, regular=moves)
    assert found.exact.all()
    np.testing.assert_allclose(found.matrices, regular, atol=0.06)
    assert abs(found.gain) < 0.01
    assert found.gain_low < 0
    unmoved = fit_code_action(codes, posed, decoder, D4, HELD)
    assert unmoved.gain_low > 0.5
    assert found.multiplicities.tolist() == [[r.multiplicity for r in D4.irreps()]]


def test_families_of_a_crosscoder_have_their_regular_action():
    blocks, _, families = features()
    found = symmetry(blocks, D4, [blocks, blocks])
    moves = regular_action(found)
    for g in range(8):
        for i, j in enumerate(moves[g]):
            assert families[i] == families[j]
            np.testing.assert_allclose(blocks[j], blocks[i][D4.table[:, g]], atol=1e-5)
    few = symmetry(blocks[1:], D4, [blocks[1:], blocks[1:]])
    lost = regular_action(few)
    assert (lost[:, :7] == -1).sum() == 7  # each of the others misses the pose that is gone
    random = np.random.default_rng(0)
    codes = random.exponential(size=(N, 19)) * (random.random((N, 19)) < 0.2)
    posed = np.einsum("nk,kgd->ngd", codes, blocks)
    posed += 0.1 * random.standard_normal(posed.shape)
    parts = [np.flatnonzero(families == f).tolist() for f in range(5)]
    learnt = fit_code_action(
        codes, posed, blocks[:, 0], D4, HELD, parts=parts, regular=moves, image=np.arange(N) // 20
    )
    assert learnt.exact.all()
    assert learnt.fvu["learnt"].max() < 0.01
    assert abs(learnt.gain) < 0.001


def test_what_does_not_fit_is_refused():
    codes, posed, decoder = rows(irrep(2).matrices)
    with pytest.raises(InputError, match=r"posed must have shape \(1500, 8, 30\)"):
        fit_code_action(codes, posed[:, :4], decoder, D4, HELD)
    with pytest.raises(InputError, match="each of the 2 latents exactly once"):
        fit_code_action(codes, posed, decoder, D4, HELD, parts=[[0], [0, 1]])
    with pytest.raises(InputError, match="held-out rows of two images"):
        fit_code_action(codes, posed, decoder, D4, HELD, image=np.zeros(N, int))
