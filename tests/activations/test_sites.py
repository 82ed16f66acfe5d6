from typing import ClassVar

import pytest
import torch
from torch import nn

from mechatlas.activations.branches import branches_of
from mechatlas.activations.sites import find_sites, intervene, list_sites, read_activations
from mechatlas.base import InputError, Site, SiteError
from tests.networks import Sequence, tiny

X = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", ["mixed", "mixed/left", "a.b:input", "a.b:input/head3"])
def test_a_site_reads_back_what_it_writes(text):
    assert str(Site.parse(text)) == text


def test_reading_stops_after_the_last_site_needed():
    network = tiny()
    for _ in range(3):  # the first pass counts the calls of each module
        read_activations(network, X, [Site("mixed"), Site("first")])
    assert network.head_calls == 1
    network(X)
    assert network.head_calls == 2


def test_several_sites_come_from_one_pass_and_equal_the_modules_own_outputs():
    network = tiny()
    sites = find_sites(network, ["first", "mixed", "mixed/right", "mixed/left"])
    found = read_activations(network, X, sites)
    expected = network.mixed(network.first(X).relu())
    torch.testing.assert_close(found[Site("mixed")], expected)
    torch.testing.assert_close(found[Site("mixed", "right")], expected[:, 5:])
    torch.testing.assert_close(found[Site("mixed", "left")], expected[:, :5])


def test_globs_stay_within_a_name_and_double_stars_cross_dots():
    network = tiny()
    assert [str(s) for s in find_sites(network, ["*"])] == ["first", "mixed", "head"]
    assert [str(s) for s in find_sites(network, ["mixed.*"])] == ["mixed.left", "mixed.right"]
    assert len(find_sites(network, ["**"])) == 5
    assert [str(s) for s in find_sites(network, ["mix*/r*"])] == ["mixed/right"]


def test_a_branch_may_be_a_submodule():
    network = tiny()
    del network.mixed.branches
    assert [str(s) for s in find_sites(network, ["mixed/right"])] == ["mixed.right"]


def test_an_unknown_site_is_refused_with_near_names():
    with pytest.raises(SiteError, match=r"no module 'mixd' .* mean 'mixed'"):
        find_sites(tiny(), ["mixd"])
    with pytest.raises(SiteError, match="branches left, right; it has no branch 'middle'"):
        find_sites(tiny(), ["mixed/middle"])
    with pytest.raises(SiteError, match="':input' and ':output'"):
        Site.parse("mixed:sideways")


def test_a_module_that_is_never_called_is_named():
    network = nn.Sequential(nn.Linear(3, 3))
    network[0].register_module("spare", nn.Linear(2, 2))
    with pytest.raises(SiteError, match=r"without calling the module of: 0\.spare"):
        read_activations(network, torch.zeros(1, 3), [Site("0.spare")])


def test_the_input_of_a_module_can_be_read():
    network = tiny()
    found = read_activations(network, X, [Site("mixed", take="input")])
    torch.testing.assert_close(found[Site("mixed", take="input")], network.first(X).relu())


def test_attention_heads_are_branches_of_a_tuple_output():
    network = Sequence()
    tokens = torch.randint(11, (2, 5))
    assert list(branches_of(network, "attention")) == ["head0", "head1", "head2", "head3"]
    whole = read_activations(network, tokens, [Site("attention")])[Site("attention")]
    third = Site("attention", "head2")
    torch.testing.assert_close(read_activations(network, tokens, [third])[third], whole[..., 4:6])
    with intervene(network, {third: torch.zeros_like}):
        changed = network(tokens)
    assert (changed[..., 4:6] == 0).all()
    torch.testing.assert_close(changed[..., :4], whole[..., :4])


def test_an_ablated_branch_changes_what_follows_and_nothing_else_remains():
    network = tiny()
    before = network(X)
    with intervene(network, {Site("mixed", "left"): torch.zeros_like}):
        inside = read_activations(network, X, [Site("mixed")])[Site("mixed")]
        during = network(X)
    assert (inside[:, :5] == 0).all()
    assert (inside[:, 5:] > 0).any()
    torch.testing.assert_close(network.head(inside.mean(dim=(2, 3))), during)
    assert not torch.equal(before, during)
    torch.testing.assert_close(network(X), before)


@pytest.mark.parametrize("take", ["output", "input"])
def test_an_edit_of_a_branch_does_not_reach_a_skip_connection(take):
    # An identity returns the very tensor that the skip connection carries.
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return torch.cat([x, self.block(x)], dim=1)

    class Same(nn.Identity):
        branches: ClassVar = {"left": slice(0, 2), "right": slice(2, 3)}

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = Same()
            self.num_attention_heads, self.head_dim = 3, 1
            self.out_proj = nn.Linear(3, 3)
            nn.init.eye_(self.out_proj.weight)
            nn.init.zeros_(self.out_proj.bias)

        def forward(self, x):
            return self.value(x) if take == "output" else self.out_proj(x)

    network, x = Residual(), torch.rand(4, 3) + 1
    name = "block.value/left" if take == "output" else "block.out_proj:input/head1"
    zero = [0, 1] if take == "output" else [1]
    with intervene(network, {Site.parse(name): torch.zeros_like}):
        skip, edited = network(x).split(3, dim=1)
    assert torch.equal(skip, x)
    assert (edited[:, zero] == 0).all()
    assert float(x.min()) >= 1, "the input itself is as it was"


def test_an_edited_input_reaches_the_module():
    network = tiny()
    with intervene(network, {Site("mixed", take="input"): torch.zeros_like}):
        inside = read_activations(network, X, [Site("mixed")])[Site("mixed")]
    torch.testing.assert_close(inside, network.mixed(torch.zeros(4, 6, 9, 9)))


def test_an_input_given_by_keyword_can_be_read_and_edited():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Called()

        def forward(self, x):
            return self.inner(x=x)

    class Called(nn.Module):
        def forward(self, x):
            return 2 * x

    network, site = Caller(), Site("inner", take="input")
    x = torch.ones(2, 3)
    assert torch.equal(read_activations(network, x, [site])[site], x)
    with intervene(network, {site: lambda a: a + 1}):
        assert torch.equal(network(x), torch.full((2, 3), 4.0))


def test_an_edit_that_changes_the_shape_is_refused():
    with (
        intervene(tiny(), {Site("first"): lambda a: a[:, :2]}) as network,
        pytest.raises(SiteError, match=r"at first returned shape \(4, 2, 9, 9\)"),
    ):
        network(X)


def test_hooks_are_gone_after_an_error():
    network = tiny()
    with pytest.raises(InputError, match=r"shape \(1, 5, 9, 9\).*in module 'first'"):
        read_activations(network, torch.zeros(1, 5, 9, 9), [Site("mixed")])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_every_site_is_listed_with_its_shape_and_branches():
    found = {str(info.site): info for info in list_sites(tiny(), X)}
    assert found["mixed"].shape == (8, 9, 9)
    assert found["mixed"].branches == {"left": slice(0, 5), "right": slice(5, 8)}
    assert found["head"].width == 2
    assert set(found) == {"first", "mixed", "mixed.left", "mixed.right", "head"}
