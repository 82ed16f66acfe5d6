"""Sites of a network: find them, read activations there, replace activations there.

    as_site             text or site -> the site of a network
    find_sites          globs -> sites
    list_sites          every site of a network, with its shape and branches
    read_activations    run a network just far enough and return the activations at some sites
    intervene           run a network with some activations replaced
    branches_of         named channel slices of a site

A branch is a slice of channels that a module names in its `branches` attribute, one of
its submodules, or a head of an attention module. Channels are axis 1 of a map
(batch, channel, h, w) and the last axis of everything else.
"""

import dataclasses
import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.hooks import RemovableHandle

from mechatlas.activations.passes import (
    counted,
    eager,
    evaluation_mode,
    unobserved,
    unwrapped,
)
from mechatlas.activations.values import replace_tensor, tensor_of, tensors_in
from mechatlas.base import Site, SiteError, UserError

Edit = Callable[[Tensor], Tensor]
"""Function from the activations at a site to their replacement, of the same shape."""
AnySite = TypeVar("AnySite", bound=Site | str)
"""Site, or its written form."""


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """Site of a network, with the shape of its activations."""

    site: Site
    kind: str
    """Class of the module."""
    shape: tuple[int, ...]
    """Shape of the activations of one sample, without the batch axis."""
    width: int
    """Number of channels."""
    branches: dict[str, slice]
    """Named slices of the channels."""


def as_site(network: nn.Module, site: Site | str) -> Site:
    """Convert the written form of a site of a network, or check a site.

    Raises:
        SiteError: The network has no such module; near names are offered.
    """
    root = unwrapped(network)
    text = site.module if isinstance(site, Site) else site
    if _has_module(root, text):
        return site if isinstance(site, Site) else Site(text)
    given = vars(site) if isinstance(site, Site) else {}
    parsed = Site.parse(text)
    if not _has_module(root, parsed.module):
        names = [name for name, _ in root.named_modules() if name]
        raise SiteError(_no_such_module(parsed, names))
    own = {name: value for name, value in given.items() if value not in (None, "output", text)}
    return dataclasses.replace(parsed, **own)


