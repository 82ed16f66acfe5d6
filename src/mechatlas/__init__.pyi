from .activations.collect import StoreConfig, collect
from .activations.images import Images
from .activations.networks import Network, load_network
from .activations.posing import PoseConfig
from .activations.samples import Arrays, open_samples
from .activations.sites import find_sites, intervene, list_sites, read_activations
from .activations.store import Store
from .activations.stream import stream
from .activations.texts import Texts, text_samples
from .analysis.branches.specialization import Specialization, branches
from .analysis.circuits.circuit import Circuit, circuit
from .analysis.effects.attribution import Attribution, attribute
from .analysis.effects.logits import LogitEffects, logit_effects
from .analysis.effects.steering import steer
from .analysis.effects.track_steering import SteeringComparison, compare_steering, steer_track
from .analysis.evaluation.evaluate import evaluate
from .analysis.evaluation.results import NetworkEvaluation
from .analysis.interaction.interaction_basis import basis
from .analysis.interaction.results import InteractionBasis, InteractionConfig
from .analysis.matching.chains import Tracks, track
from .analysis.matching.flow import FeatureFlow, feature_flow
from .analysis.matching.pairing import Match, feature_splitting, match
from .analysis.proofs.prove import AccuracyBound, prove
from .analysis.proofs.verifier.proof import AccuracyProof, load_proof
from .analysis.symmetry.classify import Symmetry, symmetry
from .app.report.from_python import report
from .base import (
    Dictionary,
    DiskError,
    InputError,
    RecipeError,
    Site,
    SiteError,
    StoreError,
    UserError,
    WeightsError,
)
from .dictionaries.autoencoder import Autoencoder, Crosscoder, Transcoder
from .dictionaries.formats import load, save
from .dictionaries.hub import load_release, push
from .dictionaries.objective import Objective, Schedule
from .dictionaries.pose_tied import PoseTied
from .dictionaries.revival import AuxK, Resample
from .dictionaries.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK
from .dictionaries.training import train
from .maths.assignment import assign
from .maths.certificate import Assignment, CertificateError
from .maths.named_groups import group

__version__: str
__all__ = [
    "AccuracyBound",
    "AccuracyProof",
    "Arrays",
    "Assignment",
    "Attribution",
    "Autoencoder",
    "AuxK",
    "BatchTopK",
    "CertificateError",
    "Circuit",
    "Crosscoder",
    "Dictionary",
    "DiskError",
    "FeatureFlow",
    "Gated",
    "Images",
    "InputError",
    "InteractionBasis",
    "InteractionConfig",
    "JumpReLU",
    "LogitEffects",
    "Match",
    "Network",
    "NetworkEvaluation",
    "Objective",
    "PoseConfig",
    "PoseTied",
    "ReLU",
    "RecipeError",
    "Resample",
    "Schedule",
    "Site",
    "SiteError",
    "Specialization",
    "SteeringComparison",
    "Store",
    "StoreConfig",
    "StoreError",
    "Symmetry",
    "Texts",
    "TopK",
    "Tracks",
    "Transcoder",
    "UserError",
    "WeightsError",
    "assign",
    "attribute",
    "basis",
    "branches",
    "circuit",
    "collect",
    "compare_steering",
    "evaluate",
    "feature_flow",
    "feature_splitting",
    "find_sites",
    "group",
    "intervene",
    "list_sites",
    "load",
    "load_network",
    "load_proof",
    "load_release",
    "logit_effects",
    "match",
    "open_samples",
    "prove",
    "push",
    "read_activations",
    "report",
    "save",
    "steer",
    "steer_track",
    "stream",
    "symmetry",
    "text_samples",
    "track",
    "train",
]
