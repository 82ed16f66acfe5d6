"""Properties of reading, listing, collecting and editing that hold on every network of the zoo.

The truth is a table beside each network, and hooks of these tests' own that clone at once.
"""

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.positions import Positions
from mechatlas.activations.sites import as_site, intervene, list_sites, read_activations
from mechatlas.activations.store import Store
from mechatlas.base import UserError
from tests.zoo import ZOO, Animal, Place

everywhere = pytest.mark.parametrize("name", ZOO)
drawn = settings(
    max_examples=5,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
"""Profile of the draws: few, and always the same."""

SITE = re.compile(
    r"(?P<module>[^#:@/]*)(#(?P<call>\d+))?(?P<input>:input)?(@\w+)?(/(?P<branch>.*))?"
)


# Hooks of our own.


def change_first(value: Any, change: Callable[[Tensor], Tensor | None]) -> tuple[Any, bool]:
    """Value with its first tensor changed, and whether there was one."""
    if isinstance(value, Tensor):
        new = change(value)
        return (value if new is None else new), True
    parts: dict[Any, Any] = {}
    if isinstance(value, Mapping):
        parts = dict(value)
    elif isinstance(value, tuple | list):
        parts = dict(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for key, part in parts.items():
        new, found = change_first(part, change)
        if found:
            parts[key] = new
            break
    else:
        return value, False
    if isinstance(value, Mapping):
        return parts, True
    if isinstance(value, list):
        return list(parts.values()), True
    if isinstance(value, tuple):
        plain = type(value) is tuple
        return tuple(parts.values()) if plain else type(value)(*parts.values()), True
    return type(value)(**parts), True


@contextmanager
def own_hook(
    network: nn.Module, place: Place, change: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """Pass the tensor of one call through a function."""
    match = SITE.fullmatch(place.site)
    assert match is not None
    wanted = int(match["call"] or 1)
    calls = 0

    def pass_through(value: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != wanted:
            return value
        new, found = change_first(value, change)
        assert found
        return new

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (pass_through(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: pass_through(kwargs[first])}

    module = network.get_submodule(match["module"])
    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if match["input"]
        else module.register_forward_hook(lambda _module, _args, out: pass_through(out))
    )
    try:
        yield
    finally:
        handle.remove()


def inside(network: nn.Module) -> nn.Module:
    """Network inside a wrapper of torch, in evaluation mode, on which hooks take effect."""
    for attribute in ("_orig_mod", "module"):
        network = getattr(network, attribute, network)
    training = any(module.training for module in network.modules())
    return copy.deepcopy(network).eval() if training else network


def tensors(value: Any) -> list[Tensor]:
    """All tensors of an answer."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    parts = value.values() if isinstance(value, Mapping) else value
    return [t for part in parts for t in tensors(part)] if isinstance(parts, Iterable) else []


def part_of(place: Place, value: Tensor) -> Tensor:
    """Channels of a branch."""
    if place.channels is None:
        return value
    return value.index_select(place.axes.index("c"), torch.tensor(place.channels))


def own_values(network: nn.Module, x: Tensor, places: Sequence[Place]) -> list[Tensor]:
    """Values that modules returned, cloned as they returned them."""
    values: list[Tensor] = []
    network = inside(network)
    for place in places:
        with own_hook(network, place, lambda value: values.append(value.clone())):
            network(x.clone())
    return [part_of(place, value) for place, value in zip(places, values, strict=True)]


def own_rows(place: Place, value: Tensor, n_samples: int) -> Tensor:
    """Rows (sample, position, channel) of a value, by the truth about its axes."""
    order = sorted(
        range(len(place.axes)), key=lambda i: (place.axes[i] != "b", place.axes[i] == "c")
    )
    moved = value.detach().permute(order)
    return moved.reshape(n_samples, -1, place.width)


def same(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


@functools.cache
def brought(name: str) -> tuple[Animal, nn.Module, Tensor]:
    """A network, used by all tests since it is left as it was, and three samples."""
    kind = ZOO[name]
    return kind, kind.network(), kind.samples(3)


def state_of(network: nn.Module) -> dict[str, Any]:
    """Everything about a network that nobody may change, and the random state."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state: dict[str, Any] = {"random": torch.get_rng_state().tolist()}
    for name, module in network.named_modules():
        state[f"{name} mode"] = module.training
        state[f"{name} hooks"] = [len(getattr(module, kind, ())) for kind in hooks]
        if not isinstance(module, torch.jit.ScriptModule):
            state[f"{name} attributes"] = sorted(vars(module))
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        state[name] = (tensor.dtype, tensor.device, tensor.requires_grad, tensor.grad is None,
                       tensor._version, tensor.data_ptr(), tensor.tolist())  # fmt: skip
    return state


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Check that a network and the random state are left as they were."""
    before = state_of(network)
    yield
    after = state_of(network)
    assert {key for key in before | after if before.get(key) != after.get(key)} == set()


@contextmanager
def refusal_allowed(kind: Animal, network: nn.Module) -> Iterator[None]:
    """Let a network in a wrapper be refused in a sentence, which leaves it as it was too."""
    with untouched(network):
        try:
            yield
        except UserError as error:
            if not kind.wrapped:
                raise AssertionError(str(error)) from error


def outcome(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Result, or the sentence by which the work is refused."""
    try:
        return work(*arguments, **options)
    except UserError as error:
        return str(error)


# Reading.


def draw_places(data: st.DataObject, kind: Animal, *, most: int) -> list[Place]:
    if not kind.places:
        pytest.skip("has no sites")
    return data.draw(st.lists(st.sampled_from(kind.places), min_size=1, max_size=most, unique=True))


@everywhere
@drawn
@given(data=st.data())
def test_a_value_is_what_the_module_returned_whatever_is_read_beside_it(name, data):
    kind, network, x = brought(name)
    places = draw_places(data, kind, most=5)
    grad = data.draw(st.booleans())
    with torch.set_grad_enabled(grad), refusal_allowed(kind, network):
        given_x = x.clone()
        beside = read_activations(network, given_x, [place.site for place in places])
        alone = read_activations(network, x, [places[0].site])
        assert torch.equal(given_x, x), "the inputs are the user's own"
        truth = own_values(network, x, places)
        same(alone[places[0].site], truth[0])
        for place, value in zip(places, truth, strict=True):
            same(beside[place.site], value)
            assert beside[place.site].dtype == value.dtype


@everywhere
def test_sites_that_are_no_single_call_of_a_module_are_refused(name):
    kind, network, x = brought(name)
    for site, sentence in kind.refused.items():
        with untouched(network), pytest.raises(UserError) as refused:
            read_activations(network, x, [site])
        assert re.search(sentence, str(refused.value)), str(refused.value)
        with (
            untouched(network),
            pytest.raises(UserError) as refused,
            intervene(network, {site: torch.zeros_like}) as edited,
        ):
            edited(x)
        assert re.search(sentence, str(refused.value)), str(refused.value)


# Listing.


def letters(axes: str) -> str:
    """Axes with the same letter for every position."""
    return re.sub(r"[^bc]", ".", axes)


@everywhere
def test_the_list_of_sites_is_the_truth(name):
    kind, network, x = brought(name)
    with refusal_allowed(kind, network):
        listed = {str(info.site): info for info in list_sites(network, x)}
        if kind.wrapped and not listed:
            return
        known = {place.site: place for place in kind.places}
        assert set(listed) <= set(known), "nothing but modules that return activations"
        for site, place in known.items():
            info = listed.get(site)
            if info is None:
                assert not (place.told and place.collected) or re.search("[:/@]", site), site
                continue
            if info.axes is None:
                assert not (place.told and place.collected), site
                continue
            assert place.collected, site
            assert (letters(info.axes), info.width) == (letters(place.axes), place.width), site
            assert math.prod(info.shape) == place.width * math.prod(place.positions), site


# Collecting.


class Numbered:
    """Samples of a network of the zoo; fits the protocol of samples."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def name(self, index: int) -> str:
        return f"sample {index}"

    def read(self, index: int) -> np.ndarray:
        x = self.x[index]
        return (x.float() if x.is_floating_point() else x).numpy()

    def stack(self, samples: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(samples)).to(self.x.dtype)


def collected(network: nn.Module, x: Tensor, sites: Sequence[str], out: Path) -> Store:
    everything = StoreConfig(positions=Positions(rule="all"), held_out=0.3, batch_size=2)
    return collect(
        network, Numbered(x), [as_site(network, site) for site in sites], out, everything
    )


def check_rows(store: Store, site: str, place: Place, value: Tensor) -> None:
    """Compare the rows of a store with a value, by sample and place."""
    rows, where = zip(*((batch.x, where) for batch, where in store.rows(site).scan()), strict=True)
    order = np.lexsort(torch.cat(where).numpy().T[::-1])
    truth = own_rows(place, value, 3).float()
    assert len(order) == truth.shape[0] * truth.shape[1]
    same(torch.cat(rows)[torch.from_numpy(order)].view_as(truth), truth)
    grid = store.shapes[site].grid
    assert math.prod(grid) == math.prod(place.positions), site
    if len(place.positions) < 3:
        assert grid == (*place.positions, 1, 1)[:2]


@everywhere
def test_rows_of_a_store_are_the_values_by_sample_and_place(name, tmp_path):
    kind, network, x = brought(name)
    places = [place for place in kind.places if place.collected]
    if not places:
        pytest.skip("has no sites")
    with refusal_allowed(kind, network):
        sites = [place.site if place.told else place.written for place in places]
        store = collected(network, x, sites, tmp_path / "store")
        truth = own_values(network, x, places)
        for site, place, value in zip(sites, places, truth, strict=True):
            check_rows(store, site, place, value)
    for number, place in enumerate(kind.places):
        if place.told and place.collected:
            continue
        out = tmp_path / str(number)
        with untouched(network):
            done = outcome(collected, network, x, [place.site], out)
        if isinstance(done, Store):
            assert place.collected, place.site
            check_rows(done, place.site, place, own_values(network, x, [place])[0])
        else:
            assert not place.collected or "@" in done, done
            assert not [*out.rglob("*.safetensors")], "nothing is written before the refusal"


# Editing.


def zeroed(place: Place, value: Tensor) -> Tensor:
    """Value with the channels of a place at 0; a tensor of its own."""
    if place.channels is None:
        return torch.zeros_like(value)
    return value.index_fill(place.axes.index("c"), torch.tensor(place.channels), 0)


@everywhere
@drawn
@given(data=st.data())
def test_an_edit_changes_what_a_hook_changes_and_nothing_else(name, data):
    kind, network, x = brought(name)
    place = draw_places(data, kind, most=1)[0]
    edit, own = data.draw(
        st.sampled_from(
            [
                (lambda a: a, lambda _a: None),
                (torch.clone, torch.clone),
                (torch.zeros_like, lambda a: zeroed(place, a)),
                (Tensor.zero_, lambda a: zeroed(place, a)),
            ]
        )
    )
    with torch.set_grad_enabled(data.draw(st.booleans())), refusal_allowed(kind, network):
        with intervene(network, {place.site: edit}) as edited:
            found = tensors(edited(x.clone()))
        alone = inside(network)
        with own_hook(alone, place, own):
            truth = tensors(alone(x.clone()))
        assert len(found) == len(truth)
        for a, b in zip(found, truth, strict=True):
            same(a, b)
