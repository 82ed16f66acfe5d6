# pyright: reportMissingImports=false
"""Let the libraries read what was written for them, and keep their codes of some rows.

    .venv-peers/bin/python tools/read_exports.py FOLDER

Runs in the environment of `tools/make_peers.sh` and never imports mechatlas. FOLDER holds
`x.safetensors`, and a folder for each of circuit-tracer, dictionary_learning and sparsify with one
folder a dictionary; `answers.safetensors` gets `LIBRARY/NAME/code` and `LIBRARY/NAME/output`.
Folders for SAELens go through the check of SAEBench, if that is installed.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import peer_shims  # noqa: F401 - before the libraries
import torch
from safetensors.torch import load_file, save_file


def circuit_tracer(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and outputs of a transcoder of one layer, or of all layers."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    place = torch.device("cpu")
    files = sorted(folder.glob("layer_*.safetensors"))
    if files:
        own = load_relu_transcoder(
            str(files[0]), 0, place, torch.float32, lazy_encoder=False, lazy_decoder=False
        )
        return own.encode(x), own(x)
    whole = load_clt(str(folder), device=place, dtype=torch.float32, lazy_decoder=False)
    rows = x.unflatten(1, (whole.n_layers, -1)).transpose(0, 1)
    code = whole.encode(rows)
    return code.transpose(0, 1).flatten(1), whole(rows).transpose(0, 1).flatten(1)


def dictionary_learning(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and outputs of a dictionary, read as its configuration says."""
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    others = {"BatchTopKSAE": BatchTopKSAE, "AutoEncoderTopK": AutoEncoderTopK}
    found: Any = others.get(kind) or getattr(dictionary, kind)
    # By default AutoEncoder gives atoms length 1 and scales the codes.
    options = {"normalize_decoder": False} if kind == "AutoEncoder" else {}
    own = found.from_pretrained(str(folder / "ae.pt"), **options)
    return own.encode(x), own(x)


def sparsify(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and outputs of a dictionary, whose codes are its strongest latents."""
    from sparsify import SparseCoder

    own = SparseCoder.load_from_disk(folder, device="cpu")
    top = own.encode(x)
    code = torch.zeros(len(x), own.num_latents)
    code.scatter_(1, top.top_indices, top.top_acts)
    return code, own(x).sae_out


def main(root: Path) -> None:
    """Read all folders."""
    answers = {}
    for library in (circuit_tracer, dictionary_learning, sparsify):
        name = library.__name__.replace("circuit_", "circuit-")
        for folder in sorted((root / name).iterdir()):
            rows = load_file(root / "x.safetensors")
            x = rows.get(folder.name, rows["x"])
            with torch.no_grad():
                code, output = library(folder, x)
            answers |= {f"{name}/{folder.name}/code": code, f"{name}/{folder.name}/output": output}
    with contextlib.suppress(ImportError):
        from sae_bench.sae_bench_utils.general_utils import _standardize_sae_cfg
        from sae_lens import SAE

        for folder in sorted((root / "saelens").iterdir()):
            sae = SAE.load_from_disk(folder)
            _standardize_sae_cfg(sae.cfg)
            answers[f"saebench/{folder.name}/layer"] = torch.tensor(sae.cfg.hook_layer)
    save_file({k: t.detach().contiguous().clone() for k, t in answers.items()},
              root / "answers.safetensors")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
