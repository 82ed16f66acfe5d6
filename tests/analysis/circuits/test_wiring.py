"""What lies between two sites is found by watching the network run."""

import pytest
import torch
from torch import Tensor, nn

from mechatlas.activations.architectures.inception import inception_mini
from mechatlas.activations.architectures.inception_v1 import inception_v1
from mechatlas.activations.architectures.squeezenet import SqueezeNet
from mechatlas.activations.sites import read_activations
from mechatlas.analysis.circuits.wiring import Affine, MaxPool, Pad, Sum, trace_wiring
from mechatlas.base import Site, SiteError
from tests.analysis.circuits.small import two


class Residual(nn.Module):
    """A stem, a residual block with batch normalisation and groups, and one that goes around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.one = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.two = nn.Conv2d(8, 8, 1)
        self.out = nn.Identity()
        self.late = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.out(torch.relu(x + self.two(self.act(self.norm(self.one(x))))))
        return self.late(y + x)


def images(n: int = 2, side: int = 31) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("network", "source", "target", "side", "routes"),
    [
        (inception_mini, "mixed3a", "mixed3b", 31, ["1x1", "3x3", "5x5", "pool"]),
        (inception_mini, "mixed3b", "mixed4a", 31, ["1x1", "3x3", "5x5", "pool"]),
        (inception_mini, "mixed4a/5x5", "mixed4b/3x3", 31, ["3x3"]),
        (SqueezeNet, "fire2", "fire3", 47, ["expand1x1", "expand3x3"]),
        (inception_v1, "mixed3b", "mixed4a", 64, ["1x1", "3x3", "5x5", "pool"]),
    ],
)
def test_routes_are_the_branches_and_the_wiring_repeats_the_network(
    network, source, target, side, routes
):
    model, x = network().eval(), images(side=side)
    wiring = trace_wiring(model, Site.parse(source), Site.parse(target), x[:1])
    assert [route.name for route in wiring.routes] == routes
    whole = [Site(Site.parse(s).module) for s in (source, target)]
    with torch.no_grad():
        given = read_activations(model, x, whole)
        torch.testing.assert_close(wiring.run(given[whole[0]]), given[whole[1]])


def test_lopsided_pooling_of_inception_v1_is_a_pad_and_a_maximum():
    wiring = trace_wiring(inception_v1().eval(), Site("mixed3b"), Site("mixed4a"), images(1, 64))
    first, second = (wiring.nodes[i].operation for i in wiring.routes[0].nodes[:2])
    assert isinstance(first, Pad)
    assert isinstance(second, MaxPool)


def test_residual_blocks_have_a_direct_route_and_normalisation_is_folded():
    network = Residual().eval()
    torch.nn.init.normal_(network.norm.get_buffer("running_mean"))
    torch.nn.init.uniform_(network.norm.get_buffer("running_var"), 0.5, 2)
    wiring = trace_wiring(network, Site("stem"), Site("out"), images(2, 9))
    assert [route.name for route in wiring.routes] == ["direct", "two"]
    kinds = {type(node.operation) for node in wiring.nodes}
    assert {Affine, Sum} <= kinds


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("mixed4a", "mixed4c", "not consecutive: the branches of 'mixed4b' lie between"),
        ("mixed4b", "mixed4a", "mixed4a does not follow site mixed4b"),
        ("mixed4d", "classify", r"classify has activations of shape \(2, 10\)"),
    ],
)
def test_sites_that_make_no_circuit_are_refused(source, target, message):
    with pytest.raises(SiteError, match=message):
        trace_wiring(inception_mini().eval(), Site(source), Site(target), images())


def test_a_step_that_cannot_be_composed_is_named_with_its_module():
    with pytest.raises(SiteError, match="Module 'localresponsenorm0' between conv2d0 and conv2d1"):
        trace_wiring(inception_v1().eval(), Site("conv2d0"), Site("conv2d1"), images(1, 64))


def test_a_way_around_the_source_is_refused():
    with pytest.raises(SiteError, match="also depends on what comes before out: module 'stem'"):
        trace_wiring(Residual().eval(), Site("out"), Site("late"), images(2, 9))


def test_a_network_in_training_mode_is_wired_as_in_evaluation_mode():
    network, x = Residual().train(), images(2, 9)
    mean = network.norm.get_buffer("running_mean").clone()
    wiring = trace_wiring(network, Site("stem"), Site("out"), x)
    assert network.norm.training
    assert torch.equal(network.norm.get_buffer("running_mean"), mean)
    expected = trace_wiring(network.eval(), Site("stem"), Site("out"), x)
    source = images(2, 7).repeat(1, 3, 1, 1)[:, :8]
    assert torch.equal(wiring.run(source), expected.run(source))


def test_the_network_is_as_it_was():
    network = two(dtype=torch.float32)
    x = images(1, 9)
    before = network(x)
    trace_wiring(network, Site("first"), Site("second"), x)
    assert torch.equal(network(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
