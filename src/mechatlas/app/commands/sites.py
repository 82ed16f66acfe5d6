"""List the sites of a network, with shapes and branches.

mechatlas sites inception_mini
mechatlas sites squeezenet --weights squeezenet.safetensors
mechatlas sites my_package.my_module:my_factory --shape 3 32 32
"""

import dataclasses
import io
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tyro.conf import Positional, arg

from mechatlas.activations import networks
from mechatlas.activations.networks import Network
from mechatlas.activations.sites import list_sites
from mechatlas.app.recipes import from_dict
from mechatlas.base import InputError, RecipeError
from mechatlas.files import read_toml
from mechatlas.ranges import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class SitesConfig:
    """List the sites of a network, with shapes and branches."""

    network: Annotated[Positional[str], arg(metavar="NETWORK")]
    """A bundled name, `package.module:factory`, or a recipe with a [network] table."""
    weights: Path | None = None
    """File of weights for it."""
    shape: tuple[int, ...] = ()
    """Shape of one sample; only for networks that do not say what they expect."""
    everything: bool = False
    """Also list the modules inside other sites' modules."""

    def __post_init__(self) -> None:
        check_ranges(self, shape="[1, 1000000]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteEntry:
    """One site of a network."""

    site: str
    """Name, as recipes take it."""
    kind: str
    """Class of the module."""
    shape: list[int]
    """Shape of the activations of one sample."""
    width: int
    """Channels."""
    branches: dict[str, tuple[int, int]]
    """First channel of each branch, and the first after it."""
    hidden: bool
    """Whether it lies inside a site with branches, and is listed with --everything only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SitesResult:
    """Sites of a network."""

    network: str
    """Name of the network."""
    parameters: int
    """Number of its parameters."""
    digest: str
    """Checksum of its weights."""
    everything: bool
    """Whether hidden sites are listed in words too."""
    sites: list[SiteEntry]


def run(config: SitesConfig) -> SitesResult:
    """List every site of a network.

    Raises:
        InputError: The network does not run on such a sample.
        UserError: There is no such network.
    """
    recipe = Network(name=config.network, weights=config.weights)
    if config.network.endswith(".toml"):
        recipe = _network_of(Path(config.network))
    network = networks.load_network(recipe)
    inputs = _example(network, config.shape)
    infos = list_sites(network, inputs)
    branched = [f"{info.site}." for info in infos]
    return SitesResult(
        network=config.network,
        parameters=sum(p.numel() for p in network.parameters()),
        digest=networks.digest(network),
        everything=config.everything,
        sites=[
            SiteEntry(
                site=str(info.site),
                kind=info.kind,
                shape=list(info.shape),
                width=info.width,
                branches={name: (s.start, s.stop) for name, s in info.branches.items()},
                hidden=not info.branches and any(str(info.site).startswith(b) for b in branched),
            )
            for info in infos
        ],
    )


def _network_of(path: Path) -> Network:
    table = read_toml(path).get("network")
    if not isinstance(table, str | dict):
        raise RecipeError(f"{path} names no network: it has no table [network].")
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


def in_words(result: SitesResult) -> str:
    """Table of the sites."""
    listed = [entry for entry in result.sites if result.everything or not entry.hidden]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("site", "kind", "shape", "branches (channels)"):
        table.add_column(column, overflow="fold")
    for entry in listed:
        branches = "  ".join(f"{name} ({b - a})" for name, (a, b) in entry.branches.items())
        table.add_row(entry.site, entry.kind, " x ".join(map(str, entry.shape)), branches)
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    n_hidden = len(result.sites) - len(listed)
    more = f"\n{n_hidden} more inside these; --everything lists them." if n_hidden else ""
    return f"{result.network}: {result.parameters:,} parameters\n{text.getvalue().rstrip()}{more}"
