"""The page: whole, self-contained, escaped, of a bounded size."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from markupsafe import Markup

from mechatlas.activations.store import Store
from mechatlas.analysis.branches.specialization import plain_shares
from mechatlas.analysis.examples.statistics import feature_statistics
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.report import paintings
from mechatlas.app.report.atoms import flat_map, neighbors
from mechatlas.app.report.chapter import MISSING, Chapter, as_json, percent, render
from mechatlas.app.report.chapters import appendix, features
from mechatlas.app.report.dossiers import Absence, Finding
from mechatlas.app.report.first_screen import first_screen
from mechatlas.app.report.galleries import gallery
from mechatlas.app.report.layout import umap
from mechatlas.app.report.page import CHAPTERS, assemble, report
from mechatlas.app.report.runs import Run, Runs, find_runs
from mechatlas.base import DiskError, UserError, no_progress
from mechatlas.dictionaries.formats import load

from .worlds import HOSTILE_FILE, HOSTILE_RUN, HOSTILE_WORD, pictures_and_words


class Reader(HTMLParser):
    """Elements with their attributes, and the text of scripts."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), []))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and self.scripts:
            self.scripts[-1][1].append(data)
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures_and_words(tmp_path_factory.mktemp("page") / "runs")


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    steps = []
    out = tmp_path_factory.mktemp("out") / "atlas.html"
    written = report(folder, out, trust=True, on_progress=lambda *step: steps.append(step))
    assert written == out
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    return out.read_text()


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def array(read, name):
    """An array of the page, as the browser will see it."""
    (attributes, text), *_ = [s for s in read.scripts if s[0].get("data-array") == name]
    raw = gzip.decompress(base64.b64decode("".join(text)))
    shape = [int(n) for n in attributes["data-shape"].split(",") if n]
    return np.frombuffer(raw, attributes["data-dtype"]).reshape(shape)


def chapters(read):
    (_, text), *_ = [s for s in read.scripts if s[0].get("id") == "chapters"]
    return json.loads("".join(text))


def test_nothing_is_loaded_from_anywhere(read):
    for tag, attributes in read.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, name, value)
        assert "@import" not in (attributes.get("style") or "")
    policy = [a["content"] for t, a in read.elements if a.get("http-equiv")]
    assert len(policy) == 1
    assert "default-src 'none'" in policy[0]
    assert "http" not in policy[0]


def test_hostile_names_stay_text(page, read):
    tags = [tag for tag, _ in read.elements]
    assert "img" not in tags
    assert "i" not in tags
    assert "alert(1)</script>" not in page
    assert HOSTILE_RUN not in page
    assert any(HOSTILE_RUN in text for text in read.text)
    data = chapters(read)["features"]["data"]
    assert any(HOSTILE_FILE in name for g in data["galleries"].values() for name in g["names"])
    assert any(HOSTILE_WORD in g.get("words", ()) for g in data["galleries"].values())


def test_every_script_that_runs_is_one_of_ours(read):
    running = [s for s in read.scripts if s[0].get("type") in (None, "module", "text/javascript")]
    assert len(running) == 8
    assert all("use strict" in "".join(text) for _, text in running)


def test_the_numbers_are_those_of_the_runs(folder, read):
    facts = chapters(read)["features"]["data"]["dictionaries"]
    number = [d["key"] for d in facts].index("mixed")
    dictionary = load(folder / "mixed")
    rows = Store(folder / "pictures").rows("mixed")
    statistics = feature_statistics(dictionary, rows, top=facts[number]["top"])
    np.testing.assert_allclose(array(read, f"features/{number}/density"), statistics.density)
    np.testing.assert_allclose(array(read, f"features/{number}/max"), statistics.max)
    assert facts[number]["rows"] == rows.n_rows + rows.n_held_out
    assert facts[number]["branches"] == ["left", "right"]
    assert facts[number]["drift"] < 0.01
    assert facts[number]["crop"]["side"] >= 3
    slot = array(read, f"features/{number}/slot")
    top, shown = facts[number]["top"], facts[number]["shown"]
    assert ((slot[:, :top] >= 0) == (statistics.sample >= 0)).all()
    assert slot.shape == (300, shown)
    value = array(read, f"features/{number}/value")[:, top:]
    quantiles = np.where(slot[:, top:] >= 0, value, np.inf)
    assert (np.diff(quantiles[np.isfinite(quantiles).all(axis=1)], axis=1) > -1e-4).all()


