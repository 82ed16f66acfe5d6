import json
from pathlib import Path

import numpy as np
import pytest

from mechatlas.app.commands import symmetry as job
from mechatlas.app.report.chapters import symmetry
from mechatlas.app.report.page import assemble
from mechatlas.app.report.runs import find_runs
from mechatlas.base import DiskError, no_progress
from mechatlas.dictionaries.formats import save
from mechatlas.files import read_json, write_json
from tests.app import posed

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    posed.write_store(root / "store", images=30)
    save(posed.group_crosscoder(), root / "crosscoder")
    words = [root / "crosscoder", "--store", root / "store", "--out", root / "<b>symmetry"]
    job.run([str(word) for word in words])
    write_json(root / "crosscoder" / "manifest.json", {"kind": "dictionary", "site": "layer"})
    manifest = root / "<b>symmetry" / "manifest.json"
    kept = read_json(manifest)
    kept["group"]["elements"][4] = HOSTILE  # names of a user's own group
    write_json(manifest, kept)
    return root


@pytest.fixture(scope="module")
def made(folder):
    chapter = symmetry.chapter(find_runs(folder), no_progress)
    assert chapter is not None
    return chapter


def test_the_chapter_counts_every_feature_once(made):
    n = len(posed.features()[0])
    assert len(made.arrays["0/class"]) == n
    points = [len(trace["x"]) for trace in made.figures["map0"]["data"]]
    assert sum(points) == n
    text = "".join(made.figures["lattice0"]["data"][1]["text"])
    assert "<b>4</b>" in text
    assert "quarter-turn" in text
    json.dumps(made.data, allow_nan=False)
    json.dumps(made.figures, allow_nan=False)


def test_the_lattice_joins_a_class_with_those_next_to_it(made):
    edges = made.figures["lattice0"]["data"][0]["x"].count(None)
    assert edges == 11  # of D4: three up from {e}, five to order 4, three to the whole


def test_a_wheel_has_each_pose_of_a_family_at_its_place(made):
    blocks, stabilizers, _ = posed.features()
    families = made.data[0]["families"]
    assert [family["size"] for family in families] == [8, 4, 4, 2]
    for family in families:
        reference = blocks[family["reference"]]
        for h, feature in enumerate(family["slots"]):
            np.testing.assert_allclose(blocks[feature], reference[posed.D4.table[:, h]], atol=1e-5)
        places = family["slots"].count(family["reference"])
        assert places == len(stabilizers[family["reference"]])


def test_the_chapter_is_tied_to_the_dictionary_on_the_page_and_escapes_names(made):
    assert made.data[0]["run"] == "crosscoder"
    assert "<b>symmetry" not in made.html
    assert "&lt;b&gt;symmetry" in made.html
    assert HOSTILE not in made.html
    assert HOSTILE not in assemble("title", [made])


def test_runs_without_symmetry_have_no_such_chapter_and_damage_is_named(folder, tmp_path):
    (tmp_path / "manifest.json").write_text('{"kind": "dictionary"}')
    assert symmetry.chapter(find_runs(tmp_path), no_progress) is None
    for name in ("manifest.json", "result.json", job.TABLE):
        (tmp_path / name).write_bytes((folder / "<b>symmetry" / name).read_bytes())
    (tmp_path / job.TENSORS).write_text("nothing")
    with pytest.raises(DiskError, match=r"symmetry\.safetensors cannot be read"):
        symmetry.chapter(find_runs(tmp_path), no_progress)
    (tmp_path / job.TABLE).write_text("nothing")
    with pytest.raises(DiskError, match=r"features\.parquet cannot be read"):
        symmetry.chapter(find_runs(tmp_path), no_progress)
