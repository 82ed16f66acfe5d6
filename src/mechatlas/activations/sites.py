"""Sites of a network: find them, read activations there, replace activations there.

    as_site             text or site -> the site of a network
    place_sites         names that a dictionary has for its sites -> the sites of a network
    find_sites          globs -> sites
    list_sites          every site of a network, with its shape and branches
    read_activations    run a network just far enough and return the activations at some sites
    intervene           run a network with some activations replaced
    branches_of         named channel slices of a site

A branch is a slice of channels that a module names in its `branches` attribute, one of
its submodules, or a head of an attention module. Which axis holds the channels is known or asked
for, never guessed (`layouts.py`).
"""

import dataclasses
import difflib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from jaxtyping import Shaped
from torch import Tensor, nn
from torch.jit import ScriptModule

from mechatlas.activations.axes import stamped_axis
from mechatlas.activations.branches import branches_of, no_such_branch, select
from mechatlas.activations.layouts import (
    Layout,
    channel_axis,
    find_layouts,
    layouts_of,
    sample_shape,
    unknown_axis,
)
from mechatlas.activations.networks import as_input, running
from mechatlas.activations.passes import (
    counted,
    eager,
    evaluation_mode,
    is_aside,
    unwrapped,
)
from mechatlas.activations.reading import Reader, hook_module, never_called, several_calls, whole
from mechatlas.activations.site_names import (
    fitting_sites,
    joined,
    lens_hint,
    translate,
)
from mechatlas.activations.values import replace_tensor, tensor_of
from mechatlas.base import InputError, Site, SiteError
from mechatlas.maths.arrays import Channels

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
    """Number of channels; 0 where it is not known which axis holds them."""
    branches: dict[str, Channels]
    """Named slices of the channels, or numbers of channels."""
    axes: str | None = None
    """Meaning of each axis, the batch included, as in the written form of a site; `None` where it
    is not known."""


def as_site(network: nn.Module, site: Site | str) -> Site:
    """Convert the written form of a site of a network, or check a site.

    Raises:
        SiteError: The network has no such module, and near names are offered; or it is scripted.
    """
    root = unwrapped(network)
    if isinstance(root, ScriptModule):
        raise SiteError(
            "The network is scripted, and nothing inside it can be read or edited; give the "
            "network that it was made from."
        )
    text = site.module if isinstance(site, Site) else site
    if _has_module(root, text):
        return site if isinstance(site, Site) else Site(text)
    given = vars(site) if isinstance(site, Site) else {}
    parsed = translate(root, Site.parse(text))
    if not _has_module(root, parsed.module):
        names = [name for name, _ in root.named_modules() if name]
        hint = lens_hint(root, parsed.module)
        raise SiteError(hint or _no_such_module(parsed, names))
    own = {name: value for name, value in given.items() if value not in (None, "output", text)}
    return dataclasses.replace(parsed, **own)


def place_sites(
    network: nn.Module,
    names: Sequence[str],
    given: Site | str | Sequence[Site | str] | None,
    what: str,
) -> dict[str, Site]:
    """Find the sites that a dictionary names in a network.

    Args:
        network: Network of the sites.
        names: Names that the dictionary has for them; those in angle brackets are of no network.
        given: Sites in their place, one for each name in this order.
        what: Words on what the dictionary reads and writes, for messages.

    Raises:
        InputError: There are more or fewer sites than names, or a site is not named at all.
        SiteError: The network has no such site.
    """
    if given is None:
        if any(name.startswith("<") for name in names):
            raise InputError(
                f"The dictionary {what}, and does not say of which site it is; give `site`."
            )
        chosen: Sequence[Site | str] = names
    else:
        chosen = [given] if isinstance(given, Site | str) else list(given)
    if len(chosen) != len(names):
        raise InputError(
            f"The dictionary {what}: give {len(names)} sites in this order, got "
            f"{', '.join(map(str, chosen))}."
        )
    return {name: as_site(network, site) for name, site in zip(names, chosen, strict=True)}


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
    network = unwrapped(network)
    names = [name for name, _ in network.named_modules() if name]
    sites: list[Site] = []
    for pattern in patterns:
        wanted = Site.parse(pattern)
        glob = _glob(wanted.module)
        modules = [name for name in names if glob.fullmatch(name)]
        if not modules and _has_module(network, wanted.module):
            modules = [wanted.module]  # another name of a shared module
        named = [translate(network, dataclasses.replace(wanted, module=name)) for name in modules]
        named = named or fitting_sites(network, wanted, glob.fullmatch)
        if not named:
            hint = lens_hint(network, wanted.module)
            raise SiteError(hint or _no_such_module(wanted, names))
        matches = [site for site in named for site in _with_branch(network, site)]
        if not matches:
            raise SiteError(no_such_branch(network, wanted, [site.module for site in named]))
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
    if not matches and joined(branches, site.branch) is not None:
        matches = [site]
    if matches:
        return matches
    prefix = f"{site.module}."
    below = [n.removeprefix(prefix) for n, _ in network.named_modules() if n.startswith(prefix)]
    return [
        dataclasses.replace(site, module=prefix + name, branch=None)
        for name in below
        if glob.fullmatch(name)
    ]


