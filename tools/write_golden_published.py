# pyright: reportMissingImports=false, reportPrivateImportUsage=false
"""Write small dictionaries in the layouts that are published, with the numbers of their libraries.

    .venv-peers/bin/python tools/write_golden_published.py --out tests/golden [--seed 0]

The companion of `write_golden_dictionaries.py`, for circuit-tracer, llamascopium, Overcomplete,
saev and the loaders of SAELens, whose downloads are redirected to the folder written here. Where
a library cannot be installed (OpenAI's, crosscoder_learning, Prisma) the numbers are those of its
formula. `published.safetensors` holds the rows `x`, or `NAME/x` of a dictionary of several sites,
and `NAME/code`, `NAME/decoded` and `NAME/output`.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peer_shims  # noqa: F401 - before the libraries
import torch
from safetensors.torch import save_file
from write_golden_dictionaries import D_IN, N_LATENTS, N_ROWS, K, Numbers, answers, randomise

SITES = 3


def drawn(random: torch.Generator, *shape: int) -> torch.Tensor:
    """Draw numbers of a size that leaves some codes at zero."""
    return torch.randn(shape, generator=random) * 0.5


def linear(random: torch.Generator, encoder: str, decoder: str) -> dict[str, torch.Tensor]:
    """Draw a linear layer each way."""
    return {
        f"{encoder}.weight": drawn(random, N_LATENTS, D_IN),
        f"{encoder}.bias": drawn(random, N_LATENTS),
        f"{decoder}.weight": drawn(random, D_IN, N_LATENTS),
        f"{decoder}.bias": drawn(random, D_IN),
    }


def circuit_tracer(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Transcoders of one layer, and cross-layer transcoders."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    found: dict[str, Numbers] = {}
    for name, skip in (("relu", False), ("skip", True), ("jump", False)):
        function: Any = torch.nn.functional.relu
        if name == "jump":
            function = JumpReLU(torch.zeros(N_LATENTS), 0.1)
        own = SingleLayerTranscoder(D_IN, N_LATENTS, function, 3, skip, dtype=torch.float32)
        randomise(own, random)
        folder = out / f"circuit_tracer_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        own.to_safetensors(str(folder / "layer_3.safetensors"))
        with torch.no_grad():
            code = own.encode(x)
            decoded = code @ own.W_dec + own.b_dec
            found[folder.name] = {"code": code, "decoded": decoded, "output": own(x)}
    for name in ("relu", "jump_relu"):
        own = CrossLayerTranscoder(
            SITES, 6, D_IN, name, lazy_decoder=False, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip
        randomise(own, random)
        folder = out / f"circuit_tracer_clt_{name}"
        own.to_safetensors(str(folder))
        wide = torch.randn(N_ROWS, SITES * D_IN, generator=random)
        layers = wide.unflatten(1, (SITES, D_IN)).transpose(0, 1)
        with torch.no_grad():
            code = own.encode(layers)
            decoded = own.decode(code.to_sparse()).transpose(0, 1).flatten(1)
        flat = code.transpose(0, 1).flatten(1)
        found[folder.name] = {"x": wide, "code": flat, "decoded": decoded, "output": decoded}
    return found


def gemma_several(out: Path, random: torch.Generator) -> dict[str, Numbers]:
    """Gemma Scope 2: a cross-layer transcoder with skips, and a crosscoder, by their formula."""
    found = {}
    for name, folder in (
        ("clt", "gemma_scope_two_clt"),
        ("crosscoder", "gemma_scope_two_layer_1_4_7_width_6"),
    ):
        wide = torch.randn(N_ROWS, SITES * D_IN, generator=random)
        x = wide.unflatten(1, (SITES, D_IN))
        parts = []
        for i in range(SITES):
            part = {
                "w_enc": drawn(random, D_IN, 6),
                "b_enc": drawn(random, 6),
                "w_dec": drawn(random, 6, SITES, D_IN),
                "b_dec": drawn(random, D_IN),
                "threshold": drawn(random, 6).abs(),
            }
            if name == "clt":
                part["w_dec"][:, :i] = 0
                part["affine_skip_connection"] = drawn(random, D_IN, D_IN)
            (out / folder).mkdir(parents=True, exist_ok=True)
            save_file(part, out / folder / f"params_layer_{i}.safetensors")
            parts.append(part)
        p = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        pre = torch.einsum("nld,ldm->nlm", x, p["w_enc"]) + p["b_enc"]
        code = pre.relu() * (pre > p["threshold"])
        decoded = torch.einsum("nlm,lmod->nod", code, p["w_dec"]) + p["b_dec"]
        skip = p.get("affine_skip_connection")
        output = decoded if skip is None else decoded + torch.einsum("nld,ldo->nlo", x, skip)
        found[folder] = {
            "x": wide, "code": code.flatten(1), "decoded": decoded.flatten(1),
            "output": output.flatten(1),
        }  # fmt: skip
    return found


def through_saelens(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Layouts that SAELens downloads and converts, its downloads taken from here."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    usual = {
        "W_enc": drawn(random, D_IN, N_LATENTS), "b_enc": drawn(random, N_LATENTS),
        "W_dec": drawn(random, N_LATENTS, D_IN), "b_dec": drawn(random, D_IN),
    }  # fmt: skip
    sizes = {"d_in": D_IN, "d_sae": N_LATENTS, "dtype": "float32", "device": "cpu"}
    names = ("llama_scope", "llama_scope_r1", "qwen_scope", "goodfire", "deepseek",
             "connor_rob", "gemma_scope_transcoder", "mwhanna_transcoder")  # fmt: skip
    for name in names:
        (out / name).mkdir(parents=True, exist_ok=True)

    both = linear(random, "encoder", "decoder")
    norms = {"in": 4.0, "out": 4.0}
    settings = {
        "d_model": D_IN, "d_sae": N_LATENTS, "expansion_factor": N_LATENTS // D_IN,
        "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
        "jump_relu_threshold": 0.3, "act_fn": "jumprelu", "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": False, "dataset_average_activation_norm": norms,
    }  # fmt: skip
    (out / "llama_scope" / "hyperparams.json").write_text(json.dumps(settings))
    (out / "llama_scope" / "checkpoints").mkdir(exist_ok=True)
    save_file(both, out / "llama_scope" / "checkpoints" / "final.safetensors")
    del settings["dataset_average_activation_norm"], settings["jump_relu_threshold"]
    (out / "llama_scope_r1" / "config.json").write_text(json.dumps(settings))
    logarithm = {"log_jumprelu_threshold": drawn(random, N_LATENTS)}
    save_file({**both, **logarithm}, out / "llama_scope_r1" / "sae_weights.safetensors")
    qwen = {**usual, "W_enc": usual["W_enc"].T.contiguous(), "W_dec": usual["W_dec"].T.contiguous()}
    torch.save(qwen, out / "qwen_scope" / "layer0.sae.pt")
    good = linear(random, "encoder_linear", "decoder_linear")
    torch.save(good, out / "goodfire" / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    torch.save(both, out / "deepseek" / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt")
    torch.save(usual, out / "connor_rob" / "gpt2-small_L3_Hcat_z.pt")
    heads = {"act_size": D_IN, "dict_size": N_LATENTS, "act_name": "blocks.3.attn.hook_z"}
    (out / "connor_rob" / "gpt2-small_L3_Hcat_z_cfg.json").write_text(json.dumps(heads))
    threshold = {"threshold": drawn(random, N_LATENTS).abs()}
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in {**usual, **threshold}.items()}
    (out / "gemma_scope_transcoder" / "layer_3" / "width_16k").mkdir(parents=True, exist_ok=True)
    np.savez(out / "gemma_scope_transcoder" / "params.npz", **arrays)
    flipped = {**usual, "W_enc": usual["W_enc"].T.contiguous()}
    save_file(flipped, out / "mwhanna_transcoder" / "layer_3.safetensors")
    (out / "mwhanna_transcoder" / "config.yaml").write_text("model_name: Qwen/Qwen3-0.6B\n")

    def local(name: str) -> Any:
        def download(repo: str = "", filename: str = "", **options: Any) -> str:
            del repo
            file = Path(options.get("filename") or filename)
            return str(next(p for p in (out / name).rglob(file.name)))

        return download

    mwhanna = {"d_model": {"value": D_IN}, "d_feature": {"value": N_LATENTS},
               "batch_size": {"value": 1}}  # fmt: skip
    found: dict[str, Numbers] = {}
    for name, loader, repository, place, more in (
        ("llama_scope", loaders.llama_scope_sae_huggingface_loader, "", "L3", {}),
        ("llama_scope_r1", loaders.llama_scope_r1_distill_sae_huggingface_loader, "", "L3R", {}),
        ("qwen_scope", loaders.qwen_scope_sae_huggingface_loader,
         f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "layer0.sae.pt", {}),
        ("goodfire", loaders.get_goodfire_huggingface_loader,
         "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth", {}),
        ("deepseek", loaders.deepseek_r1_sae_huggingface_loader, "",
         "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", {}),
        ("connor_rob", loaders.connor_rob_hook_z_huggingface_loader, "",
         "gpt2-small_L3_Hcat_z.pt", {"reshape_activations": "none"}),
        ("gemma_scope_transcoder", loaders.gemma_2_transcoder_huggingface_loader, "2b",
         "layer_3/width_16k/average_l0_1", {"d_out": D_IN}),
        ("mwhanna_transcoder", loaders.mwhanna_transcoder_huggingface_loader, "",
         "layer_3.safetensors", {}),
    ):  # fmt: skip
        loaders.hf_hub_download, plain = local(name), loaders.yaml.safe_load
        if name == "mwhanna_transcoder":
            loaders.yaml.safe_load = lambda file: {**mwhanna, "model_name": "Qwen/Qwen3-0.6B"}
            (out / name / "wandb-config.yaml").write_text("{}")
        config, state, _ = loader(repository, place, "cpu", False, {**sizes, **more})
        if name == "mwhanna_transcoder":
            loaders.yaml.safe_load = plain
            (out / name / "wandb-config.yaml").unlink()
        config = loaders.handle_config_defaulting(config)
        own = SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)
        sae = SAE.get_sae_class_for_architecture(own.architecture())(own)
        sae.process_state_dict_for_loading(state)
        sae.load_state_dict(state)
        if name == "llama_scope":
            sae.fold_activation_norm_scaling_factor(D_IN**0.5 / norms["in"])
        found[name] = answers(sae, x)
    for folder in sorted(out.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return found


def matching_pursuit(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """SAELens' matching pursuit, whose atoms have length 1."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    found: dict[str, Numbers] = {}
    for name, settings in (
        ("whole", {"residual_threshold": 0.5}),
        ("short", {"max_iterations": 3, "stop_on_duplicate_support": False,
                   "apply_b_dec_to_input": False}),
    ):  # fmt: skip
        kind, config = get_sae_class("matching_pursuit")
        sae = kind(config(d_in=D_IN, d_sae=N_LATENTS, **settings))
        randomise(sae, random)
        sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
        folder = out / f"saelens6_pursuit_{name}"
        sae.save_model(folder)
        found[folder.name] = answers(SAE.load_from_disk(folder), x)
    return found


