import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.old_runs import COLUMNS, KEYS, renamed_columns
from mechatlas.app.report.chapters import symmetry
from mechatlas.app.report.page import assemble
from mechatlas.app.report.runs import find_runs
from mechatlas.app.run_folder import FEATURES, SYMMETRY_TENSORS, execute
from mechatlas.base import DiskError, UserError, no_progress
from mechatlas.dictionaries.formats import save
from mechatlas.files import read_json, write_json
from tests.app import posed
from tests.forging import forge

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    posed.write_store(root / "store", images=30)
    save(posed.group_crosscoder(), root / "crosscoder")
    config = SymmetryConfig(
        dictionary=root / "crosscoder", store=root / "store", out=root / "<b>symmetry"
    )
    execute(config)
    write_json(root / "crosscoder" / "manifest.json", {"kind": "dictionary", "site": "layer"})
    manifest = root / "<b>symmetry" / "manifest.json"
    kept = read_json(manifest)
    kept["group"]["elements"][4] = HOSTILE  # names of a user's own group
    forge(manifest.parent, kept)
    return root


@pytest.fixture(scope="module")
def made(folder):
    chapter = symmetry.chapter(find_runs(folder), no_progress)
    assert chapter is not None
    return chapter


def test_the_chapter_counts_every_feature_once(made):
    n = len(posed.features()[0])
    assert len(made.arrays["0/class"]) == n
    assert sorted(feature.latent for feature, _ in made.statements) == list(range(n))
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
    for name in ("manifest.json", "result.json", FEATURES):
        (tmp_path / name).write_bytes((folder / "<b>symmetry" / name).read_bytes())
    (tmp_path / SYMMETRY_TENSORS).write_text("nothing")
    with pytest.raises(UserError, match=r"symmetry\.safetensors cannot be read"):
        symmetry.chapter(find_runs(tmp_path), no_progress)
    (tmp_path / FEATURES).write_text("nothing")
    with pytest.raises(DiskError, match=r"features\.parquet is damaged"):
        symmetry.chapter(find_runs(tmp_path), no_progress)


def test_a_run_of_version_0_1_is_drawn_as_before(folder, made, tmp_path):
    """The same run under the keys, columns and tensors that version 0.1 wrote."""
    run = folder / "<b>symmetry"
    old_keys = {new: old for old, new in KEYS["symmetry"].items()}
    old_names = {new: old for old, new in COLUMNS["symmetry"].items()}

    def back(value: Any) -> Any:
        if isinstance(value, dict):
            return {old_keys.get(key, key): back(each) for key, each in value.items()}
        return [back(each) for each in value] if isinstance(value, list) else value

    result = back(read_json(run / "result.json"))
    result["causal"] = {"missing": result["causal"]["missing"]}
    assert {"alike", "chance_likeness"} <= set(result)
    write_json(tmp_path / "result.json", result)
    table = pq.read_table(run / FEATURES)
    columns = {old_names.get(name, name): table[name] for name in table.column_names}
    assert {"stabiliser_elements", "likeness", "swap_alignment"} <= set(columns)
    pq.write_table(pa.table(columns), tmp_path / FEATURES)
    tensors = load_file(run / SYMMETRY_TENSORS)
    save_file(
        {old_names.get(name, name): array for name, array in tensors.items()},
        tmp_path / SYMMETRY_TENSORS,
    )
    forge(tmp_path, read_json(run / "manifest.json"), schema=1)
    drawn = symmetry.chapter(find_runs(tmp_path), no_progress)
    assert drawn is not None
    assert drawn.figures == made.figures
    for name, array in made.arrays.items():
        np.testing.assert_array_equal(drawn.arrays[name], array)


def test_a_column_that_was_renamed_keeps_its_name_where_the_new_one_is_there_too():
    assert renamed_columns({"likeness": 1}, "symmetry") == {"similarity": 1}
    today = {"likeness": 1, "similarity": 2}
    assert renamed_columns(today, "symmetry") == today
