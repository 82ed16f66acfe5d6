"""The same network with weights drawn anew: the control that a trained one is compared with.

    python recipes/branches/untrained.py inception_mini --out runs/branches/untrained.safetensors
    mechatlas collect recipes/branches/collect_inception_mini.toml \
        --network.weights runs/branches/untrained.safetensors --out runs/branches/untrained/store

Weights are Gaussian with variance 2 / inputs (He et al., 2015), so that activations keep their
size from layer to layer; biases are zero, and batch norms change nothing. Of a transformer a folder
is written:

    python recipes/branches/untrained.py transformer --weights all_minilm_l6_v2 --out runs/untrained
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import mechatlas as ma
from mechatlas.app.cli import run_script
from mechatlas.files import write


def untrained(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Fresh weights under the names and shapes of a network's own."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_parameters()  # its statistics are those of the trained weights
    random = np.random.default_rng(seed)
    fresh = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim < 2:
            fresh[name] = torch.zeros(tensor.shape) if name.endswith("bias") else tensor.clone()
            continue
        inputs = tensor[0].numel()
        drawn = random.standard_normal(tuple(tensor.shape)) * np.sqrt(2 / inputs)
        fresh[name] = torch.from_numpy(drawn.astype(np.float32))
    return fresh


def main() -> None:
    """Draw weights and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network", help="a bundled name or package.module:factory")
    parser.add_argument("--weights", type=Path, help="file of weights, if the network needs one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.network == "transformer":
        named = ma.Network(name="transformer", arguments={"path": str(options.weights)})
        network: Any = ma.load_network(named)
        network.load_state_dict(untrained(network, options.seed))
        network.save_pretrained(options.out)
        network.input.tokenizer.save_pretrained(options.out)
    else:
        network = ma.load_network(ma.Network(name=options.network, weights=options.weights))
        write(options.out, safetensors.torch.save(untrained(network, options.seed)))
    print(f"Weights: {options.out}")


if __name__ == "__main__":
    run_script(main)
