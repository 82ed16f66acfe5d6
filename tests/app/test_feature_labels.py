import json

import pytest

from mechatlas.app.feature_labels import names_of, read_feature_labels
from mechatlas.base import RecipeError

LABELS = {
    "schema": 1,
    "dictionaries": {
        "runs/a": {"site": "mixed", "features": {"1": {"name": "curve", "note": "left"}}},
        "b": {"site": "mixed", "features": {"0": {"name": "", "note": "?"}, "2": {"name": "dog"}}},
    },
}


def written(tmp_path, values):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(values))
    return path


def test_labels_are_those_of_the_dictionary(tmp_path):
    path = written(tmp_path, LABELS)
    assert read_feature_labels(path)["runs/a"] == {"1": {"name": "curve", "note": "left"}}
    assert names_of(path, tmp_path / "runs" / "a", 3) == [None, "curve", None]
    assert names_of(path, tmp_path / "b", 3) == [None, None, "dog"]


def test_labels_of_another_dictionary_are_refused(tmp_path):
    path = written(tmp_path, LABELS)
    with pytest.raises(RecipeError, match=r"labels of b, runs/a, expected one of the folder c"):
        names_of(path, tmp_path / "c", 3)
    with pytest.raises(RecipeError, match="names feature 2; the dictionary has 2"):
        names_of(path, tmp_path / "b", 2)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "is no file of labels"),
        ({"schema": 2, "dictionaries": {}}, "is no file of labels"),
        ({"schema": 1, "dictionaries": {"a": []}}, 'has no "features"'),
        ({"schema": 1, "dictionaries": {"a": {"features": {"x": {}}}}}, "the label of 'x'"),
        ({"schema": 1, "dictionaries": {"a": {"features": {"1": {"name": 3}}}}}, "both text"),
        ({"schema": 1, "dictionaries": {"a": {"features": {"1": 3}}}}, "both text"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, values, sentence):
    with pytest.raises(RecipeError, match=sentence):
        read_feature_labels(written(tmp_path, values))
