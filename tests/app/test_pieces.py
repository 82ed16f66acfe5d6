"""Parts of a page about single features: rows, lists and claims, against what they were made of."""

import json

import numpy as np
import pytest

from mechatlas.app.report import atoms, pieces
from mechatlas.app.report.dossiers import BranchLine, FeatureAt, MatchLine, SymmetryLine, collect


def test_the_row_of_a_feature_holds_its_part_of_every_array(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 3)
    random = np.random.default_rng(0)
    arrays = {
        "slot": random.integers(-1, 9, (7, 5)).astype(np.int32),
        "place": random.integers(0, 99, (7, 5, 2)).astype(np.int16),
        "heat": random.integers(0, 255, (7, 5, 3, 3)).astype(np.uint8),
        "apart": np.zeros((7, 5, 0), np.uint8),
        "scale": random.random(7).astype(np.float32),
    }
    row = pieces.row_type(arrays)
    data = b"".join(pieces.row_blocks(arrays, row))
    assert len(data) == 7 * row.itemsize
    for name, kind, at, count in pieces.layout_of(row):
        assert at % np.dtype(kind).itemsize == 0
        for i in range(7):
            found = np.frombuffer(data, kind, count, i * row.itemsize + at)
            assert found.tolist() == arrays[name][i].ravel().tolist(), name


def branch(name, *, significant):
    return BranchLine(
        anchor="b", branch=name, share=1.0, expected=0.5, q=0.0, fdr=0.05, significant=significant,
        ablation=None, activation=None,
    )  # fmt: skip


def match(cosine, *, after, matched):
    return MatchLine(
        anchor="m", after=after, name="next", other=FeatureAt("next", 0), cosine=cosine, q=0.0,
        fdr=0.05, matched=matched,
    )  # fmt: skip


def symmetry(name, members):
    return SymmetryLine(
        anchor="s", part=0, name=name, order=2, claimed=True, q=0.0, fdr=0.05, ceiling=1.0,
        family=3, pose="e", members=members,
    )  # fmt: skip


def test_claims_are_found_by_their_words_and_read_line_by_line():
    statements = [
        (FeatureAt("run", 1), branch("5x5", significant=True)),
        (FeatureAt("run", 1), branch("1x1", significant=False)),
        (FeatureAt("run", 4), branch("5x5", significant=True)),
        (FeatureAt("run", 4), match(0.5, after=True, matched=True)),
        (FeatureAt("run", 4), match(0.7, after=True, matched=False)),
        (FeatureAt("run", 2), match(0.2, after=False, matched=False)),
        (FeatureAt("run", 2), symmetry("half-turn", [(4, "r")])),
        (FeatureAt("run", 4), symmetry("mirror", [])),
    ]
    records = collect(statements)["run"]
    found = {
        (kind, word): listed[int(at[k]) : int(at[k + 1])].tolist()
        for kind, (words, (at, listed)) in pieces.claim_lists(records).items()
        for k, word in enumerate(words)
    }
    assert found == {
        ("is", "matched"): [4], ("is", "specialized"): [1, 4], ("is", "symmetric"): [2, 4],
        ("specialized", "5x5"): [1, 4], ("class", "half-turn"): [2], ("class", "mirror"): [4],
        ("family", "3"): [2],
    }  # fmt: skip
    best = pieces.best_cosines(records, 6)
    assert best["match"].tolist() == pytest.approx([0, 0, 0, 0, 0.7, 0])
    assert best["origin"].tolist() == pytest.approx([0, 0, 0.2, 0, 0, 0])
    lines, at = pieces.lines_of(records, 6)
    for i in range(6):
        line = lines[int(at[i]) : int(at[i + 1])]
        kinds = set(json.loads(line)) if line else set()
        claimed = {k for k, of in vars(records[i]).items() if of} if i in records else set()
        assert kinds == claimed


def test_near_atoms_are_found_among_very_many(monkeypatch):
    random = np.random.default_rng(0)
    centers = random.normal(size=(60, 12))
    rows = centers[random.integers(60, size=3000)] + 0.4 * random.normal(size=(3000, 12))
    alive = np.arange(3000) % 10 > 0
    exact = atoms.neighbors(rows, alive)
    monkeypatch.setattr(atoms, "EXACT", 1000)
    found = atoms.neighbors(rows, alive)
    assert exact.recall == 1
    assert (found.latent[~alive] == -1).all()
    shared = [np.isin(exact.latent[i], found.latent[i]).mean() for i in np.flatnonzero(alive)]
    assert np.mean(shared) > 0.8
    assert abs(found.recall - np.mean(shared)) < 0.08
    same = exact.latent == found.latent
    assert np.allclose(exact.cosine[same], found.cosine[same], atol=1e-6)
    assert not (found.latent == np.arange(3000)[:, None]).any()


def test_a_map_of_very_many_atoms_puts_each_beside_its_nearest(monkeypatch):
    random = np.random.default_rng(0)
    centers = random.normal(size=(6, 16))
    label = random.integers(6, size=1500)
    monkeypatch.setattr(atoms, "MAX_ATOMS_FOR_UMAP", 300)
    flat, method = atoms.flat_map(
        centers[label] + 0.2 * random.normal(size=(1500, 16)), np.ones(1500, bool)
    )
    assert "300" in method
    middle = np.stack([np.median(flat[label == k], axis=0) for k in range(6)])
    nearest = np.square(flat[:, None] - middle[None]).sum(axis=2).argmin(axis=1)
    assert (nearest == label).mean() > 0.95
