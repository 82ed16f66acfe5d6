# pyright: reportMissingImports=false
"""Let the libraries read what was written for them, and keep their codes of some rows.

    .venv-peers/bin/python tools/read_exports.py FOLDER

Runs in the environment of `tools/make_peers.sh` and never imports mechatlas. FOLDER holds
`x.safetensors`, and a folder for each of circuit-tracer, dictionary_learning and sparsify with one
folder a dictionary; `answers.safetensors` gets `LIBRARY/NAME/code` and `LIBRARY/NAME/output`.
Folders for SAELens go through the loader of SAEBench and through SAEDashboard on a tiny random
network, which gives `saebench/NAME/layer`, and the rows and codes of all features under
`saedashboard/NAME`. Files `neuronpedia/*.json` are read by the classes of SAEDashboard.
"""

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


def saebench(folder: Path) -> int:
    """Layer of a dictionary as SAEBench prepares it for its evaluations."""
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import SAE

    loaded = load_and_format_sae("exported", SAE.load_from_disk(folder), "cpu")
    assert loaded is not None
    return int(loaded[1].cfg.hook_layer)


def saedashboard(folder: Path) -> dict[str, torch.Tensor]:
    """Rows, codes and densities of all features, by SAEDashboard on a tiny random network."""
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import FeatureDataGeneratorFactory, SaeVisRunner
    from sae_lens import SAE, HookedSAETransformer

    sae = SAE.load_from_disk(folder)
    torch.manual_seed(0)
    model = HookedSAETransformer(
        {"n_layers": 4, "d_model": sae.cfg.d_in, "n_ctx": 16, "d_head": 4, "n_heads": 2,
         "d_vocab": 40, "act_fn": "gelu", "d_mlp": 16, "device": "cpu", "seed": 0}
    )  # fmt: skip
    tokens = torch.randint(40, (24, 16))
    hook, features = str(sae.cfg.metadata.hook_name), list(range(sae.cfg.d_sae))
    config = SaeVisConfig(hook_point=hook, features=features, minibatch_size_tokens=24)
    data = SaeVisRunner(config).run(sae, model, tokens)  # folds the lengths of the atoms
    maker = FeatureDataGeneratorFactory.create(config, model, sae, tokens)
    code = maker.get_feature_data(features)[0]
    rows = maker.get_model_acts(0, tokens)[hook]
    titles = [data.feature_data_dict[i].acts_histogram_data.title for i in features]
    density = [float(t.split(" = ")[1].rstrip("%")) / 100 if t else 0.0 for t in titles]
    return {
        "rows": rows.flatten(0, 1), "code": code.flatten(0, 1), "density": torch.tensor(density)
    }  # fmt: skip


def neuronpedia(file: Path) -> torch.Tensor:
    """Densities of the features in a file, read by the classes that Neuronpedia's tools write."""
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    written = json.loads(file.read_text())
    batch = NeuronpediaDashboardBatch(**written)
    assert batch.to_dict() == written
    return torch.tensor([feature.frac_nonzero for feature in batch.features])


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
    for folder in sorted((root / "saelens").iterdir()):
        answers[f"saebench/{folder.name}/layer"] = torch.tensor(saebench(folder))
        for key, tensor in saedashboard(folder).items():
            answers[f"saedashboard/{folder.name}/{key}"] = tensor
    for file in sorted((root / "neuronpedia").glob("*.json")):
        answers[f"neuronpedia/{file.stem}/density"] = neuronpedia(file)
    save_file({k: t.detach().contiguous().clone() for k, t in answers.items()},
              root / "answers.safetensors")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
