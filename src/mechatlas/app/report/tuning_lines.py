"""Lines of dossiers on responses to synthetic stimuli, and a picture of every stimulus.

    tuning_lines    table and tensors of a run of `mechatlas symmetry` -> a line for each feature
    stimulus_sheet  all stimuli in their first pose, side by side

Poses are those of `analysis.symmetry.stimuli`: the first half are turns counter-clockwise, the
second half turns after a mirror, left and right.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from mechatlas.analysis.symmetry.class_names import n_turns
from mechatlas.analysis.symmetry.stimuli import KINDS, draw_stimuli
from mechatlas.app.report.dossiers import Likeness, TuningLine, finite
from mechatlas.app.stimuli import SUPPORT, TuningResult
from mechatlas.maths.groups import Group

ROUND = ("center-surround", "color")
"""Kinds of stimuli that are the same in every orientation."""
TILE = 48
"""Side of the picture of a stimulus, in pixels."""


def stimulus_sheet() -> tuple[UInt8[np.ndarray, "h w 3"], list[str]]:
    """Draw all stimuli in their first pose, from left to right, and give their names."""
    stimuli = draw_stimuli(TILE, ((TILE - 1) / 2, (TILE - 1) / 2), TILE / 2, 4)
    tiles = stimuli.images[stimuli.image_of[:, 0]]
    sheet = np.rint(255 * tiles.transpose(2, 0, 3, 1).reshape(TILE, -1, 3)).astype(np.uint8)
    return sheet, list(stimuli.names)


def tuning_lines(
    anchor: str,
    group: Group,
    result: TuningResult,
    table: dict[str, Any],
    tensors: dict[str, np.ndarray],
) -> Iterator[tuple[int, TuningLine]]:
    """Give a line for each feature, in order; none if no stimuli were shown.

    Args:
        anchor: Anchor of the part of the chapter.
        group: C_n or D_n, in the order of `named_groups`.
        result: Agreement of the run with stimuli.
        table: Table of the features.
        tensors: Tensors of the run.
    """
    if result.missing or "tuning_curves" not in tensors:
        return
    n = n_turns(group)
    names = stimulus_sheet()[1]
    pairs = [each.similarity_by_chance for each in (result.types, result.families) if each]
    chance = next((each for each in pairs if each is not None), None)
    curves, by_kind = tensors["tuning_curves"], tensors["tuning_by_kind"]
    for i, name in enumerate(table["stimulus_name"]):
        most = float(curves[i].max())
        if not name or most <= 0:
            yield i, TuningLine(anchor=anchor, name="", n_images=result.n_images)
            continue
        turns, mirrors = np.split(curves[i] / most, 2)
        kinds = sorted(zip(by_kind[i].max(axis=1) / most, KINDS, strict=True), reverse=True)
        oriented = next(kind for _, kind in kinds if kind not in ROUND)
        repeats, mirrored = _symmetries(i, n, tensors)
        yield i, TuningLine(
            anchor=anchor,
            name=str(name),
            n_images=result.n_images,
            picture=names.index(name) if name in names else -1,
            curve=_digits(turns),
            mirrored=[] if np.allclose(turns, mirrors) else _digits(mirrors),
            oriented=oriented,
            oriented_curve=_digits(by_kind[i, KINDS.index(oriented)] / most),
            kinds=[(kind, finite(value)) for value, kind in kinds if value > 0],
            response=finite(most),
            period=finite(table["tuning_period"][i]),
            turn=repeats,
            mirror=mirrored,
            n_mirrors=group.order - n,
            claimed=_likeness(0.0, *(table[f"tuning_likeness{end}"][i]
                                     for end in ("", "_low", "_high"))),
            support=round(SUPPORT, 3),
            chance=finite(chance),
        )  # fmt: skip


def _digits(values: Float[np.ndarray, " angle"]) -> list[float]:
    return [round(float(v), 3) for v in values]


def _symmetries(
    i: int, n: int, tensors: dict[str, np.ndarray]
) -> tuple[Likeness | None, Likeness | None]:
    """Responses after the smallest turn that certainly repeats them, and in the surest mirror.

    Where no turn repeats them, the one after which they are most alike. Angles are in degrees; that
    of a mirror is the angle of its axis from the horizontal, counter-clockwise.
    """
    similarity, low, high = (
        tensors[f"tuning_similarity{end}"][i].astype(float) for end in ("", "_low", "_high")
    )
    turn, mirror = None, None
    if n > 1:
        alike = np.nan_to_num(similarity[1:n], nan=-2)
        k = 1 + int(np.append(np.flatnonzero(low[1:n] > SUPPORT), alike.argmax())[0])
        turn = _likeness(360 * k / n, similarity[k], low[k], high[k])
    if len(similarity) > n:
        k = int(np.nan_to_num(low[n:], nan=-2).argmax())
        mirror = _likeness((90 + 180 * k / n) % 180, similarity[n + k], low[n + k], high[n + k])
    return turn, mirror


def _likeness(angle: float, value: float, low: float, high: float) -> Likeness | None:
    """Correlation with its interval; None where it is not known."""
    if not np.isfinite(value):
        return None
    return round(angle, 1), finite(value), finite(low), finite(high)
