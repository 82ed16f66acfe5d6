"""The page as a reader meets it, in a real Chromium."""

import io

import numpy as np
import pytest
from PIL import Image

from mechatlas.app.report.page import report

from . import browser
from .test_page_walk import BARE, CONTRAST, OPEN, READY, SCROLL, WIDE
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
    asked = {r.partition("#")[0] for r in window.requests if not r.startswith("blob:")}
    assert asked <= {page, "about:blank"}


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
    assert "no label, class, branch or file name" in count(tab)
    search(tab, "depth>1")
    assert "There is no number “depth”" in count(tab)
    search(tab, "density>")
    assert "needs a number after >" in count(tab)
    search(tab, "kind:x")
    assert "“kind:” is not known" in count(tab)
    search(tab, "right and density > 0.0001")
    right = int(count(tab).split()[0])
    search(tab, "branch:right")
    assert int(count(tab).split()[0]) >= right > 0
    search(tab, "10-19 -right")
    outside = int(count(tab).split()[0])
    search(tab, "10-19 right")
    assert outside + int(count(tab).split()[0]) == 10
    search(tab, "12 or 17")
    assert count(tab) == "2 of 300 features"


def test_search_and_order_are_in_the_address(tab, page):
    search(tab, "density > 0.001")
    tab.run(
        "(() => { const s = document.getElementById('sort'); s.value = 'max';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    address = tab.run("location.hash")
    card = "document.querySelector('#cards .card').dataset.feature"
    first = tab.run(card)
    assert "sort=max" in address
    tab.open(page + address)
    tab.until("document.getElementById('search').value")
    tab.until("document.querySelector('#cards .card')")
    assert tab.run("document.getElementById('search').value") == "density > 0.001"
    assert tab.run("document.getElementById('sort').value") == "max"
    assert tab.run(card) == first


def test_sorting_is_by_the_number_asked_for(tab):
    tab.run(
        "(() => { const s = document.getElementById('sort'); s.value = 'density';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    briefs = tab.run(
        "[...document.querySelectorAll('.card .brief')].map((e) => e.textContent.split(' ')[1])"
    )
    densities = [float(b.rstrip("%")) for b in briefs]
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
    after = tab.run("document.getElementById('detail-title').textContent")
    assert 124 <= int(after.split("/")[1]) < 130  # the next one that is active
    assert tab.run("location.hash") == f"#{after}"
    assert tab.run("document.querySelectorAll('dialog .shares.named .share').length") == 2
    tab.press("Escape")
    tab.until("!document.querySelector('dialog[open]')")


def test_a_link_to_a_site_shown_by_a_hostile_run_opens(tab, page):
    tab.open(f"{page}#first/5")
    tab.until("document.querySelector('dialog[open]')")
    assert tab.run("document.getElementById('detail-title').textContent") == "first/5"
    assert HOSTILE_RUN in tab.run("document.getElementById('appendix').textContent")
    assert tab.run("document.querySelectorAll('img').length") == 0


def test_the_map_has_a_point_for_each_active_feature(tab):
    tab.press("Shift")
    tab.run("document.getElementById('map').scrollIntoView()")
    tab.until("document.querySelector('#map[data-drawn]')")
    active = int(count(tab).split(", ")[1].split()[0])
    assert tab.run("map.state.points.length") == active
    box = "document.getElementById('map').getBoundingClientRect()"
    x, y = tab.run(f"[{box}.left + map.state.near[3][0], {box}.top + map.state.near[3][1]]")
    tab.click(x, y)
    tab.until("document.querySelector('dialog[open]')")
    opened = tab.run("document.getElementById('detail-title').textContent")
    assert opened.startswith("mixed/")
    near = tab.run(
        f"map.state.near.filter(([px, py]) => Math.hypot(px + {box}.left - {x},"
        f" py + {box}.top - {y}) < 1.5).map((point) => point[2])"
    )
    assert int(opened.split("/")[1]) in near
    tab.press("Escape")


def test_a_lasso_lists_what_it_holds(tab):
    tab.press("Shift")  # whoever moves is no longer held at the target of a link
    tab.run("document.getElementById('map').scrollIntoView()")
    tab.until("document.querySelector('#map[data-drawn]')")
    box = tab.run("(({left, top, width, height}) => [left, top, width, height])"
                  "(document.getElementById('map').getBoundingClientRect())")  # fmt: skip
    half = tab.run(f"map.state.near.filter(([x]) => x < {box[2] / 2}).length")
    tab.run("document.getElementById('map-lasso').click()")
    left, top, width, height = box
    right, bottom = width / 2, height - 10
    corners = [(10, 10), (right, 10), (right, bottom), (10, bottom)]
    tab.drag([(left + x, top + y) for x, y in corners])
    assert "in the lasso" in count(tab)
    assert int(count(tab).split()[0]) == half
    tab.run("document.querySelector('#count button').click()")
    assert count(tab).startswith("300 features")


def test_training_curves_are_drawn(tab):
    tab.run("document.getElementById('training').scrollIntoView()")
    tab.until("document.querySelectorAll('#training [data-figure]:not([data-drawn])').length === 0")
    curves = "[data-figure=fvu], [data-figure=l0], [data-figure=dead_share]"
    traces = f"[...document.querySelectorAll('{curves}')].map((e) => e.data.length)"
    assert tab.run(traces) == [3, 3, 3]


def test_texts_show_their_tokens(tab, page):
    tab.open(f"{page}#out/1")
    tab.until("document.querySelector('dialog[open]')")
    shown = tab.run("[...document.querySelectorAll('dialog .tokens')].map((e) => e.textContent)")
    if shown:
        assert all(set(line) <= set(" w</script><i>…") for line in shown)
    tab.press("Escape")
    tab.until("document.querySelectorAll('.card .tokens .peak').length > 0")
    heat = tab.run(
        "[...document.querySelectorAll('.card .peak')]"
        ".map((e) => e.style.getPropertyValue('--heat'))"
    )
    assert max(float(h or 0) for h in heat) == 1


def test_excerpts_among_the_findings_are_as_wide_as_their_card(tab, page):
    tab.open(f"{page}#findings")
    tab.until("[...document.querySelectorAll('[data-finding]')].every((e) => e.dataset.ready)")
    widths = tab.run(
        "[...document.querySelectorAll('.finding .excerpt .tokens')]"
        ".map((e) => e.offsetWidth / e.closest('.finding').offsetWidth)"
    )
    assert len(widths) == 6
    assert min(widths) > 0.7


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(1440, 1000), (400, 860)])
def test_pictures_and_texts_fit_and_can_be_read(tab, page, size, dark, tmp_path):
    tab.open(f"{page}#mixed", *size, dark=dark)
    tab.until("document.querySelector('.card')")
    tab.run("document.getElementById('cards').scrollIntoView()")
    tab.until("document.querySelectorAll('.card canvas[data-drawn]').length > 0")
    tab.run(OPEN)
    tab.run(SCROLL)
    tab.until(READY)
    assert tab.run("document.documentElement.scrollWidth") <= size[0]
    for fault in (WIDE, CONTRAST, BARE):
        assert tab.run(fault) == []
    picture = np.asarray(Image.open(io.BytesIO(tab.picture(tmp_path / "page.png"))).convert("L"))
    assert (picture[-40:, :6].mean() < 60) == dark
    tab.open(f"{page}#out/1", *size, dark=dark)
    tab.until("document.querySelector('dialog[open] .claims[data-ready]')")
    wide, box = tab.run("(({ scrollWidth, clientWidth }) => [scrollWidth, clientWidth])"
                        "(document.querySelector('dialog'))")  # fmt: skip
    assert wide <= box
    assert tab.run(CONTRAST) == []
    tab.press("Escape")
