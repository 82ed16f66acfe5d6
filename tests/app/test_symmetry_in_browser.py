"""The chapter on symmetry as a reader meets it, in a real Chromium."""

import re
import shutil

import pytest

from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.report.page import report
from mechatlas.app.run_folder import execute
from mechatlas.dictionaries.formats import save
from mechatlas.files import write_json

from . import browser, posed
from .test_page_in_browser import DRIVER
from .test_page_walk import BARE, CONTRAST

PROGRAM = browser.find()
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(browser.NAMES)} is on PATH"),
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Page of features that saw synthetic stimuli, in a network that can be run again."""
    root = tmp_path_factory.mktemp("tuned")
    posed.turning_world(root)
    facts = {"kind": "dictionary", "site": "seen", "store": str(root / "store")}
    write_json(root / "plain" / "manifest.json", facts)
    execute(
        SymmetryConfig(
            dictionary=root / "plain", store=root / "store", out=root / "symmetry", trust=True,
            interventions=0,
        )
    )  # fmt: skip
    return report(root, root / "atlas.html", trust=True).as_uri()


@pytest.fixture(scope="module")
def zeroed(tmp_path_factory):
    """Page of a crosscoder of which a block was zeroed, and one copied to a latent of its own."""
    root = tmp_path_factory.mktemp("zeroed")
    blocks, _ = posed.turning_world(root)
    made = posed.group_crosscoder(blocks, zeroed=[(0, 3)], decoupled=[(1, 2)])
    shutil.rmtree(root / "plain")
    save(made, root / "crosscoder")
    facts = {"kind": "dictionary", "site": "seen", "store": str(root / "store")}
    write_json(root / "crosscoder" / "manifest.json", facts)
    execute(
        SymmetryConfig(
            dictionary=root / "crosscoder", store=root / "store", out=root / "symmetry", trust=True,
            interventions=0, stimuli=0,
        )
    )  # fmt: skip
    return report(root, root / "atlas.html", trust=True).as_uri()


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
    own = ("blob:null/", "about:blank", "file:")
    assert [r for r in opened.requests if not r.startswith(own)] == []
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


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (420, True)])
def test_a_dossier_draws_the_tuning_of_its_feature(tab, tuned, width, dark):
    tab.open(f"{tuned}#seen/24", width, 900, dark=dark)
    tab.until("document.querySelector('dialog[open] .claims[data-ready] .stimulus[data-drawn]')")
    dial = "document.querySelector('[aria-label^=\"response to the stimulus\"]')"
    assert tab.run(f"{dial}.querySelectorAll('polygon')[1].points.numberOfItems") == 16
    said = tab.run(f"{dial}.closest('.claim').textContent")
    assert "Responds alike every 90°" in said  # the feature is unchanged by half-turns
    assert "Under the stabilizer claimed from its blocks 1 [1, 1]" in said
    # The stimulus is painted: black in the middle, white around it.
    middle, edge = tab.run(
        "(({ data }) => [48, 2].map((x) => [...data.slice(4 * x, 4 * x + 4)]))(document"
        ".querySelector('.stimulus').getContext('2d').getImageData(0, 48, 96, 1))"
    )
    assert max(middle[:3]) < 40
    assert min(edge) > 215
    assert tab.run(BARE) == []
    assert tab.run(CONTRAST) == []
    box = tab.run("(({ scrollWidth, clientWidth }) => [scrollWidth, clientWidth])"
                  "(document.querySelector('dialog'))")  # fmt: skip
    assert box[0] <= box[1]
    tab.open(f"{tuned}#seen?q=stimulus:center")
    tab.until("/^\\d+ of 29/.test(document.getElementById('count').textContent)")


def test_a_dossier_names_zero_blocks_and_the_latent_that_writes_one(tab, zeroed):
    says = "document.querySelector('dialog[open] .claims[data-ready]').textContent"
    for feature, said in (
        (0, "r^3 shrunk although the code drives it (driven "),
        (1, "r^2 written"),
    ):
        tab.open(f"{zeroed}#seen/{feature}", 1400, 900)
        tab.until("document.querySelector('dialog[open] .claims[data-ready]')")
        assert said in tab.run(says)
    assert re.search(r"similar to itself under .+ by -?\d.* \[.+, .+\]", tab.run(says))
    assert "written by other latents, most by 29" in tab.run(says)
    assert tab.run("document.querySelectorAll('.claims [data-feature=\"29\"]').length") >= 1
