"""Find what the latents of a language model do: tokens that they raise, answers that rest on them.

mechatlas effects runs/layer26 --out runs/layer26_effects
mechatlas effects DICT --network model.gguf --site layers.26 --samples texts.zip --out OUT

The folder has `logits.parquet` (a row for each latent, with the tokens that it raises and lowers
most). `--attribute N` takes N windows and attributes to latents how much likelier than the second
the likeliest next token is. Without `--network` and `--samples` the network of the dictionary's
store runs on its held-out samples.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from mechatlas.activations.passes import on_device
from mechatlas.activations.samples import TextSamples
from mechatlas.analysis.effects.attribution import N_ABLATED, Attribution, attribute
from mechatlas.analysis.effects.logits import (
    LATENTS_AT_ONCE,
    N_RANDOM,
    LogitEffects,
    logit_effects,
)
from mechatlas.app.estimates import WORTH_MEASURING, bytes_of, of_work
from mechatlas.app.network_inputs import MeasureConfig, Measured, open_measured
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import EFFECTS, LOGITS, CommandResult, RunFolder
from mechatlas.base import InputError, Progress
from mechatlas.devices import as_device
from mechatlas.maths.bootstrap import Estimate
from mechatlas.ranges import COUNT, COUNT_OR_NONE, RATE, SEED, check_ranges

KIND = EFFECTS
FDR = 0.05
"""Default false discovery rate."""
STRONGEST = 10
"""Latents listed of each attributed answer."""
TOKEN_BYTES = 10
"""Bytes of `logits.parquet` for each token of a latent: its number, its effect and its text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EffectsConfig(MeasureConfig):
    """Find what the latents of a language model do: tokens raised and lowered, answers attributed.

    Example:  mechatlas effects runs/layer26 --out runs/layer26_effects
    """

    n_samples: int = 32
    """Windows that give the scale of the final norm, and the difference that freezing it makes."""
    n_top: int = 10
    """Tokens listed at each end."""
    fdr: float = FDR
    """False discovery rate at which a latent raises or lowers a token more than by chance."""
    n_random: int = N_RANDOM
    """Random directions of the same norm that latents are compared with."""
    attribute: int = 2
    """Windows whose likeliest next token is attributed to latents; 0 for none."""
    n_ablated: int = N_ABLATED
    """Latents of each of these that are ablated one at a time, as a check."""
    seed: int = 0
    """Seed of the null, the draws and the intervals."""

    def __post_init__(self) -> None:
        check_ranges(
            self, n_samples=COUNT, n_top=COUNT, fdr=RATE, n_random=COUNT, attribute=COUNT_OR_NONE,
            n_ablated=COUNT_OR_NONE, seed=SEED,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributedAnswer:
    """Output of the network on one window, attributed to latents."""

    sample: str
    """Name of the window."""
    output: str
    """Output that is attributed, in words."""
    value: float
    """Value of the output."""
    latents: list[int]
    """Latents with the largest attributions by size."""
    values: list[float]
    """Attribution of each: the fall of the output, to first order, without it."""
    all_latents: float
    """Sum of the attributions of all latents."""
    error: float
    """Attribution of the dictionary's error."""
    words: list[str]
    """Tokens of the window."""
    positions: list[float]
    """Attribution at each token, over all latents."""
    rank_correlation: Estimate | None
    """Rank correlation with ablations of latents, one at a time."""
    null: Estimate | None
    """Rank correlation with the attributions permuted."""
    activation_correlation: float | None
    """Rank correlation of the ablations with the activations alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EffectsResult(CommandResult):
    """Effects of latents on the tokens that follow."""

    site: str
    """Site of the dictionary."""
    n_latents: int = 0
    """Latents whose effects on the logits were found."""
    fdr: float = FDR
    """False discovery rate asked for."""
    n_raising: int = 0
    """Latents that raise some token more than random directions of the same norm do."""
    n_lowering: int = 0
    """Latents that lower some token more than random directions of the same norm do."""
    n_random: int = 0
    """Random directions of the null."""
    null_top: float | None = None
    """Median over random directions of the largest rise, at the median norm of the latents."""
    scale: float | None = None
    """Root mean square of the stream before the final norm."""
    unfrozen_difference: Estimate | None = None
    """Distance between the changes of all logits with the final norm frozen and as it is."""
    attributions: list[AttributedAnswer] = dataclasses.field(default_factory=list)
    """Answers that were attributed."""


def run(config: EffectsConfig, folder: RunFolder) -> EffectsResult:
    """Find the logit effects of all latents, and attribute some answers.

    Raises:
        InputError: The samples are no texts, or the network has no head that is known.
        RecipeError: The site is not known.
        UserError: The network, the samples or the store are not to be found, or do not fit.
    """
    measured = open_measured(config, config.n_samples)
    samples, network, dictionary = measured.samples, measured.network, measured.opened.dictionary
    if not isinstance(samples, TextSamples):
        raise InputError(
            f"Effects on tokens need texts, got {samples!r}. Give the texts with --samples."
        )
    numbers = measured.numbers or _drawn(len(samples), config)
    device = as_device(config.device)
    folder.parent("dictionary", measured.opened.checksum)
    folder.facts(site=measured.site, dictionary=str(config.dictionary.resolve()))
    tokens = samples.stack([samples.read(i) for i in numbers])
    with on_device(network, device), on_device(dictionary, device):
        effects = partial(
            logit_effects, network, dictionary, tokens=tokens.to(device), site=measured.site,
            n_top=config.n_top, n_random=config.n_random, seed=config.seed,
        )  # fmt: skip

        def attributions(progress: Progress) -> list[AttributedAnswer]:
            answers = []
            for done, i in enumerate(numbers[: config.attribute], start=1):
                window = samples.stack([samples.read(i)[~samples.padding(i)]]).to(device)
                answers.append(_attribute(config, measured, window, samples.name(i)))
                progress(done, config.attribute)
            return answers

        folder.expect(
            lambda: of_work(
                [lambda progress: effects(on_progress=progress), attributions],
                memory=2 * bytes_of(network, dictionary),
                disk=TOKEN_BYTES * (2 * config.n_top + 4) * dictionary.n_latents,
            ),
            is_long=dictionary.n_latents >= WORTH_MEASURING * LATENTS_AT_ONCE
            or config.attribute >= WORTH_MEASURING,
        )
        with bar("effects") as progress:
            found = effects(on_progress=progress)
        with bar("attributing") as progress:
            answers = attributions(progress)
    folder.table(LOGITS, logit_columns(found))
    return EffectsResult(
        **logit_counts(found, config.fdr), site=measured.site, attributions=answers
    )


def _drawn(n: int, config: EffectsConfig) -> list[int]:
    """Samples drawn at random."""
    return np.random.default_rng([config.seed, 40]).permutation(n)[: config.n_samples].tolist()


def _attribute(
    config: EffectsConfig, measured: Measured, window: Int[Tensor, "1 token"], name: str
) -> AttributedAnswer:
    """Attribute the margin of the likeliest next token over the second."""
    with torch.no_grad():
        likely, second = measured.network(window).logits[0, -1].topk(2).indices.tolist()
    found = attribute(
        measured.network, measured.opened.dictionary, window,
        lambda logits: logits[0, -1, likely] - logits[0, -1, second],
        site=measured.site, n_ablated=config.n_ablated, seed=config.seed,
    )  # fmt: skip
    first, other, *words = _words(measured.network, [likely, second, *window[0].tolist()])
    return describe_attribution(
        found, name, f"next token {first!r} over {other!r}", [str(word) for word in words]
    )


def _words(network: nn.Module, ids: Sequence[int]) -> list[str]:
    """Text of tokens; their numbers where the network has no tokenizer."""
    decode = getattr(getattr(network, "input", None), "decode", None)
    return [str(i) for i in ids] if decode is None else [str(word) for word in decode(list(ids))]


def describe_attribution(
    found: Attribution, sample: str, output: str, words: list[str]
) -> AttributedAnswer:
    """Describe an attribution for `result.json`.

    Args:
        found: The attribution.
        sample: Name of the sample.
        output: The output in words.
        words: Tokens of the sample.
    """
    top = found.top(STRONGEST)
    return AttributedAnswer(
        sample=sample,
        output=output,
        value=found.output,
        latents=[latent for latent, _ in top],
        values=[value for _, value in top],
        all_latents=float(found.latents.sum()),
        error=float(found.error.sum()),
        words=words,
        positions=found.positions[0].tolist(),
        rank_correlation=found.rank_correlation,
        null=found.null,
        activation_correlation=found.activation_correlation,
    )


def logit_counts(found: LogitEffects, fdr: float) -> dict[str, Any]:
    """Count the latents that stand out, for `result.json`.

    Args:
        found: Effects on the logits.
        fdr: False discovery rate.
    """
    return {
        "n_latents": len(found.latents),
        "fdr": fdr,
        "n_raising": int((found.q_top <= fdr).sum()),
        "n_lowering": int((found.q_bottom <= fdr).sum()),
        "n_random": found.n_random,
        "null_top": found.null_top,
        "scale": found.scale,
        "unfrozen_difference": found.unfrozen_difference,
    }


def logit_columns(found: LogitEffects) -> dict[str, Any]:
    """Columns of `logits.parquet`: a row for each latent, with lists of tokens.

    Args:
        found: Effects on the logits.
    """
    words = found.words or {}
    columns: dict[str, Any] = {"latent": found.latents}
    for end in ("top", "bottom"):
        ids = getattr(found, f"{end}_tokens")
        columns[f"{end}_tokens"] = ids.tolist()
        columns[f"{end}_words"] = [[words.get(i, str(i)) for i in row] for row in ids.tolist()]
        columns[f"{end}_effects"] = getattr(found, f"{end}_effects").tolist()
        for value in ("p", "q"):
            columns[f"{value}_{end}"] = getattr(found, f"{value}_{end}")
    return columns


def in_words(result: EffectsResult) -> str:
    """Latents that stand out, the attributions, and the folder."""
    lines = [
        f"At {result.site}: of {result.n_latents:,} latents, {result.n_raising:,} raise and "
        f"{result.n_lowering:,} lower a token more than {result.n_random:,} random directions of "
        f"the same norm (false discovery rate {result.fdr:.0%})."
    ]
    if (e := result.unfrozen_difference) is not None:
        lines.append(
            f"The final norm frozen is {e.value:.1%} [{e.low:.1%}, {e.high:.1%}] from the norm as "
            "it is."
        )
    for each in result.attributions:
        strongest = ", ".join(map(str, each.latents[:5])) or "no latent"
        agreement = "" if each.rank_correlation is None or each.null is None else (
            f"; rank correlation with {each.rank_correlation.n} ablations "
            f"{each.rank_correlation.value:.2f}, permuted {each.null.value:.2f}"
        )  # fmt: skip
        lines.append(f"{each.sample}, {each.output}: latents {strongest}{agreement}.")
    return "\n".join([*lines, f"Folder: {result.out}"])
