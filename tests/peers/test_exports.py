"""Libraries read what is written for them, and SAEBench's check accepts it: `make test-peers`."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from mechatlas.activations.site_names import lens_name
from mechatlas.app.cli import main
from mechatlas.base import WeightsError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.foreign.weights import as_pretrained
from mechatlas.dictionaries.formats import save
from mechatlas.dictionaries.sparsity import TopK
from tests.app.test_neuronpedia import here, world  # noqa: F401 - fixtures
from tests.dictionaries.golden import (
    GOLDEN,
    NAMES,
    PUBLISHED,
    X,
    expected,
    read,
    read_published,
)
from tests.peers.test_round_trips import in_peers

pytestmark = pytest.mark.peers

WITHOUT = {
    # sparsify keeps k codes of any sign before it decodes, and is compared by its outputs alone.
    ("sparsify", "code"),
}


def test_libraries_compute_what_was_written_for_them(tmp_path):
    wanted, rows = {}, {"x": X}
    for name in (*NAMES, *PUBLISHED):
        own = name in PUBLISHED
        dictionary = read_published(name) if own else read(GOLDEN / name)
        found = expected(name) if own else {"x": X}
        if own:
            rows[name] = found["x"].clone()
        for library in ("circuit-tracer", "dictionary_learning", "sparsify"):
            try:
                save(dictionary, tmp_path / library / name, format=library)
            except WeightsError:
                continue
            wanted[f"{library}/{name}/code"] = dictionary.encode(found["x"])
            wanted[f"{library}/{name}/output"] = dictionary(found["x"])
    metadata = {"model_name": "gpt2", "hook_name": lens_name("transformer.h.3")}
    own = Autoencoder(d_in=8, n_latents=24, sparsity=TopK(k=3))
    shown = {"own": own, "gemma_scope_one": read(GOLDEN / "gemma_scope_one")}
    for name, dictionary in shown.items():
        save(dictionary, tmp_path / "saelens" / name, format="saelens", metadata=metadata)
    safetensors.torch.save_file(rows, tmp_path / "x.safetensors")
    in_peers("read_exports.py", tmp_path)
    answers = safetensors.torch.load_file(tmp_path / "answers.safetensors")
    assert len(wanted) > 60
    for key, ours in wanted.items():
        library, _, kind = key.split("/")
        if (library, kind) not in WITHOUT:
            torch.testing.assert_close(answers[key], ours, rtol=1e-5, atol=1e-5, msg=key)
    for name, dictionary in shown.items():
        assert int(answers[f"saebench/{name}/layer"]) == 3
        theirs = {key: answers[f"saedashboard/{name}/{key}"] for key in ("rows", "code", "density")}
        # SAEDashboard gives atoms length 1; with the k largest they must have it before.
        length = dictionary.W_dec.norm(dim=1)
        pre = (theirs["rows"] @ dictionary.W_enc + dictionary.b_enc) * length
        state = {k: t * length for k, t in as_pretrained(dictionary, "").state.items()}
        code = dictionary.sparsity(pre, state)
        torch.testing.assert_close(theirs["code"], code, rtol=1e-4, atol=1e-5)
        density = (code > 0).float().mean(dim=0)
        torch.testing.assert_close(theirs["density"], density, rtol=0, atol=1e-5)
        assert 0 < density.mean() < 1


def test_features_for_neuronpedia_are_read_by_its_own_classes(here):  # noqa: F811 - the fixture
    words = ["export", "sae", "--format", "neuronpedia", "--store", "store"]
    main([*words, "--site", "model.layers.0", "--out", "features"])
    for library in ("circuit-tracer", "dictionary_learning", "sparsify", "saelens", "neuronpedia"):
        (here / "theirs" / library).mkdir(parents=True)
    shutil.copy(here / "features" / "batch-0.json", here / "theirs" / "neuronpedia")
    in_peers("read_exports.py", here / "theirs")
    theirs = safetensors.torch.load_file(here / "theirs" / "answers.safetensors")
    batch = json.loads((here / "features" / "batch-0.json").read_text())
    ours = torch.tensor([feature["frac_nonzero"] for feature in batch["features"]])
    torch.testing.assert_close(theirs["neuronpedia/batch-0/density"], ours)
