"""Write the bundled SqueezeNet: the published weights, rounded to float16.

    python tools/bundle_squeezenet.py squeezenet_v1_1_imagenet.safetensors

The file has the weights of `squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5` of
DeepCognition/keras-squeezenet (MIT), commit a73d4339, transposed to (out, in, height, width).
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

OUT = Path(__file__).parents[1] / "src/mechatlas/bundled/squeezenet.safetensors"


def main(source: Path) -> None:
    """Round every tensor to float16 and keep the notes of the file."""
    with safe_open(source, "pt") as file:
        notes = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name).to(torch.float16) for name in file.keys()}  # noqa: SIM118
    notes = {key: notes[key] for key in sorted(notes)} | {"license": "MIT"}
    OUT.write_bytes(save(tensors, notes))
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {len(tensors)} tensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
