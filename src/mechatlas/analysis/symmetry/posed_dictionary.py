"""A dictionary read together with a store of posed activations.

    pair_with_store    a dictionary and a store, which must fit one another
    estimate_blocks    decoder blocks from all rows and from halves of the images, and linear maps
    reconstruct        reconstruction of codes in every pose
    measure_r2         R2 of every pose on held-out rows, beside the baselines

A group crosscoder has decoder blocks of its own. For any other dictionary that reads the
untransformed block they are estimated from its codes. The two halves that the noise ceiling needs
are estimated from codes in both cases, each from half of the images.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from scipy import sparse
from torch import Tensor

from mechatlas.activations.store import Store, StoreRows
from mechatlas.analysis.symmetry.baselines import PoseMapFit, PoseMaps, PoseR2
from mechatlas.analysis.symmetry.block_artifacts import LatentScaling, ScalingEstimates
from mechatlas.analysis.symmetry.regression import CodeRegression
from mechatlas.base import Progress, StoreError, WeightsError, no_progress
from mechatlas.maths.arrays import Channels, SparseMatrix, numbers_of
from mechatlas.maths.groups import Group

BATCH = 4096
MAP_ROWS = 30_000
"""Number of rows that the linear maps of the baselines are fitted to."""
MAX_HELD_OUT_CODES = 20_000
"""Maximum number of held-out rows whose codes are kept for interventions."""


@dataclasses.dataclass(frozen=True, eq=False)
class PosedDictionary:
    """A dictionary and the posed rows of the site that it reads."""

    dictionary: Any
    """A `Dictionary` on the CPU."""
    rows: StoreRows
    site: str
    group: Group
    action: str
    """How the group acts on inputs, such as "rotate"."""
    columns: Channels
    """Columns of each block that the dictionary reads."""
    decoder_blocks: Float[np.ndarray, "feature order d"] | None
    """Decoder blocks of a dictionary that writes all of them."""
    crops: int
    """Number of samples cut from one image, which must not lie in different halves."""

    @property
    def pose_tied(self) -> bool:
        """Whether the dictionary reads all poses with the same atoms."""
        return _is_pose_tied(self.dictionary)

    @property
    def d(self) -> int:
        """Channels of one block that the dictionary reads."""
        return self.dictionary.d_block if self.pose_tied else self.dictionary.d_in

    @property
    def device(self) -> torch.device:
        """Device of the dictionary."""
        weights = self.dictionary.W_dec
        return weights.device if isinstance(weights, Tensor) else torch.device("cpu")

    def encode(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch latent"]:
        """Encode rows of all blocks; latents that are features come first.

        Codes are on the device of the dictionary.
        """
        x = x.to(self.device)
        start = self.group.identity * self.d
        return self.dictionary.encode(x if self.pose_tied else x[:, start : start + self.d]).float()

    def select_columns(self, x: Float[Tensor, "batch stored"]) -> Float[Tensor, "batch width"]:
        """Select from all blocks of some rows the columns that the dictionary reads."""
        blocks = x.view(len(x), self.group.order, -1)[:, :, self.columns]
        return blocks.reshape(len(x), -1)


def _is_pose_tied(dictionary: Any) -> bool:
    """Whether the atoms of a dictionary are tied over the poses of its `group`."""
    return getattr(dictionary, "group", None) is not None


def pair_with_store(
    dictionary: Any,
    store: Store,
    site: str,
    *,
    name: str = "The dictionary",
    trained_for: Mapping[str, Any] | None = None,
) -> PosedDictionary:
    """Pair a dictionary with a store of posed activations, and check that they fit.

    Args:
        dictionary: Dictionary that reads the untransformed block, or a pose-tied one.
        store: Store collected with a group.
        site: Site of the store, or a branch of one.
        name: Name of the dictionary in messages.
        trained_for: Entry `group` of the dictionary's manifest, if it has one.

    Raises:
        StoreError: The store has no group or no held-out rows, or its rows are of another width.
        WeightsError: The dictionary was trained for another group.
    """
    group = store.group
    if group is None:
        raise StoreError(
            f"{store.root} holds activations of inputs as they are, in one pose each. Collect a "
            "store with a [group] in the recipe."
        )
    branch = store.rows(site)  # of a branch the columns of the untransformed input
    rows = store.rows(branch.site)
    if rows.n_held_out < 2:
        raise StoreError(
            f"{store.root} has no held-out rows to measure on; collect with held_out > 0."
        )
    columns = branch.channels if branch.d_in < rows.d_in else slice(0, rows.d_in // group.order)
    d = len(numbers_of(columns, rows.d_in))
    action = str(store.manifest["group"].get("action", ""))
    blocks = _decoder_blocks(
        dictionary, name, trained_for or {}, group, action, d, f"{site} in {store.root}"
    )
    recorded = store.manifest.get("recipe", {}).get("samples", {})
    crops = int(recorded.get("crops", 1)) if isinstance(recorded, dict) else 1  # from Python: text
    return PosedDictionary(dictionary, rows, site, group, action, columns, blocks, crops)


def _decoder_blocks(
    dictionary: Any,
    name: str,
    trained_for: Mapping[str, Any],
    group: Group,
    action: str,
    d: int,
    place: str,
) -> Float[np.ndarray, "feature order d"] | None:
    """Decoder blocks of a group crosscoder; None for a dictionary of the untransformed block."""
    order, tied = group.order, _is_pose_tied(dictionary)
    n_written = getattr(dictionary, "d_out", dictionary.d_in)
    expected = (
        f"one pose of {place} has {d} ({order * d} for the {order} elements of {group.name})."
    )
    if (dictionary.d_block if tied else dictionary.d_in) != d:
        raise StoreError(f"{name} reads {dictionary.d_in} numbers, but {expected}")
    table = dictionary.group.table.tolist() if tied else trained_for.get("table")
    acts_by = trained_for.get("action")
    if table not in (None, group.table.tolist()) or acts_by not in (None, action):
        other = trained_for.get("name") or dictionary.group.name
        raise WeightsError(
            f"{name} was trained for {other}{f' ({acts_by})' if acts_by else ''}, but {place} was "
            f"collected with {group.name} (order {order}, {action})."
        )
    if tied:
        return dictionary.atoms.detach().float().cpu().numpy()
    if n_written not in (d, order * d):
        raise WeightsError(f"{name} writes {n_written} numbers, but {expected}")
    if n_written == d or getattr(dictionary, "reads", slice(0, d)).start:
        return None
    atoms = dictionary.W_dec.detach().float().cpu().numpy()
    return atoms.reshape(len(atoms), order, d)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockEstimates:
    """Decoder blocks with independent estimates from halves of the images, and linear maps."""

    blocks: Float[np.ndarray, "feature order d"]
    """Decoder blocks: those of the dictionary, or estimated from all rows."""
    halves: Float[np.ndarray, "2 feature order d"]
    """Estimates from each half of the images."""
    intercept: Float[np.ndarray, " width"] | None
    """Prediction where no latent is active, if the blocks were estimated."""
    maps: PoseMaps
    rows: Int[np.ndarray, " 2"]
    """Number of rows in each half."""
    active: Int[np.ndarray, " feature"]
    """Number of rows on which each feature was active."""
    scaling: ScalingEstimates | None = None
    """Slopes of single codes, if the dictionary has blocks of its own that may be zero."""

    def arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Collect all arrays by name, for a file."""
        parts = {name: getattr(self, name) for name in ("maps", "scaling")}
        arrays = {name: value for name, value in vars(self).items() if name not in parts}
        for part, values in parts.items():
            arrays |= {f"{part}.{k}": v for k, v in (vars(values) if values else {}).items()}
        arrays["maps.untransformed"] = np.array(
            [self.maps.untransformed.start, self.maps.untransformed.stop]
        )
        return {name: array for name, array in arrays.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> "BlockEstimates":
        """Rebuild estimates from the arrays of `arrays()`."""
        maps, scaling = (
            {k.removeprefix(part): array for k, array in arrays.items() if k.startswith(part)}
            for part in ("maps.", "scaling.")
        )
        own = slice(*maps.pop("untransformed").tolist())
        names = ("blocks", "halves", "rows", "active")
        return cls(
            **{name: arrays[name] for name in names},
            intercept=arrays.get("intercept"),
            maps=PoseMaps(untransformed=own, **maps),
            scaling=ScalingEstimates(**scaling) if scaling else None,
        )


def estimate_blocks(
    posed: PosedDictionary, *, seed: int = 0, on_progress: Progress = no_progress
) -> BlockEstimates:
    """Estimate blocks from all rows and from two halves of the images, in one pass over the store.

    Args:
        posed: Dictionary and its rows.
        seed: Seed of the row permutations of the shuffled baseline.
        on_progress: Callback with the number of rows read.

    Raises:
        InputError: A half has no rows.
        StoreError: A shard is damaged.
    """
    order, d = posed.group.order, posed.d
    width = d if posed.pose_tied else order * d
    regression = CodeRegression(posed.dictionary.n_latents, width, posed.device)
    maps = PoseMapFit(order, d, posed.group.identity, seed=seed)
    own = None if posed.pose_tied else posed.decoder_blocks
    scaling = None if own is None else LatentScaling(own)
    _read_training_rows(posed, regression, maps, scaling, on_progress)
    halves = np.stack([_as_blocks(posed, half) for half in regression.halves()])
    blocks, intercept, rows = posed.decoder_blocks, None, regression.rows
    if blocks is None:
        slopes, intercept = regression.whole()
        blocks = slopes.reshape(-1, order, d)
    active = regression.active.sum(axis=0)
    if posed.pose_tied:
        rows, active = rows // order, active[: len(blocks)]
    slopes_alone = None if scaling is None else scaling.solve()
    return BlockEstimates(blocks, halves, intercept, maps.solve(), rows, active, slopes_alone)


def _as_blocks(
    posed: PosedDictionary, slopes: Float[np.ndarray, "latent width"]
) -> Float[np.ndarray, "feature order d"]:
    """Arrange slopes by feature; pose-tied slopes have a row for each block of an atom."""
    order, d = posed.group.order, posed.d
    if posed.pose_tied:
        return slopes.reshape(order, -1, d).swapaxes(0, 1)
    return slopes.reshape(-1, order, d)


@torch.no_grad()
def _read_training_rows(
    posed: PosedDictionary,
    regression: CodeRegression,
    maps: PoseMapFit,
    scaling: LatentScaling | None,
    on_progress: Progress,
) -> None:
    """Add the training rows to the regression on codes, the linear maps and the slopes of codes."""
    n_read = 0
    for batch, where in posed.rows.scan():
        if int(batch.row[0]) >= posed.rows.n_rows:
            break
        x = posed.select_columns(batch.x)
        image = where[:, 0].numpy() // posed.crops
        second = image % 2 == 1
        for i in range(0, len(x), BATCH):
            part = slice(i, i + BATCH)
            for codes, targets in _equations(posed, x[part]):
                regression.add(codes, targets, second[part])
                if scaling is not None:
                    scaling.add(codes, targets, image[part])
        if maps.n < MAP_ROWS:
            maps.add(x.numpy())
        n_read += len(x)
        on_progress(n_read, posed.rows.n_rows)


def _equations(
    posed: PosedDictionary, x: Float[Tensor, "batch width"]
) -> Iterator[tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch target"]]]:
    """Yield codes and the targets that they should add up to.

    For a pose-tied dictionary x_g is the sum over k of the codes in pose k^-1 g times block k of
    the atoms: one equation for every block.
    """
    codes = posed.encode(x)
    if not posed.pose_tied:
        yield codes, x
        return
    group, by_pose = posed.group, codes.view(len(x), posed.group.order, -1)
    for g in range(group.order):
        poses = group.table[group.inverses, g]
        yield by_pose[:, poses].flatten(1), x[:, g * posed.d : (g + 1) * posed.d]


@torch.no_grad()
def reconstruct(
    posed: PosedDictionary, estimates: BlockEstimates, codes: Float[Tensor, "batch latent"]
) -> Float[Tensor, "batch width"]:
    """Reconstruct every pose from codes, by the dictionary or by blocks estimated for it.

    Args:
        posed: Dictionary and its rows.
        estimates: Estimated blocks.
        codes: Codes of rows.
    """
    if estimates.intercept is None:
        return posed.dictionary.decode(codes).float()
    weights = torch.from_numpy(estimates.blocks.reshape(len(estimates.blocks), -1))
    return codes @ weights.to(codes) + torch.from_numpy(estimates.intercept).to(codes)


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutCodes:
    """Codes of held-out rows, and where the rows come from."""

    codes: SparseMatrix
    """Codes `(row, latent)`."""
    sample: Int[np.ndarray, " row"]
    """Sample of each row."""
    position: Int[np.ndarray, " row"]
    """Flat position of each row in the map of the site."""


class R2Measurement(NamedTuple):
    """R2 on held-out rows by predictor and pose, and codes of some of the rows."""

    r2: dict[str, Float[np.ndarray, " order"]]
    """R2 of each pose for `dictionary`, `linear`, `invariant` and `shuffled`."""
    held_out: HeldOutCodes
    n_rows: int


@torch.no_grad()
def measure_r2(posed: PosedDictionary, estimates: BlockEstimates) -> R2Measurement:
    """Measure R2 of every pose on held-out rows, for the dictionary and for the baselines.

    Raises:
        StoreError: A shard is damaged.
    """
    explained = PoseR2(posed.group.order, posed.d)
    codes_kept: list[SparseMatrix] = []
    places_kept: list[np.ndarray] = []
    for batch, where in posed.rows.scan():
        if int(batch.row[0]) < posed.rows.n_rows:
            continue
        for x, places in zip(
            posed.select_columns(batch.x).split(BATCH), where.split(BATCH), strict=True
        ):
            codes = posed.encode(x)
            n_more = max(0, MAX_HELD_OUT_CODES - explained.n)
            codes_kept.append(sparse.csr_array(codes[:n_more].cpu().numpy()))
            places_kept.append(places[:n_more].numpy().astype(np.int64))
            reconstruction, rows = reconstruct(posed, estimates, codes).cpu().numpy(), x.numpy()
            explained.add(rows, dictionary=reconstruction, **estimates.maps.predict(rows))
    sample, y, x = np.concatenate(places_kept).T
    position = y * posed.rows.shape.grid[1] + x
    held_out = HeldOutCodes(sparse.csr_array(sparse.vstack(codes_kept)), sample, position)
    return R2Measurement(explained.r2(), held_out, explained.n)