def test_texts_come_with_their_words(read):
    data = chapters(read)["features"]["data"]
    number = [d["kind"] for d in data["dictionaries"]].index("text")
    facts = data["dictionaries"][number]
    gallery = data["galleries"][facts["gallery"]]
    tokens = array(read, f"features/{facts['gallery']}/tokens")
    assert tokens.shape == (len(gallery["names"]), 40)
    assert tokens.max() < len(gallery["words"])
    assert facts["branches"] == []
    assert array(read, f"features/{number}/heat").shape == (50, facts["shown"], 40, 1)


def test_findings_training_and_appendix_are_there(read):
    assert {"findings", "training", "features", "appendix"} == set(chapters(read))
    curves = chapters(read)["training"]["figures"]["fvu"]["data"]
    assert {c["name"] for c in curves} == {"mixed", HOSTILE_RUN, "words"}
    text = " ".join(read.text)
    assert "The network tests.networks:tiny" in text
    assert "fraction of variance unexplained" in text


def no_runs() -> Any:
    return Mock(spec=Runs, all=[], of_kind=lambda kind: [])


def test_of_each_chapter_the_strongest_finding_comes_first():
    def chapter(name, **strengths):
        found = [
            Finding(text=text, evidence="1", anchor=name, strength=strength)
            for text, strength in strengths.items()
        ]
        return Chapter(name=name, title=name, html=Markup(), findings=found)

    chapters = [chapter("one", weak=0.1, strong=0.9), chapter("two", middle=0.5)]
    html = first_screen(no_runs(), chapters).html
    assert re.findall(r">(weak|middle|strong)<", html) == ["strong", "middle", "weak"]


def test_of_many_questions_without_a_finding_five_are_listed_and_the_others_folded():
    absences = [Absence(text=f"None of {k}.", power="1", anchor="one") for k in range(7)]
    chapters = [Chapter(name="one", title="One", html=Markup(), absences=absences)]
    shown, folded = first_screen(no_runs(), chapters).html.split("<details>")
    assert [f"None of {k}." in shown for k in range(7)] == [True] * 5 + [False] * 2
    assert "2 more" in folded
    assert "None of 6." in folded


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0, "0%"), (0.0004, "0.04%"), (0.00004, "0.004%"), (0.001, "0.1%"), (0.054, "5.4%"),
     (0.5, "50%"), (0.998, "99.8%"), (1.0, "100%"), (-0.0002, "-0.02%"), (-4e-19, "0%"),
     (None, MISSING)],
)  # fmt: skip
def test_a_share_is_not_written_as_zero_unless_it_is(value, written):
    assert percent(value) == written


def test_runs_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 4, 26):
        folder = tmp_path / f"layer{number}"
        folder.mkdir()
        (folder / "manifest.json").write_text('{"kind": "dictionary", "complete": true}')
    names = [run.name for run in find_runs(tmp_path).all]
    assert names == ["layer4", "layer10", "layer26"]


def test_layers_of_equal_branches_share_a_row_in_the_appendix():
    heads = [appendix.Branch("head0", 4, 0.5, 0), appendix.Branch("head1", 4, 0.5, 1)]
    other = [appendix.Branch("1x1", 4, 1.0, 0)]
    branched = {f"layers.{k}.attention": heads for k in range(6)} | {"mixed3": other}
    bars = appendix.branch_rows(branched)
    assert bars == [("layers.*.attention", 6, heads), ("mixed3", 1, other)]


