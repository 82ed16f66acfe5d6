"""`mechatlas branches`: which branch of its site each feature of a dictionary belongs to.

The folder has `features.parquet` (a row for each feature and branch), `result.json`, the picture
of the decoder in `picture.json`, `recipe.toml` and `manifest.json`.
"""

import dataclasses
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tyro.conf import Positional, arg

from mechatlas.activations.store import Store, StoreRows
from mechatlas.analysis.branches.drive import ROWS_AT_ONCE, Drive, drive
from mechatlas.analysis.branches.specialization import (
    Specialization,
    Spectrum,
    branches,
    by_lot,
    power,
    spectrum,
)
from mechatlas.analysis.branches.summary import (
    Agreement,
    consistency,
    enriched,
    svd_order,
)
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import BRANCHES, Result, finish, refuse_strangers, write_table
from mechatlas.base import DiskError, InputError, RecipeError, StoreError
from mechatlas.dictionaries.formats import load
from mechatlas.files import checksum, read_json, write_json
from mechatlas.maths.statistics import proportion

ROWS = 16_384
LABELS_SHOWN = 50
"""Labels in `result.json`, surest first."""
PICTURE_ROWS = 160
"""Rows of the picture of a decoder; each is the mean of neighbours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchesConfig:
    """Test every feature of a dictionary for a branch of its own.

    Examples:  mechatlas branches runs/mixed4a --store runs/store --out runs/branches4a
               mechatlas branches sae.safetensors --site mixed4a --store runs/store --out out
               mechatlas branches runs/4a --store runs/store --match runs/match --out out
    """

    dictionary: Annotated[Positional[Path], arg(metavar="DICT")]
    """Folder or file of a dictionary, in any supported format, of a whole site with branches."""
    store: Path
    """Store that has the site."""
    out: Path
    """Folder for the result."""
    site: str | None = None
    """Site that the dictionary reads, if its file does not say."""
    rows: int = ROWS
    """Rows of the store for variances, and for what each branch does to the features."""
    rate: float = 0.05
    """False discovery rate at which a feature counts as specialised."""
    labels: str | None = None
    """Labels to look for in the branches, as FILE.parquet:COLUMN; a column `feature` says which
    feature each row is of, otherwise rows are in the order of features."""
    match: Path | None = None
    """What `mechatlas match --cost codes` wrote for this dictionary and those of other layers: do
    features stay in the same kind of branch?"""
    seed: int = 0
    """Seed of the controls."""


def in_words(result: Result) -> str:
    """What was found."""
    lines = [
        f"{result['site']}: {result['specialised']} of {result['tested']} features specialised to "
        f"a branch (false discovery rate {result['rate']:.0%}); with their channels drawn by lot "
        f"{result['specialised_by_lot']}"
    ]
    lines += [
        f"  {one['name']:12} {one['width']:4} channels, expected share "
        f"{one['expected_share']:.2f}: {one['specialised']} specialised{_found(one['power'])}"
        for one in result["branches"]
    ]
    for one in result.get("consistency", []):
        kinds = {
            "specialised features": one,
            "all features, by the branch they lean to": one["leaning"],
        }
        lines += [
            f"  {one['a']} -> {one['b']}: {same['pairs']} matched pairs of {which}, same branch in "
            f"{same['value']:.0%} [{same['low']:.0%}, {same['high']:.0%}], by chance "
            f"{same['chance']:.0%}"
            for which, kind in kinds.items()
            if (same := kind["same_branch"])["pairs"]
        ]
    return "\n".join([*lines, f"Result: {result['out']}"])


def _found(power: float | None) -> str:
    return "" if power is None else f" ({power:.0%} found of features moved there)"


@dataclasses.dataclass(frozen=True, eq=False)
class _Opened:
    """A dictionary with the rows of its site."""

    name: str
    dictionary: Any
    rows: StoreRows
    branches: dict[str, slice]


def run(recipe: BranchesConfig) -> Result:
    """Test every feature against the null, and measure what its branches do.

    Raises:
        DiskError: `out` holds something else, or cannot be written.
        InputError: The dictionary has only one branch to read.
        RecipeError: A choice makes no sense, or the site is not known.
        StoreError: The store misses the site, or the site has no branches.
    """
    clock = time.process_time()
    if not 0 < recipe.rate < 1 or recipe.rows < 2:
        raise RecipeError(
            f"--rate must lie between 0 and 1 (got {recipe.rate}) and --rows be at least 2 "
            f"(got {recipe.rows})."
        )
    refuse_strangers(recipe.out, BRANCHES)
    store = Store(recipe.store)
    opened = _open(recipe.dictionary, store, recipe.site)
    labels = None if recipe.labels is None else _labels(recipe.labels, opened.dictionary.n_latents)
    pairs = [] if recipe.match is None else _pairs(recipe.match, recipe.dictionary)
    known = spectrum(x for x, _ in _read(opened.rows, recipe.rows))
    with bar("setting branches to their mean") as progress:
        driven = drive(
            opened.dictionary,
            _read(opened.rows, recipe.rows),
            opened.branches,
            known.mean,
            n_rows=known.n_rows,
            on_progress=progress,
        )
    alive = driven.active > 0
    found = branches(opened.dictionary, opened.branches, known, tested=alive)
    result: Result = {"site": opened.rows.site, "rate": recipe.rate}
    result |= _summary(recipe, opened, known, driven, found)
    if labels is not None:
        result["labels"] = _label_facts(recipe, found, labels, alive)
    if pairs:
        result["consistency"] = [_consistency(recipe, store, pair, found) for pair in pairs]
    table = _table(found, driven)
    files = {"features.parquet": checksum(write_table(recipe.out / "features.parquet", table))}
    write_json(recipe.out / "picture.json", _picture(opened, known))
    manifest = {
        "schema": 1,
        "kind": BRANCHES,
        "site": opened.rows.site,
        "dictionary": str(recipe.dictionary.resolve()),
        "store": str(recipe.store.resolve()),
        "parents": {"store": checksum((recipe.store / "manifest.json").read_bytes())},
        "files": files,
    }
    write_json(recipe.out / "manifest.json", manifest)
    return finish(recipe.out, recipe, result, clock)


def _open(path: Path, store: Store, site: str | None) -> _Opened:
    """Read a dictionary and find the branches of its site.

    Raises:
        InputError: It reads one branch only.
        RecipeError: Its site is not known, or another than `site`.
        StoreError: The store misses the site, or the site has no branches, or another width.
    """
    dictionary = load(path)
    manifest = path / "manifest.json"
    told = read_json(manifest).get("site") if manifest.is_file() else None
    if site and told and site != told:
        raise RecipeError(
            f"{path} says that it reads {told}, --site says {site}. Leave --site out."
        )
    site = site or told or getattr(dictionary, "site", None)
    if site is None and len(store.sites) == 1:
        site = store.sites[0]
    if site is None:
        raise RecipeError(
            f"{path} does not say which site it reads. Add --site SITE; {store.root} has "
            f"{', '.join(store.sites)}."
        )
    rows = store.rows(site)
    if rows.d_in != rows.shape.width:
        raise InputError(
            f"{path} reads the branch {site} alone, so all of every feature is in that branch and "
            f"there is nothing to compare. Give a dictionary of {rows.site}; to find the features "
            "of a branch in it, use `mechatlas match`."
        )
    if not rows.shape.branches:
        have = [name for name, shape in store.shapes.items() if shape.branches]
        raise StoreError(
            f"{site} has no named branches. Sites of {store.root} that have some: "
            f"{', '.join(have) or 'none'}."
        )
    if dictionary.d_in != rows.d_in or dictionary.d_out != rows.d_in:
        raise StoreError(
            f"{store.root} has {rows.d_in} numbers a row at {site}; {path} reads "
            f"{dictionary.d_in} and writes {dictionary.d_out}."
        )
    named = {name: slice(*ends) for name, ends in rows.shape.branches.items()}
    return _Opened(path.name, dictionary, rows, named)


def _read(rows: StoreRows, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first rows of a store, with the sample of each; they are stored shuffled."""
    missing = min(most, rows.n_rows + rows.n_held_out)
    for batch, where in rows.scan():
        if missing <= 0:
            return
        yield batch.x[:missing], where[:missing, 0].long()
        missing -= min(missing, len(batch.x))