def _has_module(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True


def find_sites(network: nn.Module, patterns: Sequence[str]) -> list[Site]:
    """Find the sites that match any of some globs, in network order, each once.

    `*` and `?` stay within one name of a dotted path, `**` crosses dots, so `mixed*` is
    every module whose name starts so and `mixed4*/5x5` one branch of each.

    Raises:
        SiteError: A pattern matches nothing; near names are offered.

    Examples:
        >>> import mechatlas as ma
        >>> network = ma.load_network(ma.Network(name="inception_mini"))
        >>> [str(site) for site in ma.find_sites(network, ["mixed3*", "mixed4a/5x5"])]
        ['mixed3a', 'mixed3b', 'mixed4a/5x5']
    """
    names = [name for name, _ in network.named_modules() if name]
    sites: list[Site] = []
    for pattern in patterns:
        wanted = Site.parse(pattern)
        glob = _glob(wanted.module)
        modules = [name for name in names if glob.fullmatch(name)]
        if not modules:
            raise SiteError(_no_such_module(wanted, names))
        matches = [
            site
            for name in modules
            for site in _with_branch(network, dataclasses.replace(wanted, module=name))
        ]
        if not matches:
            raise SiteError(_no_such_branch(network, wanted, modules))
        sites += [site for site in matches if site not in sites]
    return sites


def _glob(pattern: str) -> re.Pattern[str]:
    translate = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return re.compile("".join(translate.get(part, re.escape(part)) for part in parts))


def _with_branch(network: nn.Module, site: Site) -> list[Site]:
    if site.branch is None:
        return [site]
    glob = _glob(site.branch)
    branches = branches_of(network, site.module, site.take)
    matches = [dataclasses.replace(site, branch=name) for name in branches if glob.fullmatch(name)]
    if matches:
        return matches
    prefix = f"{site.module}."
    below = [n.removeprefix(prefix) for n, _ in network.named_modules() if n.startswith(prefix)]
    return [Site(prefix + name, None, site.take) for name in below if glob.fullmatch(name)]


def _no_such_module(site: Site, names: list[str]) -> str:
    near = difflib.get_close_matches(site.module, names, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    return (
        f"The network has no module {site.module!r} (site {site}).{hint} "
        f"`mechatlas sites NETWORK` lists all {len(names)} of them."
    )


def _no_such_branch(network: nn.Module, site: Site, modules: list[str]) -> str:
    known = sorted({name for module in modules for name in branches_of(network, module, site.take)})
    have = f"has the branches {', '.join(known)}" if known else "has no named branches"
    return f"Module {modules[0]!r} {have}; it has no branch {site.branch!r} (site {site})."


OUTPUT_PROJECTIONS = {"c_proj", "o_proj", "out_proj", "out_lin", "dense"}
"""Names of the linear layers that take the heads, side by side, and mix them."""
INPUT_PROJECTIONS = {"query", "key", "value"} | {
    f"{x}_{end}" for x in "qkv" for end in ("proj", "lin")
}
"""Names of the linear layers whose outputs are the heads, side by side."""


def branches_of(
    network: nn.Module, module_name: str, take: Literal["output", "input"] = "output"
) -> dict[str, slice]:
    """Find the named channel slices of a module's output or input.

    A module names the branches of its output in an attribute `branches`, a dict of name to slice.
    The heads of an attention module are `head0`, `head1`, ... wherever they lie side by side:
    in the output of the module if nothing inside mixes them, in the input of the layer that
    mixes them, and in the queries, keys and values.

    Args:
        network: Network that has the module.
        module_name: Name of the module, as in `named_modules()`.
        take: Whether the slices are of the module's output or of its input.
    """
    branches = getattr(network.get_submodule(module_name), "branches", None)
    if isinstance(branches, Mapping) and not isinstance(branches, nn.Module):
        return dict(branches) if take == "output" else {}
    n_heads, width = _heads(network, module_name, take)
    return {f"head{i}": slice(i * width, (i + 1) * width) for i in range(n_heads)}


def _heads(network: nn.Module, module_name: str, take: str) -> tuple[int, int]:
    """Number and width of the heads that lie side by side at a module; 0 where none do."""
    module = network.get_submodule(module_name)
    parent, _, name = module_name.rpartition(".")
    linear = isinstance(module, nn.Linear) or _is_conv1d(module)
    if linear:
        side_by_side = name in (OUTPUT_PROJECTIONS if take == "input" else INPUT_PROJECTIONS)
    else:
        inside = {child for child, _ in module.named_children()}
        side_by_side = take == "output" and not inside & OUTPUT_PROJECTIONS
    attention = network.get_submodule(parent) if linear else module
    n_heads = _first(attention, "num_attention_heads", "num_heads", "n_heads")
    if n_heads is None and "attention" in type(attention).__name__.lower():
        n_heads = _first(
            getattr(attention, "config", None), "num_attention_heads", "n_head", "n_heads"
        )
    width = _first(attention, "attention_head_size", "head_dim", "head_size")
    if not side_by_side or n_heads is None or width is None:
        return 0, 0
    if isinstance(module, nn.Linear) and take == "output":
        n_heads = module.out_features // width  # keys and values may have fewer heads
    return n_heads, width


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' name of a linear layer in GPT-2


def _first(module: object, *names: str) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def select(network: nn.Module, site: Site) -> slice:
    """Find the slice of channels that a site reads.

    Raises:
        SiteError: The module has no branch of the site's name.
    """
    if site.branch is None:
        return slice(None)
    branches = branches_of(network, site.module, site.take)
    if site.branch not in branches:
        raise SiteError(_no_such_branch(network, site, [site.module]))
    return branches[site.branch]


def channels_last(activation: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Move the channels to the last axis (a view)."""
    return activation.movedim(1, -1) if activation.ndim == 4 else activation


def cut_branch(
    network: nn.Module, site: Site, activation: Shaped[Tensor, "..."]
) -> Shaped[Tensor, "..."]:
    """Cut activations of a whole module to the channels of a site's branch (a view).

    Args:
        network: Network that has the site.
        site: Site, with or without a branch.
        activation: Activations of the whole module.
    """
    return _cut(activation, select(network, site))


def _cut(activation: Shaped[Tensor, "..."], channels: slice) -> Shaped[Tensor, "..."]:
    axis = 1 if activation.ndim == 4 else activation.ndim - 1
    start, stop, _ = channels.indices(activation.shape[axis])
    return activation.narrow(axis, start, stop - start)


def grid_of(activation: Shaped[Tensor, "batch ..."]) -> tuple[int, int]:
    """Height and width of a map; (tokens, 1) for sequences, (1, 1) for plain vectors."""
    sides = (*channels_last(activation).shape[1:-1], 1, 1)
    return sides[0], sides[1]


class _Reached(BaseException):
    """Signal that stops a forward pass at the last site; never leaves `read_activations`.

    It is no `Exception`, since networks may catch those.
    """


@dataclasses.dataclass
class _Habits:
    """Observations on a network, by which later passes stop early and copy little."""

    n_calls: "WeakKeyDictionary[nn.Module, int]" = dataclasses.field(
        default_factory=WeakKeyDictionary
    )
    """Number of calls in one pass of the modules that were counted."""
    written: set[Site] = dataclasses.field(default_factory=set)
    """Whole sites whose tensors the network writes in place later in the pass."""


_habits: "WeakKeyDictionary[nn.Module, _Habits]" = WeakKeyDictionary()


def read_activations(
    network: nn.Module, inputs: Shaped[Tensor, "batch ..."], sites: Sequence[AnySite]
) -> dict[AnySite, Shaped[Tensor, "..."]]:
    """Read the activations at some sites, in one pass that stops after the last of them.

    The first pass in which a module is read goes on to the end of the network, to count the calls
    of the module. The network runs in evaluation mode, and is put back in its mode afterwards.

    Args:
        network: Any module; called as `network(inputs)`.
        inputs: Batch of inputs.
        sites: Sites to read, or their written form.

    Returns:
        Activations at each site, as the module gave them, whatever the network does to the tensor
        later; cut to the site's branch.

    Raises:
        SiteError: A site's module was never called, or several times and the site does not say
            which call, or it holds no tensor.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> ma.read_activations(network, torch.ones(3, 4), ["1"])["1"].shape
        torch.Size([3, 8])
    """
    root = unwrapped(network)
    wanted = {site: as_site(root, site) for site in sites}
    whole = {site: dataclasses.replace(site, branch=None) for site in wanted.values()}
    with ExitStack() as stack:
        stack.enter_context(counted())
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(eager())
        tensors = _unwritten(root, inputs, list(dict.fromkeys(whole.values())))
        return {
            given: cut_branch(root, site, tensors[whole[site]]) for given, site in wanted.items()
        }


def _unwritten(root: nn.Module, inputs: Any, sites: list[Site]) -> dict[Site, Tensor]:
    """Tensors at whole sites, from as many passes as show which of them to copy."""
    habits = _habits.setdefault(root, _Habits())
    random = torch.get_rng_state()
    while True:
        reading = _Pass(root, sites, habits)
        reading.run(inputs)
        written = reading.written()
        if not written:
            return {site: kept.tensor for site, kept in reading.kept.items()}
        habits.written |= written
        torch.set_rng_state(random)


class _Kept:
    """Tensor of a site, and what it was like when the site was reached.

    Args:
        tensor: The tensor.
        copy: Whether the network is known to write into it.
        sample: Whether to keep some of its numbers, as writing through `.data` is not counted.
    """

    def __init__(self, tensor: Tensor, *, copy: bool, sample: bool) -> None:
        counted = not tensor.is_inference() and tensor.layout == torch.strided
        self.safe = copy or not counted or is_functorch_wrapped_tensor(tensor)
        self.tensor = tensor.clone() if self.safe else tensor
        self._mark = None if self.safe else self._state()
        self._sample = None if self.safe or not sample else self._numbers().clone()

    def _state(self) -> tuple[Any, ...]:
        t = self.tensor
        return t._version, t.data_ptr(), t.shape, t.stride()

    def _numbers(self) -> Tensor:
        flat = self.tensor.detach()
        for axis, length in enumerate(flat.shape):
            flat = flat.narrow(axis, 0, min(length, 16))
        return flat

    def is_written(self) -> bool:
        """Whether the tensor was changed since."""
        if self.safe:
            return False
        if self._mark != self._state():
            return True
        if self._sample is None:
            return False
        now, then = self._numbers(), self._sample
        return not bool(((now == then) | ((now != now) & (then != then))).all())


class _Pass:
    """Pass of a network in which whole sites are read.

    Args:
        root: Network, without wrappers.
        sites: Whole sites.
        habits: What is known of the network; added to.
    """

    def __init__(self, root: nn.Module, sites: list[Site], habits: _Habits) -> None:
        self.root, self.sites, self.habits = root, sites, habits
        self.kept: dict[Site, _Kept] = {}
        self.n_calls: Counter[Site] = Counter()
        modules = [root.get_submodule(site.module) for site in sites]
        self.is_first = any(module not in habits.n_calls for module in modules)
        for site, module in zip(sites, modules, strict=True):
            if site.call is None and habits.n_calls.get(module, 1) > 1:
                raise SiteError(several_calls(site))

    def run(self, inputs: Any) -> None:
        """Run the network.

        Raises:
            SiteError: A site is not reached, or its module is called several times.
            UserError: The network refuses the inputs.
        """
        with ExitStack() as hooks:
            for site in self.sites:
                keep = functools.partial(self._keep, site)
                hooks.callback(hook_site(self.root, site, keep).remove)
            try:
                self.root(inputs.clone() if isinstance(inputs, Tensor) else inputs)
            except _Reached:
                return
            except UserError:
                raise
            except Exception:
                if len(self.kept) < len(self.sites):
                    raise
                return  # behind the last site, where no other pass gets
        missing = [site for site in self.sites if site not in self.kept]
        if missing:
            raise SiteError(_never_called(missing, self.n_calls))
        for site in self.sites:
            self.habits.n_calls[self.root.get_submodule(site.module)] = self.n_calls[site]

    def _keep(self, site: Site, value: Any) -> Any:
        self.n_calls[site] += 1
        number = self.n_calls[site]
        if number == (site.call or 1):
            copy = site in self.habits.written
            self.kept[site] = _Kept(tensor_of(value, site), copy=copy, sample=self.is_first)
        elif site.call is None:
            raise SiteError(several_calls(site))
        if len(self.kept) == len(self.sites) and not self.is_first:
            raise _Reached
        return value

    def written(self) -> set[Site]:
        """Sites whose tensors the network wrote into after they were reached."""
        return {site for site, kept in self.kept.items() if kept.is_written()}


def several_calls(site: Site) -> str:
    """Sentence that refuses a site without a call, of a module that is called several times."""
    first, second = (dataclasses.replace(site, call=n) for n in (1, 2))
    return (
        f"Module {site.module!r} is called several times in one pass; name a call: {first}, "
        f"{second}, ..."
    )


def _never_called(sites: Sequence[Site], n_calls: Mapping[Site, int]) -> str:
    called = {site: n for site in sites if (n := n_calls.get(site, 0))}
    if called:
        site, n = next(iter(called.items()))
        return f"The network calls {site.module!r} {n} time(s) in one pass; there is no {site}."
    names = ", ".join(map(str, sites))
    return f"The network ran without calling the module of: {names}."


@contextmanager
def intervene(
    network: nn.Module, edits: Mapping[Site, Edit] | Mapping[str, Edit]
) -> Iterator[nn.Module]:
    """Run a network with some activations replaced.

    The network stays in the mode that it is in. Inside, compiled modules run uncompiled and fused
    attention is off, so that every module is called.

    Args:
        network: Any module; unchanged when the context ends.
        edits: For each site, or its written form, a function from a copy of its activations (of
            the site's branch alone) to their replacement, of the same shape.

    Yields:
        The same network; call it, or read its activations, inside the context.

    Raises:
        SiteError: An edit changed the shape or took no effect, or a site has no tensor, or its
            module is called several times and the site does not say which call.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
        >>> with ma.intervene(network, {"1": torch.zeros_like}):
        ...     ablated = network(torch.ones(3, 4))
        >>> bool((ablated == 0).all())
        True
    """
    root = unwrapped(network)
    interventions = _Interventions(root, edits)
    with ExitStack() as hooks:
        hooks.enter_context(eager())
        hooks.callback(root.register_forward_pre_hook(interventions.start).remove)
        for site in interventions.edits:
            change = functools.partial(interventions.change, site)
            hooks.callback(hook_site(root, site, change).remove)
        hooks.callback(root.register_forward_hook(interventions.end).remove)
        yield network
    never = [site for site in interventions.edits if site not in interventions.applied]
    if never and not interventions.is_called:
        raise SiteError(
            f"The edit at {', '.join(map(str, never))} took no effect: the network was not called "
            "inside the context, or a compiled copy of it was."
        )


class _Interventions:
    """Edits of the sites of a network, and the calls of their modules in the current pass.

    Args:
        root: Network, without wrappers.
        edits: Functions by site.
    """

    def __init__(self, root: nn.Module, edits: Mapping[Any, Edit]) -> None:
        self.edits: dict[Site, Edit] = {}
        for given, edit in edits.items():
            site = as_site(root, given)
            if site in self.edits:
                raise SiteError(f"There are two edits at {site}; give one.")
            self.edits[site] = edit
        self.channels = {site: select(root, site) for site in self.edits}
        self.n_calls: Counter[Site] = Counter()
        self.inside = self.is_called = False
        self.applied: set[Site] = set()

    def start(self, _module: nn.Module, _args: Any) -> None:
        """Begin to count calls."""
        self.n_calls.clear()
        self.inside = self.is_called = True

    def end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Refuse a pass in which some edit took no effect.

        Raises:
            SiteError: The module of a site was not called, or not often enough.
        """
        self.inside = False
        missed = [site for site in self.edits if self.n_calls[site] < (site.call or 1)]
        if missed:
            raise SiteError(_never_called(missed, self.n_calls))

    def change(self, site: Site, value: Any) -> Any:
        """Apply the edit of a site to what its module returned or was given.

        Raises:
            SiteError: The site does not say which call of its module is meant, or the edit gave
                something else than activations of the same shape.
        """
        if not self.inside and site.call is not None:
            raise SiteError(
                f"Calls of {site.module!r} are counted while the whole network runs; {site} was "
                "reached outside, by a call of a part of it or by checkpointing."
            )
        self.n_calls[site] += self.inside
        if site.call not in (None, self.n_calls[site]):
            return value
        if site.call is None and self.n_calls[site] > 1:
            raise SiteError(several_calls(site))
        self.applied.add(site)
        tensor = tensor_of(value, site)
        return replace_tensor(value, site, self._edited(site, tensor))

    def _edited(self, site: Site, tensor: Tensor) -> Tensor:
        # The network may use the same tensor elsewhere, and write into what it is given.
        whole, channels = tensor.clone(), self.channels[site]
        part = whole if site.branch is None else _cut(whole, channels)
        new: object = self.edits[site](part)
        if not isinstance(new, Tensor) or new.is_floating_point() != tensor.is_floating_point():
            kind = new.dtype if isinstance(new, Tensor) else type(new).__name__
            raise SiteError(f"The edit at {site} returned {kind}, expected {tensor.dtype}.")
        if new.shape != part.shape:
            raise SiteError(
                f"The edit at {site} returned shape {tuple(new.shape)}, expected "
                f"{tuple(part.shape)}."
            )
        if new is whole:
            return whole
        new = new.to(tensor)
        if site.branch is None:
            return new.clone()
        axis = 1 if tensor.ndim == 4 else tensor.ndim - 1
        index = torch.arange(tensor.shape[axis], device=tensor.device)[channels]
        return tensor.index_copy(axis, index, new)


def hook_site(network: nn.Module, site: Site, change: Callable[[Any], Any]) -> RemovableHandle:
    """Pass everything that the module of a site returns, or is given, through a function.

    Args:
        network: Network, without wrappers.
        site: Site; its call, axes and branch are left out of account.
        change: Function from what is passed on to what is passed on instead.

    Raises:
        SiteError: The module is scripted, and calls no hooks.
    """
    module = network.get_submodule(site.module)
    if isinstance(module, torch.jit.ScriptModule):
        raise SiteError(
            f"Module {site.module!r} (site {site}) is scripted, and nothing inside it can be read "
            "or edited; give the network that it was made from."
        )
    if site.take == "output":
        return module.register_forward_hook(lambda _module, _args, output: change(output))

    def change_input(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        # The activation is the first argument with a tensor; some networks pass all by keyword.
        for i, value in enumerate(args):
            if next(tensors_in(value), None) is not None:
                return (*args[:i], change(value), *args[i + 1 :]), kwargs
        for name, value in kwargs.items():
            if next(tensors_in(value), None) is not None:
                return args, {**kwargs, name: change(value)}
        raise SiteError(f"Site {site} was given no tensor.")

    return module.register_forward_pre_hook(change_input, with_kwargs=True)


def list_sites(network: nn.Module, inputs: Shaped[Tensor, "batch ..."]) -> list[SiteInfo]:
    """List every module whose output is a tensor of activations, from one run of the network.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> {str(i.site): (i.kind, i.width) for i in ma.list_sites(network, torch.ones(1, 4))}
        {'0': ('Linear', 8), '1': ('ReLU', 8), '2': ('Linear', 2)}
    """
    root = unwrapped(network)
    names = {module: name for name, module in root.named_modules() if name}
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        first = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        if first is not None and first.ndim > 1:
            shapes.setdefault(names[module], []).append(tuple(first.shape[1:]))

    with ExitStack() as hooks:
        hooks.enter_context(unobserved(network))
        for module in names:
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.callback(module.register_forward_hook(note).remove)
        root(inputs.clone())
    return [
        SiteInfo(
            site=Site(name, call=number + 1 if len(shapes[name]) > 1 else None),
            kind=type(root.get_submodule(name)).__name__,
            shape=shape,
            width=shape[0 if len(shape) == 3 else -1],
            branches=branches_of(root, name),
        )
        for name in names.values()
        for number, shape in enumerate(shapes.get(name, ()))
    ]