def test_a_language_model_is_called_by_its_file():
    def name(network):
        return Run(Path("store"), "store", {"recipe": {"network": network}}, {}).network_name

    path = "models/SmolLM2-135M.gguf"
    assert name({"name": "transformer", "arguments": {"path": path}}) == "SmolLM2-135M"
    assert name({"name": "transformer", "arguments": {}}) == "transformer"
    assert name({"name": "a:b", "arguments": {"path": path}}) == "a:b"
    assert name("a:b") == "a:b"


def test_a_page_is_small(page):
    arrays = sum(len(m) for m in re.findall(r"<script type=\"text/plain\" data-[^>]*>[^<]*", page))
    assert arrays < 410 * 3000  # bytes for each of the features
    assert len(page) < 4_000_000
    scripts = len(page) - arrays
    assert scripts < 2_300_000  # nearly all of it is plotly


def test_the_same_runs_give_the_same_page(folder, page, tmp_path):
    assert report(folder, tmp_path / "again.html", trust=True).read_text() == page


def test_one_broken_run_does_not_cost_the_page(folder, tmp_path):
    broken = tmp_path / "runs"
    broken.mkdir()
    (broken / "mixed").symlink_to(folder / "mixed")
    (broken / "lost").mkdir()
    manifest = {"schema": 1, "kind": "dictionary", "site": "mixed", "store": "gone"}
    (broken / "lost" / "manifest.json").write_text(json.dumps(manifest))
    text = report(broken, tmp_path / "page.html", trust=True).read_text()
    assert "There is no dictionary at" in text
    assert 'data-array="features/0/heat"' in text


def test_a_store_alone_has_a_page(folder, tmp_path):
    text = report(folder / "pictures", tmp_path / "page.html", trust=True).read_text()
    assert "<code>mixed</code>" in text
    assert 'id="features"' not in text


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no runs: no manifest\.json"):
        report(tmp_path, tmp_path / "page.html")
    with pytest.raises(DiskError, match="There is no folder"):
        report(tmp_path / "none", tmp_path / "page.html")


def test_a_chapter_needs_no_script_of_its_own():
    figure = {"data": [{"type": "bar", "y": [1, 2]}], "layout": {}}
    html = render("training.html", curves={"fvu": "<b>"}, beside=False)
    chapter = Chapter(name="mine", title="Mine & yours", html=html, figures={"fvu": figure})
    page = assemble("a title", [chapter])
    assert "Mine &amp; yours" in page
    assert "&lt;b&gt;" in page
    assert '"figures":{"fvu":{"data":[{"type":"bar"' in page
    assert len(CHAPTERS) >= 3


def test_json_cannot_end_its_script():
    nasty = "</script><!--\u2028&"
    assert "<" not in as_json([nasty])
    assert json.loads(as_json([nasty])) == [nasty]


def test_shares_of_an_atom_in_one_branch_alone():
    atoms = np.array([[3.0, 4.0, 0.0, 0.0], [1.0, 0.0, -5.0, 1.0]])
    shares, expected = plain_shares(atoms, {"a": slice(0, 2), "b": slice(2, 4)})
    np.testing.assert_allclose(shares, [[1, 0], [0.5**0.5, 0.5**0.5]])
    np.testing.assert_allclose(expected, [0.5**0.5] * 2)
    assert plain_shares(atoms, {})[0].shape == (2, 0)


def test_neighbours_are_the_nearest_living_atoms():
    random = np.random.default_rng(0)
    atoms = random.normal(size=(200, 16))
    atoms[7] = atoms[3] * 2
    alive = np.ones(200, dtype=bool)
    alive[9] = False
    found = neighbors(atoms, alive, n=4)
    assert found.latent[3, 0] == 7
    assert found.cosine[3, 0] == pytest.approx(1)
    assert 9 not in found.latent
    assert (found.latent[9] == -1).all()
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    for i in (0, 50, 199):
        products = np.where(alive, unit @ unit[i], -2)
        products[i] = -2
        assert set(found.latent[i]) == set(np.argsort(-products)[:4])
    assert 0.5 < found.chance < 0.95


