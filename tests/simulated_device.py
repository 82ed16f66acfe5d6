"""Simulated CUDA device: tensors that claim to be on `cuda:0` and hold real numbers on the CPU.

    with simulated_cuda() as device:
        ...train, analyze with device="cuda"...
    device.calls, device.syncs, device.copies

Mixing of devices raises as it does on a GPU. Calls of operators (kernel launches, about), waits
of the host for the device and copies between them are counted, with the line that caused them.
Speed is not simulated.
"""

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mechatlas.dictionaries.engine import sparse_steps

aten = torch.ops.aten
VIEWS = {"view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze"}
VIEWS |= {"squeeze", "detach", "alias", "as_strided", "permute", "split", "unbind", "diagonal"}
VIEWS |= {"split_with_sizes", "unfold", "_reshape_alias", "empty", "empty_like", "new_empty"}
VIEWS |= {"_to_copy"}  # counted where it does something
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Device(threading.local):
    """Counts of what happened on the simulated device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.calls: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.staged: Counter[torch.dtype] = Counter()


DEVICE = Device()


class Stream:
    """Copies that are not done before somebody waits for them."""

    def __init__(self, *_: Any) -> None:
        self.left: list[Any] = []

    def wait_event(self, event: "Event") -> None:
        """Work on after what an event stands for."""
        event.synchronize()


class Event:
    """Copies of a stream up to here."""

    work: tuple[Any, ...] = ()

    def record(self, stream: Stream | None = None) -> None:
        """Stand for what the stream was asked for until now."""
        stream = stream or CURRENT[-1]
        self.work, stream.left = tuple(stream.left), []

    def synchronize(self) -> None:
        """Wait for it."""
        for copy in self.work:
            copy()
        self.work = ()


CURRENT = [Stream()]


@contextlib.contextmanager
def _on_stream(stream: Stream) -> Iterator[None]:
    CURRENT.append(stream)
    try:
        yield
    finally:
        CURRENT.pop()


def _place() -> str:
    """Line of the package that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/mechatlas/" in name:
            return f"{name.rsplit('/mechatlas/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _wait(what: str) -> None:
    DEVICE.syncs[f"{what} at {_place()}"] += 1


class OnDevice(torch.Tensor):
    """Tensor whose numbers are on the CPU while it claims to be on `cuda:0`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        with torch.inference_mode(False):  # so that views of it can be made in any mode
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=torch.device("meta"),
            )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda:0")

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    @property
    def is_meta(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, int | float | bool):
            value = OnDevice(_TENSOR(value, dtype=self.dtype))
        super().__setitem__(_with_tensors(index), value)

    def __float__(self) -> float:
        _wait("float")
        return float(self.held)

    def __int__(self) -> int:
        _wait("int")
        return int(self.held)

    def __bool__(self) -> bool:
        _wait("bool")
        return bool(self.held)

    def __index__(self) -> int:
        _wait("index")
        return self.held.__index__()

    def record_stream(self, s: Any) -> None:
        assert s is CURRENT[-1]

    def tolist(self) -> Any:
        _wait("tolist")
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.where:  # which would make numbers tensors where it takes this one to be
            args = tuple(_TENSOR(a) if isinstance(a, int | float) else a for a in args)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _with_tensors(index: Any) -> Any:
    """Lists and arrays as tensors of the host; torch makes them where it takes this one to be."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return _TENSOR(index) if isinstance(index, list | np.ndarray) else index


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _on_device(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, OnDevice)
    return OnDevice(value) if plain else value


def _refuse_mixing(name: str, args: tuple[Any, ...], leaves: list[Any]) -> None:
    """Raise what a GPU raises where tensors of two devices meet."""
    on_host = [
        t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, OnDevice) and t.ndim
    ]
    if name in INDEXING and isinstance(args[0], OnDevice):
        # A tensor of the device may be indexed by one of the host, not the reverse.
        value = args[2] if name != "index" else args[0]
        on_host = [] if isinstance(value, OnDevice) or not value.ndim else [value]
    if on_host:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({name} at {_place()})"
        )


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    if "_has_compatible_shallow_copy_type" in str(func):
        return False  # a module gets new parameters when it is moved
    on_device = [t for t in leaves if isinstance(t, OnDevice)]
    name = func._schema.name.removeprefix("aten::")
    target = kwargs.get("device")
    to_device = None if target is None else torch.device(target).type == "cuda"
    copies = name in ("copy_", "_to_copy", "copy")
    if on_device and not copies:
        _refuse_mixing(name, args, leaves)
    _count(name, args, kwargs, bool(on_device), to_device)
    plain = {**kwargs, **({"device": torch.device("cpu")} if target is not None else {})}
    out = func(*tree_map(_held, args), **tree_map(_held, plain))
    crosses = len(on_device) == 1 if name == "copy_" else to_device not in (None, bool(on_device))
    if copies and crosses:
        _delay(name, args, kwargs, out)
    if to_device is False or not (on_device or to_device):
        return out
    if (
        isinstance(args[0] if args else None, OnDevice)
        and func._schema.is_mutable
        and (name.endswith("_"))
    ):
        return args[0]
    if name == "copy_":
        return args[0]
    if "out" in kwargs and isinstance(kwargs["out"], OnDevice):
        return kwargs["out"]
    return tree_map(_on_device, out)


