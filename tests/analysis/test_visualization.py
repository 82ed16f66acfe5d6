"""Images made from noise excite a feature more than noise and than any photograph."""

import numpy as np
import pytest
import torch

from mechatlas.activations.architectures.inception import inception_mini
from mechatlas.activations.samples import Images, open_samples
from mechatlas.analysis.visualization import (
    RedirectedReLU,
    VisualizeConfig,
    center_pre_activations,
    visualize,
)
from mechatlas.base import InputError, Site


@pytest.fixture(scope="module")
def network():
    return inception_mini().eval()


def directions(width: int, n: int = 3) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0)) / width**0.5


@pytest.mark.parametrize(("site", "width"), [("mixed4a", 184), ("mixed4a/5x5", 32)])
def test_a_picture_beats_every_photograph_and_noise(network, site, width):
    units = directions(width)
    pictures, reached = visualize(
        network, Site.parse(site), units, side=31, config=VisualizeConfig(steps=48)
    )
    assert pictures.shape == (3, 31, 31, 3)
    assert (pictures >= 0).all()
    assert (pictures <= 1).all()
    samples = open_samples(Images(crops=5), network)
    crops = samples.stack([samples.read(i) for i in range(40)])
    noise = torch.rand(40, 3, 31, 31, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for k, unit in enumerate(units):
            every = unit.expand(40, -1)
            for others in (crops, noise):
                best = center_pre_activations(network, Site.parse(site), others, every).max()
                assert reached[k] > float(best)


def test_the_same_call_gives_the_same_bytes_whatever_else_is_made(network):
    config = VisualizeConfig(steps=6)
    site, rows = Site("mixed3b"), directions(136)
    first, reached = visualize(network, site, rows, side=31, config=config)
    again, _ = visualize(network, site, rows, side=31, config=config)
    assert first.tobytes() == again.tobytes()
    alone, drive = visualize(network, site, rows[1:2], side=31, config=config)
    np.testing.assert_allclose(alone[0], first[1], atol=1e-3)
    np.testing.assert_allclose(drive[0], reached[1], rtol=1e-3)
    other, _ = visualize(network, site, rows, side=31, config=VisualizeConfig(steps=6, seed=1))
    assert not np.allclose(other, first, atol=1e-2)


def test_a_penalty_makes_pictures_smoother(network):
    def rough(smoothness):
        config = VisualizeConfig(steps=16, smoothness=smoothness)
        pictures, _ = visualize(network, Site("mixed3b"), directions(136), side=31, config=config)
        return np.abs(np.diff(pictures, axis=1)).mean()

    assert rough(1000.0) < 0.8 * rough(0.0)


def test_the_network_is_not_changed_and_wrong_widths_are_refused(network):
    before = {name: p.clone() for name, p in network.named_parameters()}
    visualize(network, Site("mixed3b"), directions(136), side=31, config=VisualizeConfig(steps=2))
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    with pytest.raises(InputError, match="a map of 7 channels"):
        visualize(network, Site("mixed3b"), directions(7), side=31)
    with pytest.raises(InputError, match="classify has activations of shape"):
        visualize(network, Site("classify"), directions(10), side=31)


def test_single_units_that_are_off_are_opened(network):
    units = torch.eye(184)[::23]
    pictures, reached = visualize(
        network, Site("mixed4a"), units, side=31, config=VisualizeConfig(steps=24)
    )
    noise = 0.5 + 0.01 * torch.randn(1, 3, 31, 31, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = center_pre_activations(
            network, Site("mixed4a"), noise.expand(8, -1, -1, -1), units
        )
    assert (before == 0).sum() >= 4, "these have no slope of their own"
    assert (reached > 0).all()
    assert np.ptp(pictures, axis=(1, 2)).min() > 0.1


def test_slopes_are_redirected_only_where_none_gets_through():
    x = torch.tensor([[-1.0, 2.0], [-1.0, -2.0], [-3.0, 4.0]], requires_grad=True)
    slope = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, 0.0]])
    with RedirectedReLU():
        out = torch.relu(x)
    assert torch.equal(out, x.detach().clamp_min(0))
    out.backward(slope)
    # A slope below zero would, followed downhill, open a unit.
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]
