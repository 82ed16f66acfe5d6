"""A tiny GPT-2: evaluation and stream of a real decoder, against a plain computation in float64."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("transformers")

from mechatlas.activations.stream import stream
from mechatlas.analysis.evaluation.evaluate import evaluate
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.dictionaries.training import train
from tests.language_models import model
from tests.networks import Windows

SITE = "transformer.h.0"
SAMPLES = Windows(n=32, length=16)


@torch.no_grad()
def by_hand(network: Any, sae: Any, way: str) -> float:
    """Mean loss of the next token that is no padding, in float64, with a hook of its own."""
    network, sae = copy.deepcopy(network).double(), copy.deepcopy(sae).double()
    tokens = torch.from_numpy(SAMPLES.tokens)
    written = (tokens > 1) & ((tokens != 1).cumsum(dim=1) > 1)

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        x = output if isinstance(output, torch.Tensor) else output[0]
        new = sae.decode(sae.encode(x.flatten(0, 1))).reshape(x.shape)
        new = {"intact": x, "spliced": new, "zero_ablated": torch.zeros_like(x)}[way]
        new = torch.where(written[..., None], new, x)
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = network.get_submodule(SITE).register_forward_hook(hook)
    logits = network(tokens).logits
    handle.remove()
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return float(loss[tokens[:, 1:].flatten() != 1].mean())


def test_a_dictionary_streamed_from_gpt2_is_worth_what_a_plain_computation_says():
    network = model("gpt2")
    width = network.config.n_embd
    rows = stream(network, SAMPLES, SITE)
    sae = train(
        Autoencoder(d_in=width, n_latents=64, sparsity=TopK(k=4)), rows, steps=60, batch_size=64
    )
    found: Any = evaluate(sae, network=network, samples=SAMPLES, site=SITE)
    assert found.left_out["first"] == 32
    for way in ("intact", "spliced", "zero_ablated"):
        assert getattr(found, way).loss.value == pytest.approx(by_hand(network, sae, way), abs=1e-5)
    assert found.loss_recovered.low <= found.loss_recovered.value <= found.loss_recovered.high
