import dataclasses
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

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


class InPlace(nn.Module):
    """Writes into what its modules returned, in every way that there is."""

    def __init__(self, write) -> None:
        super().__init__()
        self.first, self.last, self.write = nn.Linear(4, 6), nn.Linear(6, 2), write

    def forward(self, x):
        y = self.first(x)
        self.write(y)
        return self.last(y.reshape(len(x), -1)[:, :1].expand(-1, 6))


WRITES = {
    "relu": torch.relu_,
    "sum": lambda y: y.add_(1),
    "view": lambda y: y[:, :2].zero_(),
    "detached": lambda y: y.detach().mul_(3),
    "data": lambda y: y.data.mul_(3),
    "numpy": lambda y: y.detach().numpy().__imul__(3),
    "resize": lambda y: y.resize_(len(y), 3),
    "set": lambda y: y.set_(torch.ones(len(y), 6)),
    "replaced": lambda y: setattr(y, "data", torch.ones(len(y), 6)),
    "transposed": lambda y: y.unsqueeze_(0).squeeze_(0).neg_(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_value_is_what_the_module_returned_whatever_is_written_later(write, inference):
    network, x = InPlace(write), torch.randn(5, 4)
    with torch.no_grad():
        truth = network.first(x)
    for _ in range(3):
        with torch.inference_mode() if inference else torch.no_grad():
            found = read_activations(network, x, ["first", "last"])
            assert torch.equal(found["first"], truth)
            assert torch.equal(read_activations(network, x, ["first"])["first"], truth)


def test_a_tensor_that_is_written_for_some_inputs_only_is_read_right():
    network = InPlace(lambda y: y.zero_() if y.sum() > 0 else None)
    with torch.no_grad():
        network.first.weight.fill_(1.0)
        for value in (-1.0, 2.0, -3.0, 4.0):
            x = torch.full((3, 4), value)
            assert torch.equal(
                read_activations(network, x, ["first", "last"])["first"], network.first(x)
            )


def test_only_tensors_that_are_written_are_copied():
    kept = []
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Identity())
    network[2].register_forward_hook(lambda _m, _args, out: kept.append(out))
    read_activations(network, torch.randn(3, 4), ["0", "2", "3"])
    found = read_activations(network, torch.randn(3, 4), ["0", "2", "3"])
    assert found["2"].data_ptr() == kept[-1].data_ptr()
    assert found["0"].data_ptr() != kept[-1].data_ptr()


class Scaled(nn.Module):
    """Network that divides its inputs in place, some of them or all."""

    def __init__(self, largest: float) -> None:
        super().__init__()
        self.largest, self.first, self.last = largest, nn.Identity(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > self.largest:
            x.div_(255)
        return self.last(self.first(x))


def test_inputs_that_the_network_writes_into_are_left_as_they_are():
    network, x = Scaled(-1e9), torch.rand(3, 4)
    for _ in range(3):
        before = x.clone()
        found = read_activations(network, x, ["first"])["first"]
        assert torch.equal(x, before)
        assert torch.equal(found, before / 255)


def test_a_network_that_begins_to_write_into_its_inputs_is_refused():
    network = Scaled(1.0)
    for _ in range(2):
        read_activations(network, torch.rand(3, 4), ["first"])
    with pytest.raises(InputError, match="wrote into this batch of inputs"):
        read_activations(network, torch.full((3, 4), 200.0), ["first"])
    x = torch.full((3, 4), 200.0)
    assert read_activations(network, x, ["first"])["first"].max() < 1
    assert bool((x == 200).all())


def test_a_value_is_never_the_users_own_batch():
    network, x = Scaled(2.0), torch.rand(3, 4)
    for site in ("first", "first:input"):
        for _ in range(3):
            before = x.clone()
            read_activations(network, x, [site])[site].zero_()
            assert torch.equal(x, before)


def test_a_module_that_takes_the_place_of_another_is_read():
    inner, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    network = nn.Sequential(inner, nn.ReLU())
    for _ in range(2):
        found = read_activations(network, x, ["0.0"])["0.0"]
        assert torch.equal(found, inner[0](x))
        inner[0] = nn.Linear(4, 4)
    network[0] = nn.Linear(4, 4)
    with pytest.raises(SiteError, match=r"0\.0"):
        read_activations(network, x, ["0.0"])


@pytest.mark.parametrize("site", ["layers.1", "layers.1:input", "layers.1.linear1", "layers.0"])
def test_layers_of_an_encoder_are_read_with_padded_samples(site):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.TransformerEncoder(layer, 2).eval()
    assert network.use_nested_tensor
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[1, 3:] = True
    x = {"src": torch.randn(3, 5, 8), "src_key_padding_mask": padded}
    truth, fused = [], torch.backends.mha.get_fastpath_enabled()
    module = network.get_submodule(site.removesuffix(":input"))
    hook = module.register_forward_hook(
        lambda _m, args, out: truth.append((args[0] if site.endswith("input") else out).clone())
    )
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        network(**x)
        hook.remove()
        torch.backends.mha.set_fastpath_enabled(fused)
        for _ in range(2):
            found = read_activations(network, x, [site])[site]
            torch.testing.assert_close(found[~padded], truth[0][~padded])
    assert network.use_nested_tensor
    assert torch.backends.mha.get_fastpath_enabled() == fused


@pytest.mark.parametrize(("site", "fused"), [("0.1", True), ("1", True), ("0.0.linear1", False)])
def test_layers_run_fused_unless_a_site_lies_inside(site, fused, monkeypatch):
    calls, kernel = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or kernel(*args)
    )
    layers = (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
    network = nn.Sequential(nn.Sequential(*layers), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        read_activations(network, torch.randn(3, 5, 8), [site])
    assert bool(calls) == fused


def test_gradients_pass_through_values_that_are_written_later():
    network = InPlace(torch.relu_)
    x = torch.randn(5, 4, requires_grad=True)
    for _ in range(2):
        read = read_activations(network, x, ["first"])["first"]
        (gradient,) = torch.autograd.grad(read.sum(), x)
        torch.testing.assert_close(gradient, network.first.weight.sum(dim=0).expand(5, 4))


class Twice(nn.Module):
    """One module under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
        self.same = self.act

    def forward(self, x):
        return self.last(self.same(self.one(self.act(self.one(x)))))


@pytest.mark.parametrize("name", ["act", "same", "one"])
def test_calls_of_a_module_are_sites_of_their_own(name):
    network, x = Twice(), torch.randn(5, 4)
    for _ in range(2):
        with pytest.raises(SiteError, match=f"several times in one pass; name a call: {name}#1"):
            read_activations(network, x, [name])
    with pytest.raises(SiteError, match="several times"), intervene(network, {name: torch.neg}):
        network(x)
    first, second = network.one(x), network.one(network.one(x).relu())
    truth = (first, second) if name == "one" else (first.relu(), second.relu())
    found = read_activations(network, x, [f"{name}#2", f"{name}#1"])
    torch.testing.assert_close(found[f"{name}#1"], truth[0])
    torch.testing.assert_close(found[f"{name}#2"], truth[1])
    with pytest.raises(
        SiteError, match=f"calls '{name}' 2 time.s. in one pass; there is no {name}#3"
    ):
        read_activations(network, x, [f"{name}#3"])
    with intervene(network, {f"{name}#2": torch.zeros_like}):
        expected = second.relu() * 0 if name != "one" else second * 0
        torch.testing.assert_close(network(x), network.last(expected), check_stride=False)


def test_the_written_form_and_the_site_mean_the_same():
    network, x = Twice(), torch.randn(5, 4)
    forms = [
        "act#2:input",
        Site("act#2:input"),
        Site.parse("act#2:input"),
        Site("act", take="input", call=2),
    ]
    found = read_activations(network, x, forms)
    assert all(torch.equal(value, found[forms[0]]) for value in found.values())
    both: Any = {Site("act#1"): torch.neg, "act#1": torch.neg}
    with pytest.raises(SiteError, match="two edits at act#1"):
        intervene(network, both).__enter__()
    for bad in ("a#0", "a#x", "a:sideways", "a@", "a@bb", "a@tt", "a@bct t", "a@bcxx"):
        with pytest.raises(SiteError):
            Site.parse(bad)


def test_an_edit_that_takes_no_effect_is_refused():
    network, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 5, 8)
    with (
        pytest.raises(SiteError, match=r"without calling the module of: self_attn\.out_proj"),
        torch.no_grad(),
        intervene(network, {"self_attn.out_proj": torch.zeros_like}),
    ):
        network(x)
    with torch.no_grad():
        before = network(x)
        with intervene(network, {"linear1": torch.zeros_like}):
            assert not torch.allclose(network(x), before)
    with (
        pytest.raises(SiteError, match="was not called inside the context"),
        intervene(network, {"norm1": torch.zeros_like}),
    ):
        nn.Linear(8, 8)(x)
    scripted = nn.Sequential(torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(SiteError, match="is scripted"):
        read_activations(scripted, torch.randn(2, 4), ["0"])


class Pair(NamedTuple):
    hidden: torch.Tensor
    skip: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Answer:
    length: int
    nested: dict
    extra: torch.Tensor


class Returning(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make, self.inner = make, nn.Linear(4, 4)

    def forward(self, x):
        return self.make(self.inner(x))


class Taking(nn.Module):
    def __init__(self, make, take) -> None:
        super().__init__()
        self.block, self.take = Returning(make), take

    def forward(self, x):
        return self.take(self.block(x))


RETURNED = {
    "NamedTuple": (lambda y: Pair(y, y), lambda out: (out.hidden, out.skip)),
    "tuple": (lambda y: (torch.arange(3), (y, y)), lambda out: out[1]),
    "list": (lambda y: [None, y, y], lambda out: out[1:]),
    "dict": (lambda y: {"n": 3, "hidden": y, "skip": y}, lambda out: (out["hidden"], out["skip"])),
    "dataclass": (
        lambda y: Answer(3, {"all": [y]}, y),
        lambda out: (out.nested["all"][0], out.extra),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "take"), RETURNED.values(), ids=RETURNED)
def test_tensors_inside_what_a_module_returns_are_read_and_edited_alike(make, take):
    returned = []
    network, x = Taking(make, take), torch.randn(5, 4)
    network.block.register_forward_hook(lambda _m, _args, out: returned.append(out))
    truth = network.block.inner(x)
    torch.testing.assert_close(read_activations(network, x, ["block"])["block"], truth)
    with intervene(network, {"block": lambda a: a + 1}):
        edited, other = network(x)
    torch.testing.assert_close(edited, truth + 1)
    torch.testing.assert_close(other, truth)
    torch.testing.assert_close(take(returned[-1])[0], truth)
    assert [info.width for info in list_sites(network, x)] == [4, 4]


@pytest.mark.parametrize(
    "channels",
    [slice(0, 6, 2), slice(None, None, -2), [4, 1], torch.tensor([3, 0]), [True, False] * 3],
    ids=str,
)
@pytest.mark.parametrize("write", ["returns", "in place"])
def test_a_branch_may_be_any_choice_of_channels(channels, write):
    network, x = nn.Sequential(nn.Conv1d(3, 6, 1), nn.Identity()), torch.randn(2, 3, 5)
    for module in network:
        vars(module)["branches"] = {"some": channels}
    numbers = list(range(6))[channels] if isinstance(channels, slice) else (
        torch.as_tensor(channels).nonzero().flatten().tolist()
        if torch.as_tensor(channels).dtype == torch.bool else list(map(int, channels))
    )  # fmt: skip
    whole = network(x)
    for site in ("0/some", "1/some", "1@bct/some"):
        torch.testing.assert_close(read_activations(network, x, [site])[site], whole[:, numbers])
        with intervene(network, {site: torch.zeros_like if write == "returns" else Tensor.zero_}):
            expected = whole.clone()
            expected[:, numbers] = 0
            torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(
    "channels", [slice(6, 9), [6], [1, 1], [], [0.5], ["a"], [[1, 2]]], ids=str
)
def test_a_branch_of_channels_that_are_not_there_is_refused(channels):
    network, x = nn.Sequential(nn.Conv1d(3, 6, 1)), torch.randn(2, 3, 5)
    vars(network[0])["branches"] = {"some": channels}
    with pytest.raises(SiteError, match=r"ranch .*channels"):
        read_activations(network, x, ["0/some"])
    edits = {"0/some": torch.zeros_like}
    with pytest.raises(SiteError, match=r"ranch .*channels"), intervene(network, edits):
        network(x)


def test_an_attribute_of_another_meaning_names_no_branches():
    network, x = nn.Sequential(nn.Linear(3, 6)), torch.randn(2, 3)
    for other in ({"left": 3}, {"a": nn.ReLU(), "b": [1]}, {"depth": "two"}):
        vars(network[0])["branches"] = other
        assert [info.branches for info in list_sites(network, x)] == [{}]


@pytest.mark.parametrize(
    "edit", [lambda a: a.mul_(0), lambda a: a.zero_().clone(), torch.zeros_like]
)
def test_an_edit_in_place_reaches_neither_skips_nor_inputs_nor_what_it_returns(edit):
    network = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    x, kept = torch.ones(2, 3), -torch.ones(2, 3)
    with intervene(network, {"0": edit}):
        assert not network(x).any()
    assert (x == 1).all()
    with intervene(network, {"0": lambda _a: kept}):
        network(x)
    assert (kept == -1).all()
    nothing: Any = {"0": lambda _a: None}
    with intervene(network, nothing), pytest.raises(SiteError, match="NoneType"):
        network(x)


def test_a_network_in_training_mode_is_run_in_evaluation_mode_and_put_back():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    network[1].eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x, random = torch.randn(5, 4), torch.get_rng_state()
    found = read_activations(network, x, ["2"])["2"]
    list_sites(network, x)
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(found, network.eval()(x))


def test_an_interrupted_pass_leaves_no_hooks():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    network = nn.Sequential(nn.Linear(4, 4), Interrupted()).train()
    for run in (
        lambda: read_activations(network, torch.randn(2, 4), ["1"]),
        lambda: list_sites(network, torch.randn(2, 4)),
    ):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        assert all(module.training for module in network.modules())


def test_networks_in_wrappers_are_read_as_what_is_inside():
    network, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    wrapped = nn.DataParallel(network)
    assert torch.equal(read_activations(wrapped, x, ["0"])["0"], network[0](x))
    with intervene(wrapped, {"0": torch.zeros_like}):
        assert not wrapped(x).any()
    assert [str(info.site) for info in list_sites(wrapped, x)] == ["0", "1"]


def test_calls_axes_and_unknown_axes_are_listed():
    class Outer(nn.Module):
        def forward(self, x):
            return x.mean() + torch.ones(2, 3)

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.outer = Twice(), Outer()

        def forward(self, x):
            self.outer(x)
            return self.twice(x)

    infos = {str(info.site): info for info in list_sites(Listed(), torch.randn(3, 4))}
    assert {"twice.act#1", "twice.act#2", "twice.one#1", "twice.one#2", "twice.last"} <= set(infos)
    assert infos["twice.act#2"].axes == "bc"
    assert infos["outer"].axes is None
    assert infos["outer"].width == 0
