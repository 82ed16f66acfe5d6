"""Recipes: configurations of commands as TOML files.

    read_recipe       a TOML file -> a configuration, or every mistake in it at once
    from_dict         plain values -> a configuration, such as those kept in a manifest
    as_dict           a configuration -> plain values, as kept in manifests and `recipe.toml`

Paths in a recipe are relative to the folder where the command runs.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import cattrs
from cattrs.gen import make_dict_structure_fn

from mechatlas import deprecated
from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network
from mechatlas.activations.samples import SampleRecipe
from mechatlas.base import DiskError, RecipeError
from mechatlas.dictionaries.revival import AuxK, Resample
from mechatlas.dictionaries.sparsity import Sparsity, TopK
from mechatlas.files import MANIFEST, read_toml
from mechatlas.remote import fetched, written

Recipe = TypeVar("Recipe")


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Path, lambda value, _: Path(_typed(value, str)))
    for plain in (str, int, bool):
        converter.register_structure_hook(plain, _typed)
    converter.register_structure_hook(float, lambda value, _: float(_typed(value, (int, float))))
    structure_network = make_dict_structure_fn(Network, converter)

    def network(value: Any, _: type) -> Network:
        return structure_network({"name": value} if isinstance(value, str) else value, Network)

    converter.register_structure_hook(Network, network)
    converter.register_unstructure_hook(Path, written)
    for union, default in ((SampleRecipe, Images), (Sparsity, TopK), (AuxK | Resample, AuxK)):
        _tell_kinds_by_type(converter, union, default)
    either: Any = AuxK | Resample
    converter.register_structure_hook(
        AuxK | Resample | None,
        lambda value, _: None if value is None else converter.structure(value, either),
    )
    converter.register_unstructure_hook(
        AuxK | Resample | None,
        lambda value: None if value is None else converter.unstructure(value, either),
    )
    return converter


def _tell_kinds_by_type(converter: cattrs.Converter, union: Any, default: type) -> None:
    # One of cattrs' own would take an unknown type for the default.
    kinds = {kind.__name__: kind for kind in get_args(union)}

    def structure(value: Any, _: Any) -> Any:
        fields = dict(_typed(value, dict))
        name = fields.pop("type", default.__name__)
        if name not in kinds:
            raise ValueError(f"expected one of the types {', '.join(kinds)}, got {name!r}")
        return converter.structure(fields, kinds[name])

    def unstructure(value: Any) -> dict[str, Any]:
        return {"type": type(value).__name__, **converter.unstructure(value)}

    converter.register_structure_hook(union, structure)
    converter.register_unstructure_hook(union, unstructure)


def _typed(value: Any, kind: Any) -> Any:
    # cattrs would turn "12" into 12 and 3.7 into 3; a recipe says what it means.
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"expected {kinds[-1].__name__}, got {value!r}")
    return value


CONVERTER = _converter()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustConfig:
    """Fields of commands that reopen the network of a store; given on the command line only."""

    network: tuple[str, ...] = ()
    """Networks that stores may name, as `package.module:factory`: their code runs. Bundled ones
    need no such word."""
    trust: bool = False
    """Run the code of whatever network a store names."""


def _spoken(kind: Any) -> tuple[str, ...]:
    """Fields of a configuration that are read from the command line only."""
    names = {field.name for field in dataclasses.fields(kind)}
    names_of_trust = ("network", "trust") if issubclass(kind, TrustConfig) else ("trust",)
    return tuple(name for name in names_of_trust if name in names)


def read_raw(path: Path) -> dict[str, Any]:
    """Read the values of a recipe file, whatever they are for.

    Raises:
        RecipeError: There is no such file, or it is not TOML.
    """
    if not path.exists():
        raise RecipeError(f"There is no recipe file {path}.")
    try:
        return read_toml(path)
    except DiskError as error:
        raise RecipeError(str(error)) from error


def read_recipe(path: Path, kind: type[Recipe]) -> Recipe:
    """Read a recipe file; the `recipe.toml` in the folder of a run is for that folder.

    Raises:
        RecipeError: There is no such file, it is not TOML, or it has unknown keys or wrong
            values; the message lists all of them.
    """
    path = fetched(path)
    raw = read_raw(path)
    if path.name == "recipe.toml" and (path.parent / MANIFEST).is_file():
        raw.setdefault("out", written(path.parent))
    refuse_spoken(path, raw, kind)
    return from_dict(deprecated.renamed_keys(_command(kind), raw), kind, str(path))


def refuse_spoken(path: Path, raw: dict[str, Any], kind: type) -> None:
    """Refuse values of a recipe that are read from the command line only.

    Args:
        path: File of the recipe.
        raw: Values by key.
        kind: Dataclass of the configuration.

    Raises:
        RecipeError: It says which code may run.
    """
    if spoken := [key for key in _spoken(kind) if key in raw]:
        raise RecipeError(
            f"{path} has {', '.join(spoken)}: code that may run is named on the command line only."
        )


def _command(kind: type) -> str:
    return kind.__name__.removesuffix("Config").lower()


def from_dict(raw: dict[str, Any], kind: type[Recipe], source: str) -> Recipe:
    """Make a configuration from plain values; keys of version 0.1 are renamed.

    Args:
        raw: Values by key.
        kind: Dataclass of the configuration.
        source: File that they come from, for messages.

    Raises:
        RecipeError: Unknown keys or wrong values; the message lists all of them.
    """
    try:
        values = deprecated.renamed_keys(_command(kind), raw, quiet=True)
        return CONVERTER.structure(values, kind)
    except cattrs.BaseValidationError as error:
        mistakes = "".join(f"\n  {line}" for line in _mistakes(error, kind))
        raise RecipeError(f"{source} is not a {kind.__name__} recipe:{mistakes}") from error


def _mistakes(error: cattrs.BaseValidationError, kind: type) -> list[str]:
    known = sorted(_keys(kind))
    lines = []
    for line in cattrs.transform_error(error, path="recipe", format_exception=_describe):
        text = line.removeprefix("extra fields found (")
        if text != line:
            names, _, place = text.partition(") @ ")
            for name in names.split(", "):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                lines.append(f"unknown key {name}{hint} @ {place}")
        else:
            lines.append(line)
    return lines


def _describe(error: BaseException, kind: Any) -> str:
    if isinstance(error, KeyError):
        return f"missing key {error.args[0]}"
    if isinstance(error, ValueError):
        return str(error)
    if " not in literal " in str(error):
        value = str(error).partition(" not in literal ")[0]
        return f"expected one of {', '.join(map(repr, get_args(kind)))}, got {value!r}"
    return cattrs.v.format_exception(error, kind)


def _keys(kind: type) -> set[str]:
    """Every key that a recipe or a table inside it can have."""
    keys: set[str] = set()
    for field in dataclasses.fields(kind):
        keys.add(field.name)
        for part in (field.type, *get_args(field.type)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                keys |= _keys(part)
    return keys


def as_dict(recipe: Any) -> dict[str, Any]:
    """Plain values that `from_dict` reads back.

    Keys without a value are left out, and so is the trust in code.
    """
    values = CONVERTER.unstructure(recipe, unstructure_as=type(recipe))
    left_out = _spoken(type(recipe))
    return _without_none({key: value for key, value in values.items() if key not in left_out})


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
