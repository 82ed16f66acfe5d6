"""Validation of virtual weights on data: ablations and integrated gradients.

    ablate                 remove a feature wherever it is active, and run on
    attribute              integrated gradients from features to pre-activations
    reproduced_variance    fraction of each pre-activation that the composed kernels reproduce
    ablation_agreement     rank correlation of predicted and measured effects, beside its nulls

Nothing here uses averaged gates: the network itself runs from one site to the next.

Source: Sundararajan et al., Axiomatic attribution for deep networks (2017), for integrated
gradients.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from mechatlas.analysis.circuits.attention import AttentionResponse, arriving
from mechatlas.analysis.circuits.compose import LinearDictionary, Response
from mechatlas.analysis.circuits.layer_parts import AttentionLayer
from mechatlas.analysis.circuits.recording import encode, seen
from mechatlas.analysis.circuits.wiring import Masked, SiteMap, Wiring, masked

RESAMPLES = 1000
"""Bootstrap samples for an interval."""
STEPS = 16
"""Points at which gradients are integrated."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ablation:
    """Loss of the target's channels when a feature of the source is removed."""

    sources: Int[np.ndarray, " source"]
    """Features removed."""
    lost: Float[np.ndarray, "source sample channel"]
    """Mean loss over all positions of a sample; channels of the target's site."""
    mean: Float[np.ndarray, " source"]
    """Mean activation of the source over all its positions."""

    def pre_activations(
        self, encoder: Float[Tensor, "d target"]
    ) -> Float[np.ndarray, "source target"]:
        """Mean loss of each pre-activation over all positions."""
        return self.lost.mean(axis=1) @ encoder.detach().float().cpu().numpy()


