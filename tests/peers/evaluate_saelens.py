"""SAELens' own loss recovered, in the environment of the peers.

    python evaluate_saelens.py FOLDER

FOLDER has a SAELens dictionary and `inputs.safetensors` (tokens, and the network's embedding,
unembedding and mixing weights). Prints the scores of `sae_lens.evals.get_recons_loss` as JSON.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
importlib.import_module("peer_shims")  # before the libraries

import torch
from sae_lens import SAE  # pyright: ignore[reportMissingImports]
from sae_lens.evals import get_recons_loss  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

folder = sys.argv[1]
given = load_file(f"{folder}/inputs.safetensors")


class Model(nn.Module):
    """The tiny network of the test, with one hook, as SAELens calls a model."""

    def forward(self, tokens, return_type="logits", loss_per_token=False, hooks=()):
        x = functional.embedding(tokens, given["embed"])
        for _, hook in hooks:
            x = hook(x, hook=SimpleNamespace(name="hook"))
        counts = torch.arange(1, x.shape[1] + 1)[:, None]
        mean = x.cumsum(dim=1) / counts
        x = x + functional.linear(mean, given["mix"], given["mix_bias"]).tanh()
        logits = functional.linear(x, given["head"], given["head_bias"])
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).reshape(len(tokens), -1)
        loss = loss if loss_per_token else loss.mean()
        return {"logits": logits, "loss": loss, "both": (logits, loss)}[return_type]

    def run_with_hooks(self, tokens, return_type="logits", fwd_hooks=(), **options):
        options = {k: v for k, v in options.items() if k == "loss_per_token"}
        return self(tokens, return_type, hooks=fwd_hooks, **options)


sae = SAE.load_from_disk(folder)
scaler = SimpleNamespace(scale=lambda x: x, unscale=lambda x: x)
scores = get_recons_loss(
    sae, Model(), scaler, given["tokens"], compute_kl=True, compute_ce_loss=True, hook_name="hook"
)
print(json.dumps({name: float(torch.as_tensor(value).mean()) for name, value in scores.items()}))