def _summary(
    recipe: BranchesConfig, opened: _Opened, known: Spectrum, driven: Drive, found: Specialization
) -> Result:
    alive = driven.active > 0
    stands, home = found.specialised(recipe.rate), found.branch_of(recipe.rate)
    chance = by_lot(opened.dictionary, opened.branches, known, tested=alive, seed=recipe.seed)
    drawn = chance.specialised(recipe.rate)
    seen = power(
        opened.dictionary, opened.branches, known, tested=alive, rate=recipe.rate, seed=recipe.seed
    )
    tested = int((~np.isnan(found.q_values)).any(axis=1).sum())
    listed = []
    for k, (name, s) in enumerate(opened.branches.items()):
        share = proportion(int(stands[:, k].sum()), max(tested, 1))
        listed.append(
            {
                "name": name,
                "first": s.start,
                "last": s.stop,
                "width": s.stop - s.start,
                "expected_share": _first_number(found.expected[:, k]),
                "mean_share": _mean(found.share[:, k]),
                "specialised": int(stands[:, k].sum()),
                "specialised_share": share.value,
                "low": share.low,
                "high": share.high,
                "home_of": int((home == k).sum()),
                "specialised_by_lot": int(drawn[:, k].sum()),
                "power": None if np.isnan(seen[k]) else float(seen[k]),
            }
        )
    n, by_chance = int(stands.any(axis=1).sum()), int(drawn.any(axis=1).sum())
    return {
        "branches": listed,
        "n_features": len(home),
        "tested": tested,
        "never_active": int((~alive).sum()),
        "specialised": n,
        "specialised_by_lot": by_chance,
        "false_discovery_rate_by_lot": min(1.0, by_chance / n) if n else None,
        "rows": driven.n_rows,
        "positive": not known.signed,
        "shares_agree": _rank_correlations(found, driven),
    }


