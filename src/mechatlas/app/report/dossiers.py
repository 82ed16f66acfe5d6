"""Dossiers: everything that the runs of a page say about each feature, and the findings.

    FeatureRecord    lines of one feature's dossier, filled in by every chapter
    Finding          claim of the first screen, with its number, its evidence and its place
    Absence          question that was asked and answered with "nothing found"
    collect          records of all chapters -> records of each dictionary, by feature

Every line of a record carries its own evidence and the anchor of its place on the page, so that
the first screen and the dossiers never say more than the chapters do.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class FeatureAt(NamedTuple):
    """Feature: a latent of the dictionary of a run."""

    run: str
    """Name of the run of the dictionary; empty if the page does not have it."""
    latent: int
    """Number of the latent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DossierLine:
    """Statement of a chapter about a feature."""

    anchor: str
    """Anchor of the part of the chapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClaimLine(DossierLine):
    """Statement that was tested against a null."""

    fdr: float
    """False discovery rate, or false match rate, asked for."""


ZeroBlock = tuple[str, str, float | None, float | None, float | None, int]
"""Pose and class of a zero block, the relative norm that speaks for the class with the ends of its
95 % interval, and the latent that writes most of it (-1 for none)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetryLine(ClaimLine):
    """Symmetry of a feature, with its evidence."""

    part: int
    """Number of the run of the analysis, for its stabilizer functions."""
    name: str
    """Class of the stabilizer."""
    order: int
    """Order of the stabilizer."""
    claimed: bool
    """Whether a stabilizer larger than {e} is claimed."""
    q: float | None
    """q-value of the claim."""
    ceiling: float | None
    """Noise ceiling: similarity of two estimates from different images."""
    family: int
    """Number of the family."""
    pose: str
    """Element that moves the reference of the family here."""
    members: list[tuple[int, str]]
    """Latents and poses of the other members, up to a dozen."""
    zero: list[ZeroBlock] = dataclasses.field(default_factory=list)
    """Zero blocks of the decoder."""
    likeness: tuple[str, float | None, float | None, float | None] | None = None
    """Class that is claimed, or else the nearest, similarity of the feature to itself under it, and
    the ends of its 95 % interval; None in runs that are older."""


Likeness = tuple[float, float | None, float | None, float | None]
"""Angle in degrees, correlation of responses under it, and the ends of its 95 % interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningLine(DossierLine):
    """Responses of a feature to synthetic stimuli, relative to its largest."""

    name: str
    """Stimulus with the largest response; empty if the feature responds to none."""
    n_images: int
    """Images shown."""
    picture: int = -1
    """Number of the stimulus on the sheet of all; -1 if it is not there."""
    curve: list[float] = dataclasses.field(default_factory=list)
    """Response to that stimulus in each orientation, counter-clockwise."""
    mirrored: list[float] = dataclasses.field(default_factory=list)
    """Response to its mirror image in each; empty where that is the same."""
    oriented: str = ""
    """Kind with the largest response of those that change when they are turned."""
    oriented_curve: list[float] = dataclasses.field(default_factory=list)
    """Largest response to stimuli of that kind in each orientation."""
    kinds: list[tuple[str, float | None]] = dataclasses.field(default_factory=list)
    """Largest response to stimuli of each kind, largest first."""
    response: float | None = None
    """Largest response."""
    period: float | None = None
    """Smallest turn after which responses certainly repeat, in degrees; 360 if none does."""
    turn: Likeness | None = None
    """Responses after that turn, or after the one after which they are most alike."""
    mirror: Likeness | None = None
    """Responses in the mirror in which they are most certainly alike, by the angle of its axis."""
    n_mirrors: int = 0
    """Mirrors of the group."""
    claimed: Likeness | None = None
    """Mean over the stabilizer that is claimed from the decoder blocks."""
    support: float | None = None
    """Correlation above which responses repeat."""
    chance: float | None = None
    """Median correlation of random pairs of features in their best pose."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchLine(ClaimLine):
    """Share of a feature in one branch, with its test."""

    branch: str
    """Name of the branch."""
    share: float | None
    """Share of the decoder row inside the branch."""
    expected: float
    """Share of a feature that belongs to no branch."""
    q: float | None
    """q-value; None where the feature was not tested."""
    significant: bool
    """Whether the feature is specialized to the branch."""
    ablation: float | None
    """Share of the activity that is lost without the branch."""
    activation: float | None
    """Share of the activation that the branch writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchLine(ClaimLine):
    """Partner of a feature in the dictionary before or after."""

    after: bool
    """Whether the partner is in the later dictionary."""
    name: str
    """Name of the partner's dictionary."""
    other: FeatureAt
    """Partner."""
    cosine: float
    """Similarity of the two."""
    q: float | None
    """q-value of the pair against null dictionaries."""
    matched: bool
    """Whether the pair is significant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackLine(DossierLine):
    """Life line of a feature through several dictionaries."""

    steps: list[tuple[str, str, int | None]]
    """Dictionary, its run and the latent in it, in the order of the network."""
    cosine: float
    """Mean similarity of consecutive members."""
    earliest: str
    """Dictionary in which the feature may be present first."""
    latest: str
    """Dictionary in which it may be present last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitLine(ClaimLine):
    """Edge of a circuit that ends or begins at a feature."""

    into: bool
    """Whether the edge leads into this feature."""
    name: str
    """Site of the feature at the other end."""
    other: FeatureAt
    """Feature at the other end."""
    branch: str
    """Branch or route of the edge."""
    contribution: float | None
    """Mean effect on the later feature's pre-activation."""
    share: float | None
    """Share of all contributions to the later feature, with its sign."""
    effect: list[float | None]
    """Pre-activation lost when the earlier feature is ablated, with a 95 % interval."""
    q: float | None
    """q-value of the edge."""
    significant: bool
    """Whether the edge is significant."""
    kernel: dict[str, Any]
    """Height, width and numbers of the kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitLine(ClaimLine):
    """Tokens that a feature raises and lowers most, directly."""

    raises: list[tuple[str, float | None]]
    """Tokens raised most, and the rise of their logits for one unit of activation."""
    lowers: list[tuple[str, float | None]]
    """Tokens lowered most, and the change of their logits."""
    q_raises: float | None
    """q-value of the largest rise against random directions."""
    q_lowers: float | None
    """q-value of the largest fall."""
    n_random: int
    """Random directions of the null."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowLine(ClaimLine):
    """Origin of a feature, and the way that it came."""

    origin: str
    """Origin in words."""
    before: FeatureAt | None
    """Partner in the layer before."""
    before_name: str
    """Name of the dictionary before."""
    cosine: float | None
    """Cosine with it."""
    q: float | None
    """q-value of that link."""
    module: FeatureAt | None
    """Latent of the attention or MLP that writes the direction."""
    module_name: str
    """Name of its dictionary."""
    module_cosine: float | None
    """Cosine with it."""
    module_q: float | None
    """q-value of that link."""
    since: str
    """Dictionary in which the track begins."""
    wrong: float | None
    """Probability that some link of the track so far is wrong, at most."""


