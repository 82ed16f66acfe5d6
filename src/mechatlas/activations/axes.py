"""Meaning of the axes of every tensor in one pass, followed from operation to operation.

    AxisTracker     mode of torch that labels tensors while a network runs
    stamped_axis    channel axis of what a module of torch returns, where the module says it

An axis is a list of factors, since reshaping merges and splits axes. A convolution, a matrix of
weights, a norm and an embedding make channels; whatever they are given had its channels at the
axis that they read. Everything else passes labels on, or loses them.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

BATCH, CHANNEL, DEMOTED = "b", "c", "p"
"""Kinds of axes: samples, channels, and channels of an earlier layer that are positions now."""


class Factor:
    """Part of an axis; its kind may become known later, for all tensors that have it."""

    def __init__(self, size: int, kind: str | None = None) -> None:
        self.size, self.kind = size, kind


Axis = list[Factor]
Axes = list[Axis]


def fresh(sizes: Iterable[int]) -> Axes:
    """Axes of which nothing is known."""
    return [[Factor(size)] for size in sizes]


def kind_of(axis: Axis) -> str | None:
    """Kind of a whole axis: `b` also if positions are merged into the batch."""
    kinds = {f.kind for f in axis if f.size > 1} or {f.kind for f in axis}
    if BATCH in kinds:
        return BATCH
    return kinds.pop() if len(kinds) == 1 else None


def has_channels(axes: Axes) -> bool:
    """Whether the channels of a tensor are known."""
    return any(factor.kind == CHANNEL for axis in axes for factor in axis)


def with_channels(axes: Axes, channel: int) -> Axes:
    """Replace the axis that holds the channels; other channels are positions from now on."""
    out = [_demoted(axis) for axis in axes]
    out[channel] = [Factor(math.prod(f.size for f in axes[channel]), CHANNEL)]
    return out


def normalized(axes: Axes, channel: int) -> Axes:
    """Axes of what is normalized along its channels, which stay what they are if they are known."""
    if kind_of(axes[channel]) == CHANNEL:
        return axes
    if not has_channels(axes) and all(f.kind is None for f in axes[channel]):
        for factor in axes[channel]:
            factor.kind = CHANNEL
        return axes
    return with_channels(axes, channel)


def _demoted(axis: Axis) -> Axis:
    if all(f.kind != CHANNEL for f in axis):
        return axis
    return [Factor(f.size, DEMOTED if f.kind == CHANNEL else f.kind) for f in axis]


def regrouped(axes: Axes, sizes: Sequence[int]) -> Axes:
    """Axes of a reshaped tensor; the factors keep their order."""
    queue = [factor for axis in axes for factor in axis]
    out: Axes = []
    for size in sizes:
        axis: Axis = []
        left = size
        while left > 1 or (size == 1 and not axis and queue and queue[0].size == 1):
            if not queue:
                return fresh(sizes)
            factor = queue.pop(0)
            if left % factor.size:
                if factor.size % left:
                    return fresh(sizes)
                queue.insert(0, Factor(factor.size // left, factor.kind))
                factor = Factor(left, factor.kind)
            axis.append(factor)
            left //= factor.size
        out.append(axis or [Factor(1)])
    if any(factor.size > 1 for factor in queue):
        return fresh(sizes)
    return out


def _resized(axis: Axis, size: int) -> Axis:
    if size == math.prod(f.size for f in axis):
        return axis
    kind = kind_of(axis)
    return [Factor(size, None if kind == BATCH else kind)]


def joined_axes(many: Sequence[Axes], sizes: Sequence[int]) -> Axes:
    """Axes of what an elementwise operation makes of several tensors.

    Args:
        many: Axes of the labeled tensors, aligned at the last.
        sizes: Shape of the result.
    """
    aligned = [[[Factor(1)]] * (len(sizes) - len(axes)) + axes for axes in many]
    out = fresh(sizes)
    best = _least_demoted(aligned)
    for i, size in enumerate(sizes):
        full = [a[i] for a in aligned if math.prod(f.size for f in a[i]) == size]
        chosen = next((a[i] for a in best if a[i] in full), out[i])
        for other in full:
            if [f.size for f in other] == [f.size for f in chosen]:
                for mine, its in zip(chosen, other, strict=True):
                    mine.kind = mine.kind or its.kind
                    its.kind = its.kind or mine.kind
        out[i] = chosen
    return out


def _least_demoted(many: list[Axes]) -> list[Axes]:
    """Tensors in the order of how much is known of them; channels that still are some first."""
    kinds = [[kind_of(axis) for axis in axes] for axes in many]

    def rank(i: int) -> tuple[bool, bool]:
        return DEMOTED in kinds[i], CHANNEL not in kinds[i]

    return [many[i] for i in sorted(range(len(many)), key=rank)]


SPATIAL = re.compile(
    r"(Conv|ConvTranspose|InstanceNorm|MaxPool|AvgPool|AdaptiveAvgPool|AdaptiveMaxPool|LPPool)([123])d"
)
"""Names of the modules of torch that read (..., channel, and so many positions)."""
LAST = {
    "Linear", "Bilinear", "LayerNorm", "RMSNorm", "Embedding", "EmbeddingBag",
    "MultiheadAttention", "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell",
    "Transformer", "TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoder",
    "TransformerDecoderLayer",
}  # fmt: skip
"""Names of the modules of torch whose channels are the last axis."""


def stamped_axis(module: nn.Module, n_axes: int) -> int | None:
    """Channel axis of what a module returns, if its class says it.

    Args:
        module: Module of torch, or of a subclass that runs as its parent does.
        n_axes: Number of axes that it returned.
    """
    parent = next((k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.")), None)
    own = getattr(type(module), "forward", None)
    if type(module).__name__ == "Conv1D":  # transformers' name of a linear layer in GPT-2
        return n_axes - 1
    if parent in (None, nn.Module) or own is not getattr(parent, "forward", None):
        return None
    name = parent.__name__
    if name in LAST:
        several = len(getattr(module, "normalized_shape", (0,))) > 1
        return None if several else n_axes - 1
    if name.startswith(("BatchNorm", "GroupNorm", "SyncBatchNorm")):
        return 1
    spatial = SPATIAL.fullmatch(name)
    axis = n_axes - int(spatial[2]) - 1 if spatial else -1
    return axis if axis >= 0 else None


class AxisTracker(TorchDispatchMode):
    """Mode of torch in which every operation labels the axes of its results.

    Args:
        network: Network to run; a product with its parameters makes channels.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._axes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for parameter in network.parameters():
            self._weights[parameter] = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip the compiler, torch would import all of it, which takes seconds

    def label(self, tensor: Tensor, axes: Axes) -> None:
        """Note the axes of a tensor."""
        if [math.prod(f.size for f in axis) for axis in axes] != list(tensor.shape):
            axes = fresh(tensor.shape)
        self._axes[tensor] = axes

    def axes(self, tensor: Tensor) -> Axes:
        """Axes of a tensor, as far as they are known."""
        if tensor not in self._axes:
            self._axes[tensor] = fresh(tensor.shape)
        return self._axes[tensor]

    def stamp(self, module: nn.Module, given: Any, tensor: Tensor) -> None:
        """Note the channels of what a module was given and returned, if its class says it.

        Args:
            module: Module of the network.
            given: First argument of the call.
            tensor: Tensor that it returned.
        """
        axis, axes = stamped_axis(module, tensor.ndim), self.axes(tensor)
        if axis is None:
            return
        name = type(module).__name__
        if "Pool" in name:
            if isinstance(given, Tensor):
                _read_at(self.axes(given), given.ndim - tensor.ndim + axis)
            if has_channels(axes):
                return
        self.label(tensor, normalized(axes, axis) if "Norm" in name else with_channels(axes, axis))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        given = [t for t in _flat((args, kwargs or {})) if isinstance(t, Tensor)]
        made = [t for t in _flat(out) if isinstance(t, Tensor)]
        known = [t for t in given if t in self._axes]
        if not known and given:
            if all(t in self._weights for t in given):
                for tensor in made:
                    self._weights[tensor] = True
            return out
        name = func.overloadpacket.__name__
        rule = _rule_of(name.removesuffix("_"))
        labels = rule(self, args, kwargs or {}, made) if known else None
        for tensor, axes in itertools.zip_longest(made, labels or ()):
            if tensor is not None:
                self.label(tensor, fresh(tensor.shape) if axes is None else axes)
        return out

    def _is_known(self, value: object) -> bool:
        return isinstance(value, Tensor) and value in self._axes

    def _is_weight(self, value: object) -> bool:
        return isinstance(value, Tensor) and value in self._weights


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


