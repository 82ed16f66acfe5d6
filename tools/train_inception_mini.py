"""Train the bundled network `inception_mini` on CIFAR-10 and write its weights.

    python tools/train_inception_mini.py CIFAR --work runs/inception_mini --out WEIGHTS.safetensors

CIFAR is either a zip of images named `train/CLASS/*` and `test/CLASS/*`, or a folder with
the original binary files (`data_batch_1.bin` .. `data_batch_5.bin`, `test_batch.bin`).
A checkpoint is written after each epoch; the same command resumes from the last one.
Batch normalisation is used for training only and folded into the convolutions at the end.
"""

import argparse
import copy
import io
import json
import math
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.architectures.inception import ConvReLU, InceptionMini

SIDE = 31
Split = tuple[np.ndarray, np.ndarray]


def main() -> None:
    """Train, fold, report the test accuracy and write the weights."""
    parser = argparse.ArgumentParser(description="Train the bundled network on CIFAR-10.")
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/inception_mini"))
    parser.add_argument("--out", type=Path, default=Path("inception_mini.safetensors"))
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    train, test = read_cifar(options.cifar, options.work)
    torch.manual_seed(options.seed)
    network = with_batch_norm(InceptionMini())
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    trained = fit(network, train, test, options)
    folded = fold(trained).half().float()
    accuracy = evaluate(folded, *test)
    weights = {name: tensor.half().contiguous() for name, tensor in folded.state_dict().items()}
    card = {
        "network": "inception_mini",
        "test_accuracy": f"{accuracy:.4f}",
        "epochs": str(options.epochs),
        "seed": str(options.seed),
    }
    save_file(weights, options.out, metadata=card)
    print(f"test accuracy {accuracy:.4f} in float16 weights; wrote {options.out}")


def fit(
    network: InceptionMini, train: Split, test: Split, options: argparse.Namespace
) -> InceptionMini:
    """Train with SGD and a one-cycle rate; resume from the checkpoint if there is one."""
    images, labels = train
    n_batches = len(images) // options.batch
    n_steps = options.epochs * n_batches
    decay = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    optimiser = torch.optim.SGD(
        [{"params": decay, "weight_decay": 5e-4}, {"params": plain}],
        lr=options.lr,
        momentum=0.9,
        nesterov=True,
    )
    checkpoint = options.work / "checkpoint.safetensors"
    first = resume(network, optimiser, checkpoint)
    for epoch in range(first, options.epochs):
        started, losses = time.time(), []
        random = torch.Generator().manual_seed(options.seed * 1000 + epoch)
        order = torch.randperm(len(images), generator=random)
        network.train()
        for batch in range(n_batches):
            step = epoch * n_batches + batch
            for group in optimiser.param_groups:
                group["lr"] = options.lr * one_cycle(step / n_steps)
            index = order[batch * options.batch : (batch + 1) * options.batch].numpy()
            x = augment(images[index], random)
            y = torch.from_numpy(labels[index])
            loss = functional.cross_entropy(network(x), y, label_smoothing=0.05)
            if not torch.isfinite(loss):
                raise SystemExit(f"The loss is {loss.item()} at step {step}; lower --lr.")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            if batch % 50 == 0:
                print(f"  {epoch} {batch}/{n_batches} {np.mean(losses[-50:]):.3f}", flush=True)
        keep(network, optimiser, checkpoint, epoch + 1)
        print(
            json.dumps(
                {
                    "epoch": epoch + 1,
                    "loss": round(float(np.mean(losses)), 4),
                    "test_accuracy": evaluate(network, *test),
                    "wall_seconds": round(time.time() - started, 1),
                }
            ),
            flush=True,
        )
    return network


def one_cycle(progress: float, warm_up: float = 0.15) -> float:
    """Fraction of the largest rate: linear up, then a cosine down to zero."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def augment(images: np.ndarray, random: torch.Generator) -> Tensor:
    """Random crops of 31 x 31 after reflecting 3 pixels, and random mirrors."""
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect")
    span = padded.shape[1] - SIDE + 1
    corner = torch.randint(span, (len(images), 2), generator=random).numpy()
    mirror = torch.rand(len(images), generator=random).numpy() < 0.5
    out = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for i, (y, x) in enumerate(corner):
        crop = padded[i, y : y + SIDE, x : x + SIDE]
        out[i] = crop[:, ::-1] if mirror[i] else crop
    return as_input(out)


def as_input(images: np.ndarray) -> Tensor:
    """RGB bytes, channels last, to floats in 0..1, channels first in shape."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)