def _first_number(values: np.ndarray) -> float:
    return float(values[~np.isnan(values)][0]) if (~np.isnan(values)).any() else 0.0


def _mean(values: np.ndarray) -> float | None:
    return float(np.nanmean(values)) if (~np.isnan(values)).any() else None


def _rank_correlations(found: Specialization, driven: Drive) -> dict[str, float | None]:
    """Do the three shares order the features of a branch alike? Mean rank correlation."""
    from scipy import stats

    told: dict[str, float | None] = {}
    others = {"activation": driven.activation, "ablation": driven.ablation}
    for name, other in others.items():
        values = []
        for k in range(len(found.names)):
            both = (
                np.isfinite(found.share[:, k]) & np.isfinite(other.value[:, k])
                if other
                else np.zeros(len(found.share), dtype=bool)
            )
            if other and both.sum() > 2 and np.ptp(other.value[both, k]) > 0:
                r = stats.spearmanr(found.share[both, k], other.value[both, k])
                values.append(float(np.asarray(r)[0]))
        told[name] = float(np.mean(values)) if values else None
    return told


def _table(found: Specialization, driven: Drive) -> dict[str, np.ndarray | list[Any]]:
    n, b = found.share.shape
    columns: dict[str, np.ndarray | list[Any]] = {
        "feature": np.repeat(np.arange(n), b),
        "branch": list(found.names) * n,
        "share": found.share.ravel(),
        "expected_share": found.expected.ravel(),
        "p_value": found.p_values.ravel(),
        "q_value": found.q_values.ravel(),
        "excess": found.excess.ravel(),
        "low": found.low.ravel(),
        "high": found.high.ravel(),
        "lumps": found.lumps.ravel(),
    }
    for name, shares in (("activation", driven.activation), ("ablation", driven.ablation)):
        empty = np.full(n * b, np.nan)
        columns[f"{name}_share"] = empty if shares is None else shares.value.ravel()
        columns[f"{name}_low"] = empty if shares is None else shares.low.ravel()
        columns[f"{name}_high"] = empty if shares is None else shares.high.ravel()
    columns["active_rows"] = np.repeat(driven.active, b)
    return columns


def _picture(opened: _Opened, known: Spectrum) -> dict[str, Any]:
    """The decoder as a picture: rows and channels sorted by what distinguishes them."""
    atoms = opened.dictionary.W_dec.detach().float().cpu().numpy().astype(np.float64)
    part = np.abs(atoms) if known.signed else np.maximum(atoms, 0)
    length = np.sqrt(np.square(part).sum(axis=1, keepdims=True))
    unit = part[length[:, 0] > 0] / length[length[:, 0] > 0]
    if min(unit.shape) < 2:
        return {}
    order = svd_order(unit)
    sorted_rows = unit[order.rows][:, order.columns]
    blocks = np.array_split(sorted_rows, min(len(sorted_rows), PICTURE_ROWS))
    owner = np.full(atoms.shape[1], -1)
    for k, s in enumerate(opened.branches.values()):
        owner[s] = k
    return {
        "rows": [np.round(block.mean(axis=0), 4).tolist() for block in blocks],
        "channels": order.columns.tolist(),
        "branch": owner[order.columns].tolist(),
        "loading": np.round(order.column_loading[order.columns], 5).tolist(),
        "explained": order.explained,
    }


def _labels(text: str, n: int) -> list[Any]:
    """One label for each feature, from `FILE.parquet:COLUMN`.

    Raises:
        DiskError: The file cannot be read.
        RecipeError: There is no such column, or it does not fit the features.
    """
    path, _, column = text.rpartition(":")
    if not path or not column:
        raise RecipeError(f"--labels must be FILE.parquet:COLUMN, got {text!r}.")
    try:
        table = pq.read_table(io.BytesIO(Path(path).read_bytes()))
    except (OSError, ValueError) as error:
        raise DiskError(f"{path} cannot be read as parquet ({error}).") from error
    if column not in table.column_names:
        raise RecipeError(
            f"{path} has no column {column!r}. It has {', '.join(table.column_names)}."
        )
    values = table[column].to_pylist()
    if "feature" not in table.column_names:
        if len(values) != n:
            raise RecipeError(f"{path} has {len(values)} rows, the dictionary {n} features.")
        return values
    labels: dict[Any, Any] = {}
    for feature, value in zip(table["feature"].to_pylist(), values, strict=True):
        if feature not in range(n):
            raise RecipeError(f"{path} names feature {feature}; the dictionary has {n}.")
        if feature in labels and labels[feature] != value:
            raise RecipeError(
                f"{path} gives feature {feature} several labels, {labels[feature]!r} and "
                f"{value!r}; each may have one."
            )
        labels[feature] = value
    return [labels.get(feature) for feature in range(n)]


