import json
import shutil
from pathlib import Path

import pytest

from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.old_runs import KEYS
from mechatlas.app.report.chapters import matching
from mechatlas.app.report.runs import find_runs
from mechatlas.app.run_folder import execute
from mechatlas.base import DiskError, no_progress
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.formats import save
from mechatlas.dictionaries.sparsity import TopK
from tests.forging import forge


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three dictionaries that were matched; the second is the first with other names."""
    root = tmp_path_factory.mktemp("runs")
    for number, seed in enumerate((0, 0, 1)):
        autoencoder = Autoencoder(d_in=12, n_latents=30, sparsity=TopK(k=4), seed=seed)
        save(autoencoder, root / f"<b>{number}")
    execute(
        MatchConfig(dictionaries=tuple(root / f"<b>{k}" for k in range(3)), out=root / "match"),
    )
    return root


def test_the_chapter_shows_every_pair_and_escapes_names(folder):
    made = matching.chapter(find_runs(folder), no_progress)
    assert made is not None
    assert len(made.arrays["0/pair"]) == 60
    assert (made.arrays["0/latent_a"][:30] == made.arrays["0/latent_b"][:30]).all()
    assert "<b>0" not in made.html
    assert "&lt;b&gt;0" in made.html
    json.dumps(made.figures, allow_nan=False)
    json.dumps(made.data, allow_nan=False)


def test_the_flow_counts_every_latent_once(folder):
    made = matching.chapter(find_runs(folder), no_progress)
    assert made is not None
    sankey = made.figures["flow0"]["data"][0]
    labels, link = sankey["node"]["label"], sankey["link"]
    leaving = [v for s, v in zip(link["source"], link["value"], strict=True)
               if labels[s].startswith("<b>0")]  # fmt: skip
    assert sum(leaving) == 30
    written = json.loads((folder / "match" / "result.json").read_text())["pairs"]
    going = [v for s, t, v in zip(link["source"], link["target"], link["value"], strict=True)
             if labels[s].startswith("<b>0") and "no partner" not in labels[t]]  # fmt: skip
    assert sum(going) == written[0]["matched"]


def test_matches_of_many_dictionaries_are_stacked_and_count_every_latent(folder, monkeypatch):
    monkeypatch.setattr(matching, "MOST_BANDED", 2)
    made = matching.chapter(find_runs(folder), no_progress)
    assert made is not None
    traces = made.figures["flow0"]["data"]
    assert [trace["name"] for trace in traces] == [f"since <b>{k}" for k in range(3)]
    heights = dict.fromkeys(traces[0]["x"], 0)
    for trace in traces:
        for name, n in zip(trace["x"], trace["y"], strict=True):
            heights[name] += n
    assert heights == {f"<b>{k}": 30 for k in range(3)}
    written = json.loads((folder / "match" / "result.json").read_text())["pairs"]
    assert traces[0]["y"][1] == written[0]["matched"]
    assert "its height is their number" in made.html


def test_runs_without_a_matching_have_no_such_chapter(folder, tmp_path):
    (tmp_path / "manifest.json").write_text('{"kind": "dictionary"}')
    assert matching.chapter(find_runs(tmp_path), no_progress) is None


def test_a_damaged_table_is_named(folder, tmp_path):
    for name in ("manifest.json", "result.json"):
        (tmp_path / name).write_bytes((folder / "match" / name).read_bytes())
    (tmp_path / "matches.parquet").write_text("no table")
    with pytest.raises(DiskError, match=r"matches\.parquet is damaged"):
        matching.chapter(find_runs(tmp_path), no_progress)


def old_keys(value):
    """A result as version 0.1 wrote it."""
    old = {new: old for old, new in KEYS["matching"].items()}
    if isinstance(value, dict):
        return {old.get(key, key): old_keys(each) for key, each in value.items()}
    return [old_keys(each) for each in value] if isinstance(value, list) else value


def test_a_result_of_version_0_1_is_drawn_like_todays(folder, tmp_path):
    result = json.loads((folder / "match" / "result.json").read_text())
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12}
    firing = {"p_b_given_a": estimate, "jaccard": estimate}
    ways = ("matched", "nearest", "same_index", "random")
    variance = {way: {"permuted": estimate, "rescaled": estimate} for way in ways}
    variance |= {way: {"permuted": estimate} for way in ("layer_drop", "b_reconstruction")}
    effect = {"variance_lost": estimate, "kl_divergence": estimate, "agreement": estimate}
    for pair in result["pairs"]:
        pair |= {
            "held_out_rows": 64, "co_firing": dict.fromkeys(ways, firing), "samples": 9,
            "explained_variance": variance, "spliced": dict.fromkeys((*ways, "b_mean"), effect),
        }  # fmt: skip
    pages = []
    for name, values in (("new", result), ("old", old_keys(result))):
        run = tmp_path / name / "match"
        shutil.copytree(folder / "match", run)
        (run / "result.json").write_text(json.dumps(values))
        forge(run, schema=1 + (name == "new"))
        made = matching.chapter(find_runs(tmp_path / name), no_progress)
        assert made is not None
        pages.append((made.html, made.data))
    assert "without_partner" in (tmp_path / "old" / "match" / "result.json").read_text()
    assert "nearest by cosine, many to one" in pages[0][0]
    assert pages[0] == pages[1]