def llamascopium(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """OpenMOSS' autoencoders and transcoders, normalized as they are trained."""
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    here, there = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
    found: dict[str, Numbers] = {}
    for name, settings, hooks, lengths in (
        ("relu", {"act_fn": "relu"}, (here, here), (3.0, 3.0)),
        ("topk", {"act_fn": "topk", "top_k": K}, (here, there), (3.0, 5.0)),
        ("jumprelu", {"act_fn": "jumprelu"}, (here, there), (3.0, 5.0)),
        ("unweighted", {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False,
                        "norm_activation": "inference"}, (here, here), None),
        ("tokens", {"act_fn": "topk", "top_k": K, "norm_activation": "token-wise",
                    "use_decoder_bias": False}, (here, here), None),
    ):  # fmt: skip
        config = SAEConfig(
            d_model=D_IN, expansion_factor=N_LATENTS // D_IN, hook_point_in=hooks[0],
            hook_point_out=hooks[1], device="cpu", dtype=torch.float32, **settings,
        )  # fmt: skip
        sae = SparseAutoEncoder(config)
        randomise(sae, random)
        if lengths:
            sae.set_dataset_average_activation_norm(dict(zip(hooks, lengths, strict=True)))
        else:
            sae.set_dataset_average_activation_norm(dict.fromkeys(hooks, 1.0))
        sae.set_current_k(K)
        folder = out / f"llamascopium_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        sae.save_pretrained(folder)
        config.save_hyperparameters(folder)
        with torch.no_grad():
            batch, scales = sae.normalize_activations(
                {hooks[0]: x, hooks[1]: x}, return_scale_factor=True
            )
            code = sae.encode(batch[hooks[0]])
            decoded = sae.decode(code) / scales[hooks[1]]
        found[folder.name] = {"code": code, "decoded": decoded, "output": decoded}
    return found


def llamascopium_sites(out: Path, random: torch.Generator) -> dict[str, Numbers]:
    """OpenMOSS' crosscoders and cross-layer transcoders, with the mean lengths of three sites."""
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
    from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig

    ins = [f"blocks.{i}.hook_resid_mid" for i in range(SITES)]
    outs = [f"blocks.{i}.hook_mlp_out" for i in range(SITES)]
    found: dict[str, Numbers] = {}
    usual = {"d_model": D_IN, "expansion_factor": N_LATENTS // D_IN, "device": "cpu",
             "dtype": torch.float32}  # fmt: skip
    for name, kind, config in (
        ("crosscoder_relu", Crosscoder, CrosscoderConfig(hook_points=ins, act_fn="relu", **usual)),
        ("crosscoder_jumprelu", Crosscoder,
         CrosscoderConfig(hook_points=ins, act_fn="jumprelu", **usual)),
        ("crosscoder_topk", Crosscoder,
         CrosscoderConfig(hook_points=ins, act_fn="topk", top_k=K, **usual)),
        ("clt_relu", CrossLayerTranscoder, CLTConfig(
            hook_points_in=ins, hook_points_out=outs, act_fn="relu",
            sparsity_include_decoder_norm=False, norm_activation="inference", **usual)),
        ("clt_jumprelu", CrossLayerTranscoder, CLTConfig(
            hook_points_in=ins, hook_points_out=outs, act_fn="jumprelu", **usual)),
        ("clt_topk", CrossLayerTranscoder, CLTConfig(
            hook_points_in=ins, hook_points_out=outs, act_fn="topk", top_k=K, **usual)),
    ):  # fmt: skip
        sae = kind(config)
        randomise(sae, random)
        points = [*ins, *([] if name.startswith("cross") else outs)]
        sae.set_dataset_average_activation_norm({p: 3.0 + i for i, p in enumerate(points)})
        folder = out / f"llamascopium_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        sae.save_pretrained(folder)
        config.save_hyperparameters(folder)
        wide = torch.randn(N_ROWS, SITES * D_IN, generator=random)
        layers = dict(zip(ins, wide.split(D_IN, dim=1), strict=True))
        targets = dict.fromkeys(outs, wide[:, :D_IN])
        with torch.no_grad():
            batch, scales = sae.normalize_activations({**layers, **targets},
                                                      return_scale_factor=True)  # fmt: skip
            code = sae.encode(torch.stack([batch[point] for point in ins], dim=1))
            out_of = [scales[p] for p in (ins if name.startswith("cross") else outs)]
            options = {} if name.startswith("cross") else {"batch_first": True}
            decoded = sae.decode(code, **options)
            decoded = (decoded / torch.stack(out_of)[:, None]).flatten(1)
        # A crosscoder's codes differ between sites only by what is closed there.
        code = code.amax(dim=1) if name.startswith("cross") else code.flatten(1)
        found[folder.name] = {"x": wide, "code": code, "decoded": decoded, "output": decoded}
    return found


def temporal(out: Path, random: torch.Generator) -> dict[str, Numbers]:
    """SAELens' temporal dictionaries, which read windows of tokens, and one as it is published."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class("temporal")
    sizes = {"d_in": D_IN, "d_sae": N_LATENTS, "n_heads": 2, "bottleneck_factor": 4}
    found: dict[str, Numbers] = {}
    for name, settings in (
        ("topk", {"kval_topk": K, "normalize_activations": "constant_scalar_rescale",
                  "activation_normalization_factor": 0.2}),
        ("relu", {"sae_diff_type": "relu", "tied_weights": False, "n_attn_layers": 2,
                  "apply_b_dec_to_input": False}),
    ):  # fmt: skip
        sae = kind(config(**sizes, **settings))
        randomise(sae, random)
        x = torch.randn(2, 10, D_IN, generator=random) * 4
        folder = out / f"temporal_{name}"
        sae.save_model(folder)
        found[folder.name] = {"x": x, **answers(SAE.load_from_disk(folder), x)}
    state = {key: t.detach().clone() for key, t in sae.state_dict().items()}
    names: dict[str, str] = {"W_dec": "D", "b_dec": "b", "W_enc": "E"}
    published = out / "temporal_published"
    folder = published / "layer_12"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({str(names.get(key, key)): t for key, t in state.items()},
              folder / "latest_ckpt.safetensors")  # fmt: skip
    own = {"exp_factor": N_LATENTS / D_IN, "n_heads": 2, "n_attn_layers": 2, "bottleneck_factor": 4,
           "sae_diff_type": "relu", "kval_topk": "null", "tied_weights": "false",
           "scaling_factor": 0.25}  # fmt: skip
    lines = ["llm:", "  n_heads: 99", f"  dimin: {D_IN}", "sae:"]
    lines += [f"  {key}: {value}" for key, value in own.items()]
    (folder / "conf.yaml").write_text("\n".join([*lines, "data:", "  dtype: float32", ""]))
    from sae_lens.loading import pretrained_sae_loaders as loaders

    loaders.hf_hub_download = lambda filename="", **options: str(published / filename)
    settings, state, _ = loaders.temporal_sae_huggingface_loader("", "layer_12")
    sae = kind(config.from_dict(settings))
    sae.load_state_dict(state)
    found["temporal_published"] = {"x": x, **answers(sae, x)}
    return found


def overcomplete(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Overcomplete's classes, in evaluation."""
    from overcomplete.sae import QSAE, SAE, BatchTopKSAE, JumpSAE, MpSAE, TopKSAE

    found: dict[str, Numbers] = {}
    for name, kind, settings in (
        ("sae", SAE, {}),
        ("topk", TopKSAE, {"top_k": K}),
        ("normed", TopKSAE, {"top_k": K, "encoder_module": "mlp_bn_1"}),
        ("batchtopk", BatchTopKSAE, {"top_k": K}),
        ("jump", JumpSAE, {}),
        ("pursuit", MpSAE, {"k": K}),
        ("levels", QSAE, {"q": 4}),
    ):
        sae = kind(D_IN, N_LATENTS, **settings)
        randomise(sae, random)
        for key, buffer in sae.named_buffers():
            if key.endswith("running_var"):
                buffer.abs_().add_(0.1)
            if key.endswith("multiplier"):
                buffer.fill_(0.3)
        if name == "batchtopk":
            sae.running_threshold = torch.tensor(0.4)
        sae.eval()
        folder = out / f"overcomplete_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(sae.state_dict(), folder / "sae.pt")
        with torch.no_grad():
            code = sae.encode(x)[1]
            decoded = sae.decode(code)
        found[folder.name] = {"code": code, "decoded": decoded, "output": decoded}
    return found


def saev(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """The dictionaries of saev 0.1, and of its later header by the formula."""
    from saev.config import SparseAutoencoder as Config
    from saev.nn import SparseAutoencoder, dump

    own = SparseAutoencoder(Config(d_vit=D_IN, exp_factor=N_LATENTS // D_IN))
    randomise(own, random)
    dump(str(out / "saev_relu" / "sae.pt"), own)
    with torch.no_grad():
        decoded, code, _ = own(x)
    found = {"saev_relu": {"code": code, "decoded": decoded, "output": decoded}}
    state = own.state_dict()
    header = {
        "schema": 2, "lib": "0.2.0", "commit": "unknown",
        "cfg": {"d_vit": D_IN, "exp_factor": N_LATENTS // D_IN,
                "activation": {"cls": "TopK", "params": {"top_k": K}}},
    }  # fmt: skip
    (out / "saev_topk").mkdir(parents=True, exist_ok=True)
    with open(out / "saev_topk" / "sae.pt", "wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        torch.save(state, file)
    pre = x @ state["W_enc"] + state["b_enc"]
    top = pre.topk(K, dim=1)
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    decoded = code @ state["W_dec"] + state["b_dec"]
    found["saev_topk"] = {"code": code, "decoded": decoded, "output": decoded}
    return found


def by_formula(out: Path, x: torch.Tensor, random: torch.Generator) -> dict[str, Numbers]:
    """Layouts whose library is on no index of packages."""
    found: dict[str, Numbers] = {}
    for kind in ("relu", "topk"):
        state: dict[str, Any] = {
            "pre_bias": drawn(random, D_IN), "latent_bias": drawn(random, N_LATENTS),
            "encoder.weight": drawn(random, N_LATENTS, D_IN),
            "decoder.weight": drawn(random, D_IN, N_LATENTS),
            "stats_last_nonzero": torch.zeros(N_LATENTS, dtype=torch.long),
        }  # fmt: skip
        rows, mean, deviation = x, 0.0, 1.0
        if kind == "topk":
            mean = x.mean(dim=1, keepdim=True)
            deviation = (x - mean).std(dim=1, keepdim=True)
            rows = (x - mean) / (deviation + 1e-5)
        pre = (rows - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
        code = pre.relu()
        if kind == "topk":
            top = pre.topk(K, dim=1)
            code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        decoded = (code @ state["decoder.weight"].T + state["pre_bias"]) * deviation + mean
        state["activation"] = {"relu": "ReLU", "topk": "TopK"}[kind]
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"} if kind == "topk" else {}
        (out / f"openai_{kind}").mkdir(parents=True, exist_ok=True)
        torch.save(state, out / f"openai_{kind}" / "autoencoder.pt")
        found[f"openai_{kind}"] = {"code": code, "decoded": decoded, "output": decoded}

    usual = {
        "W_enc": drawn(random, D_IN, N_LATENTS), "b_enc": drawn(random, N_LATENTS),
        "W_dec": drawn(random, N_LATENTS, D_IN), "b_dec": drawn(random, D_IN),
    }  # fmt: skip
    settings = {"architecture": "standard", "activation_fn_str": "topk", "d_in": D_IN,
                "activation_fn_kwargs": {"k": K}, "normalize_activations": "layer_norm",
                "hook_point": "blocks.3.hook_mlp_out", "model_name": "a-clip"}  # fmt: skip
    (out / "prisma_topk").mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": usual}, out / "prisma_topk" / "weights.pt")
    (out / "prisma_topk" / "config.json").write_text(json.dumps(settings))
    mean, deviation = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
    pre = ((x - mean) / (deviation + 1e-5) - usual["b_dec"]) @ usual["W_enc"] + usual["b_enc"]
    top = pre.topk(K, dim=1)
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    decoded = (code @ usual["W_dec"] + usual["b_dec"]) * deviation + mean
    found["prisma_topk"] = {"code": code, "decoded": decoded, "output": decoded}

    for kind in ("relu", "batchtopk"):
        wide = torch.randn(N_ROWS, SITES * D_IN, generator=random)
        state = {
            "encoder.weight": drawn(random, SITES, D_IN, N_LATENTS),
            "encoder.bias": drawn(random, N_LATENTS),
            "decoder.weight": drawn(random, SITES, N_LATENTS, D_IN),
            "decoder.bias": drawn(random, SITES, D_IN),
            "code_normalization_id": torch.tensor(1),
        }
        rows = wide.unflatten(1, (SITES, D_IN))
        code = (torch.einsum("bld,ldf->bf", rows, state["encoder.weight"])
                + state["encoder.bias"]).relu()  # fmt: skip
        folder = out / f"crosscoder_learning_{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "batchtopk":
            length = state["decoder.weight"].norm(dim=2).sum(dim=0)
            state |= {"k": torch.tensor(K), "threshold": torch.tensor(6.0)}
            code = code * (code * length > state["threshold"])
            save_file(state, folder / "model.safetensors")
            config = {"activation_dim": D_IN, "dict_size": N_LATENTS, "num_layers": SITES, "k": K}
            (folder / "config.json").write_text(json.dumps(config))
        else:
            torch.save(state, folder / "ae.pt")
        decoded = torch.einsum("bf,lfd->bld", code, state["decoder.weight"])
        decoded = (decoded + state["decoder.bias"]).flatten(1)
        found[folder.name] = {"x": wide, "code": code, "decoded": decoded, "output": decoded}
    return found


def main(out: Path, seed: int) -> None:
    """Write everything."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    random = torch.Generator().manual_seed(seed + 100)
    x = torch.randn(N_ROWS, D_IN, generator=random)
    found = {
        **circuit_tracer(out, x, random),
        **gemma_several(out, random),
        **through_saelens(out, x, random),
        **matching_pursuit(out, x, random),
        **llamascopium(out, x, random),
        **overcomplete(out, x, random),
        **saev(out, x, random),
        **by_formula(out, x, random),
        **llamascopium_sites(out, random),
        **temporal(out, random),
    }
    tensors = {f"{name}/{key}": t for name, own in found.items() for key, t in own.items()}
    kept = {key: tensor.detach().float().contiguous().clone() for key, tensor in tensors.items()}
    save_file({"x": x, **kept}, out / "published.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.out, options.seed)
