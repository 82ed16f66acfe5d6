"""Page of 10,000 features: time to build it, its size, searches and frames in Chromium.

    python -m benchmarks.bench_page

The dictionary is not trained: its atoms are mixtures of two rows each, so that most are active.
CPU seconds of the build, and of the main thread's tasks, do not depend on what else runs.
"""

import tempfile
import time
from pathlib import Path

import torch
from tests.app.browser import Browser, find

import mechatlas as ma
from mechatlas.activations.positions import Positions

N_LATENTS = 10_000
SEARCHES = ["density>0.01", "branch:5x5 density>0.001", "1x1", "file:cat", "chelsea", "10-4000"]
SEARCH = """atlas.features.ofRun('mixed4a').then(async (d) => {
  const longest = [];
  for (const text of %s) {
    const times = [];
    for (let k = 0; k < 5; k++) {
      const start = performance.now();
      query.sort((await query.select(text, d)).found, 'max', false, d);
      times.push(performance.now() - start);
    }
    longest.push(Math.max(...times));
  }
  return longest;
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


def page_of(folder: Path) -> Path:
    """Build the page and print what it took."""
    network = ma.load_network(ma.Network(name="inception_mini"))
    samples = ma.open_samples(ma.Images(source="photos", side=31, crops=60), network)
    sites = ma.find_sites(network, ["mixed4a"])
    storage = ma.StoreConfig(positions=Positions(per_sample=40))
    store = ma.collect(network, samples, sites, folder / "store", storage)
    rows = store.rows("mixed4a")
    x = next(iter(rows.batches(8192))).x
    i, j = torch.randint(len(x), (2, N_LATENTS), generator=torch.Generator().manual_seed(0))
    sae = ma.Autoencoder(d_in=rows.d_in, n_latents=N_LATENTS, sparsity=ma.TopK(k=16))
    with torch.no_grad():
        mixed = torch.nn.functional.normalize(x[i] + 0.3 * x[j] - 1.3 * x.mean(dim=0), dim=1)
        sae.W_dec[:], sae.W_enc[:], sae.b_dec[:] = mixed, mixed.T, x.mean(dim=0)
    cpu, wall = time.process_time(), time.perf_counter()
    page = ma.report(
        folder / "atlas.html", stores=store, dictionaries={"mixed4a": sae}, network=network,
        samples=samples,
    )  # fmt: skip
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"built in {cpu:.0f} CPU s, {wall:.0f} s wall; {page.stat().st_size / 1e6:.1f} MB")
    return page


def main() -> None:
    """Build the page, search and scroll it."""
    program = find()
    with tempfile.TemporaryDirectory() as name:
        page = page_of(Path(name))
        if program is None:
            print("No Chromium: searches and frames are not measured.")
            return
        browser = Browser(program, Path(name) / "profile")
        try:
            browser.open(f"{page.as_uri()}#mixed4a", 1400, 900)
            browser.until("document.querySelectorAll('.card canvas[data-drawn]').length > 10", 120)
            browser.run("new Promise((done) => setTimeout(done, 3000))")
            longest = browser.run(SEARCH % SEARCHES)
            shown = (f"{text!r} {ms:.0f}" for text, ms in zip(SEARCHES, longest, strict=True))
            print("search and sort, longest of 5, ms:", *shown)
            browser.run("scrollTo(0, 0)")
            for what in ("first", "second"):
                tasks = browser.tasks(SCROLL)
                print(f"{what} scroll of 400 frames, longest tasks of the main thread, CPU ms:",
                      *(f"{ms:.0f}" for ms in tasks[:6]))  # fmt: skip
        finally:
            browser.close()


if __name__ == "__main__":
    main()
