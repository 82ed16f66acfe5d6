"""`mechatlas symmetry`: a dictionary and a store of posed activations -> classes and families.

The folder has `result.json`, `features.parquet` (a row for each feature), `symmetry.safetensors`
(stabilizer functions, spectra and the untransformed blocks, which the page draws), and
`manifest.json`.
"""

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import tyro
from tyro.conf import Positional, arg

from mechatlas.analysis.symmetry.class_names import NOT_RELIABLE
from mechatlas.analysis.symmetry.classify import FDR, Symmetry, count_shuffled_discoveries, symmetry
from mechatlas.analysis.symmetry.control_comparison import compare_with_control
from mechatlas.analysis.symmetry.shift_evidence import EQUALITY_THRESHOLD, SUPPORT_THRESHOLD
from mechatlas.app import swapping
from mechatlas.app.posed import Learnt, Posed, learn, manifest_of, measure, open_posed, said_of
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import finish, refuse_strangers, write_table, write_tensors
from mechatlas.base import RecipeError
from mechatlas.files import checksum, read_json, write_json
from mechatlas.maths.actions import Rotate
from mechatlas.maths.groups import Group

KIND = "symmetry"
TENSORS = "symmetry.safetensors"
TABLE = "features.parquet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetryConfig:
    """Classify the features of a dictionary by what leaves them unchanged.

    Examples:  mechatlas symmetry runs/crosscoder --store runs/posed --out runs/symmetry
               mechatlas symmetry sae.safetensors --store runs/posed --site mixed3b --out runs/sym
    """

    dictionary: Annotated[Positional[Path], arg(metavar="DICT")]
    """A group crosscoder, or any dictionary that reads the untransformed activations, in any
    supported format."""
    store: Path
    """Store collected with a [group], which has the activations of every input in all poses."""
    out: Path
    """Folder for the result."""
    site: str | None = None
    """Site of the store; by default the one that the dictionary was trained on."""
    fdr: float = FDR
    """False discovery rate of the claim that something leaves a feature unchanged."""
    equality_threshold: float = EQUALITY_THRESHOLD
    """How alike two blocks must be to count as equal: cosine, corrected for noise."""
    interventions: int = 40
    """Features whose pose is swapped inside the network, if its recipe can still be followed."""
    downstream: str | None = None
    """Site where answers to swaps are compared, or "output" for the network's; by default the next
    module after the site that has the same parent."""
    control: Path | None = None
    """Result of this command for the same site of the network with weights drawn anew: says of
    which classes there are more or fewer here."""
    seed: int = 0
    """Seed of the nulls, and of the features that are swapped."""


def run(words: list[str]) -> tuple[dict[str, Any], str]:
    """Classify, from the words of the command line."""
    result = find_symmetry(tyro.cli(SymmetryConfig, args=words, prog="mechatlas symmetry"))
    return result, in_words(result)


def in_words(result: dict[str, Any]) -> str:
    """What was found."""
    counts = ", ".join(f"{n} {name}" for name, n in result["classes"].items())
    ceiling = result["noise_ceiling"]
    told = "not known" if ceiling is None else f"{ceiling:.2f}"
    r2 = {way: "unknown" if v is None else f"{v:.3f}" for way, v in result["r2_mean"].items()}
    return "\n".join([
        f"{result['n_features']} features under {result['group']['name']}: {counts}.",
        f"{result['discoveries']} have a symmetry at a false discovery rate of {result['fdr']:.0%} "
        f"({result['discoveries_shuffled']} with shuffled pairing); median noise ceiling {told}.",
        f"{result['families']} families of two or more hold {result['features_in_families']}.",
        f"R2 of other poses, held out: dictionary {r2['dictionary']}, linear map {r2['linear']}, "
        f"the activation itself {r2['invariant']}, shuffled pairing {r2['shuffled']}.",
        *([READS_ALL] if result["reads"] == "all poses" else []),
        *([] if result["group"]["closes"] else [NO_GROUP.format(**result["group"])]),
        *([_blurred_in_words(**result["interpolation"])] if result["interpolation"] else []),
        *([control_in_words(result["control"])] if result["control"] else []),
        swapping.in_words(result["causal"]),
        f"Result: {result['out']}",
    ])  # fmt: skip


def _blurred_in_words(*, matched_blur: bool, quarters: float | None, between: float) -> str:
    """What to think of turns that interpolate."""
    beside = "" if quarters is None else f", after quarter-turns to {quarters:.3f}"
    return f"After turns that interpolate features are alike to {between:.3f}{beside}; " + (
        "all poses are as blurred." if matched_blur else "the control is `matched_blur`."
    )


def control_in_words(control: dict[str, Any]) -> str:
    """Of which classes there are more or fewer than in the control."""
    here, there = control["reliable"]
    told = "; ".join(
        "{name} {share:.1%} and {share_control:.1%} (q {q_value:.2g})".format(**each)
        for each in control["classes"]
        if each["q_value"] <= FDR
    )
    return (
        f"Reliable features here ({here}) and in the control ({there}): "
        f"{told or 'no class differs'}."
    )


