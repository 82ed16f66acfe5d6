"""Matching on engines: blocks of large dictionaries in any order, with the same result."""

import copy

import numpy as np
import pytest

from mechatlas.analysis.matching.pairing import match
from mechatlas.maths import assignment, pricing


class Backwards:
    """Engine that does its pieces in reverse order, from copies."""

    def __init__(self):
        self.n_pieces = 0

    def map(self, work, pieces, *, shared=None):
        for number, piece in reversed(list(enumerate(pieces))):
            self.n_pieces += 1
            yield number, work(copy.deepcopy(piece), copy.deepcopy(shared))


def arrays_of(result):
    parts = result.assignment, result.evidence._asdict(), vars(result)
    together = {**vars(parts[0]), **parts[1], **parts[2]}
    return {name: x.tobytes() for name, x in together.items() if isinstance(x, np.ndarray)}


@pytest.mark.parametrize(("n", "m"), [(120, 120), (112, 120), (120, 70)])
def test_blocks_on_an_engine_give_the_same_match_as_here(n, m, monkeypatch):
    monkeypatch.setattr(pricing, "KEPT_BYTES", 0)
    monkeypatch.setattr(pricing, "BLOCK_BYTES", 4 * 120 * 16)  # several blocks of rows
    random = np.random.default_rng(n + m)
    a = random.normal(size=(n, 12)).astype(np.float32)
    b = random.normal(size=(m, 12)).astype(np.float32)
    b[:40] = a[:40] + 0.2 * b[:40]  # the others have no partner
    one_by_one = match(a, b)
    monkeypatch.setattr(assignment, "WORTH_SENDING", 1)
    here, engine = match(a, b), Backwards()
    there = match(a, b, engine=engine)
    assert engine.n_pieces > 3 * 8  # of the pairing, and of the pairings and rivals of the null
    assert arrays_of(here) == arrays_of(there)
    assert here.cost == pytest.approx(one_by_one.cost, rel=1e-12)
    assert here.assignment.certify(here.costs).gap == pytest.approx(0, abs=1e-9)
    small = Backwards()
    monkeypatch.setattr(assignment, "WORTH_SENDING", 1 << 31)
    match(a, b, engine=small)
    assert small.n_pieces == 0  # not worth it
