"""Files of other libraries are read as those libraries read them.

The folders under `tests/golden` and the numbers in them were written by the libraries themselves
(`tools/write_golden_dictionaries.py`).
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from mechatlas.base import InputError, WeightsError
from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.metrics import evaluate, fvu
from mechatlas.dictionaries.pretrained import Pretrained
from tests.conformance import CHECKS
from tests.dictionaries.golden import EXPECTED, GOLDEN, NAMES, UNSCALED, X, read, weights_of


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_reconstructions_are_those_of_the_library(name):
    for path in (GOLDEN / name, weights_of(GOLDEN / name)):
        dictionary = read(path)
        code = dictionary.encode(X)
        for found, key in (
            (code, "code"),
            (dictionary.decode(code), "decoded"),
            (dictionary(X), "output"),
        ):
            torch.testing.assert_close(found, EXPECTED[f"{name}/{key}"], rtol=1e-5, atol=1e-5)
    assert torch.equal(code != 0, EXPECTED[f"{name}/code"] != 0)
    assert 0 < (code != 0).float().mean() < 1, "a code of all or nothing would show nothing"
    d_in, n_latents, d_out = dictionary.d_in, dictionary.n_latents, dictionary.d_out
    assert dictionary.W_enc.shape == (d_in, n_latents)
    assert dictionary.W_dec.shape == (n_latents, d_out)
    assert (dictionary.b_enc.shape, dictionary.b_dec.shape) == ((n_latents,), (d_out,))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_conformance(name, check):
    check(read(GOLDEN / name))


def edited(tmp_path, name, **changes):
    """A copy of a golden folder with other values in its configuration; `None` deletes one."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    file = next(f for f in folder.iterdir() if f.suffix == ".json")
    config = json.loads(file.read_text())
    inner = config.get("trainer", config)
    inner |= changes
    for key in [key for key, value in changes.items() if value is None]:
        del inner[key]
    file.write_text(json.dumps(config))
    return folder


def test_a_mode_whose_numbers_are_not_in_the_file_gives_a_warning():
    for name in UNSCALED:
        with pytest.warns(UserWarning, match=r"cfg\.json: normalize_activations is .* bring them"):
            load(GOLDEN / name)


def test_b_dec_is_taken_from_the_input_by_default_but_never_by_transcoders(tmp_path):
    assert read(edited(tmp_path, "saelens6_standard", apply_b_dec_to_input=None)).subtracts_b_dec
    folder = edited(tmp_path, "saelens6_transcoder", apply_b_dec_to_input=None)
    assert not read(folder).subtracts_b_dec
    with pytest.raises(WeightsError, match=r"cfg\.json: apply_b_dec_to_input is True, expected f"):
        load(edited(tmp_path, "saelens6_transcoder", apply_b_dec_to_input=True))


def test_an_activation_function_is_heeded_in_old_files_alone(tmp_path):
    folder = edited(tmp_path, "saelens6_standard", activation_fn_str="topk")
    code = EXPECTED["saelens6_standard/code"]
    torch.testing.assert_close(read(folder).encode(X), code)  # as SAELens 6 does
    folder = edited(tmp_path, "saelens5_topk", activation_fn_str=None)
    assert (read(folder).encode(X) != 0).sum(dim=1).max() > 4


def test_an_old_scaling_factor_scales_what_is_decoded_and_not_the_code(tmp_path):
    folder = edited(tmp_path, "saelens2_standard", finetuning_scaling_factor=True)
    tensors = safetensors.torch.load_file(weights_of(folder))
    factor = torch.rand(24) + 0.5
    safetensors.torch.save_file({**tensors, "scaling_factor": factor}, weights_of(folder))
    dictionary = read(folder)
    code = EXPECTED["saelens2_standard/code"]
    torch.testing.assert_close(dictionary.encode(X), code)
    decoded = (code * factor) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(dictionary.decode(code), decoded)
    config = json.loads((folder / "cfg.json").read_text())
    config["finetuning_scaling_factor"] = False
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="scaling_factor is not 1 everywhere"):
        load(folder)