def test_a_map_keeps_clusters_apart_and_depends_on_the_seed_alone():
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(6), 50)
    centers = random.normal(size=(6, 32))
    unit = centers[label] + 0.3 * random.normal(size=(300, 32))
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float32)
    flat = umap(unit)
    apart = np.square(flat[:, None] - flat[None]).sum(axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (label[apart.argmin(axis=1)] == label).mean() > 0.97
    np.testing.assert_array_equal(flat, umap(unit))


def test_few_atoms_are_laid_out_by_principal_components():
    atoms = np.random.default_rng(0).normal(size=(20, 8))
    alive = np.arange(20) < 12
    flat, method = flat_map(atoms, alive)
    assert method == "principal components"
    assert np.isfinite(flat[alive]).all()
    assert np.isnan(flat[~alive]).all()


class Squares:
    """Samples whose every pixel is the sample's number."""

    def __init__(self, side, n):
        self.side, self.n = side, n

    def __len__(self):
        return self.n

    def name(self, index):
        return f"square {index}"

    def read(self, index):
        return np.full((self.side, self.side, 1), index, dtype=np.uint8)

    def stack(self, samples):
        raise NotImplementedError


def test_pictures_stand_where_the_page_looks_for_them(monkeypatch):
    import io

    from PIL import Image

    monkeypatch.setattr("mechatlas.app.report.galleries.SHEET_SIDE", 100)
    needed = np.array([5, 60, 61, 120, 200, 201, 202, 203, 204, 205, 250])
    found = gallery(Squares(30, 256), needed)
    assert (found.tile, found.columns, len(found.sheets)) == (30, 3, 2)
    for slot, sample in enumerate(needed):
        sheet = np.asarray(Image.open(io.BytesIO(found.sheets[slot // 9])))
        y, x = divmod(slot % 9, 3)
        middle = sheet[y * 30 + 10 : y * 30 + 20, x * 30 + 10 : x * 30 + 20]
        assert abs(middle.mean() - sample) < 4


def test_many_large_pictures_are_made_smaller(monkeypatch):
    monkeypatch.setattr("mechatlas.app.report.galleries.PIXELS", 40_000)
    found = gallery(Squares(200, 256), np.arange(100))
    assert (found.side, found.tile) == (200, 20)


def test_the_page_draws_as_many_features_as_asked(folder, monkeypatch):
    monkeypatch.setattr(paintings, "STEPS", 2)
    made = features.chapter(
        find_runs(folder, visualize=3, trust=TrustConfig(trust=True)), no_progress
    )
    assert made is not None
    for number, one in enumerate(made.data["dictionaries"]):
        whole = [name for name in one["painted"] if "/" not in name]
        assert len(whole) == (3 if one["kind"] == "image" else 0)
        for name in one["painted"]:
            assert made.images[f"painted{number}/{name}"][8:12] == b"WEBP"
        if one["branches"] and whole:
            parts = [name.split("/") for name in one["painted"] if "/" in name]
            assert [latent for latent, _ in sorted(parts)] == sorted(whole)
    assert any(one["painted"] for one in made.data["dictionaries"])


def test_those_most_in_each_branch_are_drawn_in_turn():
    shares = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.1, 0.99], [1.0, 0.0]])
    density = np.array([1, 1, 1, 1, 0.0])
    assert paintings.most_in_each(shares, density, 2).tolist() == [0, 3]
    assert paintings.most_in_each(shares, density, 9).tolist() == [0, 1, 2, 3]
    assert paintings.most_in_each(np.zeros((5, 0)), np.arange(5.0), 2).tolist() == [3, 4]
