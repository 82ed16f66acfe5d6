# pyright: reportMissingImports=false
"""SAELens: `SAETrainer.fit` over an iterator of activations, its documented way for own data."""

from measure import Measurement, parse, refuse

options = parse()
if options.tied:
    refuse("SAELens has no tied dictionaries")

import logging
from importlib.metadata import version

import peer_shims  # noqa: F401 - before the libraries
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

logging.disable(logging.WARNING)
architecture, arguments = {
    "topk": ("topk", {"k": options.k}),
    "batchtopk": ("batchtopk", {"k": float(options.k)}),
    "jumprelu": ("jumprelu", {}),
    "l1": ("standard", {}),
}[options.rule]
measurement = Measurement(options)
kind, config = get_sae_training_class(architecture)
sae = kind(config(d_in=options.d_in, d_sae=options.n_latents, **arguments))
batches = measurement.batches()
settings = SAETrainerConfig(
    total_training_samples=options.steps * options.batch_size,
    train_batch_size_samples=options.batch_size,
    lr=options.lr,
    lr_end=options.lr,
    lr_decay_steps=int(options.decay * options.steps),
    logger=LoggingConfig(log_to_wandb=False),
    dead_feature_window=-(-options.dead_after // options.batch_size) or 1000,
)
trainer = SAETrainer(cfg=settings, sae=sae, data_provider=batches)
sae.b_dec.data = measurement.x[: options.batch_size].mean(dim=0)
trainer.fit()
batches.mark()
sae.eval()
measurement.report(version("sae-lens"), sae, sae.W_dec, sae.encode)