Rule = Callable[[AxisTracker, tuple[Any, ...], dict[str, Any], list[Tensor]], list[Axes]]
"""Function from a call to the axes of what it made, in order; those left out are not known."""


def _elementwise(t: AxisTracker, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    known = [t.axes(x) for x in _flat((args, kwargs)) if t._is_known(x)]
    out = []
    for tensor in made:
        shape = list(tensor.shape)
        fit = [
            axes
            for axes in known
            if len(axes) <= len(shape)
            and all(
                math.prod(f.size for f in axis) in (1, size)
                for axis, size in zip(reversed(axes), reversed(shape), strict=False)
            )
        ]
        out.append(joined_axes(fit, shape))
    return out


def _same_kinds(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
    """Axis by axis as before, of other lengths: pooling, padding, slices, sums that keep axes."""
    source = t.axes(args[0])
    return [
        [_resized(axis, n) for axis, n in zip(source, tensor.shape, strict=True)]
        if len(source) == tensor.ndim
        else fresh(tensor.shape)
        for tensor in made
    ]


def _pool(n: int) -> Rule:
    """Rule of an operation on maps of `n` axes of positions, after the channels."""

    def rule(t: AxisTracker, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
        axes = t.axes(args[0])
        if len(axes) > n:
            _read_at(axes, len(axes) - n - 1)
        return _same_kinds(t, args, kwargs, made)

    return rule


def _view(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
    return [regrouped(t.axes(args[0]), tensor.shape) for tensor in made]


def _permute(t: AxisTracker, args: Any, _kwargs: Any, _made: list[Tensor]) -> list[Axes]:
    axes = t.axes(args[0])
    return [[axes[i] for i in args[1]]]


def _transpose(t: AxisTracker, args: Any, _kwargs: Any, _made: list[Tensor]) -> list[Axes]:
    axes = list(t.axes(args[0]))
    i, j = args[1:3] if len(args) > 2 else (0, len(axes) - 1)
    axes[i], axes[j] = axes[j], axes[i]
    return [axes]


def _unsqueeze(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
    axes = list(t.axes(args[0]))
    axes.insert(args[1] % made[0].ndim, [Factor(1)])
    return [axes]


def _without(t: AxisTracker, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    """Axes that are summed over, selected from or squeezed are gone, or of length 1."""
    axes = t.axes(args[0])
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if made and made[0].ndim == len(axes):
        return _same_kinds(t, args, kwargs, made)
    if dims is None:
        dims = [i for i, axis in enumerate(axes) if math.prod(f.size for f in axis) == 1]
    gone = {d % len(axes) for d in ([dims] if isinstance(dims, int) else dims)}
    rest = [axis for i, axis in enumerate(axes) if i not in gone]
    return [rest if len(rest) == tensor.ndim else fresh(tensor.shape) for tensor in made]


def _expand(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
    axes, shape = t.axes(args[0]), made[0].shape
    aligned = fresh(shape[: len(shape) - len(axes)]) + axes
    return [[_resized(axis, size) for axis, size in zip(aligned, shape, strict=True)]]


def _cat(t: AxisTracker, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    parts = [x for x in args[0] if t._is_known(x) and x.ndim == made[0].ndim]
    if not parts:
        return []
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % made[0].ndim
    kinds = {kind_of(t.axes(x)[dim]) for x in parts} - {None}
    sizes = list(parts[0].shape)
    sizes[dim] = 1
    others = [[*axes[:dim], [Factor(1)], *axes[dim + 1 :]] for axes in map(t.axes, parts)]
    axes = joined_axes(others, sizes)
    axes[dim] = [Factor(made[0].shape[dim], kinds.pop() if len(kinds) == 1 else None)]
    return [axes]


def _stack(t: AxisTracker, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    parts = [t.axes(x) for x in args[0] if t._is_known(x)]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % made[0].ndim
    shape = list(made[0].shape)
    axes = joined_axes(parts, shape[:dim] + shape[dim + 1 :])
    return [[*axes[:dim], [Factor(shape[dim])], *axes[dim:]]]


def _read_at(axes: Axes, channel: int) -> None:
    """Note that an operation reads the channels of its input at some axis.

    Where the channels were split over several axes, the others are positions to it.
    """
    if kind_of(axes[channel]) == CHANNEL:
        for factor in itertools.chain(*(axis for axis in axes if axis is not axes[channel])):
            factor.kind = DEMOTED if factor.kind == CHANNEL else factor.kind
    elif not has_channels(axes) and all(f.kind is None for f in axes[channel]):
        for factor in axes[channel]:
            factor.kind = CHANNEL


def _convolution(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
    if not t._is_known(args[0]):
        return []
    axes, out = t.axes(args[0]), made[0]
    channel = 1 if out.ndim == args[1].ndim else 0
    _read_at(axes, channel)
    return [
        [
            [Factor(n, CHANNEL)] if i == channel else axes[i] if i < channel else [Factor(n)]
            for i, n in enumerate(out.shape)
        ]
    ]


def _norm(axis: int) -> Rule:
    def rule(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
        several = isinstance(args[1], list | tuple) and len(args[1]) > 1
        if not t._is_known(args[0]) or several:
            return _elementwise(t, args[:1], {}, made[:1])
        return [normalized(t.axes(args[0]), axis)]

    return rule


def _embedding(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
    index = t.axes(args[1]) if t._is_known(args[1]) else fresh(args[1].shape)
    return [[*index, [Factor(made[0].shape[-1], CHANNEL)]]]


def _product(first: int) -> Rule:
    """Rule of a product of matrices, which are arguments `first` and `first + 1`."""

    def rule(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
        a, b = args[first : first + 2]
        sizes = made[0].shape
        if t._is_known(a) and not t._is_known(b):
            axes = t.axes(a)
            if t._is_weight(b):
                _read_at(axes, -1)
                kept = [_demoted(axis) for axis in axes[:-1]]
                return [[*kept, [Factor(sizes[-1], CHANNEL)]]]
            return [[*axes[:-1], [Factor(sizes[-1], kind_of(axes[-1]))]]]
        if t._is_known(b) and not t._is_known(a):
            axes = t.axes(b)
            return [[*axes[:-2], [Factor(sizes[-2], kind_of(axes[-2]))], axes[-1]]]
        return [[*t.axes(a)[:-1], t.axes(b)[-1]]]

    return rule


def _attention(t: AxisTracker, args: Any, _kwargs: Any, _made: list[Tensor]) -> list[Axes]:
    return [[*t.axes(args[0])[:-1], t.axes(args[2])[-1]]]


def _index(t: AxisTracker, args: Any, _kwargs: Any, made: list[Tensor]) -> list[Axes]:
    """One axis indexed by a list of numbers; anything else is not followed."""
    chosen = [(i, x) for i, x in enumerate(args[1]) if x is not None]
    if not t._is_known(args[0]) or len(chosen) != 1 or chosen[0][1].ndim != 1:
        return []
    return _same_kinds(t, args, {}, made)


def _copy(t: AxisTracker, args: Any, _kwargs: Any, _made: list[Tensor]) -> list[Axes]:
    """Writing into a tensor says what the tensor's axes are."""
    axes = t.axes(args[0])
    if t._is_known(args[1]) and args[1].shape == args[0].shape:
        for mine, its in zip(axes, t.axes(args[1]), strict=True):
            if all(f.kind is None for f in mine):
                for factor in mine:
                    factor.kind = kind_of(its)
    return [axes]


def _unfold(t: AxisTracker, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    axes = [*t.axes(args[0]), [Factor(args[2])]]
    return [[_resized(axis, n) for axis, n in zip(axes, made[0].shape, strict=True)]]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten"), _view),
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(
        ("select", "unbind", "squeeze", "mean", "sum", "amax", "amin", "max", "min", "argmax",
         "argmin", "var", "std", "logsumexp", "prod", "norm", "linalg_vector_norm", "any", "all",
         "var_mean", "nanmean", "nansum", "median"), _without,
    ),
    **dict.fromkeys(
        ("slice", "narrow", "split", "split_with_sizes", "chunk", "index_select", "gather", "topk",
         "sort", "constant_pad_nd", "_fft_r2c", "_fft_c2r", "_fft_c2c", "im2col", "repeat",
         "pixel_shuffle", "pixel_unshuffle", "grid_sampler_2d"), _same_kinds,
    ),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm",
                     "_native_batch_norm_legit_no_training", "_batch_norm_with_update",
                     "_batch_norm_no_update", "native_group_norm"), _norm(1)),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _norm(-1)),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"),
                    _convolution),
    **dict.fromkeys(("mm", "bmm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _product(1)),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_fused_attention_overrideable"), _attention,
    ),
    "permute": _permute, "unsqueeze": _unsqueeze, "expand": _expand, "stack": _stack,
    "embedding": _embedding, "index": _index, "copy": _copy, "unfold": _unfold,
}  # fmt: skip
"""Rules by the name of the operation; any other is elementwise, or loses labels."""


POOLING = re.compile(
    r"_?(?:max_pool|avg_pool|adaptive_\w+_pool|\w+_pad|_?upsample_[a-z]+)([123])d.*"
)
"""Names of operations on maps, with the number of axes of positions, which follow the channels."""


def _rule_of(name: str) -> Rule:
    maps = POOLING.fullmatch(name)
    return _pool(int(maps[1])) if maps else RULES.get(name, _elementwise)
