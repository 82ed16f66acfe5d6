"""A dictionary for every site of a store, its features tested for branches, and the table of it.

    mechatlas collect recipes/branches/collect_inception_mini.toml --samples.source cifar10.zip
    python recipes/branches/run.py runs/branches/inception_mini/store
    python recipes/branches/run.py runs/branches/untrained/store        # the control

Beside the store: one folder a site with its dictionary, `SITE-branches`, and for a paired store
`match`, by codes; then `table.json`. What is there already is not made again.
`--branch 5x5 1x1` also trains dictionaries on those branches alone, as in the paper, and matches
each with the one of the whole site.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import mechatlas as ma
from mechatlas.app.cli import run_script
from mechatlas.app.commands.branches import ROWS, BranchesConfig, BranchesResult
from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.recipes import read_recipe
from mechatlas.app.run_folder import BRANCHES, as_plain, execute, read_result
from mechatlas.files import read_json, write_json

HERE = Path(__file__).parent


def folder_of(root: Path, site: str) -> Path:
    """Folder of a site's dictionary."""
    return root / site.replace("/", "~").replace(":", "~")


def train(site: str, store: ma.Store, options: argparse.Namespace) -> Path:
    """Train the dictionary of a site, unless it is there."""
    out = folder_of(options.out, site)
    if not (out / "result.json").is_file():
        recipe = read_recipe(options.recipe, TrainConfig)
        width = store.rows(site).d_in
        changed = dataclasses.replace(
            recipe,
            store=options.store,
            site=site,
            out=out,
            n_latents=options.expansion * width,
            steps=options.steps or recipe.steps,
        )
        found = execute(changed)
        print(f"{site}: fvu {found.fvu:.3f}, dead {found.dead_share:.1%}", flush=True)
    return out


def matched(paths: list[Path], name: str, options: argparse.Namespace) -> Path | None:
    """Match dictionaries in a row by their codes, where the store is paired."""
    out = options.out / name
    paired = ma.Store(options.store).manifest["settings"]["paired"]
    if len(paths) < 2 or not paired:
        return None
    if not (out / "result.json").is_file():
        execute(
            MatchConfig(
                dictionaries=tuple(paths),
                out=out,
                cost="codes",
                store=options.store,
                rows=options.match_rows,
            ),
        )
    return out


def row(site: str, path: Path, result: BranchesResult) -> dict[str, Any]:
    """One row of the table."""
    trained = read_json(path / "result.json")
    return {
        "site": site,
        "features": result.n_features,
        "fvu": trained["fvu"],
        "dead_share": trained["dead_share"],
        "steps": trained["steps"],
        "n_tested": result.n_tested,
        "n_specialized": result.n_specialized,
        "n_specialized_permuted": result.n_specialized_permuted,
        "branches": {branch.name: branch.n_specialized for branch in result.branches},
        "consistency": as_plain(result.consistency),
    }


def in_words(table: list[dict[str, Any]]) -> str:
    """The table in Markdown, and how often matched features keep their kind of branch."""
    lines = [
        "| site | features | FVU | dead | specialized, q < 0.05 | permuted | by branch |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in table:
        counts = ", ".join(f"{name} {n}" for name, n in one["branches"].items() if n)
        lines.append(
            f"| {one['site']} | {one['features']:,} | {one['fvu']:.3f} | {one['dead_share']:.1%} "
            f"| {one['n_specialized']:,} of {one['n_tested']:,} "
            f"| {one['n_specialized_permuted']} | {counts or '-'} |"
        )
    ways = {f"{one['a']} -> {one['b']}": one for row in table for one in row["consistency"]}
    if ways:
        lines += ["", "| matched features | same nearest branch | with equal kernels | "
                  "both specialized |", "|---|---|---|---|"]  # fmt: skip
    for way, one in ways.items():
        nearest = one["nearest_branch"]
        shown = (nearest["same_branch"], nearest["same_branch_of_equal_size"], one["same_branch"])
        lines.append(f"| {way} | {' | '.join(map(agreement, shown))} |")
    return "\n".join(lines)


def agreement(one: dict[str, Any]) -> str:
    """One agreement in words."""
    if not one["pairs"]:
        return "no pairs"
    return (
        f"{one['value']:.1%} [{one['low']:.1%}, {one['high']:.1%}] of {one['pairs']:,}, "
        f"chance {one['chance']:.1%}"
    )


def main() -> None:
    """Train, match, test and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, help="by default the folder of the store")
    parser.add_argument("--recipe", type=Path, default=HERE / "train.toml")
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--steps", type=int, help="by default the recipe's")
    parser.add_argument("--sites", nargs="*", help="by default all that have branches")
    parser.add_argument(
        "--branch", nargs="*", default=[], help="branches with their own dictionary"
    )
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--alone", action="store_true", help="do not match sites with one another")
    parser.add_argument("--match-rows", type=int, default=4096)
    options = parser.parse_args()
    options.out = options.out or options.store.parent
    store = ma.Store(options.store)
    sites = [name for name, shape in store.shapes.items() if shape.branches]
    sites = [site for site in sites if not options.sites or site in options.sites]
    if not sites:
        parser.error(f"{options.store} has no such sites with branches: {', '.join(store.sites)}.")
    paths = [train(site, store, options) for site in sites]
    between = None if options.alone else matched(paths, "match", options)
    table = []
    for site, path in zip(sites, paths, strict=True):
        for branch in options.branch:
            if branch in store.shapes[site].branches:
                part = train(f"{site}/{branch}", store, options)
                matched([part, path], f"{part.name}-match", options)
        out = path.with_name(f"{path.name}-branches")
        made = read_result(out, BRANCHES) if (out / "result.json").is_file() else None
        if made is None or (between and not made.consistency):
            config = BranchesConfig(
                dictionary=path, store=options.store, out=out, match=between, rows=options.rows
            )
            made = execute(config)
        table.append(row(site, path, made))
        print(in_words(table[-1:]).splitlines()[2], flush=True)
    write_json(options.out / "table.json", table)
    print(in_words(table))


if __name__ == "__main__":
    run_script(main)
