"""Group crosscoders compared with simpler methods, at the same number of active latents.

    python benchmarks/compare_symmetry.py STORE [--site SITE] [--out DIR]

Every method has the same rows, steps, latents and k, and several seeds:

    plain           a sparse autoencoder of the untransformed block; how its codes predict the
                    other poses is estimated by regression afterwards
    per transform   one autoencoder for every pose; latents of each are matched one to one with
                    those of the untransformed one by the correlation of their codes
    untied          a group crosscoder: reads the untransformed block, writes all
    tied            few atoms in all poses; reads all poses. As many parameters in the decoder
                    as the untied one, with k for a row of all poses, or for every pose

Printed are R2 of the poses other than e on held-out rows (also of a linear map from a(I), which
has no bottleneck; the tied form reads all poses), features with a symmetry at a false discovery
rate of 5 %, and families of two or more. Over pairs of seeds: the median cosine of untransformed
blocks in the best one-to-one pairing (of tied atoms, in the best pose), the share of pairs that are
significant in `match`, and the share of features with a symmetry whose reliable partner has one
too, with its value by chance.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file
from torch import Tensor

import mechatlas as ma
from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.run_folder import FEATURES, SYMMETRY_TENSORS, execute
from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import SparseCoder
from mechatlas.dictionaries.rows import ArrayRows
from mechatlas.files import read_json, write_json
from mechatlas.maths.groups import Group

BATCH = 4096


class Method(NamedTuple):
    """Features of one method with one seed."""

    facts: dict[str, Any]
    atoms: np.ndarray
    symmetric: np.ndarray
    """Mask of features whose stabilizer is larger than {e}."""
    reliable: np.ndarray
    posed: np.ndarray | None = None
    """Atoms in every pose, if their own pose is arbitrary."""


class Problem:
    """Rows of a store, in memory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.store = options, ma.Store(options.store)
        self.site = options.site or self.store.sites[0]
        group = self.store.group
        if group is None:
            raise InputError(f"{options.store} was collected without a group.")
        self.group = group
        rows = self.store.rows(self.site)
        x = torch.cat([batch.x for batch, _ in rows.scan()])
        self.train, self.held = x[: rows.n_rows], x[rows.n_rows :]
        self.d = x.shape[1] // group.order

    def block(self, x: Tensor, g: int) -> Tensor:
        """Activations of one pose."""
        return x[:, g * self.d : (g + 1) * self.d]

    def fit(self, dictionary: SparseCoder, x: Tensor, seed: int) -> SparseCoder:
        """Train on some columns of the rows."""
        options = self.options
        rows = ArrayRows(x)
        ma.train(dictionary, rows, steps=options.steps, batch_size=options.batch_size, seed=seed)
        return dictionary

    def r2_of_others(self, reconstruction: Tensor) -> float:
        """Mean R2 of all poses but e on held-out rows."""
        values = []
        for g in range(1, self.group.order):
            true, predicted = self.block(self.held, g), self.block(reconstruction, g)
            total = (true - true.mean(dim=0)).square().sum()
            values.append(float(1 - (true - predicted).square().sum() / total))
        return float(np.mean(values))


def from_folder(problem: Problem, dictionary: SparseCoder, out: Path, seed: int) -> Method:
    """Classify a dictionary as `mechatlas symmetry` does."""
    ma.save(dictionary, out / "dictionary")
    config = SymmetryConfig(
        dictionary=out / "dictionary",
        store=problem.options.store,
        site=problem.site,
        out=out / "symmetry",
        interventions=0,
        seed=seed,
    )
    result = execute(config)
    table = pq.read_table(out / "symmetry" / FEATURES)
    facts = {
        "r2": result.r2_mean["dictionary"],
        "linear": result.r2_mean["linear"],
        "n_features": result.n_features,
        "reliable": result.reliable,
        "discoveries": result.discoveries,
        "families": result.families,
        "in_families": result.features_in_families,
        "classes": result.classes,
    }
    return Method(
        facts,
        load_file(out / "symmetry" / SYMMETRY_TENSORS)["atoms"],
        table["stabilizer_order"].to_numpy() > 1,
        table["reliable"].to_numpy(),
    )


