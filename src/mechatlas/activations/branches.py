"""Named slices of the channels of a site, such as the heads of attention.

branches_of   network and module -> slices by name
select        slice of the channels that a site reads
ends_of       branches whose channels lie side by side; `scattered_of` has the others
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from mechatlas.activations.passes import unwrapped
from mechatlas.activations.site_names import joined, named_heads
from mechatlas.base import Site, SiteError
from mechatlas.maths.arrays import Channels, numbers_of

OUTPUT_PROJECTIONS = {"c_proj", "o_proj", "out_proj", "out_lin", "dense", "proj"}
"""Names of the linear layers that take the heads, side by side, and mix them."""
INPUT_PROJECTIONS = {"query", "key", "value"} | {
    f"{x}_{end}" for x in "qkv" for end in ("proj", "lin")
}
"""Names of the linear layers whose outputs are the heads, side by side."""


def branches_of(
    network: nn.Module, module_name: str, take: Literal["output", "input"] = "output"
) -> dict[str, Channels]:
    """Find the named channels of a module's output or input.

    A module names the branches of its output in an attribute `branches`: a dict of name to slice,
    to numbers of channels, or to one bool a channel. The heads of an attention module are `head0`,
    `head1`, ... wherever they lie side by side: in the output of the module if nothing inside
    mixes them, in the input of the layer that mixes them, and in the queries, keys and values.

    Args:
        network: Network that has the module.
        module_name: Name of the module, as in `named_modules()`.
        take: Whether the slices are of the module's output or of its input.

    Raises:
        SiteError: What a module names as channels is none of these.
    """
    network = unwrapped(network)
    branches = getattr(network.get_submodule(module_name), "branches", None)
    if isinstance(branches, Mapping) and not isinstance(branches, nn.Module):
        channels = {n: c for n, c in branches.items() if isinstance(c, _CHANNELS)}
        if take == "input" or len(channels) < len(branches):  # an attribute that means others
            return {}
        return {n: as_channels(c, f"{module_name}/{n}") for n, c in channels.items()}
    if take == "output" and (named := named_heads(network, module_name)):
        return dict(named)
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


_CHANNELS = slice | range | list | tuple | np.ndarray | Tensor


def as_channels(value: Any, name: str, width: int | None = None) -> Channels:
    """Convert a slice, numbers of channels or one bool a channel.

    Args:
        value: The channels.
        name: Name of the branch, for the message.
        width: Number of channels, where it is known.

    Raises:
        SiteError: The value is something else, or names a channel twice.
    """
    if isinstance(value, slice):
        return value
    numbers = np.asarray(value.tolist() if isinstance(value, Tensor) else value)
    if numbers.dtype == bool and width not in (None, numbers.size):
        raise SiteError(f"The branch {name!r} has {numbers.size} bools, for {width} channels.")
    numbers = np.flatnonzero(numbers) if numbers.dtype == bool else numbers
    whole = not numbers.size or np.issubdtype(numbers.dtype, np.integer)
    if numbers.ndim != 1 or not whole or len(np.unique(numbers)) < len(numbers):
        raise SiteError(
            f"The branch {name!r} is {value!r}; expected a slice, numbers of channels, each once, "
            "or one bool a channel."
        )
    return [int(number) for number in numbers]


def ends_of(branches: Mapping[str, Channels], width: int) -> dict[str, tuple[int, int]]:
    """First channel of each branch and the one after its last; scattered branches are left out."""
    numbers = {name: numbers_of(channels, width) for name, channels in branches.items()}
    return {
        name: (at[0], at[-1] + 1)
        for name, at in numbers.items()
        if at and at == list(range(at[0], at[-1] + 1))
    }


def scattered_of(branches: Mapping[str, Channels], width: int) -> dict[str, list[int]]:
    """Channels of each branch whose channels do not lie side by side, in their order."""
    side_by_side = ends_of(branches, width)
    return {n: numbers_of(c, width) for n, c in branches.items() if n not in side_by_side}


def select(network: nn.Module, site: Site) -> Channels:
    """Find the channels that a site reads.

    Raises:
        SiteError: The module has no branch of the site's name.
    """
    if site.branch is None:
        return slice(None)
    part = joined(branches_of(network, site.module, site.take), site.branch)
    if part is None:
        raise SiteError(no_such_branch(network, site, [site.module]))
    return part


def no_such_branch(network: nn.Module, site: Site, modules: list[str]) -> str:
    """Sentence that refuses a site whose branch there is not, and names those there are.

    Args:
        network: Network that has the modules.
        site: Site that was asked for.
        modules: Modules that it may mean.
    """
    known = sorted({name for module in modules for name in branches_of(network, module, site.take)})
    have = f"has the branches {', '.join(known)}" if known else "has no named branches"
    return f"Module {modules[0]!r} {have}; it has no branch {site.branch!r} (site {site})."
