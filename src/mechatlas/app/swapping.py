"""The causal check of `mechatlas symmetry`: swap poses of features inside the network.

    prepare    the network of a store, and the module where answers are compared
    Held       codes of held-out rows, and where the rows are
    check      features, held-out rows and a store -> facts for `result.json`, columns of the table
    in_words   what was found

The network and the samples are those of the store's recipe. Where they are no longer there, or have
changed, there is no check, and `missing` says why.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from mechatlas.activations.networks import digest
from mechatlas.activations.posing import PoseConfig, action_of, places_of
from mechatlas.activations.samples import Samples
from mechatlas.activations.sites import find_sites
from mechatlas.activations.store import Store
from mechatlas.analysis.symmetry.classify import Symmetry
from mechatlas.analysis.symmetry.interchange import (
    MIN_NULLS,
    MIN_SAMPLES,
    InterchangeEffects,
    PosedNetwork,
    TrialRows,
    draw_trials,
    intervene_on_poses,
    usable_elements,
)
from mechatlas.app.progress import bar
from mechatlas.app.recipes import CollectConfig, from_dict, reopen
from mechatlas.base import Site, StoreError, UserError
from mechatlas.maths.statistics import proportion

MOST_ROWS = 20_000
"""Held-out rows whose codes are kept."""
OUTPUT = "output"
"""What the output of the network is called."""
COLUMNS = (
    "swap_alignment", "swap_null", "swap_wrong_pose", "swap_p_value", "swap_q_value",
    "swap_pose_p_value", "swap_pose_q_value", "swap_change",
)  # fmt: skip


class Held:
    """Codes of the first held-out rows, and where the rows are in maps of some width."""

    def __init__(self, width: int) -> None:
        self.n, self._width = 0, width
        self._codes: list[sparse.csr_array] = []
        self._where: list[np.ndarray] = []

    def add(self, codes: Tensor, where: Tensor) -> None:
        """Take in some rows, until there are enough."""
        kept = codes[: MOST_ROWS - self.n]
        if len(kept):
            self._codes.append(sparse.csr_array(kept.float().numpy()))
            self._where.append(where[: len(kept)].numpy().astype(np.int64))
            self.n += len(kept)

    @property
    def codes(self) -> sparse.csr_array:
        """A row for each place, a column for each latent."""
        return sparse.csr_array(sparse.vstack(self._codes))

    @property
    def where(self) -> tuple[np.ndarray, np.ndarray]:
        """Sample and flat position of each row."""
        sample, y, x = np.concatenate(self._where).T
        return sample, y * self._width + x


Result = dict[str, Any]


def prepare(store: Store, site: str, downstream: str | None, *, wanted: bool) -> PosedNetwork | str:
    """The network and where to look at it, or why there is no check; a sample is passed through.

    Args:
        store: Its network and samples are used.
        site: Where features are swapped.
        downstream: Where answers are compared, or "output"; by default the next module.
        wanted: Whether a check is asked for.

    Raises:
        InputError: The sample cannot be read.
        SiteError: There is no such site downstream.
    """
    if not wanted:
        return "Not asked for (--interventions 0)."
    try:
        network, samples, posing = _reopened(store)
    except UserError as error:
        return str(error)
    action, where = action_of(posing), Site.parse(site)
    inputs = samples.stack([samples.read(store.samples("train", 1)[0])])
    after = _after(network, where, inputs, downstream)
    return PosedNetwork(
        network, samples, action, where, after, places_of(action, network, where, inputs)
    )


def check(
    bench: PosedNetwork | str,
    held: Held,
    found: Symmetry,
    blocks: np.ndarray,
    say: Callable[[Tensor], Tensor],
    *,
    n_features: int,
    seed: int,
) -> tuple[Result, dict[str, np.ndarray]]:
    """Swap the poses of features and compare what follows with the answer to posed inputs.

    Args:
        bench: The network, or why there is none.
        held: Codes; the first columns are those of the features.
        found: The features.
        blocks: Their blocks.
        say: What the dictionary makes of codes, in every pose.
        most: Features that are drawn.
        seed: Of the draw.

    Returns:
        What `result.json` says, and columns for the table: NaN where nothing was swapped.

    Raises:
        InputError: Nothing downstream depends on the site, or a sample cannot be read.
    """
    nothing = {name: np.full(len(blocks), np.nan) for name in COLUMNS}
    if isinstance(bench, str):
        return {"missing": bench}, nothing
    codes, (sample, position) = held.codes, held.where
    elements = usable_elements(bench.places, bench.action)
    eligible, others = _features(found, blocks, elements)
    if not elements.any():
        return {"missing": "No pose moves whole positions."}, nothing
    if len(others) < 2:
        return {"missing": "There are too few features."}, nothing
    trials = draw_trials(
        sparse.csr_array(codes[:, : len(blocks)]), sample, eligible, found.stabilizers,
        elements, found.group, n_features=n_features, seed=seed,
    )  # fmt: skip
    used, index = np.unique(trials.row, return_inverse=True)
    said = np.zeros((len(used), *blocks.shape[1:]), np.float32)
    if len(used):
        said[:] = say(torch.from_numpy(codes[used].toarray())).numpy().reshape(said.shape)
    rows = TrialRows(sample[used], position[used], said)
    with bar("swapping poses") as progress:
        swaps = intervene_on_poses(
            bench, dataclasses.replace(trials, row=index), rows, blocks, found.stabilizers, others,
            seed=seed, on_progress=progress,
        )  # fmt: skip
    names = [name for name, used in zip(found.group.element_names, elements, strict=True) if used]
    facts = {"downstream": str(bench.downstream) or OUTPUT, "elements": names}
    return {**facts, **_facts(swaps, found)}, _columns(swaps, len(blocks))


def _columns(swaps: InterchangeEffects, n_features: int) -> dict[str, np.ndarray]:
    """Columns of the table: NaN where nothing was swapped."""
    measured = (
        swaps.alignment, swaps.null_alignment.mean(axis=1), swaps.wrong_pose_alignment,
        swaps.p_values, swaps.q_values, swaps.pose_p_values, swaps.pose_q_values,
        swaps.symmetric_change,
    )  # fmt: skip
    columns = {}
    for name, values in zip(COLUMNS, measured, strict=True):
        columns[name] = np.full(n_features, np.nan)
        columns[name][swaps.symmetric if name == "swap_change" else swaps.features] = values
    return columns


def _reopened(store: Store) -> tuple[nn.Module, Samples, PoseConfig]:
    """The network, the samples and the recipe of the poses.

    Raises:
        RecipeError: The store was not made by `mechatlas collect`.
        StoreError: The network has changed, or the recipe poses nothing.
        UserError: The network or the samples are no longer there.
    """
    recipe = store.manifest["recipe"]
    posing = from_dict(recipe, CollectConfig, "The store's manifest").group
    if posing is None:
        raise StoreError(f"The recipe of {store.root} poses nothing.")
    network, samples = reopen(recipe)
    if digest(network) != store.manifest["network"]:
        raise StoreError(
            f"The network found now has other weights than when {store.root} was made."
        )
    return network, samples, posing


def _after(network: nn.Module, site: Site, inputs: Tensor, asked: str | None) -> Site:
    """Where answers are compared: by default the next module with the same parent.

    Raises:
        SiteError: There is no site of the name asked for.
    """
    if asked is not None:
        return Site("") if asked == OUTPUT else find_sites(network, [asked])[0]
    parent = site.module.rpartition(".")[0]
    called: list[str] = []
    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.get_submodule(parent).named_children():
            note = functools.partial(lambda name, *_: called.append(name), name)
            hooks.callback(module.register_forward_hook(note).remove)
        network(inputs)
    own = site.module.rpartition(".")[2]
    later = called[called.index(own) + 1 :] if own in called else []
    following = [name for name in later if name != own]
    return Site(f"{parent}.{following[0]}".strip(".")) if following else Site("")


def _features(
    found: Symmetry, blocks: np.ndarray, elements: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Features that something is claimed of, and those that the null is drawn from."""
    sizes = np.bincount(found.families)[found.families]
    live = np.square(blocks).sum(axis=(1, 2)) > 0
    eligible = np.flatnonzero((found.reliable | (sizes > 1)) & live)
    moving = set(np.flatnonzero(elements).tolist())
    others = np.array([i for i in eligible if moving - found.stabilizers[i]], int)
    return eligible, others if len(others) > MIN_NULLS else np.flatnonzero(live)


