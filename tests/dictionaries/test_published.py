"""Layouts of circuit-tracer, OpenMOSS, Overcomplete, saev and other publishers.

The folders were written by the libraries or through SAELens' loaders
(`tools/write_golden_published.py`).
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from mechatlas import tensorfiles
from mechatlas.analysis.matching.pairing import match
from mechatlas.base import InputError, WeightsError
from mechatlas.dictionaries.foreign import weights
from mechatlas.dictionaries.formats import WRITERS, load, save
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.pretrained import CrossLayerDictionary, Pretrained
from mechatlas.dictionaries.sparsity import ReLU
from tests.conformance import CHECKS
from tests.dictionaries.golden import (
    GIVEN,
    GOLDEN,
    PUBLISHED,
    SITES,
    X,
    expected,
    read_published,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_codes_and_reconstructions_are_those_of_the_library(name):
    dictionary = read_published(name)
    found = expected(name)
    code = dictionary.encode(found["x"])
    for ours, key in (
        (code, "code"),
        (dictionary.decode(code), "decoded"),
        (dictionary(found["x"]), "output"),
    ):
        torch.testing.assert_close(ours, found[key], rtol=1e-5, atol=1e-5)
    assert 0 < (code != 0).float().mean() < 1, "a code of all or nothing would show nothing"
    assert dictionary.W_enc.shape == (dictionary.d_in, dictionary.n_latents)
    assert dictionary.W_dec.shape == (dictionary.n_latents, dictionary.d_out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_conformance(name):
    dictionary = read_published(name)
    for check in CHECKS:
        check(dictionary)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_of_ours_holds_the_same_dictionary(name, tmp_path):
    dictionary, found = read_published(name), expected(name)
    again = load(save(dictionary, tmp_path))
    torch.testing.assert_close(again.encode(found["x"]), found["code"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again(found["x"]), found["output"], rtol=1e-5, atol=1e-5)
    assert (again.sites, again.site) == (dictionary.sites, dictionary.site)


@pytest.mark.parametrize("name", SITES)
def test_each_site_is_decoded_alone(name):
    dictionary, found = read_published(name), expected(name)
    code = dictionary.encode(found["x"])
    assert len(dictionary.sites) == 3
    for site, span in dictionary.spans.items():
        ours = dictionary.decode_site(code, site)
        torch.testing.assert_close(ours, found["decoded"][:, span], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="does not write 'head'; it writes"):
        dictionary.decode_site(code, "head")
    # The usual parts describe the same dictionary, but for the rule.
    pre = found["x"] @ dictionary.W_enc + dictionary.b_enc
    assert torch.allclose(pre[code != 0], code[code != 0], atol=1e-5)
    if isinstance(dictionary, Pretrained) and dictionary.sparsity.by_site:
        opened = [
            dictionary.sparsity.at_site(code, dictionary.state, i) != 0
            for i in range(len(dictionary.sites))
        ]
        assert torch.equal(torch.stack(opened).any(dim=0), code != 0)
        assert any((each != (code != 0)).any() for each in opened), "a site closes some latent"
        return
    whole = code @ dictionary.W_dec + dictionary.b_dec
    torch.testing.assert_close(whole, found["decoded"], rtol=1e-5, atol=1e-5)


def test_a_dictionary_of_several_sites_is_matched_and_evaluated():
    for name in SITES:
        dictionary = read_published(name)
        assert (match(dictionary, dictionary).columns == np.arange(dictionary.n_latents)).all()
        x = torch.randn(200, dictionary.d_in)
        assert evaluate(dictionary, x, target=dictionary(x)).fvu < 1


@pytest.mark.parametrize("name", [name for name in SITES if "clt" in name])
def test_one_layer_of_a_cross_layer_transcoder_writes_itself_and_those_after_it(name):
    whole, found = read_published(name), expected(name)
    assert isinstance(whole, CrossLayerDictionary)
    parts = [load(GOLDEN / name, layer=i) for i in range(3)]
    assert [len(part.sites) for part in parts] == [3, 2, 1]
    total = torch.zeros_like(found["output"])
    for part, read in zip(parts, whole.reads.values(), strict=True):
        own = part(found["x"][:, read])
        total[:, -own.shape[1] :] += own
    torch.testing.assert_close(total, found["output"], rtol=1e-5, atol=1e-5)
    with pytest.raises(WeightsError, match="has no layer 3"):
        load(GOLDEN / name, layer=3)


def test_a_file_of_one_layer_is_that_layer():
    file = GOLDEN / "circuit_tracer_clt_relu" / "W_enc_1.safetensors"
    assert load(file).sites == load(file.parent, layer=1).sites
    file = GOLDEN / "gemma_scope_two_clt" / "params_layer_1.safetensors"
    assert torch.equal(load(file).W_dec, load(file.parent, layer=1).W_dec)


@pytest.mark.parametrize("name", [name for name in GIVEN if "gemma" not in name])
def test_what_the_files_lack_is_asked_for(name):
    with pytest.raises(WeightsError, match=r"does not say (which class|how many latents)"):
        load(GOLDEN / name)
    with pytest.raises(WeightsError, match="which needs no layer"):
        load(GOLDEN / name, layer=3, **GIVEN[name])


def test_a_transcoder_of_gemma_scope_is_known_by_its_folder(tmp_path):
    place = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3"
    shutil.copytree(GOLDEN / "gemma_scope_one", place)
    assert load(place).transcodes
    assert not load(GOLDEN / "gemma_scope_one").transcodes
    assert load(GOLDEN / "gemma_scope_one", transcodes=True).transcodes


def test_square_weights_of_no_stated_library_need_its_name(tmp_path):
    tensors = {
        "W_enc": torch.randn(8, 8), "b_enc": torch.zeros(8),
        "W_dec": torch.randn(8, 8), "b_dec": torch.zeros(8),
    }  # fmt: skip
    file = tmp_path / "layer_3.safetensors"
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(WeightsError, match="W_enc is square: name the format"):
        load(file)
    assert torch.equal(load(file, format="circuit-tracer").W_enc, tensors["W_enc"].T)
    qwen = load(file, format="Qwen Scope", k=3)
    assert torch.equal(qwen.W_dec, tensors["W_dec"].T)
    with pytest.raises(WeightsError, match="Tried: 'qwen' is none of SAELens, sparsify"):
        load(file, format="qwen")


def test_an_unknown_file_is_answered_with_its_tensors_and_the_layouts_tried(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"encoder.weight": torch.zeros(3, 2)}, file)
    said = r"it holds encoder.weight \(3, 2\)\. Tried: SAELens \(no cfg\.json beside it\)"
    with pytest.raises(WeightsError, match=said):
        load(file)


def test_shards_are_read_as_one_and_their_index_names_no_other_folder(tmp_path):
    name = "circuit_tracer_relu"
    tensors = safetensors.torch.load_file(GOLDEN / name / "layer_3.safetensors")
    places = {}
    for i, (key, tensor) in enumerate(tensors.items()):
        safetensors.torch.save_file({key: tensor}, tmp_path / f"model-{i}.safetensors")
        places[key] = f"model-{i}.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = expected(name)
    torch.testing.assert_close(load(tmp_path).encode(found["x"]), found["code"])
    for bad in ("../x.safetensors", "/etc/passwd", "..", 3, "a\\b.safetensors"):
        index.write_text(json.dumps({"weight_map": {**places, "W_enc": bad}}))
        with pytest.raises(WeightsError, match=r"index\.json: W_enc is in .*, not a file beside"):
            load(tmp_path)
    index.write_text(json.dumps({"weight_map": {**places, "W_enc": places["b_enc"]}}))
    with pytest.raises(WeightsError, match="promises W_enc in model-"):
        load(tmp_path)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="has no weight_map"):
        load(tmp_path)


def test_what_crosscoder_learning_publishes_on_the_hub_names_no_class(tmp_path):
    theirs = load(GOLDEN / "dictionary_learning_batchtopk")
    tensors = torch.load(GOLDEN / "dictionary_learning_batchtopk" / "ae.pt", weights_only=True)
    k = int(tensors.pop("k"))
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(whole, tmp_path / "model.safetensors")
    sizes = {"activation_dim": theirs.d_in, "dict_size": theirs.n_latents, "k": k}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    found = load(tmp_path)
    assert isinstance(found, Pretrained)
    torch.testing.assert_close(found(X), theirs(X))  # of weights that lie elsewhere in memory
    assert found.file_format == "dictionary_learning BatchTopKSAE"
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "dict_size": 7}))
    with pytest.raises(WeightsError, match="encoder"):
        load(tmp_path)


def test_a_large_file_stays_on_disk_in_its_own_number_format(monkeypatch, tmp_path):
    tensors = safetensors.torch.load_file(GOLDEN / "circuit_tracer_skip" / "layer_3.safetensors")
    half = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    # A name of odd length makes the header end where no number begins.
    safetensors.torch.save_file(half, tmp_path / "layer_3.safetensors", {"a": "bcd"})
    wide = load(tmp_path)
    for module in (tensorfiles, weights):
        monkeypatch.setattr(module, "MAP_FROM", 100)
    monkeypatch.setattr("mechatlas.dictionaries.pretrained.BLOCK", 7)
    mapped = load(tmp_path)
    assert mapped.W_dec.dtype == torch.bfloat16
    x = expected("circuit_tracer_skip")["x"]
    torch.testing.assert_close(mapped.encode(x), wide.encode(x))
    torch.testing.assert_close(mapped(x), wide(x))
    again = load(tmp_path, dtype=torch.float32)
    assert torch.equal(again.W_dec, wide.W_dec)
    assert load(tmp_path, dtype=torch.float64, device="cpu").W_dec.dtype == torch.float64
    qwen = load(GOLDEN / "qwen_scope", k=4)
    found = expected("qwen_scope")
    torch.testing.assert_close(qwen.encode(found["x"]), found["code"])


UNSET = ("llamascopium_clt_relu", "llamascopium_unweighted", "llamascopium_tokens")
"""Dictionaries whose library leaves mean lengths of activations as they were in memory."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_that_are_cut_or_hold_no_numbers_are_refused_by_name(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix != ".yaml"]
    for file in files:
        whole = file.read_bytes()
        for cut in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:cut])
            with pytest.raises(WeightsError, match=file.name.split(".")[0]):
                load(folder, **GIVEN.get(name, {}))
        file.write_bytes(whole)
        if file.suffix != ".safetensors":
            continue
        tensors = safetensors.torch.load_file(file)
        for i, (key, tensor) in enumerate(tensors.items()):
            unset = name in UNSET and key.startswith("dataset_average")
            if unset or not tensor.is_floating_point():
                continue
            for changed in (torch.full_like(tensor, torch.nan), tensor.to(torch.int32))[: 2 - i]:
                safetensors.torch.save_file({**tensors, key: changed}, file)
                with pytest.raises(WeightsError, match=key.replace(".", r"\.")):
                    load(folder, **GIVEN.get(name, {}))
        file.write_bytes(whole)
    assert load(folder, **GIVEN.get(name, {})).n_latents == read_published(name).n_latents


