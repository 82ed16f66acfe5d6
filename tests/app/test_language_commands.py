"""Commands on a language model: sites in both spellings, texts from rows, clear refusals."""

import json
import sys

import pytest

from mechatlas.activations.store import Store
from mechatlas.app.cli import main

pytest.importorskip("transformers")

from tests.language_models import byte_tokenizer, model, write_gguf

RECIPE = """
sites = ["blocks.*.hook_resid_post", "blocks.0.attn.hook_z/head1"]
out = "store"
[network]
name = "transformer"
arguments = { path = "llama", dtype = "float32" }
[samples]
type = "Texts"
source = "texts.jsonl"
context = 16
packing = "document"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model("llama").save_pretrained("llama")
    byte_tokenizer(first="<s>").save_pretrained("llama")
    rows = [{"text": f"Text {i} of some words. " * (1 + i % 3)} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "collect.toml").write_text(RECIPE)
    return tmp_path


def refused(words, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("mechatlas: ")
    return said[-1]


def test_sites_are_listed_in_both_spellings_with_heads_and_inputs(here, capsys):
    main(["sites", "llama", "--json"])
    entries = {e["site"]: e for e in json.loads(capsys.readouterr().out)["sites"]}
    z = entries["model.layers.1.self_attn.o_proj:input"]
    assert z["lens"] == ["blocks.1.attn.hook_z"]
    assert (z["kind"], z["shape"], z["width"]) == ("input of Linear", [8, 16], 16)
    assert z["branches"] == {f"head{i}": [4 * i, 4 * i + 4] for i in range(4)}
    assert entries["model.layers.0:input"]["lens"] == ["blocks.0.hook_resid_pre"]
    assert entries["model.layers.0"]["lens"] == ["blocks.0.hook_resid_post"]
    assert not entries["model.layers.0.mlp"]["hidden"]
    assert entries["model.layers.0.input_layernorm"]["hidden"]
    main(["sites", "llama"])
    words = capsys.readouterr().out
    assert "in TransformerLens" in words
    assert "blocks.0.hook_resid_mid" in words
    main(["sites", "inception_mini"])
    assert "TransformerLens" not in capsys.readouterr().out


def test_a_network_in_half_precision_has_circuits(here):
    recipe = RECIPE.replace('"float32"', '"bfloat16"').replace('"llama"', '"whole.gguf"')
    recipe = recipe.replace(', "blocks.0.attn.hook_z/head1"', "")
    write_gguf(here / "whole.gguf")
    (here / "half.toml").write_text(f"{recipe}\n[storage]\nheld_out = 0.3\n")
    main(["collect", "half.toml"])
    for layer in ("0", "1"):
        (here / f"{layer}.toml").write_text(
            f'store = "store"\nsite = "model.layers.{layer}"\nout = "{layer}"\n'
            "n_latents = 32\nsteps = 60\nbatch_size = 64\n"
        )
        main(["train", f"{layer}.toml"])
    main(["circuit", "0", "1", "--out", "circuit", "--n-ablated", "12", "--features", "2"])
    (pair,) = json.loads((here / "circuit" / "result.json").read_text())["pairs"]
    assert pair["agreement"]["spearman"] > 0.8
    assert pair["agreement"]["low"] > pair["agreement"]["null_high"]


def test_a_store_is_collected_by_the_names_of_transformer_lens(here):
    main(["collect", "collect.toml"])
    store = Store(here / "store")
    assert store.sites == [
        "model.layers.0",
        "model.layers.1",
        "model.layers.0.self_attn.o_proj:input/head1",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sites", "blocks.0.hook_resid_pst"], "Did you mean 'blocks.0.hook_resid_post'"),
        (["--samples.context", "99"], "reads at most 48 tokens at once, got a context of 99"),
        (["--samples.column", "body"], "has no column 'body'; it has text"),
        (["--samples.source", "llama/config.json"], "holds a dict, expected a list of rows"),
        (["--samples.source", "half.gguf"], "ends in '.gguf', expected one of"),
        (["--network.arguments", "{path: half.gguf}"], "half.gguf cannot be loaded"),
    ],
)
def test_mistakes_are_told_in_one_sentence(here, capsys, words, message):
    write_gguf(here / "whole.gguf")
    data = (here / "whole.gguf").read_bytes()
    (here / "half.gguf").write_bytes(data[: len(data) // 2])
    if words[0] == "--network.arguments":
        recipe = RECIPE.replace('path = "llama"', 'path = "half.gguf"')
        (here / "collect.toml").write_text(recipe)
        words = []
    assert message in refused(["collect", "collect.toml", *words], capsys)


def test_a_missing_extra_is_named_with_its_cure(here, capsys, monkeypatch):
    write_gguf(here / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'mechatlas[text]'" in refused(["sites", "tiny.gguf"], capsys)
