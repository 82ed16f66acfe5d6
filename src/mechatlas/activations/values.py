"""Tensor of activations in whatever a module returns or is given.

    tensor_of       the activations: the first floating-point tensor, at any depth
    replace_tensor  the same value with other activations; the value itself is left as it is

Modules return tensors, tuples, lists, NamedTuples, dictionaries, dataclasses, and any of these
inside one another.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mechatlas.base import Site, SiteError

Path = tuple[Any, ...]
"""Keys, positions and names of fields that lead to a tensor inside a value."""


def tensor_of(value: Any, site: Site) -> Tensor:
    """Find the activations in what a module returned or was given.

    Raises:
        SiteError: The value holds no tensor.
    """
    return value if isinstance(value, Tensor) else _first(value, site)[1]


def replace_tensor(value: Any, site: Site, new: Tensor) -> Any:
    """Rebuild what a module returned or was given, with other activations.

    Args:
        value: Value that holds a tensor.
        site: Site of the value, for messages.
        new: Tensor that takes the place of the one that `tensor_of` finds.

    Raises:
        SiteError: The value holds no tensor, or cannot be rebuilt.
    """
    path, _ = _first(value, site)
    try:
        return _rebuilt(value, path, new)
    except (TypeError, AttributeError, ValueError) as error:
        raise SiteError(
            f"Site {site} holds a {type(value).__name__}, which cannot be edited: {error}."
        ) from error


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors inside nested tuples, lists, dictionaries and dataclasses."""
    return (tensor for _, tensor in _tensors(value, ()))


def _first(value: Any, site: Site) -> tuple[Path, Tensor]:
    found = list(_tensors(value, ()))
    if not found:
        raise SiteError(f"Site {site} holds a {type(value).__name__} without a tensor in it.")
    return next((pair for pair in found if pair[1].is_floating_point()), found[0])


def _tensors(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, item in _items(value):
        yield from _tensors(item, (*path, key))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        yield from ((name, getattr(value, name)) for name in names if hasattr(value, name))


def _rebuilt(value: Any, path: Path, new: Tensor) -> Any:
    if not path:
        return new
    key, *rest = path
    if isinstance(value, tuple):
        items = list(value)
        items[key] = _rebuilt(items[key], tuple(rest), new)
        make = getattr(type(value), "_make", type(value))
        return make(items)
    other = copy.copy(value)
    if isinstance(value, Mapping | list):
        other[key] = _rebuilt(value[key], tuple(rest), new)  # pyright: ignore[reportIndexIssue]
    else:  # a dataclass, perhaps frozen
        object.__setattr__(other, key, _rebuilt(getattr(value, key), tuple(rest), new))
    return other
