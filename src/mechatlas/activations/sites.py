"""Where activations live in a network, and how to read and replace them there.

    find_sites          globs -> sites
    list_sites          every site of a network, with its shape and branches
    read_activations    run a network just far enough and return the activations at some sites
    intervene           run a network with some activations replaced
    branches_of         the named channel slices of a site

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
from torch import Tensor, nn

from mechatlas.base import Site, SiteError

Edit = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """What `list_sites` says of one site."""

    site: Site
    kind: str
    """Class of the module."""
    shape: tuple[int, ...]
    """Shape of its activations for one sample, without the batch axis."""
    width: int
    """Number of channels."""
    branches: dict[str, slice]


def find_sites(network: nn.Module, patterns: Sequence[str]) -> list[Site]:
    """Sites that match any of some globs, in network order, each once.

    `*` and `?` stay within one name of a dotted path, `**` crosses dots, so `mixed*` is
    every module whose name starts so and `mixed4*/5x5` one branch of each.

    Raises:
        SiteError: A pattern matches nothing; near names are offered.
    """
    names = [name for name, _ in network.named_modules() if name]
    found: list[Site] = []
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
        found += [site for site in matches if site not in found]
    return found


def _glob(pattern: str) -> re.Pattern[str]:
    translate = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return re.compile("".join(translate.get(part, re.escape(part)) for part in parts))


def _with_branch(network: nn.Module, site: Site) -> list[Site]:
    if site.branch is None:
        return [site]
    glob = _glob(site.branch)
    branches = branches_of(network, site.module, site.take)
    named = [dataclasses.replace(site, branch=name) for name in branches if glob.fullmatch(name)]
    if named:
        return named
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


HEADS_MIXED_BY = {"c_proj", "o_proj", "out_proj", "out_lin", "dense"}
"""Names of the linear layers that take the heads, side by side, and mix them."""
HEADS_MADE_BY = {"query", "key", "value"} | {f"{x}_{end}" for x in "qkv" for end in ("proj", "lin")}
"""Names of the linear layers whose outputs are the heads, side by side."""


def branches_of(
    network: nn.Module, module_name: str, take: Literal["output", "input"] = "output"
) -> dict[str, slice]:
    """The named channel slices of what a module returns, or of what it is given.

    A module names those of its output in an attribute `branches`, a dict of name to slice.
    Where an attention module keeps its heads side by side they are `head0`, `head1`, ...:
    in its output if nothing inside it mixes them, in the input of the layer that does, and
    in the queries, keys and values.
    """
    branches = getattr(network.get_submodule(module_name), "branches", None)
    if isinstance(branches, Mapping) and not isinstance(branches, nn.Module):
        return dict(branches) if take == "output" else {}
    n_heads, width = _heads(network, module_name, take)
    return {f"head{i}": slice(i * width, (i + 1) * width) for i in range(n_heads)}


def _heads(network: nn.Module, module_name: str, take: str) -> tuple[int, int]:
    """Number and width of the heads that lie side by side there; 0 where they do not."""
    module = network.get_submodule(module_name)
    parent, _, name = module_name.rpartition(".")
    linear = isinstance(module, nn.Linear) or _is_conv1d(module)
    if linear:
        apart = name in (HEADS_MIXED_BY if take == "input" else HEADS_MADE_BY)
    else:
        inside = {child for child, _ in module.named_children()}
        apart = take == "output" and not inside & HEADS_MIXED_BY
    holder = network.get_submodule(parent) if linear else module
    n_heads = _first(holder, "num_attention_heads", "num_heads", "n_heads")
    if n_heads is None and "attention" in type(holder).__name__.lower():
        n_heads = _first(
            getattr(holder, "config", None), "num_attention_heads", "n_head", "n_heads"
        )
    width = _first(holder, "attention_head_size", "head_dim", "head_size")
    if not apart or n_heads is None or width is None:
        return 0, 0
    if isinstance(module, nn.Linear) and take == "output":
        n_heads = module.out_features // width  # keys and values may have fewer heads
    return n_heads, width


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' name of a linear layer in GPT-2


def _first(holder: object, *names: str) -> int | None:
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def select(network: nn.Module, site: Site) -> slice:
    """The slice of channels that a site reads.

    Raises:
        SiteError: The module has no branch of that name.
    """
    if site.branch is None:
        return slice(None)
    branches = branches_of(network, site.module, site.take)
    if site.branch not in branches:
        raise SiteError(_no_such_branch(network, site, [site.module]))
    return branches[site.branch]


def channels_last(activation: Tensor) -> Tensor:
    """The same activations with the channels as the last axis (a view)."""
    return activation.movedim(1, -1) if activation.ndim == 4 else activation


def grid_of(activation: Tensor) -> tuple[int, int]:
    """Height and width of the map; (tokens, 1) for sequences, (1, 1) for plain vectors."""
    sides = (*channels_last(activation).shape[1:-1], 1, 1)
    return sides[0], sides[1]


class _Reached(Exception):  # noqa: N818 - it is a signal, not an error
    """Stops a forward pass after the last site needed; never leaves `read_activations`."""


def read_activations(
    network: nn.Module, inputs: Tensor, sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """Activations at some sites, in one pass that stops after the last of them.

    Args:
        network: Any module; called as `network(inputs)`.
        inputs: A batch for it.
        sites: Where to read.

    Returns:
        For each site its activations, as the module gave them, cut to the site's branch.

    Raises:
        SiteError: A site's module was never called, or holds no tensor.
    """
    found: dict[Site, Tensor] = {}

    def keep(site: Site, value: Any) -> None:
        if site not in found:
            tensor = _tensor_of(value, site)
            channels = select(network, site)
            axis = 1 if tensor.ndim == 4 else tensor.ndim - 1
            length = len(range(*channels.indices(tensor.shape[axis])))
            found[site] = tensor.narrow(axis, channels.start or 0, length)
        if len(found) == len(set(sites)):
            raise _Reached

    with ExitStack() as hooks:
        for site in dict.fromkeys(sites):
            module = _module(network, site)
            if site.take == "output":
                handle = module.register_forward_hook(
                    lambda _m, _args, output, site=site: keep(site, output)
                )
            else:
                handle = module.register_forward_pre_hook(
                    lambda _m, args, kwargs, site=site: keep(site, (*args, *kwargs.values())),
                    with_kwargs=True,
                )
            hooks.callback(handle.remove)
        try:
            network(inputs)
        except _Reached:
            return {site: found[site] for site in sites}
    missing = ", ".join(str(site) for site in sites if site not in found)
    raise SiteError(f"The network ran without calling the module of: {missing}.")


@contextmanager
def intervene(network: nn.Module, edits: Mapping[Site, Edit]) -> Iterator[nn.Module]:
    """Run a network with some activations replaced.

    Args:
        network: Any module; unchanged when the context ends.
        edits: For each site a function from its activations (of the site's branch alone)
            to what shall stand there instead, of the same shape.

    Yields:
        The same network; call it, or read its activations, inside the context.

    Raises:
        SiteError: An edit changed the shape, or a site has no tensor.
    """
    with ExitStack() as hooks:
        for site, edit in edits.items():
            change: Callable[[Any], Any] = functools.partial(
                _edit, site=site, edit=edit, channels=select(network, site)
            )
            module = _module(network, site)
            if site.take == "output":
                handle = module.register_forward_hook(
                    lambda _m, _args, output, change=change: change(output)
                )
            else:
                handle = module.register_forward_pre_hook(
                    functools.partial(_edit_input, change=change), with_kwargs=True
                )
            hooks.callback(handle.remove)
        yield network


def _edit_input(
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    change: Callable[[Any], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Some networks pass everything by keyword; the activation is then the first of these.
    if args:
        return change(args), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def _edit(value: Any, *, site: Site, edit: Edit, channels: slice) -> Any:
    tensor = _tensor_of(value, site)
    part = tensor
    if site.branch is not None:
        part = channels_last(tensor)[..., channels]
        part = part.movedim(-1, 1) if tensor.ndim == 4 else part
    new = edit(part)
    if new.shape != part.shape:
        raise SiteError(
            f"The edit at {site} returned shape {tuple(new.shape)}, expected {tuple(part.shape)}."
        )
    if site.branch is not None:
        whole = tensor.clone()
        channels_last(whole)[..., channels] = channels_last(new)
        new = whole
    return _replace_tensor(value, site, new)


def _module(network: nn.Module, site: Site) -> nn.Module:
    try:
        return network.get_submodule(site.module)
    except AttributeError:
        names = [name for name, _ in network.named_modules() if name]
        raise SiteError(_no_such_module(site, names)) from None


def _tensor_of(value: Any, site: Site) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return value[0]
    if (
        isinstance(value, Mapping)
        and value
        and isinstance(first := next(iter(value.values())), Tensor)
    ):
        return first
    raise SiteError(
        f"Site {site} holds a {type(value).__name__} that does not start with a tensor."
    )


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


def list_sites(network: nn.Module, inputs: Tensor) -> list[SiteInfo]:
    """Every module whose output is a tensor of activations, found by running it once."""
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
