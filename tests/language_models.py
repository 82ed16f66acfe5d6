"""Tiny language models with random weights, and a tokenizer of one token a byte."""

from typing import Any

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