def plain(problem: Problem, out: Path, seed: int) -> Method:
    """One autoencoder, its blocks by regression."""
    options = problem.options
    built = ma.Autoencoder(
        d_in=problem.d, n_latents=options.latents, sparsity=ma.TopK(k=options.k), seed=seed
    )
    return from_folder(
        problem, problem.fit(built, problem.block(problem.train, 0), seed), out, seed
    )


def untied(problem: Problem, out: Path, seed: int) -> Method:
    """A group crosscoder."""
    options, names = problem.options, problem.group.element_names
    built = ma.Crosscoder(
        widths=dict.fromkeys(names, problem.d),
        n_latents=options.latents,
        sparsity=ma.TopK(k=options.k),
        reads=names[0],
        seed=seed,
    )
    return from_folder(problem, problem.fit(built, problem.train, seed), out, seed)


def tied(problem: Problem, out: Path, seed: int, poses: int) -> Method:
    """Atoms in all poses, with k latents a row for each of some poses."""
    options = problem.options
    built = ma.PoseTied(
        group=problem.group,
        d_in=problem.d * problem.group.order,
        n_latents=options.latents * problem.group.order,
        sparsity=ma.TopK(k=options.k * poses),
        seed=seed,
    )
    way = from_folder(problem, problem.fit(built, problem.train, seed), out, seed)
    return way._replace(posed=built.atoms.detach().numpy())


@torch.no_grad()
def codes_of(dictionary: SparseCoder, x: Tensor) -> Tensor:
    """Codes of many rows."""
    return torch.cat([dictionary.encode(part) for part in x.split(BATCH)])


def per_transform(problem: Problem, out: Path, seed: int) -> Method:
    """An autoencoder for every pose, latents matched by their codes."""
    del out
    options, order = problem.options, problem.group.order
    made = [
        problem.fit(
            ma.Autoencoder(
                d_in=problem.d,
                n_latents=options.latents,
                sparsity=ma.TopK(k=options.k),
                seed=seed * order + g,
            ),
            problem.block(problem.train, g),
            seed,
        )
        for g in range(order)
    ]
    some = problem.train[:20_000]
    base = codes_of(made[0], problem.block(some, 0))
    centered = base - base.mean(dim=0)
    blocks = np.zeros((options.latents, order, problem.d), np.float32)
    own, reconstruction = [], torch.zeros_like(problem.held)
    held = codes_of(made[0], problem.block(problem.held, 0))
    correlations = []
    for g, dictionary in enumerate(made):
        codes = codes_of(dictionary, problem.block(some, g))
        other = codes - codes.mean(dim=0)
        products = centered.T @ other
        lengths = centered.norm(dim=0)[:, None] * other.norm(dim=0)
        correlation = (products / lengths.clamp(min=1e-9)).numpy()
        columns = ma.assign(1 - correlation).columns
        rows = np.arange(options.latents)
        slope = products[rows, columns] / centered.square().sum(dim=0).clamp(min=1e-9)
        atoms = dictionary.W_dec.detach()[columns] * slope[:, None]
        blocks[:, g] = atoms.numpy()
        # The intercept that makes the mean right.
        bias = problem.block(some, g).mean(dim=0) - base.mean(dim=0) @ atoms
        problem.block(reconstruction, g).copy_(held @ atoms + bias)
        with torch.no_grad():
            true = problem.block(problem.held, g)
            decoded = torch.cat([dictionary(part) for part in true.split(BATCH)])
            total = (true - true.mean(dim=0)).square().sum()
            own.append(float(1 - (true - decoded).square().sum() / total))
        if g:
            correlations.append(float(np.median(correlation[rows, columns])))
    symmetries = ma.symmetry(blocks, problem.group)
    sizes = np.bincount(symmetries.families)
    facts = {
        "r2": problem.r2_of_others(reconstruction),
        "r2_of_own_pose": float(np.mean(own[1:])),
        "median_correlation": float(np.mean(correlations)),
        "n_features": len(blocks),
        "reliable": int(symmetries.reliable.sum()),
        "discoveries": symmetries.n_discoveries,
        "families": int((sizes > 1).sum()),
        "in_families": int(sizes[sizes > 1].sum()),
        "missing": "no halves: noise cannot be distinguished from asymmetry",
    }
    return Method(
        facts,
        blocks[:, 0],
        np.array([len(each) > 1 for each in symmetries.stabilizers]),
        symmetries.reliable,
    )


