"""Commands and the page with a cross-layer transcoder."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mechatlas.activations.store import Store
from mechatlas.app.cli import configure, main
from mechatlas.app.commands import circuit
from mechatlas.app.estimates import OnlyEstimate
from mechatlas.app.report.from_python import report
from mechatlas.app.run_folder import execute, read_result
from mechatlas.base import UserError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.sparsity import TopK
from tests.networks import cross_layer, residual

READS = [f"layers.{i}:input" for i in range(3)]
WRITES = [f"layers.{i}" for i in range(3)]
SITES = ",".join([*READS, *WRITES])
RECIPE = f"""
sites = {json.dumps([*READS, "head"])}
out = "store"
[network]
name = "tests.networks:residual"
[samples]
type = "Arrays"
source = "x.npy"
[storage]
dtype = "float32"
paired = true
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        random = np.random.default_rng(0)
        np.save("x.npy", random.normal(size=(240, 8)).astype(np.float32))
        (folder / "collect.toml").write_text(RECIPE)
        main(["collect", "collect.toml"])
        save(cross_layer(), "clt")
        yield folder


def test_a_circuit_within_a_cross_layer_transcoder_and_its_page(here, capsys):
    words = ["circuit", "clt", "--store", "store", "--sites", SITES, "--trust"]
    main([*words, "--out", "circuit", "--n-targets", "10", "--n-ablated", "6"])
    assert (
        "clt -> clt: weights and ablations agree with rank correlation" in capsys.readouterr().out
    )
    result = read_result(here / "circuit", "circuit")
    (pair,) = result.pairs
    assert (pair.n_a, pair.n_b, pair.branches) == (36, 36, WRITES)
    assert pair.agreement_shared_gates is pair.variance_reproduced is None
    assert result.sites == ["layers.0, layers.1, layers.2", ", ".join(READS)]
    edges = pq.read_table("circuit/edges.parquet").to_pydict()
    known = ~np.isnan(edges["effect"])
    assert known.any()
    source, target = (np.array(edges[f"latent_{side}"]) for side in "ab")
    assert (target[np.array(edges["contribution"]) != 0] >= 12).all()
    one = np.flatnonzero(known & (np.array(edges["weight"]) != 0))[0]
    same = (source == source[one]) & (target == target[one])
    mean = np.abs(np.array(edges["weight"])[same].sum())
    assert 0 < abs(edges["effect"][one]) < 10 * mean
    main(["report", "circuit", "--out", "page.html"])
    assert "clt/" in (here / "page.html").read_text()


def test_a_dry_run_of_such_a_circuit_begins_every_pair_and_writes_nothing(here, monkeypatch):
    done = []

    def begun(works, **sizes):
        for work in works:
            work(lambda *progress: done.append(progress))
        return of_work([lambda _: None], **sizes)

    of_work = circuit.of_work
    monkeypatch.setattr(circuit, "of_work", begun)
    words = ["clt", "clt", "clt", "--store", "store", "--sites", *[SITES] * 3, "--trust"]
    config = configure(circuit, "circuit", [*words, "--n-targets", "10", "--out", "new"])
    with pytest.raises(OnlyEstimate) as end:
        execute(config, dry_run=True)
    assert not (here / "new").exists()
    n = len(Store(here / "store").samples("train", config.samples))
    assert [a for a, b in done if a == b] == [10 * n] * 2  # targets times samples, of two pairs
    assert {b for _, b in done} == {10 * n}
    assert len(done) > 4  # so that a long one is not done to its end
    assert end.value.estimate.disk == circuit.EDGE_BYTES * 8 * 10 * 3 * 2


def test_what_a_cross_layer_transcoder_is_worth(here, capsys):
    words = ["evaluate", "clt", "--store", "store", "--site", SITES, "--trust", "--out", "worth"]
    main(words)
    assert "fvu by site: layers.0 " in capsys.readouterr().out
    result = read_result(here / "worth", "evaluation")
    assert result.site == SITES
    assert list(result.fvu_by_site) == WRITES


def test_the_page_shows_the_features_of_all_sites(here):
    clt, network = load("clt"), residual()
    problems = []
    report(
        "features.html", stores="store", dictionaries={"mine": (READS, clt)}, network=network,
        samples=np.load("x.npy"), on_problem=lambda name, problem: problems.append(problem),
    )  # fmt: skip
    assert not problems
    page = (here / "features.html").read_text()
    assert "layers.0:input and 2 more" in page
    rows = Store("store").paired(READS)
    x, where = zip(*((batch.x, place) for batch, place in rows.scan()), strict=True)
    assert torch.cat(x).shape == (240, 24)
    assert len(torch.cat(where)[:, 0].unique()) == 240
    with pytest.raises(UserError, match=r"'mine' reads 24 \(3 sites .* no store has them all"):
        report("no.html", stores="store", dictionaries={"mine": clt}, network=network,
               samples=np.load("x.npy"))  # fmt: skip


def test_one_dictionary_of_one_site_has_no_circuit_alone(here, capsys):
    save(Autoencoder(d_in=8, n_latents=12, sparsity=TopK(k=2)), "sae")
    with pytest.raises(SystemExit) as exit_:
        main(["circuit", "sae", "--sites", "head", "--store", "store", "--out", "no"])
    assert exit_.value.code == 2
    assert "needs two dictionaries or more, got 1" in capsys.readouterr().err
