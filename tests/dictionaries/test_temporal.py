"""Temporal dictionaries, against SAELens' own numbers."""

import json
import shutil

import pytest
import torch

from mechatlas.analysis.matching.pairing import match
from mechatlas.base import InputError, WeightsError
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.temporal import TemporalDictionary
from tests.dictionaries.golden import GOLDEN, TEMPORAL, expected, read_temporal


@pytest.mark.parametrize("name", TEMPORAL)
def test_codes_and_reconstructions_are_those_of_saelens(name, tmp_path):
    dictionary, found = read_temporal(name), expected(name)
    again = load(save(dictionary, tmp_path))
    assert isinstance(again, TemporalDictionary)
    for each in (dictionary, again):
        code = each.encode(found["x"])
        for ours, key in (
            (code, "code"), (each.decode(code), "decoded"), (each(found["x"]), "output"),
        ):  # fmt: skip
            torch.testing.assert_close(ours, found[key], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            each.decode(code + each.predict(found["x"])), found["output"], rtol=1e-5, atol=1e-5
        )
    assert 0 < (code != 0).float().mean() < 1
    assert again.site == dictionary.site
    assert (code[:, 0] != 0).any(), "the first token has nothing before it"


def test_a_code_depends_on_the_tokens_before_it_and_on_no_later_ones():
    dictionary, x = read_temporal("temporal_relu"), expected("temporal_relu")["x"]
    whole = dictionary.encode(x)
    torch.testing.assert_close(dictionary.encode(x[:, :6]), whole[:, :6])
    assert not torch.allclose(dictionary.encode(x[:, 5:]), whole[:, 5:])


def test_shuffled_rows_are_refused_and_atoms_are_matched():
    dictionary = read_temporal("temporal_topk")
    rows = torch.randn(20, 8)
    for use in (dictionary.encode, dictionary, lambda x: evaluate(dictionary, x)):
        with pytest.raises(InputError, match=r"reads windows of consecutive tokens .* \(20, 8\)"):
            use(rows)
    assert match(dictionary, dictionary).cost < 1e-6
    with pytest.raises(WeightsError, match="TemporalDictionary cannot be written for SAELens"):
        save(dictionary, "nowhere", format="saelens")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bottleneck_factor": 5}, "bottleneck_factor is 5, expected one that divides"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"kval_topk": 99}, "kval_topk is 99, expected at most the number of latents, 24"),
        ({"activation_normalization_factor": 0}, "factor is 0, expected a number above 0"),
        ({"n_attn_layers": 2}, r"missing attn_layers\.1\.k_ctx\.weight"),
        ({"d_in": 9}, r"W_dec has shape \(24, 8\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(changes, said, tmp_path):
    shutil.copytree(GOLDEN / "temporal_topk", tmp_path / "t")
    file = tmp_path / "t" / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(WeightsError, match=said):
        load(tmp_path / "t")


def test_the_settings_of_a_published_one_are_those_of_its_section(tmp_path):
    shutil.copytree(GOLDEN / "temporal_published" / "layer_12", tmp_path / "layer_7")
    file = tmp_path / "layer_7" / "conf.yaml"
    dictionary = load(tmp_path / "layer_7")
    assert (dictionary.site, dictionary.n_heads) == ("blocks.7.hook_resid_post", 2)
    file.write_text(file.read_text().replace("dimin: 8", "dimin: eight"))
    with pytest.raises(WeightsError, match=r"conf\.yaml: d_in is 'eight'"):
        load(tmp_path / "layer_7")
    file.write_text("sae: [")
    with pytest.raises(WeightsError, match=r"conf\.yaml: d_in is missing"):
        load(tmp_path / "layer_7")
