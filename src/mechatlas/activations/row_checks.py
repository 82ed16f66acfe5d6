"""Checks of activations before they are kept.

naming               names of samples in messages about their batch
refuse_unreadable    numbers that no store holds, and batches of another size
refuse_other_grid    maps that are smaller or larger than those of the first sample
refuse_other_width   maps of more or fewer channels
refuse_non_finite    NaN and infinity, and numbers that the store's number format does not hold
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from mechatlas.activations.samples import Samples
from mechatlas.base import InputError, NonFiniteError, Site


@contextlib.contextmanager
def naming(samples: Samples, indices: Sequence[int]) -> Iterator[None]:
    """Name the samples of a batch in every refusal of it.

    Raises:
        InputError: As inside the context, with their names.
    """
    try:
        yield
    except InputError as error:
        first = ", ".join(samples.name(i) for i in indices[:3])
        more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
        raise InputError(f"{error} The batch: {first}{more}.") from (error.__cause__ or error)


def refuse_unreadable(activation: Shaped[Tensor, "..."], site: Site, n_samples: int) -> None:
    """Refuse complex numbers, no numbers, and activations without a row for each sample.

    Args:
        activation: Activations of a batch.
        site: Their site.
        n_samples: Number of samples of the batch.

    Raises:
        InputError: The activations cannot be kept.
    """
    if activation.is_complex():
        raise InputError(
            f"Site {site} holds complex numbers, and a store holds real ones. Let a module of the "
            "network return their real and imaginary parts, as torch.view_as_real gives them."
        )
    if activation.ndim < 2 or len(activation) != n_samples:
        raise InputError(
            f"Site {site} has shape {tuple(activation.shape)} for a batch of {n_samples}; expected "
            "the batch on the first axis."
        )
    if not activation.numel():
        raise InputError(
            f"Site {site} holds no numbers: its shape is {tuple(activation.shape)}. Choose a site "
            "with channels."
        )


def refuse_other_grid(grid: tuple[int, int], expected: tuple[int, int], site: Site) -> None:
    """Refuse a map of another size than that of the first sample.

    Args:
        grid: Sides of the map.
        expected: Sides of the map of the first sample.
        site: Site of the map.

    Raises:
        InputError: The sizes differ.
    """
    if grid != expected:
        raise InputError(
            f"Site {site} has a map of {' x '.join(map(str, grid))} here, and of "
            f"{' x '.join(map(str, expected))} for the first sample. A store keeps maps of one "
            "size; bring the samples to one size."
        )


def refuse_other_width(width: int, expected: int, site: Site) -> None:
    """Refuse more or fewer channels than the first sample has.

    Args:
        width: Number of channels.
        expected: Number of channels of the first sample.
        site: Site of the channels.

    Raises:
        InputError: The numbers differ.
    """
    if width != expected:
        raise InputError(
            f"Site {site} has {width} channels here, and {expected} for the first sample. A store "
            "keeps rows of one width; choose a site whose width does not depend on the input."
        )


def refuse_non_finite(
    rows: Shaped[Tensor, "batch position d_in"],
    site: Site,
    indices: Sequence[int],
    samples: Samples,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse activations with a NaN or an infinity.

    Args:
        rows: Activations of a batch.
        site: Their site.
        indices: Numbers of the samples of the batch.
        samples: Samples of these numbers.
        dtype: Number format that the activations are brought to; by default their own.

    Raises:
        NonFiniteError: There is one, or the number format cannot hold a number.
    """
    kept = rows if dtype is None else rows.to(dtype)
    if not kept.is_floating_point() or kept.sum(dtype=torch.float32).isfinite():
        return  # one pass; a NaN or infinity anywhere reaches the sum
    bad = (~kept.isfinite()).nonzero()
    if not len(bad):
        return
    sample, _, channel = bad[0].tolist()
    value = rows[tuple(bad[0])].item()
    where = f"at site {site}, sample {samples.name(indices[sample])}, channel {channel}"
    finite = rows.masked_fill(~rows.isfinite(), 0)
    if dtype is not None and not len((~rows.isfinite()).nonzero()):
        name, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        wider = "bfloat16 or float32" if dtype == torch.float16 else "float32"
        raise NonFiniteError(
            f"The network gave {value:.6g} {where}, and {name} holds up to {largest:.5g}; the "
            f"largest of the batch is {float(finite.abs().max()):.6g}. Use {wider} as the dtype of "
            "the store. Nothing of the batch was kept."
        )
    raise NonFiniteError(
        f"The network gave {value} {where} ({len(bad)} such values in this batch; the largest of "
        f"the others is {float(finite.abs().max()):.6g}). Look at the network and this input; "
        "nothing of the batch was kept."
    )
