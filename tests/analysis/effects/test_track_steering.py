"""Steering along a track, against sums done by hand."""

import pytest
import torch
from torch import nn

import mechatlas as ma
from mechatlas.base import InputError


class Stream(nn.Module):
    """Two layers that only pass the stream on, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)))


@pytest.fixture
def world():
    torch.manual_seed(0)
    network = Stream().eval()
    saes = [ma.Autoencoder(d_in=8, n_latents=16, sparsity=ma.TopK(k=4), seed=n) for n in range(2)]
    points = [(saes[0], 3, "first"), (saes[1], 7, "second")]
    return network, points, torch.randn(6, 8)


def test_every_layer_of_a_track_gets_its_part(world):
    network, points, x = world
    atoms = [sae.W_dec.detach()[latent] for sae, latent, _ in points]
    with ma.steer_track(network, points, 3.0), torch.no_grad():
        shared = network(x)
    with torch.no_grad():
        by_hand = network(x + 1.5 * atoms[0] + 1.5 * atoms[1])
    torch.testing.assert_close(shared, by_hand, rtol=1e-4, atol=1e-5)
    with ma.steer_track(network, points, [3.0, 0.0]), torch.no_grad():
        alone = network(x)
        expected = network.head(x + 3.0 * atoms[0])
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(x), network.head(x))


def test_the_comparison_is_that_of_the_sums(world):
    network, points, x = world
    head = network.head.weight.detach()
    with torch.no_grad():  # the second latent writes what the measure reads
        points[1][0].W_dec[7] = head[2] / head[2].norm()
    found = ma.compare_steering(network, points, x, lambda y: y[..., 2].mean(), 4.0, n_random=30)
    effects = [
        4.0 * float(sae.W_dec.detach()[latent] @ head[2]) for sae, latent, _ in points
    ]  # fmt: skip
    assert [e.change for e in found.single] == pytest.approx(effects, rel=1e-3)
    assert found.track.change == pytest.approx(sum(effects) / 2, rel=1e-3)
    one = found.single[1]
    assert one.p_value == pytest.approx(1 / 31), "no direction of that length does more"
    assert one.random_low < 0 < one.random_high < one.change
    assert one.divergence > 0 < one.random_divergence
    with torch.no_grad():
        before, after = network(x).log_softmax(-1), network(x + 4 * head[2] / head[2].norm())
    divergence = (before.exp() * (before - after.log_softmax(-1))).sum(-1).mean()
    assert one.divergence == pytest.approx(float(divergence), rel=1e-3)
    assert "track" in found.summary()


@pytest.mark.parametrize(
    ("points", "scale", "measure", "message"),
    [
        (1, 1.0, lambda y: y.mean(), "A track needs two layers or more, got 1"),
        (2, 1.0, lambda y: y, r"one finite number, got \(6, 5\)"),
        (2, float("inf"), lambda y: y.mean(), "finite number of float32, got inf"),
    ],
)
def test_what_does_not_fit_is_refused(world, points, scale, measure, message):
    network, track, x = world
    with pytest.raises(InputError, match=message):
        ma.compare_steering(network, track[:points], x, measure, scale, n_random=2)
    with pytest.raises(InputError, match="no latent 16"):
        ma.compare_steering(network, [track[0], (track[1][0], 16, "second")], x, measure, 1.0)
    with (
        pytest.raises(InputError, match="3 scales for the 2 layers"),
        ma.steer_track(network, track, [1.0, 2.0, 3.0]),
    ):
        pass
