"""Degeneracy, interaction basis, edges and modules of a network, in one call.

    basis         network, data, layers -> `InteractionBasis`, with a `LayerResult` for each layer

Main path, in reading order:

    layer_maps           maps between the layers
    collect_statistics   one pass over the data: moments and firing
    count_degeneracy     free directions of the weights
    interaction_basis    from the last layer back
    measure_edges        strength of every interaction
    ablate_edges, ablate_vectors
    find_modules         modules of the graph of needed edges
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Int
from torch import nn

from mechatlas import deprecated
from mechatlas.activations.networks import as_input, digest
from mechatlas.activations.passes import evaluation_mode, unwrapped
from mechatlas.activations.samples import whole_batch
from mechatlas.activations.sites import as_site
from mechatlas.analysis.interaction.basis_analysis import Analysis, Coordinates
from mechatlas.analysis.interaction.costs import Costs
from mechatlas.analysis.interaction.derivatives import differentiable
from mechatlas.analysis.interaction.results import InteractionBasis, InteractionConfig
from mechatlas.analysis.interaction.statistics import Inputs, NamedArrays
from mechatlas.base import (
    Dictionary,
    Engine,
    InputError,
    Progress,
    RecipeError,
    Site,
    SiteError,
    no_progress,
)
from mechatlas.devices import refuse_half_precision


@runtime_checkable
class Checkpoints(Protocol):
    """Store of finished parts, from which an interrupted call continues."""

    def kept(self, name: str) -> NamedArrays | None:
        """Read a part; `None` if it is not there."""
        ...

    def keep(self, name: str, arrays: NamedArrays) -> None:
        """Keep a finished part."""
        ...


def open_checkpoints(
    checkpoints: Checkpoints | MutableMapping[str, NamedArrays] | None,
) -> tuple[Callable[[str], NamedArrays | None], Callable[[str, NamedArrays], None]]:
    """Functions that read and keep a part; without a store, parts are kept for this call alone."""
    if isinstance(checkpoints, Checkpoints):
        return checkpoints.kept, checkpoints.keep
    mapping = {} if checkpoints is None else checkpoints
    return mapping.get, mapping.__setitem__


@deprecated.renamed_arguments
def basis(
    model: nn.Module,
    data: Any,
    layers: Sequence[str | Site],
    settings: InteractionConfig | None = None,
    *,
    dictionaries: Mapping[str, Dictionary] | None = None,
    unit_modules: Mapping[str, Int[Any, " unit"]] | None = None,
    checkpoints: Checkpoints | MutableMapping[str, NamedArrays] | None = None,
    on_progress: Progress = no_progress,
    on_costs: Callable[[Costs], None] = lambda _costs: None,
    engine: Engine | None = None,
    reopen: Callable[[], nn.Module] | None = None,
) -> InteractionBasis:
    """Find the directions that matter in some layers of a network, and how they interact.

    Args:
        model: Any module; called as `model(inputs)`, in evaluation mode.
        data: Inputs as a tensor or array, or a pair of inputs and labels; or samples, as for
            `open_samples`.
        layers: Sites in the order in which the network reaches them; the last holds the outputs
            whose behavior counts.
        settings: Bases to compare, numbers of samples, thresholds.
        dictionaries: Dictionaries by layer. Their latents are compared with the bases, as
            "dictionary"; edges go from them to the next layer's coordinates in the basis that is
            reported.
        unit_modules: Module of each unit by layer, -1 for none, in a stack of linear and ReLU
            layers. The free directions of each module are counted.
        checkpoints: Store of finished parts; an interrupted call with the same other arguments
            continues from it. A mapping is written to and read from.
        on_progress: Callback with the number of steps done and their total.
        on_costs: Callback with what it will cost, before the work begins.
        engine: Engine that measures edges and ablates, one map in one basis at a time; by default
            this process. The result is the same.
        reopen: Function of a module that gives workers of the engine the same network.

    Returns:
        A `LayerResult` for each layer, and the graph between them.

    Raises:
        SiteError: Fewer than two layers, a layer that is not there, or a wrong order.
        InputError: The data are not samples for this network, the modules do not fit it, or it
            computes in half precision.
        NonFiniteError: A NaN or an infinity, and where.
        RecipeError: An engine is given without `reopen`.

    Examples:
        >>> import torch
        >>> import mechatlas as ma
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Identity(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
        ... ).double()
        >>> inputs = torch.randn(100, 4, dtype=torch.float64)
        >>> config = ma.InteractionConfig(kinds=("lib",))
        >>> result = ma.basis(network, inputs, ["0", "2", "3"], config)
        >>> result["0"].to_basis.shape[0], len(result["0"].edges) <= 3
        (4, True)
    """
    settings = settings or InteractionConfig()
    if len(layers) < 2:
        raise SiteError(f"Name at least two layers, got {len(layers)}: {list(map(str, layers))}.")
    if engine is not None and reopen is None:
        raise RecipeError(
            "Workers of an engine open the network by themselves: give basis(reopen=f), a function "
            "of a module that returns it."
        )
    if not (isinstance(data, tuple | list | str | os.PathLike) or hasattr(data, "__array__")):
        data = whole_batch(data, model)
    inputs = Inputs.from_data(data)
    model = unwrapped(model)
    inputs = dataclasses.replace(inputs, tensor=as_input(model, inputs.tensor))
    sites = [as_site(model, site) for site in layers]
    refuse_half_precision(model, "ranks and gradients")
    kept, keep = open_checkpoints(checkpoints)
    with evaluation_mode(model), differentiable():
        analysis = Analysis.of(model, inputs, sites, settings, kept, keep, on_progress)
        on_costs(analysis.costs)
        on_coordinates = partial(_do_on, engine, analysis, reopen, dictionaries or {})
        result = analysis.run(dictionaries or {}, on_coordinates)
        return dataclasses.replace(
            result,
            learning_coefficient=analysis.learning_coefficient(),
            module_degeneracy=analysis.module_degeneracy(unit_modules),
        )


class _Job(NamedTuple):
    """Inputs of an analysis for a worker, which opens the network by itself."""

    reopen: Callable[[], nn.Module]
    network: str
    """Checksum of the weights, which those of a worker must have."""
    inputs: Inputs
    sites: list[Site]
    settings: InteractionConfig
    dictionaries: Mapping[str, Dictionary]
    kept: dict[str, NamedArrays]
    """Statistics and gradients, from which the bases are computed."""


def _do_on(
    engine: Engine | None,
    analysis: Analysis,
    reopen: Callable[[], nn.Module] | None,
    dictionaries: Mapping[str, Dictionary],
    pairs: Coordinates,
) -> None:
    """Do all parts that are about one map in one basis on an engine, and keep them.

    Args:
        engine: Engine; `None` leaves them to the analysis.
        analysis: Analysis that has done what they need.
        reopen: Function that opens the network in a worker.
        dictionaries: Dictionaries by layer.
        pairs: Coordinates at both ends of every map.
    """
    if engine is None or reopen is None:
        return
    names = ["statistics", "gradients", *(f"local.{i}" for i in range(len(analysis.maps)))]
    job = _Job(
        reopen, digest(analysis.model), analysis.inputs, analysis.sites, analysis.settings,
        dictionaries, {name: part for name in names if (part := analysis.kept(name)) is not None},
    )  # fmt: skip
    pieces = [
        (kind, number)
        for kind, each in pairs.items()
        for number in each
        if any(analysis.kept(name) is None for name in analysis.part_names(kind, number))
    ]
    for number, made in engine.map(_do_part_elsewhere, pieces, shared=job):
        for name in analysis.part_names(*pieces[number]):
            analysis.keep(name, made[name])
        analysis.steps.part()


def _do_part_elsewhere(piece: tuple[str, int], job: _Job) -> dict[str, NamedArrays]:
    """Do the parts about one map in one basis in a worker; they are given by name."""
    model = unwrapped(job.reopen())
    if digest(model) != job.network:
        raise InputError("A worker finds other weights of the network than the first process.")
    made = dict(job.kept)
    with evaluation_mode(model), differentiable():
        analysis = Analysis.of(
            model, job.inputs, job.sites, job.settings, made.get, made.__setitem__
        )
        analysis.do_part(*piece, job.dictionaries)
    return {name: made[name] for name in analysis.part_names(*piece)}