def in_the_pose_of(a: np.ndarray, b: np.ndarray, group: Group) -> np.ndarray:
    """Untransformed blocks of b, each in the pose in which it is most like its partner in a."""
    flat = [each.reshape(len(each), -1) for each in (a, b)]
    lengths = [np.maximum(np.linalg.norm(each, axis=1), 1e-9) for each in flat]
    cosines = np.stack([
        flat[0] @ b[:, group.table[:, h]].reshape(len(b), -1).T for h in range(group.order)
    ]) / np.outer(*lengths)  # fmt: skip
    columns = ma.assign(1 - cosines.max(axis=0)).columns
    out = b[:, group.identity].copy()
    out[columns] = b[columns, cosines[:, np.arange(len(a)), columns].argmax(axis=0)]
    return out


def stability(ways: list[Method], group: Group) -> dict[str, Any]:
    """Compare pairs of seeds: cosine of partners, share matched, and agreement of classes."""
    values: dict[str, list[float]] = {
        "cosine": [], "matched": [], "symmetric_too": [], "by_chance": []
    }  # fmt: skip
    for a, b in itertools.combinations(ways, 2):
        if a.posed is not None and b.posed is not None:
            b = b._replace(atoms=in_the_pose_of(a.posed, b.posed, group))
        live = [np.flatnonzero(np.abs(way.atoms).max(axis=1) > 0) for way in (a, b)]
        match = ma.match(a.atoms[live[0]], b.atoms[live[1]])
        rows = np.flatnonzero(match.columns >= 0)
        i, j = live[0][rows], live[1][match.columns[rows]]
        both = a.reliable[i] & b.reliable[j]
        has, other_has = a.symmetric[i[both]], b.symmetric[j[both]]
        values["cosine"].append(float(np.median(match.cosines[rows])))
        values["matched"].append(float(match.matched.mean()))
        if has.any():
            values["symmetric_too"].append(float(other_has[has].mean()))
            values["by_chance"].append(float(other_has.mean()))
    return {name: float(np.mean(v)) if v else None for name, v in values.items()}


def main() -> None:
    """Train, classify, compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--site")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_symmetry"))
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ways", nargs="*", help="by default all; results of others are kept")
    options = parser.parse_args()
    problem = Problem(options)
    order = problem.group.order
    ways = {
        "plain": plain,
        "per transform": per_transform,
        "untied": untied,
        "tied, k a row": lambda p, out, seed: tied(p, out, seed, 1),
        "tied, k a pose": lambda p, out, seed: tied(p, out, seed, order),
    }
    kept = options.out / "results.json"
    results = read_json(kept) if kept.is_file() else {}
    for name in options.ways or ways:
        way = ways[name]
        runs = []
        for seed in range(options.seeds):
            folder = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            runs.append(way(problem, folder, seed))
            print(f"{name}, seed {seed}: {runs[-1].facts}", flush=True)
        stable = stability(runs, problem.group) if len(runs) > 1 else {}
        print(f"{name}, over seeds: {stable}", flush=True)
        results[name] = {"seeds": [each.facts for each in runs], "stability": stable}
        write_json(kept, results)


if __name__ == "__main__":
    main()
