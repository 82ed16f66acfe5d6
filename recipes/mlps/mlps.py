"""Fully connected networks on digits and on CIFAR-10, as in the papers on the interaction basis.

    python recipes/mlps/mlps.py digits
    python recipes/mlps/mlps.py cifar10 --source cifar10.zip

Trains two hidden layers of 100 units (Adam, a batch of 64, 12 passes, a seed) and writes
`runs/mlps/NAME/` with `weights.safetensors`, `rows.npy` and `labels.npy` of what it was tested on.
A recipe names the network as `mlps:mlp`, with this folder on PYTHONPATH.
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import mechatlas as ma
from mechatlas.app.cli import run_script
from mechatlas.app.progress import bar

WIDTH, BATCH, PASSES, RATE = 100, 64, 12, 1e-3


def mlp(weights: Path) -> nn.Module:
    """A network from its weights. Sites: `pixels`, `hidden1`, `hidden2`, `outputs`."""
    state = load_file(weights)
    sizes = [state["hidden1.0.weight"].shape[1], WIDTH, WIDTH, state["outputs.weight"].shape[0]]
    network = _network(*sizes)
    network.load_state_dict(state)
    return network.eval()


def _network(n_in: int, first: int, second: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            pixels=nn.Identity(),
            hidden1=nn.Sequential(nn.Linear(n_in, first), nn.ReLU()),
            hidden2=nn.Sequential(nn.Linear(first, second), nn.ReLU()),
            outputs=nn.Linear(second, n_out),
        )
    )


def main() -> None:
    """Train one network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", choices=["digits", "cifar10"])
    parser.add_argument("--source", help="zip of CIFAR-10: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--out", type=Path, default=Path("runs/mlps"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.data == "cifar10" and options.source is None:
        parser.error("cifar10 needs --source")
    parts = _digits() if options.data == "digits" else _cifar10(options.source)
    network = train(*parts[:2], seed=options.seed)
    with torch.no_grad():
        accuracy = (network(parts[2]).argmax(1) == parts[3]).float().mean()
    print(f"{options.data}: accuracy {float(accuracy):.4f} on {len(parts[2])} not trained on")
    out = options.out / options.data
    out.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), out / "weights.safetensors")
    np.save(out / "rows.npy", parts[2].numpy())
    np.save(out / "labels.npy", parts[3].numpy())


def train(x: Tensor, labels: Tensor, *, seed: int) -> nn.Sequential:
    """Adam on the cross-entropy, the samples in a new order in every pass."""
    torch.manual_seed(seed)
    network = _network(x.shape[1], WIDTH, WIDTH, int(labels.max()) + 1)
    adam = torch.optim.Adam(network.parameters(), lr=RATE)
    with bar("training") as progress:
        for done in range(PASSES):
            for chosen in torch.randperm(len(x)).split(BATCH):
                loss = functional.cross_entropy(network(x[chosen]), labels[chosen])
                adam.zero_grad()
                loss.backward()
                adam.step()
            progress(done + 1, PASSES)
    return network.eval()


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    rows, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(rows / 8 - 1).float(), torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    kept, held = order[:1297], order[1297:]
    return x[kept], y[kept], x[held], y[held]


def _cifar10(source: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = []
    for part in ("train", "test"):
        recipe = ma.Images(source=source, include=f"{part}/*", side=32)
        samples = ma.open_samples(recipe, nn.Identity())
        names = [samples.name(i).split("/")[1] for i in range(len(samples))]
        classes = {name: number for number, name in enumerate(sorted(set(names)))}
        x = samples.stack([samples.read(i) for i in range(len(samples))]).flatten(1)
        found += [2 * x - 1, torch.tensor([classes[name] for name in names])]
    return found[0], found[1], found[2], found[3]


if __name__ == "__main__":
    run_script(main)
