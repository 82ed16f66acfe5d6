"""Recipes with absurd values: refused in a sentence that names the key, or accepted; no traceback.

Values are only validated here; nothing runs.
"""

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mechatlas.app.cli import config_type
from mechatlas.app.recipes import from_dict, read_recipe
from mechatlas.base import RecipeError, UserError
from tests.faults.fuzz import NASTY

BASES: dict[str, dict[str, Any]] = {
    "collect": {"network": {"name": "x"}, "sites": ["a"], "group": {"name": "C2"}},
    "train": {"store": "s"},
    "group_net": {"group": "C2"},
    "basis": {"network": {"name": "x"}, "layers": ["a", "b"]},
    "flow": {"dictionaries": ["a", "b"], "out": "o"},
    "match": {"dictionaries": ["a", "b"], "out": "o"},
    "symmetry": {"dictionary": "d", "store": "s", "out": "o"},
    "branches": {"dictionary": "d", "store": "s", "out": "o"},
    "circuit": {"dictionaries": ["a", "b"], "out": "o"},
    "prove": {"weights": "w"},
    "evaluate": {"dictionary": "d", "out": "o"},
    "effects": {"dictionary": "d", "out": "o"},
    "report": {"folder": "f", "out": "o"},
    "serve": {"folder": "f"},
    "verify": {"folder": "f"},
    "sweep": {"recipe": "r.toml"},
    "export": {"dictionary": "d", "format": "saelens", "out": "o"},
    "demo": {"out": "o"},
    "sites": {"network": "x"},
}
"""Fewest values of a recipe for each command."""
ABSURD = (-1, -(2**63), 2**63, 10**4000, math.inf, -math.inf, math.nan)
"""Numbers that no setting takes."""


def kind_of(command: str) -> Any:
    return config_type(importlib.import_module(f"mechatlas.app.commands.{command}"))


def fields_of(kind: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Path and type of every field of a recipe, and of each kind of table in it, by name."""
    for name, hint in get_type_hints(kind).items():
        if name not in {field.name for field in dataclasses.fields(kind)}:
            continue
        inside: list[Any] = [t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)]
        for table in inside:
            for place, inner, _ in fields_of(table, (*path, name)):
                yield place, inner, table.__name__
        if not inside:
            yield (*path, name), hint, ""


NUMBERS = [
    (command, place, kind, hint)
    for command in BASES
    for place, hint, kind in fields_of(kind_of(command))
    if {int, float} & {hint, *get_args(hint)}
]


def with_value(command: str, place: tuple[str, ...], kind: str, value: Any) -> dict[str, Any]:
    """The smallest recipe with one more value, in a table of a kind."""
    recipe: dict[str, Any] = dict(BASES[command])
    if place[0] == "source":  # in place of a store
        recipe = {"source": {"network": {"name": "x"}}}
    inner = recipe
    for key in place[:-1]:
        inner[key] = dict(inner.get(key, {}))
        inner = inner[key]
    if kind in ("Images", "Arrays", "Texts", "TopK", "BatchTopK", "ReLU", "JumpReLU", "Gated",
                "AuxK", "Resample"):  # fmt: skip
        inner["type"] = kind
        if kind in ("Arrays", "Texts"):
            inner.setdefault("source", "x")
    inner[place[-1]] = value
    return recipe


@pytest.mark.parametrize(("command", "place", "kind", "hint"), NUMBERS, ids=str)
def test_absurd_numbers_are_refused_by_name(command, place, kind, hint):
    for number in ABSURD:
        value: Any = number
        if hint is int or int in get_args(hint):
            value = number if isinstance(number, int) else None
        if value is None or (place[-1] == "outlier_norms" and number > 0):  # inf keeps all rows
            continue
        if str(hint).startswith("tuple"):
            value = [value]
        with pytest.raises(RecipeError, match=place[-1]) as error:
            from_dict(with_value(command, place, kind, value), kind_of(command), "recipe.toml")
        assert len(str(error.value)) < 9000


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.data())
def test_any_value_at_any_place_is_refused_in_a_sentence_or_accepted(data):
    command = data.draw(st.sampled_from(sorted(BASES)))
    place, _, kind = data.draw(st.sampled_from(list(fields_of(kind_of(command)))))
    value = data.draw(st.sampled_from(NASTY))
    with contextlib.suppress(UserError):
        from_dict(with_value(command, place, kind, value), kind_of(command), "recipe.toml")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff[",
        'a = "\\ud800"',
        "a = 1979-05-27T07:32:00Z",
        "a = nan\nb = inf",
        "\x00",
    ],
    ids=lambda text: text[:12],
)
def test_text_that_is_no_recipe_is_refused_in_a_sentence(tmp_path, text):
    file = tmp_path / "recipe.toml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    for command in BASES:
        with pytest.raises(UserError, match=r"recipe\.toml|recipe"):
            read_recipe(file, kind_of(command))