@torch.no_grad()
def evaluate(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on the top left 31 x 31 pixels of each image."""
    network.eval()
    right = 0
    for start in range(0, len(images), 500):
        x = as_input(images[start : start + 500, :SIDE, :SIDE])
        right += int((network(x).argmax(1).numpy() == labels[start : start + 500]).sum())
    return right / len(images)


def with_batch_norm(network: InceptionMini) -> InceptionMini:
    """Network with a batch normalization after each convolution."""
    for module in network.modules():
        if isinstance(module, ConvReLU):
            conv, side = module.conv, module.conv.kernel_size[0]
            bare = nn.Conv2d(
                conv.in_channels, conv.out_channels, side, padding=side // 2, bias=False
            )
            nn.init.kaiming_normal_(bare.weight, nonlinearity="relu")
            module.add_module("conv", nn.Sequential(bare, nn.BatchNorm2d(conv.out_channels)))
    return network


def fold(network: InceptionMini) -> InceptionMini:
    """Fold the batch normalizations into the convolutions; the function stays the same."""
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if isinstance(module, ConvReLU):
            conv, norm = module.conv.children()
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            module.add_module("conv", nn.utils.fuse_conv_bn_eval(conv, norm))
    return folded


def keep(network: nn.Module, optimiser: torch.optim.Optimizer, path: Path, epoch: int) -> None:
    """Write everything that the next epoch needs, under a temporary name first."""
    tensors = {f"network.{k}": v.contiguous() for k, v in network.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors[f"momentum.{i}"] = state["momentum_buffer"].contiguous()
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"epoch": str(epoch)})
    os.replace(temporary, path)


def resume(network: nn.Module, optimiser: torch.optim.Optimizer, path: Path) -> int:
    """Load the checkpoint if there is one; the number of epochs already done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0
    tensors = load_file(path)
    network.load_state_dict(
        {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    )
    momentum = {
        int(k.removeprefix("momentum.")): {"momentum_buffer": v}
        for k, v in tensors.items()
        if k.startswith("momentum.")
    }
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": momentum, "param_groups": groups})
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        epoch = int(json.loads(file.read(size))["__metadata__"]["epoch"])
    print(f"resumed after epoch {epoch}", flush=True)
    return epoch


def read_cifar(source: Path, cache: Path) -> tuple[Split, Split]:
    """Both splits as bytes (n, 32, 32, 3) and labels; decoded once, then cached."""
    if source.is_dir():
        names = [f"data_batch_{i}.bin" for i in range(1, 6)]
        train = [read_binary(source / name) for name in names]
        together = (np.concatenate([t[0] for t in train]), np.concatenate([t[1] for t in train]))
        return together, read_binary(source / "test_batch.bin")
    cached = cache / "cifar10.npz"
    if not cached.exists():
        cache.mkdir(parents=True, exist_ok=True)
        splits = {}
        with zipfile.ZipFile(source) as archive:
            for split in ("train", "test"):
                names = sorted(n for n in archive.namelist() if n.startswith(f"{split}/"))
                names = [n for n in names if not n.endswith("/")]
                pictures = [Image.open(io.BytesIO(archive.read(n))).convert("RGB") for n in names]
                splits[f"{split}_x"] = np.stack([np.asarray(p) for p in pictures])
                splits[f"{split}_y"] = np.array(
                    [InceptionMini.classes.index(n.split("/")[1]) for n in names]
                )
        np.savez(cached, **splits)
    data = np.load(cached)
    return (data["train_x"], data["train_y"]), (data["test_x"], data["test_y"])


def read_binary(path: Path) -> Split:
    """One of the original binary files: records of a label byte and 3 x 32 x 32 bytes."""
    records = np.fromfile(path, np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


if __name__ == "__main__":
    main()
