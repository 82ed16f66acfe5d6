"""Pages of runs made in Python, with a network that no recipe names."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mechatlas as ma
from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.report.chapters import matching
from mechatlas.app.report.from_python import draw, memory_run
from mechatlas.app.report.page import make_chapters
from mechatlas.app.report.runs import Runs, TrustConfig, find_runs
from mechatlas.app.run_folder import execute
from mechatlas.base import InputError, UserError, no_progress

from .worlds import run_command


class World:
    """A network of one's own, with a store, dictionaries and results."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        convs = [nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
        self.network = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), *head).eval()
        self.samples = torch.rand(60, 3, 12, 12)
        self.store = ma.collect(self.network, self.samples, ["1", "3"], folder / "store")
        self.first, self.last = (self.trained(site) for site in ("1", "3"))
        self.other = self.trained("3", seed=1)
        self.dictionaries = {"1": self.first, "3": self.last, "seed 1": ("3", self.other)}

    def trained(self, site: str, seed: int = 0) -> ma.Autoencoder:
        rows = self.store.rows(site)
        sae = ma.Autoencoder(d_in=rows.d_in, n_latents=32, sparsity=ma.TopK(k=4), seed=seed)
        return ma.train(sae, rows, steps=40, batch_size=128)

    def circuit(self, **options) -> ma.Circuit:
        sites = {"site_a": "1", "site_b": "3"}
        found = ma.circuit(self.network, self.first, self.last, self.samples, **sites, **options)
        assert isinstance(found, ma.Circuit)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("python"))


def test_a_network_of_ones_own_has_a_page_with_every_chapter(world, tmp_path):
    halves = {"low": slice(0, 8), "high": slice(8, 16)}
    left, right = np.ones((2, 6, 4), np.float32)
    proof = ma.prove(left, right, np.ones((4, 6), np.float32), ma.group("S3"))
    results = {
        ("3", "seed 1"): ma.match(world.last, world.other),
        ("1", "3"): world.circuit(n_ablated=4),
        "3": [ma.branches(world.last, halves), posed_features()],
        "head": ma.basis(world.network, world.samples, ["4", "5", "6"]),
        "net": proof,
    }
    problems: dict[str, str] = {}
    page = ma.report(
        tmp_path / "atlas.html", stores=world.store, dictionaries=world.dictionaries,
        results=results, network=world.network, samples=world.samples,
        on_problem=problems.__setitem__,
    ).read_text()  # fmt: skip
    assert problems == {}
    names = (
        "findings appendix training features interaction matching symmetry branches circuits proofs"
    )
    for name in names.split():
        assert f'id="{name}"' in page
    assert re.search(r"data-array=.features/2/heat", page), "three dictionaries have cards"
    assert "<title>Sequential" in page


def posed_features() -> ma.Symmetry:
    blocks = np.random.default_rng(0).normal(size=(32, 8, 6))
    return ma.symmetry(blocks, ma.group("D4"), [blocks + 0.1, blocks])


def test_a_chapter_of_memory_is_that_of_the_folder(world, tmp_path):
    for name, dictionary in (("a", world.last), ("b", world.other)):
        ma.save(dictionary, tmp_path / name)
    execute(MatchConfig(dictionaries=(tmp_path / "a", tmp_path / "b"), out=tmp_path / "match"))
    stored = matching.chapter(find_runs(tmp_path / "match"), no_progress)
    run = memory_run(("a", "b"), [ma.match(world.last, world.other)], {})
    kept = matching.chapter(Runs(Path(), [run], 0, TrustConfig(), {}), no_progress)
    assert stored is not None
    assert kept is not None
    assert kept.figures == stored.figures
    for name, array in stored.arrays.items():
        assert np.array_equal(kept.arrays[name], array)
    assert str(kept.html).split("</h3>")[1] == str(stored.html).split("</h3>")[1]


def test_matches_and_tracks_of_a_chain_are_one_run(world, tmp_path):
    third = world.trained("3", seed=2)
    matches = [ma.match(world.last, world.other), ma.match(world.other, third)]
    tracks = ma.track([d.W_dec for d in (world.last, world.other, third)], matches)
    run = memory_run(("a", "b", "c"), [*matches, tracks], {})
    chapter = matching.chapter(Runs(Path(), [run], 0, TrustConfig(), {}), no_progress)
    assert "Survival of features" in str(chapter and chapter.html)
    with pytest.raises(InputError, match=r"1 results are under 3 names, 'a', 'b', 'c'"):
        memory_run(("a", "b", "c"), matches[:1], {})


