import functools

import numpy as np
import pytest
import torch
from torch import nn

from mechatlas.activations.architectures.inception import InceptionMini
from mechatlas.activations.receptive import ReceptiveField, receptive_field
from mechatlas.base import Site, SiteError

# By hand: each layer adds (kernel - 1) * jump to the size; each pooling doubles the jump. A
# padded layer moves the offset by -padding * jump, an unpadded one leaves it.
INCEPTION_MINI = {
    "conv2d0": ReceptiveField(3, 1, -1),
    "conv2d2": ReceptiveField(9, 2, -3),
    "mixed3a": ReceptiveField(17, 2, -7),
    "mixed3b": ReceptiveField(25, 2, -11),
    "mixed3b/1x1": ReceptiveField(17, 2, -7),
    "mixed3b/3x3": ReceptiveField(21, 2, -9),
    "mixed4a": ReceptiveField(45, 4, -19),
}
GRID = {"conv2d0": 31, "mixed3b": 15, "mixed4a": 7}


@functools.cache
def measured(site, side):
    torch.manual_seed(0)
    return receptive_field(InceptionMini().eval(), Site.parse(site), side)


@pytest.mark.parametrize(("site", "field"), INCEPTION_MINI.items())
def test_a_field_is_what_one_derives_by_hand(site, field):
    assert measured(site, 31) == field


@pytest.mark.slow
def test_a_field_wider_than_the_image_is_measured_on_a_larger_one():
    assert measured("mixed4d", 31) == ReceptiveField(93, 4, -43)


def test_a_larger_input_has_the_same_field():
    assert measured("conv2d2", 63) == INCEPTION_MINI["conv2d2"]


@pytest.mark.parametrize("site", GRID)
def test_the_grid_is_centred_so_mirrored_positions_see_mirrored_pixels(site):
    field = measured(site, 31)
    last = field.offset + field.stride * (GRID[site] - 1) + field.size - 1
    assert field.offset == 30 - last


def test_a_chain_of_convolutions_without_padding():
    network = nn.Sequential(nn.Conv2d(1, 2, 5, stride=3), nn.ReLU(), nn.Conv2d(2, 2, 3, stride=2))
    assert receptive_field(network, Site("0"), 32, channels=1) == ReceptiveField(5, 3, 0)
    assert receptive_field(network, Site("2"), 32, channels=1) == ReceptiveField(11, 6, 0)


def test_dilation_pooling_and_unused_pixels():
    network = nn.Sequential(nn.Conv2d(3, 2, 3, dilation=4, padding=4), nn.MaxPool2d(2))
    assert receptive_field(network, Site("1"), 32) == ReceptiveField(10, 2, -4)
    sparse = nn.Sequential(nn.Conv2d(3, 2, 1, stride=4))
    assert receptive_field(sparse, Site("0"), 32) == ReceptiveField(1, 4, 0)


def test_dead_units_hide_nothing():
    first = nn.Conv2d(3, 2, 3, padding=1)
    nn.init.constant_(first.weight, -100.0)
    network = nn.Sequential(first, nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
    assert receptive_field(network, Site("2"), 16) == ReceptiveField(5, 1, -2)


class SqueezeAndScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.scaled = nn.Identity()
        self.pooled = nn.Identity()

    def forward(self, x):
        x = self.conv(x)
        x = self.scaled(x * x.mean(dim=(2, 3), keepdim=True).sigmoid())
        return self.pooled(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("site", ["scaled", "pooled"])
def test_a_global_operation_lets_every_position_see_the_whole_input(site):
    field = receptive_field(SqueezeAndScale(), Site(site), 20)
    assert field == ReceptiveField(20, 0, 0)
    first, end = field.span(np.array([0, 7]), 20)
    assert first.tolist() == [0, 0]
    assert end.tolist() == [20, 20]


def test_axes_that_differ_are_not_forced_into_one_field():
    network = nn.Sequential(nn.Conv2d(3, 2, (1, 3), padding=(0, 1)))
    assert receptive_field(network, Site("0"), 16) == ReceptiveField(16, 0, 0)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(torch.zeros_like(x))


def test_a_site_that_sees_no_pixel_is_refused():
    with pytest.raises(SiteError, match="No pixel reaches conv"):
        receptive_field(Constant(), Site("conv"), 16)
