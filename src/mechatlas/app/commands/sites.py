"""The sites of a network, as plain values and as a table."""

import io
import tomllib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mechatlas.activations import networks
from mechatlas.activations.networks import Network
from mechatlas.activations.sites import list_sites
from mechatlas.app.recipes import from_dict
from mechatlas.base import InputError, RecipeError


def sites(name: str, weights: Path | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """Every site of a network.

    Args:
        name: A bundled name, `package.module:factory`, or a TOML file with a network table.
        weights: File of weights for it.
        shape: Shape of one sample, if the network does not say.

    Raises:
        InputError: The network does not run on such a sample.
        UserError: There is no such network.
    """
    recipe = Network(name=name, weights=weights)
    if name.endswith(".toml"):
        recipe = _network_of(Path(name))
    network = networks.load_network(recipe)
    inputs = _example(network, shape)
    try:
        found = list_sites(network, inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{name} does not run on a sample of shape {tuple(inputs.shape[1:])}: {reason}"
        ) from error
    return {
        "network": name,
        "parameters": sum(p.numel() for p in network.parameters()),
        "digest": networks.digest(network),
        "sites": [
            {
                "site": str(info.site),
                "kind": info.kind,
                "shape": list(info.shape),
                "width": info.width,
                "branches": {n: [s.start, s.stop] for n, s in info.branches.items()},
            }
            for info in found
        ],
    }


def _network_of(path: Path) -> Network:
    try:
        table = tomllib.loads(path.read_text())["network"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise RecipeError(f"{path} has no network that can be read ({error!r}).") from error
    return from_dict(table if isinstance(table, dict) else {"name": table}, Network, str(path))


def _example(network: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    expected = getattr(network, "input", None)
    if shape:
        return torch.full((1, *shape), 0.5)
    if (side := getattr(expected, "side", None)) is not None:
        return torch.full((1, getattr(expected, "channels", 3), side, side), 0.5)
    if hasattr(expected, "windows"):
        return torch.zeros(1, 8, dtype=torch.long)
    raise InputError(
        f"{type(network).__name__} does not say what it expects; give the shape of one sample, "
        "such as --shape 3 32 32."
    )


def in_words(found: dict[str, Any], *, everything: bool) -> str:
    """A table of the sites."""
    listed = found["sites"]
    n_sites = len(listed)
    if not everything:
        listed = [e for e in listed if e["branches"] or not _inside_branched(e["site"], listed)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("site", "kind", "shape", "branches (channels)"):
        table.add_column(column, overflow="fold")
    for entry in listed:
        branches = "  ".join(f"{n} ({b - a})" for n, (a, b) in entry["branches"].items())
        shape = " x ".join(map(str, entry["shape"]))
        table.add_row(entry["site"], entry["kind"], shape, branches)
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    hidden = n_sites - len(listed)
    more = f"\n{hidden} more inside these; --everything lists them." if hidden else ""
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    return f"{found['network']}: {found['parameters']:,} parameters\n{text.rstrip()}{more}"


def _inside_branched(site: str, listed: list[dict[str, Any]]) -> bool:
    return any(site.startswith(f"{e['site']}.") for e in listed)