def _no_such_module(site: Site, names: list[str]) -> str:
    near = difflib.get_close_matches(site.module, names, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    return (
        f"The network has no module {site.module!r} (site {site}).{hint} "
        f"`mechatlas sites NETWORK` lists all {len(names)} of them."
    )


def read_activations(
    network: nn.Module, inputs: Any, sites: Sequence[AnySite]
) -> dict[AnySite, Shaped[Tensor, "..."]]:
    """Read the activations at some sites, in one pass that stops after the last of them.

    The first pass in which a module is read goes on to the end of the network, to count the calls
    of the module. The network runs in evaluation mode, and is put back in its mode afterwards.

    Args:
        network: Any module; called as `network(inputs)`.
        inputs: Batch of inputs: a tensor, an array or lists. Floats are brought to the number
            format of the network. A mapping, such as of tokens and their attention mask, goes to
            the arguments of its names.
        sites: Sites to read, or their written form.

    Returns:
        Activations at each site, as the module gave them, whatever the network does to the tensor
        later; cut to the site's branch.

    Raises:
        InputError: The network cannot run on the inputs.
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
    wanted, reader = _reader(root, tuple(sites))
    batch = as_input(network, inputs)
    modules = eager(reader.around(root))
    with counted(), evaluation_mode(network), modules, running(network, batch, sites):
        tensors = reader.tensors(root, batch)
        return {
            given: _cut(root, site, tensors[whole(site)], batch) for given, site in wanted.items()
        }


def _reader(root: nn.Module, sites: tuple[AnySite, ...]) -> tuple[dict[AnySite, Site], Reader]:
    """Sites by their given forms, and their reader, which is kept from pass to pass."""
    readers = _readers.setdefault(root, {})
    known = readers.get(sites)
    if known is None or not known[1].is_current(root):
        wanted = {site: as_site(root, site) for site in sites}
        known = readers[sites] = wanted, Reader(root, wanted.values())
    return known


_readers: WeakKeyDictionary[nn.Module, dict[Any, tuple[dict[Any, Site], Reader]]] = (
    WeakKeyDictionary()
)


def _cut(root: nn.Module, site: Site, tensor: Tensor, batch: Any) -> Tensor:
    """Cut the tensor of a whole site to the site's branch."""
    if site.branch is None:
        return tensor
    layout = _branch_layout(root, site, tensor, batch)
    return layout.cut(tensor, select(root, site))


def _branch_layout(root: nn.Module, site: Site, whole: Tensor, batch: Any) -> Layout:
    """Layout by which a branch is cut; only its channels are sure to be right."""
    if site.axes is None and site.take == "output":
        axis = stamped_axis(root.get_submodule(site.module), whole.ndim)
        if axis is not None:
            return Layout.of_channel(axis, whole.ndim)
    return layouts_of(root, batch, [site])[site]


@contextmanager
def intervene(
    network: nn.Module, edits: Mapping[Site, Edit] | Mapping[str, Edit]
) -> Iterator[nn.Module]:
    """Run a network with some activations replaced.

    Inside, the network is in evaluation mode, as when it is read; compiled modules run uncompiled
    and fused attention is off, so that every module is called.

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
        hooks.enter_context(evaluation_mode(network))
        hooks.enter_context(eager())
        hooks.callback(root.register_forward_pre_hook(interventions.start, with_kwargs=True).remove)
        for site in interventions.edits:
            change = functools.partial(interventions.change, site)
            hooks.callback(hook_module(root.get_submodule(site.module), site, change).remove)
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
        self.root = root
        self.channels = {site: select(root, site) for site in self.edits}
        self.axes: dict[Site, int | None] = {}
        self.n_calls: Counter[Site] = Counter()
        self.inside = self.is_called = False
        self.applied: set[Site] = set()

    def start(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin to count calls, and find the channels of branches."""
        if is_aside():
            return
        self.n_calls.clear()
        self.inside = self.is_called = True
        for site in self.edits:
            module = self.root.get_submodule(site.module)
            stamped = site.take == "output" and stamped_axis(module, 4) is not None
            if site.branch and not (site.axes or stamped or site in self.axes):
                self.axes[site] = channel_axis(self.root, args, kwargs, site)

    def end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Refuse a pass in which some edit took no effect."""
        if is_aside():
            return
        self.inside = False
        missed = [site for site in self.edits if self.n_calls[site] < (site.call or 1)]
        if missed:
            raise SiteError(never_called(missed, self.n_calls))

    def change(self, site: Site, value: Any) -> Any:
        """Apply the edit of a site to what its module returned or was given."""
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
        new = self._edited(site, tensor)
        return value if new is tensor else replace_tensor(value, site, new)

    def _edited(self, site: Site, tensor: Tensor) -> Tensor:
        # The network may use the same tensor elsewhere, and write into what it is given.
        whole, channels = tensor.clone(), self.channels[site]
        layout = self._layout(site, tensor) if site.branch else None
        part = layout.cut(whole, channels) if layout else whole
        new: object = self.edits[site](part)
        if not isinstance(new, Tensor) or new.is_floating_point() != tensor.is_floating_point():
            kind = new.dtype if isinstance(new, Tensor) else type(new).__name__
            raise SiteError(f"The edit at {site} returned {kind}, expected {tensor.dtype}.")
        if new.shape != part.shape:
            raise SiteError(
                f"The edit at {site} returned shape {tuple(new.shape)}, expected "
                f"{tuple(part.shape)}."
            )
        if new is whole:  # as it was, unless it was written or is watched for its gradient
            same = not (whole.is_inference() or whole.requires_grad or whole._version)
            return tensor if same else whole
        new = new.to(tensor)
        return layout.replaced(tensor, channels, new) if layout else new.clone()

    def _layout(self, site: Site, tensor: Tensor) -> Layout:
        if site.axes is not None:
            return Layout(site.axes)
        axis = self.axes.get(site)
        if site not in self.axes:
            axis = stamped_axis(self.root.get_submodule(site.module), tensor.ndim)
        if axis is None:
            raise SiteError(unknown_axis(site, tensor.shape, "which axis holds the channels"))
        return Layout.of_channel(axis, tensor.ndim)


def list_sites(network: nn.Module, inputs: Any) -> list[SiteInfo]:
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
    found = find_layouts(root, as_input(network, inputs))
    names = [name for name, _ in root.named_modules()]
    return [
        _info(root, site, *found[site])
        for site in sorted(found, key=lambda site: (names.index(site.module), site.call or 0))
    ]


def _info(root: nn.Module, site: Site, layout: Layout | str, shape: tuple[int, ...]) -> SiteInfo:
    known = isinstance(layout, Layout)
    return SiteInfo(
        site=site,
        kind=type(root.get_submodule(site.module)).__name__,
        shape=sample_shape(layout, shape) if known else shape[1:],
        width=math.prod(shape[i] for i in layout.channels) if known else 0,
        branches=branches_of(root, site.module),
        axes=layout.axes if known else None,
    )
