"""An atlas of the features of any trained PyTorch network.

    import mechatlas as ma

    network = ma.load_network(ma.Network(name="inception_mini"))
    samples = ma.open_samples(ma.Images(source="photos", side=63, crops=50), network)
    store = ma.collect(network, samples, ma.find_sites(network, ["mixed3b"]), Path("store"))
    rows = store.rows("mixed3b")
    dictionary = ma.train(ma.Autoencoder(d_in=rows.d_in, n_latents=1024), rows, steps=500)

Names are imported when first used, so that `import mechatlas` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING

from mechatlas import deprecated

if TYPE_CHECKING:
    from mechatlas.activations.collect import StoreConfig, collect
    from mechatlas.activations.networks import Network, load_network
    from mechatlas.activations.posing import PoseConfig
    from mechatlas.activations.positions import Positions
    from mechatlas.activations.samples import Arrays, Images, Texts, open_samples
    from mechatlas.activations.sites import find_sites, intervene, list_sites, read_activations
    from mechatlas.activations.store import Store
    from mechatlas.analysis.branches.specialization import branches
    from mechatlas.analysis.circuits.circuit import Circuit, circuit
    from mechatlas.analysis.interaction.interaction_basis import basis
    from mechatlas.analysis.interaction.results import InteractionBasis, InteractionConfig
    from mechatlas.analysis.matching.chains import track
    from mechatlas.analysis.matching.pairing import feature_splitting, match
    from mechatlas.analysis.proofs.prove import prove
    from mechatlas.analysis.proofs.verifier.proof import load_proof
    from mechatlas.analysis.symmetry.classify import symmetry
    from mechatlas.base import Dictionary, Rows, Site, UserError
    from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, Transcoder
    from mechatlas.dictionaries.formats import load, save
    from mechatlas.dictionaries.metrics import evaluate, fvu
    from mechatlas.dictionaries.objective import Objective, Schedule
    from mechatlas.dictionaries.pose_tied import PoseTied
    from mechatlas.dictionaries.pretrained import Pretrained
    from mechatlas.dictionaries.revival import AuxK, Resample
    from mechatlas.dictionaries.rows import ArrayRows, StreamRows
    from mechatlas.dictionaries.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK
    from mechatlas.dictionaries.training import train
    from mechatlas.maths.assignment import assign
    from mechatlas.maths.groups import Group
    from mechatlas.maths.named_groups import group

_HOMES = {
    "activations.collect": ("StoreConfig", "collect"),
    "activations.networks": ("Network", "load_network"),
    "activations.posing": ("PoseConfig",),
    "activations.positions": ("Positions",),
    "activations.samples": ("Arrays", "Images", "Texts", "open_samples"),
    "activations.sites": ("find_sites", "intervene", "list_sites", "read_activations"),
    "activations.store": ("Store",),
    "analysis.branches.specialization": ("branches",),
    "analysis.circuits.circuit": ("Circuit", "circuit"),
    "analysis.interaction.interaction_basis": ("basis",),
    "analysis.interaction.results": ("InteractionBasis", "InteractionConfig"),
    "analysis.matching.chains": ("track",),
    "analysis.matching.pairing": ("feature_splitting", "match"),
    "analysis.proofs.prove": ("prove",),
    "analysis.proofs.verifier.proof": ("load_proof",),
    "analysis.symmetry.classify": ("symmetry",),
    "base": ("Dictionary", "Rows", "Site", "UserError"),
    "dictionaries.autoencoder": ("Autoencoder", "Crosscoder", "Transcoder"),
    "dictionaries.formats": ("load", "save"),
    "dictionaries.metrics": ("evaluate", "fvu"),
    "dictionaries.pose_tied": ("PoseTied",),
    "dictionaries.pretrained": ("Pretrained",),
    "dictionaries.revival": ("AuxK", "Resample"),
    "dictionaries.rows": ("ArrayRows", "StreamRows"),
    "dictionaries.sparsity": ("BatchTopK", "Gated", "JumpReLU", "ReLU", "TopK"),
    "dictionaries.objective": ("Objective", "Schedule"),
    "dictionaries.training": ("train",),
    "maths.assignment": ("assign",),
    "maths.groups": ("Group",),
    "maths.named_groups": ("group",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArrayRows",
    "Arrays",
    "Autoencoder",
    "AuxK",
    "BatchTopK",
    "Circuit",
    "Crosscoder",
    "Dictionary",
    "Gated",
    "Group",
    "Images",
    "InteractionBasis",
    "InteractionConfig",
    "JumpReLU",
    "Network",
    "Objective",
    "PoseConfig",
    "PoseTied",
    "Positions",
    "Pretrained",
    "ReLU",
    "Resample",
    "Rows",
    "Schedule",
    "Site",
    "Store",
    "StoreConfig",
    "StreamRows",
    "Texts",
    "TopK",
    "Transcoder",
    "UserError",
    "assign",
    "basis",
    "branches",
    "circuit",
    "collect",
    "evaluate",
    "feature_splitting",
    "find_sites",
    "fvu",
    "group",
    "intervene",
    "list_sites",
    "load",
    "load_network",
    "load_proof",
    "match",
    "open_samples",
    "prove",
    "read_activations",
    "save",
    "symmetry",
    "track",
    "train",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name in deprecated.NAMES:
        home, _, new = deprecated.NAMES[name].rpartition(".")
        deprecated.warn(f"mechatlas.{name}", deprecated.NAMES[name])
        return getattr(importlib.import_module(home), new)
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mechatlas' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mechatlas.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
