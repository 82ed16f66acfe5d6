"""Tuning of the features of `mechatlas symmetry` to synthetic stimuli.

    measure       features, a network and a store -> agreement, columns and tensors
    in_words      agreement for the terminal

Stimuli are drawn about one place of the site, as large as its receptive field. They are given to
the network of the store's recipe; where it is no longer there, `missing` says so.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.activations.images import ImageSamples
from mechatlas.activations.layouts import layouts_of
from mechatlas.activations.receptive import receptive_field
from mechatlas.activations.sites import read_activations
from mechatlas.activations.store import Store
from mechatlas.analysis.symmetry.class_names import n_turns
from mechatlas.analysis.symmetry.classify import Symmetry
from mechatlas.analysis.symmetry.feature_types import FeatureTypes
from mechatlas.analysis.symmetry.posed_dictionary import PosedDictionary
from mechatlas.analysis.symmetry.stimuli import KINDS, Stimuli, draw_stimuli
from mechatlas.analysis.symmetry.tuning import (
    ClassAgreement,
    PoseAgreement,
    Tuning,
    class_agreement,
    measure_tuning,
    pose_agreement,
    poses_of_elements,
)
from mechatlas.app.inputs import open_network
from mechatlas.app.progress import bar
from mechatlas.app.recipes import TrustConfig
from mechatlas.base import Site, TrustError, UserError
from mechatlas.maths.actions import Rotate

BATCH = 32
SUPPORT = 0.5**0.5
"""Correlation above which responses repeat, as for decoder blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningResult:
    """Agreement of claims with responses to synthetic stimuli."""

    missing: str = ""
    """Reason why there are none; empty if there are."""
    n_images: int = 0
    """Images shown."""
    n_angles: int = 0
    """Orientations around the full circle."""
    receptive_field: int = 0
    """Size of the receptive field, in pixels."""
    responding: int = 0
    """Features that are active for some stimulus."""
    stimuli: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of responding features by the kind of the stimulus with the largest response."""
    classes: ClassAgreement | None = None
    """Responses of features with an exact or approximate symmetry, beside features without."""
    families: PoseAgreement | None = None
    """Responses of members of families."""
    types: PoseAgreement | None = None
    """Responses of members of types."""


class MeasuredTuning(NamedTuple):
    """Result of the stimuli, with columns and tensors of the features."""

    result: TuningResult
    columns: dict[str, Any]
    tensors: dict[str, np.ndarray]


def measure(
    posed: PosedDictionary,
    store: Store,
    symmetries: Symmetry,
    types: FeatureTypes,
    *,
    n_angles: int,
    seed: int,
    trust: TrustConfig,
) -> MeasuredTuning:
    """Show stimuli to the network and compare the responses with what was claimed.

    Args:
        posed: Dictionary and its rows.
        store: Store whose network is used.
        symmetries: Stabilizers and families.
        types: Types.
        n_angles: Least number of orientations; 0 for no stimuli.
        seed: Seed of resamplings.
        trust: Code that may run.

    Raises:
        TrustError: The store names code that the user has not named.
    """
    group, n = posed.group, len(symmetries.stabilizers)
    turns = n_turns(group)
    if not n_angles:
        return _missing(n, "Not asked for (--stimuli 0).")
    if posed.action != Rotate.name:
        return _missing(n, f"Stimuli come in rotations and mirrors; the group acts by "
                           f"{posed.action}.")  # fmt: skip
    try:
        network, samples = open_network(store, trust)
    except TrustError:
        raise
    except UserError as error:
        return _missing(n, str(error))
    if not isinstance(samples, ImageSamples) or samples.channels != 3:
        return _missing(n, "The network does not read color images.")
    site, side = Site.parse(posed.site), samples.side
    field = receptive_field(network, site, side)
    place = _middle_place(network, site, side, field.offset, field.stride, field.size)
    if place is None:
        return _missing(n, f"No place of {site} sees only what is inside an image of side {side}.")
    position, center = place
    angles = turns * max(1, -(-n_angles // turns))
    stimuli = draw_stimuli(side, center, field.size / 2, angles)
    elements = poses_of_elements(group, angles)
    rows = _activations(network, site, torch.from_numpy(stimuli.images), position)
    responses = _codes(posed, rows, stimuli.image_of, stimuli.group.table, elements)
    tuning = measure_tuning(responses, stimuli, elements, seed=seed)
    shown = {"n_images": len(stimuli.images), "n_angles": angles, "receptive_field": field.size}
    return _summarize(tuning, stimuli, symmetries, types, shown, seed)


def _summarize(
    tuning: Tuning,
    stimuli: Stimuli,
    symmetries: Symmetry,
    types: FeatureTypes,
    shown: dict[str, Any],
    seed: int,
) -> MeasuredTuning:
    """Compare responses with claims, and list what is known of each feature."""
    grades = symmetries.grades
    claims = [
        exact if grade == "exact" else near
        for grade, exact, near in zip(
            grades, symmetries.stabilizers, symmetries.approximate_stabilizers, strict=True
        )
    ]
    kinds = np.array(stimuli.kinds)[tuning.best]
    result = TuningResult(
        **shown,
        responding=int(tuning.responds.sum()),
        stimuli={kind: int((tuning.responds & (kinds == kind)).sum()) for kind in KINDS},
        classes=class_agreement(tuning, claims, grades, seed=seed),
        families=pose_agreement(tuning, symmetries.references, symmetries.poses, seed=seed),
        types=pose_agreement(tuning, types.references, types.poses, seed=seed),
    )
    names = np.array(stimuli.names)[tuning.best]
    columns = {
        "stimulus": [k if on else "" for k, on in zip(kinds, tuning.responds, strict=True)],
        "stimulus_name": [k if on else "" for k, on in zip(names, tuning.responds, strict=True)],
        "response": tuning.curves.max(axis=1),
        "tuning_period": _periods(tuning, shown["n_angles"]),
        "tuning_likeness": tuning.similarity_under(claims, tuning.similarity),
        "tuning_likeness_low": tuning.similarity_under(claims, tuning.low),
        "tuning_likeness_high": tuning.similarity_under(claims, tuning.high),
    }
    tensors = {
        "tuning_curves": tuning.curves,
        "tuning_by_kind": tuning.by_kind,
        "tuning_similarity": tuning.similarity,
        "tuning_similarity_low": tuning.low,
        "tuning_similarity_high": tuning.high,
    }
    return MeasuredTuning(result, columns, {k: v.astype(np.float32) for k, v in tensors.items()})


def _missing(n: int, why: str) -> MeasuredTuning:
    nothing = np.full(n, np.nan)
    names = ("response", "tuning_period", "tuning_likeness", "tuning_likeness_low",
             "tuning_likeness_high")  # fmt: skip
    columns = {"stimulus": [""] * n, "stimulus_name": [""] * n, **dict.fromkeys(names, nothing)}
    return MeasuredTuning(TuningResult(missing=why), columns, {})


def _middle_place(
    network: nn.Module, site: Site, side: int, offset: int, stride: int, size: int
) -> tuple[int, tuple[float, float]] | None:
    """Find the position nearest to the middle that sees only the image, and what it sees."""
    plain = torch.full((1, 3, side, side), 0.5)
    with torch.inference_mode():
        layout = layouts_of(network, plain, [site])[site]
        grid = layout.grid(read_activations(network, plain, [site])[site])
    if stride == 0 or len(grid) != 2 or min(grid) < 1:
        return None
    first = offset + stride * np.arange(max(grid))
    whole = np.flatnonzero((first >= 0) & (first + size <= side))
    if not len(whole):
        return None
    at = int(whole[np.abs(first[whole] + (size - 1) / 2 - (side - 1) / 2).argmin()])
    if at >= min(grid):
        return None
    middle = float(first[at] + (size - 1) / 2)
    return at * grid[1] + at, (middle, middle)


@torch.inference_mode()
def _activations(
    network: nn.Module, site: Site, images: Float[Tensor, "image 3 side side"], position: int
) -> Float[Tensor, "image d"]:
    """Activations of the site at one position of each image."""
    rows = []
    with bar("showing stimuli") as progress:
        for i in range(0, len(images), BATCH):
            part = images[i : i + BATCH]
            layout = layouts_of(network, part, [site])[site]
            read = read_activations(network, part, [site])[site]
            flat = layout.rows(read)
            rows.append(flat.reshape(len(part), -1, flat.shape[-1])[:, position].float())
            progress(min(i + BATCH, len(images)), len(images))
    return torch.cat(rows)


@torch.inference_mode()
def _codes(
    posed: PosedDictionary,
    rows: Float[Tensor, "image d"],
    image_of: np.ndarray,
    table: np.ndarray,
    elements: np.ndarray,
) -> Float[np.ndarray, "feature stimulus pose"]:
    """Code of each feature for every stimulus in every pose."""
    rows = rows[:, posed.columns]
    codes = []
    for own in image_of:
        if posed.pose_tied:  # reads the stimulus in all poses of the group
            blocks = [rows[own[table[g]]] for g in elements]
            codes.append(posed.encode(torch.cat(blocks, dim=1)))
        else:
            codes.append(posed.dictionary.encode(rows[own]).float())
    stacked = torch.stack(codes)[:, :, : _n_features(posed)]
    return stacked.permute(2, 0, 1).numpy()


def _n_features(posed: PosedDictionary) -> int:
    return len(posed.dictionary.atoms) if posed.pose_tied else posed.dictionary.n_latents


def _periods(tuning: Tuning, n_angles: int) -> Float[np.ndarray, " feature"]:
    """Smallest rotation of the features' group, in degrees, after which responses certainly repeat.

    360 where none does; NaN for features that do not respond.
    """
    turns = np.flatnonzero((tuning.elements > 0) & (tuning.elements < n_angles))
    degrees = tuning.elements[turns] * 360.0 / n_angles
    period = np.full(len(tuning.responds), 360.0)
    for k in turns[np.argsort(-degrees)]:
        repeats = np.nan_to_num(tuning.low[:, k], nan=-1) > SUPPORT
        period[repeats] = tuning.elements[k] * 360.0 / n_angles
    return np.where(tuning.responds, period, np.nan)


def in_words(result: TuningResult) -> str:
    """Describe the agreement with stimuli in a sentence or two."""
    if result.missing:
        return f"No stimuli were shown: {result.missing}"
    lines = [f"{result.responding} features respond to {result.n_images} synthetic stimuli."]
    classes = result.classes
    if classes and classes.auc is not None:
        lines.append(
            f"Under their claimed symmetry responses of {classes.n_claimed} features correlate by "
            f"{classes.claimed:.2f}, those of {classes.n_none} features without one by "
            f"{classes.none:.2f} (AUC {classes.auc:.2f} [{classes.low:.2f}, {classes.high:.2f}], "
            f"by chance 0.50, p {classes.p_value:.2g})."
        )
    for name, each in (("families", result.families), ("types", result.types)):
        if each and each.n:
            chance = each.similarity_by_chance
            lines.append(
                f"{each.right} of {each.n} members of {name} respond most alike in the claimed "
                f"pose ({each.low:.0%} to {each.high:.0%}, by chance {each.by_chance:.0%}), with a "
                f"correlation of {each.similarity:.2f}"
                + (f" (random pairs in their best pose {chance:.2f})." if chance else ".")
            )
    return " ".join(lines)