def _facts(swaps: InterchangeEffects, found: Symmetry) -> Result:
    passed = swaps.q_values <= found.fdr
    least = swaps.alignment[passed].min(initial=np.inf)
    null = swaps.null_alignment[np.isfinite(swaps.null_alignment)]
    return {
        **_share(swaps.q_values, found.fdr),
        "share_of_null": _number(np.mean(null >= least) if len(null) else np.nan),
        "pose": _share(swaps.pose_q_values, found.fdr),
        "alignment": _median(swaps.alignment),
        "alignment_null": _median(null),
        "alignment_wrong_pose": _median(swaps.wrong_pose_alignment),
        "repaired": _median(swaps.recovered),
        "repaired_null": _median(swaps.null_recovered.ravel()),
        "repaired_together": _number(swaps.recovered_by_all),
        "symmetric": len(swaps.symmetric),
        "change_if_unchanged": _median(swaps.symmetric_change),
        "change_of_others": _median(swaps.change),
        "classes": _by_class([found.names[i] for i in swaps.features], passed),
    }


def _share(q: np.ndarray, rate: float) -> Result:
    """Features tested and passed, and the share with its interval."""
    passed, tested = int((q <= rate).sum()), int(np.isfinite(q).sum())
    share = proportion(passed, tested)
    return {
        "tested": tested,
        "passed": passed,
        "share": _number(share.value),
        "low": share.low,
        "high": share.high,
    }