def test_a_notebook_shows_the_chapter_of_a_result(world, tmp_path):
    drawing = ma.match(world.last, world.other).show("first", "second")
    framed = re.search(r'<iframe .* srcdoc="([^"]*)"', drawing._repr_html_())
    assert html.unescape(framed[1] if framed else "") == drawing.page
    assert repr(drawing) == "Drawing(title='Matching')"
    saved = drawing.save(tmp_path / "match.html").read_text()
    assert "first" in saved
    assert 'id="overview"' not in saved
    with pytest.raises(InputError, match=r"No chapter of the page draws a Store; chapters draw M"):
        world.store.show()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"results": {("3", "x"): "match"}}, r"A Match is under 'x', which is not the name of a"),
        ({"results": {("1", "3"): "match", "3": 1}}, r"No chapter of the page draws a int"),
        ({"results": {("1", "3"): "circuit"}}, r"no feature was ablated.*n_ablated=32"),
        ({"results": {("small", "3"): "match"}}, r"32 latents is under 'small', a dictionary of 8"),
        ({"dictionaries": {"x": "last"}}, r"No store has the site 'x'.*there are 1, 3"),
        ({"samples": None}, r"Give `network` and `samples` together"),
    ],
)
def test_what_does_not_fit_is_named(world, tmp_path, given, message):
    made = {"match": lambda: ma.match(world.last, world.other), "circuit": world.circuit}
    small = ma.Autoencoder(d_in=12, n_latents=8, sparsity=ma.TopK(k=2))
    options = {
        "dictionaries": {**world.dictionaries, "small": ("1", small)}, "network": world.network,
        "samples": world.samples, **given,
    }  # fmt: skip
    if "results" in given:
        options["results"] = {k: made[v]() if v in made else v for k, v in given["results"].items()}
    if "dictionaries" in given:
        options["dictionaries"] = {"x": world.last}
    with pytest.raises(InputError, match=message):
        ma.report(tmp_path / "page.html", stores=[world.store], **options)
    assert not (tmp_path / "page.html").exists()


def test_the_old_order_of_arguments_works_with_a_warning(world, tmp_path):
    execute(MatchConfig(dictionaries=saved(world, tmp_path), out=tmp_path / "runs" / "match"))
    with pytest.warns(DeprecationWarning, match=r"ma\.report\(out, folder\)"):
        page = ma.report(tmp_path / "runs", tmp_path / "atlas.html")
    assert page == tmp_path / "atlas.html"
    assert page.is_file()


def saved(world, folder):
    ma.save(world.last, folder / "a")
    ma.save(world.other, folder / "b")
    return folder / "a", folder / "b"


def test_a_folder_and_the_dictionaries_and_store_in_it_make_one_page(world, tmp_path, monkeypatch):
    folders = saved(world, tmp_path)
    execute(MatchConfig(dictionaries=folders, out=tmp_path / "match"))
    (tmp_path / "store").symlink_to(world.store.root)
    monkeypatch.chdir(tmp_path)
    problems: dict[str, str] = {}
    page = ma.report(
        "atlas.html", ".", stores="store", network=world.network, samples=world.samples,
        dictionaries={"a": ("3", world.last), "b": ("3", world.other)},
        on_problem=problems.__setitem__,
    ).read_text()  # fmt: skip
    assert problems == {}, "the dictionaries are given, and not told off for having no manifest"
    claims = re.findall(r'data-array="features/\d+/lines"', page)
    assert len(claims) == 2, "matches are linked with both dictionaries"
    assert page.count('<td rowspan="2">store') == 1, "the store is listed once"


def test_a_page_with_nothing_to_show_is_refused(world, tmp_path):
    saved(world, tmp_path)
    with pytest.raises(UserError, match=r"holds no run that can be read: A dictionary saved from"):
        run_command("report", str(tmp_path), "--out", str(tmp_path / "page.html"))
    (tmp_path / "store").symlink_to(world.store.root)
    with pytest.raises(UserError, match=r"has nothing to show\..*no recipe names its network"):
        run_command("report", str(tmp_path), "--out", str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


def test_runs_that_cannot_be_read_do_not_cost_the_others(world, tmp_path):
    paths = saved(world, tmp_path / "runs")
    execute(MatchConfig(dictionaries=paths, out=tmp_path / "runs" / "match"))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "manifest.json").write_text("{")
    words = ("report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html"))
    result, told = run_command(*words)
    assert set(result["problems"]) == {"a", "b", "broken"}
    assert "Not drawn, or not whole: broken: " in told
    assert 'id="matching"' in (tmp_path / "page.html").read_text()
    (tmp_path / "runs" / "match" / "result.json").write_text(json.dumps({"pairs": 3}))
    with pytest.raises(UserError, match="no run that can be read"):
        run_command(*words)


def test_drawn_chapters_need_no_network(world):
    run = memory_run(("1", "3"), [world.circuit(n_ablated=4)], {})
    (chapter,) = [c for c in make_chapters(Runs(Path(), [run], 0, TrustConfig(), {}))
                  if c.name != "appendix"]  # fmt: skip
    assert chapter.name == "circuits"
    assert "circuits" in draw(world.circuit(n_ablated=4)).page
