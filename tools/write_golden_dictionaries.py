# pyright: reportMissingImports=false, reportPrivateImportUsage=false
"""Write small dictionaries with the libraries that we read, with their numbers for some rows.

    .venv-peers/bin/python tools/write_golden_dictionaries.py --out tests/golden [--seed 0]

Runs in the environment of `tools/make_peers.sh` and never imports mechatlas. Each dictionary is a
folder as its library writes it; `expected.safetensors` holds the rows (`x`) and, for each folder,
the library's own `NAME/code`, `NAME/decoded` and `NAME/output`. All weights are drawn at random,
so that no convention can hide behind a bias of zero or an atom of length 1. Gemma Scope has no
library: its files are written in the published format, the numbers by its formula. Files of
SAELens 5 are written by hand in its format and read by SAELens 6.
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import numpy as np
import peer_shims  # noqa: F401 - before the libraries
import torch
from safetensors.torch import save_file

D_IN, N_LATENTS, D_OUT, N_ROWS, K = 8, 24, 10, 8, 4

Numbers = dict[str, torch.Tensor]


def randomise(module: torch.nn.Module, random: torch.Generator) -> None:
    """Draw all weights; thresholds and scales positive, the rest around zero."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=random) * 0.5
        if "threshold" in name:
            drawn = drawn.abs() * 0.8
        tensor.data.copy_(drawn)


def answers(module: torch.nn.Module, x: torch.Tensor) -> Numbers:
    """Code, reconstruction and output of a module for some rows."""
    with torch.no_grad():
        code = module.encode(x)  # pyright: ignore[reportCallIssue]
        decoded = module.decode(code)  # pyright: ignore[reportCallIssue]
        return {"code": code, "decoded": decoded, "output": module(x)}


