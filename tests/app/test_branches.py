import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images
from mechatlas.activations.store import Store
from mechatlas.app import cli
from mechatlas.app.commands import branches as command
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.run_folder import execute
from mechatlas.base import DiskError, InputError, RecipeError, StoreError, TrustError
from mechatlas.dictionaries.sparsity import TopK
from tests.app.worlds import bytes_in, dry_run, photographs, run_command

COLUMNS = ("feature", "branch", "share", "expected_share", "p_value", "q_value")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A paired store of a small network, a dictionary of its site with branches, and others."""
    root = tmp_path_factory.mktemp("branches")
    collect = CollectConfig(
        network=Network(name="tests.networks:tiny"),
        sites=("first", "mixed"),
        samples=Images(source=str(photographs(root / "photos.zip")), side=15, crops=3),
        storage=StoreConfig(positions=Positions(rule="random", per_sample=30), paired=True),
        out=root / "store",
    )
    execute(collect)
    for name, site, seed in (
        ("whole", "mixed", 0), ("again", "mixed", 1), ("part", "mixed/left", 0),
        ("first", "first", 0),
    ):  # fmt: skip
        execute(
            TrainConfig(store=collect.out, site=site, out=root / name, n_latents=40, steps=60,
                  sparsity=TopK(k=3), batch_size=128, seed=seed)
        )  # fmt: skip
    return root


def run(root, out, *more, name="whole"):
    words = [str(root / name), "--store", str(root / "store"), "--out", str(out), "--rows", "600"]
    return run_command("branches", *words, *more)


def test_the_result_has_what_scripts_rely_on(world, tmp_path):
    result, text = run(world, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "features.parquet")
    assert tuple(table.column_names)[: len(COLUMNS)] == COLUMNS
    assert len(table) == 40 * 2
    assert table["branch"].to_pylist()[:2] == ["left", "right"]
    shares = table["share"].to_numpy().reshape(40, 2)
    there = ~np.isnan(shares).any(axis=1)
    assert np.square(shares[there]).sum(axis=1) == pytest.approx(1)
    activation = table["activation_share"].to_numpy().reshape(40, 2)
    there = ~np.isnan(activation).any(axis=1)
    assert activation[there].sum(axis=1) == pytest.approx(1)
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["site"] == "mixed"
    assert [one["width"] for one in written["branches"]] == [5, 3]
    assert sum(one["expected_share"] ** 2 for one in written["branches"]) == pytest.approx(1)
    assert written["n_tested"] + written["n_never_active"] <= 40
    assert written["n_rows"] == 600
    assert str(tmp_path / "out") in text
    assert result["out"] == str(tmp_path / "out")
    picture = json.loads((tmp_path / "out" / "picture.json").read_text())
    assert sorted(picture["channels"]) == list(range(8))


def test_the_same_command_gives_the_same_bytes(world, tmp_path):
    for name in ("one", "two"):
        run(world, tmp_path / name)
    for file in ("features.parquet", "picture.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def interrupt(*_args, **_options):
    raise KeyboardInterrupt


def test_an_interrupted_run_continues_and_ends_with_the_same_bytes(world, tmp_path, monkeypatch):
    two = (world / "whole", world / "again")
    execute(
        MatchConfig(
            dictionaries=two,
            out=tmp_path / "match",
            cost="codes",
            store=world / "store",
            trust=True,
        )
    )
    more = ("--match", str(tmp_path / "match"))
    run(world, tmp_path / "whole", *more)
    read, shares = (command, "channel_statistics"), (command, "activity_shares")
    tested = command.BranchTest, "run"
    for done, step in enumerate((read, shares, tested, (command, "consistency"))):
        with monkeypatch.context() as patch:
            patch.setattr(*step, interrupt)
            if done > 2:
                patch.setattr(*shares, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(world, tmp_path / "parts", *more)
        kept = {path.stem for path in (tmp_path / "parts" / "unfinished").glob("*")}
        assert len(kept) == (0, 1, 2, 5)[done], kept
    for step in (read, shares, tested):
        monkeypatch.setattr(*step, interrupt)
    run(world, tmp_path / "parts", *more)
    for file in ("features.parquet", "picture.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    one, other = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("parts", "whole")
    )
    assert {**one, "seconds": 0, "peak_bytes": 0} == {**other, "seconds": 0, "peak_bytes": 0}
    assert not (tmp_path / "parts" / "unfinished").exists()


def test_parts_kept_of_other_choices_are_not_continued(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(command, "activity_shares", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path / "out", "--seed", "1")
    monkeypatch.setattr(command, "channel_statistics", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "out", "--seed", "2")


def test_the_old_flag_warns_and_works(world, tmp_path):
    with pytest.warns(DeprecationWarning, match="branches --rate is now called branches --fdr"):
        result, _ = run(world, tmp_path / "out", "--rate", "0.5")
    assert result["fdr"] == 0.5


def test_labels_are_looked_for_in_the_branches(world, tmp_path):
    labels = ["x" if k % 2 else None for k in range(40)]
    pq.write_table(pa.table({"feature": list(range(40)), "kind": labels}), tmp_path / "l.parquet")
    result, _ = run(world, tmp_path / "out", "--labels", f"{tmp_path / 'l.parquet'}:kind")
    assert result["labels"]["n_labels"] == 1
    assert {one["branch"] for one in result["labels"]["surest"]} == {"left", "right"}


@pytest.mark.parametrize(
    ("features", "said"),
    [([0, 40], "names feature 40"), ([0, None], "names feature None"), ([0.5, 1], "feature 0.5"),
     ([3, 3], "gives feature 3 several labels, 'a' and 'b'")],
)  # fmt: skip
def test_labels_that_fit_no_feature_or_contradict_are_refused(world, tmp_path, features, said):
    pq.write_table(pa.table({"feature": features, "kind": ["a", "b"]}), tmp_path / "odd.parquet")
    with pytest.raises(RecipeError, match=said):
        run(world, tmp_path / "out", "--labels", f"{tmp_path / 'odd.parquet'}:kind")


def test_matched_features_are_compared_by_branch(world, tmp_path):
    two = (world / "whole", world / "again")
    execute(
        MatchConfig(
            dictionaries=two,
            out=tmp_path / "match",
            cost="codes",
            store=world / "store",
            trust=True,
        )
    )
    result, _ = run(world, tmp_path / "out", "--match", str(tmp_path / "match"), "--fdr", "0.5")
    found = result["consistency"][0]
    assert (found["a"], found["b"]) == ("whole", "again")
    assert found["same_branch"]["pairs"] >= found["same_branch_of_equal_size"]["pairs"]
    assert found["nearest_branch"]["same_branch"]["pairs"] >= found["same_branch"]["pairs"]
    execute(MatchConfig(dictionaries=two, out=tmp_path / "plain"))
    with pytest.raises(RecipeError, match="--cost decoder, which compares channel with channel"):
        run(world, tmp_path / "out2", "--match", str(tmp_path / "plain"))


def test_a_dictionary_of_one_branch_has_nothing_to_compare(world, tmp_path):
    with pytest.raises(InputError, match=r"the branch mixed/left alone.*nothing to compare"):
        run(world, tmp_path / "out", name="part")


def test_a_site_without_branches_is_refused_with_those_that_have_some(world, tmp_path):
    with pytest.raises(StoreError, match=r"first has no named branches. Sites .* have some: mixed"):
        run(world, tmp_path / "out", name="first")


@pytest.mark.parametrize(
    ("more", "kind", "said"),
    [
        (["--fdr", "2"], SystemExit, "2"),
        (["--site", "first"], RecipeError, "says that it reads mixed, but first was asked for"),
        (["--labels", "nothing"], RecipeError, "must be FILE.parquet:COLUMN"),
        (["--labels", "nowhere.parquet:kind"], DiskError, "nowhere.parquet"),
        (["--match", "nowhere"], DiskError, "nowhere"),
    ],
)
def test_mistakes_are_named_before_any_work(world, tmp_path, more, kind, said):
    with pytest.raises(kind, match=said):
        run(world, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_the_command_line_knows_it(world, tmp_path, capsys):
    cli.main(["branches", str(world / "whole"), "--store", str(world / "store"), "--out",
              str(tmp_path / "out"), "--rows", "300"])  # fmt: skip
    assert "mixed: " in capsys.readouterr().out
    assert Store(world / "store").shapes["mixed"].branches["right"] == [5, 8]


def test_a_dry_run_knows_the_size_of_the_table(world, tmp_path):
    run(world, tmp_path / "out")
    words = (world / "whole", "--store", world / "store", "--rows", "600")
    found, size = dry_run("branches", *words, out=tmp_path / "new"), bytes_in(tmp_path / "out")
    assert 0.2 * size < found.disk < 5 * size


def test_features_of_a_residual_stream_are_tested_for_heads_tokens_and_mlp(tmp_path):
    collect = CollectConfig(
        network=Network(name="tests.networks:patch_transformer"),
        sites=("layers.1",),
        samples=Images(source=str(photographs(tmp_path / "photos.zip")), side=16, crops=3),
        out=tmp_path / "store",
    )
    execute(collect)
    execute(
        TrainConfig(store=collect.out, site="layers.1", out=tmp_path / "whole", n_latents=60,
              steps=40, sparsity=TopK(k=3), batch_size=128)
    )  # fmt: skip
    with pytest.raises(TrustError, match=r"--network tests\.networks:patch_transformer"):
        run(tmp_path, tmp_path / "out")
    result, text = run(tmp_path, tmp_path / "out", "--trust")
    names = ["input", "head0", "head1", "head2", "class token", "registers", "mlp"]
    assert [one["name"] for one in result["branches"]] == names
    assert result["components"]
    assert result["n_rows"] == 600
    assert "with their coordinates permuted" in text
    table = pq.read_table(tmp_path / "out" / "features.parquet")
    shares = table["share"].to_numpy().reshape(60, 7)
    there = ~np.isnan(shares).any(axis=1)
    assert there.sum() > 10
    assert np.square(shares[there]).sum(axis=1) == pytest.approx(1)
    activation = table["activation_share"].to_numpy().reshape(60, 7)
    there = ~np.isnan(activation).any(axis=1)
    assert activation[there].sum(axis=1) == pytest.approx(1, abs=1e-4)
    page = tmp_path / "page.html"
    run_command("report", str(tmp_path), "--out", str(page))
    assert "components of the residual stream" in page.read_text()