def _label_facts(
    recipe: BranchesConfig, found: Specialization, labels: list[Any], alive: np.ndarray
) -> Result:
    listed = enriched(found.branch_of(recipe.rate), found.names, labels, tested=alive)
    return {
        "from": recipe.labels,
        "kinds": len({one.label for one in listed}),
        "enriched": sum(one.q_value <= recipe.rate for one in listed),
        "surest": [one._asdict() for one in listed[:LABELS_SHOWN]],
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """Matched features of two dictionaries."""

    paths: tuple[Path, Path]
    latent_a: np.ndarray
    latent_b: np.ndarray
    matched: np.ndarray


def _pairs(folder: Path, dictionary: Path) -> list[_Pair]:
    """The matches of one dictionary with its neighbours.

    Raises:
        DiskError: The folder holds no matching.
        RecipeError: It does not have the dictionary, or compared channels with channels.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest.get("kind") != "matching":
        raise DiskError(f"{folder} is no matching. Name the folder that `mechatlas match` wrote.")
    cost = manifest["settings"]["cost"]
    if cost != "codes":
        raise RecipeError(
            f"{folder} was matched with --cost {cost}, which compares channel with channel and so "
            "puts partners into the same branch by itself. Match with --cost codes and a paired "
            "store."
        )
    paths = [Path(path) for path in manifest["dictionaries"]]
    if dictionary.resolve() not in paths:
        raise RecipeError(
            f"{folder} does not match {dictionary}. It has {', '.join(map(str, paths))}."
        )
    try:
        table = pq.read_table(io.BytesIO((folder / "matches.parquet").read_bytes()))
    except (OSError, ValueError) as error:
        raise DiskError(f"{folder / 'matches.parquet'} cannot be read ({error}).") from error
    columns = {name: table[name].to_numpy() for name in table.column_names}
    found = []
    for number in range(len(paths) - 1):
        if dictionary.resolve() in paths[number : number + 2]:
            own = columns["pair"] == number
            found.append(
                _Pair(
                    (paths[number], paths[number + 1]),
                    columns["latent_a"][own],
                    columns["latent_b"][own],
                    columns["matched"][own],
                )
            )
    return found


def _consistency(recipe: BranchesConfig, store: Store, pair: _Pair, own: Specialization) -> Result:
    """How often matched features are in the same kind of branch: those specialised, and all."""
    found = []
    for path in pair.paths:
        if path == recipe.dictionary.resolve():
            found.append(own)
            continue
        one = _open(path, store, None)
        known = spectrum(x for x, _ in _read(one.rows, recipe.rows))
        alive = _ever_active(one.dictionary, _read(one.rows, recipe.rows))
        found.append(branches(one.dictionary, one.branches, known, tested=alive))

    def compare(homes: list[np.ndarray]) -> Result:
        agreed = consistency(
            homes[0], homes[1], found[0].names, found[1].names, latent_a=pair.latent_a,
            latent_b=pair.latent_b, matched=pair.matched, seed=recipe.seed,
        )  # fmt: skip
        return {name: _agreement(one) for name, one in agreed._asdict().items()}

    return {
        "a": pair.paths[0].name,
        "b": pair.paths[1].name,
        **compare([one.branch_of(recipe.rate) for one in found]),
        "leaning": compare([one.leaning() for one in found]),
    }


@torch.no_grad()
def _ever_active(dictionary: Any, rows: Iterator[tuple[Tensor, Tensor]]) -> np.ndarray:
    active = torch.zeros(dictionary.n_latents, dtype=torch.bool)
    for x, _ in rows:
        for part in x.float().split(ROWS_AT_ONCE):
            active |= (dictionary.encode(part) != 0).any(dim=0).cpu()
    return active.numpy()


def _agreement(one: Agreement) -> Result:
    if not one.pairs:
        return {"pairs": 0}
    return {
        "pairs": one.pairs,
        "value": one.same.value,
        "low": one.same.low,
        "high": one.same.high,
        "chance": one.chance,
        "p_value": one.p_value,
        "kappa": None if np.isnan(one.kappa) else one.kappa,
    }
