# pyright: reportMissingImports=false
"""Overcomplete: `train_sae` with its TopKSAE, whose encoder is linear with a batch norm."""

from measure import Measurement, parse, refuse

options = parse()
if options.tied or options.rule not in ("topk", "batchtopk"):
    refuse("Overcomplete has top-k and batch top-k, and no tied dictionaries")

import contextlib
import io
from importlib.metadata import version

import peer_shims  # noqa: F401 - before the libraries
import torch
from overcomplete.sae import BatchTopKSAE, TopKSAE, train_sae

measurement = Measurement(options)
kind = TopKSAE if options.rule == "topk" else BatchTopKSAE
k = options.k if options.rule == "topk" else options.k * options.batch_size
sae = kind(options.d_in, nb_concepts=options.n_latents, top_k=k, device="cpu")
optimizer = torch.optim.Adam(sae.parameters(), lr=options.lr)


def squared_error(x, x_hat, z_pre, z, atoms):
    return (x - x_hat).square().mean()


with contextlib.redirect_stdout(io.StringIO()):
    batches = measurement.batches(options.steps)
    train_sae(sae, batches, squared_error, optimizer, nb_epochs=1, device="cpu")
sae.eval()
measurement.report(version("Overcomplete"), lambda x: sae(x)[2], sae.get_dictionary())