class Trap:
    def __reduce__(self):
        return (print, ("code of a file was run",))


@pytest.mark.parametrize("name", ["qwen_scope", "openai_topk", "saev_relu", "overcomplete_sae"])
def test_no_layout_runs_code(name, tmp_path, capsys):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    (file,) = folder.glob("*.pt*")
    line = file.read_bytes().partition(b"\n")[0] + b"\n" if name == "saev_relu" else b""
    with open(file, "wb") as opened:
        opened.write(line)
        torch.save({"W_enc": Trap()}, opened)
    with pytest.raises(WeightsError, match=rf"{file.name} cannot be read"):
        load(folder, **GIVEN.get(name, {}))
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llamascopium_relu", {"sae_type": "lorsa"}, "sae_type is 'lorsa', expected one of sae"),
        ("llamascopium_clt_topk", {"act_fn": "layertopk"}, "act_fn is 'layertopk', expected one"),
        ("llamascopium_clt_relu", {"hook_points_out": ["a"]}, "expected as many as the 3 hook"),
        ("llamascopium_clt_relu", {"hook_points_in": ["a"] * 3}, "a list of sites, each once"),
        ("llamascopium_crosscoder_relu", {"hook_points": ["a", "b"]}, r"W_E has shape \(3, 8, 24"),
        ("llamascopium_crosscoder_relu", {"hook_points": 3}, "hook_points is 3, expected a list"),
        ("llamascopium_relu", {"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'"),
        ("llamascopium_relu", {"act_fn": "tanh"}, "act_fn is 'tanh', expected one of relu"),
        ("llamascopium_relu", {"act_fn": "batchtopk"}, r"no threshold: give one, as in load\("),
        ("llamascopium_relu", {"use_glu_encoder": True}, "use_glu_encoder is True"),
        ("llamascopium_relu", {"d_model": 9}, r"W_E has shape \(8, 24\), expected \(d_in 9"),
        ("llama_scope", {"jump_relu_threshold": "x"}, "jump_relu_threshold is 'x', expected a"),
        (
            "llama_scope",
            {"dataset_average_activation_norm": {"in": 0, "out": 1}},
            r"mean length of activations at blocks.* is 0, expected a number above 0",
        ),
        ("prisma_topk", {"architecture": "crate"}, "architecture is 'crate'"),
        ("crosscoder_learning_batchtopk", {"code_normalization": "MIXED"}, "is MIXED, expected"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_file_and_key(name, changes, said, tmp_path):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    (file,) = folder.glob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(WeightsError, match=said):
        load(folder, **GIVEN.get(name, {}))


def test_a_mean_length_that_no_file_has_gives_a_warning():
    with pytest.warns(UserWarning, match=r"has no mean length of activations"):
        load(GOLDEN / "llama_scope_r1")


HELD = {
    *(
        (f"circuit_tracer_{kind}", "circuit-tracer")
        for kind in ("relu", "skip", "jump", "clt_relu")
    ),
    *((f"circuit_tracer_{kind}", "saelens") for kind in ("relu", "skip", "jump")),
    *((name, "saelens") for name in ("llama_scope", "qwen_scope", "saelens6_pursuit_whole")),
    *((name, "dictionary_learning") for name in ("deepseek", "connor_rob", "llama_scope")),
    *((name, "sparsify") for name in ("qwen_scope", "overcomplete_topk")),
}
"""Dictionaries that a library must be able to hold."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_for_a_library_is_the_same_dictionary(name, tmp_path):
    dictionary, found = read_published(name), expected(name)
    for form in WRITERS:
        folder = tmp_path / form
        try:
            save(dictionary, folder, format=form)
        except WeightsError:
            assert not folder.exists()
            assert (name, form) not in HELD
            continue
        again = load(folder)
        torch.testing.assert_close(again.encode(found["x"]), found["code"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(found["x"]), found["output"], rtol=1e-5, atol=1e-5)


def test_heads_survive_the_way_through_saelens(tmp_path):
    save(read_published("connor_rob"), tmp_path / "one", format="saelens")
    again = load(tmp_path / "one")
    save(again, tmp_path / "two", format="saelens")
    for folder in ("one", "two"):
        config = json.loads((tmp_path / folder / "cfg.json").read_text())
        assert config["reshape_activations"] == "hook_z"
        assert config["metadata"]["hook_name"] == "blocks.3.attn.hook_z"
        assert config["metadata"]["model_name"] == "gpt2-small"


def test_a_rule_of_the_caller_replaces_what_the_state_does_not_say():
    dictionary = load(GOLDEN / "overcomplete_topk", sparsity=ReLU())
    code = dictionary.encode(expected("overcomplete_topk")["x"])
    assert ((code != 0).sum(dim=1) > 4).any()
