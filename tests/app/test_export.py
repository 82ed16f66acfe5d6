"""`mechatlas export`: dictionaries of any library in the format of another."""

import json

import pytest
import torch

from mechatlas.activations.site_names import lens_name
from mechatlas.app.cli import main
from mechatlas.dictionaries.formats import load
from tests.app.worlds import dry_run, run_command
from tests.dictionaries.golden import GOLDEN, expected

FILES = {"cfg.json", "sae_weights.safetensors"}


def test_a_dictionary_is_exported_with_its_site_and_model(tmp_path, capsys):
    words = [
        "export",
        str(GOLDEN / "llama_scope"),
        "--format",
        "saelens",
        "--site",
        "model.layers.3",
    ]
    out = tmp_path / "out"
    main([*words, "--model-name", "llama", "--out", str(out)])
    assert "for saelens is in" in capsys.readouterr().out
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert metadata["model_name"] == "llama"
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) >= FILES
    found = expected("llama_scope")
    code = load(out).encode(found["x"])
    torch.testing.assert_close(code, found["code"], rtol=1e-5, atol=1e-5)
    main(["verify", str(tmp_path)])
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name in FILES}
    (out / "cfg.json").unlink()
    (out / "cfg.json").symlink_to("cfg.json")
    main([*words, "--model-name", "llama", "--out", str(out)])  # the same files once more
    assert {name: (out / name).read_bytes() for name in FILES} == before
    assert json.loads((out / "manifest.json").read_text())["files"].keys() >= FILES


def test_all_layers_of_a_cross_layer_transcoder_are_exported(tmp_path, capsys):
    words = ["export", str(GOLDEN / "circuit_tracer_clt_jump_relu"), "--format", "circuit-tracer"]
    main([*words, "--out", str(tmp_path / "out"), "--json"])
    assert len(json.loads(capsys.readouterr().out)["files"]) == 6
    assert load(tmp_path / "out").n_latents == 18


def test_what_a_library_lacks_is_refused_and_exits_with_2(tmp_path, capsys):
    words = [
        "export",
        str(GOLDEN / "deepseek"),
        "--format",
        "sparsify",
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "sparsify has no dictionary with the sparsity rule ReLU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("model.layers.3", "blocks.3.hook_resid_post"),
        ("layers.3:input", "blocks.3.hook_resid_pre"),
        ("transformer.h.11.mlp", "blocks.11.hook_mlp_out"),
        ("h.0.attn.c_proj:input", "blocks.0.attn.hook_z"),
        ("model.layers.2.self_attn.o_proj:input", "blocks.2.attn.hook_z"),
        ("gpt_neox.layers.2.attention", "blocks.2.hook_attn_out"),
        ("bert.encoder.layer.5", "blocks.5.hook_normalized_resid_post"),
        # Gemma adds what its norm makes of these, other models the output itself.
        ("model.layers.3.mlp", None),
        ("model.layers.3.self_attn", None),
        ("mixed4a", None),
        ("blocks.3.hook_resid_post", None),
        ("model.layers.3/head2", None),
    ],
)
def test_sites_of_language_models_get_their_names_in_transformer_lens(site, name):
    assert lens_name(site) == name


def test_a_dry_run_knows_the_size_of_the_files(tmp_path):
    words = (GOLDEN / "llama_scope", "--format", "saelens", "--site", "model.layers.3")
    found, out = dry_run("export", *words, out=tmp_path / "new"), tmp_path / "out"
    run_command("export", *map(str, words), "--out", str(out))
    assert found.disk == sum((out / name).stat().st_size for name in FILES)
