"""`mechatlas export --format neuronpedia`, against what the network itself gives."""

import json

import numpy as np
import pytest
import torch

from mechatlas.activations.store import Store
from mechatlas.app.cli import main
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.sparsity import TopK

pytest.importorskip("transformers")

from tests.language_models import byte_tokenizer, model

RECIPE = """
sites = ["model.layers.0", "model.layers.0.mlp.act_fn"]
out = "store"
[network]
name = "transformer"
arguments = { path = "llama", dtype = "float32" }
[samples]
type = "Texts"
source = "texts.jsonl"
context = 12
packing = "packed"
[storage]
dtype = "float32"
[storage.positions]
rule = "all"
"""
SITE = "model.layers.0"


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neuronpedia")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make(folder)
    return folder


def make(folder):
    """Store of a small model's texts, and a dictionary of one of its sites."""
    model("llama").save_pretrained("llama")
    byte_tokenizer(first="<s>").save_pretrained("llama")
    rows = [{"text": f"Text {i} of {i * i} words. "} for i in range(30)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "collect.toml").write_text(RECIPE)
    main(["collect", "collect.toml"])
    rows = Store("store").rows(SITE)
    sae = Autoencoder(d_in=16, n_latents=12, sparsity=TopK(k=2))
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 12)[:, None])  # lengths that must be taken out
        sae.W_enc.copy_(sae.W_dec.T / rows.held_out(50).x.std())
    save(sae, "sae")


def codes():
    """Codes of all rows that the store keeps, in units of atoms of length 1, and their places."""
    sae, store = load("sae"), Store("store")
    batches = [(b.x, where) for b, where in store.rows(SITE).scan()]
    x, where = torch.cat([b for b, _ in batches]), torch.cat([w for _, w in batches])
    return sae.encode(x) * sae.W_dec.norm(dim=1), where


def test_features_are_what_the_network_and_the_dictionary_give(here, capsys):
    words = ["export", "sae", "--format", "neuronpedia", "--store", "store", "--site", SITE]
    main([*words, "--model-name", "tiny-llama", "--out", "out"])
    assert "for neuronpedia is in out: batch-0.json" in capsys.readouterr().out
    batch = json.loads((here / "out" / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny-llama", 0, "sae")
    code, where = codes()
    code = code.detach().numpy()
    network, sae = model("llama"), load("sae")
    atoms = (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).detach()
    effects = (atoms * network.model.norm.weight) @ network.lm_head.weight.T
    shown, tokenizer = 0, byte_tokenizer()
    for i, feature in enumerate(batch["features"]):
        own = code[:, i]
        assert feature["feature_index"] == i
        assert feature["frac_nonzero"] == pytest.approx((own > 0).mean())
        assert feature["n_tokens_in_prompt"] == 12
        assert feature["dataset"] == "texts.jsonl"
        top = effects[i].topk(10)
        assert feature["pos_values"] == pytest.approx(top.values.tolist(), abs=6e-4)
        words = [tokenizer.decode(token) for token in top.indices]
        pairs = zip(words, feature["pos_str"], strict=True)
        assert all("\ufffd" in word or word == written for word, written in pairs)
        bottom = effects[i].topk(10, largest=False).values.tolist()
        assert feature["neg_values"] == pytest.approx(bottom, abs=6e-4)
        assert sum(feature["logits_hist_data_bar_heights"]) == 258
        align = feature["neuron_alignment_indices"]
        assert align == atoms[i].topk(3).indices.tolist()
        if not (own > 0).any():
            assert feature["activations"] == feature["freq_hist_data_bar_heights"] == []
            continue
        counts = np.histogram(own[own > 0], bins=50, range=(0, own.max()))[0]
        # A value on an edge may fall on either side of it.
        heights = np.array(feature["freq_hist_data_bar_heights"])
        assert np.abs(heights.cumsum() - counts.cumsum()).max() <= 1
        assert heights.sum() == (own > 0).sum()
        tops = [each for each in feature["activations"] if each["bin_contains"] == -1]
        found = [each["values"][each["qualifying_token_index"]] for each in tops]
        assert found == sorted(found, reverse=True)
        assert found[0] == pytest.approx(own.max(), abs=2e-3)
        for each in feature["activations"]:
            assert len(each["tokens"]) == len(each["values"]) == 12
            value = each["values"][each["qualifying_token_index"]]
            assert each["bin_min"] - 1e-3 <= value <= each["bin_max"] + 1e-3
            if each["bin_contains"] != -1:
                inside = (own > each["bin_min"]) & (own <= each["bin_max"] + 1e-6)
                assert each["bin_contains"] == pytest.approx(inside.mean(), abs=1.5 / len(own))
            shown += 1
        sample, token = where[own.argmax(), 0], where[own.argmax(), 1]
        assert tops[0]["qualifying_token_index"] == token
        assert sample >= 0
    assert shown > 100


def test_some_features_are_written_and_what_does_not_fit_is_refused(here, capsys):
    words = ["export", "sae", "--format", "neuronpedia", "--store", "store"]
    main([*words, "--site", SITE, "--latents", "7", "3", "--out", "some", "--json"])
    assert json.loads(capsys.readouterr().out)["files"] == ["batch-0.json"]
    batch = json.loads((here / "some" / "batch-0.json").read_text())
    assert [feature["feature_index"] for feature in batch["features"]] == [7, 3]
    for more, said in (
        ([], "name one with --site"),
        (["--site", SITE, "--latents", "12"], "There is no latent 12; the dictionary has 0 to 11"),
        (["--site", f"{SITE}.mlp.act_fn"], "24 wide, the dictionary reads 16"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*words, *more, "--out", "refused"])
        assert exit_.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "sae", "--format", "saelens", "--latents", "3", "--out", "refused"])
    assert "neuronpedia alone" in capsys.readouterr().err
