"""Recipes: what a run is made from, as a TOML file and as a dataclass.

    Collect, Train, Interact    the recipes
    read_recipe       a TOML file -> a recipe, or every mistake in it at once
    as_dict           a recipe -> plain values, as kept in manifests and `recipe.toml`
    reopen            the recipe of a store -> its network and samples

Paths in a recipe are relative to the folder where the command runs.
"""

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

import cattrs
from cattrs.gen import make_dict_structure_fn
from torch import nn

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network, load_network
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.samples import (
    Images,
    SampleRecipe,
    Samples,
    open_samples,
)
from mechatlas.analysis.interaction.analysis import InteractionConfig
from mechatlas.base import RecipeError
from mechatlas.deprecated import renamed_keys
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, SparseCoder, Transcoder
from mechatlas.dictionaries.objective import Objective, Schedule
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.revival import AuxK, Resample
from mechatlas.dictionaries.sparsity import Sparsity, TopK
from mechatlas.maths.groups import Group

Recipe = TypeVar("Recipe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Run a network over samples and write the activations at some sites to a store."""

    network: Network
    """Which network, with which weights."""
    sites: tuple[str, ...]
    """Sites or globs, such as "mixed4*" or "mixed4a/5x5"; see `mechatlas sites NETWORK`."""
    samples: SampleRecipe = dataclasses.field(default_factory=Images)
    """What to run it on: Images, Arrays or Texts."""
    collecting: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    """Positions, number format, memory."""
    group: PoseConfig | None = None
    """Keep the activations of every input in all poses of a group, such as `name = "D4"` in a
    table [group]; by default only of the input as it is."""
    out: Path = Path("store")
    """Folder of the store. The same command continues an unfinished one."""
    device: str = "cpu"
    """Where the network runs, such as "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites must name at least one site.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train one dictionary on the activations of one site."""

    store: Path
    """Activation store to read, as written by `mechatlas collect`."""
    site: str | None = None
    """Site of the store that is read, or a branch of it; may be left out if there is one only."""
    writes: tuple[str, ...] = ()
    """Sites that are written, if not the one read: one makes a transcoder, several a crosscoder,
    which reads all of them if `site` is left out. The store must be collected as paired."""
    out: Path = Path("dictionary")
    """Folder for the weights, the recipe and the training curve."""
    n_latents: int = 4096
    """Size of the dictionary."""
    sparsity: Sparsity = dataclasses.field(default_factory=TopK)
    """What makes the code sparse: TopK, BatchTopK, ReLU, JumpReLU or Gated."""
    tied: bool = False
    """The encoder is the transpose of the decoder."""
    pose_tied: bool = False
    """Of a store with a group: few atoms in all poses, and one encoder for every pose, instead of
    a crosscoder that reads the input as it is and writes all poses."""
    matryoshka_widths: tuple[int, ...] = ()
    """Numbers of first latents that must explain the activations on their own (Matryoshka)."""
    steps: int = 20_000
    """Optimizer steps."""
    batch_size: int = 4096
    """Rows in a step."""
    lr: float = 1e-3
    """Largest learning rate of Adam."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """Learning rate and sparsity warm-up over the run."""
    objective: Objective = dataclasses.field(default_factory=Objective)
    """Squared error that is minimized, and the limit of its gradient."""
    revival: AuxK | Resample | None = None
    """How dead latents are brought back, such as `k = 256` in a table [revival]; by default not."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints. The same command continues a run that was stopped."""
    seed: int = 0
    """Seed of the weights and of the order of batches."""
    device: str = "cpu"
    """Where to train, such as "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        for name in ("n_latents", "steps", "batch_size", "lr", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}.")
        if len(self.writes) == 1 and (self.tied or self.site in (None, *self.writes)):
            raise ValueError(
                f"A transcoder to {self.writes[0]} needs another site to read, and cannot be tied."
            )
        if self.pose_tied and (self.writes or self.tied or self.matryoshka_widths or self.revival):
            raise ValueError("pose_tied goes without writes, tied, matryoshka_widths and revival.")
        if not self.pose_tied:
            self.build(dict.fromkeys(self.sites, 1))  # refuses what cannot be

    @property
    def sites(self) -> tuple[str | None, ...]:
        """Sites whose columns make up a row."""
        return (self.site, *self.writes) if len(self.writes) < 2 else self.writes

    def build(self, widths: dict[str | None, int], group: Group | None = None) -> SparseCoder:
        """The dictionary, for sites of these widths.

        Args:
            widths: Width of each site.
            group: That of the store, if its rows hold a block for every element.

        Raises:
            ValueError: It cannot be built as asked.
        """
        options: dict[str, Any] = {
            "n_latents": self.n_latents,
            "sparsity": self.sparsity,
            "matryoshka_widths": self.matryoshka_widths,
            "seed": self.seed,
        }
        if group is not None:
            return self._of_group(group, widths[self.site], options)
        if self.pose_tied:
            raise ValueError("pose_tied needs a store that was collected with a [group].")
        if not self.writes:
            return Autoencoder(d_in=widths[self.site], tied=self.tied, **options)
        if len(self.writes) == 1:
            return Transcoder(d_in=widths[self.site], d_out=widths[self.writes[0]], **options)
        written = {site: widths[site] for site in self.writes}
        return Crosscoder(widths=written, reads=self.site, tied=self.tied, **options)

    def _of_group(self, group: Group, width: int, options: dict[str, Any]) -> SparseCoder:
        """Of all poses, read from the untransformed block or, pose-tied, from every block.

        Raises:
            ValueError: It cannot be built as asked.
        """
        if self.writes or self.tied:
            raise ValueError("A dictionary of a store with a group goes without writes and tied.")
        if self.pose_tied:
            del options["matryoshka_widths"]
            return PoseTied(group=group, d_in=width, **options)
        names = group.element_names
        if len(set(names)) < group.order:
            names = tuple(map(str, range(group.order)))
        widths = dict.fromkeys(names, width // group.order)
        return Crosscoder(widths=widths, reads=names[0], **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisConfig:
    """Degeneracy, interaction basis and modules of some layers of a network."""

    network: Network
    """Which network, with which weights."""
    layers: tuple[str, ...]
    """Sites in the order in which the network reaches them; the last holds the outputs."""
    samples: SampleRecipe = dataclasses.field(default_factory=Images)
    """What to run it on: Images, Arrays or Texts."""
    labels: Path | None = None
    """An .npy file with one right answer a sample; without it the network's own count as right."""
    n_samples: int = 4096
    """At most so many samples, evenly spread over those there are."""
    dictionaries: dict[str, Path] = dataclasses.field(default_factory=dict)
    """By layer: a folder or file of a dictionary whose latents are compared with the bases."""
    how: InteractionConfig = dataclasses.field(default_factory=InteractionConfig)
    """Bases to compare, samples for Jacobians and ablations, thresholds."""
    out: Path = Path("basis")
    """Folder for the bases, the edges and the result."""

    def __post_init__(self) -> None:
        if len(self.layers) < 2:
            raise ValueError(f"layers must name at least two layers, got {len(self.layers)}.")
        if self.n_samples < 2:
            raise ValueError(f"n_samples must be at least 2, got {self.n_samples}.")


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
    converter.register_unstructure_hook(Path, str)
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


def read_recipe(path: Path, kind: type[Recipe]) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: There is no such file, it is not TOML, or it has unknown keys or wrong
            values; the message lists all of them.
    """
    try:
        raw = tomllib.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read ({error}).") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}.") from error
    return from_dict(raw, kind, str(path))


def from_dict(raw: dict[str, Any], kind: type[Recipe], source: str) -> Recipe:
    """A recipe from plain values.

    Raises:
        RecipeError: Unknown keys or wrong values; the message lists all of them.
    """
    command = kind.__name__.removesuffix("Config").lower()
    try:
        return CONVERTER.structure(renamed_keys(command, raw), kind)
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
    found: set[str] = set()
    for field in dataclasses.fields(kind):
        found.add(field.name)
        for part in (field.type, *get_args(field.type)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                found |= _keys(part)
    return found


def as_dict(recipe: Any) -> dict[str, Any]:
    """Plain values that `from_dict` reads back; keys without a value are left out."""
    return _without_none(CONVERTER.unstructure(recipe, unstructure_as=type(recipe)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def reopen(recipe: dict[str, Any]) -> tuple[nn.Module, Samples]:
    """The network and the samples that a store was collected from.

    Raises:
        RecipeError: The recipe is not one of `mechatlas collect`.
        UserError: The network or the samples are no longer there.
    """
    collected = from_dict(recipe, CollectConfig, "The store's manifest")
    network = load_network(collected.network)
    return network, open_samples(collected.samples, network)