def _control_of(folder: Path, posed: Posed) -> list[str]:
    """The class of each feature of a control.

    Raises:
        RecipeError: The folder is no result of this command, or one for another site or group.
    """
    manifest = manifest_of(folder)
    if manifest.get("kind") != KIND or not (folder / TABLE).is_file():
        raise RecipeError(f"--control {folder} is no result of `mechatlas symmetry`.")
    its, site = manifest["group"], read_json(folder / "result.json")["site"]
    found = (its["table"], its["action"], site)
    if found != (posed.group.table.tolist(), posed.action, posed.site):
        raise RecipeError(
            f"--control {folder} is one for {site} under {its['name']} ({its['action']}), but this "
            f"is {posed.site} under {posed.group.name} ({posed.action})."
        )
    return pq.read_table(folder / TABLE)["class"].to_pylist()


READS_ALL = "The dictionary is pose-tied and reads all poses; the linear map reads one."
NO_GROUP = (
    "The store's manifest says `closes: false`: steps of {action} do not return to the start, so "
    "{name} only labels them, and no subgroup of it need be a symmetry."
)


def find_symmetry(recipe: SymmetryConfig) -> dict[str, Any]:
    """Classify the features of a dictionary.

    Raises:
        DiskError: `out` holds something else, or cannot be written.
        InputError: All samples are cut from images of one half.
        RecipeError: A choice is out of range, the control is none, or no site was named and there
            are several.
        SiteError: There is no such site downstream.
        StoreError: The store has no group, is damaged, or does not fit the dictionary.
        WeightsError: The dictionary cannot be read, or is one for another group.
    """
    clock = time.process_time()
    if not 0 < recipe.fdr < 1:
        raise RecipeError(f"--fdr must lie between 0 and 1, got {recipe.fdr}.")
    if not SUPPORT_THRESHOLD < recipe.equality_threshold <= 1:
        raise RecipeError(
            f"--equality-threshold must be above {SUPPORT_THRESHOLD:.4f} and at most 1, "
            f"got {recipe.equality_threshold}."
        )
    if recipe.interventions < 0:
        raise RecipeError(f"--interventions must be at least 0, got {recipe.interventions}.")
    refuse_strangers(recipe.out, KIND)
    posed = open_posed(recipe.dictionary, recipe.store, recipe.site)
    control_names = _control_of(recipe.control, posed) if recipe.control else None
    bench = swapping.prepare(
        posed.rows.store, posed.site, recipe.downstream, wanted=recipe.interventions > 0
    )
    learnt = learn(posed, recipe.seed)
    with bar("comparing features") as progress:
        found = symmetry(
            learnt.blocks, posed.group, learnt.halves, fdr=recipe.fdr,
            equality_threshold=recipe.equality_threshold,
            seed=recipe.seed, acts_by_rotation=posed.action == Rotate.name, on_progress=progress,
        )  # fmt: skip
    shuffled = count_shuffled_discoveries(
        learnt.halves,
        posed.group,
        fdr=recipe.fdr,
        equality_threshold=recipe.equality_threshold,
        seed=recipe.seed,
    )
    r2, held, n_held = measure(posed, learnt)
    causal, swapped = swapping.check(
        bench, held, found, learnt.blocks, lambda codes: said_of(posed, learnt, codes),
        n_features=recipe.interventions, seed=recipe.seed,
    )  # fmt: skip
    result = {
        **_summary(found),
        "discoveries_shuffled": shuffled,
        "agreement": _agreement(learnt, found),
        "group": _described(posed),
        "interpolation": _interpolation(posed, found),
        "site": posed.site,
        "blocks": "estimated from codes" if posed.own_blocks is None else "decoder",
        "reads": "all poses" if posed.tied else "the untransformed input",
        "rows": int(learnt.rows.sum()),
        "rows_of_halves": learnt.rows.tolist(),
        "held_out_rows": n_held,
        "r2": r2,
        "r2_mean": {way: _mean_of_others(values, posed.group) for way, values in r2.items()},
        "causal": causal,
        "control": None
        if control_names is None
        else {
            "folder": str(recipe.control),
            "reliable": [
                len(names) - names.count(NOT_RELIABLE) for names in (found.names, control_names)
            ],
            "classes": [
                dataclasses.asdict(each)
                for each in compare_with_control(found.names, control_names, found.class_names)
            ],
        },
    }
    _write(recipe, posed, found, learnt, swapped)
    return finish(recipe.out, recipe, result, clock)


def _mean_of_others(values: list[float | None], group: Group) -> float | None:
    """Mean over the elements that do something."""
    kept = [v for g, v in enumerate(values) if g != group.identity and v is not None]
    return round(float(np.mean(kept)), 6) if kept else None


