"""A small vision transformer with registers, trained on CIFAR-10, for tests of heads and MLP.

    python recipes/branches/vit.py cifar10.zip --out runs/vit/weights.safetensors
    PYTHONPATH=recipes/branches mechatlas collect recipes/branches/collect_vit.toml \
        --samples.source cifar10.zip --network.weights runs/vit/weights.safetensors
    mechatlas train recipes/branches/train_vit.toml
    PYTHONPATH=recipes/branches mechatlas branches runs/vit/layer3 --store runs/vit/store \
        --out runs/vit/branches3 --trust

`--steps 0` writes random weights, the control. Four layers of torch's own
(`nn.TransformerEncoderLayer`) with four heads and 64 channels, on patches of 4 x 4, a class token
and four registers.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import mechatlas as ma
from mechatlas.app.cli import run_script
from mechatlas.app.progress import bar

SIDE, PATCH, CHANNELS, HEADS, LAYERS, REGISTERS = 32, 4, 64, 4, 4, 4
BATCH, RATE, N_TRAINED, N_TESTED = 128, 1e-3, 20_000, 2_000


class VisionTransformer(nn.Module):
    """Logits of ten classes, from the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.num_register_tokens = REGISTERS
        self.patches = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.special = nn.Parameter(0.02 * torch.randn(1, 1 + REGISTERS, CHANNELS))
        self.place = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2, CHANNELS))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                CHANNELS, HEADS, 4 * CHANNELS, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images with values from 0 to 1."""
        x = self.patches(2 * x - 1).flatten(2).transpose(1, 2) + self.place
        x = torch.cat([self.special.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def network(weights: Path) -> nn.Module:
    """A trained network; its sites are `layers.0` to `layers.3`."""
    model = VisionTransformer()
    model.load_state_dict(load_file(weights))
    return model.eval()


def images(source: str, part: str, n: int) -> tuple[Tensor, Tensor]:
    """Images of CIFAR-10, drawn at random, and their classes."""
    recipe = ma.Images(source=source, include=f"{part}/*", side=SIDE)
    samples = ma.open_samples(recipe, nn.Identity())
    names = [samples.name(i).split("/")[1] for i in range(len(samples))]
    classes = {name: number for number, name in enumerate(sorted(set(names)))}
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:n].tolist()
    x = samples.stack([samples.read(i) for i in chosen])
    return x, torch.tensor([classes[names[i]] for i in chosen])


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", help="zip of CIFAR-10: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--out", type=Path, default=Path("runs/vit/weights.safetensors"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = VisionTransformer()
    if options.steps:
        x, labels = images(options.source, "train", N_TRAINED)
        adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, options.steps)
        with bar("training") as progress:
            for done in range(options.steps):
                chosen = torch.randint(0, len(x), (BATCH,))
                batch = x[chosen].flip(-1) if done % 2 else x[chosen]
                loss = functional.cross_entropy(model(batch), labels[chosen])
                adam.zero_grad()
                loss.backward()
                adam.step()
                rate.step()
                progress(done + 1, options.steps)
        x, labels = images(options.source, "test", N_TESTED)
        with torch.no_grad():
            accuracy = (model.eval()(x).argmax(1) == labels).float().mean()
        print(f"accuracy {float(accuracy):.3f} on {len(x)} images not trained on")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.out)
    print(f"Weights: {options.out}")


if __name__ == "__main__":
    run_script(main)
