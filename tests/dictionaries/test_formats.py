import json
import random

import pytest
import safetensors.torch
import torch

from mechatlas.base import WeightsError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, Transcoder
from mechatlas.dictionaries.formats import FILE, load, save
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK
from tests.dictionaries.golden import EXPECTED, GOLDEN, NAMES, X, read


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path, tied):
    dictionary = Autoencoder(d_in=6, n_latents=20, sparsity=TopK(k=3), tied=tied, seed=4)
    torch.nn.init.normal_(dictionary.b_dec)
    file = save(dictionary, tmp_path / "d")
    x = torch.randn(9, 6)
    for path in (tmp_path / "d", file):
        again = load(path)
        assert torch.equal(again(x), dictionary(x))
        assert (again.tied, again.sparsity) == (tied, TopK(k=3))
    assert again.W_enc.shape == (6, 20)
    assert again.W_dec.shape == (20, 6)
    assert [p.name for p in (tmp_path / "d").iterdir()] == [FILE]


def test_a_damaged_file_is_refused_by_name(tmp_path):
    file = save(Autoencoder(d_in=6, n_latents=20, sparsity=TopK(k=3)), tmp_path)
    whole = file.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=r"dictionary\.safetensors cannot be read"):
            load(tmp_path)


def test_changed_bytes_of_our_own_file_never_raise_anything_else(tmp_path):
    file = save(Autoencoder(d_in=6, n_latents=20, sparsity=TopK(k=3)), tmp_path)
    whole, dice = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        changed[dice.randrange(min(len(whole), dice.choice((400, 10**6))))] = dice.randrange(256)
        file.write_bytes(changed)
        try:
            load(tmp_path)
        except WeightsError:
            refused += 1
    assert refused > 20


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="There is no dictionary at"):
        load(tmp_path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(WeightsError, match="is not a dictionary of mechatlas"):
        load(tmp_path)


def test_wrong_tensors_are_all_listed(tmp_path):
    rule = {"type": "TopK", "k": 1}
    config = {"kind": "Autoencoder", "d_in": 2, "n_latents": 4, "sparsity": rule}
    tensors = {
        "W_enc": torch.zeros(4, 2),
        "W_dec": torch.full((4, 2), torch.nan),
        "b_dec": torch.zeros(2),
        "extra": torch.zeros(1),
    }
    file = tmp_path / "d.safetensors"
    safetensors.torch.save_file(tensors, file, {"mechatlas": json.dumps(config)})
    with pytest.raises(WeightsError) as caught:
        load(file)
    for part in ("missing b_enc", "surplus extra", "W_enc has shape (4, 2)", "W_dec[0, 0] is nan"):
        assert part in str(caught.value)


def test_a_rule_that_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(WeightsError, match="Cannot save a dictionary with the sparsity rule"):
        save(Autoencoder(d_in=2, n_latents=4, sparsity=torch.relu), tmp_path)


RULES = [TopK(k=3), BatchTopK(k=3), ReLU(), JumpReLU(), Gated()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_what_is_written_for_saelens_is_read_back_the_same(tmp_path, rule, tied):
    x = torch.randn(9, 6)
    dictionary = Autoencoder(d_in=6, n_latents=20, sparsity=rule, tied=tied, seed=4)
    for name, tensor in dictionary.named_parameters():
        if not name.startswith(("W", "_W")):
            torch.nn.init.normal_(tensor, std=0.3)
    for learnt in (-1.0, 0.4):  # an untrained threshold, and a trained one
        if isinstance(rule, BatchTopK):
            dictionary.state["threshold"].fill_(learnt)
        file = save(dictionary, tmp_path, format="saelens", metadata={"hook_name": "blocks.1"})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", file.name]
        again = load(tmp_path)
        assert isinstance(again, Pretrained)
        assert again.site == "blocks.1"
        with torch.no_grad():
            torch.testing.assert_close(again.encode(x), dictionary.encode(x))
            torch.testing.assert_close(again(x), dictionary(x))


def test_transcoders_are_written_for_saelens_where_it_has_them_and_crosscoders_are_not(tmp_path):
    x = torch.randn(9, 6)
    for rule in (ReLU(), JumpReLU()):
        dictionary = Transcoder(d_in=6, d_out=4, n_latents=20, sparsity=rule)
        save(dictionary, tmp_path, format="saelens")
        again = read(tmp_path)
        assert again.transcodes
        with torch.no_grad():
            torch.testing.assert_close(again(x), dictionary(x))
    dictionary = Transcoder(d_in=6, d_out=4, n_latents=20, sparsity=TopK(k=2))
    with pytest.raises(WeightsError, match="SAELens has no transcoder with the sparsity rule TopK"):
        save(dictionary, tmp_path, format="saelens")
    dictionary = Crosscoder(widths={"a": 3, "b": 4}, n_latents=40)
    with pytest.raises(WeightsError, match="SAELens has no crosscoders"):
        save(dictionary, tmp_path, format="saelens")


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_from_others_can_be_written_for_saelens(name, tmp_path):
    dictionary = read(GOLDEN / name)
    if name in ("sparsify_groupmax", "sparsify_transcode_skip"):
        with pytest.raises(WeightsError, match=r"SAELens has no (dictionary|transcoder) with"):
            save(dictionary, tmp_path, format="saelens")
        return
    save(dictionary, tmp_path, format="saelens")
    again = read(tmp_path)
    code = again.encode(X)
    torch.testing.assert_close(code, EXPECTED[f"{name}/code"], rtol=1e-5, atol=1e-5)
    decoded, output = EXPECTED[f"{name}/decoded"], EXPECTED[f"{name}/output"]
    torch.testing.assert_close(again.decode(code), decoded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again(X), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_dictionary_of_another_library_is_the_same_from_a_file_of_ours(tmp_path, name):
    dictionary = read(GOLDEN / name)
    again = read(save(dictionary, tmp_path))
    code = dictionary.encode(X)
    torch.testing.assert_close(again.encode(X), code)
    torch.testing.assert_close(again.decode(again.encode(X)), dictionary.decode(code))
    torch.testing.assert_close(again(X), dictionary(X))
    assert (again.site, again.metadata) == (dictionary.site, dictionary.metadata)
    assert repr(again) == repr(dictionary)


def test_what_cannot_be_written_is_refused(tmp_path):
    dictionary = Autoencoder(d_in=2, n_latents=4, sparsity=torch.tanh)
    with pytest.raises(WeightsError, match="SAELens has no dictionary with the sparsity rule"):
        save(dictionary, tmp_path, format="saelens")
    dictionary = Autoencoder(d_in=2, n_latents=4, sparsity=TopK(k=1))
    with pytest.raises(WeightsError, match="The metadata cannot be written as JSON"):
        save(dictionary, tmp_path, format="saelens", metadata={"loss": {1, 2}})


@pytest.mark.parametrize("kind", ["Autoencoder", "Transcoder", "Crosscoder"])
def test_a_small_file_that_claims_to_be_huge_is_refused_before_anything_is_made(tmp_path, kind):
    n = 3_000_000  # weights of 33 TiB
    claims = {"Autoencoder": {"d_in": n}, "Transcoder": {"d_in": n, "d_out": n},
              "Crosscoder": {"widths": {"a": n}}}[kind]  # fmt: skip
    config = {"kind": kind, "n_latents": n, "sparsity": {"type": "TopK", "k": 3}, **claims}
    file = tmp_path / "d.safetensors"
    safetensors.torch.save_file(
        {"W_dec": torch.ones(2, 3)}, file, {"mechatlas": json.dumps(config)}
    )
    with pytest.raises(WeightsError, match=rf"W_dec has shape \(2, 3\), expected \({n}, {n}\)"):
        load(file)
