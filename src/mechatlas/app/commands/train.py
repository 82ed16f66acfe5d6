"""What the commands do: each job reads a recipe, writes a folder and returns its result.

collect    network, samples -> store
train      store -> dictionary
report     folder of runs -> page
"""

import dataclasses
import shutil
import time
from pathlib import Path

from mechatlas.activations import networks
from mechatlas.activations.collect import collect as collect_rows
from mechatlas.activations.samples import open_samples
from mechatlas.activations.sites import find_sites
from mechatlas.activations.store import PairedRows, Store, StoreRows
from mechatlas.app.progress import bar
from mechatlas.app.recipes import CollectConfig, TrainConfig, as_dict
from mechatlas.app.report.page import write_page
from mechatlas.app.run_folder import Result, cost, finish, refuse_strangers
from mechatlas.base import RecipeError
from mechatlas.dictionaries.autoencoder import SparseCoder
from mechatlas.dictionaries.formats import FILE, save
from mechatlas.dictionaries.training import train as train_dictionary
from mechatlas.files import checksum, write_json


def collect(recipe: CollectConfig) -> Result:
    """Collect activations into a store.

    Raises:
        UserError: See `mechatlas.activations.collect.collect`.
    """
    clock = time.process_time()
    network = networks.load_network(recipe.network)
    sites = find_sites(network, recipe.sites)
    samples = open_samples(recipe.samples, network)
    made_from = as_dict(dataclasses.replace(recipe, out=Path("store"), device="cpu"))
    with bar("collecting") as progress:
        store = collect_rows(
            network,
            samples,
            sites,
            recipe.out,
            recipe.collecting,
            group=recipe.group,
            recipe=made_from,
            device=recipe.device,
            on_progress=progress,
        )
    rows = {name: store.rows(name) for name in store.sites}
    result: Result = {
        "samples": len(samples),
        "skipped": len(store.manifest["skipped"]),
        "sites": {
            name: {"width": r.d_in, "rows": r.n_rows, "held_out_rows": r.n_held_out}
            for name, r in rows.items()
        },
        "bytes": sum(shard.bytes for shard in store.shards),
    }
    return finish(recipe.out, recipe, result, clock)


def train(recipe: TrainConfig) -> Result:
    """Train a dictionary on one site of a store.

    Raises:
        RecipeError: The dictionary does not suit the store.
        UserError: See `mechatlas.dictionaries.training.train`; or `out` holds something else.
    """
    clock = time.process_time()
    store = Store(recipe.store)
    rows = (
        store.paired([s for s in recipe.sites if s]) if recipe.writes else store.rows(recipe.site)
    )
    checkpoint = recipe.out / "checkpoint"
    refuse_strangers(recipe.out, "dictionary", unfinished=checkpoint.name)
    dictionary, of_group = _built(recipe, store, rows)
    with bar("training") as progress:
        train_dictionary(
            dictionary,
            rows,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            seed=recipe.seed,
            device=recipe.device,
            schedule=recipe.schedule,
            objective=recipe.objective,
            revival=recipe.revival,
            checkpoint=checkpoint,
            checkpoint_every=recipe.checkpoint_every,
            on_progress=progress,
        )
    history = dictionary.history
    assert history is not None
    file = save(dictionary.cpu(), recipe.out)
    write_json(recipe.out / "history.json", dataclasses.asdict(history))
    manifest = {
        "schema": 1,
        "kind": "dictionary",
        "site": recipe.site or (recipe.writes or store.sites)[0],
        "writes": list(recipe.writes),
        "store": str(recipe.store.resolve()),
        "parents": {"store": checksum((recipe.store / "manifest.json").read_bytes())},
        "files": {FILE: checksum(file.read_bytes())},
    }
    if of_group:
        manifest["group"] = store.manifest["group"]
    write_json(recipe.out / "manifest.json", manifest)
    shutil.rmtree(checkpoint)  # three times the size of the dictionary, and of no more use
    result: Result = {
        "fvu": history.fvu[-1],
        "l0": history.l0[-1],
        "dead_share": history.dead_share[-1],
        "steps": recipe.steps,
        "seconds_per_step": sorted(history.seconds_per_step)[len(history.step) // 2],
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "n_latents": recipe.n_latents,
        "rows": rows.n_rows,
        "held_out_rows": rows.n_held_out,
    }
    return finish(recipe.out, recipe, result, clock)


def _built(
    recipe: TrainConfig, store: Store, rows: StoreRows | PairedRows
) -> tuple[SparseCoder, bool]:
    """The dictionary, and whether it is one of all poses.

    Raises:
        RecipeError: It does not suit the store.
    """
    parts = rows.rows if isinstance(rows, PairedRows) else [rows]
    widths = {site: part.d_in for site, part in zip(recipe.sites, parts, strict=True)}
    # A branch has one block only, that of the untransformed input.
    group = store.group if parts[0].d_in == parts[0].shape.width else None
    try:
        return recipe.build(widths, group), group is not None
    except ValueError as error:
        raise RecipeError(f"{recipe.store}: {error}") from error


def report(folder: Path, out: Path, *, pictures: int = 0) -> Result:
    """Write one HTML page of all runs in a folder.

    Raises:
        RecipeError: `pictures` is negative.
        UserError: The folder holds no runs, or the page cannot be written.
    """
    if pictures < 0:
        raise RecipeError(f"--pictures must be at least 0 features, got {pictures}.")
    clock = time.process_time()
    with bar("drawing the page") as progress:
        page = write_page(folder, out, pictures=pictures, on_progress=progress)
    return {"page": str(page), "bytes": page.stat().st_size, **cost(clock)}
