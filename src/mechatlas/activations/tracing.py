"""Record of one run of a network: calls of modules, operations on tensors, activations of sites.

    trace           run a network once, up to the last of some sites
    Trace           the record
    same_numbers    the one tolerance by which a repeated computation is accepted

Analyses that repeat part of a network outside of it find that part here, by watching it run, and
accept it only if it gives the same numbers.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mechatlas.activations.networks import running
from mechatlas.activations.passes import counted, eager, evaluation_mode
from mechatlas.activations.reading import Reader, hook_module, several_calls, whole
from mechatlas.activations.values import tensor_of, tensors_in
from mechatlas.base import Site, SiteError

TOLERANCE = 256
"""Largest difference of repeated numbers, in units of rounding of the largest of them."""


def same_numbers(repeated: Shaped[Tensor, "..."], recorded: Shaped[Tensor, "..."]) -> bool:
    """Whether two tensors have one shape and agree up to rounding."""
    a, b = repeated.detach(), recorded.detach()
    tolerance = TOLERANCE * torch.finfo(b.dtype).eps * float(b.abs().max())
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance


class Version(NamedTuple):
    """Tensor, with how often it had been written in place: another number, another tensor."""

    tensor: Tensor
    number: int

    @classmethod
    def of(cls, value: Any) -> "Version | None":
        """Note the version of a tensor; `None` for anything else."""
        if not isinstance(value, Tensor):
            return None
        return cls(value, -1 if value.is_inference() else value._version)

    def is_same(self, other: "Version | None") -> bool:
        """Whether both are the same numbers in the same memory."""
        if other is None or self.number != other.number:
            return False
        a, b = self.tensor, other.tensor
        same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
        return a is b or (same_memory and a.shape == b.shape)

    @property
    def is_intact(self) -> bool:
        """Whether the tensor was not written since."""
        return self.number >= 0 and self.tensor._version == self.number


@dataclasses.dataclass(eq=False)
class ModuleCall:
    """Call of a module."""

    name: str
    """Name of the module, as in `named_modules()`."""
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    started: int
    """Number of calls that had started or finished before."""
    finished: int | None = None
    """Number of calls that had started or finished before its end; None if the run stopped
    inside."""
    output: Any = None
    given: "Version | None" = None
    """Its only argument, if that is a tensor."""
    returned: "Version | None" = None
    """Its output, if that is a tensor."""

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors among its arguments."""
        return [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor)]


class Operation(NamedTuple):
    """Operation of torch on tensors that depend on the network's input."""

    function: Any
    """Overload of `torch.ops.aten`."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parents: tuple[int, ...]
    """Numbers of the operations that made its arguments; 0 is the network's input."""
    module: str
    """Innermost module that ran it."""
    channels: int
    """Length of the second axis of its result."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Record of a run, up to the last of its sites."""

    versions: dict[Site, Version]
    """Tensor at each site, of the whole module; later operations may have written into it."""
    activations: dict[Site, Shaped[Tensor, "..."]]
    """Copies of the tensors, as they were when the site was reached."""
    calls: list[ModuleCall]
    """Calls of modules, in the order in which they started."""
    operations: list[Operation]
    """Operations in the order in which they ran, after the input; empty unless requested."""
    origin: dict[Site, int]
    """Number of the operation that made the tensor at each site."""

    def finished_calls(self) -> list[ModuleCall]:
        """Calls that finished, in the order of their ends."""
        finished = [(call.finished, call) for call in self.calls if call.finished is not None]
        return [call for _, call in sorted(finished, key=lambda pair: pair[0])]


