"""Feature visualizations for the cards of a dictionary of images.

paint           a dictionary -> an image of some features, whole and restricted to one branch
most_in_each    the features that are drawn
as_webp         an image -> a file
"""

import dataclasses
import io
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from mechatlas.activations.images import ImageSamples
from mechatlas.analysis.visualization import VisualizeConfig, visualize
from mechatlas.base import Progress, Site, no_progress
from mechatlas.maths.arrays import Channels

AT_ONCE = 16
"""Images that are optimized together."""
STEPS = 128
"""Optimization steps of an image."""


def paint(
    network: nn.Module,
    samples: ImageSamples,
    site: Site,
    encoder: Float[Tensor, "d_in latent"],
    latents: Int[np.ndarray, " n"],
    branches: Mapping[str, Channels],
    home: Int[np.ndarray, " n"],
    *,
    on_progress: Progress = no_progress,
) -> dict[str, bytes]:
    """Visualize some features.

    Args:
        network: Network of the dictionary.
        samples: Images that it takes.
        site: Site that the dictionary reads.
        encoder: Encoder weights of the dictionary.
        latents: Features to draw.
        branches: Branches of the site, if it has any.
        home: Number of a branch for each feature, to which a second image is restricted.
        on_progress: Callback with the number of images made.

    Returns:
        WebP files named LATENT, and LATENT/BRANCH for the part in a branch.
    """
    rows = encoder.detach().T.float()
    jobs = [(site, rows[torch.from_numpy(latents)], [str(i) for i in latents])]
    for k, (name, channels) in enumerate(branches.items()):
        here = latents[home == k]
        part = rows[torch.from_numpy(here)][:, channels]
        jobs.append((dataclasses.replace(site, branch=name), part, [f"{i}/{name}" for i in here]))
    total, files = sum(len(labels) for *_, labels in jobs), {}
    for where, directions, labels in jobs:
        for first in range(0, len(labels), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            drawn = visualize(
                network, where, directions[part], side=samples.side,
                config=VisualizeConfig(steps=STEPS),
            )  # fmt: skip
            images = np.rint(255 * drawn.images).astype(np.uint8)
            files |= dict(zip(labels[part], map(as_webp, images), strict=True))
            on_progress(len(files), total)
    return files


def most_in_each(
    shares: Float[np.ndarray, "feature branch"], density: Float[np.ndarray, " feature"], n: int
) -> Int[np.ndarray, " n"]:
    """Choose the features to draw: those most in each branch, in turn; else the most active.

    Args:
        shares: Share of each feature in each branch.
        density: Share of the rows where each feature is active.
        n: Upper limit on the features.
    """
    alive = np.flatnonzero(density > 0)
    keys = shares[alive].T if shares.shape[1] else density[alive][None]
    ranked = alive[np.argsort(-keys, axis=1, kind="stable")]
    every = ranked.T.ravel()
    first = np.sort(np.unique(every, return_index=True)[1])
    return np.sort(every[first[:n]]).astype(np.int64)


def as_webp(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode an image as a WebP file."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "WEBP", quality=90)
    return encoded.getvalue()
