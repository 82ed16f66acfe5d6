"""The command line: `mechatlas COMMAND ...`.

Exit codes: 0 success, 2 a mistake of the user's (one sentence, no traceback), 1 one of ours.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Never

import tyro
from tyro.conf import Positional, arg

from mechatlas.base import UserError
from mechatlas.deprecated import renamed_flags

OVERVIEW = """\
mechatlas: an atlas of the features of a trained PyTorch network.

usage: mechatlas COMMAND ...

  demo     --out DIR                         the whole tour on bundled inputs, in about a minute
  sites    NETWORK                           list the sites and branches of a network
  collect  RECIPE.toml [--field value ...]   network, samples -> activation store
  train    RECIPE.toml [--field value ...]   activation store -> dictionary
  basis    RECIPE.toml [--field value ...]   network, samples -> degeneracy, interaction basis
  match    DICT_A DICT_B [...] --out DIR     which latent is which, with proof and false match rate
  symmetry DICT --store STORE --out DIR      what leaves each feature unchanged; families of poses
  branches DICT --store STORE --out DIR      which branch of its site each feature belongs to
  circuit  DICT_A DICT_B [...] --out DIR     which feature is made of which, by which branch
  prove    WEIGHTS --table TABLE --out DIR   bound the accuracy of a group-operation network
  report   DIR --out page.html               folder of runs -> one HTML page

Try:

  mechatlas demo --out runs/demo
  mechatlas sites inception_mini
  mechatlas collect recipes/quick/collect.toml --samples.crops 20
  mechatlas COMMAND --help

Every command takes --json: print the result as one JSON object, and nothing else.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole tour on bundled inputs: collect, train, draw the page. No network access.

    Example:  mechatlas demo --out runs/demo
    """

    out: Path
    """Folder for the runs and the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SitesConfig:
    """List the sites of a network, with shapes and branches.

    Examples:  mechatlas sites inception_mini
               mechatlas sites squeezenet --weights squeezenet.safetensors
               mechatlas sites my_package.my_module:my_factory --shape 3 32 32
    """

    network: Annotated[Positional[str], arg(metavar="NETWORK")]
    """A bundled name, `package.module:factory`, or a recipe with a [network] table."""
    weights: Path | None = None
    """File of weights for it."""
    shape: tuple[int, ...] = ()
    """Shape of one sample; only for networks that do not say what they expect."""
    everything: bool = False
    """Also list the modules inside other sites' modules."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw one self-contained HTML page of all runs in a folder.

    Example:  mechatlas report runs/demo --out atlas.html
    """

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder with the runs (stores and dictionaries), itself one or up to two levels above."""
    out: Path
    """The page to write."""
    pictures: int = 0
    """Features of each dictionary of images for which a picture is made that excites them most,
    and one of their part in a branch: those most in each branch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits by itself unless the command succeeded.

    Raises:
        SystemExit: 2 for a user's mistake, 130 when interrupted, 0 after help.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words or words[0] in ("-h", "--help"):
        print(OVERVIEW)
        raise SystemExit(0 if words else 2)
    command = COMMANDS.get(words[0])
    if command is None:
        fail(f"There is no command {words[0]!r}. Commands: {', '.join(COMMANDS)}.")
    try:
        result, text = command(renamed_flags(words[0], words[1:]))
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("mechatlas: interrupted; what was finished is kept.", file=sys.stderr)
        raise SystemExit(130) from None
    print(json.dumps(result) if as_json else text)


def fail(message: str) -> Never:
    """Say what the user can mend.

    Raises:
        SystemExit: Always, with code 2.
    """
    print(f"mechatlas: {message}", file=sys.stderr)
    raise SystemExit(2)


FLAT = (tyro.conf.AvoidSubcommands,)  # a recipe has chosen its kind of samples already

Answer = tuple[dict[str, Any], str]
"""What a command found, and the same in words."""


def demo(words: list[str]) -> Answer:
    """Run the tour."""
    from mechatlas.app.commands import demo as tour

    options = tyro.cli(DemoConfig, args=words, prog="mechatlas demo")
    result = tour.run(options.out)
    return result, tour.in_words(result)


def sites(words: list[str]) -> Answer:
    """List sites."""
    from mechatlas.app.commands import sites as listing

    options = tyro.cli(SitesConfig, args=words, prog="mechatlas sites")
    found = listing.sites(options.network, options.weights, options.shape)
    return found, listing.in_words(found, everything=options.everything)


