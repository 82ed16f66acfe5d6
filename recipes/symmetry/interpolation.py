"""What interpolation alone looks like on a real network: turns by sixteenths, blurred and not.

    python recipes/symmetry/interpolation.py photographs.zip

Quarter-turns move pixels, the turns between compute them, which blurs. That alone makes other
turns less alike than quarter-turns: a 4-fold harmonic that is no symmetry of a feature. The same is
collected with `matched_blur`, where every pose, the first too, is as blurred. Told are R2 of the
best linear map and, over the features of a group crosscoder, the mean stabilizer function, of
quarter-turns and of the turns between, and the harmonic of order 4 by 16 elements.
"""

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import mechatlas as ma
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.positions import Positions
from mechatlas.app.commands import train as jobs
from mechatlas.app.commands.symmetry import TENSORS, SymmetryConfig, find_symmetry
from mechatlas.app.recipes import CollectConfig, TrainConfig

N = 16


def measure(name: str, blurred: bool, options: argparse.Namespace) -> dict[str, float]:
    """Collect, train and classify under sixteen turns."""
    out = options.out / name
    store = out / "store"
    jobs.collect(
        CollectConfig(
            network=ma.Network(name=options.network, weights=options.weights),
            sites=(options.site,),
            samples=ma.Images(source=options.photographs, side=options.side, crops=options.crops),
            collecting=ma.StoreConfig(
                positions=Positions(rule="norm", per_sample=40), dtype="float16", skip_bad=True
            ),
            group=PoseConfig(name=f"C{N}", matched_blur=blurred),
            out=store,
        )
    )
    jobs.train(
        TrainConfig(
            store=store, site=options.site, out=out / "crosscoder", n_latents=options.latents,
            sparsity=ma.TopK(k=16), steps=options.steps, batch_size=512,
        )
    )  # fmt: skip
    found = find_symmetry(
        SymmetryConfig(
            dictionary=out / "crosscoder", store=store, out=out / "symmetry", interventions=0
        )
    )
    s = load_file(out / "symmetry" / TENSORS)["stabilizer_function"].mean(axis=0)
    linear = np.array(found["r2"]["linear"])
    turns = np.arange(1, N)
    quarter = turns[turns % (N // 4) == 0]
    between = turns[turns % (N // 4) != 0]
    wave = np.exp(-2j * np.pi * 4 * np.arange(N) / N)
    return {
        "linear_quarter": float(linear[quarter].mean()),
        "linear_between": float(linear[between].mean()),
        "s_quarter": float(s[quarter].mean()),
        "s_between": float(s[between].mean()),
        # e is alike by definition, and left out of the harmonic: put at the mean of its kind.
        "harmonic_4": float((np.r_[s[quarter].mean(), s[1:]] * wave).real.mean()),
    }


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photographs")
    parser.add_argument("--network", default="inception_mini")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--site", default="mixed3b")
    parser.add_argument("--side", type=int, default=63)
    parser.add_argument("--crops", type=int, default=1)
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/symmetry/interpolation"))
    options = parser.parse_args()
    for name, blurred in (("as it is", False), ("matched blur", True)):
        told = measure(name.replace(" ", "_"), blurred, options)
        print(name, {key: round(value, 4) for key, value in told.items()}, flush=True)


if __name__ == "__main__":
    main()