def _agreement(learnt: Learnt, found: Symmetry) -> float | None:
    """Median cosine of decoder blocks with those estimated from codes, corrected for noise."""
    blocks, mean = learnt.blocks, learnt.halves.mean(axis=0)
    lengths = np.sqrt(np.einsum("igk,igk->i", mean, mean) * np.einsum("igk,igk->i", blocks, blocks))
    kept = found.reliable & (lengths > 0)
    if not kept.any():
        return None
    cosine = np.einsum("igk,igk->i", mean, blocks)[kept] / lengths[kept]
    return float(np.median(cosine / np.sqrt(np.maximum(found.reliability[kept], 1e-6))))


def _summary(found: Symmetry) -> dict[str, Any]:
    counts = Counter(found.names)
    sizes = np.bincount(found.families)
    ceilings = found.noise_ceiling[~np.isnan(found.noise_ceiling)]
    quartiles = np.quantile(ceilings, [0.25, 0.5, 0.75]).tolist() if len(ceilings) else [None] * 3
    order = [*found.class_names, NOT_RELIABLE]
    return {
        "n_features": len(found.stabilizers),
        "classes": {name: counts[name] for name in order if counts[name]},
        "fdr": found.fdr,
        "equality_threshold": found.equality_threshold,
        "discoveries": found.n_discoveries,
        "reliable": int(found.reliable.sum()),
        "noise_ceiling": quartiles[1],
        "noise_ceiling_quartiles": [quartiles[0], quartiles[2]],
        "noise_inflation": found.variance_inflation,
        "families": int((sizes > 1).sum()),
        "features_in_families": int(sizes[sizes > 1].sum()),
        "largest_family": int(sizes.max(initial=0)),
        "chance_likeness": found.chance_similarity,
    }


def _described(posed: Posed) -> dict[str, Any]:
    return {
        "name": posed.group.name,
        "order": posed.group.order,
        "action": posed.action,
        "closes": bool(posed.described.get("closes", True)),
    }


def _interpolation(posed: Posed, found: Symmetry) -> dict[str, Any] | None:
    """How alike features are after turns that compute pixels, and after those that move them."""
    quarters = np.array(posed.described.get("exact", [True]))
    if quarters.all() or posed.action != Rotate.name:
        return None
    s = found.stabilizer_function.mean(axis=0).round(6)
    others = quarters & (np.arange(posed.group.order) != posed.group.identity)
    return {
        "matched_blur": bool(posed.described["matched_blur"]),
        "quarters": float(s[others].mean()) if others.any() else None,
        "between": float(s[~quarters].mean()),
    }


def _write(
    recipe: SymmetryConfig,
    posed: Posed,
    found: Symmetry,
    learnt: Learnt,
    swapped: dict[str, np.ndarray],
) -> None:
    group = posed.group
    table = write_table(recipe.out / TABLE, {**_columns(found, learnt.active), **swapped})
    tensors = write_tensors(
        recipe.out / TENSORS,
        {
            "stabilizer_function": found.stabilizer_function.astype(np.float32),
            "errors": np.minimum(found.standard_errors, 1e6).astype(np.float32),
            "spectrum": found.spectrum.astype(np.float32),
            "atoms": learnt.blocks[:, group.identity].astype(np.float32),
        },
    )
    manifest = {
        "schema": 1,
        "kind": KIND,
        "dictionary": str(recipe.dictionary.resolve()),
        "store": str(recipe.store.resolve()),
        "parents": {"store": checksum((recipe.store / "manifest.json").read_bytes())},
        "group": {
            "name": group.name,
            "table": group.table.tolist(),
            "elements": list(group.element_names),
            "action": posed.action,
            "classes": list(found.class_names),
        },
        "files": {TABLE: checksum(table), TENSORS: checksum(tensors)},
    }
    write_json(recipe.out / "manifest.json", manifest)


def _columns(found: Symmetry, active: np.ndarray) -> dict[str, np.ndarray | list[Any]]:
    names = found.group.element_names
    orders = [len(each) for each in found.stabilizers]
    return {
        "feature": np.arange(len(orders), dtype=np.int32),
        "stabilizer": [found.class_names[c] for c in found.classes],
        "stabilizer_order": np.array(orders, np.int32),
        "stabiliser": [found.class_names[c] for c in found.classes],
        "stabiliser_order": np.array(orders, np.int32),
        "stabilizer_elements": [sorted(each) for each in found.stabilizers],
        "class": found.names,
        "family": found.families.astype(np.int32),
        "family_size": np.bincount(found.families)[found.families].astype(np.int32),
        "reference": found.references.astype(np.int32),
        "pose": found.poses.astype(np.int32),
        "pose_name": [names[pose] for pose in found.poses],
        "likeness": found.similarity_to_reference,
        "p_value": found.p_values,
        "q_value": found.q_values,
        "reliable": found.reliable,
        "noise_ceiling": found.noise_ceiling,
        "reliability": found.reliability,
        "rows_active": active,
    }
