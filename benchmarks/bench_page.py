"""Pages of very many features: time to build them, size, searches and frames in Chromium.

    python -m benchmarks.bench_page                     one file, 10,000 features
    python -m benchmarks.bench_page --served 100000     the same, in parts on a server
    python -m benchmarks.bench_page --made-up 1000000   served, of numbers drawn at random

The dictionary is not trained: its atoms are mixtures of two rows each, so that most are active.
CPU seconds of the build, and of the main thread's tasks, do not depend on what else runs.
"""

import argparse
import io
import itertools
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tests.app.browser import Browser, find

import mechatlas as ma
from mechatlas.activations.positions import Positions
from mechatlas.app.progress import bar
from mechatlas.app.report import from_python
from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.dossiers import BranchLine, FeatureAt, MatchLine, Statements
from mechatlas.app.report.page import assemble, write_parts
from mechatlas.app.report.server import serve
from mechatlas.files import write

SEARCHES = ["density>0.01", "branch:5x5 density>0.001", "1x1", "file:cat", "matched", "10-4000"]
SEARCH = """atlas.features.ofRun('mixed4a').then(async (d) => {
  for (let k = 0; k < 5; k++) query.sort((await query.select(%r, d)).found, 'max', false, d);
})"""
TYPED = """new Promise((done) => {
  const box = document.getElementById('search'), began = performance.now();
  new MutationObserver((_, observer) => {
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - began), 0));
  }).observe(document.getElementById('count'), { childList: true });
  box.value = %r;
  box.dispatchEvent(new Event('input'));
})"""
SCROLL = """new Promise((done) => {
  let left = 400, by = 30;
  const frame = () => {
    if (scrollY + innerHeight >= document.documentElement.scrollHeight - 1) by = -30;
    if (scrollY <= 0) by = 30;
    scrollBy({ top: by, behavior: 'instant' });
    if (left--) requestAnimationFrame(frame); else done();
  };
  requestAnimationFrame(frame);
})"""
DRAWN = "document.querySelectorAll('.card canvas[data-drawn]').length"


def page_of(folder: Path, n: int, *, served: bool) -> Path:
    """Build the page of a dictionary of the bundled network."""
    network = ma.load_network(ma.Network(name="inception_mini"))
    images = ma.Images(source="photos", side=31, crops=60 if n <= 20_000 else 20)
    samples = ma.open_samples(images, network)
    sites = ma.find_sites(network, ["mixed4a"])
    storage = ma.StoreConfig(positions=Positions(per_sample=40))
    store = ma.collect(network, samples, sites, folder / "store", storage)
    rows = store.rows("mixed4a")
    x = next(iter(rows.batches(8192))).x
    i, j = torch.randint(len(x), (2, n), generator=torch.Generator().manual_seed(0))
    sae = ma.Autoencoder(d_in=rows.d_in, n_latents=n, sparsity=ma.TopK(k=16 if n <= 20_000 else 64))
    with torch.no_grad():
        mixed = torch.nn.functional.normalize(x[i] + 0.3 * x[j] - 1.3 * x.mean(dim=0), dim=1)
        sae.W_dec[:], sae.W_enc[:], sae.b_dec[:] = mixed, mixed.T, x.mean(dim=0)
    if served:
        from_python.write_page = lambda runs, out, *, on_progress, **_: write_parts(
            runs, out, on_progress=on_progress
        )
    with bar("drawing the page") as step:
        return ma.report(
            folder / ("page" if served else "atlas.html"), stores=store,
            dictionaries={"mixed4a": sae}, network=network, samples=samples, on_progress=step,
        )  # fmt: skip


