"""Pictures made from noise to excite features of a dictionary, for their cards.

paint      a dictionary of maps -> a picture of some features, whole and in one branch
as_webp    a picture -> a file
"""

import dataclasses
import io
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from mechatlas.activations.samples import ImageSamples
from mechatlas.analysis.pictures import VisualizeConfig, optimise
from mechatlas.base import Progress, Site, no_progress

AT_ONCE = 16
"""Pictures that are climbed together."""
STEPS = 128


def paint(
    network: nn.Module,
    samples: ImageSamples,
    site: Site,
    dictionary: Any,
    latents: Int[np.ndarray, " n"],
    branches: dict[str, slice],
    home: Int[np.ndarray, " n"],
    *,
    on_progress: Progress = no_progress,
) -> dict[str, bytes]:
    """Draw some features.

    Args:
        network: The dictionary's.
        samples: Images that it takes.
        site: Where the dictionary reads.
        dictionary: Its encoder's columns are climbed.
        latents: Which features.
        branches: Of the site, if it has any.
        home: For each of them a branch, in which its part is drawn too.
        on_progress: Told how many pictures are made.

    Returns:
        WebP files named LATENT, and LATENT/BRANCH for its part in a branch.
    """
    rows = dictionary.W_enc.detach().T.float()
    names = list(branches)
    wanted = [(site, rows[torch.from_numpy(latents)], [str(i) for i in latents])]
    for k, name in enumerate(names):
        mine = latents[home == k]
        part = rows[torch.from_numpy(mine)][:, branches[name]]
        labels = [f"{i}/{name}" for i in mine]
        wanted.append((dataclasses.replace(site, branch=name), part, labels))
    total, made = sum(len(labels) for *_, labels in wanted), {}
    for where, directions, labels in wanted:
        for first in range(0, len(labels), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            pictures = _climbed(network, where, directions[part], samples.side)
            made |= dict(zip(labels[part], map(as_webp, pictures), strict=True))
            on_progress(len(made), total)
    return made


def _climbed(
    network: nn.Module, site: Site, directions: Tensor, side: int
) -> UInt8[np.ndarray, "n side side 3"]:
    pictures, _ = optimise(network, site, directions, side=side, how=VisualizeConfig(steps=STEPS))
    return np.rint(255 * pictures).astype(np.uint8)


def most_in_each(
    shares: Float[np.ndarray, "feature branch"], density: Float[np.ndarray, " feature"], n: int
) -> Int[np.ndarray, " n"]:
    """Up to `n` features to draw: those most in each branch, in turn; else the most active."""
    alive = np.flatnonzero(density > 0)
    keys = shares[alive].T if shares.shape[1] else density[alive][None]
    ranked = alive[np.argsort(-keys, axis=1, kind="stable")]
    every = ranked.T.ravel()
    first = np.sort(np.unique(every, return_index=True)[1])
    return np.sort(every[first[:n]]).astype(np.int64)


def as_webp(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A picture as a WebP file."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "WEBP", quality=90)
    return encoded.getvalue()