@torch.no_grad()
def ablate(
    wiring: Wiring | AttentionLayer,
    a: LinearDictionary,
    maps: Iterable[SiteMap | Masked],
    sources: Int[np.ndarray, " source"],
) -> Ablation:
    """Remove features one at a time and run on.

    Args:
        wiring: From the site of `a` to the target's.
        a: Dictionary of the source.
        maps: Activations of the source's module, batch by batch.
        sources: Features to remove.
    """
    atoms = a.W_dec.detach()
    width = wiring.reads.stop - wiring.reads.start
    means: list[np.ndarray] = []
    total, positions = np.zeros(len(sources)), 0
    for x, left_out in masked(maps):
        out = wiring.run(x)[:, wiring.reads]
        code = encode(a, x[:, wiring.writes], left_out)[:, sources].tocsc()
        positions += code.shape[0]
        part = np.zeros((len(sources), len(x), width), np.float32)
        for k, source in enumerate(sources):
            activation = code[:, [k]].toarray().ravel()
            touched = np.flatnonzero(activation.reshape(len(x), -1).any(axis=1))
            total[k] += activation.sum()
            if not len(touched):
                continue
            # Samples where it is never active lose nothing.
            without = x[touched].clone()
            f = torch.from_numpy(activation).to(x).view(len(x), 1, *x.shape[2:])[touched]
            without[:, wiring.writes] -= f * atoms[source][:, None, None]
            lost = out[touched] - wiring.run(without)[:, wiring.reads]
            part[k, touched] = lost.float().mean(dim=(2, 3)).cpu().numpy()
        means.append(part)
    return Ablation(sources, np.concatenate(means, axis=1), total / max(positions, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """Sources of the pre-activations of some targets, on average where these are active."""

    targets: Int[np.ndarray, " target"]
    """Features of the target."""
    places: Int[np.ndarray, " target"]
    """Number of positions where each was active."""
    attributed: Float[np.ndarray, "target part source"]
    """Attribution to each feature of the source through each part of the target's channels."""
    part: Int[np.ndarray, " route"]
    """Number of the part that each route writes."""
    pre_activation: Float[np.ndarray, " target"]
    """Loss of the pre-activation if all features of the source are removed at once."""
    gap: Float[np.ndarray, " target"]
    """Fraction of `pre_activation` that attributions miss, from the finite number of steps."""


def attribute(
    wiring: Wiring | AttentionLayer,
    a: LinearDictionary,
    b: LinearDictionary,
    maps: Iterable[SiteMap | Masked],
    targets: Int[np.ndarray, " target"],
    parts: Sequence[slice],
    *,
    steps: int = STEPS,
) -> Attribution:
    """Integrated gradients of pre-activations with respect to the activations of features.

    The path is a straight line from the activations without any of the features (the residual of
    the dictionary) to those with all of them. Attributions add up to the pre-activation that all
    features make together, up to `gap`. Where the network is 1-homogeneous along the line (no
    biases, no residual), all gradients on it are equal and one step is exact.

    Args:
        wiring: From the site of `a` to that of `b`.
        a: Dictionary of the source.
        b: Dictionary of the target.
        maps: Activations of the source's module, batch by batch.
        targets: Features of the target.
        parts: Channels of the target's module, such as those of each route.
        steps: Points of the line at which gradients are taken.
    """
    encoder, written = b.W_enc.detach(), a.W_dec.detach().float().cpu().numpy()
    apart = [part for k, part in enumerate(parts) if part not in parts[:k]]
    attributed = np.zeros((len(targets), len(apart), a.n_latents))
    pre_activation, places = np.zeros(len(targets)), np.zeros(len(targets), np.int64)
    for x, left_out in masked(maps):
        with torch.no_grad():
            out = wiring.run(x)[:, wiring.reads]
            code = encode(a, x[:, wiring.writes], left_out)
            on = encode(b, out, left_out)[:, targets].toarray() > 0
            features = torch.from_numpy(code @ written).to(x)
            features = features.view(len(x), *x.shape[2:], -1).movedim(-1, 1)
            bare = x.clone()
            bare[:, wiring.writes] -= features
            lost = (out - wiring.run(bare)[:, wiring.reads]).movedim(1, -1).flatten(0, 2)
            mask = torch.from_numpy(on).to(x)
            pre_activation += (
                ((lost @ encoder[:, targets]) * mask).sum(dim=0).double().cpu().numpy()
            )
            places += on.sum(axis=0)
        for step in range(steps):
            point = bare + (step + 0.5) / steps * (x - bare)
            for t, p, slope in _slopes(wiring, point, encoder[:, targets], mask, apart):
                rows = slope[:, wiring.writes].movedim(1, -1).flatten(0, 2).float().cpu().numpy()
                attributed[t, p] += ((code.T @ rows) * written).sum(axis=1) / steps
    n = np.maximum(places, 1)
    attributed, pre_activation = attributed / n[:, None, None], pre_activation / n
    whole = attributed.sum(axis=(1, 2))
    gap = np.abs(whole - pre_activation) / np.maximum(np.abs(pre_activation), 1e-30)
    each = np.array([apart.index(part) for part in parts], np.int64)
    return Attribution(targets, places, attributed, each, pre_activation, gap)


def _slopes(
    wiring: Wiring | AttentionLayer,
    point: Tensor,
    encoder: Tensor,
    mask: Tensor,
    parts: Sequence[slice],
) -> Iterable[tuple[int, int, Tensor]]:
    """Gradient of the sum of each pre-activation where its feature is active, by part."""
    start = point.detach().requires_grad_()
    with torch.enable_grad():
        out = wiring.run(start)
    rows = out.new_zeros(out.shape[1])
    for t in range(encoder.shape[1]):
        if not bool(mask[:, t].any()):
            continue
        here = mask[:, t].view(len(out), 1, *out.shape[2:])
        for p, part in enumerate(parts):
            rows.zero_()
            rows[wiring.reads] = encoder[:, t]
            rows[: part.start], rows[part.stop :] = 0, 0
            (slope,) = torch.autograd.grad(
                out, start, here * rows[:, None, None], retain_graph=True
            )
            yield t, p, slope


@torch.no_grad()
def reproduced_variance(
    wiring: Wiring | AttentionLayer,
    responses: Sequence[Response],
    a: LinearDictionary,
    b: LinearDictionary,
    maps: Iterable[SiteMap | Masked],
) -> Float[np.ndarray, " target"]:
    """Fraction of the variance of each pre-activation that the composed kernels reproduce.

    Variance over positions, with the kernels of all features of the source and a free constant.
    Both the residual of the dictionary and the error of averaged gates are missing.

    Args:
        wiring: From the site of `a` to that of `b`.
        responses: Result of `compose_responses`.
        a: Dictionary of the source.
        b: Dictionary of the target.
        maps: Activations of the source's module, batch by batch.

    Returns:
        One fraction for each feature; NaN where the pre-activation does not vary.
    """
    encoder = b.W_enc.detach()
    sums, squares, count = np.zeros((2, b.n_latents)), np.zeros((2, b.n_latents)), 0
    for x, left_out in masked(maps):
        out = wiring.run(x)
        code = encode(a, x[:, wiring.writes], left_out)
        made = np.zeros((len(out) * out.shape[2] * out.shape[3], out.shape[1]), np.float32)
        frozen = wiring.nonlinearities(x) if isinstance(wiring, AttentionLayer) else None
        for response in responses:
            if frozen is not None:
                assert isinstance(response, AttentionResponse)
                arrived = arriving(frozen, code, response.head)
                made += arrived @ response.values[0].float().cpu().numpy()
                continue
            for tap, values in zip(response.taps, response.values, strict=True):
                here, there = seen(
                    len(x), (out.shape[2], out.shape[3]), (x.shape[2], x.shape[3]),
                    response.stride, (int(tap[0]), int(tap[1])),
                )  # fmt: skip
                made[here, response.channels] += code[there] @ values.float().cpu().numpy()
        true = out[:, wiring.reads].movedim(1, -1).flatten(0, 2) @ encoder
        guess = torch.from_numpy(made[:, wiring.reads]).to(true) @ encoder
        if left_out is not None:
            true, guess = (rows[~left_out.flatten().to(rows.device)] for rows in (true, guess))
        true, rest = true.double().cpu().numpy(), (true - guess).double().cpu().numpy()
        count += len(true)
        sums[0] += true.sum(axis=0)
        sums[1] += rest.sum(axis=0)
        squares[0] += np.square(true).sum(axis=0)
        squares[1] += np.square(rest).sum(axis=0)
    spread = squares / max(count, 1) - np.square(sums / max(count, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread[0] > 1e-12, 1 - spread[1] / spread[0], np.nan)


@dataclasses.dataclass(frozen=True)
class AblationAgreement:
    """Rank correlation of predicted with measured effects, beside two nulls."""

    spearman: float
    """Spearman's rank correlation over all pairs."""
    low: float
    """Lower end of the 95 % interval over the features removed."""
    high: float
    """Upper end of the interval."""
    null: float
    """Mean correlation with predictions permuted over all pairs."""
    null_low: float
    """Lower end of its 95 % interval."""
    null_high: float
    """Upper end of its 95 % interval."""
    other_source: float
    """Mean correlation with the prediction of another removed feature for the same target."""
    other_low: float
    """Lower end of its 95 % interval."""
    other_high: float
    """Upper end of its 95 % interval."""
    pairs: int
    """Pairs of features compared."""

    def in_words(self) -> str:
        """Correlation with its interval, beside that of random pairs."""
        return (
            f"rank correlation {self.spearman:.3f} [{self.low:.3f}, {self.high:.3f}], random "
            f"pairs {self.null:.3f} [{self.null_low:.3f}, {self.null_high:.3f}]"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationEvidence:
    """Rank agreement of virtual weights with what ablations do, for three choices of gates."""

    n_ablated: int
    """Features removed one at a time, drawn at random."""
    agreement: AblationAgreement
    """Agreement with the gates that each feature meets, or with derivatives."""
    agreement_shared_gates: AblationAgreement | None = None
    """Agreement with gates averaged over all positions, the same for all features; None for
    derivatives."""
    agreement_open_gates: AblationAgreement | None = None
    """Agreement with all gates open; None for transformers."""
    n_samples: int = 0
    """Held-out samples that they were removed on."""


def ablation_agreement(
    predicted: Float[np.ndarray, "source target"],
    measured: Float[np.ndarray, "source target"],
    *,
    seed: int = 0,
    resamples: int = 200,
    possible: Bool[np.ndarray, "source target"] | None = None,
) -> AblationAgreement:
    """Spearman's rank correlation over all pairs, with its interval and its nulls.

    Args:
        predicted: Virtual weights times mean activations.
        measured: Losses of pre-activations.
        seed: Seed of the resampling and of the nulls.
        resamples: Draws for each interval.
        possible: Pairs that are compared, where some cannot act on each other; by default all.
    """
    random = np.random.default_rng(seed)
    n = len(predicted)
    counted = np.ones(predicted.shape, bool) if possible is None else possible
    x, y = np.zeros(predicted.shape), np.zeros(predicted.shape)
    x[counted], y[counted] = stats.rankdata(predicted[counted]), stats.rankdata(measured[counted])

    def correlation(p: np.ndarray, q: np.ndarray) -> float:
        if not p.size:
            return 0.0
        p, q = p - p.mean(), q - q.mean()
        size = float(np.sqrt((p * p).sum() * (q * q).sum()))
        return float((p * q).sum()) / size if size else 0.0

    drawn, null, other = [], [], []
    for _ in range(resamples):
        rows = random.integers(n, size=n)
        drawn.append(correlation(x[rows][counted[rows]], y[rows][counted[rows]]))
        null.append(correlation(random.permutation(x[counted]), y[counted]))
        shift = random.permutation(n)
        both = counted & counted[shift]
        other.append(correlation(x[shift][both], y[both]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    ends, others = np.quantile(null, [0.025, 0.975]), np.quantile(other, [0.025, 0.975])
    return AblationAgreement(
        correlation(x[counted], y[counted]), float(low), float(high),
        float(np.mean(null)), float(ends[0]), float(ends[1]),
        float(np.mean(other)), float(others[0]), float(others[1]), int(counted.sum()),
    )  # fmt: skip


def bootstrap_interval(
    values: Float[np.ndarray, "edge sample"], *, seed: int = 0
) -> tuple[Float[np.ndarray, " edge"], Float[np.ndarray, " edge"]]:
    """Bootstrap interval (95 %) of the mean over samples, for each row."""
    random = np.random.default_rng(seed)
    n = values.shape[1]
    weights = random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
    low, high = np.quantile(values @ weights.T, [0.025, 0.975], axis=1)
    return low, high
