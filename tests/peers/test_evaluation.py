"""Loss recovered and divergence, against SAELens' own evaluation on the same tokens."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mechatlas.activations.positions import Positions
from mechatlas.analysis.evaluation.evaluate import evaluate
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.formats import save
from mechatlas.dictionaries.sparsity import ReLU
from mechatlas.dictionaries.training import train
from tests.networks import Reader, Windows

pytestmark = pytest.mark.peers

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("MECHATLAS_PEERS", HERE.parents[1] / ".venv-peers"))


def test_loss_recovered_is_that_of_saelens(tmp_path):
    python = PEERS / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs {PEERS}: tools/make_peers.sh")
    network, samples = Reader(), Windows(n=40, length=3)  # too short to be padded
    rows = network.embed.weight.detach().repeat(20, 1)
    sae = train(
        Autoencoder(d_in=8, n_latents=24, sparsity=ReLU(l1=0.01)), rows, steps=200, batch_size=64
    )
    save(sae, tmp_path, format="saelens")
    weights = {
        "tokens": torch.from_numpy(samples.tokens),
        "embed": network.embed.weight.detach(),
        "mix": network.block.mix.weight.detach(),
        "mix_bias": network.block.mix.bias.detach(),
        "head": network.head.weight.detach(),
        "head_bias": network.head.bias.detach(),
    }
    save_file(weights, tmp_path / "inputs.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), str(HERE / "evaluate_saelens.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours: Any = evaluate(
        sae,
        network=network,
        samples=samples,
        site="embed",
        positions=Positions(keep_special=True, skip_first=0),
        outlier_norms=float("inf"),
    )
    spliced, intact, zero = (
        theirs[f"ce_loss_{way}"] for way in ("with_sae", "without_sae", "with_ablation")
    )
    assert ours.spliced.loss.value == pytest.approx(spliced, abs=1e-4)
    assert ours.loss_recovered.value == pytest.approx((zero - spliced) / (zero - intact), abs=1e-3)
    assert ours.spliced.kl_divergence.value == pytest.approx(theirs["kl_div_with_sae"], abs=1e-4)
