import dataclasses
import json
import shutil
import tomllib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images
from mechatlas.activations.store import Store
from mechatlas.analysis.matching import pairing, spaces
from mechatlas.analysis.matching.boolean import OPERATIONS, boolean_features
from mechatlas.analysis.matching.held_out import paired_codes
from mechatlas.app import cli
from mechatlas.app.commands import match as matching
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.inputs import open_dictionary
from mechatlas.app.match_quality import first_rows
from mechatlas.app.run_folder import execute
from mechatlas.base import DiskError, RecipeError, StoreError, UserError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.formats import save
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.maths import assignment
from tests.activations.test_collect_engines import Backwards
from tests.analysis.matching.planted import chain
from tests.app.worlds import photographs, run_command
from tests.forging import forge

KEYS = {
    "n_a", "n_b", "cost", "lower_bound", "gap", "matched", "seconds", "wall_seconds", "peak_bytes"
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Four dictionaries in a row, whose partners are known, in folders."""
    root = tmp_path_factory.mktemp("dictionaries")
    planted = chain(60, 24, 4)
    for number, one in enumerate(planted.dictionaries):
        autoencoder = Autoencoder(d_in=24, n_latents=one.n_latents, sparsity=TopK(k=4))
        with torch.no_grad():
            rows = torch.nn.functional.normalize(one.W_dec, dim=1)
            autoencoder.W_dec.copy_(rows)
            autoencoder._W_enc.copy_(rows.T)
        save(autoencoder, root / f"layer{number}")
    return root, planted


def run(saved, out, *more, layers=2):
    paths = [str(saved[0] / f"layer{k}") for k in range(layers)]
    return run_command("match", *paths, "--out", str(out), *more)


def test_the_result_has_what_scripts_rely_on(saved, tmp_path):
    result, text = run(saved, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    pair = written["pairs"][0]
    assert set(pair) >= KEYS
    assert pair["gap"] == pytest.approx(0, abs=1e-6)
    table = pq.read_table(tmp_path / "out" / "matches.parquet")
    wanted = [
        "pair",
        "latent_a",
        "latent_b",
        "cost",
        "cosine",
        "q_value",
        "margin",
        "margin_exact",
        "matched",
    ]
    assert table.column_names == wanted
    assert len(table) == min(pair["n_a"], pair["n_b"])
    assert sum(table["cost"].to_pylist()) == pytest.approx(pair["cost"])
    assert sum(table["matched"].to_pylist()) == pair["matched"]
    columns = np.full(pair["n_a"], -1)
    columns[table["latent_a"]] = table["latent_b"]
    assert saved[1].score(columns, 0, 1)[0] > 0.95
    assert str(tmp_path / "out") in text
    assert result["out"] == str(tmp_path / "out")
    assert not (tmp_path / "out" / "unfinished").exists()
    assert (tmp_path / "out" / "recipe.toml").is_file()


def test_three_dictionaries_or_more_have_tracks_and_the_same_command_gives_the_same_bytes(
    saved, tmp_path
):
    result, _ = run(saved, tmp_path / "one", layers=3)
    assert len(result["pairs"]) == 2
    table = pq.read_table(tmp_path / "one" / "tracks.parquet").to_pydict()
    assert len(table["latent"]) == sum(len(names) for names in saved[1].names[:3])
    assert set(result["first_to_last"]) == {"composition", "direct", "joint"}
    assert len(result["tracks"]["persistence"]) == 2
    run(saved, tmp_path / "two", layers=3)
    for file in ("matches.parquet", "tracks.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_pairs_on_an_engine_give_the_same_bytes_and_are_kept(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "_joint", lambda config, result, *others: result)
    run(saved, tmp_path / "here", layers=4)
    words = ("--engine", "processes:2")
    monkeypatch.setattr(MatchConfig, "elsewhere", lambda _: Backwards(give_up_after=2))
    with pytest.raises(UserError, match="given up"):
        run(saved, tmp_path / "there", *words, layers=4)
    compare, calls = pairing.compare_with_null, []
    counted = lambda *a, **options: calls.append(1) or compare(*a, **options)  # noqa: E731
    monkeypatch.setattr(pairing, "compare_with_null", counted)
    monkeypatch.setattr(MatchConfig, "elsewhere", lambda _: Backwards())
    result, _ = run(saved, tmp_path / "there", *words, layers=4)
    assert len(calls) == 1, "the evidence of two pairs was kept"
    assert [pair["a"] for pair in result["pairs"]] == ["layer0", "layer1", "layer2"]
    here, there = (tmp_path / each / "matches.parquet" for each in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()


def test_an_interrupt_loses_nothing_that_the_same_command_needs(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(assignment, "LISTED", 3)
    run(saved, tmp_path / "whole", layers=3)
    solve, compare, priced, compared = pairing.assign, pairing.compare_with_null, [], []

    def stopped(*args, on_state, **options):
        states = []

        def stop(state):
            on_state(state)
            states.append(state)
            if len(states) == 3 and len(priced) == 1:  # in the middle of the second pairing
                raise KeyboardInterrupt

        found = solve(*args, on_state=stop, **options)
        priced.append(found.rows_priced)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(pairing, "assign", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(saved, tmp_path / "killed", layers=3)
    assert len(priced) == 1, "the second pairing must need further rounds"
    resumed = []
    monkeypatch.setattr(
        pairing, "assign", lambda *a, **k: (resumed.append(k["resume"]), solve(*a, **k))[1]
    )
    monkeypatch.setattr(
        pairing,
        "compare_with_null",
        lambda *a, **k: (compared.append(a), compare(*a, **k))[1],
    )
    monkeypatch.setattr(matching, "_joint", lambda _config, result, *_: result)
    run(saved, tmp_path / "killed", layers=3)
    assert len(resumed[0].free) == 0, "the first pairing was kept whole"
    assert len(resumed[1].rows_priced) > 1, "the second one goes on where it was"
    assert len(compared) == 1, "the evidence of the first was kept"
    whole = (tmp_path / "whole" / "matches.parquet").read_bytes()
    assert (tmp_path / "killed" / "matches.parquet").read_bytes() == whole
    assert not (tmp_path / "killed" / "unfinished").exists()


@pytest.mark.parametrize("name", ["ae.pt", "params.npz", "sae_weights.safetensors"])
def test_what_was_kept_of_other_weights_is_not_used_whatever_the_format(
    tmp_path, name, monkeypatch
):
    monkeypatch.setattr("mechatlas.app.inputs.load", lambda _path: object())
    checksums = []
    for weights in (b"one", b"two"):
        (tmp_path / name).write_bytes(weights)
        checksums.append(open_dictionary(tmp_path).checksum)
    assert checksums[0] != checksums[1]


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """A paired store of a small network, and a dictionary of each of its sites."""
    root = tmp_path_factory.mktemp("paired")
    settings = StoreConfig(
        positions=Positions(rule="random", per_sample=20), paired=True, held_out=0.2
    )
    execute(
        CollectConfig(
            network=Network(name="tests.networks:tiny"),
            sites=("first", "mixed"),
            samples=Images(source=str(photographs(root / "p.zip")), side=15, crops=3),
            storage=settings,
            out=root / "store",
        )
    )
    for site in ("first", "mixed"):
        execute(
            TrainConfig(store=root / "store", site=site, out=root / site, n_latents=16,
                  sparsity=TopK(k=8), steps=200, batch_size=64)
        )  # fmt: skip
    return root


def test_with_a_store_the_network_runs_on_what_a_match_writes(paired, tmp_path):
    recipe = MatchConfig(
        trust=True,
        dictionaries=(paired / "first", paired / "mixed"),
        out=tmp_path / "out", cost="codes", store=paired / "store", samples=6,
    )  # fmt: skip
    pair = execute(recipe).pairs[0]
    effects = pair.spliced
    assert effects is not None
    assert pair.samples == 6
    ways = {"matched", "match", "random", "same_index", "b_reconstruction", "b_mean"}
    assert ways <= set(effects)
    assert "layer_drop" not in effects  # 6 and 8 channels
    for effect in effects.values():
        measures = dict(vars(effect))
        assert measures.pop("loss_change") is None, "images have no next token"
        assert set(measures) == {"variance_lost", "kl_divergence", "agreement"}
        assert all(e.low <= e.value <= e.high for e in measures.values())
    reconstruction, mean = effects["b_reconstruction"], effects["b_mean"]
    assert reconstruction.variance_lost.value < mean.variance_lost.value
    assert mean.kl_divergence is not None
    assert mean.kl_divergence.value > 0
    again = execute(dataclasses.replace(recipe, samples=0, out=tmp_path / "none"))
    assert again.pairs[0].spliced is None
    assert again.pairs[0].not_run is None
    for matched in (0, 1):  # nothing is said of the rows of no pairs
        changed = dataclasses.replace(again.pairs[0], matched=matched)
        words = matching.in_words(dataclasses.replace(again, pairs=[changed]))
        assert ("fire together" in words) == bool(matched)


def test_latents_are_described_by_two_of_the_dictionary_before(paired, tmp_path):
    config = MatchConfig(
        dictionaries=(paired / "first", paired / "mixed"), out=tmp_path / "out", cost="codes",
        store=paired / "store", samples=0, rows=50, combinations=True, fdr=0.5,
    )  # fmt: skip
    pair = execute(config).pairs[0]
    table = pq.read_table(tmp_path / "out" / "combinations.parquet").to_pydict()
    a, b = (open_dictionary(path).dictionary for path in config.dictionaries)
    store = Store(paired / "store")
    (x, samples), (y, _) = (first_rows(store.rows(site), 800) for site in ("first", "mixed"))
    found = boolean_features(paired_codes(a, b, x, y), samples, fdr=0.5, seed=config.seed)
    own = np.flatnonzero(found.first >= 0)
    assert table["latent_b"] == own.tolist()
    assert len(own) > 4
    assert table["first"] == found.first[own].tolist()
    assert table["operation"] == [OPERATIONS[k] for k in found.operation[own]]
    assert table["q_value"] == found.q_values[own].tolist()
    assert pair.n_combinations == sum(table["significant"]) == found.significant.sum()


def test_where_the_network_cannot_be_run_the_match_stands_and_says_why(paired, tmp_path):
    recipe = MatchConfig(
        trust=True,
        dictionaries=(paired / "mixed", paired / "first"),
        out=tmp_path / "out", cost="codes", store=paired / "store", samples=6,
    )  # fmt: skip
    pair = execute(recipe).pairs[0]
    assert "reaches first before mixed" in str(pair.not_run)
    assert pair.spliced is None
    shutil.copytree(paired / "store", tmp_path / "store")
    forge(tmp_path / "store", recipe={})  # as `collect` in Python leaves it
    recipe = dataclasses.replace(recipe, store=tmp_path / "store", out=tmp_path / "other")
    pair = execute(recipe).pairs[0]
    assert "no recipe names its network. Collect it by a recipe" in str(pair.not_run)
    assert pair.co_firing is not None
    assert bool(pair.co_firing["matched"].p_b_given_a.n) == bool(pair.matched)
    assert pair.co_firing["random"].p_b_given_a.n > 0


def test_sites_can_be_named_where_dictionaries_do_not_say_theirs(paired, tmp_path):
    files = tuple(tmp_path / f"{site}.safetensors" for site in ("first", "mixed"))
    for file in files:
        shutil.copy(paired / file.stem / "dictionary.safetensors", file)
    config = MatchConfig(
        dictionaries=files, out=tmp_path / "out", cost="codes", store=paired / "store", samples=0,
    )  # fmt: skip
    with pytest.raises(
        RecipeError, match=r"Name the site of each dictionary with --sites; .* first"
    ):
        execute(config)
    with pytest.raises(RecipeError, match="one site for each of the 2 dictionaries, got 1"):
        execute(dataclasses.replace(config, sites=("first",)))
    named = execute(dataclasses.replace(config, sites=("first", "mixed")))
    assert named.pairs[0].held_out_rows
    folders = dataclasses.replace(
        config, dictionaries=(paired / "first", paired / "mixed"), out=tmp_path / "folders"
    )
    assert execute(folders).pairs[0].co_firing == named.pairs[0].co_firing
    recipe = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())
    assert recipe["sites"] == ["first", "mixed"]


def test_matched_by_codes_the_spaces_are_compared(paired, tmp_path, monkeypatch):
    for module in (matching, spaces):
        monkeypatch.setattr(module, "MIN_PAIRS", 4)
    config = MatchConfig(
        dictionaries=(paired / "mixed", paired / "mixed"), out=tmp_path / "codes",
        store=paired / "store", samples=0, cost="codes",
    )  # fmt: skip
    found = execute(config)
    same = found.pairs[0].spaces
    assert same is not None
    assert same.n == found.pairs[0].matched
    assert same.rsa.value == pytest.approx(1)
    assert f"RSA 1.00 (paired at random {same.rsa.expected:.2f}" in matching.in_words(found)
    rows = dataclasses.replace(config, cost="decoder", out=tmp_path / "rows")
    assert execute(rows).pairs[0].spaces is None  # matched rows are alike by themselves


def test_the_old_name_of_a_scale_still_works(paired, tmp_path):
    with pytest.warns(DeprecationWarning, match="mean"):
        old = MatchConfig(
            dictionaries=(paired / "mixed", paired / "mixed"), out=tmp_path / "old",
            store=paired / "store", samples=0, scale="data",
        )  # fmt: skip
    new = dataclasses.replace(old, scale="mean", out=tmp_path / "new")
    costs = [execute(config).pairs[0].cost for config in (old, new)]
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"dictionaries": ()}, RecipeError, "needs two dictionaries or more, got 0"),
        ({"cost": "codes"}, RecipeError, "give --store STORE too"),
        ({"combinations": True}, RecipeError, "and --combinations need rows"),
        ({"cost": "decode"}, RecipeError, "must be one of decoder, .* got 'decode'"),
        ({"fdr": 2.0}, RecipeError, r"fdr must be in \(0, 1\)"),
        ({"store": "nowhere"}, StoreError, "nowhere"),
        ({"out": "full"}, DiskError, "not empty and is not a matching"),
    ],
)
def test_mistakes_are_named_before_any_work(saved, tmp_path, changed, kind, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    paths = tuple(saved[0] / f"layer{k}" for k in range(2))
    values = {"dictionaries": paths, "out": tmp_path / "out", **changed}
    for key in ("out", "store"):
        if isinstance(values.get(key), str):
            values[key] = tmp_path / values[key]
    with pytest.raises(kind, match=message):
        execute(MatchConfig(**values))


def test_a_missing_dictionary_is_a_users_mistake(saved, tmp_path, capsys):
    words = [
        "match",
        str(saved[0] / "layer0"),
        str(tmp_path / "gone"),
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "gone" in capsys.readouterr().err
    with pytest.raises(UserError):
        run_command(*words)