Line = (
    SymmetryLine | TuningLine | BranchLine | MatchLine | TrackLine | CircuitLine | LogitLine
    | FlowLine
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """Lines of the dossier of one feature."""

    symmetry: list[SymmetryLine] = dataclasses.field(default_factory=list)
    stimuli: list[TuningLine] = dataclasses.field(default_factory=list)
    branches: list[BranchLine] = dataclasses.field(default_factory=list)
    matches: list[MatchLine] = dataclasses.field(default_factory=list)
    tracks: list[TrackLine] = dataclasses.field(default_factory=list)
    circuits: list[CircuitLine] = dataclasses.field(default_factory=list)
    logits: list[LogitLine] = dataclasses.field(default_factory=list)
    flow: list[FlowLine] = dataclasses.field(default_factory=list)

    def add(self, line: Line) -> None:
        """Add a line of whatever kind."""
        lists = {
            SymmetryLine: self.symmetry, TuningLine: self.stimuli, BranchLine: self.branches,
            MatchLine: self.matches, TrackLine: self.tracks, CircuitLine: self.circuits,
            LogitLine: self.logits, FlowLine: self.flow,
        }  # fmt: skip
        lists[type(line)].append(line)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Claim of the first screen."""

    text: str
    """Sentence with the number."""
    evidence: str
    """Null, gap, interval or control that the claim rests on."""
    anchor: str
    """Anchor of the place on the page that shows it."""
    rows: tuple[tuple[FeatureAt, ...], ...] = ()
    """Features to show: a row for each example of the finding."""
    figure: str = ""
    """Figure of the chapter to show in place of features."""
    strength: float = 0.0
    """Share of what was asked that was found; of a chapter's findings the strongest come first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absence:
    """Question that was asked and answered with "nothing found"."""

    text: str
    """Sentence on what was asked and not found."""
    power: str
    """Power of the test: what it would have found."""
    anchor: str
    """Anchor of the place on the page that shows it."""


Statements = list[tuple[FeatureAt, Line]]
"""Lines of a chapter and the features that they are about."""


def collect(statements: Iterable[tuple[FeatureAt, Line]]) -> dict[str, dict[int, FeatureRecord]]:
    """Sort lines into one record for each feature, by the run of its dictionary."""
    records: dict[str, dict[int, FeatureRecord]] = {}
    for feature, line in statements:
        if feature.run:
            of_run = records.setdefault(feature.run, {})
            of_run.setdefault(feature.latent, FeatureRecord()).add(line)
    return records


def plain_record(record: FeatureRecord) -> dict[str, list[dict[str, Any]]]:
    """Record as plain values; kinds without lines are left out."""
    return {kind: [vars(line) for line in lines] for kind, lines in vars(record).items() if lines}


def finite(value: Any) -> float | None:
    """Number with four digits; None for NaN and for what is no number."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{float(value):.4g}")
