"""The command line: `mechatlas COMMAND ...`.

Each command is a module of `mechatlas.app.commands` with a dataclass `...Config`, `run` and
`in_words`. Exit codes: 0 success, 2 a mistake of the user's (one sentence, no traceback), 1 one of
ours, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM); what was finished is kept in both cases.
"""

import ast
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Never

COMMANDS = (
    "demo",
    "sites",
    "collect",
    "train",
    "sweep",
    "evaluate",
    "effects",
    "export",
    "basis",
    "match",
    "flow",
    "symmetry",
    "branches",
    "circuit",
    "prove",
    "report",
    "serve",
    "verify",
)
FROM_RECIPES = ("collect", "train", "basis")
"""Commands whose settings are too many for a command line alone."""
ESTIMATED = (
    "demo", "collect", "train", "sweep", "evaluate", "effects", "export", "basis", "match", "flow",
    "symmetry", "branches", "circuit", "prove", "report",
)  # fmt: skip
"""Commands that say beforehand what they cost, if that is over a minute."""
OVERVIEW = """\
mechatlas: an atlas of the features of a trained PyTorch network.

usage: mechatlas COMMAND ... [--json]

{commands}

Try:

  mechatlas demo --out runs/demo
  mechatlas sites inception_mini
  mechatlas collect recipes/quick/collect.toml --samples.crops 20
  mechatlas COMMAND --help

Every command takes --json (print the result as one JSON object, and nothing else) and a
RECIPE.toml as its first word, such as the recipe.toml of an earlier run, whose fields the other
words replace. All but {others} take --dry-run
(say how long, how much memory and disk, and do nothing). `mechatlas --version` prints the version.

Folders may be addresses, such as s3://bucket/run or gs://bucket/run, to read and to write, with the
credentials in the environment (pip install 'mechatlas[remote]').
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits by itself unless the command succeeded.

    Args:
        arguments: Words after `mechatlas`; by default those of the command line.

    Raises:
        SystemExit: 2 for a user's mistake, 130 when interrupted, 143 when terminated, 0 after help.
    """
    try:
        try:
            _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _main(arguments: Sequence[str] | None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    dry_run = "--dry-run" in words
    words = [word for word in words if word not in ("--json", "--dry-run")]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        print(f"mechatlas {metadata.version('mechatlas')}")
        return
    if words[0] not in COMMANDS:
        fail(f"There is no command {words[0]!r}. Commands: {', '.join(COMMANDS)}.")
    try:
        with _terminable():
            _answer(words[0], words[1:], as_json=as_json, dry_run=dry_run)
    except KeyboardInterrupt as error:
        _end_interrupted(error)


def run_script(script: Callable[[], None]) -> None:
    """Run the main function of a script, which ends as a command does.

    Args:
        script: Main function; it reads the command line by itself.

    Raises:
        SystemExit: 2 for a user's mistake, after one sentence; 130 when interrupted, 143 when
            terminated.
    """
    from mechatlas.base import UserError

    try:
        with _terminable():
            script()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt as error:
        _end_interrupted(error)


def _end_interrupted(error: KeyboardInterrupt) -> Never:
    terminated = isinstance(error, Terminated)
    cause = "terminated" if terminated else "interrupted"
    print(f"mechatlas: {cause}; what was finished is kept.", file=sys.stderr)
    raise SystemExit(143 if terminated else 130) from None


class Terminated(KeyboardInterrupt):
    """Request of the system that the command ends."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, unless somebody else decides what it does."""

    def end(*_: object) -> None:
        raise Terminated

    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _answer(name: str, words: list[str], *, as_json: bool, dry_run: bool) -> None:
    """Run a command and print its result."""
    began = time.monotonic()  # before what takes long to import
    from mechatlas.activations.networks import looking_in  # with torch
    from mechatlas.app.engines import is_first
    from mechatlas.base import UserError

    is_recipe = bool(words) and words[0].endswith(".toml")
    recipe = [Path(os.path.realpath(words[0])).parent] if is_recipe else []
    try:
        with looking_in(*recipe):
            text = run(name, words, as_json=as_json, dry_run=dry_run, began=began)
        if is_first():
            print(text)
    except UserError as error:
        fail(str(error))


def run(name: str, words: list[str], *, as_json: bool, dry_run: bool, began: float) -> str:
    """Run a command and describe its result, or what it would cost.

    Args:
        name: Name of the command.
        words: Words after it.
        as_json: Whether to describe it as a JSON object instead of in words.
        dry_run: Whether to estimate its time, memory and disk and do nothing else.
        began: Time, by the clock `time.monotonic`, when the program began.

    Raises:
        RecipeError: It is a dry run of a command that makes no estimate.
        SystemExit: 2, after printing, if the command found that something is damaged.
        UserError: The input is bad, or the folder holds something else.
    """
    from mechatlas.app.estimates import OnlyEstimate, in_words
    from mechatlas.app.run_folder import as_plain, execute
    from mechatlas.base import RecipeError
    from mechatlas.remote import written

    if dry_run and name not in ESTIMATED:
        raise RecipeError(
            f"`mechatlas {name}` makes no estimate; {', '.join(ESTIMATED)} take --dry-run."
        )
    warnings.filterwarnings("default", category=DeprecationWarning, module="mechatlas")
    module = "group_net" if name == "train" and _names_group(words) else name
    command = importlib.import_module(f"mechatlas.app.commands.{module}")
    config = configure(command, name, words)
    try:
        result = execute(config, dry_run=dry_run)
    except OnlyEstimate as end:
        found = end.from_beginning(began)
        return json.dumps(as_plain(found)) if as_json else in_words(found)
    values = as_plain(result) if as_json else {}
    shown = {key: values[key] for key in values if key != "out" or values[key]}
    text = json.dumps(shown) if as_json else written(command.in_words(result))
    if hasattr(command, "failed") and command.failed(result):
        print(text)
        raise SystemExit(2)
    return text


def configure(command: Any, name: str, words: list[str]) -> Any:
    """Make the configuration of a command from `[RECIPE.toml] [words]`.

    Args:
        command: Module of the command.
        name: Its name on the command line.
        words: Words after it.

    Raises:
        RecipeError: A recipe is missing or has mistakes.
        SystemExit: After help, or for a word that the command does not know.
    """
    import tyro

    from mechatlas import deprecated
    from mechatlas.app.recipes import read_recipe
    from mechatlas.base import RecipeError

    kind = config_type(command)
    from_recipe = name in FROM_RECIPES
    options: dict[str, Any] = {
        "prog": f"mechatlas {name} RECIPE.toml" if from_recipe else f"mechatlas {name}",
        "description": command.__doc__,
        "config": (tyro.conf.AvoidSubcommands,),  # a recipe has chosen its kind of samples already
    }
    words = deprecated.renamed_flags(name, words)
    takes_recipe = name not in ("sites", "sweep") and bool(words)
    recipe = words[:1] if takes_recipe and words[0].endswith(".toml") else []
    if from_recipe and not recipe and not {"-h", "--help"} & set(words):
        raise RecipeError(
            f"`mechatlas {name}` needs a recipe file first: mechatlas {name} RECIPE.toml "
            f"[--field value ...]. `mechatlas {name} --help` lists the fields."
        )
    if recipe:
        options["default"] = read_recipe(Path(recipe[0]), kind)
    try:
        return tyro.cli(kind, args=words[len(recipe) :], **options)
    except ValueError as error:
        over = f", over {recipe[0]}" if recipe else ""
        raise RecipeError(f"{error} (on the command line{over})") from error


def config_type(command: Any) -> Any:
    """Find the dataclass `...Config` of a command, named after its module."""
    name = command.__name__.rpartition(".")[2]
    return getattr(command, f"{name.title().replace('_', '')}Config")


def _names_group(words: list[str]) -> bool:
    """Whether the first word is a recipe that names a group; damaged files are for others."""
    if not words or not words[0].endswith(".toml"):
        return False
    from mechatlas.base import UserError
    from mechatlas.files import read_toml

    try:
        return not {"group", "generators"}.isdisjoint(read_toml(Path(words[0])))
    except UserError:
        return False


def overview() -> str:
    """List the commands with the first line of their modules, which are not imported."""
    lines = []
    for name in COMMANDS:
        spec = importlib.util.find_spec(f"mechatlas.app.commands.{name}")
        assert spec is not None
        source: Any = spec.loader
        text = ast.get_docstring(ast.parse(source.get_source(spec.name))) or ""
        lines.append(f"  {name:<9} {text.partition(chr(10))[0].rstrip('.')}")
    *others, last = (name for name in COMMANDS if name not in ESTIMATED)
    others = f"{', '.join(others)} and {last}"
    return OVERVIEW.format(commands="\n".join(lines), others=others)


def fail(message: str) -> Never:
    """Say what the user can mend.

    Raises:
        SystemExit: Always, with code 2.
    """
    from mechatlas.remote import written

    print(f"mechatlas: {written(message)}", file=sys.stderr)
    raise SystemExit(2)