def made_up(folder: Path, n: int) -> Path:
    """Build a served page of numbers drawn at random, with claims on a tenth of the features."""
    random, shown, heat, branches = np.random.default_rng(0), 22, (8, 8), ["1x1", "3x3", "5x5"]
    small = random.integers(0, 9, (n, shown, 2)).astype(np.int16)
    arrays = {
        "density": random.exponential(1e-3, n).astype("f4"), "upper": np.ones(n, "f4"),
        "mean": random.random(n, "f4"), "max": random.random(n, "f4"),
        "histogram": random.integers(0, 99, (n, 24)).astype("u4"), "scale": np.ones(n, "f4"),
        "shares": random.random((n, 3), "f4"), "flat": random.normal(size=(n, 2)).astype("f4"),
        "near": random.integers(0, n, (n, 8)).astype("i4"), "cosine": np.full((n, 8), 0.5, "f4"),
        "slot": random.integers(0, 400, (n, shown)).astype("i4"), "place": small, "first": small,
        "corner": small, "value": random.random((n, shown), "f4"),
        "heat": random.integers(0, 255, (n, shown, *heat)).astype("u1"),
        "apart": np.zeros((n, shown, 0), "u1"),
    }  # fmt: skip
    sheet = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (620, 620, 3)).astype("u1")).save(sheet, "WEBP")
    facts = {
        "key": "mixed4a", "run": "mixed4a", "checksum": "", "site": "mixed4a", "n": n, "top": 12,
        "shown": shown, "apart": 0, "rows": n, "allRows": n, "drift": 0, "alive": n, "map": "Dots",
        "chance": 0.4, "recall": 1, "branches": branches, "expected": [0.5] * 3, "kind": "image",
        "crop": {"side": 31, "cell": 4, "origin": 0}, "heat": heat, "gallery": "g0",
        "painted": [], "bins": 24, "perOctave": 4, "problems": [],
    }  # fmt: skip
    names = [f"{'cat' if k % 9 == 0 else 'dog'} {k}" for k in range(400)]
    gallery = {"names": names, "side": 31, "tile": 31, "columns": 20, "sheets": 1}
    claims: Statements = []
    for i in range(0, n, 10):
        of = FeatureAt("mixed4a", i)
        claims.append((of, BranchLine(
            anchor="", branch=branches[i % 3], share=0.9, expected=0.5, q=0.01, fdr=0.05,
            significant=i % 20 == 0, ablation=None, activation=None,
        )))  # fmt: skip
        claims.append((of, MatchLine(
            anchor="", after=True, name="next", other=FeatureAt("next", i), cosine=0.5, q=0.01,
            fdr=0.05, matched=i % 30 == 0,
        )))  # fmt: skip
    chapter = Chapter(
        name="features", title="Features", html=render("features.html", opened=[1], failed=[]),
        data={"galleries": {"g0": gallery}, "dictionaries": [facts], "labels": {}},
        arrays={f"0/{name}": array for name, array in arrays.items()},
        images={"g0/0": sheet.getvalue()}, statements=claims,
        scripts=("cards.js", "query.js", "labels.js", "dossier.js", "map.js", "features.js"),
    )  # fmt: skip
    numbers, page = itertools.count(), folder / "page"

    def keep(data) -> str:
        address = f"parts/{next(numbers)}"
        write(page / address, data)
        return address

    write(page / "index.html", assemble("made up", [chapter], {}, keep).encode())
    return page


def look(address: str, profile: Path) -> None:
    """Open the page, search and scroll it, and print what it took."""
    program = find()
    if program is None:
        print("No Chromium: searches and frames are not measured.")
        return
    browser = Browser(program, profile)
    try:
        browser.open(f"{address}#mixed4a", 1400, 900)
        browser.until(f"{DRAWN} > 0", 120)
        print(f"first card after {browser.run('performance.now()') / 1000:.1f} s")
        browser.until(f"{DRAWN} > 10", 120)
        browser.run("new Promise((done) => setTimeout(done, 3000))")
        spent = ((text, sum(browser.tasks(SEARCH % text)) / 5) for text in SEARCHES)
        print("search and sort, CPU ms:", *(f"{text!r} {ms:.0f}" for text, ms in spent))
        typed = []
        for text in SEARCHES:
            typed.append((text, browser.run(TYPED % text)))
            browser.run("new Promise((done) => setTimeout(done, 1000))")
        print("from typing to cards on the screen, ms by the clock:",
              *(f"{text!r} {ms:.0f}" for text, ms in typed))  # fmt: skip
        browser.run(TYPED % "")
        browser.run("scrollTo(0, 0)")
        for what in ("first", "second"):
            tasks = browser.tasks(SCROLL)
            print(f"{what} scroll of 400 frames, longest tasks of the main thread, CPU ms:",
                  *(f"{ms:.0f}" for ms in tasks[:6]))  # fmt: skip
        for _ in range(40):
            browser.press("n")
            browser.run("new Promise((done) => setTimeout(done, 100))")
        used = browser.send("Runtime.getHeapUsage")
        size = used["usedSize"] + used.get("backingStorageSize", 0)
        print(f"after 40 more pages of cards the page holds {size / 1e6:.0f} MB")
        print("complaints of the browser:", browser.complaints or "none")
    finally:
        browser.close()


def main() -> None:
    """Build a page, and look at it."""
    options = argparse.ArgumentParser(description="Pages of very many features.")
    options.add_argument("--features", type=int, default=10_000)
    options.add_argument("--served", type=int)
    options.add_argument("--made-up", type=int)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cpu, wall = time.process_time(), time.perf_counter()
        served = bool(asked.served or asked.made_up)
        page = (
            made_up(folder, asked.made_up) if asked.made_up
            else page_of(folder, asked.served or asked.features, served=served)
        )  # fmt: skip
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        files = page.rglob("*") if served else [page]
        size = sum(file.stat().st_size for file in files if file.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"built, store and all, in {cpu:.0f} CPU s, {wall:.0f} s wall; {size / 1e6:.1f} MB, "
              f"{peak:.1f} GB of memory at most")  # fmt: skip
        if not served:
            look(page.as_uri(), folder / "profile")
            return
        with serve(page) as address:
            look(address, folder / "profile")


if __name__ == "__main__":
    main()
