import numpy as np
import pytest
import torch

from mechatlas.analysis.symmetry import regression
from mechatlas.analysis.symmetry.regression import CodeRegression
from mechatlas.base import InputError

N_LATENTS, WIDTH, ROWS = 30, 24, 900


def rows(density, seed=0):
    random = np.random.default_rng(seed)
    codes = random.exponential(size=(ROWS, N_LATENTS)) * (
        random.random((ROWS, N_LATENTS)) < density
    )
    codes[:, 7] = 0  # a dead latent
    codes[:, 8] = np.where(np.arange(ROWS) % 2 == 0, codes[:, 8], 0)  # only in the first half
    codes *= 10.0 ** random.uniform(-2, 2, N_LATENTS)  # codes have any unit
    slopes = random.standard_normal((N_LATENTS, WIDTH))
    targets = 3 + codes @ slopes + random.standard_normal((ROWS, WIDTH))
    return codes.astype(np.float32), targets.astype(np.float32), np.arange(ROWS) % 2 == 1


def streamed(codes, targets, second, step):
    made = CodeRegression(N_LATENTS, WIDTH)
    for i in range(0, ROWS, step):
        part = slice(i, i + step)
        made.add(torch.from_numpy(codes[part]), torch.from_numpy(targets[part]), second[part])
    return made


def by_hand(codes, targets):
    """Ridge with an intercept, in float64, on codes of root mean square 1 where active."""
    x, y = codes.astype(np.float64), targets.astype(np.float64)
    live = x.any(axis=0)
    unit = np.sqrt(np.square(x[:, live]).sum(axis=0) / (x[:, live] != 0).sum(axis=0))
    z = x[:, live] / unit
    z, y = z - z.mean(axis=0), y - y.mean(axis=0)
    out = np.zeros((x.shape[1], y.shape[1]))
    solved = np.linalg.solve(z.T @ z + regression.RIDGE * np.eye(z.shape[1]), z.T @ y)
    out[live] = solved / unit[:, None]
    return out


@pytest.mark.parametrize("density", [0.03, 0.4])
@pytest.mark.parametrize("step", [50, ROWS])
def test_streams_give_what_a_regression_by_hand_gives(density, step, monkeypatch):
    monkeypatch.setattr(regression, "COLUMNS", 10)
    monkeypatch.setattr(regression, "BUFFER_BYTES", 130 * WIDTH * 4)
    codes, targets, second = rows(density)
    made = streamed(codes, targets, second, step)
    scale = np.sqrt(np.square(codes).mean(axis=0))[:, None] + 1e-9
    for half, chosen in zip(made.halves(), (~second, second), strict=True):
        wanted = by_hand(codes[chosen], targets[chosen])
        np.testing.assert_allclose(half * scale, wanted * scale, atol=2e-4)
        assert not half[7].any()
    whole, intercept = made.whole()
    np.testing.assert_allclose(whole * scale, by_hand(codes, targets) * scale, atol=2e-4)
    mean = targets.mean(axis=0) - codes.mean(axis=0) @ whole
    np.testing.assert_allclose(intercept, mean, atol=1e-3)
    assert not made.halves()[1][8].any()


def test_an_empty_half_is_refused():
    codes, targets, _ = rows(0.3)
    made = streamed(codes, targets, np.zeros(ROWS, bool), 100)
    with pytest.raises(InputError, match="900 and 0 rows"):
        made.halves()
