"""`mechatlas circuit`: the folder, the table, the chapter, and mistakes in one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import mechatlas as ma
from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Arrays, Images
from mechatlas.activations.store import Store
from mechatlas.app.cli import main
from mechatlas.app.commands import circuit as command
from mechatlas.app.commands.circuit import CircuitConfig
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.inputs import open_network
from mechatlas.app.old_runs import KEYS
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.report.chapters import circuits
from mechatlas.app.report.runs import find_runs
from mechatlas.app.run_folder import execute
from mechatlas.base import no_progress
from mechatlas.dictionaries.sparsity import TopK
from tests.forging import forge

SITES = ("mixed4a", "mixed4b", "mixed4d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store of `inception_mini`, three small dictionaries, and a circuit of two."""
    root = tmp_path_factory.mktemp("runs")
    execute(
        CollectConfig(
            network=Network(name="inception_mini"),
            sites=SITES,
            samples=Images(crops=12),
            storage=StoreConfig(positions=Positions(per_sample=20), held_out=0.2),
            out=root / "store",
        )
    )
    for site in SITES:
        execute(
            TrainConfig(store=root / "store", site=site, out=root / site, n_latents=96, steps=60,
                  batch_size=256, sparsity=TopK(k=8))
        )  # fmt: skip
    execute(
        CircuitConfig(dictionaries=(root / SITES[0], root / SITES[1]), out=root / "circuit",
                n_ablated=8, features=3, visualize_steps=2)
    )  # fmt: skip
    return root


def test_the_folder_holds_edges_kernels_and_their_validation(folder):
    result = json.loads((folder / "circuit" / "result.json").read_text())
    (pair,) = result["pairs"]
    assert pair["branches"] == ["1x1", "3x3", "5x5", "pool"]
    assert pair["kernel_taps"] == [1, 9, 25, 9]
    found = pair["agreement"]
    assert found["spearman"] > 0.5
    assert found["low"] > found["null_high"]
    assert found["spearman"] > pair["agreement_open_gates"]["spearman"]
    table = pq.read_table(folder / "circuit" / "edges.parquet").to_pydict()
    kernels = load_file(folder / "circuit" / "kernels.safetensors")
    for branch, row, weight in list(
        zip(table["branch"], table["kernel"], table["weight"], strict=True)
    )[:50]:
        kernel = kernels[f"0.{branch}.kernels"][row]
        assert kernel.sum() == pytest.approx(weight, rel=1e-3, abs=1e-5)
    assert all(0 <= q <= 1 for q in table["q_value"])


