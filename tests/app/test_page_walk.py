"""A walk through a page with every chapter, in light and dark, on a screen and on a phone."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import mechatlas as ma

from . import browser
from .test_from_python import World, posed_features
from .worlds import photographs

PROGRAM = browser.find()
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(browser.NAMES)} is on PATH"),
]
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
SCROLL = """(async () => {
  for (let y = 0; y < document.documentElement.scrollHeight; y += 400) {
    scrollTo(0, y);
    await new Promise((done) => setTimeout(done, 120));
  }
})()"""
READY = """[...document.querySelectorAll('[data-figure]')].every((e) => e.dataset.drawn)
  && [...document.querySelectorAll(
    '.symmetry, .matching, .branches, .effects, [data-track], [data-finding]')]
    .every((e) => !e.matches('section, [data-track], [data-finding]') || e.dataset.ready)"""
WIDE = """[...document.querySelectorAll('body *')].filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width > 0 && box.right > document.documentElement.clientWidth + 1
    && !e.closest('.scroll, nav, svg, .js-plotly-plot');
}).map((e) => `${e.tagName} ${e.className}`)"""
BARE = """[...document.querySelectorAll('[data-claim]')].filter((claim) =>
  !/\\d/.test([...claim.querySelectorAll('[data-evidence]')].map((e) => e.textContent).join(' ')))
  .map((claim) => claim.textContent.slice(0, 200))"""
OPEN = "document.querySelectorAll('main details').forEach((e) => { e.open = true; })"
CLAIMS = """Object.fromEntries([...document.querySelectorAll('main > section')].map((chapter) =>
  [chapter.id, chapter.querySelectorAll('[data-claim]').length]))"""
MEASURED = {"features", "training", "appendix"}
"""Chapters that describe and claim nothing; what is claimed of features is in their dossiers."""
UNMARKED = """(measured) => [...document.querySelectorAll('tbody tr, dl.facts')].filter((e) =>
  e.closest('main > section') && !measured.includes(e.closest('main > section').id)
  && !e.closest('[data-claim], [data-description]')).map((e) => e.textContent.slice(0, 100))"""


# The links to features are addresses of the page, not places in it that could be skipped to.
AXE = """axe.run(document, { rules: { 'skip-link': { enabled: false } },
  resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa', 'wcag21a',
  'wcag21aa', 'best-practice'] }).then(({ violations }) => violations.map((each) =>
  `${each.id} (${each.impact}), ${each.nodes.length} times: ${each.nodes[0].html.slice(0, 160)} `
  + each.nodes[0].failureSummary.slice(0, 300)))"""


def logits(n: int) -> ma.LogitEffects:
    """Effects on the logits of a made-up vocabulary; the first feature raises a token."""
    tokens = np.tile(np.arange(6), (n, 1))
    effects = np.linspace(2, 1, 6, dtype=np.float32) * np.ones((n, 1), np.float32)
    q = np.where(np.arange(n) == 0, 0.01, 0.9)
    return ma.LogitEffects(
        latents=np.arange(n), top_tokens=tokens, top_effects=effects, bottom_tokens=tokens,
        bottom_effects=-effects, p_top=q, p_bottom=np.ones(n), q_top=q, q_bottom=np.ones(n),
        null_top=1.0, n_random=500, scale=1.0, words={k: f"word {k}" for k in range(6)},
    )  # fmt: skip


def axe() -> str:
    """Script of axe-core, where a package on this machine has it."""
    given = os.environ.get("MECHATLAS_AXE")
    for package in ("axe_playwright_python", "axe_core_python"):
        spec = None if given else importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            given = str(Path(spec.submodule_search_locations[0]) / "axe.min.js")
    if given is None:
        pytest.skip("needs axe-core: pip install axe-core-python, or its file in MECHATLAS_AXE")
    return Path(given).read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("walk"))


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    halves = {"low": slice(0, 8), "high": slice(8, 16)}
    left, right = np.ones((2, 6, 4), np.float32)
    results = {
        ("3", "seed 1"): ma.match(world.last, world.other),
        ("1", "3"): world.circuit(n_ablated=4),
        ("3", "seed 1", "3 again"): ma.feature_flow(
            [world.last, world.other, world.last], mlp=[world.last, world.other]
        ),
        "3": [
            ma.branches(world.last, halves),
            posed_features(),
            logits(world.last.n_latents),
            ma.evaluate(world.last, network=world.network, samples=world.samples, site="3"),
            ma.attribute(
                world.network,
                world.last,
                world.samples[:4],
                lambda y: y[:, 0].sum(),
                site="3@bchw",
                n_ablated=8,
            ),
        ],
        "head": ma.basis(world.network, world.samples, ["4", "5", "6"]),
        "net": ma.prove(left, right, np.ones((4, 6), np.float32), ma.group("S3")),
    }
    return ma.report(
        tmp_path_factory.mktemp("page") / "atlas.html",
        stores=world.store, results=results, network=world.network, samples=world.samples,
        dictionaries={**world.dictionaries, "3 again": ("3", world.last)},
    ).as_uri()  # fmt: skip


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    assert PROGRAM is not None
    opened = browser.Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 420])
def test_nothing_is_wrong_on_the_way_through_the_page(window, page, width, dark):
    window.complaints.clear()
    window.open(page, width, 900, dark=dark)
    names = window.run("[...document.querySelectorAll('nav a')].map((a) => a.hash.slice(1))")
    assert len(names) == 13
    for name in reversed(names):
        window.run(f"document.querySelector('nav a[href=\"#{name}\"]').click()")
        window.run("new Promise((done) => setTimeout(done, 300))")
        off = window.run(
            f"document.getElementById({name!r}).getBoundingClientRect().top"
            " - document.querySelector('.top').offsetHeight - 8"
        )
        assert abs(off) <= 8, name
    window.run(OPEN)
    window.run(SCROLL)
    window.until(READY)
    assert window.run("document.documentElement.scrollWidth") <= width
    assert window.run(WIDE) == []
    assert window.run(CONTRAST) == []
    claims = window.run(CLAIMS)
    assert set(claims) == set(names)
    assert {name for name, n in claims.items() if not n} == MEASURED
    assert window.run(f"({UNMARKED})({json.dumps(sorted(MEASURED))})") == []
    assert window.run(BARE) == []
    assert [c for c in window.complaints if "GL Driver" not in c] == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 420])
def test_axe_finds_no_fault(window, page, width, dark):
    script = axe()
    window.open(page, width, 900, dark=dark)
    window.run(SCROLL)
    window.until(READY)
    window.run(f"{script}; 0")
    assert window.run(AXE) == []
    window.open(f"{page}#3/3", width, 900, dark=dark)
    window.until("document.querySelector('dialog[open] .claims[data-ready]')")
    window.run(f"{script}; 0")
    assert window.run(AXE) == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 420])
def test_a_dossier_has_every_claim_with_its_evidence(window, page, width, dark):
    window.complaints.clear()
    window.open(f"{page}#3/3", width, 900, dark=dark)
    window.until("document.querySelector('dialog[open] .claims[data-ready]')")
    titles = window.run("[...document.querySelectorAll('dialog h4')].map((e) => e.textContent)")
    assert {"Strongest", "At ten quantiles", "Activations", "Nearest features"} <= set(titles)
    assert {"Symmetry", "Branches", "Goes to", "Circuits in", "Next tokens"} <= set(titles)
    assert window.run(BARE) == []
    wide, box = window.run("(({ scrollWidth, clientWidth }) => [scrollWidth, clientWidth])"
                           "(document.querySelector('dialog'))")  # fmt: skip
    assert wide <= box
    assert window.run(CONTRAST) == []
    window.run("document.querySelector('dialog [data-leave][href^=\"#circuits\"]').click()")
    window.until("!document.querySelector('dialog[open]')")
    window.run("new Promise((done) => setTimeout(done, 500))")
    off = window.run(
        "document.getElementById('circuits-0').getBoundingClientRect().top"
        " - document.querySelector('.top').offsetHeight - 8"
    )
    assert abs(off) <= 8
    assert [c for c in window.complaints if "GL Driver" not in c] == []


def test_a_dossier_can_be_taken_along(window, page):
    window.open(f"{page}#3/3")
    window.until("document.querySelector('dialog[open] .claims[data-ready]')")
    record = json.loads(window.run(
        "atlas.features.ofRun('3').then((d) => JSON.stringify(dossier.plain(d, 3)))"
    ))  # fmt: skip
    assert record["feature"] == 3
    assert {"symmetry", "branches", "matches", "circuits"} <= set(record["claims"])
    values = [each["activation"] for each in record["quantiles"]]
    assert values == sorted(values)
    window.press("Escape")


def test_names_survive_and_come_back(window, page, world, tmp_path):
    window.open(f"{page}#3/3")
    window.until("document.querySelector('dialog[open] .label input')")
    window.run(
        "(() => { const field = document.querySelector('.label input'); field.value = 'a curve';"
        " field.dispatchEvent(new Event('change')); })()"
    )
    window.press("Escape")
    written = window.run(
        "(() => { let kept = ''; atlas.save = (_, text) => { kept = text; }; labels.save();"
        " return kept; })()"
    )
    window.open(f"{page}#3?q=label:curve")
    window.until("document.getElementById('count').textContent.startsWith('1 of')")
    file = tmp_path / "labels.json"
    file.write_text(written)
    assert json.loads(written)["dictionaries"]["3"]["features"] == {
        "3": {"name": "a curve", "note": ""}
    }
    window.run("localStorage.clear()")
    again = ma.report(
        tmp_path / "again.html", stores=world.store, dictionaries=world.dictionaries,
        network=world.network, samples=world.samples, labels=file,
    )  # fmt: skip
    window.open(f"{again.as_uri()}#3/3")
    window.until("document.querySelector('dialog[open] .label input')")
    assert window.run("document.querySelector('.label input').value") == "a curve"


def test_tokens_of_an_image_lie_at_their_patches(window, tmp_path):
    network = Patches().eval()
    images = ma.Images(source=str(photographs(tmp_path / "photos.zip")), side=16)
    store = ma.collect(network, images, ["mix"], tmp_path / "store")
    sae = ma.Autoencoder(d_in=12, n_latents=16, sparsity=ma.TopK(k=3))
    sae = ma.train(sae, store.rows("mix"), steps=30, batch_size=64)
    page = ma.report(
        tmp_path / "vit.html", stores=store, dictionaries={"mix": sae},
        network=network, samples=images,
    )  # fmt: skip
    window.open(f"{page.as_uri()}#mix")
    window.until("document.querySelectorAll('.card .apart').length > 4")
    assert window.run("document.querySelector('.card .apart').textContent") == "class"


class Patches(torch.nn.Module):
    """Patches of an image and a class token, mixed a little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.token = torch.nn.Parameter(torch.randn(1, 1, 12))
        self.mix = torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.embed(x).flatten(2).movedim(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1)
        return self.mix(tokens + 0.1 * tokens.mean(dim=1, keepdim=True))
