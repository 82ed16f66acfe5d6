import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mechatlas.app.old_runs import renamed
from mechatlas.app.report.chapters import branches
from mechatlas.app.report.runs import find_runs
from mechatlas.base import DiskError, no_progress

HOSTILE = "<i>1x1"
BRANCH = {
    "first": 0, "last": 2, "width": 2, "expected_share": 0.6, "mean_share": 0.5, "specialised": 1,
    "specialised_share": 0.3, "low": 0.1, "high": 0.6, "home_of": 1, "specialised_by_lot": 0,
    "power": 0.7,
}  # fmt: skip
AGREED = {"pairs": 9, "value": 0.8, "low": 0.5, "high": 0.9, "chance": 0.4, "p_value": 0.01,
          "kappa": 0.6}  # fmt: skip
RESULT = {
    "site": "mixed", "rate": 0.05, "n_features": 3, "tested": 2, "never_active": 1,
    "specialised": 1, "specialised_by_lot": 0, "false_discovery_rate_by_lot": 0.0, "rows": 100,
    "positive": True, "shares_agree": {"activation": None, "ablation": 0.5},
    "branches": [{"name": HOSTILE, **BRANCH}, {"name": "3x3", **BRANCH}],
    "consistency": [
        {"a": "x", "b": "y", "same_branch": AGREED, "same_branch_of_equal_size": {"pairs": 0},
         "leaning": {"same_branch": AGREED, "same_branch_of_equal_size": AGREED}}
    ],
    "labels": {"from": "l.parquet:kind", "kinds": 1, "enriched": 1, "surest": [
        {"branch": "3x3", "label": "curve", "both": 1, "in_branch": 1, "with_label": 1,
         "total": 2, "p_value": 0.001, "q_value": 0.002}]},
    "seconds": 1.5, "peak_bytes": 10,
}  # fmt: skip


@pytest.fixture(params=[1, 2])
def folder(request, tmp_path):
    """A finished run of version 0.1 (schema 1) or today, with a hostile name."""
    manifest = {"kind": "branches", "dictionary": str(tmp_path), "site": "mixed"}
    manifest |= {"schema": request.param}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    result = RESULT if request.param == 1 else renamed(RESULT, "branches")
    (tmp_path / "result.json").write_text(json.dumps(result))
    picture = {"rows": [[0.1, 0.2], [0.3, 0]], "channels": [0, 1], "branch": [0, -1],
               "loading": [0.1, 0.2], "explained": 0.4}  # fmt: skip
    (tmp_path / "picture.json").write_text(json.dumps(picture))
    nan = float("nan")
    columns = {
        "feature": [0, 0, 1, 1, 2, 2],
        "branch": [HOSTILE, "3x3"] * 3,
        "share": [0.99, 0.1, 0.6, 0.8, nan, nan],
        "expected_share": [0.6, 0.8] * 3,
        "q_value": [0.001, 1, 0.9, 0.8, nan, nan],
        "activation_share": [0.9, 0.1, 0.5, 0.5, nan, nan],
        "ablation_share": [0.9, 0.1, 0.5, 0.5, nan, nan],
        "active_rows": [50, 50, 40, 40, 0, 0],
    }
    pq.write_table(pa.table(columns), tmp_path / "features.parquet")
    return tmp_path


def test_the_chapter_shows_counts_features_and_layers_and_escapes_names(folder):
    made = branches.chapter(find_runs(folder), no_progress)
    assert made is not None
    assert HOSTILE not in made.html
    assert "&lt;i&gt;1x1" in made.html
    for words in ("1 of 2", "80%", "curve", "0</span> such pairs"):
        assert words in made.html
    strongest = made.data[0]["strongest"]
    assert [one["feature"] for one in strongest[0]] == [0, 1]
    assert [one["significant"] for one in strongest[0]] == [True, False]
    assert not any(one["significant"] for one in strongest[1])
    json.dumps(made.figures, allow_nan=False)
    json.dumps(made.data, allow_nan=False)
    grey, red = made.figures["shares0"]["data"]
    assert (len(grey["y"]), len(red["y"])) == (3, 1)


def test_runs_without_branches_have_no_such_chapter(tmp_path):
    (tmp_path / "manifest.json").write_text('{"kind": "dictionary"}')
    assert branches.chapter(find_runs(tmp_path), no_progress) is None


def test_a_damaged_table_is_named(folder):
    (folder / "features.parquet").write_text("no table")
    with pytest.raises(DiskError, match=r"features\.parquet cannot be read"):
        branches.chapter(find_runs(folder), no_progress)