def saelens_six(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Inference dictionaries and transcoders of SAELens 6."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    found = {}
    for name, architecture, settings in (
        ("standard", "standard", {}),
        ("standard_no_b_dec", "standard", {"apply_b_dec_to_input": False}),
        ("standard_expected", "standard", {"normalize_activations": "expected_average_only_in"}),
        ("standard_whitening", "standard", {"normalize_activations": "covariance_whitening"}),
        ("standard_constant_norm", "standard", {"normalize_activations": "constant_norm_rescale"}),
        ("standard_bfloat16", "standard", {"dtype": "bfloat16"}),
        ("gated", "gated", {}),
        ("gated_no_b_dec", "gated", {"apply_b_dec_to_input": False}),
        ("jumprelu", "jumprelu", {}),
        ("jumprelu_layer_norm", "jumprelu", {"normalize_activations": "layer_norm"}),
        ("topk", "topk", {"k": K}),
        ("topk_rescaled", "topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("abstopk", "abstopk", {"k": K}),
        ("transcoder", "transcoder", {"d_out": D_OUT}),
        ("transcoder_layer_norm", "transcoder", {"normalize_activations": "layer_norm"}),
        ("skip_transcoder", "skip_transcoder", {"d_out": D_OUT}),
        ("jumprelu_transcoder", "jumprelu_transcoder", {"d_out": D_OUT}),
        ("jumprelu_skip_transcoder", "jumprelu_skip_transcoder", {"d_out": D_OUT}),
    ):
        kind, config = get_sae_class(architecture)
        if "transcoder" in architecture:
            settings = {"d_out": D_IN, "apply_b_dec_to_input": False, **settings}
        sae = kind(config(d_in=D_IN, d_sae=N_LATENTS, **settings))
        randomise(sae, random)
        sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
        folder = out / f"saelens6_{name}"
        sae.save_model(folder)
        found[folder.name] = answers(SAE.load_from_disk(folder, dtype="float32"), x)
    return found


def saelens_training(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Training checkpoints; the numbers are those of what SAELens exports from them."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_training_class

    found = {}
    for name, settings in (
        ("topk", {"k": K}),
        ("batchtopk", {"k": float(K)}),
        ("matryoshka_batchtopk", {"k": float(K), "matryoshka_widths": [6, 12, N_LATENTS]}),
    ):
        kind, config = get_sae_training_class(name)
        sae = kind(config(d_in=D_IN, d_sae=N_LATENTS, **settings))
        randomise(sae, random)
        folder = out / f"saelens6_training_{name}"
        sae.save_model(folder)
        exported = out / f"saelens6_exported_{name}"
        sae.save_inference_model(exported)
        found[exported.name] = answers(SAE.load_from_disk(exported), x)
        found[folder.name] = found[exported.name]
    return found


def saelens_five(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Folders as SAELens 2 to 5 wrote them."""
    from sae_lens import SAE, TrainingSAE

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) * 0.5

    def plain() -> dict[str, torch.Tensor]:
        tensors = {"W_enc": draw(D_IN, N_LATENTS), "W_dec": draw(N_LATENTS, D_IN)}
        return {**tensors, "b_enc": draw(N_LATENTS), "b_dec": draw(D_IN)}

    common = {"d_in": D_IN, "d_sae": N_LATENTS, "dtype": "torch.float32", "device": "cpu"}
    top = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    gated = plain()
    del gated["b_enc"]
    gated |= {key: draw(N_LATENTS) for key in ("b_gate", "b_mag", "r_mag")}
    ones = {"scaling_factor": torch.ones(N_LATENTS)}
    five = {**common, "sae_lens_training_version": "5.3.0", "normalize_activations": "none"}
    found = {}
    for name, config, tensors in (
        ("saelens2_standard", {**common, "hook_point": "blocks.1.hook_mlp_out"}, plain() | ones),
        ("saelens3_bool", {**common, "normalize_activations": False, **top}, plain()),
        (
            "saelens5_no_b_dec",
            {**five, "architecture": "standard", "apply_b_dec_to_input": False},
            plain(),
        ),
        ("saelens5_topk", {**five, "architecture": "standard", **top}, plain()),
        ("saelens5_gated", {**five, "architecture": "gated"}, gated),
        (
            "saelens5_log_threshold",
            {**five, "architecture": "jumprelu", "activation_fn_str": "relu"},
            {**plain(), "log_threshold": draw(N_LATENTS)},
        ),
    ):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(config))
        kind = TrainingSAE if "log_threshold" in tensors else SAE
        found[name] = answers(kind.load_from_disk(folder), x)
    return found


def dictionary_learning(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """One dictionary of each class, saved as `trainSAE` saves it."""
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.p_anneal import PAnnealTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    common = {
        "steps": 10,
        "activation_dim": D_IN,
        "dict_size": N_LATENTS,
        "layer": 3,
        "lm_name": "none",
        "device": "cpu",
        "warmup_steps": 1,
    }
    few = {"sparsity_warmup_steps": 2, "decay_start": 8}
    found = {}
    for name, kind, settings in (
        ("standard", StandardTrainer, few),
        ("april", StandardTrainerAprilUpdate, few),
        ("p_anneal", PAnnealTrainer, {**few, "anneal_start": 2, "anneal_end": 5}),
        ("gdm", GatedSAETrainer, few),
        ("gated_anneal", GatedAnnealTrainer, {**few, "anneal_start": 2, "anneal_end": 5}),
        ("jumprelu", JumpReluTrainer, few),
        ("topk", TopKTrainer, {"k": K}),
        ("batchtopk", BatchTopKTrainer, {"k": K}),
        ("matryoshka", MatryoshkaBatchTopKTrainer, {"k": K, "group_fractions": [0.25, 0.25, 0.5]}),
        ("new", None, {}),
    ):
        if kind is None:
            ae = AutoEncoderNew(D_IN, N_LATENTS)
            config = {"dict_class": "AutoEncoderNew", "activation_dim": D_IN}
        else:
            trainer = kind(**common, **settings)
            ae, config = trainer.ae, trainer.config
        randomise(ae, random)
        folder = out / f"dictionary_learning_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"trainer": config}, indent=4))
        torch.save({key: t.cpu() for key, t in ae.state_dict().items()}, folder / "ae.pt")
        found[folder.name] = answers(ae, x)
    return found


def sparsify(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Autoencoders and a transcoder of sparsify; its code is written out in full."""
    from sparsify import SparseCoder, SparseCoderConfig

    found = {}
    for name, settings in (
        ("topk", {"num_latents": N_LATENTS}),
        ("square", {"num_latents": D_IN}),
        ("expansion", {"num_latents": 0, "expansion_factor": 3}),
        ("groupmax", {"num_latents": N_LATENTS, "activation": "groupmax"}),
        ("transcode", {"num_latents": N_LATENTS, "transcode": True}),
        ("transcode_skip", {"expansion_factor": 3, "transcode": True, "skip_connection": True}),
    ):
        coder = SparseCoder(D_IN, SparseCoderConfig(k=K, **settings), dtype=torch.float32)
        randomise(coder, random)
        folder = out / f"sparsify_{name}"
        coder.save_to_disk(folder)
        with torch.no_grad():
            coded = coder.encode(x)
            empty = torch.zeros(len(x), coder.num_latents)
            found[folder.name] = {
                "code": empty.scatter(1, coded.top_indices, coded.top_acts),
                "decoded": coder.decode(coded.top_acts, coded.top_indices),
                "output": coder(x, y=x).sae_out,
            }
    return found


def gemma_scope(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Files in the two formats of Gemma Scope, and its formula."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) / math.sqrt(shape[0])

    found = {}
    for name, d_out, skips in (("one", D_IN, False), ("two", D_IN, False), ("two_skip", 10, True)):
        folder = out / f"gemma_scope_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "w_enc": draw(D_IN, N_LATENTS),
            "w_dec": draw(N_LATENTS, d_out),
            "b_enc": draw(N_LATENTS),
            "b_dec": draw(d_out),
            "threshold": draw(N_LATENTS).abs() * 3,
        }
        z = x @ tensors["w_enc"] + tensors["b_enc"]
        code = z * (z > tensors["threshold"])
        decoded = output = code @ tensors["w_dec"] + tensors["b_dec"]
        if name == "one":
            arrays = {key.replace("w_", "W_"): t.numpy() for key, t in tensors.items()}
            np.savez(folder / "params.npz", **arrays)  # pyright: ignore[reportArgumentType]
        else:
            if skips:
                tensors["affine_skip_connection"] = draw(D_IN, d_out)
                output = decoded + x @ tensors["affine_skip_connection"]
            config = {
                "architecture": "jump_relu",
                "model_name": "google/gemma-3-1b-pt",
                "hf_hook_point_in": "model.layers.3.output",
                "affine_connection": skips,
            }
            save_file(tensors, folder / "params.safetensors")
            (folder / "config.json").write_text(json.dumps(config))
        found[folder.name] = {"code": code, "decoded": decoded, "output": output}
    return found


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.manual_seed(options.seed)
    random = torch.Generator().manual_seed(options.seed)
    x = 1.5 * torch.randn(N_ROWS, D_IN, generator=random) + 0.3
    numbers = {"x": x}
    for write in (
        saelens_six,
        saelens_training,
        saelens_five,
        dictionary_learning,
        sparsify,
        gemma_scope,
    ):
        for name, found in write(options.out, x, random).items():
            numbers |= {f"{name}/{key}": t.contiguous() for key, t in found.items()}
    kept = {key: tensor.detach().float().clone() for key, tensor in numbers.items()}
    save_file(kept, options.out / "expected.safetensors")


if __name__ == "__main__":
    main()
