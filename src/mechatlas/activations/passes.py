"""Passes of a user's network, which is left as it was.

evaluation_mode   training mode off, and back on afterwards
eager             no compiled code and no fused kernels, which would pass hooks by
unobserved        evaluation mode for a pass beside the user's own, random state put back
unwrapped         network inside a wrapper of torch
"""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from mechatlas.base import SiteError


def unwrapped(network: nn.Module) -> nn.Module:
    """Find the network inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Raises:
        SiteError: The network is split over several devices.
    """
    while True:
        parallel = isinstance(network, _PARALLEL)
        devices: Any = (parallel and network.device_ids) or ()
        if len(devices) > 1:
            raise SiteError(
                f"{type(network).__name__} runs copies of the network on {len(devices)} devices; "
                "give `network.module` instead."
            )
        compiled = "_orig_mod" in network._modules
        inside = network.module if parallel else network._orig_mod if compiled else None
        if not isinstance(inside, nn.Module):
            return network
        network = inside


_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Switch the modules that are in training mode to evaluation, and back afterwards.

    Dropout is off inside, and running statistics are used and not changed.
    """
    training = [module for module in _parts(network) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _parts(network: nn.Module) -> list[nn.Module]:
    """Network and all modules inside, as by `modules()`, in a third of the time."""
    found, seen = [network], {network}
    for module in found:
        for part in module._modules.values():
            if part is not None and part not in seen:
                seen.add(part)
                found.append(part)
    return found


@contextmanager
def eager(around: Collection[nn.Module] | None = None) -> Iterator[None]:
    """Run modules one by one: compiled code and fused attention do not call them, nor hooks.

    Args:
        around: Modules that lie around those that are hooked, if layers with no hooked module
            inside may run fused; by default no layer may.
    """
    fuse = around is not None and not any(isinstance(m, _LAYER) for m in around)
    packing = [m for m in around or () if isinstance(m, _ENCODER) and m.use_nested_tensor]
    fused = torch.backends.mha.get_fastpath_enabled()
    compiles = "torch._dynamo" in sys.modules  # nothing can be compiled before it is imported
    with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
        try:
            if fused and not fuse:
                torch.backends.mha.set_fastpath_enabled(False)
            for encoder in packing:  # layers would be given padded samples without the padding
                encoder.use_nested_tensor = False
            yield
        finally:
            if fused and not fuse:
                torch.backends.mha.set_fastpath_enabled(True)
            for encoder in packing:
                encoder.use_nested_tensor = True


_LAYER, _ENCODER = nn.TransformerEncoderLayer, nn.TransformerEncoder


@contextmanager
def on_device(network: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Move a network to a device, and each of its parts back to its own afterwards."""
    parts = [(part, part.device) for part in (*network.parameters(), *network.buffers())]
    try:
        network.to(device)
        yield
    finally:
        homes = {home for _, home in parts}
        if len(homes) == 1:
            network.to(homes.pop())
        for part, home in parts:
            if part.device != home:  # spread over several devices
                part.data = part.data.to(home)


@contextmanager
def counted() -> Iterator[None]:
    """Leave inference mode, whose tensors do not count how often they are written."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


_aside: ContextVar[bool] = ContextVar("aside", default=False)


def is_aside() -> bool:
    """Whether a pass runs that the user did not ask for, in which no hook of a site acts."""
    return _aside.get()


@contextmanager
def unobserved(network: nn.Module) -> Iterator[None]:
    """Leave no trace of a pass that the user did not ask for: random state, mode and buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = {b.device for b in network.parameters() if b.device.type == "cuda"}
    with counted(), torch.no_grad(), evaluation_mode(network), eager():
        token = _aside.set(True)
        try:
            with torch.random.fork_rng(devices=list(devices)):
                yield
        finally:
            _aside.reset(token)
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