def test_a_dry_run_estimates_every_part_and_writes_nothing(folder, tmp_path, capsys):
    words = [str(folder / site) for site in SITES[:2]]
    words += ["--n-ablated", "8", "--features", "3", "--visualize-steps", "2"]
    main(["circuit", *words, "--out", str(tmp_path / "new"), "--dry-run", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "new").exists()
    assert 0 < found["seconds"] < 60
    written = sum(each.stat().st_size for each in (folder / "circuit").glob("*"))
    assert 0.3 * written < found["disk"] < 3 * written


def test_the_chapter_draws_what_was_found(folder):
    made = circuits.chapter(find_runs(folder), no_progress)
    assert made is not None
    json.dumps(made.data, allow_nan=False)
    (part,) = made.data
    assert part["runs"] == list(SITES[:2])
    assert len(part["drawings"]) == 3
    assert set(part["pictures"]) == set(made.images)
    assert made.images


def test_a_run_of_version_0_1_is_still_drawn(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "runs")
    file = tmp_path / "runs" / "circuit" / "result.json"
    text = file.read_text()
    for old, new in KEYS["circuit"].items():
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{old}"')
    file.write_text(text)
    forge(file.parent, schema=1)
    old = circuits.chapter(find_runs(tmp_path / "runs"), no_progress)
    new = circuits.chapter(find_runs(folder), no_progress)
    assert old is not None
    assert new is not None
    assert old.html == new.html
    assert old.data[0]["drawings"] == new.data[0]["drawings"]


def test_the_verb_gives_what_the_command_gives(folder):
    store = Store(folder / "store")
    network, samples = open_network(store, TrustConfig())
    numbers = store.samples("train", 256), store.samples("held", 128)
    known, unseen = (samples.stack([samples.read(int(i)) for i in n]) for n in numbers)
    found = ma.circuit(
        network, ma.load(folder / SITES[0]), ma.load(folder / SITES[1]), known, held_out=unseen,
        site_a=SITES[0], site_b=SITES[1], n_ablated=8,
    )  # fmt: skip
    (pair,) = json.loads((folder / "circuit" / "result.json").read_text())["pairs"]
    table = pq.read_table(folder / "circuit" / "edges.parquet").to_pydict()
    assert table["latent_a"] == found.edges.source.tolist()
    assert table["latent_b"] == found.edges.target.tolist()
    np.testing.assert_allclose(table["weight"], found.edges.weight, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(table["q_value"], found.edges.q_value, atol=0.05)
    assert pair["n_significant"] == found.significant.sum()
    assert found.evidence is not None
    assert found.evidence.agreement.spearman == pytest.approx(
        pair["agreement"]["spearman"], abs=1e-3
    )


def test_the_same_command_gives_the_same_edges(folder, tmp_path):
    dictionaries = (folder / SITES[0], folder / SITES[1])
    again = CircuitConfig(
        dictionaries=dictionaries,
        out=tmp_path / "again",
        n_ablated=8,
        features=3,
        visualize_steps=2,
    )
    execute(again)
    for name in ("edges.parquet", "kernels.safetensors", "pictures.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "circuit" / name).read_bytes()


def test_an_interrupted_run_continues_with_the_pairs_it_has_kept(folder, tmp_path, monkeypatch):
    config = CircuitConfig(
        dictionaries=(folder / SITES[0], folder / SITES[1]), out=tmp_path / "again",
        n_ablated=8, features=3, visualize_steps=2,
    )  # fmt: skip

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "strongest_paths", interrupt)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    manifest = json.loads((config.out / "manifest.json").read_text())
    assert manifest["complete"] is False
    monkeypatch.setattr(command, "find_circuit", interrupt)
    assert execute(config).pairs[0].n_ablated == 8
    for name in ("edges.parquet", "kernels.safetensors", "pictures.safetensors"):
        assert (config.out / name).read_bytes() == (folder / "circuit" / name).read_bytes()
    assert not (config.out / "unfinished").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixed4a"], "needs two dictionaries or more, got 1"),
        (["mixed4b", "mixed4d"], "not consecutive: the branches of 'mixed4c' lie between"),
        (["mixed4b", "mixed4a"], "mixed4a does not follow site mixed4b"),
        (["mixed4a", "mixed4b", "--fdr", "2"], "fdr must be in (0, 1)"),
        (["mixed4a", "mixed4b", "--store", "nowhere"], "is not an activation store"),
    ],
)
def test_a_mistake_is_one_sentence(folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as caught:
        main(["circuit", *words, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_store_that_is_gone_is_named(folder, tmp_path, monkeypatch, capsys):
    for site in SITES[:2]:
        shutil.copytree(folder / site, tmp_path / site)
        forge(tmp_path / site, store="/gone")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["circuit", *SITES[:2], "--out", "out"])
    assert "The store of mixed4a (/gone) is no longer there" in capsys.readouterr().err


def test_a_transformer_has_circuits_by_heads_and_mlp(tmp_path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", random.standard_normal((120, 10, 12)).astype(np.float32))
    name = "tests.analysis.circuits.transformers:single"
    sites = ("layers.0", "layers.1")
    execute(
        CollectConfig(
            network=Network(name=name), sites=sites, samples=Arrays(source=tmp_path / "x.npy"),
            storage=StoreConfig(held_out=0.3), out=tmp_path / "store",
        )
    )  # fmt: skip
    for site in sites:
        execute(
            TrainConfig(
                store=tmp_path / "store", site=site, out=tmp_path / site, n_latents=48, steps=80,
                batch_size=128, sparsity=TopK(k=6),
            )
        )  # fmt: skip
    found = execute(
        CircuitConfig(
            dictionaries=tuple(tmp_path / site for site in sites), out=tmp_path / "circuit",
            n_ablated=12, features=3, trust=True,
        )
    )  # fmt: skip
    (pair,) = found.pairs
    assert pair.branches == [
        "direct", "head0", "head1", "head2", "mlp", "head0 > mlp", "head1 > mlp", "head2 > mlp"
    ]  # fmt: skip
    assert set(pair.kernel_taps) == {17}
    assert pair.agreement.spearman > 0.9
    assert pair.agreement.low > pair.agreement.null_high
    assert pair.agreement_open_gates is None
    made = circuits.chapter(find_runs(tmp_path), no_progress)
    assert made is not None
    edge = made.data[0]["drawings"][0]["edges"][0]
    assert (edge["kernel"]["h"], edge["kernel"]["w"]) == (1, 17)
