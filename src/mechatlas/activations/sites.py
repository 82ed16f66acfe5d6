"""Sites of a network: find them, read activations there, replace activations there.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mechatlas.activations.site_names import (
    fitting_sites,
    joined,
    lens_hint,
    named_heads,
    translate,
)
from mechatlas.base import Site, SiteError

Edit = Callable[[Tensor], Tensor]
"""Function from the activations at a site to their replacement, of the same shape."""


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
        named = [translate(network, dataclasses.replace(wanted, module=name)) for name in modules]
        named = named or fitting_sites(network, wanted, glob.fullmatch)
        if not named:
            hint = lens_hint(network, wanted.module)
            raise SiteError(hint or _no_such_module(wanted, names))
        matches = [site for site in named for site in _with_branch(network, site)]
        if not matches:
            raise SiteError(_no_such_branch(network, wanted, [site.module for site in named]))
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
    if take == "output" and (named := named_heads(network, module_name)):
        return named
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
    part = joined(branches_of(network, site.module, site.take), site.branch)
    if part is None:
        raise SiteError(_no_such_branch(network, site, [site.module]))
    return part


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


class _Reached(Exception):  # noqa: N818 - it is a signal, not an error
    """Signal that stops a forward pass at the last site; never leaves `read_activations`."""


def read_activations(
    network: nn.Module, inputs: Shaped[Tensor, "batch ..."], sites: Sequence[Site]
) -> dict[Site, Shaped[Tensor, "..."]]:
    """Read the activations at some sites, in one pass that stops after the last of them.

    Args:
        network: Any module; called as `network(inputs)`.
        inputs: Batch of inputs.
        sites: Sites to read.

    Returns:
        Activations at each site, as the module gave them, cut to the site's branch.

    Raises:
        SiteError: A site's module was never called, or holds no tensor.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> site = ma.Site("1")
        >>> ma.read_activations(network, torch.ones(3, 4), [site])[site].shape
        torch.Size([3, 8])
    """
    activations: dict[Site, Tensor] = {}

    def keep(site: Site, value: Any) -> Any:
        if site not in activations:
            activations[site] = cut_branch(network, site, _tensor_of(value, site))
        if len(activations) == len(set(sites)):
            raise _Reached
        return value

    with ExitStack() as hooks:
        for site in dict.fromkeys(sites):
            hooks.callback(_hook(network, site, functools.partial(keep, site)).remove)
        try:
            network(inputs)
        except _Reached:
            return {site: activations[site] for site in sites}
    missing = ", ".join(str(site) for site in sites if site not in activations)
    raise SiteError(f"The network ran without calling the module of: {missing}.")


@contextmanager
def intervene(network: nn.Module, edits: Mapping[Site, Edit]) -> Iterator[nn.Module]:
    """Run a network with some activations replaced.

    Args:
        network: Any module; unchanged when the context ends.
        edits: For each site a function from its activations (of the site's branch alone)
            to their replacement, of the same shape.

    Yields:
        The same network; call it, or read its activations, inside the context.

    Raises:
        SiteError: An edit changed the shape, or a site has no tensor.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
        >>> with ma.intervene(network, {ma.Site("1"): torch.zeros_like}):
        ...     ablated = network(torch.ones(3, 4))
        >>> bool((ablated == 0).all())
        True
    """
    with ExitStack() as hooks:
        for site, edit in edits.items():
            change = functools.partial(_edit, site=site, edit=edit, channels=select(network, site))
            hooks.callback(_hook(network, site, change).remove)
        yield network


def _hook(network: nn.Module, site: Site, change: Callable[[Any], Any]) -> RemovableHandle:
    """Pass everything that a module returns, or is given, through a function."""
    module = _module(network, site)
    if site.take == "output":
        return module.register_forward_hook(lambda _module, _args, output: change(output))

    def change_input(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        # Some networks pass everything by keyword; the activation is then the first of these.
        if args or not kwargs:
            return change(args), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    return module.register_forward_pre_hook(change_input, with_kwargs=True)


def _edit(value: Any, *, site: Site, edit: Edit, channels: slice) -> Any:
    tensor = _tensor_of(value, site)
    part = tensor if site.branch is None else _cut(tensor, channels)
    new = edit(part)
    if new.shape != part.shape:
        raise SiteError(
            f"The edit at {site} returned shape {tuple(new.shape)}, expected {tuple(part.shape)}."
        )
    if site.branch is not None:
        whole = tensor.clone()  # a skip connection may carry the same tensor
        _cut(whole, channels).copy_(new)
        new = whole
    return _replace_tensor(value, site, new)


def _module(network: nn.Module, site: Site) -> nn.Module:
    try:
        return network.get_submodule(site.module)
    except AttributeError:
        names = [name for name, _ in network.named_modules() if name]
        raise SiteError(_no_such_module(site, names)) from None


def _tensor_of(value: Any, site: Site) -> Tensor:
    first = value
    if isinstance(value, Mapping | tuple | list):
        first = next(iter(value.values() if isinstance(value, Mapping) else value), None)
    if not isinstance(first, Tensor):
        raise SiteError(
            f"Site {site} holds a {type(value).__name__} that does not start with a tensor."
        )
    return first


def _replace_tensor(value: Any, site: Site, new: Tensor) -> Any:
    if isinstance(value, Tensor):
        return new
    if isinstance(value, tuple):
        return (new, *value[1:])
    if isinstance(value, list):
        return [new, *value[1:]]
    if isinstance(value, dict):
        value[next(iter(value))] = new
        return value
    raise SiteError(f"Site {site} holds a {type(value).__name__}, which cannot be edited.")


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
    shapes: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in network.named_modules() if name}

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and first.ndim in (2, 3, 4):
            shapes.setdefault(names[module], tuple(first.shape[1:]))

    with ExitStack() as hooks, torch.no_grad():
        for module in names:
            hooks.callback(module.register_forward_hook(note).remove)
        network(inputs)
    return [
        SiteInfo(
            site=Site(name),
            kind=type(network.get_submodule(name)).__name__,
            shape=shapes[name],
            width=shapes[name][0 if len(shapes[name]) == 3 else -1],
            branches=branches_of(network, name),
        )
        for name in names.values()
        if name in shapes
    ]
