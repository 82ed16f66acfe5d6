"""Steering: run a network with some latents of a dictionary changed.

    steer            add to latents or clamp them, in every call of the network
    changed_rows     rows of a site with an edited code, their reconstruction error kept
    site_rows        activations at a site <-> rows of their channels

The error of the dictionary stays: x becomes x + decode(changed code) - decode(code), so that a
dictionary that explains little does little harm.

Source: Templeton et al., Scaling monosemanticity (2024), for clamping with the error term.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.activations.axes import stamped_axis
from mechatlas.activations.layouts import Layout
from mechatlas.activations.passes import unwrapped
from mechatlas.activations.sites import as_site, intervene
from mechatlas.base import Dictionary, InputError, Site
from mechatlas.dictionaries.ends import ends_of, in_words
from mechatlas.dictionaries.pretrained import reading_of

EditCode = Callable[[Tensor], Tensor]
"""Function from codes (row, latent) to their replacement."""


@contextmanager
def steer(
    network: nn.Module,
    dictionary: Dictionary,
    latent: int | Sequence[int] | Mapping[int, float],
    scale: float | None = None,
    *,
    site: Site | str | None = None,
    mode: Literal["add", "clamp"] = "add",
) -> Iterator[nn.Module]:
    """Run a network with some latents of a dictionary changed at every position.

    Args:
        network: Network; unchanged when the context ends. `generate` works inside.
        dictionary: Dictionary of the site.
        latent: Latent to change, several of them, or a mapping from latents to their scales.
        scale: Activation, in the units of the code, that is added or clamped to; 0 with `clamp`
            ablates. Goes without a mapping.
        site: Site of the dictionary; by default the one that its file names.
        mode: Whether activations are added to, or replaced.

    Yields:
        The same network; call it inside the context.

    Raises:
        InputError: There is no such latent, the dictionary is of another site, or the scale is
            not finite or overflows the number format of the site.
        SiteError: The network has no such site.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sae = ma.Autoencoder(d_in=8, n_latents=16, sparsity=ma.TopK(k=4))
        >>> with ma.steer(network, sae, latent=3, scale=2.0, site="1"):
        ...     steered = network(torch.ones(1, 4))
        >>> bool((steered == network(torch.ones(1, 4))).all())
        False
    """
    place = site_of(network, dictionary, site)
    scales = _scales(dictionary, latent, scale)
    if mode not in ("add", "clamp"):
        raise InputError(f"mode must be 'add' or 'clamp', got {mode!r}.")
    latents = torch.tensor(list(scales))
    values = torch.tensor(list(scales.values()))

    def change(code: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        new = code.clone()
        columns = latents.to(code.device)
        amount = values.to(code)
        new[:, columns] = amount if mode == "clamp" else code[:, columns] + amount
        return new

    def edit(activation: Tensor) -> Tensor:
        rows, put_back = site_rows(network, place, activation, dictionary)
        changed = changed_rows(dictionary, rows, change).to(activation.dtype)
        if not changed.isfinite().all() and activation.isfinite().all():
            raise InputError(
                f"Scale {max(scales.values(), key=abs):g} overflows {activation.dtype} at {place}. "
                "Take a smaller one."
            )
        return put_back(changed)

    with intervene(network, {place: edit}):
        yield network


def changed_rows(
    dictionary: Dictionary, rows: Float[Tensor, "row d"], change: EditCode
) -> Float[Tensor, "row d"]:
    """Edit the code of rows and keep their reconstruction error.

    Args:
        dictionary: Dictionary that writes the site that it reads.
        rows: Rows of its site.
        change: Edit of their code.
    """
    x = rows.float()
    code = dictionary.encode(x)
    return x + (dictionary.decode(change(code)) - dictionary.decode(code)).float()


def site_rows(
    network: nn.Module, site: Site, activation: Tensor, dictionary: Dictionary
) -> tuple[Float[Tensor, "row d"], Callable[[Tensor], Tensor]]:
    """Rows of the activations at a site, and the function that puts rows back.

    Args:
        network: Network of the site.
        site: Site.
        activation: Activations there.
        dictionary: Dictionary that reads them.

    Raises:
        InputError: They are not as wide as the dictionary.
    """
    axis = stamped_axis(unwrapped(network).get_submodule(site.module), activation.ndim)
    last = activation.ndim - 1
    layout = (
        Layout(site.axes)
        if site.axes
        else Layout.of_channel(
            last if axis is None or site.take != "output" else axis, activation.ndim
        )
    )
    whole = layout.rows(activation)
    if whole.shape[-1] != dictionary.d_in:
        raise InputError(
            f"Site {site} is {whole.shape[-1]} wide, the dictionary reads "
            f"{reading_of(dictionary)}: is it of another site or model?"
        )
    rows = whole.reshape(-1, whole.shape[-1])
    return rows, lambda new: layout.undo(new.reshape(whole.shape), activation)


def site_of(network: nn.Module, dictionary: Any, site: Site | str | None) -> Site:
    """Site of a dictionary in a network.

    Args:
        network: Network.
        dictionary: Dictionary, whose file may name its site.
        site: Site that the user gave.

    Raises:
        InputError: None is named, it is another than the dictionary's, or the dictionary is of
            several sites.
        SiteError: The network has no such site.
    """
    if len(ends_of(dictionary).names) > 1:
        raise InputError(
            f"The dictionary {in_words(dictionary)}; take one that writes the one site that it "
            "reads."
        )
    named = getattr(dictionary, "site", None)
    given = named if site is None else site
    if given is None:
        raise InputError("The dictionary does not say of which site it is; give `site`.")
    place = as_site(network, given)
    if named is not None and as_site(network, named) != place:
        raise InputError(f"The dictionary is of site {named}, not of {place}.")
    return place


def check_latents(dictionary: Dictionary, latents: Sequence[int]) -> None:
    """Refuse latents that a dictionary does not have.

    Args:
        dictionary: Dictionary.
        latents: Numbers of latents.

    Raises:
        InputError: There is no such latent, or none is given.
    """
    wrong = [i for i in latents if not 0 <= i < dictionary.n_latents]
    if wrong or not latents:
        given = f"no latent {wrong[0]}" if wrong else f"{dictionary.n_latents} latents; name one"
        ends = f"; it has 0 to {dictionary.n_latents - 1}" if wrong else ""
        raise InputError(f"The dictionary has {given}{ends}.")


def _scales(dictionary: Dictionary, latent: Any, scale: float | None) -> dict[int, float]:
    """Scale of each latent.

    Raises:
        InputError: There is no such latent, or a scale is missing or not a finite number.
    """
    if isinstance(latent, Mapping):
        if scale is not None:
            raise InputError("The latents have their scales already; leave `scale` out.")
        scales = {int(i): float(value) for i, value in latent.items()}
    else:
        if scale is None:
            raise InputError("Give a `scale`: the activation that is added or clamped to.")
        several = latent if isinstance(latent, Sequence) else [latent]
        scales = {int(i): float(scale) for i in several}
    check_latents(dictionary, list(scales))
    for value in scales.values():
        if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
            raise InputError(f"The scale must be a finite number of float32, got {value}.")
    return scales