def collect(words: list[str]) -> Answer:
    """Collect a store."""
    from mechatlas.app import recipes
    from mechatlas.app.commands import train as jobs

    result = jobs.collect(from_words(recipes.CollectConfig, words, "collect"))
    widths = ", ".join(f"{n} ({s['rows']} rows)" for n, s in result["sites"].items())
    skipped = f"; skipped {result['skipped']} unreadable samples" if result["skipped"] else ""
    return result, f"Collected {widths}{skipped}.\nStore: {result['out']}"


def train(words: list[str]) -> Answer:
    """Train a dictionary, or a network on a group's table."""
    from mechatlas.app import group_nets, recipes
    from mechatlas.app.commands import train as jobs

    if group_nets.is_recipe(words):
        made = group_nets.train(from_words(group_nets.GroupNetConfig, words, "train"))
        return dataclasses.asdict(made), group_nets.in_words(made)
    result = jobs.train(from_words(recipes.TrainConfig, words, "train"))
    quality = f"fvu {result['fvu']:.4f}, l0 {result['l0']:.1f}, dead {result['dead_share']:.1%}"
    return result, f"Held out: {quality}.\nDictionary: {result['out']}"


def basis(words: list[str]) -> Answer:
    """Degeneracy and interaction basis."""
    from mechatlas.app import recipes
    from mechatlas.app.commands import basis as interact

    result = interact.interact(from_words(recipes.BasisConfig, words, "basis"))
    return result, interact.in_words(result)


def match(words: list[str]) -> Answer:
    """Match dictionaries."""
    from mechatlas.app.commands import match as matching

    return matching.main(words)


def symmetry(words: list[str]) -> Answer:
    """Classify features by what leaves them unchanged."""
    from mechatlas.app.commands import symmetry as job

    return job.main(words)


def branches(words: list[str]) -> Answer:
    """Test features for a branch of their own."""
    from mechatlas.app.commands import branches as job

    return job.run(words)


def circuit(words: list[str]) -> Answer:
    """Find circuits."""
    from mechatlas.app.commands import circuit as job

    return job.main(words)


def prove(words: list[str]) -> Answer:
    """Prove a bound, or check a proof."""
    from mechatlas.app.commands import prove as job

    return job.run(words)


def report(words: list[str]) -> Answer:
    """Draw the page."""
    from mechatlas.app.commands import train as jobs

    options = tyro.cli(ReportConfig, args=words, prog="mechatlas report")
    result = jobs.report(options.folder, options.out, pictures=options.pictures)
    return result, f"Page: {result['page']} ({result['bytes'] / 2**20:.1f} MiB)"


COMMANDS: dict[str, Callable[[list[str]], Answer]] = {
    "demo": demo,
    "sites": sites,
    "collect": collect,
    "train": train,
    "basis": basis,
    "match": match,
    "symmetry": symmetry,
    "branches": branches,
    "circuit": circuit,
    "prove": prove,
    "report": report,
}


def from_words(kind: type[Any], words: list[str], command: str) -> Any:
    """A recipe from `RECIPE.toml [--field value ...]`.

    Raises:
        RecipeError: No recipe file was named, or it has mistakes.
    """
    from mechatlas.app.recipes import read_recipe
    from mechatlas.base import RecipeError

    described = f"{kind.__doc__}\n\nExample:  mechatlas {command} recipes/quick/{command}.toml"
    prog = f"mechatlas {command} RECIPE.toml"
    files = [word for word in words[:1] if word.endswith(".toml")]
    if not files:
        if "-h" in words or "--help" in words:
            tyro.cli(kind, args=["--help"], prog=prog, description=described, config=FLAT)
        raise RecipeError(
            f"`mechatlas {command}` needs a recipe file first: mechatlas {command} RECIPE.toml "
            f"[--field value ...]. `mechatlas {command} --help` lists the fields."
        )
    recipe = read_recipe(Path(files[0]), kind)
    try:
        return tyro.cli(
            kind, args=words[1:], default=recipe, prog=prog, description=described, config=FLAT
        )
    except ValueError as error:
        raise RecipeError(f"{error} (on the command line, over {files[0]})") from error
