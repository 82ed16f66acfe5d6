"""The page as a reader meets it, in a real Chromium."""

import io

import numpy as np
import pytest
from PIL import Image

from mechatlas.app.report.page import report

from . import browser
from .worlds import HOSTILE_RUN, pictures_and_words

PROGRAM = browser.find()
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(browser.NAMES)} is on PATH"),
]
DRIVER = "GL Driver Message"  # of software rendering; says nothing of the page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = pictures_and_words(tmp_path_factory.mktemp("page") / "runs")
    return report(folder, folder.parent / "atlas.html", trust=True).as_uri()


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    assert PROGRAM is not None
    opened = browser.Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def tab(window, page):
    """The page, freshly opened at its features; afterwards nothing may have gone wrong."""
    window.requests.clear()
    window.complaints.clear()
    window.open(f"{page}#mixed")
    window.until("document.querySelectorAll('.card').length > 0")
    yield window
    assert [c for c in window.complaints if DRIVER not in c] == []
    assert {r.partition("#")[0] for r in window.requests} <= {page, "about:blank"}


def count(tab):
    return tab.run("document.getElementById('count').textContent")


def search(tab, text):
    tab.run(
        "(() => { const box = document.getElementById('search'); box.value = "
        f"{text!r}; box.dispatchEvent(new Event('input')); }})()"
    )
    tab.run("new Promise((done) => setTimeout(done, 200))")


def test_pictures_are_drawn(tab, tmp_path):
    tab.until("document.querySelectorAll('.card canvas[data-drawn]').length > 20")
    spread = tab.run(
        """[...document.querySelectorAll('.card canvas[data-drawn]')].map((c) => {
             const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
             const green = p.filter((_, i) => i % 4 === 1);
             return Math.max(...green) - Math.min(...green); })"""
    )
    assert np.median(spread) > 20
    picture = np.asarray(Image.open(io.BytesIO(tab.picture(tmp_path / "page.png"))))
    assert picture.shape[:2] == (1000, 1440)
    assert picture.std() > 5


def test_heat_can_be_hidden(tab):
    tab.until("document.querySelector('.card canvas[data-drawn]')")
    code = "document.querySelector('.card canvas[data-drawn]').toDataURL()"
    warm = tab.run(code)
    tab.press("h")
    tab.until("document.querySelector('.card canvas[data-drawn]')")
    assert tab.run("document.getElementById('heat').getAttribute('aria-pressed')") == "false"
    assert tab.run(code) != warm


def test_search_narrows_the_cards(tab):
    assert count(tab).startswith("300 features")
    search(tab, "10-19")
    assert count(tab) == "10 of 300 features"
    assert tab.run("document.querySelectorAll('.card').length") == 10
    search(tab, "17")
    assert tab.run("document.querySelector('.card').dataset.feature") == "17"
    search(tab, "density>0 right>0.5")
    assert 0 < int(count(tab).split()[0]) < 300
    search(tab, "<script>")
    by_name = int(count(tab).split()[0])
    assert 0 < by_name < 300
    search(tab, "nothing-is-called-this")
    assert count(tab) == "0 of 300 features"
    search(tab, "depth>1")
    assert "there is no number “depth”" in count(tab)


def test_sorting_is_by_the_number_asked_for(tab):
    tab.run(
        "(() => { const s = document.getElementById('sort'); s.value = 'density';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    briefs = tab.run(
        "[...document.querySelectorAll('.card .brief')].map((e) => e.textContent.split(' ')[1])"
    )
    densities = [float(b) for b in briefs]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[-1]


def test_pages_turn(tab):
    first = tab.run("document.querySelector('.card').dataset.feature")
    tab.press("n")
    assert tab.run("document.querySelector('.card').dataset.feature") != first
    assert tab.run("document.getElementById('page').textContent") == "page 2 of 13"
    tab.press("p")
    assert tab.run("document.querySelector('.card').dataset.feature") == first


def test_a_link_opens_its_card(tab, page):
    tab.open(f"{page}#mixed/123")
    tab.until("document.querySelector('dialog[open]')")
    assert tab.run("document.getElementById('detail-title').textContent") == "mixed/123"
    tab.press("ArrowRight")
    assert tab.run("document.getElementById('detail-title').textContent") == "mixed/124"
    assert tab.run("location.hash") == "#mixed/124"
    assert tab.run("document.querySelectorAll('dialog .shares.named .share').length") == 2
    tab.press("Escape")
    tab.until("!document.querySelector('dialog[open]')")


def test_a_link_to_a_site_shown_by_a_hostile_run_opens(tab, page):
    tab.open(f"{page}#first/5")
    tab.until("document.querySelector('dialog[open]')")
    assert tab.run("document.getElementById('detail-title').textContent") == "first/5"
    assert HOSTILE_RUN in tab.run("document.getElementById('overview').textContent")
    assert tab.run("document.querySelectorAll('img').length") == 0


def test_the_map_has_a_point_for_each_active_feature(tab):
    tab.until("document.querySelector('#map[data-drawn]')")
    points = tab.run("document.getElementById('map').data.reduce((n, t) => n + t.x.length, 0)")
    active = int(count(tab).split(", ")[1].split()[0])
    assert points == active
    tab.run("document.getElementById('map').emit('plotly_click', {points: [{customdata: 42}]})")
    assert tab.run("document.getElementById('detail-title').textContent") == "mixed/42"


def test_training_curves_are_drawn(tab):
    tab.run("document.getElementById('training').scrollIntoView()")
    tab.until("document.querySelectorAll('#training [data-drawn]').length === 3")
    assert tab.run("document.querySelectorAll('#training .scatterlayer .trace').length") == 9


def test_texts_show_their_tokens(tab, page):
    tab.open(f"{page}#out/1")
    tab.until("document.querySelector('dialog[open]')")
    shown = tab.run("[...document.querySelectorAll('dialog .tokens')].map((e) => e.textContent)")
    if shown:
        assert all(set(line) <= set(" w</script><i>") for line in shown)
    tab.press("Escape")
    tab.until("document.querySelectorAll('.card .tokens .peak').length > 0")
    heat = tab.run(
        "[...document.querySelectorAll('.card .peak')]"
        ".map((e) => e.style.getPropertyValue('--heat'))"
    )
    assert max(float(h or 0) for h in heat) == 1


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(1440, 1000), (400, 860)])
def test_nothing_is_wider_than_the_window(tab, page, size, dark, tmp_path):
    tab.open(f"{page}#mixed", *size, dark=dark)
    tab.until("document.querySelector('.card')")
    tab.run("document.getElementById('cards').scrollIntoView()")
    tab.until("document.querySelectorAll('.card canvas[data-drawn]').length > 0")
    assert tab.run("document.documentElement.scrollWidth") <= size[0]
    picture = np.asarray(Image.open(io.BytesIO(tab.picture(tmp_path / "page.png"))).convert("L"))
    assert (picture[-40:, :6].mean() < 60) == dark