def test_the_threshold_of_topk_is_not_used_and_one_never_learnt_gives_a_warning(tmp_path):
    name = "dictionary_learning_topk"
    folder = edited(tmp_path, name)
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**tensors, "threshold": torch.tensor(1e6)}, folder / "ae.pt")
    torch.testing.assert_close(read(folder).encode(X), EXPECTED[f"{name}/code"])
    batch = edited(tmp_path, "dictionary_learning_batchtopk")
    tensors = torch.load(batch / "ae.pt", weights_only=True)
    torch.save({**tensors, "threshold": torch.tensor(-1.0)}, batch / "ae.pt")
    with pytest.warns(UserWarning, match=r"ae\.pt: threshold is -1: training ended before"):
        dictionary = load(batch)
    weights = tensors["encoder.weight"].T
    pre = (X - tensors["b_dec"]) @ weights + tensors["encoder.bias"]
    torch.testing.assert_close(dictionary.encode(X), pre.relu())


def test_the_norm_factor_of_dictionary_learning_is_already_in_the_biases(tmp_path):
    folder = edited(tmp_path, "dictionary_learning_batchtopk", norm_factor=37.0)
    code = EXPECTED["dictionary_learning_batchtopk/code"]
    torch.testing.assert_close(read(folder).encode(X), code)


def test_sparsify_atoms_are_read_the_right_way_round_even_when_square():
    tensors = safetensors.torch.load_file(GOLDEN / "sparsify_square" / "sae.safetensors")
    dictionary = read(GOLDEN / "sparsify_square")
    assert torch.equal(dictionary.W_dec, tensors["W_dec"])
    wrong = EXPECTED["sparsify_square/code"] @ tensors["W_dec"].T + tensors["b_dec"]
    assert (dictionary.decode(dictionary.encode(X)) - wrong).abs().max() > 0.1


def test_rows_with_units_of_their_own_are_never_decoded_without_them():
    dictionary = read(GOLDEN / "saelens6_standard_constant_norm")
    code = dictionary.encode(X)
    changed = code.clone()
    changed[:, 3] = 0
    with pytest.raises(InputError, match=r"give the rows too, decode\(code, x\)"):
        dictionary.decode(changed)
    length = X.norm(dim=1, keepdim=True) / 8**0.5
    direct = (changed @ dictionary.W_dec + dictionary.b_dec) * length
    torch.testing.assert_close(dictionary.decode(changed, X), direct)
    # Twice the row is the same code in twice the units.
    torch.testing.assert_close(dictionary.encode(2 * X), code)
    torch.testing.assert_close(dictionary(2 * X), 2 * dictionary(X))
    assert dictionary(torch.zeros(2, 8)).isfinite().all()
    assert evaluate(dictionary, X, batch_size=3).fvu == pytest.approx(float(fvu(X, dictionary(X))))


def test_half_precision_is_read_as_single_and_moves_with_its_dictionary():
    dictionary = read(GOLDEN / "saelens6_standard_bfloat16")
    assert dictionary.W_enc.dtype == torch.float32
    gated = read(GOLDEN / "saelens6_gated").to(torch.float64)
    code = gated.encode(X.double())
    assert code.dtype == torch.float64
    torch.testing.assert_close(code.float(), EXPECTED["saelens6_gated/code"])
    with pytest.raises(InputError, match="width 8, got 9"):
        gated.encode(torch.zeros(1, 9))


def test_a_file_under_another_name_is_known_by_its_keys(tmp_path):
    for name, new in (
        ("gemma_scope_one", "layer_3.npz"),
        ("gemma_scope_two", "resid_post_layer_3.safetensors"),
        ("saelens6_gated", "gated.safetensors"),
        ("sparsify_topk", "coder.safetensors"),
        ("dictionary_learning_gdm", "ae_500.pt"),
    ):
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder)
        weights_of(folder).rename(folder / new)
        torch.testing.assert_close(read(folder / new).encode(X), EXPECTED[f"{name}/code"])
    checkpoints = tmp_path / "dictionary_learning_gdm" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints.parent / "ae_500.pt").rename(checkpoints / "ae_500.pt")
    code = EXPECTED["dictionary_learning_gdm/code"]
    torch.testing.assert_close(read(checkpoints / "ae_500.pt").encode(X), code)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"not a dictionary of a known format; it holds weight"):
        load(tmp_path / "other.safetensors")


