# pyright: reportMissingImports=false
"""sparsify: its coder in the loop that its trainer's hook runs."""

from measure import Measurement, parse, refuse

options = parse()
if options.tied or options.rule != "topk":
    refuse("sparsify has top-k only, and no tied dictionaries")

from importlib.metadata import version

import peer_shims  # noqa: F401 - before the libraries
import torch
from sparsify import SparseCoder, SparseCoderConfig

measurement = Measurement(options)
config = SparseCoderConfig(num_latents=options.n_latents, k=options.k)
coder = SparseCoder(options.d_in, config, dtype=torch.float32)
optimizer = torch.optim.Adam(coder.parameters(), lr=options.lr)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer,
    lambda step: min(1.0, (options.steps - step) / max(1, options.decay * options.steps)),
)
silent = torch.zeros(options.n_latents, dtype=torch.long)
for number, x in enumerate(measurement.batches(options.steps)):
    if number == 0:
        coder.b_dec.data = x.mean(dim=0)
    coder.set_decoder_norm_to_unit_norm()
    variance = (x - x.mean(dim=0)).square().sum()
    dead = silent > options.dead_after if options.dead_after else None
    out = coder(x=x, y=x, dead_mask=dead, total_variance=variance)
    fired = torch.zeros(options.n_latents, dtype=torch.bool)
    fired[out.latent_indices.flatten()] = True
    loss = out.fvu + out.auxk_loss / 32 if options.dead_after else out.fvu
    loss.backward()
    coder.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    silent += len(x)
    silent[fired] = 0


def codes(x: torch.Tensor) -> torch.Tensor:
    """Codes of some rows, as a matrix."""
    found = coder.encode(x)
    return torch.zeros(len(x), options.n_latents).scatter(1, found.top_indices, found.top_acts)


measurement.report(version("eai-sparsify"), lambda x: coder(x).sae_out, coder.W_dec, codes)
