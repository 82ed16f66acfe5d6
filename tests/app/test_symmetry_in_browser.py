"""The chapter on symmetry as a reader meets it, in a real Chromium."""

import pytest

from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.report.page import report
from mechatlas.app.run_folder import execute
from mechatlas.dictionaries.formats import save

from . import browser, posed
from .test_page_in_browser import DRIVER

PROGRAM = browser.find()
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(browser.NAMES)} is on PATH"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    root = tmp_path_factory.mktemp("symmetry")
    posed.write_store(root / "store", images=30)
    save(posed.group_crosscoder(), root / "crosscoder")
    config = SymmetryConfig(
        dictionary=root / "crosscoder", store=root / "store", out=root / "runs" / "symmetry"
    )
    execute(config)
    page = report(root / "runs", root / "atlas.html").as_uri()
    assert PROGRAM is not None
    opened = browser.Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    opened.open(f"{page}#symmetry")
    opened.run("document.querySelector('.members').scrollIntoView()")
    opened.until("document.querySelector('section.symmetry[data-ready]')")
    yield opened
    assert [c for c in opened.complaints if DRIVER not in c] == []
    asked = {r.partition("#")[0] for r in opened.requests if not r.startswith("blob:null/")}
    assert asked <= {page, "about:blank"}
    opened.close()


def test_a_class_can_be_chosen_and_shows_its_stabilizer_functions(tab):
    tab.run(
        "(() => { const box = document.querySelector('.which'); const option = [...box.options]"
        ".find((o) => o.text.startsWith('quarter-turn')); box.value = option.value; "
        "box.dispatchEvent(new Event('change')); })()"
    )
    assert tab.run("document.querySelectorAll('.members .card').length") == 2
    title = tab.run("document.querySelector('.members .polar title').textContent")
    likeness = dict(line.split(": ") for line in title.splitlines())
    assert all(abs(float(likeness[name]) - 1) < 0.1 for name in ("e", "r", "r^2", "r^3"))
    assert float(likeness["s"]) < 0.5


def test_a_family_is_a_wheel_with_all_its_poses(tab):
    assert tab.run("document.querySelectorAll('.wheel').length") == 2
    assert tab.run("document.querySelectorAll('.wheel .slot').length") == 16
    assert tab.run("document.querySelectorAll('.wheel .slot.none').length") == 0
    tab.run("document.querySelector('.after').click()")
    assert tab.run("document.querySelector('.at').textContent") == "2 of 2"


def test_the_figures_are_drawn(tab):
    tab.run("document.querySelector('[data-figure=lattice0]').scrollIntoView()")
    for name in ("lattice0", "r20"):
        tab.run(f"document.querySelector('[data-figure={name}]').scrollIntoView()")
        tab.until(f"document.querySelector('[data-figure={name}]').dataset.drawn")
