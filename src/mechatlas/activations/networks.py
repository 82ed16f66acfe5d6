"""Networks by name, with their weights.

load_network   a bundled name or `package.module:factory` -> nn.Module in eval mode
load_weights   a file of weights into a network, every mismatch named
run_network    call a network; what it raises becomes one sentence
as_input       an array in any form -> a batch in the number format of a network
dtype_of       number format that a network computes in
digest         checksum of all weights, kept with everything made from them
has_weights    whether a network has the weights of a checksum
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from mechatlas.base import InputError, UserError, WeightsError
from mechatlas.maths.arrays import as_numbers
from mechatlas.sources import reason_of
from mechatlas.tensorfiles import mismatches, non_finite, read_tensors

ARCHITECTURES = "mechatlas.activations.architectures"
BUNDLED = {
    "inception_mini": f"{ARCHITECTURES}.inception:inception_mini",
    "inception_v1": f"{ARCHITECTURES}.inception_v1:inception_v1",
    "squeezenet": f"{ARCHITECTURES}.squeezenet:squeezenet",
    "efficientnet_lite0": f"{ARCHITECTURES}.efficientnet:efficientnet_lite0",
    "transformer": f"{ARCHITECTURES}.language:transformer",
}
"""Networks that a recipe can name without a module path."""
_FOLDERS: ContextVar[tuple[Path, ...]] = ContextVar("_FOLDERS", default=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Name of a network, and its weights."""

    name: str
    """A bundled name (inception_mini, ...) or `package.module:factory`."""
    weights: Path | None = None
    """File of weights, given to the factory as `weights=`."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the factory."""


def load_network(recipe: Network) -> nn.Module:
    """Call the factory that a recipe names: a class of `nn.Module`, or a function of the module.

    A module of the user's own is imported from where Python finds it, else from the current folder;
    commands also look beside the recipe.

    Returns:
        The network in evaluation mode.

    Raises:
        UserError: No such factory, or it did not return an `nn.Module`.

    Examples:
        >>> import torch
        >>> import mechatlas as ma
        >>> network = ma.load_network(ma.Network(name="inception_mini"))
        >>> network(torch.rand(2, 3, 31, 31)).shape
        torch.Size([2, 10])
    """
    arguments = dict(recipe.arguments)
    if recipe.weights is not None:
        arguments["weights"] = recipe.weights
    try:
        with _importable(recipe.name):
            network = _factory(recipe.name)(**arguments)
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"Network {recipe.name!r} refused its arguments: {error}.") from error
    except Exception as error:  # code of the user's own can raise anything
        raise UserError(
            f"Network {recipe.name!r} cannot be built: {reason_of(error)} ({type(error).__name__})."
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{recipe.name!r} returned {type(network).__name__}, expected a torch.nn.Module."
        )
    return network.eval()


@contextlib.contextmanager
def looking_in(*folders: Path) -> Iterator[None]:
    """Look for the modules of named networks in some folders too, as in that of a recipe."""
    token = _FOLDERS.set(folders)
    try:
        yield
    finally:
        _FOLDERS.reset(token)


def folders() -> tuple[Path, ...]:
    """Folders in which modules of named networks are looked for too, for workers."""
    return _FOLDERS.get()


def reload_network(network: "Network", beside: tuple[Path, ...]) -> nn.Module:
    """Load a network again in a worker; it is one that the first process has loaded.

    Args:
        network: Network and its weights.
        beside: Folders in which the first process looks for modules.
    """
    with looking_in(*beside):
        return load_network(network)


@contextlib.contextmanager
def _importable(name: str) -> Iterator[None]:
    """Let Python import a network's module from the folders, after all others that it knows.

    Only while a network is loaded that the user has named: nothing else that a command imports may
    come from a folder of data.
    """
    folders = () if name in BUNDLED else (*_FOLDERS.get(), Path.cwd())
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path.extend(added)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            with contextlib.suppress(ValueError):  # the imported code may have removed it
                sys.path.remove(folder)


