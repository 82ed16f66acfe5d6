# pyright: reportMissingImports=false
"""dictionary_learning: `trainSAE` over any iterable of activations."""

from measure import Measurement, parse, refuse

options = parse()
if options.tied:
    refuse("dictionary_learning has no tied dictionaries")

from importlib.metadata import version

import peer_shims  # noqa: F401 - before the libraries
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE

kind, arguments = {
    "topk": (TopKTrainer, {"k": options.k}),
    "batchtopk": (BatchTopKTrainer, {"k": options.k}),
    "jumprelu": (JumpReluTrainer, {"sparsity_warmup_steps": None}),
    "l1": (StandardTrainer, {"sparsity_warmup_steps": None}),
}[options.rule]
measurement = Measurement(options)
kept = []


class Kept(kind):
    """The trainer, which `trainSAE` builds and does not give back."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        kept.append(self)
        if options.dead_after:
            self.dead_feature_threshold = options.dead_after


batches = measurement.batches(options.steps + 1)
settings = {
    "trainer": Kept,
    "steps": options.steps,
    "activation_dim": options.d_in,
    "dict_size": options.n_latents,
    "lr": options.lr,
    "warmup_steps": 0,
    "decay_start": int((1 - options.decay) * options.steps) if options.decay else None,
    "layer": 0,
    "lm_name": "none",
    "device": "cpu",
    "seed": options.seed,
    **arguments,
}
trainSAE(data=batches, trainer_configs=[settings], steps=options.steps, device="cpu")
ae = kept[0].ae
atoms = ae.W_dec if hasattr(ae, "W_dec") else ae.decoder.weight.T
measurement.report(version("dictionary-learning"), ae, atoms, ae.encode)