def test_a_folder_of_none_or_of_several_says_what_to_do(tmp_path):
    with pytest.raises(
        WeightsError, match=r"There is crosscoder_learning_batchtopk/model\.safet.*: give one"
    ):
        load(GOLDEN)
    shutil.copy(GOLDEN / "gemma_scope_one" / "params.npz", tmp_path)
    shutil.copy(GOLDEN / "gemma_scope_two" / "params.safetensors", tmp_path)
    with pytest.raises(WeightsError, match=r"several dictionaries \(params\.npz, params\.saf"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("saelens6_topk", {"architecture": "tpc"}, r"cfg\.json: architecture is 'tpc'"),
        ("saelens6_topk", {"k": 25}, r"cfg\.json: k is 25, expected at most .* 24"),
        ("saelens6_topk", {"k": None}, r"activation_fn_kwargs\.k is missing, expected a whole"),
        ("saelens6_topk", {"k": True}, r"k is True, expected a whole number"),
        ("saelens6_topk", {"d_in": 9}, r"W_enc has shape \(8, 24\), expected \(d_in 9, latent 24"),
        ("saelens6_topk", {"d_sae": "24"}, r"d_sae is '24', expected a whole number"),
        ("saelens6_topk", {"normalize_activations": "unit"}, "normalize_activations is 'unit'"),
        ("saelens6_topk", {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'"),
        ("saelens5_topk", {"activation_fn_str": "tanh-relu"}, "activation_fn_str is 'tanh-relu'"),
        ("saelens6_topk", {"metadata": []}, r"metadata is \[\], expected a JSON object"),
        ("dictionary_learning_topk", {"k": 5}, r"config\.json: trainer\.k is 5, expected 4"),
        ("dictionary_learning_topk", {"dict_class": "IdentityDict"}, "dict_class is 'IdentityDi"),
        ("dictionary_learning_topk", {"dict_class": None}, r"trainer\.dict_class is missing"),
        ("dictionary_learning_topk", {"dict_size": 12}, r"encoder\.weight has shape \(24, 8\)"),
        ("sparsify_topk", {"k": 99}, "k is 99, expected at most"),
        ("sparsify_topk", {"activation": "relu"}, "activation is 'relu', expected one of topk"),
        ("sparsify_topk", {"signed": True}, "signed is True, expected false"),
        ("sparsify_groupmax", {"k": 5}, "k is 5, expected a divisor"),
        ("sparsify_expansion", {"expansion_factor": 4}, r"expected \(latent 32, d_in 8\)"),
        ("gemma_scope_two", {"architecture": "topk"}, r"architecture is 'topk', expected one of"),
        ("gemma_scope_two", {"affine_connection": True}, r"params\.safe.* missing affine_"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_file_and_key(tmp_path, name, changes, said):
    with pytest.raises(WeightsError, match=said):
        load(edited(tmp_path, name, **changes))


def test_a_missing_or_broken_configuration_is_refused_by_name(tmp_path):
    for text in (None, "", "{", "[1]", "[" * 100_000, '{"a": \xff}'):
        folder = edited(tmp_path, "saelens6_topk")
        if text is None:
            (folder / "cfg.json").unlink()
        else:
            (folder / "cfg.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(WeightsError, match=r"cfg\.json"):
            load(folder)


def test_a_file_of_several_sites_must_say_which_it_reads(tmp_path):
    folder = edited(tmp_path, "gemma_scope_two")
    tensors = safetensors.torch.load_file(folder / "params.safetensors")
    tensors["w_dec"] = tensors["w_dec"][:, None].repeat(1, 3, 1)
    safetensors.torch.save_file(tensors, folder / "params.safetensors")
    with pytest.raises(WeightsError, match=r"w_dec has shape \(24, 3, 8\): it writes several"):
        load(folder)
    dictionary = load(folder, layer=1)
    assert isinstance(dictionary, Pretrained)
    assert dictionary.sites == tuple(f"blocks.{i}.hook_mlp_out" for i in range(3))
    code = dictionary.encode(X)
    torch.testing.assert_close(code, EXPECTED["gemma_scope_two/code"])
    decoded = EXPECTED["gemma_scope_two/decoded"]
    torch.testing.assert_close(dictionary.decode_site(code, "blocks.1.hook_mlp_out"), decoded)
    with pytest.raises(WeightsError, match="layer is 3, expected less than its 3 sites"):
        load(folder, layer=3)


class Trap:
    def __reduce__(self):
        return (print, ("code of a file was run",))


def test_reading_runs_nothing_that_a_file_asks_for(tmp_path, capsys):
    folder = edited(tmp_path, "dictionary_learning_topk")
    torch.save({"encoder.weight": Trap()}, folder / "ae.pt")
    with pytest.raises(WeightsError, match=r"ae\.pt cannot be read"):
        load(folder)
    np.savez(tmp_path / "params.npz", W_enc=np.array([Trap()], dtype=object))
    with pytest.raises(WeightsError, match=r"params\.npz cannot be read"):
        load(tmp_path / "params.npz")
    assert "was run" not in capsys.readouterr().out
