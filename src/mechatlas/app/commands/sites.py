"""List the sites of a network, with shapes and branches.

mechatlas sites inception_mini
mechatlas sites squeezenet --weights squeezenet.safetensors
mechatlas sites my_package.my_module:my_factory --shape 3 32 32
mechatlas sites models/gpt2
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
from mechatlas.activations.branches import branches_of, ends_of, scattered_of
from mechatlas.activations.site_names import lens_sites
from mechatlas.activations.sites import SiteInfo, list_sites, read_activations
from mechatlas.app.network_inputs import named_network
from mechatlas.base import InputError, Site
from mechatlas.ranges import check_ranges

MANY = 6
"""Number of branches of one width above which only the first and the last are printed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SitesConfig:
    """List the sites of a network, with shapes and branches."""

    network: Annotated[Positional[str], arg(metavar="NETWORK")]
    """A bundled name, `package.module:factory`, a recipe with a [network] table, or the folder,
    zip or .gguf file of a language model."""
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
    lens: list[str]
    """Names in TransformerLens, which recipes take too."""
    kind: str
    """Class of the module."""
    shape: list[int]
    """Shape of the activations of one sample."""
    width: int
    """Channels; 0 where it is not known which axis holds them."""
    axes: str | None
    """Meaning of each axis: b the batch, c channels, any other a position; null if not known."""
    branches: dict[str, tuple[int, int]]
    """First channel of each branch, and the first after it."""
    scattered: dict[str, list[int]]
    """Channels of each branch whose channels do not lie side by side."""
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
    network = networks.load_network(named_network(config.network, config.weights))
    inputs = _example(network, config.shape)
    infos = list_sites(network, inputs)
    return SitesResult(
        network=config.network,
        parameters=sum(p.numel() for p in network.parameters()),
        digest=networks.digest(network),
        everything=config.everything,
        sites=_entries(network, inputs, infos),
    )


def _entries(network: nn.Module, inputs: torch.Tensor, infos: list[SiteInfo]) -> list[SiteEntry]:
    """Outputs of modules, and the other sites that TransformerLens has a name for."""
    names: dict[Site, list[str]] = {}
    for name, site in lens_sites(network).items():
        names.setdefault(site, []).append(name)
    others = [site for site in names if site.take == "input" or site.branch is not None]
    tensors = read_activations(network, inputs, others) if others else {}
    outer = [f"{info.site}." for info in infos]
    entries: list[SiteEntry] = []
    for info in infos:
        inside = any(str(info.site).startswith(name) for name in outer)
        beside = [site for site in others if site.module == info.site.module]
        before = [site for site in beside if site.take == "input"]
        after = [site for site in beside if site.take == "output"]
        for site in (*before, info.site, *after):
            shape = list(tensors[site].shape[1:]) if site in tensors else list(info.shape)
            whole = site.branch is None
            branches = branches_of(network, site.module, site.take) if whole else {}
            width = info.width if site == info.site else shape[-1]
            entries.append(
                SiteEntry(
                    site=str(site),
                    lens=names.get(site, []),
                    kind=info.kind if site == info.site else f"{site.take} of {info.kind}",
                    shape=shape,
                    width=width,
                    axes=info.axes,
                    branches=ends_of(branches, width),
                    scattered=scattered_of(branches, width),
                    hidden=inside and site not in names and not branches,
                )
            )
    return entries


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
    columns = ["site", "kind", "axes", "shape", "branches (channels)"]
    named = any(entry.lens for entry in listed)
    for column in [columns[0], *["in TransformerLens"] * named, *columns[1:]]:
        table.add_column(column, overflow="fold")
    for entry in listed:
        shape = " x ".join(map(str, entry.shape))
        cells = [entry.site, entry.kind, entry.axes or "?", shape, _branches(entry)]
        table.add_row(cells[0], *[" ".join(entry.lens)] * named, *cells[1:])
    text = io.StringIO()
    Console(file=text, width=160 if named else 100).print(table)
    n_hidden = len(result.sites) - len(listed)
    more = f"\n{n_hidden} more inside these; --everything lists them." if n_hidden else ""
    return f"{result.network}: {result.parameters:,} parameters\n{text.getvalue().rstrip()}{more}"


def _branches(entry: SiteEntry) -> str:
    """Names and widths of the branches; heads, of one width, as a range."""
    branches = {name: b - a for name, (a, b) in entry.branches.items()}
    branches |= {name: len(numbers) for name, numbers in entry.scattered.items()}
    names = list(branches)
    if len(names) > MANY and len(set(branches.values())) == 1:
        return f"{names[0]} .. {names[-1]} ({len(names)} of {branches[names[0]]})"
    return "  ".join(f"{name} ({width})" for name, width in branches.items())
