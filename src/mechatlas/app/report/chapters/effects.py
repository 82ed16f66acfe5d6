"""Chapter on effects: tokens that features raise and lower, and answers attributed to features."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mechatlas.app.report.chapter import Chapter, number, part_for_each, percent
from mechatlas.app.report.dossiers import (
    Absence,
    FeatureAt,
    Finding,
    LogitLine,
    Statements,
    finite,
)
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.run_folder import EFFECTS, LOGITS
from mechatlas.base import Progress

if TYPE_CHECKING:
    from mechatlas.app.commands.effects import AttributedAnswer, EffectsResult

STRONGEST = 12
"""Features listed of each dictionary."""
SHOWN = 8
"""Tokens at each end in a dossier."""
IN_WORDS = 4
"""Tokens of a feature in a sentence."""
Table = dict[str, Any]


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw one part for every run of `mechatlas effects`.

    Raises:
        DiskError: A result is damaged.
    """
    silent: list[tuple["EffectsResult", str]] = []
    made = part_for_each(
        "Effects", runs.of_kind(EFFECTS), partial(_draw, runs, silent), on_progress,
        scripts=("effects.js",), shown=SHOWN,
    )  # fmt: skip
    if made is not None and silent:
        made.note(_absence(silent))
    return made


def _draw(
    runs: Runs, silent: list[tuple["EffectsResult", str]], made: Chapter, k: int, run: Run
) -> dict[str, Any]:
    """Draw a run; those without a finding are noted among the silent ones."""
    result: "EffectsResult" = run.typed_result()
    of_run, anchor = runs.dictionary_at(run.manifest["dictionary"]), f"effects-{k}"
    listed: list[dict[str, Any]] = []
    if run.has(LOGITS):
        table = run.table(LOGITS)
        listed = _strongest(table, result.fdr)
        if result.n_raising + result.n_lowering:
            made.note(_finding(result, listed, of_run, anchor))
        else:
            silent.append((result, anchor))
        made.statements.extend(_lines(result, table, of_run, anchor))
    made.data.append(of_run)
    answers = [_answer(each) for each in result.attributions]
    return {"result": result, "listed": listed, "answers": answers}


def _strongest(table: Table, fdr: float) -> list[dict[str, Any]]:
    """Features that stand out most; where none does, those with the largest rises."""
    q = np.minimum(table["q_top"], table["q_bottom"])
    largest = np.array([row[0] if row else 0.0 for row in table["top_effects"]])
    order = np.lexsort((-largest, q))[:STRONGEST].tolist()
    return [
        {
            "feature": int(table["latent"][i]),
            "raises": table["top_words"][i][:SHOWN],
            "lowers": table["bottom_words"][i][:SHOWN],
            "rise": float(largest[i]),
            "q_raises": float(table["q_top"][i]),
            "q_lowers": float(table["q_bottom"][i]),
            "significant": bool(q[i] <= fdr),
        }
        for i in order
    ]


def _absence(silent: list[tuple["EffectsResult", str]]) -> Absence:
    """Sum up all dictionaries without a feature that raises or lowers a token."""
    results, most = [result for result, _ in silent], max(r.null_top or 0 for r, _ in silent)
    sites = ", ".join(result.site for result in results)
    return Absence(
        text=f"Of {sum(r.n_latents for r in results):,} features of {sites}, none raises or lowers "
        "a token directly more than by chance.",
        power=f"False discovery rate {percent(results[0].fdr)} against {results[0].n_random:,} "
        f"random directions of the same norm, whose largest rise is {number(most)} in the median.",
        anchor=silent[0][1],
    )


def _finding(
    result: "EffectsResult", listed: list[dict[str, Any]], run: str, anchor: str
) -> Finding:
    """Sum up how many features write something in particular into the logits."""
    null = f"against {result.n_random:,} random directions of the same norm"
    frozen = "" if (e := result.unfrozen_difference) is None else (
        f"; freezing the final norm is off by {percent(e.value)} "
        f"[{percent(e.low)}, {percent(e.high)}]"
    )  # fmt: skip
    best = [one for one in listed if one["significant"]][:4]
    does = "raises" if best[0]["q_raises"] <= result.fdr else "lowers"
    words = ", ".join(word.strip() for word in best[0][does][:IN_WORDS])
    return Finding(
        text=f"Of {result.n_latents:,} features of {result.site}, {result.n_raising:,} raise and "
        f"{result.n_lowering:,} lower a token directly: feature {best[0]['feature']} {does} "
        f"{words}.",
        evidence=f"False discovery rate {percent(result.fdr)} {null}{frozen}.",
        anchor=anchor,
        rows=(tuple(FeatureAt(run, one["feature"]) for one in best),),
        strength=(result.n_raising + result.n_lowering) / result.n_latents,
    )


def _lines(result: "EffectsResult", table: Table, run: str, anchor: str) -> Statements:
    """Lines on the tokens of each feature."""
    statements: Statements = []
    for i, latent in enumerate(table["latent"].tolist()):
        ends = [
            [
                (word, finite(effect))
                for word, effect in zip(
                    table[f"{end}_words"][i][:SHOWN], table[f"{end}_effects"][i], strict=False
                )
            ]
            for end in ("top", "bottom")
        ]
        line = LogitLine(
            anchor=anchor, raises=ends[0], lowers=ends[1], q_raises=finite(table["q_top"][i]),
            q_lowers=finite(table["q_bottom"][i]), n_random=result.n_random, fdr=result.fdr,
        )  # fmt: skip
        statements.append((FeatureAt(run, latent), line))
    return statements


def _answer(answer: "AttributedAnswer") -> dict[str, Any]:
    """Window with the attribution at each token, and the features it rests on."""
    most = max((abs(value) for value in answer.positions), default=0.0) or 1.0
    return {
        "answer": answer,
        "tokens": [
            {"word": word, "value": value, "heat": round(abs(value) / most, 3)}
            for word, value in zip(answer.words, answer.positions, strict=True)
        ],
        "features": list(zip(answer.latents, answer.values, strict=True)),
    }
