"""Effect of interpolation on a real network: sixteen rotations, with and without matched blur.

    python recipes/symmetry/interpolation.py photographs.zip

Quarter-turns move pixels; the rotations between interpolate them, which blurs. The blur alone makes
other rotations less similar than quarter-turns: a 4-fold harmonic that is no symmetry of a feature.
With `matched_blur` every pose, the first included, is equally blurred. Printed are R2 of the best
linear map and the mean stabilizer function over the features of a group crosscoder, for
quarter-turns and for the rotations between, and its harmonic of order 4 over 16 elements.
"""

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import mechatlas as ma
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.positions import Positions
from mechatlas.app.commands import symmetry
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.run_folder import SYMMETRY_TENSORS, execute

N = 16


def measure(name: str, blurred: bool, options: argparse.Namespace) -> dict[str, float]:
    """Collect, train and classify under sixteen rotations."""
    out = options.out / name
    store = out / "store"
    execute(
        CollectConfig(
            network=ma.Network(name=options.network, weights=options.weights),
            sites=(options.site,),
            samples=ma.Images(source=options.photographs, side=options.side, crops=options.crops),
            storage=ma.StoreConfig(
                positions=Positions(rule="norm", per_sample=40), dtype="float16", skip_bad=True
            ),
            group=PoseConfig(name=f"C{N}", matched_blur=blurred),
            out=store,
        )
    )
    execute(
        TrainConfig(
            store=store, site=options.site, out=out / "crosscoder", n_latents=options.latents,
            sparsity=ma.TopK(k=16), steps=options.steps, batch_size=512,
        )
    )  # fmt: skip
    config = symmetry.SymmetryConfig(
        dictionary=out / "crosscoder", store=store, out=out / "symmetry", interventions=0
    )
    result = execute(config)
    s = load_file(out / "symmetry" / SYMMETRY_TENSORS)["stabilizer_function"].mean(axis=0)
    linear = np.array(result.r2["linear"])
    turns = np.arange(1, N)
    quarter = turns[turns % (N // 4) == 0]
    between = turns[turns % (N // 4) != 0]
    wave = np.exp(-2j * np.pi * 4 * np.arange(N) / N)
    return {
        "linear_quarter": float(linear[quarter].mean()),
        "linear_between": float(linear[between].mean()),
        "s_quarter": float(s[quarter].mean()),
        "s_between": float(s[between].mean()),
        # s(e) is 1 by definition, so the mean of quarter-turns stands in for it in the harmonic.
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
    for name, blurred in (("unmodified", False), ("matched blur", True)):
        measured = measure(name.replace(" ", "_"), blurred, options)
        print(name, {key: round(value, 4) for key, value in measured.items()}, flush=True)


if __name__ == "__main__":
    main()
