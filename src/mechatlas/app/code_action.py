"""Learnt action of the group on codes, for `mechatlas symmetry --code-action`.

measure     dictionary, rows of a store and types of features -> result
in_words    the result for the terminal
"""

import dataclasses

import numpy as np
import torch

from mechatlas.analysis.symmetry.classify import Symmetry
from mechatlas.analysis.symmetry.code_action import fit_code_action, regular_action
from mechatlas.analysis.symmetry.feature_types import FeatureTypes
from mechatlas.analysis.symmetry.posed_dictionary import PosedDictionary
from mechatlas.app.pose_interventions import rounded
from mechatlas.base import InputError

MAX_LATENTS = 1024
"""Largest number of active latents: matrices of all of them are fitted for every element."""
MAX_BYTES = 1 << 29
"""Size of the posed rows that are read, four fifths of them to fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeActionResult:
    """Representation of the group on codes that is learnt, judged by held-out poses."""

    missing: str = ""
    """Reason why none was learnt; empty if one was."""
    parts: int = 0
    """Parts whose codes are transformed among themselves: types, and other features alone."""
    represented: int = 0
    """Number of parts that a representation was found for; codes of the others are left as they
    are."""
    irreps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of times that each irrep occurs in these, trivial ones first."""
    rows: int = 0
    """Rows that it is fitted to."""
    held_out_rows: int = 0
    """Held-out rows that it is measured on."""
    fvu: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """Mean FVU of held-out poses other than e, by action: `learnt`; `regular` (codes move within
    families); `unchanged` (codes stay); `unconstrained` (matrices that are no representation)."""
    gain: float | None = None
    """FVU of the best of `regular`, `unchanged` and the mean of the pose, less that of `learnt`."""
    gain_low: float | None = None
    """Lower end of the 95 % interval of the gain over images."""
    gain_high: float | None = None
    """Upper end of the interval."""


def measure(
    posed: PosedDictionary,
    blocks: np.ndarray,
    active: np.ndarray,
    symmetries: Symmetry,
    types: FeatureTypes,
) -> CodeActionResult:
    """Learn the action on codes of active latents, types among themselves.

    Args:
        posed: Dictionary and its rows.
        blocks: Decoder blocks (feature, order, d).
        active: Number of rows on which each feature is active.
        symmetries: Families, for the regular action.
        types: Types.
    """
    alive, group = np.flatnonzero(active), posed.group
    if posed.pose_tied:
        return CodeActionResult(missing="The dictionary is pose-tied: its action is the regular.")
    if not 0 < len(alive) <= MAX_LATENTS:
        return CodeActionResult(
            missing=f"{len(alive):,} latents are active; an action is learnt for {MAX_LATENTS:,} "
            "at most."
        )
    codes, rows, image, held = _rows(posed)
    labels = types.labels[alive]
    parts = [np.flatnonzero(labels == k).tolist() for k in range(labels.max(initial=-1) + 1)]
    parts += [[i] for i in np.flatnonzero(labels < 0).tolist()]
    place = np.full(len(active) + 1, -1)  # the last one for codes that are lost
    place[alive] = np.arange(len(alive))
    try:
        found = fit_code_action(
            codes[:, alive], rows, blocks[alive, group.identity], group, held, parts=parts,
            regular=place[regular_action(symmetries)[:, alive]], image=image,
        )  # fmt: skip
    except InputError as error:
        return CodeActionResult(missing=str(error))
    others = np.arange(group.order) != group.identity
    counts = found.multiplicities.sum(axis=0)
    return CodeActionResult(
        parts=len(parts),
        represented=int(found.exact.sum()),
        irreps={r.name: int(n) for r, n in zip(group.irreps(), counts, strict=True) if n},
        rows=int((~held).sum()),
        held_out_rows=int(held.sum()),
        fvu={name: rounded(each[others].mean()) for name, each in found.fvu.items()},
        gain=rounded(found.gain),
        gain_low=rounded(found.gain_low),
        gain_high=rounded(found.gain_high),
    )


@torch.no_grad()
def _rows(posed: PosedDictionary) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, rows in all poses, image of each, and whether it is held out."""
    order, d = posed.group.order, posed.d
    most = MAX_BYTES // (8 * order * d)
    left = {False: most - most // 5, True: most // 5}
    parts: list[tuple[np.ndarray, ...]] = []
    for batch, where in posed.rows.scan():
        held = int(batch.row[0]) >= posed.rows.n_rows
        x = posed.select_columns(batch.x)[: left[held]]
        left[held] -= len(x)
        if len(x):
            image = where[: len(x), 0].numpy() // posed.crops
            codes = posed.encode(x).cpu().numpy()
            parts.append((codes, x.float().numpy(), image, np.full(len(x), held)))
    codes, rows, image, held_out = (np.concatenate(each) for each in zip(*parts, strict=True))
    return codes, rows.reshape(len(rows), order, d), image, held_out


def in_words(result: CodeActionResult) -> str:
    """Describe the action in a sentence."""
    if result.missing:
        return f"No action on codes was learnt: {result.missing}"
    irreps = ", ".join(f"{n} {name}" for name, n in result.irreps.items())
    fvu = {k: "unknown" if v is None else f"{v:.3f}" for k, v in result.fvu.items()}
    gain = "" if result.gain is None else (
        f"; gain {result.gain:.3f} [{result.gain_low:.3f}, {result.gain_high:.3f}]"
    )  # fmt: skip
    return (
        f"A learnt action on codes ({result.represented} of {result.parts} parts have a "
        f"representation: {irreps or 'none'}) leaves an FVU of {fvu['learnt']} in other poses, the "
        f"regular one {fvu['regular']}, codes as they are {fvu['unchanged']}, matrices that are no "
        f"representation {fvu['unconstrained']}{gain}."
    )