def _forget_other(package: str) -> None:
    """Forget a module of the same name that lies in no folder any more that is looked into."""
    loaded = getattr(sys.modules.get(package), "__file__", None)
    if loaded is None:
        return
    file = Path(loaded)
    folder = file.parent.parent if file.stem == "__init__" else file.parent
    spec = PathFinder.find_spec(package)
    if spec is not None and str(folder) not in map(os.path.abspath, sys.path):
        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            del sys.modules[name]


def _factory(name: str) -> Callable[..., Any]:
    path = BUNDLED.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, BUNDLED, n=2)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(
            f"There is no bundled network {name!r}.{hint} Bundled: {', '.join(BUNDLED)}. "
            "Name your own as 'package.module:factory'."
        )
    _forget_other(module_name.partition(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"Network {name!r}: cannot import {error.name!r}. It is not installed, and neither "
            f"beside the recipe nor in the current folder, {Path.cwd()}, nor on PYTHONPATH."
        ) from error
    except Exception as error:  # code of the user's own can raise anything
        raise UserError(
            f"Network {name!r}: importing {module_name!r} failed: {reason_of(error)} "
            f"({type(error).__name__})."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise UserError(f"Network {name!r}: module {module_name!r} has no function {attribute!r}.")
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        return factory
    function = inspect.unwrap(factory)
    home = str(getattr(function, "__module__", ""))
    within = home == module_name or home.startswith(f"{module_name}.")
    if isinstance(function, types.FunctionType) and within:
        return factory
    raise UserError(
        f"Network {name!r} was not called: it is neither a class of torch.nn.Module nor a function "
        f"defined in {module_name!r} ({type(factory).__name__} of {home or 'no module'})."
    )


def load_weights(
    network: nn.Module, path: Path, rename: Callable[[str], str | None] = lambda name: name
) -> None:
    """Copy a file of weights into a network.

    Args:
        network: Changed in place; only if every key and shape fits.
        path: A safetensors file, or a `.pt` or `.pth` file of plain tensors.
        rename: The network's name of a key in the file, or `None` for keys to pass over.

    Raises:
        WeightsError: The file cannot be read, or keys or shapes differ; lists all of them.
    """
    wanted = network.state_dict()
    given: dict[str, Tensor] = {}
    for name, tensor in read_tensors(path).items():
        renamed = rename(name)
        if renamed is not None:
            given[renamed] = tensor
    wrong = mismatches(given, {name: tensor.shape for name, tensor in wanted.items()})
    wrong += non_finite(given)
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise WeightsError(
            f"{path} does not fit {type(network).__name__}: {shown}. "
            "Is it the weights file of this architecture?"
        )
    network.load_state_dict({name: t.to(wanted[name].dtype) for name, t in given.items()})


def dtype_of(network: nn.Module) -> torch.dtype | None:
    """Number format of the first floating-point parameter or buffer; `None` where there is none."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


def _first_parameter(network: nn.Module) -> nn.Parameter | None:
    """First parameter, as `parameters()` yields it, without its name."""
    waiting = [network]
    while waiting:
        module = waiting.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                return parameter
        waiting += [part for part in reversed(module._modules.values()) if part is not None]
    return None


def as_input(network: nn.Module, inputs: Any) -> Any:
    """Convert a batch to a tensor as a network reads it.

    Args:
        network: Network that is called with the batch.
        inputs: A tensor, an array or nested lists, which are brought to the device of the network's
            first parameter, and floats to its number format. Tuples and mappings are for networks
            that take them, and stay as they are.

    Raises:
        InputError: It is an array of something else than real numbers, or sparse, or masked.
    """
    if isinstance(inputs, tuple | Mapping):
        return inputs
    parameter = _first_parameter(network)
    if (
        parameter is not None
        and isinstance(inputs, Tensor)
        and inputs.dtype == parameter.dtype
        and inputs.device == parameter.device
        and inputs.layout == torch.strided
        and inputs.is_floating_point()
    ):
        return inputs  # as most are
    wanted = dtype_of(network)
    if hasattr(inputs, "stack") and hasattr(inputs, "read"):
        raise InputError(
            f"{type(inputs).__name__} is not a batch. Make one of it: "
            "samples.stack([samples.read(i) for i in range(8)])."
        )
    if not isinstance(inputs, Tensor):
        array = as_numbers(inputs, "The batch of inputs")
        floats = array.dtype.kind == "f"
        kept = array.dtype.newbyteorder("=") if floats else np.dtype(np.int64)
        inputs = torch.from_numpy(np.array(array, kept, order="C"))
        wanted = wanted or torch.float32
    if inputs.layout != torch.strided:
        raise InputError("The batch of inputs is a sparse tensor. Pass .to_dense() of it.")
    if parameter is not None and not inputs.is_meta:
        inputs = inputs.to(parameter.device)
    if inputs.is_floating_point() and wanted is not None and inputs.dtype != wanted:
        return inputs.to(wanted)
    return inputs


@contextlib.contextmanager
def running(network: nn.Module, inputs: Any, sites: Sequence[Any] = ()) -> Iterator[None]:
    """Turn whatever a network raises inside the context into one sentence.

    Args:
        network: Network that is called.
        inputs: Batch that it is called with.
        sites: Sites that are read, for the message.

    Raises:
        InputError: The network raised an error; names the shape of the inputs and the module.
        UserError: The network says itself what the user can mend.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # code of the user's own can raise anything
        given = type(inputs).__name__
        if isinstance(inputs, Tensor):
            kind = str(inputs.dtype).removeprefix("torch.")
            given = f"{kind} inputs of shape {tuple(inputs.shape)}"
        purpose = f" to read {', '.join(map(str, sites[:3]))}" if sites else ""
        raise InputError(
            f"{type(network).__name__} cannot run on {given}{purpose}: {reason_of(error)} "
            f"({type(error).__name__}{_place(network, error)})."
        ) from error


def run_network(network: nn.Module, inputs: Any) -> Any:
    """Call a network with a batch in any form.

    Args:
        network: Any module; called with the batch in its own number format.
        inputs: Batch, as for `as_input`.

    Raises:
        InputError: The network raised an error; names the shape of the inputs and the module.
    """
    batch = as_input(network, inputs)
    with running(network, batch):
        return call_network(network, batch)


def call_network(network: nn.Module, inputs: Any) -> Any:
    """Call a network; a mapping goes to the arguments of its names, where the network has these.

    Args:
        network: Any module.
        inputs: Batch as the network takes it.
    """
    if isinstance(inputs, Tensor):
        return network(inputs)
    args, kwargs = arguments_of(network, inputs)
    return network(*args, **kwargs)


def arguments_of(network: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which `call_network` calls a network, in order and by name."""
    if isinstance(inputs, Mapping) and set(inputs) <= set(
        inspect.signature(network.forward).parameters
    ):
        return (), dict(inputs)
    return (inputs,), {}


def _place(network: nn.Module, error: BaseException) -> str:
    """Innermost module of a network in which an error was raised."""
    names = {id(module): name for name, module in network.named_modules()}
    place, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if names.get(id(module)):
            place = f" in module {names[id(module)]!r}, a {type(module).__name__}"
        trace = trace.tb_next
    return place


def digest(network: nn.Module) -> str:
    """Checksum (xxh3, 128 bits) of the names, shapes and bytes of all weights."""
    state = xxhash.xxh3_128()
    for name, tensor in network.state_dict().items():
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        whole = tensor.detach().cpu().contiguous().flatten()
        state.update(whole.view(torch.uint8).numpy() if whole.numel() else b"")
    return state.hexdigest()


def has_weights(network: nn.Module, checksum: str) -> bool:
    """Whether a network, or its base model without a head, has the weights of a checksum.

    Stores of version 0.2 were made from base models, whose heads are kept now.
    """
    base = getattr(network, "base_model", None)  # of transformers
    return checksum == digest(network) or (
        isinstance(base, nn.Module) and base is not network and checksum == digest(base)
    )