def _by_class(names: list[str], passed: np.ndarray) -> dict[str, dict[str, int]]:
    """Features tested and passed of each class."""
    tested, stood = Counter(names), Counter(n for n, ok in zip(names, passed, strict=True) if ok)
    return {name: {"tested": n, "passed": stood[name]} for name, n in tested.most_common()}


def _median(values: np.ndarray) -> float | None:
    kept = values[np.isfinite(values)]
    return _number(np.median(kept)) if len(kept) else None


def _number(value: Any) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def in_words(causal: Result) -> str:
    """What was found."""
    if "missing" in causal:
        return f"Poses were not swapped inside the network: {causal['missing']}"
    if not causal["tested"]:
        return (
            f"Poses were not swapped inside the network: no feature of which something is claimed "
            f"was active on {MIN_SAMPLES} held-out samples."
        )
    pose = causal["pose"]
    told = (
        f"Poses swapped inside the network: {causal['passed']} of {causal['tested']} features "
        f"bring {causal['downstream']} nearer its answer to the posed input than other features do "
        f"({causal['low']:.0%} to {causal['high']:.0%}; of the others "
        f"{causal['share_of_null']:.1%} do), {pose['passed']} of {pose['tested']} nearer than they "
        f"do in a wrong pose ({pose['low']:.0%} to {pose['high']:.0%})."
    )
    if causal["change_if_unchanged"] is not None:
        told += (
            f" Swaps that should change nothing change {causal['change_if_unchanged']:.2f} of what "
            "removing the feature does"
        )
        other = causal["change_of_others"]
        told += "." if other is None else f", others {other:.2f}."
    return told