@torch.no_grad()
def trace(
    network: nn.Module,
    inputs: Shaped[Tensor, "batch ..."],
    sites: Sequence[Site],
    *,
    operations: bool = False,
) -> Trace:
    """Run a network once, up to the last of some sites, and record the run.

    Args:
        network: Any module; called as `network(inputs)`.
        inputs: A few samples.
        sites: Sites to reach; their branches are left out of account.
        operations: Whether to record every operation, beside the calls of modules.

    Raises:
        SiteError: A site is not reached, holds no tensor, or does not depend on the input.
    """
    recorder = _Recorder()
    with ExitStack() as hooks:
        for mode in (counted(), evaluation_mode(network), eager()):
            hooks.enter_context(mode)
        Reader(network, sites).tensors(network, inputs)  # refuses later calls too
        for name, module in network.named_modules():
            start = functools.partial(recorder.start, name)
            handle = module.register_forward_pre_hook(start, with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(
                module.register_forward_hook(
                    recorder.finish, with_kwargs=True, always_call=True
                ).remove
            )
        recorder.n_sites = len({whole(site) for site in sites})
        for site in dict.fromkeys(whole(site) for site in sites):
            reach = functools.partial(recorder.reach, site)
            hooks.callback(hook_module(network.get_submodule(site.module), site, reach).remove)
        if operations:
            recorder.know(inputs, recorder.operation(None, (), {}, (), 0))
            hooks.enter_context(recorder)
        with running(network, inputs), suppress(_Done):
            network(inputs)
    missing = ", ".join(str(site) for site in sites if whole(site) not in recorder.reached)
    if missing:
        raise SiteError(f"The network ran without calling the module of: {missing}.")
    reached = {site: recorder.reached[whole(site)] for site in sites}
    origin = {site: number for site, (_, _, number) in reached.items()}
    if operations and -1 in origin.values():
        site = next(site for site, number in origin.items() if number < 0)
        raise SiteError(f"Site {site} does not depend on the network's input.")
    return Trace(
        {site: version for site, (version, _, _) in reached.items()},
        {site: copy for site, (_, copy, _) in reached.items()},
        recorder.calls,
        recorder.operations,
        origin,
    )


class _Done(Exception):  # noqa: N818 - a signal, never leaves this module
    pass


class _Recorder(TorchDispatchMode):
    """Recorder of calls of modules, by hooks, and of operations, as a mode of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ModuleCall] = []
        self.operations: list[Operation] = []
        self.reached: dict[Site, tuple[Version, Tensor, int]] = {}
        self.known: dict[int, int] = {}
        self.n_sites = 0
        self.n_calls: Counter[Site] = Counter()
        self._stack: list[ModuleCall] = []
        self._alive: list[Tensor] = []  # an id is only good as long as its tensor lives
        self._time = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip the compiler, torch would import all of it, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        known = self.known
        parents = tuple(known[id(a)] for a in tensors_in((args, kwargs)) if id(a) in known)
        out = func(*args, **kwargs)
        for k, tensor in enumerate(tensors_in(out) if parents else ()):
            function = func if k == 0 else f"output {k} of {func}"
            width = tensor.shape[1] if tensor.ndim > 1 else 0
            self.know(tensor, self.operation(function, args, kwargs, parents, width))
        return out

    def operation(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parents: tuple[int, ...],
        channels: int,
    ) -> int:
        """Note an operation, and return its number."""
        module = self._stack[-1].name if self._stack else "the network's input"
        self.operations.append(Operation(function, args, kwargs, parents, module, channels))
        return len(self.operations) - 1

    def know(self, tensor: Tensor, number: int) -> None:
        """Note which operation made a tensor."""
        self.known[id(tensor)] = number
        self._alive.append(tensor)

    def start(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note that a call has started."""
        call = ModuleCall(name, module, args, kwargs, self._time)
        if len(args) == 1 and not kwargs:
            call.given = Version.of(args[0])
        self._time += 1
        self.calls.append(call)
        self._stack.append(call)

    def finish(
        self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note that the innermost call has ended; with no output if the run stops inside."""
        call = self._stack.pop()
        if output is not None:
            call.finished, call.output = self._time, output
            call.returned = Version.of(output)
            self._time += 1

    def reach(self, site: Site, value: Any) -> Any:
        """Keep the tensor at a site, and stop at the last one."""
        self.n_calls[site] += 1
        if site.call is None and self.n_calls[site] > 1:
            raise SiteError(several_calls(site))
        if self.n_calls[site] == (site.call or 1):
            tensor = tensor_of(value, site)
            origin = self.known.get(id(tensor), -1)
            self.reached[site] = Version(tensor, tensor._version), tensor.clone(), origin
        if len(self.reached) == self.n_sites:
            raise _Done
        return value