def _delay(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Let a copy between host and device happen no sooner than it is waited for.

    What the host sends by the stream of the work is there before the work goes on.
    """
    to, source = (_held(args[0]), args[1]) if name == "copy_" else (out, args[0])
    own_stream = len(CURRENT) > 1
    non_blocking = kwargs.get("non_blocking") or args[2:3] == (True,)
    if own_stream or (non_blocking and isinstance(source, OnDevice)):
        to.zero_()
        DEVICE.staged[to.dtype] += own_stream
        CURRENT[-1].left.append(lambda: to.copy_(_held(source)))


def _count(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    on_device: bool,
    to_device: bool | None,
) -> None:
    """Count an operator."""
    if on_device and name not in VIEWS:
        DEVICE.calls[f"{name} at {_place()}"] += 1
    unknown = name == "repeat_interleave" and kwargs.get("output_size") is None
    if on_device and (name in WAITING or (unknown and not isinstance(args[-1], int))):
        _wait(name)
    boolean = name in INDEXING and any(
        isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] if i is not None
    )
    if on_device and boolean:
        _wait("index by a mask")
    if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        kind = "to the device" if isinstance(args[0], OnDevice) else "to the host"
        DEVICE.copies[f"{kind} at {_place()}"] += 1
    if name == "_to_copy" and to_device is not None and to_device != on_device:
        kind = "to the device" if to_device else "to the host"
        DEVICE.copies[f"{kind} at {_place()}"] += 1
        if not to_device:
            _wait("copy to the host")


class _Mode(TorchDispatchMode):
    """Routes what names the device, or has a tensor of it, to the simulation."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {key: v for key, v in (kwargs or {}).items() if key != "pin_memory"}
        target = kwargs.get("device")
        named = target is not None and torch.device(target).type == "cuda"
        if named or any(isinstance(t, OnDevice) for t in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


_TENSOR, _AS_TENSOR, _TO = torch.tensor, torch.as_tensor, torch.Tensor.to


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _tensor(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
    made = _TENSOR(data, *args, **options)
    if _is_cuda(device):
        DEVICE.copies[f"to the device at {_place()}"] += 1
        return OnDevice(made)
    return made


def _as_tensor(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
    if isinstance(data, OnDevice):
        return data.to(device or "cuda", **options)
    made = _AS_TENSOR(data, *args, **options)
    return _tensor(made, device=device) if _is_cuda(device) else made


def _to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Copy; of another tensor only the Python side knows where it claims to be."""
    if args and isinstance(args[0], OnDevice):
        args = ("cuda:0", args[0].dtype, *args[1:])
    place = options.get("device", args[0] if args else None)
    named = isinstance(place, str | torch.device) and torch.device(place).type
    if isinstance(tensor, OnDevice) and named == "cpu":
        DEVICE.copies[f"to the host at {_place()}"] += 1
        _wait("copy to the host")
        return _TO(tensor.held, *args, **options)
    return _TO(tensor, *args, **options)


def _new_tensor(tensor: torch.Tensor, data: Any, **options: Any) -> torch.Tensor:
    return _tensor(data, **{"dtype": tensor.dtype, "device": tensor.device, **options})


def _no_jvp(*_: Any) -> Any:
    raise NotImplementedError("torch.func hides that a tensor is of this device")


def _fork_rng(*_: Any, **__: Any) -> Any:
    return _FORK_RNG(devices=[])


_FORK_RNG = torch.random.fork_rng


@contextlib.contextmanager
def simulated_cuda() -> Iterator[Device]:
    """Make `device="cuda"` mean the simulated device; gives its counts."""
    replaced: dict[Any, Any] = {
        (sparse_steps, "can_use_triton"): lambda _: False,  # its kernels want a driver
        (torch, "tensor"): _tensor,
        (torch, "as_tensor"): _as_tensor,
        # A parameter that is converted is another tensor: this one keeps what it holds.
        (torch, "_has_compatible_shallow_copy_type"): lambda *_: False,
        (torch.func, "jvp"): _no_jvp,
        (torch.Tensor, "to"): _to,
        (torch.Tensor, "new_tensor"): _new_tensor,
        (torch.random, "fork_rng"): _fork_rng,
        (torch.cuda, "_lazy_init"): lambda *_, **__: None,
        (torch.cuda, "is_available"): lambda: True,
        (torch.cuda, "device_count"): lambda: 1,
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "synchronize"): lambda *_: None,
        (torch.cuda, "Stream"): Stream,
        (torch.cuda, "Event"): Event,
        (torch.cuda, "stream"): _on_stream,
        (torch.cuda, "current_stream"): lambda *_: CURRENT[-1],
    }
    torch._C._ensureCUDADeviceGuardSet()
    before = {key: getattr(*key) for key in replaced}
    DEVICE.reset()
    try:
        for (module, name), value in replaced.items():
            setattr(module, name, value)
        with _Mode():
            yield DEVICE
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
