"""Feature flow on planted origins."""

import numpy as np
import pytest

import mechatlas as ma
from mechatlas.analysis.matching.flow import (
    ATTENTION,
    MLP,
    ORIGINS,
    PASSED,
    TRANSFORMED,
    UNEXPLAINED,
)
from mechatlas.base import InputError

D, N = 64, 40
"""Width of the stream, and latents of each origin."""


def planted(seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Two layers of the stream, an attention and an MLP; the true origin of each latent."""
    draw = np.random.default_rng(seed)
    unit = [draw.standard_normal((N, D)) for _ in range(5)]
    passed, both, heads, neurons, new = unit
    near = [x + 0.3 * draw.standard_normal(x.shape) for x in unit]
    second = np.concatenate([near[0], near[1], near[2], near[3], new])
    truth = np.repeat([PASSED, TRANSFORMED, ATTENTION, MLP, UNEXPLAINED], N)
    order = draw.permutation(len(second))
    first = np.concatenate([passed, both, draw.standard_normal((N, D))])
    attention = np.concatenate([heads, draw.standard_normal((N, D))])
    mlp = np.concatenate([neurons, both])
    return [first, second[order]], attention, mlp, truth[order]


@pytest.fixture(scope="module")
def flow():
    stream, attention, mlp, _ = planted()
    third = stream[1][::-1] + 0.2 * np.random.default_rng(9).standard_normal(stream[1].shape)
    return ma.feature_flow([*stream, third], attention=[attention, []], mlp=[mlp, []])


def test_origins_are_those_that_were_planted(flow):
    _, _, _, truth = planted()
    found = flow.origins[0]
    assert (found == truth).mean() > 0.88
    for origin in range(len(ORIGINS)):
        share = flow.share(1, origin)
        assert share.low <= 0.2 <= share.high, ORIGINS[origin]
    assert set(flow.origins[1]) <= {PASSED, UNEXPLAINED}, "no modules were given there"


def test_nothing_comes_from_dictionaries_that_were_turned(flow):
    stream, attention, mlp, _ = planted()
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))[0]
    control = ma.feature_flow(
        [stream[0] @ turn, stream[1]], attention=[attention @ turn], mlp=[mlp @ turn]
    )
    assert (control.origins[0] == UNEXPLAINED).mean() > 0.95
    assert control.longest() == [] or len(control.longest(99)) < 5
    assert flow.births(1).value < 0.7 < control.births(1).value


def test_a_track_is_followed_both_ways_with_its_errors(flow):
    _, _, _, truth = planted()
    latent = int(np.flatnonzero((truth == TRANSFORMED) & (flow.origins[0] == TRANSFORMED))[0])
    points = flow.track(1, latent)
    assert [p.layer for p in points] == [0, 1, 2]
    assert points[2].latent == len(truth) - 1 - latent
    assert (points[1].kind, points[1].origin) == ("mlp", "transformed")
    assert points[1].false_match_rate == 0 <= points[0].false_match_rate <= 0.1
    born = int(np.flatnonzero((truth == ATTENTION) & (flow.origins[0] == ATTENTION))[0])
    start, *_ = flow.track(1, born)
    assert (start.layer, start.kind, start.cosine) == (1, "attention", 0)
    layer, last = flow.longest(1)[0]
    assert len(flow.track(layer, last)) == 3
    assert flow.deaths(0).value == pytest.approx((flow.after(0) < 0).mean())


@pytest.mark.parametrize(
    ("stream", "options", "message"),
    [
        (1, {}, "two layers of the stream or more, got 1"),
        (3, {"mlp": [0]}, "`mlp` needs one entry for each of the 2 layers after the first, got 1"),
        (2, {"attention": [np.eye(3)]}, "A has 64 numbers for a latent and B has 3"),
    ],
)
def test_what_does_not_fit_is_refused(stream, options, message):
    rows = np.random.default_rng(0).standard_normal((16, D))
    with pytest.raises(InputError, match=message):
        ma.feature_flow([rows] * stream, **options)
    with pytest.raises(InputError, match="There is no latent 99 in layer 0"):
        ma.feature_flow([rows, rows]).track(0, 99)
